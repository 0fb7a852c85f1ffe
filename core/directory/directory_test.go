package directory

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

var ctx = context.Background()

// same fails the test when got is not want.
func same(t tb, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func TestMembership(t *testing.T) {
	each(t, func(t *testing.T, d Directory, c *clock) {
		b, a := node("b", 100), node("a", 200)
		same(t, "first join", join(t, d, b).TTL, DefaultTTL)
		join(t, d, a)
		got, err := d.Nodes(ctx)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "nodes", got, []Node{*a, *b})

		c.advance(DefaultTTL - 1)
		a.Address, a.Capacity, a.Free = "elsewhere:1", 300, 10
		join(t, d, a)
		c.advance(1)
		got, err = d.Nodes(ctx)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "nodes after b's time has run out", got, []Node{*a})

		if err := d.Leave(ctx, backend.Peer{Node: "a", Incarnation: 99}); err != nil {
			t.Fatal(err)
		}
		publish(t, d, a, "k") // another incarnation's leave is ignored
		if err := d.Leave(ctx, a.Peer); err != nil {
			t.Fatal(err)
		}
		same(t, "owner after leave", locate(t, d, "k"), []string{""})
		got, err = d.Nodes(ctx)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "number of nodes after leave", len(got), 0)
	})
}

func TestExpiryVoidsEntries(t *testing.T) {
	each(t, func(t *testing.T, d Directory, c *clock) {
		a, b := node("a", 100), node("b", 100)
		first := join(t, d, a)
		publish(t, d, a, "k1", "k2")
		c.advance(DefaultTTL / 2)
		join(t, d, b)
		same(t, "refused by the holder", publish(t, d, b, "k1"), []bool{false})
		c.advance(DefaultTTL / 2)

		same(t, "owner", locate(t, d, "k1"), []string{""})
		same(t, "place", place(t, d, &PlaceRequest{Keys: []string{"k1", "k2"}, Sizes: []uint64{1, 1}}), []string{"b", "b"})
		same(t, "entered over void entries", publish(t, d, b, "k1"), []bool{true})
		same(t, "owners", locate(t, d, "k1", "k2"), []string{"b", ""})

		if again := join(t, d, a); again.Membership == first.Membership {
			t.Errorf("a comes back, and is not told that its entries are void: %+v", again)
		}
		same(t, "owners when a is back", locate(t, d, "k1", "k2"), []string{"b", ""})
		same(t, "a refills", publish(t, d, a, "k1", "k2"), []bool{false, true})
	})
}

// Each membership ends at its own time, however the others come and go.
func TestExpiryOfSeveral(t *testing.T) {
	each(t, func(t *testing.T, d Directory, c *clock) {
		const unit = DefaultTTL / 6
		members := func() (names string) {
			nodes, err := d.Nodes(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range nodes {
				names += n.Peer.Node
			}
			return names
		}
		var got []string
		for i := range 14 {
			for _, name := range []string{0: "a", 2: "b", 5: "c", 6: "b", 13: ""}[i] {
				join(t, d, node(string(name), 100))
			}
			got = append(got, members())
			c.advance(unit)
		}
		same(t, "members after each step", got, []string{
			"a", "a", "ab", "ab", "ab", "abc", "bc", "bc", "bc", "bc", "bc", "b", "", "",
		})
	})
}

// Every way of losing the entries shows in the number of the membership, and nothing else does: not the publication
// of one key by a node that has never heard that a new membership has begun.
func TestMembershipNumbers(t *testing.T) {
	each(t, func(t *testing.T, d Directory, c *clock) {
		a := node("a", 100)
		seen := map[uint64]bool{0: true}
		for i, lose := range []func(){
			func() {}, // an unknown incarnation
			func() { d.Leave(ctx, a.Peer) },
			func() { c.advance(DefaultTTL) },
			func() { a.Peer.Incarnation++ },
		} {
			lose()
			number := join(t, d, a).Membership
			if seen[number] {
				t.Errorf("%d: number %d again", i, number)
			}
			seen[number] = true
			same(t, "when it is renewed", join(t, d, a).Membership, number)
			publish(t, d, a, "k")
			same(t, "with an entry", join(t, d, a).Membership, number)
		}
	})
}

// What was sent in an earlier membership arrives too late.
func TestPublicationOfAnEarlierMembership(t *testing.T) {
	each(t, func(t *testing.T, d Directory, c *clock) {
		a := node("a", 100)
		late := &PublishRequest{Peer: a.Peer, Membership: join(t, d, a).Membership, Keys: []string{"k"}, Sizes: []uint64{1}}
		c.advance(DefaultTTL)
		now := join(t, d, a).Membership
		if err := d.Publish(ctx, late, new(PublishReply)); !errors.Is(err, backend.ErrPeerGone) {
			t.Errorf("publish: %v, want PeerGone", err)
		}
		same(t, "owner", locate(t, d, "k"), []string{""})
		late.Membership = now
		if err := d.Publish(ctx, late, new(PublishReply)); err != nil {
			t.Error(err)
		}
	})
}

// Of two requests for one key the younger holds, in whatever order they arrive.
func TestRequestsThatPassEachOther(t *testing.T) {
	each(t, func(t *testing.T, d Directory, c *clock) {
		a, b := node("a", 100), node("b", 100)
		publishAt := func(sequence, size uint64) error {
			var reply PublishReply
			err := d.Publish(ctx, &PublishRequest{
				Peer: a.Peer, Sequence: sequence, Keys: []string{"k"}, Sizes: []uint64{size},
			}, &reply)
			if err == nil && !reply.Entered[0] {
				t.Errorf("the publication with number %d has not entered its key", sequence)
			}
			return err
		}
		withdrawAt := func(n *Node, sequence, floor uint64) {
			err := d.Withdraw(ctx, &WithdrawRequest{Peer: n.Peer, Sequence: sequence, Floor: floor, Keys: []string{"k"}})
			if err != nil {
				t.Fatal(err)
			}
		}
		join(t, d, a)
		join(t, d, b)
		publishAt(5, 50)
		withdrawAt(a, 4, 0)
		same(t, "after an older withdrawal", locate(t, d, "k"), []string{"a"})
		publishAt(3, 30)
		list, err := d.List(ctx, &ListRequest{})
		if err != nil {
			t.Fatal(err)
		}
		same(t, "after an older publication", list.Entries, []Entry{{Key: "k", Size: 50, Node: "a"}})
		withdrawAt(a, 4, 0)
		same(t, "the older publication has not made it older", locate(t, d, "k"), []string{"a"})

		withdrawAt(a, 7, 7) // the publication with number 6 may yet arrive
		same(t, "after a younger withdrawal", locate(t, d, "k"), []string{""})
		if err := publishAt(6, 60); !errors.Is(err, backend.ErrBusy) {
			t.Errorf("publication below the floor: %v, want Busy", err)
		}
		same(t, "after the publication was refused", locate(t, d, "k"), []string{""})
		withdrawAt(a, 8, 2) // a floor does not sink
		if err := publishAt(6, 60); !errors.Is(err, backend.ErrBusy) {
			t.Errorf("publication below the older floor: %v, want Busy", err)
		}
		withdrawAt(b, 100, 100) // nor does it concern others
		if err := publishAt(9, 90); err != nil {
			t.Error(err)
		}
		same(t, "in the end", locate(t, d, "k"), []string{"a"})
	})
}

func TestNewIncarnation(t *testing.T) {
	each(t, func(t *testing.T, d Directory, c *clock) {
		old := node("a", 100)
		join(t, d, old)
		publish(t, d, old, "k")
		fresh := node("a", 100)
		fresh.Peer.Incarnation = 77
		join(t, d, fresh)
		same(t, "old entry", locate(t, d, "k"), []string{""})

		refused := func(when string) {
			t.Helper()
			if _, err := d.Join(ctx, old); !errors.Is(err, backend.ErrPeerGone) {
				t.Errorf("old incarnation joins %s: %v", when, err)
			}
			err := d.Publish(ctx, &PublishRequest{Peer: old.Peer, Keys: []string{"k"}, Sizes: []uint64{1}}, new(PublishReply))
			if !errors.Is(err, backend.ErrPeerGone) {
				t.Errorf("old incarnation publishes %s: %v", when, err)
			}
		}
		refused("after the new one")
		publish(t, d, fresh, "k")
		if err := d.Withdraw(ctx, &WithdrawRequest{Peer: old.Peer, Keys: []string{"k"}}); err != nil {
			t.Fatal(err)
		}
		same(t, "entry after the old one's withdrawal", locate(t, d, "k"), []string{"a"})
		if err := d.Leave(ctx, old.Peer); err != nil {
			t.Fatal(err)
		}
		same(t, "entry after the old one's leave", locate(t, d, "k"), []string{"a"})
		c.advance(DefaultTTL)
		refused("when the new one has run out")

		// An incarnation that ran out before another one came is replaced by it as well.
		third := node("a", 100)
		third.Peer.Incarnation = 5
		join(t, d, third)
		if _, err := d.Join(ctx, fresh); !errors.Is(err, backend.ErrPeerGone) {
			t.Errorf("second incarnation joins after the third: %v", err)
		}
	})
}

func TestPublishAndWithdraw(t *testing.T) {
	each(t, func(t *testing.T, d Directory, c *clock) {
		a, b := node("a", 100), node("b", 100)
		stranger := node("stranger", 1)
		err := d.Publish(ctx, &PublishRequest{Peer: stranger.Peer}, new(PublishReply))
		var e *backend.Error
		if !errors.As(err, &e) || e.Code != backend.PeerGone || e.Peer != stranger.Peer {
			t.Errorf("publish by a stranger: %v", err)
		}
		join(t, d, a)
		join(t, d, b)
		same(t, "first", publish(t, d, a, "k", "\xff\x00"), []bool{true, true})
		same(t, "again", publish(t, d, a, "k", "k"), []bool{true, true})
		same(t, "other node", publish(t, d, b, "l", "k"), []bool{true, false})
		same(t, "none", len(publish(t, d, b)), 0)

		req := &PublishRequest{Peer: a.Peer, Keys: []string{"k"}, Sizes: []uint64{math.MaxUint64}, Free: 7}
		if err := d.Publish(ctx, req, new(PublishReply)); err != nil {
			t.Fatal(err)
		}
		list, err := d.List(ctx, &ListRequest{})
		if err != nil {
			t.Fatal(err)
		}
		same(t, "list", list, &ListReply{Entries: []Entry{
			{Key: "k", Size: math.MaxUint64, Node: "a"}, {Key: "l", Size: 1, Node: "b"}, {Key: "\xff\x00", Size: 1, Node: "a"},
		}})
		nodes, err := d.Nodes(ctx)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "what a has free", nodes[0].Free, uint64(7))

		withdraw := &WithdrawRequest{Peer: b.Peer, Keys: []string{"k", "l", "unknown"}, Free: 101}
		if err := d.Withdraw(ctx, withdraw); err != nil {
			t.Fatal(err)
		}
		same(t, "owners", locate(t, d, "k", "l", "\xff\x00", "k"), []string{"a", "", "a", "a"})
		nodes, err = d.Nodes(ctx)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "what b has free is no more than its capacity", nodes[1].Free, uint64(100))
	})
}

func TestRepliesAreReused(t *testing.T) {
	each(t, func(t *testing.T, d Directory, c *clock) {
		a := node("a", 100)
		join(t, d, a)
		publish(t, d, a, "k")
		place := PlaceReply{Placements: make([]Placement, 5), Nodes: make([]Node, 5)}
		if err := d.Place(ctx, &PlaceRequest{Keys: []string{"k"}, Sizes: []uint64{1}}, &place); err != nil {
			t.Fatal(err)
		}
		same(t, "place", place, PlaceReply{Placements: []Placement{{Exists: true}}, Nodes: []Node{*a}})
		locate := LocateReply{At: make([]int, 5), Nodes: make([]Node, 5)}
		if err := d.Locate(ctx, &LocateRequest{Keys: []string{"?", "k"}}, &locate); err != nil {
			t.Fatal(err)
		}
		same(t, "locate", locate, LocateReply{At: []int{NoNode, 0}, Nodes: []Node{*a}})
		publish := PublishReply{Entered: []bool{false, false, false}}
		if err := d.Publish(ctx, &PublishRequest{Peer: a.Peer, Keys: []string{"k"}, Sizes: []uint64{1}}, &publish); err != nil {
			t.Fatal(err)
		}
		same(t, "publish", publish, PublishReply{Entered: []bool{true}})
	})
}

func TestBadRequests(t *testing.T) {
	each(t, func(t *testing.T, d Directory, c *clock) {
		a := node("a", 100)
		join(t, d, a)
		long := strings.Repeat("x", MaxKey+1)
		cancelled, cancel := context.WithCancel(ctx)
		cancel()
		withKeys := func(keys ...string) map[string]error {
			sizes := make([]uint64, len(keys))
			return map[string]error{
				"publish":  d.Publish(ctx, &PublishRequest{Peer: a.Peer, Keys: keys, Sizes: sizes}, new(PublishReply)),
				"withdraw": d.Withdraw(ctx, &WithdrawRequest{Peer: a.Peer, Keys: keys}),
				"place":    d.Place(ctx, &PlaceRequest{Keys: keys, Sizes: sizes}, new(PlaceReply)),
				"locate":   d.Locate(ctx, &LocateRequest{Keys: keys}, new(LocateReply)),
			}
		}
		check := func(what string, err error, code backend.Code, text string) {
			t.Helper()
			if backend.CodeOf(err) != code || err != nil && !strings.Contains(err.Error(), text) {
				t.Errorf("%s: got %v, want %v with %q", what, err, code, text)
			}
		}
		for what, err := range withKeys("k", "") {
			check(what, err, backend.BadRequest, "key 1 of 2 is empty")
		}
		for what, err := range withKeys(long, "k") {
			check(what, err, backend.BadRequest, "key 0 of 2 is 1025 bytes long; the limit is 1024")
		}
		for what, err := range withKeys(long[:MaxKey]) {
			check(what, err, 0, "")
		}
		check("sizes of publish", d.Publish(ctx, &PublishRequest{Peer: a.Peer, Keys: []string{"k"}}, new(PublishReply)),
			backend.BadRequest, "1 keys come with 0 sizes")
		check("sizes of place", d.Place(ctx, &PlaceRequest{Sizes: []uint64{1}}, new(PlaceReply)),
			backend.BadRequest, "0 keys come with 1 sizes")
		check("excluded", d.Place(ctx, &PlaceRequest{Exclude: make([]backend.Peer, MaxNodes+1)}, new(PlaceReply)),
			backend.BadRequest, "4097 nodes are excluded")
		for what, change := range map[string]func(n *Node){
			"no name":        func(n *Node) { n.Peer.Node = "" },
			"no incarnation": func(n *Node) { n.Peer.Incarnation = 0 },
			"long name":      func(n *Node) { n.Peer.Node = long[:MaxName+1] },
			"long host":      func(n *Node) { n.Peer.Host = long[:MaxName+1] },
			"long address":   func(n *Node) { n.Address = long[:MaxName+1] },
			"not UTF-8":      func(n *Node) { n.Peer.Node = "\xff" },
		} {
			n := *a
			change(&n)
			_, err := d.Join(ctx, &n)
			check(what, err, backend.BadRequest, "join: ")
		}
		for what, req := range map[string]*ListRequest{
			"limit": {Limit: -1}, "prefix": {Prefix: long}, "after": {After: long},
		} {
			_, err := d.List(ctx, req)
			check(what, err, backend.BadRequest, "list: ")
		}

		_, joinErr := d.Join(cancelled, a)
		_, nodesErr := d.Nodes(cancelled)
		_, listErr := d.List(cancelled, &ListRequest{})
		for what, err := range map[string]error{
			"join": joinErr, "nodes": nodesErr, "list": listErr,
			"leave":    d.Leave(cancelled, a.Peer),
			"publish":  d.Publish(cancelled, &PublishRequest{Peer: a.Peer}, new(PublishReply)),
			"withdraw": d.Withdraw(cancelled, &WithdrawRequest{Peer: a.Peer}),
			"place":    d.Place(cancelled, &PlaceRequest{}, new(PlaceReply)),
			"locate":   d.Locate(cancelled, &LocateRequest{}, new(LocateReply)),
		} {
			check(what+" cancelled", err, backend.Cancelled, "")
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s cancelled: %v is not context.Canceled", what, err)
			}
		}
	})
}

func TestMembersAreBounded(t *testing.T) {
	d := newMemory(t, Options{Now: newClock().Now})
	for i := range MaxNodes {
		join(t, d, node(fmt.Sprint("n", i), 1))
	}
	_, err := d.Join(ctx, node("one too many", 1))
	var e *backend.Error
	if !errors.As(err, &e) || e.Code != backend.Busy || e.RetryAfter == 0 {
		t.Errorf("join: %v", err)
	}
	join(t, d, node("n7", 1))
	// Names that come and go are forgotten at some point, and members never are.
	if err := d.Leave(ctx, node("n8", 1).Peer); err != nil {
		t.Fatal(err)
	}
	for i := range MaxNodes + 10 {
		name := node(fmt.Sprint("z", i), 1)
		join(t, d, name)
		if err := d.Leave(ctx, name.Peer); err != nil {
			t.Fatal(err)
		}
	}
	same(t, "records", len(d.records), 2*MaxNodes)
	same(t, "live records", len(d.members), MaxNodes-1)
	for _, m := range d.members {
		if d.member(m.node.Peer) != m {
			t.Fatalf("the record of %s is lost", m.node.Peer)
		}
	}
}

func TestReplacedIncarnationsAreBounded(t *testing.T) {
	d := newMemory(t, Options{Now: newClock().Now})
	n := node("a", 1)
	for i := range uint64(3 * replacedKept) {
		n.Peer.Incarnation = i + 1
		join(t, d, n)
	}
	same(t, "replaced", len(d.records["a"].replaced), replacedKept)
	n.Peer.Incarnation = 3*replacedKept - 1
	if _, err := d.Join(ctx, n); !errors.Is(err, backend.ErrPeerGone) {
		t.Errorf("the one before the last: %v", err)
	}
}

func TestList(t *testing.T) {
	each(t, func(t *testing.T, d Directory, c *clock) {
		a, b := node("a", 100), node("b", 100)
		join(t, d, a)
		join(t, d, b)
		var keys []string
		for i := range 3*step + 5 {
			keys = append(keys, fmt.Sprintf("%c/%d", 'x'+rune(i%2), i))
		}
		publish(t, d, a, keys[:step]...)
		publish(t, d, b, keys[step:]...)
		slices.Sort(keys)
		var x []string
		for _, key := range keys {
			if strings.HasPrefix(key, "x/") {
				x = append(x, key)
			}
		}
		for _, tc := range []struct {
			req  ListRequest
			want []string
			more bool
		}{
			{ListRequest{}, keys[:1000], true},
			{ListRequest{Limit: 1}, keys[:1], true},
			{ListRequest{Limit: math.MaxInt}, keys[:10_000], true},
			{ListRequest{Limit: 10_000, After: keys[9_999]}, keys[10_000:], false},
			{ListRequest{Limit: len(x), Prefix: "x/"}, x, false},
			{ListRequest{Limit: len(x) - 1, Prefix: "x/"}, x[:len(x)-1], true},
			{ListRequest{Limit: 50, Prefix: "x/", After: x[99]}, x[100:150], true},
			{ListRequest{Prefix: "x/", After: "y"}, nil, false},
			{ListRequest{Prefix: "none"}, nil, false},
		} {
			reply, err := d.List(ctx, &tc.req)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, e := range reply.Entries {
				got = append(got, e.Key)
			}
			same(t, fmt.Sprintf("%+v", tc.req), got, tc.want)
			same(t, fmt.Sprintf("more after %+v", tc.req), reply.More, tc.more)
		}
		c.advance(DefaultTTL)
		reply, err := d.List(ctx, &ListRequest{})
		if err != nil {
			t.Fatal(err)
		}
		same(t, "list when nobody is left", len(reply.Entries), 0)
	})
}

// A listing may be cut by its size on the way, and goes on after the cut.
func TestListOfLongKeys(t *testing.T) {
	d := newMemory(t, Options{Now: newClock().Now})
	client := newClient(t, d)
	a := node("a", 100)
	join(t, d, a)
	var want []string
	for i := range 5000 {
		want = append(want, fmt.Sprintf("%0*d", MaxKey, i))
	}
	publish(t, client, a, want...)
	var got []string
	pages := 0
	for after, more := "", true; more; pages++ {
		reply, err := client.List(ctx, &ListRequest{After: after, Limit: 5000})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range reply.Entries {
			got = append(got, e.Key)
		}
		after, more = got[len(got)-1], reply.More
	}
	same(t, "keys", got, want)
	same(t, "pages", pages, 5)
}

// A batch that one message does not hold goes in parts, and the caller sees one reply.
func TestLargeBatches(t *testing.T) {
	for _, tc := range []struct {
		name            string
		keys, keyLength int
	}{
		{"many keys", maxMessageKeys + 3, 8},
		{"long keys", 3*maxMessageText/MaxKey + 3, MaxKey},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newMemory(t, Options{Now: newClock().Now})
			client := newClient(t, d)
			nodes := []*Node{node("a", 1<<40), node("b", 1<<40)}
			for _, n := range nodes {
				join(t, client, n)
			}
			keys := make([]string, tc.keys)
			for i := range keys {
				keys[i] = fmt.Sprintf("%0*d", tc.keyLength, i)
			}
			publish(t, d, nodes[0], keys[:5]...)
			entered := publish(t, client, nodes[1], keys...)
			same(t, "refused", slices.Index(entered, true), 5)
			same(t, "entered", slices.Contains(entered[5:], false), false)

			sizes := make([]uint64, len(keys))
			var direct, remote PlaceReply
			if err := d.Place(ctx, &PlaceRequest{Keys: keys, Sizes: sizes}, &direct); err != nil {
				t.Fatal(err)
			}
			if err := client.Place(ctx, &PlaceRequest{Keys: keys, Sizes: sizes}, &remote); err != nil {
				t.Fatal(err)
			}
			same(t, "place", remote, direct)
			var directAt, remoteAt LocateReply
			if err := d.Locate(ctx, &LocateRequest{Keys: keys}, &directAt); err != nil {
				t.Fatal(err)
			}
			if err := client.Locate(ctx, &LocateRequest{Keys: keys}, &remoteAt); err != nil {
				t.Fatal(err)
			}
			same(t, "locate", remoteAt, directAt)

			if err := client.Withdraw(ctx, &WithdrawRequest{Peer: nodes[1].Peer, Keys: keys}); err != nil {
				t.Fatal(err)
			}
			same(t, "left", len(d.entries), 5)
		})
	}
}

func TestParts(t *testing.T) {
	long := strings.Repeat("x", MaxKey)
	const longs = maxMessageText / MaxKey // that one message holds
	for _, tc := range []struct {
		keys []string
		want [][2]int
	}{
		{nil, [][2]int{{0, 0}}},
		{[]string{"k"}, [][2]int{{0, 1}}},
		{slices.Repeat([]string{"k"}, maxMessageKeys), [][2]int{{0, maxMessageKeys}}},
		{slices.Repeat([]string{"k"}, maxMessageKeys+1), [][2]int{{0, maxMessageKeys}, {maxMessageKeys, maxMessageKeys + 1}}},
		{slices.Repeat([]string{long}, 2*longs+1), [][2]int{{0, longs}, {longs, 2 * longs}, {2 * longs, 2*longs + 1}}},
	} {
		var got [][2]int
		for from, to := range parts(tc.keys) {
			got = append(got, [2]int{from, to})
		}
		same(t, fmt.Sprintf("parts of %d keys", len(tc.keys)), got, tc.want)
	}
}

func TestUnreachable(t *testing.T) {
	cc, err := grpc.NewClient("passthrough:///nowhere", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return nil, net.ErrClosed }))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	if _, err := NewClient(cc).Nodes(ctx); !errors.Is(err, backend.ErrPathDown) {
		t.Errorf("nodes: %v", err)
	}
}
