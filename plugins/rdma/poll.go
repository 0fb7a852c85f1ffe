package rdma

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// recheck is how long a poller trusts the completion channel to tell of completions. None should ever be missed.
const recheck = time.Second

// counts are what the backend counts, for all endpoints together. They only grow.
type counts struct {
	workRequests, sges, posts, completions, strays, failures, probes atomic.Uint64
}

// Counters implements backend.Counter.
func (t *transport) Counters() []backend.Count {
	c := &t.counts
	return []backend.Count{
		{Name: "work_requests", Value: c.workRequests.Load()},
		{Name: "sges", Value: c.sges.Load()},
		{Name: "posts", Value: c.posts.Load()},
		{Name: "completions", Value: c.completions.Load()},
		{Name: "cgo_calls", Value: t.lib.Calls()},
		{Name: "stray_completions", Value: c.strays.Load()},
		{Name: "endpoint_failures", Value: c.failures.Load()},
		{Name: "probes", Value: c.probes.Load()},
	}
}

// poller takes the completions of one path. It polls only while the device owes some: first for a short time without
// sleeping, then when the completion channel tells of one.
type poller struct {
	endpoint *endpoint
	path     *path
	index    int    // in endpoint.pollers
	ahead    uint64 // bytes that the device has before it gets no more
	lanes    []*lane
	wake     chan struct{} // has room for the one signal that is sent to a poller that is parked

	// polling is the right to poll, which a caller of PostWait may take while the poller sleeps. ended belongs to who has
	// it.
	polling sync.Mutex
	ended   []ending

	pumps atomic.Bool // whoever polls has to pump, completions or not

	// Guarded by endpoint.mu.
	bytes   uint64 // in the ledgers of the lanes
	parked  bool   // the poller waits for wake
	helped  bool   // a caller of PostWait polls, or is about to
	answers uint64 // completions so far
	probed  uint64 // answers, when the need for a probe was last looked at
	turn    int    // of the lane that is probed next
}

// busy tells whether the device owes completions. The caller holds endpoint.mu.
func (p *poller) busy() bool {
	for _, l := range p.lanes {
		if l.busy() {
			return true
		}
	}
	return false
}

// rouse wakes the poller up if there is something to poll for and nobody who does. The caller holds endpoint.mu.
func (p *poller) rouse() {
	if p.parked && !p.helped && (p.busy() || p.pumps.Load() || p.endpoint.stopped) {
		p.parked = false
		p.wake <- struct{}{}
	}
}

// take makes the poller the next pumper. The caller holds endpoint.mu.
func (p *poller) take() {
	p.pumps.Store(true)
	p.rouse()
	p.path.cq.Wake() // it may sleep, while it has to wait for a path that is not well
}

// run is the goroutine of the poller.
func (p *poller) run() {
	for p.park() {
		p.polling.Lock()
		err := p.attend()
		p.polling.Unlock()
		if err != nil {
			p.lost(err)
			return
		}
	}
}

// park waits until there is something to poll for. It returns false when the endpoint has no use for the poller any more.
func (p *poller) park() bool {
	e := p.endpoint
	e.mu.Lock()
	p.parked = !p.busy() && !p.pumps.Load() && !e.stopped
	parked, stopped := p.parked, e.stopped
	e.mu.Unlock()
	if parked {
		<-p.wake
	}
	return !stopped
}

// attend polls until the device owes nothing. It looks for completions without sleeping as long as that pays: a look
// that found nothing makes the next one half as long, and a sleep that was shorter than a full look the next one full
// again. The caller has the right to poll, and has it again afterwards.
func (p *poller) attend() error {
	full := p.endpoint.t.settings.look
	look := full
	for p.wanted() {
		found, err := p.look(look)
		if err != nil {
			return err
		}
		if found {
			continue
		}
		look /= 2
		slept, err := p.sleep()
		if err != nil {
			return err
		}
		if slept < full {
			look = full
		}
	}
	return nil
}

// look polls until there are completions, or the time is over. The caller has the right to poll.
func (p *poller) look(limit time.Duration) (found bool, err error) {
	until := time.Now().Add(limit)
	for {
		n, err := p.poll()
		if n > 0 || err != nil {
			return n > 0, err
		}
		if !time.Now().Before(until) {
			return false, nil
		}
		runtime.Gosched()
	}
}

// wanted tells whether there is something to poll for.
func (p *poller) wanted() bool {
	e := p.endpoint
	e.mu.Lock()
	defer e.mu.Unlock()
	return (p.busy() || p.pumps.Load()) && !e.stopped
}

// sleep waits until the completion channel tells of a completion. Meanwhile it lays down the right to poll.
func (p *poller) sleep() (slept time.Duration, err error) {
	if err := p.path.cq.Arm(); err != nil {
		return 0, err
	}
	if n, err := p.poll(); n > 0 || err != nil {
		return 0, err
	}
	p.polling.Unlock()
	defer p.polling.Lock()
	begin := time.Now()
	err = p.path.cq.Wait(begin.Add(recheck))
	return time.Since(begin), err
}

// help polls for a caller of PostWait, until the transfer has ended, for the time of a look at most. The caller has the
// right to poll, and has it no more afterwards; and it is counted in endpoint.running.
func (p *poller) help(t *transfer, turn uint64) {
	e := p.endpoint
	defer e.running.Done()
	until := time.Now().Add(min(e.t.settings.look, backend.MaxPostWait))
	var err error
	for t.turn.Load() == turn && time.Now().Before(until) {
		var n int
		if n, err = p.poll(); err != nil {
			break
		}
		if n == 0 {
			runtime.Gosched()
		}
	}
	p.polling.Unlock()
	if err != nil {
		p.lost(err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	p.helped = false
	p.rouse()
}

// poll takes the completions that are there, books them, posts what there is room for then, and delivers what has ended.
// The caller has the right to poll.
func (p *poller) poll() (int, error) {
	completions, err := p.path.cq.Poll()
	if err != nil || len(completions) == 0 && !p.pumps.Load() {
		return 0, err
	}
	e := p.endpoint
	strays := 0
	e.mu.Lock()
	p.answers += uint64(len(completions))
	for i := range completions {
		if l := p.lane(completions[i].QPN); l == nil || !l.book(&completions[i]) {
			strays++
		}
	}
	p.pumps.Store(false)
	e.pump()
	if e.failure != nil {
		e.signal() // drain waits for this
	}
	e.mu.Unlock()
	e.t.counts.completions.Add(uint64(len(completions)))
	if strays > 0 {
		e.t.counts.strays.Add(uint64(strays))
	}
	for i := range p.ended {
		p.ended[i].deliver()
		p.ended[i] = ending{}
	}
	p.ended = p.ended[:0]
	return len(completions), nil
}

// lost ends the endpoint when its completions are not to be had any more.
func (p *poller) lost(err error) {
	p.endpoint.fail(&backend.Error{Code: backend.PathDown, Text: "the completion queue is lost", Err: err}, true)
}

// lane returns the lane of a queue pair, or nil.
func (p *poller) lane(num uint32) *lane {
	for _, l := range p.lanes {
		if l.num == num {
			return l
		}
	}
	return nil
}

// probe sees to it that the death of a peer is noticed also where nothing is in flight: on a path that was quiet since the
// last call, it writes no bytes. It tells whether the path was quiet. The caller holds endpoint.mu, and nobody is the
// pumper.
func (p *poller) probe() bool {
	quiet := p.answers == p.probed && !p.busy()
	p.probed = p.answers
	if quiet {
		p.probed++ // the answer to the probe
		p.lanes[p.turn%len(p.lanes)].deal(nil, 1, 0)
		p.turn++
		p.endpoint.t.counts.probes.Add(1)
	}
	return quiet
}
