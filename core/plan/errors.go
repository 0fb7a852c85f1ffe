package plan

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// RunError says that a run cannot be planned: it is empty, or it ends beyond what 64 bits can say. It is a
// backend.BadRequest.
type RunError struct {
	Index int // in the runs of the batch
	Run   Run
}

// newRunError blames runs[i], for which valid is false.
func newRunError(runs []Run, i int) error { return &RunError{Index: i, Run: runs[i]} }

// Error names the run, its key, and the range at fault.
func (e *RunError) Error() string {
	r := &e.Run
	where := fmt.Sprintf("run %d of key %d (local region %d offset %d, remote region %d offset %d, length %d)",
		e.Index, r.Key, r.Local, r.LocalOffset, r.Remote, r.RemoteOffset, r.Length)
	switch {
	case r.Length == 0:
		return where + ": it is empty: leave such runs out"
	case r.LocalOffset+r.Length < r.LocalOffset:
		return where + ": the local range ends beyond 64 bits"
	}
	return where + ": the remote range ends beyond 64 bits"
}

// Unwrap returns backend.ErrBadRequest.
func (e *RunError) Unwrap() error { return backend.ErrBadRequest }

// Culprit is one of the two runs that overlap.
type Culprit struct {
	Index int    // in the runs of the batch
	Key   uint32 // as in Run.Key
}

// OverlapError says that two runs of a batch write the same bytes. It is a backend.BadRequest.
type OverlapError struct {
	Op backend.Op
	// First and Second are in the order of the batch. Their keys may be the same.
	First, Second Culprit
	// Region is the number of the region that both write: a remote one for a Write, a local one for a Read.
	Region uint32
	// Offset and Length are the range that both write.
	Offset, Length uint64
}

// Error names both runs, their keys, and the range that they share.
func (e *OverlapError) Error() string {
	do := "write to remote"
	if e.Op == backend.Read {
		do = "read into local"
	}
	return fmt.Sprintf("run %d of key %d and run %d of key %d both %s region %d, range [%d, +%d)",
		e.First.Index, e.First.Key, e.Second.Index, e.Second.Key, do, e.Region, e.Offset, e.Length)
}

// Unwrap returns backend.ErrBadRequest.
func (e *OverlapError) Unwrap() error { return backend.ErrBadRequest }

// findOverlap names two runs that overlap; the caller knows that there are some. It need not be quick: a batch
// that gets here is refused.
func findOverlap(op backend.Op, runs []Run) *OverlapError {
	order := make([]int, len(runs))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		regionA, offsetA := runs[a].destination(op)
		regionB, offsetB := runs[b].destination(op)
		return cmp.Or(cmp.Compare(regionA, regionB), cmp.Compare(offsetA, offsetB), cmp.Compare(a, b))
	})
	k := 1
	for ; ; k++ {
		regionA, offsetA := runs[order[k-1]].destination(op)
		regionB, offsetB := runs[order[k]].destination(op)
		if regionA == regionB && offsetB-offsetA < runs[order[k-1]].Length {
			break
		}
	}
	a, b := &runs[order[k-1]], &runs[order[k]]
	region, start := b.destination(op)
	_, startA := a.destination(op)
	first, second := min(order[k-1], order[k]), max(order[k-1], order[k])
	return &OverlapError{
		Op:     op,
		First:  Culprit{first, runs[first].Key},
		Second: Culprit{second, runs[second].Key},
		Region: region,
		Offset: start,
		Length: min(startA+a.Length, start+b.Length) - start,
	}
}
