package core_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/fault"
)

// TestPutElsewhere: what the way to one node does not carry goes to another node.
func TestPutElsewhere(t *testing.T) {
	for script, want := range map[string]struct {
		status   core.Status
		attempts int // at the node that took it
	}{
		"complete:2*error(pathdown)":    {core.Stored, 1}, // both attempts at the first node
		"post:1*error(denied)":          {core.Stored, 1},
		"complete:1*error(unsupported)": {core.Stored, 1},
		"complete:1*error(internal)":    {core.Stored, 1},
		"establish:1*error(pathdown)":   {core.Stored, 1},
		"complete:1*error(pathdown)":    {core.Stored, 2}, // a second attempt at the same node
		"post:2*busy":                   {core.Stored, 1},
		"complete:dup":                  {core.Stored, 1},
		"complete:1*error(badrequest)":  {core.Failed, 1},
		"complete:4*error(pathdown)":    {core.Failed, 2}, // nor does the second node take it
		"session:error(unsupported)":    {core.Failed, 1},
	} {
		t.Run(script, func(t *testing.T) {
			c := newCluster(t, shape{nodes: 2, client: verifyAll, wrap: faulty("client", "reference", parse(t, script))})
			value := made(10_000, 1)
			r := c.client.Put(t.Context(), "key", value)
			if r.Status != want.status || r.Path.Attempts != want.attempts {
				t.Fatalf("%+v, want %v after %d attempts", r, want.status, want.attempts)
			}
			c.quiet()
			if want.status != core.Stored {
				is(t, core.Missing, c.client.Exists(t.Context(), "key")...)
				if n := c.stats(0).Keys + c.stats(1).Keys; n != 0 {
					t.Errorf("%d keys are held", n)
				}
				return
			}
			into := make([]byte, len(value))
			is(t, core.Found, c.client.Get(t.Context(), "key", into))
			if !bytes.Equal(into, value) {
				t.Error("other bytes came back")
			}
			if n := c.stats(0).Keys + c.stats(1).Keys; n != 1 {
				t.Errorf("%d keys are held, want one", n)
			}
		})
	}
}

// TestNextBackend: what one backend does not carry goes by the next, and the result says so.
func TestNextBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, script := range []string{"complete:error(pathdown)", "establish:error(denied)", "session:error(unsupported)", "post:kill", "answer:error(pathdown)"} {
			owner := "client"
			if script == "answer:error(pathdown)" {
				owner = "node-0"
			}
			c := newCluster(t, shape{client: verifyAll, backends: []backend.Factory{network("first"), network("second")},
				wrap: faulty(owner, "first", parse(t, script))})
			value, into := made(10_000, 1), make([]byte, 10_000)
			for _, r := range []core.Result{c.client.Put(t.Context(), "key", value), c.client.Get(t.Context(), "key", into)} {
				if !r.OK() || r.Path.Backend != "second" {
					t.Errorf("%s: %+v", script, r)
				}
			}
			if !bytes.Equal(value, into) {
				t.Errorf("%s: other bytes came back", script)
			}
			if n := c.engine.Counters("second").Bytes.Load(); n != 20_000 {
				t.Errorf("%s: the second backend has carried %d bytes", script, n)
			}
			if owner == "node-0" && len(c.engine.Outages()) != 1 {
				t.Errorf("%s: outages %+v", script, c.engine.Outages())
			}
		}
	})
}

// TestInDoubt: a write that ended in doubt is fenced before the value becomes visible, or before its pages are used
// again.
func TestInDoubt(t *testing.T) {
	for script, want := range map[string]core.Status{
		"complete:1*partial(0)": core.Stored, // and done the second time
		"complete:2*partial(0)": core.Failed,
	} {
		var n atomic.Int64
		c := newCluster(t, shape{client: verifyAll, wrap: func(owner, _ string, b backend.Backend) backend.Backend {
			if owner == "client" {
				return fault.Wrap(b, parse(t, script))
			}
			return fences{b, &n}
		}})
		is(t, core.Stored, c.newClient(c.newEngine("other"), c.shape.client).Put(t.Context(), "other", made(10_000, 1)))
		if n.Load() != 0 {
			t.Errorf("%s: a put without doubt is fenced", script)
		}
		value := made(10_000, 2)
		if r := c.client.Put(t.Context(), "key", value); r.Status != want {
			t.Fatalf("%s: %+v, want %v", script, r, want)
		} else if want == core.Stored && n.Load() != 1 {
			t.Errorf("%s: %d fences when the put returns, want one", script, n.Load())
		}
		c.quiet() // what is in quarantine gets out of it by a fence
		if n.Load() == 0 {
			t.Errorf("%s: no fence", script)
		}
		into := make([]byte, len(value))
		r := c.client.Get(t.Context(), "key", into)
		if (r.Status == core.Found) != (want == core.Stored) || r.Status == core.Found && !bytes.Equal(into, value) {
			t.Errorf("%s: get: %+v", script, r)
		}
	}
}

// TestFenceFails: a value that cannot be made certain is not made visible.
func TestFenceFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		script := parse(t, "fence:1*error(pathdown)")
		c := newCluster(t, shape{client: verifyAll, limits: peer.Limits{SlotTTL: 200 * time.Millisecond, Grace: time.Millisecond},
			wrap: func(owner, _ string, b backend.Backend) backend.Backend {
				if owner == "client" {
					return fault.Wrap(b, parse(t, "complete:1*partial(0)"))
				}
				return fault.Wrap(b, script)
			}})
		refused(t, c.client.Put(t.Context(), "key", made(10_000, 1)), core.InDoubt, backend.PathDown, `commit "key"`, "could not be fenced")
		is(t, core.Missing, c.client.Exists(t.Context(), "key")...)
		c.quiet()
		if s := c.stats(0); s.FreePages != s.Pages || s.FenceFailures != 1 {
			t.Errorf("%+v", s)
		}
		is(t, core.Stored, c.client.Put(t.Context(), "key", made(10_000, 1)))
	})
}

// TestCorruption: bytes that were damaged on the way are an error where they are verified.
func TestCorruption(t *testing.T) {
	for _, registered := range []bool{true, false} {
		c := newCluster(t, shape{client: verifyAll, wrap: faulty("client", "reference", parse(t, "complete:corrupt"))})
		value := made(10_000, 1)
		is(t, core.Stored, c.client.Put(t.Context(), "key", value))
		into := make([]byte, 10_000)
		if registered {
			into = c.alloc(10_000)
		}
		refused(t, c.client.Get(t.Context(), "key", into), core.Failed, backend.Integrity, `get "key"`, "checksum")

		c.client.Tune(core.Tuning{Verify: core.VerifyOff})
		if r := c.client.Get(t.Context(), "key", into); r.Status != core.Found || r.Verified || bytes.Equal(into, value) {
			t.Errorf("unverified: %+v", r)
		}
		c.client.Tune(core.Tuning{Verify: core.VerifySample, SampleEvery: 3})
		found := 0
		for range 9 {
			if r := c.client.Get(t.Context(), "key", into); r.Status == core.Found {
				found++
			}
		}
		if found != 6 {
			t.Errorf("of 9 damaged values %d were let through, want the 6 that are not in the sample", found)
		}
		c.quiet()
	}
}

// TestNoChecksum: a value that was written without one cannot be verified, and the result says so.
func TestNoChecksum(t *testing.T) {
	c := newCluster(t, shape{client: core.ClientOptions{StagingSize: 1 << 20}})
	is(t, core.Stored, c.client.Put(t.Context(), "key", made(1000, 1)))
	c.client.Tune(core.Tuning{Verify: core.VerifyAll})
	if r := c.client.Get(t.Context(), "key", make([]byte, 1000)); r.Status != core.Found || r.Verified {
		t.Errorf("%+v", r)
	}
}

// TestEvictionUnderSlowReader: a reader is so slow that its lease runs out, its value is evicted and the pages hold
// another one's. It must not get those bytes for the value, whether its transfer can be cancelled or not.
func TestEvictionUnderSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, verify := range []core.Verify{core.VerifyOff, core.VerifyAll} {
			for _, deaf := range []bool{false, true} {
				g := newGate(backend.Read, deaf)
				c := newCluster(t, shape{
					poolSize: 4 * 4096, wrap: g.at("client"),
					limits: peer.Limits{LeaseTTL: 30 * time.Millisecond, Grace: time.Millisecond},
					client: core.ClientOptions{StagingSize: 1 << 20, Tuning: core.Tuning{Verify: verify}},
				})
				t.Cleanup(g.letThrough)
				is(t, core.Stored, c.client.Put(t.Context(), "key", made(3*4096, 1)))
				into := make([]byte, 3*4096)
				got := make(chan core.Result, 1)
				go func() { got <- c.client.Get(t.Context(), "key", into) }()
				receive(t, g.arrived)

				other := c.newClient(c.newEngine("other"), c.shape.client)
				for i := 0; c.stats(0).Evictions == 0; i++ { // not before the lease has run out
					if r := other.Put(t.Context(), fmt.Sprint("other-", i), made(3*4096, uint64(100+i))); !r.OK() {
						refused(t, r, core.NoSpace, backend.Busy, "node-0 has no room")
					}
					time.Sleep(time.Millisecond) // by the clock of the test, which stands still while something is done
				}
				// The directory hears of it a moment later.
				waitUntil(t, func() bool { return other.Exists(t.Context(), "key")[0].Status == core.Missing })
				if !deaf {
					// The reader's client cancels the transfer when its time is up, which is now.
					refused(t, receive(t, got), core.Failed, backend.Cancelled, "the node holds the memory no longer")
					continue
				}
				g.letThrough()
				refused(t, receive(t, got), core.Failed, backend.Integrity, "the lease of 30ms ran out")
			}
		}
	})
}

// TestSlowNodeAlone: a node whose bytes do not come in time fails its own values, and none of those of others.
func TestSlowNodeAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, op := range []backend.Op{backend.Read, backend.Write} {
			for _, deaf := range []bool{false, true} {
				g := newGate(op, deaf)
				g.node = "node-0"
				c := newCluster(t, shape{
					nodes: 2, wrap: g.at("client"), client: verifyAll,
					limits: peer.Limits{LeaseTTL: 50 * time.Millisecond, SlotTTL: 50 * time.Millisecond, Grace: time.Millisecond},
				})
				t.Cleanup(g.letThrough)
				list := items(c.alloc(1<<20), slices.Repeat([]int{10_000}, 8), 1)
				into := buffers(c.alloc(1<<20), list, 0)
				call := func() []core.Result { return c.client.BatchPut(t.Context(), list) }
				if op == backend.Read {
					is(t, core.Stored, c.client.BatchPut(t.Context(), list)...)
					call = func() []core.Result { return c.client.BatchGet(t.Context(), into) }
				}
				called := make(chan []core.Result, 1)
				go func() { called <- call() }()
				receive(t, g.arrived)
				if deaf { // let the bytes come, but too late
					if op == backend.Write {
						waitUntil(t, func() bool { return c.stats(0).Expired > 0 })
					} else {
						waitUntil(t, func() bool { return c.stats(0).Leases == 0 })
					}
					g.letThrough()
				}
				good := 0
				for i, r := range receive(t, called) {
					switch {
					case r.OK():
						good++
						if r.Path.Node != "node-1" || op == backend.Read && !bytes.Equal(into[i].Value, list[i].Value) {
							t.Errorf("%v %d: %+v", op, i, r)
						}
					case r.Path.Node != "node-0" || r.Status != core.Failed:
						t.Errorf("%v %d: %+v", op, i, r)
					}
				}
				if good != 4 {
					t.Errorf("%v: %d of the 4 values of the other node", op, good)
				}
				c.quiet()
			}
		}
	})
}

// TestReaderHoldsItsValue: what a lease holds is neither evicted nor overwritten, even when it is removed and put
// again.
func TestReaderHoldsItsValue(t *testing.T) {
	g := newGate(backend.Read, false)
	c := newCluster(t, shape{poolSize: 8 * 4096, wrap: g.at("client"), client: core.ClientOptions{StagingSize: 1 << 20}})
	t.Cleanup(g.letThrough)
	value := made(3*4096, 1)
	is(t, core.Stored, c.client.Put(t.Context(), "key", value))
	into := make([]byte, 3*4096)
	got := make(chan core.Result, 1)
	go func() { got <- c.client.Get(t.Context(), "key", into) }()
	receive(t, g.arrived)
	is(t, core.Removed, c.client.Remove(t.Context(), "key")...)
	is(t, core.Stored, c.client.Put(t.Context(), "key", made(3*4096, 2)))
	for i := range 5 {
		is(t, core.Stored, c.client.Put(t.Context(), fmt.Sprint("more-", i), made(2*4096, 3)))
	}
	g.letThrough()
	is(t, core.Found, receive(t, got))
	if !bytes.Equal(into, value) {
		t.Error("the reader gets other bytes than those it came for")
	}
}

// TestSlotExpires: a put that takes longer than its slots are held is given up in time, and leaves nothing behind.
func TestSlotExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, deaf := range []bool{false, true} {
			g := newGate(backend.Write, deaf)
			c := newCluster(t, shape{wrap: g.at("client"), client: verifyAll,
				limits: peer.Limits{SlotTTL: 30 * time.Millisecond, Grace: time.Millisecond}})
			t.Cleanup(g.letThrough)
			put := make(chan core.Result, 1)
			go func() { put <- c.client.Put(t.Context(), "key", made(100, 1)) }()
			receive(t, g.arrived)
			if deaf { // the transfer ends, but too late
				waitUntil(t, func() bool { return c.stats(0).Expired == 1 })
				g.letThrough()
			}
			r := receive(t, put)
			if deaf {
				refused(t, r, core.Failed, backend.Cancelled, "the slot had expired")
			} else {
				refused(t, r, core.Failed, backend.Cancelled, "the node holds the memory no longer")
			}
			is(t, core.Missing, c.client.Exists(t.Context(), "key")...)
			c.quiet()
		}
	})
}

// TestLateCompletion: the caller gives up while a transfer is in flight that cannot be cancelled. Until it has ended
// the call does not return, the slot stays reserved and the staging memory is lent to nobody else.
func TestLateCompletion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const staging = 16 << 10
		g := newGate(backend.Write, true)
		c := newCluster(t, shape{wrap: g.at("client"), client: core.ClientOptions{StagingSize: staging}})
		t.Cleanup(g.letThrough)
		ctx, cancel := context.WithCancel(t.Context())
		put := make(chan core.Result, 1)
		value := made(staging, 1)
		go func() { put <- c.client.Put(ctx, "key", value) }()
		receive(t, g.arrived)
		cancel()
		short, stop := context.WithTimeout(t.Context(), 30*time.Millisecond)
		defer stop()
		refused(t, c.client.Put(short, "second", made(staging, 2)), core.Failed, backend.Cancelled, "no room for 16KiB in staging memory")
		if s := c.stats(0); s.PendingSlots != 1 {
			t.Errorf("%d slots are pending while the transfer is in flight", s.PendingSlots)
		}
		select {
		case r := <-put:
			t.Fatalf("the put returns while its transfer is in flight: %+v", r)
		default:
		}
		g.letThrough()
		is(t, core.Stored, receive(t, put)) // it was done after all, and is committed
		into := make([]byte, staging)
		is(t, core.Found, c.client.Get(t.Context(), "key", into))
		if !bytes.Equal(into, value) {
			t.Error("other bytes came back")
		}
		is(t, core.Stored, c.client.Put(t.Context(), "second", made(staging, 2)))
		c.quiet()
	})
}

// TestCancelledPut: a transfer that is cancelled in flight leaves no slot behind.
func TestCancelledPut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, op := range []backend.Op{backend.Write, backend.Read} {
			g := newGate(op, false)
			c := newCluster(t, shape{wrap: g.at("client"), client: verifyAll})
			t.Cleanup(g.letThrough)
			value := made(100, 1)
			call := c.client.Put
			if op == backend.Read {
				is(t, core.Stored, c.client.Put(t.Context(), "key", value))
				call = c.client.Get
			}
			why := errors.New("no more interest")
			ctx, cancel := context.WithCancelCause(t.Context())
			result := make(chan core.Result, 1)
			go func() { result <- call(ctx, "key", value) }()
			receive(t, g.arrived)
			cancel(why)
			refused(t, receive(t, result), core.Failed, backend.Cancelled, why.Error())
			c.quiet()
			if free := c.stats(0).FreePages; op == backend.Write && free != c.stats(0).Pages {
				t.Errorf("%d of %d pages are free", free, c.stats(0).Pages)
			}
		}
	})
}

// TestNotQuiet: a backend does not end a transfer that was cancelled. The caller is told that its memory is in
// doubt, and the client goes on with other memory.
func TestNotQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(backend.Write, true)
		c := newCluster(t, shape{wrap: g.at("client"), client: verifyAll, quiet: time.Millisecond})
		t.Cleanup(g.letThrough)
		ctx, cancel := context.WithCancel(t.Context())
		put := make(chan []core.Result, 1)
		list := []core.Item{{Key: "a", Value: made(100, 1)}, {Key: "b", Value: made(4<<20, 2)}} // two waves
		go func() { put <- c.client.BatchPut(ctx, list) }()
		receive(t, g.arrived)
		cancel()
		results := receive(t, put)
		refused(t, results[0], core.InDoubt, backend.Internal, `put "a"`, "did not become quiet")
		refused(t, results[1], core.Failed, backend.Internal, "given up")
		waitUntil(t, func() bool { return c.stats(0).PendingSlots == 0 })
	})
}

// TestNodeCloses: a node leaves in the middle of a put and of a get.
func TestNodeCloses(t *testing.T) {
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		g := newGate(op, false)
		c := newCluster(t, shape{nodes: 2, wrap: g.at("client"), client: verifyAll})
		t.Cleanup(g.letThrough)
		list := items(c.alloc(1<<20), slices.Repeat([]int{10_000}, 8), 1)
		into := buffers(c.alloc(1<<20), list, 0)
		call := func() []core.Result { return c.client.BatchPut(t.Context(), list) }
		if op == backend.Read {
			is(t, core.Stored, c.client.BatchPut(t.Context(), list)...)
			call = func() []core.Result { return c.client.BatchGet(t.Context(), into) }
		}
		called := make(chan []core.Result, 1)
		go func() { called <- call() }()
		receive(t, g.arrived)
		receive(t, g.arrived) // a transfer to each node
		if err := c.nodes[0].Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		g.letThrough()
		for i, r := range receive(t, called) {
			switch {
			case op == backend.Write:
				// Those that were on their way to the node that left went to the other one, or failed alone.
				if r.Status == core.Stored && r.Path.Node != "node-1" {
					t.Errorf("put %d: %+v", i, r)
				}
			case r.Status == core.Found:
				if !bytes.Equal(into[i].Value, list[i].Value) {
					t.Errorf("get %d: other bytes", i)
				}
			case r.Path.Node != "node-0":
				t.Errorf("get %d: %+v", i, r)
			}
		}
		// Whatever the pool says that it has, it has.
		for i, r := range c.client.BatchGet(t.Context(), into) {
			if r.Status == core.Found && !bytes.Equal(into[i].Value, list[i].Value) || r.Status != core.Found && r.Status != core.Missing {
				t.Errorf("%v: get %d afterwards: %+v", op, i, r)
			}
		}
	}
}

// TestNodeRestarts: a node comes back under its name with another incarnation. Nothing has to be done for it.
func TestNodeRestarts(t *testing.T) {
	c := newCluster(t, shape{client: verifyAll})
	is(t, core.Stored, c.client.Put(t.Context(), "key", made(100, 1)))
	for i := range 3 {
		if err := c.nodes[len(c.nodes)-1].Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		is(t, core.Missing, c.client.Get(t.Context(), "key", make([]byte, 100)))
		c.addNode("node-0")
		value := made(100, uint64(i))
		is(t, core.Stored, c.client.Put(t.Context(), "key", value))
		into := make([]byte, 100)
		is(t, core.Found, c.client.Get(t.Context(), "key", into))
		if !bytes.Equal(into, value) {
			t.Error("other bytes came back")
		}
		if n := c.client.KnownNodes(); n != 1 {
			t.Errorf("the client keeps %d incarnations of one node", n)
		}
	}
}

// TestSharedEngine: one client of an engine goes, another stays.
func TestSharedEngine(t *testing.T) {
	g := newGate(backend.Write, false)
	c := newCluster(t, shape{wrap: g.at("client"), client: verifyAll})
	t.Cleanup(g.letThrough)
	second := c.newClient(c.engine, c.shape.client)
	put := make(chan core.Result, 1)
	go func() { put <- c.client.Put(t.Context(), "a", made(100, 1)) }()
	receive(t, g.arrived)
	is(t, core.Missing, second.Get(t.Context(), "b", make([]byte, 1)))
	is(t, core.Missing, second.Remove(t.Context(), "b")...)
	go func() { second.Put(t.Context(), "c", made(100, 1)) }()
	receive(t, g.arrived)
	g.letThrough()
	waitUntil(t, func() bool { return second.Exists(t.Context(), "c")[0].Status == core.Exists })
	if err := second.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	is(t, core.Stored, receive(t, put))
	if r := c.client.Put(t.Context(), "d", made(100, 1)); r.Status != core.Stored || r.Path.Attempts != 1 {
		t.Errorf("after the other client has closed: %+v", r)
	}
	if n := c.engine.Counters("reference").Connects.Load(); n != 1 {
		t.Errorf("%d connections were made, want one", n)
	}
}

// broken is a directory that does not answer.
type broken struct {
	directory.Directory
	err *atomic.Pointer[backend.Error]
}

func (d broken) Place(ctx context.Context, req *directory.PlaceRequest, reply *directory.PlaceReply) error {
	if err := d.err.Load(); err != nil {
		return err
	}
	return d.Directory.Place(ctx, req, reply)
}

func (d broken) Locate(ctx context.Context, req *directory.LocateRequest, reply *directory.LocateReply) error {
	if err := d.err.Load(); err != nil {
		return err
	}
	return d.Directory.Locate(ctx, req, reply)
}

// TestDirectoryFails: every key fails with the directory's error, and works when it is back.
func TestDirectoryFails(t *testing.T) {
	var failure atomic.Pointer[backend.Error]
	c := newCluster(t, shape{client: verifyAll, directory: func(d directory.Directory) directory.Directory { return broken{d, &failure} }})
	value := made(100, 1)
	is(t, core.Stored, c.client.Put(t.Context(), "key", value))
	for code, status := range map[backend.Code]core.Status{backend.PathDown: core.Failed, backend.Busy: core.Busy} {
		failure.Store(backend.Errorf(code, "the directory does not answer"))
		for _, r := range slices.Concat(
			c.client.BatchPut(t.Context(), []core.Item{{Key: "a", Value: value}, {Key: "b", Value: value}}),
			c.client.BatchGet(t.Context(), []core.Item{{Key: "key", Value: value}, {Key: "b", Value: make([]byte, 1)}}),
			c.client.Exists(t.Context(), "key"), c.client.Remove(t.Context(), "key"), c.client.Stat(t.Context(), "key"),
		) {
			refused(t, r, status, code, "the directory does not answer")
		}
		if _, err := c.client.ExplainPut(t.Context(), []string{"a"}, []uint64{1}, core.ExplainOptions{}); backend.CodeOf(err) != code {
			t.Errorf("explain put: %v", err)
		}
	}
	failure.Store(nil)
	is(t, core.Found, c.client.Get(t.Context(), "key", value))
	c.quiet()
}

// odd is a node that answers strangely.
type odd struct {
	peer.Service
	change *change
}

// change is what an odd node does to its replies; nothing at first. It may be set while calls are under way.
type change struct {
	f atomic.Pointer[func(reply any) error]
}

func (c *change) set(f func(reply any) error) { c.f.Store(&f) }

func (o odd) apply(reply any) error {
	if f := o.change.f.Load(); f != nil && *f != nil {
		return (*f)(reply)
	}
	return nil
}

func (o odd) Allocate(ctx context.Context, req *peer.AllocateRequest, reply *peer.AllocateReply) error {
	return errors.Join(o.Service.Allocate(ctx, req, reply), o.apply(reply))
}

func (o odd) Commit(ctx context.Context, req *peer.CommitRequest, reply *peer.CommitReply) error {
	return errors.Join(o.Service.Commit(ctx, req, reply), o.apply(reply))
}

func (o odd) Resolve(ctx context.Context, req *peer.ResolveRequest, reply *peer.ResolveReply) error {
	return errors.Join(o.Service.Resolve(ctx, req, reply), o.apply(reply))
}

func (o odd) Remove(ctx context.Context, req *peer.RemoveRequest, reply *peer.RemoveReply) error {
	return errors.Join(o.Service.Remove(ctx, req, reply), o.apply(reply))
}

func (o odd) Release(ctx context.Context, req *peer.ReleaseRequest, reply *peer.ReleaseReply) error {
	return errors.Join(o.Service.Release(ctx, req, reply), o.apply(reply))
}

// TestLeaseByTheNodesWord: what is not compared with a checksum is a value only when the node says that it has held it
// all the while.
func TestLeaseByTheNodesWord(t *testing.T) {
	var change change
	c := newCluster(t, shape{client: core.ClientOptions{StagingSize: 1 << 20}, dial: func(s peer.Service) peer.Service { return odd{s, &change} }})
	value := made(100, 1)
	is(t, core.Stored, c.client.Put(t.Context(), "unsummed", value))
	c.client.Tune(core.Tuning{Verify: core.VerifyAll})
	is(t, core.Stored, c.client.Put(t.Context(), "summed", value))
	get := func(key string) core.Result { return c.client.Get(t.Context(), key, make([]byte, 100)) }
	is(t, core.Found, get("unsummed"), get("summed"))

	for _, tc := range []struct {
		f     func(r *peer.ReleaseReply) error
		code  backend.Code
		words string
	}{
		{func(r *peer.ReleaseReply) error { r.Held = false; return nil }, backend.Integrity, "ran out before the last byte had come"},
		{func(*peer.ReleaseReply) error { return backend.Errorf(backend.PathDown, "no answer") }, backend.PathDown, "no answer"},
	} {
		change.set(func(reply any) error {
			if r, ok := reply.(*peer.ReleaseReply); ok {
				return tc.f(r)
			}
			return nil
		})
		for _, verify := range []core.Verify{core.VerifyOff, core.VerifySample, core.VerifyAll} {
			c.client.Tune(core.Tuning{Verify: verify})
			refused(t, get("unsummed"), core.Failed, tc.code, `get "unsummed"`, tc.words)
			if verify == core.VerifyAll {
				is(t, core.Found, get("summed"))
			} else {
				refused(t, get("summed"), core.Failed, tc.code, tc.words)
			}
		}
	}
}

// TestOddNode: whatever a node answers, keys fail one by one, and nothing outside of its region is touched.
func TestOddNode(t *testing.T) {
	var change change
	c := newCluster(t, shape{client: verifyAll, dial: func(s peer.Service) peer.Service { return odd{s, &change} }})
	value := made(3*4096+1, 1)
	key := 0
	put := func(words string, status core.Status, code backend.Code, f func(reply any)) {
		t.Helper()
		change.set(func(reply any) error {
			f(reply)
			return nil
		})
		key++
		refused(t, c.client.Put(t.Context(), fmt.Sprint("put-", key), value), status, code, words)
	}
	allocated := func(f func(r *peer.AllocateReply)) func(any) {
		return func(reply any) {
			if r, ok := reply.(*peer.AllocateReply); ok {
				f(r)
			}
		}
	}
	committed := func(f func(r *peer.CommitReply)) func(any) {
		return func(reply any) {
			if r, ok := reply.(*peer.CommitReply); ok {
				f(r)
			}
		}
	}
	for _, tc := range []struct {
		words string
		f     func(r *peer.AllocateReply)
	}{
		{"region 1, and has 1", func(r *peer.AllocateReply) { r.Runs[0].Region = 1 }},
		{"range [16777216, +12289) of a region of 16777216 bytes", func(r *peer.AllocateReply) { r.Runs[0].Offset = 16 << 20 }},
		{"range [18446744073709551615, +12289)", func(r *peer.AllocateReply) { r.Runs[0].Offset = 1<<64 - 1 }},
		{"do not make up the value's 12289", func(r *peer.AllocateReply) { r.Runs[0].Length++ }},
		{"do not make up the value's 12289", func(r *peer.AllocateReply) { r.Runs[0].Length = 0 }},
		{"runs of 12288 bytes for a value of 12289", func(r *peer.AllocateReply) { r.Runs[0].Length-- }},
		{"answered for 0 keys of 1", func(r *peer.AllocateReply) { r.Slots = nil }},
	} {
		put(tc.words, core.Failed, backend.Internal, allocated(tc.f))
	}
	put("refuses a value", core.Failed, backend.BadRequest, allocated(func(r *peer.AllocateReply) { r.Slots[0].Status = peer.Unknown }))
	put("answered for 0 slots of 1", core.InDoubt, backend.Internal, committed(func(r *peer.CommitReply) { r.Statuses = nil }))
	put("refused the slot", core.Failed, backend.Internal, committed(func(r *peer.CommitReply) { r.Statuses[0] = peer.Unknown }))

	change.set(nil)
	is(t, core.Stored, c.client.Put(t.Context(), "key", value))
	get := func(words string, code backend.Code, f func(*peer.ResolveReply)) {
		t.Helper()
		change.set(func(reply any) error {
			if r, ok := reply.(*peer.ResolveReply); ok {
				f(r)
			}
			return nil
		})
		refused(t, c.client.Get(t.Context(), "key", make([]byte, len(value))), core.Failed, code, words)
	}
	get("region 7, and has 1", backend.Internal, func(r *peer.ResolveReply) { r.Runs[0].Region = 7 })
	get("of a region of", backend.Internal, func(r *peer.ResolveReply) { r.Runs[0].Offset = 16<<20 - 1 })
	get("do not make up the value's 5 bytes", backend.Internal, func(r *peer.ResolveReply) { r.Values[0].Size = 5 })
	get("has 18446744073709551615 bytes", backend.BadRequest, func(r *peer.ResolveReply) { r.Values[0].Size = 1<<64 - 1 })
	get("answered for 2 keys of 1", backend.Internal, func(r *peer.ResolveReply) { r.Values = append(r.Values, peer.Value{}) })
	get("status 0", backend.Internal, func(r *peer.ResolveReply) { r.Values[0].Status = peer.Unknown })
	get("checksum", backend.Integrity, func(r *peer.ResolveReply) { r.Runs[0].Offset += 4096 }) // another's bytes
	get("checksum", backend.Integrity, func(r *peer.ResolveReply) { r.Values[0].Checksum++ })

	change.set(func(reply any) error {
		if r, ok := reply.(*peer.RemoveReply); ok {
			r.Statuses = nil
		}
		return nil
	})
	refused(t, c.client.Remove(t.Context(), "key")[0], core.Failed, backend.Internal, "answered for 0 keys of 1")
}

// liar is a node that describes itself wrongly.
type liar struct {
	peer.Service
	change func(d *peer.Description)
}

func (l liar) Describe(ctx context.Context) (*peer.Description, error) {
	d, err := l.Service.Describe(ctx)
	if err == nil {
		l.change(d)
	}
	return d, err
}

// TestWrongDescription: a node that is not the one that the directory names, or that offers the memory of another,
// gets and gives nothing.
func TestWrongDescription(t *testing.T) {
	for words, change := range map[string]func(d *peer.Description){
		"in its place":                 func(d *peer.Description) { d.Peer.Incarnation++ },
		"found node-7@":                func(d *peer.Description) { d.Peer.Node = "node-7" },
		"a region that is not its own": func(d *peer.Description) { d.Regions[0].Peer.Node = "node-7" },
	} {
		honest := newCluster(t, shape{client: verifyAll})
		is(t, core.Stored, honest.client.Put(t.Context(), "key", made(100, 1)))
		honest.shape.dial = func(s peer.Service) peer.Service { return liar{s, change} }
		client := honest.newClient(honest.engine, verifyAll)
		r := client.Put(t.Context(), "other", made(100, 1))
		if r.Status != core.Failed {
			t.Errorf("put: %+v", r)
		}
		says(t, r.Err, words)
		if r := client.Get(t.Context(), "key", make([]byte, 100)); r.Status != core.Failed && r.Status != core.Missing {
			t.Errorf("get: %+v", r)
		}
		is(t, core.Found, honest.client.Get(t.Context(), "key", make([]byte, 100)))
	}
}

// TestCommitFails: what the node did not confirm is in doubt; what it says is gone is put again elsewhere.
func TestCommitFails(t *testing.T) {
	for code, want := range map[backend.Code]core.Status{backend.PathDown: core.InDoubt, backend.Cancelled: core.InDoubt, backend.PeerGone: core.Stored} {
		var change change
		failed := false
		c := newCluster(t, shape{nodes: 2, client: verifyAll, dial: func(s peer.Service) peer.Service { return odd{s, &change} }})
		change.set(func(reply any) error {
			if _, ok := reply.(*peer.CommitReply); ok && !failed {
				failed = true
				return backend.Errorf(code, "the answer is lost")
			}
			return nil
		})
		r := c.client.Put(t.Context(), "key", made(100, 1))
		if r.Status != want && !(code == backend.PeerGone && r.Status == core.Exists) {
			t.Errorf("%v: %+v, want %v", code, r, want)
		}
		if want == core.InDoubt {
			refused(t, r, core.InDoubt, code, `commit "key"`, "the answer is lost")
		}
	}
}
