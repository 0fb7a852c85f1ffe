package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Sizes of regions. What is to be caught while it is on its way is large enough to take a while.
const (
	small = 256 << 10
	large = 4 << 20
)

// margin is memory before and after each region. It belongs to nobody, and must never change. It also gives each
// region an offset in its file, or in its allocation, since forgetting that offset is a favourite mistake.
const margin = 64 << 10

// settle is how long a case leaves a backend the chance to do what it must not do.
const settle = 20 * time.Millisecond

const allRights = backend.RemoteRead | backend.RemoteWrite

// lastIncarnation numbers the ends of all cases.
var lastIncarnation atomic.Uint64

// rig is what a case works with: two ends, a connection from the first to the second, and the memory of both.
type rig struct {
	*trial
	h                 Harness
	ctx               context.Context
	initiator, target *node
	endpoint          backend.Endpoint
	nodes             []*node
	lent              []Memory
	links             []*link
	rng               *rand.ChaCha8
	lastRegion        backend.RegionID
}

// node is one end.
type node struct {
	r         *rig
	peer      backend.Peer
	newMemory func(size int) (Memory, error)
	backend   backend.Backend
	process   Process // nil when it is linked in
	closed    bool
	killed    bool // on purpose
}

// area is a region of a node.
type area struct {
	node   *node
	lent   Memory // with the margins
	size   int    // of the region
	remote backend.Remote
	// bare says that the region is registered without what lets another process reach it: a descriptor, or a handle.
	bare bool
}

func newRig(t *trial, h Harness) *rig {
	return &rig{trial: t, h: h, ctx: context.Background(), rng: rand.NewChaCha8([32]byte{1})}
}

func (r *rig) setUp() {
	r.initiator, r.target = r.open("initiator", r.h.NewMemory), r.open("target", r.h.NewFarMemory)
	r.endpoint = r.connect(r.initiator, r.target)
}

// open opens the backend once more, as an end that is lent the memory given.
func (r *rig) open(name string, newMemory func(size int) (Memory, error)) *node {
	n := &node{
		r: r, peer: backend.Peer{Node: name, Incarnation: lastIncarnation.Add(1), Host: r.h.Host}, newMemory: newMemory,
	}
	defer r.calling("Factory.Open")()
	b, err := r.h.open(r.ctx, n.peer)
	if err != nil {
		r.Fatalf("open the %s: %v", name, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.opened = append(r.opened, b)
	n.backend, n.process = watched{b, r.trial}, r.h.Process(b)
	r.nodes = append(r.nodes, n)
	return n
}

// close ends the case, also one that has failed: it closes both ends, checks that every accepted transfer has
// completed once, and gives the memory back.
func (r *rig) close() {
	for _, n := range r.nodes {
		n.close()
	}
	for _, l := range r.links {
		l.sink.audit(r)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stuck {
		return
	}
	for _, m := range r.lent {
		if err := m.Free(); err != nil {
			r.failures = append(r.failures, fmt.Sprintf("free memory: %v", err))
		}
	}
}

// close closes the backend. A process of its own must have lived until then.
func (n *node) close() {
	died := n.killed
	if !n.closed && !died && n.process != nil {
		if err := n.process.Died(); err != nil {
			n.r.Errorf("the plugin's process, as the %s, has died: %v", n.peer.Node, err)
			died = true
		}
	}
	n.closed = true
	if err := n.backend.Close(); err != nil && !died {
		n.r.Errorf("Backend.Close of the %s: %v", n.peer.Node, err)
	}
}

// guard runs what must return, and ends the case when it does not.
func (r *rig) guard(what string, f func()) {
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		f()
	}()
	r.await(what, returned)
}

// await waits until c is closed.
func (r *rig) await(what string, c <-chan struct{}) {
	if !r.wait(c, r.h.Patience) {
		r.Fatalf("%s: nothing after %s", what, r.h.Patience)
	}
}

// timeout returns a context that ends when the harness's patience does.
func (r *rig) timeout() (context.Context, context.CancelFunc) {
	return context.WithTimeout(r.ctx, r.h.Patience)
}

func (r *rig) caps() backend.Capabilities { return r.initiator.backend.Info().Capabilities }

// claims tells whether the backend claims to move bytes between two areas.
func (r *rig) claims(near, far *area) bool {
	c := r.caps()
	_, linked := c.Link(near.remote.Place, far.remote.Place)
	return linked && c.Local.Has(near.remote.Kind) && c.Remote.Has(far.remote.Kind)
}

// nowhere is the place of a GPU that no machine has.
const nowhere = "ffff:ff:1f.7"

// kindAt returns the kind of memory at a place.
func kindAt(place string) backend.MemoryKind {
	if place == "" {
		return backend.HostMemory
	}
	return backend.GPUMemory
}

// wayOf names a pair of places.
func wayOf(near, far string) string {
	words := func(place string) string {
		if place == "" {
			return "host memory"
		}
		return "GPU " + place
	}
	return words(near) + " to " + words(far)
}

// ops returns the operations that the backend claims.
func (r *rig) ops() []backend.Op {
	return slices.DeleteFunc([]backend.Op{backend.Write, backend.Read}, func(op backend.Op) bool {
		return r.caps().Ops&op == 0
	})
}

// connect makes a connection that must succeed.
func (r *rig) connect(from, to *node) backend.Endpoint {
	endpoint, err := r.tryConnect(from, to, to.peer)
	if err != nil {
		r.Fatalf("connect %s to %s: %v", from.peer, to.peer, err)
	}
	return endpoint
}

// tryConnect offers a connection to the peer called as, and has it answered by to.
func (r *rig) tryConnect(from, to *node, as backend.Peer) (backend.Endpoint, error) {
	ctx, cancel := r.timeout()
	defer cancel()
	handshake, err := from.backend.Offer(ctx, as)
	if err != nil {
		return nil, err
	}
	answer, err := to.backend.Answer(ctx, from.peer, handshake.Offer())
	if err != nil {
		handshake.Abandon()
		return nil, err
	}
	return handshake.Establish(ctx, answer)
}

// area lends memory to the node and registers it.
func (n *node) area(size int, rights backend.Rights) *area {
	a := n.lend(size, rights)
	a.register()
	return a
}

// lend gives the node memory, full of random bytes, and an id of its own. It is yet to be registered.
func (n *node) lend(size int, rights backend.Rights) *area {
	return n.lendOf(n.newMemory, size, rights)
}

// lendOf lends memory other than the node's usual.
func (n *node) lendOf(newMemory func(size int) (Memory, error), size int, rights backend.Rights) *area {
	r := n.r
	lent, err := newMemory(size + 2*margin)
	if err != nil {
		r.Fatalf("NewMemory: %v", err)
	}
	r.lent = append(r.lent, lent)
	r.lastRegion++
	region := lent.region(margin, size)
	a := &area{
		node: n, lent: lent, size: size,
		remote: backend.Remote{
			Peer: n.peer, Region: r.lastRegion, Kind: region.Kind, Rights: rights, Size: region.Size(), Place: region.Place(),
		},
	}
	a.refill()
	return a
}

// register registers the memory; it must succeed.
func (a *area) register() {
	if err := a.tryRegister(); err != nil {
		if c := a.node.r.caps(); !c.Local.Has(a.remote.Kind) && !c.Remote.Has(a.remote.Kind) {
			a.node.r.Fatalf("the harness lends %s memory, which the backend does not claim: %v", a.remote.Kind, err)
		}
		a.node.r.Fatalf("Register region %d of %d bytes: %v", a.remote.Region, a.size, err)
	}
}

func (a *area) tryRegister() error {
	key, err := a.node.backend.Register(a.node.r.ctx, a.asMemory())
	a.remote.Key = key
	return err
}

func (a *area) asMemory() backend.Memory {
	m := a.lent.region(margin, a.size)
	m.Region, m.Rights = a.remote.Region, a.remote.Rights
	if a.bare {
		m.FD, m.FDOffset = -1, 0
		if m.GPU != nil {
			m.GPU.Handle = nil
		}
	}
	return m
}

// whole is the size of the memory with the margins.
func (a *area) whole() int { return a.size + 2*margin }

// look returns n bytes of the memory from an offset, which counts the first margin in. Where the processor can address
// them it is the memory itself, with whatever becomes of it while the caller looks; elsewhere it is a copy.
func (a *area) look(offset, n int) []byte {
	if a.lent.GPU == nil {
		return a.lent.Bytes[offset : offset+n : offset+n]
	}
	p := make([]byte, n)
	if err := a.lent.Load(p, uint64(offset)); err != nil {
		a.node.r.Fatalf("Memory.Load of %d bytes of the %s: %v", n, a.node.peer.Node, err)
	}
	return p
}

// at looks at a part of the region.
func (a *area) at(offset, length uint64) []byte { return a.look(margin+int(offset), int(length)) }

// contents returns a copy of the memory, margins included.
func (a *area) contents() []byte {
	if a.lent.GPU == nil {
		return bytes.Clone(a.lent.Bytes)
	}
	return a.look(0, a.whole())
}

// refill gives the memory new random bytes, and returns a copy of them.
func (a *area) refill() []byte {
	r := a.node.r
	if a.lent.GPU == nil {
		r.fill(a.lent.Bytes)
		return bytes.Clone(a.lent.Bytes)
	}
	p := make([]byte, a.whole())
	r.fill(p)
	if err := a.lent.Store(0, p); err != nil {
		r.Fatalf("Memory.Store of %d bytes of the %s: %v", len(p), a.node.peer.Node, err)
	}
	return p
}

// fill writes new random bytes, the same ones again after a length that is prime: no slip of a power of two goes
// unseen.
func (r *rig) fill(p []byte) {
	n := min(65521, len(p))
	r.rng.Read(p[:n])
	for n < len(p) {
		n += copy(p[n:], p[:65521])
	}
}

// unchanged compares the memory, margins included, with what it should be.
func (a *area) unchanged(want []byte, why string) {
	r := a.node.r
	if r.h.NearEndOnly {
		return
	}
	got := a.look(0, len(want))
	if bytes.Equal(got, want) {
		return
	}
	i := 0
	for i < len(want)-1 && got[i] == want[i] { // what changes behind our back may be right again
		i++
	}
	r.Errorf("%s: byte %d of the %s's region (size %d) is wrong", why, i-margin, a.node.peer.Node, a.size)
}

// deregister ends the use of the region.
func (a *area) deregister() {
	r := a.node.r
	ctx, cancel := r.timeout()
	defer cancel()
	if err := a.node.backend.Deregister(ctx, a.remote.Region); err != nil {
		r.Errorf("Deregister region %d: %v", a.remote.Region, err)
	}
}

// fence waits until the initiator's writes to the target are over.
func (r *rig) fence() { r.target.fence(r.initiator) }

// fence waits until what the other node has written to this one is over. An error means "not certain yet".
func (n *node) fence(other *node) {
	r := n.r
	ctx, cancel := r.timeout()
	defer cancel()
	for {
		err := n.backend.Fence(ctx, other.peer)
		if err == nil {
			return
		}
		r.identity("Fence", err)
		if ctx.Err() != nil {
			r.Fatalf("Fence does not succeed: %v", err)
		}
		time.Sleep(backend.DefaultRetryAfter)
	}
}

// identity checks that an error has one, and that it is among the codes, if any are given.
func (r *rig) identity(what string, err error, allowed ...backend.Code) {
	var e *backend.Error
	code := backend.CodeOf(err)
	switch {
	case err == nil:
		r.Errorf("%s: succeeded, want an error", what)
	case !errors.As(err, &e) && code != backend.Cancelled, !slices.Contains(backend.Codes, code):
		r.Errorf("%s: the error is not a *backend.Error with a known code: %v", what, err)
	case len(allowed) > 0 && !slices.Contains(allowed, code):
		r.Errorf("%s: %v; its code is %q, want one of %q", what, err, code, allowed)
	}
}

// scatter returns n segments, sorted by remote offset, that overlap on neither side of two regions of one size.
// Neighbours on the remote side are not neighbours on the local side.
func scatter(rng *rand.Rand, size uint64, n int) []backend.Segment {
	segments := make([]backend.Segment, n)
	free := size
	for i := range segments {
		segments[i].Length = 1 + rng.Uint64N(size/uint64(n))
		if rng.IntN(4) == 0 {
			segments[i].Length = 1
		}
		free -= segments[i].Length
	}
	place := func(order []int, set func(s *backend.Segment, offset uint64)) {
		offset, left := uint64(0), free
		for k, i := range order {
			gap := rng.Uint64N(left/uint64(len(order)-k) + 1)
			if rng.IntN(3) == 0 {
				gap = 0 // some do touch
			}
			offset, left = offset+gap, left-gap
			set(&segments[i], offset)
			offset += segments[i].Length
		}
	}
	order := rng.Perm(n)
	place(order, func(s *backend.Segment, offset uint64) { s.Local = offset })
	slices.Sort(order)
	place(order, func(s *backend.Segment, offset uint64) { s.Remote = offset })
	return segments
}

// cut64 cuts the whole of a region into 64 segments.
func cut64(size int) []backend.Segment {
	segments := make([]backend.Segment, 64)
	step := uint64(size / len(segments))
	for i := range segments {
		segments[i] = backend.Segment{Local: uint64(i) * step, Remote: uint64(i) * step, Length: step}
	}
	return segments
}
