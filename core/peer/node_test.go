package peer

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// world is a node with everything around it.
type world struct {
	t      testing.TB
	fabric *fakeFabric
	dir    *fakeDirectory
	node   *Node
	svc    Service // the node, directly or over gRPC
}

func newWorld(t testing.TB, pages uint64, change func(*Options)) *world {
	w := &world{t: t, fabric: &fakeFabric{pages: pages}, dir: newFakeDirectory()}
	o := Options{Fabric: w.fabric, Directory: w.dir, Address: "here:1", PageSize: testPage}
	if change != nil {
		change(&o)
	}
	var err error
	if w.node, err = NewNode(o); err != nil {
		t.Fatal(err)
	}
	w.svc = w.node
	return w
}

func (w *world) start() *world {
	if err := w.node.Start(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := w.node.Close(context.Background()); err != nil {
			w.t.Error(err)
		}
	})
	return w
}

// overGRPC puts the wire between the test and the node.
func (w *world) overGRPC(lis net.Listener, dial func(context.Context, string) (net.Conn, error)) *world {
	s := grpc.NewServer(grpc.MaxRecvMsgSize(MaxMessageBytes))
	Register(s, w.node)
	served := make(chan error, 1)
	go func() { served <- s.Serve(lis) }()
	cc, err := grpc.NewClient("passthrough:node", grpc.WithContextDialer(dial),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		cc.Close()
		s.Stop()
		if err := <-served; err != nil {
			w.t.Error(err)
		}
	})
	w.svc = NewClient(cc)
	return w
}

// both runs a test with the node in the same process and with the node behind gRPC.
func both(t *testing.T, pages uint64, test func(t *testing.T, w *world)) {
	t.Run("direct", func(t *testing.T) { test(t, newWorld(t, pages, nil).start()) })
	t.Run("grpc", func(t *testing.T) {
		lis := bufconn.Listen(1 << 20)
		test(t, newWorld(t, pages, nil).start().overGRPC(lis,
			func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	})
}

func (w *world) allocate(client backend.Peer, size uint64, keys ...string) AllocateReply {
	w.t.Helper()
	req := &AllocateRequest{Client: client, To: self.Incarnation, Keys: keys}
	for range keys {
		req.Sizes = append(req.Sizes, size)
	}
	var reply AllocateReply
	if err := w.svc.Allocate(context.Background(), req, &reply); err != nil {
		w.t.Fatal(err)
	}
	return reply
}

func (w *world) tryCommit(client backend.Peer, fence bool, slots ...Slot) ([]Status, error) {
	req := &CommitRequest{Client: client, To: self.Incarnation, Slots: commitSlots(slots), Fence: fence}
	var reply CommitReply
	err := w.svc.Commit(context.Background(), req, &reply)
	return reply.Statuses, err
}

func (w *world) put(size uint64, keys ...string) []Status {
	w.t.Helper()
	statuses, err := w.tryCommit(alice, false, w.allocate(alice, size, keys...).Slots...)
	if err != nil {
		w.t.Fatal(err)
	}
	return statuses
}

func (w *world) resolve(keys ...string) ResolveReply {
	w.t.Helper()
	var reply ResolveReply
	err := w.svc.Resolve(context.Background(), &ResolveRequest{Client: bob, To: self.Incarnation, Keys: keys}, &reply)
	if err != nil {
		w.t.Fatal(err)
	}
	return reply
}

func (w *world) remove(keys ...string) ([]Status, error) {
	var reply RemoveReply
	err := w.svc.Remove(context.Background(), &RemoveRequest{To: self.Incarnation, Keys: keys}, &reply)
	return reply.Statuses, err
}

func (w *world) stats() Stats {
	w.t.Helper()
	st, err := w.svc.Stats(context.Background())
	if err != nil {
		w.t.Fatal(err)
	}
	return *st
}

func (w *world) listed(want ...string) {
	w.t.Helper()
	if diff := cmp.Diff(want, w.dir.listed()); diff != "" {
		w.t.Errorf("keys in the directory (-want +got):\n%s", diff)
	}
}

func TestPutGetRemove(t *testing.T) {
	both(t, 100, func(t *testing.T, w *world) {
		d, err := w.svc.Describe(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := &Description{Peer: self, PageSize: testPage, Regions: w.fabric.Describe()}
		if diff := cmp.Diff(want, d); diff != "" {
			t.Errorf("description (-want +got):\n%s", diff)
		}

		keys := []string{"one", "two \xff not utf-8", "three"}
		slots := w.allocate(alice, testPage+1, keys...)
		if slots.TTL != 30*time.Second {
			t.Errorf("slots are held for %v", slots.TTL)
		}
		w.listed()
		got, err := w.tryCommit(alice, false, slots.Slots...)
		if err != nil || !slices.Equal(got, []Status{OK, OK, OK}) {
			t.Fatalf("commit: %v, statuses %v", err, got)
		}
		w.listed("one", "three", "two \xff not utf-8")

		values := w.resolve("one", "none", "two \xff not utf-8")
		ids := slots.Slots
		wantValues := ResolveReply{
			Values: []Value{
				{Status: OK, Size: testPage + 1, Generation: uint64(ids[0].ID), Checksum: 7, HasChecksum: true, RunCount: 1},
				{Status: Missing, FirstRun: values.Values[1].FirstRun},
				{Status: OK, Size: testPage + 1, Generation: uint64(ids[1].ID), Checksum: 7, HasChecksum: true, FirstRun: 1, RunCount: 1},
			},
			Runs:  slots.Runs[:2],
			Lease: values.Lease, TTL: 10 * time.Second,
		}
		if diff := cmp.Diff(wantValues, values); diff != "" || values.Lease == 0 {
			t.Errorf("lease %d, resolve (-want +got):\n%s", values.Lease, diff)
		}

		if got, err := w.remove("one", "none", "three"); err != nil || !slices.Equal(got, []Status{OK, Missing, OK}) {
			t.Errorf("remove: %v, statuses %v", err, got)
		}
		w.listed("two \xff not utf-8")
		wantStats := Stats{
			Peer: self, PageSize: testPage, Pages: 100, FreePages: 96, LargestFreeRun: 96, Keys: 1, Leases: 1,
		}
		if got := w.stats(); got != wantStats {
			t.Errorf("stats %+v, want %+v", got, wantStats)
		}
		release := &ReleaseRequest{Client: bob, To: self.Incarnation, Lease: values.Lease}
		var released ReleaseReply
		err = w.svc.Release(t.Context(), release, &released)
		if got := w.stats(); err != nil || !released.Held || got.FreePages != 98 || got.Leases != 0 {
			t.Errorf("release: %v, held %v, stats %+v", err, released.Held, got)
		}
		if err := w.svc.Release(t.Context(), release, &released); err != nil || released.Held {
			t.Errorf("release again: %v, held %v", err, released.Held)
		}
	})
}

func TestAnswer(t *testing.T) {
	both(t, 1, func(t *testing.T, w *world) {
		req := &AnswerRequest{From: alice, To: self.Incarnation, Backend: "tcp", Offer: []byte("offer")}
		got, err := w.svc.Answer(t.Context(), req)
		if err != nil || string(got.Answer) != "alice offer" {
			t.Fatalf("answer %+v, %v", got, err)
		}
		if key, ok := got.Keys[9]; len(got.Keys) != 2 || string(got.Keys[1]) != "elsewhere" || !ok || len(key) != 0 {
			t.Errorf("the answer brings the keys %v", got.Keys)
		}
		req.Backend = "rdma"
		if _, err := w.svc.Answer(t.Context(), req); backend.CodeOf(err) != backend.Unsupported {
			t.Errorf("%v, want Unsupported", err)
		}
	})
}

func TestCallsForAnotherIncarnationAreRefused(t *testing.T) {
	both(t, 10, func(t *testing.T, w *world) {
		w.put(1, "k")
		ctx, to := t.Context(), self.Incarnation-1
		_, answerErr := w.svc.Answer(ctx, &AnswerRequest{From: alice, To: to})
		for call, err := range map[string]error{
			"answer": answerErr,
			"allocate": w.svc.Allocate(ctx,
				&AllocateRequest{Client: alice, To: to, Keys: []string{"x"}, Sizes: []uint64{1}}, new(AllocateReply)),
			"commit":  w.svc.Commit(ctx, &CommitRequest{Client: alice, To: to}, new(CommitReply)),
			"abort":   w.svc.Abort(ctx, &AbortRequest{Client: alice, To: to}),
			"resolve": w.svc.Resolve(ctx, &ResolveRequest{Client: alice, To: to, Keys: []string{"k"}}, new(ResolveReply)),
			"release": w.svc.Release(ctx, &ReleaseRequest{Client: alice, To: to}, new(ReleaseReply)),
			"remove":  w.svc.Remove(ctx, &RemoveRequest{To: to, Keys: []string{"k"}}, new(RemoveReply)),
		} {
			if backend.CodeOf(err) != backend.PeerGone {
				t.Errorf("%s: %v, want PeerGone", call, err)
			}
		}
		if got := w.stats(); got.Keys != 1 || got.PendingSlots+got.Leases != 0 {
			t.Errorf("stats %+v: a refused call has done something", got)
		}
	})
}

func TestBadRequests(t *testing.T) {
	both(t, 10, func(t *testing.T, w *world) {
		ctx, to, many := t.Context(), self.Incarnation, make([]string, MaxKeys+1)
		for call, err := range map[string]error{
			"sizes": w.svc.Allocate(ctx, &AllocateRequest{Client: alice, To: to, Keys: []string{"a", "b"}, Sizes: []uint64{1}},
				new(AllocateReply)),
			"keys": w.svc.Resolve(ctx, &ResolveRequest{Client: alice, To: to, Keys: many}, new(ResolveReply)),
			"slots": w.svc.Commit(ctx, &CommitRequest{Client: alice, To: to, Slots: make([]CommitSlot, MaxKeys+1)},
				new(CommitReply)),
			"client":      w.svc.Abort(ctx, &AbortRequest{Client: backend.Peer{Node: "a"}, To: to}),
			"client name": w.svc.Release(ctx, &ReleaseRequest{Client: backend.Peer{Incarnation: 1}, To: to}, new(ReleaseReply)),
		} {
			if backend.CodeOf(err) != backend.BadRequest {
				t.Errorf("%s: %v, want BadRequest", call, err)
			}
		}
	})
}

func TestLargestBatches(t *testing.T) {
	both(t, 1<<16, func(t *testing.T, w *world) {
		if err := w.node.SetLimits(Limits{HighWatermark: 1, LowWatermark: 1}); err != nil {
			t.Fatal(err)
		}
		var keys []string
		for i := range MaxKeys {
			keys = append(keys, fmt.Sprintf("%0*d", MaxKeyLength, i))
		}
		for _, s := range w.put(1, keys...) {
			if s != OK {
				t.Fatalf("status %d", s)
			}
		}
		if got := w.resolve(keys...); len(got.Runs) != MaxKeys {
			t.Errorf("%d runs, want %d", len(got.Runs), MaxKeys)
		}
		// Scatter the pool, so that each page is a run of its own.
		var holes []string
		for i := range 8 {
			for j := range MaxKeys {
				keys[j] = fmt.Sprint(i, " ", j)
				if j%2 == 0 {
					holes = append(holes, keys[j])
				}
			}
			w.put(1, keys...)
		}
		fill := w.allocate(alice, (1<<16-9*MaxKeys)*testPage, "the rest")
		if _, err := w.tryCommit(alice, false, fill.Slots...); err != nil {
			t.Fatal(err)
		}
		for batch := range slices.Chunk(holes, MaxKeys) {
			if _, err := w.remove(batch...); err != nil {
				t.Fatal(err)
			}
		}
		keys = keys[:0]
		for i := range 256 {
			keys = append(keys, fmt.Sprint("scattered ", i))
		}
		if got := w.allocate(alice, 64*testPage, keys...); len(got.Runs) != 16384 {
			t.Errorf("%d runs, want 16,384", len(got.Runs))
		}
	})
}

func TestCommitOfAKeyThatAnotherNodeHas(t *testing.T) {
	both(t, 10, func(t *testing.T, w *world) {
		w.dir.set(func() { w.dir.owners["theirs"] = "another" })
		if got := w.put(testPage, "mine", "theirs"); !slices.Equal(got, []Status{OK, Exists}) {
			t.Errorf("statuses %v, want OK and Exists", got)
		}
		if got := w.stats(); got.Keys != 1 || got.FreePages != 9 {
			t.Errorf("stats %+v", got)
		}
		w.listed("mine")
	})
}

func TestCommitWithFence(t *testing.T) {
	both(t, 10, func(t *testing.T, w *world) {
		slots := w.allocate(alice, testPage, "k").Slots
		w.fabric.failFences(backend.Errorf(backend.PathDown, "no way"))
		if _, err := w.tryCommit(alice, true, slots...); backend.CodeOf(err) != backend.PathDown {
			t.Errorf("%v, want the code of the fence", err)
		}
		w.listed()
		w.fabric.failFences(nil)
		if got, err := w.tryCommit(alice, true, slots...); err != nil || got[0] != OK {
			t.Errorf("%v, statuses %v", err, got)
		}
		w.listed("k")
		if got := w.stats(); got.FenceFailures != 1 || w.fabric.fences() != 2 {
			t.Errorf("%d fences, stats %+v", w.fabric.fences(), got)
		}
	})
}

// within runs a test of a node by itself in a bubble of time.
func within(t *testing.T, pages uint64, change func(*Options), test func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) { test(t, newWorld(t, pages, change)) })
}

func TestQuarantineEndsByItself(t *testing.T) {
	within(t, 10, nil, func(t *testing.T, w *world) {
		w.start()
		slots := w.allocate(alice, testPage, "aborted", "abandoned").Slots
		w.fabric.failFences(errors.New("no"))
		err := w.svc.Abort(t.Context(), &AbortRequest{
			Client: alice, To: self.Incarnation, Slots: []SlotID{slots[0].ID}, Fence: true,
		})
		synctest.Wait()
		if got := w.stats(); err != nil || got.QuarantinedPages != 1 || got.FenceFailures != 1 {
			t.Errorf("%v, stats %+v", err, got)
		}
		time.Sleep(time.Minute)
		if got := w.stats(); got.QuarantinedPages != 2 || got.Expired != 1 || got.FreePages != 8 {
			t.Errorf("while fences fail: %+v", got)
		}
		if n := w.fabric.fences(); n < 5 || n > 20 {
			t.Errorf("%d fences in a minute: they should become rarer, and not end", n)
		}
		w.fabric.failFences(nil)
		time.Sleep(2 * maxFenceBackoff)
		if got := w.stats(); got.QuarantinedPages != 0 || got.FreePages != 10 {
			t.Errorf("after a fence: %+v", got)
		}
	})
}

func TestDirectoryAwayAtCommit(t *testing.T) {
	within(t, 100, nil, func(t *testing.T, w *world) {
		w.start()
		w.put(1, "early")
		w.dir.set(func() { w.dir.down = backend.Errorf(backend.PathDown, "unplugged") })
		_, err := w.tryCommit(alice, false, w.allocate(alice, 1, "late").Slots...)
		if !errors.Is(err, backend.ErrPathDown) || !strings.Contains(err.Error(), "not visible") {
			t.Errorf("%v, want PathDown", err)
		}
		_, err = w.remove("early")
		if !errors.Is(err, backend.ErrPathDown) {
			t.Errorf("%v, want PathDown", err)
		}
		time.Sleep(time.Minute)
		w.listed("early")
		w.dir.set(func() { w.dir.down = nil })
		time.Sleep(fakeTTL)
		w.listed("late")
	})
}

func TestDirectoryForgets(t *testing.T) {
	within(t, 10_000, nil, func(t *testing.T, w *world) {
		w.start()
		var keys []string
		for i := range 5000 {
			keys = append(keys, fmt.Sprintf("%04d", i))
		}
		for batch := range slices.Chunk(keys, MaxKeys) {
			w.put(1, batch...)
		}
		synctest.Wait() // until the first refill is over: it would notice before the commit does
		w.dir.set(func() {
			w.dir.forget()
			w.dir.owners["0007"] = "another" // who was faster
		})
		_, err := w.tryCommit(alice, false, w.allocate(alice, 1, "z").Slots...)
		if !errors.Is(err, backend.ErrPathDown) || errors.Is(err, backend.ErrPeerGone) {
			t.Errorf("%v, want PathDown: the node is there", err)
		}
		synctest.Wait() // the refused publication was enough to join again
		w.listed(append(slices.Delete(keys, 7, 8), "z")...)
		if got := w.resolve("0007"); got.Values[0].Status != Missing {
			t.Errorf("status %d of a key that another node has, want Missing", got.Values[0].Status)
		}
	})
}

func TestNodeStartsWithoutDirectory(t *testing.T) {
	within(t, 10, nil, func(t *testing.T, w *world) {
		w.dir.down = backend.Errorf(backend.PathDown, "unplugged")
		w.start()
		_, err := w.tryCommit(alice, false, w.allocate(alice, 1, "k").Slots...)
		if !errors.Is(err, backend.ErrPathDown) {
			t.Errorf("%v, want PathDown", err)
		}
		w.dir.set(func() { w.dir.down = nil })
		time.Sleep(fakeTTL)
		w.listed("k")
		w.dir.set(func() {
			if m := w.dir.member; m.Address != "here:1" || m.Capacity != 10*testPage {
				t.Errorf("member %+v", m)
			}
		})
	})
}

func TestMembershipIsRenewed(t *testing.T) {
	within(t, 10, nil, func(t *testing.T, w *world) {
		var joins atomic.Int64
		w.dir.before = func(call string, _ []string) {
			if call == "join" {
				joins.Add(1)
			}
		}
		w.start()
		time.Sleep(10*fakeTTL + 1)
		if got := joins.Load(); got != 31 {
			t.Errorf("%d joins in ten times to live, want 31", got)
		}
	})
}

func TestReplacedNodeStopsServing(t *testing.T) {
	within(t, 10, nil, func(t *testing.T, w *world) {
		w.start()
		w.dir.set(func() { w.dir.replaced = true })
		time.Sleep(fakeTTL)
		_, err := w.svc.Stats(t.Context())
		if !errors.Is(err, backend.ErrPeerGone) {
			t.Errorf("%v, want PeerGone", err)
		}
		again := newWorld(t, 10, func(o *Options) { o.Directory = w.dir })
		if err := again.node.Start(t.Context()); !errors.Is(err, backend.ErrPeerGone) {
			t.Errorf("start: %v, want PeerGone", err)
		}
	})
}

func TestClose(t *testing.T) {
	within(t, 10, nil, func(t *testing.T, w *world) {
		w.start()
		w.put(1, "k")
		for range 2 {
			if err := w.node.Close(t.Context()); err != nil {
				t.Error(err)
			}
		}
		w.listed()
		if _, err := w.svc.Describe(t.Context()); !errors.Is(err, backend.ErrPeerGone) {
			t.Errorf("%v, want PeerGone", err)
		}
	})
}

func TestCloseIsBounded(t *testing.T) {
	within(t, 10, nil, func(t *testing.T, w *world) {
		w.start()
		stuck := make(chan struct{})
		w.dir.set(func() {
			w.dir.before = func(call string, _ []string) {
				if call == "join" {
					<-stuck
				}
			}
		})
		time.Sleep(fakeTTL)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := w.node.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, want DeadlineExceeded", err)
		}
		close(stuck)
	})
}

func TestEvictionsAreWithdrawn(t *testing.T) {
	within(t, 10, nil, func(t *testing.T, w *world) {
		w.start()
		synctest.Wait() // until the directory is told that there is nothing: it must not touch the order of use
		w.put(3*testPage, "a", "b", "c")
		w.dir.set(func() { w.dir.down = backend.Errorf(backend.PathDown, "unplugged") })
		w.allocate(alice, 3*testPage, "d", "e")
		synctest.Wait()
		w.listed("a", "b", "c")
		w.dir.set(func() { w.dir.down = nil })
		time.Sleep(fakeTTL)
		w.listed("c")
	})
}

func TestTooManyEvictionsStartAfresh(t *testing.T) {
	within(t, 10, func(o *Options) { o.MaxWithdrawals = 1 }, func(t *testing.T, w *world) {
		w.start()
		synctest.Wait() // as above
		w.put(2*testPage, "a", "b", "c", "d")
		w.dir.set(func() { w.dir.down = backend.Errorf(backend.PathDown, "unplugged") })
		w.allocate(alice, 3*testPage, "e", "f")
		time.Sleep(time.Minute)
		w.dir.set(func() { w.dir.down = nil })
		time.Sleep(fakeTTL)
		w.listed("d")
		w.dir.set(func() {
			if w.dir.leaves != 1 {
				t.Errorf("the node left %d times, want once", w.dir.leaves)
			}
		})
	})
}

// A key is removed while its commit asks the directory.
func TestRemoveDuringPublication(t *testing.T) {
	within(t, 10, nil, func(t *testing.T, w *world) {
		w.dir.before = func(call string, keys []string) {
			if call == "publish" {
				if got, err := w.remove(keys...); err != nil || got[0] != OK {
					t.Errorf("remove: %v, statuses %v", err, got)
				}
			}
		}
		w.start()
		synctest.Wait() // until the first refill is over: it would publish the key a second time
		w.put(1, "k")
		w.listed()
		if got := w.stats(); got.FreePages != 10 {
			t.Errorf("stats %+v", got)
		}
	})
}

// Many clients at once, in a pool that is too small for them: the race detector watches, and at the end the
// directory and the store agree.
func TestManyClients(t *testing.T) {
	w := newWorld(t, 300, func(o *Options) { o.MaxLeases = 40 }).start()
	ctx := t.Context()
	var served atomic.Int64
	var clients sync.WaitGroup
	for c := range 64 {
		clients.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(c)))
			client := backend.Peer{Node: fmt.Sprint("client-", c), Incarnation: 1}
			var allocated AllocateReply
			var committed CommitReply
			var resolved ResolveReply
			var removed RemoveReply
			for range 40 {
				keys, sizes := make([]string, 4), make([]uint64, 4)
				for i := range keys {
					keys[i], sizes[i] = fmt.Sprint("key-", rng.IntN(200)), 1+rng.Uint64N(4*testPage)
				}
				err := w.svc.Allocate(ctx, &AllocateRequest{Client: client, To: self.Incarnation, Keys: keys, Sizes: sizes}, &allocated)
				if err != nil {
					t.Error(err)
					return
				}
				var ids []CommitSlot
				for _, s := range allocated.Slots {
					if s.Status == OK {
						ids = append(ids, CommitSlot{ID: s.ID})
					}
				}
				if rng.IntN(4) == 0 && len(ids) > 0 {
					err = w.svc.Abort(ctx, &AbortRequest{Client: client, To: self.Incarnation, Slots: []SlotID{ids[0].ID}, Fence: rng.IntN(2) == 0})
					ids = ids[1:]
				}
				if err == nil {
					err = w.svc.Commit(ctx, &CommitRequest{Client: client, To: self.Incarnation, Slots: ids}, &committed)
				}
				if err == nil && slices.Contains(committed.Statuses, Expired) {
					err = errors.New("a slot has expired")
				}
				if err == nil {
					err = w.svc.Resolve(ctx, &ResolveRequest{Client: client, To: self.Incarnation, Keys: keys}, &resolved)
				}
				if errors.Is(err, backend.ErrBusy) {
					continue
				}
				if err == nil {
					err = w.svc.Release(ctx, &ReleaseRequest{Client: client, To: self.Incarnation, Lease: resolved.Lease}, new(ReleaseReply))
				}
				if err == nil && rng.IntN(4) == 0 {
					err = w.svc.Remove(ctx, &RemoveRequest{To: self.Incarnation, Keys: keys[:1]}, &removed)
				}
				if err != nil {
					t.Error(err)
					return
				}
				served.Add(1)
			}
		})
	}
	clients.Wait()
	if served.Load() == 0 {
		t.Error("no client was served")
	}
	// What the directory lists is here, once it has heard of the last evictions.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		var absent directory.WithdrawRequest
		w.node.store.Absent(w.dir.listed(), &absent)
		if len(absent.Keys) == 0 && len(w.dir.listed()) == int(w.node.store.Stats().Keys) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the directory lists %q, which are gone", absent.Keys)
		}
	}
	if err := w.node.Close(ctx); err != nil {
		t.Error(err)
	}
	if got := w.node.store.Stats(); got.PendingSlots != 0 {
		t.Errorf("stats %+v: all slots were committed or aborted", got)
	}
}
