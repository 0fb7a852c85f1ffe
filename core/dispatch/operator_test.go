package dispatch_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/umbp/umbp/core/dispatch"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// TestKeysOfTheAnswer: the peer's backend is started anew, and its regions have other keys since; the descriptors say
// what was. Sessions use the keys that came with the answer, and the descriptor's where it brought none.
func TestKeysOfTheAnswer(t *testing.T) {
	f := newFake("a", 8)
	starts := 0
	r := newRig(t, dispatch.Options{Carry: func(context.Context, backend.Peer, string, []byte) ([]byte, map[backend.RegionID][]byte, error) {
		starts++
		if starts == 1 {
			return nil, nil, nil // a peer that knows nothing of keys that change
		}
		return nil, map[backend.RegionID][]byte{5: fmt.Append(nil, "key ", starts), 6: []byte("of another")}, nil
	}}, f)
	for _, want := range []string{"described", "key 2", "key 3"} {
		j := r.job(backend.Write, peerX, 1)
		j.Remotes[0].Keys["a"] = []byte("described")
		ended := r.run(t.Context(), j)
		p := f.next(t)
		if got := string(p.s.remote.Key); got != want {
			t.Errorf("the session has the key %q, want %q", got, want)
		}
		if key := string(j.Remotes[0].Keys["a"]); key != "described" {
			t.Errorf("the descriptor has the key %q now", key)
		}
		p.done()
		r.wait(ended)
		p.s.e.fail() // as when the peer's backend ends
	}
}

// TestDisable: what is under way ends well, what waits for its turn as well; then the endpoints are closed. From the
// call on nothing connects by that backend, and what wants to, goes the next way.
func TestDisable(t *testing.T) {
	a, b := newFake("a", 1), newFake("b", 1)
	r := newRig(t, dispatch.Options{}, a, b)
	j := r.job(backend.Write, peerX, 1, 1)
	ended := r.run(t.Context(), j)
	first := a.next(t)
	disabled := make(chan struct{})
	go func() {
		r.Disable(t.Context(), 0)
		close(disabled)
	}()
	// A peer that is not connected yet is not connected any more, once the call has begun.
	other := r.job(backend.Write, peerY, 1)
	for way := "a#1"; way != "b#0"; {
		otherEnded := r.run(t.Context(), other)
		select {
		case p := <-a.accepted:
			way = p.way()
			p.done()
			p.s.e.fail() // so that the next round must connect again
		case p := <-b.accepted:
			way = p.way()
			p.done()
		}
		r.wait(otherEnded)
	}
	if got := other.Results[0]; got.Err != nil || got.Backend != 1 { // how often it tried the first depends on when that ended
		t.Errorf("what may not connect by the first backend ended with %+v", got)
	}

	select {
	case <-disabled:
		t.Fatal("Disable returns while a transfer is in flight")
	default:
	}
	first.done()
	a.next(t).done()
	r.wait(ended)
	one := dispatch.Result{Attempts: 1}
	r.check(j, outcomes(backend.Done, 2), one, one)
	receive(t, disabled)
	receive(t, first.s.e.done)
	for _, heard := range r.policy.heard() {
		if strings.HasPrefix(heard, "failed") {
			t.Errorf("an operator's wish is taken for an outage: %s", heard)
		}
	}

	r.Enable(0)
	again := r.job(backend.Write, peerX, 1)
	ended = r.run(t.Context(), again)
	a.next(t).done()
	r.wait(ended)
	r.check(again, outcomes(backend.Done, 1), one)
}

// TestDisableHasAnEnd: what is still under way when the time is over is tried another way.
func TestDisableHasAnEnd(t *testing.T) {
	a, b := newFake("a", 1), newFake("b", 1)
	r := newRig(t, dispatch.Options{}, a, b)
	j := r.job(backend.Write, peerX, 1)
	ended := r.run(t.Context(), j)
	a.next(t) // and is never answered, until the endpoint is closed
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.Disable(ctx, 0)
	b.next(t).done()
	r.wait(ended)
	r.check(j, outcomes(backend.Done, 1), dispatch.Result{Backend: 1, Attempts: 3})

	// With no other way, the error says why.
	alone := newRig(t, dispatch.Options{}, a)
	alone.Disable(ctx, 0)
	j = alone.job(backend.Write, peerX, 1)
	alone.wait(alone.run(t.Context(), j))
	alone.check(j, outcomes(backend.NotSent, 1), dispatch.Result{Attempts: 1, Err: pathDown})
	if err := j.Results[0].Err; !strings.Contains(err.Error(), "disabled by the operator") {
		t.Errorf("the error does not say why: %v", err)
	}
}

// TestDisableWhileConnecting: a connection that is being made when the time is over is not used.
func TestDisableWhileConnecting(t *testing.T) {
	a, b := newFake("a", 1), newFake("b", 1)
	connecting, connect := make(chan struct{}), make(chan struct{})
	a.onEstablish = func(context.Context, backend.Peer) error {
		close(connecting)
		<-connect
		return nil
	}
	r := newRig(t, dispatch.Options{}, a, b)
	j := r.job(backend.Write, peerX, 1)
	ended := r.run(t.Context(), j)
	receive(t, connecting)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.Disable(ctx, 0)
	close(connect)
	b.next(t).done()
	r.wait(ended)
	r.check(j, outcomes(backend.Done, 1), dispatch.Result{Backend: 1, Attempts: 2})
}
