package reference

import (
	"context"
	"errors"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Pair is two ends on a network of their own and a connection between them, for tests that need a working
// backend and do not care which.
type Pair struct {
	Initiator, Target         backend.Backend
	InitiatorPeer, TargetPeer backend.Peer
	// Endpoint leads from Initiator to Target.
	Endpoint backend.Endpoint
}

// NewPair opens and connects two ends. The caller closes the pair.
func NewPair() (*Pair, error) {
	p := &Pair{
		InitiatorPeer: backend.Peer{Node: "initiator", Incarnation: 1, Host: "host"},
		TargetPeer:    backend.Peer{Node: "target", Incarnation: 1, Host: "host"},
	}
	factory := NewNetwork().Factory()
	options, err := backend.CheckOptions(factory.Options, nil)
	if err != nil {
		return nil, err
	}
	ctx := context.Background()
	p.Initiator, err = factory.Open(ctx, backend.Config{Self: p.InitiatorPeer, Options: options})
	if err != nil {
		return nil, err
	}
	p.Target, err = factory.Open(ctx, backend.Config{Self: p.TargetPeer, Options: options})
	if err != nil {
		return nil, errors.Join(err, p.Initiator.Close())
	}
	p.Endpoint, err = Connect(ctx, p.Initiator, p.InitiatorPeer, p.Target, p.TargetPeer)
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// Close closes both ends, and with them the endpoint.
func (p *Pair) Close() error {
	return errors.Join(p.Initiator.Close(), p.Target.Close())
}

// Target is the end that answers: a backend of this process, or whatever stands for one elsewhere.
type Target interface {
	Answer(ctx context.Context, peer backend.Peer, offer []byte) (answer []byte, err error)
}

// Connect carries offer and answer between two backends of any kind, as two hosts would over their control plane, and
// returns the endpoint from the first to the second.
func Connect(ctx context.Context, from backend.Backend, fromPeer backend.Peer, to Target, toPeer backend.Peer) (backend.Endpoint, error) {
	handshake, err := from.Offer(ctx, toPeer)
	if err != nil {
		return nil, err
	}
	answer, err := to.Answer(ctx, fromPeer, handshake.Offer())
	if err != nil {
		handshake.Abandon()
		return nil, err
	}
	return handshake.Establish(ctx, answer)
}
