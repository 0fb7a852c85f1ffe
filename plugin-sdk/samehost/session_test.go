package samehost

import (
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

const mib = 1 << 20

// pair is two connected instances in this process, with one session.
type pair struct {
	a, b      *Instance
	near, far backend.Memory
	remote    backend.Remote
	endpoint  *endpoint
	session   backend.Session
	sink      *sink
}

func newPair(t testing.TB, size int, options ...string) *pair {
	t.Helper()
	p := &pair{
		a:    newInstance(t, peer("a", 1), options...),
		b:    newInstance(t, peer("b", 2)),
		near: memory(t, 1, size, 0), far: memory(t, 2, size, all),
		sink: new(sink),
	}
	register(t, p.a, p.near)
	p.remote = register(t, p.b, p.far)
	p.endpoint = connect(t, p.a, p.b.self, p.b)
	p.session = bind(t, p.endpoint, 1, p.remote, p.sink)
	fill(p.near.Bytes, 1)
	fill(p.far.Bytes, 2)
	return p
}

func TestPostRefuses(t *testing.T) {
	p := newPair(t, 8192)
	segment := func(local, remote, length uint64) []backend.Segment {
		return []backend.Segment{{Length: 1}, {Local: local, Remote: remote, Length: length}}
	}
	for _, c := range []struct {
		name     string
		op       backend.Op
		segments []backend.Segment
		code     backend.Code
		text     string
	}{
		{"no operation", 0, segment(0, 0, 1), backend.Unsupported, "op-0"},
		{"two operations", backend.Write | backend.Read, segment(0, 0, 1), backend.Unsupported, "op-3"},
		{"no segments", backend.Write, nil, backend.BadRequest, "no segments"},
		{"too many segments", backend.Write, make([]backend.Segment, 1<<14+1), backend.BadRequest, "16385 segments"},
		{"empty segment", backend.Write, segment(1, 5, 0), backend.BadRequest, "offset 5 is empty"},
		{"local end", backend.Write, segment(8191, 0, 2), backend.BadRequest, "region 1, range [8191, +2)"},
		{"remote end", backend.Read, segment(0, 8191, 2), backend.BadRequest, "region 2, range [8191, +2)"},
		{"local start", backend.Read, segment(8193, 0, 1), backend.BadRequest, "region 1"},
		{"remote start", backend.Write, segment(0, 8193, 1), backend.BadRequest, "region 2"},
		{"local overflow", backend.Write, segment(math.MaxUint64, 0, 2), backend.BadRequest, "region 1"},
		{"remote overflow", backend.Write, segment(0, math.MaxUint64, 2), backend.BadRequest, "region 2"},
		{"length overflow", backend.Write, segment(1, 1, math.MaxUint64), backend.BadRequest, "region 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := post(p.session, c.op, 1, c.segments...)
			wantCode(t, err, c.code)
			if !strings.Contains(err.Error(), c.text) {
				t.Errorf("error %q does not say %q", err, c.text)
			}
		})
	}
	must(t, p.session.Close())
	wantCode(t, post(p.session, backend.Write, 1, backend.Segment{Length: 1}), backend.BadRequest)
	p.sink.Empty(t)
	wantSame(t, "remote region", p.far.Bytes, backendtest.Filled(8192, 2))
}

func TestWholeRegionFits(t *testing.T) {
	p := newPair(t, 8192)
	must(t, post(p.session, backend.Write, 1, backend.Segment{Length: 8192}))
	must(t, p.sink.Wait(t, 1).Err)
	wantSame(t, "remote region", p.far.Bytes, p.near.Bytes)
}

func TestBusyBeyondWindow(t *testing.T) {
	p := newPair(t, mib, "window=2")
	m := moverOf(p.a)
	m.hold(t)
	g := backend.Segment{Length: 1000}
	must(t, post(p.session, backend.Write, 1, g))
	must(t, post(p.session, backend.Write, 2, g))
	wantCode(t, post(p.session, backend.Write, 3, g), backend.Busy)
	m.step(t)
	must(t, post(p.session, backend.Write, 3, g))
	m.step(t)
	m.step(t)
	for cookie := range uint64(3) {
		must(t, p.sink.Wait(t, cookie+1).Err)
	}
}

// again posts the next transfer from within Complete, as the contract allows.
type again struct {
	session backend.Session
	left    atomic.Int64
	ended   chan error
}

func (a *again) Complete(c backend.Completion) {
	left := a.left.Add(-1)
	if c.Err != nil || left < 0 {
		a.ended <- c.Err
		return
	}
	err := post(a.session, backend.Write, uint64(left), backend.Segment{Length: 1 << 10 << (left % 8)})
	if err != nil {
		a.ended <- err
	}
}

func TestPostWithinComplete(t *testing.T) {
	p := newPair(t, mib, "window=1") // the room is free when Complete is called
	a := &again{ended: make(chan error, 1)}
	a.left.Store(100)
	a.session = bind(t, p.endpoint, 1, p.remote, a)
	must(t, post(a.session, backend.Write, 100, backend.Segment{Length: 1}))
	select {
	case err := <-a.ended:
		must(t, err)
	case <-time.After(backendtest.Patience):
		t.Fatal("the transfers do not end")
	}
}

func TestCancel(t *testing.T) {
	p := newPair(t, 2*mib)
	m := moverOf(p.a)
	m.hold(t)
	before := slices.Clone(p.far.Bytes)
	must(t, post(p.session, backend.Write, 1, backend.Segment{Length: 10}, backend.Segment{Local: mib, Remote: mib, Length: mib}))
	must(t, post(p.session, backend.Write, 2, backend.Segment{Length: mib}))
	p.session.Cancel(99) // unknown: ignored
	p.session.Cancel(1)
	if p.sink.Has(1) {
		t.Fatal("completed before the mover has finished it")
	}
	m.step(t)
	c := p.sink.Wait(t, 1)
	wantCode(t, c.Err, backend.Cancelled)
	wantOutcomes(t, c, backend.NotSent, backend.NotSent)
	wantSame(t, "remote region", p.far.Bytes, before)
	m.step(t)
	must(t, p.sink.Wait(t, 2).Err)

	must(t, post(p.session, backend.Write, 3, backend.Segment{Length: mib})) // it takes the place of one that was stopped
	m.step(t)
	must(t, p.sink.Wait(t, 3).Err)
	wantSame(t, "remote region", p.far.Bytes[:mib], p.near.Bytes[:mib])
}

// TestFinish has the mover end transfers in all ways.
func TestFinish(t *testing.T) {
	failed := []backend.Outcome{backend.Done, backend.Failed}
	for _, c := range []struct {
		name     string
		outcomes []backend.Outcome
		err      *backend.Error
		code     backend.Code
		text     string
		breaks   bool // the endpoint
	}{
		{"all is done", nil, nil, 0, "", false},
		{"was stopped", failed, nil, backend.Cancelled, "copy: cancelled (peer b@2, region 2)", false},
		{"failed", failed, backend.Errorf(backend.Internal, "odd"), backend.Internal, "copy: internal error: odd (peer b@2, region 2)", false},
		{"says more", failed, &backend.Error{Code: backend.Integrity, Region: 9}, backend.Integrity, "copy: integrity violated (peer b@2, region 9)", false},
		{"nothing is known", nil, backend.Errorf(backend.Internal, "odd"), backend.Internal, "odd", false},
		{"the path is down", failed, backend.Errorf(backend.PathDown, "the device is lost"), backend.PathDown, "the device is lost", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, 8192)
			m := moverOf(p.a)
			m.hold(t)
			segments := []backend.Segment{{Length: 10}, {Local: 20, Remote: 20, Length: 10}}
			must(t, post(p.session, backend.Write, 1, segments...))
			must(t, post(p.session, backend.Write, 2, segments...))
			m.next(t).transfer.Finish(slices.Clone(c.outcomes), c.err)
			got := p.sink.Wait(t, 1)
			if backend.CodeOf(got.Err) != c.code || c.code != 0 && !strings.Contains(got.Err.Error(), c.text) {
				t.Errorf("got %v, want code %q and %q", got.Err, c.code, c.text)
			}
			wantOutcomes(t, got, c.outcomes...)
			other := m.next(t).transfer
			if other.Stopped() != c.breaks {
				t.Errorf("the other transfer: stopped %v, want %v", other.Stopped(), c.breaks)
			}
			other.Finish(nil, nil)
			must(t, p.sink.Wait(t, 2).Err) // it came to its end nevertheless
			err := post(p.session, backend.Write, 3, segments...)
			if !c.breaks {
				must(t, err)
				m.step(t)
				must(t, p.sink.Wait(t, 3).Err)
				return
			}
			wantDone(t, p.endpoint.Done())
			wantCode(t, err, backend.PathDown)
			if !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %q", err, c.text)
			}
		})
	}
}

// TestSessionCloseEndsTransfers closes one of two sessions: its transfers complete before Close returns, the
// other's go on.
func TestSessionCloseEndsTransfers(t *testing.T) {
	p := newPair(t, 64*mib)
	k := new(sink)
	other := bind(t, p.endpoint, 1, p.remote, k)
	g := backend.Segment{Length: 64 * mib}
	for cookie := range uint64(4) {
		must(t, post(p.session, backend.Write, cookie, g))
	}
	must(t, post(other, backend.Write, 1, g))
	must(t, p.session.Close())
	must(t, p.session.Close())
	done := p.sink.All(t)
	if len(done) != 4 {
		t.Errorf("%d transfers have completed when Close returns, want 4", len(done))
	}
	for _, c := range done {
		if c.Err != nil && backend.CodeOf(c.Err) != backend.Cancelled {
			t.Errorf("transfer %d: %v", c.Cookie, c.Err)
		}
	}
	must(t, k.Wait(t, 1).Err)
}

func TestEndpointClose(t *testing.T) {
	p := newPair(t, 64*mib)
	for cookie := range uint64(4) {
		must(t, post(p.session, backend.Write, cookie, backend.Segment{Length: 64 * mib}))
	}
	must(t, p.endpoint.Close())
	must(t, p.endpoint.Close())
	if n := len(p.sink.All(t)); n != 4 {
		t.Errorf("%d transfers have completed when Close returns, want 4", n)
	}
	wantDone(t, p.endpoint.Done())
	wantCode(t, post(p.session, backend.Write, 9, backend.Segment{Length: 1}), backend.PathDown)
	_, err := p.endpoint.Session(soon(t), 1, p.remote, p.sink)
	wantCode(t, err, backend.PathDown)
	if len(p.b.guests) != 0 {
		t.Error("the target still counts the endpoint among its guests")
	}
	must(t, p.session.Close())
}

func TestSessionRefuses(t *testing.T) {
	a, b := newInstance(t, peer("a", 1)), newInstance(t, peer("b", 2))
	c := startChild(t, peer("c", 3))
	register(t, a, memory(t, 1, 4096, 0))
	for _, far := range []struct {
		name     string
		endpoint *endpoint
		good     backend.Remote
		closed   backend.Remote
	}{
		{
			"one process", connect(t, a, b.self, b),
			register(t, b, memory(t, 5, 4096, all)),
			register(t, b, memory(t, 6, 4096, 0)),
		},
		{
			"two processes", connect(t, a, c.Self, c),
			c.Register(t, regionArgs{ID: 5, Size: 4096, Rights: all}),
			c.Register(t, regionArgs{ID: 6, Size: 4096}),
		},
	} {
		for _, r := range []struct {
			name   string
			change func(r *backend.Remote, local *backend.RegionID)
			code   backend.Code
		}{
			{"old incarnation", func(r *backend.Remote, _ *backend.RegionID) { r.Peer.Incarnation = 1 }, backend.PeerGone},
			{"other node", func(r *backend.Remote, _ *backend.RegionID) { r.Peer.Node = "x" }, backend.PeerGone},
			{"memory of a GPU", func(r *backend.Remote, _ *backend.RegionID) { r.Kind = backend.GPUMemory }, backend.Unsupported},
			{"no key", func(r *backend.Remote, _ *backend.RegionID) { r.Key = nil }, backend.Denied},
			{"wrong key", func(r *backend.Remote, _ *backend.RegionID) { r.Key[3] ^= 1 }, backend.Denied},
			{"no rights", func(r *backend.Remote, _ *backend.RegionID) {
				r.Region, r.Key = far.closed.Region, make([]byte, 16)
			}, backend.Denied},
			{"unknown remote region", func(r *backend.Remote, _ *backend.RegionID) { r.Region = 77 }, backend.BadRequest},
			{"unknown local region", func(_ *backend.Remote, local *backend.RegionID) { *local = 77 }, backend.BadRequest},
			{"wrong key of a mapped region", func(r *backend.Remote, _ *backend.RegionID) { r.Key[0] ^= 1 }, backend.Denied},
		} {
			t.Run(far.name+"/"+r.name, func(t *testing.T) {
				remote, local := far.good, backend.RegionID(1)
				remote.Key = slices.Clone(remote.Key)
				r.change(&remote, &local)
				_, err := far.endpoint.Session(soon(t), local, remote, new(sink))
				wantCode(t, err, r.code)
			})
		}
		bind(t, far.endpoint, 1, far.good, new(sink))
	}
}

func TestRights(t *testing.T) {
	a, b := newInstance(t, peer("a", 1)), newInstance(t, peer("b", 2))
	child := startChild(t, peer("c", 3))
	register(t, a, memory(t, 1, 8192, 0))
	local, remote := connect(t, a, b.self, b), connect(t, a, child.Self, child)
	for _, c := range []struct {
		name        string
		id          backend.RegionID
		rights      backend.Rights
		write, read backend.Code
	}{
		{"read", 11, backend.RemoteRead, backend.Denied, 0},
		{"write", 12, backend.RemoteWrite, 0, backend.Denied},
		{"both", 13, all, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, way := range []struct {
				e *endpoint
				r backend.Remote
			}{
				{local, register(t, b, memory(t, c.id, 8192, c.rights))},
				{remote, child.Register(t, regionArgs{ID: c.id, Size: 8192, Rights: c.rights})},
			} {
				way.r.Rights = all // what the descriptor claims changes nothing
				k := new(sink)
				s := bind(t, way.e, 1, way.r, k)
				if got := backend.CodeOf(post(s, backend.Write, 1, backend.Segment{Length: 100})); got != c.write {
					t.Errorf("write: got %v, want %v", got, c.write)
				}
				if got := backend.CodeOf(post(s, backend.Read, 2, backend.Segment{Length: 100})); got != c.read {
					t.Errorf("read: got %v, want %v", got, c.read)
				}
				must(t, s.Close())
			}
		})
	}
}

// TestUnclaimedOp posts what the backend does not claim.
func TestUnclaimedOp(t *testing.T) {
	a, err := openInstance(peer("a", 1), map[string]string{"socket_dir": socketDir(t)}, func(s *Settings) {
		s.Info.Capabilities.Ops = backend.Read
	})
	must(t, err)
	closeLater(t, a)
	register(t, a, memory(t, 1, 4096, all))
	k := new(sink)
	s := bind(t, connect(t, a, a.self, a), 1, register(t, a, memory(t, 2, 4096, all)), k)
	wantCode(t, post(s, backend.Write, 1, backend.Segment{Length: 1}), backend.Unsupported)
	must(t, post(s, backend.Read, 1, backend.Segment{Length: 1}))
	must(t, k.Wait(t, 1).Err)
}

// TestLinks has an instance that knows a link from host memory to one GPU, and to no other place.
func TestLinks(t *testing.T) {
	a, err := openInstance(peer("a", 1), map[string]string{"socket_dir": socketDir(t)}, func(s *Settings) {
		s.Info.Capabilities.Remote = backend.Kinds(backend.HostMemory, backend.GPUMemory)
		s.Info.Capabilities.Links = []backend.Link{{Far: "0000:01:00.0"}}
	})
	must(t, err)
	closeLater(t, a)
	register(t, a, memory(t, 1, 4096, 0))
	good := register(t, a, memory(t, 2, 4096, all))
	e := connect(t, a, a.self, a)
	for _, c := range []struct {
		place, text string
	}{
		{"0000:01:00.0", ""},
		{"0000:02:00.0", "no link from host memory to GPU 0000:02:00.0"},
		{"", "no link from host memory to host memory"},
	} {
		r := good
		r.Place = c.place
		_, err := e.Session(soon(t), 1, r, new(sink))
		if c.text == "" {
			must(t, err)
			continue
		}
		wantCode(t, err, backend.Unsupported, c.text)
	}
}

func TestWarmPostsDoNotAllocate(t *testing.T) {
	p := newPair(t, 4*mib)
	moverOf(p.a).inline = true
	done := make(backendtest.Signal, 1)
	s := bind(t, p.endpoint, 1, p.remote, done)
	many := make([]backend.Segment, 1000)
	for i := range many {
		many[i] = backend.Segment{Local: uint64(i) * 4096, Remote: uint64(i) * 4096, Length: 4096}
	}
	allocations := testing.AllocsPerRun(200, func() {
		if err := s.Post(backend.Transfer{Op: backend.Write, Segments: many}); err != nil {
			t.Error(err)
			return
		}
		<-done
	})
	if allocations != 0 {
		t.Errorf("%v allocations for each transfer", allocations)
	}
}
