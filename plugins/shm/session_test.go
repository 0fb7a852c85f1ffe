package shm

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
	"github.com/umbp/umbp/plugin-sdk/samehost"
)

const mib = 1 << 20

// pair is two connected instances in this process, with one session.
type pair struct {
	a, b      *instance
	near, far backend.Memory
	remote    backend.Remote
	endpoint  backend.Endpoint
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

// byHand takes the workers away, so that a test decides when a part is copied. One comes back when the test ends,
// lest a failed test wait for ever.
func (i *instance) byHand(t testing.TB) {
	i.mover.copier.close()
	i.mover.copier = startCopier(0)
	t.Cleanup(func() { i.mover.copier.workers.Go(i.mover.copier.run) })
}

// step does what a worker does in one round.
func (i *instance) step(t testing.TB) {
	t.Helper()
	c := i.mover.copier
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.queue.after == &c.queue {
		t.Fatal("no transfer is queued")
	}
	c.advance(c.queue.after)
}

// TestInlineCompletesInPost relies on nobody else: there are no workers.
func TestInlineCompletesInPost(t *testing.T) {
	p := newPair(t, mib, "inline_bytes=4096")
	p.a.byHand(t)
	must(t, post(p.session, backend.Write, 1, backend.Segment{Length: 4096}))
	if !p.sink.Has(1) {
		t.Error("a transfer of inline_bytes has not completed when Post returns")
	}
	must(t, post(p.session, backend.Write, 2, backend.Segment{Length: 4097}))
	if p.sink.Has(2) {
		t.Error("a transfer beyond inline_bytes completed within Post")
	}
	p.a.step(t)
	must(t, p.sink.Wait(t, 2).Err)
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
	c := p.sink.Wait(t, 2)
	wantCode(t, c.Err, backend.Cancelled)
	wantOutcomes(t, c, backend.NotSent)
	wantSame(t, "remote region", p.far.Bytes, before)
	p.a.step(t)
	must(t, p.sink.Wait(t, 1).Err)
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
			if p.sink.Has(1) {
				t.Fatal("completed within Cancel")
			}
			p.a.step(t)
			c := p.sink.Wait(t, 1)
			wantCode(t, c.Err, backend.Cancelled)
			wantOutcomes(t, c, backend.Done, backend.Failed, backend.NotSent)
			backendtest.Model(op, wantNear, wantFar, backend.Segment{Length: mib / 2}, backend.Segment{Local: mib, Remote: mib, Length: mib})
			wantSame(t, "local region", p.near.Bytes, wantNear)
			wantSame(t, "remote region", p.far.Bytes, wantFar)

			must(t, post(p.session, op, 2, segments...)) // the cursor of the reused transfer is as new
			for range 3 {
				p.a.step(t)
			}
			must(t, p.sink.Wait(t, 2).Err)
			backendtest.Model(op, wantNear, wantFar, segments...)
			wantSame(t, "local region", p.near.Bytes, wantNear)
			wantSame(t, "remote region", p.far.Bytes, wantFar)
		})
	}
}

// TestParts takes a transfer apart: the parts are whole, in order, and no piece of a long segment is short.
func TestParts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		length := rapid.OneOf(rapid.Uint64Range(1, 5000), rapid.Uint64Range(mib-2, 5*mib), rapid.Just[uint64](2*mib))
		x, c := new(samehost.Transfer), new(cursor)
		for _, n := range rapid.SliceOfN(length, 1, 3000).Draw(t, "lengths") {
			x.Segments = append(x.Segments, backend.Segment{Length: n})
		}
		next, offset := 0, uint64(0)
		for p := c.take(x); p.bytes > 0; p = c.take(x) {
			if p.first != next || p.offset != offset {
				t.Fatalf("part %+v does not start at segment %d, offset %d", p, next, offset)
			}
			if p.bytes >= 3*partBytes || c.next-p.first > partSegments {
				t.Fatalf("part %+v is too large", p)
			}
			for left := p.bytes; left > 0; {
				n := min(left, x.Segments[next].Length-offset)
				if n < partBytes && n < x.Segments[next].Length {
					t.Fatalf("a piece of %d bytes of segment %d of %d", n, next, x.Segments[next].Length)
				}
				left -= n
				if offset += n; offset == x.Segments[next].Length {
					next, offset = next+1, 0
				}
			}
		}
		if next != len(x.Segments) || c.next != next {
			t.Fatalf("the parts end at segment %d of %d", next, len(x.Segments))
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
		c := p.sink.Wait(t, cookie)
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
			remote := connect(t, a, b.Self, b)
			own := protections(t)
			for _, way := range []struct {
				e backend.Endpoint
				r backend.Remote
			}{{local, register(t, here, far)}, {remote, b.Register(t, regionArgs{ID: c.id, Size: 8192, Rights: c.rights})}} {
				way.r.Rights = all // what the descriptor claims changes nothing
				k := new(sink)
				s := bind(t, way.e, 1, way.r, k)
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

// TestWithoutDescriptor shows the one thing that needs a file: another process.
func TestWithoutDescriptor(t *testing.T) {
	b := newInstance(t, peer("b", 2))
	far := memory(t, 5, 4096, all)
	far.FD = -1
	remote := register(t, b, far)

	a := newInstance(t, peer("a", 1))
	register(t, a, memory(t, 1, 4096, 0))
	k := new(sink)
	s := bind(t, connect(t, a, b.self, b), 1, remote, k)
	must(t, post(s, backend.Write, 1, backend.Segment{Length: 4096}))
	must(t, k.Wait(t, 1).Err)

	c := startChild(t, peer("c", 3))
	elsewhere := c.Register(t, regionArgs{ID: 5, Size: 4096, Rights: all, Bare: true})
	_, err := connect(t, a, c.Self, c).Session(soon(t), 1, elsewhere, k)
	wantCode(t, err, backend.Unsupported, "without a file descriptor")
}

func TestWarmPostsDoNotAllocate(t *testing.T) {
	p := newPair(t, 4*mib)
	done := make(backendtest.Signal, 1)
	s := bind(t, p.endpoint, 1, p.remote, done)
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
