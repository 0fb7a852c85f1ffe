package tcp

import (
	"context"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// inlineBytes bounds the frames that Post tries to send itself: copying them takes no longer than waking up the
// writer does.
const inlineBytes = 64 << 10

// lane is one connection of an endpoint. The right to send is held by one goroutine at a time: by the writer, or,
// where the lane is idle and the frame small, by the one that posts. So is the right to receive: see receiver.
type lane struct {
	e      *endpoint
	stream *stream
	wake   chan struct{} // hands the right to send to the writer
	rest   *flight       // what a poster could not send entirely, handed over with the right
	recall chan struct{} // hands the right to receive to the reader

	// Of the one that receives.
	reply  reply // the last one, whose header has come
	midway bool  // its payload has not, entirely

	// Guarded by endpoint.mu.
	receiver    receiver
	turns       uint64     // how often a poster has taken the right to receive
	evicted     bool       // the poster that receives was interrupted, so that it hands over
	writing     bool       // somebody holds the right to send, or it is in wake
	load        uint64     // bytes of the transfers that are queued or awaited
	queued      flightList // not begun
	awaiting    flightList // begun, in the order in which the replies have to come
	flush       flight     // of no transfer: it answers flushAsked, behind all that was posted before
	flushAsked  uint64     // the last flush that may be sent
	flushWanted uint64     // the last flush that the target has asked for, where posts are gathered first
	gathering   bool       // gather runs
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
// or the session or the region was closed, since the flight was taken; the flight is the caller's then. A caller that
// waits for the flight to complete may have to receive its reply, before submit returns.
func (e *endpoint) submit(f *flight, waits bool) *backend.Error {
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
	inline := !l.writing && f.out.left <= inlineBytes && l.stream.tls == nil
	f.alone = waits && inline && f.total <= inlineBytes && l.awaiting.first == nil
	leads := l.enlist(f)
	switch {
	case l.writing:
		f.state = queued
		l.queued.push(f)
		e.mu.Unlock()
	case inline:
		l.writing = true
		f.state = begun
		l.awaiting.push(f)
		e.running.Add(1)
		e.mu.Unlock()
		l.sendInline(f)
		if leads {
			l.lead()
		}
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

// answerFlush has the flush sent once everything that was posted before it was asked for has been: see served.fence.
// Where posts can still be on their way from the host, it waits for those first.
func (l *lane) answerFlush(id uint64) {
	if l.e.t.posted == nil {
		l.sendFlush(id)
		return
	}
	l.e.mu.Lock()
	defer l.e.mu.Unlock()
	l.flushWanted = id
	if !l.gathering {
		l.gathering = true
		l.e.running.Go(l.gather) // the caller is counted, too
	}
}

// gather waits for the posts that are on their way, and has the flush sent behind them. Where they do not come, no flush
// does, and the target aborts the connection.
func (l *lane) gather() {
	for {
		l.e.mu.Lock()
		id := l.flushWanted
		l.e.mu.Unlock()
		ctx, cancel := context.WithTimeout(l.e.t.ctx, l.e.t.settings.fenceGrace)
		err := l.e.t.posted(ctx)
		cancel()
		if err == nil {
			l.sendFlush(id)
		}
		l.e.mu.Lock()
		l.gathering = l.flushWanted != id // another was asked for meanwhile, and more may have been posted before
		again := l.gathering
		l.e.mu.Unlock()
		if !again {
			return
		}
	}
}

// sendFlush has the flush sent once everything that is queued now has been.
func (l *lane) sendFlush(id uint64) {
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
