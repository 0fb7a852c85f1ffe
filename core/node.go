package core

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/umbp/umbp/core/control"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// NodeOptions says what a node lends. Directory and PageSize are required, and PoolSize or GPU.
type NodeOptions struct {
	Directory directory.Directory
	Address   string // of the node's control plane as peers dial it, host:port
	PoolSize  uint64 // bytes, a whole number of pages
	PageSize  uint64 // bytes
	HugePages region.HugePages
	// GPU is a range of a GPU's memory for the pool to lie in, with its address in this process, instead of memory of the
	// host that NewNode allocates. PoolSize is zero then, or the size of the range. The memory stays the caller's, and
	// allocated until Close has returned.
	GPU    *backend.GPURange
	Limits peer.Limits
	// Progress is told how much of the pool is populated. May be nil.
	Progress func(done, total uint64)
	Log      backend.Logger // may be nil
}

// Node lends memory to the pool. It is the peer.Service of its process.
type Node struct {
	*peer.Node
	engine *Engine
	arena  *region.Arena // nil where the pool lies in a GPU's memory
	region *region.Region
}

// NewNode allocates and registers the memory of a node. Start makes it a member of the directory; Close ends it,
// before the engine.
func NewNode(ctx context.Context, engine *Engine, opts NodeOptions) (*Node, error) {
	if g := opts.GPU; g != nil {
		if opts.PoolSize != 0 && opts.PoolSize != g.Size {
			return nil, backend.Errorf(backend.BadRequest, "a pool of %d bytes is not the %d bytes of GPU memory that it is to lie in", opts.PoolSize, g.Size)
		}
		opts.PoolSize = g.Size
	}
	if opts.PageSize == 0 || opts.PoolSize == 0 || opts.PoolSize%opts.PageSize != 0 {
		return nil, backend.Errorf(backend.BadRequest, "a pool of %d bytes is no whole number of pages of %d", opts.PoolSize, opts.PageSize)
	}
	n := &Node{engine: engine}
	const rights = backend.RemoteRead | backend.RemoteWrite
	var pool *region.Region
	var err error
	if opts.GPU != nil {
		pool = gpuRegion(opts.GPU, rights)
	} else {
		n.arena, err = region.NewArena("umbp-pool", opts.PoolSize, region.ArenaOptions{
			HugePages: opts.HugePages, Context: ctx, Progress: opts.Progress,
		})
		if err != nil {
			return nil, fmt.Errorf("allocate the pool: %w", err)
		}
		pool = &region.Region{Kind: backend.HostMemory, Rights: rights, Bytes: n.arena.Bytes(), FD: n.arena.FD()}
	}
	if n.region, err = engine.Register(ctx, pool); err != nil {
		return nil, errors.Join(fmt.Errorf("register the pool: %w", err), n.freeArena())
	}
	n.Node, err = peer.NewNode(peer.Options{
		Fabric: poolFabric{engine, n.region.ID}, Directory: opts.Directory, Address: opts.Address, PageSize: opts.PageSize, Limits: opts.Limits, Log: opts.Log,
	})
	if err != nil {
		return nil, errors.Join(err, n.free(ctx))
	}
	return n, nil
}

// poolFabric is what the node's bookkeeping sees of the engine: of its regions, the pool alone.
type poolFabric struct {
	*Engine
	pool backend.RegionID
}

// Describe returns the pool with its present keys.
func (f poolFabric) Describe() []region.Descriptor {
	d, err := f.Descriptor(f.pool)
	if err != nil { // the node is being closed
		return nil
	}
	return []region.Descriptor{d}
}

// Answer keeps the keys of regions that are not the pool's from those who know the node only.
func (f poolFabric) Answer(ctx context.Context, from backend.Peer, backendName string, offer []byte) (*peer.AnswerReply, error) {
	reply, err := f.Engine.Answer(ctx, from, backendName, offer)
	if err == nil {
		maps.DeleteFunc(reply.Keys, func(id backend.RegionID, _ []byte) bool { return id != f.pool })
	}
	return reply, err
}

// Engine returns the engine that the node stands on.
func (n *Node) Engine() *Engine { return n.engine }

// HugePages says what kind of pages the pool lies on; nothing where it lies in a GPU's memory.
func (n *Node) HugePages() string {
	if n.arena == nil {
		return ""
	}
	return n.arena.HugePages()
}

// Close leaves the directory, ends the node's goroutines, and frees the pool once nothing can touch it any more.
func (n *Node) Close(ctx context.Context) error {
	return errors.Join(n.Node.Close(ctx), n.free(ctx))
}

func (n *Node) free(ctx context.Context) error {
	if err := n.engine.Deregister(ctx, n.region.ID); err != nil {
		return err
	}
	return n.freeArena()
}

func (n *Node) freeArena() error {
	if n.arena == nil {
		return nil
	}
	return n.arena.Close()
}

// DialControl returns a Dial that reaches nodes over the control plane.
func DialControl(creds *backend.Credentials) Dial {
	return func(_ context.Context, node directory.Node) (peer.Service, func() error, error) {
		conn, err := control.Connect(node.Address, creds)
		if err != nil {
			return nil, nil, err
		}
		return peer.NewClient(conn), conn.Close, nil
	}
}

// DialLocal returns a Dial that finds the nodes given within the process, and others by the Dial given, which may
// be nil.
func DialLocal(others Dial, nodes ...*Node) Dial {
	return func(ctx context.Context, node directory.Node) (peer.Service, func() error, error) {
		for _, n := range nodes {
			if n.engine.Self() == node.Peer {
				return n.Node, func() error { return nil }, nil
			}
		}
		if others == nil {
			return nil, nil, &backend.Error{Code: backend.PeerGone, Op: "dial", Peer: node.Peer, Text: "no such node in this process"}
		}
		return others(ctx, node)
	}
}
