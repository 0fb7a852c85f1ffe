package directory

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// A directory that nobody calls ends memberships and removes their entries by itself.
func TestReaper(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := NewMemory(Options{TTL: time.Second})
		defer d.Close()
		a, b := node("a", 100), node("b", 100)
		join(t, d, a)
		join(t, d, b)
		for i := range 3 * step {
			publish(t, d, []*Node{a, b}[i%2], fmt.Sprint(i))
		}
		for range 4 {
			time.Sleep(600 * time.Millisecond)
			join(t, d, b)
		}
		synctest.Wait()
		d.mu.Lock()
		defer d.mu.Unlock()
		same(t, "members", len(d.members), 1)
		same(t, "entries", len(d.entries), 3*step/2)
		same(t, "void entries", d.void, 0)
	})
}

func TestSweepCountsWhatIsOverwritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newMemory(t, Options{Now: newClock().Now})
		a, b := node("a", 100), node("b", 100)
		join(t, d, a)
		publish(t, d, a, "k1", "k2", "k3")
		if err := d.Leave(ctx, a.Peer); err != nil {
			t.Fatal(err)
		}
		join(t, d, b)
		publish(t, d, b, "k1")
		same(t, "void entries", d.void, 2)
		d.sweep()
		same(t, "void entries after the sweep", d.void, 0)
		same(t, "entries", len(d.entries), 1)
		same(t, "owners", locate(t, d, "k1", "k2"), []string{"b", ""})
	})
}

// A long sweep ends when the directory is closed.
func TestCloseEndsSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := NewMemory(Options{Now: newClock().Now})
		a := node("a", 100)
		join(t, d, a)
		for i := range 2 * step {
			publish(t, d, a, fmt.Sprint(i))
		}
		if err := d.Leave(ctx, a.Peer); err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d.sweep()
		same(t, "void entries that are left", d.void, step)
	})
}

// Keys that are kept are copies: those of a request may be pieces of something large.
func TestKeysAreCopied(t *testing.T) {
	d := newMemory(t, Options{Now: newClock().Now})
	a, b := node("a", 100), node("b", 100)
	buffer := []byte("key")
	key := alias(buffer)
	join(t, d, a)
	publish(t, d, a, key) // new
	req := &PublishRequest{Peer: a.Peer, Keys: []string{key}, Sizes: []uint64{2}}
	if err := d.Publish(ctx, req, new(PublishReply)); err != nil { // another size
		t.Fatal(err)
	}
	if err := d.Leave(ctx, a.Peer); err != nil {
		t.Fatal(err)
	}
	join(t, d, b)
	publish(t, d, b, key) // over a void entry
	copy(buffer, "???")
	same(t, "owner", locate(t, d, "key"), []string{"b"})
}

// Many clients at once: no race, no entry of a node that is not a member, and every key has one owner in the end.
func TestConcurrentUse(t *testing.T) {
	each(t, func(t *testing.T, d Directory, c *clock) {
		const nodes, rounds, keys = 4, 40, 64
		batch := make([]string, keys)
		sizes := make([]uint64, keys)
		for i := range batch {
			batch[i] = fmt.Sprint("key", i)
		}
		var wg sync.WaitGroup
		for i := range nodes {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(1, uint64(i)))
				n := node(fmt.Sprint("n", i), 1000)
				for range rounds {
					switch r.IntN(6) {
					case 0:
						n.Peer.Incarnation++
					case 1:
						c.advance(DefaultTTL / 3)
					case 2:
						if err := d.Leave(ctx, n.Peer); err != nil {
							t.Errorf("leave: %v", err)
						}
					}
					if _, err := d.Join(ctx, n); err != nil {
						t.Errorf("join: %v", err)
					}
					req := &PublishRequest{Peer: n.Peer, Keys: batch, Sizes: sizes}
					if err := d.Publish(ctx, req, new(PublishReply)); err != nil && backend.CodeOf(err) != backend.PeerGone {
						t.Errorf("publish: %v", err)
					}
					half := &WithdrawRequest{Peer: n.Peer, Keys: batch[:keys/2]}
					if err := d.Withdraw(ctx, half); err != nil {
						t.Errorf("withdraw: %v", err)
					}
				}
			})
			wg.Go(func() {
				var at LocateReply
				var placed PlaceReply
				for range rounds {
					if err := d.Locate(ctx, &LocateRequest{Keys: batch}, &at); err != nil {
						t.Errorf("locate: %v", err)
					}
					for _, i := range at.At {
						if i != NoNode && at.Nodes[i].Capacity != 1000 {
							t.Errorf("locate gave %+v", at.Nodes[i])
						}
					}
					if err := d.Place(ctx, &PlaceRequest{Keys: batch, Sizes: sizes}, &placed); err != nil {
						t.Errorf("place: %v", err)
					}
					page, err := d.List(ctx, &ListRequest{})
					if err != nil {
						t.Errorf("list: %v", err)
						continue
					}
					for i, e := range page.Entries {
						if i > 0 && e.Key <= page.Entries[i-1].Key {
							t.Errorf("list gave %q after %q", e.Key, page.Entries[i-1].Key)
						}
					}
					if _, err := d.Nodes(ctx); err != nil {
						t.Errorf("nodes: %v", err)
					}
				}
			})
		}
		wg.Wait()

		c.advance(DefaultTTL)
		last := node("last", 1000)
		join(t, d, last)
		for i, entered := range publish(t, d, last, batch...) {
			if !entered {
				t.Errorf("key %d is held by a node that is not a member", i)
			}
		}
	})
}

// A listing and a sweep let others change the entries while they walk over them.
func TestWalksDuringChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newMemory(t, Options{Now: newClock().Now})
		stays, comes := node("stays", 100), node("comes", 100)
		join(t, d, stays)
		var want []string
		for i := range 2 * step {
			want = append(want, fmt.Sprintf("stays/%06d", i))
		}
		publish(t, d, stays, want...)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				comes.Peer.Incarnation++
				join(t, d, comes)
				var keys []string
				for j := range 500 {
					keys = append(keys, fmt.Sprintf("comes/%06d", (i*500+j)%(4*step)))
				}
				publish(t, d, comes, keys...)
				d.sweep()
			}
		})
		for range 5 {
			reply, err := d.List(ctx, &ListRequest{Prefix: "stays/", Limit: 2 * step})
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, e := range reply.Entries {
				got = append(got, e.Key)
			}
			same(t, "keys that stay", got, want)
		}
		close(stop)
		wg.Wait()
		d.sweep()
		same(t, "void entries", d.void, 0)
		same(t, "entries", len(d.entries), 2*step+d.members[0].entries)
	})
}
