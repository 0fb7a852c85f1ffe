// Package reference is the smallest backend: it moves bytes by copy between two ends in one process, and it
// makes every promise of package backend. Read it before you write a backend of your own.
//
// A real backend has a wire between its ends; here a Network stands for it. Backends that are opened on the same
// Network reach each other, by the same offer, answer and establish that a real one needs.
//
// The one idea to take along is that an endpoint numbers the transfers that it accepts, and completes them in
// that order. Everything that has to wait until memory is quiet (Deregister, Fence, Close) notes the number of
// the last transfer accepted and waits until that one has completed; see endpoint.wait.
package reference

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Name is the name of the backend.
const Name = "reference"

// Network is what the ends of reference backends find each other on.
type Network struct {
	mu   sync.Mutex
	ends map[address]*end
}

// An address has the incarnation in it, so that a peer that has restarted is another peer.
type address struct {
	node        string
	incarnation uint64
}

func addressOf(p backend.Peer) address { return address{p.Node, p.Incarnation} }

// NewNetwork returns a network with nobody on it.
func NewNetwork() *Network {
	return &Network{ends: map[address]*end{}}
}

// Factory returns the factory of the backends on this network.
func (n *Network) Factory() backend.Factory {
	return backend.Factory{
		Name: Name,
		Options: []backend.Option{{
			Name: "window", Type: backend.IntOption, Default: "64", Min: "1", Max: "65536",
			Help: "Transfers that one endpoint accepts before it says Busy.",
		}},
		Open: n.open,
	}
}

func (n *Network) open(_ context.Context, cfg backend.Config) (backend.Backend, error) {
	b := &end{
		network:   n,
		self:      cfg.Self,
		posted:    cfg.Posted,
		window:    cfg.Options.Int("window"),
		regions:   map[backend.RegionID]*region{},
		endpoints: map[*endpoint]struct{}{},
	}
	rand.Read(b.secret[:])
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ends[addressOf(cfg.Self)] != nil {
		return nil, refuse(backend.BadRequest, "open", cfg.Self, "this incarnation is on the network already: draw a new one at each start")
	}
	n.ends[addressOf(cfg.Self)] = b
	return b, nil
}

// refuse makes an error with its operation and the peer that it is about.
func refuse(code backend.Code, op string, peer backend.Peer, text string) *backend.Error {
	return &backend.Error{Code: code, Backend: Name, Op: op, Peer: peer, Text: text}
}

// end is one backend: one end of the network.
type end struct {
	network *Network
	self    backend.Peer
	posted  func(context.Context) error // nil when there is nothing to wait for; see backend.Config
	window  int
	// secret never leaves this end. Keys and answers are sealed with it: whoever shows one has got it from here,
	// and this end has nothing to remember about those it gave out.
	secret [32]byte

	mu        sync.Mutex
	closed    bool
	regions   map[backend.RegionID]*region
	endpoints map[*endpoint]struct{} // those of both directions: from here, and to here
}

// region is one registered region. gone is set once, by Deregister, and read by Post under the endpoint's lock.
type region struct {
	id     backend.RegionID
	rights backend.Rights
	bytes  []byte
	gone   atomic.Bool
}

func (b *end) seal(purpose string, text []byte) []byte {
	mac := hmac.New(sha256.New, b.secret[:])
	mac.Write([]byte(purpose + ":"))
	mac.Write(text)
	return mac.Sum(nil)
}

func (b *end) key(id backend.RegionID) []byte {
	return b.seal("region", binary.BigEndian.AppendUint64(nil, uint64(id)))
}

// Info implements backend.Backend.
func (b *end) Info() backend.Info {
	host := backend.Kinds(backend.HostMemory)
	return backend.Info{Name: Name, Version: "1", Capabilities: backend.Capabilities{
		Ops: backend.Write | backend.Read, Local: host, Remote: host, Reach: backend.SameProcess, Window: b.window,
	}}
}

// Register implements backend.Backend. The key is a seal on the region's id: guessing an id is not enough.
func (b *end) Register(_ context.Context, m backend.Memory) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	fault := func(code backend.Code, text string) ([]byte, error) {
		return nil, &backend.Error{Code: code, Backend: Name, Op: "register", Region: m.Region, Text: text}
	}
	switch {
	case b.closed:
		return fault(backend.PathDown, "the backend is closed")
	case m.Kind != backend.HostMemory:
		return fault(backend.Unsupported, "only host memory can be copied")
	case m.Region == 0 || len(m.Bytes) == 0:
		return fault(backend.BadRequest, "a region needs an id and memory")
	case b.regions[m.Region] != nil:
		return fault(backend.BadRequest, "the region is registered already")
	}
	b.regions[m.Region] = &region{id: m.Region, rights: m.Rights, bytes: m.Bytes}
	if m.Rights == 0 {
		return nil, nil
	}
	return b.key(m.Region), nil
}

func (b *end) region(id backend.RegionID) *region {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.regions[id]
}

// Deregister implements backend.Backend. First no new transfer may use the region, then those that were accepted
// before have to be through. If the context ends the wait, the region stays listed, and gone: a second call waits
// again.
func (b *end) Deregister(ctx context.Context, id backend.RegionID) error {
	r := b.region(id)
	if r == nil {
		return nil
	}
	r.gone.Store(true)
	for _, e := range b.connections() {
		if err := e.wait(ctx, e.last()); err != nil {
			return err
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.regions, id)
	return nil
}

// Offer implements backend.Backend. An offer names the incarnation that it is meant for, and a number that makes
// it different from every other offer.
func (b *end) Offer(_ context.Context, peer backend.Peer) (backend.Handshake, error) {
	h := &handshake{from: b, peer: peer, offer: binary.BigEndian.AppendUint64(nil, peer.Incarnation)}
	h.offer = append(h.offer, make([]byte, 16)...)
	rand.Read(h.offer[8:])
	return h, nil
}

// Answer implements backend.Backend. The answer is a seal on who offered what. Nothing is kept, so that offers
// that nobody establishes cost nothing.
func (b *end) Answer(_ context.Context, peer backend.Peer, offer []byte) ([]byte, error) {
	if len(offer) != 24 {
		return nil, refuse(backend.BadRequest, "answer", peer, "this is not an offer of the reference backend")
	}
	if binary.BigEndian.Uint64(offer) != b.self.Incarnation {
		return nil, refuse(backend.PeerGone, "answer", peer, "the offer is meant for another incarnation of "+b.self.String())
	}
	return b.seal("connect", append([]byte(peer.String()), offer...)), nil
}

// handshake holds nothing but its own memory, so that Abandon has nothing to free.
type handshake struct {
	from  *end
	peer  backend.Peer
	offer []byte
}

func (h *handshake) Offer() []byte { return h.offer }

func (h *handshake) Abandon() {}

// Establish finds the target, has it recognise its own answer, and tells both ends about the endpoint.
func (h *handshake) Establish(ctx context.Context, answer []byte) (backend.Endpoint, error) {
	if err := ctx.Err(); err != nil {
		return nil, cancelled("establish", h.peer, err)
	}
	h.from.network.mu.Lock()
	to := h.from.network.ends[addressOf(h.peer)]
	h.from.network.mu.Unlock()
	if to == nil {
		return nil, refuse(backend.PeerGone, "establish", h.peer, "this incarnation is not on the network")
	}
	if !hmac.Equal(answer, to.seal("connect", append([]byte(h.from.self.String()), h.offer...))) {
		return nil, refuse(backend.Denied, "establish", h.peer, "the answer is not one that the peer gave to this offer")
	}
	e := newEndpoint(h.from, to)
	if !h.from.attach(e) || !to.attach(e) {
		e.fail(refuse(backend.PathDown, "establish", h.peer, "an end is closed"))
	}
	if err := e.down(); err != nil { // an end may also have closed after it was attached
		<-e.ended
		h.from.detach(e)
		to.detach(e)
		return nil, err
	}
	return e, nil
}

func (b *end) attach(e *endpoint) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closed {
		b.endpoints[e] = struct{}{}
	}
	return !b.closed
}

func (b *end) detach(e *endpoint) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.endpoints, e)
}

func (b *end) connections() []*endpoint {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Collect(maps.Keys(b.endpoints))
}

// Fence implements backend.Backend. Nothing has to be broken for it: this end sees the queues of its peers, and
// waits for what is in them, or is on its way to them, now.
func (b *end) Fence(ctx context.Context, peer backend.Peer) error {
	for _, e := range b.connections() {
		if e.to != b || addressOf(e.from.self) != addressOf(peer) {
			continue
		}
		if e.from.posted != nil {
			if err := e.from.posted(ctx); err != nil {
				return err
			}
		}
		if err := e.wait(ctx, e.last()); err != nil {
			return err
		}
	}
	return nil
}

// Close implements backend.Backend. It takes the end off the network, then ends every endpoint that touches its
// memory, in either direction.
func (b *end) Close() error {
	b.network.mu.Lock()
	if b.network.ends[addressOf(b.self)] == b {
		delete(b.network.ends, addressOf(b.self))
	}
	b.network.mu.Unlock()
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	for _, e := range b.connections() {
		e.fail(refuse(backend.PathDown, "", b.self, "this end of the endpoint was closed"))
		<-e.ended
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.regions)
	return nil
}

func cancelled(op string, peer backend.Peer, cause error) *backend.Error {
	return &backend.Error{Code: backend.Cancelled, Backend: Name, Op: op, Peer: peer, Err: cause}
}
