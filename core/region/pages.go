package region

import (
	"fmt"
	"math"
)

// Run is consecutive pages of a pool region. The first page of the region has the number zero.
type Run struct {
	First, Count uint32
}

// end returns the page after the last one.
func (r Run) end() uint64 { return uint64(r.First) + uint64(r.Count) }

// String returns the run as "pages [first, +count)".
func (r Run) String() string { return fmt.Sprintf("pages [%d, +%d)", r.First, r.Count) }

// Pages says which pages of a region are free, and hands them out in as few runs as possible: every run costs a
// segment in each transfer of the value.
//
// Its memory and time depend on the number of free runs, not on the number of pages. An operation takes O(log n)
// for each run that it hands out or takes back, and allocates nothing unless there are more free runs than ever
// before. It is not safe for concurrent use: its owner locks.
type Pages struct {
	count uint32
	free  int
	// The free runs, twice. They never touch each other: neighbours are joined.
	bySize  keySet // of sizeKey
	byPlace keySet // of placeKey
}

// The keys of a run in the two sets: the first orders runs by length, and those of one length by place.
func (r Run) sizeKey() uint64  { return uint64(r.Count)<<32 | uint64(r.First) }
func (r Run) placeKey() uint64 { return uint64(r.First)<<32 | uint64(r.Count) }

func runOfSizeKey(k uint64) Run  { return Run{First: uint32(k), Count: uint32(k >> 32)} }
func runOfPlaceKey(k uint64) Run { return Run{First: uint32(k >> 32), Count: uint32(k)} }

// NewPages returns an allocator of count pages, all of them free. It panics when count is negative or does not
// fit 32 bits: 16 TiB in pages of 4 KiB.
func NewPages(count int) *Pages {
	if count < 0 || uint64(count) > math.MaxUint32 {
		panic(fmt.Sprintf("region: a pool of %d pages: the count must fit 32 bits", count))
	}
	p := &Pages{count: uint32(count), bySize: newKeySet(), byPlace: newKeySet()}
	if count > 0 {
		p.add(Run{Count: uint32(count)})
		p.free = count
	}
	return p
}

// Alloc takes n pages and appends their runs to out: one run where any free run is long enough, and the least
// possible number otherwise. Of several free runs that are long enough it cuts the shortest, and of those the one
// with the lowest number, so that long runs stay long. It returns out as it was and false when fewer than n pages
// are free. To take no pages always succeeds.
func (p *Pages) Alloc(n int, out []Run) ([]Run, bool) {
	if n > p.free {
		return out, false
	}
	for n > 0 {
		// Whole runs, the longest first, until one run can hold the rest: no other choice needs fewer.
		key, ok := p.bySize.atLeast(uint64(n) << 32)
		if !ok {
			key, _ = p.bySize.atLeast(uint64(p.LargestRun()) << 32)
		}
		r := runOfSizeKey(key)
		p.drop(r)
		if int(r.Count) > n {
			p.add(Run{First: r.First + uint32(n), Count: r.Count - uint32(n)})
			r.Count = uint32(n)
		}
		out = append(out, r)
		n -= int(r.Count)
		p.free -= int(r.Count)
	}
	return out, true
}

// Free gives pages back. The run may be one that Alloc returned or any part of one, as long as all of it is in
// use. It panics when it is empty, outside the pool, or free already, in part or whole: the caller has lost track
// of who owns the pages, and going on would hand one page to two values.
func (p *Pages) Free(r Run) {
	if r.Count == 0 || r.end() > uint64(p.count) {
		panic(fmt.Sprintf("region: free of %v: not in a pool of %d pages", r, p.count))
	}
	// The free runs on either side of where r begins. Both are checked before anything changes.
	here := uint64(r.First) << 32
	leftKey, hasLeft := p.byPlace.below(here)
	rightKey, hasRight := p.byPlace.atLeast(here)
	left, right := runOfPlaceKey(leftKey), runOfPlaceKey(rightKey)
	if hasLeft && left.end() > uint64(r.First) {
		panic(doubleFree(r, left))
	}
	if hasRight && uint64(right.First) < r.end() {
		panic(doubleFree(r, right))
	}

	p.free += int(r.Count)
	if hasLeft && left.end() == uint64(r.First) {
		p.drop(left)
		r = Run{First: left.First, Count: left.Count + r.Count}
	}
	if hasRight && uint64(right.First) == r.end() {
		p.drop(right)
		r.Count += right.Count
	}
	p.add(r)
}

func doubleFree(freed, free Run) string {
	return fmt.Sprintf("region: free of %v: %v are free already", freed, free)
}

// add and drop keep the two sets alike.
func (p *Pages) add(r Run) {
	p.bySize.insert(r.sizeKey())
	p.byPlace.insert(r.placeKey())
}

func (p *Pages) drop(r Run) {
	p.bySize.remove(r.sizeKey())
	p.byPlace.remove(r.placeKey())
}

// FreePages returns the number of free pages.
func (p *Pages) FreePages() int { return p.free }

// FreeRuns returns the number of runs that the free pages form.
func (p *Pages) FreeRuns() int { return p.bySize.size }

// LargestRun returns the length of the longest free run, in pages; zero when none is free.
func (p *Pages) LargestRun() int {
	key, _ := p.bySize.below(math.MaxUint64)
	return int(runOfSizeKey(key).Count)
}

// Fragmentation returns the share of the free pages that lie outside the longest free run: 0 when all are one
// run, or none is free, and towards 1 when they are scattered.
func (p *Pages) Fragmentation() float64 {
	if p.free == 0 {
		return 0
	}
	return 1 - float64(p.LargestRun())/float64(p.free)
}
