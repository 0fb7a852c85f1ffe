package host

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Calls counts the calls of one kind that were made to a backend.
type Calls struct {
	// Op is the method: "register", "deregister", "offer", "answer", "establish", "session", "fence".
	Op string
	// Count is how many calls have returned, and Errors how many of them with an error.
	Count, Errors uint64
	// Time is how long they took together.
	Time time.Duration
}

// Calls returns what was called, and how long that took, for each kind of call in a fixed order; nil for a backend that
// is not to be had. Transfers are not among them: nothing is measured on their way.
func (b *Backend) Calls() []Calls {
	if b.Backend == nil {
		return nil
	}
	b.calls.mu.Lock()
	defer b.calls.mu.Unlock()
	return append([]Calls(nil), b.calls.byOp[:]...)
}

// Counters returns what the backend has counted by itself; nil for a backend that counts nothing, or is not to be had.
func (b *Backend) Counters() []backend.Count {
	if c, ok := b.Backend.(backend.Counter); ok {
		return c.Counters()
	}
	return nil
}

// The kinds of calls.
const (
	opRegister = iota
	opDeregister
	opOffer
	opAnswer
	opEstablish
	opSession
	opFence
	ops
)

// calls counts, and traces to the log.
type calls struct {
	backend string
	log     backend.Logger

	mu   sync.Mutex
	byOp [ops]Calls
}

func newCalls(name string, log backend.Logger) *calls {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	c := &calls{backend: name, log: log}
	for op, name := range [ops]string{"register", "deregister", "offer", "answer", "establish", "session", "fence"} {
		c.byOp[op].Op = name
	}
	return c
}

// note counts a call. The arguments say more about it.
func (c *calls) note(op int, begun time.Time, err error, args ...any) {
	took := time.Since(begun)
	c.mu.Lock()
	n := &c.byOp[op]
	n.Count++
	n.Time += took
	if err != nil {
		n.Errors++
		args = append(args, "error", err)
	}
	c.mu.Unlock()
	c.log.Debug("called a backend", append([]any{"backend", c.backend, "call", n.Op, "took", took}, args...)...)
}

// measured is a backend whose calls are counted.
type measured struct {
	backend.Backend
	calls *calls
}

func (b measured) Register(ctx context.Context, m backend.Memory) ([]byte, error) {
	begun := time.Now()
	key, err := b.Backend.Register(ctx, m)
	b.calls.note(opRegister, begun, err, "region", m.Region, "bytes", m.Size())
	return key, err
}

func (b measured) Deregister(ctx context.Context, id backend.RegionID) error {
	begun := time.Now()
	err := b.Backend.Deregister(ctx, id)
	b.calls.note(opDeregister, begun, err, "region", id)
	return err
}

func (b measured) Offer(ctx context.Context, peer backend.Peer) (backend.Handshake, error) {
	begun := time.Now()
	h, err := b.Backend.Offer(ctx, peer)
	b.calls.note(opOffer, begun, err, "peer", peer)
	if err != nil {
		return nil, err
	}
	return measuredHandshake{h, peer, b.calls}, nil
}

func (b measured) Answer(ctx context.Context, peer backend.Peer, text []byte) ([]byte, error) {
	begun := time.Now()
	reply, err := b.Backend.Answer(ctx, peer, text)
	b.calls.note(opAnswer, begun, err, "peer", peer)
	return reply, err
}

func (b measured) Fence(ctx context.Context, peer backend.Peer) error {
	begun := time.Now()
	err := b.Backend.Fence(ctx, peer)
	b.calls.note(opFence, begun, err, "peer", peer)
	return err
}

// Counters implements backend.Counter, for backends that do.
func (b measured) Counters() []backend.Count {
	if c, ok := b.Backend.(backend.Counter); ok {
		return c.Counters()
	}
	return nil
}

type measuredHandshake struct {
	backend.Handshake
	peer  backend.Peer
	calls *calls
}

func (h measuredHandshake) Establish(ctx context.Context, text []byte) (backend.Endpoint, error) {
	begun := time.Now()
	e, err := h.Handshake.Establish(ctx, text)
	h.calls.note(opEstablish, begun, err, "peer", h.peer)
	if err != nil {
		return nil, err
	}
	return measuredEndpoint{e, h.peer, h.calls}, nil
}

// measuredEndpoint hands out sessions as they are.
type measuredEndpoint struct {
	backend.Endpoint
	peer  backend.Peer
	calls *calls
}

func (e measuredEndpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	begun := time.Now()
	s, err := e.Endpoint.Session(ctx, local, remote, sink)
	e.calls.note(opSession, begun, err, "peer", e.peer, "local", local, "remote", remote.Region)
	return s, err
}
