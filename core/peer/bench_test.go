package peer

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkStore is the books alone, without a directory.
func BenchmarkStore(b *testing.B) {
	s := newBench(b, StoreOptions{Regions: []int{2 * benchKeys * benchPages}})
	allocate := &AllocateRequest{Client: alice}
	for i := range benchKeys {
		allocate.Keys = append(allocate.Keys, fmt.Sprintf("model/layer-00/block-%016x", i))
		allocate.Sizes = append(allocate.Sizes, benchPages*testPage)
	}
	commit := &CommitRequest{Client: alice, Slots: make([]CommitSlot, benchKeys)}
	var p Publication
	for range benchKeys {
		p.Reply.Entered = append(p.Reply.Entered, true)
	}
	entered := p.Reply.Entered
	var allocated AllocateReply
	var committed CommitReply
	var resolved ResolveReply
	var removed RemoveReply
	b.ReportAllocs()
	measure(b, []benchCall{
		{"allocate", func() error { return s.Allocate(allocate, &allocated) }},
		{"commit", func() error {
			for i, slot := range allocated.Slots {
				commit.Slots[i] = CommitSlot{ID: slot.ID}
			}
			s.Commit(commit, &committed, &p)
			return nil
		}},
		{"settle", func() error {
			p.Reply.Entered = entered
			s.Settle(&p)
			return nil
		}},
		{"resolve", func() error { return s.Resolve(&ResolveRequest{Client: bob, Keys: allocate.Keys}, &resolved) }},
		{"release", func() error {
			s.Release(&ReleaseRequest{Client: bob, Lease: resolved.Lease}, new(ReleaseReply))
			return nil
		}},
		{"remove", func() error {
			s.Remove(&RemoveRequest{Keys: allocate.Keys}, &removed)
			return nil
		}},
	})
}

// The batch of the benchmark that the project is measured by: 256 values of 64 pages.
const (
	benchKeys  = 256
	benchPages = 64
)

func BenchmarkBatch(b *testing.B) {
	b.Run("direct", func(b *testing.B) {
		benchmarkBatch(b, newWorld(b, 2*benchKeys*benchPages, nil).start())
	})
	b.Run("grpc over a unix socket", func(b *testing.B) {
		path := filepath.Join(b.TempDir(), "node.sock")
		lis, err := net.Listen("unix", path)
		if err != nil {
			b.Fatal(err)
		}
		w := newWorld(b, 2*benchKeys*benchPages, nil).start()
		benchmarkBatch(b, w.overGRPC(lis, func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}))
	})
}

// benchmarkBatch measures each call by itself, per key, on the way through the life of a batch.
func benchmarkBatch(b *testing.B, w *world) {
	ctx := context.Background()
	allocate := &AllocateRequest{Client: alice, To: self.Incarnation}
	for i := range benchKeys {
		allocate.Keys = append(allocate.Keys, fmt.Sprintf("model/layer-00/block-%016x", i))
		allocate.Sizes = append(allocate.Sizes, benchPages*testPage)
	}
	commit := &CommitRequest{Client: alice, To: self.Incarnation, Slots: make([]CommitSlot, benchKeys)}
	resolve := &ResolveRequest{Client: alice, To: self.Incarnation, Keys: allocate.Keys}
	release := &ReleaseRequest{Client: alice, To: self.Incarnation}
	remove := &RemoveRequest{To: self.Incarnation, Keys: allocate.Keys}
	var allocated AllocateReply
	var committed CommitReply
	var resolved ResolveReply
	var removed RemoveReply
	b.ReportAllocs()
	measure(b, []benchCall{
		{"allocate", func() error { return w.svc.Allocate(ctx, allocate, &allocated) }},
		{"commit", func() error {
			for i, s := range allocated.Slots {
				commit.Slots[i] = CommitSlot{ID: s.ID}
			}
			return w.svc.Commit(ctx, commit, &committed)
		}},
		{"resolve", func() error { return w.svc.Resolve(ctx, resolve, &resolved) }},
		{"release", func() error {
			release.Lease = resolved.Lease
			return w.svc.Release(ctx, release, new(ReleaseReply))
		}},
		{"remove", func() error { return w.svc.Remove(ctx, remove, &removed) }},
	})
}

type benchCall struct {
	name string
	call func() error
}

// measure makes the calls one after the other, over and over, and reports what each costs.
func measure(b *testing.B, calls []benchCall) {
	spent := make([]time.Duration, len(calls))
	for b.Loop() {
		for i, c := range calls {
			since := time.Now()
			err := c.call()
			spent[i] += time.Since(since)
			if err != nil {
				b.Fatal(c.name, err)
			}
		}
	}
	for i, c := range calls {
		b.ReportMetric(float64(spent[i].Nanoseconds())/float64(b.N)/benchKeys, c.name+"-ns/key")
	}
}
