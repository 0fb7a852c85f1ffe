package peer

import (
	"context"

	"google.golang.org/grpc"

	"github.com/umbp/umbp/core/internal/grpcerr"
	"github.com/umbp/umbp/core/peer/peerpb"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// MaxMessageBytes is more than the largest message that the limits on a call allow. A server that Register is
// called on is made with grpc.MaxRecvMsgSize(MaxMessageBytes): the default of gRPC holds fewer keys.
const MaxMessageBytes = 16 << 20

// Register offers a Service over gRPC.
func Register(s grpc.ServiceRegistrar, svc Service) {
	peerpb.RegisterPeerServiceServer(s, &server{svc: svc})
}

// server is the Service's end of the wire.
type server struct {
	peerpb.UnimplementedPeerServiceServer
	svc Service
}

func (s *server) Describe(ctx context.Context, _ *peerpb.DescribeRequest) (*peerpb.DescribeReply, error) {
	d, err := s.svc.Describe(ctx)
	if err != nil {
		return nil, grpcerr.ToStatus(err)
	}
	return descriptionToProto(d), nil
}

func (s *server) Answer(ctx context.Context, req *peerpb.AnswerRequest) (*peerpb.AnswerReply, error) {
	reply, err := s.svc.Answer(ctx, answerFromProto(req))
	if err != nil {
		return nil, grpcerr.ToStatus(err)
	}
	return answeredToProto(reply), nil
}

func (s *server) Allocate(ctx context.Context, req *peerpb.AllocateRequest) (*peerpb.AllocateReply, error) {
	r, err := allocateFromProto(req)
	var reply AllocateReply
	if err == nil {
		err = s.svc.Allocate(ctx, r, &reply)
	}
	if err != nil {
		return nil, grpcerr.ToStatus(err)
	}
	return allocatedToProto(&reply), nil
}

func (s *server) Commit(ctx context.Context, req *peerpb.CommitRequest) (*peerpb.CommitReply, error) {
	r, err := commitFromProto(req)
	var reply CommitReply
	if err == nil {
		err = s.svc.Commit(ctx, r, &reply)
	}
	return &peerpb.CommitReply{Statuses: statusesToProto(reply.Statuses)}, grpcerr.ToStatus(err)
}

func (s *server) Abort(ctx context.Context, req *peerpb.AbortRequest) (*peerpb.AbortReply, error) {
	return &peerpb.AbortReply{}, grpcerr.ToStatus(s.svc.Abort(ctx, abortFromProto(req)))
}

func (s *server) Resolve(ctx context.Context, req *peerpb.ResolveRequest) (*peerpb.ResolveReply, error) {
	r, err := resolveFromProto(req)
	var reply ResolveReply
	if err == nil {
		err = s.svc.Resolve(ctx, r, &reply)
	}
	if err != nil {
		return nil, grpcerr.ToStatus(err)
	}
	return resolvedToProto(&reply), nil
}

func (s *server) Release(ctx context.Context, req *peerpb.ReleaseRequest) (*peerpb.ReleaseReply, error) {
	var reply ReleaseReply
	err := s.svc.Release(ctx, releaseFromProto(req), &reply)
	return releasedToProto(&reply), grpcerr.ToStatus(err)
}

func (s *server) Remove(ctx context.Context, req *peerpb.RemoveRequest) (*peerpb.RemoveReply, error) {
	r, err := removeFromProto(req)
	var reply RemoveReply
	if err == nil {
		err = s.svc.Remove(ctx, r, &reply)
	}
	return &peerpb.RemoveReply{Statuses: statusesToProto(reply.Statuses)}, grpcerr.ToStatus(err)
}

func (s *server) Stats(ctx context.Context, _ *peerpb.StatsRequest) (*peerpb.StatsReply, error) {
	st, err := s.svc.Stats(ctx)
	if err != nil {
		return nil, grpcerr.ToStatus(err)
	}
	return statsToProto(st), nil
}

// Client reaches a Service over gRPC. It may be used by any number of goroutines. The connection belongs to the
// caller.
type Client struct{ pb peerpb.PeerServiceClient }

var _ Service = (*Client)(nil)

// NewClient returns a client over a connection.
func NewClient(cc grpc.ClientConnInterface) *Client {
	return &Client{pb: peerpb.NewPeerServiceClient(cc)}
}

// large lets replies be as long as the limits on a call allow.
var large = grpc.MaxCallRecvMsgSize(MaxMessageBytes)

// Describe implements Service.
func (c *Client) Describe(ctx context.Context) (*Description, error) {
	p, err := c.pb.Describe(ctx, &peerpb.DescribeRequest{}, large)
	if err != nil {
		return nil, grpcerr.FromStatus(err)
	}
	d, err := descriptionFromProto(p)
	return d, blame("describe", err)
}

// Answer implements Service.
func (c *Client) Answer(ctx context.Context, req *AnswerRequest) (*AnswerReply, error) {
	p, err := c.pb.Answer(ctx, answerToProto(req), large)
	if err != nil {
		return nil, grpcerr.FromStatus(err)
	}
	return answeredFromProto(p), nil
}

// Allocate implements Service.
func (c *Client) Allocate(ctx context.Context, req *AllocateRequest, reply *AllocateReply) error {
	p, err := c.pb.Allocate(ctx, allocateToProto(req), large)
	if err != nil {
		return grpcerr.FromStatus(err)
	}
	return blame("allocate", allocatedFromProto(p, len(req.Keys), reply))
}

// Commit implements Service.
func (c *Client) Commit(ctx context.Context, req *CommitRequest, reply *CommitReply) error {
	p, err := c.pb.Commit(ctx, commitToProto(req), large)
	if err != nil {
		return grpcerr.FromStatus(err)
	}
	reply.Statuses = statusesFromProto(p.GetStatuses(), reply.Statuses)
	return blame("commit", columns("statuses", len(req.Slots), len(reply.Statuses)))
}

// Abort implements Service.
func (c *Client) Abort(ctx context.Context, req *AbortRequest) error {
	_, err := c.pb.Abort(ctx, abortToProto(req))
	return grpcerr.FromStatus(err)
}

// Resolve implements Service.
func (c *Client) Resolve(ctx context.Context, req *ResolveRequest, reply *ResolveReply) error {
	p, err := c.pb.Resolve(ctx, resolveToProto(req), large)
	if err != nil {
		return grpcerr.FromStatus(err)
	}
	return blame("resolve", resolvedFromProto(p, len(req.Keys), reply))
}

// Release implements Service.
func (c *Client) Release(ctx context.Context, req *ReleaseRequest, reply *ReleaseReply) error {
	p, err := c.pb.Release(ctx, releaseToProto(req))
	*reply = *releasedFromProto(p)
	return grpcerr.FromStatus(err)
}

// Remove implements Service.
func (c *Client) Remove(ctx context.Context, req *RemoveRequest, reply *RemoveReply) error {
	p, err := c.pb.Remove(ctx, removeToProto(req), large)
	if err != nil {
		return grpcerr.FromStatus(err)
	}
	reply.Statuses = statusesFromProto(p.GetStatuses(), reply.Statuses)
	return blame("remove", columns("statuses", len(req.Keys), len(reply.Statuses)))
}

// Stats implements Service.
func (c *Client) Stats(ctx context.Context) (*Stats, error) {
	p, err := c.pb.Stats(ctx, &peerpb.StatsRequest{}, large)
	if err != nil {
		return nil, grpcerr.FromStatus(err)
	}
	return statsFromProto(p), nil
}

// blame says that a reply that makes no sense is the node's defect, not the caller's mistake.
func blame(op string, err error) error {
	if err == nil {
		return nil
	}
	return &backend.Error{Code: backend.Internal, Op: op, Text: "the node's reply cannot be used", Err: err}
}
