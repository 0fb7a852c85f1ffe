package core

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/zeebo/xxh3"

	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Get reads one value into memory that is as long as the value or longer. See BatchGet.
func (c *PoolClient) Get(ctx context.Context, key string, into []byte) Result {
	return c.BatchGet(ctx, []Item{{Key: key, Value: into}})[0]
}

// BatchGet reads values and returns what became of each, in order. The Size of a result that is Found says how
// much of the item's memory was filled. Bytes beyond it are untouched; after any other result, its content is
// undefined. Items whose memory overlaps are refused.
//
// A value is never another's and never half of one: bytes whose checksum is wrong, or which may have been replaced
// while they were read, are an Integrity error. BatchGet returns when nothing writes into the values any more, also
// when ctx ends before; a context without a deadline gets the client's timeout. In the one case where a backend is
// broken so badly that it does not even become quiet, the result is InDoubt, and the memory must not be used again.
func (c *PoolClient) BatchGet(ctx context.Context, items []Item) []Result {
	return c.call(ctx, opGet, items, func(ctx context.Context, b *batch) { b.get(ctx) })
}

func (b *batch) get(ctx context.Context) {
	b.checkMemory("get")
	b.refuseOverlaps()
	for len(b.todo) > 0 {
		moved := b.getWave(ctx)
		if err := b.over(ctx); err != nil {
			b.failAll("get", b.later, err)
			return
		}
		if !moved {
			b.waitForStaging(ctx)
		}
		b.todo = append(b.todo[:0], b.later...)
	}
}

// refuseOverlaps fails the items into whose memory another one's value would be written. Most batches show at the
// first look that there are none.
func (b *batch) refuseOverlaps() {
	var last uintptr
	rising := true
	for _, i := range b.todo {
		start, end := b.items[i].extent()
		rising = rising && last <= start
		last = end
	}
	if rising {
		return
	}
	order := append(b.order[:0], b.todo...)
	slices.SortFunc(order, func(i, j uint32) int {
		first, _ := b.items[i].extent()
		second, _ := b.items[j].extent()
		return cmp.Compare(first, second)
	})
	furthest := order[0]
	for _, i := range order[1:] {
		_, last = b.items[furthest].extent()
		start, end := b.items[i].extent()
		if start < last && start < end {
			err := backend.Errorf(backend.BadRequest, "the memory of %q overlaps that of %q", b.items[furthest].Key, b.items[i].Key)
			b.fail("get", furthest, err)
			b.fail("get", i, err)
		}
		if end > last {
			furthest = i
		}
	}
	b.order, b.todo = order, b.alive(b.todo)
}

// getWave gets the items on the list of what is to do, as many as one call to a node may name, and reports whether
// any of them got so far as to move. Those that found no staging memory, or no place in an answer, are left in later.
func (b *batch) getWave(ctx context.Context) (moved bool) {
	b.later = b.later[:0]
	if len(b.todo) > peer.MaxKeys {
		b.later = append(b.later, b.todo[peer.MaxKeys:]...)
		b.todo = b.todo[:peer.MaxKeys]
	}
	b.findMemory()
	if !b.locateParts(ctx, "get", b.todo) {
		return true
	}
	b.eachPart(func(p *part) { p.get(ctx) })
	for _, p := range b.parts {
		moved = moved || p.moved
		b.later = append(b.later, p.later...)
	}
	if !b.unusable {
		for _, i := range b.todo {
			b.unstage(i)
		}
	}
	return moved
}

// findMemory finds the items whose memory is registered, and fails those for which it is no more.
func (b *batch) findMemory() {
	for _, i := range b.todo {
		at, ok, err := b.find(&b.items[i])
		if err != nil {
			b.fail("get", i, err)
		} else if ok {
			b.places[i] = at
		}
	}
	b.todo = b.alive(b.todo)
}

// waitForStaging waits for staging memory for the first item that found none, now that nothing else can be done and
// no lease is held, and puts the item first in line.
func (b *batch) waitForStaging(ctx context.Context) {
	at := slices.IndexFunc(b.later, func(i uint32) bool { return b.results[i].Size > 0 })
	if at < 0 {
		return // none is short of memory; the others are still to be asked for
	}
	i, n := b.later[at], b.results[b.later[at]].Size
	b.later = slices.Delete(b.later, at, at+1)
	offset, err := b.client.staging.Acquire(ctx, n)
	if err != nil {
		b.fail("get", i, err)
		return
	}
	b.places[i] = place{region: b.client.stagingRegion, offset: offset, length: n, staged: true}
	b.later = slices.Insert(b.later, 0, i)
}

// locateParts asks the directory where the items are, and makes a part for each node that holds some.
func (b *batch) locateParts(ctx context.Context, op string, items []uint32) bool {
	b.keys = b.keys[:0]
	for _, i := range items {
		b.keys = append(b.keys, b.items[i].Key)
	}
	req := directory.LocateRequest{Keys: b.keys}
	err := b.ask(ctx, func(ctx context.Context) error { return b.client.opts.Directory.Locate(ctx, &req, &b.locate) })
	if err != nil {
		b.newParts(nil)
		b.failAll(op, items, err)
		return false
	}
	b.newParts(b.locate.Nodes)
	for k, i := range items {
		if at := b.locate.At[k]; at == directory.NoNode {
			b.results[i] = Result{Status: Missing}
		} else {
			b.parts[at].add(i, &b.items[i])
		}
	}
	return true
}

// get resolves, moves and verifies the items of the part.
func (p *part) get(ctx context.Context) {
	p.resolve(ctx, "get")
	if p.err != nil {
		return
	}
	p.meetRegions()
	for k, i := range p.items {
		v := &p.resolved.Values[k]
		if v.Status != peer.OK || p.batch.results[i].Err != nil || !p.stageGet(i, v.Size) {
			continue
		}
		if err := p.addRuns(i, p.resolved.Runs[v.FirstRun:v.FirstRun+v.RunCount], v.Size); err != nil {
			p.batch.fail("get", i, err)
		}
	}
	p.move(ctx, "get", backend.Read)
	if p.unusable {
		return // the lease runs out by itself
	}
	p.finishGet(p.endLease(ctx))
}

// resolve asks the node where its values are, and enters what it says into the results. The values are held under a
// lease. Items that the answer had no room for are added to later.
func (p *part) resolve(ctx context.Context, op string) {
	b := p.batch
	p.ask(ctx, func(ctx context.Context) error {
		req := peer.ResolveRequest{Client: b.client.engine.Self(), To: p.node.peer.Incarnation, Keys: p.keys}
		if err := p.node.service.Resolve(ctx, &req, &p.resolved); err != nil {
			return err
		}
		if got := len(p.resolved.Values); got != len(p.items) {
			return p.short(got, len(p.items), "keys")
		}
		p.ttl = p.resolved.TTL
		return nil
	})
	if p.gone(op) {
		return
	}
	answered := slices.ContainsFunc(p.resolved.Values, func(v peer.Value) bool { return v.Status != peer.Unknown })
	for k, i := range p.items {
		v, result := &p.resolved.Values[k], &b.results[i]
		*result = Result{Path: Path{Node: p.info.Peer.Node}, Size: v.Size}
		switch {
		case v.Status == peer.Missing:
			result.Status = Missing
		case v.Status == peer.Unknown && answered:
			p.later = append(p.later, i)
		case v.Status != peer.OK || v.Size == 0:
			b.fail(op, i, backend.Errorf(backend.Internal, "node %s answered with status %d and %d bytes", p.info.Peer.Node, v.Status, v.Size))
		}
	}
}

// gone enters the failure of a call to the node, if there was one. What was in the memory of a node whose
// incarnation is gone does not exist any more: it is missing, and no error.
func (p *part) gone(op string) bool {
	switch {
	case p.err == nil:
		return false
	case backend.CodeOf(p.err) == backend.PeerGone:
		for _, i := range p.items {
			p.batch.results[i] = Result{Status: Missing}
		}
	default:
		p.batch.failAll(op, p.items, p.err)
	}
	return true
}

// stageGet finds the memory that the item's bytes move into.
func (p *part) stageGet(i uint32, size uint64) bool {
	b, c := p.batch, p.batch.client
	have, at := b.items[i].size(), &b.places[i]
	if size > have {
		b.fail("get", i, backend.Errorf(backend.BadRequest, "the value has %d bytes, and the memory given only %d", size, have))
		return false
	}
	if at.region != nil && (!at.staged || at.length >= size) {
		return true // registered, or waited for since the wave before
	}
	b.unstage(i)
	if c.staging == nil {
		b.fail("get", i, errNoStaging)
		return false
	}
	offset, ok := c.staging.TryAcquire(size)
	if !ok {
		p.later = append(p.later, i)
		return false
	}
	*at = place{region: c.stagingRegion, offset: offset, length: size, staged: true}
	return true
}

// endLease ends the lease, and says whether it held to the end. Values whose checksum is going to be compared need no
// more than this process's clock for that. For others the node's word is asked for, since a process that was suspended
// has a clock that lies.
func (p *part) endLease(ctx context.Context) error {
	if time.Since(p.begun) >= p.ttl {
		p.releaseSoon(ctx)
		return p.leaseRanOut()
	}
	all, checked := p.batch.tuning.Verify == VerifyAll, true
	for k, i := range p.items {
		v := &p.resolved.Values[k]
		checked = checked && (v.Status != peer.OK || all && v.HasChecksum && p.batch.items[i].addressable())
	}
	if checked {
		p.releaseSoon(ctx)
		return nil
	}
	start := time.Now()
	defer func() { p.batch.client.stats.control.Add(time.Since(start)) }()
	held, err := p.node.release(ctx, p.releaseRequest())
	switch {
	case err != nil:
		return err
	case !held:
		return p.leaseRanOut()
	}
	return nil
}

func (p *part) leaseRanOut() error {
	return backend.Errorf(backend.Integrity,
		"the lease of %s ran out before the last byte had come; raise pool.read_lease or get less at once", p.ttl)
}

func (p *part) releaseRequest() *peer.ReleaseRequest {
	return &peer.ReleaseRequest{
		Client: p.batch.client.engine.Self(), To: p.node.peer.Incarnation, Lease: p.resolved.Lease,
	}
}

// releaseSoon ends the lease, if there is one: at once when that is a call within the process, and beside the caller's
// way when it is a call over the network, as long as not too many are on their way.
func (p *part) releaseSoon(ctx context.Context) {
	if p.err != nil || p.resolved.Lease == 0 {
		return
	}
	c, n, req := p.batch.client, p.node, p.releaseRequest()
	start := time.Now()
	defer func() { c.stats.control.Add(time.Since(start)) }()
	if n.local() {
		n.release(ctx, req)
		return
	}
	select {
	case c.releasing <- struct{}{}:
		c.inFlight.Add(1)
		go func() {
			defer c.inFlight.Done()
			n.release(ctx, req)
			<-c.releasing
		}()
	default:
		n.release(ctx, req)
	}
}

// releaseTimeout bounds giving a lease back. One that is not given back runs out by itself.
const releaseTimeout = 2 * time.Second

// release ends a lease, also when the caller's time is up, and says whether the node had held it until then.
func (n *node) release(ctx context.Context, req *peer.ReleaseRequest) (held bool, err error) {
	if !n.local() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
		defer cancel()
	}
	var reply peer.ReleaseReply
	err = n.service.Release(ctx, req, &reply)
	return reply.Held, err
}

// finishGet turns bytes that have arrived into values: those of a lease that held to the end, whose checksum is right.
func (p *part) finishGet(lease error) {
	b, c := p.batch, p.batch.client
	var bytes, staged uint64
	for k, i := range p.items {
		v, result := &p.resolved.Values[k], &b.results[i]
		if v.Status != peer.OK || result.Err != nil || result.Path.Attempts == 0 {
			continue
		}
		if lease != nil {
			b.fail("get", i, lease)
			continue
		}
		result.Status = Found
		bytes += v.Size
		if b.places[i].staged {
			staged += v.Size
		}
	}
	start := time.Now()
	parallel(len(p.items), bytes, func(k int) {
		i := p.items[k]
		v, result, at := &p.resolved.Values[k], &b.results[i], &b.places[i]
		if result.Status != Found || !b.items[i].addressable() {
			return
		}
		value := b.items[i].bytes()[:v.Size]
		if at.staged {
			copy(value, at.region.Bytes[at.offset:at.offset+v.Size])
		}
		if v.HasChecksum && b.verifies() {
			if sum := xxh3.Hash(value); sum != v.Checksum {
				b.fail("get", i, &backend.Error{Code: backend.Integrity, Peer: p.info.Peer, Text: "the checksum of the bytes is not the writer's: they are damaged, or were replaced while they were read"})
				return
			}
			result.Verified = true
		}
	})
	c.stats.verify.Add(time.Since(start))
	c.stats.stagedBytes.Add(staged)
}

// verifies decides for one value whether its checksum is compared.
func (b *batch) verifies() bool {
	switch b.tuning.Verify {
	case VerifyAll:
		return true
	case VerifySample:
		return b.client.sampled.Add(1)%uint64(b.tuning.SampleEvery) == 0
	}
	return false
}
