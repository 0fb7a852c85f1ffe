package coalesce

import (
	"fmt"
	"slices"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// spot is where one byte of a transfer lies at either end, and the segment that it belongs to.
type spot struct {
	local, remote uint64
	segment       uint32
}

// spots lists the bytes of segments, in their order.
func spots(segments []backend.Segment) []spot {
	var all []spot
	for i, s := range segments {
		for n := range s.Length {
			all = append(all, spot{s.Local + n, s.Remote + n, uint32(i)})
		}
	}
	return all
}

func part(offset, size uint64) uint64 {
	if size == 0 {
		return 0
	}
	return offset / size
}

// ranges returns how many SGEs the bytes need at least.
func ranges(bytes []spot, limits Limits) int {
	n := 0
	for i, b := range bytes {
		if i == 0 || b.local != bytes[i-1].local+1 || part(b.local, limits.LocalPart) != part(b.local-1, limits.LocalPart) {
			n++
		}
	}
	return n
}

// feasible says whether one WR may carry the bytes, in that order, by the words of the package's comment.
func feasible(bytes []spot, limits Limits) bool {
	for i, b := range bytes {
		if i > 0 && b.remote != bytes[i-1].remote+1 {
			return false
		}
		if part(b.remote, limits.RemotePart) != part(bytes[0].remote, limits.RemotePart) {
			return false
		}
	}
	return (limits.Bytes == 0 || uint64(len(bytes)) <= limits.Bytes) && ranges(bytes, limits) <= max(limits.SGEs, 1)
}

// fewest returns the least number of feasible intervals that the bytes can be cut into. It tries every interval, and
// relies on nothing that the package's comment argues.
func fewest(bytes []spot, limits Limits) int {
	best := make([]int, len(bytes)+1) // best[end] is for bytes[:end]
	for end := 1; end <= len(bytes); end++ {
		best[end] = end
		for start := range end {
			if best[start]+1 < best[end] && feasible(bytes[start:end], limits) {
				best[end] = best[start] + 1
			}
		}
	}
	return best[len(bytes)]
}

// fewestSets returns the least number of sets that the bytes can be dealt into so that one WR may carry each: also sets
// that are no intervals, in any order of their bytes. It tries all of them, so ten bytes are many.
func fewestSets(bytes []spot, limits Limits) int {
	best := len(bytes)
	var sets [][]spot
	var deal func(left []spot)
	deal = func(left []spot) {
		if len(left) == 0 {
			if !slices.ContainsFunc(sets, func(set []spot) bool { return !feasible(set, limits) }) {
				best = min(best, len(sets))
			}
			return
		}
		for i := range sets {
			kept := sets[i]
			sets[i] = append(slices.Clone(kept), left[0])
			slices.SortStableFunc(sets[i], func(a, b spot) int { return int(int64(a.remote - b.remote)) })
			deal(left[1:])
			sets[i] = kept
		}
		sets = append(sets, left[:1])
		deal(left[1:])
		sets = sets[:len(sets)-1]
	}
	deal(bytes)
	return best
}

// check compares a plan with the segments byte by byte: each is carried once, in order, within the limits, by as few WRs
// and SGEs as can be.
func check(p *Plan, segments []backend.Segment, limits Limits) error {
	want := spots(segments)
	var got []spot
	nextSGE := uint32(0)
	for i, wr := range p.WRs {
		if wr.FirstSGE != nextSGE || wr.SGEs == 0 {
			return fmt.Errorf("WR %d has %d SGEs from %d, not some from %d", i, wr.SGEs, wr.FirstSGE, nextSGE)
		}
		nextSGE += wr.SGEs
		if int(nextSGE) > len(p.SGEs) {
			return fmt.Errorf("WR %d ends at SGE %d of %d", i, nextSGE, len(p.SGEs))
		}
		var carried []spot
		for _, sge := range p.SGEs[wr.FirstSGE:nextSGE] {
			if sge.Length == 0 {
				return fmt.Errorf("WR %d has an empty SGE", i)
			}
			if part(sge.Local, limits.LocalPart) != part(sge.Local+uint64(sge.Length)-1, limits.LocalPart) {
				return fmt.Errorf("WR %d: the SGE of %d bytes at %d crosses an edge", i, sge.Length, sge.Local)
			}
			for n := range uint64(sge.Length) {
				carried = append(carried, spot{local: sge.Local + n, remote: wr.Remote + uint64(len(carried))})
			}
		}
		if len(carried) != int(wr.Bytes) {
			return fmt.Errorf("WR %d says %d bytes, and its SGEs %d", i, wr.Bytes, len(carried))
		}
		if !feasible(carried, limits) {
			return fmt.Errorf("WR %d breaks the limits: %+v", i, wr)
		}
		if n := ranges(carried, limits); n != int(wr.SGEs) {
			return fmt.Errorf("WR %d has %d SGEs where %d are enough", i, wr.SGEs, n)
		}
		if end := len(got) + len(carried); end > len(want) {
			return fmt.Errorf("WR %d: byte %d of %d", i, end, len(want))
		}
		if first, last := want[len(got)].segment, want[len(got)+len(carried)-1].segment; wr.First != first || wr.Last != last {
			return fmt.Errorf("WR %d has bytes of segments %d to %d, and says %d to %d", i, first, last, wr.First, wr.Last)
		}
		for n := range carried {
			carried[n].segment = want[len(got)+n].segment
		}
		got = append(got, carried...)
	}
	if int(nextSGE) != len(p.SGEs) {
		return fmt.Errorf("%d SGEs, of which WRs have %d", len(p.SGEs), nextSGE)
	}
	if !slices.Equal(got, want) {
		return fmt.Errorf("carries\n%v\nand not\n%v", got, want)
	}
	if n := fewest(want, limits); n != len(p.WRs) {
		return fmt.Errorf("%d WRs where %d are enough", len(p.WRs), n)
	}
	return nil
}
