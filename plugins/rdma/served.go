package rdma

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/device"
)

// served is a connection that a peer has made to this process. Its queue pairs serve what the peer posts without any
// help; all they send are probes.
type served struct {
	id    uint64 // of its probes
	peer  backend.Peer
	born  time.Time
	ready bool // guarded by connections.mu: Answer is through, and the connection may be dropped

	mu    sync.Mutex
	lanes []*servedLane
}

// servedLane is the target's end of one path. One that could not be set up is over at once.
type servedLane struct {
	rail *rail
	qps  []device.QP // those that are not closed
	over bool        // all are closed, and the rail is left
	nums []uint32
	turn int // of the queue pair that is probed next
	// When the last probe was sent, and whether it is still to be answered.
	probed  time.Time
	waiting bool
}

// connections are those that this process serves.
type connections struct {
	t *transport

	mu     sync.Mutex
	m      map[uint64]*served
	lastID uint64
	limit  int
}

// Answer implements backend.Backend. It pairs the rails that the peer offers with those of this end, and makes the queue
// pairs that serve it.
func (t *transport) Answer(ctx context.Context, peer backend.Peer, raw []byte) ([]byte, error) {
	b, err := t.answer(ctx, peer, raw)
	if err != nil {
		return nil, t.fault("answer", peer, err)
	}
	return b, nil
}

func (t *transport) answer(ctx context.Context, peer backend.Peer, raw []byte) ([]byte, error) {
	if err := checkPeer(peer); err != nil {
		return nil, err
	}
	o, err := parseOffer(raw)
	switch {
	case err != nil:
		return nil, err
	case o.target != t.self.Incarnation:
		return nil, backend.Errorf(backend.PeerGone, "the offer is for incarnation %x of this node, which is %x now", o.target, t.self.Incarnation)
	case o.initiator != peer.Incarnation:
		return nil, backend.Errorf(backend.BadRequest, "the offer is of incarnation %x", o.initiator)
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case !t.begin():
		return nil, errClosed
	}
	defer t.running.Done()
	// A node that was started again has nothing in flight from before.
	t.dropServed(func(c *served) bool { return c.peer.Node == peer.Node && c.peer.Incarnation != peer.Incarnation })
	c, err := t.served.enter(peer)
	if err != nil {
		return nil, err
	}
	a := answer{target: t.self.Incarnation}
	var failed several
	pairs, unpaired := t.pair(o.ends)
	for _, p := range pairs {
		path, err := t.serve(c, p, &o.ends[p.offered])
		if err != nil {
			failed = append(failed, err)
			continue
		}
		a.paths = append(a.paths, path)
	}
	ready := t.served.open(c)
	if len(a.paths) == 0 {
		t.dropServed(func(d *served) bool { return d == c })
		failed = append(failed, unpaired...)
		return nil, &backend.Error{Code: failed.code(), Err: failed, RetryAfter: t.settings.breakerPause}
	}
	for _, err := range failed {
		t.log.Warn("a path that a peer offered does not work, and is left out", "backend", t.info.Name, "peer", peer.String(), "error", err)
	}
	if ready != nil {
		return nil, ready
	}
	return a.encode(), nil
}

// pairing is an offered end, by its position, and the rail that serves it.
type pairing struct {
	offered int
	rail    *rail
	at      *station
}

// pair finds a rail for as many of the offered ends as it can: that of the same index, since networks that are apart
// are numbered alike at every host, and for what is left whichever fits. It returns in order, and says why ends are
// left over.
func (t *transport) pair(ends []end) (pairs []pairing, unpaired []error) {
	type candidate struct {
		rail *rail
		at   *station
		end  end
	}
	var free []candidate
	for i := range t.slots {
		r, err := t.rail(i)
		var at *station
		if err == nil {
			at, err = r.ready(&t.settings)
		}
		if err != nil {
			unpaired = append(unpaired, &backend.Error{Code: backend.PathDown, Err: err})
			continue
		}
		free = append(free, candidate{r, at, r.describe(at, &t.settings)})
	}
	left := make([]int, len(ends))
	for i := range left {
		left[i] = i
	}
	match := func(fits func(e *end, c *candidate) bool) {
		left = slices.DeleteFunc(left, func(i int) bool {
			k := slices.IndexFunc(free, func(c candidate) bool { return ends[i].fits(&c.end) == nil && fits(&ends[i], &c) })
			if k >= 0 {
				pairs = append(pairs, pairing{i, free[k].rail, free[k].at})
				free = slices.Delete(free, k, k+1)
			}
			return k >= 0
		})
	}
	match(func(e *end, c *candidate) bool { return e.rail == c.end.rail })
	match(func(*end, *candidate) bool { return true })
	slices.SortFunc(pairs, func(a, b pairing) int { return a.offered - b.offered })
	for _, i := range left {
		for k := range free {
			unpaired = append(unpaired, backend.Errorf(backend.Unsupported, "%s does not fit port %d of the peer: %v",
				free[k].rail.name, ends[i].rail, ends[i].fits(&free[k].end)))
		}
	}
	return pairs, unpaired
}

// serve makes the target's end of a path.
func (t *transport) serve(c *served, p pairing, e *end) (answeredPath, error) {
	r, s := p.rail, &t.settings
	if !r.users.Enter() {
		return answeredPath{}, lostRail(r)
	}
	lane := &servedLane{rail: r}
	c.mu.Lock()
	c.lanes = append(c.lanes, lane)
	c.mu.Unlock()
	own := r.describe(p.at, s)
	own.mtu = min(own.mtu, e.mtu)
	own.reads = max(1, min(e.reads, r.attr.MaxReadsServed, maxReads))
	own.psn = randomPSN()
	for i := range e.qpns {
		qp, err := r.dev.CreateQP(device.QPConfig{CQ: r.prober.cq, SendWRs: 1, SGEs: 1})
		if err == nil {
			lane.qps, lane.nums = append(lane.qps, qp), append(lane.nums, qp.Num())
			if err = qp.Init(r.port.Number, device.RemoteRead|device.RemoteWrite); err == nil {
				if err = qp.ReadyToReceive(s.receive(r, p.at, e, i, own.mtu, own.reads)); err == nil {
					err = qp.ReadyToSend(s.send(own.psn, 1))
				}
			}
		}
		if err != nil {
			return answeredPath{}, with(refusal(r, err), lane.close())
		}
	}
	own.qpns = lane.nums
	a := answeredPath{
		offered: p.offered, end: own, generation: r.generation,
		proofAddress: address(r.proof.bytes), proofKey: r.proof.mr.RKey(), proof: [proofSize]byte(r.proof.bytes),
	}
	if r.generation > 1 {
		a.fresh = t.fresh(r)
	}
	return a, nil
}

// fresh returns the keys of the regions that peers may reach over a rail.
func (t *transport) fresh(r *rail) map[backend.RegionID][]uint32 {
	fresh := make(map[backend.RegionID][]uint32)
	for id, region := range t.regions.All() {
		if g := region.rails[r.index].Load(); g != nil && g.rail == r && region.rights != 0 && len(fresh) < maxFresh {
			fresh[id] = g.rkeys
		}
	}
	return fresh
}

// close destroys the queue pairs that are left. After an error it can be called again, unless the rail is spent.
func (l *servedLane) close() error {
	if l.over {
		return nil
	}
	var failed error
	l.qps = slices.DeleteFunc(l.qps, func(qp device.QP) bool {
		err := qp.Close()
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", l.rail.name, err))
		}
		return err == nil || l.rail.spent.Load()
	})
	if l.over = len(l.qps) == 0; l.over {
		l.rail.users.Leave()
	}
	return failed
}

func (c *served) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	for _, l := range c.lanes {
		err = errors.Join(err, l.close())
	}
	return err
}

func (c *served) ended() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !slices.ContainsFunc(c.lanes, func(l *servedLane) bool { return !l.over })
}

// over tells whether one of the paths is over r.
func (c *served) over(r *rail) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.lanes, func(l *servedLane) bool { return l.rail == r })
}

// has tells whether a queue pair of r is one of the connection's.
func (c *served) has(r *rail, num uint32) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.lanes, func(l *servedLane) bool { return l.rail == r && slices.Contains(l.nums, num) })
}

// enter makes a place for a connection, or says Busy. Then the connections that there are are probed at once: a peer that
// keeps connecting has left some behind.
func (s *connections) enter(peer backend.Peer) (*served, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	same := 0
	for _, c := range s.m {
		if c.peer.Node == peer.Node {
			same++
		}
	}
	if len(s.m) >= s.limit || same >= s.limit/4 {
		for _, c := range s.m {
			c.hurry()
		}
		return nil, &backend.Error{Code: backend.Busy, RetryAfter: s.t.settings.probe,
			Text: fmt.Sprintf("this node serves %d connections, %d of them of this peer, and no more than %d (max_connections)", len(s.m), same, s.limit)}
	}
	s.lastID++
	c := &served{id: s.lastID, peer: peer, born: time.Now()}
	s.m[c.id] = c
	return c, nil
}

// leave gives up the place of a connection that has ended.
func (s *connections) leave(c *served) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.m, c.id)
}

// open puts a connection into service, unless one of its rails was lost meanwhile: whoever lost it has not seen it.
func (s *connections) open(c *served) error {
	s.mu.Lock()
	c.ready = true
	s.mu.Unlock()
	c.mu.Lock()
	i := slices.IndexFunc(c.lanes, func(l *servedLane) bool { return l.rail.ctx.Err() != nil })
	c.mu.Unlock()
	if i < 0 {
		return nil
	}
	s.t.dropServed(func(d *served) bool { return d == c })
	return lostRail(c.lanes[i].rail)
}

// drop ends the connections that are chosen. One that does not end for certain is an error, and stays.
func (s *connections) drop(chosen func(*served) bool) error {
	s.mu.Lock()
	var all []*served
	for _, c := range s.m {
		if c.ready {
			all = append(all, c)
		}
	}
	s.mu.Unlock()
	var failed error
	for _, c := range all {
		if !chosen(c) {
			continue
		}
		failed = errors.Join(failed, c.close())
		if c.ended() {
			s.leave(c)
		}
	}
	return failed
}

// probe probes the connections that are due.
func (s *connections) probe(now time.Time) {
	s.mu.Lock()
	all := make([]*served, 0, len(s.m))
	for _, c := range s.m {
		if c.ready {
			all = append(all, c)
		}
	}
	s.mu.Unlock()
	if len(all) == 0 {
		return
	}
	chain := s.t.lib.NewChain(1, 1)
	defer chain.Close()
	var dead []*served
	for _, c := range all {
		if err := c.probe(s.t, chain, now); err != nil {
			s.t.log.Debug("a connection that was served has ended", "backend", s.t.info.Name, "peer", c.peer.String(), "error", err)
			dead = append(dead, c)
		}
	}
	if len(dead) > 0 {
		s.t.dropServed(func(c *served) bool { return slices.Contains(dead, c) })
	}
}

// hurry makes the connection due for a probe.
func (c *served) hurry() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range c.lanes {
		if !l.waiting {
			l.probed = time.Time{}
		}
	}
}

// probe writes nothing to the peer over each path, when it is time to. The error says that a path is dead. The peer has
// the time of its connect_timeout, which this end cannot know, before it is probed for the first time.
func (c *served) probe(t *transport, chain *device.Chain, now time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range c.lanes {
		switch {
		case l.over:
			continue
		case l.waiting && now.Sub(l.probed) > t.settings.silence()+t.settings.probe:
			return fmt.Errorf("%s does not answer a probe", l.rail.name)
		case l.waiting, now.Sub(c.born) < t.settings.connectTimeout, now.Sub(l.probed) < t.settings.probe:
			continue
		}
		l.turn = (l.turn + 1) % len(l.qps)
		chain.WRs = append(chain.WRs[:0], device.WR{ID: c.id, Op: device.Write, Signaled: true})
		if _, err := l.qps[l.turn].Post(chain); err != nil {
			return fmt.Errorf("%s: %w", l.rail.name, err)
		}
		l.probed, l.waiting = now, true
		t.counts.probes.Add(1)
	}
	return nil
}

// answered notes the completion of a probe, or that there was none.
func (s *connections) answered(r *rail, completion *device.Completion) {
	s.mu.Lock()
	c := s.m[completion.ID]
	s.mu.Unlock()
	if c == nil || !c.answered(r, completion) {
		s.t.counts.strays.Add(1)
		return
	}
	if completion.Status != device.Success {
		s.t.log.Debug("a connection that was served has ended", "backend", s.t.info.Name, "peer", c.peer.String(),
			"port", r.name, "error", completion.Status.String())
		s.t.dropServed(func(d *served) bool { return d == c })
	}
}

func (c *served) answered(r *rail, completion *device.Completion) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range c.lanes {
		if l.rail == r && l.waiting && slices.Contains(l.nums, completion.QPN) {
			l.waiting = false
			return true
		}
	}
	return false
}

// prober has the completion queue of all the queue pairs that a rail serves. There is one probe at a time of each
// connection.
type prober struct {
	t    *transport
	rail *rail
	cq   device.CQ
	done chan struct{} // closed when run has ended; nil when it was never started
}

func newProber(t *transport, r *rail) (*prober, error) {
	cq, err := r.dev.CreateCQ(min(t.settings.maxConnections, r.attr.MaxCQE))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.name, err)
	}
	return &prober{t: t, rail: r, cq: cq}, nil
}

func (p *prober) start() {
	p.t.served.restrict(p.cq.Entries())
	p.done = make(chan struct{})
	go p.run()
}

// restrict lowers the limit to what a completion queue has room for.
func (s *connections) restrict(entries int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limit = min(s.limit, entries)
}

// run takes the completions of probes until the rail is lost or closed.
func (p *prober) run() {
	defer close(p.done)
	defer wakeAtEnd(p.rail.ctx, p.cq)()
	armed := false
	for p.rail.ctx.Err() == nil {
		completions, err := p.cq.Poll()
		for i := range completions {
			p.t.served.answered(p.rail, &completions[i])
		}
		p.t.counts.completions.Add(uint64(len(completions)))
		switch {
		case err != nil:
		case len(completions) > 0:
			continue
		case !armed:
			err = p.cq.Arm()
		default:
			err = p.cq.Wait(time.Time{})
		}
		if err != nil {
			p.t.loseRail(p.rail, fmt.Errorf("probes cannot be polled: %w", err))
			return
		}
		armed = !armed
	}
}

// close frees the completion queue. The queue pairs that it serves are closed, and the rail is lost.
func (p *prober) close() error {
	if p.done != nil {
		<-p.done
	}
	return p.cq.Close()
}
