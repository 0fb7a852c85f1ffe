package xgmi

import (
	"sync"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/xgmi/shape"
)

// order is who wants bytes moved: a *samehost.Transfer, or a self-test.
type order interface {
	Stopped() bool
	Finish(outcomes []backend.Outcome, err *backend.Error)
}

// job is an order on its way. It belongs to the driver from add on.
type job struct {
	order     order
	op        backend.Op
	near, far uint64 // addresses of the regions
	segments  []backend.Segment
	plan      shape.Plan

	stream *stream
	next   int // the first part that was not submitted
	out    int // parts that were submitted and have not ended
	// outcomes is nil while nothing has failed. What is not submitted is entered at the end.
	outcomes []backend.Outcome
	err      *backend.Error // why something failed, the first reason
	after    *job           // in a queue
}

// jobs keeps those that have ended, for the plans that they have room for.
var jobs = sync.Pool{New: func() any { return new(job) }}

func newJob(o order, p *path, op backend.Op, segments []backend.Segment, limits shape.Limits) *job {
	j := jobs.Get().(*job)
	j.order, j.op, j.near, j.far, j.segments = o, op, p.nearAt, p.farAt, segments
	j.plan.Cut(segments, limits)
	return j
}

// ends returns the addresses that a copy goes to and comes from, and the distances between its rows.
func (j *job) ends(o *shape.Op) (to, toPitch, from, fromPitch uint64) {
	near, far := j.near+o.Local, j.far+o.Remote
	if j.op == backend.Write {
		return far, o.RemotePitch, near, o.LocalPitch
	}
	return near, o.LocalPitch, far, o.RemotePitch
}

// unsent tells whether parts are left that were not submitted.
func (j *job) unsent() bool { return j.next < len(j.plan.Parts) }

// fail enters that segments first to last have failed, and why: nil where that is because the order was stopped.
func (j *job) fail(first, last uint32, why *backend.Error) {
	j.record()
	for i := first; i <= last; i++ {
		j.outcomes[i] = backend.Failed
	}
	if j.err == nil && why != nil {
		s := j.segments[first]
		e := *why
		e.Offset, e.Length = s.Remote, s.Length
		j.err = &e
	}
}

// record makes the list of outcomes, as if all were done.
func (j *job) record() {
	if j.outcomes == nil {
		j.outcomes = make([]backend.Outcome, len(j.segments))
		for i := range j.outcomes {
			j.outcomes[i] = backend.Done
		}
	}
}

// finish completes the order. No part is out, and none will be submitted.
func (j *job) finish() {
	if j.unsent() {
		j.record()
		at := j.plan.Parts[j.next].First
		first := j.plan.Ops[at].First
		for i := int(first); i < len(j.outcomes); i++ {
			j.outcomes[i] = backend.NotSent
		}
		if at > 0 && j.plan.Ops[at-1].Last == first { // cut in two, and half of it is submitted
			j.outcomes[first] = backend.Failed
		}
	}
	o, outcomes, err := j.order, j.outcomes, j.err
	*j = job{plan: j.plan}
	jobs.Put(j)
	o.Finish(outcomes, err)
}

// queue is a list of jobs.
type queue struct{ first, last *job }

func (q *queue) push(j *job) {
	if j.after = nil; q.last == nil {
		q.first = j
	} else {
		q.last.after = j
	}
	q.last = j
}

func (q *queue) pop() *job {
	j := q.first
	if q.first = j.after; q.first == nil {
		q.last = nil
	}
	j.after = nil
	return j
}
