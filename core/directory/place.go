package directory

import (
	"context"
	"slices"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Place implements Directory. A node that says that it is full is not out of the choice, since nodes evict:
//
//  1. With Policy.Together, the node that has room for everything; of several the one with the most.
//  2. Else for each key the node with the most room, as long as that is enough.
//  3. Else the node whose turn it is to evict. Turns come in proportion to capacity, so that values live equally
//     long everywhere. With Policy.Together the keys that need it stay on one node.
//
// With Policy.LocalFirst steps 1 and 2 ask the client's own process first, then the nodes of its host, then the
// others. Room is what a node has free by its last report, less what has been placed there since, so that a burst
// does not pile up on one node. A key is without a node only when it is larger than every node's capacity, or
// when all nodes are excluded.
func (d *Memory) Place(ctx context.Context, req *PlaceRequest, reply *PlaceReply) error {
	if err := req.check(ctx); err != nil {
		return err
	}
	reply.Placements = slices.Grow(reply.Placements[:0], len(req.Keys))[:len(req.Keys)]
	reply.Nodes = reply.Nodes[:0]
	s := d.scratch.Get().(*scratch)
	defer d.scratch.Put(s)
	d.rlock()
	defer d.mu.RUnlock()
	s.begin(len(d.members))

	s.missing = s.missing[:0]
	var total uint64
	for i, key := range req.Keys {
		if m := d.owner(key); m != nil {
			reply.Placements[i] = Placement{Exists: true, Node: s.mention(m, &reply.Nodes)}
			continue
		}
		s.missing = append(s.missing, i)
		total = addSizes(total, req.Sizes[i])
	}
	if len(s.missing) == 0 {
		return nil
	}

	d.placing.Lock()
	defer d.placing.Unlock()
	c := &s.chooser
	c.begin(d, req, s)
	if req.Policy.Together {
		if m := c.roomiest(total); m != nil {
			m.placed = addSizes(m.placed, total)
			node := s.mention(m, &reply.Nodes)
			for _, i := range s.missing {
				reply.Placements[i] = Placement{Node: node}
			}
			return nil
		}
	}
	for _, i := range s.missing {
		reply.Placements[i] = Placement{Node: NoNode}
		m := c.withRoom(req.Sizes[i])
		if m == nil {
			m = c.toEvict(d, req.Sizes[i], req.Policy.Together)
		}
		if m != nil {
			reply.Placements[i].Node = s.mention(m, &reply.Nodes)
		}
	}
	return nil
}

// chooser chooses nodes for the keys of one batch. Choosing one node for everything needs no order; the heaps are
// made when keys have to be spread.
type chooser struct {
	near   [3][]*member // the client's own node, those of its host, the others; heaps by roomier when heaped
	heaped bool

	evictors []*member // all of them; a heap by earlier, but for the one at turn, which may have become later
	turn     int       // the index in evictors that was chosen last; -1 for none
	evicted  uint64    // bytes that it was given
}

// begin takes in the members that a request allows.
func (c *chooser) begin(d *Memory, req *PlaceRequest, s *scratch) {
	s.excluded = slices.Grow(s.excluded[:0], len(d.members))[:len(d.members)]
	clear(s.excluded)
	for _, peer := range req.Exclude {
		if m := d.member(peer); m != nil {
			s.excluded[m.index] = true
		}
	}
	for i := range c.near {
		c.near[i] = c.near[i][:0]
	}
	for i, m := range d.members {
		if s.excluded[i] || m.node.Capacity == 0 {
			continue
		}
		tier := 2
		if req.Policy.LocalFirst {
			tier = distance(m.node.Peer, req.Client)
		}
		c.near[tier] = append(c.near[tier], m)
	}
	c.heaped = false
	c.evictors = c.evictors[:0]
}

// distance returns 0 for the client itself, 1 for a node of its host, and 2 for others.
func distance(node, client backend.Peer) int {
	switch {
	case node.Node == client.Node && node.Incarnation == client.Incarnation:
		return 0
	case node.Host == client.Host && node.Host != "":
		return 1
	}
	return 2
}

// roomiest returns the nearest node that has room for size bytes, the one with the most of them, or nil.
func (c *chooser) roomiest(size uint64) *member {
	for _, tier := range c.near {
		var best *member
		for _, m := range tier {
			if m.room() >= size && (best == nil || roomier(m, best)) {
				best = m
			}
		}
		if best != nil {
			return best
		}
	}
	return nil
}

// withRoom is roomiest for one key of many: it takes the bytes, and it is quick.
func (c *chooser) withRoom(size uint64) *member {
	if !c.heaped {
		for _, tier := range c.near {
			heapify(tier, roomier)
		}
		c.heaped = true
	}
	for _, tier := range c.near {
		if len(tier) > 0 && tier[0].room() >= size {
			m := tier[0]
			m.placed = addSizes(m.placed, size)
			sink(tier, 0, roomier)
			return m
		}
	}
	return nil
}

// toEvict returns the node whose turn it is among those that are large enough, and gives it the bytes. Nil means
// that none is.
func (c *chooser) toEvict(d *Memory, size uint64, together bool) *member {
	switch {
	case len(c.evictors) == 0:
		for _, tier := range c.near {
			c.evictors = append(c.evictors, tier...)
		}
		for _, m := range c.evictors {
			m.turn = max(m.turn, d.turn) // who was full later than others has not saved up turns
		}
		heapify(c.evictors, earlier)
		c.turn = -1
	case c.turn >= 0:
		m := c.evictors[c.turn]
		if together && addSizes(c.evicted, size) <= m.node.Capacity {
			return c.evict(m, size)
		}
		sink(c.evictors, c.turn, earlier)
		c.turn = -1
	}
	for i, m := range c.evictors {
		if m.node.Capacity >= size && (c.turn < 0 || earlier(m, c.evictors[c.turn])) {
			c.turn = i
			if i == 0 {
				break // the top of the heap is the earliest of all
			}
		}
	}
	if c.turn < 0 {
		return nil
	}
	m := c.evictors[c.turn]
	c.evicted = 0
	d.turn = max(d.turn, m.turn)
	return c.evict(m, size)
}

func (c *chooser) evict(m *member, size uint64) *member {
	c.evicted = addSizes(c.evicted, size)
	m.turn += float64(size) / float64(m.node.Capacity)
	return m
}

// room returns the bytes that m can take without evicting, by our estimate.
func (m *member) room() uint64 {
	if m.placed >= m.node.Free {
		return 0
	}
	return m.node.Free - m.placed
}

// roomier tells whether a has more room than b; among equals the first by name has.
func roomier(a, b *member) bool {
	if a.room() != b.room() {
		return a.room() > b.room()
	}
	return a.index < b.index
}

// earlier tells whether a has to evict before b; among equals the larger has to, then the first by name.
func earlier(a, b *member) bool {
	switch {
	case a.turn != b.turn:
		return a.turn < b.turn
	case a.node.Capacity != b.node.Capacity:
		return a.node.Capacity > b.node.Capacity
	}
	return a.index < b.index
}

// heapify makes h a heap with the first by before at the top.
func heapify(h []*member, before func(a, b *member) bool) {
	for i := len(h)/2 - 1; i >= 0; i-- {
		sink(h, i, before)
	}
}

// sink restores the order of a heap whose element i may come later than it did.
func sink(h []*member, i int, before func(a, b *member) bool) {
	for {
		child := 2*i + 1
		if child >= len(h) {
			return
		}
		if right := child + 1; right < len(h) && before(h[right], h[child]) {
			child = right
		}
		if !before(h[child], h[i]) {
			return
		}
		h[i], h[child] = h[child], h[i]
		i = child
	}
}
