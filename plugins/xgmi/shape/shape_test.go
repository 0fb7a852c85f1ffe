package shape

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// small are limits that a few bytes reach.
var small = Limits{PartBytes: 64, PartOps: 8, Batch: 16, MinBatch: 2}

func seg(local, remote, length uint64) backend.Segment {
	return backend.Segment{Local: local, Remote: remote, Length: length}
}

// pages returns segments of one size, at given distances.
func pages(n int, length, localPitch, remotePitch uint64) (list []backend.Segment) {
	for i := range uint64(n) {
		list = append(list, seg(i*localPitch, i*remotePitch, length))
	}
	return list
}

// render writes a plan in short: pieces as width@local<>remote, grids with xrows/pitches, a b for batched, then the
// segments; parts are separated by |.
func render(p *Plan) (s string) {
	for i, part := range p.Parts {
		if i > 0 {
			s += "| "
		}
		for _, o := range p.Ops[part.First:][:part.Count] {
			s += fmt.Sprintf("%d", o.Width)
			if o.Rows > 1 {
				s += fmt.Sprintf("x%d/%d:%d", o.Rows, o.LocalPitch, o.RemotePitch)
			}
			if o.Batched {
				s += "b"
			}
			s += fmt.Sprintf("@%d:%d[%d-%d] ", o.Local, o.Remote, o.First, o.Last)
		}
	}
	return s
}

func TestCut(t *testing.T) {
	for _, c := range []struct {
		name     string
		segments []backend.Segment
		limits   Limits
		want     string
	}{
		{"nothing", nil, small, ""},
		{"one", pages(1, 10, 0, 0), small, "10@0:0[0-0] "},
		{"adjacent on both sides", pages(4, 10, 10, 10), small, "40@0:0[0-3] "},
		{"adjacent on one side", pages(5, 10, 10, 12), small, "10x5/10:12@0:0[0-4] "},
		{"three rows are none", pages(3, 10, 10, 12), small, "10b@0:0[0-0] 10b@10:12[1-1] 10b@20:24[2-2] "},
		{"no batches", pages(2, 10, 10, 12), Limits{PartBytes: 64, PartOps: 8}, "10@0:0[0-0] 10@10:12[1-1] "},
		{"too wide for a batch", pages(2, 17, 20, 20), small, "17@0:0[0-0] 17@20:20[1-1] "},
		{"one makes no batch", []backend.Segment{seg(0, 0, 8), seg(30, 30, 20)}, small, "8@0:0[0-0] 20@30:30[1-1] "},
		{
			"a piece before a grid that it is not of",
			append([]backend.Segment{seg(3, 0, 5)}, seg(10, 20, 5), seg(20, 40, 5), seg(30, 60, 5), seg(40, 80, 5)),
			small, "5@3:0[0-0] 5x4/10:20@10:20[1-4] ",
		},
		{
			"pieces of two segments as rows",
			[]backend.Segment{seg(0, 0, 2), seg(2, 2, 3), seg(8, 10, 5), seg(16, 20, 1), seg(17, 21, 4), seg(24, 30, 5)},
			small, "5x4/8:10@0:0[0-5] ",
		},
		{"backwards", []backend.Segment{seg(40, 0, 5), seg(30, 10, 5), seg(20, 20, 5), seg(10, 30, 5)}, small,
			"5b@40:0[0-0] 5b@30:10[1-1] 5b@20:20[2-2] 5b@10:30[3-3] "},
		{"the same local bytes", pages(4, 5, 0, 10), small, "5b@0:0[0-0] 5b@0:10[1-1] 5b@0:20[2-2] 5b@0:30[3-3] "},
		{"overlapping remote ranges", pages(4, 5, 5, 3), small, "5b@0:0[0-0] 5b@5:3[1-1] 5b@10:6[2-2] 5b@15:9[3-3] "},
		{"too far apart", pages(4, 5, 5, MaxPitch+1), small,
			fmt.Sprintf("5b@0:0[0-0] 5b@5:%d[1-1] 5b@10:%d[2-2] 5b@15:%d[3-3] ", 1<<31, 1<<32, 3<<31)},
		{"as far apart as may be", pages(4, 5, 5, MaxPitch), small, fmt.Sprintf("5x4/5:%d@0:0[0-3] ", MaxPitch)},
		{"a long segment", pages(1, 200, 0, 0), small, "64@0:0[0-0] | 64@64:64[0-0] | 72@128:128[0-0] "},
		{"a piece ends when it is long enough", pages(3, 70, 70, 70), small, "70@0:0[0-0] | 70@70:70[1-1] | 70@140:140[2-2] "},
		{"a cut within the second segment", []backend.Segment{seg(0, 0, 60), seg(60, 60, 100)}, small,
			"64@0:0[0-1] | 96@64:64[1-1] "},
		{"a grid of more than a part", pages(9, 16, 16, 20), small,
			"16x4/16:20@0:0[0-3] | 16x4/16:20@64:80[4-7] | 16@128:160[8-8] "},
		{"rows too wide for a grid", pages(4, 17, 17, 20), small,
			"17@0:0[0-0] 17@17:20[1-1] 17@34:40[2-2] 17@51:60[3-3] "},
		{"many small ones", []backend.Segment{
			seg(0, 0, 1), seg(5, 2, 1), seg(9, 4, 1), seg(2, 6, 1), seg(7, 8, 1), seg(20, 10, 1), seg(30, 12, 1), seg(15, 14, 1), seg(40, 16, 1),
		}, small, "1b@0:0[0-0] 1b@5:2[1-1] 1b@9:4[2-2] 1b@2:6[3-3] 1b@7:8[4-4] 1b@20:10[5-5] 1b@30:12[6-6] 1b@15:14[7-7] | 1@40:16[8-8] "},
	} {
		t.Run(c.name, func(t *testing.T) {
			var p Plan
			p.Cut(c.segments, c.limits)
			if got := render(&p); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
			check(t, &p, c.segments, c.limits)
		})
	}
}

// spot is one byte of a transfer: where it lies, and the segment that it belongs to.
type spot struct {
	local, remote uint64
	segment       uint32
}

// fataler is what a test and a property have in common.
type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

// check compares a plan with the segments byte by byte, and holds it to its limits.
func check(t fataler, p *Plan, segments []backend.Segment, l Limits) {
	t.Helper()
	var want, got []spot
	for i, s := range segments {
		for n := range s.Length {
			want = append(want, spot{s.Local + n, s.Remote + n, uint32(i)})
		}
	}
	for i, o := range p.Ops {
		if o.Width == 0 || o.Rows == 0 || o.First > o.Last || int(o.Last) >= len(segments) {
			t.Fatalf("copy %d is malformed: %+v", i, o)
		}
		if o.Rows == 1 && (o.LocalPitch != 0 || o.RemotePitch != 0) || o.Bytes() >= 2*l.PartBytes {
			t.Fatalf("piece %d is malformed, or too long: %+v", i, o)
		}
		if o.Rows > 1 && (o.Rows < MinRows || o.LocalPitch < o.Width || o.RemotePitch < o.Width || o.Batched ||
			o.LocalPitch > MaxPitch || o.RemotePitch > MaxPitch || o.Bytes() > l.PartBytes) {
			t.Fatalf("grid %d is malformed: %+v", i, o)
		}
		if o.Batched && o.Width > l.Batch {
			t.Fatalf("copy %d is too long for a batch: %+v", i, o)
		}
		first := len(got)
		for row := range uint64(o.Rows) {
			for n := range o.Width {
				at := len(got)
				if at == len(want) {
					t.Fatalf("copy %d has more bytes than the segments: %+v", i, o)
				}
				got = append(got, spot{o.Local + row*o.LocalPitch + n, o.Remote + row*o.RemotePitch + n, want[at].segment})
			}
		}
		if a, b := want[first].segment, want[len(got)-1].segment; a != o.First || b != o.Last {
			t.Fatalf("copy %d has bytes of segments %d to %d: %+v", i, a, b, o)
		}
	}
	if !slices.Equal(got, want) {
		t.Fatalf("the copies are not the segments:\ngot  %v\nwant %v\nof %v", got, want, segments)
	}

	next := uint32(0)
	for i, part := range p.Parts {
		if part.First != next || part.Count == 0 || int(part.Count) > l.PartOps {
			t.Fatalf("part %d is malformed: %+v", i, part)
		}
		next += part.Count
		var bytes uint64
		var batched uint32
		for _, o := range p.Ops[part.First:next] {
			bytes += o.Bytes()
			if o.Batched {
				batched++
			}
		}
		if bytes != part.Bytes || batched != part.Batched || bytes >= 3*l.PartBytes {
			t.Fatalf("part %d has %d bytes and %d batched copies: %+v", i, bytes, batched, part)
		}
		if batched > 0 && int(batched) < l.MinBatch {
			t.Fatalf("part %d has a batch of %d", i, batched)
		}
		if i < len(p.Parts)-1 && bytes < l.PartBytes && int(part.Count) < l.PartOps {
			t.Fatalf("part %d ended early: %+v", i, part)
		}
	}
	if int(next) != len(p.Ops) {
		t.Fatalf("the parts have %d copies of %d", next, len(p.Ops))
	}
}

// drawSegments makes segments that are likely to be neighbours, and rows of grids.
func drawSegments(t *rapid.T) (list []backend.Segment) {
	var local, remote uint64
	for len(list) < 60 && rapid.IntRange(0, 9).Draw(t, "more") > 0 {
		s := seg(0, 0, rapid.Uint64Range(1, 24).Draw(t, "length"))
		localGap := rapid.SampledFrom([]uint64{0, 0, 1, 7}).Draw(t, "local gap")
		remoteGap := rapid.SampledFrom([]uint64{0, 0, 1, 5}).Draw(t, "remote gap")
		for range rapid.IntRange(1, 9).Draw(t, "rows") {
			s.Local, s.Remote = local, remote
			list = append(list, s)
			local, remote = local+s.Length+localGap, remote+s.Length+remoteGap
		}
		if rapid.Bool().Draw(t, "elsewhere") {
			local = rapid.Uint64Range(0, 1<<12).Draw(t, "local")
		}
	}
	return list
}

func TestCutIsRight(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := Limits{
			PartBytes: rapid.Uint64Range(1, 200).Draw(t, "part bytes"),
			PartOps:   rapid.IntRange(1, 10).Draw(t, "part ops"),
			Batch:     rapid.Uint64Range(0, 30).Draw(t, "batch"),
			MinBatch:  rapid.IntRange(0, 4).Draw(t, "min batch"),
		}
		var p Plan
		for range 2 { // the second uses the first again
			segments := drawSegments(t)
			p.Cut(segments, l)
			check(t, &p, segments, l)
		}
	})
}

// TestCutIsGood holds the plan of regular patterns to the number of copies that they need.
func TestCutIsGood(t *testing.T) {
	l := Limits{PartBytes: 1 << 20, PartOps: 256, Batch: 64 << 10, MinBatch: 2}
	rapid.Check(t, func(t *rapid.T) {
		width := rapid.Uint64Range(1, 16<<10).Draw(t, "width")
		rows := rapid.IntRange(MinRows, 1000).Draw(t, "rows")
		gap := rapid.Uint64Range(1, 4096).Draw(t, "gap")
		var p Plan
		p.Cut(pages(rows, width, width, width+gap), l)
		grid := int(l.PartBytes / width) // rows of one
		if most := (rows+grid-1)/grid + MinRows - 2; len(p.Ops) > most {
			t.Fatalf("%d copies for %d rows of %d bytes, want %d at most", len(p.Ops), rows, width, most)
		}
	})
}

func TestCutAllocatesNothing(t *testing.T) {
	segments := slices.Concat(pages(500, 4096, 4096, 8192), pages(500, 4096, 12288, 4096*3))
	l := Limits{PartBytes: 1 << 20, PartOps: 256, Batch: 64 << 10, MinBatch: 2}
	var p Plan
	p.Cut(segments, l)
	if n := testing.AllocsPerRun(10, func() { p.Cut(segments, l) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
