// Package fault wraps a backend and makes it fail on command, so that what stands above it can be tested.
//
// What fails is written in a short script:
//
//	script, err := fault.Parse("post:2*off->1*error(pathdown);complete:drop")
//	b = fault.Wrap(b, script)
//
// reads: the first two posts are left alone, the third is refused with PathDown, later ones are left alone; no
// completion comes, until its transfer is cancelled. See Parse for the grammar.
//
// The points are register, offer, answer, establish, session, post, complete, fence and close. The verbs:
//
//	off           nothing happens
//	error(code)   the call is not made and returns this code: internal, busy, peergone, pathdown, badrequest,
//	              denied, integrity, cancelled, unsupported. At close, the backend is closed all the same. At
//	              complete, the transfer ends with this code and every segment Failed
//	delay(time)   the call is made later, or its context ends the wait; at complete, the completion comes later,
//	              or at once when its transfer is cancelled. Not at post, which never blocks
//	busy          Post returns ErrBusy
//	drop          the completion does not come until the transfer is cancelled, its session, its endpoint or the
//	              backend is closed, or its local region is deregistered. Then it is Cancelled, every segment
//	              InDoubt. A completion that is an error already comes as it is
//	partial(n)    the completion is PathDown: the first n segments Done, the rest InDoubt
//	kill          the endpoint goes down, at session, post or complete; what is in flight ends with PathDown
//	dup           the completion comes twice
//	corrupt       one bit of the first byte that a Read brought is flipped; a Write is let through, since its
//	              bytes are out of reach here
//
// The wrapper keeps the contract, with two exceptions that are meant to break it: dup, and corrupt. Where the
// script says nothing it passes calls through and costs next to nothing.
package fault

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Wrap returns a backend that is b with the faults of the script.
func Wrap(b backend.Backend, s *Script) backend.Backend {
	return &wrapped{
		Backend: b, script: s, name: b.Info().Name,
		memory:    map[backend.RegionID][]byte{},
		endpoints: map[*endpoint]struct{}{},
	}
}

// WrapFactory returns a factory whose backends have the faults of the script. They share its counts.
func WrapFactory(f backend.Factory, s *Script) backend.Factory {
	open := f.Open
	f.Open = func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
		b, err := open(ctx, cfg)
		if err != nil {
			return nil, err
		}
		return Wrap(b, s), nil
	}
	return f
}

type wrapped struct {
	backend.Backend
	script *Script
	name   string

	mu        sync.Mutex
	memory    map[backend.RegionID][]byte // for corrupt
	endpoints map[*endpoint]struct{}
}

// Counters implements backend.Counter, for backends that do.
func (w *wrapped) Counters() []backend.Count {
	if c, ok := w.Backend.(backend.Counter); ok {
		return c.Counters()
	}
	return nil
}

func (w *wrapped) injected(code backend.Code, op Point) *backend.Error {
	return &backend.Error{Code: code, Backend: w.name, Op: string(op), Text: "injected fault"}
}

// at does what the script says about a call that may take its time, and returns the error to give up with.
func (w *wrapped) at(ctx context.Context, p Point) error {
	return w.carryOut(ctx, p, w.script.next(p))
}

func (w *wrapped) carryOut(ctx context.Context, p Point, a action) error {
	switch a.verb {
	case fail:
		return w.injected(a.code, p)
	case delay:
		timer := time.NewTimer(a.delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			err := w.injected(backend.Cancelled, p)
			err.Err = ctx.Err()
			return err
		}
	}
	return nil
}

// Register implements backend.Backend.
func (w *wrapped) Register(ctx context.Context, m backend.Memory) ([]byte, error) {
	if err := w.at(ctx, Register); err != nil {
		return nil, err
	}
	key, err := w.Backend.Register(ctx, m)
	if err == nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.memory[m.Region] = m.Bytes
	}
	return key, err
}

// Deregister implements backend.Backend. Completions that are held back here belong to transfers that still use
// the region, as far as the host knows.
func (w *wrapped) Deregister(ctx context.Context, id backend.RegionID) error {
	if err := w.Backend.Deregister(ctx, id); err != nil {
		return err
	}
	for _, e := range w.open() {
		e.release(func(s *session) bool { return s.local == id })
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.memory, id)
	return nil
}

func (w *wrapped) open() []*endpoint {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := make([]*endpoint, 0, len(w.endpoints))
	for e := range w.endpoints {
		all = append(all, e)
	}
	return all
}

// Offer implements backend.Backend.
func (w *wrapped) Offer(ctx context.Context, peer backend.Peer) (backend.Handshake, error) {
	if err := w.at(ctx, Offer); err != nil {
		return nil, err
	}
	h, err := w.Backend.Offer(ctx, peer)
	if err != nil {
		return nil, err
	}
	return handshake{h, w}, nil
}

// Answer implements backend.Backend.
func (w *wrapped) Answer(ctx context.Context, peer backend.Peer, offer []byte) ([]byte, error) {
	if err := w.at(ctx, Answer); err != nil {
		return nil, err
	}
	return w.Backend.Answer(ctx, peer, offer)
}

// Fence implements backend.Backend.
func (w *wrapped) Fence(ctx context.Context, peer backend.Peer) error {
	if err := w.at(ctx, Fence); err != nil {
		return err
	}
	return w.Backend.Fence(ctx, peer)
}

// Close implements backend.Backend.
func (w *wrapped) Close() error {
	injected := w.at(context.Background(), Close)
	err := w.Backend.Close()
	for _, e := range w.open() {
		err = errors.Join(err, e.Close())
	}
	return errors.Join(injected, err)
}

type handshake struct {
	backend.Handshake
	backend *wrapped
}

// Establish implements backend.Handshake.
func (h handshake) Establish(ctx context.Context, answer []byte) (backend.Endpoint, error) {
	w := h.backend
	if err := w.at(ctx, Establish); err != nil {
		h.Abandon()
		return nil, err
	}
	inner, err := h.Handshake.Establish(ctx, answer)
	if err != nil {
		return nil, err
	}
	e := &endpoint{
		Endpoint: inner, backend: w, window: int64(w.Info().Capabilities.Window), sessions: map[*session]struct{}{},
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endpoints[e] = struct{}{}
	return e, nil
}
