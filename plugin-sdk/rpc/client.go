package rpc

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/proto/backendpb"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// DefaultCallTimeout is how long a plugin may take to answer a call whose caller set no deadline.
const DefaultCallTimeout = 10 * time.Second

// Options says how a Client reaches its plugin.
type Options struct {
	// Name is what the backend must call itself.
	Name string
	// Conn leads to the plugin. The caller closes it, after Client.Close or Client.Lost.
	Conn grpc.ClientConnInterface
	// Passage passes descriptors to the plugin. Nil: none can be passed, so that transfers travel by the stream, and
	// the plugin gets at memory by messages. The caller closes it, after Client.Close or Client.Lost.
	Passage *shm.Passage
	// Config is what the backend is opened with, but for its Options, whose texts are RawOptions. Log is not used: the
	// plugin has a log of its own.
	Config     backend.Config
	RawOptions map[string]string
	// CallTimeout bounds each call whose caller set no deadline; DefaultCallTimeout when it is zero.
	CallTimeout time.Duration
	// Stream offers the plugin the plain data path only.
	Stream bool
	// Look is how long the plugin looks for the next transfer before it sleeps, when nothing is in flight and looking pays;
	// zero for the plugin's own idea, which is DefaultLook where it is served by a Server.
	Look time.Duration
}

// Client is the backend of a plugin, in the host. Its methods are those of backend.Backend, and what the supervisor of
// the process needs: Ping, Broken, Err, Lost, InFlight.
type Client struct {
	name        string
	service     backendpb.BackendClient
	passage     *shm.Passage
	callTimeout time.Duration
	info        backend.Info
	mapped      bool // the plugin maps memory; otherwise it asks for it
	takesGPU    bool // the plugin takes memory of a GPU
	path        path // nil until Open has come so far

	lastTag, lastSession atomic.Uint64
	flushes              atomic.Int64 // that are not on their way yet
	flying               atomic.Int64 // transfers in flight

	refusal  atomic.Pointer[backend.Error] // why calls are refused, if they are; set with mu held
	broken   chan struct{}
	lost     chan struct{}
	life     context.Context // ends when no more calls are made
	end      context.CancelFunc
	running  sync.WaitGroup // goroutines
	closing  sync.Once
	closeErr error
	freeing  sync.Once

	mu        sync.RWMutex
	err       error // why the client is broken
	closed    bool  // Close was called: that streams end is no surprise
	ended     bool  // no more goroutines
	isLost    bool
	regions   map[backend.RegionID]*region
	endpoints map[uint64]*endpoint
	sessions  map[uint64]*session
	// While connections are established, early holds the endpoints that failed before it was known here that they
	// exist.
	establishing int
	early        map[uint64]struct{}
}

// region is memory that the host has lent.
type region struct {
	id   backend.RegionID
	kind backend.MemoryKind
	size uint64
	// usable is set when the plugin has registered the region, and cleared when Deregister is called.
	usable atomic.Bool

	mu    sync.RWMutex
	bytes []byte // for messages; nil when they must not touch it any more
}

// Open opens the backend in the plugin. The context bounds opening only.
func Open(ctx context.Context, o Options) (*Client, error) {
	c := &Client{
		name: o.Name, service: backendpb.NewBackendClient(o.Conn), passage: o.Passage, callTimeout: o.CallTimeout,
		broken: make(chan struct{}), lost: make(chan struct{}),
		regions: map[backend.RegionID]*region{}, endpoints: map[uint64]*endpoint{}, sessions: map[uint64]*session{},
		early: map[uint64]struct{}{},
	}
	if c.callTimeout == 0 {
		c.callTimeout = DefaultCallTimeout
	}
	c.life, c.end = context.WithCancel(context.Background())
	if err := c.open(ctx, o); err != nil {
		c.free()
		return nil, err
	}
	return c, nil
}

func (c *Client) open(ctx context.Context, o Options) error {
	request := &backendpb.OpenRequest{
		Self: peerOut(o.Config.Self), Options: o.RawOptions, Insecure: o.Config.Insecure,
		DataPaths:      []backendpb.DataPath{backendpb.DataPath_DATA_PATH_STREAM},
		MemoryAccesses: []backendpb.MemoryAccess{backendpb.MemoryAccess_MEMORY_ACCESS_MESSAGES},
	}
	if o.Passage != nil {
		request.MemoryAccesses = append(request.MemoryAccesses, backendpb.MemoryAccess_MEMORY_ACCESS_MAPPED)
		if !o.Stream {
			request.DataPaths = append(request.DataPaths, backendpb.DataPath_DATA_PATH_QUEUES)
		}
	}
	if k := o.Config.Credentials; k != nil {
		request.Credentials = &backendpb.Credentials{CertFile: k.CertFile, KeyFile: k.KeyFile, CaFile: k.CAFile}
	}
	reply, err := call(ctx, c, "open", c.service.Open, request)
	if err != nil {
		return err
	}
	if c.info, err = infoIn(reply.GetInfo()); err != nil {
		return err
	}
	access, path := reply.GetMemoryAccess(), reply.GetDataPath()
	switch {
	case c.info.Name != o.Name:
		return c.errorf(backend.BadRequest, "open", "the plugin calls its backend %q: name it so in the configuration, or start another plugin", c.info.Name)
	case !slices.Contains(request.DataPaths, path), !slices.Contains(request.MemoryAccesses, access):
		return c.errorf(backend.Internal, "open", "the plugin has chosen %s and %s, which the host does not offer", path, access)
	}
	c.mapped, c.takesGPU = access == backendpb.MemoryAccess_MEMORY_ACCESS_MAPPED, reply.GetTakesGpu()

	transfers := path == backendpb.DataPath_DATA_PATH_STREAM
	if transfers || !c.mapped {
		stream, err := c.service.Transfers(c.life)
		if err != nil {
			return c.callError(ctx, "open", err)
		}
		p := &streamPath{client: c, stream: stream, transfers: transfers, serveMemory: !c.mapped}
		if transfers {
			c.path = p
		}
		c.spawn(p.send)
		c.spawn(p.receive)
	}
	if !transfers {
		if err := c.attach(ctx, o.Look); err != nil {
			return err
		}
	}
	events, err := c.service.Events(c.life, &backendpb.EventsRequest{})
	if err != nil {
		return c.callError(ctx, "open", err)
	}
	c.spawn(func() { c.receiveEvents(events) })
	return nil
}

// Capacities of the queues in bytes. Submissions have room for ten transfers of the largest size, so that the plugin
// has something to do while the host prepares the next; completions are short.
const (
	submissionsCapacity = 4 << 20
	completionsCapacity = 1 << 20
)

// attach makes the queues and hands them to the plugin.
func (c *Client) attach(ctx context.Context, look time.Duration) error {
	p, err := newQueuePath(c)
	if err != nil {
		return c.wrap(backend.Internal, "open", err)
	}
	c.path = p
	tag, err := c.pass(p.files()...)
	if err != nil {
		return c.wrap(backend.PathDown, "open", err)
	}
	if _, err := call(ctx, c, "open", c.service.Attach, &backendpb.AttachRequest{Tag: tag, LookNs: look.Nanoseconds()}); err != nil {
		return err
	}
	c.spawn(p.receive)
	return nil
}

// Ping returns nil when the plugin has answered. It asks while the backend is being closed, too: a plugin that takes its
// time for that is alive.
func (c *Client) Ping(ctx context.Context) error {
	bounded, cancel := c.bounded(ctx)
	defer cancel()
	if _, err := c.service.Ping(bounded, &backendpb.PingRequest{}); err != nil {
		return c.callError(ctx, "ping", err)
	}
	return nil
}

// Broken is closed when the plugin's process must be ended: the data path is corrupt, a stream has ended, or the plugin
// has answered nonsense, or nothing where it must. Err says what. A Client that was closed or lost does not break any
// more.
func (c *Client) Broken() <-chan struct{} { return c.broken }

// Err says why the client is broken, or is nil.
func (c *Client) Err() error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.err
}

// fail breaks the client.
func (c *Client) fail(err error) {
	c.mu.Lock()
	if c.ended || c.isLost || c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	why := c.wrap(backend.PathDown, "", err)
	why.Text = "the plugin is broken"
	c.refusal.CompareAndSwap(nil, why)
	all := slices.Collect(maps.Values(c.endpoints))
	c.mu.Unlock()
	close(c.broken)
	for _, e := range all {
		e.fail(why)
	}
}

// streamEnded is called when a stream of the plugin ends, which only Close may bring about.
func (c *Client) streamEnded(which string, err error) {
	c.mu.RLock()
	expected := c.closed
	c.mu.RUnlock()
	if !expected {
		c.fail(&backend.Error{Code: backend.PathDown, Backend: c.name, Text: "the plugin has ended the stream of " + which, Err: err})
	}
}

// Lost says that the plugin's process is gone: it has been reaped, and nothing of it can touch memory any more. When
// Lost returns, everything that was in flight has completed: with NotSent for what the plugin never took, InDoubt for
// the rest, and PathDown because of cause. Endpoints are done, and every later call fails with PathDown because of
// cause. It must not be called from within Sink.Complete.
func (c *Client) Lost(cause error) {
	c.mu.Lock()
	if c.ended || c.isLost {
		c.mu.Unlock()
		return
	}
	why := c.wrap(backend.PathDown, "", cause)
	why.Text = "the plugin's process has ended"
	c.refusal.Store(why)
	c.isLost = true
	all := slices.Collect(maps.Values(c.endpoints))
	c.mu.Unlock()
	for _, e := range all {
		e.lose(why)
	}
	close(c.lost)
	c.free() // after this no completion comes from the plugin
	for _, s := range c.allSessions() {
		s.lose(why)
	}
}

// InFlight returns how many transfers have been accepted and have not completed.
func (c *Client) InFlight() int {
	n := 0
	for _, s := range c.allSessions() {
		n += s.inFlight()
	}
	return n
}

func (c *Client) allSessions() []*session {
	return c.sessionsOf(func(*session) bool { return true })
}

func (c *Client) sessionsOf(match func(*session) bool) []*session {
	c.mu.RLock()
	defer c.mu.RUnlock()
	var all []*session
	for _, s := range c.sessions {
		if match(s) {
			all = append(all, s)
		}
	}
	return all
}

// Info implements backend.Backend.
func (c *Client) Info() backend.Info { return c.info }

// Register implements backend.Backend. Host memory without a descriptor is refused with Unsupported where the plugin
// maps what it is lent. So is memory of a GPU without an interprocess handle, and all of it where the plugin asks for
// bytes by messages, or is of a time before it could be lent any.
func (c *Client) Register(ctx context.Context, m backend.Memory) ([]byte, error) {
	r := &region{id: m.Region, kind: m.Kind, size: m.Size(), bytes: m.Bytes}
	if err := c.admit(m, r); err != nil {
		err.Op, err.Region = "register", m.Region
		return nil, err
	}
	request := &backendpb.RegisterRequest{
		Region: uint64(m.Region), Kind: uint32(m.Kind), Rights: uint32(m.Rights), Size: m.Size(), HasFd: m.FD >= 0,
		Gpu: gpuOut(m.GPU),
	}
	if c.mapped && m.GPU == nil {
		tag, err := c.passMemory(m.FD)
		if err != nil {
			c.forget(r)
			err.Region = m.Region
			return nil, err
		}
		request.Tag, request.FdOffset = tag, m.FDOffset
	}
	reply, err := call(ctx, c, "register", c.service.Register, request)
	switch {
	case unanswered(err):
		// The region may be registered. Its id stays taken until that is undone; its memory is the caller's again.
		r.revoke()
		c.undo(func(ctx context.Context) error {
			_, err := c.service.Deregister(ctx, &backendpb.DeregisterRequest{Region: uint64(m.Region)})
			c.forget(r)
			return err
		})
		return nil, err
	case err != nil:
		c.forget(r)
		return nil, err
	}
	r.usable.Store(true)
	return reply.GetKey(), nil
}

// admit reserves the id of a region, or says why the region cannot be lent.
func (c *Client) admit(m backend.Memory, r *region) *backend.Error {
	caps := &c.info.Capabilities
	switch {
	case !caps.Local.Has(m.Kind) && !caps.Remote.Has(m.Kind):
		return c.errorf(backend.Unsupported, "", "%s memory is not claimed", m.Kind)
	case m.Region == 0 || m.Kind == backend.HostMemory && len(m.Bytes) == 0:
		return c.errorf(backend.BadRequest, "", "a region needs an id and memory")
	}
	if err := m.Check(); err != nil {
		return c.wrap(backend.BadRequest, "", err)
	}
	if m.GPU != nil {
		if err := c.admitGPU(m.GPU); err != nil {
			return err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.refusal.Load() != nil:
		return c.refused("")
	case c.regions[m.Region] != nil:
		return c.errorf(backend.BadRequest, "", "the region is registered already")
	case c.mapped && m.GPU == nil && m.FD < 0:
		return c.errorf(backend.Unsupported, "", "the memory has no file descriptor, and a backend in a process of its own has to map it: allocate it from UMBP, or link the backend in")
	}
	c.regions[m.Region] = r
	return nil
}

// admitGPU says why a range of a GPU's memory cannot be lent to the plugin.
func (c *Client) admitGPU(g *backend.GPURange) *backend.Error {
	switch {
	case !c.mapped:
		return c.errorf(backend.Unsupported, "", "the processor cannot address the memory of a GPU, and the plugin asks for memory by messages")
	case !c.takesGPU:
		return c.errorf(backend.Unsupported, "", "the plugin is of a version that cannot be lent memory of a GPU: build it with a newer SDK")
	case len(g.Handle) == 0:
		return c.errorf(backend.Unsupported, "", "the memory of GPU %s has no interprocess handle, and a backend in a process of its own has to open one: "+
			"allocate it so that %s gives one, or link the backend in", g.Device, g.Runtime)
	}
	return nil
}

func (c *Client) forget(r *region) {
	c.mu.Lock()
	if c.regions[r.id] == r {
		delete(c.regions, r.id)
	}
	c.mu.Unlock()
	r.revoke()
}

// revoke returns when no message touches the memory any more.
func (r *region) revoke() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bytes = nil
}

// Deregister implements backend.Backend.
func (c *Client) Deregister(ctx context.Context, id backend.RegionID) error {
	c.mu.RLock()
	r := c.regions[id]
	c.mu.RUnlock()
	if r == nil {
		return nil
	}
	r.usable.Store(false)
	if _, err := call(ctx, c, "deregister", c.service.Deregister, &backendpb.DeregisterRequest{Region: uint64(id)}); err != nil {
		return err
	}
	err := c.settle(ctx, "deregister", c.sessionsOf(func(s *session) bool { return s.local == r }))
	if err == nil {
		c.forget(r)
	}
	return err
}

// Offer implements backend.Backend. The call goes on when ctx ends before it: only then is it known which handshake
// has to be abandoned.
func (c *Client) Offer(ctx context.Context, peer backend.Peer) (backend.Handshake, error) {
	type result struct {
		reply *backendpb.OfferReply
		err   error
	}
	answered := make(chan result)
	started := c.spawn(func() {
		// It goes on when the caller gives up, for as long as a call may take, and no shorter than the caller would wait.
		lasting, cancel := context.WithoutCancel(ctx), context.CancelFunc(func() {})
		if deadline, has := ctx.Deadline(); has && time.Until(deadline) > c.callTimeout {
			lasting, cancel = context.WithDeadline(lasting, deadline)
		}
		defer cancel()
		reply, err := call(lasting, c, "offer", c.service.Offer, &backendpb.OfferRequest{Peer: peerOut(peer)})
		select {
		case answered <- result{reply, err}:
		case <-ctx.Done():
			if err == nil {
				c.abandon(reply.GetHandshake())
			}
		}
	})
	if !started {
		return nil, c.refused("offer")
	}
	select {
	case r := <-answered:
		if r.err != nil {
			return nil, r.err
		}
		return &handshake{client: c, peer: peer, id: r.reply.GetHandshake(), offer: r.reply.GetOffer()}, nil
	case <-ctx.Done():
		return nil, c.wrap(backend.Cancelled, "offer", ctx.Err())
	}
}

// Answer implements backend.Backend.
func (c *Client) Answer(ctx context.Context, peer backend.Peer, offer []byte) ([]byte, error) {
	reply, err := call(ctx, c, "answer", c.service.Answer, &backendpb.AnswerRequest{Peer: peerOut(peer), Offer: offer})
	return reply.GetAnswer(), err
}

// Fence implements backend.Backend.
func (c *Client) Fence(ctx context.Context, peer backend.Peer) error {
	_, err := call(ctx, c, "fence", c.service.Fence, &backendpb.FenceRequest{Peer: peerOut(peer)})
	return err
}

// countersTimeout bounds Counters, whose callers have better things to do than to wait.
const countersTimeout = time.Second

// Counters implements backend.Counter. There are none while the plugin does not answer in time, where it counts nothing,
// and where it answers nonsense.
func (c *Client) Counters() []backend.Count {
	ctx, cancel := context.WithTimeout(context.Background(), min(countersTimeout, c.callTimeout))
	defer cancel()
	reply, err := call(ctx, c, "counters", c.service.Counters, &backendpb.CountersRequest{})
	if err != nil {
		return nil
	}
	return countsIn(reply.GetCounts())
}

// Close implements backend.Backend. It returns when the plugin has closed the backend and everything has completed, or
// when the client is lost. A plugin that does not close in time breaks the client, and Close goes on waiting: whoever
// calls it sees to it that a broken plugin is ended, and Lost called.
func (c *Client) Close() error {
	c.closing.Do(func() { c.closeErr = c.close() })
	return c.closeErr
}

func (c *Client) close() error {
	c.mu.Lock()
	if c.isLost {
		c.mu.Unlock()
		<-c.lost
		_ = c.settle(context.Background(), "close", c.allSessions())
		c.free()
		return nil
	}
	c.closed = true
	c.refusal.CompareAndSwap(nil, c.errorf(backend.PathDown, "", "the backend is closed"))
	all, why := slices.Collect(maps.Values(c.endpoints)), c.refusal.Load()
	c.mu.Unlock()
	for _, e := range all {
		e.fail(why)
	}
	var answer error
	answered := false
	c.conclude("close the backend", func(ctx context.Context) error {
		reply, err := c.service.Close(ctx, &backendpb.CloseRequest{})
		answer, answered = errorIn(reply.GetError()), err == nil
		return err
	}, c.allSessions())
	if !answered {
		<-c.lost
	}
	c.free()
	return answer
}

// conclude makes a call that ends something, if there is one, and waits until the sessions' transfers have completed. A
// plugin that does not do its part breaks the client; then the wait ends with Lost.
func (c *Client) conclude(what string, end func(context.Context) error, sessions []*session) {
	if end != nil {
		ctx, cancel := c.bounded(context.Background())
		defer cancel()
		if err := end(ctx); err != nil {
			c.fail(c.callError(context.Background(), what, err))
		}
	}
	_ = c.settle(context.Background(), what, sessions) // which does not end
}

// settle waits until the sessions' transfers have completed, which the plugin says they have: what is left is on its
// way. If it does not arrive, the client breaks.
func (c *Client) settle(ctx context.Context, what string, sessions []*session) error {
	patience := time.AfterFunc(c.callTimeout, func() {
		c.fail(c.errorf(backend.Internal, what, "the plugin has not completed every transfer"))
	})
	defer patience.Stop()
	for _, s := range sessions {
		select {
		case <-s.quiet():
		case <-ctx.Done():
			return c.wrap(backend.Cancelled, what, ctx.Err())
		}
	}
	return nil
}

// free ends every call and every goroutine, and frees the data path.
func (c *Client) free() {
	c.freeing.Do(func() {
		c.mu.Lock()
		c.ended = true
		clear(c.regions)
		c.mu.Unlock()
		c.end()
		if c.path != nil {
			c.path.close()
		}
		c.running.Wait()
	})
}

// spawn runs f, and tells whether it does: not after the end.
func (c *Client) spawn(f func()) bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if !c.ended {
		c.running.Go(f)
	}
	return !c.ended
}

// enter counts the caller as running, and tells whether it may run: not after the end.
func (c *Client) enter() bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if !c.ended {
		c.running.Add(1)
	}
	return !c.ended
}

// undo takes something back in the plugin whose caller has given up. A plugin that does not let it be is broken: what
// state it is in is not known any more.
func (c *Client) undo(f func(ctx context.Context) error) {
	c.spawn(func() {
		ctx, cancel := c.bounded(context.Background())
		defer cancel()
		if err := f(ctx); err != nil {
			c.fail(c.callError(context.Background(), "undo", err))
		}
	})
}

func (c *Client) abandon(handshake uint64) {
	c.undo(func(ctx context.Context) error {
		_, err := c.service.Abandon(ctx, &backendpb.AbandonRequest{Handshake: handshake})
		return err
	})
}

// pass sends files to the plugin and returns the tag under which it finds them.
func (c *Client) pass(files ...*os.File) (uint64, error) {
	tag := c.lastTag.Add(1)
	return tag, c.passage.Send(tag, files...)
}

// passMemory sends a copy of the descriptor of a region.
func (c *Client) passMemory(fd int) (uint64, *backend.Error) {
	mine, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return 0, c.wrap(backend.BadRequest, "register", os.NewSyscallError("duplicating the memory's descriptor", err))
	}
	f := os.NewFile(uintptr(mine), "umbp-region")
	defer f.Close()
	tag, err := c.pass(f)
	if err != nil {
		return 0, c.wrap(backend.PathDown, "register", err)
	}
	return tag, nil
}

// receiveEvents notes which endpoints have failed.
func (c *Client) receiveEvents(events grpc.ServerStreamingClient[backendpb.Event]) {
	for {
		event, err := events.Recv()
		if err != nil {
			c.streamEnded("events", err)
			return
		}
		switch e := event.GetEvent().(type) { // what is not known is ignored
		case *backendpb.Event_EndpointDown:
			c.endpointDown(e.EndpointDown.GetEndpoint())
		case *backendpb.Event_Flush:
			c.flush(e.Flush.GetCookie())
		}
	}
}

// maxFlushes bounds the flushes that wait for room.
const maxFlushes = 1024

// flush sends the plugin what it has asked for: a sign behind everything that was posted until now.
func (c *Client) flush(cookie uint64) {
	if c.flushes.Add(1) > maxFlushes {
		c.fail(c.errorf(backend.Internal, "flush", "the plugin asks for flushes and takes none"))
		return
	}
	c.path.cancel(shm.Cancel{Cookie: cookie}, func() { c.flushes.Add(-1) })
}

// maxEarly bounds Client.early.
const maxEarly = 1 << 16

func (c *Client) endpointDown(id uint64) {
	c.mu.Lock()
	e := c.endpoints[id]
	if e == nil && c.establishing > 0 && len(c.early) < maxEarly {
		c.early[id] = struct{}{}
	}
	c.mu.Unlock()
	if e != nil {
		e.fail(c.errorf(backend.PathDown, "", "the endpoint has failed"))
	}
}

// complete delivers a completion. It returns what is wrong with it, if it makes no sense.
func (c *Client) complete(id uint64, cookie uint64, failure *backendpb.Error, outcomes []backend.Outcome) error {
	c.mu.RLock()
	s := c.sessions[id]
	c.mu.RUnlock()
	if s == nil {
		return c.errorf(backend.Internal, "complete", "the plugin completes transfer %d of session %d, which does not exist", cookie, id)
	}
	if failure.GetCode() == uint32(backend.Busy) { // which no transfer can end with
		failure.Code = uint32(backend.Internal)
	}
	return s.complete(cookie, errorIn(failure), outcomes)
}

// call makes one call to the plugin. The error is the one in the reply, or says why there is none.
func call[Q, R any](
	ctx context.Context, c *Client, op string, method func(context.Context, *Q, ...grpc.CallOption) (*R, error), request *Q,
) (*R, error) {
	if c.refusal.Load() != nil {
		return nil, c.refused(op)
	}
	if err := ctx.Err(); err != nil {
		return nil, c.wrap(backend.Cancelled, op, err)
	}
	bounded, cancel := c.bounded(ctx)
	defer cancel()
	reply, err := method(bounded, request)
	if err != nil {
		return nil, c.callError(ctx, op, err)
	}
	if r, ok := any(reply).(interface{ GetError() *backendpb.Error }); ok && r.GetError() != nil {
		return nil, errorIn(r.GetError())
	}
	return reply, nil
}

// bounded returns a context that ends with ctx and with the client, and that has a deadline.
func (c *Client) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	var cancel context.CancelFunc
	if _, has := ctx.Deadline(); has {
		ctx, cancel = context.WithCancel(ctx)
	} else {
		ctx, cancel = context.WithTimeout(ctx, c.callTimeout)
	}
	stop := context.AfterFunc(c.life, cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}

// noAnswer is the cause of an error of a call that may have been carried out or not.
type noAnswer struct{ error }

func (n noAnswer) Unwrap() error { return n.error }

func unanswered(err error) bool {
	var n noAnswer
	return errors.As(err, &n)
}

// callError makes an error of a call's status. ctx is the caller's.
func (c *Client) callError(ctx context.Context, op string, err error) *backend.Error {
	select {
	case <-c.lost:
		e := c.refused(op)
		e.Err = noAnswer{e.Err}
		return e
	default:
	}
	if ctx.Err() != nil {
		return c.wrap(backend.Cancelled, op, noAnswer{ctx.Err()})
	}
	if _, has := ctx.Deadline(); has && status.Code(err) == codes.DeadlineExceeded { // which the plugin noticed first
		return c.wrap(backend.Cancelled, op, noAnswer{context.DeadlineExceeded})
	}
	e := c.wrap(backend.Internal, op, noAnswer{err})
	switch status.Code(err) {
	case codes.DeadlineExceeded:
		e.Code, e.Text = backend.PathDown, "the plugin has not answered within "+c.callTimeout.String()
	case codes.Unavailable, codes.Canceled:
		e.Code, e.Text = backend.PathDown, "the plugin cannot be reached"
	default:
		e.Text = "the plugin is defective"
	}
	return e
}

// refused says why calls are refused. There is a reason.
func (c *Client) refused(op string) *backend.Error {
	e := *c.refusal.Load()
	e.Op = op
	return &e
}

func (c *Client) errorf(code backend.Code, op, format string, args ...any) *backend.Error {
	e := backend.Errorf(code, format, args...)
	e.Backend, e.Op = c.name, op
	return e
}

func (c *Client) wrap(code backend.Code, op string, cause error) *backend.Error {
	return &backend.Error{Code: code, Backend: c.name, Op: op, Err: cause}
}
