package coalesce

import (
	"math/rand/v2"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// benchPages is 256 values of 64 pages.
const benchPages = 16384

// BenchmarkCut reports the time for each segment. The large segments are cut 16 times each, so there the time for each WR
// says more.
func BenchmarkCut(b *testing.B) {
	order := rand.New(rand.NewPCG(1, 2)).Perm(benchPages)
	pages := func(at func(i uint64) backend.Segment) []backend.Segment {
		segments := make([]backend.Segment, benchPages)
		for i := range segments {
			segments[i] = at(uint64(i))
		}
		return segments
	}
	for _, c := range []struct {
		name      string
		segments  []backend.Segment
		limits    Limits
		wrs, sges int
	}{
		{
			"contiguous",
			pages(func(i uint64) backend.Segment {
				return backend.Segment{Local: i * page, Remote: i * page, Length: page}
			}),
			Limits{SGEs: 16}, 1, 1,
		},
		{
			"shuffled-local",
			pages(func(i uint64) backend.Segment {
				return backend.Segment{Local: uint64(order[i]) * page, Remote: i * page, Length: page}
			}),
			Limits{SGEs: 16}, 1024, 16383,
		},
		{
			"shuffled-local-in-parts",
			pages(func(i uint64) backend.Segment {
				return backend.Segment{Local: uint64(order[i]) * page, Remote: i * page, Length: page}
			}),
			Limits{SGEs: 16, LocalPart: 1 << 22, RemotePart: 1 << 22}, 1024, 16383,
		},
		{
			"scattered",
			pages(func(i uint64) backend.Segment {
				return backend.Segment{Local: uint64(order[i]) * page, Remote: 2 * i * page, Length: page}
			}),
			Limits{SGEs: 16}, benchPages, benchPages,
		},
		{
			"large",
			pages(func(i uint64) backend.Segment {
				return backend.Segment{Local: i << 25, Remote: i << 25, Length: 1 << 24}
			}),
			Limits{SGEs: 16, Bytes: 1 << 20}, 16 * benchPages, 16 * benchPages,
		},
	} {
		b.Run(c.name, func(b *testing.B) {
			var p Plan
			p.Cut(c.segments, c.limits)
			if len(p.WRs) != c.wrs || len(p.SGEs) != c.sges {
				b.Fatalf("%d WRs with %d SGEs, not %d with %d", len(p.WRs), len(p.SGEs), c.wrs, c.sges)
			}
			b.ReportAllocs()
			for b.Loop() {
				p.Cut(c.segments, c.limits)
			}
			elapsed := float64(b.Elapsed().Nanoseconds())
			b.ReportMetric(elapsed/float64(b.N*len(c.segments)), "ns/segment")
			b.ReportMetric(elapsed/float64(b.N*len(p.WRs)), "ns/WR")
			b.ReportMetric(float64(len(p.WRs)), "WRs")
			b.ReportMetric(float64(len(p.SGEs)), "SGEs")
		})
	}
}
