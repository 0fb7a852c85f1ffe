package region

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// bitmap is the naive allocator that Pages is compared with: true is free.
type bitmap []bool

func newBitmap(count int) bitmap {
	b := make(bitmap, count)
	for i := range b {
		b[i] = true
	}
	return b
}

// runs returns the maximal runs of pages that are free, or in use.
func (b bitmap) runs(free bool) (runs []Run) {
	for i := 0; i < len(b); i++ {
		first := i
		for i < len(b) && b[i] == free {
			i++
		}
		if i > first {
			runs = append(runs, Run{First: uint32(first), Count: uint32(i - first)})
		}
	}
	return runs
}

func (b bitmap) set(r Run, free bool) error {
	for i := uint64(r.First); i < r.end(); i++ {
		if i >= uint64(len(b)) || b[i] == free {
			return fmt.Errorf("page %d of %v has free = %v already, or is outside", i, r, free)
		}
		b[i] = free
	}
	return nil
}

// fewest returns the least number of free runs that hold n pages, and the run that a best fit cuts when that
// number is one.
func (b bitmap) fewest(n int) (number int, best Run) {
	free := b.runs(true)
	for _, r := range free {
		if int(r.Count) >= n && (best.Count == 0 || r.Count < best.Count) {
			best = r
		}
	}
	slices.SortFunc(free, func(x, y Run) int { return int(y.Count) - int(x.Count) })
	for sum := 0; sum < n; number++ {
		sum += int(free[number].Count)
	}
	return number, best
}

// pagesModel drives both allocators with the same operations.
type pagesModel struct {
	pages *Pages
	model bitmap
	out   []Run
}

func (m *pagesModel) alloc(n int) error {
	free := 0
	for _, r := range m.model.runs(true) {
		free += int(r.Count)
	}
	mark := Run{First: math.MaxUint32, Count: 7}
	out, ok := m.pages.Alloc(n, append(m.out[:0], mark))
	m.out = out
	if ok != (n <= free) {
		return fmt.Errorf("alloc of %d with %d free: %v", n, free, ok)
	}
	if out[0] != mark {
		return fmt.Errorf("alloc overwrote what was in out: %v", out[0])
	}
	runs := out[1:]
	if !ok {
		if len(runs) != 0 {
			return fmt.Errorf("alloc failed and appended %v", runs)
		}
		return nil
	}
	number, best := m.model.fewest(n)
	if len(runs) != number {
		return fmt.Errorf("alloc of %d took %d runs %v, %d suffice", n, len(runs), runs, number)
	}
	if number == 1 && runs[0].First != best.First {
		return fmt.Errorf("alloc of %d cut %v, the best fit is %v", n, runs[0], best)
	}
	sum := 0
	for _, r := range runs {
		if err := m.model.set(r, false); err != nil {
			return err
		}
		sum += int(r.Count)
	}
	if sum != n {
		return fmt.Errorf("alloc of %d returned %d pages", n, sum)
	}
	return nil
}

// free frees a part of the index-th run in use: count pages from skip on, both taken modulo what there is.
func (m *pagesModel) free(index, skip, count int) error {
	used := m.model.runs(false)
	if len(used) == 0 {
		return nil
	}
	r := used[index%len(used)]
	skip %= int(r.Count)
	count = 1 + count%(int(r.Count)-skip)
	r = Run{First: r.First + uint32(skip), Count: uint32(count)}
	m.pages.Free(r)
	return m.model.set(r, true)
}

func (m *pagesModel) check() error {
	free := m.model.runs(true)
	sum, largest := 0, 0
	for _, r := range free {
		sum += int(r.Count)
		largest = max(largest, int(r.Count))
	}
	p := m.pages
	if p.FreePages() != sum || p.FreeRuns() != len(free) || p.LargestRun() != largest {
		return fmt.Errorf("%d pages in %d runs, largest %d; want %d, %d, %d",
			p.FreePages(), p.FreeRuns(), p.LargestRun(), sum, len(free), largest)
	}
	want := 0.0
	if sum > 0 {
		want = 1 - float64(largest)/float64(sum)
	}
	if p.Fragmentation() != want {
		return fmt.Errorf("fragmentation %v, want %v", p.Fragmentation(), want)
	}
	return nil
}

func TestPagesAgainstBitmap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		count := rapid.IntRange(0, 300).Draw(t, "count")
		m := &pagesModel{pages: NewPages(count), model: newBitmap(count)}
		must := func(err error) {
			if err != nil {
				t.Fatal(err)
			}
		}
		sizes := rapid.OneOf(rapid.IntRange(0, 8), rapid.IntRange(0, 310))
		t.Repeat(map[string]func(*rapid.T){
			"alloc": func(t *rapid.T) { must(m.alloc(sizes.Draw(t, "n"))) },
			"free": func(t *rapid.T) {
				place := rapid.IntRange(0, 300)
				must(m.free(place.Draw(t, "run"), place.Draw(t, "skip"), place.Draw(t, "count")))
			},
			"": func(*rapid.T) { must(m.check()) },
		})
	})
}

// FuzzPages reads a stream of operations: a byte for the number of pages, then pairs of bytes.
func FuzzPages(f *testing.F) {
	f.Add([]byte{64, 0x03, 10, 0x03, 20, 0x80, 1, 0xc5, 4, 0x03, 60})
	f.Add([]byte{255, 0, 1, 0, 1, 0, 1, 0, 1, 0x80, 0, 0x82, 0, 0, 2, 0, 255, 0x81, 9})
	f.Fuzz(func(t *testing.T, stream []byte) {
		if len(stream) == 0 {
			return
		}
		count := int(stream[0])
		m := &pagesModel{pages: NewPages(count), model: newBitmap(count)}
		for ops := stream[1:]; len(ops) >= 2; ops = ops[2:] {
			var err error
			if ops[0]&0x80 == 0 {
				err = m.alloc(int(ops[1]))
			} else {
				err = m.free(int(ops[0]&0x0f), int(ops[0]>>4&7), int(ops[1]))
			}
			if err == nil {
				err = m.check()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	})
}

// TestPagesRefusesBadFree frees what is not in use. The allocator is as it was afterwards.
func TestPagesRefusesBadFree(t *testing.T) {
	for _, test := range []struct {
		name string
		run  Run
		says []string
	}{
		{"empty", Run{First: 10}, []string{"[10, +0)", "pool of 100 pages"}},
		{"runs out of the pool", Run{First: 99, Count: 2}, []string{"[99, +2)", "pool of 100 pages"}},
		{"beyond 32 bits", Run{First: math.MaxUint32, Count: math.MaxUint32}, []string{"pool of 100 pages"}},
		{"twice", Run{First: 20, Count: 5}, []string{"[20, +5)", "[20, +10)", "free already"}},
		{"in a free run", Run{First: 25, Count: 1}, []string{"[25, +1)", "[20, +10)"}},
		{"end of a free run", Run{First: 29, Count: 2}, []string{"[29, +2)", "[20, +10)"}},
		{"start of a free run", Run{First: 15, Count: 6}, []string{"[15, +6)", "[20, +10)"}},
		{"around a free run", Run{First: 10, Count: 40}, []string{"[10, +40)", "[20, +10)"}},
		{"between two free runs, into the second", Run{First: 30, Count: 31}, []string{"[30, +31)", "[60, +1)"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := NewPages(100)
			p.Alloc(100, nil)
			p.Free(Run{First: 20, Count: 10})
			p.Free(Run{First: 60, Count: 1})
			func() {
				defer func() {
					text, _ := recover().(string)
					for _, word := range test.says {
						if !strings.Contains(text, word) {
							t.Errorf("panic %q does not say %q", text, word)
						}
					}
				}()
				p.Free(test.run)
			}()
			if p.FreePages() != 11 || p.FreeRuns() != 2 || p.LargestRun() != 10 {
				t.Errorf("the refused run changed the pool: %d free in %d runs", p.FreePages(), p.FreeRuns())
			}
		})
	}
}

func TestNewPagesRefusesBadCount(t *testing.T) {
	for _, count := range []int{-1, math.MaxUint32 + 1} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("NewPages(%d) did not panic", count)
				}
			}()
			NewPages(count)
		}()
	}
}

// TestPagesOfLargestPool uses the whole range of the page numbers.
func TestPagesOfLargestPool(t *testing.T) {
	p := NewPages(math.MaxUint32)
	runs, ok := p.Alloc(math.MaxUint32, nil)
	if want := []Run{{Count: math.MaxUint32}}; !ok || !slices.Equal(runs, want) {
		t.Fatalf("got %v, %v", runs, ok)
	}
	last := Run{First: math.MaxUint32 - 1, Count: 1}
	p.Free(last)
	p.Free(Run{First: 0, Count: math.MaxUint32 - 1})
	if p.FreeRuns() != 1 || p.FreePages() != math.MaxUint32 || p.Fragmentation() != 0 {
		t.Fatalf("%d pages in %d runs", p.FreePages(), p.FreeRuns())
	}
}

// TestPagesAllocatesNothingWhenWarm holds for a pool that is whole and for one that is scattered.
func TestPagesAllocatesNothingWhenWarm(t *testing.T) {
	for _, scattered := range []bool{false, true} {
		p := newBenchPool(1<<16, scattered)
		out := make([]Run, 0, 1<<12)
		round := func() {
			out = out[:0]
			for range 16 {
				out, _ = p.Alloc(64, out)
			}
			for _, r := range out {
				p.Free(r)
			}
		}
		if n := testing.AllocsPerRun(100, round); n != 0 {
			t.Errorf("scattered = %v: a round allocates %v times", scattered, n)
		}
	}
}

// newBenchPool returns a pool with half of its pages free: in one run, or every other page.
func newBenchPool(count int, scattered bool) *Pages {
	p := NewPages(count)
	p.Alloc(count, nil)
	if !scattered {
		p.Free(Run{Count: uint32(count / 2)})
		return p
	}
	for i := 0; i < count; i += 2 {
		p.Free(Run{First: uint32(i), Count: 1})
	}
	return p
}

// BenchmarkPages allocates and frees a batch of 256 values of 64 pages: in a pool with one free run, and in one
// where every second page is in use.
func BenchmarkPages(b *testing.B) {
	const values, pages = 256, 64
	for _, pool := range []struct {
		name      string
		count     int
		scattered bool
	}{
		{"fresh", 1 << 20, false},
		{"fragmented/1M", 1 << 20, true},
		{"fragmented/16M", 1 << 24, true},
	} {
		b.Run(pool.name, func(b *testing.B) {
			p := newBenchPool(pool.count, pool.scattered)
			runs := make([]Run, 0, values*pages)
			b.ReportAllocs()
			for b.Loop() {
				runs = runs[:0]
				for range values {
					runs, _ = p.Alloc(pages, runs)
				}
				for _, r := range runs {
					p.Free(r)
				}
			}
			perOp := float64(b.Elapsed().Nanoseconds()) / float64(b.N)
			b.ReportMetric(perOp/values, "ns/value")
			b.ReportMetric(perOp/float64(len(runs)), "ns/run")
		})
	}
}
