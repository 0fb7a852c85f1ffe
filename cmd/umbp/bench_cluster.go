package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"time"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/null"
	"github.com/umbp/umbp/plugins/shm"
	"github.com/umbp/umbp/plugins/tcp"
)

// benchCase is one combination of the flags of a benchmark.
type benchCase struct {
	op, scenario, backend string
	mode                  string // how the backends run: config.InProcess or config.AsProcess
	plugins               config.Plugins
	batch, itemPages      int
	pageBytes             uint64
	peers                 int
	options               map[string]string // of the backend that is measured
	memory, pool          place             // of the caller's values, and of the pools
	gpu                   config.GPU
}

// The operations and scenarios.
const (
	benchPut = "put"
	benchGet = "get"

	allZeroCopy = "all_zc"     // the caller's memory is registered; one target
	mixed       = "mixed"      // likewise; the caller is a node too, and holds half of the items
	allStaged   = "all_stg"    // the caller's memory is not registered; one target
	multiPeer   = "multi_peer" // registered; several targets
)

func (c *benchCase) itemBytes() uint64  { return uint64(c.itemPages) * c.pageBytes }
func (c *benchCase) batchBytes() uint64 { return uint64(c.batch) * c.itemBytes() }
func (c *benchCase) pages() int         { return c.batch * c.itemPages }

// moveless tells whether the backend moves no bytes.
func (c *benchCase) moveless() bool {
	return c.backend == null.Name || simulations[c.backend] != nil
}

func (c *benchCase) targets() int {
	if c.scenario == multiPeer {
		return max(c.peers, 2)
	}
	return 1
}

// String names the case in progress reports and errors.
func (c *benchCase) String() string {
	between := ""
	if c.gpus() {
		between = fmt.Sprintf(" between %s and %s", c.memory, c.pool)
	}
	return fmt.Sprintf("batch-%s %s over %s%s, %d x %d pages of %s", c.op, c.scenario, c.backend, between, c.batch, c.itemPages, humanSize(c.pageBytes))
}

// gpus tells whether memory of a GPU is at either end.
func (c *benchCase) gpus() bool { return c.memory.gpu || c.pool.gpu }

// in returns the case with its backends in another mode.
func (c *benchCase) in(mode string) benchCase {
	other := *c
	other.mode = mode
	return other
}

// autoBackend stands for the backends of the default policy.
const autoBackend = "auto"

// headroom is how many batches fit into the pool of a target.
const headroom = 4

// benchCluster is a directory, the targets, and the caller, in one process. The control plane is direct calls; the
// bytes go over the backends.
type benchCluster struct {
	benchCase
	factories []backend.Factory // of every end; what is measured comes last
	still     func()            // called after each call: since the first one everything is connected
	directory *directory.Memory
	nodes     []*core.Node
	caller    *core.Engine
	clients   map[string]*core.PoolClient // by plan

	memoryOn, poolOn *gpuDevice // nil for the host

	data   *memory // the caller's: what is put, or got into
	mirror *memory // the other end of the comparison: what is got to check a put, or was put to be got
	serial int     // of the keys
	items  []core.Item

	closers []func() error // in the order of opening
}

// openBench starts a cluster with a client for each plan.
func openBench(ctx context.Context, c benchCase, plans []string) (_ *benchCluster, err error) {
	b := &benchCluster{
		benchCase: c, directory: directory.NewMemory(directory.Options{TTL: ownLease}), clients: make(map[string]*core.PoolClient),
		items: make([]core.Item, c.batch),
	}
	b.factories, b.still = c.factories()
	b.closers = append(b.closers, b.directory.Close)
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s, %s: %w", &c, c.mode, errors.Join(err, b.Close()))
		}
	}()
	if b.memoryOn, err = b.openGPU(c.memory); err != nil {
		return nil, err
	}
	if b.poolOn, err = b.openGPU(c.pool); err != nil {
		return nil, err
	}
	for i := range c.targets() {
		engine, err := b.openEngine(ctx, fmt.Sprintf("target-%d", i), "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		if err := b.startNode(ctx, engine); err != nil {
			return nil, err
		}
	}
	if b.caller, err = b.openEngine(ctx, "caller", "off"); err != nil {
		return nil, err
	}
	if c.scenario == mixed {
		// A pool like the target's: placing by free room then sends every second item to each.
		if err := b.startNode(ctx, b.caller); err != nil {
			return nil, err
		}
	}
	for _, plan := range plans {
		if err := b.openClient(ctx, plan); err != nil {
			return nil, err
		}
	}
	return b, b.openMemory(ctx, b.clients[plans[0]])
}

// Close ends the cluster, last opened first.
func (b *benchCluster) Close() error {
	var errs []error
	for _, c := range slices.Backward(b.closers) {
		errs = append(errs, c())
	}
	return errors.Join(errs...)
}

// openGPU opens the device of a place; nil stands for the host's.
func (b *benchCluster) openGPU(p place) (*gpuDevice, error) {
	device, err := p.open(b.gpu)
	if device != nil {
		b.closers = append(b.closers, device.Close)
	}
	return device, err
}

// factories returns the backends of each end, and the still of benchCluster. A backend that is not linked in has no more
// than a name, and runs as a process.
func (c *benchCase) factories() (list []backend.Factory, still func()) {
	still = func() {}
	switch c.backend {
	case null.Name:
		return []backend.Factory{null.Factory}, still
	case autoBackend:
		return []backend.Factory{shm.Factory, tcp.Factory}, still
	case shm.Factory.Name:
		return []backend.Factory{shm.Factory}, still
	}
	f := linked(c.backend)
	f.Name = c.backend
	if simulate := simulations[c.backend]; simulate != nil {
		s := simulate()
		f, still = s.factory, s.still
	}
	if c.scenario == mixed && !c.gpus() { // the one where something is in the caller's own memory
		list = append(list, shm.Factory)
	}
	return append(list, f), still
}

func (b *benchCluster) openEngine(ctx context.Context, name, listen string) (*core.Engine, error) {
	rules := []selector.Rule{{Require: []string{b.backend}}}
	within := true
	switch b.backend {
	case null.Name:
	case autoBackend:
		rules = []selector.Rule{{Prefer: []string{shm.Factory.Name}, Allow: []string{tcp.Factory.Name}}}
	default:
		if b.scenario == mixed && !b.gpus() {
			rules = append([]selector.Rule{{Match: selector.Match{SameNode: &within}, Require: []string{shm.Factory.Name}}}, rules...)
		}
	}
	var specs []host.Spec
	for _, f := range b.factories {
		options := map[string]string{}
		if f.Name == b.backend {
			options = b.backendOptions()
		}
		if f.Name == tcp.Factory.Name {
			options = withOption(options, "listen", listen)
		}
		spec, err := backendSpec(f, b.mode, b.plugins, config.Backend{Name: f.Name, Options: options})
		if err != nil {
			return nil, err
		}
		specs = append(specs, spec)
	}
	engine, err := core.NewEngine(ctx, core.EngineOptions{Node: name, Backends: specs, Rules: rules})
	if err != nil {
		return nil, err
	}
	b.closers = append(b.closers, engine.Close)
	for _, opened := range engine.Backends() {
		if opened.Err != nil { // what is measured must not go another way
			return nil, opened.Err
		}
	}
	return engine, nil
}

// backendOptions returns the options of the backend that is measured. One for GPUs opens what the command allocates with.
func (c *benchCase) backendOptions() map[string]string {
	options := map[string]string{}
	if c.backend == xgmiName {
		options["runtime"] = cmp.Or(c.gpu.Runtime, "auto")
		options["library"] = c.gpu.Library
	}
	maps.Copy(options, c.options)
	return options
}

func (b *benchCluster) startNode(ctx context.Context, engine *core.Engine) error {
	opts := core.NodeOptions{
		Directory: b.directory, Address: engine.Self().Node + ":1", PoolSize: headroom * b.batchBytes(), PageSize: b.pageBytes,
	}
	if b.poolOn != nil {
		at, free, err := b.poolOn.alloc(opts.PoolSize)
		if err != nil {
			return err
		}
		b.closers = append(b.closers, free)
		opts.GPU = &at
	}
	node, err := core.NewNode(ctx, engine, opts)
	if b.poolOn != nil {
		err = needsGPUBackend(err)
	}
	if err != nil {
		return err
	}
	b.nodes = append(b.nodes, node)
	b.closers = append(b.closers, func() error { return node.Close(context.Background()) })
	return node.Start(ctx)
}

func (b *benchCluster) openClient(ctx context.Context, plan string) error {
	opts := core.ClientOptions{Engine: b.caller, Directory: b.directory, Dial: core.DialLocal(nil, b.nodes...)}
	if plan == perPage {
		opts.PerPage = b.pageBytes
	}
	if b.scenario == allStaged {
		opts.StagingSize = b.batchBytes()
	}
	client, err := core.NewPoolClient(ctx, opts)
	if err == nil {
		b.clients[plan] = client
		b.closers = append(b.closers, func() error { return client.Close(context.Background()) })
	}
	return err
}

// openMemory allocates the two ends of the comparison. Staged memory is populated like the other, but not
// registered.
func (b *benchCluster) openMemory(ctx context.Context, client *core.PoolClient) error {
	open := func(registered bool) (m *memory, err error) {
		if registered {
			m, err = openMemory(ctx, client, b.memoryOn, b.batchBytes())
		} else {
			m, err = openUnregistered(ctx, b.batchBytes())
		}
		if err == nil {
			b.closers = append(b.closers, func() error { return m.Close(context.Background()) })
		}
		return m, err
	}
	var err error
	if b.mirror, err = open(true); err == nil {
		b.data, err = open(b.scenario != allStaged)
	}
	return err
}

// name gives the items fresh keys, and the values in memory.
func (b *benchCluster) name(m *memory) {
	b.serial++
	for i := range b.items {
		b.items[i].Key = fmt.Sprintf("bench-%d-%d", b.serial, i)
	}
	b.lay(m)
}

// lay gives the items the values in memory, one after the other.
func (b *benchCluster) lay(m *memory) {
	size := b.itemBytes()
	for i := range b.items {
		m.lay(&b.items[i], uint64(i)*size, size)
	}
}

// fillPattern fills memory with numbers that depend on the seed, so that no byte can be right by having been left
// over.
func fillPattern(memory []byte, seed uint64) {
	random := rand.NewPCG(seed, 400)
	for len(memory) >= 8 {
		binary.LittleEndian.PutUint64(memory, random.Uint64())
		memory = memory[8:]
	}
	for i := range memory {
		memory[i] = byte(random.Uint64())
	}
}

// allAre checks that every result has the status that the benchmark counts on.
func (b *benchCluster) allAre(want core.Status, results []core.Result) error {
	for i := range results {
		if r := &results[i]; r.Status != want {
			return errors.Join(fmt.Errorf("%s: key %q is %s, not %s", &b.benchCase, b.items[i].Key, r.Status, want), r.Err)
		}
	}
	return nil
}

func (b *benchCluster) remove(ctx context.Context, client *core.PoolClient) error {
	keys := make([]string, len(b.items))
	for i := range b.items {
		keys[i] = b.items[i].Key
	}
	return b.allAre(core.Removed, client.Remove(ctx, keys...))
}

// turn is one of those that alternate within a run.
type turn struct {
	on     *benchCluster
	plan   string
	verify string
}

// sample is what was measured of one call.
type sample struct {
	wall, control, plan, dispatch, move, verify, staging time.Duration

	transfers, segments, completed, allocs uint64
	carried                                map[string]int    // items by backend
	counts                                 map[string]uint64 // what the backend counts by itself
}

// warmups are the rounds that are not timed. In the first one everything grows to its size; the last one counts
// allocations, which stops the world and leaves the caches cold.
const warmups = 2

// measure gives every turn its number of calls, one after the other and round after round, and returns what they took.
func measure(ctx context.Context, turns []turn, iters int, progress func(round int)) (samples [][]sample, err error) {
	samples = make([][]sample, len(turns))
	ends := make(map[*benchCluster]func() error)
	for _, t := range turns {
		if ends[t.on] == nil {
			if ends[t.on], err = t.on.begin(ctx, t.plan); err != nil {
				return nil, err
			}
		}
	}
	allocs := make([]uint64, len(turns))
	for round := 1 - warmups; round <= iters; round++ {
		progress(max(round, 0))
		for i, t := range turns {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			s, err := t.on.call(ctx, t, round == 0, round == iters)
			if err != nil {
				return nil, err
			}
			t.on.still()
			if round == 0 {
				allocs[i] = s.allocs
			} else if round > 0 {
				s.allocs = allocs[i]
				samples[i] = append(samples[i], s)
			}
		}
	}
	for _, end := range ends {
		if err := end(); err != nil {
			return nil, err
		}
	}
	return samples, nil
}

// begin puts what is to be got; end removes it.
func (b *benchCluster) begin(ctx context.Context, plan string) (end func() error, err error) {
	if b.op != benchGet {
		return func() error { return nil }, nil
	}
	b.name(b.mirror)
	if err := b.mirror.fill(uint64(b.serial)); err != nil {
		return nil, err
	}
	putter := b.clients[plan]
	putter.Tune(core.Tuning{Verify: core.VerifyAll}) // so that there are checksums to verify
	if err := b.allAre(core.Stored, putter.BatchPut(ctx, b.items)); err != nil {
		return nil, err
	}
	b.lay(b.data)
	return func() error { return b.remove(ctx, putter) }, nil
}

// call makes one call and measures it. The last one of a turn is given bytes that were never used before, and they
// are compared afterwards.
func (b *benchCluster) call(ctx context.Context, t turn, count, last bool) (sample, error) {
	client := b.clients[t.plan]
	client.Tune(core.Tuning{Verify: verifyLevels[t.verify]})
	check := last && !b.moveless()
	run, want := client.BatchGet, core.Found
	if b.op == benchPut {
		run, want = client.BatchPut, core.Stored
		b.name(b.data)
	}
	if check {
		if err := b.renew(); err != nil {
			return sample{}, err
		}
	}
	s, results := b.timed(ctx, client, run, count)
	if err := b.allAre(want, results); err != nil {
		return s, err
	}
	if check {
		if err := b.compare(ctx, client); err != nil {
			return s, err
		}
	}
	if b.op == benchPut {
		return s, b.remove(ctx, client)
	}
	return s, nil
}

// renew gives the caller's memory bytes that it never had, or, to get into, none.
func (b *benchCluster) renew() error {
	if b.op == benchPut {
		return b.data.fill(uint64(b.serial))
	}
	return b.data.clear()
}

// compare compares what was got with what was put, after it has got what was put.
func (b *benchCluster) compare(ctx context.Context, client *core.PoolClient) error {
	if b.op == benchPut {
		if err := b.mirror.clear(); err != nil {
			return err
		}
		b.lay(b.mirror)
		if err := b.allAre(core.Found, client.BatchGet(ctx, b.items)); err != nil {
			return err
		}
	}
	err := b.data.compare(b.mirror)
	if errors.Is(err, errDiffers) {
		return &backend.Error{Code: backend.Integrity, Op: "compare", Text: b.String() + ": " + err.Error()}
	}
	return err
}

// simulated tells whether what was measured is simulated: the devices, or the moving of bytes itself.
func (b *benchCluster) simulated() bool { return b.moveless() || simulatedDevices(b.caller) }

// timed makes one call and takes the time, or counts its allocations.
func (b *benchCluster) timed(
	ctx context.Context, client *core.PoolClient, run func(context.Context, []core.Item) []core.Result, count bool,
) (sample, []core.Result) {
	var before, after runtime.MemStats
	counts, answered, stats := b.counts(), b.answered(), client.Stats()
	if count {
		runtime.ReadMemStats(&before)
	}
	start := time.Now()
	results := run(ctx, b.items)
	wall := time.Since(start)
	if count {
		runtime.ReadMemStats(&after)
	}
	now := client.Stats()
	s := sample{
		wall: wall, control: now.Control - stats.Control, plan: now.Plan - stats.Plan, dispatch: now.Dispatch - stats.Dispatch,
		move: now.Move - stats.Move, verify: now.Verify - stats.Verify, staging: now.Staging - stats.Staging,
		transfers: now.Transfers - stats.Transfers, segments: now.Segments - stats.Segments,
		completed: b.answered() - answered, allocs: after.Mallocs - before.Mallocs, carried: make(map[string]int),
		counts: b.counts(),
	}
	for name := range s.counts {
		if _, known := counts[name]; known {
			s.counts[name] -= counts[name]
		} else {
			delete(s.counts, name) // nobody knows how much of it was there before the call
		}
	}
	for i := range results {
		s.carried[results[i].Path.Backend]++
	}
	return s, results
}

// answered returns how many transfers the backends of the caller have answered.
func (b *benchCluster) answered() (n uint64) {
	for _, known := range b.caller.Backends() {
		n += b.caller.Counters(known.Name).Transfers.Load()
	}
	return n
}

// countTries is how often the process of a backend is asked what it counts: it says nothing when it does not come to
// answer in time.
const countTries = 5

// counts returns what the backend that is measured counts by itself, at the caller's end; nothing for most.
func (b *benchCluster) counts() map[string]uint64 {
	counts := make(map[string]uint64)
	for _, known := range b.caller.Backends() {
		if known.Name != b.backend {
			continue
		}
		told := known.Counters()
		for try := 1; try < countTries && len(told) == 0 && known.Process != nil; try++ {
			told = known.Counters()
		}
		for _, c := range told {
			counts[c.Name] = c.Value
		}
	}
	return counts
}
