package rpc

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/status"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/proto/backendpb"
)

// OpenSession implements backendpb.BackendServer.
func (v *service) OpenSession(ctx context.Context, q *backendpb.OpenSessionRequest) (*backendpb.OpenSessionReply, error) {
	return &backendpb.OpenSessionReply{Error: errorOut(v.server.openSession(ctx, q))}, nil
}

func (s *Server) openSession(ctx context.Context, q *backendpb.OpenSessionRequest) error {
	t := &servedSession{id: q.GetSession(), ready: make(chan struct{})}
	defer close(t.ready)
	s.mu.Lock()
	t.endpoint = s.endpoints[q.GetEndpoint()]
	twice, path := s.sessions[t.id] != nil, s.replies != nil
	if t.endpoint != nil && !twice && path {
		s.sessions[t.id] = t
	}
	s.mu.Unlock()
	switch {
	case !path:
		return backend.Errorf(backend.BadRequest, "the data path is not open: call Attach first")
	case t.endpoint == nil:
		return backend.Errorf(backend.PathDown, "there is no endpoint %d any more", q.GetEndpoint())
	case twice || t.id == 0:
		return backend.Errorf(backend.BadRequest, "session %d was opened before", t.id)
	}
	session, err := t.endpoint.endpoint.Session(ctx, backend.RegionID(q.GetLocal()), remoteIn(q.GetRemote()), t)
	if err == nil && ctx.Err() != nil { // the host has given up, and will not hear of it
		_ = session.Close()
		err = &backend.Error{Code: backend.Cancelled, Op: "session", Err: ctx.Err()}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		delete(s.sessions, t.id)
	} else {
		t.session = session
	}
	return err
}

// CloseSession implements backendpb.BackendServer.
func (v *service) CloseSession(ctx context.Context, q *backendpb.CloseSessionRequest) (*backendpb.CloseSessionReply, error) {
	s := v.server
	s.mu.Lock()
	t := s.sessions[q.GetSession()]
	s.mu.Unlock()
	if t == nil {
		return &backendpb.CloseSessionReply{}, nil
	}
	select {
	case <-t.ready:
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if s.sessionOf(t.id) != t {
		return &backendpb.CloseSessionReply{}, nil
	}
	err := t.close()
	s.mu.Lock()
	delete(s.sessions, t.id)
	s.mu.Unlock()
	return &backendpb.CloseSessionReply{Error: errorOut(err)}, nil
}

// sessionOf returns a session that is open.
func (s *Server) sessionOf(id uint64) *servedSession {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.sessions[id]; t != nil && t.session != nil {
		return t
	}
	return nil
}

func (s *Server) allEndpoints() []*served {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.endpoints))
}

// settle answers what waits on any endpoint, and what is posted from now on, when the backend is going to be closed.
func (s *Server) settle() {
	for _, e := range s.allEndpoints() {
		e.stop()
	}
}

// served is an endpoint in the plugin.
type served struct {
	server   *Server
	dial     *dial
	id       uint64
	endpoint backend.Endpoint
	window   int

	mu       sync.Mutex
	closed   bool
	inFlight int // transfers that the host has posted and that have not completed
	// waiting are transfers for which the backend had no room, in order; their number is within inFlight. One at a time
	// is being tried again.
	waiting []*waiting
	waited  uint64 // number of the last one that had to wait
	trying  *waiting
	again   bool // something has completed while one was tried
	retry   *time.Timer
}

// waiting is a transfer that waits, with segments of its own.
type waiting struct {
	number    uint64 // in the order of the endpoint
	session   *servedSession
	transfer  backend.Transfer
	cancelled bool
}

// servedSession is a session in the plugin. It is the backend's sink.
type servedSession struct {
	id       uint64
	endpoint *served
	ready    chan struct{}   // closed when OpenSession is through
	session  backend.Session // guarded by the server's mu until ready
	closed   bool            // guarded by the endpoint's mu
}

func (e *served) isClosed() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.closed
}

// stop refuses what comes from now on, and what waits.
func (e *served) stop() {
	e.mu.Lock()
	e.closed = true
	left := e.waiting
	e.waiting = nil
	if e.retry != nil {
		e.retry.Stop()
	}
	e.mu.Unlock()
	for _, w := range left {
		w.session.refuse(&w.transfer, nil)
	}
}

func (e *served) close() error {
	e.stop()
	err := e.endpoint.Close()
	s := e.server
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.endpoints, e.id)
	delete(s.handshakes, e.dial.id)
	for id, t := range s.sessions {
		if t.endpoint == e {
			delete(s.sessions, id)
		}
	}
	return err
}

func (t *servedSession) close() error {
	e := t.endpoint
	e.mu.Lock()
	t.closed = true
	var mine []*waiting
	e.waiting = slices.DeleteFunc(e.waiting, func(w *waiting) bool {
		if w.session == t {
			mine = append(mine, w)
		}
		return w.session == t
	})
	e.mu.Unlock()
	for _, w := range mine {
		t.refuse(&w.transfer, nil)
	}
	return t.session.Close()
}

// post posts what came from the host. The transfer's segments are the caller's.
func (s *Server) post(session uint64, transfer backend.Transfer) {
	t := s.sessionOf(session)
	if t == nil { // closed meanwhile
		s.replies.complete(session, transfer.Cookie, backend.Errorf(backend.PathDown, "there is no session %d any more", session),
			make([]backend.Outcome, len(transfer.Segments)))
		return
	}
	e := t.endpoint
	e.mu.Lock()
	e.inFlight++
	s.flying.Add(1)
	full, stopped := e.inFlight > e.window, e.closed || t.closed
	wait := !full && !stopped && (len(e.waiting) > 0 || e.trying != nil)
	if wait {
		e.wait(t, transfer)
	}
	e.mu.Unlock()
	switch {
	case full:
		t.refuse(&transfer, backend.Errorf(backend.BadRequest, "more transfers than the window of %d", e.window))
	case stopped:
		t.refuse(&transfer, nil)
	case !wait:
		err := t.session.Post(transfer)
		if err == nil {
			return
		}
		e.mu.Lock()
		wait = backend.CodeOf(err) == backend.Busy && !e.closed && !t.closed
		if wait {
			e.wait(t, transfer)
			e.tryLater(err)
		}
		e.mu.Unlock()
		if !wait {
			t.refuse(&transfer, err)
		}
	}
}

// wait appends a transfer to those that wait. The caller holds mu.
func (e *served) wait(t *servedSession, transfer backend.Transfer) {
	transfer.Segments = slices.Clone(transfer.Segments)
	e.waited++
	e.waiting = append(e.waiting, &waiting{number: e.waited, session: t, transfer: transfer})
}

// maxRetryAfter bounds what a backend may ask for: one whose completion was missed is asked again in time.
const maxRetryAfter = time.Second

// tryLater tries again after what the backend says, if nothing completes before. The caller holds mu.
func (e *served) tryLater(busy error) {
	after := backend.DefaultRetryAfter
	var b *backend.Error
	if errors.As(busy, &b) && b.RetryAfter > 0 {
		after = min(b.RetryAfter, maxRetryAfter)
	}
	if e.retry == nil {
		e.retry = time.AfterFunc(after, e.tryWaiting)
	} else {
		e.retry.Reset(after)
	}
}

// tryWaiting posts what waits, as far as the backend has room.
func (e *served) tryWaiting() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.again = true
	for e.trying == nil && len(e.waiting) > 0 {
		w := e.waiting[0]
		e.waiting = e.waiting[1:]
		e.trying, e.again = w, false
		e.mu.Unlock()
		err := w.session.session.Post(w.transfer)
		e.mu.Lock()
		e.trying = nil
		if backend.CodeOf(err) == backend.Busy && !e.closed && !w.session.closed {
			if !w.cancelled {
				e.waiting = slices.Insert(e.waiting, 0, w)
				if !e.again {
					e.tryLater(err)
					return
				}
				continue
			}
			err = errCancelledWaiting
		}
		e.mu.Unlock()
		if err != nil {
			w.session.refuse(&w.transfer, err)
		} else if w.cancelled {
			w.session.session.Cancel(w.transfer.Cookie)
		}
		e.mu.Lock()
	}
}

var errCancelledWaiting = &backend.Error{Code: backend.Cancelled, Text: "cancelled while it waited for room"}

// refuse completes a transfer that the backend has not accepted, because of what was closed, or because of err.
func (t *servedSession) refuse(transfer *backend.Transfer, err error) {
	e := t.endpoint
	e.mu.Lock()
	switch {
	case t.closed:
		err = &backend.Error{Code: backend.Cancelled, Text: "the session was closed", Err: err}
	case e.closed:
		err = &backend.Error{Code: backend.PathDown, Text: "the endpoint was closed", Err: err}
	}
	e.inFlight--
	e.mu.Unlock()
	e.server.answer(t.id, transfer.Cookie, err, make([]backend.Outcome, len(transfer.Segments)))
}

// Complete implements backend.Sink.
func (t *servedSession) Complete(c backend.Completion) {
	e := t.endpoint
	e.mu.Lock()
	e.inFlight-- // before the host can know
	wake := len(e.waiting) > 0 || e.trying != nil
	e.mu.Unlock()
	e.server.answer(t.id, c.Cookie, c.Err, c.Outcomes)
	if wake {
		e.tryWaiting()
	}
}

// answer tells the host what became of a transfer. When it was the last one in flight, the next is not far.
func (s *Server) answer(session, cookie uint64, failure error, outcomes []backend.Outcome) {
	last := s.flying.Add(-1) == 0
	s.replies.complete(session, cookie, failure, outcomes)
	if last && s.submissions != nil {
		s.submissions.Nudge()
	}
}

// cancel cancels what the host says. There is no session zero: a Cancel on it is a sign that was asked for.
func (s *Server) cancel(session, cookie uint64) {
	if session == 0 {
		s.flushed(cookie)
		return
	}
	t := s.sessionOf(session)
	if t == nil {
		return
	}
	e := t.endpoint
	e.mu.Lock()
	is := func(w *waiting) bool { return w.session == t && w.transfer.Cookie == cookie }
	var found *waiting
	if i := slices.IndexFunc(e.waiting, is); i >= 0 {
		found = e.waiting[i]
		e.waiting = slices.Delete(e.waiting, i, i+1)
	} else if e.trying != nil && is(e.trying) {
		e.trying.cancelled = true
	}
	e.mu.Unlock()
	if found != nil {
		t.refuse(&found.transfer, errCancelledWaiting)
		return
	}
	t.session.Cancel(cookie)
}

// posted implements backend.Config.Posted: it asks the host for a sign behind everything that it has posted, and then
// waits for what has come before and waits for room.
func (s *Server) posted(ctx context.Context) error {
	sign := make(chan struct{})
	s.mu.Lock()
	s.lastID++
	id := s.lastID
	s.signs[id] = sign
	s.mu.Unlock()
	s.events.add(&backendpb.Event{Event: &backendpb.Event_Flush{Flush: &backendpb.Flush{Cookie: id}}}, 0, 0)
	select {
	case <-sign:
	case <-s.life.Done():
		return nil // nothing is handed on any more
	case <-ctx.Done():
		s.flushed(id)
		return &backend.Error{Code: backend.Cancelled, Op: "wait for what was posted", Err: ctx.Err()}
	}
	for _, e := range s.allEndpoints() {
		if err := e.passed(ctx, e.lastWaiting()); err != nil {
			return err
		}
	}
	return nil
}

// flushed notes a sign of the host.
func (s *Server) flushed(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sign := s.signs[id]; sign != nil {
		close(sign)
		delete(s.signs, id)
	}
}

// lastWaiting returns the number of the last transfer that had to wait for room.
func (e *served) lastWaiting() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.waited
}

// passed returns when no transfer up to that number waits any more. It looks now and then: few ever wait.
func (e *served) passed(ctx context.Context, number uint64) error {
	for {
		e.mu.Lock()
		waits := len(e.waiting) > 0 && e.waiting[0].number <= number || e.trying != nil && e.trying.number <= number
		e.mu.Unlock()
		if !waits {
			return nil
		}
		select {
		case <-time.After(retryInterval):
		case <-ctx.Done():
			return &backend.Error{Code: backend.Cancelled, Op: "wait for what was posted", Err: ctx.Err()}
		}
	}
}
