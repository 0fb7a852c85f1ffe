// Package plan turns the runs of a batch into the transfers that carry them.
//
// A value lies in runs of pages; a batch of values is a list of runs, each between one local and one remote
// region. The planner groups them by (local, remote), sorts each group by remote offset, merges neighbours that
// touch on both sides, and cuts what exceeds the limits of the backends. It is pure: no I/O, no clock, no locks.
//
// It works in four steps, each of which costs by what the step before has left over:
//
//	join    runs → spans         in the caller's order: runs of one value that continue each other become one span
//	sort    spans by (local, remote, remote offset); skipped when the caller's order is that order already
//	merge   spans → segments → groups, across values, within the limits
//	check   that no destination byte is written twice; by segment, and skipped when join has seen that it holds
//
// So pages that arrive in order cost one look at each page, and only pages that arrive scattered are sorted.
//
// Groups travel, but keys are accounted: Plan.Keys leads from a segment back to the values whose bytes it carries.
// Explain says in words or JSON what a plan does.
package plan

import (
	"slices"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Run is one contiguous piece of one value: a page, or many. Where a batch of very many is made, assign the fields
// of elements that are there already: appending Run literals takes longer than planning them.
type Run struct {
	// Key is the index of the value in the batch.
	Key uint32
	// Local and Remote are the caller's numbers for the regions: small, dense, and the same for the same region.
	Local, Remote uint32
	// LocalOffset and RemoteOffset are bytes from the start of the region; Length is in bytes.
	LocalOffset, RemoteOffset, Length uint64
}

// Group is one transfer: segments between one local and one remote region. A pair of regions whose segments
// exceed the limits has several groups.
type Group struct {
	Local, Remote uint32
	First, Count  int    // its segments are Plan.Segments[First : First+Count]
	Bytes         uint64 // sum of their lengths
}

// Plan is what Planner.Plan returns. It belongs to its planner, and is valid until the planner's next call.
type Plan struct {
	Op       backend.Op
	Runs     int // how many runs were planned
	Groups   []Group
	Segments []backend.Segment

	// The keys of segment i are keys[firstKey[i]:firstKey[i+1]]; those of the last one reach to the end.
	keys     []uint32
	firstKey []uint32
}

// Keys returns the keys (Run.Key) of the values whose bytes lie in Plan.Segments[segment], in the order of those
// bytes. The slice is never empty; it belongs to the plan. A key stands in it once for each unbroken stretch of
// its bytes, so more than once where values are interleaved, and in several segments where a value is cut or
// scattered.
func (pl *Plan) Keys(segment int) []uint32 {
	end := len(pl.keys)
	if segment+1 < len(pl.firstKey) {
		end = int(pl.firstKey[segment+1])
	}
	return pl.keys[pl.firstKey[segment]:end:end]
}

// reset empties the plan and keeps its memory.
func (pl *Plan) reset(op backend.Op, runs int) {
	pl.Op, pl.Runs = op, runs
	pl.Groups, pl.Segments = pl.Groups[:0], pl.Segments[:0]
	pl.keys, pl.firstKey = pl.keys[:0], pl.firstKey[:0]
}

// startSegment appends a segment that carries bytes of key, and returns it for the caller to fill.
func (pl *Plan) startSegment(key uint32) *backend.Segment {
	pl.firstKey = append(pl.firstKey, uint32(len(pl.keys)))
	pl.keys = append(pl.keys, key)
	return extend(&pl.Segments)
}

// extend makes s longer by one element, and returns it for the caller to fill. Appending a struct of several
// fields is slower by far: it is written on the stack field by field and read back in wider words, for which the
// processor has to wait until the fields have reached the cache.
func extend[T any](s *[]T) *T {
	n := len(*s)
	if n == cap(*s) {
		*s = slices.Grow(*s, 1)
	}
	*s = (*s)[:n+1]
	return &(*s)[n]
}
