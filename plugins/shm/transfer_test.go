package shm

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"slices"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

// The regions of the property tests are larger than several parts, and end at odd places.
const (
	nearSize = 3<<20 + 4567
	farSize  = 4<<20 + 321
)

// drawSegments draws a transfer: destinations do not overlap, sources may.
func drawSegments(t *rapid.T, op backend.Op) []backend.Segment {
	destination, source := uint64(farSize), uint64(nearSize)
	if op == backend.Read {
		destination, source = source, destination
	}
	length := rapid.OneOf(
		rapid.Uint64Range(1, 100), rapid.Just(uint64(4096)),
		rapid.Uint64Range(1, 1<<17), rapid.Uint64Range(1<<20-5, 5<<19),
	)
	gap := rapid.OneOf(rapid.Just(uint64(0)), rapid.Uint64Range(0, 1<<18))
	var list []backend.Segment
	at := gap.Draw(t, "first gap")
	for range rapid.IntRange(1, 80).Draw(t, "segments") {
		n := min(length.Draw(t, "length"), source)
		if n > destination-min(at, destination) {
			break
		}
		from := rapid.Uint64Range(0, source-n).Draw(t, "source")
		s := backend.Segment{Local: from, Remote: at, Length: n}
		if op == backend.Read {
			s.Local, s.Remote = at, from
		}
		list = append(list, s)
		at += n + gap.Draw(t, "gap")
	}
	if len(list) == 0 {
		list = []backend.Segment{{Length: 1}}
	}
	slices.SortFunc(list, func(a, b backend.Segment) int { return cmp.Compare(a.Remote, b.Remote) })
	return list
}

// checkTransfers moves random transfers and compares both whole regions with the model after each.
func checkTransfers(t *testing.T, s backend.Session, k *sink, near []byte, refill func(seed uint64), sum func() [sha256.Size]byte) {
	wantNear, wantFar := make([]byte, nearSize), make([]byte, farSize)
	fill(near, 1)
	fill(wantNear, 1)
	refill(2)
	fill(wantFar, 2)
	cookie := uint64(0)
	rapid.Check(t, func(rt *rapid.T) {
		cookie++
		op := rapid.SampledFrom([]backend.Op{backend.Write, backend.Read}).Draw(rt, "op")
		segments := drawSegments(rt, op)
		seed := rapid.Uint64Range(0, 1000).Draw(rt, "seed")
		if op == backend.Write { // so that each transfer has something new to move
			fill(near[:1<<16], seed)
			fill(wantNear[:1<<16], seed)
		}
		if err := post(s, op, cookie, segments...); err != nil {
			rt.Fatal(err)
		}
		if c := k.Wait(t, cookie); c.Err != nil {
			rt.Fatal(c.Err)
		}
		backendtest.Model(op, wantNear, wantFar, segments...)
		if !bytes.Equal(near, wantNear) {
			rt.Fatalf("%s: the local region is wrong", op)
		}
		if sum() != sha256.Sum256(wantFar) {
			rt.Fatalf("%s: the remote region is wrong", op)
		}
	})
}

func TestBytesInOneProcess(t *testing.T) {
	for _, inline := range []string{"0", "64KiB"} {
		t.Run("inline "+inline, func(t *testing.T) {
			a := newInstance(t, peer("a", 1), "inline_bytes="+inline, "workers=3")
			b := newInstance(t, peer("b", 2))
			near, far := memory(t, 1, nearSize, 0), memory(t, 2, farSize, all)
			register(t, a, near)
			remote := register(t, b, far)
			k := new(sink)
			s := bind(t, connect(t, a, b.self, b), 1, remote, k)
			checkTransfers(t, s, k, near.Bytes,
				func(seed uint64) { fill(far.Bytes, seed) },
				func() [sha256.Size]byte { return sha256.Sum256(far.Bytes) })
		})
	}
}

func TestBytesAcrossProcesses(t *testing.T) {
	a := newInstance(t, peer("a", 1), "workers=3")
	b := startChild(t, peer("b", 2))
	near := memory(t, 1, nearSize, 0)
	register(t, a, near)
	remote := b.Register(t, regionArgs{ID: 7, Size: farSize, Rights: all})
	k := new(sink)
	s := bind(t, connect(t, a, b.Self, b), 1, remote, k)
	checkTransfers(t, s, k, near.Bytes,
		func(seed uint64) { must(t, b.Call("Fill", regionArgs{ID: 7, Seed: seed}, nil)) },
		func() (sum [sha256.Size]byte) {
			must(t, b.Call("Sum", backend.RegionID(7), &sum))
			return sum
		})
}

// TestManySessions has goroutines share one endpoint, a session each, on neighbouring parts of the regions.
func TestManySessions(t *testing.T) {
	const users, rounds, share = 8, 30, 96 << 10
	a := newInstance(t, peer("a", 1), "workers=4", "window=4")
	b := newInstance(t, peer("b", 2))
	near, far := memory(t, 1, users*share, 0), memory(t, 2, users*share, all)
	fill(near.Bytes, 9)
	register(t, a, near)
	remote := register(t, b, far)
	e := connect(t, a, b.self, b)
	var group sync.WaitGroup
	sinks := make([]sink, users)
	for u := range uint64(users) {
		k := &sinks[u]
		group.Go(func() {
			s, err := e.Session(soon(t), 1, remote, k)
			if err != nil {
				t.Error(err)
				return
			}
			for cookie := range uint64(rounds) {
				// Odd rounds are copied inline, even ones by the workers.
				length := uint64(share)
				if cookie%2 == 1 {
					length /= 2
				}
				err := backendtest.PostWhenFree(s, backend.Write, cookie, backend.Segment{Local: u * share, Remote: u * share, Length: length})
				if err != nil {
					t.Error(err)
				}
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	for i := range sinks {
		if n := len(sinks[i].All(t)); n != rounds {
			t.Errorf("%d transfers completed, want %d", n, rounds)
		}
	}
	wantSame(t, "remote region", far.Bytes, near.Bytes)
}
