package shm

import (
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

const (
	benchSize = 64 << 20
	benchPage = 4 << 10
)

// newBench connects to a target in another process. The regions have been touched.
func newBench(b *testing.B) (backend.Session, *path, backendtest.Signal) {
	a := newInstance(b, peer("a", 1))
	target := startChild(b, peer("b", 2))
	near := memory(b, 1, benchSize, 0)
	fill(near.Bytes, 1)
	register(b, a, near)
	remote := target.Register(b, regionArgs{ID: 5, Size: benchSize, Rights: all})
	done := make(backendtest.Signal, 1)
	s := bind(b, connect(b, a, target.Self, target), 1, remote, done)
	return s, a.mover.path.Load(), done
}

// memcpy copies the segments with as many goroutines as the backend has, each an equal share.
func memcpy(p *path, segments []backend.Segment) {
	workers := runtime.GOMAXPROCS(0)
	var group sync.WaitGroup
	for w := range workers {
		group.Go(func() {
			for _, g := range segments[w*len(segments)/workers : (w+1)*len(segments)/workers] {
				copy(p.far[g.Remote:g.Remote+g.Length], p.near[g.Local:g.Local+g.Length])
			}
		})
	}
	group.Wait()
}

// BenchmarkTransfer moves 64 MiB and compares it with copies of the same bytes by plain goroutines, taking turns
// in one run (run it with -benchtime 1x): memcpy copies one range for each goroutine, memcpy-list the same segments. The speeds are of the
// best turn each, for the machine may have other work; the processor time is of all turns.
func BenchmarkTransfer(b *testing.B) {
	var ranges []backend.Segment
	workers := uint64(runtime.GOMAXPROCS(0))
	for w := range workers {
		from, to := w*benchSize/workers, (w+1)*benchSize/workers
		ranges = append(ranges, backend.Segment{Local: from, Remote: from, Length: to - from})
	}
	var pages []backend.Segment
	for i, from := range rand.Perm(benchSize / benchPage) {
		pages = append(pages, backend.Segment{Local: uint64(from) * benchPage, Remote: uint64(i) * benchPage, Length: benchPage})
	}
	for _, c := range []struct {
		name     string
		segments []backend.Segment
		plain    []backend.Segment
	}{
		{"one-segment", []backend.Segment{{Length: benchSize}}, ranges},
		{"16384-pages-shuffled", pages, pages},
	} {
		b.Run(c.name, func(b *testing.B) {
			s, p, done := newBench(b)
			best := [3]time.Duration{1 << 62, 1 << 62, 1 << 62}
			var used [3]time.Duration
			turn := func(i int, do func()) {
				start, before := time.Now(), processorTime(b)
				do()
				best[i] = min(best[i], time.Since(start))
				used[i] += processorTime(b) - before
			}
			for range 300 * b.N {
				turn(0, func() {
					must(b, s.Post(backend.Transfer{Op: backend.Write, Segments: c.segments}))
					must(b, <-done)
				})
				turn(1, func() { memcpy(p, ranges) })
				turn(2, func() { memcpy(p, c.plain) })
			}
			speed := func(d time.Duration) float64 { return benchSize / d.Seconds() / 1e9 }
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(speed(best[0]), "shm-GB/s")
			b.ReportMetric(speed(best[1]), "memcpy-GB/s")
			b.ReportMetric(speed(best[2]), "memcpy-list-GB/s")
			b.ReportMetric(best[1].Seconds()/best[0].Seconds(), "of-memcpy")
			b.ReportMetric(best[2].Seconds()/best[0].Seconds(), "of-memcpy-list")
			b.ReportMetric(used[0].Seconds()/used[1].Seconds(), "cpu-per-memcpy")
			b.ReportMetric(used[0].Seconds()/used[2].Seconds(), "cpu-per-memcpy-list")
		})
	}
}

// processorTime is what this process has used so far.
func processorTime(b *testing.B) time.Duration {
	var usage unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &usage))
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkLatency measures one small transfer at a time, from Post to Complete.
func BenchmarkLatency(b *testing.B) {
	for _, c := range []struct {
		name   string
		length uint64
	}{{"4KiB", 4 << 10}, {"64KiB", 64 << 10}, {"128KiB", 128 << 10}} {
		b.Run(c.name, func(b *testing.B) {
			s, _, done := newBench(b)
			b.ReportAllocs()
			b.SetBytes(int64(c.length))
			transfer := backend.Transfer{Op: backend.Write, Segments: []backend.Segment{{Length: c.length}}}
			for b.Loop() {
				if err := s.Post(transfer); err != nil {
					b.Fatal(err)
				}
				<-done
			}
		})
	}
}
