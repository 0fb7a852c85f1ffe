package xgmi

import (
	"fmt"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
)

// BenchmarkSimulated moves 256 pages between two simulated GPUs: one transfer for each page, and one for all of them,
// whose near pages are in a row, or anywhere. It says what the calls and completions cost the processor, and nothing of
// what a GPU does.
func BenchmarkSimulated(b *testing.B) {
	const n = 256
	for _, page := range []uint64{4 * kib, 16 * kib, 64 * kib} {
		var row, scattered []backend.Segment
		for i := range n {
			s := backend.Segment{Local: uint64(i) * page, Remote: uint64(2*i) * page, Length: page}
			row = append(row, s)
			s.Local = uint64(i*37%n) * page
			scattered = append(scattered, s)
		}
		for _, c := range []struct {
			name     string
			segments []backend.Segment
			each     int // segments of one transfer
		}{{"per-page", scattered, 1}, {"grouped-row", row, n}, {"grouped-scattered", scattered, n}} {
			b.Run(fmt.Sprintf("%dKiB/%s", page/kib, c.name), func(b *testing.B) {
				w := newWorld(b, gpusim.Machine{})
				k := w.newCouple(0, 1, int(2*n*page))
				done := make(backendtest.Signal, n)
				s := bind(b, k.endpoint, 1, k.remote, done)
				b.SetBytes(n * int64(page))
				b.ReportAllocs()
				for b.Loop() {
					for i := 0; i < n; i += c.each {
						if err := s.Post(backend.Transfer{Op: backend.Write, Segments: c.segments[i:][:c.each], Cookie: uint64(i)}); err != nil {
							b.Fatal(err)
						}
					}
					for i := 0; i < n; i += c.each {
						must(b, <-done)
					}
				}
			})
		}
	}
}

// BenchmarkSimulatedLatency moves one page at a time, from Post to Complete.
func BenchmarkSimulatedLatency(b *testing.B) {
	w := newWorld(b, gpusim.Machine{})
	k := w.newCouple(0, 1, mib)
	done := make(backendtest.Signal, 1)
	s := bind(b, k.endpoint, 1, k.remote, done)
	segments := []backend.Segment{{Length: 4 * kib}}
	b.ReportAllocs()
	for b.Loop() {
		if err := s.Post(backend.Transfer{Op: backend.Write, Segments: segments}); err != nil {
			b.Fatal(err)
		}
		must(b, <-done)
	}
}
