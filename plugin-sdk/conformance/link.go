package conformance

import (
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// link is a session with its two areas and its sink.
type link struct {
	backend.Session
	r         *rig
	near, far *area
	sink      *sink
	waiter    backend.PostWaiter // used instead of Post, where it is set
}

// posted is one transfer of a link.
type posted struct {
	backend.Transfer
	done     chan struct{} // closed at its first completion
	err      error
	outcomes []backend.Outcome
}

// sink keeps account of completions.
type sink struct {
	mu         sync.Mutex
	posts      map[uint64]*posted // accepted, or about to be
	lastCookie uint64
	closed     bool // Complete must not be called any more
	complaints []string
	// then is called within Complete, where it is set.
	then func(*posted)
}

// Complete implements backend.Sink. It notes what is wrong, for audit to report on the goroutine of the case.
func (s *sink) Complete(c backend.Completion) {
	s.mu.Lock()
	p := s.posts[c.Cookie]
	switch {
	case p == nil:
		s.complain("a completion for a cookie that was never accepted")
	case s.closed:
		s.complain("a completion after Close had returned")
	case p.completed():
		s.complain("a second completion of the same transfer")
		p = nil
	default:
		p.err, p.outcomes = c.Err, slices.Clone(c.Outcomes)
		s.check(p)
		close(p.done)
	}
	then := s.then
	s.mu.Unlock()
	if p != nil && then != nil {
		then(p)
	}
}

func (s *sink) complain(text string) { s.complaints = append(s.complaints, text) }

// check compares the parts of a completion with each other.
func (s *sink) check(p *posted) {
	if p.err == nil {
		return
	}
	var e *backend.Error
	allDone := len(p.outcomes) == len(p.Segments)
	for _, o := range p.outcomes {
		allDone = allDone && o == backend.Done
		if o > backend.InDoubt {
			s.complain("an outcome that does not exist: " + o.String())
		}
	}
	switch {
	case len(p.outcomes) > len(p.Segments):
		s.complain("more outcomes than segments")
	case allDone:
		s.complain("an error although every segment is Done: " + p.err.Error())
	case !errors.As(p.err, &e):
		s.complain("an error without identity: " + p.err.Error())
	case !slices.Contains(backend.Codes, e.Code), e.Code == backend.Busy:
		s.complain("an error with a code that a completion cannot have: " + p.err.Error())
	}
}

// audit reports what is wrong. It is called when nothing is in flight any more.
func (s *sink) audit(r *rig) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, c := range s.complaints {
		if i == 5 {
			r.Errorf("... and %d more", len(s.complaints)-i)
			break
		}
		r.Errorf("the sink got %s", c)
	}
	s.complaints = nil
	open := 0
	for _, p := range s.posts {
		if !p.completed() {
			open++
		}
	}
	if open > 0 {
		r.Errorf("%d accepted transfers were never completed", open)
	}
	s.closed = true
}

func (p *posted) completed() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// outcome returns what became of a segment. The transfer has completed.
func (p *posted) outcome(i int) backend.Outcome {
	switch {
	case p.err == nil:
		return backend.Done
	case i < len(p.outcomes):
		return p.outcomes[i]
	}
	return backend.InDoubt
}

// session binds an endpoint to two areas; it must succeed.
func (r *rig) session(endpoint backend.Endpoint, near, far *area) *link {
	l, err := r.trySession(endpoint, near, far, far.remote)
	if err != nil && !r.claims(near, far) {
		r.Fatalf("the harness lends memory to move from %s, which the backend does not claim: %v", wayOf(near.remote.Place, far.remote.Place), err)
	}
	if err != nil {
		r.Fatalf("Session: %v", err)
	}
	return l
}

// trySession binds an endpoint to a local area and to what remote says, true or not.
func (r *rig) trySession(endpoint backend.Endpoint, near, far *area, remote backend.Remote) (*link, error) {
	ctx, cancel := r.timeout()
	defer cancel()
	l := &link{r: r, near: near, far: far, sink: &sink{posts: map[uint64]*posted{}}}
	session, err := endpoint.Session(ctx, near.remote.Region, remote, l.sink)
	if err != nil {
		return nil, err
	}
	l.Session = session
	r.mu.Lock()
	defer r.mu.Unlock()
	r.links = append(r.links, l)
	return l, nil
}

// link lends two areas of one size, one to each end, and binds the rig's endpoint to them.
func (r *rig) link(size int) *link {
	return r.session(r.endpoint, r.initiator.area(size, 0), r.target.area(size, allRights))
}

// try posts once.
func (l *link) try(op backend.Op, segments []backend.Segment) (*posted, error) {
	s := l.sink
	s.mu.Lock()
	s.lastCookie++
	p := &posted{
		Transfer: backend.Transfer{Op: op, Segments: slices.Clone(segments), Cookie: s.lastCookie},
		done:     make(chan struct{}),
	}
	s.posts[p.Cookie] = p
	s.mu.Unlock()
	handed := p.Transfer
	handed.Segments = slices.Clone(segments)
	post := l.Post
	if l.waiter != nil {
		post = l.waiter.PostWait
	}
	err := post(handed)
	// From here on the slice is the host's again. What a backend that kept it would read now is a legal transfer,
	// but another one.
	for i := range handed.Segments {
		handed.Segments[i] = backend.Segment{Length: 1}
	}
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.posts, p.Cookie)
		return nil, err
	}
	return p, nil
}

// post posts until the transfer is accepted.
func (l *link) post(op backend.Op, segments []backend.Segment) *posted {
	deadline := time.Now().Add(l.r.h.Patience)
	for {
		p, err := l.try(op, segments)
		if err == nil {
			return p
		}
		if !errors.Is(err, backend.ErrBusy) {
			l.r.Fatalf("Post of a legal %s: %v", op, err)
		}
		if time.Now().After(deadline) {
			l.r.Fatalf("Post is still Busy after %s", l.r.h.Patience)
		}
		time.Sleep(backend.DefaultRetryAfter / 10)
	}
}

// wait waits for a transfer.
func (l *link) wait(p *posted) {
	l.r.await("the completion of an accepted "+p.Op.String(), p.done)
}

// move posts a transfer, waits for it, and wants it done, with both memories as they should then be.
func (l *link) move(op backend.Op, segments []backend.Segment, what string) {
	near, far := l.near.contents(), l.far.contents()
	p := l.post(op, segments)
	l.wait(p)
	if p.err != nil {
		l.r.Fatalf("%s: a legal %s failed: %v", what, op, p.err)
	}
	l.verify(p, near, far, what)
}

// verify compares both memories with what a completed transfer says about its segments. near and far are copies
// from before.
func (l *link) verify(p *posted, near, far []byte, what string) {
	if l.r.h.NearEndOnly {
		return
	}
	for i, s := range p.Segments {
		n := near[margin+s.Local:][:s.Length]
		f := far[margin+s.Remote:][:s.Length]
		switch {
		case p.outcome(i) == backend.NotSent:
		case p.outcome(i) != backend.Done && p.Op == backend.Write:
			copy(f, l.far.at(s.Remote, s.Length)) // may be anything
		case p.outcome(i) != backend.Done:
			copy(n, l.near.at(s.Local, s.Length))
		case p.Op == backend.Write:
			copy(f, n)
		default:
			copy(n, f)
		}
	}
	l.near.unchanged(near, what+": after a "+p.Op.String())
	l.far.unchanged(far, what+": after a "+p.Op.String())
}

// closeSession closes the session, after which the sink must not be called.
func (l *link) closeSession() {
	if err := l.Close(); err != nil {
		l.r.Errorf("Session.Close: %v", err)
	}
	l.sink.audit(l.r)
}
