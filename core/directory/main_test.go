package directory

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clock is a clock that moves only when it is told to.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Unix(1_000_000, 0)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// tb is what the tests share with benchmarks and with rapid.
type tb interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
	Errorf(format string, args ...any)
}

func newMemory(t testing.TB, opts Options) *Memory {
	t.Helper()
	d := NewMemory(opts)
	t.Cleanup(func() { d.Close() })
	return d
}

// serve returns a connection to a server of d behind l.
func serve(t testing.TB, d Directory, l net.Listener, dial func(context.Context, string) (net.Conn, error)) *grpc.ClientConn {
	t.Helper()
	s := grpc.NewServer()
	Register(s, d)
	var served sync.WaitGroup
	served.Go(func() { s.Serve(l) })
	cc, err := grpc.NewClient("passthrough:///directory",
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(dial))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cc.Close()
		s.Stop()
		served.Wait()
	})
	return cc
}

// newClient returns a Client of d.
func newClient(t testing.TB, d Directory) *Client {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	return NewClient(serve(t, d, l, func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
}

// each runs test against a Memory, and against a Client of one.
func each(t *testing.T, test func(t *testing.T, d Directory, c *clock)) {
	t.Run("memory", func(t *testing.T) {
		c := newClock()
		test(t, newMemory(t, Options{Now: c.Now}), c)
	})
	t.Run("grpc", func(t *testing.T) {
		c := newClock()
		test(t, newClient(t, newMemory(t, Options{Now: c.Now})), c)
	})
}

// node returns a node of the first incarnation with everything free.
func node(name string, capacity uint64) *Node {
	return &Node{
		Peer:    backend.Peer{Node: name, Incarnation: 1, Host: "host-" + name},
		Address: name + ":7000", Capacity: capacity, Free: capacity,
	}
}

func join(t tb, d Directory, n *Node) JoinReply {
	t.Helper()
	reply, err := d.Join(context.Background(), n)
	if err != nil {
		t.Fatalf("join %s: %v", n.Peer, err)
	}
	return reply
}

// publish enters keys of one byte each and returns which were entered.
func publish(t tb, d Directory, n *Node, keys ...string) []bool {
	t.Helper()
	var reply PublishReply
	req := &PublishRequest{Peer: n.Peer, Keys: keys, Sizes: make([]uint64, len(keys)), Free: n.Free}
	for i := range req.Sizes {
		req.Sizes[i] = 1
	}
	if err := d.Publish(context.Background(), req, &reply); err != nil {
		t.Fatalf("publish for %s: %v", n.Peer, err)
	}
	return reply.Entered
}

// locate returns the names of the nodes that hold keys; "" for none.
func locate(t tb, d Directory, keys ...string) []string {
	t.Helper()
	var reply LocateReply
	if err := d.Locate(context.Background(), &LocateRequest{Keys: keys}, &reply); err != nil {
		t.Fatalf("locate: %v", err)
	}
	names := make([]string, len(reply.At))
	for i, at := range reply.At {
		if at != NoNode {
			names[i] = reply.Nodes[at].Peer.Node
		}
	}
	return names
}

// place returns the names of the nodes where keys go; "" for none, and with a "=" before it for one that exists.
func place(t tb, d Directory, req *PlaceRequest) []string {
	t.Helper()
	var reply PlaceReply
	if err := d.Place(context.Background(), req, &reply); err != nil {
		t.Fatalf("place: %v", err)
	}
	names := make([]string, len(reply.Placements))
	for i, p := range reply.Placements {
		if p.Node != NoNode {
			names[i] = reply.Nodes[p.Node].Peer.Node
		}
		if p.Exists {
			names[i] = "=" + names[i]
		}
	}
	return names
}
