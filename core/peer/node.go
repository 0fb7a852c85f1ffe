package peer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Fabric is what a node needs of the process that it is in: its identity, its memory, and its backends.
type Fabric interface {
	// Self is this process. It does not change.
	Self() backend.Peer
	// Describe returns the regions of the pool, in an order that does not change. The caller does not change them.
	Describe() []region.Descriptor
	// Answer accepts a connection of a backend, as target. See backend.Backend.
	Answer(ctx context.Context, from backend.Peer, backendName string, offer []byte) (*AnswerReply, error)
	// Fence returns nil when nothing that the client posted before can touch this process's memory any more,
	// through any backend. See backend.Backend.
	Fence(ctx context.Context, client backend.Peer) error
}

// Options is what a Node is made with.
type Options struct {
	Fabric    Fabric
	Directory directory.Directory
	Address   string // of the node's control plane, host:port, for the directory
	PageSize  uint64 // bytes
	Limits    Limits
	// MaxPending, MaxLeases, MaxWithdrawals and ClientShare are as in StoreOptions.
	MaxPending, MaxLeases, MaxWithdrawals int
	ClientShare                           float64
	// Log receives what an operator should know. Nothing is logged for a call that succeeds. May be nil.
	Log backend.Logger
}

// Node is the Service of one process. It may be used by any number of goroutines.
//
// The memory of the pool belongs to the caller, who keeps it until Close has returned and the backends are closed.
type Node struct {
	fabric    Fabric
	directory directory.Directory
	self      backend.Peer
	address   string
	log       backend.Logger
	store     *Store

	publications sync.Pool     // of *Publication
	gone         atomic.Bool   // closed, or replaced by another incarnation
	membership   atomic.Uint64 // directory.JoinReply.Membership; 0 until a Join has succeeded

	joinNow, tellNow, fenceNow wish

	running context.Context // of the goroutines
	stop    context.CancelFunc
	done    sync.WaitGroup
}

var _ Service = (*Node)(nil)

// NewNode makes a node that serves calls; Start makes it a member of the directory. The error names every option
// that is wrong.
func NewNode(o Options) (*Node, error) {
	if o.Fabric == nil || o.Directory == nil {
		return nil, backend.Errorf(backend.BadRequest, "new node: it needs a fabric and a directory")
	}
	n := &Node{
		fabric: o.Fabric, directory: o.Directory, self: o.Fabric.Self(), address: o.Address, log: o.Log,
		publications: sync.Pool{New: func() any { return new(Publication) }},
		joinNow:      make(wish, 1), tellNow: make(wish, 1), fenceNow: make(wish, 1),
	}
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	so := StoreOptions{
		PageSize: o.PageSize, Limits: o.Limits, Fence: o.Fabric.Fence, Evicting: n.tellNow.wake,
		MaxPending: o.MaxPending, MaxLeases: o.MaxLeases, MaxWithdrawals: o.MaxWithdrawals,
		ClientShare: o.ClientShare,
	}
	for _, r := range o.Fabric.Describe() {
		so.Regions = append(so.Regions, int(r.Size/max(1, o.PageSize)))
	}
	var err error
	if n.store, err = NewStore(so); err != nil {
		return nil, err
	}
	n.running, n.stop = context.WithCancel(context.Background())
	return n, nil
}

// SetLimits changes the limits of the pool while it serves.
func (n *Node) SetLimits(l Limits) error { return n.store.SetLimits(l) }

// Describe implements Service.
func (n *Node) Describe(context.Context) (*Description, error) {
	if err := n.serving("describe"); err != nil {
		return nil, err
	}
	return &Description{Peer: n.self, Regions: n.fabric.Describe(), PageSize: n.store.pageSize}, nil
}

// Answer implements Service.
func (n *Node) Answer(ctx context.Context, req *AnswerRequest) (*AnswerReply, error) {
	if err := n.meant("answer", req.To); err != nil {
		return nil, err
	}
	if err := valid("answer", req.From); err != nil {
		return nil, err
	}
	return n.fabric.Answer(ctx, req.From, req.Backend, req.Offer)
}

// Allocate implements Service.
func (n *Node) Allocate(_ context.Context, req *AllocateRequest, reply *AllocateReply) error {
	if err := n.check("allocate", req.Client, req.To, len(req.Keys)); err != nil {
		return err
	}
	if len(req.Sizes) != len(req.Keys) {
		return &backend.Error{Code: backend.BadRequest, Op: "allocate", Peer: n.self,
			Text: fmt.Sprintf("%d keys and %d sizes: each key needs one", len(req.Keys), len(req.Sizes))}
	}
	return n.busy("allocate", n.store.Allocate(req, reply))
}

// Commit implements Service. When the directory cannot be reached, the error is PathDown: the values are stored,
// and become visible when it is back.
func (n *Node) Commit(ctx context.Context, req *CommitRequest, reply *CommitReply) error {
	if err := n.check("commit", req.Client, req.To, len(req.Slots)); err != nil {
		return err
	}
	if req.Fence {
		if err := n.store.FenceClient(ctx, req.Client); err != nil {
			return &backend.Error{Code: backend.CodeOf(err), Op: "commit", Peer: req.Client,
				Text: "nothing is committed: the client could not be fenced; commit again before the slots expire", Err: err}
		}
	}
	p := n.publications.Get().(*Publication)
	defer n.publications.Put(p)
	n.store.Commit(req, reply, p)
	if err := n.publish(ctx, p); err != nil {
		// Only the words of the cause: its code says how we stand with the directory, not how the client stands
		// with us.
		return &backend.Error{Code: backend.PathDown, Op: "commit", Peer: n.self,
			Text: fmt.Sprintf("%d values are stored, but not visible before the directory can be reached again: %v",
				len(p.Request.Keys), err)}
	}
	for i, entered := range p.Reply.Entered {
		if !entered {
			reply.Statuses[p.At[i]] = Exists
		}
	}
	return nil
}

// Abort implements Service.
func (n *Node) Abort(_ context.Context, req *AbortRequest) error {
	if err := n.check("abort", req.Client, req.To, len(req.Slots)); err != nil {
		return err
	}
	n.store.Abort(req)
	if req.Fence {
		n.fenceNow.wake()
	}
	return nil
}

// Resolve implements Service.
func (n *Node) Resolve(_ context.Context, req *ResolveRequest, reply *ResolveReply) error {
	if err := n.check("resolve", req.Client, req.To, len(req.Keys)); err != nil {
		return err
	}
	return n.busy("resolve", n.store.Resolve(req, reply))
}

// Release implements Service.
func (n *Node) Release(_ context.Context, req *ReleaseRequest, reply *ReleaseReply) error {
	if err := n.check("release", req.Client, req.To, 0); err != nil {
		return err
	}
	n.store.Release(req, reply)
	return nil
}

// Remove implements Service. When the directory cannot be reached, the error is PathDown: the values are gone, and
// the directory forgets them when it is back.
func (n *Node) Remove(ctx context.Context, req *RemoveRequest, reply *RemoveReply) error {
	if err := n.check("remove", n.self, req.To, len(req.Keys)); err != nil {
		return err
	}
	n.store.Remove(req, reply)
	if err := n.withdraw(ctx, req.Keys); err != nil {
		return &backend.Error{Code: backend.PathDown, Op: "remove", Peer: n.self,
			Text: fmt.Sprintf("the values are gone, but listed until the directory can be reached again: %v", err)}
	}
	return nil
}

// Stats implements Service.
func (n *Node) Stats(context.Context) (*Stats, error) {
	if err := n.serving("stats"); err != nil {
		return nil, err
	}
	st := n.store.Stats()
	st.Peer = n.self
	return &st, nil
}

// check refuses a call that is not for this incarnation, or that is not well formed.
func (n *Node) check(op string, client backend.Peer, to uint64, keys int) error {
	if err := n.meant(op, to); err != nil {
		return err
	}
	if keys > MaxKeys {
		return &backend.Error{Code: backend.BadRequest, Op: op, Peer: n.self,
			Text: fmt.Sprintf("%d keys in one call, and no more than %d are allowed: split the batch", keys, MaxKeys)}
	}
	return valid(op, client)
}

// valid refuses a client that cannot be told from others.
func valid(op string, client backend.Peer) error {
	if client.Node == "" || client.Incarnation == 0 {
		return &backend.Error{Code: backend.BadRequest, Op: op, Peer: client,
			Text: "the client does not say who it is: it needs a name and an incarnation"}
	}
	return nil
}

func (n *Node) meant(op string, to uint64) error {
	if to != n.self.Incarnation {
		return &backend.Error{Code: backend.PeerGone, Op: op, Peer: n.self,
			Text: fmt.Sprintf("the call is for incarnation %x: describe the node again", to)}
	}
	return n.serving(op)
}

func (n *Node) serving(op string) error {
	if n.gone.Load() {
		return &backend.Error{Code: backend.PeerGone, Op: op, Peer: n.self, Text: "the node does not serve any more"}
	}
	return nil
}

// busy completes an error of the store.
func (n *Node) busy(op string, err error) error {
	var e *backend.Error
	if errors.As(err, &e) {
		e.Op, e.Peer, e.RetryAfter = op, n.self, retryBusy
	}
	return err
}

// retryBusy is how long a client waits that found a table full.
const retryBusy = 10 * time.Millisecond
