package shm

import (
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

const mib = 1 << 20

// pair is two connected instances in this process, with one session.
type pair struct {
	a, b      *instance
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
		sink: newSink(),
	}
	register(t, p.a, p.near)
	p.remote = register(t, p.b, p.far)
	p.endpoint = connect(t, p.a, p.b.self, p.b)
	var err error
	p.session, err = p.endpoint.Session(soon(t), 1, p.remote, p.sink)
	must(t, err)
	fill(p.near.Bytes, 1)
	fill(p.far.Bytes, 2)
	return p
}

// byHand takes the workers away, so that a test decides when a part is copied. One comes back when the test ends,
// lest a failed test wait for ever.
func (i *instance) byHand(t testing.TB) {
	i.copier.close()
	i.copier = startCopier(0)
	t.Cleanup(func() { i.copier.workers.Go(i.copier.run) })
}

// step does what a worker does in one round.
func (i *instance) step(t testing.TB) {
	t.Helper()
	c := i.copier
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.queue.after == &c.queue {
		t.Fatal("no transfer is queued")
	}
	c.advance(c.queue.after)
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
		{"too many segments", backend.Write, make([]backend.Segment, maxSegments+1), backend.BadRequest, "16385 segments"},
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
	if len(p.sink.got) != 0 {
		t.Errorf("refused transfers completed: %v", p.sink.got)
	}
	want := make([]byte, 8192)
	fill(want, 2)
	wantSame(t, "remote region", p.far.Bytes, want)
}

func TestWholeRegionFits(t *testing.T) {
	p := newPair(t, 8192)
	must(t, post(p.session, backend.Write, 1, backend.Segment{Length: 8192}))
	must(t, p.sink.wait(t, 1).Err)
	wantSame(t, "remote region", p.far.Bytes, p.near.Bytes)
}

// TestInlineCompletesInPost relies on nobody else: there are no workers.
func TestInlineCompletesInPost(t *testing.T) {
	p := newPair(t, mib, "inline_bytes=4096")
	p.a.byHand(t)
	must(t, post(p.session, backend.Write, 1, backend.Segment{Length: 4096}))
	if _, ok := p.sink.has(1); !ok {
		t.Error("a transfer of inline_bytes has not completed when Post returns")
	}
	must(t, post(p.session, backend.Write, 2, backend.Segment{Length: 4097}))
	if _, ok := p.sink.has(2); ok {
		t.Error("a transfer beyond inline_bytes completed within Post")
	}
	p.a.step(t)
	must(t, p.sink.wait(t, 2).Err)
}

func TestBusyBeyondWindow(t *testing.T) {
	p := newPair(t, mib, "window=2", "inline_bytes=16")
	p.a.byHand(t)
	g := backend.Segment{Length: 1000}
	must(t, post(p.session, backend.Write, 1, g))
	must(t, post(p.session, backend.Write, 2, g))
	wantCode(t, post(p.session, backend.Write, 3, g), backend.Busy)
	wantCode(t, post(p.session, backend.Write, 3, backend.Segment{Length: 1}), backend.Busy)
	p.a.step(t)
	must(t, post(p.session, backend.Write, 3, g))
	p.a.step(t)
	p.a.step(t)
	for cookie := range uint64(3) {
		must(t, p.sink.wait(t, cookie+1).Err)
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
	var err error
	a.session, err = p.endpoint.Session(soon(t), 1, p.remote, a)
	must(t, err)
	must(t, post(a.session, backend.Write, 100, backend.Segment{Length: 1}))
	select {
	case err := <-a.ended:
		must(t, err)
	case <-time.After(patience):
		t.Fatal("the transfers do not end")
	}
}

func TestCancelQueued(t *testing.T) {
	p := newPair(t, 2*mib)
	p.a.byHand(t)
	before := slices.Clone(p.far.Bytes)
	must(t, post(p.session, backend.Write, 1, backend.Segment{Length: mib}))
	must(t, post(p.session, backend.Write, 2, backend.Segment{Local: mib, Remote: mib, Length: mib}))
	p.session.Cancel(99) // unknown: ignored
	p.session.Cancel(2)
	p.a.step(t) // what is cancelled goes first
	c := p.sink.wait(t, 2)
	wantCode(t, c.Err, backend.Cancelled)
	if want := []backend.Outcome{backend.NotSent}; !slices.Equal(c.Outcomes, want) {
		t.Errorf("outcomes %v, want %v", c.Outcomes, want)
	}
	wantSame(t, "remote region", p.far.Bytes, before)
	p.a.step(t)
	must(t, p.sink.wait(t, 1).Err)
}

// TestCancelInFlight cancels after the first part of three segments: the first is done, the second half copied.
func TestCancelInFlight(t *testing.T) {
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		t.Run(op.String(), func(t *testing.T) {
			p := newPair(t, 4*mib)
			p.a.byHand(t)
			segments := []backend.Segment{
				{Length: mib / 2},
				{Local: mib, Remote: mib, Length: 2 * mib},
				{Local: 3 * mib, Remote: 3 * mib, Length: mib},
			}
			wantNear, wantFar := slices.Clone(p.near.Bytes), slices.Clone(p.far.Bytes)
			must(t, post(p.session, op, 1, segments...))
			p.a.step(t)
			p.session.Cancel(1)
			if _, ok := p.sink.has(1); ok {
				t.Fatal("completed within Cancel")
			}
			p.a.step(t)
			c := p.sink.wait(t, 1)
			wantCode(t, c.Err, backend.Cancelled)
			want := []backend.Outcome{backend.Done, backend.Failed, backend.NotSent}
			if !slices.Equal(c.Outcomes, want) {
				t.Fatalf("outcomes %v, want %v", c.Outcomes, want)
			}
			naive(op, wantNear, wantFar, []backend.Segment{{Length: mib / 2}, {Local: mib, Remote: mib, Length: mib}})
			wantSame(t, "local region", p.near.Bytes, wantNear)
			wantSame(t, "remote region", p.far.Bytes, wantFar)

			must(t, post(p.session, op, 2, segments...)) // the cursor of the reused transfer is as new
			for range 3 {
				p.a.step(t)
			}
			must(t, p.sink.wait(t, 2).Err)
			naive(op, wantNear, wantFar, segments)
			wantSame(t, "local region", p.near.Bytes, wantNear)
			wantSame(t, "remote region", p.far.Bytes, wantFar)
		})
	}
}

// TestParts takes a transfer apart: the parts are whole, in order, and no piece of a long segment is short.
func TestParts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		length := rapid.OneOf(rapid.Uint64Range(1, 5000), rapid.Uint64Range(mib-2, 5*mib), rapid.Just[uint64](2*mib))
		x := new(transfer)
		for _, n := range rapid.SliceOfN(length, 1, 3000).Draw(t, "lengths") {
			x.segments = append(x.segments, backend.Segment{Length: n})
		}
		next, offset := 0, uint64(0)
		for p := x.take(); p.bytes > 0; p = x.take() {
			if p.first != next || p.offset != offset {
				t.Fatalf("part %+v does not start at segment %d, offset %d", p, next, offset)
			}
			if p.bytes >= 3*partBytes || x.next-p.first > partSegments {
				t.Fatalf("part %+v is too large", p)
			}
			for left := p.bytes; left > 0; {
				n := min(left, x.segments[next].Length-offset)
				if n < partBytes && n < x.segments[next].Length {
					t.Fatalf("a piece of %d bytes of segment %d of %d", n, next, x.segments[next].Length)
				}
				left -= n
				if offset += n; offset == x.segments[next].Length {
					next, offset = next+1, 0
				}
			}
		}
		if next != len(x.segments) || x.next != next {
			t.Fatalf("the parts end at segment %d of %d", next, len(x.segments))
		}
	})
}

// TestCancelRaces cancels against running workers: whatever is reported, the bytes agree with it.
func TestCancelRaces(t *testing.T) {
	const pages, page = 128, 64 << 10
	p := newPair(t, pages*page, "workers=3")
	for cookie := range uint64(10) {
		fill(p.near.Bytes, 10+cookie)
		fill(p.far.Bytes, 100+cookie)
		before := slices.Clone(p.far.Bytes)
		var segments []backend.Segment
		for i := range uint64(pages) {
			segments = append(segments, backend.Segment{Local: i * page, Remote: i * page, Length: page})
		}
		must(t, post(p.session, backend.Write, cookie, segments...))
		p.session.Cancel(cookie)
		c := p.sink.wait(t, cookie)
		if c.Err == nil {
			wantSame(t, "remote region", p.far.Bytes, p.near.Bytes)
			continue
		}
		wantCode(t, c.Err, backend.Cancelled)
		for i, o := range c.Outcomes {
			got := p.far.Bytes[i*page:][:page]
			switch o {
			case backend.Done:
				wantSame(t, "a done segment", got, p.near.Bytes[i*page:][:page])
			case backend.NotSent:
				wantSame(t, "a segment not sent", got, before[i*page:][:page])
			case backend.InDoubt:
				t.Errorf("segment %d is in doubt", i)
			}
		}
	}
}

// TestSessionCloseEndsTransfers closes one of two sessions: its transfers complete before Close returns, the
// other's go on.
func TestSessionCloseEndsTransfers(t *testing.T) {
	p := newPair(t, 64*mib)
	k := newSink()
	other, err := p.endpoint.Session(soon(t), 1, p.remote, k)
	must(t, err)
	g := backend.Segment{Length: 64 * mib}
	for cookie := range uint64(4) {
		must(t, post(p.session, backend.Write, cookie, g))
	}
	must(t, post(other, backend.Write, 1, g))
	must(t, p.session.Close())
	must(t, p.session.Close())
	if len(p.sink.got) != 4 {
		t.Errorf("%d transfers have completed when Close returns, want 4", len(p.sink.got))
	}
	for cookie, c := range p.sink.got {
		if c.Err != nil && backend.CodeOf(c.Err) != backend.Cancelled {
			t.Errorf("transfer %d: %v", cookie, c.Err)
		}
	}
	must(t, k.wait(t, 1).Err)
}

func TestEndpointClose(t *testing.T) {
	p := newPair(t, 64*mib)
	for cookie := range uint64(4) {
		must(t, post(p.session, backend.Write, cookie, backend.Segment{Length: 64 * mib}))
	}
	must(t, p.endpoint.Close())
	must(t, p.endpoint.Close())
	if len(p.sink.got) != 4 {
		t.Errorf("%d transfers have completed when Close returns, want 4", len(p.sink.got))
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

func TestRights(t *testing.T) {
	a, b := newInstance(t, peer("a", 1)), startChild(t, peer("b", 2))
	here := newInstance(t, peer("c", 3))
	near := memory(t, 1, 8192, 0)
	register(t, a, near)
	for _, c := range []struct {
		name        string
		id          backend.RegionID
		rights      backend.Rights
		write, read backend.Code
		protection  string
	}{
		{"read", 11, backend.RemoteRead, backend.Denied, 0, "r--s"},
		{"write", 12, backend.RemoteWrite, 0, backend.Denied, "rw-s"},
		{"both", 13, all, 0, 0, "rw-s"},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := protections(t)
			far := memory(t, c.id, 8192, c.rights)
			local := connect(t, a, here.self, here)
			remote := connect(t, a, b.self, b)
			own := protections(t)
			for _, way := range []struct {
				e *endpoint
				r backend.Remote
			}{{local, register(t, here, far)}, {remote, b.register(t, RegionArgs{ID: c.id, Size: 8192, Rights: c.rights})}} {
				way.r.Rights = all // what the descriptor claims changes nothing
				k := newSink()
				s, err := way.e.Session(soon(t), 1, way.r, k)
				must(t, err)
				if got := backend.CodeOf(post(s, backend.Write, 1, backend.Segment{Length: 100})); got != c.write {
					t.Errorf("write: got %v, want %v", got, c.write)
				}
				if got := backend.CodeOf(post(s, backend.Read, 2, backend.Segment{Length: 100})); got != c.read {
					t.Errorf("read: got %v, want %v", got, c.read)
				}
			}
			want := append(own, c.protection)
			slices.Sort(want)
			if got := protections(t); !slices.Equal(got, want) {
				t.Errorf("mappings have the permissions %v, want %v", got, want)
			}
			must(t, remote.Close())
			must(t, local.Close())
			if got := protections(t); len(got) != len(before)+1 {
				t.Errorf("mappings %v remain, before there were %v", got, before)
			}
		})
	}
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
			"two processes", connect(t, a, c.self, c),
			c.register(t, RegionArgs{ID: 5, Size: 4096, Rights: all}),
			c.register(t, RegionArgs{ID: 6, Size: 4096}),
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
				_, err := far.endpoint.Session(soon(t), local, remote, newSink())
				wantCode(t, err, r.code)
			})
		}
		_, err := far.endpoint.Session(soon(t), 1, far.good, newSink())
		must(t, err)
	}
}

// TestWithoutDescriptor shows the one thing that needs a file: another process.
func TestWithoutDescriptor(t *testing.T) {
	b := newInstance(t, peer("b", 2))
	far := memory(t, 5, 4096, all)
	far.FD = -1
	remote := register(t, b, far)

	a := newInstance(t, peer("a", 1))
	register(t, a, memory(t, 1, 4096, 0))
	k := newSink()
	s, err := connect(t, a, b.self, b).Session(soon(t), 1, remote, k)
	must(t, err)
	must(t, post(s, backend.Write, 1, backend.Segment{Length: 4096}))
	must(t, k.wait(t, 1).Err)

	c := startChild(t, peer("c", 3))
	c.register(t, RegionArgs{ID: 1, Size: 4096})
	c.connectTo(t, b)
	err = c.call("Hammer", HammerArgs{Local: 1, Remote: remote}, &Nothing{})
	if err == nil || !strings.Contains(err.Error(), "without a file descriptor") {
		t.Errorf("got %v, want a refusal that names the missing file descriptor", err)
	}
}

func TestWarmPostsDoNotAllocate(t *testing.T) {
	p := newPair(t, 4*mib)
	done := make(signal, 1)
	s, err := p.endpoint.Session(soon(t), 1, p.remote, done)
	must(t, err)
	many := make([]backend.Segment, 1000)
	for i := range many {
		many[i] = backend.Segment{Local: uint64(i) * 4096, Remote: uint64(i) * 4096, Length: 4096}
	}
	for _, c := range []struct {
		name     string
		segments []backend.Segment
	}{
		{"inline", many[:1]},
		{"by workers", many},
	} {
		allocations := testing.AllocsPerRun(200, func() {
			if err := s.Post(backend.Transfer{Op: backend.Write, Segments: c.segments}); err != nil {
				t.Error(err)
				return
			}
			<-done
		})
		if allocations != 0 {
			t.Errorf("%s: %v allocations for each transfer", c.name, allocations)
		}
	}
}

// signal is a sink that passes on only that something completed.
type signal chan error

func (s signal) Complete(c backend.Completion) { s <- c.Err }
