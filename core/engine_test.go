package core_test

import (
	"context"
	"errors"
	"testing"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/control"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/fault"
)

func TestNewEngineRefuses(t *testing.T) {
	ok := network("reference")
	broken := ok
	broken.Name = "broken"
	broken.Open = func(context.Context, backend.Config) (backend.Backend, error) { return nil, errors.New("out of order") }
	rules := []selector.Rule{{Require: []string{"reference"}}}
	for name, tc := range map[string]struct {
		opts  core.EngineOptions
		words string
	}{
		"no name":        {core.EngineOptions{Backends: []host.Spec{{Factory: ok}}, Rules: rules}, "name of its node"},
		"wrong policy":   {core.EngineOptions{Node: "n", Backends: []host.Spec{{Factory: broken}}, Rules: rules}, `selection policy: rule 1 names backend "reference"`},
		"broken backend": {core.EngineOptions{Node: "n", Backends: []host.Spec{{Factory: ok}, {Factory: broken}}, Rules: rules}, "open backend broken: out of order"},
	} {
		_, err := core.NewEngine(t.Context(), tc.opts)
		if err == nil {
			t.Fatalf("%s: accepted", name)
		}
		says(t, err, tc.words)
	}
}

// TestBackendNotToBeHad: the process goes on, and the policy says what that means.
func TestBackendNotToBeHad(t *testing.T) {
	absent := network("absent")
	absent.Open = func(context.Context, backend.Config) (backend.Backend, error) {
		return nil, backend.Errorf(backend.Unsupported, "no such device")
	}
	c := newCluster(t, shape{client: verifyAll, backends: []backend.Factory{absent, network("reference")}})
	if r := c.client.Put(t.Context(), "key", made(100, 1)); r.Status != core.Stored || r.Path.Backend != "reference" {
		t.Errorf("%+v", r)
	}
	if b := c.engine.Backends(); len(b) != 2 || b[0].Backend != nil || !errors.Is(b[0].Err, backend.ErrUnsupported) || b[1].Backend == nil {
		t.Errorf("backends %+v", b)
	}
	_, err := c.engine.Answer(t.Context(), c.engine.Self(), "absent", nil)
	if backend.CodeOf(err) != backend.Unsupported {
		t.Errorf("an offer to a backend that is not there: %v", err)
	}
	if c.engine.Counters("unknown") != nil || c.engine.Counters("absent") == nil {
		t.Error("counters by name")
	}

	if err := c.engine.SetRules([]selector.Rule{{Require: []string{"absent"}}}); err != nil {
		t.Fatal(err)
	}
	refused(t, c.client.Put(t.Context(), "other", made(100, 1)), core.Failed, backend.Unsupported,
		"absent: unavailable", "no such device", "reference: not named by rule 1")
	if err := c.engine.SetRules([]selector.Rule{{Require: []string{"refrence"}}}); err == nil {
		t.Error("a policy with an unknown name is accepted")
	} else {
		says(t, err, `did you mean "reference"?`)
	}
	if err := c.engine.SetRules([]selector.Rule{{Prefer: []string{"reference"}}}); err != nil {
		t.Fatal(err)
	}
	is(t, core.Stored, c.client.Put(t.Context(), "other", made(100, 1)))
	c.engine.SetAttempts(1)
	is(t, core.Stored, c.client.Put(t.Context(), "third", made(100, 1)))
}

// TestRegister: a backend that cannot use a region is not chosen for it; without any, the region is refused.
func TestRegister(t *testing.T) {
	script := parse(t, "register:1*off->error(unsupported)") // the client's staging memory is all that it takes
	c := newCluster(t, shape{client: verifyAll, backends: []backend.Factory{network("first"), network("second")},
		wrap: faulty("client", "first", script)})
	value := c.alloc(4096)
	if r := c.client.Put(t.Context(), "registered", value); r.Status != core.Stored || r.Path.Backend != "second" || r.Path.Staged {
		t.Errorf("%+v", r)
	}
	if r := c.client.Put(t.Context(), "staged", make([]byte, 100)); r.Status != core.Stored || r.Path.Backend != "first" || !r.Path.Staged {
		t.Errorf("%+v", r)
	}

	none := newCluster(t, shape{wrap: faulty("client", "reference", parse(t, "register:error(unsupported)"))})
	if _, err := none.client.Alloc(t.Context(), 4096); err == nil {
		t.Error("memory that no backend can use is accepted")
	} else {
		says(t, err, "no backend can use the memory", "register region 1 with reference", "injected fault")
	}
	memory := make([]byte, 4096)
	if _, err := none.client.Register(t.Context(), memory); err == nil {
		t.Error("memory that no backend can use is accepted")
	}
	if _, err := core.NewPoolClient(t.Context(), core.ClientOptions{
		Engine: none.engine, Directory: none.dir, Dial: core.DialLocal(nil), StagingSize: 1 << 20,
	}); err == nil {
		t.Error("staging memory that no backend can use is accepted")
	} else {
		says(t, err, "staging memory")
	}
	if _, err := core.NewPoolClient(t.Context(), core.ClientOptions{Engine: none.engine}); err == nil {
		t.Error("a client without a directory is accepted")
	}
}

// TestRegisteredBuffer is memory of the caller's own.
func TestRegisteredBuffer(t *testing.T) {
	c := newCluster(t, shape{})
	arena, err := region.NewArena("test", 1<<16, region.ArenaOptions{HugePages: region.HugePagesOff})
	if err != nil {
		t.Fatal(err)
	}
	defer arena.Close()
	buf, err := c.client.Register(t.Context(), arena.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	fill(buf.Bytes(), 1)
	if r := c.client.Put(t.Context(), "key", buf.Bytes()); r.Status != core.Stored || r.Path.Staged {
		t.Errorf("%+v", r)
	}
	if _, err := c.client.Register(t.Context(), arena.Bytes()[100:]); backend.CodeOf(err) != backend.BadRequest {
		t.Errorf("memory that is registered already: %v", err)
	}
	for range 2 {
		if err := buf.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	refused(t, c.client.Put(t.Context(), "later", arena.Bytes()), core.Failed, backend.BadRequest, "no registered region")
}

// TestBufferCloses cancels what is in flight on the buffer, and frees it after that.
func TestBufferCloses(t *testing.T) {
	g := newGate(backend.Write, false)
	c := newCluster(t, shape{wrap: g.at("client")})
	buf, err := c.client.Alloc(t.Context(), 1<<16)
	if err != nil {
		t.Fatal(err)
	}
	put := make(chan core.Result, 1)
	go func() { put <- c.client.Put(t.Context(), "key", buf.Bytes()) }()
	receive(t, g.arrived)
	if err := buf.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	refused(t, receive(t, put), core.Failed, backend.Cancelled, `put "key"`)
	c.quiet()
}

// TestBufferWaits: a transfer that cannot be cancelled holds its buffer, and nothing new begins on it.
func TestBufferWaits(t *testing.T) {
	g := newGate(backend.Write, true)
	c := newCluster(t, shape{wrap: g.at("client")})
	t.Cleanup(g.letThrough)
	buf, err := c.client.Alloc(t.Context(), 1<<16)
	if err != nil {
		t.Fatal(err)
	}
	memory := buf.Bytes()
	put, closed := make(chan core.Result, 1), make(chan error, 1)
	go func() { put <- c.client.Put(t.Context(), "key", memory) }()
	receive(t, g.arrived)
	go func() { closed <- buf.Close(context.Background()) }()
	var late core.Result
	waitUntil(t, func() bool {
		late = c.client.Get(t.Context(), "absent", memory)
		return late.Status == core.Failed
	})
	refused(t, late, core.Failed, backend.BadRequest, "being registered or closed")
	select {
	case err := <-closed:
		t.Fatalf("the buffer is closed under its transfer: %v", err)
	default:
	}
	g.letThrough()
	if r := receive(t, put); r.Status != core.Stored && backend.CodeOf(r.Err) != backend.Cancelled {
		t.Errorf("%+v", r)
	}
	if err := receive(t, closed); err != nil {
		t.Error(err)
	}
}

func TestNewNodeRefuses(t *testing.T) {
	c := newCluster(t, shape{})
	for name, opts := range map[string]core.NodeOptions{
		"no page size":      {PoolSize: 4096, Directory: c.dir},
		"no pool":           {PageSize: 4096, Directory: c.dir},
		"no whole pages":    {PoolSize: 5000, PageSize: 4096, Directory: c.dir},
		"no directory":      {PoolSize: 4096, PageSize: 4096},
		"wrong watermarks":  {PoolSize: 4096, PageSize: 4096, Directory: c.dir, Limits: peer.Limits{HighWatermark: 7}},
		"unknown hugepages": {PoolSize: 4096, PageSize: 4096, Directory: c.dir, HugePages: "often"},
	} {
		if _, err := core.NewNode(t.Context(), c.engine, opts); backend.CodeOf(err) != backend.BadRequest {
			t.Errorf("%s: %v", name, err)
		}
	}
	none := newCluster(t, shape{wrap: func(owner, _ string, b backend.Backend) backend.Backend {
		if owner == "client" {
			return fault.Wrap(b, parse(t, "register:error(unsupported)"))
		}
		return b
	}})
	_, err := core.NewNode(t.Context(), none.engine, core.NodeOptions{PoolSize: 4096, PageSize: 4096, Directory: none.dir})
	says(t, err, "register the pool", "no backend can use the memory")
}

// TestPoolIsAlone: memory that a connector has registered on the engine of a node is no part of its pool.
func TestPoolIsAlone(t *testing.T) {
	c := newCluster(t, shape{})
	engine := c.newEngine("both")
	mine := make([]byte, 1<<20)
	if _, err := engine.Register(t.Context(), &region.Region{
		Kind: backend.HostMemory, Rights: backend.RemoteRead | backend.RemoteWrite, Bytes: mine, FD: -1,
	}); err != nil {
		t.Fatal(err)
	}
	if err := c.nodes[0].Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	node, err := core.NewNode(t.Context(), engine, core.NodeOptions{
		Directory: c.dir, Address: "both:1", PoolSize: 64 << 10, PageSize: 4096, HugePages: region.HugePagesOff,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { node.Close(context.Background()) })
	if err := node.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.nodes = append(c.nodes, node)
	if s := c.stats(1); s.Pages != 16 {
		t.Errorf("the pool has %d pages, want 16", s.Pages)
	}
	if node.HugePages() == "" || node.Engine() != engine {
		t.Error("the node does not say what it stands on")
	}
}

// TestOverGRPC runs the control plane over its real transport, and the bytes over the reference backend.
func TestOverGRPC(t *testing.T) {
	c := newCluster(t, shape{nodes: 2})
	server, err := control.Listen("127.0.0.1:0", nil, false)
	if err != nil {
		t.Fatal(err)
	}
	engine := c.newEngine("remote")
	node, err := core.NewNode(t.Context(), engine, core.NodeOptions{
		Directory: c.dir, Address: server.Address(), PoolSize: 1 << 20, PageSize: 4096, HugePages: region.HugePagesOff,
	})
	if err != nil {
		t.Fatal(err)
	}
	directory.Register(server, c.dir)
	peer.Register(server, node)
	served := make(chan error, 1)
	go func() { served <- server.Serve() }()
	t.Cleanup(func() {
		if err := node.Close(context.Background()); err != nil {
			t.Error(err)
		}
		server.Stop(context.Background())
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	for _, n := range c.nodes { // so that the remote node gets everything
		if err := n.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := node.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn, err := control.Connect(server.Address(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	client, err := core.NewPoolClient(t.Context(), core.ClientOptions{
		Engine: c.engine, Directory: directory.NewClient(conn), Dial: core.DialLocal(core.DialControl(nil), c.nodes...),
		StagingSize: 1 << 20, Tuning: core.Tuning{Verify: core.VerifyAll},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	c.client = client
	list := items(c.alloc(1<<20), []int{1, 5000, 100_000, 4096}, 1)
	is(t, core.Stored, client.BatchPut(t.Context(), list)...)
	into := buffers(c.alloc(1<<20), list, 1)
	sameBytes(t, list, into, client.BatchGet(t.Context(), into))
	is(t, core.Found, client.Stat(t.Context(), "key-0", "key-3")...)
	is(t, core.Removed, client.Remove(t.Context(), "key-0")...)
	waitUntil(t, func() bool { // leases are given back beside the calls
		s, err := node.Stats(t.Context())
		return err == nil && s.Leases == 0 && s.PendingSlots == 0
	})

	// A directory that names a node that is not there any more.
	gone := backend.Peer{Node: "gone", Incarnation: 5}
	if _, err := c.dir.Join(t.Context(), &directory.Node{Peer: gone, Address: server.Address(), Capacity: 1 << 30, Free: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	var reply directory.PublishReply
	if err := c.dir.Publish(t.Context(), &directory.PublishRequest{Peer: gone, Keys: []string{"lost"}, Sizes: []uint64{5}, Free: 1 << 30}, &reply); err != nil {
		t.Fatal(err)
	}
	is(t, core.Missing, client.Get(t.Context(), "lost", make([]byte, 5)))
	if r := client.Put(t.Context(), "new", made(100, 1)); r.Status != core.Stored || r.Path.Node != "remote" {
		t.Errorf("%+v", r)
	}
}

func TestStats(t *testing.T) {
	c := newCluster(t, shape{client: verifyAll})
	is(t, core.Stored, c.client.Put(t.Context(), "a", made(5000, 1)))
	is(t, core.Exists, c.client.Put(t.Context(), "a", made(5000, 1)))
	is(t, core.Found, c.client.Get(t.Context(), "a", make([]byte, 5000)))
	is(t, core.Missing, c.client.Get(t.Context(), "b", make([]byte, 5000)))
	is(t, core.Exists, c.client.Exists(t.Context(), "a")...)
	s := c.client.Stats()
	if s.Transfers != 2 || s.Segments != 2 || s.Runs != 2 || s.StagedBytes != 3*5000 || s.Control == 0 || s.Plan == 0 ||
		s.Verify == 0 || s.Staging == 0 {
		t.Errorf("%+v", s)
	}
	want := map[string]core.OpSnapshot{
		"put":    {Batches: 2, Bytes: 5000, Results: map[core.Status]uint64{core.Stored: 1, core.Exists: 1}},
		"get":    {Batches: 2, Bytes: 5000, Results: map[core.Status]uint64{core.Found: 1, core.Missing: 1}},
		"exists": {Batches: 1, Results: map[core.Status]uint64{core.Exists: 1}},
		"remove": {}, "stat": {},
	}
	for _, op := range s.Ops {
		w := want[op.Op]
		if op.Batches != w.Batches || op.Bytes != w.Bytes || len(op.Results) != len(w.Results) {
			t.Errorf("%s: %+v, want %+v", op.Op, op, w)
		}
		for status, n := range w.Results {
			if op.Results[status] != n {
				t.Errorf("%s: %d of %v, want %d", op.Op, op.Results[status], status, n)
			}
		}
	}
}

func TestStatusWords(t *testing.T) {
	for status, want := range map[core.Status]string{
		core.Failed: "failed", core.Stored: "stored", core.Exists: "exists", core.Found: "found", core.Missing: "missing",
		core.Removed: "removed", core.Busy: "busy", core.NoSpace: "no space", core.InDoubt: "in doubt", 99: "status-99",
	} {
		if got := status.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if text, _ := core.InDoubt.MarshalText(); string(text) != "in_doubt" {
		t.Errorf("got %q", text)
	}
}
