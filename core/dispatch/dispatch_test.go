package dispatch_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/umbp/umbp/core/dispatch"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

var (
	pathDown  = backend.ErrPathDown
	cancelled = backend.ErrCancelled
)

func TestGroupsOverlap(t *testing.T) {
	f := newFake("a", 8)
	r := newRig(t, dispatch.Options{}, f)
	j := r.job(backend.Write, peerX, 1, 2, 3)
	ended := r.run(t.Context(), j)
	var flying []*posted
	for range 3 { // all are under way before the first has completed
		flying = append(flying, f.next(t))
	}
	total := 0
	for _, p := range flying {
		total += len(p.Segments)
		p.done()
	}
	r.wait(ended)
	if total != 6 {
		t.Errorf("%d segments were posted, want 6", total)
	}
	one := dispatch.Result{Attempts: 1}
	r.check(j, outcomes(backend.Done, 6), one, one, one)
	c := r.Counters(0)
	if c.Transfers.Load() != 3 || c.Segments.Load() != 6 || c.Bytes.Load() != 75 || c.Failures.Load() != 0 || c.Connects.Load() != 1 || c.Endpoints.Load() != 1 {
		t.Errorf("counters: %d transfers, %d segments, %d bytes, %d failures, %d connects, %d endpoints", c.Transfers.Load(),
			c.Segments.Load(), c.Bytes.Load(), c.Failures.Load(), c.Connects.Load(), c.Endpoints.Load())
	}
}

func TestEmptyPlan(t *testing.T) {
	r := newRig(t, dispatch.Options{}, newFake("a", 1))
	j := r.job(backend.Read, peerX)
	r.wait(r.run(t.Context(), j))
	r.check(j, nil)
}

// TestWindow: no more transfers are in flight than the window says; the others follow, in order, as completions
// come.
func TestWindow(t *testing.T) {
	f := newFake("a", 2)
	r := newRig(t, dispatch.Options{}, f)
	warm(r, f)
	j := r.job(backend.Write, peerX, 1, 1, 1, 1, 1)
	ended := r.run(t.Context(), j)
	first, second := f.next(t), f.next(t)
	for i := 2; i < 5; i++ {
		f.nothing(t)
		first.done()
		first, second = second, f.next(t)
		if !slices.Equal(second.Segments, segments(i)) {
			t.Errorf("transfer %d carries %v", i, second.Segments)
		}
	}
	first.done()
	second.done()
	r.wait(ended)
	one := dispatch.Result{Attempts: 1}
	r.check(j, outcomes(backend.Done, 5), one, one, one, one, one)
}

// warm opens the session of the jobs to peerX, so that they post from the caller's goroutine, in order.
func warm(r *rig, f *fake) {
	r.t.Helper()
	ended := r.run(r.t.Context(), r.job(backend.Write, peerX, 1))
	f.next(r.t).done()
	r.wait(ended)
}

// TestBusyWithNothingOutstanding: no completion will come that tells when there is room, so time does.
func TestBusyWithNothingOutstanding(t *testing.T) {
	f := newFake("a", 4)
	busy := []error{backend.ErrBusy, &backend.Error{Code: backend.Busy, RetryAfter: time.Microsecond}, backend.ErrBusy}
	var mu sync.Mutex
	f.onPost = func(*posted) error {
		mu.Lock()
		defer mu.Unlock()
		if len(busy) == 0 {
			return nil
		}
		err := busy[0]
		busy = busy[1:]
		return err
	}
	r := newRig(t, dispatch.Options{}, f)
	j := r.job(backend.Write, peerX, 1, 1)
	ended := r.run(t.Context(), j)
	f.next(t).done()
	f.next(t).done()
	r.wait(ended)
	one := dispatch.Result{Attempts: 1} // Busy is no attempt
	r.check(j, outcomes(backend.Done, 2), one, one)
}

// TestBusyWithSomeOutstanding: the backend has room for less than its window, and says so; each completion makes
// room for one more.
func TestBusyWithSomeOutstanding(t *testing.T) {
	f := newFake("a", 8)
	room := make(chan struct{}, 8)
	room <- struct{}{}
	f.onPost = func(*posted) error {
		select {
		case <-room:
			return nil
		default:
			return &backend.Error{Code: backend.Busy, RetryAfter: time.Hour} // who relies on time waits for long
		}
	}
	r := newRig(t, dispatch.Options{}, f)
	j := r.job(backend.Write, peerX, 1, 1, 1, 1)
	ended := r.run(t.Context(), j)
	for range 4 {
		p := f.next(t)
		f.nothing(t)
		room <- struct{}{}
		p.done()
	}
	r.wait(ended)
	one := dispatch.Result{Attempts: 1}
	r.check(j, outcomes(backend.Done, 4), one, one, one, one)
}

// TestCompletionDuringABusyPost: the completion that makes room comes before the group is back in the queue, and is
// the last one to come.
func TestCompletionDuringABusyPost(t *testing.T) {
	f := newFake("a", 2)
	r := newRig(t, dispatch.Options{}, f)
	warm(r, f)
	for _, window := range []int{1, 2} { // from the caller's Post, and from that of a completion
		var flying []*posted
		blocker := r.job(backend.Write, peerX, slices.Repeat([]int{1}, window)...)
		blockerEnded := r.run(t.Context(), blocker)
		for range window {
			flying = append(flying, f.next(t))
		}
		var once sync.Once
		f.onPost = func(*posted) (err error) {
			once.Do(func() {
				flying[len(flying)-1].done()
				err = &backend.Error{Code: backend.Busy, RetryAfter: time.Hour}
			})
			return err
		}
		j := r.job(backend.Read, peerX, 1)
		ended := r.run(t.Context(), j)
		if window == 2 {
			waitQueued(r, 1)
			flying[0].done()
		}
		f.next(t).done()
		r.wait(ended)
		r.wait(blockerEnded)
		f.onPost = nil
	}
}

func TestQueueIsBounded(t *testing.T) {
	f := newFake("a", 1)
	r := newRig(t, dispatch.Options{MaxQueued: 1}, f)
	warm(r, f)
	flying, waiting, refused := r.job(backend.Write, peerX, 1), r.job(backend.Write, peerX, 1), r.job(backend.Write, peerX, 1)
	flyingEnded := r.run(t.Context(), flying)
	p := f.next(t)
	waitingEnded := r.run(t.Context(), waiting)
	waitQueued(r, 1)
	r.wait(r.run(t.Context(), refused))
	r.check(refused, outcomes(backend.NotSent, 1), dispatch.Result{Attempts: 1, Err: backend.ErrBusy})
	p.done()
	f.next(t).done()
	r.wait(flyingEnded)
	r.wait(waitingEnded)
	r.check(waiting, outcomes(backend.Done, 1), dispatch.Result{Attempts: 1})
}

// TestRefusedPostPassesItsCreditOn: a transfer waits for the only credit, and the one that held it is refused by the
// backend: no completion will come.
func TestRefusedPostPassesItsCreditOn(t *testing.T) {
	for _, refusal := range []error{backend.ErrBadRequest, backend.ErrUnsupported} {
		f := newFake("a", 1)
		r := newRig(t, dispatch.Options{}, f)
		warm(r, f)
		posting, answer := make(chan struct{}), make(chan error)
		f.onPost = func(p *posted) error {
			if p.Op == backend.Read {
				return nil
			}
			close(posting)
			return <-answer
		}
		bad := r.job(backend.Write, peerX, 1)
		badEnded := r.run(t.Context(), bad)
		receive(t, posting)
		good := r.job(backend.Read, peerX, 1, 1)
		goodEnded := r.run(t.Context(), good)
		waitQueued(r, 2)
		answer <- refusal
		r.wait(badEnded)
		f.next(t).done()
		f.next(t).done()
		r.wait(goodEnded)
		r.check(bad, outcomes(backend.NotSent, 1), dispatch.Result{Attempts: 1, Err: refusal})
		one := dispatch.Result{Attempts: 1}
		r.check(good, outcomes(backend.Done, 2), one, one)
	}
}

// waitQueued waits until so many groups wait for a window.
func waitQueued(r *rig, n int) {
	r.t.Helper()
	waitUntil(r.t, func() bool { return dispatch.Queued(r.Dispatcher) == n })
}

// waitUntil fails the test instead of letting it hang.
func waitUntil(t *testing.T, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not come about")
		}
	}
}

// TestCompletionInsidePost completes on the goroutine that posts, with the window full all the time.
func TestCompletionInsidePost(t *testing.T) {
	f := newFake("a", 1)
	f.onPost = func(p *posted) error {
		p.done()
		return nil
	}
	r := newRig(t, dispatch.Options{}, f)
	groups := slices.Repeat([]int{1}, 500)
	j := r.job(backend.Write, peerX, groups...)
	for range 3 {
		r.wait(r.run(t.Context(), j))
		r.check(j, outcomes(backend.Done, 500), slices.Repeat([]dispatch.Result{{Attempts: 1}}, 500)...)
	}
}

// TestCompletionBeforePostReturns: the job ends, and is run again, while the Post of its first run has not returned.
func TestCompletionBeforePostReturns(t *testing.T) {
	f := newFake("a", 2)
	r := newRig(t, dispatch.Options{}, f)
	warm(r, f)
	returning := make(chan struct{})
	var posts atomic.Int32
	f.onPost = func(p *posted) error {
		if p.Op == backend.Read {
			first := posts.Add(1) == 1
			p.done()
			if first {
				<-returning
			}
		}
		return nil
	}
	others := r.job(backend.Write, peerX, 1, 1)
	othersEnded := r.run(t.Context(), others)
	first, second := f.next(t), f.next(t)
	j := r.job(backend.Read, peerX, 1)
	ended := r.run(t.Context(), j)
	waitQueued(r, 1) // so that it is not Run that posts the group, but who brings the next completion
	pumping := make(chan struct{})
	go func() {
		defer close(pumping)
		first.done()
	}()
	for range 3 {
		r.wait(ended)
		r.check(j, outcomes(backend.Done, 1), dispatch.Result{Attempts: 1})
		ended = r.run(t.Context(), j)
	}
	r.wait(ended)
	close(returning)
	receive(t, pumping)
	second.done()
	r.wait(othersEnded)
}

// TestFalseCompletions: what comes twice, or for what was never posted, changes nothing.
func TestFalseCompletions(t *testing.T) {
	f := newFake("a", 1)
	r := newRig(t, dispatch.Options{}, f)
	warm(r, f)
	j := r.job(backend.Write, peerX, 1, 1)
	ended := r.run(t.Context(), j)
	first := f.next(t)
	sink := first.s.sink
	for _, cookie := range []uint64{first.Cookie + 1, first.Cookie + 1<<32, 1 << 40, 1<<64 - 1} {
		sink.Complete(backend.Completion{Cookie: cookie})
	}
	f.nothing(t)
	first.done()
	second := f.next(t) // has the same credit
	for range 3 {
		sink.Complete(backend.Completion{Cookie: first.Cookie})
	}
	select {
	case <-ended:
		t.Fatal("the second completion of one transfer ends another")
	default:
	}
	second.fail(backend.BadRequest, backend.Failed)
	r.wait(ended)
	sink.Complete(backend.Completion{Cookie: second.Cookie})
	r.check(j, []backend.Outcome{backend.Done, backend.Failed}, dispatch.Result{Attempts: 1},
		dispatch.Result{Attempts: 1, Err: backend.ErrBadRequest})
}

// TestOnlyTheRestIsSentAgain: a transfer ends in part, its connection is broken; what is done is not sent again,
// and the rest goes by a new connection, then by the next backend.
func TestOnlyTheRestIsSentAgain(t *testing.T) {
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		a, b := newFake("a", 4), newFake("b", 4)
		r := newRig(t, dispatch.Options{}, a, b)
		j := r.job(op, peerX, 2, 6)
		ended := r.run(t.Context(), j)
		p, other := a.next(t), a.next(t)
		if len(p.Segments) == 2 {
			p, other = other, p
		}
		other.done() // before the connection breaks
		p.fail(backend.PathDown, backend.Done, backend.NotSent, backend.Failed, backend.Done, backend.InDoubt)
		// The sixth segment has no outcome, and is in doubt, too.
		p = a.next(t)
		if p.way() != "a#1" || !slices.Equal(p.Segments, segments(3, 4, 6, 7)) {
			t.Fatalf("%v: by %s: %v", op, p.way(), p.Segments)
		}
		p.fail(backend.PathDown, backend.NotSent, backend.Done, backend.NotSent, backend.Done)
		p = b.next(t)
		if !slices.Equal(p.Segments, segments(3, 6)) {
			t.Fatalf("%v: by %s: %v", op, p.way(), p.Segments)
		}
		p.done()
		r.wait(ended)
		r.check(j, outcomes(backend.Done, 8), dispatch.Result{Attempts: 1},
			dispatch.Result{Backend: 1, Attempts: 3, Fence: op == backend.Write})
		if c := r.Counters(0); c.Transfers.Load() != 3 || c.Failures.Load() != 2 || c.Connects.Load() != 2 {
			t.Errorf("a: %d transfers, %d failures, %d connects", c.Transfers.Load(), c.Failures.Load(), c.Connects.Load())
		}
		if c := r.Counters(1); c.Transfers.Load() != 1 || c.Failures.Load() != 0 {
			t.Errorf("b: %d transfers, %d failures", c.Transfers.Load(), c.Failures.Load())
		}
	}
}

// TestComplaintAboutNothing: an error with every segment done is no failure.
func TestComplaintAboutNothing(t *testing.T) {
	f := newFake("a", 1)
	r := newRig(t, dispatch.Options{}, f)
	j := r.job(backend.Write, peerX, 2)
	ended := r.run(t.Context(), j)
	f.next(t).fail(backend.Internal, backend.Done, backend.Done)
	r.wait(ended)
	r.check(j, outcomes(backend.Done, 2), dispatch.Result{Attempts: 1})
}

// TestFenceStays: a write in doubt that ends in failure tells the target to fence, whatever came after it.
func TestFenceStays(t *testing.T) {
	f := newFake("a", 1)
	r := newRig(t, dispatch.Options{Attempts: 2}, f)
	j := r.job(backend.Write, peerX, 2)
	ended := r.run(t.Context(), j)
	f.next(t).fail(backend.PathDown, backend.Done, backend.InDoubt)
	f.next(t).fail(backend.PathDown, backend.NotSent)
	r.wait(ended)
	r.check(j, []backend.Outcome{backend.Done, backend.NotSent}, dispatch.Result{Attempts: 2, Err: pathDown, Fence: true})
	if text := j.Results[0].Err.Error(); !strings.Contains(text, "1 of 2 segments are not done after 2 attempts") ||
		!strings.Contains(text, "peer x@b") || !strings.Contains(text, "range [1000, +11)") {
		t.Errorf("the error does not say what is missing: %s", text)
	}
}

// TestWays: which failures are worth another attempt, and by which way.
func TestWays(t *testing.T) {
	for _, tc := range []struct {
		code backend.Code
		ways []string
	}{
		{backend.PathDown, []string{"a#0", "a#1", "b#0", "b#1"}},
		{backend.Unsupported, []string{"a#0", "b#0"}},
		{backend.Denied, []string{"a#0", "b#0"}},
		{backend.Internal, []string{"a#0", "b#0"}},
		{backend.BadRequest, []string{"a#0"}},
		{backend.PeerGone, []string{"a#0"}},
		{backend.Integrity, []string{"a#0"}},
		{backend.Busy, []string{"a#0"}},
		{backend.Cancelled, []string{"a#0"}},
	} {
		for _, where := range []string{"completion", "post"} {
			if where == "post" && tc.code == backend.Busy {
				continue // that is back-pressure
			}
			t.Run(fmt.Sprintf("%v at %s", tc.code, where), func(t *testing.T) {
				var mu sync.Mutex
				var ways []string
				post := func(p *posted) error {
					mu.Lock()
					defer mu.Unlock()
					ways = append(ways, p.way())
					if where == "post" {
						return backend.Errorf(tc.code, "refused")
					}
					go p.fail(tc.code, backend.Failed)
					return nil
				}
				a, b := newFake("a", 1), newFake("b", 1)
				a.onPost, b.onPost = post, post
				r := newRig(t, dispatch.Options{}, a, b)
				j := r.job(backend.Write, peerX, 1)
				r.wait(r.run(t.Context(), j))
				if diff := cmp.Diff(tc.ways, ways); diff != "" {
					t.Errorf("the ways differ (-want +got):\n%s", diff)
				}
				last := int16(0)
				if len(tc.ways) > 1 {
					last = 1
				}
				want := backend.Failed
				if where == "post" {
					want = backend.NotSent
				}
				r.check(j, outcomes(want, 1), dispatch.Result{
					Backend: last, Attempts: int16(len(tc.ways)), Err: &backend.Error{Code: tc.code},
				})
				for b, n := range map[int]uint64{0: uint64(strings.Count(fmt.Sprint(ways), "a#")), 1: uint64(strings.Count(fmt.Sprint(ways), "b#"))} {
					if c := r.Counters(b); c.Transfers.Load() != n || c.Failures.Load() != n {
						t.Errorf("backend %d: %d transfers, %d failures, want %d of each", b, c.Transfers.Load(), c.Failures.Load(), n)
					}
				}
			})
		}
	}
}

func TestAttempts(t *testing.T) {
	f := newFake("a", 1)
	r := newRig(t, dispatch.Options{Attempts: 3}, f)
	j := r.job(backend.Read, peerX, 1)
	for _, n := range []int{3, 1, 2} {
		ended := r.run(t.Context(), j)
		for range n {
			f.next(t).fail(backend.PathDown)
		}
		r.wait(ended)
		r.check(j, outcomes(backend.InDoubt, 1), dispatch.Result{Attempts: int16(n), Err: pathDown})
		if n == 3 {
			r.SetAttempts(1)
		} else {
			r.SetAttempts(0) // the default, two
		}
	}
}

func TestConnectFailure(t *testing.T) {
	for _, tc := range []struct {
		name string
		make func(a *fake, o *dispatch.Options)
		news string
	}{
		{"establish", func(a *fake, _ *dispatch.Options) {
			a.onEstablish = func(context.Context, backend.Peer) error { return backend.ErrDenied }
		}, "failed 0 x: denied"},
		{"establish, with a plain error", func(a *fake, _ *dispatch.Options) {
			a.onEstablish = func(context.Context, backend.Peer) error { return errors.New("connection refused") }
		}, "failed 0 x: path down"},
		{"carry", func(_ *fake, o *dispatch.Options) {
			o.Carry = func(_ context.Context, _ backend.Peer, name string, offer []byte) ([]byte, map[backend.RegionID][]byte, error) {
				if string(offer) != name {
					t.Errorf("the offer of %s is %q", name, offer)
				}
				if name == "a" {
					return nil, nil, backend.ErrUnsupported
				}
				return nil, nil, nil
			}
		}, "failed 0 x: unsupported"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, b := newFake("a", 1), newFake("b", 1)
			var opts dispatch.Options
			tc.make(a, &opts)
			r := newRig(t, opts, a, b)
			j := r.job(backend.Write, peerX, 1, 1)
			ended := r.run(t.Context(), j)
			b.next(t).done()
			b.next(t).done()
			r.wait(ended)
			two := dispatch.Result{Backend: 1, Attempts: 2}
			r.check(j, outcomes(backend.Done, 2), two, two)
			if diff := cmp.Diff([]string{tc.news, "works 1 x"}, r.policy.heard()); diff != "" {
				t.Errorf("the policy hears (-want +got):\n%s", diff)
			}
		})
	}
}

// TestSessionRefused: a region that one backend cannot reach goes by the next; its connection stays, and the policy hears
// of it, so that the backend is not asked again for each batch.
func TestSessionRefused(t *testing.T) {
	a, b := newFake("a", 1), newFake("b", 1)
	a.onSession = func(*fakeEndpoint) error { return backend.ErrUnsupported }
	r := newRig(t, dispatch.Options{}, a, b)
	j := r.job(backend.Write, peerX, 1)
	ended := r.run(t.Context(), j)
	b.next(t).done()
	r.wait(ended)
	r.check(j, outcomes(backend.Done, 1), dispatch.Result{Backend: 1, Attempts: 2})
	if n := r.Counters(0).Endpoints.Load(); n != 1 {
		t.Errorf("%d endpoints of a, want the one that refused a session", n)
	}
	if diff := cmp.Diff([]string{"works 0 x", "refused 0 1→x/5: unsupported", "works 1 x"}, r.policy.heard()); diff != "" {
		t.Errorf("the policy hears (-want +got):\n%s", diff)
	}

	delete(j.Remotes[0].Keys, "b") // nor can b, now
	j.Remotes[0].ID++
	r.wait(r.run(t.Context(), j))
	r.check(j, outcomes(backend.NotSent, 1), dispatch.Result{Backend: 1, Attempts: 2, Err: backend.ErrUnsupported})
}

// TestStaleEndpoint: a connection that broke unnoticed refuses a new session; it is replaced, and the transfer goes
// its way as if nothing had been.
func TestStaleEndpoint(t *testing.T) {
	f := newFake("a", 1)
	r := newRig(t, dispatch.Options{}, f)
	warm(r, f)
	f.onSession = func(e *fakeEndpoint) error {
		if e.number == 0 {
			return backend.ErrPathDown
		}
		return nil
	}
	j := r.job(backend.Write, peerX, 1)
	j.Remotes[0].ID = 6
	ended := r.run(t.Context(), j)
	p := f.next(t)
	p.done()
	r.wait(ended)
	r.check(j, outcomes(backend.Done, 1), dispatch.Result{Attempts: 1})
	if p.way() != "a#1" {
		t.Errorf("it went by %s", p.way())
	}

	// Where the new one refuses, too, the path is down.
	f.onSession = func(*fakeEndpoint) error { return backend.ErrPathDown }
	j.Remotes[0].ID = 7
	r.wait(r.run(t.Context(), j))
	r.check(j, outcomes(backend.NotSent, 1), dispatch.Result{Attempts: 1, Err: pathDown})
}

// TestEndpointFails: the next job connects anew; what was in flight is sent again.
func TestEndpointFails(t *testing.T) {
	f := newFake("a", 1)
	r := newRig(t, dispatch.Options{}, f)
	j := r.job(backend.Write, peerX, 1, 1)
	ended := r.run(t.Context(), j)
	p := f.next(t)
	p.s.e.fail() // the dispatcher sees it and closes the endpoint, which ends what is in flight
	for range 2 {
		p := f.next(t)
		if p.way() != "a#1" {
			t.Fatalf("a transfer comes by %s", p.way())
		}
		p.done()
	}
	r.wait(ended)
	two := dispatch.Result{Attempts: 2} // the one that waited in the queue had an attempt taken from it, too
	r.check(j, outcomes(backend.Done, 2), two, two)
	waitUntil(t, func() bool { return r.Counters(0).Endpoints.Load() == 1 })
}

// TestBlackHole: a peer that does not answer delays nobody else, and its transfers go by another way when the time
// for connecting is up.
func TestBlackHole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newFake("a", 4), newFake("b", 4)
		connecting := make(chan struct{})
		a.onEstablish = func(ctx context.Context, p backend.Peer) error {
			if p == peerX {
				close(connecting)
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}
		r := newRig(t, dispatch.Options{ConnectTimeout: 50 * time.Millisecond}, a, b)
		j := r.job(backend.Write, peerX, 1, 1)
		j.Remotes = append(j.Remotes, r.descriptor(peerY))
		j.Plan.Groups[1].Remote = 1
		ended := r.run(t.Context(), j)
		receive(t, connecting)
		p := a.next(t)
		if p.s.e.peer != peerY {
			t.Errorf("a transfer to %s", p.s.e.peer)
		}
		p.done()
		b.next(t).done()
		r.wait(ended)
		r.check(j, outcomes(backend.Done, 2), dispatch.Result{Backend: 1, Attempts: 2}, dispatch.Result{Attempts: 1})
		if !slices.Contains(r.policy.heard(), "failed 0 x: path down") {
			t.Errorf("the policy hears %v", r.policy.heard())
		}
	})
}

// TestCancelledWhileConnecting: the job ends at once; the connection is made all the same, for others.
func TestCancelledWhileConnecting(t *testing.T) {
	f := newFake("a", 1)
	connecting, connect := make(chan struct{}), make(chan struct{})
	f.onEstablish = func(context.Context, backend.Peer) error {
		close(connecting)
		<-connect
		return nil
	}
	r := newRig(t, dispatch.Options{}, f)
	ctx, cancel := context.WithCancel(t.Context())
	j := r.job(backend.Write, peerX, 1)
	ended := r.run(ctx, j)
	receive(t, connecting)
	other := r.job(backend.Write, peerX, 1)
	otherEnded := r.run(t.Context(), other)
	cancel()
	r.wait(ended)
	r.check(j, outcomes(backend.NotSent, 1), dispatch.Result{Attempts: 1, Err: cancelled})
	close(connect)
	f.next(t).done()
	r.wait(otherEnded)
	r.check(other, outcomes(backend.Done, 1), dispatch.Result{Attempts: 1})
}

// TestDeadlineInFlight: Run asks the backend to cancel, and returns only when the transfer has completed, however
// it did.
func TestDeadlineInFlight(t *testing.T) {
	errTooLate := errors.New("too late")
	for _, tc := range []struct {
		name   string
		finish func(p *posted)
		out    []backend.Outcome
		want   dispatch.Result
	}{
		{"in time after all", (*posted).done, outcomes(backend.Done, 2), dispatch.Result{Attempts: 1}},
		{"cancelled", func(p *posted) { p.fail(backend.Cancelled, backend.Done, backend.NotSent) },
			[]backend.Outcome{backend.Done, backend.NotSent}, dispatch.Result{Attempts: 1, Err: cancelled}},
		{"in doubt", func(p *posted) { p.fail(backend.PathDown) },
			outcomes(backend.InDoubt, 2), dispatch.Result{Attempts: 1, Err: cancelled, Fence: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFake("a", 1)
			asked := make(chan *posted, 10)
			f.onCancel = func(p *posted) { asked <- p }
			r := newRig(t, dispatch.Options{}, f)
			ctx, cancel := context.WithCancelCause(t.Context())
			j := r.job(backend.Write, peerX, 2)
			ended := r.run(ctx, j)
			p := f.next(t)
			cancel(errTooLate)
			if got := receive(t, asked); got != p {
				t.Fatal("another transfer is cancelled")
			}
			select {
			case <-ended:
				t.Fatal("Run returns while the transfer is in flight")
			default:
			}
			tc.finish(p)
			r.wait(ended)
			r.check(j, tc.out, tc.want)
			if err := j.Results[0].Err; err != nil && !errors.Is(err, errTooLate) {
				t.Errorf("the error does not give the cause: %v", err)
			}
		})
	}
}

// TestJobDeadline: the job's own deadline ends it as the end of a context does. A later run with another deadline is
// not ended by it.
func TestJobDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		errTooLate := errors.New("too late")
		f := newFake("a", 1)
		f.onCancel = func(p *posted) { p.fail(backend.Cancelled, backend.NotSent) }
		r := newRig(t, dispatch.Options{}, f)
		warm(r, f)
		j := r.job(backend.Write, peerX, 1, 1) // one in flight, one in the queue
		j.DeadlineCause = errTooLate
		gone := dispatch.Result{Attempts: 1, Err: cancelled}
		for range 3 {
			j.Deadline = time.Now().Add(5 * time.Millisecond)
			r.wait(r.run(t.Context(), j))
			f.next(t)
			r.check(j, outcomes(backend.NotSent, 2), gone, gone)
			for _, res := range j.Results {
				if !errors.Is(res.Err, errTooLate) {
					t.Errorf("the error does not give the cause: %v", res.Err)
				}
			}

			j.Deadline = time.Now().Add(time.Hour)
			ended := r.run(t.Context(), j)
			f.next(t).done()
			f.next(t).done()
			r.wait(ended)
			one := dispatch.Result{Attempts: 1}
			r.check(j, outcomes(backend.Done, 2), one, one)
		}

		// It holds for connecting, too, and passes before the run as well as in it.
		connecting, connect := make(chan struct{}), make(chan struct{})
		f.onEstablish = func(context.Context, backend.Peer) error {
			close(connecting)
			<-connect
			return nil
		}
		for _, d := range []time.Duration{5 * time.Millisecond, -time.Hour} {
			j := r.job(backend.Write, peerY, 1)
			j.Deadline, j.DeadlineCause = time.Now().Add(d), errTooLate
			r.wait(r.run(t.Context(), j))
			r.check(j, outcomes(backend.NotSent, 1), gone)
			if !errors.Is(j.Results[0].Err, errTooLate) {
				t.Errorf("the error does not give the cause: %v", j.Results[0].Err)
			}
		}
		receive(t, connecting)
		close(connect)
	})
}

// TestShortOutage: a group waits for the end of an outage that is nearly over, and for no longer one.
func TestShortOutage(t *testing.T) {
	const ever = 0 // nobody knows how long it lasts
	one, none := dispatch.Result{Attempts: 1}, dispatch.Result{Backend: -1, Err: pathDown}
	for name, tc := range map[string]struct {
		lasts []time.Duration // from the start, as the policy says before it makes the choice that is good
		want  dispatch.Result
	}{
		"it ends":          {[]time.Duration{10 * time.Millisecond}, one},
		"it is over":       {[]time.Duration{-time.Second}, one},
		"it does not end":  {[]time.Duration{10 * time.Millisecond, 20 * time.Millisecond}, none},
		"it will not soon": {[]time.Duration{time.Hour}, none},
		"nobody knows":     {[]time.Duration{ever}, none},
	} {
		t.Run(name, inBubble(func(t *testing.T) {
			f := newFake("a", 4)
			r := newRig(t, dispatch.Options{}, f)
			start, lasts := time.Now(), tc.lasts
			r.policy.before = func(q selector.Query) *selector.Choice {
				if len(lasts) == 0 || q.Remote.Peer != peerX {
					return nil
				}
				c := &selector.Choice{Candidates: []selector.Candidate{{Backend: "a", Down: true, Reason: "down: refused"}}}
				if lasts[0] != ever {
					c.Until = start.Add(lasts[0])
				}
				lasts = lasts[1:]
				return c
			}
			j := r.job(backend.Write, peerX, 1, 1)
			j.Remotes = append(j.Remotes, r.descriptor(peerY))
			j.Plan.Groups[1].Remote = 1
			ended := r.run(t.Context(), j)
			f.next(t).done()
			if tc.want.Err == nil {
				f.next(t).done()
			}
			r.wait(ended)
			want := []backend.Outcome{backend.NotSent, backend.Done}
			if tc.want.Err == nil {
				want[0] = backend.Done
			}
			r.check(j, want, tc.want, one)
			if tc.want.Err != nil && !strings.Contains(j.Results[0].Err.Error(), "a: down: refused") {
				t.Errorf("the error does not give the reason: %v", j.Results[0].Err)
			}
		}))
	}
}

// TestCancelledInAnOutage does not wait for its end.
func TestCancelledInAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake("a", 1)
		r := newRig(t, dispatch.Options{}, f)
		asked := make(chan struct{}, 1)
		r.policy.before = func(q selector.Query) *selector.Choice {
			asked <- struct{}{}
			return &selector.Choice{Until: q.Now.Add(200 * time.Millisecond), Candidates: []selector.Candidate{{Backend: "a", Down: true, Reason: "down"}}}
		}
		ctx, cancel := context.WithCancel(t.Context())
		j := r.job(backend.Write, peerX, 1)
		ended := r.run(ctx, j)
		receive(t, asked)
		cancel()
		r.wait(ended)
		r.check(j, outcomes(backend.NotSent, 1), dispatch.Result{Backend: -1, Err: cancelled})
	})
}

// TestCancelledInTheQueue: a group that waits for its turn ends at once, and others keep theirs.
func TestCancelledInTheQueue(t *testing.T) {
	f := newFake("a", 1)
	r := newRig(t, dispatch.Options{}, f)
	warm(r, f)
	first := r.job(backend.Write, peerX, 1)
	firstEnded := r.run(t.Context(), first)
	p := f.next(t)
	ctx, cancel := context.WithCancel(t.Context())
	j, last := r.job(backend.Write, peerX, 1, 1), r.job(backend.Read, peerX, 1)
	ended := r.run(ctx, j)
	waitQueued(r, 2)
	lastEnded := r.run(t.Context(), last)
	waitQueued(r, 3)
	cancel()
	r.wait(ended)
	gone := dispatch.Result{Attempts: 1, Err: cancelled}
	r.check(j, outcomes(backend.NotSent, 2), gone, gone)
	p.done()
	r.wait(firstEnded)
	if p := f.next(t); p.Op != backend.Read {
		t.Errorf("a %v follows", p.Op)
	} else {
		p.done()
	}
	r.wait(lastEnded)
}

// TestCancelledBetweenQueueAndBackend: a group is on its way from the queue to a backend that has no room for it
// when its job is cancelled. It does not wait for the completions of others.
func TestCancelledBetweenQueueAndBackend(t *testing.T) {
	f := newFake("a", 2)
	r := newRig(t, dispatch.Options{}, f)
	warm(r, f)
	others := r.job(backend.Write, peerX, 1, 1)
	othersEnded := r.run(t.Context(), others)
	first, second := f.next(t), f.next(t)
	posting, answer := make(chan struct{}), make(chan error)
	f.onPost = func(*posted) error {
		close(posting)
		return <-answer
	}
	ctx, cancel := context.WithCancel(t.Context())
	j := r.job(backend.Read, peerX, 1)
	ended := r.run(ctx, j)
	waitQueued(r, 1)
	go first.done()
	receive(t, posting)
	cancel()
	waitUntil(t, func() bool { return dispatch.Cancelled(j) })
	answer <- backend.ErrBusy
	r.wait(ended)
	r.check(j, outcomes(backend.NotSent, 1), dispatch.Result{Attempts: 1, Err: cancelled})
	second.done()
	r.wait(othersEnded)
}

// TestCancelledBeforePostReturns: the backend does not know the transfer yet when its job is cancelled. It is told
// when it does.
func TestCancelledBeforePostReturns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake("a", 1)
		posting, answer := make(chan struct{}), make(chan error)
		f.onPost = func(*posted) error {
			close(posting)
			return <-answer
		}
		f.onCancel = func(p *posted) { p.fail(backend.Cancelled, backend.NotSent) }
		r := newRig(t, dispatch.Options{}, f)
		ctx, cancel := context.WithCancel(t.Context())
		j := r.job(backend.Write, peerX, 1)
		ended := r.run(ctx, j)
		receive(t, posting)
		cancel()
		synctest.Wait() // until the first request to cancel is through
		answer <- nil
		r.wait(ended)
		r.check(j, outcomes(backend.NotSent, 1), dispatch.Result{Attempts: 1, Err: cancelled})
	})
}

// TestCancelledInABusyPost: the group that held the only credit is taken back; the one that waits for it gets it.
func TestCancelledInABusyPost(t *testing.T) {
	f := newFake("a", 1)
	posting, answer := make(chan struct{}), make(chan error)
	f.onPost = func(p *posted) error {
		if p.Op == backend.Read {
			return nil
		}
		close(posting)
		return <-answer
	}
	r := newRig(t, dispatch.Options{}, f)
	ctx, cancel := context.WithCancel(t.Context())
	j := r.job(backend.Write, peerX, 1)
	ended := r.run(ctx, j)
	receive(t, posting)
	other := r.job(backend.Read, peerX, 1)
	otherEnded := r.run(t.Context(), other)
	waitQueued(r, 1)
	cancel()
	waitUntil(t, func() bool { return dispatch.Cancelled(j) })
	answer <- backend.ErrBusy
	r.wait(ended)
	f.next(t).done()
	r.wait(otherEnded)
}

// TestCancelledBeforeRun posts nothing that it does not take back.
func TestCancelledBeforeRun(t *testing.T) {
	f := newFake("a", 1)
	f.onCancel = func(p *posted) { p.fail(backend.Cancelled, backend.NotSent) }
	r := newRig(t, dispatch.Options{}, f)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	j := r.job(backend.Write, peerX, 1, 1, 1)
	r.wait(r.run(ctx, j))
	gone := dispatch.Result{Attempts: 1, Err: cancelled}
	r.check(j, outcomes(backend.NotSent, 3), gone, gone, gone)
}

// TestNotQuiet: a backend does not end a cancelled transfer; Run gives up, and what comes later does no harm.
func TestNotQuiet(t *testing.T) {
	f := newFake("a", 2)
	r := newRig(t, dispatch.Options{QuietTimeout: 10 * time.Millisecond}, f)
	ctx, cancel := context.WithCancel(t.Context())
	ended := r.run(ctx, r.job(backend.Write, peerX, 1))
	p := f.next(t)
	cancel()
	if err := receive(t, ended); !errors.Is(err, dispatch.ErrNotQuiet) {
		t.Fatalf("Run returns %v", err)
	}
	p.done()
	warm(r, f) // others are not affected
}

// TestLateCompletions races completions with a Run that gives up, for the race detector.
func TestLateCompletions(t *testing.T) {
	f := newFake("a", 64)
	r := newRig(t, dispatch.Options{QuietTimeout: time.Nanosecond}, f)
	warm(r, f)
	for range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		j := r.job(backend.Write, peerX, slices.Repeat([]int{1}, 64)...)
		ended := r.run(ctx, j)
		var flying []*posted
		for range 64 {
			flying = append(flying, f.next(t))
		}
		cancel()
		waitUntil(t, func() bool { return dispatch.Cancelled(j) })
		for _, p := range flying {
			p.done()
		}
		if err := receive(t, ended); err != nil && !errors.Is(err, dispatch.ErrNotQuiet) {
			t.Fatal(err)
		}
	}
}

func TestClose(t *testing.T) {
	f := newFake("a", 1)
	r := newRig(t, dispatch.Options{}, f)
	j := r.job(backend.Write, peerX, 1, 1, 1)
	ended := r.run(t.Context(), j)
	f.next(t)
	r.Close()
	r.wait(ended)
	for i, res := range j.Results {
		if res.Err == nil {
			t.Errorf("group %d has no error, though the dispatcher was closed", i)
		}
	}
	if n := r.Counters(0).Endpoints.Load(); n != 0 {
		t.Errorf("%d endpoints after Close", n)
	}
	r.wait(r.run(t.Context(), j))
	if err := j.Results[0].Err; backend.CodeOf(err) != backend.Cancelled || !strings.Contains(err.Error(), "the dispatcher is closed") {
		t.Errorf("after Close: %v", err)
	}
	r.Close() // twice
}

// TestCloseWhileConnecting does not wait for a peer that does not answer.
func TestCloseWhileConnecting(t *testing.T) {
	f := newFake("a", 1)
	connecting := make(chan struct{})
	f.onEstablish = func(ctx context.Context, _ backend.Peer) error {
		close(connecting)
		<-ctx.Done()
		return ctx.Err()
	}
	r := newRig(t, dispatch.Options{ConnectTimeout: time.Hour}, f)
	j := r.job(backend.Write, peerX, 1)
	ended := r.run(t.Context(), j)
	receive(t, connecting)
	r.Close()
	r.wait(ended)
	if j.Results[0].Err == nil {
		t.Error("the job has not failed")
	}
	if news := r.policy.heard(); len(news) != 0 {
		t.Errorf("the policy hears %v of a connection that was given up", news)
	}
}

func TestForget(t *testing.T) {
	f := newFake("a", 2)
	r := newRig(t, dispatch.Options{}, f)
	jx, jy := r.job(backend.Write, peerX, 1), r.job(backend.Write, peerY, 1)
	endedX, endedY := r.run(t.Context(), jx), r.run(t.Context(), jy)
	byPeer := map[backend.Peer]*posted{}
	for range 2 {
		p := f.next(t)
		byPeer[p.s.e.peer] = p
	}
	r.Forget(peerX)
	again := f.next(t) // what was in flight to x is sent again, by a new endpoint
	if again.s.e.peer != peerX || again.s.e == byPeer[peerX].s.e {
		t.Errorf("by %s to %s", again.way(), again.s.e.peer)
	}
	again.done()
	byPeer[peerY].done()
	r.wait(endedX)
	r.wait(endedY)
	r.check(jx, outcomes(backend.Done, 1), dispatch.Result{Attempts: 2})
	r.check(jy, outcomes(backend.Done, 1), dispatch.Result{Attempts: 1})
}

// TestForgetRegion: nothing of the region is in flight when it returns.
func TestForgetRegion(t *testing.T) {
	f := newFake("a", 4)
	r := newRig(t, dispatch.Options{}, f)
	other := &region.Region{ID: 2, Kind: backend.HostMemory}
	j, spared := r.job(backend.Write, peerX, 1), r.job(backend.Write, peerX, 1)
	spared.Locals[0] = other
	ended := r.run(t.Context(), j)
	gone := f.next(t)
	sparedEnded := r.run(t.Context(), spared)
	stays := f.next(t)
	r.ForgetRegion(near.ID)
	gone.s.e.mu.Lock()
	if gone.s.e.flying[gone] {
		t.Error("a transfer of the region is in flight")
	}
	if !gone.s.e.flying[stays] {
		t.Error("a transfer of another region has ended")
	}
	gone.s.e.mu.Unlock()
	stays.done()
	r.wait(ended)
	r.wait(sparedEnded)
	r.check(j, outcomes(backend.NotSent, 1), dispatch.Result{Attempts: 1, Err: cancelled})
	r.check(spared, outcomes(backend.Done, 1), dispatch.Result{Attempts: 1})

	again := r.run(t.Context(), j)
	p := f.next(t)
	if p.s == gone.s {
		t.Error("the session of the forgotten region is used again")
	}
	p.done()
	r.wait(again)
}

// TestNoWay: the error lists the reasons, and its code says whether to come back.
func TestNoWay(t *testing.T) {
	f := newFake("a", 1)
	r := newRig(t, dispatch.Options{}, f)
	for down, code := range map[bool]backend.Code{false: backend.Unsupported, true: backend.PathDown} {
		r.policy.choice = &selector.Choice{Candidates: []selector.Candidate{
			{Backend: "a", Reason: "cannot write"}, {Backend: "b", Down: down, Reason: "because"},
		}}
		j := r.job(backend.Write, peerX, 1, 1)
		r.wait(r.run(t.Context(), j))
		none := dispatch.Result{Backend: -1, Err: &backend.Error{Code: code}}
		r.check(j, outcomes(backend.NotSent, 2), none, none)
		if text := j.Results[0].Err.Error(); !strings.Contains(text, "a: cannot write; b: because") {
			t.Errorf("the reasons are not given: %s", text)
		}
	}
}

func TestLimits(t *testing.T) {
	r := newRig(t, dispatch.Options{Backends: []dispatch.Backend{{Name: "none"}}}, newFake("a", 1))
	if l := r.Limits(); l != (backend.Limits{Segments: 8}) {
		t.Errorf("limits %+v", l)
	}
}
