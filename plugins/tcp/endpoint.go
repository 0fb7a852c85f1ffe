package tcp

import (
	"errors"
	"io"
	"sync"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// endpoint is a connected peer, at the initiator: a few lanes, and a fixed number of flights.
type endpoint struct {
	t       *transport
	peer    backend.Peer
	lanes   []*lane
	flights []flight
	running sync.WaitGroup // everyone who may touch local memory or call a sink
	done    chan struct{}  // closed at the failure
	ended   chan struct{}  // closed when everything has completed and every goroutine has ended

	mu      sync.Mutex // never held across I/O, nor while a sink is called
	failure *backend.Error
	free    []*flight
	lastID  uint64
}

// flight is the record of one transfer. Flights are made once and used again and again, with what they have
// grown to.
type flight struct {
	// Set before the flight is submitted, and not changed until it is recycled.
	session *session
	cookie  uint64
	op      backend.Op
	id      uint64
	head    []byte // header and table of the request
	spans   []span // local ranges
	total   uint64 // bytes
	lane    *lane
	alone   bool // it is small, its poster waits for it, and nothing else was on the lane

	out cursor // what has still to be sent; it belongs to whoever sends on the lane
	in  cursor // what a Read has still to receive; it belongs to whoever receives on the lane

	// Guarded by endpoint.mu.
	state     flightState
	sent      bool // the request is entirely with the kernel, and out is not used any more
	receiving bool // the payload of a Read is being stored, by one that completes it if it is cancelled
	answered  bool // the reply is here
	cancelled bool
	abandoned bool           // a Read that has completed as cancelled; only (the rest of) its reply is awaited
	refusal   *backend.Error // what the reply said, if it was not yes
	next      *flight
}

type flightState uint8

const (
	idle   flightState = iota // free, or being filled by Post
	queued                    // in lane.queued
	begun                     // a byte may have left
	ending                    // somebody is completing it
)

// newEndpoint takes over the streams, also when it fails. The caller is counted in t.running.
func (t *transport) newEndpoint(peer backend.Peer, streams []*stream) (backend.Endpoint, error) {
	e := &endpoint{
		t: t, peer: peer,
		flights: make([]flight, t.settings.window),
		free:    make([]*flight, t.settings.window),
		done:    make(chan struct{}),
		ended:   make(chan struct{}),
	}
	for i := range e.flights {
		e.free[i] = &e.flights[i]
	}
	for _, s := range streams {
		e.lanes = append(e.lanes, &lane{e: e, stream: s, wake: make(chan struct{}, 1), recall: make(chan struct{}, 1)})
	}
	t.mu.Lock()
	closed := t.closed
	if !closed {
		t.endpoints[e] = struct{}{}
	}
	t.mu.Unlock()
	if closed {
		for _, s := range streams {
			s.close(true)
		}
		return nil, fault("establish", peer, errClosed)
	}
	for _, l := range e.lanes {
		e.running.Go(l.read)
		e.running.Go(l.write)
	}
	t.running.Go(e.supervise)
	return e, nil
}

// Done implements backend.Endpoint.
func (e *endpoint) Done() <-chan struct{} { return e.done }

// Close implements backend.Endpoint.
func (e *endpoint) Close() error {
	e.fail(backend.Errorf(backend.PathDown, "the endpoint was closed"))
	<-e.ended
	return nil
}

// fail ends the endpoint, the first time that it is called. It does not block: supervise does what takes time.
func (e *endpoint) fail(cause error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.failLocked(cause)
}

func (e *endpoint) failLocked(cause error) {
	if e.failure != nil {
		return
	}
	if errors.Is(cause, io.EOF) {
		cause = errors.New("the peer closed the connection")
	}
	e.failure = &backend.Error{Code: backend.PathDown, Backend: name, Op: "transfer", Peer: e.peer, Err: cause}
	close(e.done)
	for _, l := range e.lanes {
		l.stream.abort()
	}
}

// supervise waits for the failure, and for quiet, and completes what was in flight.
func (e *endpoint) supervise() {
	<-e.done
	e.running.Wait()
	var open []*flight
	e.mu.Lock()
	failure := e.failure
	for i := range e.flights {
		f := &e.flights[i]
		if (f.state == queued || f.state == begun) && !f.abandoned {
			f.state = ending
			open = append(open, f)
		}
	}
	e.mu.Unlock()
	for _, l := range e.lanes {
		l.stream.close(len(open) > 0)
	}
	for _, f := range open {
		err := failure
		if f.cancelled {
			err = cancelled(f)
		}
		e.complete(f, err, f.outcomes())
	}
	e.t.mu.Lock()
	delete(e.t.endpoints, e)
	e.t.mu.Unlock()
	e.t.log.Debug("an endpoint ended", "backend", name, "peer", e.peer.String(), "error", failure.Err)
	close(e.ended)
}

// complete answers a flight that is ending. The flight is free again before the sink is called, so that the sink
// can post the next one.
func (e *endpoint) complete(f *flight, failure *backend.Error, outcomes []backend.Outcome) {
	s := f.session
	c := backend.Completion{Cookie: f.cookie, Outcomes: outcomes}
	if failure != nil {
		c.Err = failure
	}
	e.mu.Lock()
	e.recycle(f)
	e.mu.Unlock()
	s.deliver(c)
}

// recycle frees a flight, and drops its pointers into memory. The caller holds e.mu.
func (e *endpoint) recycle(f *flight) {
	if f.lane != nil {
		f.lane.load -= f.total
	}
	*f = flight{head: f.head[:0], spans: f.spans[:0]}
	e.free = append(e.free, f)
}

// checkProgress fails the endpoint when a lane is stuck in a transfer. Only the janitor calls it.
func (e *endpoint) checkProgress(now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, l := range e.lanes {
		if limit := e.t.settings.ioTimeout; l.stream.stalled(l.load > 0, now, limit) {
			e.failLocked(backend.Errorf(backend.PathDown, "no progress within the io_timeout of %s", limit))
		}
	}
}

// uses tells whether a transfer in flight has its local end in r.
func (e *endpoint) uses(r *region) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.flights {
		f := &e.flights[i]
		if f.state != idle && !f.abandoned && f.session.local == r {
			return true
		}
	}
	return false
}

// outcomes says what became of each segment of a flight that did not get its reply. Nobody else uses it any more.
func (f *flight) outcomes() []backend.Outcome {
	out := make([]backend.Outcome, len(f.spans))
	sent := uint64(len(f.head)) + f.payload() - f.out.left
	if f.lane == nil || sent == 0 {
		return out // the peer knows nothing of it: NotSent
	}
	if f.op == backend.Read {
		return f.received()
	}
	for i, start := 0, uint64(len(f.head)); i < len(out); i++ {
		if start < sent {
			out[i] = backend.InDoubt
		}
		start += f.spans[i].length
	}
	return out
}

// received says what became of each segment of a Read that has begun.
func (f *flight) received() []backend.Outcome {
	out := make([]backend.Outcome, len(f.spans))
	received := f.total - f.in.left
	for i, end := 0, uint64(0); i < len(out); i++ {
		end += f.spans[i].length
		out[i] = backend.Failed
		if end <= received {
			out[i] = backend.Done
		}
	}
	return out
}

// abandon gives up a Read that has begun, whose memory nobody touches any more, and returns its completion, which
// the caller delivers. The flight itself stays taken until its reply has been thrown away. The caller holds e.mu.
func (f *flight) abandon() backend.Completion {
	c := backend.Completion{Cookie: f.cookie, Err: cancelled(f), Outcomes: f.received()}
	f.abandoned, f.receiving = true, false
	f.in = cursor{left: f.in.left}
	return c
}

// payload returns how many bytes of local memory follow the head.
func (f *flight) payload() uint64 {
	if f.op == backend.Write {
		return f.total
	}
	return 0
}

func cancelled(f *flight) *backend.Error {
	return &backend.Error{Code: backend.Cancelled, Backend: name, Op: f.op.String(),
		Peer: f.session.e.peer, Region: f.session.remote.Region}
}
