package shm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// filled returns a record that is recognised again.
func filled(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed + byte(i)*7
	}
	return b
}

func TestQueue(t *testing.T) {
	s, r := create(t, MinCapacity)
	var room []byte
	// Enough to go round the ring many times, with every length around the multiples of 8.
	for i := range 2000 {
		want := filled(1+i%59, byte(i))
		_, err := s.Send(want)
		must(t, err)
		room, err = r.Receive(room)
		must(t, err)
		if !bytes.Equal(room, want) {
			t.Fatalf("record %d: got % x, want % x", i, room, want)
		}
	}
}

func TestQueueRefusesCapacities(t *testing.T) {
	for _, capacity := range []int{math.MinInt, -1, 0, 1, MinCapacity / 2, MinCapacity + 8, 3 * MinCapacity, MaxCapacity + 8} {
		if q, err := Create(capacity); err == nil {
			t.Errorf("a capacity of %d is accepted", capacity)
			q.Close()
		}
	}
}

func TestQueueRefusesRecords(t *testing.T) {
	s, r := create(t, MinCapacity)
	for _, n := range []int{0, MinCapacity - lengthSize + 1, MinCapacity, 2 * MinCapacity} {
		if _, err := s.Send(make([]byte, n)); err == nil || errors.Is(err, ErrFull) {
			t.Errorf("a record of %d bytes: %v", n, err)
		}
	}
	want := filled(MinCapacity-lengthSize, 3)
	_, err := s.Send(want)
	must(t, err)
	if _, err := s.Send([]byte{1}); err != ErrFull {
		t.Errorf("a full queue: %v", err)
	}
	got, err := r.Receive(nil)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Error("the largest record comes out as another")
	}
	_, err = s.Send([]byte{1})
	must(t, err)
}

// TestQueueModel does what it likes to a queue and to a list.
func TestQueueModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, err := Create(MinCapacity)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		memory, wake := s.Files()
		r, err := Attach(dup(memory), dup(wake))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()

		type sent struct {
			record   []byte
			position uint64
		}
		var waiting []sent
		var all []uint64 // positions
		taken, used := 0, 0
		var room []byte
		t.Repeat(map[string]func(*rapid.T){
			"send": func(t *rapid.T) {
				record := filled(rapid.IntRange(1, 1200).Draw(t, "bytes"), byte(len(all)))
				needs := lengthSize + (len(record)+7)/8*8
				position, err := s.Send(record)
				if fits := used+needs <= MinCapacity; fits != (err == nil) || !fits && err != ErrFull {
					t.Fatalf("%d bytes on top of %d: %v", needs, used, err)
				} else if !fits {
					return
				}
				used += needs
				waiting = append(waiting, sent{record, position})
				all = append(all, position)
			},
			"receive": func(t *rapid.T) {
				if len(waiting) == 0 {
					t.Skip("it would wait")
				}
				got, err := r.Receive(room)
				if err != nil || !bytes.Equal(got, waiting[0].record) {
					t.Fatalf("got %x, %v, want %x", got, err, waiting[0].record)
				}
				room = got
				used -= lengthSize + (len(got)+7)/8*8
				waiting = waiting[1:]
				taken++
			},
			"": func(t *rapid.T) {
				for i, position := range all {
					if s.Taken(position) != (i < taken) {
						t.Fatalf("record %d at %d: taken %v, %d were", i, position, !(i < taken), taken)
					}
				}
			},
		})
	})
}

// TestQueueManySenders lets many goroutines send through a small ring to a receiver that sleeps now and then. No
// record is lost, torn or overtaken by one of the same goroutine.
func TestQueueManySenders(t *testing.T) {
	const senders, each = 8, 2000
	s, r := create(t, MinCapacity)
	var wg sync.WaitGroup
	for id := range senders {
		wg.Go(func() {
			for i := range each {
				record := filled(8+i%200, byte(i))
				binary.LittleEndian.PutUint32(record, uint32(id))
				binary.LittleEndian.PutUint32(record[4:], uint32(i))
				for {
					_, err := s.Send(record)
					if err == nil {
						break
					}
					if err != ErrFull {
						t.Error(err)
						return
					}
					time.Sleep(10 * time.Microsecond)
				}
				if i%100 == 0 {
					time.Sleep(200 * time.Microsecond) // the receiver falls asleep
				}
			}
		})
	}
	var next [senders]int
	var room []byte
	for range senders * each {
		var err error
		room, err = r.Receive(room)
		must(t, err)
		id, i := binary.LittleEndian.Uint32(room), int(binary.LittleEndian.Uint32(room[4:]))
		if i != next[id] || len(room) != 8+i%200 || !bytes.Equal(room[8:], filled(len(room), byte(i))[8:]) {
			t.Fatalf("sender %d: record %d of %d bytes, where record %d comes next", id, i, len(room), next[id])
		}
		next[id]++
	}
	wg.Wait()
}

// TestQueueWakes sends one record at a time to and fro between receivers that never look before they sleep: a wake-up
// that is lost stops the test.
func TestQueueWakes(t *testing.T) {
	there, in := create(t, MinCapacity)
	out, back := create(t, MinCapacity)
	in.receiver.pace.wanted, back.receiver.pace.wanted = math.MaxInt, math.MaxInt
	const trips = 5000
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := echoRecords(in, out, trips); err != nil {
			t.Error(err)
		}
	})
	var room []byte
	for i := range trips {
		_, err := there.Send([]byte{byte(i)})
		must(t, err)
		room, err = back.Receive(room)
		must(t, err)
		if len(room) != 1 || room[0] != byte(i) {
			t.Fatalf("got % x, want %x", room, byte(i))
		}
	}
	wg.Wait()
	if in.receiver.pace.credit != 0 || back.receiver.pace.credit != 0 {
		t.Errorf("they looked before they slept: %+v, %+v", in.receiver.pace, back.receiver.pace)
	}
}

// TestQueueWakesOnlySleepers: sending is no system call unless the receiver sleeps, and many senders wake it once.
func TestQueueWakesOnlySleepers(t *testing.T) {
	s, r := create(t, MinCapacity)
	send := func() {
		t.Helper()
		_, err := s.Send([]byte{1})
		must(t, err)
	}
	send()
	if n := wakesOf(t, s.wake); n != 0 {
		t.Errorf("a receiver that does not sleep is woken %d times", n)
	}
	r.receiver.mu.Lock()
	r.wait(time.Time{}) // it finds the record when it has announced its sleep already
	r.receiver.mu.Unlock()
	send()
	if n := wakesOf(t, s.wake); n != 0 {
		t.Errorf("a receiver that is up again is woken %d times", n)
	}
	s.sleeping.Store(1) // as a receiver does
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(send)
	}
	wg.Wait()
	if n := wakesOf(t, s.wake); n != 1 {
		t.Errorf("a receiver that sleeps is woken %d times", n)
	}
}

// TestQueueSleeps: a receiver with nothing to do ends up asleep, however busy it was before.
func TestQueueSleeps(t *testing.T) {
	s, r := create(t, MinCapacity)
	r.receiver.pace.credit = maxCredit
	received := make(chan error)
	go func() {
		var room []byte
		var err error
		for err == nil {
			if room, err = r.Receive(room); err == nil {
				received <- nil
			}
		}
		received <- err
	}()
	for range 100 {
		_, err := s.Send([]byte{1})
		must(t, err)
		must(t, <-received)
	}
	for s.sleeping.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	must(t, r.Close())
	if err := <-received; err != ErrClosed {
		t.Errorf("a receiver asleep when the queue closes gets %v", err)
	}
}

func TestPace(t *testing.T) {
	p := pace{wanted: minShort}
	const long, short = 10 * shortSleep, shortSleep / 2.0
	nap := func(d float64, n int) {
		for range n {
			p.slept(d)
		}
	}
	expect := func(what string, looks bool) {
		t.Helper()
		if p.looks() != looks {
			t.Fatalf("%s: looks %v, want %v", what, !looks, looks)
		}
	}
	miss := func(n int) {
		for range n {
			p.missed()
		}
	}
	expect("new", false)
	nap(long, 1000)
	expect("idle", false)
	nap(short, minShort-1)
	nap(long, 1)
	nap(short, minShort-1)
	expect("short sleeps between long ones", false)
	nap(short, 1)
	expect("short sleeps in a row", true)
	miss(tryCredit)
	expect("an attempt that failed", false)
	nap(short, 2*minShort-1)
	expect("half as eager", false)
	nap(short, 1)
	expect("the second attempt", true)
	for range 100 {
		p.found()
	}
	miss(maxCredit - 1)
	expect("some misses after many hits", true)
	miss(1)
	expect("too many misses", false)
	nap(short, 2*minShort)
	expect("as eager again as in the beginning", true)
	for range 20 {
		miss(p.credit)
		nap(short, maxShort)
		expect("after the longest pause", true)
	}
}

func TestQueueClose(t *testing.T) {
	s, r := create(t, MinCapacity)
	var positions []uint64
	for range 3 {
		position, err := s.Send([]byte{1})
		must(t, err)
		positions = append(positions, position)
	}
	_, err := r.Receive(nil)
	must(t, err)
	must(t, s.Close())
	must(t, s.Close())
	if _, err := s.Send([]byte{1}); err != ErrClosed {
		t.Errorf("Send: %v", err)
	}
	if _, err := s.Receive(nil); err != ErrClosed {
		t.Errorf("Receive: %v", err)
	}
	for i, position := range positions {
		if s.Taken(position) != (i == 0) {
			t.Errorf("record %d: taken %v", i, i != 0)
		}
	}
	_, err = r.Receive(nil) // the other end does not notice
	must(t, err)
}

// TestQueueCloseAtOnce closes an end in the middle of everything.
func TestQueueCloseAtOnce(t *testing.T) {
	for range 50 {
		s, r := create(t, MinCapacity)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for {
					position, err := s.Send([]byte{1, 2, 3})
					if err == ErrClosed {
						return
					}
					if err == nil {
						s.Taken(position)
					}
				}
			})
		}
		wg.Go(func() {
			var room []byte
			var err error
			for n := 0; err == nil; n++ {
				if room, err = r.Receive(room); n == 100 {
					go r.Close()
					go s.Close()
				}
			}
			if err != ErrClosed {
				t.Error(err)
			}
		})
		wg.Wait()
		must(t, errors.Join(r.Close(), s.Close()))
	}
}

func TestQueueAllocatesNothing(t *testing.T) {
	s, r := create(t, MinCapacity)
	record := filled(100, 1)
	room := make([]byte, 100)
	if n := testing.AllocsPerRun(100, func() {
		position, err := s.Send(record)
		must(t, err)
		room, err = r.Receive(room)
		must(t, err)
		if !s.Taken(position) {
			t.Fatal("not taken")
		}
	}); n != 0 {
		t.Errorf("a record takes %v allocations", n)
	}
}

// memoryFile returns a file with the header of a queue.
func memoryFile(t testing.TB, size int64, seals int, header ...uint64) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("umbp-test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	must(t, err)
	f := os.NewFile(uintptr(fd), "memory")
	must(t, f.Truncate(size))
	for i, word := range header {
		_, err := f.WriteAt(binary.LittleEndian.AppendUint64(nil, word), int64(8*i))
		must(t, err)
	}
	_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals)
	must(t, err)
	return f
}

func TestAttachRefuses(t *testing.T) {
	const size = headerSize + MinCapacity
	good := []uint64{queueMagic, queueVersion, MinCapacity}
	before := held(t)
	for _, c := range []struct {
		memory *os.File
		want   string
	}{
		{memoryFile(t, size, seals, good...), ""},
		{memoryFile(t, size, unix.F_SEAL_SHRINK, good...), "not sealed"},
		{memoryFile(t, size, unix.F_SEAL_GROW, good...), "not sealed"},
		{memoryFile(t, 0, seals), "its file has 0 bytes"},
		{memoryFile(t, headerSize, seals, good...), "its file has 4096 bytes"},
		{memoryFile(t, size+8, seals, good...), "its file has 8200 bytes"},
		{memoryFile(t, headerSize+2*MaxCapacity, seals, queueMagic, queueVersion, 2*MaxCapacity), "its file has"},
		{memoryFile(t, size, seals, 7, queueVersion, MinCapacity), "its header begins with 0x7"},
		{memoryFile(t, size, seals, queueMagic, 2, MinCapacity), "version 2"},
		{memoryFile(t, size, seals, queueMagic, queueVersion, 2*MinCapacity), "says 8192 bytes"},
	} {
		q, err := Attach(c.memory, eventfd(t))
		switch {
		case c.want == "":
			must(t, err)
			must(t, q.Close())
		case !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), c.want):
			t.Errorf("got %v, want an error that says %q", err, c.want)
		}
	}
	regular, err := os.CreateTemp(t.TempDir(), "")
	must(t, err)
	must(t, regular.Truncate(size))
	if _, err := Attach(regular, eventfd(t)); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a regular file: %v", err)
	}
	wake, err := os.CreateTemp(t.TempDir(), "")
	must(t, err)
	if _, err := Attach(memoryFile(t, size, seals, good...), wake); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a wake that cannot be polled: %v", err)
	}
	// The memory files were made before the count.
	if after := held(t); after.leak(before) {
		t.Errorf("before: %+v, after: %+v", before, after)
	}
}

// TestNotInherited: a process that this one starts gets what it is given, and no more.
func TestNotInherited(t *testing.T) {
	s, _ := create(t, MinCapacity)
	memory, wake := s.Files()
	host, plugin, err := NewPassage()
	must(t, err)
	defer plugin.Close()
	defer host.Close()
	conn, err := host.conn.SyscallConn()
	must(t, err)
	check := func(what string, fd uintptr) {
		flags, err := unix.FcntlInt(fd, unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%s would be inherited: flags %#x, %v", what, flags, err)
		}
	}
	check("the memory", memory.Fd())
	check("the eventfd", wake.Fd())
	check("the plugin's end", plugin.Fd())
	must(t, conn.Control(func(fd uintptr) { check("the host's end", fd) }))
}

func TestNothingLeaks(t *testing.T) {
	before := held(t)
	for range 100 {
		s, err := Create(MinCapacity)
		must(t, err)
		r := attach(t, s)
		host, plugin, err := NewPassage()
		must(t, err)
		other, err := OpenPassage(plugin)
		must(t, err)
		memory, wake := s.Files()
		must(t, host.Send(1, memory, wake))
		_, files, err := other.Receive()
		must(t, err)
		third, err := Attach(files[0], files[1])
		must(t, err)
		must(t, errors.Join(s.Close(), r.Close(), third.Close(), host.Close(), other.Close()))
	}
	if after := held(t); after.leak(before) {
		t.Errorf("before: %+v, after: %+v", before, after)
	}
}

// TestRace tells the race detector's view: what was written before Send is seen after Receive.
func TestRace(t *testing.T) {
	s, r := create(t, MinCapacity)
	var shared int
	go func() {
		shared = 1
		if _, err := s.Send([]byte{1}); err != nil {
			t.Error(err)
		}
	}()
	_, err := r.Receive(nil)
	must(t, err)
	if shared != 1 {
		t.Error("received before it was sent")
	}
}

func ExampleQueue() {
	q, err := Create(MinCapacity)
	if err != nil {
		panic(err)
	}
	defer q.Close()
	position, err := q.Send(AppendCancel(nil, Cancel{Session: 1, Cookie: 2}))
	if err != nil {
		panic(err)
	}
	fmt.Println(q.Taken(position))
	// Usually the other process receives.
	record, err := q.Receive(nil)
	if err != nil {
		panic(err)
	}
	cancel, err := ParseCancel(record)
	fmt.Println(cancel, err, q.Taken(position))
	// Output:
	// false
	// {1 2} <nil> true
}
