// Package directory knows which node holds which key, and where a new one goes.
//
// The directory is a cache of what the nodes hold: nodes own their entries and publish them, and an empty
// directory is refilled by the nodes. Memory is the implementation that is embedded by default; Register offers
// any Directory over gRPC, and Client reaches one. Which of them a caller has makes no difference to it: errors
// and replies are the same.
package directory

import (
	"context"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Directory maps keys to nodes. Every call carries a whole batch. Replies are filled in place, so that a caller
// that reuses a reply pays for no allocation; their slices belong to the caller. Requests are not kept.
type Directory interface {
	// Join makes a node a member, or renews its membership. A node calls it again before TTL runs out; otherwise
	// its entries go. A new incarnation of a node voids the entries of the old one.
	Join(ctx context.Context, node *Node) (JoinReply, error)
	// Leave ends a membership and drops the node's entries. An incarnation that is not the current one is ignored.
	Leave(ctx context.Context, peer backend.Peer) error
	// Nodes lists the members, ordered by name.
	Nodes(ctx context.Context) ([]Node, error)

	// Publish enters keys for the node that holds them. They are visible to every client when it returns. The
	// first node to publish a key keeps it. A node that is not a member is refused with PeerGone, and so is a
	// request of an earlier membership. One below the floor that a Withdraw has set is refused with Busy: where it
	// is still meant, it is made again with a new Sequence.
	Publish(ctx context.Context, req *PublishRequest, reply *PublishReply) error
	// Withdraw drops entries; those that belong to another node or incarnation, or that a Publish with a greater
	// Sequence has entered, stay.
	Withdraw(ctx context.Context, req *WithdrawRequest) error

	// Place says where new keys should go, or that they exist.
	Place(ctx context.Context, req *PlaceRequest, reply *PlaceReply) error
	// Locate says which nodes hold keys.
	Locate(ctx context.Context, req *LocateRequest, reply *LocateReply) error
	// List returns entries in the order of their keys.
	List(ctx context.Context, req *ListRequest) (*ListReply, error)
}

// Node is one member.
type Node struct {
	Peer     backend.Peer
	Address  string // of its control plane, host:port
	Capacity uint64 // bytes in its pool
	Free     uint64 // bytes that it could take now, without evicting
}

// JoinReply answers Join.
type JoinReply struct {
	TTL time.Duration // join again before it has passed
	// Membership is drawn when a membership begins, and is not zero. The directory knows nothing of what the node
	// published before: a node that has not yet published all its keys in this membership does so.
	Membership uint64
}

// PublishRequest enters keys.
type PublishRequest struct {
	Peer       backend.Peer
	Membership uint64 // as in JoinReply; 0 means whichever the node has
	// Sequence grows from request to request, of both kinds, within an incarnation, and tells the younger of two
	// that pass each other on the way.
	Sequence uint64
	Keys     []string
	Sizes    []uint64 // bytes
	Free     uint64   // bytes left in the pool, as in Node.Free
}

// PublishReply says for each key whether the entry is this node's now: false when another node has it.
type PublishReply struct {
	Entered []bool
}

// WithdrawRequest drops entries.
type WithdrawRequest struct {
	Peer     backend.Peer
	Sequence uint64 // as in PublishRequest
	// Floor is above the Sequence of every Publish of which the node does not know whether it has arrived. From now
	// on the directory refuses those below it: what is withdrawn here does not come back with one that was late.
	Floor uint64
	Keys  []string
	Free  uint64 // as in PublishRequest
}

// NoNode is the node index of a key that is nowhere, or that no node has room for.
const NoNode = -1

// Policy says how Place spreads keys.
type Policy struct {
	// LocalFirst prefers the node of the client's own process, then those of its host, as long as they have room.
	LocalFirst bool
	// Together keeps a batch on one node as long as one has room for all of it.
	Together bool
}

// PlaceRequest asks for a place of Sizes[i] bytes for each Keys[i].
type PlaceRequest struct {
	Client  backend.Peer
	Keys    []string
	Sizes   []uint64       // bytes
	Exclude []backend.Peer // nodes that have just refused
	Policy  Policy
}

// Placement is the place of one key.
type Placement struct {
	Exists bool // the key is there already, at Node
	Node   int  // index into PlaceReply.Nodes, or NoNode
}

// PlaceReply has one placement for each key, in order, and the nodes that they mention.
type PlaceReply struct {
	Placements []Placement
	Nodes      []Node
}

// LocateRequest asks where keys are.
type LocateRequest struct {
	Keys []string
}

// LocateReply has one index into Nodes for each key, in order; NoNode for a key that is nowhere.
type LocateReply struct {
	At    []int
	Nodes []Node
}

// ListRequest asks for entries whose key begins with Prefix and is greater than After.
type ListRequest struct {
	Prefix string
	After  string
	Limit  int // at most; 0 means 1000, and more than 10,000 means 10,000
}

// Entry is one key of a listing.
type Entry struct {
	Key  string
	Size uint64 // bytes
	Node string
}

// ListReply is one page of a listing. More says that there are further entries after the last one.
type ListReply struct {
	Entries []Entry
	More    bool
}
