package plan

import (
	"errors"
	"math"
	"slices"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"pgregory.net/rapid"
)

// byteAt names one byte of one region.
type byteAt struct {
	region uint32
	offset uint64
}

// origin is where a destination byte comes from, and for which key.
type origin struct {
	source byteAt
	key    uint32
}

// ends returns the destination and the source of byte i of a run.
func ends(op backend.Op, r Run, i uint64) (destination, source byteAt) {
	local, remote := byteAt{r.Local, r.LocalOffset + i}, byteAt{r.Remote, r.RemoteOffset + i}
	if op == backend.Read {
		return local, remote
	}
	return remote, local
}

// failer is what rapid.T and testing.T share.
type failer interface {
	Helper()
	Fatalf(format string, args ...any)
}

// checkPlan plans a batch of valid runs and compares the plan, byte by byte, with copying the runs one by one.
func checkPlan(t failer, p *Planner, op backend.Op, runs []Run, limits backend.Limits) {
	t.Helper()
	want := make(map[byteAt]origin)
	overlap := false
	for _, r := range runs {
		for i := range r.Length {
			destination, source := ends(op, r, i)
			if _, ok := want[destination]; ok {
				overlap = true
			}
			want[destination] = origin{source, r.Key}
		}
	}
	before := slices.Clone(runs)
	pl, err := p.Plan(op, runs, limits)
	if !slices.Equal(before, runs) {
		t.Fatalf("Plan changed its input")
	}
	if overlap {
		checkOverlap(t, op, runs, err)
		return
	}
	if err != nil {
		t.Fatalf("Plan: %v; no two runs overlap", err)
	}
	if pl.Op != op || pl.Runs != len(runs) {
		t.Fatalf("the plan is a %s of %d runs, want a %s of %d", pl.Op, pl.Runs, op, len(runs))
	}
	checkShape(t, pl, limits)
	for _, g := range pl.Groups {
		for i := g.First; i < g.First+g.Count; i++ {
			s := pl.Segments[i]
			var keys []uint32
			for b := range s.Length {
				destination, source := ends(op, Run{
					Local: g.Local, Remote: g.Remote, LocalOffset: s.Local, RemoteOffset: s.Remote,
				}, b)
				w, ok := want[destination]
				if !ok {
					t.Fatalf("segment %d writes %v, which is not in the batch or has been written already", i, destination)
				}
				if w.source != source {
					t.Fatalf("segment %d writes %v from %v, want from %v", i, destination, source, w.source)
				}
				delete(want, destination)
				if len(keys) == 0 || keys[len(keys)-1] != w.key {
					keys = append(keys, w.key)
				}
			}
			if got := pl.Keys(i); !slices.Equal(got, keys) {
				t.Fatalf("Keys(%d) = %v, want %v", i, got, keys)
			}
		}
	}
	if len(want) > 0 {
		t.Fatalf("%d bytes are in no segment", len(want))
	}
}

// checkOverlap checks that err names two runs that overlap, and the range that they share.
func checkOverlap(t failer, op backend.Op, runs []Run, err error) {
	t.Helper()
	var e *OverlapError
	if !errors.As(err, &e) || !errors.Is(err, backend.ErrBadRequest) {
		t.Fatalf("Plan: %v, want an *OverlapError that is a bad request", err)
	}
	if e.First.Index >= e.Second.Index {
		t.Fatalf("%v: the culprits are not in the order of the batch", e)
	}
	first, second := runs[e.First.Index], runs[e.Second.Index]
	region, a := first.destination(op)
	other, b := second.destination(op)
	start, end := max(a, b), min(a+first.Length, b+second.Length)
	if region != other || start >= end {
		t.Fatalf("%v: these runs do not overlap", e)
	}
	want := OverlapError{
		Op: op, Region: region, Offset: start, Length: end - start,
		First: Culprit{e.First.Index, first.Key}, Second: Culprit{e.Second.Index, second.Key},
	}
	if *e != want {
		t.Fatalf("overlap %+v, want %+v", *e, want)
	}
}

// checkShape checks what can be said of a plan without knowing its runs.
func checkShape(t failer, pl *Plan, limits backend.Limits) {
	t.Helper()
	longest := min(orNone(limits.SegmentBytes), maxSegment)
	next := 0
	for i, g := range pl.Groups {
		if g.First != next || g.Count < 1 {
			t.Fatalf("group %d has segments %d+%d, want them from %d on", i, g.First, g.Count, next)
		}
		next += g.Count
		segments := pl.Segments[g.First:next]
		var bytes uint64
		for j, s := range segments {
			bytes += s.Length
			if s.Length == 0 || s.Length > longest {
				t.Fatalf("group %d: segment %v, want 1 to %d bytes", i, s, longest)
			}
			if j == 0 {
				continue
			}
			last := segments[j-1]
			if last.Remote > s.Remote {
				t.Fatalf("group %d: segment %v comes before %v", i, last, s)
			}
			if touch(last, s) && last.Length != longest {
				t.Fatalf("group %d: segments %v and %v could be merged more", i, last, s)
			}
		}
		if bytes != g.Bytes || bytes > orNone(limits.TransferBytes) || limits.Segments > 0 && g.Count > limits.Segments {
			t.Fatalf("group %d: %+v of %d bytes exceeds %+v or is miscounted", i, g, bytes, limits)
		}
		if i == 0 {
			continue
		}
		last := pl.Groups[i-1]
		switch {
		case last.Local != g.Local || last.Remote != g.Remote:
			if last.Local > g.Local || last.Local == g.Local && last.Remote > g.Remote {
				t.Fatalf("group %+v comes before %+v", last, g)
			}
		case last.Count == limits.Segments || last.Bytes == limits.TransferBytes:
		case pl.Op == backend.Read && pl.Segments[g.First-1].Remote > pl.Segments[g.First].Remote:
		default:
			t.Fatalf("group %+v follows %+v, which has room left", g, last)
		}
	}
	if next != len(pl.Segments) {
		t.Fatalf("%d segments belong to groups, want %d", next, len(pl.Segments))
	}
}

// orNone is the limit n, where zero is none.
func orNone(n uint64) uint64 {
	if n == 0 {
		return math.MaxUint64
	}
	return n
}

func touch(a, b backend.Segment) bool {
	return a.Local+a.Length == b.Local && a.Remote+a.Length == b.Remote
}

// regionNumbers are dense, as they should be, and then some that make sort keys too wide to be packed.
var regionNumbers = []uint32{0, 1, 2, 5, 1 << 20, math.MaxUint32}

// offsetBases are where regions begin to be used: at their start, at a page, and so that they end with 64 bits.
var offsetBases = []uint64{0, 1 << 36, math.MaxUint64 - 4096}

func drawOp() *rapid.Generator[backend.Op] {
	return rapid.SampledFrom([]backend.Op{backend.Write, backend.Read})
}

func drawLimits() *rapid.Generator[backend.Limits] {
	return rapid.Custom(func(t *rapid.T) backend.Limits {
		return backend.Limits{
			Segments:      rapid.IntRange(0, 5).Draw(t, "segments"),
			SegmentBytes:  rapid.Uint64Range(0, 20).Draw(t, "segment bytes"),
			TransferBytes: rapid.Uint64Range(0, 50).Draw(t, "transfer bytes"),
		}
	})
}

// drawRuns draws runs that like to continue one another, in order or not. Their destinations do not overlap, unless
// one of them is moved at the end.
func drawRuns(op backend.Op) *rapid.Generator[[]Run] {
	return rapid.Custom(func(t *rapid.T) []Run {
		regions := rapid.SampledFrom(regionNumbers[:rapid.SampledFrom([]int{1, 2, 6}).Draw(t, "regions")])
		base := rapid.SampledFrom(offsetBases).Draw(t, "base")
		free := make(map[uint32]uint64) // the next free offset of each destination region
		var key uint32
		var from, to byteAt // where the next run goes if it continues this one

		runs := make([]Run, rapid.SampledFrom([]int{0, 1, 6, 30, 120}).Draw(t, "runs"))
		for i := range runs {
			length := rapid.Uint64Range(1, 9).Draw(t, "length")
			switch rapid.IntRange(0, 5).Draw(t, "step") {
			case 0: // another place at both ends
				from = byteAt{regions.Draw(t, "from"), rapid.Uint64Range(0, 200).Draw(t, "source offset")}
				to.region = regions.Draw(t, "to")
				to.offset = free[to.region]
			case 1: // a hole in the destination
				to.offset++
			case 2: // another value
				key++
			}
			local, remote := from, to
			if op == backend.Read {
				local, remote = to, from
			}
			runs[i] = Run{
				Key: key, Local: local.region, Remote: remote.region, Length: length,
				LocalOffset: base + local.offset, RemoteOffset: base + remote.offset,
			}
			from.offset += length
			to.offset += length
			free[to.region] = to.offset
		}
		switch rapid.IntRange(0, 3).Draw(t, "order") {
		case 0:
			slices.Reverse(runs)
		case 1:
			runs = rapid.Permutation(runs).Draw(t, "permutation")
		}
		if len(runs) > 1 && rapid.IntRange(0, 2).Draw(t, "move") == 0 {
			culprit := &runs[rapid.IntRange(0, len(runs)-1).Draw(t, "culprit")]
			victim := runs[rapid.IntRange(0, len(runs)-1).Draw(t, "victim")]
			within := rapid.Uint64Range(0, victim.Length).Draw(t, "within")
			if op == backend.Read {
				culprit.Local, culprit.LocalOffset = victim.Local, victim.LocalOffset+within
			} else {
				culprit.Remote, culprit.RemoteOffset = victim.Remote, victim.RemoteOffset+within
			}
		}
		return runs
	})
}
