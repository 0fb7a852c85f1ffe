package dispatch

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// endpoint is a backend's endpoint and the one owner of its credits. A credit is a record, which says whose
// transfer is in flight under a cookie; a group that finds none waits in the queue.
type endpoint struct {
	backend.Endpoint
	backendName string
	keys        map[backend.RegionID][]byte // of the peer's regions, since it answered
	maxQueued   int
	dropped     chan struct{} // closed when the dispatcher takes the endpoint out of use
	down        atomic.Bool

	mu      sync.Mutex
	window  int
	records []record // grows to window
	free    []uint32 // records not in use
	first   *group   // queue of groups that wait for a credit
	last    *group
	queued  int
	pumping bool // one goroutine at a time posts from the queue
	// completions counts them: one that comes between a Busy and the group's return to the queue finds nothing to post,
	// and must not be the last to look.
	completions uint64
	finished    bool // nothing is queued any more
}

// record is one credit. The generation makes a cookie good for one transfer only: a completion that comes twice,
// or for a transfer that has ended, is recognised and ignored.
type record struct {
	g          *group
	generation uint32
}

func newEndpoint(ep backend.Endpoint, name string, keys map[backend.RegionID][]byte, window, maxQueued int) *endpoint {
	return &endpoint{Endpoint: ep, backendName: name, keys: keys, window: max(window, 1), maxQueued: maxQueued,
		dropped: make(chan struct{})}
}

func (e *endpoint) isDown() bool { return e == nil || e.down.Load() }

// markDown is called with the dispatcher's lock held.
func (e *endpoint) markDown() {
	if !e.down.Swap(true) {
		close(e.dropped)
	}
}

func (e *endpoint) errDown() error {
	return &backend.Error{Code: backend.PathDown, Op: "post", Backend: e.backendName, Text: "the endpoint has failed"}
}

// submit posts the group, or queues it. A caller that waits for the group, and for nothing else, may be kept for
// backend.MaxPostWait.
func (e *endpoint) submit(g *group, waits bool) {
	e.mu.Lock()
	switch {
	case e.finished:
		e.mu.Unlock()
		g.refused(e.errDown())
		return
	case g.job.cancelled.Load():
		e.mu.Unlock()
		g.refused(errCancelledQueued)
		return
	case e.first != nil || e.outstanding() == e.window:
		if e.queued >= e.maxQueued {
			e.mu.Unlock()
			g.refused(&backend.Error{Code: backend.Busy, Op: "post", Backend: e.backendName,
				Text: "too many transfers wait for this peer"})
			return
		}
		e.pushBack(g)
		e.mu.Unlock()
		return
	}
	cookie, completions := e.take(g), e.completions
	e.mu.Unlock()
	if retryAfter, busy := e.post(g, cookie, waits); busy {
		e.mu.Lock()
		refusal := e.putBack(g, cookie, retryAfter)
		missed := completions != e.completions
		e.mu.Unlock()
		if refusal != nil {
			g.refused(refusal)
		}
		if refusal != nil || missed { // others may wait for this credit; or there may be room by now
			e.pump()
		}
	}
}

// post hands a group that has a credit to the backend. When it reports busy, the group is still the caller's.
func (e *endpoint) post(g *group, cookie uint64, waits bool) (retryAfter time.Duration, busy bool) {
	// The group may be complete, and its job at its next batch, before Post has returned: nothing of it is read
	// after that but the flag, whose new meaning does no harm to a cookie that is gone.
	s, cancelled := g.session, &g.job.cancelled
	t := backend.Transfer{Op: g.job.Plan.Op, Segments: g.segments, Cookie: cookie}
	var err error
	if waits && s.waiter != nil {
		j, waiting := g.job, time.Now()
		err = s.waiter.PostWait(t)
		j.Moving += time.Since(waiting) // the caller is the one that runs the job
	} else {
		err = s.Post(t)
	}
	switch {
	case err == nil:
		if cancelled.Load() {
			s.Cancel(cookie)
		}
		return 0, false
	case backend.CodeOf(err) == backend.Busy:
		retryAfter = backend.DefaultRetryAfter
		if e, ok := err.(*backend.Error); ok && e.RetryAfter > 0 {
			retryAfter = e.RetryAfter
		}
		return retryAfter, true
	}
	e.mu.Lock()
	e.giveBack(cookie)
	waiting := e.first != nil && !e.pumping
	e.mu.Unlock()
	g.refused(err)
	if waiting { // for this credit: no completion will come that passes it on
		e.pump()
	}
	return 0, false
}

// pump posts from the queue as long as there are credits. A completion that comes in while another goroutine
// pumps, or from within its own Post, leaves its credit to that one.
func (e *endpoint) pump() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.pumping {
		return
	}
	e.pumping = true
	defer func() { e.pumping = false }()
	for e.first != nil && e.outstanding() < e.window && !e.finished {
		g := e.popFront()
		if g.job.cancelled.Load() {
			e.mu.Unlock()
			g.refused(errCancelledQueued)
			e.mu.Lock()
			continue
		}
		cookie, completions := e.take(g), e.completions
		e.mu.Unlock()
		retryAfter, busy := e.post(g, cookie, false)
		e.mu.Lock()
		if !busy {
			continue
		}
		refusal := e.putBack(g, cookie, retryAfter)
		if refusal == nil {
			if completions != e.completions {
				continue // there may be room by now
			}
			return
		}
		e.mu.Unlock()
		g.refused(refusal)
		e.mu.Lock()
	}
}

// complete is where the backend's completions arrive.
func (e *endpoint) complete(c backend.Completion) {
	e.mu.Lock()
	i := uint32(c.Cookie)
	if int(i) >= len(e.records) || e.records[i].g == nil || e.records[i].generation != uint32(c.Cookie>>32) {
		e.mu.Unlock()
		return
	}
	g := e.records[i].g
	e.giveBack(c.Cookie)
	e.completions++
	waiting := e.first != nil && !e.pumping
	e.mu.Unlock()
	g.completed(c)
	if waiting {
		e.pump()
	}
}

// cancel ends what a job has here: what waits in the queue at once, what is in flight as soon as it is quiet.
// The job's flag is set already.
func (e *endpoint) cancel(j *Job) {
	type inFlight struct {
		s      *session
		cookie uint64
	}
	var flying []inFlight
	e.mu.Lock()
	waiting := e.takeQueued(func(g *group) bool { return g.job == j })
	for i := range e.records {
		if r := &e.records[i]; r.g != nil && r.g.job == j {
			flying = append(flying, inFlight{r.g.session, cookieOf(i, r.generation)})
		}
	}
	e.mu.Unlock()
	refuseAll(waiting, errCancelledQueued)
	for _, f := range flying {
		f.s.Cancel(f.cookie)
	}
}

// failQueued ends what waits in the queue of an endpoint that is down, and lets nothing in any more.
func (e *endpoint) failQueued() {
	e.mu.Lock()
	e.finished = true
	waiting := e.takeQueued(func(*group) bool { return true })
	e.mu.Unlock()
	refuseAll(waiting, e.errDown())
}

func refuseAll(list *group, err error) {
	for g := list; g != nil; {
		next := g.next // the group is its job's again once it is refused
		g.next = nil
		g.refused(err)
		g = next
	}
}

// idle tells whether nothing is in flight, and nothing waits.
func (e *endpoint) idle() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.first == nil && e.outstanding() == 0
}

// The methods below are called with e.mu held.

func (e *endpoint) outstanding() int { return len(e.records) - len(e.free) }

func cookieOf(i int, generation uint32) uint64 { return uint64(generation)<<32 | uint64(i) }

func (e *endpoint) take(g *group) (cookie uint64) {
	if n := len(e.free); n > 0 {
		i := e.free[n-1]
		e.free = e.free[:n-1]
		e.records[i].g = g
		return cookieOf(int(i), e.records[i].generation)
	}
	e.records = append(e.records, record{g: g})
	return cookieOf(len(e.records)-1, 0)
}

func (e *endpoint) giveBack(cookie uint64) {
	r := &e.records[uint32(cookie)]
	r.g = nil
	r.generation++
	e.free = append(e.free, uint32(cookie))
}

// putBack returns a group that the backend had no room for to the head of the queue. The next completion posts
// it; with none outstanding, a timer does. The error says why the group cannot wait, and is nil when it can.
func (e *endpoint) putBack(g *group, cookie uint64, retryAfter time.Duration) error {
	e.giveBack(cookie)
	switch {
	case e.finished:
		return e.errDown()
	case g.job.cancelled.Load(): // while it was in nobody's queue, where cancel would have found it
		return errCancelledQueued
	}
	g.next = e.first
	e.first = g
	if e.last == nil {
		e.last = g
	}
	e.queued++
	if e.outstanding() == 0 {
		time.AfterFunc(retryAfter, e.pump)
	}
	return nil
}

func (e *endpoint) pushBack(g *group) {
	g.next = nil
	if e.last == nil {
		e.first = g
	} else {
		e.last.next = g
	}
	e.last = g
	e.queued++
}

func (e *endpoint) popFront() *group {
	g := e.first
	e.first = g.next
	if e.first == nil {
		e.last = nil
	}
	g.next = nil
	e.queued--
	return g
}

// takeQueued removes the groups that match from the queue and returns them as a list.
func (e *endpoint) takeQueued(match func(*group) bool) (taken *group) {
	rest := e.first
	e.first, e.last, e.queued = nil, nil, 0
	for rest != nil {
		g := rest
		rest = g.next
		if match(g) {
			g.next = taken
			taken = g
		} else {
			e.pushBack(g)
		}
	}
	return taken
}
