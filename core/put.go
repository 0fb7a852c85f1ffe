package core

import (
	"context"
	"slices"
	"time"

	"github.com/zeebo/xxh3"

	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Put stores one value. See BatchPut.
func (c *PoolClient) Put(ctx context.Context, key string, value []byte) Result {
	return c.BatchPut(ctx, []Item{{Key: key, Value: value}})[0]
}

// BatchPut stores values and returns what became of each, in order. A value whose result is Stored is visible to
// every client when BatchPut returns. A key that the pool has already keeps its value: the result is Exists.
//
// Values fail alone: one that finds no room, or whose node dies, does not touch the others. BatchPut returns when
// nothing reads the values any more, also when ctx ends before; a context without a deadline gets the client's
// timeout.
func (c *PoolClient) BatchPut(ctx context.Context, items []Item) []Result {
	return c.call(ctx, opPut, items, func(ctx context.Context, b *batch) { b.put(ctx) })
}

func (b *batch) put(ctx context.Context) {
	for _, i := range b.todo {
		if b.items[i].size() == 0 {
			b.fail("put", i, backend.Errorf(backend.BadRequest, "the value is empty"))
		}
	}
	b.checkMemory("put")
	for len(b.todo) > 0 && b.stagePut(ctx) {
		b.putWave(ctx)
		if err := b.over(ctx); err != nil {
			b.failAll("put", b.todo, err)
			return
		}
	}
}

// stagePut makes the next wave: the items that lie in registered memory, and as many others as the staging memory
// has room for; no more than one call to a node may name. When it has room for none, it waits for the first. It
// reports whether there is anything to do.
func (b *batch) stagePut(ctx context.Context) bool {
	c := b.client
	b.wave, b.later = b.wave[:0], b.later[:0]
	var copied uint64
	for n, i := range b.todo {
		if len(b.wave) == peer.MaxKeys {
			b.later = append(b.later, b.todo[n:]...)
			break
		}
		item := &b.items[i]
		at, ok, err := b.find(item)
		if err != nil {
			b.fail("put", i, err)
			continue
		}
		if ok {
			b.places[i] = at
		} else if c.staging == nil {
			b.fail("put", i, errNoStaging)
			continue
		} else if offset, ok := c.staging.TryAcquire(item.size()); ok {
			b.places[i] = place{region: c.stagingRegion, offset: offset, length: item.size(), staged: true}
			copied += item.size()
		} else {
			b.later = append(b.later, i)
			continue
		}
		b.wave = append(b.wave, i)
	}
	for len(b.wave) == 0 && len(b.later) > 0 {
		i := b.later[0]
		b.later = b.later[1:]
		n := b.items[i].size()
		offset, err := c.staging.Acquire(ctx, n)
		if err != nil {
			b.fail("put", i, err)
			continue
		}
		b.places[i] = place{region: c.stagingRegion, offset: offset, length: n, staged: true}
		copied += n
		b.wave = append(b.wave, i)
	}
	b.todo = append(b.todo[:0], b.later...)
	if copied > 0 {
		start := time.Now()
		parallel(len(b.wave), copied, func(n int) {
			i := b.wave[n]
			if at := &b.places[i]; at.staged {
				copy(at.region.Bytes[at.offset:], b.items[i].Value)
			}
		})
		c.stats.staging.Add(time.Since(start))
		c.stats.stagedBytes.Add(copied)
	}
	return len(b.wave) > 0
}

// putWave puts the items of the wave, and those that their nodes could not take once more without these nodes. Items that no
// backend can carry to one node are put as often as there is another: that says nothing of the next, which may lend other
// memory. Each round excludes another node, of which there are no more than directory.MaxNodes.
func (b *batch) putWave(ctx context.Context) {
	wave := b.wave
	b.exclude = b.exclude[:0] // another value may well find room where the last one did not
	b.putRound(ctx)
	for len(b.wave) > 0 && ctx.Err() == nil && !b.unusable {
		b.putRound(ctx)
		b.wave = slices.DeleteFunc(b.wave, func(i uint32) bool { return backend.CodeOf(b.results[i].Err) != backend.Unsupported })
	}
	b.wave = wave
	if !b.unusable {
		for _, i := range wave {
			b.unstage(i)
		}
	}
}

// putRound places the items of the wave and lets each node's part put its own. Items that another node may take are
// left in the wave, with the nodes that could not in exclude.
func (b *batch) putRound(ctx context.Context) {
	if err := b.askPlaces(ctx, func(i uint32) uint64 { return b.items[i].size() }); err != nil {
		b.failAll("put", b.wave, err)
		b.wave = nil
		return
	}
	b.newParts(b.place.Nodes)
	for k, i := range b.wave {
		result := &b.results[i]
		switch at := b.place.Placements[k]; {
		case at.Exists:
			*result = Result{Status: Exists, Path: Path{Node: b.place.Nodes[at.Node].Peer.Node}}
		case at.Node == directory.NoNode && result.Err == nil:
			result.Status = NoSpace
			result.Err = &keyError{"put", b.items[i].Key, backend.Errorf(backend.Busy,
				"no node can hold %d bytes: start a node, or one with a larger pool.size", b.items[i].size())}
		case at.Node == directory.NoNode:
			// What the node before said stands.
		default:
			*result = Result{}
			b.parts[at.Node].add(i, &b.items[i])
		}
	}
	b.eachPart(func(p *part) { p.put(ctx) })
	var again []uint32
	for _, p := range b.parts {
		if len(p.again) > 0 {
			again = append(again, p.again...)
			b.exclude = append(b.exclude, p.info.Peer)
		}
	}
	slices.Sort(again) // neighbours in the batch stay neighbours
	b.wave = again
}

// askPlaces asks the directory where the items of the wave should go.
func (b *batch) askPlaces(ctx context.Context, size func(i uint32) uint64) error {
	b.keys, b.sizes = b.keys[:0], b.sizes[:0]
	for _, i := range b.wave {
		b.keys = append(b.keys, b.items[i].Key)
		b.sizes = append(b.sizes, size(i))
	}
	req := directory.PlaceRequest{
		Client: b.client.engine.Self(), Keys: b.keys, Sizes: b.sizes, Exclude: b.exclude, Policy: b.tuning.Placement,
	}
	return b.ask(ctx, func(ctx context.Context) error { return b.client.opts.Directory.Place(ctx, &req, &b.place) })
}

// put allocates, moves and commits the items of the part.
func (p *part) put(ctx context.Context) {
	p.allocate(ctx)
	if p.err != nil {
		p.batch.failAll("put", p.items, p.err)
		p.again = append(p.again, p.items...)
		return
	}
	if len(p.items) == 0 {
		return
	}
	p.meetRegions()
	for k, i := range p.items {
		slot := &p.allocated.Slots[k]
		if slot.Status != peer.OK {
			p.refused(k, slot.Status)
			continue
		}
		if err := p.addRuns(i, p.allocated.Runs[slot.FirstRun:slot.FirstRun+slot.RunCount], p.sizes[k]); err != nil {
			p.batch.fail("put", i, err)
		}
	}
	waitForSums := p.checksums()
	p.move(ctx, "put", backend.Write)
	waitForSums()
	p.conclude(ctx)
}

func (p *part) allocate(ctx context.Context) {
	p.ask(ctx, func(ctx context.Context) error {
		if p.leaveUnreachable(); len(p.items) == 0 {
			return nil
		}
		req := peer.AllocateRequest{
			Client: p.batch.client.engine.Self(), To: p.node.peer.Incarnation, Keys: p.keys, Sizes: p.sizes,
		}
		if err := p.node.service.Allocate(ctx, &req, &p.allocated); err != nil {
			return err
		}
		if got := len(p.allocated.Slots); got != len(p.items) {
			return p.short(got, len(p.items), "keys")
		}
		p.ttl = p.allocated.TTL
		return nil
	})
}

// leaveUnreachable leaves to other nodes the items that no backend can carry to this one. It is not asked for slots for
// them, since it might evict values for what never comes.
func (p *part) leaveUnreachable() {
	b := p.batch
	var total uint64
	for _, size := range p.sizes {
		total += size
	}
	var local *region.Region
	var err error
	kept := 0
	for k, i := range p.items {
		if b.places[i].region != local {
			local = b.places[i].region
			err = p.unreachable(local, total)
		}
		if err != nil {
			b.fail("put", i, err)
			p.again = append(p.again, i)
			continue
		}
		p.items[kept], p.keys[kept], p.sizes[kept] = i, p.keys[k], p.sizes[k]
		kept++
	}
	p.items, p.keys, p.sizes = p.items[:kept], p.keys[:kept], p.sizes[:kept]
}

// unreachable returns why nothing of up to so many bytes can be written from a local region to the node, or nil.
func (p *part) unreachable(local *region.Region, bytes uint64) (err error) {
	for k := range p.node.regions {
		err = p.batch.client.engine.selector.Unreachable(selector.Query{
			Local: local, Remote: &p.node.regions[k], Op: backend.Write, Bytes: bytes, Now: p.begun,
		})
		if err == nil {
			return nil
		}
	}
	return err
}

// refused enters the result of an item that got no slot.
func (p *part) refused(k int, status peer.Status) {
	i, result := p.items[k], &p.batch.results[p.items[k]]
	switch status {
	case peer.Exists:
		*result = Result{Status: Exists, Path: Path{Node: p.info.Peer.Node}}
	case peer.NoSpace:
		result.Status = NoSpace
		result.Err = &keyError{"put", p.keys[k], backend.Errorf(backend.Busy,
			"node %s has no room for %d bytes, and nothing that it may evict", p.info.Peer.Node, p.sizes[k])}
		p.again = append(p.again, i)
	default:
		p.batch.fail("put", i, backend.Errorf(backend.BadRequest, "node %s refuses a value of %d bytes", p.info.Peer.Node, p.sizes[k]))
	}
}

// checksums computes the checksums of the values that are about to move, where the processor can address them, beside
// the move when there is much of them: the values stand still until the call returns. The function returned waits for
// them.
func (p *part) checksums() (wait func()) {
	b := p.batch
	if b.tuning.Verify == VerifyOff {
		return func() {}
	}
	var bytes uint64
	p.summed = p.summed[:0]
	for k, i := range p.items {
		if p.allocated.Slots[k].Status == peer.OK && b.results[i].Err == nil && b.items[i].addressable() {
			p.summed = append(p.summed, i)
			bytes += p.sizes[k]
		}
	}
	sum := func() {
		start := time.Now()
		parallel(len(p.summed), bytes, func(n int) { b.sums[p.summed[n]] = xxh3.Hash(b.items[p.summed[n]].bytes()) })
		b.client.stats.verify.Add(time.Since(start))
	}
	const worthAGoroutine = 1 << 20
	if bytes < worthAGoroutine {
		sum()
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		sum()
	}()
	return func() { <-done }
}

// concludeTimeout bounds giving slots back after the caller's time is up.
const concludeTimeout = 2 * time.Second

// conclude commits the slots whose values are in place and aborts the others.
func (p *part) conclude(ctx context.Context) {
	b := p.batch
	start := time.Now()
	defer func() { b.client.stats.control.Add(time.Since(start)) }()
	// The slots are settled even when the caller's time is up: a slot that is neither committed nor aborted is
	// room lost until it expires.
	if ctx.Err() != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), concludeTimeout)
		defer cancel()
	}
	self, to := b.client.engine.Self(), p.node.peer.Incarnation
	p.commit.Client, p.commit.To, p.commit.Fence = self, to, p.fence
	p.abort.Client, p.abort.To, p.abort.Fence = self, to, p.fence || p.unusable
	for k, i := range p.items {
		slot := &p.allocated.Slots[k]
		switch {
		case slot.Status != peer.OK:
		case b.results[i].Err == nil:
			p.commit.Slots = append(p.commit.Slots, peer.CommitSlot{
				ID: slot.ID, Checksum: b.sums[i], HasChecksum: b.tuning.Verify != VerifyOff && b.items[i].addressable(),
			})
		default:
			p.abort.Slots = append(p.abort.Slots, slot.ID)
		}
	}
	if len(p.abort.Slots) > 0 {
		// What fails here is put right by the slots' expiry.
		if err := p.node.service.Abort(ctx, &p.abort); backend.CodeOf(err) == backend.PeerGone {
			p.lost(err)
		}
	}
	if len(p.commit.Slots) > 0 && p.err == nil {
		if err := p.node.service.Commit(ctx, &p.commit, &p.committed); err != nil {
			p.lost(err)
		} else if got := len(p.committed.Statuses); got != len(p.commit.Slots) {
			p.err = p.short(got, len(p.commit.Slots), "slots")
		}
	}
	p.enterCommit()
}

// enterCommit enters what became of the slots into the results.
func (p *part) enterCommit() {
	b := p.batch
	committed := 0
	for k, i := range p.items {
		if p.allocated.Slots[k].Status != peer.OK {
			continue
		}
		result := &b.results[i]
		if result.Err != nil {
			switch backend.CodeOf(result.Err) {
			case backend.PeerGone, backend.PathDown, backend.Denied, backend.Unsupported, backend.Internal:
				p.again = append(p.again, i) // the node is at fault, or the way to it
			}
			continue
		}
		switch {
		case p.err == nil:
		case backend.CodeOf(p.err) == backend.PeerGone:
			// The node is gone, and the value with it: nobody can have seen it.
			b.fail("commit", i, p.err)
			p.again = append(p.again, i)
			continue
		default:
			result.Status = InDoubt
			result.Err = &keyError{"commit", p.keys[k], p.err}
			continue
		}
		switch p.committed.Statuses[committed] {
		case peer.OK:
			result.Status, result.Size = Stored, p.sizes[k]
		case peer.Exists:
			result.Status = Exists
		case peer.Expired:
			b.fail("commit", i, backend.Errorf(backend.Cancelled, "the slot had expired at node %s; raise pool.slot_ttl or put less at once", p.info.Peer.Node))
		default:
			b.fail("commit", i, backend.Errorf(backend.Internal, "node %s refused the slot", p.info.Peer.Node))
		}
		committed++
	}
}
