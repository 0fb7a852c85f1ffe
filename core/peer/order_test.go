package peer

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// lossy is the way to a real directory. The test decides when a request arrives, and whether its answer comes back.
type lossy struct {
	directory.Directory
	t *testing.T

	mu    sync.Mutex
	fates []*fate // of calls that are still to be made
}

// fate is what becomes of the next call of one kind.
type fate struct {
	call     string
	arrive   chan struct{}
	answered chan struct{}
	done     chan struct{} // closed when the request has taken effect
}

// next has the next call of a kind wait, until arrive is closed before it reaches the directory, and until answered
// is closed before its answer comes back. The caller's patience ends earlier when its context does.
func (l *lossy) next(call string) *fate {
	f := &fate{call: call, arrive: make(chan struct{}), answered: make(chan struct{}), done: make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fates = append(l.fates, f)
	return f
}

// travel makes a call: send is given a context of its own, since what is on the way does not come back.
func (l *lossy) travel(ctx context.Context, call string, send func(context.Context) error) error {
	l.mu.Lock()
	i := slices.IndexFunc(l.fates, func(f *fate) bool { return f.call == call })
	if i < 0 {
		l.mu.Unlock()
		return send(ctx)
	}
	f := l.fates[i]
	l.fates = slices.Delete(l.fates, i, i+1)
	l.mu.Unlock()
	answer := make(chan error, 1)
	go func() {
		<-f.arrive
		err := send(context.WithoutCancel(ctx))
		close(f.done)
		<-f.answered
		answer <- err
	}()
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return &backend.Error{Code: backend.Cancelled, Op: call, Err: ctx.Err()}
	}
}

// late lets a request arrive whose caller has given up.
func (l *lossy) late(f *fate) {
	l.t.Helper()
	close(f.arrive)
	synctest.Wait()
	select {
	case <-f.done:
	default:
		l.t.Errorf("there is no %s on the way", f.call)
	}
	close(f.answered)
}

func (l *lossy) Join(ctx context.Context, n *directory.Node) (reply directory.JoinReply, err error) {
	var sent directory.JoinReply
	err = l.travel(ctx, "join", func(ctx context.Context) (err error) {
		sent, err = l.Directory.Join(ctx, n)
		return err
	})
	if err == nil {
		reply = sent
	}
	return reply, err
}

func (l *lossy) Publish(ctx context.Context, r *directory.PublishRequest, reply *directory.PublishReply) error {
	req := *r
	req.Keys, req.Sizes = slices.Clone(r.Keys), slices.Clone(r.Sizes)
	sent := new(directory.PublishReply)
	err := l.travel(ctx, "publish", func(ctx context.Context) error { return l.Directory.Publish(ctx, &req, sent) })
	if err == nil {
		*reply = *sent
	}
	return err
}

func (l *lossy) Withdraw(ctx context.Context, r *directory.WithdrawRequest) error {
	req := *r
	return l.travel(ctx, "withdraw", func(ctx context.Context) error { return l.Directory.Withdraw(ctx, &req) })
}

// withLosses runs a test of a node that has joined a real directory over a way that the test drives.
func withLosses(t *testing.T, test func(t *testing.T, w *world, l *lossy)) {
	synctest.Test(t, func(t *testing.T) {
		l := &lossy{t: t, Directory: newDirectory(t)}
		w := newWorld(t, 100, func(o *Options) { o.Directory = l }).start()
		synctest.Wait()
		test(t, w, l)
		if len(l.fates) > 0 {
			t.Errorf("%d calls that should have had a fate have not been made", len(l.fates))
		}
	})
}

func newDirectory(t *testing.T) *directory.Memory {
	d := directory.NewMemory(directory.Options{})
	t.Cleanup(func() { d.Close() })
	return d
}

// lists checks what the directory lists.
func (l *lossy) lists(when string, want ...string) {
	l.t.Helper()
	reply, err := l.List(l.t.Context(), &directory.ListRequest{})
	if err != nil {
		l.t.Fatal(err)
	}
	var got []string
	for _, e := range reply.Entries {
		got = append(got, e.Key)
	}
	if !slices.Equal(got, want) {
		l.t.Errorf("%s: %q are listed, want %q", when, got, want)
	}
}

// commitAsync commits a key, and gives up when its context ends.
func (w *world) commitAsync(ctx context.Context, key string) <-chan error {
	req := &CommitRequest{Client: alice, To: self.Incarnation, Slots: commitSlots(w.allocate(alice, 1, key).Slots)}
	ended := make(chan error, 1)
	go func() { ended <- w.svc.Commit(ctx, req, new(CommitReply)) }()
	synctest.Wait()
	return ended
}

// The directory starts anew, the node joins and never hears of it, and publishes a key meanwhile.
func TestLostJoinReply(t *testing.T) {
	withLosses(t, func(t *testing.T, w *world, l *lossy) {
		w.put(1, "a", "b")
		lost := l.next("join")
		again := l.next("join")
		l.Directory = newDirectory(t)
		time.Sleep(directory.DefaultTTL / 3) // the node renews what it takes for its membership
		close(lost.arrive)
		synctest.Wait()
		// The node is a member, and does not know.
		if err := <-w.commitAsync(t.Context(), "c"); !errors.Is(err, backend.ErrPathDown) {
			t.Errorf("commit: %v, want PathDown", err)
		}
		for range 3 { // the directory has not forgotten the node for want of renewals
			time.Sleep(directory.DefaultTTL * 2 / 3)
			if _, err := l.Directory.Join(t.Context(), &directory.Node{Peer: self}); err != nil {
				t.Fatal(err)
			}
		}
		close(again.arrive)
		close(again.answered)
		time.Sleep(tellInterval)
		synctest.Wait()
		l.lists("after the second reply", "a", "b", "c")
		close(lost.answered)
	})
}

// A node without keys is not told to publish them over and over, and one whose refill has failed makes it again.
func TestRefillIsMadeOnce(t *testing.T) {
	within(t, 10, nil, func(t *testing.T, w *world) {
		published := 0
		w.dir.before = func(call string, _ []string) {
			if call == "publish" {
				published++
			}
		}
		w.start()
		time.Sleep(10 * fakeTTL)
		if published != 0 {
			t.Errorf("%d publications of nothing", published)
		}
		w.put(1, "k")
		time.Sleep(10 * fakeTTL)
		if published != 1 {
			t.Errorf("%d publications, want that of the commit", published)
		}
		fails := true
		w.dir.set(func() {
			w.dir.forget()
			w.dir.before = func(call string, _ []string) {
				if call == "publish" && fails {
					fails = false
					w.dir.set(func() { w.dir.down = backend.Errorf(backend.PathDown, "unplugged") })
				}
			}
		})
		time.Sleep(fakeTTL)
		w.listed()
		w.dir.set(func() { w.dir.down = nil })
		time.Sleep(fakeTTL)
		w.listed("k")
	})
}

// A client gives up on removing a key, it is put again, and then the withdrawal arrives.
func TestLateWithdrawal(t *testing.T) {
	withLosses(t, func(t *testing.T, w *world, l *lossy) {
		w.put(1, "k")
		withdrawal := l.next("withdraw")
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		err := w.svc.Remove(ctx, &RemoveRequest{To: self.Incarnation, Keys: []string{"k"}}, new(RemoveReply))
		if !errors.Is(err, backend.ErrPathDown) {
			t.Errorf("remove: %v, want PathDown", err)
		}
		if got := w.put(1, "k"); got[0] != OK {
			t.Errorf("put: status %d", got[0])
		}
		l.late(withdrawal)
		l.lists("after the late withdrawal", "k")
		time.Sleep(time.Minute)
		l.lists("a minute later", "k")
	})
}

// A client gives up on committing a key, it is removed, and then the publication arrives.
func TestLatePublication(t *testing.T) {
	withLosses(t, func(t *testing.T, w *world, l *lossy) {
		publication := l.next("publish")
		ctx, cancel := context.WithCancel(t.Context())
		committed := w.commitAsync(ctx, "k")
		cancel()
		if err := <-committed; !errors.Is(err, backend.ErrPathDown) {
			t.Errorf("commit: %v, want PathDown", err)
		}
		if _, err := w.remove("k"); err != nil {
			t.Error(err)
		}
		l.late(publication)
		l.lists("after the late publication")
		w.put(1, "k")
		l.lists("after it is put again", "k")
	})
}

// As before, but the key is removed before the client gives up.
func TestLatePublicationOfWhatIsGone(t *testing.T) {
	withLosses(t, func(t *testing.T, w *world, l *lossy) {
		publication := l.next("publish")
		ctx, cancel := context.WithCancel(t.Context())
		committed := w.commitAsync(ctx, "k")
		if _, err := w.remove("k"); err != nil { // withdrawn before it is published
			t.Error(err)
		}
		close(publication.arrive)
		synctest.Wait()
		l.lists("after the publication", "k")
		cancel()
		<-committed
		time.Sleep(tellInterval)
		synctest.Wait()
		l.lists("when the node has told the directory")
		close(publication.answered)
	})
}

// A publication that is only slow is refused for the sake of one that was lost, and is made again.
func TestSlowPublicationIsMadeAgain(t *testing.T) {
	withLosses(t, func(t *testing.T, w *world, l *lossy) {
		slow, lost := l.next("publish"), l.next("publish")
		slowly := w.commitAsync(t.Context(), "slow")
		ctx, cancel := context.WithCancel(t.Context())
		losing := w.commitAsync(ctx, "lost")
		cancel()
		<-losing
		if _, err := w.remove("lost"); err != nil {
			t.Error(err)
		}
		close(slow.arrive)
		close(slow.answered)
		if err := <-slowly; err != nil {
			t.Error(err)
		}
		l.late(lost)
		l.lists("after all", "slow")
	})
}

// A publication that was refused since a new membership has begun on the way is made again in that one.
func TestPublicationDuringNewMembership(t *testing.T) {
	withLosses(t, func(t *testing.T, w *world, l *lossy) {
		slow := l.next("publish")
		committed := w.commitAsync(t.Context(), "k")
		if err := l.Leave(t.Context(), self); err != nil {
			t.Fatal(err)
		}
		w.node.joinNow.wake()
		synctest.Wait()
		close(slow.arrive)
		close(slow.answered)
		if err := <-committed; err != nil {
			t.Error(err)
		}
		l.lists("after the commit", "k")
	})
}

// The directory lists a key that the node does not hold. Whoever comes for it has it withdrawn, and not what is put
// meanwhile.
func TestGhosts(t *testing.T) {
	withLosses(t, func(t *testing.T, w *world, l *lossy) {
		ghosts := []string{"ghost", "put meanwhile", "unnoticed"}
		req := &directory.PublishRequest{Peer: self, Keys: ghosts, Sizes: []uint64{1, 1, 1}}
		if err := l.Publish(t.Context(), req, new(directory.PublishReply)); err != nil {
			t.Fatal(err)
		}
		slots := w.allocate(alice, 1, "put meanwhile").Slots
		withdrawal := l.next("withdraw")
		w.resolve("ghost", "put meanwhile", "")
		time.Sleep(tellInterval)
		synctest.Wait()
		if _, err := w.tryCommit(alice, false, slots...); err != nil {
			t.Error(err)
		}
		l.late(withdrawal)
		l.lists("after the withdrawal", "put meanwhile", "unnoticed")
	})
}

// Keys that no directory takes do not keep others from being withdrawn.
func TestRemoveOfImpossibleKeys(t *testing.T) {
	withLosses(t, func(t *testing.T, w *world, l *lossy) {
		w.put(1, "k")
		got, err := w.remove("", "k", string(make([]byte, MaxKeyLength+1)))
		if err != nil || !slices.Equal(got, []Status{Missing, OK, Missing}) {
			t.Errorf("remove: %v, statuses %v", err, got)
		}
		l.lists("after all")
	})
}
