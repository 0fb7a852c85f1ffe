package samehost

import (
	"context"
	"crypto/subtle"
	"path/filepath"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Offer implements backend.Backend.
func (i *Instance) Offer(_ context.Context, peer backend.Peer) (backend.Handshake, error) {
	if i.self.Host != "" && peer.Host != "" && i.self.Host != peer.Host {
		return nil, &backend.Error{
			Code: backend.Unsupported, Op: "offer", Backend: i.name, Peer: peer,
			Text: "the peer is on another host: " + peer.Host + ", this is " + i.self.Host,
		}
	}
	if len(peer.Node) > maxString || len(i.self.Node) > maxString {
		return nil, &backend.Error{
			Code: backend.BadRequest, Op: "offer", Backend: i.name, Peer: peer, Text: "the name of the node is too long",
		}
	}
	o := offer{from: i.self, to: peer}
	return &handshake{instance: i, peer: peer, offer: o.encode()}, nil
}

// Answer implements backend.Backend.
func (i *Instance) Answer(_ context.Context, peer backend.Peer, bytes []byte) ([]byte, error) {
	fail := func(code backend.Code, text string) ([]byte, error) {
		return nil, &backend.Error{Code: code, Op: "answer", Backend: i.name, Peer: peer, Text: text}
	}
	o, err := parseOffer(bytes)
	if err != nil {
		return nil, i.errMalformed("answer", "offer", peer)
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
	instance *Instance
	peer     backend.Peer
	offer    []byte
}

// Offer implements backend.Handshake.
func (h *handshake) Offer() []byte { return h.offer }

// Abandon implements backend.Handshake.
func (h *handshake) Abandon() {}

// Establish implements backend.Handshake.
func (h *handshake) Establish(ctx context.Context, bytes []byte) (backend.Endpoint, error) {
	i := h.instance
	if err := ctx.Err(); err != nil {
		return nil, &backend.Error{Code: backend.Cancelled, Op: "establish", Backend: i.name, Peer: h.peer, Err: err}
	}
	a, err := parseAnswer(bytes)
	if err != nil {
		return nil, i.errMalformed("establish", "answer", h.peer)
	}
	e := newEndpoint(i, h.peer)
	if target, ok := instances.Load(a.instance); ok {
		e.reach, err = reachLocal(target.(*Instance), &a, e)
	} else if !filepath.IsAbs(a.socket) {
		err = i.errMalformed("establish", "answer", h.peer)
	} else {
		e.reach, err = reachSocket(ctx, &a, e)
	}
	if err != nil {
		e.cancel()
		return nil, err
	}
	err = i.adopt(e)
	go e.keep() // which disowns it again, perhaps at once
	if err != nil {
		e.Close()
		return nil, err
	}
	return e, nil
}

// reach is an endpoint's way to its target.
type reach interface {
	// open returns a region of the target, against its key. Opening it again costs little.
	open(ctx context.Context, id backend.RegionID, key regionKey) (area, error)
	// ask has the target's mover answer a question.
	ask(ctx context.Context, question []byte) ([]byte, error)
	// leave gives up everything that open returned, and then lets the target know. It is called once, when nothing uses
	// the reach and nothing will.
	leave()
}

// area is a region of the target as the initiator sees it.
type area struct {
	region Region
	rights backend.Rights
}

// localReach is the way to a target in the same process.
type localReach struct {
	target *Instance
	guest  *Guest
	asking chan struct{} // full while a question is with the target
}

func reachLocal(target *Instance, a *answer, e *endpoint) (*localReach, error) {
	if target.name != e.instance.name {
		return nil, &backend.Error{
			Code: backend.Denied, Op: "establish", Backend: e.instance.name, Peer: e.peer,
			Text: "the answer was given by backend " + target.name,
		}
	}
	key, ok := target.granted(a.grant)
	if !ok || subtle.ConstantTimeCompare(key[:], a.secret[:]) != 1 {
		return nil, e.instance.explain(target.errNoGrant(), "establish", e.peer, 0)
	}
	revoke := func() { e.fail(target.errRevoked(e.peer)) }
	g, refusal := target.admit(a.grant, revoke, e.quiet)
	if refusal != nil {
		return nil, e.instance.explain(refusal, "establish", e.peer, 0)
	}
	return &localReach{target: target, guest: g, asking: make(chan struct{}, 1)}, nil
}

func (l *localReach) open(_ context.Context, id backend.RegionID, key regionKey) (area, error) {
	r, refusal := l.target.lend(l.guest, id, key, false)
	if refusal != nil {
		return area{}, refusal
	}
	return area{region: r.region, rights: r.rights}, nil
}

func (l *localReach) ask(ctx context.Context, question []byte) ([]byte, error) {
	select {
	case l.asking <- struct{}{}:
		defer func() { <-l.asking }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	b, refusal := l.target.answer(ctx, l.guest, question)
	if refusal != nil {
		return nil, refusal
	}
	return b, nil
}

func (l *localReach) leave() { l.target.forget(l.guest) }
