package gpusim

import (
	"bytes"
	"slices"
	"testing"
)

// TestRefuse refuses each kind of call.
func TestRefuse(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, s *Sim, r *rt) {
		p, stream, e, host := r.alloc(100), r.stream(), r.event(), pages(t, 100)
		for call, c := range map[Call]struct {
			code int
			name string
			args []any
		}{
			Copies:        {unknown, "MemcpyAsync", []any{p, p + 50, 10, anyKind, stream}},
			Allocations:   {outOfMemory, "Malloc", []any{new(uintptr), 100}},
			Exports:       {unknown, "IpcGetMemHandle", []any{new([8]uintptr), p}},
			Registrations: {unknown, "HostRegister", []any{addressOf(host), 100, 0}},
			Streams:       {unknown, "StreamCreateWithFlags", []any{new(uintptr), 1}},
			Events:        {unknown, "EventCreateWithFlags", []any{new(uintptr), 2}},
			Records:       {unknown, "EventRecord", []any{e, stream}},
			Peers:         {unknown, "DeviceEnablePeerAccess", []any{1, 0}},
		} {
			s.SetFaults(Fault{Call: call})
			r.answers(c.code, c.name, c.args...)
			s.SetFaults(Fault{Call: call, From: s.Devices[1].PCI, Code: 5}, Fault{Call: call, From: s.Devices[0].PCI, Code: 6})
			r.answers(6, c.name, c.args...)
		}
		s.SetFaults(Fault{Call: Imports, Code: 7})
		if code := r.importHandle(new(uintptr), &[8]uintptr{}); code != r.either(invalidPointer, invalidValue) {
			t.Errorf("a handle that is none: %d", code)
		}
		c := startChild(t, s)
		_, h := c.exported(0)
		if code := r.importHandle(new(uintptr), &h); code != 7 {
			t.Errorf("import answers %d, want 7", code)
		}
		r.must("StreamDestroy", stream)
		r.must("EventDestroy", e)
		r.must("Free", p)
	})
}

// TestCounting checks After and Times, and that a new edition counts anew.
func TestCounting(t *testing.T) {
	s := New(t, Machine{})
	r := open(t, s)
	p, stream := r.alloc(100), r.stream()
	struck := func(n int) (numbers []int) {
		for i := range n {
			if r.call("MemcpyAsync", p, p+50, 10, anyKind, stream) != 0 {
				numbers = append(numbers, i)
			}
		}
		return numbers
	}
	for _, c := range []struct {
		faults []Fault
		want   []int
	}{
		{nil, nil},
		{[]Fault{{}}, []int{0, 1, 2, 3, 4}},
		{[]Fault{{After: 2}}, []int{2, 3, 4}},
		{[]Fault{{After: 1, Times: 2}}, []int{1, 2}},
		{[]Fault{{Times: 1}, {After: 3, Times: 1}}, []int{0, 3}},
		{[]Fault{{Times: 1}, {After: 3, Times: 1}}, []int{0, 3}},
		{[]Fault{{From: Host}, {To: Host}, {From: s.Devices[1].PCI}}, nil},
		{[]Fault{{From: s.Devices[0].PCI, To: s.Devices[0].PCI, After: 4}}, []int{4}},
	} {
		s.SetFaults(c.faults...)
		if got := struck(5); !slices.Equal(got, c.want) {
			t.Errorf("%+v struck %v, want %v", c.faults, got, c.want)
		}
	}
	r.must("StreamSynchronize", stream)
	r.must("StreamDestroy", stream)
	r.must("Free", p)
}

// TestFail fails a copy when its turn comes.
func TestFail(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, s *Sim, r *rt) {
		p, stream, before, after := r.alloc(100), r.stream(), r.event(), r.event()
		r.store(p, []byte{1, 2, 3, 4})
		s.SetFaults(Fault{Effect: Fail, After: 1, Times: 1, Code: 5})
		r.must("MemcpyAsync", p+10, p, 1, anyKind, stream)
		r.must("EventRecord", before, stream)
		r.must("MemcpyAsync", p+11, p+1, 1, anyKind, stream)
		r.must("MemcpyAsync", p+12, p+2, 1, anyKind, stream)
		r.must("EventRecord", after, stream)
		r.awaits(5, after)
		r.must("EventQuery", before)
		r.answers(5, "StreamSynchronize", stream)
		r.must("StreamSynchronize", stream)
		r.must("EventRecord", after, stream)
		r.awaits(0, after)
		if got := r.load(p+10, 3); !bytes.Equal(got, []byte{1, 0, 3}) {
			t.Errorf("copied %v", got)
		}
		// Where the caller waits anyhow, it is told at once.
		s.SetFaults(Fault{Effect: Fail, Code: 5})
		r.answers(5, "MemcpyAsync", p, pages(t, 10), 10, anyKind, stream)
		r.must("StreamSynchronize", stream)
		r.must("EventDestroy", before)
		r.must("EventDestroy", after)
		r.must("StreamDestroy", stream)
		r.must("Free", p)
	})
}

// TestLose loses one of two devices while copies of another of its streams stall.
func TestLose(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, s *Sim, r *rt) {
		p, stream, stuck, e := r.alloc(100), r.stream(), r.stream(), r.event()
		host := pages(t, 100)
		r.must("HostRegister", addressOf(host), 100, 0)
		r.must("SetDevice", 1)
		q := r.alloc(100)
		r.must("SetDevice", 0)
		r.must("DeviceEnablePeerAccess", 1, 0)
		r.store(p, []byte{1, 2, 3, 4})
		s.SetFaults(Fault{Effect: Stall, Times: 1}, Fault{Effect: Lose, After: 2})
		r.must("MemcpyAsync", p+10, p, 1, anyKind, stuck)
		r.must("MemcpyAsync", q, p, 1, anyKind, stream)
		r.must("MemcpyAsync", q+1, p+1, 1, anyKind, stream)
		r.call("MemcpyAsync", q+2, p+2, 1, anyKind, stream)
		r.answers(launchFailure, "StreamSynchronize", stream)
		r.answers(launchFailure, "StreamSynchronize", stuck)
		s.SetFaults()

		for call, args := range map[string][]any{
			"MemcpyAsync":           {p, p + 1, 1, anyKind, stream},
			"Memcpy":                {host, p, 1, anyKind},
			"Malloc":                {new(uintptr), 100},
			"StreamCreateWithFlags": {new(uintptr), 1},
			"EventRecord":           {e, stream},
			"EventQuery":            {e},
			"IpcGetMemHandle":       {new([8]uintptr), p},
			"StreamSynchronize":     {0},
		} {
			r.answers(launchFailure, call, args...)
		}
		// The other device goes on, but for the memory of the lost one.
		r.must("SetDevice", 1)
		if got := r.load(q, 3); !bytes.Equal(got, []byte{1, 0, 0}) {
			t.Errorf("copied %v", got)
		}
		r.must("DeviceEnablePeerAccess", 0, 0)
		r.answers(launchFailure, "Memcpy", q, p, 1, anyKind)
		r.must("Free", q)
		r.must("SetDevice", 0)
		// What is destroyed is let go all the same.
		r.answers(launchFailure, "HostUnregister", addressOf(host))
		r.answers(launchFailure, "EventDestroy", e)
		r.answers(launchFailure, "StreamDestroy", stream)
		r.answers(launchFailure, "StreamDestroy", stuck)
		r.answers(launchFailure, "Free", p)
	})
}

// TestCorrupt changes one byte of each copy between one pair of places.
func TestCorrupt(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, s *Sim, r *rt) {
		const size = 1000
		p, stream := r.alloc(2*size), r.stream()
		host := pages(t, size)
		s.SetFaults(Fault{Effect: Corrupt, From: s.Devices[0].PCI, To: Host})
		for _, c := range []struct {
			to, from uintptr
			wrong    int
		}{{p + size, p, 0}, {p, addressOf(host), 0}, {addressOf(host), p, 1}} {
			r.store(c.from, bytes.Repeat([]byte{7}, size))
			r.must("MemcpyAsync", c.to, c.from, size, anyKind, stream)
			r.must("StreamSynchronize", stream)
			if wrong := size - bytes.Count(r.load(c.to, size), []byte{7}); wrong != c.wrong {
				t.Errorf("%d bytes are wrong, want %d", wrong, c.wrong)
			}
		}
		r.must("StreamDestroy", stream)
		r.must("Free", p)
	})
}

// TestSlow checks that a copy that takes longer than the test holds its stream up.
func TestSlow(t *testing.T) {
	s := New(t, Machine{Rate: 1 << 40})
	r := open(t, s)
	p, stream, e := r.alloc(100), r.stream(), r.event()
	s.SetFaults(Fault{Effect: Slow, Rate: 1, Times: 1})
	r.must("MemcpyAsync", p, p+50, 50, anyKind, stream) // fifty seconds
	r.must("EventRecord", e, stream)
	r.answers(notReady, "EventQuery", e)
	// The copy ends with the process.
	r.must("StreamDestroy", stream)
}
