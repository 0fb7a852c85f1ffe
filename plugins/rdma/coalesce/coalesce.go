// Package coalesce turns the segments of a transfer into the fewest work requests that the devices allow. It is pure:
// offsets in, offsets out.
//
// A work request (WR) names one contiguous remote range and a list of local ranges (SGEs). So the bytes that follow each
// other in the remote region share a WR, and those of them that follow each other in the local region as well share an
// SGE:
//
//	local region      ┌──A──┬──B──┐     ┌──C──┐           ┌──D──┐
//	                  └─────┴─────┘     └─────┘           └─────┘
//	                      SGE 0          SGE 1             SGE 2
//	                      └──────┬────────┘                  │
//	                           WR 0                        WR 1
//	                  ┌──────────┴──────┐                 ┌──┴──┐
//	remote region     │  A  ╷  B  ╷  C  │                 │  D  │
//	                  └─────┴─────┴─────┘                 └─────┘
//
// A WR ends where the remote bytes do not go on, at an edge between two remote memory regions (MRs), and before it would
// have more bytes or more SGEs than allowed. An SGE ends where its WR ends, where the local bytes do not go on, and at
// an edge between two local MRs. Both may end anywhere, in the middle of a segment too: what is legal byte by byte is
// never refused.
//
// # Why there are no fewer
//
// See the bytes of the transfer as one sequence: those of the first segment, then those of the second, and so on. Call an
// interval of it feasible when one WR can carry it. Feasibility is hereditary: any interval within a feasible one is
// feasible, since it is contiguous where the whole is, crosses no edge that the whole does not cross, has no more bytes,
// and needs no more SGEs. Cut opens each WR where the last one ended and takes all the bytes it can.
//
// Let any other plan cut the same sequence into feasible intervals, and let its i-th end at byte e(i), and Cut's at g(i).
// Then g(i) ≥ e(i) for every i. It is so for the first, since Cut takes all it can. If g(i) ≥ e(i), and e(i+1) > g(i),
// then the bytes from g(i) to e(i+1) lie within the other plan's interval from e(i) to e(i+1), so they are feasible, and
// Cut's next WR reaches e(i+1) at least. So Cut is at the end no later than any other plan, with no more WRs. The same
// argument, within one WR, says that it has the fewest SGEs that its bytes can have.
//
// No plan at all has fewer WRs for a write, nor for a read whose remote ranges do not overlap: the bytes of a WR are
// contiguous in the remote region, and the segments are sorted, so they are an interval of the sequence. Where remote
// ranges of a read overlap, a plan that changes the order of the bytes may have fewer.
package coalesce

import (
	"math"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// MaxBytes is the most bytes in one WR, whatever Limits says: no device has a larger max_msg_sz.
const MaxBytes = 1 << 31

// Limits is what the work requests of one transfer must keep to: the strictest of all the ways that they may go.
type Limits struct {
	SGEs  int    // SGEs in one WR; less than 1 is 1. It is max_sge for a write and max_sge_rd for a read.
	Bytes uint64 // in one WR; 0, and what is above MaxBytes, is MaxBytes
	// LocalPart and RemotePart say where the MRs of the two regions end: at every multiple of so many bytes from the
	// start of the region. With 0 the region is one MR.
	LocalPart, RemotePart uint64
}

// WR is a work request. It has parts of the segments from First to Last, and all of those between.
type WR struct {
	Remote      uint64 // offset in the remote region
	Bytes       uint32 // the sum of the lengths of its SGEs, never 0
	FirstSGE    uint32 // index in Plan.SGEs
	SGEs        uint32 // how many, at least 1
	First, Last uint32 // indexes of the first and the last segment that it has bytes of
}

// SGE is one contiguous local range.
type SGE struct {
	Local  uint64 // offset in the local region
	Length uint32 // never 0
}

// Plan is a list of work requests in the order of the segments, with their SGEs. The zero Plan is ready for use; one that
// is used again allocates nothing once it has grown large enough.
type Plan struct {
	WRs  []WR
	SGEs []SGE
}

// Cut replaces the plan by one for segments. They are sorted by Remote, their lengths are not zero, and their ranges lie
// within regions of less than 2⁶⁴ bytes: the caller has checked that.
func (p *Plan) Cut(segments []backend.Segment, limits Limits) {
	p.WRs, p.SGEs = p.WRs[:0], p.SGEs[:0]
	maxBytes, maxSGEs := limits.Bytes, uint32(min(max(limits.SGEs, 1), math.MaxInt32))
	if maxBytes == 0 || maxBytes > MaxBytes {
		maxBytes = MaxBytes
	}
	local, remote := newParts(limits.LocalPart), newParts(limits.RemotePart)

	// The WR and the SGE that are open, where they go on if they do, and how many bytes they have room for.
	var wr *WR
	var sge *SGE
	var wrEnd, wrRoom, sgeEnd, sgeRoom uint64
	for i := range segments {
		s := segments[i]
		for { // once for each piece of s
			if wrRoom == 0 || s.Remote != wrEnd || wr.SGEs == maxSGEs && (sgeRoom == 0 || s.Local != sgeEnd) {
				p.WRs = append(p.WRs, WR{}) // filled in below: a literal would be made on the stack and copied
				wr = &p.WRs[len(p.WRs)-1]
				wr.Remote, wr.FirstSGE, wr.First = s.Remote, uint32(len(p.SGEs)), uint32(i)
				wrEnd, wrRoom = s.Remote, min(maxBytes, remote.room(s.Remote))
				sgeRoom = 0
			}
			if sgeRoom == 0 || s.Local != sgeEnd {
				p.SGEs = append(p.SGEs, SGE{Local: s.Local})
				sge = &p.SGEs[len(p.SGEs)-1]
				sgeEnd, sgeRoom = s.Local, local.room(s.Local)
				wr.SGEs = uint32(len(p.SGEs)) - wr.FirstSGE
			}
			n := min(s.Length, wrRoom, sgeRoom)
			wrEnd, wrRoom = wrEnd+n, wrRoom-n
			sgeEnd, sgeRoom = sgeEnd+n, sgeRoom-n
			wr.Bytes, wr.Last = uint32(wrEnd-wr.Remote), uint32(i)
			sge.Length = uint32(sgeEnd - sge.Local)
			if n == s.Length {
				break
			}
			s.Local, s.Remote, s.Length = s.Local+n, s.Remote+n, s.Length-n
		}
	}
}

// parts is a region that consists of MRs of the same size. It remembers the one asked for last: to find another takes a
// division.
type parts struct {
	size, start uint64
}

func newParts(size uint64) parts {
	if size == 0 {
		size = math.MaxUint64
	}
	return parts{size: size}
}

// room returns how many bytes there are from offset to the end of its MR.
func (p *parts) room(offset uint64) uint64 {
	if offset-p.start >= p.size {
		p.start = offset - offset%p.size
	}
	return p.size - (offset - p.start)
}
