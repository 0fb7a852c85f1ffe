package directory

import (
	"context"
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// hosted returns a node on the given host.
func hosted(name, host string, capacity, free uint64) *Node {
	n := node(name, capacity)
	n.Peer.Host, n.Free = host, free
	return n
}

func TestPlace(t *testing.T) {
	spread, together := Policy{}, Policy{Together: true}
	local := Policy{LocalFirst: true}
	localTogether := Policy{LocalFirst: true, Together: true}
	// c has the most room, then b, then a; a and b share a host.
	cluster := []*Node{
		hosted("a", "h1", 1000, 30), hosted("b", "h1", 1000, 40), hosted("c", "h2", 1000, 50), hosted("client-only", "h1", 0, 0),
	}
	full := []*Node{hosted("a", "h1", 100, 0), hosted("b", "h1", 200, 0), hosted("c", "h2", 100, 0)}
	a := cluster[0].Peer
	for _, tc := range []struct {
		name    string
		nodes   []*Node
		client  backend.Peer
		policy  Policy
		exclude []string
		sizes   []uint64
		want    []string
	}{
		{"no nodes", nil, a, spread, nil, []uint64{1}, []string{""}},
		{"no keys", cluster, a, spread, nil, nil, []string{}},
		{"most room first", cluster, a, spread, nil, []uint64{15, 15, 15}, []string{"c", "b", "c"}},
		{"ties by name", cluster, a, spread, nil, []uint64{10, 10}, []string{"c", "b"}},
		{"together", cluster, a, together, nil, []uint64{20, 20, 10}, []string{"c", "c", "c"}},
		{"together does not fit", cluster, a, together, nil, []uint64{20, 20, 20}, []string{"c", "b", "a"}},
		{"local first", cluster, a, local, nil, []uint64{20, 20, 20, 20, 20}, []string{"a", "b", "b", "c", "c"}},
		{"local and together", cluster, a, localTogether, nil, []uint64{10, 20}, []string{"a", "a"}},
		{"together on the host", cluster, a, localTogether, nil, []uint64{20, 20}, []string{"b", "b"}},
		{"together far away", cluster, a, localTogether, nil, []uint64{25, 25}, []string{"c", "c"}},
		{"client is no node", cluster, backend.Peer{Node: "x", Host: "h1"}, local, nil, []uint64{30, 30}, []string{"b", "a"}},
		{"client is an older incarnation", cluster, backend.Peer{Node: "a", Incarnation: 9}, local, nil, []uint64{5}, []string{"c"}},
		{"hosts without a name are not shared", []*Node{hosted("a", "", 9, 1), hosted("b", "", 9, 2)},
			backend.Peer{Node: "a", Incarnation: 1}, local, nil, []uint64{2}, []string{"b"}},
		{"excluded", cluster, a, together, []string{"c"}, []uint64{30}, []string{"b"}},
		{"all excluded", cluster, a, spread, []string{"a", "b", "c"}, []uint64{1}, []string{""}},
		{"too large for any", cluster, a, spread, nil, []uint64{1001, 1}, []string{"", "c"}},
		{"room for some, eviction for others", cluster, a, spread, nil, []uint64{50, 1000}, []string{"c", "a"}},
		{"sum overflows", cluster, a, together, nil, []uint64{math.MaxUint64, math.MaxUint64, 2}, []string{"", "", "c"}},
		{"turns by capacity", full, a, spread, nil, []uint64{10, 10, 10, 10, 10, 10, 10, 10},
			[]string{"b", "a", "c", "b", "b", "a", "c", "b"}},
		{"only one is large enough", full, a, spread, nil, []uint64{150, 150, 10}, []string{"b", "b", "a"}},
		{"eviction together", full, a, together, nil, []uint64{60, 60, 60, 60, 60}, []string{"b", "b", "b", "a", "c"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			each(t, func(t *testing.T, d Directory, _ *clock) {
				for _, n := range tc.nodes {
					join(t, d, n)
				}
				req := &PlaceRequest{Client: tc.client, Sizes: tc.sizes, Policy: tc.policy}
				for i := range tc.sizes {
					req.Keys = append(req.Keys, fmt.Sprint("k", i))
				}
				for _, name := range tc.exclude {
					req.Exclude = append(req.Exclude, node(name, 0).Peer)
				}
				same(t, "places", place(t, d, req), tc.want)
			})
		})
	}
}

func TestPlaceTellsWhatExists(t *testing.T) {
	each(t, func(t *testing.T, d Directory, _ *clock) {
		a, b := node("a", 100), node("b", 50)
		join(t, d, a)
		join(t, d, b)
		publish(t, d, b, "k1", "k3")
		req := &PlaceRequest{
			Keys: []string{"k0", "k1", "k2", "k3"}, Sizes: []uint64{50, 50, 50, 50}, Policy: Policy{Together: true},
			Exclude: []backend.Peer{b.Peer}, // which says where not to put, not what to forget
		}
		same(t, "places", place(t, d, req), []string{"a", "=b", "a", "=b"})
	})
}

// What has been placed counts until the node says anew what it has free.
func TestBurst(t *testing.T) {
	each(t, func(t *testing.T, d Directory, _ *clock) {
		a, b := node("a", 100), node("b", 80)
		join(t, d, a)
		join(t, d, b)
		one := &PlaceRequest{Keys: []string{"k"}, Sizes: []uint64{30}, Policy: Policy{Together: true}}
		var got []string
		for range 4 {
			got = append(got, place(t, d, one)...)
		}
		same(t, "burst", got, []string{"a", "b", "a", "b"})
		publish(t, d, b) // it has 80 free, as before
		same(t, "after b's report", place(t, d, one), []string{"b"})
		join(t, d, a)
		same(t, "after a's report", place(t, d, one), []string{"a"})
		a.Free = 0
		if err := d.Withdraw(ctx, &WithdrawRequest{Peer: a.Peer, Free: a.Free}); err != nil {
			t.Fatal(err)
		}
		same(t, "when a is full", place(t, d, one), []string{"b"})
	})
}

// Nodes that are full evict in proportion to their capacity, from one batch to the next, whatever they report in
// between; one that joins full takes part without having saved up turns.
func TestTurnsAcrossBatches(t *testing.T) {
	d := newMemory(t, Options{Now: newClock().Now})
	count := func(batches int) map[string]int {
		counts := make(map[string]int)
		for range batches {
			req := &PlaceRequest{Keys: []string{"x", "y"}, Sizes: []uint64{1, 1}, Policy: Policy{Together: true}}
			for _, name := range place(t, d, req) {
				counts[name]++
				join(t, d, d.members[slices.IndexFunc(d.members, func(m *member) bool {
					return m.node.Peer.Node == name
				})].fullNode())
			}
		}
		return counts
	}
	join(t, d, hosted("a", "", 1024, 0))
	join(t, d, hosted("b", "", 2048, 0))
	same(t, "two nodes", count(300), map[string]int{"a": 200, "b": 400})
	join(t, d, hosted("c", "", 1024, 0))
	same(t, "three nodes", count(400), map[string]int{"a": 200, "b": 400, "c": 200})
}

// fullNode returns the node as it joins again when it is full.
func (m *member) fullNode() *Node {
	n := m.node
	n.Free = 0
	return &n
}

// The heaps that spread a large batch give what choosing from all nodes for each key gives.
func TestSpreadIsExact(t *testing.T) {
	d := newMemory(t, Options{Now: newClock().Now})
	room := make(map[string]uint64)
	for i := range 50 {
		n := node(fmt.Sprintf("n%02d", i), 10_000)
		n.Free = uint64(i * 7919 % 2003)
		join(t, d, n)
		room[n.Peer.Node] = n.Free
	}
	req := &PlaceRequest{}
	var want []string
	for i := range 400 {
		size := uint64(i*104729%97 + 1)
		req.Keys = append(req.Keys, fmt.Sprint(i))
		req.Sizes = append(req.Sizes, size)
		best := ""
		for name, free := range room {
			if best == "" || free > room[best] || free == room[best] && name < best {
				best = name
			}
		}
		if room[best] < size {
			t.Fatal("the test has to stay within what is free")
		}
		room[best] -= size
		want = append(want, best)
	}
	same(t, "places", place(t, d, req), want)
}

func TestNoAllocation(t *testing.T) {
	d := newMemory(t, Options{})
	for i := range 10 {
		join(t, d, hosted(fmt.Sprint("n", i), "", 1<<20, uint64(i)))
	}
	keys, sizes := batchOf(0)
	peer := d.members[0].node.Peer
	var published PublishReply
	var placed PlaceReply
	var located LocateReply
	pub := &PublishRequest{Peer: peer, Keys: keys, Sizes: sizes}
	fresh, _ := batchOf(1)
	calls := map[string]func() error{
		"publish":        func() error { return d.Publish(context.Background(), pub, &published) },
		"place existing": func() error { return d.Place(ctx, &PlaceRequest{Keys: keys, Sizes: sizes}, &placed) },
		"place new":      func() error { return d.Place(ctx, &PlaceRequest{Keys: fresh, Sizes: sizes}, &placed) },
		"locate":         func() error { return d.Locate(ctx, &LocateRequest{Keys: keys}, &located) },
	}
	for _, name := range []string{"publish", "place existing", "place new", "locate"} {
		call := calls[name]
		n := testing.AllocsPerRun(50, func() {
			if err := call(); err != nil {
				t.Fatal(err)
			}
		})
		// The collector may empty the pool of scratch memory at any time: a few for the call, none for the keys.
		if n > 10 {
			t.Errorf("%s of %d keys allocates %v times", name, len(keys), n)
		}
	}
}
