package core_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/fault"
	"github.com/umbp/umbp/plugin-sdk/reference"
)

// answerer carries offers to an engine in this process.
type answerer struct{ *core.Engine }

func (a answerer) Answer(ctx context.Context, req *peer.AnswerRequest) (*peer.AnswerReply, error) {
	return a.Engine.Answer(ctx, req.From, req.Backend, req.Offer)
}

// pair is two engines that know each other, with a region each, and a session from the first to the second.
type pair struct {
	near, far             *core.Engine
	nearMemory, farMemory []byte
	nearID, farID         backend.RegionID
	remove                func()
	*core.Session
}

// limited has other limits than the backend that it wraps.
type limited struct {
	backend.Backend
	limits backend.Limits
}

func (l limited) Info() backend.Info {
	info := l.Backend.Info()
	info.Capabilities.Limits = l.limits
	return info
}

func newPair(t *testing.T, size int, wrap func(backend.Backend) backend.Backend, opts core.EngineOptions) *pair {
	t.Helper()
	p := &pair{}
	factory := reference.NewNetwork().Factory()
	engine := func(name string, wrap func(backend.Backend) backend.Backend) (*core.Engine, []byte, backend.RegionID) {
		opts := opts
		opts.Node, opts.Rules = name, []selector.Rule{{Require: []string{"reference"}}}
		opts.Backends = []host.Spec{{Factory: factory, Wrap: wrap}}
		e, err := core.NewEngine(t.Context(), opts)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := e.Close(); err != nil {
				t.Error(err)
			}
		})
		r, err := e.Register(t.Context(), &region.Region{
			Kind: backend.HostMemory, Rights: backend.RemoteRead | backend.RemoteWrite, Bytes: make([]byte, size), FD: -1,
		})
		if err != nil {
			t.Fatal(err)
		}
		return e, r.Bytes, r.ID
	}
	p.near, p.nearMemory, p.nearID = engine("near", wrap)
	p.far, p.farMemory, p.farID = engine("far", nil)
	p.remove = p.near.AddPeer(p.far.Self(), answerer{p.far})
	d, err := p.far.Descriptor(p.farID)
	if err != nil {
		t.Fatal(err)
	}
	if p.Session, err = p.near.Open(p.nearID, d); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestSessionBytes compares what sessions move with a copy, byte for byte, over small limits that cut segments.
func TestSessionBytes(t *testing.T) {
	const size = 10_000
	for _, limits := range []backend.Limits{{}, {Segments: 2, SegmentBytes: 700, TransferBytes: 1000}} {
		p := newPair(t, size, func(b backend.Backend) backend.Backend { return limited{b, limits} }, core.EngineOptions{})
		seed := uint64(0)
		rapid.Check(t, func(t *rapid.T) {
			seed += 2
			fill(p.nearMemory, seed)
			fill(p.farMemory, seed+1)
			wantNear, wantFar := bytes.Clone(p.nearMemory), bytes.Clone(p.farMemory)
			// Disjoint on both sides: cut both into as many slots, and pair these at random.
			n := rapid.IntRange(1, 10).Draw(t, "segments")
			slot := size / n
			order := rapid.Permutation(slices.Collect(func(yield func(int) bool) {
				for i := range n {
					if !yield(i) {
						return
					}
				}
			})).Draw(t, "order")
			write := rapid.Bool().Draw(t, "write")
			var segments []backend.Segment
			for i, k := range order {
				length := rapid.IntRange(1, slot).Draw(t, "length")
				s := backend.Segment{Local: uint64(i * slot), Remote: uint64(k*slot + slot - length), Length: uint64(length)}
				segments = append(segments, s)
				if write {
					copy(wantFar[s.Remote:][:s.Length], wantNear[s.Local:])
				} else {
					copy(wantNear[s.Local:][:s.Length], wantFar[s.Remote:])
				}
			}
			call := p.Read
			if write {
				call = p.Write
			}
			r := call(context.Background(), segments)
			if r.Err != nil || r.Fence || r.Path.Node != "far" || r.Path.Backend != "reference" || r.Path.Attempts == 0 {
				t.Fatalf("%+v", r)
			}
			if !slices.Equal(r.Outcomes, slices.Repeat([]backend.Outcome{backend.Done}, n)) {
				t.Fatalf("outcomes %v", r.Outcomes)
			}
			if !bytes.Equal(p.nearMemory, wantNear) || !bytes.Equal(p.farMemory, wantFar) {
				t.Fatal("other bytes than those of a copy")
			}
		})
	}
}

func TestSessionRefuses(t *testing.T) {
	p := newPair(t, 1000, nil, core.EngineOptions{})
	for name, tc := range map[string]struct {
		call     func(context.Context, []backend.Segment) core.Report
		segments []backend.Segment
		words    string
	}{
		"local range":    {p.Write, []backend.Segment{{Length: 1}, {Local: 999, Remote: 5, Length: 2}}, "segment 1: range [999, +2) is not in the local region of 1000 bytes"},
		"remote range":   {p.Read, []backend.Segment{{Remote: 1001, Length: 1}}, "segment 0: range [1001, +1) is not in the remote region"},
		"overflow":       {p.Read, []backend.Segment{{Remote: 1, Length: 1<<64 - 1}}, "is not in the"},
		"empty":          {p.Write, []backend.Segment{{}}, "empty"},
		"remote overlap": {p.Write, []backend.Segment{{Length: 10}, {Local: 20, Remote: 9, Length: 10}}, "the same byte"},
		"local overlap":  {p.Read, []backend.Segment{{Length: 10}, {Local: 9, Remote: 20, Length: 10}}, "the same byte"},
	} {
		fill(p.nearMemory, 1)
		r := tc.call(t.Context(), tc.segments)
		if backend.CodeOf(r.Err) != backend.BadRequest || slices.ContainsFunc(r.Outcomes, func(o backend.Outcome) bool { return o != backend.NotSent }) {
			t.Errorf("%s: %+v", name, r)
		}
		if name != "remote overlap" && name != "local overlap" && name != "empty" {
			says(t, r.Err, tc.words)
		}
	}
	if r := p.Write(t.Context(), nil); r.Err != nil || len(r.Outcomes) != 0 {
		t.Errorf("no segments: %+v", r)
	}
	if !bytes.Equal(p.farMemory, make([]byte, 1000)) {
		t.Error("a refused write has written")
	}
	if _, err := p.near.Open(99, region.Descriptor{}); backend.CodeOf(err) != backend.BadRequest {
		t.Errorf("a session on a region that is not registered: %v", err)
	}
	if _, err := p.near.Descriptor(99); backend.CodeOf(err) != backend.BadRequest {
		t.Errorf("the descriptor of a region that is not registered: %v", err)
	}
}

// TestSessionOutcomes: outcomes come back by the caller's segments, also where these were merged, or cut.
func TestSessionOutcomes(t *testing.T) {
	script := func(text string, limits backend.Limits) func(backend.Backend) backend.Backend {
		return func(b backend.Backend) backend.Backend { return limited{fault.Wrap(b, parse(t, text)), limits} }
	}
	const done, notSent, failed, inDoubt = backend.Done, backend.NotSent, backend.Failed, backend.InDoubt
	one := func(lengths ...uint64) (s []backend.Segment) { // far apart
		for i, n := range lengths {
			s = append(s, backend.Segment{Local: uint64(i) * 100, Remote: uint64(i) * 100, Length: n})
		}
		return s
	}
	for _, tc := range []struct {
		name     string
		wrap     func(backend.Backend) backend.Backend
		segments []backend.Segment
		want     []backend.Outcome
		code     backend.Code
		fence    bool
	}{
		{"sent again", script("complete:off->1*partial(1)", backend.Limits{}), one(10, 10, 10), []backend.Outcome{done, done, done}, 0, true},
		{"refused", script("post:off->error(badrequest)", backend.Limits{}), one(10, 10), []backend.Outcome{notSent, notSent}, backend.BadRequest, false},
		{"failed", script("complete:off->error(badrequest)", backend.Limits{}), one(10, 10), []backend.Outcome{failed, failed}, backend.BadRequest, false},
		{"in doubt", script("complete:off->partial(1)", backend.Limits{}), one(10, 10, 10), []backend.Outcome{done, done, inDoubt}, backend.PathDown, true},
		{"merged", script("complete:off->error(badrequest)", backend.Limits{}),
			[]backend.Segment{{Local: 0, Remote: 0, Length: 10}, {Local: 10, Remote: 10, Length: 10}, {Local: 50, Remote: 70, Length: 5}},
			[]backend.Outcome{failed, failed, failed}, backend.BadRequest, false},
		// Each segment is a transfer of its own; the second of them is refused. The first segment is cut in two.
		{"cut, and half done", script("post:2*off->1*error(badrequest)", backend.Limits{Segments: 1, SegmentBytes: 10}),
			one(20, 10), []backend.Outcome{failed, done}, backend.BadRequest, false},
		{"cut, and nothing sent", script("post:off->2*error(badrequest)", backend.Limits{Segments: 1, SegmentBytes: 10}),
			one(20, 10), []backend.Outcome{notSent, done}, backend.BadRequest, false},
		{"cut, and in doubt", script("complete:off->4*partial(0)", backend.Limits{Segments: 3, SegmentBytes: 10}),
			one(20, 10), []backend.Outcome{inDoubt, inDoubt}, backend.PathDown, true},
		{"cut, and half in doubt", script("complete:off->1*error(badrequest)->2*partial(0)", backend.Limits{Segments: 1, SegmentBytes: 10}),
			one(20), []backend.Outcome{inDoubt}, backend.BadRequest, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t, 1000, tc.wrap, core.EngineOptions{})
			// A first transfer opens the session, so that the others are posted in the order of the plan.
			if r := p.Read(t.Context(), []backend.Segment{{Length: 1}}); r.Err != nil {
				t.Fatal(r.Err)
			}
			r := p.Write(t.Context(), tc.segments)
			if !slices.Equal(r.Outcomes, tc.want) || backend.CodeOf(r.Err) != tc.code || r.Fence != tc.fence {
				t.Errorf("outcomes %v, fence %v, %v; want %v, %v, code %v", r.Outcomes, r.Fence, r.Err, tc.want, tc.fence, tc.code)
			}
		})
	}
}

// TestSessionEnds: deadlines, backends that do not become quiet, and peers and regions that go away.
func TestSessionEnds(t *testing.T) {
	whole := []backend.Segment{{Length: 1000}}
	t.Run("deadline", func(t *testing.T) {
		g := newGate(backend.Write, false)
		p := newPair(t, 1000, func(b backend.Backend) backend.Backend { return gated{b, g} }, core.EngineOptions{})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan core.Report, 1)
		go func() { ended <- p.Write(ctx, whole) }()
		receive(t, g.arrived)
		cancel()
		r := receive(t, ended)
		if backend.CodeOf(r.Err) != backend.Cancelled || r.Outcomes[0] != backend.NotSent || !errors.Is(r.Err, context.Canceled) {
			t.Errorf("%+v", r)
		}
	})
	t.Run("not quiet", func(t *testing.T) {
		g := newGate(backend.Write, true)
		p := newPair(t, 1000, func(b backend.Backend) backend.Backend { return gated{b, g} }, core.EngineOptions{QuietTimeout: time.Millisecond})
		t.Cleanup(g.letThrough)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan core.Report, 1)
		go func() { ended <- p.Write(ctx, whole) }()
		receive(t, g.arrived)
		cancel()
		r := receive(t, ended)
		if r.Err == nil || r.Outcomes[0] != backend.InDoubt || !r.Fence {
			t.Errorf("%+v", r)
		}
	})
	t.Run("region gone", func(t *testing.T) {
		p := newPair(t, 1000, nil, core.EngineOptions{})
		if err := p.near.Deregister(t.Context(), p.nearID); err != nil {
			t.Fatal(err)
		}
		if err := p.near.Deregister(t.Context(), p.nearID); err != nil {
			t.Errorf("the second time: %v", err)
		}
		if r := p.Write(t.Context(), whole); backend.CodeOf(r.Err) != backend.BadRequest {
			t.Errorf("%+v", r)
		}
	})
	t.Run("peer removed", func(t *testing.T) {
		p := newPair(t, 1000, nil, core.EngineOptions{})
		again := p.near.AddPeer(p.far.Self(), answerer{p.far})
		p.remove()
		p.remove()
		if r := p.Write(t.Context(), whole); r.Err != nil {
			t.Errorf("another user has added the peer, too: %v", r.Err)
		}
		again()
		waitUntil(t, func() bool { return p.near.Counters("reference").Endpoints.Load() == 0 })
		r := p.Write(t.Context(), whole)
		if backend.CodeOf(r.Err) != backend.PeerGone {
			t.Errorf("%+v", r)
		}
		says(t, r.Err, "no such peer is known")
	})
	t.Run("to itself", func(t *testing.T) {
		p := newPair(t, 1000, nil, core.EngineOptions{})
		fill(p.nearMemory, 7)
		d, _ := p.near.Descriptor(p.nearID)
		s, err := p.near.Open(p.nearID, d)
		if err != nil {
			t.Fatal(err)
		}
		if r := s.Write(t.Context(), []backend.Segment{{Local: 0, Remote: 500, Length: 500}}); r.Err != nil || !bytes.Equal(p.nearMemory[:500], p.nearMemory[500:]) {
			t.Errorf("%+v", r)
		}
	})
}

// TestSessionConcurrently is for the race detector, and for bytes that end up where another caller's belong.
func TestSessionConcurrently(t *testing.T) {
	const part = 1000
	p := newPair(t, 16*part, nil, core.EngineOptions{})
	fill(p.nearMemory, 1)
	var wg sync.WaitGroup
	for w := range uint64(16) {
		wg.Go(func() {
			for range 50 {
				if r := p.Write(t.Context(), []backend.Segment{{Local: w * part, Remote: (15 - w) * part, Length: part}}); r.Err != nil {
					t.Error(r.Err)
				}
			}
		})
	}
	wg.Wait()
	for w := range 16 {
		if !bytes.Equal(p.nearMemory[w*part:][:part], p.farMemory[(15-w)*part:][:part]) {
			t.Errorf("part %d holds other bytes", w)
		}
	}
}
