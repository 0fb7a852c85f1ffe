// Package null is a backend that moves no bytes. It accepts transfers, checks them, and completes them, so that
// what a batch costs on the host's side can be measured alone.
//
// It says what it is: its capabilities are marked Simulated, its version says that no bytes move, and a read
// leaves the destination as it was. A transfer completes within Post, so that what is measured is the host's own work,
// and not how fast the system wakes goroutines. Any peer can be reached; nobody has to be there.
package null

import (
	"bytes"
	"context"
	"maps"
	"slices"
	"sync"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Name is the name of the backend.
const Name = "null"

var kinds = backend.Kinds(backend.HostMemory, backend.GPUMemory)

// hello is what offers and answers say. There is nobody behind it; it only tells stray bytes from a handshake.
var hello = []byte("umbp null backend")

// Factory opens the backend.
var Factory = backend.Factory{
	Name: Name,
	Info: &info,
	Open: func(context.Context, backend.Config) (backend.Backend, error) {
		return &null{sizes: map[backend.RegionID]uint64{}, endpoints: map[*endpoint]struct{}{}}, nil
	},
}

// window is what is claimed; a transfer leaves it before the next one can come.
const window = 1 << 15

var info = backend.Info{Name: Name, Version: "1 (moves no bytes)", Capabilities: backend.Capabilities{
	Ops: backend.Write | backend.Read, Local: kinds, Remote: kinds, Reach: backend.Network,
	Window: window, Simulated: true,
}}

type null struct {
	mu        sync.Mutex
	closed    bool
	sizes     map[backend.RegionID]uint64 // of the registered regions; the memory itself is never touched
	endpoints map[*endpoint]struct{}
}

func refuse(code backend.Code, op string, peer backend.Peer, text string) *backend.Error {
	return &backend.Error{Code: code, Backend: Name, Op: op, Peer: peer, Text: text}
}

// Info implements backend.Backend.
func (b *null) Info() backend.Info { return info }

// Register implements backend.Backend. No peer needs a key.
func (b *null) Register(_ context.Context, m backend.Memory) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	fault := func(code backend.Code, text string) ([]byte, error) {
		return nil, &backend.Error{Code: code, Backend: Name, Op: "register", Region: m.Region, Text: text}
	}
	switch {
	case b.closed:
		return fault(backend.PathDown, "the backend is closed")
	case !kinds.Has(m.Kind):
		return fault(backend.Unsupported, "memory of this kind is not claimed")
	case m.Region == 0 || m.Size() == 0:
		return fault(backend.BadRequest, "a region needs an id and memory")
	}
	if err := m.Check(); err != nil {
		return nil, &backend.Error{Code: backend.BadRequest, Backend: Name, Op: "register", Region: m.Region, Err: err}
	}
	if _, twice := b.sizes[m.Region]; twice {
		return fault(backend.BadRequest, "the region is registered already")
	}
	b.sizes[m.Region] = m.Size()
	return nil, nil
}

// region returns the size of a registered region.
func (b *null) region(id backend.RegionID) (uint64, *backend.Error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	size, ok := b.sizes[id]
	if !ok {
		return 0, &backend.Error{Code: backend.BadRequest, Backend: Name, Op: "session", Region: id,
			Text: "the local region is not registered"}
	}
	return size, nil
}

// Deregister implements backend.Backend.
func (b *null) Deregister(ctx context.Context, id backend.RegionID) error {
	b.mu.Lock()
	delete(b.sizes, id)
	b.mu.Unlock()
	for _, e := range b.open() {
		if err := e.closeSessions(ctx, func(s *session) bool { return s.local == id }); err != nil {
			return err
		}
	}
	return nil
}

func (b *null) open() []*endpoint {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Collect(maps.Keys(b.endpoints))
}

// Offer implements backend.Backend.
func (b *null) Offer(_ context.Context, peer backend.Peer) (backend.Handshake, error) {
	return handshake{b, peer}, nil
}

// Answer implements backend.Backend.
func (b *null) Answer(_ context.Context, peer backend.Peer, offer []byte) ([]byte, error) {
	if !bytes.Equal(offer, hello) {
		return nil, refuse(backend.BadRequest, "answer", peer, "this is not an offer of the null backend")
	}
	return bytes.Clone(hello), nil
}

type handshake struct {
	backend *null
	peer    backend.Peer
}

func (h handshake) Offer() []byte { return bytes.Clone(hello) }

func (h handshake) Abandon() {}

func (h handshake) Establish(_ context.Context, answer []byte) (backend.Endpoint, error) {
	if !bytes.Equal(answer, hello) {
		return nil, refuse(backend.BadRequest, "establish", h.peer, "this is not an answer of the null backend")
	}
	b := h.backend
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, refuse(backend.PathDown, "establish", h.peer, "the backend is closed")
	}
	e := newEndpoint(b, h.peer)
	b.endpoints[e] = struct{}{}
	return e, nil
}

// Fence implements backend.Backend. Peers never touch memory here.
func (b *null) Fence(context.Context, backend.Peer) error { return nil }

// Close implements backend.Backend.
func (b *null) Close() error {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	for _, e := range b.open() {
		e.Close()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.sizes)
	return nil
}
