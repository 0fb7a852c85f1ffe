package samehost

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

// hammer is a sink that posts the same transfer again whenever it completes, until it is refused.
type hammer struct {
	session backend.Session
	segment backend.Segment
	once    sync.Once
	moved   chan struct{} // closed after the first transfer

	mu      sync.Mutex
	refusal error
}

func (h *hammer) hit() {
	if err := post(h.session, backend.Write, 1, h.segment); err != nil {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.refusal = err
	}
}

func (h *hammer) Complete(backend.Completion) {
	h.once.Do(func() { close(h.moved) })
	h.hit()
}

func startHammer(t testing.TB, p *pair) *hammer {
	t.Helper()
	h := &hammer{segment: backend.Segment{Length: uint64(len(p.near.Bytes))}, moved: make(chan struct{})}
	h.session = bind(t, p.endpoint, 1, p.remote, h)
	h.hit()
	<-h.moved
	return h
}

// wantUntouched fills a region and checks that nobody writes to it while other goroutines and processes have had
// their turn.
func wantUntouched(t testing.TB, b []byte) {
	t.Helper()
	fill(b, 77)
	want := slices.Clone(b)
	for range 100 {
		runtime.Gosched()
	}
	time.Sleep(20 * time.Millisecond)
	wantSame(t, "region after the fence", b, want)
}

func TestFenceInOneProcess(t *testing.T) {
	p := newPair(t, 8*mib)
	other := newInstance(t, peer("c", 3))
	bystander := connect(t, other, p.b.self, p.b)
	h := startHammer(t, p)

	must(t, p.b.Fence(soon(t), peer("a", 2))) // another incarnation: nothing happens
	wantOpen(t, p.endpoint.Done(), "a fence of another incarnation broke the endpoint")
	must(t, p.b.Fence(soon(t), p.a.self))
	wantUntouched(t, p.far.Bytes)
	wantDone(t, p.endpoint.Done())
	must(t, h.session.Close())
	wantCode(t, h.refusal, backend.PathDown)
	wantOpen(t, bystander.Done(), "the fence broke another peer's endpoint")
	// The peer comes back by a new endpoint.
	k := new(sink)
	s := bind(t, connect(t, p.a, p.b.self, p.b), 1, p.remote, k)
	must(t, post(s, backend.Write, 1, backend.Segment{Length: 8 * mib}))
	must(t, k.Wait(t, 1).Err)
}

func TestFenceAcrossProcesses(t *testing.T) {
	const size = 8 * mib
	b := newInstance(t, peer("b", 2))
	far := memory(t, 5, size, all)
	remote := register(t, b, far)
	a := startChild(t, peer("a", 1))
	a.Register(t, regionArgs{ID: 1, Size: size})
	a.ConnectTo(t, b.self, b)
	must(t, a.Call("Hammer", SessionArgs{Local: 1, Remote: remote}, nil))

	// A stopped process may go on writing at any time: the fence must not succeed.
	a.Stop(t)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	wantCode(t, b.Fence(ctx, a.Self), backend.Cancelled)
	wantCode(t, b.Deregister(ctx, 5), backend.Cancelled)

	must(t, a.Signal(syscall.SIGCONT))
	must(t, b.Fence(soon(t), a.Self))
	wantUntouched(t, far.Bytes)
	var code backend.Code
	must(t, a.Call("Ended", uint64(size), &code))
	if code != backend.PathDown {
		t.Errorf("the initiator's posts are refused with %q, want path down", code)
	}
	var counts [2]int
	must(t, a.Call("Counts", nil, &counts))
	if counts[1] != 1 { // its own region
		t.Errorf("the initiator has %d mappings after the fence, want 1", counts[1])
	}
	must(t, b.Deregister(soon(t), 5))
}

func TestFenceOfKilledInitiator(t *testing.T) {
	b := newInstance(t, peer("b", 2))
	far := memory(t, 5, mib, all)
	remote := register(t, b, far)
	a := startChild(t, peer("a", 1))
	a.Register(t, regionArgs{ID: 1, Size: mib})
	a.ConnectTo(t, b.self, b)
	must(t, a.Call("Hammer", SessionArgs{Local: 1, Remote: remote}, nil))
	must(t, a.Kill())
	must(t, b.Fence(soon(t), a.Self))
	wantUntouched(t, far.Bytes)
	must(t, b.Fence(soon(t), a.Self)) // again, and of a peer that is not there
}

// TestStoppedPeerAtClose has Close give up on a peer that does not let go, and say so.
func TestStoppedPeerAtClose(t *testing.T) {
	b, err := openInstance(peer("b", 2), map[string]string{"socket_dir": socketDir(t)})
	must(t, err)
	remote := register(t, b, memory(t, 5, mib, all))
	a := startChild(t, peer("a", 1))
	a.Register(t, regionArgs{ID: 1, Size: mib})
	a.ConnectTo(t, b.self, b)
	must(t, a.Call("Hammer", SessionArgs{Local: 1, Remote: remote}, nil))
	a.Stop(t)
	wantCode(t, b.Close(), backend.Cancelled)
	wantCode(t, b.Close(), backend.Cancelled)
}

func TestTargetKilled(t *testing.T) {
	const size = 16 * mib
	a := newInstance(t, peer("a", 1))
	near := memory(t, 1, size, 0)
	register(t, a, near)
	b := startChild(t, peer("b", 2))
	remote := b.Register(t, regionArgs{ID: 5, Size: size, Rights: all})
	e := connect(t, a, b.Self, b)
	k := new(sink)
	s := bind(t, e, 1, remote, k)

	// When the target dies, one transfer has come to its end in the mover, one was held half way, one has not begun.
	m := moverOf(a)
	m.hold(t)
	segments := []backend.Segment{{Length: mib}, {Local: 8 * mib, Remote: 8 * mib, Length: 8 * mib}}
	for cookie := range uint64(3) {
		must(t, post(s, backend.Write, cookie, segments...))
	}
	b.End()
	wantDone(t, e.Done())
	for cookie, c := range []struct{ finish, want []backend.Outcome }{
		{nil, []backend.Outcome{backend.Failed, backend.Failed}}, // copied to nobody
		{[]backend.Outcome{backend.Done, backend.NotSent}, []backend.Outcome{backend.Failed, backend.NotSent}},
		{[]backend.Outcome{backend.NotSent, backend.NotSent}, []backend.Outcome{backend.NotSent, backend.NotSent}},
	} {
		held := m.next(t).transfer
		if !held.Stopped() {
			t.Errorf("transfer %d was not asked to stop", cookie)
		}
		held.Finish(c.finish, nil)
		got := k.Wait(t, uint64(cookie))
		wantCode(t, got.Err, backend.PathDown)
		wantOutcomes(t, got, c.want...)
	}
	m.release()
	wantCode(t, post(s, backend.Write, 3, segments...), backend.PathDown)
	_, err := e.Session(soon(t), 1, remote, k)
	wantCode(t, err, backend.PathDown)

	// Its successor is reached with a new endpoint, and not by the old descriptor.
	b2 := startChild(t, peer("b", 3))
	remote2 := b2.Register(t, regionArgs{ID: 5, Size: size, Rights: all})
	e2 := connect(t, a, b2.Self, b2)
	_, err = e2.Session(soon(t), 1, remote, k)
	wantCode(t, err, backend.PeerGone)
	s2 := bind(t, e2, 1, remote2, k)
	must(t, post(s2, backend.Write, 4, backend.Segment{Length: 100}))
	must(t, k.Wait(t, 4).Err)
}

// TestTargetKilledUnderWorkers kills the target while workers copy: nobody crashes, and all is accounted for.
func TestTargetKilledUnderWorkers(t *testing.T) {
	const size = 16 * mib
	a := newInstance(t, peer("a", 1), "window=8")
	register(t, a, memory(t, 1, size, 0))
	b := startChild(t, peer("b", 2))
	remote := b.Register(t, regionArgs{ID: 5, Size: size, Rights: all})
	e := connect(t, a, b.Self, b)
	k := new(sink)
	s := bind(t, e, 1, remote, k)
	posted := uint64(0)
	var err error
	for err == nil {
		if err = backendtest.PostWhenFree(s, backend.Write, posted, backend.Segment{Length: size}); err == nil {
			if posted++; posted == 4 {
				must(t, b.Kill())
			}
		}
	}
	wantCode(t, err, backend.PathDown)
	must(t, s.Close())
	all := k.All(t)
	if uint64(len(all)) != posted {
		t.Errorf("%d of %d transfers completed", len(all), posted)
	}
	for _, c := range all {
		if c.Err != nil && (backend.CodeOf(c.Err) != backend.PathDown || slices.Contains(c.Outcomes, backend.Done)) {
			t.Errorf("transfer %d: %v, outcomes %v", c.Cookie, c.Err, c.Outcomes)
		}
	}
}

func TestTargetCloses(t *testing.T) {
	a := newInstance(t, peer("a", 1))
	register(t, a, memory(t, 1, mib, 0))
	b := startChild(t, peer("b", 2))
	remote := b.Register(t, regionArgs{ID: 5, Size: mib, Rights: all})
	e := connect(t, a, b.Self, b)
	s := bind(t, e, 1, remote, new(sink))
	must(t, b.Call("Close", nil, nil))
	wantDone(t, e.Done())
	wantCode(t, post(s, backend.Write, 1, backend.Segment{Length: 1}), backend.PathDown) // the process lives
}

func TestDeregisterRemote(t *testing.T) {
	t.Run("one process", func(t *testing.T) {
		p := newPair(t, 8*mib)
		register(t, p.b, memory(t, 6, 4096, all))
		h := startHammer(t, p)
		must(t, p.b.Deregister(soon(t), 99)) // unknown
		must(t, p.b.Deregister(soon(t), 6))  // held by nobody
		wantOpen(t, p.endpoint.Done(), "the end of a region that the peer does not hold broke its endpoint")
		must(t, p.b.Deregister(soon(t), p.far.Region))
		must(t, p.b.Deregister(soon(t), p.far.Region))
		wantUntouched(t, p.far.Bytes)
		must(t, h.session.Close())
		_, err := connect(t, p.a, p.b.self, p.b).Session(soon(t), 1, p.remote, new(sink))
		wantCode(t, err, backend.BadRequest)
	})
	t.Run("two processes", func(t *testing.T) {
		a, b := newInstance(t, peer("a", 1)), startChild(t, peer("b", 2))
		register(t, a, memory(t, 1, mib, 0))
		gone := b.Register(t, regionArgs{ID: 5, Size: mib, Rights: all})
		stays := b.Register(t, regionArgs{ID: 6, Size: mib, Rights: all})
		e := connect(t, a, b.Self, b)
		for _, r := range []backend.Remote{gone, stays} {
			bind(t, e, 1, r, new(sink))
		}
		must(t, b.Call("Deregister", backend.RegionID(5), nil))
		wantDone(t, e.Done())
		must(t, e.Close())
		if n := moverOf(a).open(); n != 1 {
			t.Errorf("%d regions are left, want the local one alone", n)
		}
		e = connect(t, a, b.Self, b)
		_, err := e.Session(soon(t), 1, gone, new(sink))
		wantCode(t, err, backend.BadRequest)
		bind(t, e, 1, stays, new(sink))
	})
}

func TestDeregisterLocal(t *testing.T) {
	p := newPair(t, 8*mib)
	h := startHammer(t, p)
	must(t, p.a.Deregister(soon(t), p.near.Region))
	wantUntouched(t, p.near.Bytes)
	wantUntouched(t, p.far.Bytes)
	wantCode(t, h.refusal, backend.BadRequest)
	_, err := p.endpoint.Session(soon(t), 1, p.remote, new(sink))
	wantCode(t, err, backend.BadRequest)
	wantOpen(t, p.endpoint.Done(), "the end of a local region broke the endpoint")
}

func TestRegisterRefuses(t *testing.T) {
	i := newInstance(t, peer("a", 1))
	good := memory(t, 1, 4096, all)
	for _, c := range []struct {
		name   string
		change func(*backend.Memory)
		code   backend.Code
	}{
		{"memory of a GPU", func(m *backend.Memory) { m.Kind = backend.GPUMemory }, backend.Unsupported},
		{"host memory with a place on a GPU", func(m *backend.Memory) { m.GPU = new(backend.GPURange) }, backend.BadRequest},
		{"region zero", func(m *backend.Memory) { m.Region = 0 }, backend.BadRequest},
		{"unknown rights", func(m *backend.Memory) { m.Rights = 4 }, backend.BadRequest},
		{"closed descriptor", func(m *backend.Memory) { m.FD = 1 << 20 }, backend.Internal},
	} {
		m := good
		c.change(&m)
		_, err := i.Register(soon(t), m)
		if backend.CodeOf(err) != c.code {
			t.Errorf("%s: got %v, want code %q", c.name, err, c.code)
		}
	}
	key, err := i.Register(soon(t), good)
	must(t, err)
	if len(key) == 0 {
		t.Error("a region with rights has no key")
	}
	_, err = i.Register(soon(t), good)
	wantCode(t, err, backend.BadRequest)
	must(t, i.Deregister(soon(t), 1))
	good.Rights = 0
	key, err = i.Register(soon(t), good)
	must(t, err)
	if key != nil {
		t.Error("a region without rights has a key")
	}
}

// TestNothingLeaks connects and closes many times, in both directions.
func TestNothingLeaks(t *testing.T) {
	dir := socketDir(t)
	self := peer("a", 1)
	b := startChild(t, peer("b", 2))
	remote := b.Register(t, regionArgs{ID: 5, Size: 8192, Rights: all})
	near := memory(t, 1, 8192, all)
	count := func() (here, there [2]int) {
		here, err := held()
		must(t, err)
		must(t, b.Call("Counts", nil, &there))
		return here, there
	}
	cycle := func() {
		i, err := openInstance(self, map[string]string{"socket_dir": dir})
		must(t, err)
		r := register(t, i, near)
		e := connect(t, i, b.Self, b)
		k := new(sink)
		s := bind(t, e, 1, remote, k)
		must(t, post(s, backend.Read, 1, backend.Segment{Length: 8192}))
		must(t, k.Wait(t, 1).Err)
		own := connect(t, i, i.self, i) // to itself: a peer like any other
		bind(t, own, 1, r, k)
		b.ConnectTo(t, i.self, i)
		must(t, b.Call("Session", SessionArgs{Local: 5, Remote: r}, nil))
		must(t, i.Close())
		var code backend.Code
		must(t, b.Call("Ended", uint64(1), &code))
	}
	cycle()
	here, there := count()
	for range 100 {
		cycle()
	}
	// The child's ends of the last connections may take a moment to close.
	what := fmt.Sprintf("%v descriptors and mappings here, and %v there, as before", here, there)
	backendtest.Eventually(t, what, func() bool {
		h, th := count()
		return h == here && th == there
	})
	wantEmpty(t, dir)
}
