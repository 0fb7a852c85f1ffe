package host

import (
	"context"
	"sync/atomic"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// gate stands before the Posts of an instance. A planned restart shuts it until the instance has ended: what is new is Busy
// then, and when nobody is within Post any more, what is in flight is all that there will be.
type gate struct {
	shut    atomic.Bool
	posting atomic.Int64
}

// enter tells whether a Post may begin; leave ends one that may.
func (g *gate) enter() bool {
	g.posting.Add(1)
	if g.shut.Load() {
		g.leave()
		return false
	}
	return true
}

func (g *gate) leave() { g.posting.Add(-1) }

// gatedHandshake, gatedEndpoint and gatedSession lead Post through the gate, and are what they wrap otherwise.
type gatedHandshake struct {
	backend.Handshake
	gate *gate
}

func (h gatedHandshake) Establish(ctx context.Context, answer []byte) (backend.Endpoint, error) {
	e, err := h.Handshake.Establish(ctx, answer)
	if err != nil {
		return nil, err
	}
	return gatedEndpoint{e, h.gate}, nil
}

type gatedEndpoint struct {
	backend.Endpoint
	gate *gate
}

func (e gatedEndpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	s, err := e.Endpoint.Session(ctx, local, remote, sink)
	if err != nil {
		return nil, err
	}
	gated := gatedSession{s, e.gate}
	if waiter, ok := s.(backend.PostWaiter); ok {
		return &gatedWaiter{gated, waiter}, nil
	}
	return &gated, nil
}

type gatedSession struct {
	backend.Session
	gate *gate
}

// Post implements backend.Session.
func (s *gatedSession) Post(t backend.Transfer) error {
	if !s.gate.enter() {
		return backend.ErrBusy
	}
	defer s.gate.leave()
	return s.Session.Post(t)
}

type gatedWaiter struct {
	gatedSession
	waiter backend.PostWaiter
}

// PostWait implements backend.PostWaiter.
func (s *gatedWaiter) PostWait(t backend.Transfer) error {
	if !s.gate.enter() {
		return backend.ErrBusy
	}
	defer s.gate.leave()
	return s.waiter.PostWait(t)
}
