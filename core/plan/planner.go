package plan

import (
	"math"
	"math/bits"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// maxSegment is the longest segment. Its length fits the 32 bits that wire formats and devices have for it, and is a
// multiple of every usual page size, up to 2 MiB, so that a cut there splits no page.
const maxSegment = 1<<32 - 1<<21

// Planner makes plans and keeps its memory from one to the next: once it has seen batches as large as they come,
// planning allocates nothing. The zero value is ready. A planner is not for concurrent use.
type Planner struct {
	plan   Plan
	starts []uint32 // index of the first run of each span, and the number of runs
	places []place
	sorter sorter
}

// Plan plans a batch. It neither changes nor keeps runs, of which there are fewer than 2³². The plan does not depend
// on the order of runs, except that a Read from equal remote offsets keeps theirs.
//
// Within a pair of regions, a group is filled before the next one begins: up to limits.Segments, and up to
// limits.TransferBytes, for which a segment is cut if need be. A limit of zero is none, but no segment is longer
// than 32 bits can say. Where a Read cuts runs that share remote bytes, a group ends early rather than lose its order.
//
// Errors satisfy errors.Is(err, backend.ErrBadRequest). A run that is empty or that ends beyond 2⁶⁴-1 is refused
// with a *RunError. Runs that would write the same byte, which is a byte of a remote region for a Write and of a
// local region for a Read, are refused with an *OverlapError, whatever groups they belong to. A Read may read a
// remote byte more than once. That runs lie inside their regions is for the caller to check first: the planner
// does not know how large these are.
func (p *Planner) Plan(op backend.Op, runs []Run, limits backend.Limits) (*Plan, error) {
	if op != backend.Write && op != backend.Read {
		return nil, backend.Errorf(backend.BadRequest, "plan a batch: %s is neither write nor read", op)
	}
	sorted, disjoint, err := p.join(op, runs)
	if err != nil {
		return nil, err
	}
	var order []uint32
	if !sorted {
		order = p.order(runs)
	}
	p.plan.reset(op, len(runs))
	p.merge(runs, order, limits)
	if !disjoint && p.overlap() {
		return nil, findOverlap(op, runs)
	}
	return &p.plan, nil
}

// join fills p.starts: runs of one value that continue each other, in the caller's order, become one span. It
// reports whether the spans are sorted as merge wants them, and whether their destinations rise strictly, which
// proves that no two overlap.
func (p *Planner) join(op backend.Op, runs []Run) (sorted, disjoint bool, err error) {
	sorted, disjoint = true, true
	starts := p.starts[:0]
	last := &Run{}             // the span before this one,
	var lastRegion uint32      // the region to which its bytes go,
	var lastDestination uint64 // and where in it they end
	for i := 0; i < len(runs); {
		first := &runs[i]
		if !first.valid() {
			return false, false, newRunError(runs, i)
		}
		starts = append(starts, uint32(i))
		localEnd, remoteEnd := first.LocalOffset+first.Length, first.RemoteOffset+first.Length
		for i++; i < len(runs); i++ {
			r := &runs[i]
			if r.RemoteOffset != remoteEnd || r.LocalOffset != localEnd ||
				r.Key != first.Key || r.Local != first.Local || r.Remote != first.Remote {
				break
			}
			if !r.valid() {
				return false, false, newRunError(runs, i)
			}
			localEnd += r.Length
			remoteEnd += r.Length
		}
		sorted = sorted && (last.Local < first.Local || last.Local == first.Local &&
			(last.Remote < first.Remote || last.Remote == first.Remote && last.RemoteOffset <= first.RemoteOffset))
		region, destination := first.destination(op)
		disjoint = disjoint && (lastRegion < region || lastRegion == region && lastDestination <= destination)
		last, lastRegion, lastDestination = first, region, remoteEnd
		if op == backend.Read {
			lastDestination = localEnd
		}
	}
	p.starts = append(starts, uint32(len(runs)))
	return sorted, disjoint, nil
}

// order returns the numbers of the spans, sorted by local region, remote region, and remote offset.
func (p *Planner) order(runs []Run) []uint32 {
	spans := p.starts[:len(p.starts)-1]
	var remotes uint32
	for _, start := range spans {
		remotes |= runs[start].Remote
	}
	remoteBits := bits.Len32(remotes)
	p.places = p.places[:0]
	for _, start := range spans {
		r := &runs[start]
		p.places = append(p.places, place{uint64(r.Local)<<remoteBits | uint64(r.Remote), r.RemoteOffset})
	}
	return p.sorter.sort(p.places)
}

// merge fills the plan with the spans, in the order given; nil is the order they have.
func (p *Planner) merge(runs []Run, order []uint32, limits backend.Limits) {
	limits = limits.Tighten(backend.Limits{
		Segments: math.MaxInt, SegmentBytes: maxSegment, TransferBytes: math.MaxUint64,
	})
	pl := &p.plan
	group, segment := &Group{}, &backend.Segment{}
	var localEnd, remoteEnd uint64 // of the segment
	var room uint64                // what the segment can still take
	for k := range len(p.starts) - 1 {
		i := k
		if order != nil {
			i = int(order[k])
		}
		first, last := &runs[p.starts[i]], &runs[p.starts[i+1]-1]
		local, remote := first.LocalOffset, first.RemoteOffset
		for left := last.RemoteOffset + last.Length - remote; ; {
			newPair := len(pl.Groups) == 0 || first.Remote != group.Remote || first.Local != group.Local
			if newPair || room == 0 || remote != remoteEnd || local != localEnd {
				// Offsets go back only where a Read cuts runs that share remote bytes.
				back := remote < segment.Remote
				if newPair || back || group.Count >= limits.Segments || group.Bytes == limits.TransferBytes {
					group = extend(&pl.Groups)
					*group = Group{Local: first.Local, Remote: first.Remote, First: len(pl.Segments)}
				}
				group.Count++
				segment = pl.startSegment(first.Key)
				segment.Local, segment.Remote, segment.Length = local, remote, 0
				localEnd, remoteEnd = local, remote
				room = min(limits.SegmentBytes, limits.TransferBytes-group.Bytes)
			} else if pl.keys[len(pl.keys)-1] != first.Key {
				pl.keys = append(pl.keys, first.Key)
			}
			n := min(left, room)
			segment.Length += n
			group.Bytes += n
			localEnd += n
			remoteEnd += n
			room -= n
			if left -= n; left == 0 {
				break
			}
			local += n
			remote += n
		}
	}
}

// overlap reports whether two segments of the plan write the same byte. Only bytes that continue each other are
// merged, so two segments overlap if and only if two runs do.
func (p *Planner) overlap() bool {
	pl := &p.plan
	p.places = p.places[:0]
	rising := true
	var last place
	var end uint64
	for _, g := range pl.Groups {
		for _, s := range pl.Segments[g.First : g.First+g.Count] {
			next := place{uint64(g.Remote), s.Remote}
			if pl.Op == backend.Read {
				next = place{uint64(g.Local), s.Local}
			}
			rising = rising && (last.region < next.region || last.region == next.region && end <= next.offset)
			p.places = append(p.places, next)
			last, end = next, next.offset+s.Length
		}
	}
	if rising {
		return false
	}
	order := p.sorter.sort(p.places)
	for k := 1; k < len(order); k++ {
		a, b := order[k-1], order[k]
		if p.places[a].region == p.places[b].region &&
			p.places[b].offset-p.places[a].offset < pl.Segments[a].Length {
			return true
		}
	}
	return false
}

// PerPage plans a batch without grouping: each page, counted from the start of its run, becomes a group of one
// segment, in the caller's order. It is what a client does that hands its engine one element a page, made as
// quick as it can be, and exists to be measured against Plan. It refuses what Plan refuses, except that it does
// not look for overlaps: that would take the sorting that this way of planning goes without.
func (p *Planner) PerPage(op backend.Op, runs []Run, pageBytes uint64) (*Plan, error) {
	if op != backend.Write && op != backend.Read {
		return nil, backend.Errorf(backend.BadRequest, "plan pages: %s is neither write nor read", op)
	}
	if pageBytes == 0 || pageBytes > maxSegment {
		return nil, backend.Errorf(backend.BadRequest,
			"plan pages: a page of %d bytes: choose a size from 1 to %d", pageBytes, uint64(maxSegment))
	}
	pl := &p.plan
	pl.reset(op, len(runs))
	for i := range runs {
		r := &runs[i]
		if !r.valid() {
			return nil, newRunError(runs, i)
		}
		for at := uint64(0); at < r.Length; {
			n := min(pageBytes, r.Length-at)
			g := extend(&pl.Groups)
			g.Local, g.Remote, g.First, g.Count, g.Bytes = r.Local, r.Remote, len(pl.Segments), 1, n
			s := pl.startSegment(r.Key)
			s.Local, s.Remote, s.Length = r.LocalOffset+at, r.RemoteOffset+at, n
			at += n
		}
	}
	return pl, nil
}

// valid reports whether the run is not empty and both its ends can be said in 64 bits.
func (r *Run) valid() bool {
	// One comparison for three: a length of zero wraps round to the largest number.
	return r.Length-1 < math.MaxUint64-max(r.LocalOffset, r.RemoteOffset)
}

// destination returns where the bytes go: the region, and the offset in it.
func (r *Run) destination(op backend.Op) (region uint32, offset uint64) {
	if op == backend.Read {
		return r.Local, r.LocalOffset
	}
	return r.Remote, r.RemoteOffset
}
