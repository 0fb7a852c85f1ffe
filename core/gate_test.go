package core_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// says fails the test unless the error's text has all the words.
func says(tb testing.TB, err error, words ...string) {
	tb.Helper()
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			tb.Errorf("the error does not say %q: %v", w, err)
		}
	}
}

// gate holds back the transfers of one operation before a byte of them has moved, until it is opened. It stands for
// a slow wire.
type gate struct {
	op backend.Op
	// deaf makes transfers ignore Cancel: they move their bytes all the same.
	deaf bool
	// node, if not empty, is the only node whose transfers are held back.
	node    string
	arrived chan struct{} // one token for each transfer that is held back
	open    chan struct{} // closed to let all through
	once    sync.Once
}

func newGate(op backend.Op, deaf bool) *gate {
	return &gate{op: op, deaf: deaf, arrived: make(chan struct{}, 1000), open: make(chan struct{})}
}

func (g *gate) letThrough() { g.once.Do(func() { close(g.open) }) }

// at returns a shape.wrap that puts the gate before the backends of one engine.
func (g *gate) at(owner string) func(string, string, backend.Backend) backend.Backend {
	return func(o, _ string, b backend.Backend) backend.Backend {
		if o == owner {
			return gated{b, g}
		}
		return b
	}
}

type gated struct {
	backend.Backend
	g *gate
}

func (b gated) Offer(ctx context.Context, p backend.Peer) (backend.Handshake, error) {
	h, err := b.Backend.Offer(ctx, p)
	return gatedShake{h, b.g}, err
}

type gatedShake struct {
	backend.Handshake
	g *gate
}

func (h gatedShake) Establish(ctx context.Context, answer []byte) (backend.Endpoint, error) {
	e, err := h.Handshake.Establish(ctx, answer)
	if err != nil {
		return nil, err
	}
	return &gatedEndpoint{Endpoint: e, g: h.g}, nil
}

type gatedEndpoint struct {
	backend.Endpoint
	g *gate

	mu       sync.Mutex
	sessions []*gatedSession
}

func (e *gatedEndpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	inner, err := e.Endpoint.Session(ctx, local, remote, sink)
	if err != nil || e.g.node != "" && e.g.node != remote.Peer.Node {
		return inner, err
	}
	s := &gatedSession{Session: inner, g: e.g, sink: sink, held: map[uint64]chan struct{}{}}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sessions = append(e.sessions, s)
	return s, nil
}

func (e *gatedEndpoint) Close() error {
	e.mu.Lock()
	sessions := e.sessions
	e.mu.Unlock()
	for _, s := range sessions {
		s.settle()
	}
	return e.Endpoint.Close()
}

type gatedSession struct {
	backend.Session
	g    *gate
	sink backend.Sink

	wg   sync.WaitGroup
	mu   sync.Mutex
	held map[uint64]chan struct{} // closed to cancel
}

func (s *gatedSession) Post(t backend.Transfer) error {
	if t.Op != s.g.op {
		return s.Session.Post(t)
	}
	select {
	case <-s.g.open:
		return s.Session.Post(t)
	default:
	}
	cancel := make(chan struct{})
	s.mu.Lock()
	s.held[t.Cookie] = cancel
	s.mu.Unlock()
	t.Segments = slices.Clone(t.Segments)
	s.wg.Go(func() {
		var err error
		select {
		case <-s.g.open:
			err = s.Session.Post(t)
		case <-cancel:
			err = backend.ErrCancelled
		}
		s.mu.Lock()
		delete(s.held, t.Cookie)
		s.mu.Unlock()
		if err != nil {
			s.sink.Complete(backend.Completion{
				Cookie: t.Cookie, Err: err, Outcomes: slices.Repeat([]backend.Outcome{backend.NotSent}, len(t.Segments)),
			})
		}
	})
	s.g.arrived <- struct{}{}
	return nil
}

func (s *gatedSession) Cancel(cookie uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	cancel := s.held[cookie]
	switch {
	case s.g.deaf:
	case cancel == nil:
		s.Session.Cancel(cookie)
	default:
		close(cancel)
		s.held[cookie] = make(chan struct{}) // for whoever cancels again
	}
}

// settle cancels what is held back, and returns when it has completed.
func (s *gatedSession) settle() {
	s.mu.Lock()
	for cookie, cancel := range s.held {
		if !s.g.deaf {
			close(cancel)
			s.held[cookie] = make(chan struct{})
		}
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *gatedSession) Close() error {
	s.settle()
	return s.Session.Close()
}
