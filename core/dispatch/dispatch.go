// Package dispatch carries out plans.
//
// A Dispatcher owns what outlives a batch: endpoints (connected peers) and sessions (an endpoint bound to a pair
// of regions), which are made when they are first needed and dropped when they fail. A Job is one batch on its
// way: for each group of its plan the dispatcher asks SelectBackend, finds the session, and posts, as far as the
// endpoint's window allows; the rest waits in a bounded queue and is posted as completions come in. All groups of
// a batch are under way at once, over all peers. What fails is sent again, only those segments, on the next
// backend that the policy allows.
//
// Run ends when every group has ended, whatever the context says: a deadline or a cancellation makes the
// dispatcher cancel what is in flight and wait until it is quiet, because until then the memory is not the
// caller's. Connections to a peer are made on goroutines of their own, under their own deadline, so that a peer
// that does not answer delays nobody else.
package dispatch

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/core/internal/pathmap"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Carry hands a backend's offer to the peer over the control plane. It returns the peer's answer, and the keys that the
// peer's regions have for this backend at present, by region. For sessions on the connection that is being made, such a
// key counts before that of a descriptor, which may be older than the backend's present instance.
type Carry func(ctx context.Context, to backend.Peer, backendName string, offer []byte) (
	answer []byte, keys map[backend.RegionID][]byte, err error)

// Options says how a Dispatcher works. Zero fields take the defaults named.
type Options struct {
	// Backends are the backends of the process, by the number that SelectBackend uses. An entry without a Backend
	// is unavailable and never chosen.
	Backends []Backend
	Select   selector.SelectBackend
	Carry    Carry
	// ConnectTimeout bounds setting up one endpoint or session. Default 5 s.
	ConnectTimeout time.Duration
	// QuietTimeout is how long a cancelled transfer may take to become quiet before the backend is held to be
	// broken. Default 30 s.
	QuietTimeout time.Duration
	// Attempts is how often one backend is tried for a group whose connection breaks. Default 2.
	Attempts int
	// MaxQueued bounds the groups that wait for the window of one endpoint; further ones end Busy. Default 65536.
	MaxQueued int
	Log       backend.Logger // may be nil
}

// Backend is an opened backend and the name that it is configured under.
type Backend struct {
	Name    string
	Backend backend.Backend
}

// Dispatcher runs jobs. Safe for concurrent use.
type Dispatcher struct {
	opts     Options
	counters []Counters // by backend
	limits   backend.Limits
	attempts atomic.Int32

	// sessions is immutable; a change replaces it. Looking one up takes no lock.
	sessions atomic.Pointer[pathmap.Map[*session]]

	ctx  context.Context // ends with Close
	stop context.CancelFunc
	wg   sync.WaitGroup // connections being made, and the watchers of endpoints

	mu        sync.Mutex
	closed    bool
	disabled  []bool // by backend
	endpoints map[endpointKey]*pending[*endpoint]
	opening   map[sessionKey]*pending[*session]
}

// Counters count what one backend has carried since the dispatcher was made.
type Counters struct {
	Transfers atomic.Uint64 // groups tried, resends included
	Segments  atomic.Uint64
	Bytes     atomic.Uint64 // of segments that are done
	Failures  atomic.Uint64 // transfers that did not end done
	Endpoints atomic.Int64  // connected now
	Connects  atomic.Uint64 // endpoints established
}

type endpointKey struct {
	backend int
	peer    backend.Peer
}

// sessionKey names a session; its Variant is the number of the backend.
type sessionKey = pathmap.Key

// session is a backend's session and the sink of its completions.
type session struct {
	backend.Session
	waiter backend.PostWaiter // the Session, or nil
	ep     *endpoint
}

func (s *session) Complete(c backend.Completion) { s.ep.complete(c) }

// New returns a dispatcher. Close ends it; the backends are the caller's to close, after that.
func New(opts Options) *Dispatcher {
	if opts.ConnectTimeout == 0 {
		opts.ConnectTimeout = 5 * time.Second
	}
	if opts.QuietTimeout == 0 {
		opts.QuietTimeout = 30 * time.Second
	}
	if opts.MaxQueued == 0 {
		opts.MaxQueued = 1 << 16
	}
	d := &Dispatcher{
		opts:      opts,
		counters:  make([]Counters, len(opts.Backends)),
		disabled:  make([]bool, len(opts.Backends)),
		endpoints: make(map[endpointKey]*pending[*endpoint]),
		opening:   make(map[sessionKey]*pending[*session]),
	}
	for _, b := range opts.Backends {
		if b.Backend != nil {
			d.limits = d.limits.Tighten(b.Backend.Info().Capabilities.Limits)
		}
	}
	d.SetAttempts(opts.Attempts)
	d.sessions.Store(&pathmap.Map[*session]{})
	d.ctx, d.stop = context.WithCancel(context.Background())
	return d
}

// SetAttempts changes how often one backend is tried for a group whose connection breaks; zero takes the default.
func (d *Dispatcher) SetAttempts(n int) {
	if n == 0 {
		n = 2
	}
	d.attempts.Store(int32(n))
}

// Limits returns the limits that every backend of the process can keep: groups planned within them can go any
// way, and be sent again another way.
func (d *Dispatcher) Limits() backend.Limits { return d.limits }

// Counters returns the counters of the backend of that number.
func (d *Dispatcher) Counters(b int) *Counters { return &d.counters[b] }

// Close fails every endpoint, waits until what was in flight is quiet, and returns. Jobs still running end with
// errors.
func (d *Dispatcher) Close() {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.stop()
	d.wg.Wait()
}

// Forget drops the endpoints to a peer: its incarnation is gone, or its credentials are. What is in flight fails.
func (d *Dispatcher) Forget(peer backend.Peer) {
	d.dropAll(func(key endpointKey) bool { return key.peer == peer })
}

// dropAll takes the endpoints that match out of use.
func (d *Dispatcher) dropAll(match func(endpointKey) bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for key, p := range d.endpoints {
		switch {
		case !match(key):
		case !p.done():
			delete(d.endpoints, key) // connect finds that it is not wanted any more
		case p.err == nil:
			p.value.markDown()
		}
	}
}

// Enable lets the backend of that number connect to peers again, after Disable.
func (d *Dispatcher) Enable(b int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.disabled[b] = false
}

// drainPoll is how often Disable looks whether what it waits for has ended.
const drainPoll = 5 * time.Millisecond

// Disable keeps the backend of that number from connecting to peers, waits until what is under way on its endpoints has
// ended, and closes them. When ctx ends, it does not wait any longer, and what is still under way is tried another way,
// like anything whose connection breaks. Whoever chooses backends must not choose this one from before the call on.
func (d *Dispatcher) Disable(ctx context.Context, b int) {
	d.mu.Lock()
	d.disabled[b] = true
	d.mu.Unlock()
	wait(ctx, func() bool { return d.busy(b) })
	d.dropAll(func(key endpointKey) bool { return key.backend == b })
	wait(ctx, func() bool { return d.counters[b].Endpoints.Load() > 0 })
}

// wait returns when the condition holds no more, or ctx has ended.
func wait(ctx context.Context, while func() bool) {
	poll := time.NewTicker(drainPoll)
	defer poll.Stop()
	for ctx.Err() == nil && while() {
		select {
		case <-poll.C:
		case <-ctx.Done():
		}
	}
}

// busy tells whether anything is under way on an endpoint of the backend, or one is being connected.
func (d *Dispatcher) busy(b int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for key, p := range d.endpoints {
		if key.backend == b && (!p.done() || p.err == nil && !p.value.idle()) {
			return true
		}
	}
	return false
}

// ForgetRegion closes the sessions of a local region, before it is deregistered. What is in flight on them is
// cancelled and has completed when it returns.
func (d *Dispatcher) ForgetRegion(id backend.RegionID) {
	for _, s := range d.removeSessions(func(k sessionKey, _ *session) bool { return k.Local == id }) {
		s.Close()
	}
}

// pending is a result that several wait for.
type pending[T any] struct {
	ready chan struct{}
	value T     // valid once ready is closed
	err   error // likewise
}

func newPending[T any]() *pending[T] { return &pending[T]{ready: make(chan struct{})} }

func (p *pending[T]) set(value T, err error) {
	p.value, p.err = value, err
	close(p.ready)
}

func (p *pending[T]) done() bool {
	select {
	case <-p.ready:
		return true
	default:
		return false
	}
}

func (p *pending[T]) wait(ctx context.Context) (T, error) {
	select {
	case <-p.ready:
		return p.value, p.err
	case <-ctx.Done():
		var none T
		return none, cancelled(ctx)
	}
}

func cancelled(ctx context.Context) error {
	return &backend.Error{Code: backend.Cancelled, Op: "wait", Err: context.Cause(ctx)}
}

var errClosed = &backend.Error{Code: backend.Cancelled, Op: "dispatch", Text: "the dispatcher is closed"}

// cached returns the session if there is one that works.
func (d *Dispatcher) cached(key sessionKey) *session {
	if s, ok := d.sessions.Load().Get(key); ok && !s.ep.isDown() {
		return s
	}
	return nil
}

// session returns the session for a pair of regions, and opens it if there is none. The opening goes on when ctx
// ends: others may wait for it.
func (d *Dispatcher) session(ctx context.Context, key sessionKey, local *region.Region, remote *region.Descriptor) (*session, error) {
	d.mu.Lock()
	if s := d.cached(key); s != nil {
		d.mu.Unlock()
		return s, nil
	}
	p := d.opening[key]
	if p == nil {
		if d.closed {
			d.mu.Unlock()
			return nil, errClosed
		}
		p = newPending[*session]()
		d.opening[key] = p
		d.wg.Add(1)
		go func() {
			defer d.wg.Done()
			s, err := d.open(key, local, remote)
			d.mu.Lock()
			delete(d.opening, key)
			d.mu.Unlock()
			p.set(s, err)
		}()
	}
	d.mu.Unlock()
	return p.wait(ctx)
}

func (d *Dispatcher) open(key sessionKey, local *region.Region, remote *region.Descriptor) (*session, error) {
	b := d.opts.Backends[key.Variant]
	far, ok := remote.Remote(b.Name)
	if !ok {
		return nil, &backend.Error{Code: backend.Unsupported, Op: "open session", Backend: b.Name, Peer: remote.Peer,
			Region: remote.ID, Text: "the peer has not registered the region with this backend"}
	}
	for stale := true; ; stale = false {
		ep, err := d.endpoint(endpointKey{int(key.Variant), remote.Peer})
		if err != nil {
			return nil, err
		}
		s, err := d.bind(ep, key, far)
		switch {
		case err == nil:
			return s, nil
		case !stale || backend.CodeOf(err) != backend.PathDown:
			if backend.CodeOf(err) == backend.Unsupported { // and will be, each time that it is asked
				d.opts.Select.PairRefused(int(key.Variant), key.Local, remote, err, time.Now())
			}
			return nil, connectError("open session", b.Name, remote.Peer, err)
		}
		// The endpoint may have been there for long, and have broken unnoticed: a new one gets its chance.
		d.drop(ep)
	}
}

// bind opens a session on an endpoint and enters it for others to find.
func (d *Dispatcher) bind(ep *endpoint, key sessionKey, far backend.Remote) (*session, error) {
	ctx, cancel := context.WithTimeout(d.ctx, d.opts.ConnectTimeout)
	defer cancel()
	if key, ok := ep.keys[far.Region]; ok {
		far.Key = key
	}
	s := &session{ep: ep}
	var err error
	if s.Session, err = ep.Session(ctx, key.Local, far, s); err != nil {
		return nil, err
	}
	s.waiter, _ = s.Session.(backend.PostWaiter)
	d.mu.Lock()
	alive := !ep.isDown()
	if alive {
		d.sessions.Store(d.sessions.Load().With(key, s))
	}
	d.mu.Unlock()
	if !alive {
		return nil, backend.Errorf(backend.PathDown, "the endpoint failed meanwhile")
	}
	return s, nil
}

// connectError names what could not be connected. Running out of time says here that the path is down, not that a
// caller gave up.
func connectError(op, backendName string, peer backend.Peer, err error) error {
	code := backend.CodeOf(err)
	if code == backend.Cancelled || code == backend.Internal {
		code = backend.PathDown
	}
	return &backend.Error{Code: code, Op: op, Backend: backendName, Peer: peer, Err: err}
}

// endpoint returns the endpoint to a peer, and connects it if there is none, which takes no longer than
// ConnectTimeout.
func (d *Dispatcher) endpoint(key endpointKey) (*endpoint, error) {
	d.mu.Lock()
	p := d.endpoints[key]
	if p != nil && p.done() && p.value.isDown() {
		p = nil // its watcher has not removed it yet
	}
	if p == nil {
		if d.closed || d.disabled[key.backend] {
			d.mu.Unlock()
			return nil, d.unwanted(key)
		}
		p = newPending[*endpoint]()
		d.endpoints[key] = p
		d.wg.Add(1)
		go func() {
			defer d.wg.Done()
			d.connect(key, p)
		}()
	}
	d.mu.Unlock()
	<-p.ready
	return p.value, p.err
}

// unwanted says why no endpoint is to be connected, or the one that has been connected is not wanted any more. It is
// called with d.mu held.
func (d *Dispatcher) unwanted(key endpointKey) error {
	err := &backend.Error{Code: backend.PeerGone, Op: "connect", Backend: d.opts.Backends[key.backend].Name, Peer: key.peer,
		Text: "the peer was forgotten"}
	switch {
	case d.closed:
		return errClosed
	case d.disabled[key.backend]:
		err.Code, err.Text = backend.PathDown, selector.Disabled
	}
	return err
}

// connect sets p, and then stays to watch the endpoint until it fails.
func (d *Dispatcher) connect(key endpointKey, p *pending[*endpoint]) {
	ep, err := d.establish(key)
	if err != nil {
		d.mu.Lock()
		if d.endpoints[key] == p {
			delete(d.endpoints, key)
		}
		d.mu.Unlock()
		if d.ctx.Err() == nil {
			d.opts.Select.PathFailed(key.backend, key.peer, err, time.Now())
		}
		p.set(nil, err)
		return
	}
	d.mu.Lock()
	forgotten := d.endpoints[key] != p
	unwanted := d.unwanted(key)
	d.mu.Unlock()
	if forgotten {
		p.set(nil, errors.Join(unwanted, ep.Close()))
		return
	}
	d.opts.Select.PathWorks(key.backend, key.peer)
	counters := &d.counters[key.backend]
	counters.Connects.Add(1)
	counters.Endpoints.Add(1)
	defer counters.Endpoints.Add(-1)
	p.set(ep, nil)

	select {
	case <-ep.Done():
	case <-ep.dropped:
	case <-d.ctx.Done():
	}
	d.mu.Lock()
	ep.markDown()
	if d.endpoints[key] == p {
		delete(d.endpoints, key)
	}
	d.mu.Unlock()
	d.removeSessions(func(_ sessionKey, s *session) bool { return s.ep == ep })
	if err := ep.Close(); err != nil && d.opts.Log != nil {
		d.opts.Log.Warn("closing an endpoint failed", "backend", ep.backendName, "peer", key.peer, "error", err)
	}
	ep.failQueued()
}

func (d *Dispatcher) establish(key endpointKey) (*endpoint, error) {
	ctx, cancel := context.WithTimeout(d.ctx, d.opts.ConnectTimeout)
	defer cancel()
	b := d.opts.Backends[key.backend]
	fail := func(op string, err error) error { return connectError(op, b.Name, key.peer, err) }
	h, err := b.Backend.Offer(ctx, key.peer)
	if err != nil {
		return nil, fail("offer", err)
	}
	answer, keys, err := d.opts.Carry(ctx, key.peer, b.Name, h.Offer())
	if err != nil {
		h.Abandon()
		return nil, fail("carry offer", err)
	}
	ep, err := h.Establish(ctx, answer)
	if err != nil {
		return nil, fail("establish", err)
	}
	return newEndpoint(ep, b.Name, keys, b.Backend.Info().Capabilities.Window, d.opts.MaxQueued), nil
}

// drop takes an endpoint out of use; its watcher closes it.
func (d *Dispatcher) drop(e *endpoint) {
	d.mu.Lock()
	e.markDown()
	d.mu.Unlock()
}

func (d *Dispatcher) removeSessions(match func(sessionKey, *session) bool) []*session {
	d.mu.Lock()
	defer d.mu.Unlock()
	var removed []*session
	d.sessions.Store(d.sessions.Load().Filter(func(k sessionKey, s *session) bool {
		if match(k, s) {
			removed = append(removed, s)
			return false
		}
		return true
	}))
	return removed
}
