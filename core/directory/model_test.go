package directory

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// model is a directory in the plainest terms: what a test can be sure of.
type model struct {
	now     time.Time
	nodes   map[string]*modelNode
	last    map[string]uint64          // the incarnation that joined last, by name
	gone    map[string]map[uint64]bool // those before it
	entries map[string]modelEntry
	numbers map[uint64]bool // of memberships that have begun
}

type modelEntry struct {
	Entry
	sequence uint64
}

type modelNode struct {
	node     Node
	deadline time.Time
	placed   uint64
	number   uint64
	floor    uint64
}

func newModel(now time.Time) *model {
	return &model{
		now: now, nodes: make(map[string]*modelNode), last: make(map[string]uint64),
		gone: make(map[string]map[uint64]bool), entries: make(map[string]modelEntry),
		numbers: map[uint64]bool{0: true},
	}
}

func (m *model) drop(name string) {
	delete(m.nodes, name)
	maps.DeleteFunc(m.entries, func(_ string, e modelEntry) bool { return e.Node == name })
}

func (m *model) advance(d time.Duration) {
	m.now = m.now.Add(d)
	for name, n := range m.nodes {
		if !m.now.Before(n.deadline) {
			m.drop(name)
		}
	}
}

func (m *model) member(p backend.Peer) *modelNode {
	if n := m.nodes[p.Node]; n != nil && n.node.Peer.Incarnation == p.Incarnation {
		return n
	}
	return nil
}

// join returns the number of the membership, 0 for a new one, and whether the node may join.
func (m *model) join(n Node) (number uint64, ok bool) {
	name, incarnation := n.Peer.Node, n.Peer.Incarnation
	if m.gone[name][incarnation] {
		return 0, false
	}
	if last := m.last[name]; last != 0 && last != incarnation {
		m.drop(name)
		if m.gone[name] == nil {
			m.gone[name] = make(map[uint64]bool)
		}
		m.gone[name][last] = true
	}
	m.last[name] = incarnation
	if m.nodes[name] == nil {
		m.nodes[name] = new(modelNode)
	}
	joined := m.nodes[name]
	joined.node, joined.deadline, joined.placed = n, m.now.Add(DefaultTTL), 0
	return joined.number, true
}

// room is what a node has free by our estimate.
func (n *modelNode) room() uint64 { return n.node.Free - min(n.node.Free, n.placed) }

func (n *modelNode) report(free uint64) { n.node.Free, n.placed = min(free, n.node.Capacity), 0 }

// checkPlace checks a reply of Place, key by key, and takes in what it has placed.
func (m *model) checkPlace(t *rapid.T, req *PlaceRequest, names []string) {
	var total uint64
	for i, key := range req.Keys {
		if _, ok := m.entries[key]; !ok {
			total += req.Sizes[i]
		}
	}
	// candidates are the nodes of the nearest tier that has room for size bytes; all others if none has.
	candidates := func(size uint64) (names []string, room bool) {
		var tiers [4][]string
		for name, n := range m.nodes {
			excluded := slices.ContainsFunc(req.Exclude, func(p backend.Peer) bool { return m.member(p) == n })
			if excluded || n.node.Capacity == 0 || n.node.Capacity < size {
				continue
			}
			switch {
			case n.room() < size:
				tiers[3] = append(tiers[3], name)
			case req.Policy.LocalFirst && m.member(req.Client) == n:
				tiers[0] = append(tiers[0], name)
			case req.Policy.LocalFirst && n.node.Peer.Host == req.Client.Host:
				tiers[1] = append(tiers[1], name)
			default:
				tiers[2] = append(tiers[2], name)
			}
		}
		for _, tier := range tiers[:3] {
			if len(tier) > 0 {
				slices.Sort(tier)
				best := slices.MaxFunc(tier, func(a, b string) int {
					if ra, rb := m.nodes[a].room(), m.nodes[b].room(); ra != rb {
						return map[bool]int{true: 1, false: -1}[ra > rb]
					}
					return strings.Compare(b, a)
				})
				return []string{best}, true
			}
		}
		return tiers[3], false
	}
	whole, fits := candidates(total)
	for i, key := range req.Keys {
		if e, ok := m.entries[key]; ok {
			if names[i] != "="+e.Node {
				t.Fatalf("key %q is at %q, and place says %q", key, e.Node, names[i])
			}
			continue
		}
		allowed, room := whole, true
		if !req.Policy.Together || !fits {
			allowed, room = candidates(req.Sizes[i])
		}
		if len(allowed) == 0 {
			allowed = []string{""}
		}
		if !slices.Contains(allowed, names[i]) {
			t.Fatalf("key %d of %d bytes goes to %q, not to one of %q", i, req.Sizes[i], names[i], allowed)
		}
		if room && (!req.Policy.Together || !fits) {
			m.nodes[names[i]].placed += req.Sizes[i]
		}
	}
	if req.Policy.Together && fits && total > 0 {
		m.nodes[whole[0]].placed += total
	}
}

func TestModel(t *testing.T) {
	for _, remote := range []bool{false, true} {
		t.Run(fmt.Sprintf("remote=%t", remote), func(t *testing.T) {
			c := newClock()
			// One server for all runs: each run starts with a directory of its own behind it.
			var current swap
			var d Directory = &current
			if remote {
				d = newClient(t, &current)
			}
			rapid.Check(t, func(t *rapid.T) {
				memory := NewMemory(Options{Now: c.Now})
				defer memory.Close()
				current.Directory = memory
				compare(t, d, memory, c)
			})
		})
	}
}

// swap is a directory that can be replaced.
type swap struct{ Directory }

// compare does the same to d and to a model, and compares what they say. Behind d is memory.
func compare(t *rapid.T, d Directory, memory *Memory, c *clock) {
	m := newModel(c.Now())
	names := rapid.SampledFrom([]string{"a", "b", "c"})
	keys := rapid.SliceOfN(rapid.StringMatching(`[xy][0-9]`), 0, 12)
	capacities := []uint64{0, 5, 20, 100}
	// Mostly in order, as a node draws them, so that floors do not refuse everything.
	var drawn uint64
	sequences := rapid.Custom(func(t *rapid.T) uint64 {
		drawn++
		return drawn - min(drawn, rapid.SampledFrom([]uint64{0, 0, 1, 2, 5}).Draw(t, "late"))
	})
	peer := func(t *rapid.T) backend.Peer {
		name := names.Draw(t, "node")
		return backend.Peer{
			Node: name, Incarnation: rapid.Uint64Range(1, 4).Draw(t, "incarnation"),
			Host: map[string]string{"a": "h1", "b": "h1", "c": "h2"}[name],
		}
	}
	// known draws one that may well be a member.
	known := func(t *rapid.T) backend.Peer {
		p := peer(t)
		if last := m.last[p.Node]; last != 0 && rapid.IntRange(0, 4).Draw(t, "current") > 0 {
			p.Incarnation = last
		}
		return p
	}
	sizes := func(t *rapid.T, n int) []uint64 {
		return rapid.SliceOfN(rapid.Uint64Range(0, 25), n, n).Draw(t, "sizes")
	}

	t.Repeat(map[string]func(*rapid.T){
		"join": func(t *rapid.T) {
			n := Node{Peer: known(t), Address: "x", Capacity: rapid.SampledFrom(capacities).Draw(t, "capacity")}
			n.Free = rapid.Uint64Range(0, n.Capacity).Draw(t, "free")
			reply, err := d.Join(ctx, &n)
			number, ok := m.join(n)
			if ok != (err == nil) || !ok && !errors.Is(err, backend.ErrPeerGone) {
				t.Fatalf("join: %v, accepted by the model: %t", err, ok)
			}
			if !ok {
				return
			}
			if number == 0 {
				if number = reply.Membership; m.numbers[number] {
					t.Fatalf("a new membership has the number %d, as an earlier one", number)
				}
				m.numbers[number] = true
				m.member(n.Peer).number = number
			}
			same(t, "join", reply, JoinReply{TTL: DefaultTTL, Membership: number})
		},
		"leave": func(t *rapid.T) {
			p := known(t)
			if err := d.Leave(ctx, p); err != nil {
				t.Fatal(err)
			}
			if m.member(p) != nil {
				m.drop(p.Node)
			}
		},
		"advance": func(t *rapid.T) {
			by := time.Duration(rapid.Int64Range(1, int64(DefaultTTL)).Draw(t, "by"))
			c.advance(by)
			m.advance(by)
		},
		"sweep": func(t *rapid.T) { memory.sweep() },
		"publish": func(t *rapid.T) {
			req := &PublishRequest{
				Peer: known(t), Sequence: sequences.Draw(t, "sequence"), Keys: keys.Draw(t, "keys"),
				Free: rapid.Uint64Range(0, 120).Draw(t, "free"),
			}
			req.Sizes = sizes(t, len(req.Keys))
			n := m.member(req.Peer)
			switch rapid.IntRange(0, 5).Draw(t, "membership") {
			case 0, 1:
			case 2:
				req.Membership = 1 // as good as never drawn
				n = nil
			default:
				if n != nil {
					req.Membership = n.number
				}
			}
			var reply PublishReply
			err := d.Publish(ctx, req, &reply)
			if n != nil && req.Sequence < n.floor {
				if !errors.Is(err, backend.ErrBusy) {
					t.Fatalf("publish with number %d below %d: %v", req.Sequence, n.floor, err)
				}
				return
			}
			if n == nil {
				if !errors.Is(err, backend.ErrPeerGone) {
					t.Fatalf("publish by %s, which is not a member: %v", req.Peer, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			n.report(req.Free)
			want := make([]bool, len(req.Keys))
			for i, key := range req.Keys {
				e, ok := m.entries[key]
				want[i] = !ok || e.Node == req.Peer.Node
				if want[i] && (!ok || req.Sequence >= e.sequence) {
					m.entries[key] = modelEntry{Entry{Key: key, Size: req.Sizes[i], Node: req.Peer.Node}, req.Sequence}
				}
			}
			if !slices.Equal(reply.Entered, want) {
				t.Fatalf("entered %v, want %v", reply.Entered, want)
			}
		},
		"withdraw": func(t *rapid.T) {
			req := &WithdrawRequest{
				Peer: known(t), Sequence: sequences.Draw(t, "sequence"), Floor: sequences.Draw(t, "floor"),
				Keys: keys.Draw(t, "keys"), Free: rapid.Uint64Range(0, 120).Draw(t, "free"),
			}
			if err := d.Withdraw(ctx, req); err != nil {
				t.Fatal(err)
			}
			if n := m.member(req.Peer); n != nil {
				n.report(req.Free)
				n.floor = max(n.floor, req.Floor)
				for _, key := range req.Keys {
					if e := m.entries[key]; e.Node == req.Peer.Node && e.sequence <= req.Sequence {
						delete(m.entries, key)
					}
				}
			}
		},
		"place": func(t *rapid.T) {
			req := &PlaceRequest{
				Client: peer(t), Keys: keys.Draw(t, "keys"), Exclude: rapid.SliceOfN(rapid.Custom(peer), 0, 2).Draw(t, "exclude"),
				Policy: Policy{LocalFirst: rapid.Bool().Draw(t, "local"), Together: rapid.Bool().Draw(t, "together")},
			}
			req.Sizes = sizes(t, len(req.Keys))
			m.checkPlace(t, req, place(t, d, req))
		},
		"locate": func(t *rapid.T) {
			drawn := keys.Draw(t, "keys")
			want := make([]string, len(drawn))
			for i, key := range drawn {
				want[i] = m.entries[key].Node
			}
			if got := locate(t, d, drawn...); !slices.Equal(got, want) {
				t.Fatalf("locate gave %q, want %q", got, want)
			}
		},
		"list": func(t *rapid.T) {
			req := &ListRequest{
				Prefix: rapid.SampledFrom([]string{"", "x", "y", "z"}).Draw(t, "prefix"),
				After:  rapid.SampledFrom([]string{"", "x3", "y", "y55"}).Draw(t, "after"),
				Limit:  rapid.IntRange(1, 5).Draw(t, "limit"),
			}
			want := &ListReply{Entries: []Entry{}}
			for _, key := range slices.Sorted(maps.Keys(m.entries)) {
				switch {
				case key <= req.After || !strings.HasPrefix(key, req.Prefix):
				case len(want.Entries) == req.Limit:
					want.More = true
				default:
					want.Entries = append(want.Entries, m.entries[key].Entry)
				}
			}
			got, err := d.List(ctx, req)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(got.Entries, want.Entries) || got.More != want.More {
				t.Fatalf("list gave %+v, want %+v", got, want)
			}
		},
		"": func(t *rapid.T) {
			got, err := memory.Nodes(ctx)
			if err != nil {
				t.Fatal(err)
			}
			var want []Node
			for _, name := range slices.Sorted(maps.Keys(m.nodes)) {
				want = append(want, m.nodes[name].node)
			}
			if !slices.Equal(got, want) {
				t.Fatalf("nodes are %+v, want %+v", got, want)
			}
			void, held := 0, make(map[*member]int)
			for _, e := range memory.entries {
				held[e.owner]++
				if e.owner.gone {
					void++
				}
			}
			for owner, n := range held {
				if !owner.gone && owner.entries != n {
					t.Fatalf("%s has %d entries and counts %d", owner.node.Peer, n, owner.entries)
				}
			}
			if void != memory.void {
				t.Fatalf("%d entries are void and %d are counted", void, memory.void)
			}
		},
	})
}

// A page is what sorting everything gives, whatever comes in which order.
func TestPageIsExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		keys := rapid.SliceOf(rapid.StringMatching(`[a-c]{1,4}`)).Draw(t, "keys")
		p := page{size: rapid.IntRange(1, 8).Draw(t, "size")}
		for _, key := range keys {
			p.add(Entry{Key: key})
			if p.full() {
				p.shrink()
			}
		}
		p.shrink()
		var got []string
		for _, e := range p.entries {
			got = append(got, e.Key)
		}
		slices.Sort(keys)
		want := slices.Compact(keys)
		want = want[:min(len(want), p.size)]
		if !slices.Equal(got, want) {
			t.Fatalf("got %q, want %q", got, want)
		}
	})
}

func TestAddSizes(t *testing.T) {
	for _, tc := range [][3]uint64{
		{1, 2, 3}, {math.MaxUint64, 0, math.MaxUint64}, {math.MaxUint64 - 1, 1, math.MaxUint64},
		{math.MaxUint64, 1, math.MaxUint64}, {math.MaxUint64, math.MaxUint64, math.MaxUint64},
	} {
		if got := addSizes(tc[0], tc[1]); got != tc[2] {
			t.Errorf("%d + %d = %d, want %d", tc[0], tc[1], got, tc[2])
		}
	}
}
