package dispatch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/core/plan"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Job is one batch on its way. The caller fills in the first fields, runs it, and reads the others. A job can be
// run again and then allocates nothing; it is not for concurrent use, and must not be used again after Run has
// returned ErrNotQuiet.
type Job struct {
	Plan    *plan.Plan
	Locals  []*region.Region     // by Group.Local
	Remotes []*region.Descriptor // by Group.Remote
	// Deadline ends the job as the end of its context does, with DeadlineCause, which must be set with it; zero for none.
	// It costs less than a context of its own.
	Deadline      time.Time
	DeadlineCause error

	// Outcomes says what became of each segment of the plan.
	Outcomes []backend.Outcome
	// Results says what became of each group of the plan.
	Results []Result
	// Dispatching is the time the caller's goroutine spent selecting, looking up sessions, posting and handling
	// completions; Moving is the time it waited for backends.
	Dispatching, Moving time.Duration

	groups    []group
	pending   atomic.Int64 // groups that have not ended
	cancelled atomic.Bool
	timer     *time.Timer   // of Deadline
	wake      chan struct{} // holds a token when pending has reached zero or a group has failed

	parked  []*group // groups that wait for an outage to end
	tallies []tally  // by backend

	mu     sync.Mutex
	failed *group // list of groups that did not end done, and wait for a decision
}

// Result is what became of one group.
type Result struct {
	Err      error // nil when every segment is done
	Backend  int16 // the one that was tried last, or -1
	Attempts int16 // how often it was tried: posted, or given up before that
	// Fence says that a write ended in doubt on the way, even where a later one was done: the target must fence
	// this process before it relies on the pages, or uses them for something else.
	Fence bool
}

// cancelled says that the group was not tried any further, and why, before what had gone wrong until then.
func (t *trouble) cancelled(cause error) {
	t.err = &backend.Error{Code: backend.Cancelled, Err: fmt.Errorf("%w: %w", cause, t.err)}
}

// ErrNotQuiet says that a cancelled transfer did not end within Options.QuietTimeout. Its memory may still be
// touched: it must not be used again, and neither must the job.
var ErrNotQuiet = errors.New("a backend did not become quiet after a transfer was cancelled")

var errCancelledQueued = &backend.Error{Code: backend.Cancelled, Op: "post", Text: "cancelled while waiting for its turn"}

// group is the state of one group of the plan. It is owned by one party at a time: the job's goroutine, a queue
// or record of an endpoint, or the goroutine that opens its session.
type group struct {
	job      *Job
	choice   *selector.Choice
	session  *session
	segments []backend.Segment // to be sent now
	trouble  *trouble          // nil as long as nothing went wrong
	next     *group            // in whichever list the group is
	index    int32
	attempts uint8 // in all
	try      uint8 // at the present backend
	way      uint8 // index into choice.Order
}

// trouble is what a group needs once something has gone wrong.
type trouble struct {
	err      error
	connect  bool    // no endpoint or session could be had
	fence    bool    // some attempt at a write ended in doubt
	segments []int32 // plan's numbers of group.segments, once these are fewer than the whole
}

// Run carries out the job's plan and returns when every group has ended and is quiet. What became of them is in
// Results and Outcomes; the error is nil, or ErrNotQuiet. When ctx ends, what is under way is cancelled; where that is
// a single group, Run may notice up to backend.MaxPostWait late.
func (d *Dispatcher) Run(ctx context.Context, j *Job) error {
	start := time.Now()
	j.prepare()
	waits := len(j.groups) == 1 && j.canWait(ctx, start)
	var cold []*group
	for i := range j.groups {
		g := &j.groups[i]
		switch d.choose(g, start) {
		case noWayNow:
			j.parked = append(j.parked, g)
		case someWay:
			if !d.launch(g, waits) {
				cold = append(cold, g)
			}
		}
	}
	if cold != nil {
		d.openSessions(ctx, j, cold)
	}
	err := d.wait(ctx, j)
	j.Dispatching = time.Since(start) - j.Moving
	if err == nil { // otherwise the results may still be written to
		d.count(j)
	}
	return err
}

// canWait tells whether nothing that would end the job can be due within backend.MaxPostWait.
func (j *Job) canWait(ctx context.Context, now time.Time) bool {
	soon := now.Add(backend.MaxPostWait)
	if d, ok := ctx.Deadline(); ok && d.Before(soon) || !j.Deadline.IsZero() && j.Deadline.Before(soon) {
		return false
	}
	return ctx.Err() == nil
}

func (j *Job) prepare() {
	n := len(j.Plan.Groups)
	if cap(j.groups) < n {
		j.groups = make([]group, n)
		j.Results = make([]Result, n)
	}
	j.groups, j.Results = j.groups[:n], j.Results[:n]
	for i := range j.groups {
		pg := &j.Plan.Groups[i]
		j.groups[i] = group{job: j, index: int32(i), segments: j.Plan.Segments[pg.First : pg.First+pg.Count]}
		j.Results[i] = Result{Backend: -1}
	}
	if cap(j.Outcomes) < len(j.Plan.Segments) {
		j.Outcomes = make([]backend.Outcome, len(j.Plan.Segments))
	}
	j.Outcomes = j.Outcomes[:len(j.Plan.Segments)]
	clear(j.Outcomes)
	if j.wake == nil {
		j.wake = make(chan struct{}, 1)
	}
	select {
	case <-j.wake:
	default:
	}
	j.pending.Store(int64(n))
	j.cancelled.Store(false)
	j.failed = nil
	j.parked = j.parked[:0]
	j.Moving = 0
}

// patience is the longest outage that a group waits for the end of: that of a connection which broke and is made anew,
// when a neighbour's transfer was cancelled, say. A peer that has gone away is not waited for.
const patience = 250 * time.Millisecond

// What choose finds.
type ways int

const (
	someWay  ways = iota
	noWayNow      // but soon, perhaps
	noWayAtAll
)

// choose asks for the ways of a group. A group that has none, and is not worth waiting for, is ended.
func (d *Dispatcher) choose(g *group, now time.Time) ways {
	g.choice = d.opts.Select.SelectBackend(selector.Query{
		Local: g.local(), Remote: g.remote(), Op: g.job.Plan.Op, Bytes: g.plan().Bytes, Now: now,
	})
	if len(g.choice.Order) > 0 {
		return someWay
	}
	waited := g.trouble != nil
	g.fails().err = g.choice.NoWay(g.remote())
	if until := g.choice.Until; !waited && !until.IsZero() && until.Sub(now) <= patience {
		return noWayNow
	}
	g.end()
	return noWayAtAll
}

// retryParked starts the groups that have waited for an outage to end. Those that still have no way end.
func (d *Dispatcher) retryParked(ctx context.Context, j *Job) {
	var cold []*group
	now := time.Now()
	for _, g := range j.parked {
		if d.choose(g, now) != someWay {
			continue
		}
		g.trouble = nil
		if !d.launch(g, false) {
			cold = append(cold, g)
		}
	}
	j.parked = j.parked[:0]
	if cold != nil {
		d.openSessions(ctx, j, cold)
	}
}

// endParked ends the groups that wait for an outage to end.
func (j *Job) endParked(ctx context.Context) {
	for _, g := range j.parked {
		g.trouble.cancelled(j.over(ctx))
		g.end()
	}
	j.parked = j.parked[:0]
}

// launch submits a group if its session is there. For the meaning of waits see endpoint.submit.
func (d *Dispatcher) launch(g *group, waits bool) bool {
	s := d.cached(d.key(g))
	if s == nil {
		return false
	}
	g.session = s
	s.ep.submit(g, waits)
	return true
}

func (d *Dispatcher) key(g *group) sessionKey {
	remote := g.remote()
	return sessionKey{Local: g.local().ID, Remote: remote.ID, Peer: remote.Peer.Incarnation, Variant: uint64(g.choice.Order[g.way])}
}

// openSessions opens the sessions that groups wait for, all at once, and submits the groups as they come.
func (d *Dispatcher) openSessions(ctx context.Context, j *Job, cold []*group) {
	waiting := make(map[sessionKey]*group)
	for _, g := range cold {
		key := d.key(g)
		g.next = waiting[key]
		waiting[key] = g
	}
	for key, list := range waiting {
		local, remote := list.local(), list.remote()
		ctx, cancel := ctx, context.CancelFunc(func() {})
		if !j.Deadline.IsZero() {
			ctx, cancel = context.WithDeadlineCause(ctx, j.Deadline, j.DeadlineCause)
		}
		go func() {
			defer cancel()
			s, err := d.session(ctx, key, local, remote)
			for g := list; g != nil; {
				next := g.next // once submitted, the group is not ours
				g.next = nil
				if err != nil {
					g.fails().connect = true
					g.refused(err)
				} else {
					g.session = s
					s.ep.submit(g, false)
				}
				g = next
			}
		}()
	}
}

// wait returns when all groups have ended, and sees to those that fail.
func (d *Dispatcher) wait(ctx context.Context, j *Job) error {
	if j.pending.Load() == 0 {
		return nil
	}
	done := ctx.Done()
	var notQuiet, outageOver, deadline <-chan time.Time
	if !j.Deadline.IsZero() {
		if j.timer == nil {
			j.timer = time.NewTimer(time.Until(j.Deadline))
		} else {
			j.timer.Reset(time.Until(j.Deadline))
		}
		defer j.timer.Stop()
		deadline = j.timer.C
	}
	if len(j.parked) > 0 {
		timer := time.NewTimer(time.Until(j.parked[0].choice.Until))
		defer timer.Stop()
		outageOver = timer.C
	}
	for j.pending.Load() > 0 {
		waiting := time.Now()
		select {
		case <-j.wake:
			j.Moving += time.Since(waiting)
			d.settle(ctx, j)
		case <-outageOver:
			j.Moving += time.Since(waiting)
			outageOver = nil
			d.retryParked(ctx, j)
		case <-done:
			j.Moving += time.Since(waiting)
			done, deadline, outageOver = nil, nil, nil
			notQuiet = d.cancel(ctx, j)
		case <-deadline:
			j.Moving += time.Since(waiting)
			done, deadline, outageOver = nil, nil, nil
			notQuiet = d.cancel(ctx, j)
		case <-notQuiet:
			if d.opts.Log != nil {
				d.opts.Log.Error("a backend did not become quiet after a cancellation; its memory is withheld",
					"waited", d.opts.QuietTimeout)
			}
			return ErrNotQuiet
		}
	}
	return nil
}

// cancel cancels what the job has in flight, and returns what tells that it has not become quiet in time.
func (d *Dispatcher) cancel(ctx context.Context, j *Job) (notQuiet <-chan time.Time) {
	j.cancelled.Store(true)
	j.endParked(ctx)
	d.mu.Lock()
	var all []*endpoint
	for _, p := range d.endpoints {
		if p.done() && p.err == nil {
			all = append(all, p.value)
		}
	}
	d.mu.Unlock()
	for _, e := range all {
		e.cancel(j)
	}
	return time.After(d.opts.QuietTimeout)
}

// over returns why the job is to end before its groups have, or nil.
func (j *Job) over(ctx context.Context) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case !j.Deadline.IsZero() && !time.Now().Before(j.Deadline):
		return j.DeadlineCause
	}
	return nil
}

// settle decides what becomes of the groups that have failed: sent again, what is left of them, or ended.
func (d *Dispatcher) settle(ctx context.Context, j *Job) {
	j.mu.Lock()
	list := j.failed
	j.failed = nil
	j.mu.Unlock()
	var cold []*group
	cause := j.over(ctx)
	for g := list; g != nil; {
		next := g.next
		g.next = nil
		switch {
		case !g.keepRest():
			g.trouble.err = nil // the backend complained, but every segment is done
			g.end()
		case cause != nil:
			g.trouble.cancelled(cause)
			d.giveUp(g)
		case !d.nextWay(g):
			d.giveUp(g)
		case !d.launch(g, false):
			cold = append(cold, g)
		}
		g = next
	}
	if cold != nil {
		d.openSessions(ctx, j, cold)
	}
}

// giveUp ends a group that has failed, with an error that says what was tried.
func (d *Dispatcher) giveUp(g *group) {
	remote := g.remote()
	r := &backend.Error{Code: backend.CodeOf(g.trouble.err), Op: g.job.Plan.Op.String(), Peer: remote.Peer,
		Region: remote.ID, Text: fmt.Sprintf("%d of %d segments are not done after %d attempts",
			len(g.segments), g.plan().Count, g.attempts), Err: g.trouble.err}
	if len(g.segments) > 0 {
		r.Offset, r.Length = g.segments[0].Remote, g.segments[0].Length
	}
	g.trouble.err = r
	g.end()
}

// nextWay finds the way for another attempt, or reports that there is none. A broken connection is made anew; a
// backend that cannot connect, or refuses, is passed over for the next that the policy allows. What would fail on
// every way is not tried again.
func (d *Dispatcher) nextWay(g *group) bool {
	t := g.trouble
	switch backend.CodeOf(t.err) {
	case backend.BadRequest, backend.Integrity, backend.PeerGone, backend.Busy, backend.Cancelled:
		return false
	case backend.PathDown:
		if g.session != nil {
			d.drop(g.session.ep)
		}
		if !t.connect && int32(g.try) < d.attempts.Load() {
			return true
		}
	}
	t.connect = false
	c := &d.counters[g.choice.Order[g.way]]
	c.Transfers.Add(uint64(g.try))
	c.Failures.Add(uint64(g.try))
	g.way++
	g.try = 0
	g.session = nil
	return int(g.way) < len(g.choice.Order)
}

// tally is what one job did on one backend.
type tally struct{ transfers, segments, bytes, failures uint64 }

// count adds what the job did to the counters: the atomics are touched once for each backend, not for each group.
// What a group tried in vain on backends before its last has been counted when it left them.
func (d *Dispatcher) count(j *Job) {
	if len(j.tallies) != len(d.counters) {
		j.tallies = make([]tally, len(d.counters))
	}
	clear(j.tallies)
	for i := range j.Results {
		r, g, tries := &j.Results[i], &j.Plan.Groups[i], uint64(j.groups[i].try)
		if tries == 0 {
			continue
		}
		t := &j.tallies[r.Backend]
		t.transfers += tries
		t.failures += tries
		t.segments += uint64(g.Count)
		if r.Err == nil {
			t.bytes += g.Bytes
			t.failures--
		}
	}
	for b, t := range j.tallies {
		if t.transfers > 0 {
			c := &d.counters[b]
			c.Transfers.Add(t.transfers)
			c.Segments.Add(t.segments)
			c.Bytes.Add(t.bytes)
			c.Failures.Add(t.failures)
		}
	}
}

func (g *group) plan() *plan.Group          { return &g.job.Plan.Groups[g.index] }
func (g *group) local() *region.Region      { return g.job.Locals[g.plan().Local] }
func (g *group) remote() *region.Descriptor { return g.job.Remotes[g.plan().Remote] }

func (g *group) fails() *trouble {
	if g.trouble == nil {
		g.trouble = &trouble{}
	}
	return g.trouble
}

// number returns the plan's number of the group's i-th present segment.
func (g *group) number(i int) int {
	if g.trouble != nil && g.trouble.segments != nil {
		return int(g.trouble.segments[i])
	}
	return g.plan().First + i
}

// completed takes the backend's answer. It runs on the backend's goroutine; the group, and its job once the last
// group has ended, are gone when it returns.
func (g *group) completed(c backend.Completion) {
	g.attempts++
	g.try++
	outcomes := g.job.Outcomes
	if c.Err == nil {
		for i := range g.segments {
			outcomes[g.number(i)] = backend.Done
		}
		if g.trouble != nil {
			g.trouble.err = nil // what went wrong before has been put right
		}
		g.end()
		return
	}
	t := g.fails()
	t.err = c.Err
	for i := range g.segments {
		o := backend.InDoubt
		if i < len(c.Outcomes) {
			o = c.Outcomes[i]
		}
		if o == backend.InDoubt && g.job.Plan.Op == backend.Write {
			t.fence = true
		}
		outcomes[g.number(i)] = o
	}
	g.settleLater()
}

// refused takes the news that the group was not sent: its outcomes stay as the attempt before left them.
func (g *group) refused(err error) {
	g.attempts++
	g.try++
	g.fails().err = err
	g.settleLater()
}

func (g *group) settleLater() {
	j := g.job
	j.mu.Lock()
	g.next = j.failed
	j.failed = g
	// The token is sent with the lock held: the job may end, and its next batch begin, as soon as it is free.
	j.signal()
	j.mu.Unlock()
}

// end records the group's result. Nothing of the group may be touched after it.
func (g *group) end() {
	j := g.job
	r := Result{Backend: -1, Attempts: int16(g.attempts)}
	if int(g.way) < len(g.choice.Order) {
		r.Backend = int16(g.choice.Order[g.way])
	} else if n := len(g.choice.Order); n > 0 {
		r.Backend = int16(g.choice.Order[n-1])
	}
	if t := g.trouble; t != nil {
		r.Err, r.Fence = t.err, t.fence
	}
	j.Results[g.index] = r
	if j.pending.Add(-1) == 0 {
		j.signal()
	}
}

func (j *Job) signal() {
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

// keepRest reduces the group to the segments that are not done, and reports whether any is left.
func (g *group) keepRest() bool {
	var numbers []int32
	var segments []backend.Segment
	for i, s := range g.segments {
		n := g.number(i)
		if g.job.Outcomes[n] != backend.Done {
			numbers = append(numbers, int32(n))
			segments = append(segments, s)
		}
	}
	g.trouble.segments, g.segments = numbers, segments
	return len(segments) > 0
}
