package tcp

import (
	"context"
	"errors"
	"maps"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const everything = backend.RemoteRead | backend.RemoteWrite

type sink = backendtest.Sink

var (
	must       = backendtest.Must
	wantCode   = backendtest.WantCode
	wantClosed = backendtest.WantClosed
	wantOpen   = backendtest.WantOpen
	eventually = backendtest.Eventually
	fill       = backendtest.Fill
)

type config struct {
	peer    backend.Peer
	options map[string]string
	change  func(*backend.Config)
}

// node opens a backend that is closed with the test.
func node(t testing.TB, name string, c config) *transport {
	t.Helper()
	b, err := openNode(name, c)
	must(t, err)
	backendtest.CloseAtEnd(t, b)
	return b
}

func openNode(name string, c config) (*transport, error) {
	if c.peer.Node == "" {
		c.peer = backendtest.Peer(name, 7)
	}
	cfg := backend.Config{Self: c.peer}
	if c.change != nil {
		c.change(&cfg)
	}
	b, err := backendtest.TryOpen(Factory, cfg, c.options)
	if err != nil {
		return nil, err
	}
	return b.(*transport), nil
}

// lend registers memory and returns it as peers see it.
func (t *transport) lend(tb testing.TB, id backend.RegionID, bytes []byte, rights backend.Rights) backend.Remote {
	tb.Helper()
	return backendtest.Register(tb, t, t.self, backend.Memory{Region: id, Kind: backend.HostMemory, Rights: rights, Bytes: bytes, FD: -1})
}

func establish(initiator, target *transport) (backend.Endpoint, error) {
	return backendtest.TryConnect(initiator, initiator.self, target.self, target)
}

func connect(t testing.TB, initiator, target *transport) *endpoint {
	t.Helper()
	return backendtest.Connect(t, initiator, initiator.self, target.self, target).(*endpoint)
}

func bind(t testing.TB, e backend.Endpoint, local backend.RegionID, remote backend.Remote, sink backend.Sink) *session {
	t.Helper()
	return backendtest.Bind(t, e, local, remote, sink).(*session)
}

// pair is an initiator and a target that are connected, with a region of each.
type pair struct {
	a, b        *transport
	near, far   []byte
	remote      backend.Remote
	endpoint    *endpoint
	session     *session
	completions *sink
}

func newPair(t testing.TB, size int, options map[string]string) *pair {
	t.Helper()
	p := &pair{
		a: node(t, "a", config{options: options}), b: node(t, "b", config{options: options}),
		near: make([]byte, size), far: make([]byte, size), completions: new(sink),
	}
	p.a.lend(t, 1, p.near, 0)
	p.remote = p.b.lend(t, 2, p.far, everything)
	p.endpoint = connect(t, p.a, p.b)
	p.session = bind(t, p.endpoint, 1, p.remote, p.completions)
	return p
}

func write(cookie uint64, segments ...backend.Segment) backend.Transfer {
	return backend.Transfer{Op: backend.Write, Cookie: cookie, Segments: segments}
}

func read(cookie uint64, segments ...backend.Segment) backend.Transfer {
	return backend.Transfer{Op: backend.Read, Cookie: cookie, Segments: segments}
}

// must posts, and waits for the transfer to be done.
func (p *pair) must(t testing.TB, transfer backend.Transfer) {
	t.Helper()
	must(t, p.session.Post(transfer))
	if c := p.completions.Next(t); c.Err != nil || c.Cookie != transfer.Cookie {
		t.Fatalf("transfer %d: got completion of %d, %v", transfer.Cookie, c.Cookie, c.Err)
	}
}

// rawInitiator connects to target as initiator would, and gives the proven connection to the test.
func rawInitiator(t testing.TB, initiator, target *transport) net.Conn {
	t.Helper()
	h, a := granted(t, initiator, target)
	conn, x := dialExchange(t, h, &a, 0)
	must(t, x.initiate(conn))
	return conn
}

// granted returns a handshake for one connection that target has answered.
func granted(t testing.TB, initiator, target *transport) (*handshake, answer) {
	t.Helper()
	hs, err := initiator.Offer(context.Background(), target.self)
	must(t, err)
	h := hs.(*handshake)
	raw, err := target.Answer(context.Background(), initiator.self, h.Offer())
	must(t, err)
	a, err := parseAnswer(raw)
	must(t, err)
	return h, a
}

func dialExchange(t testing.TB, h *handshake, a *answer, index uint16) (net.Conn, *exchange) {
	t.Helper()
	conn, err := net.Dial("tcp", a.addresses[0])
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	must(t, conn.SetDeadline(time.Now().Add(backendtest.Patience)))
	return conn, &exchange{
		secret: a.secret, initiator: h.offer.initiator, target: a.target, offer: h.offer.nonce,
		hello: hello{target: a.target.Incarnation, grant: a.grant, index: index},
	}
}

// rawTarget is a target that follows the protocol up to the proof; then the test has the connection.
type rawTarget struct {
	endpoint    *endpoint
	session     *session
	completions *sink
	near        []byte
	conn        net.Conn
}

// newRawTarget connects a, over a single connection, to a target that the test plays.
func newRawTarget(t testing.TB, size int, options map[string]string) *rawTarget {
	t.Helper()
	return newRawTargetFor(t, size, config{options: options})
}

// newRawTargetFor configures the initiator beyond its options.
func newRawTargetFor(t testing.TB, size int, c config) *rawTarget {
	t.Helper()
	all := map[string]string{"connections": "1", "listen": "off"}
	maps.Copy(all, c.options)
	c.options = all
	a := node(t, "a", c)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { listener.Close() })

	self := backend.Peer{Node: "fake", Incarnation: 3}
	hs, err := a.Offer(context.Background(), self)
	must(t, err)
	h := hs.(*handshake)
	ans := answer{target: self, addresses: []string{listener.Addr().String()}}
	fillRandom(ans.secret[:])

	type accepted struct {
		conn net.Conn
		err  error
	}
	result := make(chan accepted, 1)
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			err = func() error {
				hi, err := readHello(conn)
				if err != nil {
					return err
				}
				x := exchange{secret: ans.secret, initiator: a.self, target: self, offer: h.offer.nonce, hello: hi}
				if err := x.respond(conn); err != nil {
					return err
				}
				_, err = conn.Write([]byte{0})
				return err
			}()
		}
		result <- accepted{conn, err}
	}()
	e, err := h.Establish(context.Background(), ans.encode())
	r := <-result
	must(t, errors.Join(err, r.err))
	t.Cleanup(func() { r.conn.Close() })
	rt := &rawTarget{endpoint: e.(*endpoint), completions: new(sink), near: make([]byte, size), conn: r.conn}
	a.lend(t, 1, rt.near, 0)
	rt.session = bind(t, e, 1, backend.Remote{
		Peer: self, Region: 9, Kind: backend.HostMemory, Rights: everything, Size: uint64(size),
	}, rt.completions)
	return rt
}

// evenly cuts size bytes into n segments, at the same offsets on both sides.
func evenly(n, size int) []backend.Segment {
	segments := make([]backend.Segment, n)
	step := uint64(size / n)
	for i := range segments {
		segments[i] = backend.Segment{Local: uint64(i) * step, Remote: uint64(i) * step, Length: step}
	}
	return segments
}
