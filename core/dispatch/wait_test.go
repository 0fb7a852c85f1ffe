package dispatch_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/umbp/umbp/core/dispatch"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// newWaiting returns a fake whose sessions have PostWait, and the number of its calls. The hook may be nil.
func newWaiting(before func() error) (*fake, *atomic.Int32) {
	f, calls := newFake("a", 1), new(atomic.Int32)
	f.onPostWait = func(s *fakeSession, t backend.Transfer) error {
		calls.Add(1)
		if before != nil {
			if err := before(); err != nil {
				return err
			}
		}
		return s.Post(t)
	}
	return f, calls
}

// TestWhoWaits: the goroutine of Run is lent to a backend where it has nothing else to do, and nothing else is due.
func TestWhoWaits(t *testing.T) {
	for name, tc := range map[string]struct {
		groups   int
		to       backend.Peer
		over     bool          // the context is
		deadline time.Duration // of the job, unless it is zero
		limit    time.Duration // of the context, unless it is zero
		want     int32
	}{
		"one group":            {groups: 1, want: 1},
		"two groups":           {groups: 2},
		"no session yet":       {groups: 1, to: peerY},
		"far deadline":         {groups: 1, deadline: time.Hour, limit: time.Hour, want: 1},
		"near deadline":        {groups: 1, deadline: backend.MaxPostWait / 2, limit: time.Hour},
		"near end of context":  {groups: 1, deadline: time.Hour, limit: backend.MaxPostWait / 2},
		"context that is over": {groups: 1, over: true},
	} {
		t.Run(name, inBubble(func(t *testing.T) {
			f, calls := newWaiting(nil)
			r := newRig(t, dispatch.Options{}, f)
			warm(r, f)
			calls.Store(0)
			f.onPost = func(p *posted) error {
				p.done()
				return nil
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if tc.over {
				cancel()
			}
			if tc.limit != 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, tc.limit)
				defer cancel()
			}
			if tc.to == (backend.Peer{}) {
				tc.to = peerX
			}
			want := make([]dispatch.Result, tc.groups)
			for i := range want {
				want[i].Attempts = 1
			}
			j := r.job(backend.Read, tc.to, make([]int, tc.groups)...)
			if tc.deadline != 0 {
				j.Deadline, j.DeadlineCause = time.Now().Add(tc.deadline), context.DeadlineExceeded
			}
			r.wait(r.run(ctx, j))
			if n := calls.Load(); n != tc.want {
				t.Errorf("PostWait is called %d times, want %d", n, tc.want)
			}
			r.check(j, nil, want...)
		}))
	}
}

// TestBusyWaiter: a group that a lent goroutine found no room for waits like any other.
func TestBusyWaiter(t *testing.T) {
	f, calls := newWaiting(func() error { return backend.ErrBusy })
	r := newRig(t, dispatch.Options{}, f)
	warm(r, f)
	j := r.job(backend.Write, peerX, 2)
	ended := r.run(t.Context(), j)
	f.next(t).done()
	r.wait(ended)
	r.check(j, outcomes(backend.Done, 2), dispatch.Result{Attempts: 1})
	if n := calls.Load(); n != 1 {
		t.Errorf("PostWait is called %d times, want 1", n)
	}
}

// TestRefusedWaiter: what is tried again is not waited for.
func TestRefusedWaiter(t *testing.T) {
	f, calls := newWaiting(func() error { return backend.Errorf(backend.PathDown, "broken") })
	r := newRig(t, dispatch.Options{}, f)
	warm(r, f)
	j := r.job(backend.Write, peerX, 2)
	ended := r.run(t.Context(), j)
	f.next(t).done()
	r.wait(ended)
	r.check(j, outcomes(backend.Done, 2), dispatch.Result{Attempts: 2})
	if n := calls.Load(); n != 1 {
		t.Errorf("PostWait is called %d times, want 1", n)
	}
}

// TestCancelledWhileLent: Run cancels as soon as it has its goroutine back.
func TestCancelledWhileLent(t *testing.T) {
	lent, giveBack := make(chan struct{}), make(chan struct{})
	f, _ := newWaiting(func() error {
		close(lent)
		<-giveBack
		return nil
	})
	f.onCancel = func(p *posted) { p.fail(backend.Cancelled, backend.NotSent) }
	r := newRig(t, dispatch.Options{}, f)
	warm(r, f)
	ctx, cancel := context.WithCancel(t.Context())
	j := r.job(backend.Write, peerX, 1)
	ended := r.run(ctx, j)
	receive(t, lent)
	cancel()
	close(giveBack)
	f.next(t)
	r.wait(ended)
	r.check(j, outcomes(backend.NotSent, 1), dispatch.Result{Attempts: 1, Err: cancelled})
}
