package core_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// renewable is a backend that can be started anew, as one that runs as a process is.
type renewable struct {
	backend.Backend
	open func() (backend.Backend, error)

	mu      sync.Mutex
	regions []backend.Memory
}

func (r *renewable) now() backend.Backend {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.Backend
}

func (r *renewable) Register(ctx context.Context, m backend.Memory) ([]byte, error) {
	r.mu.Lock()
	r.regions = append(r.regions, m)
	r.mu.Unlock()
	return r.now().Register(ctx, m)
}

func (r *renewable) Deregister(ctx context.Context, id backend.RegionID) error {
	return r.now().Deregister(ctx, id)
}

func (r *renewable) Offer(ctx context.Context, p backend.Peer) (backend.Handshake, error) {
	return r.now().Offer(ctx, p)
}

func (r *renewable) Answer(ctx context.Context, p backend.Peer, offer []byte) ([]byte, error) {
	return r.now().Answer(ctx, p, offer)
}

func (r *renewable) Fence(ctx context.Context, p backend.Peer) error { return r.now().Fence(ctx, p) }
func (r *renewable) Close() error                                    { return r.now().Close() }

// renew replaces the instance, and tells the engine of the new keys.
func (r *renewable) renew(t *testing.T, e *core.Engine) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.Backend.Close(); err != nil {
		t.Fatal(err)
	}
	var err error
	if r.Backend, err = r.open(); err != nil {
		t.Fatal(err)
	}
	for _, m := range r.regions {
		key, err := r.Backend.Register(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		e.TellKey("reference", m.Region, key)
	}
}

// renewing returns a factory of renewable backends, which are found by the name of their node.
func renewing(f backend.Factory) (backend.Factory, map[string]*renewable) {
	opened := map[string]*renewable{}
	inner := f.Open
	f.Open = func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
		r := &renewable{open: func() (backend.Backend, error) { return inner(context.Background(), cfg) }}
		var err error
		r.Backend, err = r.open()
		opened[cfg.Self.Node] = r
		return r, err
	}
	return f, opened
}

// TestBackendStartedAnew: the backend of the node, and then that of the client, is started anew. The client goes on
// with the node that it knows, whose descriptors are from before.
func TestBackendStartedAnew(t *testing.T) {
	factory, opened := renewing(network("reference"))
	c := newCluster(t, shape{client: verifyAll, backends: []backend.Factory{factory}})
	node := c.nodes[0]
	describe := func() []byte {
		d, err := node.Describe(t.Context())
		if err != nil || len(d.Regions) != 1 {
			t.Fatalf("%+v, %v", d, err)
		}
		return d.Regions[0].Keys["reference"]
	}
	key := describe()
	for i := range 3 {
		value := made(10_000, uint64(i))
		name := fmt.Sprint("key-", i)
		is(t, core.Stored, c.client.Put(t.Context(), name, value))
		opened["node-0"].renew(t, node.Engine())
		if young := describe(); string(young) == string(key) {
			t.Fatal("the key is the one of before")
		} else {
			key = young
		}
		got := make([]byte, len(value))
		if r := c.client.Get(t.Context(), name, got); r.Status != core.Found || string(got) != string(value) {
			t.Fatalf("after the node's backend was started anew: %+v", r)
		}
		opened["client"].renew(t, c.engine)
		if r := c.client.Get(t.Context(), name, got); r.Status != core.Found || string(got) != string(value) {
			t.Fatalf("after the client's backend was started anew: %+v", r)
		}
	}
	if n := c.client.KnownNodes(); n != 1 {
		t.Errorf("the client knows %d nodes", n)
	}
}

// TestAnswerKeys: a node's service gives away the keys of the pool alone; an engine those of all its regions that peers
// may reach.
func TestAnswerKeys(t *testing.T) {
	c := newCluster(t, shape{embedded: true})
	own, err := c.engine.Register(t.Context(), &region.Region{
		Kind: backend.HostMemory, Rights: backend.RemoteRead, Bytes: make([]byte, 4096), FD: -1,
	})
	if err != nil {
		t.Fatal(err)
	}
	c.alloc(4096) // that nobody else may reach
	ask := func(answer func(offer []byte) (*peer.AnswerReply, error)) *peer.AnswerReply {
		t.Helper()
		reply, err := answer(make([]byte, 24))
		if err != nil && backend.CodeOf(err) != backend.PeerGone {
			t.Fatal(err)
		}
		return reply
	}
	offer := func() []byte {
		h, err := c.engine.Backends()[0].Backend.Offer(t.Context(), c.engine.Self())
		if err != nil {
			t.Fatal(err)
		}
		defer h.Abandon()
		return h.Offer()
	}
	all := ask(func([]byte) (*peer.AnswerReply, error) {
		return c.engine.Answer(t.Context(), c.engine.Self(), "reference", offer())
	})
	if len(all.Keys) != 2 || len(all.Keys[1]) == 0 || len(all.Keys[own.ID]) == 0 {
		t.Errorf("the engine gives the keys %v", all.Keys)
	}
	pool := ask(func([]byte) (*peer.AnswerReply, error) {
		return c.nodes[0].Answer(t.Context(), &peer.AnswerRequest{
			From: c.engine.Self(), To: c.engine.Self().Incarnation, Backend: "reference", Offer: offer(),
		})
	})
	if len(pool.Keys) != 1 || string(pool.Keys[1]) != string(all.Keys[1]) {
		t.Errorf("the node gives the keys %v", pool.Keys)
	}
	if err := c.engine.Deregister(t.Context(), own.ID); err != nil {
		t.Fatal(err)
	}
}

// early tells of a younger key before Register has returned the first one.
type early struct {
	backend.Backend
	tell func(id backend.RegionID)
}

func (e early) Register(ctx context.Context, m backend.Memory) ([]byte, error) {
	key, err := e.Backend.Register(ctx, m)
	e.tell(m.Region)
	return key, err
}

// TestYoungerKeyStays: a backend is started anew between the return of its Register and the engine's note of it.
func TestYoungerKeyStays(t *testing.T) {
	var engine *core.Engine
	c := newCluster(t, shape{wrap: func(owner, _ string, b backend.Backend) backend.Backend {
		if owner != "client" {
			return b
		}
		return early{b, func(id backend.RegionID) { engine.TellKey("reference", id, []byte("younger")) }}
	}})
	engine = c.engine
	r, err := engine.Register(t.Context(), &region.Region{
		Kind: backend.HostMemory, Rights: backend.RemoteRead, Bytes: make([]byte, 4096), FD: -1,
	})
	if err != nil {
		t.Fatal(err)
	}
	if key := string(r.Keys["reference"]); key != "younger" {
		t.Errorf("the key is %q", key)
	}
	if err := engine.Deregister(t.Context(), r.ID); err != nil {
		t.Fatal(err)
	}
	engine.TellKey("reference", r.ID, []byte("late")) // for a region that is gone
	if _, err := engine.Descriptor(r.ID); err == nil {
		t.Error("the region is back")
	}
}

// TestSetBackendEnabled: the operator disables a backend at the client, and then at the node.
func TestSetBackendEnabled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, shape{client: verifyAll, backends: []backend.Factory{network("first"), network("second")}})
		keys := 0
		way := func(client *core.PoolClient, want string) {
			t.Helper()
			keys++
			key := fmt.Sprint("key-", keys)
			if r := client.Put(t.Context(), key, made(100, 1)); r.Status != core.Stored || r.Path.Backend != want {
				t.Fatalf("%+v, %v; want it over %s", r, r.Err, want)
			}
			if r := client.Get(t.Context(), key, make([]byte, 100)); r.Status != core.Found || r.Path.Backend != want {
				t.Fatalf("%+v, %v; want it over %s", r, r.Err, want)
			}
		}
		set := func(e *core.Engine, name string, enabled bool) {
			t.Helper()
			if err := e.SetBackendEnabled(t.Context(), name, enabled); err != nil {
				t.Fatal(err)
			}
		}
		way(c.client, "first")
		set(c.engine, "first", false)
		if n := c.engine.Counters("first").Endpoints.Load(); n != 0 {
			t.Errorf("%d endpoints are left", n)
		}
		way(c.client, "second")
		explained, err := c.client.ExplainPut(t.Context(), []string{"k"}, []uint64{100}, core.ExplainOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if r := explained.Shown[0].Rejected; len(r) != 1 || r[0].Backend != "first" || r[0].Reason != "disabled by the operator" {
			t.Errorf("the reasons are %+v", r)
		}
		set(c.engine, "second", false)
		r := c.client.Put(t.Context(), "nowhere", made(100, 1))
		refused(t, r, core.Failed, backend.Unsupported, "first: disabled by the operator", "second: disabled by the operator")
		set(c.engine, "second", true)
		set(c.engine, "first", true)
		way(c.client, "first")

		// At the node: who is connected stays so, who comes takes another way, and comes back when the backend does.
		node := c.nodes[0].Engine()
		set(node, "first", false)
		way(c.client, "first")
		newcomer := c.newClient(c.newEngine("newcomer"), verifyAll)
		way(newcomer, "second")
		set(node, "first", true)
		waitUntil(t, func() bool { // the outage that the newcomer has noted has an end
			keys++
			return newcomer.Put(t.Context(), fmt.Sprint("key-", keys), made(100, 1)).Path.Backend == "first"
		})

		states := node.BackendStates()
		if len(states) != 2 || states[0].Name != "first" || states[0].Info == nil || states[0].Disabled || states[0].Reason != "" || states[0].Process != nil {
			t.Errorf("states %+v", states)
		}
		set(node, "second", false)
		if s := node.BackendStates(); s[0].Disabled || !s[1].Disabled {
			t.Errorf("states %+v", s)
		}
		for call, err := range map[string]error{
			`no backend "frist", did you mean "first"?`: node.SetBackendEnabled(t.Context(), "frist", false),
			`no backend "third"`:                        node.RestartBackend(t.Context(), "third"),
			`linked into this node`:                     node.RestartBackend(t.Context(), "first"),
		} {
			if backend.CodeOf(err) != backend.BadRequest || !strings.Contains(err.Error(), call) {
				t.Errorf("got %v, want %s", err, call)
			}
		}
	})
}

// TestRestartOfWhatIsNotThere: a backend that was not to be had when the engine was made.
func TestRestartOfWhatIsNotThere(t *testing.T) {
	absent := network("absent")
	absent.Open = func(context.Context, backend.Config) (backend.Backend, error) {
		return nil, backend.Errorf(backend.Unsupported, "no such device")
	}
	c := newCluster(t, shape{backends: []backend.Factory{absent, network("reference")}})
	err := c.engine.RestartBackend(t.Context(), "absent")
	if backend.CodeOf(err) != backend.BadRequest {
		t.Errorf("got %v", err)
	}
	says(t, err, "not to be had when this node started", "no such device")
	if s := c.engine.BackendStates()[0]; s.Info != nil || !strings.Contains(s.Reason, "no such device") {
		t.Errorf("state %+v", s)
	}
}

// TestOneOperatorAtATime: who waits for another's drain to end, can give up.
func TestOneOperatorAtATime(t *testing.T) {
	script := parse(t, "complete:drop")
	c := newCluster(t, shape{wrap: faulty("client", "reference", script), client: core.ClientOptions{StagingSize: 1 << 20}})
	put := make(chan core.Result, 1)
	putting, stop := context.WithCancel(t.Context())
	go func() { put <- c.client.Put(putting, "key", made(100, 1)) }()
	waitUntil(t, func() bool { return script.Fired("complete") > 0 })
	disabled := make(chan error, 1)
	go func() { disabled <- c.engine.SetBackendEnabled(t.Context(), "reference", false) }()
	waitUntil(t, func() bool { return c.engine.BackendStates()[0].Disabled })
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.engine.SetBackendEnabled(gone, "reference", true); backend.CodeOf(err) != backend.Cancelled {
		t.Errorf("got %v", err)
	}
	stop()
	if err := receive(t, disabled); err != nil {
		t.Error(err)
	}
	receive(t, put)
}
