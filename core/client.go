package core

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Dial reaches the control plane of a node. The function returned ends the connection.
type Dial func(ctx context.Context, node directory.Node) (peer.Service, func() error, error)

// ClientOptions says how a PoolClient works. Engine, Directory and Dial are required; zero fields take the
// defaults named.
type ClientOptions struct {
	Engine    *Engine
	Directory directory.Directory
	Dial      Dial
	// StagingSize is the memory, in bytes, through which values travel that lie in no registered region. Zero
	// refuses such values.
	StagingSize uint64
	// PerPage, when not zero, plans one transfer for each piece of so many bytes instead of grouped ones. It is
	// the benchmark's "before", and slow.
	PerPage uint64
	Tuning  Tuning
}

// Tuning is what can be changed while a client works.
type Tuning struct {
	// Verify says which values a get compares with the checksum that their writer made.
	Verify Verify
	// SampleEvery: with VerifySample, one of so many values is verified. Default 16.
	SampleEvery int
	// Placement says how new keys are spread over the nodes.
	Placement directory.Policy
	// Timeout bounds a call whose context has no deadline. Default 30 s.
	Timeout time.Duration
}

// Verify says how far checksums are used.
type Verify uint8

// The degrees of verification. Writers make checksums unless it is off.
const (
	VerifyOff Verify = iota
	VerifySample
	VerifyAll
)

// PoolClient puts and gets values by key. Safe for concurrent use.
type PoolClient struct {
	engine *Engine
	opts   ClientOptions
	tuning atomic.Pointer[Tuning]
	stats  Stats

	stagingArena  *region.Arena
	stagingRegion *region.Region
	staging       *region.Staging

	batches  sync.Pool // of *batch
	sampled  atomic.Uint64
	inFlight sync.WaitGroup
	// releasing holds a token for each lease that is being given back over the network.
	releasing chan struct{}

	mu     sync.Mutex
	closed bool
	nodes  map[backend.Peer]*nodeEntry
}

// nodeEntry is a node that the client knows, or is getting to know. Many may wait for ready.
type nodeEntry struct {
	ready chan struct{}
	node  *node
	err   error
}

// known returns the node if the client knows it, without waiting.
func (e *nodeEntry) known() *node {
	select {
	case <-e.ready:
		return e.node
	default:
		return nil
	}
}

// node is a node that the client can talk to.
type node struct {
	peer    backend.Peer
	service peer.Service
	regions []region.Descriptor
	leave   func() error // removes it from the engine, and hangs up
}

// local tells whether calls to the node stay within the process.
func (n *node) local() bool {
	_, local := n.service.(*peer.Node)
	return local
}

// NewPoolClient returns a client. Close ends it; the engine stays the caller's.
func NewPoolClient(ctx context.Context, opts ClientOptions) (*PoolClient, error) {
	if opts.Engine == nil || opts.Directory == nil || opts.Dial == nil {
		return nil, errors.New("a pool client needs an engine, a directory and a way to dial nodes")
	}
	c := &PoolClient{engine: opts.Engine, opts: opts, nodes: make(map[backend.Peer]*nodeEntry),
		releasing: make(chan struct{}, maxReleasing)}
	c.Tune(opts.Tuning)
	if opts.StagingSize > 0 {
		if err := c.openStaging(ctx, opts.StagingSize); err != nil {
			return nil, fmt.Errorf("staging memory: %w", err)
		}
	}
	return c, nil
}

// stagingUnit is the granularity of staging memory: values share no page, so that copying one never disturbs the
// cache lines or the mapping of another.
const stagingUnit = 4096

func (c *PoolClient) openStaging(ctx context.Context, size uint64) error {
	arena, r, err := c.allocRegion(ctx, "umbp-staging", size)
	if err != nil {
		return err
	}
	c.stagingArena, c.stagingRegion = arena, r
	c.staging = region.NewStaging(arena.Size(), stagingUnit)
	return nil
}

func (c *PoolClient) allocRegion(ctx context.Context, name string, size uint64) (*region.Arena, *region.Region, error) {
	arena, err := region.NewArena(name, size, region.ArenaOptions{Context: ctx})
	if err != nil {
		return nil, nil, err
	}
	r := &region.Region{Kind: backend.HostMemory, Bytes: arena.Bytes(), FD: arena.FD()}
	if r, err = c.engine.Register(ctx, r); err != nil {
		return nil, nil, errors.Join(err, arena.Close())
	}
	return arena, r, nil
}

// Tune replaces the client's tuning for calls that begin from now on.
func (c *PoolClient) Tune(t Tuning) {
	if t.SampleEvery <= 0 {
		t.SampleEvery = 16
	}
	if t.Timeout <= 0 {
		t.Timeout = 30 * time.Second
	}
	c.tuning.Store(&t)
}

// Buffer is registered memory, allocated by the client or the caller's: values in it move without being copied.
type Buffer struct {
	client *PoolClient
	arena  *region.Arena
	region *region.Region
}

// Alloc returns a buffer of at least size bytes, populated. It is meant for few, large buffers.
func (c *PoolClient) Alloc(ctx context.Context, size uint64) (*Buffer, error) {
	arena, r, err := c.allocRegion(ctx, "umbp-buffer", size)
	if err != nil {
		return nil, err
	}
	return &Buffer{client: c, arena: arena, region: r}, nil
}

// Register makes memory of the caller's a buffer. The memory must be off the Go heap (a mapping), and stay mapped
// until Close has returned. Memory without a file descriptor cannot be used by every backend.
func (c *PoolClient) Register(ctx context.Context, memory []byte) (*Buffer, error) {
	r, err := c.engine.Register(ctx, &region.Region{Kind: backend.HostMemory, Bytes: memory, FD: -1})
	if err != nil {
		return nil, err
	}
	return &Buffer{client: c, region: r}, nil
}

// RegisterGPU makes a range of a GPU's memory a buffer. The range carries its address in this process, as
// gpu.Runtime.Describe fills it in. The memory must stay allocated until Close has returned. Backends that cannot use it
// are not chosen for it; when none can, it is refused with the reasons.
func (c *PoolClient) RegisterGPU(ctx context.Context, memory backend.GPURange) (*Buffer, error) {
	r, err := c.engine.Register(ctx, gpuRegion(&memory, 0))
	if err != nil {
		return nil, err
	}
	return &Buffer{client: c, region: r}, nil
}

// gpuRegion returns a region of a GPU's memory, with a description of its own.
func gpuRegion(memory *backend.GPURange, rights backend.Rights) *region.Region {
	own := *memory
	own.Handle = slices.Clone(memory.Handle)
	return &region.Region{Kind: backend.GPUMemory, Rights: rights, GPU: &own, FD: -1}
}

// Bytes returns the memory of the buffer; nil for a GPU's, which the processor cannot address.
func (b *Buffer) Bytes() []byte { return b.region.Bytes }

// Size returns the size of the buffer in bytes.
func (b *Buffer) Size() uint64 { return b.region.Size() }

// At returns the range of length bytes from offset on, for Item.At. A range that is not in the buffer is refused when it
// is used.
func (b *Buffer) At(offset, length uint64) Range { return Range{b, offset, length} }

// Close deregisters the buffer, after what is in flight on it has been cancelled, and frees memory that Alloc
// allocated. On an error the memory is still registered.
func (b *Buffer) Close(ctx context.Context) error {
	if err := b.client.engine.Deregister(ctx, b.region.ID); err != nil {
		return err
	}
	if b.arena == nil {
		return nil
	}
	return b.arena.Close()
}

// Close waits for the calls under way, releases the staging memory and hangs up on the nodes. Buffers are closed
// by their owners, before. When ctx ends first, nothing is released.
func (c *PoolClient) Close(ctx context.Context) error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.mu.Unlock()
	idle := make(chan struct{})
	go func() {
		c.inFlight.Wait()
		close(idle)
	}()
	select {
	case <-idle:
	case <-ctx.Done():
		return &backend.Error{Code: backend.Cancelled, Op: "close client", Text: "calls are still under way", Err: context.Cause(ctx)}
	}
	var errs []error
	for _, e := range c.nodes {
		errs = append(errs, e.node.leave())
	}
	clear(c.nodes)
	if c.stagingArena != nil {
		if err := c.engine.Deregister(ctx, c.stagingRegion.ID); err != nil {
			errs = append(errs, err)
		} else {
			errs = append(errs, c.stagingArena.Close())
		}
	}
	return errors.Join(errs...)
}

var errClientClosed = &backend.Error{Code: backend.Cancelled, Text: "the client is closed"}

// begin opens a call: it fails once the client is closed or the context has ended, and gives the call a deadline.
func (c *PoolClient) begin(ctx context.Context) (context.Context, func(), error) {
	if ctx.Err() != nil {
		return ctx, nil, ended(ctx)
	}
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return ctx, nil, errClientClosed
	}
	c.inFlight.Add(1)
	c.mu.Unlock()
	if _, bounded := ctx.Deadline(); bounded {
		return ctx, c.inFlight.Done, nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.tuning.Load().Timeout)
	return ctx, func() { cancel(); c.inFlight.Done() }, nil
}

// ended is the error of what was not done because its context had ended.
func ended(ctx context.Context) error {
	return &backend.Error{Code: backend.Cancelled, Err: context.Cause(ctx)}
}

// node returns the node, and gets to know it first if need be. Getting to know goes on when ctx ends: others may
// wait for it.
func (c *PoolClient) node(ctx context.Context, info directory.Node) (*node, error) {
	c.mu.Lock()
	e := c.nodes[info.Peer]
	if e == nil {
		e = &nodeEntry{ready: make(chan struct{})}
		c.nodes[info.Peer] = e
		c.inFlight.Add(1)
		go func() {
			defer c.inFlight.Done()
			e.node, e.err = c.meet(info)
			if e.err != nil {
				c.mu.Lock()
				delete(c.nodes, info.Peer)
				c.mu.Unlock()
			} else {
				c.forgetFormer(info.Peer)
			}
			close(e.ready)
		}()
	}
	c.mu.Unlock()
	if n := e.known(); n != nil {
		return n, nil // at work always, and without asking ctx for its channel, which it makes when it is first asked
	}
	select {
	case <-e.ready:
		return e.node, e.err
	case <-ctx.Done():
		return nil, &backend.Error{Code: backend.Cancelled, Op: "reach node", Peer: info.Peer, Err: context.Cause(ctx)}
	}
}

// maxReleasing bounds the leases that are given back beside the calls that held them.
const maxReleasing = 64

// meetTimeout bounds getting to know a node.
const meetTimeout = 5 * time.Second

func (c *PoolClient) meet(info directory.Node) (*node, error) {
	ctx, cancel := context.WithTimeout(context.Background(), meetTimeout)
	defer cancel()
	fail := func(err error) (*node, error) {
		code := backend.CodeOf(err)
		if code == backend.Cancelled || code == backend.Internal {
			code = backend.PathDown
		}
		return nil, &backend.Error{Code: code, Op: "reach node at " + info.Address, Peer: info.Peer, Err: err}
	}
	service, hangUp, err := c.opts.Dial(ctx, info)
	if err != nil {
		return fail(err)
	}
	d, err := service.Describe(ctx)
	switch {
	case err != nil:
	case d.Peer.Node != info.Peer.Node || d.Peer.Incarnation != info.Peer.Incarnation:
		err = &backend.Error{Code: backend.PeerGone, Text: fmt.Sprintf("found %s in its place", d.Peer)}
	case slices.ContainsFunc(d.Regions, func(r region.Descriptor) bool { return r.Peer != info.Peer }):
		err = backend.Errorf(backend.Internal, "it describes a region that is not its own")
	default:
		remove := c.engine.AddPeer(info.Peer, service)
		leave := func() error {
			remove()
			return hangUp()
		}
		return &node{peer: info.Peer, service: service, regions: d.Regions, leave: leave}, nil
	}
	return fail(errors.Join(err, hangUp()))
}

// forget drops a node whose incarnation is gone.
func (c *PoolClient) forget(n *node) {
	c.mu.Lock()
	e := c.nodes[n.peer]
	found := e != nil && e.known() == n // another call may have been first
	if found {
		delete(c.nodes, n.peer)
	}
	c.mu.Unlock()
	if found {
		n.leave()
	}
}

// forgetFormer drops the incarnations that a node had before this one.
func (c *PoolClient) forgetFormer(now backend.Peer) {
	var former []*node
	c.mu.Lock()
	for p, e := range c.nodes {
		if n := e.known(); n != nil && p.Node == now.Node && p.Incarnation != now.Incarnation {
			former = append(former, n)
		}
	}
	c.mu.Unlock()
	for _, n := range former {
		c.forget(n)
	}
}
