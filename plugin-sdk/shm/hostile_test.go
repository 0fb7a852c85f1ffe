package shm

import (
	"encoding/binary"
	"errors"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// step is what the hostile end does next, read from fuzzed bytes.
func step(script *[]byte) (op byte, n uint64, ok bool) {
	if len(*script) < 9 {
		return 0, 0, false
	}
	op, n = (*script)[0], binary.LittleEndian.Uint64((*script)[1:])
	*script = (*script)[9:]
	return op, n, true
}

func script(steps ...uint64) (b []byte) {
	for i := 0; i < len(steps); i += 2 {
		b = append(b, byte(steps[i]))
		b = binary.LittleEndian.AppendUint64(b, steps[i+1])
	}
	return b
}

// TestCorrupt: the receiver says what is wrong, and where.
func TestCorrupt(t *testing.T) {
	for _, c := range []struct {
		sent   uint64
		length uint64
		want   string // empty for a record
	}{
		{16, 8, ""},
		{16, 1, ""},
		{MinCapacity, MinCapacity - 8, ""},
		{12, 4, "its sender is at position 12,"},
		{MinCapacity + 8, 8, "its sender is at position 4104, which is not within 4096 bytes of 0"},
		{1<<64 - 8, 8, "its sender is at position 18446744073709551608,"},
		{16, 0, "the record at position 0 has 0 bytes"},
		{16, 9, "the record at position 0 has 9 bytes, and the sender is at 16"},
		{16, 1<<64 - 1, "the record at position 0 has 18446744073709551615 bytes"},
		{8, 1, "the record at position 0 has 1 bytes, and the sender is at 8"},
	} {
		s, r := create(t, MinCapacity)
		binary.LittleEndian.PutUint64(s.ring, c.length)
		s.sharedSent.Store(c.sent)
		record, err := r.Receive(nil)
		switch {
		case c.want == "" && (err != nil || uint64(len(record)) != c.length):
			t.Errorf("%+v: a record of %d bytes, %v", c, len(record), err)
		case c.want != "" && (!errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), c.want)):
			t.Errorf("got %v, want an error that says %q", err, c.want)
		}
	}
}

// FuzzHostileSender writes what it likes where a sender may write. The receiver gets records that lay in the ring, or
// ErrCorrupt for good.
func FuzzHostileSender(f *testing.F) {
	const sent, ring, wake, honest = 0, 1, 2, 3
	f.Add(script(honest, 8, honest, 3000, sent, 1<<63, honest, 1))
	f.Add(script(ring, 24<<32, sent, 32))             // an honest record
	f.Add(script(ring, 25<<32, sent, 32))             // one that is longer than what was sent
	f.Add(script(ring, 0xffffffff<<32, sent, 32))     // and much longer
	f.Add(script(sent, 32))                           // an empty one
	f.Add(script(sent, 12))                           // between records
	f.Add(script(sent, MinCapacity+8))                // more than the ring holds
	f.Add(script(honest, 1, honest, 1, sent, 8))      // back
	f.Add(script(wake, 0, wake, 1, sent, ^uint64(7))) // far ahead
	f.Fuzz(func(t *testing.T, b []byte) {
		s, r := create(t, MinCapacity)
		var broken error
		var room []byte
		for op, n, ok := step(&b); ok; op, n, ok = step(&b) {
			switch op % 4 {
			case sent:
				s.sharedSent.Store(n)
			case ring:
				binary.LittleEndian.PutUint64(s.ring[n%(MinCapacity/8)*8:], n>>32)
			case wake:
				s.sleeping.Store(uint32(n))
				must(t, s.wakeConn.Control(s.signal))
			case honest:
				_, _ = s.Send(make([]byte, n%MinCapacity))
			}
			if r.receiver.sent == r.receiver.taken && s.sharedSent.Load() == r.receiver.taken && broken == nil {
				continue // Receive would wait
			}
			record, err := r.Receive(room)
			switch {
			case broken != nil && err != broken:
				t.Fatalf("after %v: %v", broken, err)
			case err == nil && (len(record) == 0 || len(record) > MinCapacity-lengthSize):
				t.Fatalf("a record of %d bytes", len(record))
			case err != nil && !errors.Is(err, ErrCorrupt):
				t.Fatal(err)
			}
			if err == nil {
				room = record
			}
			broken = err
		}
	})
}

// FuzzHostileReceiver writes what it likes where a receiver may write. The sender never overwrites what it has not
// seen taken, and finds out.
func FuzzHostileReceiver(f *testing.F) {
	const taken, sleeping, send = 0, 1, 2
	f.Add(script(send, 2000, send, 2000, taken, 2008, send, 2000))
	f.Add(script(send, 2000, send, 2000, taken, 1, send, 2000))
	f.Add(script(send, 4000, taken, 1<<40, send, 2000))
	f.Add(script(send, 4000, taken, 4008, send, 4000, taken, 8, send, 4000))
	f.Add(script(sleeping, 0xffff, send, 1, sleeping, 1, send, 1, taken, ^uint64(0), send, 4000))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, r := create(t, MinCapacity)
		var broken error
		var sent, free uint64 = 0, MinCapacity // free: the end of what the receiver has ever given back
		for op, n, ok := step(&b); ok; op, n, ok = step(&b) {
			switch op % 3 {
			case taken:
				r.sharedTaken.Store(n)
			case sleeping:
				r.sleeping.Store(uint32(n))
			case send:
				if n := r.sharedTaken.Load(); n <= sent {
					free = max(free, n+MinCapacity)
				}
				position, err := s.Send(make([]byte, 1+n%(MinCapacity-lengthSize)))
				switch {
				case broken != nil && err != broken:
					t.Fatalf("after %v: %v", broken, err)
				case err == nil && position > free:
					t.Fatalf("sent up to %d, where only %d are free", position, free)
				case err == nil:
					sent = position
				case err != ErrFull && !errors.Is(err, ErrCorrupt):
					t.Fatal(err)
				}
				if errors.Is(err, ErrCorrupt) {
					broken = err
				}
			}
			if broken != nil && !s.Taken(sent) {
				t.Fatal("of a corrupt queue a record counts as not taken")
			}
		}
	})
}

// FuzzAttach opens files with any header.
func FuzzAttach(f *testing.F) {
	f.Add(uint64(queueMagic), uint64(queueVersion), uint64(MinCapacity), uint32(headerSize+MinCapacity), seals)
	f.Add(uint64(queueMagic), uint64(queueVersion), uint64(MinCapacity), uint32(headerSize), seals)
	f.Add(uint64(queueMagic), uint64(queueVersion), uint64(1<<63), uint32(headerSize+8*MinCapacity), seals)
	f.Add(uint64(0), uint64(0), uint64(0), uint32(0), 0)
	f.Fuzz(func(t *testing.T, magic, version, capacity uint64, size uint32, sealed int) {
		size %= 1 << 24
		sealed &= seals
		header := []uint64{magic, version, capacity}
		if size < 24 {
			header = nil
		}
		q, err := Attach(memoryFile(t, int64(size), sealed, header...), eventfd(t))
		good := magic == queueMagic && version == queueVersion && sealed == seals &&
			size >= headerSize+MinCapacity && capacity == uint64(size-headerSize) && capacity&(capacity-1) == 0
		switch {
		case good != (err == nil):
			t.Fatalf("attached: %v", err)
		case err == nil:
			must(t, q.Close())
		case !errors.Is(err, ErrCorrupt):
			t.Fatal(err)
		}
	})
}

// TestHostileWake: an end that keeps the count of the eventfd full stops nobody.
func TestHostileWake(t *testing.T) {
	s, r := create(t, MinCapacity)
	received := make(chan error)
	go func() {
		for {
			_, err := r.Receive(nil)
			if received <- err; err != nil {
				return
			}
		}
	}()
	full := binary.NativeEndian.AppendUint64(nil, 1<<64-2)
	for range 100 {
		for s.sleeping.Load() == 0 {
			runtime.Gosched()
		}
		if _, err := unix.Write(int(s.wake.Fd()), full); err != nil && err != unix.EAGAIN {
			t.Fatal(err)
		}
		_, err := s.Send([]byte{1})
		must(t, err)
		must(t, <-received)
	}
	must(t, r.Close())
	if err := <-received; err != ErrClosed {
		t.Error(err)
	}
}
