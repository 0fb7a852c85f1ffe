// Package plan turns the runs of a batch into the transfers that carry them.
//
// A value lies in runs of pages; a batch of values is a list of runs, each between one local and one remote
// region. The planner groups them by (local, remote), sorts each group by remote offset, merges neighbours that
// touch on both sides, and cuts what exceeds the limits of the backends. It is pure: no I/O, no clock, no locks.
package plan

import "github.com/umbp/umbp/plugin-sdk/backend"

// Run is one contiguous piece of one value: a page, or many.
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
	Groups   []Group
	Segments []backend.Segment
}
