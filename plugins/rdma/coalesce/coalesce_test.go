package coalesce

import (
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"pgregory.net/rapid"
)

var update = flag.Bool("update", false, "write the golden files in testdata anew")

// drawSegments draws segments that are sorted by Remote and whose local ranges may lie anywhere. Each goes on where the
// last one ended more often than not, on either side. Where overlap is allowed, a remote range may also begin before the
// last one ends.
func drawSegments(most int, longest uint64, overlap bool) *rapid.Generator[[]backend.Segment] {
	return rapid.Custom(func(t *rapid.T) []backend.Segment {
		var segments []backend.Segment
		var local, remote, floor uint64
		for range rapid.IntRange(0, most).Draw(t, "segments") {
			switch how := rapid.IntRange(0, 9).Draw(t, "remote"); {
			case how < 6: // goes on
			case how < 8 || !overlap:
				remote += rapid.Uint64Range(1, 5).Draw(t, "gap")
			default:
				remote = rapid.Uint64Range(floor, remote).Draw(t, "back to")
			}
			if rapid.IntRange(0, 9).Draw(t, "local") >= 5 {
				local = rapid.Uint64Range(0, 40).Draw(t, "local offset")
			}
			length := rapid.Uint64Range(1, longest).Draw(t, "length")
			segments = append(segments, backend.Segment{Local: local, Remote: remote, Length: length})
			floor = remote
			local, remote = local+length, remote+length
		}
		return segments
	})
}

// drawLimits draws small limits, and zero for each often enough.
func drawLimits() *rapid.Generator[Limits] {
	return rapid.Custom(func(t *rapid.T) Limits {
		size := func(label string, most uint64) uint64 {
			if rapid.Bool().Draw(t, "no "+label) {
				return 0
			}
			return rapid.Uint64Range(1, most).Draw(t, label)
		}
		return Limits{
			SGEs:       rapid.IntRange(0, 5).Draw(t, "SGEs"),
			Bytes:      size("bytes", 12),
			LocalPart:  size("local part", 9),
			RemotePart: size("remote part", 9),
		}
	})
}

func TestCutIsMinimalAndExact(t *testing.T) {
	var p Plan // used again, as endpoints do
	rapid.Check(t, func(t *rapid.T) {
		segments := drawSegments(10, 7, rapid.Bool().Draw(t, "overlap")).Draw(t, "segments")
		limits := drawLimits().Draw(t, "limits")
		p.Cut(segments, limits)
		if err := check(&p, segments, limits); err != nil {
			t.Fatal(err)
		}
	})
}

// Where remote ranges do not overlap, no plan has fewer WRs, whatever it does with the order of the bytes.
func TestNoPlanHasFewer(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		segments := drawSegments(4, 2, false).Draw(t, "segments")
		limits := drawLimits().Draw(t, "limits")
		var p Plan
		p.Cut(segments, limits)
		if n := fewestSets(spots(segments), limits); n != len(p.WRs) {
			t.Fatalf("%d WRs where %d are enough", len(p.WRs), n)
		}
	})
}

// What holds for bytes holds for units of bytes: a plan for offsets, lengths and limits that are all larger by the same
// factor is larger by that factor, up to lengths and offsets at the limits of their types.
func TestCutScales(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		segments := drawSegments(10, 7, true).Draw(t, "segments")
		limits := drawLimits().Draw(t, "limits")
		if limits.Bytes == 0 {
			limits.Bytes = 8
		}
		// The largest unit lets a WR, and its one SGE perhaps, have MaxBytes exactly.
		unit := rapid.SampledFrom([]uint64{3, 4096, 1 << 20, MaxBytes / limits.Bytes}).Draw(t, "unit")
		var small, large Plan
		small.Cut(segments, limits)
		scaled := limits
		scaled.Bytes *= unit
		scaled.LocalPart *= unit
		scaled.RemotePart *= unit
		if scaled.Bytes == MaxBytes && rapid.Bool().Draw(t, "more than any device") {
			scaled.Bytes = rapid.SampledFrom([]uint64{0, MaxBytes + 1, math.MaxUint32, math.MaxUint64}).Draw(t, "bytes")
		}
		// Far from zero, by whole MRs: up to the last byte that a region can have.
		far := func(part uint64, end func(backend.Segment) uint64, label string) uint64 {
			if part == 0 {
				part = 1
			}
			most := uint64(0)
			for _, s := range segments {
				most = max(most, end(s)*unit)
			}
			return (math.MaxUint64 - most) / part * rapid.Uint64Range(0, 1).Draw(t, label) * part
		}
		local := far(scaled.LocalPart, func(s backend.Segment) uint64 { return s.Local + s.Length }, "far local")
		remote := far(scaled.RemotePart, func(s backend.Segment) uint64 { return s.Remote + s.Length }, "far remote")
		var input []backend.Segment
		for _, s := range segments {
			input = append(input, backend.Segment{Local: local + s.Local*unit, Remote: remote + s.Remote*unit, Length: s.Length * unit})
		}
		large.Cut(input, scaled)

		for i := range small.WRs {
			small.WRs[i].Remote = remote + small.WRs[i].Remote*unit
			small.WRs[i].Bytes *= uint32(unit)
		}
		for i := range small.SGEs {
			small.SGEs[i].Local = local + small.SGEs[i].Local*unit
			small.SGEs[i].Length *= uint32(unit)
		}
		if diff := cmp.Diff(small, large, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("not the same plan %d times as large:\n%s", unit, diff)
		}
	})
}

// A segment larger than any WR, and than any 32-bit number, is cut. No memory stands behind it.
func TestHugeSegment(t *testing.T) {
	const length = 1<<40 + 5
	for _, bytes := range []uint64{0, MaxBytes - 1, MaxBytes, MaxBytes + 1, math.MaxUint32, math.MaxUint64} {
		var p Plan
		p.Cut([]backend.Segment{{Local: math.MaxUint64 - length, Remote: 7, Length: length}}, Limits{SGEs: math.MaxInt, Bytes: bytes})
		if bytes == 0 || bytes > MaxBytes {
			bytes = MaxBytes
		}
		total := uint64(0)
		for i, wr := range p.WRs {
			sge := p.SGEs[i]
			if wr.Remote != 7+total || sge.Local != math.MaxUint64-length+total || wr.Bytes != sge.Length {
				t.Fatalf("WR %d: %+v with %+v after %d bytes", i, wr, sge, total)
			}
			if want := min(bytes, length-total); uint64(wr.Bytes) != want {
				t.Fatalf("WR %d has %d bytes, not %d", i, wr.Bytes, want)
			}
			total += uint64(wr.Bytes)
		}
		if total != length || len(p.SGEs) != len(p.WRs) {
			t.Fatalf("%d bytes of %d, %d WRs with %d SGEs", total, length, len(p.WRs), len(p.SGEs))
		}
	}
}

// Cutting allocates only until the plan has grown to the size that is in use.
func TestCutAllocatesNothing(t *testing.T) {
	for _, c := range cases() {
		var p Plan
		p.Cut(c.segments, c.limits)
		if n := testing.AllocsPerRun(10, func() { p.Cut(c.segments, c.limits) }); n != 0 {
			t.Errorf("%s: %v allocations", c.name, n)
		}
	}
}

// FuzzCut reads limits from the first four bytes and a segment from each three that follow: where the remote range begins
// relative to the last one, where the local one does, and the length.
func FuzzCut(f *testing.F) {
	f.Add([]byte{4, 0, 0, 0, 0, 0, 8, 0, 0, 8, 0, 9, 8})                // contiguous, then contiguous at the target only
	f.Add([]byte{1, 0, 0, 0, 0, 0, 8, 0, 3, 8, 0, 9, 8})                // one SGE a WR
	f.Add([]byte{0, 7, 0, 0, 0, 0, 60})                                 // cut at seven bytes
	f.Add([]byte{2, 0, 8, 8, 3, 5, 60})                                 // MRs on both sides, out of step
	f.Add([]byte{9, 5, 3, 7, 0, 0, 20, 0, 0, 20, 0, 30, 20, 4, 0, 20})  // every limit at once
	f.Add([]byte{3, 0, 0, 0, 0, 0, 10, 0xf0, 40, 10, 0xf5, 20, 10, 10}) // reads that overlap
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) < 4 {
			return
		}
		limits := Limits{
			SGEs: int(int8(data[0])), Bytes: uint64(data[1]), LocalPart: uint64(data[2]), RemotePart: uint64(data[3]),
		}
		var segments []backend.Segment
		var local, remote, floor, total uint64
		for data = data[4:]; len(data) >= 3; data = data[3:] {
			if step := int8(data[0]); step >= 0 {
				remote += uint64(step)
			} else {
				remote = max(floor, remote-min(remote, uint64(-int64(step))))
			}
			if data[1] != 0 {
				local = uint64(data[1])
			}
			length := uint64(data[2])%64 + 1
			if total += length; total > 200 { // the oracle takes its time over every byte
				return
			}
			segments = append(segments, backend.Segment{Local: local, Remote: remote, Length: length})
			floor = remote
			local, remote = local+length, remote+length
		}
		var p Plan
		p.Cut(segments, limits)
		if err := check(&p, segments, limits); err != nil {
			t.Fatalf("%+v of %+v: %v", limits, segments, err)
		}
	})
}

const page = 4096

type testCase struct {
	name     string
	limits   Limits
	segments []backend.Segment
}

// cases are plans worth looking at: the golden files show them.
func cases() []testCase {
	// pages returns segments of one page each, at the given pages of the local region, one after the other in the
	// remote one.
	pages := func(local ...uint64) []backend.Segment {
		var segments []backend.Segment
		for i, l := range local {
			segments = append(segments, backend.Segment{Local: l * page, Remote: uint64(i) * page, Length: page})
		}
		return segments
	}
	apart := pages(0, 1, 2, 3)
	for i := range apart {
		apart[i].Remote *= 2
	}
	return []testCase{
		{"contiguous", Limits{SGEs: 16}, pages(0, 1, 2, 3, 4, 5, 6, 7)},
		{"gathered", Limits{SGEs: 16}, pages(7, 6, 2, 3, 4, 0)},
		{"scattered", Limits{SGEs: 16}, apart},
		{"one-sge", Limits{SGEs: 1}, pages(7, 6, 2, 3, 4, 0)},
		{"sges-used-up", Limits{SGEs: 3}, pages(9, 7, 5, 6, 3, 1, 0)},
		{"cut-within-a-segment", Limits{SGEs: 16, Bytes: 10000}, pages(0, 1, 2, 7, 8)},
		{"one-byte", Limits{SGEs: 16, Bytes: 1}, []backend.Segment{{Local: 9, Remote: 5, Length: 3}}},
		{"local-edges", Limits{SGEs: 16, LocalPart: 2 * page}, pages(1, 2, 3, 4)},
		{"local-edges-one-sge", Limits{SGEs: 1, LocalPart: 2 * page}, pages(1, 2, 3, 4)},
		{"remote-edges", Limits{SGEs: 16, RemotePart: 2 * page}, []backend.Segment{{Local: 64, Remote: page, Length: 4 * page}}},
		{"edges-out-of-step", Limits{SGEs: 2, LocalPart: 3 * page, RemotePart: 4 * page, Bytes: 3 * page},
			[]backend.Segment{{Local: page, Remote: 0, Length: 10 * page}}},
		{"part-then-merge", Limits{SGEs: 2, Bytes: 6000}, []backend.Segment{
			{Local: 0, Remote: 0, Length: 5000}, {Local: 9000, Remote: 5000, Length: 2000}, {Local: 20000, Remote: 7000, Length: 10},
		}},
		{"overlapping-reads", Limits{SGEs: 16}, []backend.Segment{
			{Local: 0, Remote: 0, Length: page}, {Local: 4 * page, Remote: 0, Length: page},
			{Local: 5 * page, Remote: page, Length: page}, {Local: 8 * page, Remote: page + 100, Length: page},
		}},
		{"four-gibibytes", Limits{SGEs: 16}, []backend.Segment{{Local: 1, Remote: 1 << 40, Length: 1<<32 + 1}}},
		{"nothing", Limits{}, nil},
	}
}

// render writes a plan as text: each WR, with the segments and the SGEs below it.
func render(c testCase, p *Plan) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%+v\n", c.limits)
	for i, s := range c.segments {
		fmt.Fprintf(&b, "segment %d: local %d, remote %d, %d bytes\n", i, s.Local, s.Remote, s.Length)
	}
	fmt.Fprintf(&b, "segments: %d, WRs: %d, SGEs: %d\n", len(c.segments), len(p.WRs), len(p.SGEs))
	for i, wr := range p.WRs {
		fmt.Fprintf(&b, "\nWR %d: remote %d, %d bytes of segments %d to %d\n", i, wr.Remote, wr.Bytes, wr.First, wr.Last)
		for _, sge := range p.SGEs[wr.FirstSGE:][:wr.SGEs] {
			fmt.Fprintf(&b, "  local %d, %d bytes\n", sge.Local, sge.Length)
		}
	}
	return b.String()
}

func TestGolden(t *testing.T) {
	var names []string
	for _, c := range cases() {
		t.Run(c.name, func(t *testing.T) {
			var p Plan
			p.Cut(c.segments, c.limits)
			got, file := render(c, &p), filepath.Join("testdata", c.name+".txt")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("not as in %s (rewrite it with -update if it should be):\n%s", file, diff)
			}
		})
		names = append(names, c.name+".txt")
	}
	files, err := filepath.Glob(filepath.Join("testdata", "*.txt"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if !slices.Contains(names, filepath.Base(file)) {
			t.Errorf("%s belongs to no case", file)
		}
	}
}
