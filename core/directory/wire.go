package directory

import (
	"fmt"
	"slices"
	"time"

	pb "github.com/umbp/umbp/core/directory/directorypb"
	"github.com/umbp/umbp/core/internal/wire"
)

// This file turns requests and replies into their messages and back: toX makes the message of X, and fromX fills
// an X from what came over the wire, which is untrusted. Replies are appended to what the caller's reply holds,
// since a large batch travels in several messages.

func toNode(n Node) *pb.Node {
	return &pb.Node{Peer: wire.ToPeer(n.Peer), Address: n.Address, Capacity: n.Capacity, Free: n.Free}
}

func fromNode(p *pb.Node) Node {
	return Node{Peer: wire.FromPeer(p.GetPeer()), Address: p.GetAddress(), Capacity: p.GetCapacity(), Free: p.GetFree()}
}

// convert returns f of each element.
func convert[A, B any](from []A, f func(A) B) []B {
	if len(from) == 0 {
		return nil
	}
	to := make([]B, len(from))
	for i, a := range from {
		to[i] = f(a)
	}
	return to
}

func toJoinReply(r JoinReply) *pb.JoinReply {
	return &pb.JoinReply{TtlNs: int64(r.TTL), Membership: r.Membership}
}

func fromJoinReply(p *pb.JoinReply) (JoinReply, error) {
	r := JoinReply{TTL: time.Duration(p.GetTtlNs()), Membership: p.GetMembership()}
	if r.TTL <= 0 {
		return r, fmt.Errorf("a membership of %v is too short to be renewed", r.TTL)
	}
	if r.Membership == 0 {
		return r, fmt.Errorf("the membership has no number")
	}
	return r, nil
}

func toPublishRequest(r *PublishRequest) *pb.PublishRequest {
	return &pb.PublishRequest{
		Peer: wire.ToPeer(r.Peer), Membership: r.Membership, Sequence: r.Sequence,
		Keys: wire.ToKeys(r.Keys), Sizes: r.Sizes, Free: r.Free,
	}
}

func fromPublishRequest(p *pb.PublishRequest) (*PublishRequest, error) {
	keys, err := wire.FromKeys(p.GetKeys(), maxMessageKeys)
	return &PublishRequest{
		Peer: wire.FromPeer(p.GetPeer()), Membership: p.GetMembership(), Sequence: p.GetSequence(),
		Keys: keys, Sizes: p.GetSizes(), Free: p.GetFree(),
	}, err
}

func toPublishReply(r *PublishReply) *pb.PublishReply {
	return &pb.PublishReply{Entered: r.Entered}
}

func fromPublishReply(r *PublishReply, p *pb.PublishReply, keys int) error {
	r.Entered = append(r.Entered, p.GetEntered()...)
	return checkCounts(keys, len(p.GetEntered()))
}

func toWithdrawRequest(r *WithdrawRequest) *pb.WithdrawRequest {
	return &pb.WithdrawRequest{
		Peer: wire.ToPeer(r.Peer), Sequence: r.Sequence, Floor: r.Floor, Keys: wire.ToKeys(r.Keys), Free: r.Free,
	}
}

func fromWithdrawRequest(p *pb.WithdrawRequest) (*WithdrawRequest, error) {
	keys, err := wire.FromKeys(p.GetKeys(), maxMessageKeys)
	return &WithdrawRequest{
		Peer: wire.FromPeer(p.GetPeer()), Sequence: p.GetSequence(), Floor: p.GetFloor(), Keys: keys, Free: p.GetFree(),
	}, err
}

func toPlaceRequest(r *PlaceRequest) *pb.PlaceRequest {
	return &pb.PlaceRequest{
		Client:  wire.ToPeer(r.Client),
		Keys:    wire.ToKeys(r.Keys),
		Sizes:   r.Sizes,
		Exclude: convert(r.Exclude, wire.ToPeer),
		Policy:  &pb.Policy{LocalFirst: r.Policy.LocalFirst, Together: r.Policy.Together},
	}
}

func fromPlaceRequest(p *pb.PlaceRequest) (*PlaceRequest, error) {
	keys, err := wire.FromKeys(p.GetKeys(), maxMessageKeys)
	return &PlaceRequest{
		Client:  wire.FromPeer(p.GetClient()),
		Keys:    keys,
		Sizes:   p.GetSizes(),
		Exclude: convert(p.GetExclude(), wire.FromPeer),
		Policy:  Policy{LocalFirst: p.GetPolicy().GetLocalFirst(), Together: p.GetPolicy().GetTogether()},
	}, err
}

func toPlaceReply(r *PlaceReply) *pb.PlaceReply {
	p := &pb.PlaceReply{
		Exists: make([]bool, len(r.Placements)),
		At:     make([]uint32, len(r.Placements)),
		Nodes:  convert(r.Nodes, toNode),
	}
	for i, placement := range r.Placements {
		p.Exists[i], p.At[i] = placement.Exists, toIndex(placement.Node)
	}
	return p
}

func fromPlaceReply(r *PlaceReply, p *pb.PlaceReply, keys int) error {
	if err := checkCounts(keys, len(p.GetExists()), len(p.GetAt())); err != nil {
		return err
	}
	places := appendNodes(&r.Nodes, p.GetNodes())
	for i, at := range p.GetAt() {
		node, err := fromIndex(at, places)
		if err != nil {
			return err
		}
		exists := p.GetExists()[i]
		if exists && node == NoNode {
			return fmt.Errorf("key %d of %d exists, and at no node", i, keys)
		}
		r.Placements = append(r.Placements, Placement{Exists: exists, Node: node})
	}
	return nil
}

func toLocateRequest(r *LocateRequest) *pb.LocateRequest {
	return &pb.LocateRequest{Keys: wire.ToKeys(r.Keys)}
}

func fromLocateRequest(p *pb.LocateRequest) (*LocateRequest, error) {
	keys, err := wire.FromKeys(p.GetKeys(), maxMessageKeys)
	return &LocateRequest{Keys: keys}, err
}

func toLocateReply(r *LocateReply) *pb.LocateReply {
	return &pb.LocateReply{At: convert(r.At, toIndex), Nodes: convert(r.Nodes, toNode)}
}

func fromLocateReply(r *LocateReply, p *pb.LocateReply, keys int) error {
	if err := checkCounts(keys, len(p.GetAt())); err != nil {
		return err
	}
	places := appendNodes(&r.Nodes, p.GetNodes())
	for _, at := range p.GetAt() {
		node, err := fromIndex(at, places)
		if err != nil {
			return err
		}
		r.At = append(r.At, node)
	}
	return nil
}

func toListRequest(r *ListRequest) *pb.ListRequest {
	return &pb.ListRequest{Prefix: []byte(r.Prefix), After: []byte(r.After), Limit: int64(r.Limit)}
}

func fromListRequest(p *pb.ListRequest) *ListRequest {
	return &ListRequest{Prefix: string(p.GetPrefix()), After: string(p.GetAfter()), Limit: int(p.GetLimit())}
}

func toListReply(r *ListReply) *pb.ListReply {
	p := &pb.ListReply{
		Keys:  wire.ToKeys(convert(r.Entries, func(e Entry) string { return e.Key })),
		Sizes: convert(r.Entries, func(e Entry) uint64 { return e.Size }),
		At:    make([]uint32, len(r.Entries)),
		More:  r.More,
	}
	index := make(map[string]uint32)
	for i, e := range r.Entries {
		at, ok := index[e.Node]
		if !ok {
			at = uint32(len(p.Nodes))
			index[e.Node] = at
			p.Nodes = append(p.Nodes, e.Node)
		}
		p.At[i] = at
	}
	return p
}

func fromListReply(p *pb.ListReply) (*ListReply, error) {
	keys, err := wire.FromKeys(p.GetKeys(), maxMessageKeys)
	if err != nil {
		return nil, err
	}
	if err := checkCounts(len(keys), len(p.GetSizes()), len(p.GetAt())); err != nil {
		return nil, err
	}
	r := &ListReply{Entries: make([]Entry, len(keys)), More: p.GetMore()}
	for i, key := range keys {
		at := p.GetAt()[i]
		if uint64(at) >= uint64(len(p.GetNodes())) {
			return nil, fmt.Errorf("key %d is at node %d of %d", i, at, len(p.GetNodes()))
		}
		r.Entries[i] = Entry{Key: key, Size: p.GetSizes()[i], Node: p.GetNodes()[at]}
	}
	return r, nil
}

// checkCounts refuses a reply that answers for fewer or more keys than there are.
func checkCounts(keys int, answers ...int) error {
	for _, n := range answers {
		if n != keys {
			return fmt.Errorf("%d answers came for %d keys", n, keys)
		}
	}
	return nil
}

// toIndex returns a node index as it travels: the zero value is NoNode.
func toIndex(node int) uint32 { return uint32(node + 1) }

// fromIndex returns the place in the caller's reply of the node with the given index on the wire.
func fromIndex(at uint32, places []int) (int, error) {
	switch {
	case at == 0:
		return NoNode, nil
	case uint64(at) > uint64(len(places)):
		return 0, fmt.Errorf("node %d of %d is mentioned", at, len(places))
	}
	return places[at-1], nil
}

// appendNodes adds those nodes that an earlier message has not brought, and returns where each of them is.
func appendNodes(nodes *[]Node, ps []*pb.Node) []int {
	earlier := len(*nodes)
	return convert(ps, func(p *pb.Node) int {
		n := fromNode(p)
		at := slices.IndexFunc((*nodes)[:earlier], func(e Node) bool { return e.Peer == n.Peer })
		if at < 0 {
			at = len(*nodes)
			*nodes = append(*nodes, n)
		}
		return at
	})
}
