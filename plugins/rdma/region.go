package rdma

import (
	"math"
	"sync"
	"sync/atomic"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/device"
)

// region is one registered region. Its memory may be touched only between users.enter and users.leave.
type region struct {
	id     backend.RegionID
	rights backend.Rights
	size   uint64
	base   uint64 // address of its first byte
	part   uint64 // bytes of one memory region of the devices, a power of two; the last one may be shorter
	bytes  []byte // nil once the region is deregistered, so that nothing points to memory that gets unmapped
	users  gate

	// rails holds, by the index of a rail, what the device made of the region; nil where the rail is lost. It is
	// changed under transport.memory, and read by the data path.
	rails []atomic.Pointer[registration]
}

// registration is a region as one rail's device knows it.
type registration struct {
	rail  *rail
	mrs   []device.MR // by part
	lkeys []uint32
	rkeys []uint32
}

func newRegion(m *backend.Memory, part uint64, rails int) *region {
	r := &region{
		id: m.Region, rights: m.Rights, size: uint64(len(m.Bytes)), base: address(m.Bytes), part: part, bytes: m.Bytes,
		rails: make([]atomic.Pointer[registration], rails),
	}
	r.users.drained = make(chan struct{})
	return r
}

// access is what a device may do with the memory of a region.
func access(rights backend.Rights) device.Access {
	a := device.LocalWrite
	if rights&backend.RemoteRead != 0 {
		a |= device.RemoteRead
	}
	if rights&backend.RemoteWrite != 0 {
		a |= device.RemoteWrite
	}
	return a
}

// parts is how many parts of the given size a region has.
func parts(size, part uint64) uint64 { return (size-1)/part + 1 }

// regions is the table of registered regions. Lookups take no lock: the table is replaced, never changed.
type regions struct {
	mu    sync.Mutex // serialises the replacements
	table atomic.Pointer[map[backend.RegionID]*region]
}

func (t *regions) get(id backend.RegionID) *region {
	if m := t.table.Load(); m != nil {
		return (*m)[id]
	}
	return nil
}

// add puts r into the table, where its id is free.
func (t *regions) add(r *region) {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := t.copy()
	m[r.id] = r
	t.table.Store(&m)
}

// remove forgets a region whose gate is shut and drained. Only the first call for a region has an effect.
func (t *regions) remove(r *region) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.get(r.id) != r {
		return
	}
	m := t.copy()
	delete(m, r.id)
	t.table.Store(&m)
	r.bytes = nil
}

// all returns every region.
func (t *regions) all() map[backend.RegionID]*region {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.copy()
}

func (t *regions) copy() map[backend.RegionID]*region {
	m := make(map[backend.RegionID]*region)
	if old := t.table.Load(); old != nil {
		for id, r := range *old {
			m[id] = r
		}
	}
	return m
}

// gate counts those who are inside, and can be shut: then nobody enters any more, and drained is closed when the
// last one has left.
type gate struct {
	inside  atomic.Int64 // plus shut, once shut
	drained chan struct{}
	once    sync.Once
}

const shut = math.MinInt64 / 2

// enter tells whether the caller is inside; if so, it has to leave.
func (g *gate) enter() bool {
	if g.inside.Add(1) > 0 {
		return true
	}
	g.leave()
	return false
}

func (g *gate) leave() {
	if g.inside.Add(-1) == shut {
		g.once.Do(func() { close(g.drained) })
	}
}

func (g *gate) isShut() bool { return g.inside.Load() < 0 }

// close shuts the gate. It may be called more than once.
func (g *gate) close() {
	for {
		n := g.inside.Load()
		if n < 0 {
			return
		}
		if g.inside.CompareAndSwap(n, n+shut) {
			if n == 0 {
				g.once.Do(func() { close(g.drained) })
			}
			return
		}
	}
}
