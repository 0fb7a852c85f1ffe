package tcp

import (
	"context"
	"errors"
	"maps"
	"net"
	"runtime"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// long bounds what must end, and does so at once unless something is broken.
const long = 20 * time.Second

type config struct {
	peer    backend.Peer
	options map[string]string
	change  func(*backend.Config)
}

// node opens a backend that is closed with the test.
func node(t testing.TB, name string, c config) *transport {
	t.Helper()
	b, err := openNode(name, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func openNode(name string, c config) (*transport, error) {
	values, err := backend.CheckOptions(Factory.Options, c.options)
	if err != nil {
		return nil, err
	}
	if c.peer.Node == "" {
		c.peer = backend.Peer{Node: name, Incarnation: 7, Host: "here"}
	}
	cfg := backend.Config{Self: c.peer, Options: values}
	if c.change != nil {
		c.change(&cfg)
	}
	b, err := Factory.Open(context.Background(), cfg)
	if err != nil {
		return nil, err
	}
	return b.(*transport), nil
}

const everything = backend.RemoteRead | backend.RemoteWrite

// lend registers memory and returns it as peers see it.
func (t *transport) lend(tb testing.TB, id backend.RegionID, bytes []byte, rights backend.Rights) backend.Remote {
	tb.Helper()
	key, err := t.Register(context.Background(), backend.Memory{
		Region: id, Kind: backend.HostMemory, Rights: rights, Bytes: bytes, FD: -1,
	})
	if err != nil {
		tb.Fatal(err)
	}
	return backend.Remote{Peer: t.self, Region: id, Kind: backend.HostMemory, Rights: rights, Size: uint64(len(bytes)), Key: key}
}

func establish(initiator, target *transport) (*endpoint, error) {
	ctx, cancel := context.WithTimeout(context.Background(), long)
	defer cancel()
	h, err := initiator.Offer(ctx, target.self)
	if err != nil {
		return nil, err
	}
	answer, err := target.Answer(ctx, initiator.self, h.Offer())
	if err != nil {
		h.Abandon()
		return nil, err
	}
	e, err := h.Establish(ctx, answer)
	if err != nil {
		return nil, err
	}
	return e.(*endpoint), nil
}

func connect(t testing.TB, initiator, target *transport) *endpoint {
	t.Helper()
	e, err := establish(initiator, target)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func bind(t testing.TB, e backend.Endpoint, local backend.RegionID, remote backend.Remote, sink backend.Sink) *session {
	t.Helper()
	s, err := e.Session(context.Background(), local, remote, sink)
	if err != nil {
		t.Fatal(err)
	}
	return s.(*session)
}

// pair is an initiator and a target that are connected, with a region of each.
type pair struct {
	a, b        *transport
	near, far   []byte
	remote      backend.Remote
	endpoint    *endpoint
	session     *session
	completions sink
}

func newPair(t testing.TB, size int, options map[string]string) *pair {
	t.Helper()
	p := &pair{
		a: node(t, "a", config{options: options}), b: node(t, "b", config{options: options}),
		near: make([]byte, size), far: make([]byte, size), completions: newSink(),
	}
	p.a.lend(t, 1, p.near, 0)
	p.remote = p.b.lend(t, 2, p.far, everything)
	p.endpoint = connect(t, p.a, p.b)
	p.session = bind(t, p.endpoint, 1, p.remote, p.completions)
	return p
}

// sink hands completions to the test.
type sink chan backend.Completion

func newSink() sink { return make(sink, 1024) }

func (s sink) Complete(c backend.Completion) {
	c.Outcomes = slices.Clone(c.Outcomes)
	s <- c
}

func (s sink) next(t testing.TB) backend.Completion {
	t.Helper()
	select {
	case c := <-s:
		return c
	case <-time.After(long):
		t.Fatalf("no completion\n%s", stacks())
		panic("unreachable")
	}
}

// collect returns the next n completions by cookie.
func (s sink) collect(t testing.TB, n int) map[uint64]backend.Completion {
	t.Helper()
	all := make(map[uint64]backend.Completion, n)
	for range n {
		c := s.next(t)
		if _, twice := all[c.Cookie]; twice {
			t.Fatalf("transfer %d completed twice", c.Cookie)
		}
		all[c.Cookie] = c
	}
	return all
}

func (s sink) empty(t testing.TB) {
	t.Helper()
	select {
	case c := <-s:
		t.Fatalf("unexpected completion %+v", c)
	default:
	}
}

func stacks() string {
	b := make([]byte, 1<<20)
	return string(b[:runtime.Stack(b, true)])
}

func wantCode(t testing.TB, err error, code backend.Code) {
	t.Helper()
	var e *backend.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Fatalf("got error %v, want code %q", err, code)
	}
}

func wantClosed(t testing.TB, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(long):
		t.Fatalf("%s did not happen\n%s", what, stacks())
	}
}

// eventually waits for a condition that another goroutine brings about.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(long); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s did not happen\n%s", what, stacks())
		}
	}
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
	if err := p.session.Post(transfer); err != nil {
		t.Fatal(err)
	}
	if c := p.completions.next(t); c.Err != nil || c.Cookie != transfer.Cookie {
		t.Fatalf("transfer %d: got completion of %d, %v", transfer.Cookie, c.Cookie, c.Err)
	}
}

// rawInitiator connects to target as initiator would, and gives the proven connection to the test.
func rawInitiator(t testing.TB, initiator, target *transport) net.Conn {
	t.Helper()
	h, a := granted(t, initiator, target)
	conn, x := dialExchange(t, h, &a, 0)
	if err := x.initiate(conn); err != nil {
		t.Fatal(err)
	}
	return conn
}

// granted returns a handshake for one connection that target has answered.
func granted(t testing.TB, initiator, target *transport) (*handshake, answer) {
	t.Helper()
	hs, err := initiator.Offer(context.Background(), target.self)
	if err != nil {
		t.Fatal(err)
	}
	h := hs.(*handshake)
	raw, err := target.Answer(context.Background(), initiator.self, h.Offer())
	if err != nil {
		t.Fatal(err)
	}
	a, err := parseAnswer(raw)
	if err != nil {
		t.Fatal(err)
	}
	return h, a
}

func dialExchange(t testing.TB, h *handshake, a *answer, index uint16) (net.Conn, *exchange) {
	t.Helper()
	conn, err := net.Dial("tcp", a.addresses[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(long)); err != nil {
		t.Fatal(err)
	}
	return conn, &exchange{
		secret: a.secret, initiator: h.offer.initiator, target: a.target, offer: h.offer.nonce,
		hello: hello{target: a.target.Incarnation, grant: a.grant, index: index},
	}
}

// rawTarget is a target that follows the protocol up to the proof; then the test has the connection.
type rawTarget struct {
	endpoint    *endpoint
	session     *session
	completions sink
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
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })

	self := backend.Peer{Node: "fake", Incarnation: 3}
	hs, err := a.Offer(context.Background(), self)
	if err != nil {
		t.Fatal(err)
	}
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
	if err = errors.Join(err, r.err); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.conn.Close() })
	rt := &rawTarget{endpoint: e.(*endpoint), completions: newSink(), near: make([]byte, size), conn: r.conn}
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

func pattern(b []byte, seed int) {
	for i := range b {
		b[i] = byte((i+seed)*31 + (i>>8)*7 + seed)
	}
}
