package peer

import (
	"context"
	"time"

	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Service is what a node offers to clients. *Node implements it for clients in the same process, *Client over
// gRPC. Every call carries a whole batch.
//
// Replies are filled in place: a caller that reuses a reply pays for no allocation. A reply's slices belong to
// the caller. Requests are not kept, but for the strings of keys that are allocated. An error means that the call
// as a whole failed (the node is unreachable, or it is not the incarnation asked for: PeerGone); what became of
// single keys is in their statuses.
type Service interface {
	// Describe tells who the node is and how to reach the regions of its pool.
	Describe(ctx context.Context) (*Description, error)
	// Answer is the target's half of connecting a backend; see backend.Backend.
	Answer(ctx context.Context, req *AnswerRequest) (*AnswerReply, error)

	// Allocate reserves a slot for each key. A slot that is neither committed nor aborted within its time to live
	// is taken back.
	Allocate(ctx context.Context, req *AllocateRequest, reply *AllocateReply) error
	// Commit makes slots readable, by every client, before it returns.
	Commit(ctx context.Context, req *CommitRequest, reply *CommitReply) error
	// Abort gives slots back.
	Abort(ctx context.Context, req *AbortRequest) error
	// Resolve tells where values lie, and holds them there under one lease until Release or until it runs out.
	Resolve(ctx context.Context, req *ResolveRequest, reply *ResolveReply) error
	// Release ends a lease, and tells whether it has held until then: if not, what was read under it may be
	// another value's bytes.
	Release(ctx context.Context, req *ReleaseRequest, reply *ReleaseReply) error
	// Remove deletes values; they are gone for every client when it returns. Memory under a lease is reused only
	// when the lease has ended.
	Remove(ctx context.Context, req *RemoveRequest, reply *RemoveReply) error
	// Stats returns the state of the node's pool.
	Stats(ctx context.Context) (*Stats, error)
}

// Status is what became of one key in one call.
type Status uint8

// The statuses. The zero value says that the node did not get to the key.
const (
	Unknown Status = iota
	OK
	Exists  // the pool holds the key already, at this node or another
	Missing // the node does not hold the key
	NoSpace // no room, even after evicting all that may be evicted
	Expired // the slot's time had run out; its memory is no longer the caller's
	Refused // the request is wrong for this key: an empty key, a size of zero, larger than the pool
)

// SlotID names a slot within one incarnation of a node. Ids are never used twice.
type SlotID uint64

// LeaseID names a lease within one incarnation of a node. Ids are never used twice.
type LeaseID uint64

// Run is one contiguous piece of a value in the node's memory.
type Run struct {
	Region         uint32 // index into Description.Regions
	Offset, Length uint64 // bytes
}

// Description is what Describe returns.
type Description struct {
	Peer     backend.Peer
	Regions  []region.Descriptor
	PageSize uint64 // bytes
}

// AnswerRequest carries a backend's offer from an initiator.
type AnswerRequest struct {
	From    backend.Peer
	To      uint64 // incarnation of the node that the caller means
	Backend string
	Offer   []byte
}

// AnswerReply is what the initiator needs to finish the connection, and to use it.
type AnswerReply struct {
	Answer []byte
	// Keys holds the backend's present keys of the node's regions, as far as peers may reach them. They hold for the
	// connection that is being made: the keys in a descriptor are those of when it was made, and a backend that has been
	// started anew since then has others.
	Keys map[backend.RegionID][]byte
}

// AllocateRequest asks for a slot of Sizes[i] bytes for each Keys[i].
type AllocateRequest struct {
	Client backend.Peer
	To     uint64 // incarnation of the node that the caller means
	Keys   []string
	Sizes  []uint64 // bytes
}

// Slot is the reservation for one key. Its runs are AllocateReply.Runs[FirstRun : FirstRun+RunCount]; their
// lengths add up to the size asked for.
type Slot struct {
	Status             Status // OK, Exists, NoSpace or Refused
	ID                 SlotID
	FirstRun, RunCount uint32
}

// AllocateReply has one slot for each key, in order.
type AllocateReply struct {
	Slots []Slot
	Runs  []Run
	TTL   time.Duration // how long the slots are held, counted from before the request was sent
}

// CommitSlot says that a slot's bytes are in place.
type CommitSlot struct {
	ID          SlotID
	Checksum    uint64 // XXH3-64 of the value, where HasChecksum
	HasChecksum bool
}

// CommitRequest commits slots. Fence says that a transfer to one of them ended in doubt on the way: the node
// fences the client before it makes them readable.
type CommitRequest struct {
	Client backend.Peer
	To     uint64
	Slots  []CommitSlot
	Fence  bool
}

// CommitReply has one status for each slot: OK, Exists (another put of the key was first; this slot was given
// back) or Expired.
type CommitReply struct {
	Statuses []Status
}

// AbortRequest gives slots back. Fence says that a transfer to one of them may still be storing: the node fences
// the client before it uses the pages again.
type AbortRequest struct {
	Client backend.Peer
	To     uint64
	Slots  []SlotID
	Fence  bool
}

// ResolveRequest asks where values lie.
type ResolveRequest struct {
	Client backend.Peer
	To     uint64
	Keys   []string
}

// Value is where one value lies: in ResolveReply.Runs[FirstRun : FirstRun+RunCount].
type Value struct {
	Status             Status // OK or Missing; Unknown where the reply is full: ask again for those
	Size               uint64 // bytes
	Generation         uint64 // of the slot: unique within the node's incarnation
	Checksum           uint64
	HasChecksum        bool
	FirstRun, RunCount uint32
}

// ResolveReply has one value for each key, in order. Lease covers all that were found; zero when none was.
type ResolveReply struct {
	Values []Value
	Runs   []Run
	Lease  LeaseID
	TTL    time.Duration // of the lease, counted from before the request was sent
}

// ReleaseRequest ends a lease.
type ReleaseRequest struct {
	Client backend.Peer
	To     uint64
	Lease  LeaseID
}

// ReleaseReply says whether the lease was still there, and the client's: it had neither run out nor been released.
type ReleaseReply struct {
	Held bool
}

// RemoveRequest deletes values.
type RemoveRequest struct {
	To   uint64
	Keys []string
}

// RemoveReply has one status for each key: OK or Missing.
type RemoveReply struct {
	Statuses []Status
}

// Stats is the state of a node's pool.
type Stats struct {
	Peer               backend.Peer
	PageSize           uint64 // bytes
	Pages, FreePages   uint64
	LargestFreeRun     uint64  // pages
	Fragmentation      float64 // 0: all free pages are one run; towards 1: scattered
	Keys               uint64  // committed
	PendingSlots       uint64  // allocated, not committed
	Leases             uint64
	QuarantinedPages   uint64 // waiting for a fence
	Evictions, Expired uint64 // since the node started
	FenceFailures      uint64
}
