package rpc

import (
	"context"
	"sync"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/proto/backendpb"
)

// dial is a handshake in the plugin. It is kept as long as the endpoint that has come of it, since a host that never
// heard of the endpoint abandons the handshake.
type dial struct {
	id        uint64
	handshake backend.Handshake

	mu       sync.Mutex // held while it is established
	used     bool
	endpoint *served
}

// maxHandshakes bounds the handshakes that are kept.
const maxHandshakes = 1 << 16

// Offer implements backendpb.BackendServer.
func (v *service) Offer(ctx context.Context, q *backendpb.OfferRequest) (*backendpb.OfferReply, error) {
	s := v.server
	b, err := s.opened()
	if err != nil {
		return nil, err
	}
	h, err := b.Offer(ctx, peerIn(q.GetPeer()))
	if err != nil {
		return &backendpb.OfferReply{Error: errorOut(err)}, nil
	}
	s.mu.Lock()
	kept := ctx.Err() == nil && len(s.handshakes) < maxHandshakes
	s.lastID++
	d := &dial{id: s.lastID, handshake: h}
	if kept {
		s.handshakes[d.id] = d
	}
	s.mu.Unlock()
	if !kept {
		h.Abandon()
		return &backendpb.OfferReply{Error: errorOut(backend.Errorf(backend.Busy, "too many connections and handshakes"))}, nil
	}
	return &backendpb.OfferReply{Handshake: d.id, Offer: h.Offer()}, nil
}

func (s *Server) dialOf(id uint64) *dial {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.handshakes[id]
}

func (s *Server) forgetDial(d *dial) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.handshakes, d.id)
}

// Establish implements backendpb.BackendServer.
func (v *service) Establish(ctx context.Context, q *backendpb.EstablishRequest) (*backendpb.EstablishReply, error) {
	s := v.server
	d := s.dialOf(q.GetHandshake())
	if d == nil {
		return &backendpb.EstablishReply{Error: badRequest("there is no handshake %d", q.GetHandshake())}, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.used {
		return &backendpb.EstablishReply{Error: badRequest("handshake %d was used before", d.id)}, nil
	}
	d.used = true
	bounded, cancel := withTimeout(ctx, q.GetTimeoutNs())
	defer cancel()
	endpoint, err := d.handshake.Establish(bounded, q.GetAnswer())
	if err == nil && ctx.Err() != nil { // the host has given up, and will not hear of it
		_ = endpoint.Close()
		err = &backend.Error{Code: backend.Cancelled, Op: "establish", Err: ctx.Err()}
	}
	if err == nil {
		d.endpoint, err = s.serve(d, endpoint)
	}
	if err != nil {
		s.forgetDial(d)
		return &backendpb.EstablishReply{Error: errorOut(err)}, nil
	}
	return &backendpb.EstablishReply{Endpoint: d.endpoint.id}, nil
}

// serve notes an endpoint and tells the host when it fails.
func (s *Server) serve(d *dial, endpoint backend.Endpoint) (*served, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil, backend.Errorf(backend.PathDown, "the plugin is ending") // which closes the endpoint
	}
	s.lastID++
	e := &served{server: s, dial: d, id: s.lastID, endpoint: endpoint, window: s.window}
	s.endpoints[e.id] = e
	s.running.Go(func() {
		select {
		case <-endpoint.Done():
			if !e.isClosed() {
				s.events.add(&backendpb.Event{Event: &backendpb.Event_EndpointDown{
					EndpointDown: &backendpb.EndpointDown{Endpoint: e.id},
				}}, 0, 0)
			}
		case <-s.life.Done():
		}
	})
	return e, nil
}

// Abandon implements backendpb.BackendServer. It also ends an endpoint of which the host has not heard.
func (v *service) Abandon(_ context.Context, q *backendpb.AbandonRequest) (*backendpb.AbandonReply, error) {
	s := v.server
	d := s.dialOf(q.GetHandshake())
	if d == nil {
		return &backendpb.AbandonReply{}, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case !d.used:
		d.used = true
		d.handshake.Abandon()
		s.forgetDial(d)
	case d.endpoint != nil:
		_ = d.endpoint.close() // nobody is there who could be told
	}
	return &backendpb.AbandonReply{}, nil
}

// CloseEndpoint implements backendpb.BackendServer.
func (v *service) CloseEndpoint(_ context.Context, q *backendpb.CloseEndpointRequest) (*backendpb.CloseEndpointReply, error) {
	s := v.server
	s.mu.Lock()
	e := s.endpoints[q.GetEndpoint()]
	s.mu.Unlock()
	if e == nil {
		return &backendpb.CloseEndpointReply{}, nil
	}
	return &backendpb.CloseEndpointReply{Error: errorOut(e.close())}, nil
}
