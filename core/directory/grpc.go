package directory

import (
	"context"
	"iter"

	"google.golang.org/grpc"

	pb "github.com/umbp/umbp/core/directory/directorypb"
	"github.com/umbp/umbp/core/internal/grpcerr"
	"github.com/umbp/umbp/core/internal/wire"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// The bounds of one message. They keep every message below the 4 MiB that gRPC accepts by default.
const (
	maxMessageKeys = 16_384
	maxMessageText = 1 << 20 // bytes of keys
)

// Register serves d on s.
func Register(s grpc.ServiceRegistrar, d Directory) {
	pb.RegisterDirectoryServer(s, &server{directory: d})
}

// server hands the calls of clients to a Directory.
type server struct {
	pb.UnimplementedDirectoryServer
	directory Directory
}

func (s *server) Join(ctx context.Context, p *pb.JoinRequest) (*pb.JoinReply, error) {
	node := fromNode(p.GetNode())
	reply, err := s.directory.Join(ctx, &node)
	if err != nil {
		return nil, grpcerr.ToStatus(err)
	}
	return toJoinReply(reply), nil
}

func (s *server) Leave(ctx context.Context, p *pb.LeaveRequest) (*pb.LeaveReply, error) {
	if err := s.directory.Leave(ctx, wire.FromPeer(p.GetPeer())); err != nil {
		return nil, grpcerr.ToStatus(err)
	}
	return &pb.LeaveReply{}, nil
}

func (s *server) Nodes(ctx context.Context, _ *pb.NodesRequest) (*pb.NodesReply, error) {
	nodes, err := s.directory.Nodes(ctx)
	if err != nil {
		return nil, grpcerr.ToStatus(err)
	}
	return &pb.NodesReply{Nodes: convert(nodes, toNode)}, nil
}

func (s *server) Publish(ctx context.Context, p *pb.PublishRequest) (*pb.PublishReply, error) {
	req, err := fromPublishRequest(p)
	if err != nil {
		return nil, unreadable("publish", err)
	}
	var reply PublishReply
	if err := s.directory.Publish(ctx, req, &reply); err != nil {
		return nil, grpcerr.ToStatus(err)
	}
	return toPublishReply(&reply), nil
}

func (s *server) Withdraw(ctx context.Context, p *pb.WithdrawRequest) (*pb.WithdrawReply, error) {
	req, err := fromWithdrawRequest(p)
	if err != nil {
		return nil, unreadable("withdraw", err)
	}
	if err := s.directory.Withdraw(ctx, req); err != nil {
		return nil, grpcerr.ToStatus(err)
	}
	return &pb.WithdrawReply{}, nil
}

func (s *server) Place(ctx context.Context, p *pb.PlaceRequest) (*pb.PlaceReply, error) {
	req, err := fromPlaceRequest(p)
	if err != nil {
		return nil, unreadable("place", err)
	}
	var reply PlaceReply
	if err := s.directory.Place(ctx, req, &reply); err != nil {
		return nil, grpcerr.ToStatus(err)
	}
	return toPlaceReply(&reply), nil
}

func (s *server) Locate(ctx context.Context, p *pb.LocateRequest) (*pb.LocateReply, error) {
	req, err := fromLocateRequest(p)
	if err != nil {
		return nil, unreadable("locate", err)
	}
	var reply LocateReply
	if err := s.directory.Locate(ctx, req, &reply); err != nil {
		return nil, grpcerr.ToStatus(err)
	}
	return toLocateReply(&reply), nil
}

func (s *server) List(ctx context.Context, p *pb.ListRequest) (*pb.ListReply, error) {
	reply, err := s.directory.List(ctx, fromListRequest(p))
	if err != nil {
		return nil, grpcerr.ToStatus(err)
	}
	// A page may be shorter than its limit. This one ends where the message would grow too large.
	text := 0
	for i, e := range reply.Entries {
		if text += len(e.Key) + len(e.Node); text > maxMessageText {
			reply = &ListReply{Entries: reply.Entries[:i], More: true}
			break
		}
	}
	return toListReply(reply), nil
}

// unreadable reports that a request is not what any Client sends.
func unreadable(op string, err error) error {
	return grpcerr.ToStatus(&backend.Error{
		Code: backend.BadRequest, Op: op, Text: "the request cannot be read", Err: err,
	})
}

// Client is a Directory that is served elsewhere. It is safe for concurrent use. Errors are those of the
// Directory there, and PathDown when it cannot be reached.
//
// A batch with more keys than one message holds (16,384, or 1 MiB of their bytes) travels in several, one after
// the other: Policy.Together then holds for each part, and when a part fails, the call fails, although the parts
// before it have taken effect. Repeating it is harmless.
type Client struct {
	rpc pb.DirectoryClient
}

// NewClient returns a Client that calls over cc, which stays the caller's to close.
func NewClient(cc grpc.ClientConnInterface) *Client {
	return &Client{rpc: pb.NewDirectoryClient(cc)}
}

// Join implements Directory.
func (c *Client) Join(ctx context.Context, node *Node) (JoinReply, error) {
	if err := node.check(ctx); err != nil {
		return JoinReply{}, err
	}
	p, err := c.rpc.Join(ctx, &pb.JoinRequest{Node: toNode(*node)})
	if err != nil {
		return JoinReply{}, grpcerr.FromStatus(err)
	}
	reply, err := fromJoinReply(p)
	return reply, badReply("join", err)
}

// Leave implements Directory.
func (c *Client) Leave(ctx context.Context, peer backend.Peer) error {
	_, err := c.rpc.Leave(ctx, &pb.LeaveRequest{Peer: wire.ToPeer(peer)})
	return grpcerr.FromStatus(err)
}

// Nodes implements Directory.
func (c *Client) Nodes(ctx context.Context) ([]Node, error) {
	p, err := c.rpc.Nodes(ctx, &pb.NodesRequest{})
	if err != nil {
		return nil, grpcerr.FromStatus(err)
	}
	return convert(p.GetNodes(), fromNode), nil
}

// Publish implements Directory.
func (c *Client) Publish(ctx context.Context, req *PublishRequest, reply *PublishReply) error {
	if err := req.check(ctx); err != nil {
		return err
	}
	reply.Entered = reply.Entered[:0]
	for from, to := range parts(req.Keys) {
		part := *req
		part.Keys, part.Sizes = req.Keys[from:to], req.Sizes[from:to]
		p, err := c.rpc.Publish(ctx, toPublishRequest(&part))
		if err != nil {
			return grpcerr.FromStatus(err)
		}
		if err := fromPublishReply(reply, p, to-from); err != nil {
			return badReply("publish", err)
		}
	}
	return nil
}

// Withdraw implements Directory.
func (c *Client) Withdraw(ctx context.Context, req *WithdrawRequest) error {
	if err := req.check(ctx); err != nil {
		return err
	}
	for from, to := range parts(req.Keys) {
		part := *req
		part.Keys = req.Keys[from:to]
		if _, err := c.rpc.Withdraw(ctx, toWithdrawRequest(&part)); err != nil {
			return grpcerr.FromStatus(err)
		}
	}
	return nil
}

// Place implements Directory.
func (c *Client) Place(ctx context.Context, req *PlaceRequest, reply *PlaceReply) error {
	if err := req.check(ctx); err != nil {
		return err
	}
	reply.Placements, reply.Nodes = reply.Placements[:0], reply.Nodes[:0]
	for from, to := range parts(req.Keys) {
		part := *req
		part.Keys, part.Sizes = req.Keys[from:to], req.Sizes[from:to]
		p, err := c.rpc.Place(ctx, toPlaceRequest(&part))
		if err != nil {
			return grpcerr.FromStatus(err)
		}
		if err := fromPlaceReply(reply, p, to-from); err != nil {
			return badReply("place", err)
		}
	}
	return nil
}

// Locate implements Directory.
func (c *Client) Locate(ctx context.Context, req *LocateRequest, reply *LocateReply) error {
	if err := req.check(ctx); err != nil {
		return err
	}
	reply.At, reply.Nodes = reply.At[:0], reply.Nodes[:0]
	for from, to := range parts(req.Keys) {
		p, err := c.rpc.Locate(ctx, toLocateRequest(&LocateRequest{Keys: req.Keys[from:to]}))
		if err != nil {
			return grpcerr.FromStatus(err)
		}
		if err := fromLocateReply(reply, p, to-from); err != nil {
			return badReply("locate", err)
		}
	}
	return nil
}

// List implements Directory. A page may be shorter than its limit although there are more entries.
func (c *Client) List(ctx context.Context, req *ListRequest) (*ListReply, error) {
	if err := req.check(ctx); err != nil {
		return nil, err
	}
	p, err := c.rpc.List(ctx, toListRequest(req))
	if err != nil {
		return nil, grpcerr.FromStatus(err)
	}
	reply, err := fromListReply(p)
	return reply, badReply("list", err)
}

// parts yields the ranges of keys that fit into one message each. A batch without keys is one part.
func parts(keys []string) iter.Seq2[int, int] {
	return func(yield func(from, to int) bool) {
		from, text := 0, 0
		for i, key := range keys {
			if i-from == maxMessageKeys || text+len(key) > maxMessageText {
				if !yield(from, i) {
					return
				}
				from, text = i, 0
			}
			text += len(key)
		}
		yield(from, len(keys))
	}
}

// badReply reports that the directory answered what no directory may.
func badReply(op string, err error) error {
	if err == nil {
		return nil
	}
	return &backend.Error{Code: backend.Internal, Op: op, Text: "the directory's answer cannot be used", Err: err}
}
