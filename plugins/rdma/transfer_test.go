package rdma

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
	"github.com/umbp/umbp/plugins/rdma/coalesce"
	"github.com/umbp/umbp/plugins/rdma/verbstest"
)

// tiny are options with which every limit is met all the time.
var tiny = map[string]string{
	"send_queue": "16", "signal_every": "3", "sges": "2", "wr_bytes": "1000", "window": "4", "stripe": "4KiB",
}

var twoDevices = verbstest.Config{Devices: make([]verbstest.DeviceConfig, 2)}

// drawSegments cuts both regions into the same number of pieces, in a random order on the local side.
func drawSegments(rt *rapid.T, size int) []backend.Segment {
	n := rapid.SampledFrom([]int{1, 2, 3, 17, 300, 1025}).Draw(rt, "segments")
	slot := size / n
	order := make([]int, n)
	for i := range order {
		order[i] = i
	}
	if rapid.Bool().Draw(rt, "shuffled") {
		order = rapid.Permutation(order).Draw(rt, "order")
	}
	seed := rapid.Uint32().Draw(rt, "shape")
	segments := make([]backend.Segment, 0, n)
	for i := range n {
		seed = seed*1664525 + 1013904223
		length := 1 + int(seed>>8)%slot
		if seed%3 == 0 {
			length = slot // touches its neighbour
		}
		segments = append(segments, backend.Segment{
			Local: uint64(order[i]*slot + slot - length), Remote: uint64(i * slot), Length: uint64(length),
		})
	}
	return segments
}

func TestTransfersMoveExactlyTheirSegments(t *testing.T) {
	const size = 192 << 10
	for name, c := range map[string]struct {
		devices verbstest.Config
		options map[string]string
	}{
		"default": {}, "tiny": {options: tiny}, "two devices": {devices: twoDevices, options: tiny},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, c.devices, size, c.options)
			var cookie uint64
			rapid.Check(t, func(rt *rapid.T) {
				segments := drawSegments(rt, size)
				fill(r.near, rapid.Uint64Range(0, 255).Draw(rt, "near"))
				fill(r.far, rapid.Uint64Range(256, 511).Draw(rt, "far"))
				wantNear, wantFar := bytes.Clone(r.near), bytes.Clone(r.far)
				op := rapid.SampledFrom([]backend.Op{backend.Write, backend.Read}).Draw(rt, "op")
				backendtest.Model(op, wantNear, wantFar, segments...)
				post := r.session.Post
				if rapid.Bool().Draw(rt, "wait") {
					post = r.session.PostWait
				}
				cookie++
				if err := post(backend.Transfer{Op: op, Segments: segments, Cookie: cookie}); err != nil {
					rt.Fatal(err)
				}
				clear(segments) // they are not the backend's any more
				if c := r.completions.Next(t); c.Err != nil || c.Cookie != cookie {
					rt.Fatalf("got %+v", c)
				}
				if !bytes.Equal(r.near, wantNear) || !bytes.Equal(r.far, wantFar) {
					rt.Fatalf("a %s of %d segments moved other bytes than its own", op, len(segments))
				}
			})
		})
	}
}

// TestOutcomesOfSegments compares with the plain meaning: a segment has the outcome that all its work requests have; where
// they differ, it is in doubt if one is, and has failed otherwise.
func TestOutcomesOfSegments(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		segments := rapid.IntRange(1, 8).Draw(rt, "segments")
		covers := make([][]backend.Outcome, segments)
		var wrs []coalesce.WR
		var fates []backend.Outcome
		for at := 0; at < segments; {
			last := rapid.IntRange(at, segments-1).Draw(rt, "last")
			fate := backend.Outcome(rapid.IntRange(0, 3).Draw(rt, "fate"))
			wrs, fates = append(wrs, coalesce.WR{First: uint32(at), Last: uint32(last)}), append(fates, fate)
			for i := at; i <= last; i++ {
				covers[i] = append(covers[i], fate)
			}
			at = last
			if last == segments-1 && rapid.Bool().Draw(rt, "over") || rapid.Bool().Draw(rt, "next") {
				at++
			}
		}
		got := outcomes(wrs, fates, segments)
		for i, all := range covers {
			want := backend.Failed
			switch {
			case slices.Contains(all, backend.InDoubt):
				want = backend.InDoubt
			case !slices.ContainsFunc(all, func(o backend.Outcome) bool { return o != all[0] }):
				want = all[0]
			}
			if got[i] != want {
				rt.Fatalf("segment %d, with work requests %v, is %s, not %s", i, all, got[i], want)
			}
		}
	})
}

func TestTransferQueue(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var q transferQueue
		var model []*transfer
		rt.Repeat(map[string]func(*rapid.T){
			"push": func(*rapid.T) {
				x := &transfer{}
				q.push(x)
				model = append(model, x)
			},
			"pop": func(rt *rapid.T) {
				if len(model) == 0 {
					rt.Skip()
				}
				if q.pop() != model[0] {
					rt.Fatal("not the first one")
				}
				model = model[1:]
			},
			"remove": func(rt *rapid.T) {
				if len(model) == 0 {
					rt.Skip()
				}
				i := rapid.IntRange(0, len(model)-1).Draw(rt, "index")
				q.remove(model[i])
				if model[i].queued {
					rt.Fatal("what was removed is queued")
				}
				model = slices.Delete(model, i, i+1)
			},
			"": func(rt *rapid.T) {
				var got []*transfer
				for x := q.first; x != nil; x = x.next {
					got = append(got, x)
				}
				if !slices.Equal(got, model) || len(model) > 0 && q.last != model[len(model)-1] {
					rt.Fatal(fmt.Sprintf("%d are queued, not %d", len(got), len(model)))
				}
			},
		})
	})
}
