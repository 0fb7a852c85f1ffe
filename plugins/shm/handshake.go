package shm

import (
	"context"
	"crypto/subtle"
	"path/filepath"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Offer implements backend.Backend.
func (i *instance) Offer(_ context.Context, peer backend.Peer) (backend.Handshake, error) {
	if i.self.Host != "" && peer.Host != "" && i.self.Host != peer.Host {
		return nil, &backend.Error{
			Code: backend.Unsupported, Op: "offer", Backend: name, Peer: peer,
			Text: "the peer is on another host: " + peer.Host + ", this is " + i.self.Host,
		}
	}
	if len(peer.Node) > maxString || len(i.self.Node) > maxString {
		return nil, &backend.Error{
			Code: backend.BadRequest, Op: "offer", Backend: name, Peer: peer, Text: "the name of the node is too long",
		}
	}
	o := offer{from: i.self, to: peer}
	return &handshake{instance: i, peer: peer, offer: o.encode()}, nil
}

// Answer implements backend.Backend.
func (i *instance) Answer(_ context.Context, peer backend.Peer, bytes []byte) ([]byte, error) {
	fail := func(code backend.Code, text string) ([]byte, error) {
		return nil, &backend.Error{Code: code, Op: "answer", Backend: name, Peer: peer, Text: text}
	}
	o, err := parseOffer(bytes)
	if err != nil {
		return nil, errMalformed("answer", "offer", peer)
	}
	if o.from.Node != peer.Node || o.from.Incarnation != peer.Incarnation {
		return fail(backend.Denied, "the offer was made by "+o.from.String())
	}
	if o.to.Node != i.self.Node || o.to.Incarnation != i.self.Incarnation {
		return fail(backend.PeerGone, "the offer was made to "+o.to.String()+", this is "+i.self.String())
	}
	a := answer{instance: i.id, socket: i.socket}
	if a.grant, a.secret, err = i.grant(peer); err != nil {
		return nil, err
	}
	return a.encode(), nil
}

// handshake is an offer that was made. It holds nothing.
type handshake struct {
	instance *instance
	peer     backend.Peer
	offer    []byte
}

// Offer implements backend.Handshake.
func (h *handshake) Offer() []byte { return h.offer }

// Abandon implements backend.Handshake.
func (h *handshake) Abandon() {}

// Establish implements backend.Handshake.
func (h *handshake) Establish(ctx context.Context, bytes []byte) (backend.Endpoint, error) {
	if err := ctx.Err(); err != nil {
		return nil, &backend.Error{Code: backend.Cancelled, Op: "establish", Backend: name, Peer: h.peer, Err: err}
	}
	a, err := parseAnswer(bytes)
	if err != nil {
		return nil, errMalformed("establish", "answer", h.peer)
	}
	e := newEndpoint(h.instance, h.peer)
	if target, ok := instances.Load(a.instance); ok {
		e.reach, err = reachLocal(target.(*instance), &a, e)
	} else if !filepath.IsAbs(a.socket) {
		err = errMalformed("establish", "answer", h.peer)
	} else {
		e.reach, err = reachSocket(ctx, &a, e)
	}
	if err != nil {
		return nil, err
	}
	go e.keep()
	if err := h.instance.adopt(e); err != nil {
		e.Close()
		return nil, err
	}
	return e, nil
}

// reach is an endpoint's way to its target.
type reach interface {
	// open returns a region of the target, against its key. Opening it again costs little.
	open(ctx context.Context, id backend.RegionID, key regionKey) (area, error)
	// leave gives up everything that open returned, and then lets the target know. It is called once, when no copy
	// runs and none can start.
	leave()
}

// area is a region of the target as the initiator sees it.
type area struct {
	bytes  []byte // mapped read-only where rights lack RemoteWrite
	rights backend.Rights
}

// localReach is the way to a target in the same process.
type localReach struct {
	target *instance
	guest  *guest
}

func reachLocal(target *instance, a *answer, e *endpoint) (*localReach, error) {
	key, ok := target.granted(a.grant)
	if !ok || subtle.ConstantTimeCompare(key[:], a.secret[:]) != 1 {
		return nil, errNoGrant
	}
	revoke := func() { e.fail(errRevoked(e.peer)) }
	g, refusal := target.admit(a.grant, revoke, e.quiet)
	if refusal != nil {
		return nil, refusal
	}
	return &localReach{target: target, guest: g}, nil
}

func (l *localReach) open(_ context.Context, id backend.RegionID, key regionKey) (area, error) {
	r, refusal := l.target.lend(l.guest, id, key, false)
	if refusal != nil {
		return area{}, refusal
	}
	return area{bytes: r.memory.Bytes, rights: r.memory.Rights}, nil
}

func (l *localReach) leave() { l.target.forget(l.guest) }

func errRevoked(peer backend.Peer) *backend.Error {
	return &backend.Error{
		Code: backend.PathDown, Backend: name, Peer: peer,
		Text: "the peer has taken its memory back: connect again",
	}
}
