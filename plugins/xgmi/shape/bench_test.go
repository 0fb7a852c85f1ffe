package shape

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// BenchmarkCut makes plans for 4096 pages of 16 KiB. It reports nanoseconds for each segment.
func BenchmarkCut(b *testing.B) {
	const n, page = 4096, 16 << 10
	shuffled := pages(n, page, page, 2*page)
	for i, to := range rand.New(rand.NewPCG(1, 2)).Perm(n) {
		shuffled[i].Local = uint64(to) * page
	}
	runs := pages(n, page, page, page)
	for i := range runs {
		runs[i].Remote += uint64(i/16) * page // 16 pages, and a gap
	}
	l := Limits{PartBytes: 32 << 20, PartOps: 256, Batch: 256 << 10, MinBatch: 4}
	for _, c := range []struct {
		name     string
		segments []backend.Segment
	}{
		{"one-piece", pages(n, page, page, page)},
		{"grid", pages(n, page, page, 2*page)},
		{"runs", runs},
		{"shuffled", shuffled},
	} {
		b.Run(c.name, func(b *testing.B) {
			var p Plan
			segments := slices.Clone(c.segments)
			b.ReportAllocs()
			for b.Loop() {
				p.Cut(segments, l)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/segment")
			b.ReportMetric(float64(len(p.Ops)), "copies")
			b.ReportMetric(float64(len(p.Parts)), "parts")
		})
	}
}
