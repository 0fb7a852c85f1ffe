package rdma

import (
	"slices"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/coalesce"
)

// transfer is the record of one transfer. Records are made once for each endpoint, and used again and again with the
// arrays that they have grown to.
type transfer struct {
	turn atomic.Uint64 // counts the uses that have ended

	// Set by Post, and not changed until the transfer ends.
	session  *session
	cookie   uint64
	op       backend.Op
	segments int
	plan     coalesce.Plan

	// Guarded by endpoint.mu.
	active    bool // accepted, and not ended
	queued    bool // in endpoint.queue
	next      *transfer
	lane      int               // index of the lane that its next part goes to, if that has room
	dealt     int               // work requests that have gone to a lane
	open      int               // those of them that are in a ledger
	done      int               // those of them that are done
	fates     []backend.Outcome // of the work requests
	culprit   int               // index of the work request that broke the endpoint, or -1
	cancelled bool
	deadline  time.Time // of a transfer that is cancelled and open: when the endpoint is broken for it
}

// retire enters a part that is done. Where it was all that was missing, the transfer ends, and the poller delivers its
// completion.
func (t *transfer) retire(p *part, by *poller) {
	for i := range t.fates[p.first:][:p.count] {
		t.fates[p.first+i] = backend.Done
	}
	t.open -= p.count
	t.done += p.count
	if t.done == len(t.plan.WRs) || t.cancelled && t.open == 0 {
		by.ended = append(by.ended, by.endpoint.end(t))
	}
}

// ending is a completion to be delivered.
type ending struct {
	session *session
	backend.Completion
}

// deliver calls the sink. Nobody touches the memory of the transfer any more, and its record is free.
func (d *ending) deliver() {
	d.session.sink.Complete(d.Completion)
	d.session.near.users.Leave()
	d.session.users.Leave()
}

// end frees the record of a transfer of which nothing is in a ledger nor queued, and returns its completion. The caller
// holds e.mu.
func (e *endpoint) end(t *transfer) ending {
	d := ending{t.session, backend.Completion{Cookie: t.cookie}}
	if t.done < len(t.plan.WRs) {
		d.Outcomes = outcomes(t.plan.WRs, t.fates, t.segments)
		d.Err = t.failure()
	}
	e.free = append(e.free, t)
	t.recycle()
	return d
}

// failure says why the transfer did not succeed. The caller holds endpoint.mu.
func (t *transfer) failure() error {
	s := t.session
	switch {
	case t.cancelled:
		return s.fault(backend.Cancelled, t.op.String(), "")
	case t.culprit >= 0:
		w := &t.plan.WRs[t.culprit]
		err := *s.endpoint.failure
		err.Op, err.Region, err.Offset, err.Length = t.op.String(), s.remote.Region, w.Remote, uint64(w.Bytes)
		return &err
	}
	return s.endpoint.failure
}

// recycle makes the record ready for its next use.
func (t *transfer) recycle() {
	t.session = nil
	t.active, t.cancelled = false, false
	t.lane, t.dealt, t.open, t.done, t.culprit = 0, 0, 0, 0, -1
	t.turn.Add(1)
}

// prepare makes the fates of all work requests NotSent.
func (t *transfer) prepare() {
	n := len(t.plan.WRs)
	t.fates = slices.Grow(t.fates[:0], n)[:n]
	clear(t.fates)
}

// outcomes returns what became of the segments, from what became of the work requests that had bytes of them.
func outcomes(wrs []coalesce.WR, fates []backend.Outcome, segments int) []backend.Outcome {
	out := make([]backend.Outcome, segments)
	const nothing = backend.Outcome(255)
	for i := range out {
		out[i] = nothing
	}
	for i := range wrs {
		for k := wrs[i].First; k <= wrs[i].Last; k++ {
			if out[k] == nothing {
				out[k] = fates[i]
			} else {
				out[k] = join(out[k], fates[i])
			}
		}
	}
	return out
}

// join returns the outcome of a segment of which parts had the outcomes a and b.
func join(a, b backend.Outcome) backend.Outcome {
	switch {
	case a == b:
		return a
	case a == backend.InDoubt || b == backend.InDoubt:
		return backend.InDoubt
	}
	return backend.Failed
}

// transferQueue is a queue of transfers.
type transferQueue struct{ first, last *transfer }

func (q *transferQueue) push(t *transfer) {
	t.queued, t.next = true, nil
	if q.last == nil {
		q.first = t
	} else {
		q.last.next = t
	}
	q.last = t
}

func (q *transferQueue) pop() *transfer {
	t := q.first
	if q.first = t.next; q.first == nil {
		q.last = nil
	}
	t.queued, t.next = false, nil
	return t
}

// remove takes t out of the middle.
func (q *transferQueue) remove(t *transfer) {
	rest := transferQueue{}
	for q.first != nil {
		if u := q.pop(); u != t {
			rest.push(u)
		}
	}
	*q = rest
}
