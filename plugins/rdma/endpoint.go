package rdma

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/coalesce"
	"github.com/umbp/umbp/plugins/rdma/device"
)

// endpoint is a connected peer, at the initiator: its paths with their queue pairs, and a fixed number of transfers.
type endpoint struct {
	t             *transport
	peer          backend.Peer
	pollers       []*poller // one for each path
	lanes         []*lane   // of all paths, by turns: the next lane is on the next path
	writes, reads coalesce.Limits
	signalEvery   int           // work requests in a part
	stripe        uint64        // bytes in a part, give or take a work request; 0 where there is only one path
	chain         *device.Chain // of the pumper
	transfers     []transfer

	running  sync.WaitGroup // pollers, and who else may call a sink
	changed  chan struct{}  // tells supervise to look again; has room for one signal
	done     chan struct{}  // closed at the failure
	finished chan struct{}  // closed when everything has completed and every goroutine has ended

	mu      sync.Mutex // never held while a device works, nor while a sink is called
	failure *backend.Error
	fatal   bool // no completion is to be expected any more
	stopped bool // the pollers have to end
	pumping bool // somebody is the pumper
	free    []*transfer
	queue   transferQueue // of what has work requests that were not dealt to a lane
	turn    int           // the lane that the next transfer starts at
}

// maxChain bounds the work requests, and sixteen times that the SGEs, that are posted with one doorbell.
const maxChain = 1024

// newEndpoint takes over the paths, whose queue pairs are ready to send.
func (t *transport) newEndpoint(peer backend.Peer, paths []*path) *endpoint {
	e := t.assemble(peer, paths)
	for _, p := range e.pollers {
		e.running.Go(p.run)
	}
	go e.supervise()
	return e
}

// assemble makes an endpoint that nobody attends to yet.
func (t *transport) assemble(peer backend.Peer, paths []*path) *endpoint {
	e := &endpoint{
		t: t, peer: peer,
		transfers: make([]transfer, t.settings.window),
		changed:   make(chan struct{}, 1),
		done:      make(chan struct{}),
		finished:  make(chan struct{}),
	}
	for i := range e.transfers {
		e.transfers[i].recycle()
		e.free = append(e.free, &e.transfers[i])
	}
	for i, p := range paths {
		e.pollers = append(e.pollers, &poller{
			endpoint: e, path: p, index: i, ahead: ahead(p.rail.port.Rate), wake: make(chan struct{}, 1),
		})
	}
	for i := range t.settings.queuePairs {
		for _, p := range e.pollers {
			if i < len(p.path.qps) {
				// The completion queue has room for what the queue pairs were asked to hold, not for what they were granted.
				size := min(t.settings.sendQueue, p.path.qps[i].Caps().SendWRs, p.path.cq.Entries()/len(p.path.qps))
				p.lanes = append(p.lanes, newLane(p, p.path.qps[i], size))
				e.lanes = append(e.lanes, p.lanes[i])
			}
		}
	}
	e.limit()
	return e
}

// limit finds out what all lanes allow: a transfer is planned before it is known which of them its parts will go to.
func (e *endpoint) limit() {
	s := &e.t.settings
	bytes := uint64(coalesce.MaxBytes)
	if s.wrBytes != 0 {
		bytes = min(bytes, s.wrBytes)
	}
	if len(e.pollers) > 1 { // one contiguous value is to go over all of them
		e.stripe = s.stripe
		bytes = min(bytes, s.stripe)
	}
	writes, reads, size := s.sges, s.sges, s.sendQueue
	for _, l := range e.lanes {
		r := l.poller.path.rail
		writes = min(writes, r.attr.MaxSGE, l.qp.Caps().SGEs)
		reads = min(reads, r.attr.MaxSGERead, l.qp.Caps().SGEs)
		bytes = min(bytes, r.port.MaxMessage)
		size = min(size, l.size)
	}
	e.writes = coalesce.Limits{SGEs: writes, Bytes: bytes}
	e.reads = coalesce.Limits{SGEs: reads, Bytes: bytes}
	// A part needs room for all of it. With half of the queue at most, the other half is busy meanwhile.
	e.signalEvery = min(s.signalEvery, max(size/2, 1))
	wrs := min(size, maxChain)
	e.chain = e.t.lib.NewChain(wrs, max(min(wrs*max(writes, reads), 16*maxChain), writes, reads))
}

// Done implements backend.Endpoint.
func (e *endpoint) Done() <-chan struct{} { return e.done }

var errEndpointClosed = backend.Errorf(backend.PathDown, "the endpoint was closed")

// Close implements backend.Endpoint.
func (e *endpoint) Close() error {
	e.fail(errEndpointClosed, false)
	<-e.finished
	return nil
}

// take returns a free record of a transfer, or says Busy.
func (e *endpoint) take() (*transfer, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.failure != nil {
		return nil, e.failure
	}
	last := len(e.free) - 1
	if last < 0 {
		return nil, backend.ErrBusy
	}
	t := e.free[last]
	e.free = e.free[:last]
	return t, nil
}

// submit sends a transfer on its way.
func (e *endpoint) submit(t *transfer) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.accept(t); err != nil {
		return err
	}
	e.pump()
	return nil
}

// submitAndHelp is submit for a caller that waits for the transfer. It polls for one that is a single part, where nobody
// else does.
func (e *endpoint) submitAndHelp(t *transfer) error {
	e.mu.Lock()
	if err := e.accept(t); err != nil {
		e.mu.Unlock()
		return err
	}
	turn := t.turn.Load()
	p := e.lanes[t.lane].poller
	helps := e.queue.first == t && len(t.plan.WRs) <= e.signalEvery && !p.helped && p.polling.TryLock()
	if helps {
		p.helped = true
		e.running.Add(1)
	}
	e.pump()
	e.mu.Unlock()
	if helps {
		p.help(t, turn)
	}
	return nil
}

// accept queues a transfer, or frees its record and says why not. The caller holds e.mu.
func (e *endpoint) accept(t *transfer) error {
	s := t.session
	var err error
	switch {
	case e.failure != nil:
		err = e.failure
	case s.users.IsShut():
		err = s.fault(backend.BadRequest, "post", "the session is closed")
	case s.near.users.IsShut():
		err = s.deregistered() // whoever waits for the region must not wait for one more transfer
	default:
		t.active = true
		t.lane = e.turn
		e.turn = (e.turn + 1) % len(e.lanes)
		e.queue.push(t)
		return nil
	}
	t.recycle()
	e.free = append(e.free, t)
	s.near.users.Leave()
	s.users.Leave()
	return err
}

// pump deals what is queued to the lanes, as far as there is room, and posts it. One goroutine at a time is the pumper:
// the others leave their transfers to it. After a few rounds it leaves the rest to a poller, since it may be within a
// Post, which is not to take long. The caller holds e.mu; it is released while the device works.
func (e *endpoint) pump() {
	const rounds = 4
	if e.pumping {
		return
	}
	e.pumping = true
	for round := 0; e.failure == nil; round++ {
		if round == rounds && e.queue.first != nil {
			e.pollers[0].take()
			break
		}
		e.deal()
		if !e.dealt() {
			break
		}
		e.mu.Unlock()
		err := e.post()
		e.mu.Lock()
		for _, p := range e.pollers {
			p.rouse()
		}
		if err != nil {
			e.failLocked(err, false)
		}
	}
	e.pumping = false
	if e.failure != nil {
		e.signal()
	}
}

// deal deals what is queued to the lanes, in the order of the queue, until a part finds no lane with room for it.
func (e *endpoint) deal() {
	for e.queue.first != nil {
		t := e.queue.first
		for t.dealt < len(t.plan.WRs) {
			n, bytes := e.cut(t)
			l := e.roomFor(n, t.lane)
			if l < 0 {
				return
			}
			e.lanes[l].deal(t, n, bytes)
			t.lane = (l + 1) % len(e.lanes)
		}
		e.queue.pop()
	}
}

// cut returns how many work requests, and bytes, the next part of a transfer has.
func (e *endpoint) cut(t *transfer) (wrs int, bytes uint64) {
	rest := t.plan.WRs[t.dealt:]
	rest = rest[:min(len(rest), e.signalEvery)]
	for i := range rest {
		bytes += uint64(rest[i].Bytes)
		if e.stripe != 0 && bytes >= e.stripe {
			return i + 1, bytes
		}
	}
	return len(rest), bytes
}

// ahead returns how many bytes of a path the device has before it gets no more: what a wire of so many Mbit/s carries
// in a millisecond, within bounds. That is ample until a completion is noticed, and what is beyond can be cancelled at
// once, while to take something back from the device means to break the endpoint.
func ahead(rate int) uint64 {
	const least, most = 1 << 20, 12 << 20
	if rate <= 0 {
		return most
	}
	return min(max(uint64(rate)*1e6/8/1000, least), most)
}

// roomFor returns the index of the first lane, from one on, that has room for a part, or -1.
func (e *endpoint) roomFor(wrs, from int) int {
	for i := range e.lanes {
		k := (from + i) % len(e.lanes)
		if l := e.lanes[k]; l.room() >= wrs && l.poller.bytes < l.poller.ahead {
			return k
		}
	}
	return -1
}

// dealt tells whether something was dealt and not posted. The caller is the pumper.
func (e *endpoint) dealt() bool {
	return slices.ContainsFunc(e.lanes, func(l *lane) bool { return l.filled != l.tail })
}

// post posts what was dealt. The caller is the pumper, and does not hold e.mu.
func (e *endpoint) post() *backend.Error {
	for _, l := range e.lanes {
		if l.filled == l.tail {
			continue
		}
		if err := l.post(e.chain); err != nil {
			return &backend.Error{Code: backend.PathDown, Text: fmt.Sprintf("post to queue pair %#x", l.num), Err: err}
		}
	}
	return nil
}

// busy tells whether a device owes completions. The caller holds e.mu.
func (e *endpoint) busy() bool {
	return slices.ContainsFunc(e.pollers, (*poller).busy)
}

// cancel ends the transfers that are chosen, or sees to it that they end soon.
func (e *endpoint) cancel(chosen func(*transfer) bool) {
	var ended []ending
	e.mu.Lock()
	for i := range e.transfers {
		t := &e.transfers[i]
		if !t.active || t.cancelled || !chosen(t) {
			continue
		}
		t.cancelled = true
		if e.failure != nil {
			continue
		}
		if t.queued {
			e.queue.remove(t)
		}
		if t.open == 0 {
			ended = append(ended, e.end(t))
		} else {
			t.deadline = time.Now().Add(e.t.settings.cancelGrace)
			e.signal()
		}
	}
	if len(ended) > 0 {
		e.running.Add(1)
		defer e.running.Done()
	}
	e.pump() // what was behind them in the queue may have room now
	e.mu.Unlock()
	for i := range ended {
		ended[i].deliver()
	}
}

// fail ends the endpoint, the first time that it is called. It does not block: supervise does what takes time. Where it
// is fatal, no device will answer what is outstanding.
func (e *endpoint) fail(err *backend.Error, fatal bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.failLocked(err, fatal)
}

func (e *endpoint) failLocked(err *backend.Error, fatal bool) {
	if fatal && !e.fatal {
		e.fatal = true
		e.signal()
	}
	if e.failure != nil {
		return
	}
	failure := *err
	failure.Backend, failure.Op, failure.Peer = e.t.info.Name, "transfer", e.peer
	e.failure = &failure
	if err != errEndpointClosed && err != errClosed {
		e.t.counts.failures.Add(1)
	}
	close(e.done)
}

// signal makes supervise look at the endpoint.
func (e *endpoint) signal() {
	select {
	case e.changed <- struct{}{}:
	default:
	}
}

// supervise ends the endpoint when it has failed. Up to then it probes what is quiet, and breaks the endpoint when
// what was cancelled does not end.
func (e *endpoint) supervise() {
	e.watch()
	for _, l := range e.lanes {
		if err := l.qp.Fail(); err != nil {
			e.t.log.Debug("a queue pair could not be moved to the error state", "backend", e.t.info.Name,
				"peer", e.peer.String(), "queue_pair", l.num, "error", err)
		}
	}
	e.drain()
	e.halt()
	for _, l := range e.lanes {
		e.destroy(l)
	}
	// It is quiet: no device touches memory for this endpoint any more.
	for _, d := range e.settle() {
		d.deliver()
	}
	for _, p := range e.pollers {
		if err := p.path.cq.Close(); err != nil {
			e.t.log.Warn("a completion queue could not be destroyed", "backend", e.t.info.Name, "peer", e.peer.String(), "error", err)
		}
	}
	e.chain.Close()
	e.t.log.Debug("an endpoint ended", "backend", e.t.info.Name, "peer", e.peer.String(), "error", e.failure)
	for _, p := range e.pollers {
		for _, l := range p.lanes {
			if kindOf(l.status) != unknown {
				e.t.report(p.path.rail, e.peer, l.status)
				break
			}
		}
	}
	e.t.forget(e)
	close(e.finished)
}

// watch returns when the endpoint has failed.
func (e *endpoint) watch() {
	probes := time.NewTicker(e.t.settings.probe)
	defer probes.Stop()
	grace := time.NewTimer(0)
	defer grace.Stop()
	for {
		select {
		case <-e.done:
			return
		case <-probes.C:
			e.probe()
		case <-e.changed:
		case <-grace.C:
		}
		if next, some := e.overdue(time.Now()); some {
			grace.Reset(time.Until(next))
		}
	}
}

// probe sends probes over what is quiet.
func (e *endpoint) probe() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.pumping || e.failure != nil {
		return
	}
	idle := true
	for _, p := range e.pollers {
		idle = p.probe() && idle
	}
	if idle {
		e.shrink()
	}
	e.pump()
}

// overdue breaks the endpoint when something that was cancelled has not ended in its time, and returns when to look
// again, if there is anything to look for.
func (e *endpoint) overdue(now time.Time) (next time.Time, some bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.transfers {
		t := &e.transfers[i]
		if !t.active || !t.cancelled {
			continue
		}
		if !t.deadline.After(now) {
			e.failLocked(backend.Errorf(backend.PathDown, "a %s that was cancelled did not end within the cancel_grace of %s",
				t.op, e.t.settings.cancelGrace), false)
			return time.Time{}, false
		}
		if !some || t.deadline.Before(next) {
			next, some = t.deadline, true
		}
	}
	return next, some
}

// drain waits until the device has answered everything, or long enough. In any case it waits for the pumper.
func (e *endpoint) drain() {
	limit := time.NewTimer(e.t.settings.drain)
	defer limit.Stop()
	enough := false
	for {
		e.mu.Lock()
		over := !e.pumping && (enough || e.fatal || !e.busy())
		e.mu.Unlock()
		if over {
			return
		}
		select {
		case <-e.changed:
		case <-limit.C:
			enough = true
		}
	}
}

// halt ends the pollers, and waits for everyone who may deliver a completion.
func (e *endpoint) halt() {
	e.mu.Lock()
	e.stopped = true
	for _, p := range e.pollers {
		p.rouse()
	}
	e.mu.Unlock()
	for _, p := range e.pollers {
		p.path.cq.Wake()
	}
	e.running.Wait()
}

// destroy closes the queue pair of a lane. Its closing is what makes the memory of this end quiet, so it is tried until
// it succeeds; only of a device that is spent, for half a second.
func (e *endpoint) destroy(l *lane) {
	pause := time.Millisecond
	for {
		err := l.qp.Close()
		if err == nil {
			return
		}
		over := l.poller.path.rail.spent.Load() && pause > time.Second/2
		if pause == time.Millisecond || over {
			e.t.log.Error("a device does not destroy a queue pair; what it has in flight is not completed until it does",
				"backend", e.t.info.Name, "port", l.poller.path.rail.name, "peer", e.peer.String(), "queue_pair", l.num,
				"given_up", over, "error", err)
		}
		if over {
			return
		}
		time.Sleep(pause)
		pause = min(2*pause, time.Second)
	}
}

// settle ends every transfer that is left. The queue pairs are closed.
func (e *endpoint) settle() []ending {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, l := range e.lanes {
		l.abandon()
	}
	var ended []ending
	for i := range e.transfers {
		t := &e.transfers[i]
		if t.active {
			t.done = 0
			for _, f := range t.fates {
				if f == backend.Done {
					t.done++
				}
			}
			ended = append(ended, e.end(t))
		}
	}
	return ended
}

// shrink frees what transfers have grown to and idle records need not keep. The caller holds e.mu.
func (e *endpoint) shrink() {
	const keep = 1024 // work requests
	for _, t := range e.free {
		if cap(t.plan.WRs) > keep || cap(t.plan.SGEs) > keep {
			t.plan, t.fates = coalesce.Plan{}, nil
		}
	}
}

// uses tells whether a transfer in flight has its local end in r.
func (e *endpoint) uses(r *region) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.transfers {
		if t := &e.transfers[i]; t.active && t.session.near == r {
			return true
		}
	}
	return false
}
