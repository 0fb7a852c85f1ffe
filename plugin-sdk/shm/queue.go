package shm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Errors of a queue. ErrFull passes; the others stay.
var (
	ErrFull    = errors.New("the queue is full: send again when its receiver has taken something")
	ErrClosed  = errors.New("the queue is closed")
	ErrCorrupt = errors.New("the queue is corrupt: end the process at its other end")
)

// Capacities of a queue, in bytes. A record takes its length, rounded up to a multiple of 8, and 8 bytes more.
const (
	MinCapacity     = 4 << 10
	MaxCapacity     = 1 << 30
	DefaultCapacity = 1 << 20 // room for the largest record twice
)

// The memory of a queue is one page of header, then the ring. What the two ends write is on cache lines of its own,
// so that they do not take them from each other.
const (
	headerSize     = 4096
	magicOffset    = 0
	versionOffset  = 8
	capacityOffset = 16
	sentOffset     = 64  // written by the sender
	takenOffset    = 128 // written by the receiver
	sleepingOffset = 192 // set by the receiver, cleared by whoever is going to wake it

	queueMagic   = 0x5545_5551_5042_4d55 // "UMBPQUEU"
	queueVersion = 1

	lengthSize = 8 // what stands before each record: its length
)

// Queue carries records from one process to another, in order. One end sends and the other receives; which one an
// end is shows in what is called on it. Any number of goroutines may call Send and Taken at the same time, one at a
// time is served by Receive, and Close may be called at any time.
//
// Positions count the bytes that have passed. They begin at zero, only grow, and are multiples of 8. A queue serves
// one sender and one receiver for all of its life: there is no taking over half-way.
type Queue struct {
	memory, wake *os.File
	mapping      []byte // header and ring; nil once closed. Guarded by both mutexes
	ring         []byte
	sharedSent   *atomic.Uint64
	sharedTaken  *atomic.Uint64
	sleeping     *atomic.Uint32 // not zero while the receiver sleeps or is about to

	wakeConn syscall.RawConn
	signal   func(fd uintptr)      // wakes the receiver
	doze     func(fd uintptr) bool // puts the receiver to sleep
	closed   atomic.Bool

	expects func() bool   // see Expect; nil for always
	look    time.Duration // how long the receiver looks before it sleeps, where looking pays
	looks   atomic.Bool   // the receiver sleeps, and would look if it were woken

	sender struct {
		mu    sync.Mutex
		sent  uint64 // what sharedSent must be
		taken uint64 // sharedTaken as it was last read
		err   error  // wraps ErrCorrupt once it has shown
	}
	receiver struct {
		mu     sync.Mutex
		taken  uint64 // what sharedTaken must be
		sent   uint64 // sharedSent as it was last read
		err    error  // wraps ErrCorrupt once it has shown
		dozing bool   // within doze: it has announced its sleep
		pace   pace
	}
}

// Create makes a queue. Capacity is the size of its ring in bytes, a power of two.
func Create(capacity int) (*Queue, error) {
	if !validCapacity(uint64(capacity)) {
		return nil, fmt.Errorf("create a queue: its capacity cannot be %d bytes: give a power of two from %d to %d",
			capacity, MinCapacity, MaxCapacity)
	}
	memory, err := createMemory(headerSize + int64(capacity))
	if err != nil {
		return nil, fmt.Errorf("create the memory of a queue: %w", err)
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create the eventfd of a queue: %w", err), memory.Close())
	}
	q, err := open(memory, os.NewFile(uintptr(fd), "umbp-wake"), headerSize+capacity)
	if err != nil {
		return nil, fmt.Errorf("create a queue: %w", err)
	}
	binary.LittleEndian.PutUint64(q.mapping[magicOffset:], queueMagic)
	binary.LittleEndian.PutUint64(q.mapping[versionOffset:], queueVersion)
	binary.LittleEndian.PutUint64(q.mapping[capacityOffset:], uint64(capacity))
	return q, nil
}

func validCapacity(n uint64) bool {
	return n >= MinCapacity && n <= MaxCapacity && bits.OnesCount64(n) == 1
}

// createMemory makes a file whose size nobody can change: an end that could would make the other die by touching
// what is gone.
func createMemory(size int64) (*os.File, error) {
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING | unix.MFD_NOEXEC_SEAL
	fd, err := unix.MemfdCreate("umbp-queue", flags)
	if errors.Is(err, unix.EINVAL) { // kernels before 6.3 do not know how to forbid executing
		fd, err = unix.MemfdCreate("umbp-queue", flags&^unix.MFD_NOEXEC_SEAL)
	}
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	if err = unix.Ftruncate(fd, size); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals|unix.F_SEAL_SEAL)
	}
	if err != nil {
		return nil, errors.Join(os.NewSyscallError("sizing and sealing", err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "umbp-queue"), nil
}

// seals are those that an end insists on.
const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW

// Attach opens the other end of a queue whose files came from the process that created it. It takes them over: they
// are closed when it fails, or with the queue. What does not look like a queue is refused with ErrCorrupt.
func Attach(memory, wake *os.File) (*Queue, error) {
	size, err := checkMemory(memory)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("attach a queue: %w", err), memory.Close(), wake.Close())
	}
	q, err := open(memory, wake, size)
	if err != nil {
		return nil, fmt.Errorf("attach a queue: %w", err)
	}
	if err := q.checkHeader(); err != nil {
		return nil, errors.Join(fmt.Errorf("attach a queue: %w", err), q.Close())
	}
	return q, nil
}

// checkMemory returns the size of a file that can be mapped without danger.
func checkMemory(memory *os.File) (size int, err error) {
	info, err := memory.Stat()
	if err != nil {
		return 0, err
	}
	if n := info.Size() - headerSize; n < 0 || !validCapacity(uint64(n)) {
		return 0, fmt.Errorf("%w: its file has %d bytes, which is no header and a power of two", ErrCorrupt, info.Size())
	}
	conn, err := memory.SyscallConn()
	if err != nil {
		return 0, err
	}
	var has int
	var getErr error
	if err := conn.Control(func(fd uintptr) { has, getErr = unix.FcntlInt(fd, unix.F_GET_SEALS, 0) }); err != nil {
		return 0, err
	}
	if getErr != nil || has&seals != seals {
		return 0, fmt.Errorf("%w: its file is not sealed against changes of its size", ErrCorrupt)
	}
	return int(info.Size()), nil
}

func (q *Queue) checkHeader() error {
	magic := binary.LittleEndian.Uint64(q.mapping[magicOffset:])
	version := binary.LittleEndian.Uint64(q.mapping[versionOffset:])
	capacity := binary.LittleEndian.Uint64(q.mapping[capacityOffset:])
	switch {
	case magic != queueMagic:
		return fmt.Errorf("%w: its header begins with %#x", ErrCorrupt, magic)
	case version != queueVersion:
		return fmt.Errorf("%w: its layout has version %d, and this end knows version %d", ErrCorrupt, version, queueVersion)
	case capacity != uint64(len(q.ring)):
		return fmt.Errorf("%w: its header says %d bytes, and its ring has %d", ErrCorrupt, capacity, len(q.ring))
	}
	return nil
}

// open maps a queue. It takes the files over.
func open(memory, wake *os.File, size int) (*Queue, error) {
	q, err := openFiles(memory, wake, size)
	if err != nil {
		return nil, errors.Join(err, memory.Close(), wake.Close())
	}
	return q, nil
}

func openFiles(memory, wake *os.File, size int) (*Queue, error) {
	q := &Queue{memory: memory, wake: wake, look: DefaultLook}
	// What Go cannot poll it would read with a blocked thread, which Close cannot wake.
	if err := wake.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("%w: its eventfd cannot be polled: %w", ErrCorrupt, err)
	}
	var err error
	if q.wakeConn, err = wake.SyscallConn(); err != nil {
		return nil, err
	}
	conn, err := memory.SyscallConn()
	if err != nil {
		return nil, err
	}
	var mapErr error
	err = conn.Control(func(fd uintptr) {
		q.mapping, mapErr = unix.Mmap(int(fd), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	})
	if err := errors.Join(err, os.NewSyscallError("mmap", mapErr)); err != nil {
		return nil, err
	}
	q.ring = q.mapping[headerSize:]
	q.sharedSent = word64(q.mapping, sentOffset)
	q.sharedTaken = word64(q.mapping, takenOffset)
	q.sleeping = word32(q.mapping, sleepingOffset)

	// Made once, because each would be an allocation where it is used.
	one := binary.NativeEndian.AppendUint64(nil, 1)
	q.signal = func(fd uintptr) {
		_, _ = unix.Write(int(fd), one) // the only way to fail is that the count is full: it is readable then
	}
	q.doze = q.dozeOn
	q.receiver.pace.wanted = minShort
	return q, nil
}

// Files returns what the other end attaches: the memory and the eventfd. They stay the queue's.
func (q *Queue) Files() (memory, wake *os.File) { return q.memory, q.wake }

// Send appends a record and returns the position behind it, for Taken. It does not block, and keeps nothing of the
// record. ErrFull says that there is no room now. A record that can never fit is refused with another error.
func (q *Queue) Send(record []byte) (position uint64, err error) {
	position, asleep, err := q.put(record)
	if asleep {
		// Out of the mutex, so that other senders do not wait for the system call. It fails when the queue is
		// closed: nobody needs to be woken then.
		_ = q.wakeConn.Control(q.signal)
	}
	return position, err
}

func (q *Queue) put(record []byte) (position uint64, asleep bool, err error) {
	s := &q.sender
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case q.closed.Load():
		return 0, false, ErrClosed
	case s.err != nil:
		return 0, false, s.err
	}
	capacity := uint64(len(q.ring))
	if len(record) == 0 || uint64(len(record)) > capacity-lengthSize {
		return 0, false, fmt.Errorf("a record of %d bytes does not fit into a queue of %d", len(record), capacity)
	}
	size := recordSize(uint64(len(record)))
	if size > capacity-(s.sent-s.taken) {
		if err := q.readTaken(); err != nil {
			return 0, false, err
		}
		if size > capacity-(s.sent-s.taken) {
			return 0, false, ErrFull
		}
	}
	at := s.sent & (capacity - 1)
	binary.LittleEndian.PutUint64(q.ring[at:], uint64(len(record)))
	at = (at + lengthSize) & (capacity - 1)
	copy(q.ring, record[copy(q.ring[at:], record):])
	s.sent += size
	raceRelease()
	q.sharedSent.Store(s.sent)
	// One of the senders wakes the receiver, once for each time that it sleeps.
	return s.sent, q.sleeping.Load() != 0 && q.sleeping.Swap(0) != 0, nil
}

// recordSize returns how much of the ring a record of n bytes takes.
func recordSize(n uint64) uint64 { return lengthSize + (n+7)&^7 }

// readTaken learns how far the receiver has come. The caller holds sender.mu.
func (q *Queue) readTaken() error {
	s := &q.sender
	taken := q.sharedTaken.Load()
	if taken-s.taken > s.sent-s.taken || taken%8 != 0 {
		s.err = fmt.Errorf("%w: its receiver is at position %d, which is not between %d and %d", ErrCorrupt, taken, s.taken, s.sent)
		return s.err
	}
	s.taken = taken
	return nil
}

// Taken tells whether the receiver has taken the record before the position that Send returned. It may be asked
// after Close. A receiver that has died before it took a record has not acted on it; Taken says so for certain only
// once its process has ended. Of a corrupt queue everything counts as taken.
func (q *Queue) Taken(position uint64) bool {
	s := &q.sender
	s.mu.Lock()
	defer s.mu.Unlock()
	if q.mapping != nil && position > s.taken && s.err == nil {
		_ = q.readTaken() // what it returns is kept
	}
	return position <= s.taken || s.err != nil
}

// Receive returns the next record, waiting for one. The record is in buf, or in a new slice where buf's capacity is
// too small: callers pass back what they got. ErrClosed and ErrCorrupt end it for good.
func (q *Queue) Receive(buf []byte) (record []byte, err error) {
	return q.ReceiveUntil(buf, time.Time{})
}

// ReceiveUntil is Receive, but gives up with os.ErrDeadlineExceeded when nothing has come by the deadline; the zero time
// is none.
func (q *Queue) ReceiveUntil(buf []byte, deadline time.Time) (record []byte, err error) {
	r := &q.receiver
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		switch {
		case q.closed.Load():
			return nil, ErrClosed
		case r.err != nil:
			return nil, r.err
		case r.sent != r.taken:
			return q.take(buf)
		case q.sharedSent.Load() == r.taken:
			if !q.wait(deadline) {
				return buf, os.ErrDeadlineExceeded
			}
		default:
			q.readSent()
		}
	}
}

// Expect has the receiver ask, before it looks for a record instead of sleeping, whether one is likely to come, and look
// for so long then. Otherwise it looks for DefaultLook whenever that has paid before. Expect is called before the first
// Receive.
func (q *Queue) Expect(likely func() bool, look time.Duration) { q.expects, q.look = likely, look }

// Nudge says that a record is likely to come soon from now on. It wakes a receiver that sleeps, if looking has paid
// before. It does not block, and any goroutine may call it.
func (q *Queue) Nudge() {
	if q.looks.Load() {
		_ = q.wakeConn.Control(q.signal) // as in Send
	}
}

// readSent learns how far the sender has come. The caller holds receiver.mu.
func (q *Queue) readSent() {
	r := &q.receiver
	sent := q.sharedSent.Load()
	if sent-r.taken > uint64(len(q.ring)) || sent%8 != 0 {
		r.err = fmt.Errorf("%w: its sender is at position %d, which is not within %d bytes of %d", ErrCorrupt, sent, len(q.ring), r.taken)
		return
	}
	r.sent = sent
}

// take copies the next record out of the ring: what is judged later is not what the sender can still change.
func (q *Queue) take(buf []byte) (record []byte, err error) {
	r := &q.receiver
	raceAcquire()
	mask := uint64(len(q.ring)) - 1
	at := r.taken & mask
	n := binary.LittleEndian.Uint64(q.ring[at:])
	if n == 0 || n > r.sent-r.taken-lengthSize {
		r.err = fmt.Errorf("%w: the record at position %d has %d bytes, and the sender is at %d", ErrCorrupt, r.taken, n, r.sent)
		return nil, r.err
	}
	if uint64(cap(buf)) < n {
		buf = make([]byte, n)
	}
	record = buf[:n]
	at = (at + lengthSize) & mask
	copy(record[copy(record, q.ring[at:]):], q.ring)
	r.taken += recordSize(n)
	q.sharedTaken.Store(r.taken)
	return record, nil
}

// Close ends Send and Receive, the waiting ones too, and frees the queue once they have returned. The other end does
// not notice. Closing twice is not an error.
func (q *Queue) Close() error {
	if q.closed.Swap(true) {
		return nil
	}
	err := q.wake.Close() // wakes Receive
	q.receiver.mu.Lock()
	defer q.receiver.mu.Unlock()
	q.sender.mu.Lock()
	defer q.sender.mu.Unlock()
	if q.sender.taken < q.sender.sent && q.sender.err == nil {
		_ = q.readTaken() // the last chance, for Taken
	}
	unmapped := unix.Munmap(q.mapping)
	q.mapping, q.ring, q.sharedSent, q.sharedTaken, q.sleeping = nil, nil, nil, nil, nil
	return errors.Join(err, unmapped, q.memory.Close())
}
