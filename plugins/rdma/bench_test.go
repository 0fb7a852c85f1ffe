package rdma

import (
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
	"github.com/umbp/umbp/plugins/rdma/device"
	"github.com/umbp/umbp/plugins/rdma/verbstest"
)

// What follows is timed over a simulated device that carries out work requests within Post and moves no bytes: it is the
// time of the host, and none of a network.
var timed = verbstest.Config{NoBytes: true, Instant: true}

const benchPages = 16384 // 256 values of 64 pages

// benchPage is small, so that the regions of a benchmark are, too.
const benchPage = 256

// pages lists segments of one page each: contiguous at both ends, or with gaps between them, so that none can share a work
// request, in the reverse order at the near end.
func pages(n int, contiguous bool) []backend.Segment {
	segments := make([]backend.Segment, n)
	for i := range segments {
		at := uint64(i) * benchPage
		segments[i] = backend.Segment{Local: at, Remote: at, Length: benchPage}
		if !contiguous {
			segments[i].Local = uint64(n-1-i) * benchPage
			segments[i].Length--
		}
	}
	return segments
}

func BenchmarkTransfer(b *testing.B) {
	for _, c := range []struct {
		name     string
		segments []backend.Segment
		post     func(*session, backend.Transfer) error
	}{
		{"scattered", pages(benchPages, false), (*session).Post},
		{"contiguous", pages(benchPages, true), (*session).Post},
		{"one", pages(1, true), (*session).Post},
		{"one-wait", pages(1, true), (*session).PostWait},
	} {
		b.Run(c.name, func(b *testing.B) {
			r := newRig(b, timed, benchPages*benchPage, nil)
			done := make(backendtest.Signal, 1)
			s := r.bind(b, done)
			move := func() {
				if err := c.post(s, backend.Transfer{Op: backend.Write, Segments: c.segments}); err != nil {
					b.Fatal(err)
				}
				if err := <-done; err != nil {
					b.Fatal(err)
				}
			}
			move() // what is made once is made
			before := r.fabric.Counts()
			b.ReportAllocs()
			for b.Loop() {
				move()
			}
			now := r.fabric.Counts()
			elapsed := float64(b.Elapsed().Nanoseconds())
			b.ReportMetric(elapsed/float64(b.N*len(c.segments)), "ns/segment")
			b.ReportMetric(elapsed/float64(now.WRs-before.WRs), "ns/WR")
			b.ReportMetric(float64(now.WRs-before.WRs)/float64(b.N), "WRs/op")
			b.ReportMetric(float64(now.Posts-before.Posts)/float64(b.N), "posts/op")
			b.ReportMetric(float64(now.Polled-before.Polled)/float64(b.N), "completions/op")
		})
	}
}

// BenchmarkLedger times what Post and the completions of scattered segments cost this package, without a device, real or
// simulated.
func BenchmarkLedger(b *testing.B) {
	p := newPaper(1, 2, 512, 64, 0)
	var done int
	p.session.sink = counter{&done}
	for _, q := range p.qps[0] {
		q.forget = true
		q.then = func() {
			id := p.endpoint.lanes[q.num-1].handed.Load()
			p.cqs[0].completions = append(p.cqs[0].completions, device.Completion{ID: id, QPN: q.Num()})
		}
	}
	x := backend.Transfer{Op: backend.Write, Segments: pages(benchPages, false)}
	for b.Loop() {
		if err := p.session.Post(x); err != nil {
			b.Fatal(err)
		}
		for done == 0 {
			p.poll()
		}
		done = 0
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*benchPages), "ns/WR")
}

// counter is a sink that counts completions.
type counter struct{ n *int }

func (c counter) Complete(backend.Completion) { *c.n++ }

// TestNoAllocations moves transfers of every shape without asking the Go heap for anything.
func TestNoAllocations(t *testing.T) {
	if testing.CoverMode() != "" || raceEnabled {
		t.Skip("instrumented code allocates")
	}
	r := newRig(t, timed, benchPages*benchPage, nil)
	done := make(backendtest.Signal, 1)
	s := r.bind(t, done)
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		for _, segments := range [][]backend.Segment{pages(benchPages, false), pages(benchPages, true), pages(1, true)} {
			for name, post := range map[string]func(backend.Transfer) error{"Post": s.Post, "PostWait": s.PostWait} {
				move := func() {
					if err := post(backend.Transfer{Op: op, Segments: segments}); err != nil {
						t.Fatal(err)
					}
					if err := <-done; err != nil {
						t.Fatal(err)
					}
				}
				move()
				if n := testing.AllocsPerRun(10, move); n != 0 {
					t.Errorf("%s of a %s of %d segments makes %v allocations", name, op, len(segments), n)
				}
			}
		}
	}
}
