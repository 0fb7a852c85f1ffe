// Package inuse helps a backend to keep what it was given for just as long as transfers use it.
//
// A region's memory may be unmapped as soon as Deregister has returned, so Deregister waits for the transfers that use it,
// while Post, which must not wait, goes on with other regions. A Table has the regions by id, and is read without a lock. A
// Gate in each of them counts its users, and lets nobody in once it is shut:
//
//	r := b.regions.Get(id)
//	if r == nil || !r.users.Enter() {
//		return refused
//	}
//	... // when the transfer is over, and nothing touches r.bytes any more:
//	r.users.Leave()
//
// and where the region ends:
//
//	select {
//	case <-r.users.Shut():
//	case <-ctx.Done():
//		... // abort those who are still inside, who then leave
//	}
//
// Anything else that is used and ends serves as well: a session, a device.
package inuse

import (
	"iter"
	"maps"
	"math"
	"sync"
	"sync/atomic"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Gate counts those who are inside. Once it is shut, nobody enters any more. The zero value is open, and empty. A Gate must
// not be copied after its first use. All methods may be called from any goroutine; only Shut takes a lock.
type Gate struct {
	inside atomic.Int64 // plus shut, once it is shut

	mu    sync.Mutex
	empty chan struct{} // nil while the gate is open
	ended bool          // empty is closed
}

// shut is so far below zero that no number of users makes up for it.
const shut = math.MinInt64 / 2

// Enter tells whether the caller is inside; if so, it has to Leave.
func (g *Gate) Enter() bool {
	if g.inside.Add(1) > 0 {
		return true
	}
	g.Leave()
	return false
}

// Leave ends what an Enter began.
func (g *Gate) Leave() {
	if g.inside.Add(-1) == shut {
		g.end()
	}
}

// end may be called more than once: those who find the gate shut are inside for a moment, too.
func (g *Gate) end() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.ended {
		g.ended = true
		close(g.empty)
	}
}

// Shut shuts the gate for good, and returns a channel that is closed when the last one has left. It does not wait, and
// may be called more than once.
func (g *Gate) Shut() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.empty == nil {
		g.empty = make(chan struct{})
		if g.inside.Add(shut) == shut {
			g.ended = true
			close(g.empty)
		}
	}
	return g.empty
}

// IsShut tells whether Shut was called.
func (g *Gate) IsShut() bool { return g.inside.Load() < 0 }

// Inside returns how many are inside. Somebody who is about to be turned away may be counted.
func (g *Gate) Inside() int64 {
	n := g.inside.Load()
	if n < 0 {
		n -= shut
	}
	return n
}

// Table has the regions of a backend by their ids. The zero value is empty. A look-up takes no lock, and a few
// nanoseconds; a change copies the table, which suits regions, since they last for many transfers. A Table must not be
// copied after its first use. All methods may be called from any goroutine.
type Table[R any] struct {
	mu      sync.Mutex // serialises the changes
	regions atomic.Pointer[map[backend.RegionID]*R]
}

// Get returns a region, or nil where there is none of that id.
func (t *Table[R]) Get(id backend.RegionID) *R { return t.load()[id] }

// Add tells whether the id was free. If so, the region is in the table.
func (t *Table[R]) Add(id backend.RegionID, r *R) bool {
	return t.change(id, nil, func(m map[backend.RegionID]*R) { m[id] = r })
}

// Remove takes a region out, and tells whether it was there. Another one of the same id stays.
func (t *Table[R]) Remove(id backend.RegionID, r *R) bool {
	return t.change(id, r, func(m map[backend.RegionID]*R) { delete(m, id) })
}

// change makes a change where the id has the region that it is said to have.
func (t *Table[R]) change(id backend.RegionID, has *R, how func(map[backend.RegionID]*R)) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.load()
	if old[id] != has {
		return false
	}
	m := make(map[backend.RegionID]*R, len(old)+1)
	maps.Copy(m, old)
	how(m)
	t.regions.Store(&m)
	return true
}

// All returns the regions that are in the table now, in no order. What is added or removed later makes no difference.
func (t *Table[R]) All() iter.Seq2[backend.RegionID, *R] { return maps.All(t.load()) }

func (t *Table[R]) load() map[backend.RegionID]*R {
	if m := t.regions.Load(); m != nil {
		return *m
	}
	return nil
}
