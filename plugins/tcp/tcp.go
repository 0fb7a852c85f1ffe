package tcp

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/inuse"
)

const name = "tcp"

// Factory opens the backend.
var Factory = backend.Factory{Name: name, Info: new(info(readSettings(backend.Defaults(options)))), Options: options, Open: open}

// transport is the backend: the initiator of its endpoints, and the target of the connections it serves.
type transport struct {
	self     backend.Peer
	settings settings
	log      backend.Logger
	info     backend.Info
	regions  inuse.Table[region]
	server   *server                     // nil for an initiator only
	client   *tls.Config                 // nil without credentials
	posted   func(context.Context) error // backend.Config.Posted

	ctx     context.Context // ends when Close is called
	end     context.CancelFunc
	running sync.WaitGroup // every goroutine, and every Establish
	quiet   chan struct{}  // closed when Close is through

	mu        sync.Mutex
	closed    bool
	endpoints map[*endpoint]struct{}
}

// info is what the backend is with these settings.
func info(s settings) backend.Info {
	return backend.Info{
		Name:    name,
		Version: "1.0.0",
		Capabilities: backend.Capabilities{
			Ops:    backend.Write | backend.Read,
			Local:  backend.Kinds(backend.HostMemory),
			Remote: backend.Kinds(backend.HostMemory),
			Reach:  backend.Network,
			Limits: backend.Limits{Segments: maxSegments, SegmentBytes: maxTransfer, TransferBytes: maxTransfer},
			Window: s.window,
		},
	}
}

func open(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
	settings := readSettings(cfg.Options)
	t := &transport{
		self:      cfg.Self,
		settings:  settings,
		info:      info(settings),
		log:       cfg.Log,
		posted:    cfg.Posted,
		quiet:     make(chan struct{}),
		endpoints: make(map[*endpoint]struct{}),
	}
	if t.log == nil {
		t.log = slog.New(slog.DiscardHandler)
	}
	if err := checkPeer(t.self); err != nil {
		return nil, fault("open", backend.Peer{}, err)
	}
	if cfg.Credentials != nil {
		var err error
		if t.client, err = cfg.Credentials.Client(); err != nil {
			return nil, fault("open", backend.Peer{}, err)
		}
	}
	t.ctx, t.end = context.WithCancel(context.Background())
	if t.settings.listen != "" {
		var err error
		if t.server, err = listen(ctx, t, &cfg); err != nil {
			t.end()
			return nil, fault("open", backend.Peer{}, err)
		}
		t.running.Go(t.server.accept)
	}
	t.running.Go(t.watch)
	return t, nil
}

func checkPeer(p backend.Peer) error {
	switch {
	case p.Node == "" || len(p.Node) > maxName:
		return backend.Errorf(backend.BadRequest, "the name of node %q has %d bytes, not 1 to %d", p.Node, len(p.Node), maxName)
	case p.Incarnation == 0:
		return backend.Errorf(backend.BadRequest, "node %q has no incarnation", p.Node)
	}
	return nil
}

// fault returns err as an error of this backend about a peer, which may be zero. The code stays.
func fault(op string, peer backend.Peer, err error) *backend.Error {
	if own, ok := err.(*backend.Error); ok {
		e := *own
		e.Backend, e.Op, e.Peer = name, op, peer
		return &e
	}
	return &backend.Error{Code: backend.CodeOf(err), Backend: name, Op: op, Peer: peer, Err: err}
}

// Info implements backend.Backend.
func (t *transport) Info() backend.Info { return t.info }

// Register implements backend.Backend. Peers need no key: a region's id and the handshake are enough.
func (t *transport) Register(_ context.Context, m backend.Memory) ([]byte, error) {
	refuse := func(code backend.Code, text string) ([]byte, error) {
		return nil, &backend.Error{Code: code, Backend: name, Op: "register", Region: m.Region, Text: text}
	}
	switch {
	case m.Kind != backend.HostMemory:
		return refuse(backend.Unsupported, "only host memory can be registered, not "+m.Kind.String())
	case m.Region == 0:
		return refuse(backend.BadRequest, "the region has no id")
	case len(m.Bytes) == 0:
		return refuse(backend.BadRequest, "the region has no bytes")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return refuse(backend.PathDown, "the backend is closed")
	}
	r := &region{id: m.Region, rights: m.Rights, size: uint64(len(m.Bytes)), bytes: m.Bytes}
	if !t.regions.Add(r.id, r) {
		return refuse(backend.BadRequest, "a region of this id is registered already")
	}
	return nil, nil
}

// Deregister implements backend.Backend. It lets what uses the region finish, and breaks it when ctx ends first;
// so it always ends quiet.
func (t *transport) Deregister(ctx context.Context, id backend.RegionID) error {
	r := t.regions.Get(id)
	if r == nil {
		return nil
	}
	unused := r.users.Shut()
	select {
	case <-unused:
	case <-ctx.Done():
		t.breakUsers(r)
		<-unused
	}
	t.forget(r)
	return nil
}

// breakUsers aborts every connection that has the region, whose gate is shut, in use.
func (t *transport) breakUsers(r *region) {
	cause := backend.Errorf(backend.PathDown, "region %d was deregistered during a transfer", r.id)
	for _, e := range t.openEndpoints() {
		if e.uses(r) {
			e.fail(cause)
		}
	}
	if t.server != nil {
		t.server.abort(func(c *served) bool { return c.using.Load() == r })
	}
}

func (t *transport) openEndpoints() []*endpoint {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]*endpoint, 0, len(t.endpoints))
	for e := range t.endpoints {
		all = append(all, e)
	}
	return all
}

// Answer implements backend.Backend.
func (t *transport) Answer(_ context.Context, peer backend.Peer, offer []byte) ([]byte, error) {
	if t.server == nil {
		return nil, &backend.Error{Code: backend.Unsupported, Backend: name, Op: "answer", Peer: peer,
			Text: "this end is an initiator only; set the option listen to serve peers"}
	}
	b, err := t.server.answer(peer, offer)
	if err != nil {
		return nil, fault("answer", peer, err)
	}
	return b, nil
}

// Fence implements backend.Backend. It breaks only connections that do not get through with what was posted before.
func (t *transport) Fence(ctx context.Context, peer backend.Peer) error {
	if t.server == nil {
		return nil
	}
	if err := t.server.fence(ctx, peer); err != nil {
		return fault("fence", peer, err)
	}
	return nil
}

// Close implements backend.Backend.
func (t *transport) Close() error {
	t.mu.Lock()
	first := !t.closed
	t.closed = true
	t.mu.Unlock()
	if !first {
		<-t.quiet
		return nil
	}
	t.end()
	for _, e := range t.openEndpoints() {
		e.fail(backend.Errorf(backend.PathDown, "the backend was closed"))
	}
	if t.server != nil {
		t.server.close()
	}
	t.running.Wait()
	for _, r := range t.regions.All() {
		<-r.users.Shut()
		t.forget(r)
	}
	close(t.quiet)
	return nil
}

// watch is the janitor: it gives up connections that are stuck in a transfer, and forgets grants that nobody used.
// Reading a counter now and then spares the data path a deadline for each frame.
func (t *transport) watch() {
	tick := time.NewTicker(t.settings.ioTimeout / 4)
	defer tick.Stop()
	for {
		select {
		case <-t.ctx.Done():
			return
		case now := <-tick.C:
			for _, e := range t.openEndpoints() {
				e.checkProgress(now)
			}
			if t.server != nil {
				t.server.sweep(now)
			}
		}
	}
}

// control sets what has to be set before a socket connects or listens.
func (s *settings) control(_, _ string, c syscall.RawConn) error {
	var err error
	set := func(fd uintptr) {
		if s.sendBuffer > 0 {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, s.sendBuffer)
		}
		if s.receiveBuffer > 0 && err == nil {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, s.receiveBuffer)
		}
	}
	return errors.Join(c.Control(set), err)
}

// tune sets up an established connection.
func (s *settings) tune(conn *net.TCPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var optErr error
	err = raw.Control(func(fd uintptr) {
		optErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(s.userTimeout.Milliseconds()))
	})
	return errors.Join(err, optErr, conn.SetNoDelay(true), conn.SetKeepAliveConfig(net.KeepAliveConfig{
		Enable: true, Idle: s.keepAlive, Interval: max(s.keepAlive/3, time.Second), Count: 3,
	}))
}
