package region

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Table holds the regions of a process. Readers take no lock and allocate nothing: they look at an immutable
// snapshot that writers replace. It is safe for concurrent use.
type Table struct {
	current atomic.Pointer[snapshot]

	mu     sync.Mutex // held by writers
	lastID backend.RegionID
}

// snapshot is the table between two changes.
type snapshot struct {
	byID    []*Region
	byPlace []place // disjoint
}

// place is the addresses of a region.
type place struct {
	start, end uintptr
	region     *Region
}

// NewTable returns an empty table.
func NewTable() *Table {
	t := &Table{}
	t.current.Store(&snapshot{})
	return t
}

// Add gives the region its id, which is never used again, and puts it in the table. The region belongs to the
// table from then on. It refuses with BadRequest a region without memory, one that is in a table already, and one
// that overlaps another: a slice would lie in both, and a remote write to one would change the other. Memory of a GPU
// needs its address in this process.
func (t *Table) Add(r *Region) error {
	m := r.Memory()
	if err := m.Check(); err != nil {
		return &backend.Error{Code: backend.BadRequest, Op: "add region", Err: err}
	}
	start, end := r.Extent()
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.current.Load()
	switch {
	case r.ID != 0:
		return &backend.Error{Code: backend.BadRequest, Op: "add region", Region: r.ID,
			Text: "it has an id already: make a new Region for each time that memory is added"}
	case start == end:
		return &backend.Error{Code: backend.BadRequest, Op: "add region",
			Text: "it has no bytes: a region needs memory that this process can address"}
	case start == 0:
		return &backend.Error{Code: backend.BadRequest, Op: "add region",
			Text: "it has no address: only the process that allocated a GPU's memory can register it"}
	}
	i := old.after(start)
	for _, p := range old.byPlace[max(i-1, 0):min(i+1, len(old.byPlace))] {
		if start < p.end && p.start < end {
			return &backend.Error{Code: backend.BadRequest, Op: "add region", Region: p.region.ID,
				Text: fmt.Sprintf("the new region's memory [%#x, +%d) overlaps region %d's [%#x, +%d): "+
					"remove that one first, or add the two as one region",
					start, end-start, p.region.ID, p.start, p.end-p.start)}
		}
	}
	t.lastID++
	r.ID = t.lastID
	r.uses = &uses{}
	t.current.Store(&snapshot{
		byID:    append(slices.Clip(old.byID), r), // ids only grow
		byPlace: slices.Insert(slices.Clone(old.byPlace), i, place{start, end, r}),
	})
	return nil
}

// Remove takes a region out of the table and tells whether it was there. Readers that have found it may still
// hold it: its memory is unmapped only when the transfers that use it have ended.
func (t *Table) Remove(id backend.RegionID) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.current.Load()
	i, ok := old.index(id)
	if !ok {
		return false
	}
	t.current.Store(&snapshot{
		byID: slices.Delete(slices.Clone(old.byID), i, i+1),
		byPlace: slices.DeleteFunc(slices.Clone(old.byPlace), func(p place) bool {
			return p.region.ID == id
		}),
	})
	return true
}

// SetKey records that the region is registered with a backend, under the key that its Register returned; a key
// that was recorded before is replaced. It tells whether the region is in the table.
func (t *Table) SetKey(id backend.RegionID, backendName string, key []byte) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.current.Load()
	i, ok := old.index(id)
	if !ok {
		return false
	}
	r := *old.byID[i]
	r.Keys = maps.Clone(r.Keys)
	if r.Keys == nil {
		r.Keys = make(map[string][]byte, 1)
	}
	r.Keys[backendName] = key

	changed := &snapshot{byID: slices.Clone(old.byID), byPlace: slices.Clone(old.byPlace)}
	changed.byID[i] = &r
	start, _ := r.Extent()
	changed.byPlace[changed.after(start)-1].region = &r
	t.current.Store(changed)
	return true
}

// Get returns the region of that id.
func (t *Table) Get(id backend.RegionID) (*Region, bool) {
	s := t.current.Load()
	i, ok := s.index(id)
	if !ok {
		return nil, false
	}
	return s.byID[i], true
}

// Find returns the region that holds all of b, and where in the region b starts. A slice that begins in a region
// and runs out of it is in none, even where another region follows at once; nor is an empty slice. A slice that was made
// of an address in a GPU's memory is found like any other; its bytes are not to be touched.
func (t *Table) Find(b []byte) (r *Region, offset uint64, ok bool) {
	start, end := extent(b)
	s := t.current.Load()
	i := s.after(start) - 1
	if i < 0 || start == end {
		return nil, 0, false
	}
	p := s.byPlace[i]
	if end > p.end {
		return nil, 0, false
	}
	return p.region, uint64(start - p.start), true
}

// All returns every region, in the order of their ids. The slice is shared, and must not be changed.
func (t *Table) All() []*Region { return t.current.Load().byID }

// after returns the index in byPlace of the first region that starts after addr.
func (s *snapshot) after(addr uintptr) int {
	lo, hi := 0, len(s.byPlace)
	for lo < hi {
		if mid := int(uint(lo+hi) / 2); s.byPlace[mid].start <= addr {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo
}

func (s *snapshot) index(id backend.RegionID) (i int, ok bool) {
	return slices.BinarySearchFunc(s.byID, id, func(r *Region, id backend.RegionID) int {
		return cmp.Compare(r.ID, id)
	})
}
