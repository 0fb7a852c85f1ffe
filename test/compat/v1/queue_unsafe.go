package main

import (
	"encoding/binary"
	"errors"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

var order = binary.LittleEndian

// queue is one direction of the data path: a page of header, and a ring.
type queue struct {
	ring        []byte
	sent, taken *atomic.Uint64
	sleeping    *atomic.Uint32
	wake        *os.File
	mine        uint64 // this end's own position
	theirs      uint64 // what was read last of the other's
}

var (
	errFull    = errors.New("the queue is full")
	errCorrupt = errors.New("the queue is corrupt")
)

func attachQueue(memory, wake int) (*queue, error) {
	defer unix.Close(memory)
	seals, err := unix.FcntlInt(uintptr(memory), unix.F_GET_SEALS, 0)
	if err != nil || seals&(unix.F_SEAL_SHRINK|unix.F_SEAL_GROW) != unix.F_SEAL_SHRINK|unix.F_SEAL_GROW {
		return nil, errCorrupt
	}
	var info unix.Stat_t
	if err := unix.Fstat(memory, &info); err != nil || info.Size < 8192 {
		return nil, errCorrupt
	}
	m, err := unix.Mmap(memory, 0, int(info.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	capacity := order.Uint64(m[16:])
	if string(m[:8]) != "UMBPQUEU" || order.Uint64(m[8:]) != 1 || capacity != uint64(info.Size)-4096 || capacity&(capacity-1) != 0 {
		return nil, errCorrupt
	}
	return &queue{
		ring:     m[4096:],
		sent:     (*atomic.Uint64)(unsafe.Pointer(&m[64])),
		taken:    (*atomic.Uint64)(unsafe.Pointer(&m[128])),
		sleeping: (*atomic.Uint32)(unsafe.Pointer(&m[192])),
		wake:     os.NewFile(uintptr(wake), "wake"),
	}, nil
}

func (q *queue) capacity() uint64 { return uint64(len(q.ring)) }

func padded(n int) uint64 { return (uint64(n) + 7) &^ 7 }

// send is called by one goroutine.
func (q *queue) send(record []byte) error {
	taken := q.taken.Load()
	if taken%8 != 0 || taken < q.theirs || taken > q.mine {
		return errCorrupt
	}
	q.theirs = taken
	size := 8 + padded(len(record))
	if size > q.capacity()-(q.mine-taken) {
		return errFull
	}
	at := q.mine & (q.capacity() - 1)
	order.PutUint64(q.ring[at:], uint64(len(record)))
	at = (at + 8) & (q.capacity() - 1)
	n := copy(q.ring[at:], record)
	copy(q.ring, record[n:])
	q.mine += size
	q.sent.Store(q.mine)
	if q.sleeping.Load() != 0 && q.sleeping.Swap(0) != 0 {
		if _, err := q.wake.Write(order.AppendUint64(nil, 1)); err != nil && !errors.Is(err, unix.EAGAIN) {
			return err
		}
	}
	return nil
}

// receive hands each record to f, until something is wrong.
func (q *queue) receive(f func([]byte) error) error {
	token := make([]byte, 8)
	for {
		sent := q.sent.Load()
		if sent%8 != 0 || sent-q.mine > q.capacity() {
			return errCorrupt
		}
		if sent == q.mine {
			q.sleeping.Store(1)
			if q.sent.Load() == q.mine {
				if _, err := q.wake.Read(token); err != nil { // the runtime waits until it is readable
					return err
				}
			}
			q.sleeping.Store(0)
			continue
		}
		at := q.mine & (q.capacity() - 1)
		n := order.Uint64(q.ring[at:])
		if n == 0 || n > sent-q.mine-8 {
			return errCorrupt
		}
		record := make([]byte, n)
		at = (at + 8) & (q.capacity() - 1)
		k := copy(record, q.ring[at:])
		copy(record[k:], q.ring)
		q.mine += 8 + padded(int(n))
		q.taken.Store(q.mine)
		if err := f(record); err != nil {
			return err
		}
	}
}
