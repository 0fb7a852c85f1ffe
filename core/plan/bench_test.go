package plan

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

const (
	benchKeys = 256
	benchPage = 4096
)

// benchBatch is a batch of benchKeys values of the same number of pages, as a client knows it: where each value
// lies at either end, and the order in which it hands them to the planner.
type benchBatch struct {
	pages  int
	stride uint64 // from one page to the next in the remote region: benchPage where they touch
	values []Run  // each key's first page
	single []Run  // where pages are shuffled: the key and the page's offsets, in order of planning
}

// newBenchBatch spreads the values in turn over the remote regions.
func newBenchBatch(pages, regions int, stride uint64, order string) *benchBatch {
	b := &benchBatch{pages: pages, stride: stride}
	for key := range benchKeys {
		b.values = append(b.values, Run{
			Key: uint32(key), Remote: uint32(key % regions), Length: benchPage,
			LocalOffset:  uint64(key*pages) * benchPage,
			RemoteOffset: uint64(key/regions*pages) * stride,
		})
	}
	random := rand.New(rand.NewPCG(1, 2))
	switch order {
	case "keys-shuffled":
		random.Shuffle(benchKeys, func(i, j int) { b.values[i], b.values[j] = b.values[j], b.values[i] })
	case "pages-shuffled":
		b.single = b.asPages(nil)
		random.Shuffle(len(b.single), func(i, j int) { b.single[i], b.single[j] = b.single[j], b.single[i] })
	}
	return b
}

// asPages returns the batch as runs of one page, in the memory of runs.
func (b *benchBatch) asPages(runs []Run) []Run {
	runs = slices.Grow(runs, benchKeys*b.pages)[:benchKeys*b.pages]
	if b.single != nil {
		for i := range runs {
			s := &b.single[i]
			fill(&runs[i], s, s.LocalOffset, s.RemoteOffset, benchPage)
		}
		return runs
	}
	for i := range b.values {
		v := &b.values[i]
		local, remote := v.LocalOffset, v.RemoteOffset
		pages := runs[i*b.pages:][:b.pages]
		for j := range pages {
			fill(&pages[j], v, local, remote, benchPage)
			local += benchPage
			remote += b.stride
		}
	}
	return runs
}

// asRuns returns the batch as one run for each key, in the memory of runs.
func (b *benchBatch) asRuns(runs []Run) []Run {
	runs = slices.Grow(runs, benchKeys)[:benchKeys]
	for i := range runs {
		v := &b.values[i]
		fill(&runs[i], v, v.LocalOffset, v.RemoteOffset, uint64(b.pages)*benchPage)
	}
	return runs
}

// fill writes a run of a value field by field: a composite literal would be made on the stack and copied, which
// takes four times as long.
func fill(r, value *Run, local, remote, length uint64) {
	r.Key, r.Local, r.Remote = value.Key, value.Local, value.Remote
	r.LocalOffset, r.RemoteOffset, r.Length = local, remote, length
}

// measure times building the input and planning it, with a planner that is warm.
func measure(b *testing.B, pages int, build func([]Run) []Run, plan func(*Planner, []Run) (*Plan, error)) {
	var planner Planner
	runs := build(nil)
	pl, err := plan(&planner, runs)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		runs = build(runs[:0])
		if pl, err = plan(&planner, runs); err != nil {
			b.Fatal(err)
		}
	}
	nanoseconds := float64(b.Elapsed().Nanoseconds()) / float64(b.N)
	b.ReportMetric(nanoseconds/float64(benchKeys*pages), "ns/page")
	b.ReportMetric(nanoseconds/float64(len(runs)), "ns/run")
	b.ReportMetric(float64(len(pl.Segments)), "segments")
}

func grouped(op backend.Op) func(*Planner, []Run) (*Plan, error) {
	return func(p *Planner, runs []Run) (*Plan, error) { return p.Plan(op, runs, backend.Limits{}) }
}

// BenchmarkPlan has values whose pages touch, so that all of them merge.
func BenchmarkPlan(b *testing.B) {
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		for _, pages := range []int{64, 128} {
			for _, regions := range []int{1, 4} {
				for _, order := range []string{"in-order", "keys-shuffled", "pages-shuffled"} {
					batch := newBenchBatch(pages, regions, benchPage, order)
					name := fmt.Sprintf("%s/pages=%d/regions=%d/%s", op, pages, regions, order)
					b.Run(name+"/as-pages", func(b *testing.B) { measure(b, pages, batch.asPages, grouped(op)) })
					if order != "pages-shuffled" {
						b.Run(name+"/as-runs", func(b *testing.B) { measure(b, pages, batch.asRuns, grouped(op)) })
					}
				}
			}
		}
	}
}

// BenchmarkPlanScattered has pages that do not touch in the remote regions, so that none of them merge.
func BenchmarkPlanScattered(b *testing.B) {
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		for _, regions := range []int{1, 4} {
			for _, order := range []string{"in-order", "keys-shuffled", "pages-shuffled"} {
				batch := newBenchBatch(128, regions, 2*benchPage, order)
				b.Run(fmt.Sprintf("%s/pages=128/regions=%d/%s", op, regions, order), func(b *testing.B) {
					measure(b, 128, batch.asPages, grouped(op))
				})
			}
		}
	}
}

// BenchmarkPerPage makes the plans that Plan is measured against.
func BenchmarkPerPage(b *testing.B) {
	perPage := func(p *Planner, runs []Run) (*Plan, error) { return p.PerPage(backend.Write, runs, benchPage) }
	for _, pages := range []int{64, 128} {
		for _, order := range []string{"in-order", "pages-shuffled"} {
			batch := newBenchBatch(pages, 1, benchPage, order)
			b.Run(fmt.Sprintf("pages=%d/%s", pages, order), func(b *testing.B) {
				measure(b, pages, batch.asPages, perPage)
			})
		}
	}
}

// BenchmarkBuildInput is the part of the figures above that is not the planner's.
func BenchmarkBuildInput(b *testing.B) {
	for _, order := range []string{"in-order", "pages-shuffled"} {
		batch := newBenchBatch(128, 1, benchPage, order)
		b.Run(order, func(b *testing.B) {
			measure(b, 128, batch.asPages, func(p *Planner, _ []Run) (*Plan, error) { return &p.plan, nil })
		})
	}
}
