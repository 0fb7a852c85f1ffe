// Package admin is what a node lets its operator do while it runs: look at its backends, restart the process of one,
// and disable one or enable it again.
//
// The service stands on the node's control plane, beside those for clients, and asks for the same credentials.
package admin

import (
	"context"
	"math"
	"time"

	"google.golang.org/grpc"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/admin/adminpb"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/core/internal/grpcerr"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Engine is what the service works on: a *core.Engine.
type Engine interface {
	BackendStates() []core.BackendState
	RestartBackend(ctx context.Context, name string) error
	SetBackendEnabled(ctx context.Context, name string, enabled bool) error
}

// Register offers an engine to operators over gRPC.
func Register(s grpc.ServiceRegistrar, e Engine) {
	adminpb.RegisterAdminServiceServer(s, &server{engine: e})
}

// server is the engine's end of the wire.
type server struct {
	adminpb.UnimplementedAdminServiceServer
	engine Engine
}

func (s *server) Backends(context.Context, *adminpb.BackendsRequest) (*adminpb.BackendsReply, error) {
	reply := &adminpb.BackendsReply{}
	for _, b := range s.engine.BackendStates() {
		reply.Backends = append(reply.Backends, toProto(&b))
	}
	return reply, nil
}

func (s *server) RestartBackend(ctx context.Context, req *adminpb.RestartBackendRequest) (*adminpb.RestartBackendReply, error) {
	err := s.engine.RestartBackend(ctx, req.GetBackend())
	return &adminpb.RestartBackendReply{}, grpcerr.ToStatus(err)
}

func (s *server) SetBackendEnabled(ctx context.Context, req *adminpb.SetBackendEnabledRequest) (*adminpb.SetBackendEnabledReply, error) {
	err := s.engine.SetBackendEnabled(ctx, req.GetBackend(), req.GetEnabled())
	return &adminpb.SetBackendEnabledReply{}, grpcerr.ToStatus(err)
}

// Client reaches the engine of a node over gRPC. It may be used by any number of goroutines. The connection belongs to
// the caller. Errors have the codes that they have at the node.
type Client struct{ pb adminpb.AdminServiceClient }

// NewClient returns a client over a connection.
func NewClient(cc grpc.ClientConnInterface) *Client {
	return &Client{pb: adminpb.NewAdminServiceClient(cc)}
}

// Backends returns the state of each backend of the node.
func (c *Client) Backends(ctx context.Context) ([]core.BackendState, error) {
	p, err := c.pb.Backends(ctx, &adminpb.BackendsRequest{})
	if err != nil {
		return nil, grpcerr.FromStatus(err)
	}
	var states []core.BackendState
	for _, b := range p.GetBackends() {
		states = append(states, fromProto(b))
	}
	return states, nil
}

// RestartBackend restarts the process of a backend. See core.Engine.
func (c *Client) RestartBackend(ctx context.Context, name string) error {
	_, err := c.pb.RestartBackend(ctx, &adminpb.RestartBackendRequest{Backend: name})
	return grpcerr.FromStatus(err)
}

// SetBackendEnabled disables a backend, or enables it again. See core.Engine.
func (c *Client) SetBackendEnabled(ctx context.Context, name string, enabled bool) error {
	_, err := c.pb.SetBackendEnabled(ctx, &adminpb.SetBackendEnabledRequest{Backend: name, Enabled: enabled})
	return grpcerr.FromStatus(err)
}

func toProto(b *core.BackendState) *adminpb.Backend {
	p := &adminpb.Backend{Name: b.Name, Reason: b.Reason, Disabled: b.Disabled}
	if b.Info != nil {
		caps := &b.Info.Capabilities
		p.Info = &adminpb.Info{
			Version: b.Info.Version, Ops: uint32(caps.Ops), Local: uint32(caps.Local), Remote: uint32(caps.Remote),
			Reach: uint32(caps.Reach), Window: uint32(caps.Window), Simulated: caps.Simulated, Links: toLinks(caps.Links),
		}
	}
	if b.Process != nil {
		p.Process = &adminpb.Process{
			Phase: string(b.Process.Phase), Pid: uint32(b.Process.PID), Restarts: uint64(b.Process.Restarts),
			SinceUnixNs: b.Process.Since.UnixNano(),
		}
	}
	return p
}

// fromProto reads what a node says, which may be of another version: what does not fit is cut down to what does.
func fromProto(p *adminpb.Backend) core.BackendState {
	b := core.BackendState{Name: p.GetName(), Reason: p.GetReason(), Disabled: p.GetDisabled()}
	if i := p.GetInfo(); i != nil {
		b.Info = &backend.Info{Name: b.Name, Version: i.GetVersion(), Capabilities: backend.Capabilities{
			Ops: backend.Op(i.GetOps()), Local: backend.MemoryKindSet(i.GetLocal()), Remote: backend.MemoryKindSet(i.GetRemote()),
			Reach: backend.Reach(min(i.GetReach(), math.MaxUint8)), Window: int(i.GetWindow()), Simulated: i.GetSimulated(),
			Links: fromLinks(i.GetLinks()),
		}}
	}
	if s := p.GetProcess(); s != nil {
		b.Process = &host.State{
			Phase: host.Phase(s.GetPhase()), PID: int(s.GetPid()), Restarts: int(s.GetRestarts()),
			Since: time.Unix(0, s.GetSinceUnixNs()),
		}
	}
	return b
}

// toLinks tells no links, where the backend moves bytes between all places, from none.
func toLinks(links []backend.Link) *adminpb.Links {
	if links == nil {
		return nil
	}
	p := &adminpb.Links{}
	for _, l := range links {
		p.Links = append(p.Links, &adminpb.Link{Near: l.Near, Far: l.Far, Cost: int64(l.Cost), Text: l.Text})
	}
	return p
}

func fromLinks(p *adminpb.Links) []backend.Link {
	if p == nil {
		return nil
	}
	links := []backend.Link{}
	for _, l := range p.GetLinks() {
		links = append(links, backend.Link{Near: l.GetNear(), Far: l.GetFar(), Cost: int(l.GetCost()), Text: l.GetText()})
	}
	return links
}
