package verbstest

import (
	"runtime"
	"time"

	"github.com/umbp/umbp/plugins/rdma/device"
)

// kick sees to it that somebody carries out what is in the send queue.
func (q *queuePair) kick() {
	if q.running || q.closed || q.next == q.tail {
		return
	}
	q.running = true
	if q.dev.fabric.cfg.Instant {
		q.run()
		return
	}
	go func() {
		q.dev.fabric.mu.Lock()
		defer q.dev.fabric.mu.Unlock()
		q.run()
	}()
}

// run carries out work requests until there is none that may be. The lock is held, but not while bytes move.
func (q *queuePair) run() {
	f := q.dev.fabric
	for q.step() {
		if !f.cfg.Instant {
			f.mu.Unlock()
			runtime.Gosched()
			f.mu.Lock()
		}
	}
	q.running = false
	f.idle.Broadcast()
}

// step carries out the work request at next and reports whether there may be one after it.
func (q *queuePair) step() bool {
	f, hw := q.dev.fabric, q.dev.hw
	if q.closed || q.dev.dead || q.next == q.tail {
		return false
	}
	if q.state == Failed {
		q.flush()
		return false
	}
	s := q.slot(q.next)
	if !s.begun {
		if hw.budget == 0 {
			return false
		}
		if hw.budget > 0 {
			hw.budget--
		}
		s.begun = true
		s.trigger = f.meetWR(q, s)
	}
	if s.moved {
		return q.unanswered()
	}
	fault := s.fault()
	if status := q.local(s); status != device.Success {
		return q.complete(s, status)
	}
	if fault.Effect == Swallow && fault.Landed == Nothing {
		return q.unanswered()
	}
	t := q.reach()
	if t == nil {
		return q.unanswered()
	}
	q.calm()
	remote, status := t.serve(q, s)
	if status != device.Success {
		t.breakDown()
		return q.complete(s, status)
	}
	length := s.length()
	switch fault.Effect {
	case Complete, Kill, Swallow:
		length = fault.Landed.of(length)
	}
	if !q.move(s, t, remote, length, fault.Effect == Corrupt) {
		return true // something ended meanwhile: look again
	}
	switch fault.Effect {
	case Kill:
		f.kill(hw)
		return false
	case Swallow:
		s.moved = true
		return q.unanswered()
	case Complete:
		switch fault.Status {
		case device.RemoteInvalid, device.RemoteAccess, device.RemoteOperation:
			t.breakDown()
		}
		return q.complete(s, fault.Status)
	}
	return q.complete(s, device.Success)
}

// breakDown fails a queue pair by itself, which is an event.
func (q *queuePair) breakDown() {
	q.state = Failed
	q.dev.tell(device.Event{Kind: device.QPFailed, QPN: q.num})
	q.kick()
}

// local checks what the device checks at its own end, and finds the memory.
func (q *queuePair) local(s *slot) device.Status {
	attr := &q.dev.hw.config.Attr
	if s.wr.Op == device.Read && (len(s.sges) > attr.MaxSGERead || q.send.ReadsInitiated == 0) {
		return device.LocalQPOperation
	}
	if s.length() > q.dev.hw.ports[q.port-1].MaxMessage {
		return device.LocalLength
	}
	q.regions, q.views = q.regions[:0], q.views[:0]
	var r *region
	for i := range s.sges {
		e := &s.sges[i]
		if r == nil || r.lkey != e.LKey {
			r = q.dev.hw.lkeys[e.LKey]
		}
		if r == nil || r.dev != q.dev || !r.covers(e.Addr, uint64(e.Length)) ||
			s.wr.Op == device.Read && r.access&device.LocalWrite == 0 {
			return device.LocalProtection
		}
		q.regions = append(q.regions, r)
		q.views = append(q.views, r.slice(e.Addr, uint64(e.Length)))
	}
	return device.Success
}

// serve checks what t, the target, checks for a request of q, and finds the memory; there is none for no bytes.
func (t *queuePair) serve(q *queuePair, s *slot) (*region, device.Status) {
	right := device.RemoteWrite
	if s.wr.Op == device.Read {
		right = device.RemoteRead
		if q.send.ReadsInitiated > t.receive.ReadsServed && q.readsAtOnce(t.receive.ReadsServed) {
			return nil, device.RemoteInvalid
		}
	}
	length := s.length()
	if t.access&right == 0 || t.receive.MTU != q.receive.MTU && length > uint64(min(t.receive.MTU, q.receive.MTU)) {
		return nil, device.RemoteInvalid
	}
	if length == 0 {
		return nil, device.Success
	}
	r := t.dev.hw.rkeys[s.wr.RKey]
	if r == nil || r.dev != t.dev || r.access&right == 0 || !r.covers(s.wr.Remote, length) {
		return nil, device.RemoteAccess
	}
	return r, device.Success
}

// readsAtOnce says whether more than limit reads are outstanding, from next on.
func (q *queuePair) readsAtOnce(limit int) bool {
	for i := range uint64(limit) + 1 {
		if q.next+i == q.tail || q.slot(q.next+i).wr.Op != device.Read {
			return false
		}
	}
	return true
}

func (s *slot) length() uint64 {
	var n uint64
	for i := range s.sges {
		n += uint64(s.sges[i].Length)
	}
	return n
}

// move moves the first bytes of a work request, without the lock, and reports whether it may be answered. Not so when
// either queue pair has ended meanwhile.
func (q *queuePair) move(s *slot, t *queuePair, remote *region, length uint64, corrupt bool) bool {
	f := q.dev.fabric
	f.counts.Bytes += length
	if length == 0 || f.cfg.NoBytes {
		return true
	}
	far := remote.slice(s.wr.Remote, length)
	for _, r := range q.regions {
		r.users++
	}
	remote.users++
	t.serving++
	f.mu.Unlock()
	for _, near := range q.views {
		n := min(len(near), len(far))
		if s.wr.Op == device.Write {
			copy(far[:n], near)
		} else {
			copy(near, far[:n])
		}
		if corrupt && n > 0 {
			corrupt = false
			if s.wr.Op == device.Write {
				far[0] ^= 0xff
			} else {
				near[0] ^= 0xff
			}
		}
		far = far[n:]
	}
	f.mu.Lock()
	t.serving--
	remote.users--
	for _, r := range q.regions {
		r.users--
	}
	f.idle.Broadcast()
	if t.state == Failed {
		s.moved = true // the acknowledgement is lost
		return false
	}
	return q.state == ReadyToSend && !q.dev.dead
}

// unanswered waits for an answer to the request at next, or gives it up when it has waited enough.
func (q *queuePair) unanswered() bool {
	if q.expired {
		return q.complete(q.slot(q.next), device.RetriesExceeded)
	}
	if q.patient == nil {
		var timer *time.Timer
		timer = time.AfterFunc(q.dev.fabric.cfg.Retry, func() {
			q.dev.fabric.mu.Lock()
			defer q.dev.fabric.mu.Unlock()
			if q.patient == timer {
				q.expired = true
				q.kick()
			}
		})
		q.patient = timer
	}
	return false
}

// calm ends the waiting for an answer.
func (q *queuePair) calm() {
	if q.patient != nil {
		q.patient.Stop()
		q.patient = nil
	}
	q.expired = false
}

// complete answers the work request at next, and ends the queue pair when the answer is an error.
func (q *queuePair) complete(s *slot, status device.Status) bool {
	if status == device.Success && !s.wr.Signaled {
		q.calm()
		q.next++
		return true
	}
	fault := s.fault()
	q.holding = q.holding || fault.Effect == Hold
	q.stray = q.stray || fault.Effect == Hold && fault.Stray
	e := completion{cq: q.cq, qp: q, sequence: q.next, Completion: device.Completion{
		ID: s.wr.ID, QPN: q.num, Status: status,
	}}
	if status != device.Success {
		e.Vendor = vendor
		q.state = Failed
	}
	q.calm()
	q.next++
	switch fault.Effect {
	case Lose:
	case Duplicate:
		q.deliver(e)
		q.deliver(e)
	case Foreign:
		stray := e
		stray.qp, stray.QPN = nil, foreign
		q.deliver(stray)
		q.deliver(e)
	case Echo:
		q.deliver(e)
		e.qp = nil
		q.dev.fabric.strays = append(q.dev.fabric.strays, e)
	default:
		q.deliver(e)
	}
	return true
}

// vendor is what simulated errors have for the device's own word.
const vendor = 0x51

// foreign is a number that no queue pair has.
const foreign = 0xffffff

// flush answers all that is left.
func (q *queuePair) flush() {
	q.calm()
	for ; q.next < q.tail; q.next++ {
		s := q.slot(q.next)
		q.deliver(completion{cq: q.cq, qp: q, sequence: q.next, Completion: device.Completion{
			ID: s.wr.ID, QPN: q.num, Status: device.Flushed, Vendor: vendor,
		}})
	}
}

// deliver hands a completion to the completion queue, or keeps it when completions are held.
func (q *queuePair) deliver(e completion) {
	if q.holding {
		q.held = append(q.held, e)
		return
	}
	q.cq.push(e)
}

// reach returns the queue pair that hears q, or nil.
func (q *queuePair) reach() *queuePair {
	f, hw := q.dev.fabric, q.dev.hw
	if q.routes != f.routes {
		q.resolve()
	}
	p := q.peer
	if p == nil || p.unplug || hw.unplug || !p.ports[q.peerPort-1].Active || !hw.ports[q.port-1].Active {
		return nil
	}
	t := p.qps[q.receive.RemoteQPN]
	if t == nil || t.dev.dead || t.state != ReadyToReceive && t.state != ReadyToSend ||
		t.port != q.peerPort || t.receive.RemoteQPN != q.num || t.receive.RemotePSN != q.send.PSN {
		return nil
	}
	if q.receive.Link == device.InfiniBand {
		if t.receive.RemoteLID != hw.ports[q.port-1].LID {
			return nil
		}
	} else if t.receive.RemoteGID != q.source.Addr || t.source.Addr != q.receive.RemoteGID ||
		t.source.Type != q.source.Type {
		return nil
	}
	return t
}

// resolve looks up where the peer is.
func (q *queuePair) resolve() {
	q.routes, q.peer = q.dev.fabric.routes, nil
	if own, ok := q.dev.hw.ports[q.port-1].at(q.source.Index); !ok || own != q.source {
		return
	}
	for _, hw := range q.dev.fabric.hardware {
		for i := range hw.ports {
			if hw.ports[i].answers(&q.receive, q.source.Type) {
				q.peer, q.peerPort = hw, i+1
			}
		}
	}
}

// answers says whether a port has the address that a queue pair sends to.
func (p *PortConfig) answers(a *device.ReceiveAttr, as device.GIDType) bool {
	if p.Link != a.Link {
		return false
	}
	if p.Link == device.InfiniBand {
		return p.LID == a.RemoteLID
	}
	for _, g := range p.Table {
		if g.Addr == a.RemoteGID && g.Type == as {
			return true
		}
	}
	return false
}
