package directory

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

const (
	batchSize  = 256
	benchNodes = 8
)

// batchOf returns the keys of one batch, as long as a hash in hexadecimal digits, and their sizes.
func batchOf(i int) ([]string, []uint64) {
	keys, sizes := make([]string, batchSize), make([]uint64, batchSize)
	for j := range keys {
		// Multiplying by an odd number scatters the keys.
		keys[j] = fmt.Sprintf("%064x", uint64(i*batchSize+j)*0x9e3779b97f4a7c15)
		sizes[j] = 1 << 20
	}
	return keys, sizes
}

// benchDirectory returns a directory with the given number of entries, the batches that they were published in, and
// batches of keys that are not there.
func benchDirectory(b *testing.B, entries int) (d *Memory, there, absent [][]string, sizes []uint64) {
	b.Helper()
	d = newMemory(b, Options{Now: newClock().Now})
	nodes := make([]*Node, benchNodes)
	for i := range nodes {
		nodes[i] = node(fmt.Sprint("n", i), 1<<40)
		join(b, d, nodes[i])
	}
	for i := range entries / batchSize {
		var keys []string
		keys, sizes = batchOf(i)
		req := &PublishRequest{Peer: nodes[i%benchNodes].Peer, Keys: keys, Sizes: sizes}
		if err := d.Publish(ctx, req, new(PublishReply)); err != nil {
			b.Fatal(err)
		}
		there = append(there, keys)
	}
	for i := range 64 {
		keys, _ := batchOf(entries + i)
		absent = append(absent, keys)
	}
	return d, there, absent, sizes
}

// perKey runs call with a batch number and reports the time for each key.
func perKey(b *testing.B, call func(i int) error) {
	b.Helper()
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if err := call(i); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/batchSize, "ns/key")
}

// With few entries the processor's caches hold them; with many, each key waits for memory.
func BenchmarkMemory(b *testing.B) {
	for _, entries := range []int{1 << 14, 1 << 20} {
		b.Run(fmt.Sprintf("entries=%d", entries), func(b *testing.B) {
			d, there, absent, sizes := benchDirectory(b, entries)
			benchCalls(b, d, there, absent, sizes)
		})
	}
}

func BenchmarkUnixSocket(b *testing.B) {
	d, there, absent, sizes := benchDirectory(b, 1<<14)
	path := filepath.Join(b.TempDir(), "directory")
	l, err := net.Listen("unix", path)
	if err != nil {
		b.Fatal(err)
	}
	cc := serve(b, d, l, func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	})
	benchCalls(b, NewClient(cc), there, absent, sizes)
}

func benchCalls(b *testing.B, d Directory, there, absent [][]string, sizes []uint64) {
	b.Helper()
	peers := make([]backend.Peer, benchNodes)
	for i := range peers {
		peers[i] = node(fmt.Sprint("n", i), 0).Peer
	}
	b.Run("Locate", func(b *testing.B) {
		var reply LocateReply
		perKey(b, func(i int) error {
			return d.Locate(ctx, &LocateRequest{Keys: there[i*7919%len(there)]}, &reply)
		})
	})
	for name, policy := range map[string]Policy{"Together": {Together: true}, "Spread": {}} {
		b.Run("Place"+name, func(b *testing.B) {
			var reply PlaceReply
			perKey(b, func(i int) error {
				return d.Place(ctx, &PlaceRequest{Keys: absent[i%len(absent)], Sizes: sizes, Policy: policy}, &reply)
			})
		})
	}
	b.Run("PlaceExisting", func(b *testing.B) {
		var reply PlaceReply
		perKey(b, func(i int) error {
			return d.Place(ctx, &PlaceRequest{Keys: there[i*7919%len(there)], Sizes: sizes}, &reply)
		})
	})
	b.Run("PublishAgain", func(b *testing.B) {
		var reply PublishReply
		perKey(b, func(i int) error {
			i = i * 7919 % len(there)
			req := &PublishRequest{Peer: peers[i%benchNodes], Keys: there[i], Sizes: sizes}
			return d.Publish(ctx, req, &reply)
		})
	})
	// One publish of keys that are not there, and one withdrawal to make room for the next.
	b.Run("PublishNewAndWithdraw", func(b *testing.B) {
		var reply PublishReply
		perKey(b, func(i int) error {
			keys, peer := absent[i%len(absent)], peers[i%benchNodes]
			if err := d.Publish(ctx, &PublishRequest{Peer: peer, Keys: keys, Sizes: sizes}, &reply); err != nil {
				return err
			}
			return d.Withdraw(ctx, &WithdrawRequest{Peer: peer, Keys: keys})
		})
	})
}

// A page of a listing walks over all entries.
func BenchmarkList(b *testing.B) {
	d, _, _, _ := benchDirectory(b, 1<<20)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := d.List(ctx, &ListRequest{}); err != nil {
			b.Fatal(err)
		}
	}
}
