package tcp

import (
	"context"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// session binds an endpoint to one local and one remote region.
type session struct {
	e      *endpoint
	local  *region
	remote backend.Remote
	sink   backend.Sink

	// Guarded by endpoint.mu.
	closed  bool
	flights int           // taken and not completed
	drained chan struct{} // closed when closed and flights is zero
}

// Session implements backend.Endpoint.
func (e *endpoint) Session(_ context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	refuse := func(code backend.Code, region backend.RegionID, text string) (backend.Session, error) {
		return nil, &backend.Error{Code: code, Backend: name, Op: "session", Peer: e.peer, Region: region, Text: text}
	}
	near := e.t.regions.Get(local)
	switch {
	case near == nil || near.users.IsShut():
		return refuse(backend.BadRequest, local, "the local region is not registered")
	case remote.Peer.Node != e.peer.Node:
		return refuse(backend.BadRequest, remote.Region, "the region belongs to "+remote.Peer.String())
	case remote.Peer.Incarnation != e.peer.Incarnation:
		return refuse(backend.PeerGone, remote.Region, "the region belongs to "+remote.Peer.String())
	case remote.Kind != backend.HostMemory:
		return refuse(backend.Unsupported, remote.Region, "only host memory can be reached, not "+remote.Kind.String())
	case remote.Region == 0 || sink == nil:
		return refuse(backend.BadRequest, remote.Region, "a session needs a remote region and a sink")
	}
	s := &session{e: e, local: near, remote: remote, sink: sink, drained: make(chan struct{})}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.failure != nil {
		return nil, e.failure
	}
	return s, nil
}

// refusal says why the session takes no transfers any more, if so. The caller holds e.mu.
func (s *session) refusal() *backend.Error {
	switch {
	case s.e.failure != nil:
		return s.e.failure
	case s.closed:
		return s.fault(backend.BadRequest, "post", "the session is closed")
	case s.local.users.IsShut():
		e := s.fault(backend.BadRequest, "post", "the local region was deregistered")
		e.Region = s.local.id
		return e
	}
	return nil
}

func (s *session) fault(code backend.Code, op, text string) *backend.Error {
	return &backend.Error{Code: code, Backend: name, Op: op, Peer: s.e.peer, Region: s.remote.Region, Text: text}
}

// Post implements backend.Session.
func (s *session) Post(t backend.Transfer) error { return s.post(t, false) }

// PostWait implements backend.PostWaiter. The caller of a small transfer, on a lane where nothing else is awaited,
// receives the reply itself.
func (s *session) PostWait(t backend.Transfer) error { return s.post(t, true) }

func (s *session) post(t backend.Transfer, waits bool) error {
	total, err := s.check(&t)
	if err != nil {
		return err
	}
	if !s.local.users.Enter() {
		return s.fault(backend.BadRequest, "post", "the local region was deregistered")
	}
	f, err := s.take()
	if err != nil {
		s.local.users.Leave()
		return err
	}
	s.fill(f, &t, total)
	if err := s.e.submit(f, waits); err != nil {
		s.e.mu.Lock()
		s.e.recycle(f)
		s.e.mu.Unlock()
		s.local.users.Leave()
		s.leave()
		return err
	}
	return nil
}

// check refuses what can be refused before a byte has moved, and returns the bytes of the transfer.
func (s *session) check(t *backend.Transfer) (total uint64, _ error) {
	need := backend.RemoteWrite
	switch t.Op {
	case backend.Write:
	case backend.Read:
		need = backend.RemoteRead
	default:
		return 0, s.fault(backend.Unsupported, "post", "a transfer is a write or a read, not "+t.Op.String())
	}
	switch n := len(t.Segments); {
	case s.remote.Rights&need == 0:
		return 0, s.fault(backend.Denied, t.Op.String(), "the region does not give this right to peers")
	case n == 0:
		return 0, s.fault(backend.BadRequest, t.Op.String(), "the transfer has no segments")
	case n > maxSegments:
		return 0, s.fault(backend.BadRequest, t.Op.String(), "the transfer has more segments than Capabilities.Limits allow")
	}
	for i := range t.Segments {
		g := &t.Segments[i]
		local, remote := span{g.Local, g.Length}, span{g.Remote, g.Length}
		switch {
		case !remote.inside(s.remote.Size):
			return 0, s.outside(t.Op, s.remote.Region, remote, "the range is empty or outside the remote region")
		case !local.inside(s.local.size):
			return 0, s.outside(t.Op, s.local.id, local, "the range is outside the local region")
		case g.Length > maxTransfer-total:
			return 0, s.outside(t.Op, s.remote.Region, remote, "the transfer has more bytes than Capabilities.Limits allow")
		}
		total += g.Length
	}
	return total, nil
}

func (s *session) outside(op backend.Op, region backend.RegionID, r span, text string) error {
	e := s.fault(backend.BadRequest, op.String(), text)
	e.Region, e.Offset, e.Length = region, r.offset, r.length
	return e
}

// take gets a free flight, or says Busy.
func (s *session) take() (*flight, error) {
	e := s.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := s.refusal(); err != nil {
		return nil, err
	}
	last := len(e.free) - 1
	if last < 0 {
		return nil, backend.ErrBusy
	}
	f := e.free[last]
	e.free = e.free[:last]
	s.flights++
	e.lastID++
	f.id = e.lastID
	return f, nil
}

// fill copies the transfer, whose segments are the caller's again when Post returns, into the flight.
func (s *session) fill(f *flight, t *backend.Transfer, total uint64) {
	f.session, f.cookie, f.op, f.total = s, t.Cookie, t.Op, total
	f.head = appendRequest(f.head[:0], request{
		op: t.Op, id: f.id, region: s.remote.Region, count: uint32(len(t.Segments)), total: total,
	})
	for i := range t.Segments {
		g := &t.Segments[i]
		f.head = appendSpan(f.head, span{g.Remote, g.Length})
		f.spans = append(f.spans, span{g.Local, g.Length})
	}
	if t.Op == backend.Write {
		f.out = newCursor(f.head, s.local.bytes, f.spans, total)
	} else {
		f.out = newCursor(f.head, nil, nil, 0)
		f.in = newCursor(nil, s.local.bytes, f.spans, total)
	}
}

// Cancel implements backend.Session. A Write that has begun cannot be taken back, other than by ending the
// endpoint. A Read can: its memory is left alone from here on, and what is still to come of it is thrown away.
func (s *session) Cancel(cookie uint64) {
	s.cancel(func(f *flight) bool { return f.cookie == cookie })
}

// cancel ends the flights of the session that are chosen.
func (s *session) cancel(chosen func(*flight) bool) {
	e := s.e
	var ended []backend.Completion
	e.mu.Lock()
	for i := range e.flights {
		f := &e.flights[i]
		open := (f.state == queued || f.state == begun) && !f.answered && !f.cancelled && !f.abandoned
		if !open || f.session != s || !chosen(f) {
			continue
		}
		switch {
		case e.failure != nil:
			f.cancelled = true
		case f.state == queued:
			f.lane.queued.remove(f)
			ended = append(ended, backend.Completion{
				Cookie: f.cookie, Err: cancelled(f), Outcomes: make([]backend.Outcome, len(f.spans)), // NotSent
			})
			e.recycle(f)
		case f.op == backend.Write:
			f.cancelled = true
			e.failLocked(backend.Errorf(backend.PathDown, "a write that had begun was cancelled"))
		case f.receiving:
			f.cancelled = true
			f.lane.stream.interrupt()
		default:
			ended = append(ended, f.abandon())
		}
	}
	if len(ended) > 0 {
		e.running.Add(1)
		defer e.running.Done()
	}
	e.mu.Unlock()
	for _, c := range ended {
		s.deliver(c)
	}
}

// deliver hands over the completion of a flight of the session. Nobody touches the flight's memory any more.
func (s *session) deliver(c backend.Completion) {
	s.sink.Complete(c)
	s.local.users.Leave()
	s.leave()
}

// leave counts one flight of the session as completed.
func (s *session) leave() {
	s.e.mu.Lock()
	defer s.e.mu.Unlock()
	s.flights--
	if s.closed && s.flights == 0 {
		close(s.drained)
	}
}

// Close implements backend.Session.
func (s *session) Close() error {
	s.e.mu.Lock()
	if !s.closed {
		s.closed = true
		if s.flights == 0 {
			close(s.drained)
		}
	}
	s.e.mu.Unlock()
	s.cancel(func(*flight) bool { return true })
	<-s.drained
	return nil
}
