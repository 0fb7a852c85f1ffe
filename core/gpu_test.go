package core_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

const gpu1, gpu2 = "0000:01:00.0", "0000:02:00.0"

// gpus stands for the GPUs of a host. What it allocates has addresses that end the test when the processor touches them;
// the bytes lie elsewhere.
type gpus struct {
	mu        sync.Mutex
	memory    map[uint64][]byte // by address of a range
	forbidden map[uint64][]byte // what lies at the address
}

// alloc returns a range in the middle of an allocation.
func (g *gpus) alloc(tb testing.TB, device string, size uint64) backend.GPURange {
	tb.Helper()
	const margin = 4096
	forbidden, err := unix.Mmap(-1, 0, int(size)+2*margin, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Munmap(forbidden) })
	r := backend.GPURange{
		Runtime: "hip", Device: device, Address: uint64(addressOf(forbidden)) + margin, Size: size,
		Allocation: uint64(len(forbidden)), Offset: margin, Handle: []byte("handle"),
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.memory == nil {
		g.memory, g.forbidden = map[uint64][]byte{}, map[uint64][]byte{}
	}
	g.memory[r.Address], g.forbidden[r.Address] = make([]byte, size), forbidden[margin:][:size]
	return r
}

// slice returns a slice that was made of a range's address.
func (g *gpus) slice(r backend.GPURange) []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.forbidden[r.Address]
}

func addressOf(b []byte) uintptr {
	start, _ := (&region.Region{Bytes: b}).Extent()
	return start
}

// bytes returns what lies in a range, for the test to look at.
func (g *gpus) bytes(r backend.GPURange) []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.memory[r.Address]
}

// links are those of two GPUs that share a link, and reach the memory of the host.
var links = []backend.Link{
	{Near: gpu1, Far: gpu1, Text: "same GPU"}, {Near: gpu2, Far: gpu2, Text: "same GPU"},
	{Near: gpu1, Far: gpu2, Cost: 1, Text: "XGMI, 1 hop"}, {Near: gpu2, Far: gpu1, Cost: 1, Text: "XGMI, 1 hop"},
	{Near: gpu1}, {Near: gpu2}, {Far: gpu1}, {Far: gpu2},
}

// mover makes a backend of the host's memory one that moves the memory of GPUs, too.
type mover struct {
	backend.Backend
	gpus  *gpus
	links []backend.Link
	// refuse, if not nil, may refuse a session.
	refuse func(remote backend.Remote) error
}

func (m mover) Info() backend.Info {
	info := m.Backend.Info()
	c := &info.Capabilities
	c.Local = backend.Kinds(backend.HostMemory, backend.GPUMemory)
	c.Remote, c.Links = c.Local, m.links
	return info
}

func (m mover) Register(ctx context.Context, memory backend.Memory) ([]byte, error) {
	if memory.GPU != nil {
		memory.Kind, memory.Bytes, memory.GPU = backend.HostMemory, m.gpus.bytes(*memory.GPU), nil
	}
	return m.Backend.Register(ctx, memory)
}

func (m mover) Offer(ctx context.Context, p backend.Peer) (backend.Handshake, error) {
	h, err := m.Backend.Offer(ctx, p)
	return moverShake{h, m}, err
}

type moverShake struct {
	backend.Handshake
	mover mover
}

func (h moverShake) Establish(ctx context.Context, answer []byte) (backend.Endpoint, error) {
	e, err := h.Handshake.Establish(ctx, answer)
	if err != nil {
		return nil, err
	}
	return moverEndpoint{e, h.mover}, nil
}

type moverEndpoint struct {
	backend.Endpoint
	mover mover
}

func (e moverEndpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	if e.mover.refuse != nil {
		if err := e.mover.refuse(remote); err != nil {
			return nil, err
		}
	}
	remote.Kind = backend.HostMemory
	return e.Endpoint.Session(ctx, local, remote, sink)
}

// moving returns a shape.wrap that makes the named backend move the memory of GPUs.
func moving(name string, g *gpus, links []backend.Link) func(string, string, backend.Backend) backend.Backend {
	return func(_, n string, b backend.Backend) backend.Backend {
		if n != name {
			return b
		}
		return mover{Backend: b, gpus: g, links: links}
	}
}

// onGPU is a shape.pool that puts the pools of the named nodes on a GPU.
func onGPU(tb testing.TB, g *gpus, size uint64, devices map[string]string) func(node string) *backend.GPURange {
	return func(node string) *backend.GPURange {
		device, ok := devices[node]
		if !ok {
			return nil
		}
		r := g.alloc(tb, device, size)
		return &r
	}
}

// gpuBuffer returns a buffer in a GPU's memory, and the bytes that lie there.
func (c *cluster) gpuBuffer(g *gpus, device string, size uint64) (*core.Buffer, []byte) {
	c.tb.Helper()
	r := g.alloc(c.tb, device, size)
	buf, err := c.client.RegisterGPU(c.tb.Context(), r)
	if err != nil {
		c.tb.Fatal(err)
	}
	c.tb.Cleanup(func() {
		if err := buf.Close(context.Background()); err != nil {
			c.tb.Error(err)
		}
	})
	return buf, g.bytes(r)
}

// TestGPUMemory puts values from memory of every kind into a pool on a GPU, and gets them into memory of every kind.
func TestGPUMemory(t *testing.T) {
	for _, pool := range []map[string]string{{"node-0": gpu1}, {}} {
		t.Run(fmt.Sprint(len(pool), " GPU pools"), func(t *testing.T) {
			g := &gpus{}
			c := newCluster(t, shape{client: verifyAll, wrap: moving("reference", g, nil), pool: onGPU(t, g, 16<<20, pool)})
			const size = 1 << 20
			near, nearBytes := c.gpuBuffer(g, gpu1, size)
			other, otherBytes := c.gpuBuffer(g, gpu2, size)
			hostBuffer, err := c.client.Alloc(t.Context(), size)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { hostBuffer.Close(context.Background()) })
			kinds := []struct {
				buffer *core.Buffer
				bytes  []byte
			}{{near, nearBytes}, {other, otherBytes}, {hostBuffer, hostBuffer.Bytes()}, {nil, make([]byte, size)}}
			item := func(key string, kind int, offset, length int) core.Item {
				if b := kinds[kind].buffer; b != nil {
					return core.Item{Key: key, At: b.At(uint64(offset), uint64(length))}
				}
				return core.Item{Key: key, Value: kinds[kind].bytes[offset:][:length]}
			}
			round := 0
			rapid.Check(t, func(t *rapid.T) {
				round++
				var put, get []core.Item
				var from, to []int
				n := rapid.IntRange(1, 6).Draw(t, "values")
				lengths := make([]int, n)
				slot := size / 2 / n // values lie in the first half of each buffer, and are got into the second
				for i := range n {
					key := fmt.Sprintf("%d-%d", round, i)
					lengths[i] = rapid.IntRange(1, 20_000).Draw(t, "length")
					from, to = append(from, rapid.IntRange(0, 3).Draw(t, "from")), append(to, rapid.IntRange(0, 3).Draw(t, "to"))
					fill(kinds[from[i]].bytes[i*slot:][:lengths[i]], uint64(round*10+i))
					put = append(put, item(key, from[i], i*slot, lengths[i]))
					get = append(get, item(key, to[i], size/2+i*slot, lengths[i]+rapid.IntRange(0, 5).Draw(t, "spare")))
				}
				before := c.client.Stats().Unsummed
				for i, r := range c.client.BatchPut(context.Background(), put) {
					if r.Status != core.Stored || r.Size != uint64(lengths[i]) || r.Path.Staged != (from[i] == 3) {
						t.Fatalf("put %d from %d: %+v", i, from[i], r)
					}
				}
				unsummed := uint64(0)
				for i, r := range c.client.BatchGet(context.Background(), get) {
					verified := from[i] >= 2 && to[i] >= 2 // both ends could address the bytes
					if r.Status != core.Found || r.Size != uint64(lengths[i]) || r.Path.Staged != (to[i] == 3) || r.Verified != verified {
						t.Fatalf("get %d, put from %d, into %d: %+v", i, from[i], to[i], r)
					}
					want, got := kinds[from[i]].bytes[i*slot:][:lengths[i]], kinds[to[i]].bytes[size/2+i*slot:][:lengths[i]]
					if !bytes.Equal(want, got) {
						t.Fatalf("get %d, put from %d, into %d: wrong bytes", i, from[i], to[i])
					}
					for _, kind := range []int{from[i], to[i]} {
						if kind < 2 {
							unsummed++
						}
					}
				}
				if got := c.client.Stats().Unsummed - before; got != unsummed {
					t.Fatalf("%d values count as unsummed, want %d", got, unsummed)
				}
			})
			c.quiet()
		})
	}
}

// TestGPUPool: peers hear where the pool lies; the range's owner keeps it.
func TestGPUPool(t *testing.T) {
	g := &gpus{}
	c := newCluster(t, shape{wrap: moving("reference", g, links), pool: onGPU(t, g, 64<<10, map[string]string{"node-0": gpu2})})
	d, err := c.nodes[0].Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if r := d.Regions[0]; len(d.Regions) != 1 || r.Kind != backend.GPUMemory || r.Place != gpu2 || r.Size != 64<<10 {
		t.Errorf("the node describes %+v", d.Regions)
	}
	if s := c.stats(0); s.Pages != 16 || c.nodes[0].HugePages() != "" {
		t.Errorf("%d pages on %q", s.Pages, c.nodes[0].HugePages())
	}

	memory := g.alloc(t, gpu1, 64<<10)
	for name, change := range map[string]func(*core.NodeOptions){
		"another size":   func(o *core.NodeOptions) { o.PoolSize = 4096 },
		"no whole pages": func(o *core.NodeOptions) { o.GPU.Size-- },
		"no address":     func(o *core.NodeOptions) { o.GPU.Address = 0 },
		"no allocation":  func(o *core.NodeOptions) { o.GPU.Offset = o.GPU.Allocation },
	} {
		r := memory
		opts := core.NodeOptions{Directory: c.dir, PageSize: 4096, GPU: &r}
		change(&opts)
		if _, err := core.NewNode(t.Context(), c.engine, opts); backend.CodeOf(err) != backend.BadRequest {
			t.Errorf("%s: %v", name, err)
		}
	}
	for range 2 { // the memory is free again after Close
		node, err := core.NewNode(t.Context(), c.engine, core.NodeOptions{Directory: c.dir, PoolSize: 64 << 10, PageSize: 4096, GPU: &memory})
		if err != nil {
			t.Fatal(err)
		}
		if err := node.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestGPUItemsRefused: an item's memory is named once, within a buffer that is open, and no address twice in a get.
func TestGPUItemsRefused(t *testing.T) {
	g := &gpus{}
	c := newCluster(t, shape{client: verifyAll, wrap: moving("reference", g, nil)})
	buf, _ := c.gpuBuffer(g, gpu1, 4096)
	hostBuffer, err := c.client.Alloc(t.Context(), 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer hostBuffer.Close(context.Background())
	closed, err := c.client.RegisterGPU(t.Context(), g.alloc(t, gpu1, 4096))
	if err != nil {
		t.Fatal(err)
	}
	if err := closed.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	elsewhere := newCluster(t, shape{wrap: moving("reference", g, nil)})
	foreign, _ := elsewhere.gpuBuffer(g, gpu1, 4096)
	memory := g.alloc(t, gpu2, 4096)
	inDisguise, err := c.client.RegisterGPU(t.Context(), memory)
	if err != nil {
		t.Fatal(err)
	}
	defer inDisguise.Close(context.Background())
	slice := g.slice(memory)

	is(t, core.Stored, c.client.BatchPut(t.Context(), []core.Item{{Key: "there", At: buf.At(0, 100)}, {Key: "too", At: buf.At(0, 100)}})...)
	for name, tc := range map[string]struct {
		item  core.Item
		words string
	}{
		"both":             {core.Item{At: buf.At(0, 100), Value: made(100, 1)}, "Value and At"},
		"beyond the end":   {core.Item{At: buf.At(4000, 97)}, "range [4000, +97) is not in the buffer of 4096 bytes"},
		"overflow":         {core.Item{At: buf.At(1<<64-1, 2)}, "is not in the buffer"},
		"beyond host":      {core.Item{At: hostBuffer.At(4097, 1)}, "is not in the buffer"},
		"closed":           {core.Item{At: closed.At(0, 100)}, "is closed"},
		"another engine":   {core.Item{At: foreign.At(0, 100)}, "another engine"},
		"a slice of it":    {core.Item{Value: slice[8:108]}, "name it by Item.At"},
		"a short range":    {core.Item{At: buf.At(0, 99)}, "the value has 100 bytes, and the memory given only 99"},
		"an empty range":   {core.Item{At: buf.At(0, 0)}, "only 0"},
		"no memory at all": {core.Item{}, "only 0"},
	} {
		t.Run(name, func(t *testing.T) {
			tc.item.Key = "there"
			refused(t, c.client.BatchGet(t.Context(), []core.Item{tc.item})[0], core.Failed, backend.BadRequest, `get "there"`, tc.words)
			if strings.Contains(tc.words, "only") {
				return
			}
			tc.item.Key = "new"
			refused(t, c.client.BatchPut(t.Context(), []core.Item{tc.item})[0], core.Failed, backend.BadRequest, `put "new"`, tc.words)
		})
	}
	refused(t, c.client.BatchPut(t.Context(), []core.Item{{Key: "new", At: buf.At(5, 0)}})[0], core.Failed, backend.BadRequest, "empty")

	overlap := []core.Item{{Key: "there", At: buf.At(100, 100)}, {Key: "too", At: buf.At(1, 100)}}
	for _, r := range c.client.BatchGet(t.Context(), overlap) {
		refused(t, r, core.Failed, backend.BadRequest, `the memory of "too" overlaps that of "there"`)
	}
	mixed := []core.Item{{Key: "there", At: hostBuffer.At(50, 100)}, {Key: "too", Value: hostBuffer.Bytes()[:100]}}
	for _, r := range c.client.BatchGet(t.Context(), mixed) {
		refused(t, r, core.Failed, backend.BadRequest, `overlaps`)
	}
	apart := []core.Item{{Key: "there", At: buf.At(101, 100)}, {Key: "too", At: buf.At(1, 100)}}
	is(t, core.Found, c.client.BatchGet(t.Context(), apart)...)
	is(t, core.Stored, c.client.BatchPut(t.Context(), []core.Item{{Key: "a", At: buf.At(0, 100)}, {Key: "b", At: buf.At(50, 100)}})...)
	c.quiet()
}

// TestGPULease: what is got into memory that the processor cannot address is a value only when the node says that it has
// held it all the while, also where the writer made a checksum.
func TestGPULease(t *testing.T) {
	var change change
	g := &gpus{}
	c := newCluster(t, shape{client: verifyAll, wrap: moving("reference", g, nil),
		dial: func(s peer.Service) peer.Service { return odd{s, &change} }})
	buf, _ := c.gpuBuffer(g, gpu1, 4096)
	is(t, core.Stored, c.client.Put(t.Context(), "summed", made(100, 1)))
	into := []core.Item{{Key: "summed", At: buf.At(0, 100)}}
	is(t, core.Found, c.client.BatchGet(t.Context(), into)...)
	change.set(func(reply any) error {
		if r, ok := reply.(*peer.ReleaseReply); ok {
			r.Held = false
		}
		return nil
	})
	refused(t, c.client.BatchGet(t.Context(), into)[0], core.Failed, backend.Integrity, "ran out before the last byte had come")
	change.set(func(reply any) error {
		if r, ok := reply.(*peer.ResolveReply); ok {
			r.Lease = 0
		}
		return nil
	})
	refused(t, c.client.BatchGet(t.Context(), into)[0], core.Failed, backend.Integrity, "ran out before the last byte had come")
	is(t, core.Found, c.client.Get(t.Context(), "summed", make([]byte, 100)))
}

// TestGPURegister: backends that do not claim the memory of GPUs are not asked; where none takes it, each says why.
func TestGPURegister(t *testing.T) {
	g := &gpus{}
	asked := new(atomic.Int64)
	c := newCluster(t, shape{backends: []backend.Factory{network("hosts"), network("gpus")}, client: verifyAll,
		wrap: func(owner, name string, b backend.Backend) backend.Backend {
			if name == "hosts" {
				return countsRegister{b, asked}
			}
			return mover{Backend: b, gpus: g}
		}})
	asked.Store(0)
	buf, memory := c.gpuBuffer(g, gpu1, 4096)
	fill(memory, 1)
	if asked.Load() != 0 {
		t.Error("a backend is asked for what it does not claim")
	}
	if r := c.client.BatchPut(t.Context(), []core.Item{{Key: "k", At: buf.At(0, 4096)}})[0]; r.Status != core.Stored || r.Path.Backend != "gpus" {
		t.Errorf("%+v", r)
	}

	absent := network("absent")
	absent.Open = func(context.Context, backend.Config) (backend.Backend, error) {
		return nil, backend.Errorf(backend.Unsupported, "no such device")
	}
	none := newCluster(t, shape{backends: []backend.Factory{network("hosts"), absent}})
	buffer, err := none.client.RegisterGPU(t.Context(), g.alloc(t, gpu1, 4096))
	if buffer != nil || backend.CodeOf(err) != backend.Unsupported {
		t.Errorf("%v, %v", buffer, err)
	}
	says(t, err, "hosts: register: unsupported: memory of kind gpu is not claimed", "absent is not to be had", "no such device", "no backend can use the memory")
	pool := g.alloc(t, gpu1, 4096)
	_, err = core.NewNode(t.Context(), none.engine, core.NodeOptions{Directory: none.dir, PageSize: 4096, GPU: &pool})
	says(t, err, "register the pool", "memory of kind gpu is not claimed")
}

type countsRegister struct {
	backend.Backend
	n *atomic.Int64
}

func (b countsRegister) Register(ctx context.Context, m backend.Memory) ([]byte, error) {
	b.n.Add(1)
	return b.Backend.Register(ctx, m)
}

// TestGPUOutOfReach: what no backend can carry to one node goes to another one, and to a third, and fails where there is
// none.
func TestGPUOutOfReach(t *testing.T) {
	g := &gpus{}
	some := slices.DeleteFunc(slices.Clone(links), func(l backend.Link) bool { return l.Near == gpu1 && l.Far == gpu2 })
	c := newCluster(t, shape{nodes: 4, wrap: moving("reference", g, some), pool: onGPU(t, g, 16<<20, map[string]string{
		"node-0": gpu2, "node-1": gpu1, "node-2": gpu2, "node-3": gpu2,
	})})
	buf, memory := c.gpuBuffer(g, gpu1, 1<<20)
	fill(memory, 3)
	var list, into []core.Item
	for i := range uint64(16) {
		list = append(list, core.Item{Key: fmt.Sprint("key-", i), At: buf.At(i*1000, 1000)})
		into = append(into, core.Item{Key: fmt.Sprint("key-", i), At: buf.At(500_000+i*1000, 1000)})
	}
	for i := range list { // one by one, so that some are placed on each node
		r := c.client.BatchPut(t.Context(), list[i:i+1])[0]
		if r.Status != core.Stored || r.Path.Node != "node-1" {
			t.Errorf("put %d: %+v", i, r)
		}
	}
	is(t, core.Found, c.client.BatchGet(t.Context(), into)...)
	if !bytes.Equal(memory[:16_000], memory[500_000:][:16_000]) {
		t.Error("wrong bytes")
	}
	c.quiet()

	if err := c.nodes[1].Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	list[0].Key = "nowhere"
	refused(t, c.client.BatchPut(t.Context(), list[:1])[0], core.Failed, backend.Unsupported,
		"no backend can carry the group", "reference: no link from GPU "+gpu1+" to GPU "+gpu2)
}

// TestOutOfReachIsNotAsked: a node that no backend can carry an item to evicts nothing for it. What lies in other memory may go
// there, in the same batch.
func TestOutOfReachIsNotAsked(t *testing.T) {
	g := &gpus{}
	some := slices.DeleteFunc(slices.Clone(links), func(l backend.Link) bool { return l.Near == gpu1 && l.Far == gpu2 })
	const nodes, pool = 4, 64 << 10
	c := newCluster(t, shape{nodes: nodes, poolSize: pool, pageSize: 4096, client: verifyAll, wrap: moving("reference", g, some),
		pool: onGPU(t, g, pool, map[string]string{"node-0": gpu2, "node-1": gpu1, "node-2": gpu2, "node-3": gpu2})})
	var full []core.Item
	for i := range uint64(nodes * pool / 4096) {
		full = append(full, core.Item{Key: fmt.Sprint("before-", i), Value: made(4096, i)})
	}
	is(t, core.Stored, c.client.BatchPut(t.Context(), full)...)
	buf, memory := c.gpuBuffer(g, gpu1, 64<<10)
	fill(memory, 3)
	for i := range uint64(8) {
		r := c.client.BatchPut(t.Context(), []core.Item{{Key: fmt.Sprint("gpu-", i), At: buf.At(i*4096, 4096)}})[0]
		if r.Status != core.Stored || r.Path.Node != "node-1" {
			t.Errorf("put %d: %+v", i, r)
		}
	}
	for i := range nodes {
		if s := c.stats(i); (s.Evictions > 0) != (i == 1) {
			t.Errorf("node %d has evicted %d values", i, s.Evictions)
		}
	}

	var mixed, into []core.Item
	for i := range uint64(8) {
		mixed = append(mixed, core.Item{Key: fmt.Sprint("mixed-gpu-", i), At: buf.At(i*4096, 4096)},
			core.Item{Key: fmt.Sprint("mixed-host-", i), Value: made(4096, 100+i)})
	}
	for i, r := range c.client.BatchPut(t.Context(), mixed) {
		if r.Status != core.Stored || i%2 == 0 && r.Path.Node != "node-1" {
			t.Errorf("put %d: %+v", i, r)
		}
		into = append(into, core.Item{Key: mixed[i].Key, Value: make([]byte, 4096)})
	}
	is(t, core.Found, c.client.BatchGet(t.Context(), into)...)
	for i, item := range into {
		want := mixed[i].Value
		if i%2 == 0 {
			want = memory[i/2*4096:][:4096]
		}
		if !bytes.Equal(item.Value, want) {
			t.Errorf("%s has wrong bytes", item.Key)
		}
	}
	c.quiet()
}

// TestSelfTestFails: a backend that refuses two regions is passed over for the next of the policy, and not asked again for
// every batch.
func TestSelfTestFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &gpus{}
		sessions := new(atomic.Int64)
		c := newCluster(t, shape{backends: []backend.Factory{network("xgmi"), network("slow")},
			wrap: func(_, name string, b backend.Backend) backend.Backend {
				m := mover{Backend: b, gpus: g, links: links}
				if name == "xgmi" {
					m.refuse = func(remote backend.Remote) error {
						sessions.Add(1)
						return backend.Errorf(backend.Unsupported, "the self-test failed from %s to %s", gpu1, remote.Place)
					}
				}
				return m
			}, pool: onGPU(t, g, 16<<20, map[string]string{"node-0": gpu2})})
		buf, memory := c.gpuBuffer(g, gpu1, 1<<20)
		fill(memory, 4)
		for i := range uint64(20) {
			r := c.client.BatchPut(t.Context(), []core.Item{{Key: fmt.Sprint(i), At: buf.At(0, 1000)}})[0]
			want := 1
			if i == 0 {
				want = 2
			}
			if r.Status != core.Stored || r.Path.Backend != "slow" || r.Path.Attempts != want {
				t.Errorf("put %d: %+v", i, r)
			}
		}
		if n := sessions.Load(); n != 1 {
			t.Errorf("the backend that refuses was asked %d times", n)
		}

		// Where the policy allows no other, the reason comes out, at once and again.
		if err := c.engine.SetRules([]selector.Rule{{Require: []string{"xgmi"}}}); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			refused(t, c.client.BatchPut(t.Context(), []core.Item{{Key: "new", At: buf.At(0, 1000)}})[0], core.Failed, backend.Unsupported,
				"xgmi: refused", "the self-test failed from "+gpu1+" to "+gpu2)
		}
	})
}

// TestGPUSession moves bytes between regions of GPUs by offsets, and knows how large they are.
func TestGPUSession(t *testing.T) {
	g := &gpus{}
	c := newCluster(t, shape{wrap: moving("reference", g, links)})
	far := c.newEngine("far")
	region := func(e *core.Engine, device string) (backend.RegionID, []byte) {
		memory := g.alloc(t, device, 1000)
		r, err := e.Register(t.Context(), gpuRegion(memory))
		if err != nil {
			t.Fatal(err)
		}
		return r.ID, g.bytes(memory)
	}
	nearID, near := region(c.engine, gpu1)
	farID, there := region(far, gpu2)
	fill(near, 1)
	t.Cleanup(c.engine.AddPeer(far.Self(), answerer{far}))
	d, err := far.Descriptor(farID)
	if err != nil {
		t.Fatal(err)
	}
	if d.Size != 1000 || d.Place != gpu2 {
		t.Errorf("%+v", d)
	}
	s, err := c.engine.Open(nearID, d)
	if err != nil {
		t.Fatal(err)
	}
	if r := s.Write(t.Context(), []backend.Segment{{Local: 10, Remote: 500, Length: 400}}); r.Err != nil {
		t.Fatal(r.Err)
	}
	if !bytes.Equal(near[10:410], there[500:900]) {
		t.Error("wrong bytes")
	}
	for _, seg := range []backend.Segment{{Local: 1, Length: 1000}, {Remote: 999, Length: 2}} {
		if r := s.Read(t.Context(), []backend.Segment{seg}); backend.CodeOf(r.Err) != backend.BadRequest {
			t.Errorf("%+v: %v", seg, r.Err)
		}
	}
}

func gpuRegion(memory backend.GPURange) *region.Region {
	return &region.Region{
		Kind: backend.GPUMemory, Rights: backend.RemoteRead | backend.RemoteWrite, GPU: &memory, FD: -1,
	}
}

// TestExplainGPUPool says by which link values would travel.
func TestExplainGPUPool(t *testing.T) {
	g := &gpus{}
	some := []backend.Link{{Far: gpu1, Text: "PCIe"}}
	c := newCluster(t, shape{backends: []backend.Factory{network("xgmi"), network("tcp")}, client: verifyAll,
		wrap: moving("xgmi", g, some), pool: onGPU(t, g, 16<<20, map[string]string{"node-0": gpu1})})
	e, err := c.client.ExplainPut(t.Context(), []string{"a"}, []uint64{5000}, core.ExplainOptions{})
	text, _ := explained(t, e, err)
	for _, want := range []string{
		"by xgmi: chosen: the first of the rule that can carry it (PCIe) (rule 1)", "not by tcp: cannot reach memory of kind gpu",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%s\ndoes not say %q", text, want)
		}
	}
	e, err = c.client.ExplainPut(t.Context(), []string{"a"}, []uint64{5000}, core.ExplainOptions{Place: gpu2})
	text, _ = explained(t, e, err)
	for _, want := range []string{
		"buffer on GPU " + gpu2 + " → node-0", "not by xgmi: no link from GPU " + gpu2 + " to GPU " + gpu1, "not by tcp: cannot use local memory of kind gpu",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%s\ndoes not say %q", text, want)
		}
	}
	_, err = c.client.ExplainGet(t.Context(), []string{"a"}, core.ExplainOptions{Place: "the first"})
	if backend.CodeOf(err) != backend.BadRequest || !strings.Contains(err.Error(), `"the first" is no place`) {
		t.Errorf("for no place: %v", err)
	}
}
