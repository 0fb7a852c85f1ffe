package pool_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/control"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// client is a pool client in the test's own process, with an engine of its own.
type client struct {
	*core.PoolClient
	t         *testing.T
	engine    *core.Engine
	directory *directory.Client
}

func connect(t *testing.T, mode, directoryAddress, sockets string, backends ...string) *client {
	t.Helper()
	engine, err := newEngine(t.Context(), mode, "client-"+t.Name()+"-"+fmt.Sprint(rand.Uint32()), backends, map[string]map[string]string{
		"tcp": {"listen": "off"}, "shm": {"socket_dir": sockets},
	})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := control.Connect(directoryAddress, nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &client{t: t, engine: engine, directory: directory.NewClient(conn)}
	c.PoolClient, err = core.NewPoolClient(t.Context(), core.ClientOptions{
		Engine: engine, Directory: c.directory, Dial: core.DialControl(nil), StagingSize: 2 << 20,
		Tuning: core.Tuning{Verify: core.VerifyAll, Timeout: patience},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.Close(context.Background()), engine.Close(), conn.Close()); err != nil {
			t.Error(err)
		}
	})
	return c
}

// alloc returns registered memory.
func (c *client) alloc(size uint64) []byte {
	c.t.Helper()
	buf, err := c.Alloc(c.t.Context(), size)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		if err := buf.Close(context.Background()); err != nil {
			c.t.Error(err)
		}
	})
	return buf.Bytes()
}

// register registers memory of a connector's own.
func register(t *testing.T, e *core.Engine, size uint64) *region.Region {
	t.Helper()
	arena, err := region.NewArena("test", size, region.ArenaOptions{HugePages: region.HugePagesOff})
	if err != nil {
		t.Fatal(err)
	}
	r, err := e.Register(t.Context(), &region.Region{Kind: backend.HostMemory, Bytes: arena.Bytes(), FD: arena.FD()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(e.Deregister(context.Background(), r.ID), arena.Close()); err != nil {
			t.Error(err)
		}
	})
	return r
}

// items makes values: every third outside of registered memory, the others one after the other in it.
func (c *client) items(prefix string, sizes ...int) []core.Item {
	total := 0
	for _, n := range sizes {
		total += n
	}
	memory := c.alloc(uint64(total))
	var list []core.Item
	for i, n := range sizes {
		value := make([]byte, n)
		if i%3 != 0 {
			value, memory = memory[:n:n], memory[n:]
		}
		fill(value, uint64(len(prefix)*1000+i))
		list = append(list, core.Item{Key: fmt.Sprintf("%s-%d", prefix, i), Value: value})
	}
	return list
}

// into makes memory to get the items into.
func (c *client) into(list []core.Item) []core.Item {
	var sizes []int
	for _, it := range list {
		sizes = append(sizes, len(it.Value))
	}
	into := c.items("", sizes...)
	for i := range into {
		into[i].Key = list[i].Key
	}
	return into
}

func fill(b []byte, seed uint64) {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	rand.NewChaCha8(key).Read(b)
}

// same fails the test unless every value was found, and is the one that was put.
func (c *client) same(list []core.Item) []core.Result {
	c.t.Helper()
	into := c.into(list)
	results := c.BatchGet(c.t.Context(), into)
	for i, r := range results {
		if r.Status != core.Found || r.Size != uint64(len(list[i].Value)) || !r.Verified {
			c.t.Fatalf("get %q: %+v", list[i].Key, r)
		}
		if !bytes.Equal(into[i].Value, list[i].Value) {
			c.t.Fatalf("get %q: other bytes", list[i].Key)
		}
	}
	return results
}

func is(t *testing.T, want core.Status, results ...core.Result) {
	t.Helper()
	for i, r := range results {
		if r.Status != want {
			t.Fatalf("result %d: %+v, want %v", i, r, want)
		}
	}
}

// paths counts the results by node and backend.
func paths(results []core.Result) map[string]int {
	n := map[string]int{}
	for _, r := range results {
		n[r.Path.Node+" by "+r.Path.Backend]++
	}
	return n
}

// eventually fails the test instead of letting it hang.
func eventually(t *testing.T, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not come about")
		}
	}
}

func receive[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatal("nothing came")
		panic("unreachable")
	}
}

// sockets makes a directory for the sockets of the shm backend. Its path is short: there is little room for it in a
// socket's address.
func sockets(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "umbp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

var (
	tcpOnly = []string{"tcp"}
	shmTCP  = []string{"shm", "tcp"}
)

// newPool starts a directory and two nodes, a and b, and returns them. The changes apply to the node's roles.
func newPool(t *testing.T, mode string, lease time.Duration, change ...func(a, b *role)) (dir, a, b *process, socketDir string) {
	t.Helper()
	socketDir = sockets(t)
	anyPort := net.JoinHostPort(ownHost(), "0")
	dir = start(t, role{Listen: anyPort, Lease: lease})
	ra := role{Listen: anyPort, Directory: dir.Control, Node: "a", Backends: tcpOnly, Data: anyPort, Sockets: socketDir, PoolSize: 16 << 20, Mode: mode}
	rb := ra
	rb.Node = "b"
	for _, f := range change {
		f(&ra, &rb)
	}
	return dir, start(t, ra), start(t, rb), socketDir
}

// TestPool runs every test with the backends linked in, and again with each as a process of its own.
func TestPool(t *testing.T) {
	for _, mode := range []string{inProcess, asProcess} {
		for name, test := range map[string]func(t *testing.T, mode string){
			"MixedFleet":        testMixedFleet,
			"PoolFull":          testPoolFull,
			"NodeKilled":        testNodeKilled,
			"ConnectionCut":     testConnectionCut,
			"DirectoryRestarts": testDirectoryRestarts,
			"NodeRestarts":      testNodeRestarts,
			"IdleGap":           testIdleGap,
			"WrongSecret":       testWrongSecret,
			"Leaving":           testLeaving,
		} {
			t.Run(mode+"/"+name, func(t *testing.T) {
				t.Parallel()
				test(t, mode)
			})
		}
	}
}

var sizes = []int{1, 4095, 4096, 4097, 12_289, 100_000, 300_001, 7, 65_536, 200_000}

// testMixedFleet: one node has shared memory and tcp, the other tcp alone. The same holds for the clients. Everyone
// gets everything, by the best way that they share.
func testMixedFleet(t *testing.T, mode string) {
	dir, _, _, socketDir := newPool(t, mode, patience, func(a, _ *role) { a.Backends = shmTCP })
	rich := connect(t, mode, dir.Control, socketDir, shmTCP...)
	poor := connect(t, mode, dir.Control, "", tcpOnly...)
	for i, c := range []*client{rich, poor} {
		list := c.items(fmt.Sprint("client-", i), slices.Repeat(sizes, 3)...)
		results := c.BatchPut(t.Context(), list)
		is(t, core.Stored, results...)
		for _, got := range [][]core.Result{results, c.same(list)} {
			n := paths(got)
			way := []string{"a by shm", "a by tcp"}[i]
			if n[way] == 0 || n["b by tcp"] == 0 || n[way]+n["b by tcp"] != len(list) {
				t.Errorf("client %d: the values went %v", i, n)
			}
		}
		[]*client{poor, rich}[i].same(list)
	}
	is(t, core.Exists, rich.Put(t.Context(), "client-1-0", []byte("other")))
	is(t, core.Removed, rich.Remove(t.Context(), "client-1-0")...)
	is(t, core.Missing, poor.Get(t.Context(), "client-1-0", make([]byte, 10)))
}

// testPoolFull over real processes: what has no room fails alone.
func testPoolFull(t *testing.T, mode string) {
	dir, _, _, _ := newPool(t, mode, patience, func(a, b *role) { a.PoolSize, b.PoolSize = 1<<20, 1<<20 })
	c := connect(t, mode, dir.Control, "", tcpOnly...)
	list := c.items("full", slices.Repeat([]int{300_000}, 8)...) // three fit on each node
	var stored []core.Item
	for i, r := range c.BatchPut(t.Context(), list) {
		switch r.Status {
		case core.Stored:
			stored = append(stored, list[i])
		case core.NoSpace:
		default:
			t.Errorf("put %d: %+v", i, r)
		}
	}
	if len(stored) != 6 {
		t.Errorf("%d values are stored, want 6", len(stored))
	}
	c.same(stored)
}

// testNodeKilled kills a node while bytes are on their way to it, or from it.
func testNodeKilled(t *testing.T, mode string) {
	for name, direction := range map[string]int{"put": toNode, "get": toClient} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var p *proxy
			dir, _, b, _ := newPool(t, mode, briefly, func(_, b *role) {
				b.Data = freePort(t, b.host())
				p = newProxy(t, b.Data)
				b.Announce = p.address()
			})
			c := connect(t, mode, dir.Control, "", tcpOnly...)
			before := c.items("before", sizes...)
			is(t, core.Stored, c.BatchPut(t.Context(), before)...)
			beforeAt := c.same(before)

			list := c.items("list", slices.Repeat([]int{200_000}, 10)...)
			call := func() []core.Result { return c.BatchPut(t.Context(), list) }
			into := c.into(list)
			at := map[string]string{} // the nodes of the values
			if direction == toClient {
				for i, r := range c.BatchPut(t.Context(), list) {
					is(t, core.Stored, r)
					at[list[i].Key] = r.Path.Node
				}
				call = func() []core.Result { return c.BatchGet(t.Context(), into) }
			}
			p.stopAfter(direction, 150_000, false)
			called := make(chan []core.Result, 1)
			go func() { called <- call() }()
			receive(t, p.stopped) // in the middle of a transfer
			b.kill()
			results := receive(t, called)
			for i, r := range results {
				switch {
				case direction == toNode:
					// What did not get to b went to a.
					if r.Status != core.Stored || r.Path.Node != "a" {
						t.Errorf("put %d: %+v", i, r)
					}
				case at[list[i].Key] == "a":
					if r.Status != core.Found || !bytes.Equal(into[i].Value, list[i].Value) {
						t.Errorf("get %d, which a has: %+v", i, r)
					}
				case r.Status == core.Found || r.Err != nil && backend.CodeOf(r.Err) != backend.PathDown && backend.CodeOf(r.Err) != backend.PeerGone:
					t.Errorf("get %d, which b had: %+v", i, r)
				}
			}
			if direction == toNode {
				c.same(list)
			}

			// Once its membership has run out, the node's values are missing; the others are there.
			eventually(t, func() bool {
				nodes, err := c.directory.Nodes(t.Context())
				return err == nil && len(nodes) == 1
			})
			left := c.into(before)
			eventually(t, func() bool { // a may have been late to sign on, too
				for i, r := range c.BatchGet(t.Context(), left) {
					if (r.Status == core.Found) != (beforeAt[i].Path.Node == "a") || r.Status != core.Found && r.Status != core.Missing {
						return false
					}
				}
				return true
			})
			is(t, core.Stored, c.BatchPut(t.Context(), c.items("after", sizes...))...)
		})
	}
}

// testConnectionCut cuts the connection in the middle of a frame. The transfer is sent again.
func testConnectionCut(t *testing.T, mode string) {
	var p *proxy
	dir, _, _, _ := newPool(t, mode, patience, func(a, b *role) {
		a.PoolSize = 4096 // so that all goes to b
		b.Data = freePort(t, b.host())
		p = newProxy(t, b.Data)
		b.Announce = p.address()
	})
	c := connect(t, mode, dir.Control, "", tcpOnly...)
	is(t, core.Stored, c.BatchPut(t.Context(), c.items("warm", sizes[1:]...))...)
	for i, n := range []int64{0, 1, 39, 40, 100, 100_000, 999_999} {
		list := c.items(fmt.Sprint("cut-", i), 900_000, 900_000, 5000)
		p.stopAfter(toNode, n, true)
		results := c.BatchPut(t.Context(), list)
		receive(t, p.stopped)
		is(t, core.Stored, results...)
		if !slices.ContainsFunc(results, func(r core.Result) bool { return r.Path.Attempts > 1 }) {
			t.Errorf("cut after %d bytes: nothing was sent again: %+v", n, results)
		}
		c.same(list)
		p.stopAfter(toClient, n, true)
		c.same(list)
		receive(t, p.stopped)
		var keys []string
		for _, it := range list {
			keys = append(keys, it.Key)
		}
		is(t, core.Removed, c.Remove(t.Context(), keys...)...)
	}
}

// testDirectoryRestarts: the directory is killed and comes back empty at the same address. The nodes tell it what
// they hold.
func testDirectoryRestarts(t *testing.T, mode string) {
	dir, _, _, _ := newPool(t, mode, briefly)
	c := connect(t, mode, dir.Control, "", tcpOnly...)
	list := c.items("key", sizes...)
	is(t, core.Stored, c.BatchPut(t.Context(), list)...)
	dir.kill()
	for _, r := range append(c.BatchPut(t.Context(), c.items("meanwhile", 10, 20)), c.BatchGet(t.Context(), c.into(list))...) {
		if r.Status != core.Failed || backend.CodeOf(r.Err) != backend.PathDown {
			t.Errorf("without a directory: %+v", r)
		}
	}
	dir.restart()
	var keys []string
	for _, it := range list {
		keys = append(keys, it.Key)
	}
	eventually(t, func() bool {
		return !slices.ContainsFunc(c.Exists(t.Context(), keys...), func(r core.Result) bool { return r.Status != core.Exists })
	})
	c.same(list)
	is(t, core.Exists, c.BatchPut(t.Context(), list)...)
	is(t, core.Stored, c.BatchPut(t.Context(), c.items("after", sizes...))...)
}

// testNodeRestarts: a node is killed and comes back on the same ports, with another incarnation. Clients that knew it
// go on without a restart, and what they knew of its memory is refused.
func testNodeRestarts(t *testing.T, mode string) {
	dir, _, b, _ := newPool(t, mode, patience, func(a, b *role) { a.PoolSize, b.Data = 4096, freePort(t, b.host()) })
	c := connect(t, mode, dir.Control, "", tcpOnly...)
	list := c.items("key", sizes[1:]...)
	for range 2 {
		results := c.BatchPut(t.Context(), list)
		is(t, core.Stored, results...)
		c.same(list)

		// A connector knows the node, too, by a descriptor.
		conn, err := control.Connect(b.Control, nil)
		if err != nil {
			t.Fatal(err)
		}
		service := peer.NewClient(conn)
		described, err := service.Describe(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		r := register(t, c.engine, 4096)
		remove := c.engine.AddPeer(described.Peer, service)
		session, err := c.engine.Open(r.ID, described.Regions[0])
		if err != nil {
			t.Fatal(err)
		}
		whole := []backend.Segment{{Length: 4096}}
		if r := session.Read(t.Context(), whole); r.Err != nil {
			t.Fatal(r.Err)
		}
		old := b.Self
		b = b.restart()
		if b.Self.Incarnation == old.Incarnation {
			t.Fatal("the incarnation is the same")
		}
		report := session.Write(t.Context(), whole)
		if backend.CodeOf(report.Err) != backend.PeerGone || report.Outcomes[0] == backend.Done {
			t.Errorf("a write by the old descriptor: %+v", report)
		}
		remove()
		conn.Close()

		for _, r := range c.BatchGet(t.Context(), c.into(list)) {
			if r.Status != core.Missing {
				t.Errorf("a value of the old incarnation: %+v", r)
			}
		}
	}
	is(t, core.Stored, c.BatchPut(t.Context(), list)...)
	c.same(list)
}

// testIdleGap: connections that have been silent for longer than their keepalive are good.
func testIdleGap(t *testing.T, mode string) {
	dir, _, _, socketDir := newPool(t, mode, patience, func(a, _ *role) { a.Backends = shmTCP })
	c := connect(t, mode, dir.Control, socketDir, shmTCP...)
	list := c.items("key", sizes...)
	is(t, core.Stored, c.BatchPut(t.Context(), list)...)
	time.Sleep(3 * time.Second)
	for _, r := range c.same(list) {
		if r.Path.Attempts != 1 {
			t.Errorf("after the gap: %+v", r)
		}
	}
}

// testWrongSecret: who does not have the secret that the control plane hands out gets nothing, whatever they send.
func testWrongSecret(t *testing.T, mode string) {
	dir, _, b, _ := newPool(t, mode, patience, func(a, b *role) { a.PoolSize, b.Data = 4096, freePort(t, b.host()) })
	c := connect(t, mode, dir.Control, "", tcpOnly...)
	value := bytes.Repeat([]byte("a secret value! "), 512)
	is(t, core.Stored, c.Put(t.Context(), "key", value))

	read := make([]byte, 56) // a request to read the first page, as it looks after a handshake
	copy(read, "UMRQ\x02")
	read[16], read[24] = 1, 1
	binary.LittleEndian.PutUint64(read[32:], 4096)
	binary.LittleEndian.PutUint64(read[48:], 4096)
	hello := make([]byte, 8+8+16+2+32)
	binary.LittleEndian.PutUint64(hello[8:], b.Self.Incarnation)
	noise := make([]byte, 1<<16)
	fill(noise, 1)
	var wg sync.WaitGroup
	for name, sent := range map[string][]byte{
		"nothing": nil, "noise": noise, "a request": read, "a request, many times": bytes.Repeat(read, 100),
		"a hello of zeros": hello, "a hello and a request": append(hello, read...),
	} {
		wg.Go(func() {
			conn, err := net.Dial("tcp", b.role.Data)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			conn.Write(sent)
			if sent == nil {
				conn.(*net.TCPConn).CloseWrite()
			}
			conn.SetReadDeadline(time.Now().Add(connectTimeout + patience))
			got, err := io.ReadAll(conn)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: the connection is left open", name)
			}
			if bytes.Contains(got, []byte("secret")) || len(got) > 128 {
				t.Errorf("%s: %d bytes come back: %q", name, len(got), got)
			}
		})
	}
	wg.Wait()
	into := make([]byte, len(value))
	is(t, core.Found, c.Get(t.Context(), "key", into))
	if !bytes.Equal(into, value) {
		t.Error("the value has changed")
	}

	// Nor does an engine that offers under the name of another get what was meant for that one.
	stranger, err := newEngine(t.Context(), mode, "stranger", tcpOnly, map[string]map[string]string{"tcp": {"listen": "off"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stranger.Close() })
	conn, err := control.Connect(b.Control, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	service := peer.NewClient(conn)
	described, err := service.Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.AddPeer(described.Peer, forged{service, c.engine.Self()})()
	r := register(t, stranger, 4096)
	session, err := stranger.Open(r.ID, described.Regions[0])
	if err != nil {
		t.Fatal(err)
	}
	report := session.Read(t.Context(), []backend.Segment{{Length: 4096}})
	if report.Err == nil || !bytes.Equal(r.Bytes, make([]byte, 4096)) {
		t.Errorf("a stranger reads: %+v", report)
	}
}

// forged carries offers under another's name.
type forged struct {
	peer.Service
	name backend.Peer
}

func (f forged) Answer(ctx context.Context, req *peer.AnswerRequest) (*peer.AnswerReply, error) {
	req.From = f.name
	return f.Service.Answer(ctx, req)
}

// testLeaving: a node that leaves in good order is gone at once, with its values.
func testLeaving(t *testing.T, mode string) {
	dir, _, b, socketDir := newPool(t, mode, patience, func(a, b *role) { a.Backends, b.Backends = shmTCP, shmTCP })
	c := connect(t, mode, dir.Control, socketDir, shmTCP...)
	list := c.items("key", slices.Repeat(sizes, 2)...)
	results := c.BatchPut(t.Context(), list)
	is(t, core.Stored, results...)
	b.stop()
	for i, r := range c.BatchGet(t.Context(), c.into(list)) {
		want := core.Found
		if results[i].Path.Node == "b" {
			want = core.Missing
		}
		is(t, want, r)
	}
	is(t, core.Stored, c.BatchPut(t.Context(), c.items("after", sizes...))...)
}
