package rpc

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/proto/backendpb"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// handshake is a connection that is being set up, in the host.
type handshake struct {
	client *Client
	peer   backend.Peer
	id     uint64
	offer  []byte
}

// Offer implements backend.Handshake.
func (h *handshake) Offer() []byte { return h.offer }

// Abandon implements backend.Handshake.
func (h *handshake) Abandon() { h.client.abandon(h.id) }

// establishSlack is what the plugin does not get of the time that there is, so that its own error arrives.
const establishSlack = 100 * time.Millisecond

// Establish implements backend.Handshake.
func (h *handshake) Establish(ctx context.Context, answer []byte) (backend.Endpoint, error) {
	c := h.client
	timeout := c.callTimeout
	if deadline, has := ctx.Deadline(); has {
		timeout = time.Until(deadline)
	}
	timeout -= min(timeout/8, establishSlack)
	if ctx.Err() != nil || timeout <= 0 {
		h.Abandon()
		return nil, h.fault(c.wrap(backend.Cancelled, "establish", cmp.Or(ctx.Err(), context.DeadlineExceeded)))
	}
	c.mu.Lock()
	c.establishing++
	c.mu.Unlock()
	reply, err := call(ctx, c, "establish", c.service.Establish, &backendpb.EstablishRequest{
		Handshake: h.id, Answer: answer, TimeoutNs: int64(timeout),
	})
	if unanswered(err) {
		h.Abandon() // ends whatever has come of it
	}
	e := &endpoint{client: c, peer: h.peer, id: reply.GetEndpoint(), done: make(chan struct{})}
	c.mu.Lock()
	_, down := c.early[e.id]
	if c.establishing--; c.establishing == 0 {
		clear(c.early)
	}
	twice := c.endpoints[e.id] != nil
	if err == nil && c.refusal.Load() != nil { // closing, or broken: the plugin ends all endpoints
		err = c.refused("establish")
	}
	if err == nil && !twice {
		c.endpoints[e.id] = e
	}
	c.mu.Unlock()
	switch {
	case err != nil:
		return nil, h.fault(err)
	case twice:
		defect := c.errorf(backend.Internal, "establish", "the plugin calls two endpoints %d", e.id)
		c.fail(defect)
		return nil, h.fault(defect)
	case down:
		e.fail(c.errorf(backend.PathDown, "", "the endpoint has failed"))
	}
	return e, nil
}

func (h *handshake) fault(err error) error {
	if e, ok := err.(*backend.Error); ok && e.Peer == (backend.Peer{}) {
		e.Peer = h.peer
	}
	return err
}

// endpoint is a connected peer, in the host.
type endpoint struct {
	client   *Client
	peer     backend.Peer
	id       uint64
	done     chan struct{}
	err      atomic.Pointer[backend.Error] // why it is done
	inFlight atomic.Int64                  // transfers within the window
}

// fail takes the endpoint down. The first reason stays.
func (e *endpoint) fail(why *backend.Error) {
	if e.err.CompareAndSwap(nil, e.about(why)) {
		close(e.done)
	}
}

// lose takes the endpoint down with the process; that reason replaces others.
func (e *endpoint) lose(why *backend.Error) {
	e.fail(why)
	e.err.Store(e.about(why))
}

func (e *endpoint) about(why *backend.Error) *backend.Error {
	about := *why
	about.Op, about.Peer = "post", e.peer
	return &about
}

// Done implements backend.Endpoint.
func (e *endpoint) Done() <-chan struct{} { return e.done }

// Session implements backend.Endpoint.
func (e *endpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	c := e.client
	fault := func(err *backend.Error, region backend.RegionID) (backend.Session, error) {
		err.Op, err.Peer, err.Region = "session", e.peer, region
		return nil, err
	}
	c.mu.RLock()
	near := c.regions[local]
	c.mu.RUnlock()
	down := e.err.Load()
	switch caps := &c.info.Capabilities; {
	case down != nil:
		gone := *down
		return fault(&gone, local)
	case near == nil || !near.usable.Load():
		return fault(c.errorf(backend.BadRequest, "", "the local region is not registered"), local)
	case !caps.Local.Has(near.kind):
		return fault(c.errorf(backend.Unsupported, "", "%s memory is not claimed for the near end", near.kind), local)
	case !caps.Remote.Has(remote.Kind):
		return fault(c.errorf(backend.Unsupported, "", "%s memory is not claimed for the far end", remote.Kind), remote.Region)
	}
	s := &session{
		client: c, endpoint: e, id: c.lastSession.Add(1), local: near, remote: remote, sink: sink,
		flights: map[uint64]flight{}, unsent: map[uint64]struct{}{},
	}
	_, err := call(ctx, c, "session", c.service.OpenSession, &backendpb.OpenSessionRequest{
		Endpoint: e.id, Local: uint64(local), Remote: remoteOut(remote), Session: s.id,
	})
	closeInPlugin := func(ctx context.Context) error {
		_, err := c.service.CloseSession(ctx, &backendpb.CloseSessionRequest{Session: s.id})
		return err
	}
	if err != nil {
		if unanswered(err) {
			c.undo(closeInPlugin)
		}
		return nil, err
	}
	c.mu.Lock()
	// Whoever ends an endpoint or a region sets that first, and then looks for its sessions.
	down = e.err.Load()
	open := down == nil && near.usable.Load()
	if open {
		c.sessions[s.id] = s
	}
	c.mu.Unlock()
	if open {
		return s, nil
	}
	c.undo(closeInPlugin)
	if down != nil {
		gone := *down
		return fault(&gone, local)
	}
	return fault(c.errorf(backend.BadRequest, "", "the local region was deregistered meanwhile"), local)
}

// Close implements backend.Endpoint.
func (e *endpoint) Close() error {
	c := e.client
	e.fail(c.errorf(backend.PathDown, "", "the endpoint was closed"))
	c.mu.RLock()
	known := c.endpoints[e.id] == e && !c.ended
	c.mu.RUnlock()
	var answer error
	end := func(ctx context.Context) error {
		reply, err := c.service.CloseEndpoint(ctx, &backendpb.CloseEndpointRequest{Endpoint: e.id})
		answer = errorIn(reply.GetError())
		return err
	}
	if !known {
		end = nil
	}
	mine := c.sessionsOf(func(s *session) bool { return s.endpoint == e })
	c.conclude("close the endpoint", end, mine)
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.endpoints, e.id)
	for _, s := range mine {
		delete(c.sessions, s.id)
	}
	return answer
}

// session is an endpoint bound to two regions, in the host.
type session struct {
	client   *Client
	endpoint *endpoint
	id       uint64
	local    *region
	remote   backend.Remote
	sink     backend.Sink

	mu      sync.Mutex
	closed  bool
	flights map[uint64]flight   // by cookie
	unsent  map[uint64]struct{} // cookies whose Cancel is not on its way yet
	serial  uint64              // of the last flight
	open    int                 // transfers whose Complete has not returned
	idle    chan struct{}       // closed when open becomes zero; nil when nobody waits
}

// flight is one accepted transfer. Serial tells flights of one cookie apart.
type flight struct {
	serial    uint64
	position  uint64 // in the path; zero until it is known
	segments  int
	cancelled bool
}

// Post implements backend.Session. The flight is noted before the plugin can know of it: the completion may come
// before Post has returned.
func (s *session) Post(t backend.Transfer) error {
	_, err := s.post(&t)
	s.client.path.posted()
	return err
}

// PostWait implements backend.PostWaiter: where nothing else is in flight, the caller receives its own completion.
func (s *session) PostWait(t backend.Transfer) error {
	serial, err := s.post(&t)
	if err != nil {
		s.client.path.posted()
		return err
	}
	s.client.path.await(s, t.Cookie, serial)
	return nil
}

// flies tells whether a flight has not completed.
func (s *session) flies(cookie, serial uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flights[cookie].serial == serial
}

// post sends a transfer, and returns the serial of its flight.
func (s *session) post(t *backend.Transfer) (serial uint64, _ error) {
	if err := s.check(t); err != nil {
		return 0, err
	}
	serial, err := s.depart(t)
	if err != nil {
		return 0, err
	}
	position, err := s.client.path.post(shm.Post{Session: s.id, Cookie: t.Cookie, Op: t.Op, Segments: t.Segments})
	s.mu.Lock()
	f, flying := s.flights[t.Cookie]
	flying = flying && f.serial == serial
	if err != nil && flying {
		s.land(t.Cookie)
		s.leave()
	} else if flying {
		f.position = position
		s.flights[t.Cookie] = f
	}
	s.mu.Unlock()
	switch {
	case err == nil:
		if flying && f.cancelled { // meanwhile
			s.sendCancel(t.Cookie, serial)
		}
		return serial, nil
	case !flying: // it has not left and is not here either: Lost has completed it
		return serial, nil
	case errors.Is(err, shm.ErrFull):
		return 0, backend.ErrBusy
	case !errors.Is(err, shm.ErrClosed):
		s.client.fail(err)
	}
	return 0, s.down()
}

// down says why the endpoint is.
func (s *session) down() error {
	if err := s.endpoint.err.Load(); err != nil {
		return err
	}
	return s.fault(backend.PathDown, "the data path is closed")
}

// check refuses a transfer that the contract forbids. A range is checked without adding its offset and length, whose
// sum may overflow.
func (s *session) check(t *backend.Transfer) error {
	caps := &s.client.info.Capabilities
	switch {
	case t.Op != backend.Write && t.Op != backend.Read || caps.Ops&t.Op == 0:
		return s.fault(backend.Unsupported, t.Op.String()+" is not claimed")
	case t.Op == backend.Write && s.remote.Rights&backend.RemoteWrite == 0:
		return s.fault(backend.Denied, "peers may not write the remote region")
	case t.Op == backend.Read && s.remote.Rights&backend.RemoteRead == 0:
		return s.fault(backend.Denied, "peers may not read the remote region")
	case len(t.Segments) == 0:
		return s.fault(backend.BadRequest, "a transfer has at least one segment")
	case len(t.Segments) > caps.Limits.Segments:
		return s.fault(backend.BadRequest, "more segments than Limits.Segments")
	}
	longest, left := caps.Limits.SegmentBytes, caps.Limits.TransferBytes
	if longest == 0 {
		longest = 1<<64 - 1
	}
	if left == 0 {
		left = 1<<64 - 1
	}
	localSize, remoteSize := s.local.size, s.remote.Size
	for i := range t.Segments {
		g := &t.Segments[i]
		switch {
		case g.Length-1 >= localSize || g.Local > localSize-g.Length: // a length of zero wraps, and is refused
			return s.outside(s.local.id, g.Local, g.Length)
		case g.Length > remoteSize || g.Remote > remoteSize-g.Length:
			return s.outside(s.remote.Region, g.Remote, g.Length)
		case g.Length > longest:
			return s.fault(backend.BadRequest, "a segment is longer than Limits.SegmentBytes")
		case g.Length > left && caps.Limits.TransferBytes != 0:
			return s.fault(backend.BadRequest, "the transfer is longer than Limits.TransferBytes")
		}
		left -= g.Length
	}
	return nil
}

func (s *session) fault(code backend.Code, text string) *backend.Error {
	err := s.client.wrap(code, "post", nil)
	err.Peer, err.Text = s.endpoint.peer, text
	return err
}

func (s *session) outside(region backend.RegionID, offset, length uint64) error {
	err := s.fault(backend.BadRequest, "the range is empty or not within the region")
	err.Region, err.Offset, err.Length = region, offset, length
	return err
}

// depart notes a flight and gives it its place in the window.
func (s *session) depart(t *backend.Transfer) (serial uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.endpoint.err.Load(); err != nil {
		return 0, err
	}
	if s.closed {
		return 0, s.fault(backend.BadRequest, "the session is closed")
	}
	if !s.local.usable.Load() {
		err := s.fault(backend.BadRequest, "the local region was deregistered")
		err.Region = s.local.id
		return 0, err
	}
	if _, flying := s.flights[t.Cookie]; flying {
		return 0, s.fault(backend.BadRequest, "a transfer of this cookie is in flight")
	}
	if _, leaving := s.unsent[t.Cookie]; leaving { // the Cancel of the former transfer must not hit this one
		return 0, backend.ErrBusy
	}
	if e := s.endpoint; e.inFlight.Add(1) > int64(s.client.info.Capabilities.Window) {
		e.inFlight.Add(-1)
		return 0, backend.ErrBusy
	}
	s.client.flying.Add(1)
	s.serial++
	s.open++
	s.flights[t.Cookie] = flight{serial: s.serial, segments: len(t.Segments)}
	return s.serial, nil
}

// land ends a flight; its transfer leaves the window. The caller holds mu, and calls leave when the sink knows.
func (s *session) land(cookie uint64) {
	delete(s.flights, cookie)
	s.endpoint.inFlight.Add(-1)
	s.client.flying.Add(-1)
}

// leave notes that a transfer is through. The caller holds mu.
func (s *session) leave() {
	if s.open--; s.open == 0 && s.idle != nil {
		close(s.idle)
		s.idle = nil
	}
}

// quiet returns a channel that is closed when no transfer is in flight and the sink is not being called. It means
// something when no new transfers are accepted.
func (s *session) quiet() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.idle != nil {
		return s.idle
	}
	idle := make(chan struct{})
	if s.open == 0 {
		close(idle)
	} else {
		s.idle = idle
	}
	return idle
}

func (s *session) inFlight() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open
}

// complete hands a completion of the plugin to the sink. It returns what is wrong with it, if it makes no sense.
func (s *session) complete(cookie uint64, failure error, outcomes []backend.Outcome) error {
	s.mu.Lock()
	f, flying := s.flights[cookie]
	if !flying || len(outcomes) > f.segments {
		s.mu.Unlock()
		if !flying {
			return s.client.errorf(backend.Internal, "complete", "the plugin completes transfer %d of session %d, which is not in flight", cookie, s.id)
		}
		return s.client.errorf(backend.Internal, "complete", "the plugin completes %d segments of transfer %d of session %d, which has %d",
			len(outcomes), cookie, s.id, f.segments)
	}
	s.land(cookie)
	s.mu.Unlock()
	s.deliver(backend.Completion{Cookie: cookie, Err: failure, Outcomes: outcomes})
	return nil
}

func (s *session) deliver(c backend.Completion) {
	s.sink.Complete(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leave()
}

// lose completes what is in flight when the plugin's process is gone. The endpoint is down: nothing new comes.
func (s *session) lose(why *backend.Error) {
	s.mu.Lock()
	lost := s.flights
	s.flights = map[uint64]flight{}
	s.mu.Unlock()
	failure := s.endpoint.about(why)
	failure.Op = "transfer"
	for cookie, f := range lost {
		s.endpoint.inFlight.Add(-1)
		s.client.flying.Add(-1)
		completion := backend.Completion{Cookie: cookie, Err: failure}
		if f.position != 0 && !s.client.path.taken(f.position) {
			completion.Outcomes = make([]backend.Outcome, f.segments) // all NotSent
		}
		s.deliver(completion)
	}
}

// Cancel implements backend.Session. It is passed on once for each transfer, and not before the transfer itself: Post
// sees to one that comes too early.
func (s *session) Cancel(cookie uint64) {
	s.mu.Lock()
	f, flying := s.flights[cookie]
	if !flying || f.cancelled {
		s.mu.Unlock()
		return
	}
	f.cancelled = true
	s.flights[cookie] = f
	s.mu.Unlock()
	if f.position != 0 {
		s.sendCancel(cookie, f.serial)
	}
}

// sendCancel passes a Cancel on, unless the flight has ended.
func (s *session) sendCancel(cookie, serial uint64) {
	s.mu.Lock()
	flying := s.flights[cookie].serial == serial
	if flying {
		s.unsent[cookie] = struct{}{}
	}
	s.mu.Unlock()
	if flying {
		s.client.path.cancel(shm.Cancel{Session: s.id, Cookie: cookie}, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.unsent, cookie)
		})
	}
}

// Close implements backend.Session.
func (s *session) Close() error {
	c := s.client
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	c.mu.RLock()
	known := c.sessions[s.id] == s && !c.ended
	c.mu.RUnlock()
	var answer error
	end := func(ctx context.Context) error {
		reply, err := c.service.CloseSession(ctx, &backendpb.CloseSessionRequest{Session: s.id})
		answer = errorIn(reply.GetError())
		return err
	}
	if !known {
		end = nil
	}
	c.conclude("close the session", end, []*session{s})
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.sessions, s.id)
	return answer
}
