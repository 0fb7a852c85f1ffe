package reference

import (
	"context"
	"crypto/hmac"
	"sync"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// endpoint carries transfers from one end to another. One goroutine does all of its copying and completing, so
// that transfers complete in the order in which they were accepted.
type endpoint struct {
	from, to *end
	done     chan struct{} // closed when the endpoint fails
	ended    chan struct{} // closed when its goroutine has ended

	mu   sync.Mutex
	work sync.Cond // signalled when accepted or err changes
	err  *backend.Error
	// jobs is a ring: transfer number n is in jobs[n % len(jobs)]. Three numbers only grow: of transfers
	// accepted, of those whose bytes are through (their slots are free again), and of those whose Complete has
	// returned.
	jobs                       []job
	accepted, moved, completed uint64
	waiters                    []waiter
	outcomes                   []backend.Outcome // scratch of the goroutine
}

// job is one accepted transfer. Its slice is reused, so that a warm endpoint does not allocate.
type job struct {
	session   *session
	op        backend.Op
	cookie    uint64
	segments  []backend.Segment
	cancelled bool
}

// waiter is closed when the first `until` transfers have completed.
type waiter struct {
	until uint64
	ready chan struct{}
}

func newEndpoint(from, to *end) *endpoint {
	e := &endpoint{
		from: from, to: to,
		done: make(chan struct{}), ended: make(chan struct{}),
		jobs: make([]job, from.window),
	}
	e.work.L = &e.mu
	go e.run()
	return e
}

// Session implements backend.Endpoint. The target decides what a remote region is: the descriptor came from
// elsewhere and may be old or forged.
func (e *endpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	fault := func(code backend.Code, region backend.RegionID, text string) (backend.Session, error) {
		err := refuse(code, "session", e.to.self, text)
		err.Region = region
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, cancelled("session", e.to.self, err)
	}
	if err := e.down(); err != nil {
		return nil, err
	}
	if addressOf(remote.Peer) != addressOf(e.to.self) {
		return fault(backend.PeerGone, remote.Region, "the descriptor is of "+remote.Peer.String()+": fetch it anew")
	}
	if remote.Kind != backend.HostMemory {
		return fault(backend.Unsupported, remote.Region, "only host memory can be copied")
	}
	near := e.from.region(local)
	if near == nil {
		return fault(backend.BadRequest, local, "the local region is not registered")
	}
	if !hmac.Equal(remote.Key, e.to.key(remote.Region)) {
		return fault(backend.Denied, remote.Region, "the key does not open the remote region")
	}
	far := e.to.region(remote.Region)
	if far == nil {
		return fault(backend.BadRequest, remote.Region, "the peer has no such region any more")
	}
	return &session{endpoint: e, local: near, remote: far, sink: sink}, nil
}

// Done implements backend.Endpoint.
func (e *endpoint) Done() <-chan struct{} { return e.done }

// Close implements backend.Endpoint.
func (e *endpoint) Close() error {
	e.fail(refuse(backend.PathDown, "", e.to.self, "the endpoint was closed"))
	<-e.ended
	return nil
}

// fail ends the endpoint for good. The first reason stays.
func (e *endpoint) fail(why *backend.Error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err == nil {
		e.err = why
		close(e.done)
		e.work.Signal()
	}
}

// down returns why the endpoint has failed, as an untyped nil when it has not.
func (e *endpoint) down() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err == nil {
		return nil
	}
	return e.err
}

// last returns how many transfers were accepted until now.
func (e *endpoint) last() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.accepted
}

// wait returns when the first `until` transfers have completed, or when the context ends.
func (e *endpoint) wait(ctx context.Context, until uint64) error {
	w := waiter{until, make(chan struct{})}
	e.mu.Lock()
	if e.completed >= until {
		e.mu.Unlock()
		return nil
	}
	e.waiters = append(e.waiters, w)
	e.mu.Unlock()
	select {
	case <-w.ready:
		return nil
	case <-ctx.Done(): // the waiter leaves the list when its transfer completes
		return cancelled("wait for transfers", e.to.self, ctx.Err())
	}
}

// run takes the jobs one after the other. Once the endpoint has failed it completes those that are left, none of
// which moves a byte, and ends.
func (e *endpoint) run() {
	defer close(e.ended)
	defer e.from.detach(e)
	defer e.to.detach(e)
	e.mu.Lock()
	defer e.mu.Unlock()
	for {
		for e.moved == e.accepted {
			if e.err != nil {
				return
			}
			e.work.Wait()
		}
		j := &e.jobs[e.moved%uint64(len(e.jobs))]
		sink, completion := j.session.sink, e.move(j)
		e.moved++ // from here on the slot may be taken again: Complete may well call Post

		e.mu.Unlock()
		sink.Complete(completion)
		e.mu.Lock()

		e.completed++
		waiting := e.waiters[:0]
		for _, w := range e.waiters {
			if w.until <= e.completed {
				close(w.ready)
			} else {
				waiting = append(waiting, w)
			}
		}
		e.waiters = waiting
	}
}

// move copies one segment after the other and looks before each whether it should still. It is called with the
// lock, which it gives up while it copies: that is why Post and Cancel never wait for a copy.
func (e *endpoint) move(j *job) backend.Completion {
	for i, seg := range j.segments {
		if err := e.interrupted(j); err != nil {
			e.outcomes = e.outcomes[:0]
			for k := range j.segments {
				if k < i {
					e.outcomes = append(e.outcomes, backend.Done)
				} else {
					e.outcomes = append(e.outcomes, backend.NotSent)
				}
			}
			return backend.Completion{Cookie: j.cookie, Err: err, Outcomes: e.outcomes}
		}
		near := j.session.local.bytes[seg.Local:][:seg.Length]
		far := j.session.remote.bytes[seg.Remote:][:seg.Length]
		e.mu.Unlock()
		if j.op == backend.Write {
			copy(far, near)
		} else {
			copy(near, far)
		}
		e.mu.Lock()
	}
	return backend.Completion{Cookie: j.cookie}
}

// interrupted says why a job should not go on, if it should not.
func (e *endpoint) interrupted(j *job) error {
	switch {
	case e.err != nil:
		return e.err
	case j.cancelled:
		return refuse(backend.Cancelled, j.op.String(), e.to.self, "")
	}
	return j.session.usable(j.op.String())
}

// session is one pair of regions. It has no state but closed, which the endpoint's lock guards.
type session struct {
	endpoint      *endpoint
	local, remote *region
	sink          backend.Sink
	closed        bool
}

// usable refuses when one of the regions was deregistered.
func (s *session) usable(op string) error {
	for _, r := range [...]*region{s.local, s.remote} {
		if r.gone.Load() {
			err := refuse(backend.BadRequest, op, s.endpoint.to.self, "the region was deregistered")
			err.Region = r.id
			return err
		}
	}
	return nil
}

// Post implements backend.Session. What it checks, it checks before the transfer is accepted and under the lock
// that Deregister and Close take afterwards: a transfer is either refused, or it is one that they wait for.
func (s *session) Post(t backend.Transfer) error {
	if err := s.check(t); err != nil {
		return err
	}
	e := s.endpoint
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil {
		return e.err
	}
	if s.closed {
		return refuse(backend.BadRequest, "post", e.to.self, "the session is closed")
	}
	if err := s.usable("post"); err != nil {
		return err
	}
	if e.accepted-e.moved == uint64(len(e.jobs)) {
		return backend.ErrBusy
	}
	j := &e.jobs[e.accepted%uint64(len(e.jobs))]
	j.session, j.op, j.cookie, j.cancelled = s, t.Op, t.Cookie, false
	j.segments = append(j.segments[:0], t.Segments...) // the caller's slice is ours only while Post runs
	e.accepted++
	e.work.Signal()
	return nil
}

// check refuses a transfer that the contract or the target forbids.
func (s *session) check(t backend.Transfer) error {
	fault := func(code backend.Code, text string) error {
		return refuse(code, "post", s.endpoint.to.self, text)
	}
	switch {
	case t.Op != backend.Write && t.Op != backend.Read:
		return fault(backend.Unsupported, t.Op.String()+" is neither write nor read")
	case t.Op == backend.Write && s.remote.rights&backend.RemoteWrite == 0:
		return fault(backend.Denied, "peers may not write the remote region")
	case t.Op == backend.Read && s.remote.rights&backend.RemoteRead == 0:
		return fault(backend.Denied, "peers may not read the remote region")
	case len(t.Segments) == 0:
		return fault(backend.BadRequest, "a transfer has at least one segment")
	}
	for _, seg := range t.Segments {
		if err := s.within(s.local, seg.Local, seg.Length); err != nil {
			return err
		}
		if err := s.within(s.remote, seg.Remote, seg.Length); err != nil {
			return err
		}
	}
	return nil
}

// within checks a range without adding its offset and length, whose sum may overflow.
func (s *session) within(r *region, offset, length uint64) error {
	size := uint64(len(r.bytes))
	if length != 0 && length <= size && offset <= size-length {
		return nil
	}
	return &backend.Error{
		Code: backend.BadRequest, Backend: Name, Op: "post", Peer: s.endpoint.to.self,
		Region: r.id, Offset: offset, Length: length, Text: "the range is empty or not within the region",
	}
}

// Cancel implements backend.Session. The job is only marked: the goroutine sees the mark before its next copy,
// and completes the job when it is quiet.
func (s *session) Cancel(cookie uint64) {
	s.endpoint.mu.Lock()
	defer s.endpoint.mu.Unlock()
	s.cancel(func(j *job) bool { return j.cookie == cookie })
}

// cancel marks the session's jobs that match. The endpoint's lock is held.
func (s *session) cancel(match func(*job) bool) {
	e := s.endpoint
	for n := e.moved; n < e.accepted; n++ {
		if j := &e.jobs[n%uint64(len(e.jobs))]; j.session == s && match(j) {
			j.cancelled = true
		}
	}
}

// Close implements backend.Session.
func (s *session) Close() error {
	e := s.endpoint
	e.mu.Lock()
	s.closed = true
	s.cancel(func(*job) bool { return true })
	last := e.accepted
	e.mu.Unlock()
	return e.wait(context.Background(), last)
}
