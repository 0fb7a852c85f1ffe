package core_test

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/fault"
	"github.com/umbp/umbp/plugin-sdk/reference"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must happen, and how long the parts of a cluster wait for each other where
// the test is not about that: a machine may be so busy that a process stands still for seconds. A test that is about
// time has a clock of its own, by synctest.
const patience = time.Minute

// cluster is a directory, nodes and a client in one process, over the reference backend.
type cluster struct {
	tb     testing.TB
	shape  shape
	dir    *directory.Memory
	nodes  []*core.Node
	engine *core.Engine
	client *core.PoolClient
}

type shape struct {
	nodes    int         // default 1
	poolSize uint64      // of each node; default 16 MiB
	pageSize uint64      // default 4096
	limits   peer.Limits // SlotTTL and LeaseTTL: default patience
	client   core.ClientOptions
	quiet    time.Duration // QuietTimeout of the engines; default patience
	// embedded puts the client on the engine of the first node.
	embedded bool
	// backends are the networks that engines are on, in the order of preference; default one, named reference.
	backends []backend.Factory
	// wrap, if not nil, wraps a backend of one engine: "node-0", "node-1", ... or "client".
	wrap func(owner, name string, b backend.Backend) backend.Backend
	// pool, if not nil, says where the pool of a node lies, unless that is the memory of the host.
	pool func(node string) *backend.GPURange
	// dial, if not nil, wraps the way to a node's control plane.
	dial func(peer.Service) peer.Service
	// directory, if not nil, wraps the directory that clients see.
	directory func(directory.Directory) directory.Directory
}

// network returns the factory of a network of its own, under a name.
func network(name string) backend.Factory {
	f := reference.NewNetwork().Factory()
	f.Name = name
	return f
}

func newCluster(tb testing.TB, s shape) *cluster {
	tb.Helper()
	if s.nodes == 0 {
		s.nodes = 1
	}
	if s.poolSize == 0 {
		s.poolSize = 16 << 20
	}
	if s.pageSize == 0 {
		s.pageSize = 4096
	}
	s.limits.SlotTTL = cmp.Or(s.limits.SlotTTL, patience)
	s.limits.LeaseTTL = cmp.Or(s.limits.LeaseTTL, patience)
	s.quiet = cmp.Or(s.quiet, patience)
	if s.backends == nil {
		s.backends = []backend.Factory{network("reference")}
	}
	c := &cluster{tb: tb, shape: s, dir: directory.NewMemory(directory.Options{TTL: patience})}
	tb.Cleanup(func() { c.dir.Close() })
	for i := range s.nodes {
		c.addNode(fmt.Sprintf("node-%d", i))
	}
	if s.embedded {
		c.engine = c.nodes[0].Engine()
	} else {
		c.engine = c.newEngine("client")
	}
	c.client = c.newClient(c.engine, s.client)
	return c
}

func (c *cluster) addNode(name string) *core.Node {
	c.tb.Helper()
	opts := core.NodeOptions{
		Directory: c.dir, Address: name + ":1", PoolSize: c.shape.poolSize, PageSize: c.shape.pageSize,
		HugePages: region.HugePagesOff, Limits: c.shape.limits,
	}
	if c.shape.pool != nil {
		if opts.GPU = c.shape.pool(name); opts.GPU != nil {
			opts.PoolSize = 0
		}
	}
	node, err := core.NewNode(c.tb.Context(), c.newEngine(name), opts)
	if err != nil {
		c.tb.Fatal(err)
	}
	c.tb.Cleanup(func() {
		if err := node.Close(context.Background()); err != nil {
			c.tb.Error(err)
		}
	})
	if err := node.Start(c.tb.Context()); err != nil {
		c.tb.Fatal(err)
	}
	c.nodes = append(c.nodes, node)
	return node
}

func (c *cluster) newEngine(name string) *core.Engine {
	c.tb.Helper()
	var specs []host.Spec
	var names []string
	for _, f := range c.shape.backends {
		spec := host.Spec{Factory: f}
		if c.shape.wrap != nil {
			spec.Wrap = func(b backend.Backend) backend.Backend { return c.shape.wrap(name, f.Name, b) }
		}
		specs = append(specs, spec)
		names = append(names, f.Name)
	}
	engine, err := core.NewEngine(c.tb.Context(), core.EngineOptions{
		Node: name, Backends: specs, Rules: []selector.Rule{{Require: names}},
		ConnectTimeout: patience, QuietTimeout: c.shape.quiet,
	})
	if err != nil {
		c.tb.Fatal(err)
	}
	c.tb.Cleanup(func() {
		if err := engine.Close(); err != nil {
			c.tb.Error(err)
		}
	})
	return engine
}

func (c *cluster) newClient(engine *core.Engine, opts core.ClientOptions) *core.PoolClient {
	c.tb.Helper()
	opts.Engine, opts.Directory = engine, c.dir
	opts.Tuning.Timeout = cmp.Or(opts.Tuning.Timeout, patience)
	if c.shape.directory != nil {
		opts.Directory = c.shape.directory(c.dir)
	}
	opts.Dial = func(ctx context.Context, node directory.Node) (peer.Service, func() error, error) {
		service, hangUp, err := core.DialLocal(nil, c.nodes...)(ctx, node)
		if err == nil && c.shape.dial != nil {
			service = c.shape.dial(service)
		}
		return service, hangUp, err
	}
	client, err := core.NewPoolClient(c.tb.Context(), opts)
	if err != nil {
		c.tb.Fatal(err)
	}
	c.tb.Cleanup(func() {
		if err := client.Close(context.Background()); err != nil {
			c.tb.Error(err)
		}
	})
	return client
}

// alloc returns registered memory of the client.
func (c *cluster) alloc(size int) []byte {
	c.tb.Helper()
	buf, err := c.client.Alloc(c.tb.Context(), uint64(size))
	if err != nil {
		c.tb.Fatal(err)
	}
	c.tb.Cleanup(func() {
		if err := buf.Close(context.Background()); err != nil {
			c.tb.Error(err)
		}
	})
	return buf.Bytes()
}

// stats returns the state of a node's pool.
func (c *cluster) stats(node int) *peer.Stats {
	c.tb.Helper()
	s, err := c.nodes[node].Stats(context.Background())
	if err != nil {
		c.tb.Fatal(err)
	}
	return s
}

// quiet waits until no node holds anything that is not a committed value: no slot waits, no lease is held, no page
// is in quarantine.
func (c *cluster) quiet() {
	c.tb.Helper()
	waitUntil(c.tb, func() bool {
		for i := range c.nodes {
			if s := c.stats(i); s.PendingSlots+s.Leases+s.QuarantinedPages != 0 {
				return false
			}
		}
		return true
	})
}

// waitUntil fails the test instead of letting it hang.
func waitUntil(tb testing.TB, holds func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatal("it does not come about")
		}
	}
}

// receive fails the test instead of letting it hang.
func receive[T any](tb testing.TB, c <-chan T) T {
	tb.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		tb.Fatal("nothing came")
		panic("unreachable")
	}
}

// fill fills b with bytes that depend on the seed.
func fill(b []byte, seed uint64) {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	rand.NewChaCha8(key).Read(b)
}

// made returns n bytes of unregistered memory, filled.
func made(n int, seed uint64) []byte {
	b := make([]byte, n)
	fill(b, seed)
	return b
}

// parse reads a fault script.
func parse(tb testing.TB, text string) *fault.Script {
	tb.Helper()
	s, err := fault.Parse(text)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// faulty returns a shape.wrap that gives one backend of one engine the faults of a script.
func faulty(owner, name string, s *fault.Script) func(string, string, backend.Backend) backend.Backend {
	return func(o, n string, b backend.Backend) backend.Backend {
		if o == owner && n == name {
			return fault.Wrap(b, s)
		}
		return b
	}
}

// fences counts the calls of Fence.
type fences struct {
	backend.Backend
	n *atomic.Int64
}

func (f fences) Fence(ctx context.Context, p backend.Peer) error {
	f.n.Add(1)
	return f.Backend.Fence(ctx, p)
}

// is fails the test unless every result has the status.
func is(tb testing.TB, want core.Status, results ...core.Result) {
	tb.Helper()
	for i, r := range results {
		if r.Status != want {
			tb.Fatalf("result %d: %v, want %v (%v)", i, r.Status, want, r.Err)
		}
		if r.OK() && r.Err != nil {
			tb.Fatalf("result %d: %v, and an error: %v", i, r.Status, r.Err)
		}
	}
}

// refused fails the test unless the result has the status, and an error of the code that says all the words.
func refused(tb testing.TB, r core.Result, status core.Status, code backend.Code, words ...string) {
	tb.Helper()
	if r.Status != status || backend.CodeOf(r.Err) != code {
		tb.Errorf("%v, %v; want %v, %v", r.Status, r.Err, status, code)
	}
	says(tb, r.Err, words...)
}
