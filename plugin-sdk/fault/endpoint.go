package fault

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

type endpoint struct {
	backend.Endpoint
	backend *wrapped
	window  int64
	held    atomic.Int64 // completions held back: their transfers still count for the window
	killed  atomic.Bool

	mu       sync.Mutex
	closed   bool
	dying    chan struct{} // after kill: closed when the inner endpoint is
	sessions map[*session]struct{}
}

// Session implements backend.Endpoint. Without a fault at complete, completions go straight to the host's sink.
func (e *endpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	w := e.backend
	a := w.script.next(Session)
	if a.verb == kill {
		e.kill()
	}
	if err := w.carryOut(ctx, Session, a); err != nil {
		return nil, err
	}
	if e.killed.Load() {
		return nil, w.injected(backend.PathDown, Session)
	}
	w.mu.Lock()
	memory := w.memory[local]
	w.mu.Unlock()
	s := &session{endpoint: e, local: local, memory: memory, sink: sink}
	s.delivered.L = &s.mu
	if w.script.terms[Complete] != nil {
		s.flights, sink = map[uint64]*flight{}, s
	}
	inner, err := e.Endpoint.Session(ctx, local, remote, sink)
	if err != nil {
		return nil, err
	}
	s.Session = inner
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sessions[s] = struct{}{}
	return s, nil
}

// kill takes the endpoint down. Closing the inner one may block, and Post and Complete may not.
func (e *endpoint) kill() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed || e.dying != nil {
		return
	}
	e.killed.Store(true)
	e.dying = make(chan struct{})
	go func() {
		defer close(e.dying)
		e.Endpoint.Close()
		e.release(anySession)
	}()
}

// Close implements backend.Endpoint.
func (e *endpoint) Close() error {
	e.mu.Lock()
	e.closed = true
	dying := e.dying
	e.mu.Unlock()
	err := e.Endpoint.Close()
	if dying != nil {
		<-dying
	}
	e.release(anySession)
	w := e.backend
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.endpoints, e)
	return err
}

func anySession(*session) bool { return true }

// release delivers what the sessions that match hold back, and returns when it has been delivered.
func (e *endpoint) release(match func(*session) bool) {
	e.mu.Lock()
	var matching []*session
	for s := range e.sessions {
		if match(s) {
			matching = append(matching, s)
		}
	}
	e.mu.Unlock()
	for _, s := range matching {
		s.release()
	}
}

type session struct {
	backend.Session
	endpoint *endpoint
	local    backend.RegionID
	memory   []byte // of the local region
	sink     backend.Sink

	mu         sync.Mutex
	flights    map[uint64]*flight // accepted transfers, by cookie; nil when the script has nothing for completions
	delivering int                // calls of deliver that have begun
	delivered  sync.Cond          // broadcast when one has ended
}

// flight is an accepted transfer.
type flight struct {
	op        backend.Op
	segments  int
	first     backend.Segment
	cancelled bool // from now on its completion is not held back
	held      bool // the inner backend has completed it, and the host does not know
	// Of a held flight: what the host will be told, and the timer of a delay.
	answer backend.Completion
	timer  *time.Timer
}

// Post implements backend.Session.
func (s *session) Post(t backend.Transfer) error {
	e := s.endpoint
	switch a := e.backend.script.next(Post); a.verb {
	case fail:
		return e.backend.injected(a.code, Post)
	case busy:
		return backend.ErrBusy
	case kill:
		e.kill()
	}
	if e.killed.Load() {
		return e.backend.injected(backend.PathDown, Post)
	}
	if s.flights == nil {
		return s.Session.Post(t)
	}
	if e.held.Load() >= e.window {
		return backend.ErrBusy
	}
	f := &flight{op: t.Op, segments: len(t.Segments)}
	if len(t.Segments) > 0 {
		f.first = t.Segments[0]
	}
	s.mu.Lock()
	s.flights[t.Cookie] = f
	s.mu.Unlock()
	err := s.Session.Post(t)
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.flights, t.Cookie)
	}
	return err
}

// Complete implements backend.Sink, towards the inner backend. The transfer is quiet already: what may be held
// back here is only the news of it.
func (s *session) Complete(c backend.Completion) {
	a := s.endpoint.backend.script.next(Complete)
	s.mu.Lock()
	f := s.flights[c.Cookie]
	if f == nil { // the inner backend completes what it never accepted: the host shall see that
		s.mu.Unlock()
		s.sink.Complete(c)
		return
	}
	if (a.verb == drop || a.verb == delay) && c.Err == nil && !f.cancelled {
		s.hold(f, c, a)
		s.mu.Unlock()
		return
	}
	delete(s.flights, c.Cookie)
	s.mu.Unlock()

	switch a.verb {
	case fail:
		c = s.failed(c.Cookie, f, a.code, 0, backend.Failed)
	case partial:
		if c.Err == nil && a.count < f.segments {
			c = s.failed(c.Cookie, f, backend.PathDown, a.count, backend.InDoubt)
		}
	case kill:
		c = s.failed(c.Cookie, f, backend.PathDown, 0, backend.InDoubt)
		s.endpoint.kill()
	case corrupt:
		if f.op == backend.Read && s.memory != nil {
			s.memory[f.first.Local] ^= 1
		}
	case dup:
		s.sink.Complete(c)
	}
	s.sink.Complete(c)
}

// failed makes a completion with the first segments Done, and the others as told.
func (s *session) failed(cookie uint64, f *flight, code backend.Code, done int, others backend.Outcome) backend.Completion {
	outcomes := slices.Repeat([]backend.Outcome{others}, f.segments)
	for i := range done {
		outcomes[i] = backend.Done
	}
	return backend.Completion{Cookie: cookie, Err: s.endpoint.backend.injected(code, Complete), Outcomes: outcomes}
}

// hold keeps a completion back. The lock is held.
func (s *session) hold(f *flight, c backend.Completion, a action) {
	s.endpoint.held.Add(1)
	f.held, f.answer = true, backend.Completion{Cookie: c.Cookie}
	if a.verb == drop {
		f.answer = s.failed(c.Cookie, f, backend.Cancelled, 0, backend.InDoubt)
		return
	}
	f.timer = time.AfterFunc(a.delay, func() {
		s.mu.Lock()
		mine := s.take(c.Cookie, f)
		s.mu.Unlock()
		if mine {
			s.deliver(f)
		}
	})
}

// take makes the caller the one who delivers a held completion, unless somebody else is. The lock is held.
func (s *session) take(cookie uint64, f *flight) bool {
	if !f.held || s.flights[cookie] != f {
		return false
	}
	delete(s.flights, cookie)
	if f.timer != nil {
		f.timer.Stop()
	}
	s.delivering++
	return true
}

// deliver tells the host what was held back. It follows a take, without the lock.
func (s *session) deliver(f *flight) {
	s.endpoint.held.Add(-1)
	s.sink.Complete(f.answer)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.delivering--
	s.delivered.Broadcast()
}

// release delivers all that is held back, and waits for others who do.
func (s *session) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for cookie, f := range s.flights {
		if s.take(cookie, f) {
			s.mu.Unlock()
			s.deliver(f)
			s.mu.Lock()
		}
	}
	for s.delivering > 0 {
		s.delivered.Wait()
	}
}

// Cancel implements backend.Session. A completion that is held back comes now, on a goroutine of its own: the
// caller may hold what Complete needs.
func (s *session) Cancel(cookie uint64) {
	s.mu.Lock()
	if f := s.flights[cookie]; f != nil {
		f.cancelled = true
		if s.take(cookie, f) {
			go s.deliver(f)
		}
	}
	s.mu.Unlock()
	s.Session.Cancel(cookie)
}

// Close implements backend.Session.
func (s *session) Close() error {
	s.mu.Lock()
	for _, f := range s.flights {
		f.cancelled = true
	}
	s.mu.Unlock()
	err := s.Session.Close()
	s.release()
	e := s.endpoint
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.sessions, s)
	return err
}
