package tcp

import (
	"errors"
	"os"
	"strconv"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// inlineBytes bounds the frames that Post tries to send itself: copying them takes no longer than waking up the
// writer does.
const inlineBytes = 64 << 10

// lane is one connection of an endpoint. Its reader goroutine receives the replies. The right to send is held by
// one goroutine at a time: by the writer, or, where the lane is idle and the frame small, by the one that posts.
type lane struct {
	e      *endpoint
	stream *stream
	wake   chan struct{} // hands the right to send to the writer
	rest   *flight       // what a poster could not send entirely, handed over with the right

	// Guarded by endpoint.mu.
	writing    bool       // somebody holds the right to send, or it is in wake
	load       uint64     // bytes of the transfers that are queued or awaited
	queued     flightList // not begun
	awaiting   flightList // begun, in the order in which the replies have to come
	flush      flight     // of no transfer: it answers flushAsked, behind all that was posted before
	flushAsked uint64     // the last flush that the target has asked for
}

// flightList is a queue of flights.
type flightList struct{ first, last *flight }

func (l *flightList) push(f *flight) {
	if l.last == nil {
		l.first = f
	} else {
		l.last.next = f
	}
	l.last = f
}

func (l *flightList) pop() *flight {
	f := l.first
	if f != nil {
		if l.first = f.next; l.first == nil {
			l.last = nil
		}
		f.next = nil
	}
	return f
}

// remove takes f out of the middle.
func (l *flightList) remove(f *flight) {
	var rest flightList
	for g := l.pop(); g != nil; g = l.pop() {
		if g != f {
			rest.push(g)
		}
	}
	*l = rest
}

// submit sends a flight on its way over the lane with the least to do. It refuses where the endpoint has failed,
// or the session or the region was closed, since the flight was taken; the flight is the caller's then.
func (e *endpoint) submit(f *flight) *backend.Error {
	e.mu.Lock()
	if err := f.session.refusal(); err != nil {
		e.mu.Unlock()
		return err
	}
	l := e.lanes[0]
	for _, other := range e.lanes[1:] {
		if other.load < l.load {
			l = other
		}
	}
	if l.load == 0 {
		l.stream.progress.Add(1) // the time without progress counts from here
	}
	f.lane = l
	l.load += f.total
	switch {
	case l.writing:
		f.state = queued
		l.queued.push(f)
		e.mu.Unlock()
	case f.out.left <= inlineBytes && l.stream.tls == nil:
		l.writing = true
		f.state = begun
		l.awaiting.push(f)
		e.running.Add(1)
		e.mu.Unlock()
		l.sendInline(f)
		e.running.Done()
	default:
		l.writing = true
		f.state = queued
		l.queued.push(f)
		e.mu.Unlock()
		l.wake <- struct{}{}
	}
	return nil
}

// sendInline sends f without waiting, and leaves what is left to the writer. The caller holds the right to send.
func (l *lane) sendInline(f *flight) {
	if err := l.stream.trySend(&f.out); err != nil {
		l.e.fail(err)
		return
	}
	if f.out.left > 0 {
		l.rest = f
		l.wake <- struct{}{}
		return
	}
	l.e.mu.Lock()
	more := l.queued.first != nil
	l.writing = more
	answered := l.markSent(f)
	l.e.mu.Unlock()
	if more {
		l.wake <- struct{}{}
	}
	if answered {
		l.e.finish(f)
	}
}

// markSent notes that f is entirely with the kernel, and tells whether its reply has overtaken this note, so that
// the caller has to finish it. The caller holds e.mu.
func (l *lane) markSent(f *flight) bool {
	if f == &l.flush {
		if f.state = idle; f.id != l.flushAsked {
			l.queueFlush()
		}
		return false
	}
	f.sent = true
	if f.answered {
		f.state = ending
	}
	return f.answered
}

// write is the writer goroutine. It sends one queued flight after the other while it holds the right to.
func (l *lane) write() {
	for {
		select {
		case <-l.e.done:
			return
		case <-l.wake:
		}
		f := l.rest
		l.rest = nil
		if f == nil {
			f = l.nextQueued()
		}
		for f != nil {
			if err := l.stream.send(&f.out); err != nil {
				l.e.fail(err)
				return
			}
			l.e.mu.Lock()
			answered := l.markSent(f)
			l.e.mu.Unlock()
			if answered {
				l.e.finish(f)
			}
			f = l.nextQueued()
		}
	}
}

// nextQueued begins the next flight, or gives up the right to send when there is none.
func (l *lane) nextQueued() *flight {
	l.e.mu.Lock()
	defer l.e.mu.Unlock()
	if l.e.failure != nil {
		return nil
	}
	f := l.queued.pop()
	if f == nil {
		l.writing = false
		return nil
	}
	f.state = begun
	if f != &l.flush {
		l.awaiting.push(f)
	}
	return f
}

// answerFlush has the flush sent once everything that is queued now has been: see served.fence.
func (l *lane) answerFlush(id uint64) {
	l.e.mu.Lock()
	l.flushAsked = id
	if l.flush.state == idle {
		l.queueFlush()
	}
	wake := !l.writing
	l.writing = true
	l.e.mu.Unlock()
	if wake {
		l.wake <- struct{}{}
	}
}

// queueFlush queues the flush that was asked for last. The caller holds e.mu.
func (l *lane) queueFlush() {
	f := &l.flush
	f.state, f.id = queued, l.flushAsked
	f.head = appendRequest(f.head[:0], request{op: opFlush, id: f.id})
	f.out = newCursor(f.head, nil, nil, 0)
	l.queued.push(f)
}

// read is the reader goroutine. It never waits for a writer, so that a target that is blocked in sending gets on,
// and reads again.
func (l *lane) read() {
	for {
		if err := l.readReply(); err != nil {
			l.e.fail(err)
			return
		}
	}
}

// readReply receives one reply. What it says is untrusted: it can only answer the oldest flight, with what that
// has asked for.
func (l *lane) readReply() error {
	b, err := l.stream.peek(replySize)
	if err != nil {
		return err
	}
	r, err := parseReply(b)
	if err != nil {
		return err
	}
	l.stream.consume(replySize)
	if r.code == statusFlush {
		l.answerFlush(r.id)
		return nil
	}

	l.e.mu.Lock()
	f := l.awaiting.first
	awaited := f != nil && f.id == r.id
	if awaited {
		f.receiving = r.code == 0 && f.op == backend.Read && !f.abandoned
	}
	l.e.mu.Unlock()
	if !awaited {
		return protocolError("a reply to request %d is not the one awaited", r.id)
	}
	var refusal *backend.Error
	switch {
	case r.code != 0:
		text, err := l.stream.peek(int(r.bytes))
		if err != nil {
			return midFrame(err)
		}
		refusal = &backend.Error{Code: r.code, Backend: name, Op: f.op.String(), Peer: l.e.peer,
			Region: f.session.remote.Region, Text: "the target says " + strconv.Quote(string(text))}
		l.stream.consume(int(r.bytes))
	case r.bytes != f.in.left:
		return protocolError("a reply carries %d bytes, not %d", r.bytes, f.in.left)
	case f.op == backend.Read:
		if err := l.receive(f); err != nil {
			return err
		}
	}

	l.e.mu.Lock()
	l.awaiting.pop()
	f.answered, f.refusal = true, refusal
	finish := f.sent
	if finish {
		f.state = ending
	}
	l.e.mu.Unlock()
	if finish {
		l.e.finish(f)
	}
	return nil
}

// receive stores the payload of a Read where it belongs, and throws away what comes once the Read is cancelled.
func (l *lane) receive(f *flight) error {
	if f.abandoned { // nobody changes it in a flight that the reader has in hand
		return l.stream.discard(f.in.left)
	}
	err := l.stream.receive(&f.in)
	l.e.mu.Lock()
	f.receiving = false // from here on, Cancel does not interrupt
	interrupted := f.cancelled
	l.e.mu.Unlock()
	if !interrupted || err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	if err := l.stream.resume(); err != nil {
		return err
	}
	if err == nil {
		return nil // everything was there already
	}
	l.e.mu.Lock()
	c := f.abandon()
	l.e.mu.Unlock()
	f.session.deliver(c)
	return l.stream.discard(f.in.left)
}

// finish completes a flight that was sent and answered.
func (e *endpoint) finish(f *flight) {
	switch {
	case f.abandoned:
		e.mu.Lock()
		e.recycle(f)
		e.mu.Unlock()
		return
	case f.refusal == nil:
		e.complete(f, nil, nil)
		return
	}
	outcomes := make([]backend.Outcome, len(f.spans))
	for i := range outcomes {
		outcomes[i] = backend.Failed
	}
	e.complete(f, f.refusal, outcomes)
}
