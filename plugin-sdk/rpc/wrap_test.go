package rpc_test

import (
	"context"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/null"
)

// stuck returns the null backend, whose sessions accept transfers and never complete them.
func stuck() backend.Factory {
	f := null.Factory
	f.Name = "stuck"
	return wrapSessions(f, func(_ backend.Session, _ backend.Sink) backend.Session { return stuckSession{} })
}

type stuckSession struct{}

func (stuckSession) Post(backend.Transfer) error { return nil }
func (stuckSession) Cancel(uint64)               {}
func (stuckSession) Close() error                { return nil }

// wrapSessions returns f, with something else for its sessions.
func wrapSessions(f backend.Factory, wrap func(backend.Session, backend.Sink) backend.Session) backend.Factory {
	open := f.Open
	f.Open = func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
		b, err := open(ctx, cfg)
		if err != nil {
			return nil, err
		}
		return wrappedBackend{b, f.Name, wrap}, nil
	}
	return f
}

type wrappedBackend struct {
	backend.Backend
	name string
	wrap func(backend.Session, backend.Sink) backend.Session
}

func (b wrappedBackend) Info() backend.Info {
	i := b.Backend.Info()
	i.Name = b.name
	return i
}

func (b wrappedBackend) Offer(ctx context.Context, peer backend.Peer) (backend.Handshake, error) {
	h, err := b.Backend.Offer(ctx, peer)
	return wrappedHandshake{h, b.wrap}, err
}

type wrappedHandshake struct {
	backend.Handshake
	wrap func(backend.Session, backend.Sink) backend.Session
}

func (h wrappedHandshake) Establish(ctx context.Context, answer []byte) (backend.Endpoint, error) {
	e, err := h.Handshake.Establish(ctx, answer)
	if err != nil {
		return nil, err
	}
	return wrappedEndpoint{e, h.wrap}, nil
}

type wrappedEndpoint struct {
	backend.Endpoint
	wrap func(backend.Session, backend.Sink) backend.Session
}

func (e wrappedEndpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	s, err := e.Endpoint.Session(ctx, local, remote, sink)
	if err != nil {
		return nil, err
	}
	return e.wrap(s, sink), nil
}
