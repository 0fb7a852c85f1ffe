package shm

import (
	"sync/atomic"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

const (
	// partBytes is about how much one worker copies before it looks for a cancellation: between this and three
	// times as much. That takes a fraction of a millisecond. A longer segment is cut into pieces of this size up
	// to twice as much, never less, because memmove bypasses the caches only from 1 MiB on, which makes it twice
	// as fast for bytes that do not fit there.
	partBytes = 1 << 20
	// partSegments bounds a part of very small segments.
	partSegments = 1 << 10
)

// transfer is one accepted Post. Workers take parts off its front and copy them side by side; whoever puts back
// the last finishes it.
type transfer struct {
	session  *session
	op       backend.Op
	cookie   uint64
	segments []backend.Segment

	// stopped says that no further part may be taken.
	stopped atomic.Bool

	// The first byte that no part has taken is byte offset of segment next. Under copier.mu, unless the posting
	// goroutine copies by itself.
	next   int
	offset uint64

	// Under copier.mu:
	out           int  // parts being copied
	queued        bool // it is in the copier's queue
	before, after *transfer

	place int // in session.inFlight, under endpoint.mu
}

// part is a piece of a transfer: so many bytes, from byte offset of segment first on.
type part struct {
	first         int
	offset, bytes uint64
}

// take cuts the next part off the transfer. It is empty when nothing is left, or the transfer was stopped.
func (t *transfer) take() part {
	p := part{first: t.next, offset: t.offset}
	if t.stopped.Load() {
		return p
	}
	for last := min(t.next+partSegments, len(t.segments)); t.next < last && p.bytes < partBytes; {
		rest := t.segments[t.next].Length - t.offset
		if rest >= 2*partBytes {
			p.bytes += partBytes
			t.offset += partBytes
		} else {
			p.bytes += rest
			t.next, t.offset = t.next+1, 0
		}
	}
	return p
}

// copy moves the bytes of a part.
func (t *transfer) copy(p part) {
	near, far := t.session.near, t.session.far.bytes
	for i := p.first; p.bytes > 0; i++ {
		g := t.segments[i]
		n := min(g.Length-p.offset, p.bytes)
		l := near[g.Local+p.offset:][:n]
		r := far[g.Remote+p.offset:][:n]
		if t.op == backend.Write {
			copy(r, l)
		} else {
			copy(l, r)
		}
		p.offset = 0
		p.bytes -= n
	}
}

// finish completes a transfer that nobody copies any more, and gives it back.
func (t *transfer) finish() {
	s := t.session
	e := s.endpoint
	c := backend.Completion{Cookie: t.cookie}

	e.mu.Lock()
	// What is in the memory of a process that is gone is of no use to anyone.
	lost := e.err != nil && e.err.Err == errCut
	if lost || t.next < len(t.segments) {
		c.Err, c.Outcomes = t.reason(), t.outcomes(lost)
	}
	last := s.inFlight[len(s.inFlight)-1]
	s.inFlight[t.place], last.place = last, t.place
	s.inFlight = s.inFlight[:len(s.inFlight)-1]
	e.accepted--
	e.recycle(t)
	e.mu.Unlock()

	s.sink.Complete(c)
	s.transfers.Done()
	e.transfers.Done()
}

// reason says why the transfer ended early.
func (t *transfer) reason() error {
	e := t.session.endpoint
	if e.err != nil {
		return e.err
	}
	return &backend.Error{Code: backend.Cancelled, Backend: name, Peer: e.peer, Region: t.session.remote}
}

// outcomes tells segment by segment how far the transfer came. All parts that were taken have been copied.
func (t *transfer) outcomes(lost bool) []backend.Outcome {
	list := make([]backend.Outcome, len(t.segments)) // NotSent
	for i := range t.next {
		list[i] = backend.Done
		if lost {
			list[i] = backend.Failed
		}
	}
	if t.offset > 0 {
		list[t.next] = backend.Failed
	}
	return list
}

// reuse returns a transfer as good as new, with room for segments where one is warm.
func (e *endpoint) reuse() *transfer {
	n := len(e.free) - 1
	if n < 0 {
		return new(transfer)
	}
	t := e.free[n]
	e.free = e.free[:n]
	e.spare -= cap(t.segments)
	t.next, t.offset = 0, 0
	t.stopped.Store(false)
	return t
}

// recycle keeps a finished transfer for the next Post. There are never more of them than the window is wide.
func (e *endpoint) recycle(t *transfer) {
	if e.spare+cap(t.segments) > maxSpare {
		t.segments = nil
	}
	e.spare += cap(t.segments)
	t.session = nil
	e.free = append(e.free, t)
}
