package peer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

var (
	alice = backend.Peer{Node: "alice", Incarnation: 0xa, Host: "one"}
	bob   = backend.Peer{Node: "bob", Incarnation: 0xb, Host: "two"}
)

const testPage = 4096

// bench is a store with a clock and a fence that the test drives.
type bench struct {
	*Store
	t        testing.TB
	clock    time.Time
	fenceErr error
	fenced   []backend.Peer
}

func newBench(t testing.TB, o StoreOptions) *bench {
	b := &bench{t: t, clock: time.Unix(1_000_000, 0)}
	o.PageSize = testPage
	o.Now = func() time.Time { return b.clock }
	o.Fence = func(_ context.Context, peer backend.Peer) error {
		if !b.mu.TryLock() {
			t.Error("the store's lock is held while it fences")
			return nil
		}
		defer b.mu.Unlock()
		b.fenced = append(b.fenced, peer)
		return b.fenceErr
	}
	s, err := NewStore(o)
	if err != nil {
		t.Fatal(err)
	}
	b.Store = s
	return b
}

// allocate reserves slots of the given number of pages.
func (b *bench) allocate(client backend.Peer, pages int, keys ...string) AllocateReply {
	b.t.Helper()
	req := &AllocateRequest{Client: client, Keys: keys}
	for range keys {
		req.Sizes = append(req.Sizes, uint64(pages)*testPage)
	}
	var reply AllocateReply
	if err := b.Allocate(req, &reply); err != nil {
		b.t.Fatal(err)
	}
	return reply
}

// commit commits slots; the directory enters all that it is asked to, unless it is down.
func (b *bench) commit(client backend.Peer, directoryUp bool, slots ...Slot) []Status {
	b.t.Helper()
	var p Publication
	var reply CommitReply
	b.Commit(&CommitRequest{Client: client, Slots: commitSlots(slots)}, &reply, &p)
	if !directoryUp {
		b.Unsettle(&p)
		return reply.Statuses
	}
	for range p.Request.Keys {
		p.Reply.Entered = append(p.Reply.Entered, true)
	}
	if stale := b.Settle(&p); len(stale) > 0 {
		b.t.Fatalf("stale keys %q: nothing has removed them", stale)
	}
	return reply.Statuses
}

func commitSlots(slots []Slot) (out []CommitSlot) {
	for _, s := range slots {
		out = append(out, CommitSlot{ID: s.ID, Checksum: 7, HasChecksum: true})
	}
	return out
}

func (b *bench) put(pages int, keys ...string) {
	b.t.Helper()
	slots := b.allocate(alice, pages, keys...).Slots
	for i, status := range b.commit(alice, true, slots...) {
		if status != OK {
			b.t.Fatalf("put %q: status %d", keys[i], status)
		}
	}
}

func (b *bench) resolve(client backend.Peer, keys ...string) ResolveReply {
	b.t.Helper()
	var reply ResolveReply
	if err := b.Resolve(&ResolveRequest{Client: client, Keys: keys}, &reply); err != nil {
		b.t.Fatal(err)
	}
	return reply
}

// held says which keys the store holds, without touching what was used when.
func (b *bench) held(keys ...string) string {
	var absent directory.WithdrawRequest
	b.Absent(keys, &absent)
	var held []string
	for _, key := range keys {
		if !slices.Contains(absent.Keys, key) {
			held = append(held, key)
		}
	}
	return fmt.Sprint(held)
}

func (b *bench) freePages(want int) {
	b.t.Helper()
	if got := b.Stats().FreePages; got != uint64(want) {
		b.t.Errorf("%d pages are free, want %d", got, want)
	}
}

func statuses(slots []Slot) (out []Status) {
	for _, s := range slots {
		out = append(out, s.Status)
	}
	return out
}

func TestBatchIsAllocatedInOnePiece(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{10, 100}})
	req := &AllocateRequest{Client: alice, Keys: []string{"a", "b", "c"}, Sizes: []uint64{testPage, 3*testPage + 1, 5}}
	var reply AllocateReply
	for range 2 { // into the same reply
		if err := b.Allocate(req, &reply); err != nil {
			t.Fatal(err)
		}
	}
	want := []Run{
		{Region: 1, Offset: 0, Length: testPage}, // the first batch has taken six of the ten pages of region 0
		{Region: 1, Offset: testPage, Length: 3*testPage + 1},
		{Region: 1, Offset: 5 * testPage, Length: 5},
	}
	if diff := cmp.Diff(want, reply.Runs); diff != "" {
		t.Errorf("runs (-want +got):\n%s", diff)
	}
	for i, s := range reply.Slots {
		if s.Status != OK || s.FirstRun != uint32(i) || s.RunCount != 1 {
			t.Errorf("slot %d: %+v", i, s)
		}
	}
}

func TestValueLiesAcrossRegions(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{4, 8, 4}})
	reply := b.allocate(alice, 16, "a")
	want := []Run{
		{Region: 1, Length: 8 * testPage}, {Region: 0, Length: 4 * testPage}, {Region: 2, Length: 4 * testPage},
	}
	if diff := cmp.Diff(want, reply.Runs); diff != "" {
		t.Errorf("runs (-want +got):\n%s", diff)
	}
	b.Abort(&AbortRequest{Client: alice, Slots: []SlotID{reply.Slots[0].ID}})
	b.freePages(16)
}

func TestRefusedKeysDoNotHoldUpTheOthers(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{4}})
	b.put(1, "old")
	long := string(make([]byte, MaxKeyLength))
	req := &AllocateRequest{
		Client: alice,
		Keys:   []string{"", long + "x", "zero", "huge", "giant", "old", long},
		Sizes:  []uint64{1, 1, 0, 4*testPage + 1, 1<<64 - 1, 1, 1},
	}
	var reply AllocateReply
	if err := b.Allocate(req, &reply); err != nil {
		t.Fatal(err)
	}
	want := []Status{Refused, Refused, Refused, Refused, Refused, Exists, OK}
	if diff := cmp.Diff(want, statuses(reply.Slots)); diff != "" {
		t.Errorf("statuses (-want +got):\n%s", diff)
	}
}

func TestPoolFullStoresWhatFits(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{10}})
	b.allocate(alice, 5, "pending")
	req := &AllocateRequest{
		Client: alice, Keys: []string{"a", "b", "c", "d"}, Sizes: []uint64{3 * testPage, 3 * testPage, 1, 2 * testPage},
	}
	var reply AllocateReply
	if err := b.Allocate(req, &reply); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Status{OK, NoSpace, OK, NoSpace}, statuses(reply.Slots)); diff != "" {
		t.Errorf("statuses (-want +got):\n%s", diff)
	}
	b.commit(alice, true, reply.Slots[0], reply.Slots[2])
	if got := b.held("a", "b", "c", "d"); got != "[a c]" {
		t.Errorf("held %s, want [a c]", got)
	}
}

func TestFirstCommitWins(t *testing.T) {
	for _, directoryUp := range []bool{true, false} {
		b := newBench(t, StoreOptions{Regions: []int{10}})
		first, second := b.allocate(alice, 2, "k"), b.allocate(bob, 2, "k")
		if got := b.commit(bob, directoryUp, second.Slots...); got[0] != OK {
			t.Errorf("first commit: status %d", got[0])
		}
		var p Publication
		var reply CommitReply
		b.Commit(&CommitRequest{Client: alice, Slots: commitSlots(first.Slots)}, &reply, &p)
		if reply.Statuses[0] != Exists {
			t.Errorf("second commit: status %d, want Exists", reply.Statuses[0])
		}
		// Who is told that the key exists must be able to find it.
		if published := len(p.Request.Keys) == 0; published != directoryUp {
			t.Errorf("directory up: %v; keys to publish: %q", directoryUp, p.Request.Keys)
		}
		b.freePages(8)
		if got := b.resolve(bob, "k").Values[0].Generation; got != uint64(second.Slots[0].ID) {
			t.Errorf("generation %d, want that of the first commit", got)
		}
	}
}

func TestSlotsBelongToTheirClient(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{10}})
	slots := b.allocate(alice, 1, "k").Slots
	again := alice
	again.Incarnation++
	for _, thief := range []backend.Peer{bob, again} {
		if got := b.commit(thief, true, slots...); got[0] != Expired {
			t.Errorf("commit by %v: status %d, want Expired", thief, got[0])
		}
		b.Abort(&AbortRequest{Client: thief, Slots: []SlotID{slots[0].ID}})
	}
	b.freePages(9)
	if got := b.commit(alice, true, slots[0], slots[0]); got[0] != OK || got[1] != Expired {
		t.Errorf("commit twice by the owner: statuses %v, want OK and Expired", got)
	}
}

func TestExpiredSlotWaitsForItsFence(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{10}, Limits: Limits{SlotTTL: time.Second, Grace: time.Second}})
	slots := b.allocate(alice, 4, "k").Slots
	b.clock = b.clock.Add(2 * time.Second)
	b.Expire()
	if got := b.Stats(); got.PendingSlots != 1 || got.QuarantinedPages != 0 {
		t.Errorf("within the grace: %+v", got)
	}
	b.clock = b.clock.Add(1)
	if got := b.commit(alice, true, slots...); got[0] != Expired {
		t.Errorf("commit: status %d, want Expired", got[0])
	}
	b.Abort(&AbortRequest{Client: alice, Slots: []SlotID{slots[0].ID}}) // too late to mean anything

	b.fenceErr = errors.New("no")
	b.FenceQuarantined(t.Context())
	b.FenceQuarantined(t.Context()) // too early to try again
	if got := b.Stats(); got.Expired != 1 || got.QuarantinedPages != 4 || got.FreePages != 6 || got.FenceFailures != 1 {
		t.Errorf("after a fence that failed: %+v", got)
	}
	b.fenceErr = nil
	b.FenceQuarantined(t.Context())
	b.freePages(6)
	b.clock = b.clock.Add(minFenceBackoff)
	b.FenceQuarantined(t.Context())
	b.freePages(10)
	if diff := cmp.Diff([]backend.Peer{alice, alice}, b.fenced); diff != "" {
		t.Errorf("fenced (-want +got):\n%s", diff)
	}
	if len(b.clients) != 0 {
		t.Errorf("%d clients are remembered that have nothing here", len(b.clients))
	}
}

func TestPagesQuarantinedDuringAFenceWaitForTheNext(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{10}})
	slots := b.allocate(alice, 2, "a", "b").Slots
	b.Abort(&AbortRequest{Client: alice, Slots: []SlotID{slots[0].ID}, Fence: true})
	b.Store.fence = func(context.Context, backend.Peer) error {
		b.Abort(&AbortRequest{Client: alice, Slots: []SlotID{slots[1].ID}, Fence: true})
		return nil
	}
	b.FenceQuarantined(t.Context())
	b.freePages(8)
	b.FenceQuarantined(t.Context())
	b.freePages(10)
}

func TestAbort(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{10}})
	slots := b.allocate(alice, 2, "a", "b").Slots
	b.Abort(&AbortRequest{Client: alice, Slots: []SlotID{slots[0].ID}})
	b.freePages(8)
	b.Abort(&AbortRequest{Client: alice, Slots: []SlotID{slots[1].ID, 999}, Fence: true})
	b.freePages(8)
	if err := b.FenceClient(t.Context(), alice); err != nil {
		t.Fatal(err)
	}
	b.freePages(10)
}

func TestRemoveUnderLease(t *testing.T) {
	for name, end := range map[string]func(*bench, []LeaseID){
		"released": func(b *bench, leases []LeaseID) {
			b.Release(&ReleaseRequest{Client: bob, Lease: leases[0]}, new(ReleaseReply))
			b.Release(&ReleaseRequest{Client: bob, Lease: leases[0]}, new(ReleaseReply)) // twice ends nothing else
			b.Release(&ReleaseRequest{Client: bob, Lease: leases[1]}, new(ReleaseReply)) // not bob's
			b.freePages(6)
			b.Release(&ReleaseRequest{Client: alice, Lease: leases[1]}, new(ReleaseReply))
		},
		"run out": func(b *bench, _ []LeaseID) { b.clock = b.clock.Add(time.Hour) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, StoreOptions{Regions: []int{10}})
			b.put(4, "k")
			leases := []LeaseID{b.resolve(bob, "k", "no", "k").Lease, b.resolve(alice, "k").Lease}
			var reply RemoveReply
			b.Remove(&RemoveRequest{Keys: []string{"k", "k"}}, &reply)
			if diff := cmp.Diff([]Status{OK, Missing}, reply.Statuses); diff != "" {
				t.Errorf("statuses (-want +got):\n%s", diff)
			}
			if got := b.resolve(bob, "k"); got.Values[0].Status != Missing || got.Lease != 0 {
				t.Errorf("resolve after remove: %+v", got)
			}
			b.freePages(6)
			end(b, leases)
			b.freePages(10)
			if len(b.fenced) > 0 {
				t.Errorf("fenced %v: reads need no fence", b.fenced)
			}
		})
	}
}

func TestEvictionTakesTheLeastRecentlyUsed(t *testing.T) {
	var woken int
	b := newBench(t, StoreOptions{
		Regions: []int{100}, Limits: Limits{HighWatermark: 0.8, LowWatermark: 0.5}, Evicting: func() { woken++ },
	})
	for _, key := range []string{"a", "b", "c", "d", "e", "f", "g", "h"} {
		b.put(10, key)
	}
	if woken != 0 {
		t.Error("evicted below the high watermark")
	}
	b.Release(&ReleaseRequest{Client: bob, Lease: b.resolve(bob, "a").Lease}, new(ReleaseReply)) // used again
	b.resolve(bob, "b")                                                                          // being read
	b.put(5, "i")
	if got := b.held("a", "b", "c", "d", "e", "f", "g", "h", "i"); got != "[a b g h i]" {
		t.Errorf("held %s, want [a b g h i]", got)
	}
	evicted, overflow := b.Evicted(nil)
	if diff := cmp.Diff([]string{"c", "d", "e", "f"}, evicted); diff != "" || overflow || woken != 1 {
		t.Errorf("overflow %v, woken %d, evicted (-want +got):\n%s", overflow, woken, diff)
	}
	if got := b.Stats().Evictions; got != 4 {
		t.Errorf("%d evictions, want 4", got)
	}
}

func TestEvictionSparesWhatTheDirectoryHasNotHeardOf(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{10}})
	b.commit(alice, false, b.allocate(alice, 5, "unheard").Slots...)
	b.put(4, "heard")
	if got := statuses(b.allocate(alice, 6, "big").Slots); got[0] != NoSpace {
		t.Errorf("status %d, want NoSpace", got[0])
	}
	if got := b.held("unheard", "heard"); got != "[unheard heard]" {
		t.Errorf("held %s: it has been evicted in vain", got)
	}
	var p Publication
	if !b.Unsettled(&p) || !slices.Equal(p.Request.Keys, []string{"unheard"}) {
		t.Fatalf("unsettled %q, want [unheard]", p.Request.Keys)
	}
	p.Reply.Entered = []bool{true}
	b.Settle(&p)
	if got := statuses(b.allocate(alice, 6, "big").Slots); got[0] != OK {
		t.Errorf("status %d, want OK", got[0])
	}
}

func TestSettle(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{10}})
	commit := func(keys ...string) *Publication {
		var p Publication
		var reply CommitReply
		b.Commit(&CommitRequest{Client: alice, Slots: commitSlots(b.allocate(alice, 1, keys...).Slots)}, &reply, &p)
		return &p
	}
	remove := func(keys ...string) { b.Remove(&RemoveRequest{Keys: keys}, new(RemoveReply)) }

	p := commit("mine", "theirs", "gone", "again")
	remove("gone", "again")
	q := commit("again")
	p.Reply.Entered = []bool{true, false, true, true}
	if stale := b.Settle(p); !slices.Equal(stale, []string{"gone"}) {
		t.Errorf("stale %q, want [gone]", stale)
	}
	if got := b.held("mine", "theirs", "gone", "again"); got != "[mine again]" {
		t.Errorf("held %s, want [mine again]", got)
	}
	q.Reply.Entered = []bool{true}
	b.Settle(q)
	b.freePages(8)
}

func TestWalkFindsAllCommittedKeys(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{10_000}})
	want := map[string]bool{}
	for i := range 5000 {
		key := fmt.Sprint("key-", i)
		if i%5 == 0 {
			b.allocate(alice, 1, key) // pending: not to be found
			continue
		}
		b.put(1, key)
		want[key] = true
	}
	b.resolve(bob, "key-1")
	var p Publication
	err := b.Walk(&p, func() error {
		if n := len(p.Request.Keys); n > publishKeys || n != len(p.Request.Sizes) {
			t.Errorf("a batch of %d keys and %d sizes", n, len(p.Request.Sizes))
		}
		for _, key := range p.Request.Keys {
			if !want[key] {
				t.Errorf("found %q twice, or it should not be there", key)
			}
			delete(want, key)
		}
		return nil
	})
	if err != nil || len(want) > 0 {
		t.Errorf("error %v, %d keys not found", err, len(want))
	}
	stop := errors.New("stop")
	if err := b.Walk(&p, func() error { return stop }); err != stop {
		t.Errorf("error %v, want the visitor's", err)
	}
}

func TestWithdrawalsOverflow(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{10}, MaxWithdrawals: 3})
	b.put(2, "a", "b", "c", "d")
	b.allocate(alice, 10, "all")
	if keys, overflow := b.Evicted(nil); !overflow || len(keys) > 0 {
		t.Errorf("overflow %v, keys %q", overflow, keys)
	}
	b.WithdrawLater([]string{"a", "b"})
	if keys, overflow := b.Evicted(nil); overflow || len(keys) != 2 {
		t.Errorf("after the overflow: overflow %v, keys %q", overflow, keys)
	}
	b.Overflow()
	if _, overflow := b.Evicted(nil); !overflow {
		t.Error("the overflow is forgotten")
	}
}

func TestTablesAreBounded(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{100}, MaxPending: 3, MaxLeases: 2})
	slots := b.allocate(alice, 1, "a", "b").Slots
	two := &AllocateRequest{Client: alice, Keys: []string{"c", "d"}, Sizes: []uint64{1, 1}}
	if err := b.Allocate(two, new(AllocateReply)); !errors.Is(err, backend.ErrBusy) {
		t.Errorf("allocate: %v, want Busy", err)
	}
	b.freePages(98)
	b.commit(alice, true, slots...)
	if err := b.Allocate(two, new(AllocateReply)); err != nil {
		t.Error(err)
	}
	b.resolve(alice, "a")
	lease := b.resolve(bob, "a").Lease
	one := &ResolveRequest{Client: bob, Keys: []string{"no", "b"}}
	if err := b.Resolve(one, new(ResolveReply)); !errors.Is(err, backend.ErrBusy) {
		t.Errorf("resolve: %v, want Busy", err)
	}
	b.Release(&ReleaseRequest{Client: bob, Lease: lease}, new(ReleaseReply))
	if err := b.Resolve(one, new(ResolveReply)); err != nil {
		t.Error(err)
	}
}

// One client that takes all that it may get does not keep the others out.
func TestClientShare(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{100}, MaxPending: 5, MaxLeases: 4})
	b.put(1, "k")
	one := func(client backend.Peer) error {
		return b.Allocate(&AllocateRequest{Client: client, Keys: []string{"new"}, Sizes: []uint64{1}}, new(AllocateReply))
	}
	resolve := func(client backend.Peer, reply *ResolveReply) error {
		return b.Resolve(&ResolveRequest{Client: client, Keys: []string{"k"}}, reply)
	}
	slots := b.allocate(alice, 1, "a", "b", "c").Slots
	if err := one(alice); !errors.Is(err, backend.ErrBusy) {
		t.Errorf("allocate beyond the share: %v, want Busy", err)
	}
	if err := one(bob); err != nil {
		t.Errorf("allocate by another: %v", err)
	}
	b.Abort(&AbortRequest{Client: alice, Slots: []SlotID{slots[0].ID}, Fence: true})
	if err := one(alice); err != nil {
		t.Errorf("allocate within the share again: %v", err)
	}
	var first, reply ResolveReply
	for _, r := range []*ResolveReply{&first, &reply} {
		if err := resolve(alice, r); err != nil {
			t.Fatal(err)
		}
	}
	if err := resolve(alice, &reply); !errors.Is(err, backend.ErrBusy) {
		t.Errorf("resolve beyond the share: %v, want Busy", err)
	}
	if err := resolve(bob, &reply); err != nil {
		t.Errorf("resolve by another: %v", err)
	}
	b.Release(&ReleaseRequest{Client: alice, Lease: first.Lease}, new(ReleaseReply))
	if err := resolve(alice, &reply); err != nil {
		t.Errorf("resolve within the share again: %v", err)
	}
}

// What cannot fit, however much is evicted, evicts nothing.
func TestNothingIsEvictedInVain(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{20}, Limits: Limits{HighWatermark: 1, LowWatermark: 1}})
	b.put(3, "a", "b", "c", "d")
	b.allocate(alice, 2, "pending")
	b.resolve(bob, "d")
	if got := statuses(b.allocate(alice, 16, "too large").Slots); got[0] != NoSpace {
		t.Errorf("status %d, want NoSpace", got[0])
	}
	if got := b.held("a", "b", "c", "d"); got != "[a b c d]" {
		t.Errorf("held %s, want [a b c d]", got)
	}
	// Of 15 pages that are free or may be evicted, the first and the third take nine.
	req := &AllocateRequest{Client: alice, Keys: []string{"x", "y", "z"}, Sizes: []uint64{8 * testPage, 8 * testPage, testPage}}
	var reply AllocateReply
	if err := b.Allocate(req, &reply); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Status{OK, NoSpace, OK}, statuses(reply.Slots)); diff != "" {
		t.Errorf("statuses (-want +got):\n%s", diff)
	}
	if got := b.held("a", "b", "c", "d"); got != "[b c d]" {
		t.Errorf("held %s, want [b c d]", got)
	}
}

func TestReleaseTellsWhetherTheLeaseHeld(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{10}, Limits: Limits{LeaseTTL: time.Second, Grace: time.Second}})
	b.put(1, "k")
	for _, tc := range []struct {
		after  time.Duration
		client backend.Peer
		held   bool
	}{{0, bob, true}, {2 * time.Second, bob, true}, {2*time.Second + 1, bob, false}, {0, alice, false}} {
		lease := b.resolve(bob, "k").Lease
		b.clock = b.clock.Add(tc.after)
		reply := ReleaseReply{Held: !tc.held}
		if b.Release(&ReleaseRequest{Client: tc.client, Lease: lease}, &reply); reply.Held != tc.held {
			t.Errorf("%+v: held %v", tc, reply.Held)
		}
	}
}

// A pool can be so scattered that the runs of a batch do not fit in one reply.
func TestRepliesAreBounded(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{40}, Limits: Limits{HighWatermark: 1}})
	b.maxRuns = 6
	var odd []string
	for i := range 20 {
		b.put(1, fmt.Sprint("even ", i), fmt.Sprint("odd ", i))
		odd = append(odd, fmt.Sprint("odd ", i))
	}
	b.Remove(&RemoveRequest{Keys: odd}, new(RemoveReply))

	reply := b.allocate(alice, 3, "a", "b", "c")
	if diff := cmp.Diff([]Status{OK, OK, NoSpace}, statuses(reply.Slots)); diff != "" {
		t.Errorf("statuses (-want +got):\n%s", diff)
	}
	b.commit(alice, true, reply.Slots[:2]...)
	b.commit(alice, true, b.allocate(alice, 3, "c").Slots...)
	if got := statuses(b.allocate(alice, 7, "too scattered").Slots); got[0] != NoSpace {
		t.Errorf("status %d of a value that no reply could hold, want NoSpace", got[0])
	}
	b.freePages(11)
	var got []Status
	for _, v := range b.resolve(bob, "a", "b", "c", "none").Values {
		got = append(got, v.Status)
	}
	if diff := cmp.Diff([]Status{OK, OK, Unknown, Missing}, got); diff != "" {
		t.Errorf("statuses (-want +got):\n%s", diff)
	}
}

func TestLimits(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{10}})
	for _, bad := range []Limits{
		{SlotTTL: -1}, {LeaseTTL: -1}, {Grace: -1}, {HighWatermark: 1.5}, {LowWatermark: -0.5},
		{HighWatermark: 0.5, LowWatermark: 0.6},
	} {
		if err := b.SetLimits(bad); !errors.Is(err, backend.ErrBadRequest) {
			t.Errorf("%+v: %v, want BadRequest", bad, err)
		}
	}
	if err := b.SetLimits(Limits{SlotTTL: time.Hour, LeaseTTL: time.Minute, HighWatermark: 0.5}); err != nil {
		t.Fatal(err)
	}
	if got := b.allocate(alice, 1, "k"); got.TTL != time.Hour {
		t.Errorf("slots are held for %v, want an hour", got.TTL)
	}
	if got := b.resolve(alice, "k"); got.TTL != time.Minute {
		t.Errorf("the lease is %v, want a minute", got.TTL)
	}
}

func TestNewStoreNamesEveryFault(t *testing.T) {
	_, err := NewStore(StoreOptions{Regions: []int{1, 0}, Limits: Limits{Grace: -1}, MaxLeases: -1, ClientShare: 2})
	if !errors.Is(err, backend.ErrBadRequest) {
		t.Fatalf("%v, want BadRequest", err)
	}
	for _, words := range []string{"page size", "fence", "region 1", "grace", "max leases", "client share"} {
		if !strings.Contains(err.Error(), words) {
			t.Errorf("%q is not named in: %v", words, err)
		}
	}
}

func TestNoAllocationOnceWarm(t *testing.T) {
	b := newBench(t, StoreOptions{Regions: []int{1000}})
	keys := []string{"a", "b", "c", "d"}
	allocate := &AllocateRequest{Client: alice, Keys: keys, Sizes: []uint64{1, testPage, 3 * testPage, 7}}
	commit := &CommitRequest{Client: alice, Slots: make([]CommitSlot, len(keys))}
	resolve, release := &ResolveRequest{Client: bob, Keys: keys}, &ReleaseRequest{Client: bob}
	remove := &RemoveRequest{Keys: keys}
	var allocated AllocateReply
	var committed CommitReply
	var resolved ResolveReply
	var released ReleaseReply
	var removed RemoveReply
	var p Publication
	entered := []bool{true, true, true, true}
	allocations := testing.AllocsPerRun(100, func() {
		if err := b.Allocate(allocate, &allocated); err != nil {
			t.Fatal(err)
		}
		for i, s := range allocated.Slots {
			commit.Slots[i].ID = s.ID
		}
		b.Commit(commit, &committed, &p)
		p.Reply.Entered = entered
		b.Settle(&p)
		if err := b.Resolve(resolve, &resolved); err != nil {
			t.Fatal(err)
		}
		release.Lease = resolved.Lease
		b.Release(release, &released)
		b.Remove(remove, &removed)
	})
	if allocations != 0 || removed.Statuses[3] != OK {
		t.Errorf("%v allocations in the life of a batch, want none; statuses %v", allocations, removed.Statuses)
	}
}

func TestTableSkipsTakenPlaces(t *testing.T) {
	table := newTable[int](4)
	old := new(int)
	id := table.add(old)
	seen := map[uint64]bool{id: true}
	for range 100 {
		next := table.add(new(int))
		if seen[next] || table.get(next) == nil {
			t.Fatalf("id %d is used twice, or not found", next)
		}
		seen[next] = true
		table.remove(next)
	}
	if table.get(id) != old || table.live != 1 {
		t.Error("the old record is lost")
	}
}
