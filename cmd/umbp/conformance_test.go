package main

import (
	"context"
	"sync/atomic"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/serve"
	"github.com/umbp/umbp/plugins/tcp"
)

// brokenPluginMain is a plugin that breaks the contract in the way that its option says.
func brokenPluginMain() {
	serve.Main(backend.Factory{
		Name: "broken",
		Options: []backend.Option{{
			Name: "defect", Type: backend.StringOption, Default: "none", Help: "What is wrong with the backend.",
			Choices: []string{"none", "start", "silent", "crash", "hang", "twice", "limit", "outcomes"},
		}},
		Examine: func(_ context.Context, options backend.Values) []backend.Finding {
			library := backend.Finding{Subject: "library", Text: "libbroken.so.1"}
			if options.String("defect") != "start" {
				return []backend.Finding{library}
			}
			return []backend.Finding{library, {
				Subject: "device", State: backend.Problem, Text: "there is\nnone", Remedy: "plug one in",
			}}
		},
		Open: func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
			defect := cfg.Options.String("defect")
			if defect == "start" {
				return nil, backend.Errorf(backend.Unsupported, "there is no such device")
			}
			var err error
			if cfg.Options, err = backend.CheckOptions(tcp.Factory.Options, nil); err != nil {
				return nil, err
			}
			b, err := tcp.Factory.Open(ctx, cfg)
			if err != nil {
				return nil, err
			}
			return &broken{Backend: b, defect: defect}, nil
		},
	})
}

type broken struct {
	backend.Backend
	defect string
	fences atomic.Uint64
}

// Counters implements backend.Counter.
func (b *broken) Counters() []backend.Count {
	return []backend.Count{{Name: "fences", Value: b.fences.Load()}, {Name: "repairs"}}
}

func (b *broken) Fence(ctx context.Context, peer backend.Peer) error {
	b.fences.Add(1)
	return b.Backend.Fence(ctx, peer)
}

func (b *broken) Info() backend.Info {
	i := b.Backend.Info()
	i.Name = "broken"
	return i
}

func (b *broken) Offer(ctx context.Context, peer backend.Peer) (backend.Handshake, error) {
	h, err := b.Backend.Offer(ctx, peer)
	if err != nil {
		return nil, err
	}
	return &brokenHandshake{h, b.defect}, nil
}

type brokenHandshake struct {
	backend.Handshake
	defect string
}

func (h *brokenHandshake) Establish(ctx context.Context, answer []byte) (backend.Endpoint, error) {
	e, err := h.Handshake.Establish(ctx, answer)
	if err != nil {
		return nil, err
	}
	return &brokenEndpoint{e, h.defect}, nil
}

type brokenEndpoint struct {
	backend.Endpoint
	defect string
}

func (e *brokenEndpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	s, err := e.Endpoint.Session(ctx, local, remote, &brokenSink{sink, e.defect})
	if err != nil {
		return nil, err
	}
	return &brokenSession{s, e.defect}, nil
}

type brokenSession struct {
	backend.Session
	defect string
}

func (s *brokenSession) Post(t backend.Transfer) error {
	switch {
	case s.defect == "silent":
		return nil
	case s.defect == "crash":
		panic("a defect in Post")
	case s.defect == "hang":
		select {}
	case s.defect == "limit" && len(t.Segments) > 10:
		return backend.Errorf(backend.BadRequest, "more than 10 segments")
	}
	return s.Session.Post(t)
}

type brokenSink struct {
	backend.Sink
	defect string
}

func (s *brokenSink) Complete(c backend.Completion) {
	switch {
	case s.defect == "twice":
		s.Sink.Complete(c)
	case s.defect == "outcomes" && c.Err != nil:
		c.Outcomes = append(append([]backend.Outcome(nil), c.Outcomes...), make([]backend.Outcome, 100)...)
	}
	s.Sink.Complete(c)
}
