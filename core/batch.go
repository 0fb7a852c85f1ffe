package core

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// batch is the working memory of one call. It is used by one goroutine, which lends its parts to others while it
// waits for them, and is kept for the next call, so that a client at work allocates next to nothing.
type batch struct {
	client  *PoolClient
	tuning  *Tuning
	items   []Item
	results []Result
	places  []place  // by item
	sums    []uint64 // checksums, by item

	// A call goes in waves. A wave holds the items that have memory to move from or to; the others wait in todo
	// for staging memory.
	todo, wave, later []uint32

	keys    []string // of the present request
	sizes   []uint64
	numbers map[string]uint32 // of keys, to find duplicates
	order   []uint32          // of items, by address
	exclude []backend.Peer    // nodes that could not take items of the wave
	held    []*region.Region  // local regions that the batch uses

	place  directory.PlaceReply
	locate directory.LocateReply
	parts  []*part // one for each node that the wave has to do with
	spare  []*part

	// unusable: a transfer of some part may still be touching local memory. What the batch holds stays held.
	unusable bool
}

// place is where an item's bytes lie locally.
type place struct {
	region *region.Region
	offset uint64
	length uint64 // of the staging memory held, when staged
	staged bool
}

func (c *PoolClient) newBatch(items []Item, results []Result) *batch {
	b, _ := c.batches.Get().(*batch)
	if b == nil {
		b = &batch{client: c, numbers: make(map[string]uint32)}
	}
	b.tuning = c.tuning.Load()
	b.items, b.results = items, results
	b.todo = b.todo[:0]
	b.exclude = b.exclude[:0]
	b.places = resize(b.places, len(items))
	b.sums = resize(b.sums, len(items))
	return b
}

// call runs f over the items that no node would refuse at sight, which are on the batch's list of what is to do, and
// returns what became of all of them.
func (c *PoolClient) call(ctx context.Context, op op, items []Item, f func(ctx context.Context, b *batch)) []Result {
	results := make([]Result, len(items))
	b := c.newBatch(items, results)
	defer b.recycle()
	b.check(op.String())
	ctx, end, err := c.begin(ctx)
	if err != nil {
		b.failAll(op.String(), b.todo, err)
		return results
	}
	defer end()
	f(ctx, b)
	c.stats.finish(op, items, results)
	return results
}

// recycle gives back what the batch holds, and keeps the batch for another call.
func (b *batch) recycle() {
	b.dropParts()
	if b.unusable {
		return
	}
	for i := range b.places {
		b.unstage(uint32(i))
	}
	for i, r := range b.held {
		r.Release()
		b.held[i] = nil
	}
	b.held = b.held[:0]
	b.items, b.results = nil, nil
	clear(b.places)
	clear(b.numbers)
	clear(b.keys[:cap(b.keys)])
	b.client.batches.Put(b)
}

// resize returns a slice of n zero values, in the memory of s if it is large enough.
func resize[T any](s []T, n int) []T {
	if cap(s) < n {
		return make([]T, n)
	}
	s = s[:n]
	clear(s)
	return s
}

// maxKey is the longest key, in bytes.
const maxKey = directory.MaxKey

// check refuses what no node could take, and puts the other items on the list of what is to do. A key that comes
// twice is refused both times: the caller's two values cannot both be right.
func (b *batch) check(op string) {
	for i := range b.items {
		key := b.items[i].Key
		switch {
		case key == "":
			b.fail(op, uint32(i), backend.Errorf(backend.BadRequest, "item %d has an empty key", i))
			continue
		case len(key) > maxKey:
			b.fail(op, uint32(i), backend.Errorf(backend.BadRequest, "the key has %d bytes, more than the %d allowed", len(key), maxKey))
			continue
		}
		if first, twice := b.numbers[key]; twice {
			err := backend.Errorf(backend.BadRequest, "items %d and %d have the same key", first, i)
			b.fail(op, first, err)
			b.fail(op, uint32(i), err)
			continue
		}
		b.numbers[key] = uint32(i)
	}
	for i := range b.items {
		if b.results[i].Err == nil {
			b.todo = append(b.todo, uint32(i))
		}
	}
}

// over says why the batch does not go on with another wave, if it does not.
func (b *batch) over(ctx context.Context) error {
	switch {
	case b.unusable:
		return backend.Errorf(backend.Internal, "the batch was given up")
	case ctx.Err() != nil:
		return ended(ctx)
	}
	return nil
}

// alive returns the items that have not failed, in place.
func (b *batch) alive(items []uint32) []uint32 {
	kept := items[:0]
	for _, i := range items {
		if b.results[i].Err == nil {
			kept = append(kept, i)
		}
	}
	return kept
}

func (b *batch) fail(op string, i uint32, err error) {
	b.results[i].fail(&keyError{op, b.items[i].Key, err})
}

func (b *batch) failAll(op string, items []uint32, err error) {
	for _, i := range items {
		b.fail(op, i, err)
	}
}

// ask makes a call to the directory, and adds its time to the client's statistics.
func (b *batch) ask(ctx context.Context, call func(ctx context.Context) error) error {
	start := time.Now()
	defer func() { b.client.stats.control.Add(time.Since(start)) }()
	return call(ctx)
}

// dropParts makes the parts ready for the next wave. Parts that are still being touched are left to themselves.
func (b *batch) dropParts() {
	for _, p := range b.parts {
		if !p.unusable {
			p.reset()
			b.spare = append(b.spare, p)
		}
	}
	b.parts = b.parts[:0]
}

// newParts makes one part for each node of a reply.
func (b *batch) newParts(nodes []directory.Node) {
	b.dropParts()
	for _, info := range nodes {
		var p *part
		if n := len(b.spare); n > 0 {
			p = b.spare[n-1]
			b.spare = b.spare[:n-1]
		} else {
			p = &part{}
		}
		p.batch, p.info = b, info
		b.parts = append(b.parts, p)
	}
}

// eachPart calls f for every part that has items, at once where there are several, and returns when all have
// returned.
func (b *batch) eachPart(f func(p *part)) {
	busy := 0
	var only *part
	for _, p := range b.parts {
		if len(p.items) > 0 {
			busy++
			only = p
		}
	}
	if busy <= 1 {
		if only != nil {
			f(only)
		}
	} else {
		var wg sync.WaitGroup
		for _, p := range b.parts {
			if len(p.items) > 0 {
				wg.Go(func() { f(p) })
			}
		}
		wg.Wait()
	}
	for _, p := range b.parts {
		b.unusable = b.unusable || p.unusable
	}
}

// checkMemory refuses the items that name no memory that could be used.
func (b *batch) checkMemory(op string) {
	for _, i := range b.todo {
		if err := b.items[i].check(b.client.engine); err != nil {
			b.fail(op, i, err)
		}
	}
	b.todo = b.alive(b.todo)
}

// hold keeps a local region from being deregistered as long as the batch lasts.
func (b *batch) hold(r *region.Region) error {
	for i := len(b.held) - 1; i >= 0; i-- {
		if b.held[i] == r {
			return nil
		}
	}
	if !r.Hold() {
		return backend.Errorf(backend.BadRequest, "the memory (region %d) is being registered or closed", r.ID)
	}
	b.held = append(b.held, r)
	return nil
}

// find returns the place of an item's memory if that is registered, and whether it is. The region is held.
func (b *batch) find(item *Item) (at place, ok bool, err error) {
	regions := b.client.engine.regions
	if buffer := item.At.buffer; buffer != nil {
		r, ok := regions.Get(buffer.region.ID)
		if !ok {
			return place{}, false, backend.Errorf(backend.BadRequest, "the buffer (region %d) is closed", buffer.region.ID)
		}
		return place{region: r, offset: item.At.offset}, true, b.hold(r)
	}
	r, offset, ok := regions.Find(item.Value)
	switch {
	case !ok:
		return place{}, false, nil
	case r.GPU != nil:
		return place{}, false, backend.Errorf(backend.BadRequest,
			"the value lies in the memory of GPU %s (region %d), which the processor cannot address: name it by Item.At", r.GPU.Device, r.ID)
	}
	return place{region: r, offset: offset}, true, b.hold(r)
}

// unstage gives the staging memory of an item back, if it has any.
func (b *batch) unstage(i uint32) {
	if at := &b.places[i]; at.staged {
		b.client.staging.Release(at.offset, at.length)
		*at = place{}
	}
}

var errNoStaging = &backend.Error{Code: backend.BadRequest,
	Text: "the value lies in no registered region, and staging is refused; use a registered buffer, or set client.staging to allow"}

// parallel calls f for 0 to n-1, on several processors where the work is worth it.
func parallel(n int, bytes uint64, f func(i int)) {
	const worthwhile = 1 << 20
	workers := min(n, runtime.GOMAXPROCS(0))
	if bytes < worthwhile || workers < 2 {
		for i := range n {
			f(i)
		}
		return
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	wg.Wait()
}
