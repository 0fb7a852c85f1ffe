package core_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

var verifyAll = core.ClientOptions{StagingSize: 4 << 20, Tuning: core.Tuning{Verify: core.VerifyAll}}

// items makes values of the sizes: the even ones in the memory given, the odd ones outside every region.
func items(memory []byte, sizes []int, seed uint64) []core.Item {
	var list []core.Item
	for i, size := range sizes {
		value := make([]byte, size)
		if i%2 == 0 {
			value, memory = memory[:size:size], memory[size:]
		}
		fill(value, seed+uint64(i))
		list = append(list, core.Item{Key: fmt.Sprintf("key-%d", i), Value: value})
	}
	return list
}

// buffers makes memory to get the items into, longer than they are by so many bytes, all of which are 0xEE.
func buffers(memory []byte, list []core.Item, spare int) []core.Item {
	var into []core.Item
	for i, it := range list {
		n := len(it.Value) + spare
		value := make([]byte, n)
		if i%2 != 0 { // what came from outside of a region goes into one, and the other way round
			value, memory = memory[:n:n], memory[n:]
		}
		for k := range value {
			value[k] = 0xEE
		}
		into = append(into, core.Item{Key: it.Key, Value: value})
	}
	return into
}

// sameBytes compares what was got with what was put, to the last byte of the buffers.
func sameBytes(t testing.TB, put, got []core.Item, results []core.Result) {
	t.Helper()
	for i, r := range results {
		want := put[i].Value
		if r.Status != core.Found || r.Size != uint64(len(want)) {
			t.Fatalf("get %q: %+v", put[i].Key, r)
		}
		if !bytes.Equal(got[i].Value[:r.Size], want) {
			t.Errorf("get %q: wrong bytes", put[i].Key)
		}
		if spare := got[i].Value[r.Size:]; !bytes.Equal(spare, bytes.Repeat([]byte{0xEE}, len(spare))) {
			t.Errorf("get %q: bytes behind the value were touched", put[i].Key)
		}
	}
}

// TestMixed puts and gets values of many sizes, local and remote, staged and not, on several nodes at once.
func TestMixed(t *testing.T) {
	for _, verify := range []core.Verify{core.VerifyOff, core.VerifySample, core.VerifyAll} {
		c := newCluster(t, shape{nodes: 3, embedded: true, client: core.ClientOptions{StagingSize: 8 << 20, Tuning: core.Tuning{Verify: verify}}})
		var sizes []int
		for i := range 60 {
			sizes = append(sizes, []int{1, 4095, 4096, 4097, 3*4096 + 1, 200_000 + i}[i%6])
		}
		list := items(c.alloc(8<<20), sizes, 1)
		nodes := map[string]int{}
		for i, r := range c.client.BatchPut(t.Context(), list) {
			is(t, core.Stored, r)
			want := core.Path{Node: r.Path.Node, Backend: "reference", Attempts: 1, Staged: i%2 != 0}
			if r.Path != want || r.Size != uint64(sizes[i]) {
				t.Errorf("put %d: %+v", i, r)
			}
			nodes[r.Path.Node]++
		}
		if len(nodes) != 3 {
			t.Errorf("the values are on %v, want all three nodes", nodes)
		}

		// Another client, on an engine of its own, gets them.
		c.engine = c.newEngine("client")
		c.client = c.newClient(c.engine, c.shape.client)
		into := buffers(c.alloc(8<<20), list, 9)
		results := c.client.BatchGet(t.Context(), into)
		sameBytes(t, list, into, results)
		verified := 0
		for i, r := range results {
			if r.Path.Staged != (i%2 == 0) {
				t.Errorf("get %d: path %+v", i, r.Path)
			}
			if r.Verified {
				verified++
			}
		}
		if want := map[core.Verify]int{core.VerifyOff: 0, core.VerifySample: 60 / 16, core.VerifyAll: 60}[verify]; verified != want {
			t.Errorf("%d of 60 values were verified, want %d", verified, want)
		}
		c.quiet()
	}
}

// TestSizes goes from one byte to 64 MiB.
func TestSizes(t *testing.T) {
	const largest = 64 << 20
	c := newCluster(t, shape{poolSize: 96 << 20, pageSize: 64 << 10, client: core.ClientOptions{Tuning: core.Tuning{Verify: core.VerifyAll}}})
	memory, into := c.alloc(largest), c.alloc(largest+1)
	fill(memory, 3)
	for _, size := range []int{1, 2, 65535, 65536, 65537, 16<<20 + 1, largest} {
		key := fmt.Sprint(size)
		is(t, core.Stored, c.client.Put(t.Context(), key, memory[:size]))
		into[size] = 0xEE
		r := c.client.Get(t.Context(), key, into)
		is(t, core.Found, r)
		if r.Size != uint64(size) || !r.Verified || !bytes.Equal(into[:size], memory[:size]) || into[size] != 0xEE {
			t.Errorf("%d bytes: %+v, and other bytes", size, r)
		}
		is(t, core.Removed, c.client.Remove(t.Context(), key)...)
	}
}

// TestPerPage is the benchmark's way of planning.
func TestPerPage(t *testing.T) {
	c := newCluster(t, shape{nodes: 2, client: core.ClientOptions{PerPage: 4096, StagingSize: 1 << 20, Tuning: core.Tuning{Verify: core.VerifyAll}}})
	list := items(c.alloc(1<<20), []int{5 * 4096, 4097, 1, 100_000}, 5)
	before := c.client.Stats()
	is(t, core.Stored, c.client.BatchPut(t.Context(), list)...)
	if n := c.client.Stats().Transfers - before.Transfers; n != 5+2+1+25 {
		t.Errorf("%d transfers, want one for each page: 33", n)
	}
	into := buffers(c.alloc(1<<20), list, 0)
	sameBytes(t, list, into, c.client.BatchGet(t.Context(), into))
}

// TestModel compares clients with a map: whatever they do, they see the same values.
func TestModel(t *testing.T) {
	const slots, longest = 6, 20_000
	c := newCluster(t, shape{nodes: 2, poolSize: 4 << 20, pageSize: 1024,
		client: core.ClientOptions{StagingSize: 48 << 10, Tuning: core.Tuning{Verify: core.VerifyAll}}})
	memory, into := c.alloc(slots*longest), c.alloc(slots*longest)
	clients := []*core.PoolClient{c.client, c.newClient(c.newEngine("other"), c.shape.client)}
	seed := uint64(0)
	rapid.Check(t, func(t *rapid.T) {
		model := map[string][]byte{}
		keys := rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "f", "g", "h"}), 1, slots, rapid.ID)
		client := func() *core.PoolClient { return clients[rapid.IntRange(0, 1).Draw(t, "client")] }
		t.Repeat(map[string]func(*rapid.T){
			"put": func(t *rapid.T) {
				var list []core.Item
				for i, key := range keys.Draw(t, "keys") {
					size := rapid.IntRange(1, longest).Draw(t, "size")
					value := memory[i*longest:][:size]
					if rapid.Bool().Draw(t, "staged") {
						value = make([]byte, size)
					}
					seed++
					fill(value, seed)
					list = append(list, core.Item{Key: key, Value: value})
				}
				for i, r := range client().BatchPut(context.Background(), list) {
					want := core.Stored
					if _, held := model[list[i].Key]; held {
						want = core.Exists
					} else {
						model[list[i].Key] = bytes.Clone(list[i].Value)
					}
					if r.Status != want {
						t.Fatalf("put %q: %v, want %v (%v)", list[i].Key, r.Status, want, r.Err)
					}
				}
			},
			"get": func(t *rapid.T) {
				var list []core.Item
				for i, key := range keys.Draw(t, "keys") {
					value := into[i*longest:][:longest]
					if rapid.Bool().Draw(t, "staged") {
						value = make([]byte, longest)
					}
					list = append(list, core.Item{Key: key, Value: value})
				}
				for i, r := range client().BatchGet(context.Background(), list) {
					want, held := model[list[i].Key]
					switch {
					case !held && r.Status != core.Missing, held && r.Status != core.Found:
						t.Fatalf("get %q: %v (%v), held %v", list[i].Key, r.Status, r.Err, held)
					case held && !bytes.Equal(list[i].Value[:r.Size], want):
						t.Fatalf("get %q: other bytes", list[i].Key)
					}
				}
			},
			"remove": func(t *rapid.T) {
				list := keys.Draw(t, "keys")
				for i, r := range client().Remove(context.Background(), list...) {
					want := core.Missing
					if _, held := model[list[i]]; held {
						want = core.Removed
					}
					delete(model, list[i])
					if r.Status != want {
						t.Fatalf("remove %q: %v, want %v (%v)", list[i], r.Status, want, r.Err)
					}
				}
			},
			"look": func(t *rapid.T) {
				list := keys.Draw(t, "keys")
				cl := client()
				stats := cl.Stat(context.Background(), list...)
				for i, r := range cl.Exists(context.Background(), list...) {
					value, held := model[list[i]]
					if (r.Status == core.Exists) != held || (stats[i].Status == core.Found) != held || stats[i].Size != uint64(len(value)) {
						t.Fatalf("%q: exists %v, stat %v of %d bytes, held %v", list[i], r.Status, stats[i].Status, stats[i].Size, held)
					}
				}
			},
		})
		for _, r := range c.client.Remove(context.Background(), "a", "b", "c", "d", "e", "f", "g", "h") {
			if r.Err != nil {
				t.Fatal(r.Err)
			}
		}
	})
	c.quiet()
}

func TestPoolFull(t *testing.T) {
	c := newCluster(t, shape{nodes: 2, poolSize: 8 * 4096, client: verifyAll})
	sizes := slices.Repeat([]int{3 * 4096}, 6) // two fit on each node
	list := items(c.alloc(1<<20), sizes, 1)
	list = append(list, core.Item{Key: "small", Value: made(2*4096, 9)}, core.Item{Key: "huge", Value: made(9*4096, 9)})
	results := c.client.BatchPut(t.Context(), list)
	var stored []core.Item
	for i, r := range results[:7] {
		if r.Status == core.Stored {
			stored = append(stored, list[i])
			continue
		}
		refused(t, r, core.NoSpace, backend.Busy, fmt.Sprintf("%q", list[i].Key), fmt.Sprint(len(list[i].Value)))
	}
	if len(stored) != 5 || results[6].Status != core.Stored {
		t.Fatalf("%d values are stored, want four large ones and the small one: %+v", len(stored), results)
	}
	refused(t, results[7], core.NoSpace, backend.Busy, "huge", "start a node")
	into := buffers(c.alloc(1<<20), stored, 0)
	sameBytes(t, stored, into, c.client.BatchGet(t.Context(), into))

	// Another batch finds room, by eviction.
	is(t, core.Stored, c.client.Put(t.Context(), "later", made(4*4096, 1)))
	c.quiet()
}

// TestRoomInLaterWaves: a value that finds no room does not keep those in later waves from the node.
func TestRoomInLaterWaves(t *testing.T) {
	c := newCluster(t, shape{poolSize: 8 * 4096, client: core.ClientOptions{StagingSize: 5 * 4096}})
	is(t, core.Stored, c.client.Put(t.Context(), "large", c.alloc(7*4096)))
	// While a reader holds it, nothing can be evicted.
	var reply peer.ResolveReply
	req := peer.ResolveRequest{Client: c.engine.Self(), To: c.nodes[0].Engine().Self().Incarnation, Keys: []string{"large"}}
	if err := c.nodes[0].Resolve(t.Context(), &req, &reply); err != nil {
		t.Fatal(err)
	}
	results := c.client.BatchPut(t.Context(), []core.Item{
		{Key: "too large", Value: made(5*4096, 1)}, // fills the staging memory
		{Key: "small", Value: made(4096, 2)},       // waits for it
	})
	is(t, core.NoSpace, results[0])
	is(t, core.Stored, results[1])
}

func TestDuplicateKeys(t *testing.T) {
	c := newCluster(t, shape{client: verifyAll})
	list := []core.Item{
		{Key: "a", Value: made(10, 1)}, {Key: "b", Value: made(10, 2)}, {Key: "a", Value: made(10, 3)}, {Key: "a", Value: made(10, 4)},
	}
	for _, call := range []func(context.Context, []core.Item) []core.Result{c.client.BatchPut, c.client.BatchGet} {
		results := call(t.Context(), list)
		if !results[1].OK() {
			t.Errorf("the other key: %+v", results[1])
		}
		refused(t, results[0], core.Failed, backend.BadRequest, `"a"`, "items 0 and", "the same key")
		refused(t, results[2], core.Failed, backend.BadRequest, "items 0 and 2 have the same key")
		refused(t, results[3], core.Failed, backend.BadRequest, "items 0 and 3 have the same key")
	}
	for _, r := range c.client.Remove(t.Context(), "b", "b") {
		refused(t, r, core.Failed, backend.BadRequest, "items 0 and 1")
	}
}

func TestBadItems(t *testing.T) {
	c := newCluster(t, shape{client: core.ClientOptions{}})
	memory := c.alloc(1 << 16)
	long := string(bytes.Repeat([]byte("k"), directory.MaxKey+1))
	is(t, core.Stored, c.client.Put(t.Context(), "there", memory[:5000]))
	for _, tc := range []struct {
		name   string
		result core.Result
		words  string
	}{
		{"put without a key", c.client.Put(t.Context(), "", memory[:1]), "item 0 has an empty key"},
		{"put with a long key", c.client.Put(t.Context(), long, memory[:1]), "1025 bytes"},
		{"put of nothing", c.client.Put(t.Context(), "a", nil), "the value is empty"},
		{"get without a key", c.client.Get(t.Context(), "", memory), "item 0 has an empty key"},
		{"get into too little", c.client.Get(t.Context(), "there", memory[:4999]), "the value has 5000 bytes, and the memory given only 4999"},
		{"get into nothing", c.client.Get(t.Context(), "there", nil), "the memory given only 0"},
		{"put without staging", c.client.Put(t.Context(), "a", make([]byte, 10)), "staging is refused"},
		{"get without staging", c.client.Get(t.Context(), "there", make([]byte, 5000)), "staging is refused"},
		{"stat without a key", c.client.Stat(t.Context(), "")[0], "empty key"},
	} {
		if tc.result.Status != core.Failed || backend.CodeOf(tc.result.Err) != backend.BadRequest {
			t.Errorf("%s: %+v", tc.name, tc.result)
		}
		says(t, tc.result.Err, tc.words)
	}
	// The longest key is good.
	is(t, core.Stored, c.client.Put(t.Context(), long[1:], memory[:1]))
	if n := len(c.client.BatchPut(t.Context(), nil)) + len(c.client.BatchGet(t.Context(), nil)) + len(c.client.Exists(t.Context())); n != 0 {
		t.Errorf("%d results for nothing", n)
	}
	c.quiet()
}

func TestOverlappingGets(t *testing.T) {
	c := newCluster(t, shape{client: verifyAll})
	keys := []string{"a", "b", "c", "d"}
	var put []core.Item
	for i, key := range keys {
		put = append(put, core.Item{Key: key, Value: made(100, uint64(i))})
	}
	is(t, core.Stored, c.client.BatchPut(t.Context(), put)...)
	for name, memory := range map[string][]byte{"registered": c.alloc(4096), "staged": make([]byte, 4096)} {
		for _, tc := range []struct {
			name string
			at   [][2]int // the memory of each key: offset and length
			bad  []string // keys
		}{
			{"one after the other", [][2]int{{0, 100}, {100, 100}, {200, 100}}, nil},
			{"in any order", [][2]int{{200, 100}, {0, 100}, {100, 100}}, nil},
			{"the same", [][2]int{{0, 100}, {500, 100}, {0, 100}}, []string{"a", "c"}},
			{"by one byte", [][2]int{{0, 100}, {99, 100}, {300, 100}}, []string{"a", "b"}},
			{"one in another", [][2]int{{0, 1000}, {2000, 100}, {500, 100}, {600, 100}}, []string{"a", "c", "d"}},
			{"one over two", [][2]int{{100, 100}, {200, 100}, {150, 100}}, []string{"a", "b", "c"}},
		} {
			var list []core.Item
			for i, at := range tc.at {
				list = append(list, core.Item{Key: keys[i], Value: memory[at[0]:][:at[1]]})
			}
			for i, r := range c.client.BatchGet(t.Context(), list) {
				if !slices.Contains(tc.bad, keys[i]) {
					if r.Status != core.Found || !bytes.Equal(list[i].Value[:100], put[i].Value) {
						t.Errorf("%s, %s: get %q: %+v", name, tc.name, keys[i], r)
					}
					continue
				}
				if r.Status != core.Failed || backend.CodeOf(r.Err) != backend.BadRequest {
					t.Errorf("%s, %s: get %q: %+v", name, tc.name, keys[i], r)
				}
				says(t, r.Err, "overlaps", fmt.Sprintf("%q", keys[i]))
			}
		}
	}
	// Values that are put may well lie in the same memory.
	value := made(100, 1)
	is(t, core.Stored, c.client.BatchPut(t.Context(), []core.Item{{Key: "e", Value: value}, {Key: "f", Value: value[50:]}})...)
}

// TestStagingOverflow: a value larger than the staging memory is refused with the remedy; a batch that is larger
// goes in waves.
func TestStagingOverflow(t *testing.T) {
	c := newCluster(t, shape{client: core.ClientOptions{StagingSize: 64 << 10, Tuning: core.Tuning{Verify: core.VerifyAll}}})
	registered := c.alloc(1 << 20)
	fill(registered, 1)
	list := []core.Item{{Key: "registered", Value: registered[:200_000]}}
	for i := range 50 {
		list = append(list, core.Item{Key: fmt.Sprint("key-", i), Value: made(1+i*1300, uint64(i))})
	}
	large := core.Item{Key: "large", Value: made(64<<10+1, 5)}
	results := c.client.BatchPut(t.Context(), append(slices.Clone(list), large))
	is(t, core.Stored, results[:len(list)]...)
	refused(t, results[len(list)], core.Failed, backend.BadRequest, `"large"`, "register the memory", "client.staging_size")

	is(t, core.Stored, c.client.Put(t.Context(), "large", registered[:64<<10+1]))
	list = append(list, core.Item{Key: "large", Value: registered[:64<<10+1]})
	var into []core.Item
	for _, it := range list {
		into = append(into, core.Item{Key: it.Key, Value: make([]byte, len(it.Value))})
	}
	into[0].Value = registered[500_000:][:200_000]
	results = c.client.BatchGet(t.Context(), into)
	last := len(list) - 1
	sameBytes(t, list[:last], into[:last], results[:last])
	refused(t, results[last], core.Failed, backend.BadRequest, `"large"`, "register the memory", "client.staging_size")
	if n := c.client.Stats().StagedBytes; n != 2*(50+1300*49*50/2) { // put and got
		t.Errorf("%d bytes were staged", n)
	}
	c.quiet()
}

// TestCompetingForStaging: batches that are all larger than the staging memory wait for each other, and none waits
// for ever.
func TestCompetingForStaging(t *testing.T) {
	c := newCluster(t, shape{nodes: 2, client: core.ClientOptions{StagingSize: 32 << 10, Tuning: core.Tuning{Verify: core.VerifyAll}}})
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for round := range 4 {
				var list, into []core.Item
				for i := range 12 {
					n := 1 + (i*3700+w*900)%(28<<10)
					list = append(list, core.Item{Key: fmt.Sprintf("%d-%d-%d", w, round, i), Value: made(n, uint64(w*1000+i))})
					into = append(into, core.Item{Key: list[i].Key, Value: make([]byte, n)})
				}
				for i, r := range c.client.BatchPut(t.Context(), list) {
					if r.Status != core.Stored {
						t.Errorf("put %q: %+v", list[i].Key, r)
					}
				}
				for i, r := range c.client.BatchGet(t.Context(), into) {
					if r.Status != core.Found || !bytes.Equal(into[i].Value, list[i].Value) {
						t.Errorf("get %q: %+v", into[i].Key, r)
					}
				}
			}
		})
	}
	wg.Wait()
	c.quiet()
}

// spy tells when a lease is released.
type spy struct {
	peer.Service
	released chan<- struct{}
}

func (s spy) Release(ctx context.Context, req *peer.ReleaseRequest, reply *peer.ReleaseReply) error {
	defer func() { s.released <- struct{}{} }()
	return s.Service.Release(ctx, req, reply)
}

// TestStagingComesBack: a value goes away, or grows, while a get waits for staging memory for it; the memory is not
// lost.
func TestStagingComesBack(t *testing.T) {
	for name, then := range map[string]func(c *cluster){
		"missing": func(c *cluster) {},
		"longer":  func(c *cluster) { is(t, core.Stored, c.client.Put(t.Context(), "key", c.alloc(12<<10))) },
	} {
		t.Run(name, func(t *testing.T) {
			g := newGate(backend.Read, false)
			released := make(chan struct{}, 10)
			c := newCluster(t, shape{client: core.ClientOptions{StagingSize: 16 << 10}, wrap: g.at("client"),
				dial: func(s peer.Service) peer.Service { return spy{s, released} }})
			t.Cleanup(g.letThrough)
			is(t, core.Stored, c.client.BatchPut(t.Context(), []core.Item{{Key: "first", Value: made(16<<10, 1)}})...)
			is(t, core.Stored, c.client.Put(t.Context(), "key", made(4<<10, 2)))
			first, second := make(chan core.Result, 1), make(chan core.Result, 1)
			go func() { first <- c.client.Get(t.Context(), "first", make([]byte, 16<<10)) }()
			receive(t, g.arrived) // it has all the staging memory
			go func() { second <- c.client.Get(t.Context(), "key", make([]byte, 16<<10)) }()
			receive(t, released) // it has found the value, and no memory for it
			is(t, core.Removed, c.client.Remove(t.Context(), "key")...)
			then(c)
			g.letThrough()
			is(t, core.Found, receive(t, first))
			if r := receive(t, second); r.Status != core.Missing && r.Status != core.Found {
				t.Errorf("the second get: %+v", r)
			}
			is(t, core.Found, c.client.Get(t.Context(), "first", make([]byte, 16<<10))) // needs all of it again
		})
	}
}

// TestManyKeys has more keys than one call to a node may name.
func TestManyKeys(t *testing.T) {
	const n = peer.MaxKeys + 500
	c := newCluster(t, shape{pageSize: 64, poolSize: 2 * n * 64, client: core.ClientOptions{StagingSize: 1 << 20, Tuning: core.Tuning{Verify: core.VerifyAll}}})
	memory, into := c.alloc(n*8), c.alloc(n*8)
	fill(memory, 1)
	var list, gets []core.Item
	var keys []string
	for i := range n {
		key := fmt.Sprint("key-", i)
		list = append(list, core.Item{Key: key, Value: memory[i*8:][:8]})
		gets = append(gets, core.Item{Key: key, Value: into[i*8:][:8]})
		keys = append(keys, key)
	}
	is(t, core.Stored, c.client.BatchPut(t.Context(), list)...)
	is(t, core.Exists, c.client.Exists(t.Context(), keys...)...)
	is(t, core.Found, c.client.BatchGet(t.Context(), gets)...)
	if !bytes.Equal(memory, into) {
		t.Error("other bytes came back")
	}
	is(t, core.Found, c.client.Stat(t.Context(), keys...)...)
	is(t, core.Removed, c.client.Remove(t.Context(), keys...)...)
	is(t, core.Missing, c.client.Exists(t.Context(), keys...)...)
	c.quiet()
}

// brief is a node whose answers have room for few runs.
type brief struct {
	peer.Service
	runs int
}

func (b brief) Resolve(ctx context.Context, req *peer.ResolveRequest, reply *peer.ResolveReply) error {
	short := *req
	short.Keys = req.Keys[:min(len(req.Keys), b.runs)]
	if err := b.Service.Resolve(ctx, &short, reply); err != nil {
		return err
	}
	for len(reply.Values) < len(req.Keys) {
		reply.Values = append(reply.Values, peer.Value{})
	}
	return nil
}

// TestPartialAnswers: what an answer had no room for is asked for again.
func TestPartialAnswers(t *testing.T) {
	c := newCluster(t, shape{nodes: 2, client: verifyAll, dial: func(s peer.Service) peer.Service { return brief{s, 3} }})
	list := items(c.alloc(1<<20), slices.Repeat([]int{5000}, 20), 1)
	is(t, core.Stored, c.client.BatchPut(t.Context(), list)...)
	into := buffers(c.alloc(1<<20), list, 0)
	sameBytes(t, list, into, c.client.BatchGet(t.Context(), into))
	var keys []string
	for _, it := range list {
		keys = append(keys, it.Key)
	}
	keys = append(keys, "absent")
	stats := c.client.Stat(t.Context(), keys...)
	is(t, core.Found, stats[:20]...)
	is(t, core.Missing, stats[20])
	for i, r := range stats[:20] {
		if r.Size != 5000 {
			t.Errorf("stat %d: %+v", i, r)
		}
	}
	e, err := c.client.ExplainGet(t.Context(), keys, core.ExplainOptions{})
	if err != nil || len(e.Left) != 20-6+1 {
		t.Errorf("explained, but for %d of 21 keys: %v", len(e.Left), err)
	}
	c.quiet()
}

func TestClosedClient(t *testing.T) {
	c := newCluster(t, shape{client: verifyAll})
	value := made(100, 1)
	is(t, core.Stored, c.client.Put(t.Context(), "a", value))
	if err := c.client.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.client.Close(t.Context()); err != nil {
		t.Errorf("the second Close: %v", err)
	}
	for _, r := range slices.Concat(
		c.client.BatchPut(t.Context(), []core.Item{{Key: "b", Value: value}, {Key: "c", Value: value}}),
		c.client.BatchGet(t.Context(), []core.Item{{Key: "a", Value: value}}),
		c.client.Exists(t.Context(), "a"), c.client.Remove(t.Context(), "a"), c.client.Stat(t.Context(), "a"),
	) {
		refused(t, r, core.Failed, backend.Cancelled, "the client is closed")
	}
	if _, err := c.client.ExplainGet(t.Context(), []string{"a"}, core.ExplainOptions{}); backend.CodeOf(err) != backend.Cancelled {
		t.Errorf("explain: %v", err)
	}
}

// TestCloseWaits: calls that are under way finish as if nothing were, also where they have a node to get to know yet.
func TestCloseWaits(t *testing.T) {
	g := newGate(backend.Write, false)
	c := newCluster(t, shape{nodes: 2, client: core.ClientOptions{StagingSize: 8 << 10}, wrap: g.at("client")})
	t.Cleanup(g.letThrough)
	put := make(chan []core.Result, 1)
	go func() { // three waves
		put <- c.client.BatchPut(t.Context(), []core.Item{
			{Key: "a", Value: made(8<<10, 1)}, {Key: "b", Value: made(8<<10, 2)}, {Key: "c", Value: made(8<<10, 2)},
		})
	}()
	receive(t, g.arrived)
	closed := make(chan error, 1)
	go func() { closed <- c.client.Close(context.Background()) }()
	waitUntil(t, func() bool { return c.client.Exists(t.Context(), "x")[0].Err != nil })
	select {
	case <-closed:
		t.Error("Close does not wait for the call under way")
	default:
	}
	g.letThrough()
	is(t, core.Stored, receive(t, put)...)
	if err := receive(t, closed); err != nil {
		t.Error(err)
	}
}

func TestContextDone(t *testing.T) {
	c := newCluster(t, shape{client: verifyAll})
	value := made(100, 1)
	is(t, core.Stored, c.client.Put(t.Context(), "a", value))
	why := errors.New("no more interest")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	for _, r := range slices.Concat(
		c.client.BatchPut(ctx, []core.Item{{Key: "b", Value: value}}), c.client.BatchGet(ctx, []core.Item{{Key: "a", Value: value}}),
		c.client.Exists(ctx, "a"), c.client.Remove(ctx, "a"), c.client.Stat(ctx, "a"),
	) {
		refused(t, r, core.Failed, backend.Cancelled, why.Error())
	}
	is(t, core.Exists, c.client.Exists(t.Context(), "a")...)
	c.quiet()
}

// TestContextEndsBetweenWaves: what has not begun does not begin.
func TestContextEndsBetweenWaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, op := range []backend.Op{backend.Write, backend.Read} {
			g := newGate(op, true)
			c := newCluster(t, shape{client: core.ClientOptions{StagingSize: 8 << 10}, wrap: g.at("client")})
			t.Cleanup(g.letThrough)
			list := []core.Item{{Key: "a", Value: made(8<<10, 1)}, {Key: "b", Value: made(8<<10, 2)}}
			call := c.client.BatchPut
			if op == backend.Read {
				is(t, core.Stored, c.client.BatchPut(t.Context(), list)...)
				call = c.client.BatchGet
			}
			ctx, cancel := context.WithCancel(t.Context())
			results := make(chan []core.Result, 1)
			go func() { results <- call(ctx, list) }()
			receive(t, g.arrived)
			cancel()
			g.letThrough()
			r := receive(t, results)
			if !r[0].OK() {
				t.Errorf("%v: the first value, which has moved: %+v", op, r[0])
			}
			refused(t, r[1], core.Failed, backend.Cancelled, `"b"`)
			c.quiet()
		}
	})
}

// TestSecondPut: eight clients put other values under one key at the same time. One is stored, the others are told
// that the key exists, and everyone gets the bytes of the one.
func TestSecondPut(t *testing.T) {
	const n = 8
	c := newCluster(t, shape{nodes: 3, client: verifyAll})
	var clients []*core.PoolClient
	for i := range n {
		clients = append(clients, c.newClient(c.newEngine(fmt.Sprint("client-", i)), c.shape.client))
	}
	for round := range 20 {
		key := fmt.Sprint("key-", round)
		var stored atomic.Int64
		stored.Store(-1)
		var wg sync.WaitGroup
		for i, client := range clients {
			wg.Go(func() {
				switch r := client.Put(t.Context(), key, made(30_000+i, uint64(i))); r.Status {
				case core.Stored:
					if !stored.CompareAndSwap(-1, int64(i)) {
						t.Errorf("%s: two clients were told that they stored it", key)
					}
				case core.Exists:
				default:
					t.Errorf("%s: %+v", key, r)
				}
				into := make([]byte, 40_000)
				if r := client.Get(t.Context(), key, into); r.Status != core.Found || !bytes.Equal(into[:r.Size], made(int(r.Size), r.Size-30_000)) {
					t.Errorf("%s: get: %+v, or mixed bytes", key, r)
				} else if s := stored.Load(); s >= 0 && int(r.Size) != 30_000+int(s) {
					t.Errorf("%s: %d bytes, and client %d stored it", key, r.Size, s)
				}
			})
		}
		wg.Wait()
		if stored.Load() < 0 {
			t.Errorf("%s: nobody stored it", key)
		}
	}
	c.quiet()
}

// TestThousandClients runs the batches of a thousand callers at once, over a few clients.
func TestThousandClients(t *testing.T) {
	c := newCluster(t, shape{nodes: 2, poolSize: 32 << 20, pageSize: 512, client: core.ClientOptions{
		StagingSize: 1 << 20, Tuning: core.Tuning{Verify: core.VerifyAll},
	}})
	clients := []*core.PoolClient{c.client, c.newClient(c.engine, c.shape.client), c.newClient(c.nodes[0].Engine(), c.shape.client)}
	var wg sync.WaitGroup
	for i := range 1000 {
		wg.Go(func() {
			client := clients[i%len(clients)]
			var put, got []core.Item
			for k := range 4 {
				put = append(put, core.Item{Key: fmt.Sprintf("%d-%d", i, k), Value: made(100+(i*k)%900, uint64(i*4+k))})
				got = append(got, core.Item{Key: put[k].Key, Value: make([]byte, 1000)})
			}
			for _, r := range client.BatchPut(t.Context(), put) {
				if r.Status != core.Stored {
					t.Errorf("caller %d: put: %+v", i, r)
				}
			}
			reader := clients[(i+1)%len(clients)]
			for k, r := range reader.BatchGet(t.Context(), got) {
				if r.Status != core.Found || !bytes.Equal(got[k].Value[:r.Size], put[k].Value) {
					t.Errorf("caller %d: get: %+v", i, r)
				}
			}
			for _, r := range reader.Remove(t.Context(), put[0].Key, put[1].Key) {
				if r.Status != core.Removed {
					t.Errorf("caller %d: remove: %+v", i, r)
				}
			}
		})
	}
	wg.Wait()
	c.quiet()
	if n := c.stats(0).Keys + c.stats(1).Keys; n != 2000 {
		t.Errorf("%d keys are left, want 2000", n)
	}
}

// TestTimeout: a context without a deadline gets the client's.
func TestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(backend.Write, false)
		c := newCluster(t, shape{client: verifyAll, wrap: g.at("client")})
		t.Cleanup(g.letThrough)
		tuning := c.shape.client.Tuning
		tuning.Timeout = 20 * time.Millisecond
		c.client.Tune(tuning)
		refused(t, c.client.Put(context.Background(), "a", made(100, 1)), core.Failed, backend.Cancelled, "deadline exceeded")
		c.quiet()
	})
}
