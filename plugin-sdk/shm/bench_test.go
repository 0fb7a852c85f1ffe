package shm

import (
	"fmt"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// BenchmarkRoundTrip sends a record to an end that returns it. Hot, the next follows at once; cold, both ends have
// gone to sleep before. Beside it stands the limit of what has to wake the other end: two bare eventfds.
func BenchmarkRoundTrip(b *testing.B) {
	for _, where := range []string{"one-process", "two-processes"} {
		for _, c := range []struct {
			name  string
			pause time.Duration
		}{{"hot", 0}, {"cold", time.Millisecond}} {
			two := where == "two-processes"
			b.Run(where+"/queue/"+c.name, func(b *testing.B) {
				there, back := newEcho(b, two)
				record := AppendCancel(nil, Cancel{1, 2})
				var room []byte
				roundTrips(b, c.pause, func() (err error) {
					if _, err = there.Send(record); err != nil {
						return err
					}
					room, err = back.Receive(room)
					return err
				})
			})
			b.Run(where+"/eventfd/"+c.name, func(b *testing.B) {
				there, back := eventfd(b), eventfd(b)
				b.Cleanup(func() {
					there.Close()
					back.Close()
				})
				if two {
					startChild(b, pingPong, there, back)
				} else {
					go answerAll(there, back)
				}
				count := [8]byte{1}
				roundTrips(b, c.pause, func() error {
					if _, err := there.Write(count[:]); err != nil {
						return err
					}
					_, err := back.Read(count[:])
					return err
				})
			})
		}
	}
}

func roundTrips(b *testing.B, pause time.Duration, trip func() error) {
	b.ReportAllocs()
	var spent time.Duration
	for b.Loop() {
		if pause > 0 {
			time.Sleep(pause)
		}
		start := time.Now()
		if err := trip(); err != nil {
			b.Fatal(err)
		}
		spent += time.Since(start)
	}
	b.ReportMetric(float64(spent.Nanoseconds())/float64(b.N), "ns/trip")
}

// BenchmarkPost is what a transfer costs on its way through a queue: written, sent, received, read.
func BenchmarkPost(b *testing.B) {
	for _, n := range []int{1, 256, MaxSegments} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			q, err := Create(DefaultCapacity)
			must(b, err)
			defer q.Close()
			p := Post{Session: 1, Cookie: 2, Op: backend.Write, Segments: make([]backend.Segment, n)}
			var out, in []byte
			var room []backend.Segment
			b.ReportAllocs()
			for b.Loop() {
				out = AppendPost(out[:0], &p)
				if _, err := q.Send(out); err != nil {
					b.Fatal(err)
				}
				in, err = q.Receive(in)
				if err != nil {
					b.Fatal(err)
				}
				got, err := ParsePost(in, room)
				if err != nil {
					b.Fatal(err)
				}
				room = got.Segments
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/segment")
		})
	}
}
