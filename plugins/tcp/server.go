package tcp

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// maxUnproven bounds the connections that have not proved themselves yet.
const maxUnproven = 128

// server is the target: the listener, the grants that it has given, and the connections that it serves.
type server struct {
	t         *transport
	listener  *net.TCPListener
	addresses []string
	loopback  bool        // only this host can reach the listener
	secured   *tls.Config // nil without credentials

	mu       sync.Mutex
	closed   bool
	grants   map[grantID]*grant // whose connections have not all come yet
	unproven map[*net.TCPConn]struct{}
	serving  map[*served]struct{}
}

// grant allows one endpoint of one initiator to connect.
type grant struct {
	offer   offer
	secret  [secretSize]byte
	expires time.Time
	missing map[uint16]struct{} // indexes of the connections that have not come yet
	opening *atomic.Int32       // see served
}

func listen(ctx context.Context, t *transport, cfg *backend.Config) (*server, error) {
	addr, err := net.ResolveTCPAddr("tcp", t.settings.listen)
	if err != nil {
		return nil, &backend.Error{Code: backend.BadRequest, Text: "option listen", Err: err}
	}
	if err := mayListen(addr, cfg); err != nil {
		return nil, err
	}
	s := &server{
		t:        t,
		loopback: addr.IP.IsLoopback(),
		grants:   make(map[grantID]*grant),
		unproven: make(map[*net.TCPConn]struct{}),
		serving:  make(map[*served]struct{}),
	}
	if cfg.Credentials != nil {
		if s.secured, err = cfg.Credentials.Server(); err != nil {
			return nil, err
		}
	}
	lc := net.ListenConfig{Control: t.settings.control}
	l, err := lc.Listen(ctx, "tcp", addr.String())
	if err != nil {
		return nil, err
	}
	s.listener = l.(*net.TCPListener)
	if s.addresses, err = advertised(t.settings.advertise, l.Addr().(*net.TCPAddr)); err != nil {
		l.Close()
		return nil, err
	}
	t.log.Info("serving peers", "backend", name, "listen", l.Addr().String(), "advertise", s.addresses)
	return s, nil
}

// answer checks an offer and grants its connections.
func (s *server) answer(peer backend.Peer, raw []byte) ([]byte, error) {
	o, err := parseOffer(raw)
	if err != nil {
		return nil, err
	}
	self := s.t.self
	switch {
	case o.initiator.Node != peer.Node || o.initiator.Incarnation != peer.Incarnation:
		return nil, backend.Errorf(backend.BadRequest, "the offer was made by %s", o.initiator)
	case o.target.Node != self.Node || o.target.Incarnation != self.Incarnation:
		return nil, backend.Errorf(backend.PeerGone, "the offer was made to %s, and this is %s", o.target, self)
	case s.loopback && s.t.settings.advertise == "" && peer.Host != "" && self.Host != "" && peer.Host != self.Host:
		return nil, backend.Errorf(backend.Unsupported,
			"only this host can reach %s: set the option listen to serve peers on other hosts", s.listener.Addr())
	}
	a := answer{target: self, addresses: s.addresses}
	fillRandom(a.grant[:])
	fillRandom(a.secret[:])
	g := &grant{
		offer: o, secret: a.secret,
		expires: time.Now().Add(4 * s.t.settings.connectTimeout),
		missing: make(map[uint16]struct{}),
		opening: new(atomic.Int32),
	}
	g.opening.Store(int32(o.connections))
	for i := range o.connections {
		g.missing[uint16(i)] = struct{}{}
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, backend.Errorf(backend.PathDown, "the backend is closed")
	}
	// A node has one incarnation: what was granted to an earlier one, or is served to it, is void.
	s.replace(peer)
	promised := len(s.serving)
	for _, g := range s.grants {
		promised += len(g.missing)
	}
	if promised+o.connections > s.t.settings.maxConnections {
		e := backend.Errorf(backend.Busy, "%d connections are served or promised, and the option max_connections is %d",
			promised, s.t.settings.maxConnections)
		e.RetryAfter = s.t.settings.connectTimeout
		return nil, e
	}
	s.grants[a.grant] = g
	return a.encode(), nil
}

// replace voids the grants of other incarnations of the peer's node, and aborts their connections. The caller
// holds s.mu.
func (s *server) replace(peer backend.Peer) {
	stale := func(p backend.Peer) bool { return p.Node == peer.Node && p.Incarnation != peer.Incarnation }
	for id, g := range s.grants {
		if stale(g.offer.initiator) {
			delete(s.grants, id)
		}
	}
	for c := range s.serving {
		if stale(c.peer) {
			c.stream.abort()
		}
	}
}

// fence fences every connection of this incarnation of the peer. It leaves the grants alone: nothing can have been
// posted on connections that are still to come.
func (s *server) fence(ctx context.Context, peer backend.Peer) error {
	var fences errgroup.Group
	s.mu.Lock()
	for c := range s.serving {
		if c.peer.Node == peer.Node && c.peer.Incarnation == peer.Incarnation {
			fences.Go(func() error { return c.fence(ctx) })
		}
	}
	s.mu.Unlock()
	return fences.Wait()
}

// abort ends the connections chosen, without waiting.
func (s *server) abort(chosen func(*served) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.serving {
		if chosen(c) {
			c.stream.abort()
		}
	}
}

// sweep gives up what is stuck, and forgets grants that have expired.
func (s *server) sweep(now time.Time) {
	s.abort(func(c *served) bool {
		stuck := c.stream.stalled(c.busy.Load(), now, s.t.settings.ioTimeout)
		if stuck {
			s.t.log.Warn("a peer is stuck in a transfer", "backend", name, "peer", c.peer.String(), "timeout", s.t.settings.ioTimeout)
		}
		return stuck
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, g := range s.grants {
		if now.After(g.expires) {
			delete(s.grants, id)
		}
	}
}

// close ends the listener and every connection; the goroutines end soon after.
func (s *server) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.listener.Close()
	clear(s.grants)
	for conn := range s.unproven {
		conn.Close()
	}
	for c := range s.serving {
		c.stream.abort()
	}
}

// accept takes connections until the listener is closed.
func (s *server) accept() {
	const shortest, longest = 5 * time.Millisecond, time.Second
	pause := shortest
	for {
		conn, err := s.listener.AcceptTCP()
		switch {
		case err == nil:
			pause = shortest
			if s.admit(conn) {
				s.t.running.Go(func() { s.handle(conn) })
			}
			continue
		case errors.Is(err, net.ErrClosed):
			return
		}
		s.t.log.Warn("cannot accept a connection", "backend", name, "error", err)
		select { // descriptors may have run out: pause, so that the loop does not spin
		case <-s.t.ctx.Done():
			return
		case <-time.After(pause):
			pause = min(2*pause, longest)
		}
	}
}

// admit tells whether there is room for one more connection that has not proved itself; if not, it closes it.
func (s *server) admit(conn *net.TCPConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.unproven) >= maxUnproven {
		conn.Close()
		return false
	}
	s.unproven[conn] = struct{}{}
	return true
}

// handle proves both ends to each other, and serves the peer until the connection ends.
func (s *server) handle(conn *net.TCPConn) {
	defer conn.Close()
	c, err := s.welcome(conn)
	s.mu.Lock()
	delete(s.unproven, conn)
	s.mu.Unlock()
	if err != nil {
		if backend.CodeOf(err) == backend.Denied {
			s.t.log.Warn("refused a connection", "backend", name, "from", conn.RemoteAddr().String(), "error", err)
		} else {
			s.t.log.Debug("a connection ended in its handshake", "backend", name, "from", conn.RemoteAddr().String(), "error", err)
		}
		return
	}
	s.t.log.Debug("serving a connection", "backend", name, "peer", c.peer.String())
	if err = c.begin(); err == nil {
		err = c.serve()
	}
	if !errors.Is(err, io.EOF) && !c.stream.aborted.Load() {
		s.t.log.Warn("a connection failed", "backend", name, "peer", c.peer.String(), "error", err)
	}
	c.stream.close(true)
	s.mu.Lock()
	delete(s.serving, c)
	s.mu.Unlock()
	close(c.quiet)
}

// welcome is the target's side of the handshake. The connection that it returns is listed as served.
func (s *server) welcome(tcp *net.TCPConn) (*served, error) {
	if err := s.t.settings.tune(tcp); err != nil {
		return nil, err
	}
	if err := tcp.SetDeadline(time.Now().Add(s.t.settings.connectTimeout)); err != nil {
		return nil, err
	}
	var conn net.Conn = tcp
	var secured *tls.Conn
	if s.secured != nil {
		secured = tls.Server(tcp, s.secured)
		conn = secured
		if err := secured.Handshake(); err != nil {
			return nil, &backend.Error{Code: backend.Denied, Text: "no TLS session", Err: err}
		}
	}
	h, err := readHello(conn)
	if err != nil {
		return nil, err
	}
	if h.target != s.t.self.Incarnation {
		refuseHello(conn, backend.PeerGone)
		return nil, backend.Errorf(backend.PeerGone, "the peer wants incarnation %x", h.target)
	}
	s.mu.Lock()
	g := s.grants[h.grant]
	s.mu.Unlock()
	if g == nil {
		refuseHello(conn, backend.Denied)
		return nil, backend.Errorf(backend.Denied, "the grant is unknown, used or expired")
	}
	x := exchange{secret: g.secret, initiator: g.offer.initiator, target: s.t.self, offer: g.offer.nonce, hello: h}
	if err := x.respond(conn); err != nil {
		if backend.CodeOf(err) == backend.Denied {
			_, _ = conn.Write([]byte{byte(backend.Denied)}) // the connection ends, whether this arrives or not
		}
		return nil, err
	}
	stream, err := newStream(tcp, secured)
	if err != nil {
		return nil, err
	}
	c := newServed(s.t, g.offer.initiator, stream, g.opening)
	if !s.enlist(c, g, h) {
		_, _ = conn.Write([]byte{byte(backend.Denied)}) // as above
		return nil, backend.Errorf(backend.Denied, "the grant was used or voided meanwhile")
	}
	return c, nil
}

// enlist uses up one connection of the grant, if it still stands, and lists the connection as served: from here
// on Fence sees it.
func (s *server) enlist(c *served, g *grant, h hello) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.grants[h.grant] != g || time.Now().After(g.expires) {
		return false
	}
	if _, ok := g.missing[h.index]; !ok {
		return false
	}
	delete(g.missing, h.index)
	if len(g.missing) == 0 {
		delete(s.grants, h.grant)
	}
	s.serving[c] = struct{}{}
	return true
}
