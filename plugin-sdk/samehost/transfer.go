package samehost

import (
	"sync/atomic"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Transfer is one accepted Post, on its way. Between Start and Finish it is the mover's; the fields above State are read
// only.
type Transfer struct {
	Op       backend.Op
	Segments []backend.Segment // checked: within both regions, not empty; sorted by Remote
	Bytes    uint64            // of all segments
	// State is the mover's own. It is kept when the transfer is used again for another Post of the same endpoint, so that
	// what a mover needs for a transfer is allocated once. Start may run while Stop does: Stop reads what Start writes
	// under a lock of the mover's, or looks at nothing.
	State any

	session *session
	cookie  uint64
	stopped atomic.Bool
	place   int // in session.inFlight, under endpoint.mu
}

// Stopped tells whether the transfer was asked to end: no more of it need be moved. It may be called between Start and
// Finish.
func (t *Transfer) Stopped() bool { return t.stopped.Load() }

// stop is called under endpoint.mu.
func (t *Transfer) stop() {
	t.stopped.Store(true)
	t.session.path.Stop(t)
}

// Finish completes the transfer and gives it back: with nil outcomes and nil err when all is done, and otherwise with
// one outcome for each segment, and why it ended early, or nil where that is because it was stopped. The outcomes are the
// host's from then on. Where the endpoint has failed, the instance says so in place of err; an err of code PathDown makes
// it fail. Nothing may touch the bytes of the transfer any more. The caller holds no lock that Stop takes.
func (t *Transfer) Finish(outcomes []backend.Outcome, err *backend.Error) {
	s := t.session
	e := s.endpoint
	c := backend.Completion{Cookie: t.cookie}

	e.mu.Lock()
	last := s.inFlight[len(s.inFlight)-1]
	s.inFlight[t.place], last.place = last, t.place
	s.inFlight = s.inFlight[:len(s.inFlight)-1]
	// What is in the memory of a process that is gone is of no use to anyone.
	lost := e.err != nil && e.err.Err == errCut
	if outcomes != nil || err != nil || lost {
		c.Err, c.Outcomes = t.reason(err), outcomes
	}
	if lost {
		c.Outcomes = worthless(outcomes, len(t.Segments))
	}
	e.accepted--
	e.recycle(t)
	e.mu.Unlock()

	s.sink.Complete(c)
	s.users.Done()
}

// reason says why the transfer ended early. It is called under endpoint.mu.
func (t *Transfer) reason(err *backend.Error) error {
	e := t.session.endpoint
	if err == nil {
		err = &backend.Error{Code: backend.Cancelled}
	}
	err = e.instance.explain(err, "", e.peer, t.session.remote)
	if err.Code == backend.PathDown {
		e.fall(err)
	}
	if e.err != nil {
		return e.err
	}
	return err
}

// worthless returns the outcomes of n segments, nil where all are done, with Failed in place of Done.
func worthless(outcomes []backend.Outcome, n int) []backend.Outcome {
	if outcomes == nil {
		outcomes = make([]backend.Outcome, n)
		for i := range outcomes {
			outcomes[i] = backend.Done
		}
	}
	for i, o := range outcomes {
		if o == backend.Done {
			outcomes[i] = backend.Failed
		}
	}
	return outcomes
}

// maxSpare bounds the segments that an endpoint's unused transfers have room for: 24 MiB.
const maxSpare = 1 << 20

// reuse returns a transfer as good as new, with room for segments where one is warm. It is called under endpoint.mu.
func (e *endpoint) reuse() *Transfer {
	n := len(e.free) - 1
	if n < 0 {
		return new(Transfer)
	}
	t := e.free[n]
	e.free = e.free[:n]
	e.spare -= cap(t.Segments)
	t.stopped.Store(false)
	return t
}

// recycle keeps a finished transfer for the next Post. There are never more of them than the window is wide.
func (e *endpoint) recycle(t *Transfer) {
	if e.spare+cap(t.Segments) > maxSpare {
		t.Segments = nil
	}
	e.spare += cap(t.Segments)
	t.session = nil
	e.free = append(e.free, t)
}
