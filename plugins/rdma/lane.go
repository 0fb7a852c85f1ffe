package rdma

import (
	"fmt"
	"math/bits"
	"sync/atomic"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/device"
)

// lane is one queue pair, with its ledger.
//
// Work requests are numbered in the order in which they are dealt to the lane, and the number is the ID of the work
// request. They begin at one: zero was the proof that was read when the connection was set up, so that a completion of it
// that comes again answers nothing. Three numbers are the whole account:
//
//	answered ≤ handed ≤ dealt
//
// What is above answered takes room in the send queue, so the credits of the lane are size - (dealt - answered): every
// work request counts, signaled or not, of a transfer or a probe. What is above handed the device has not seen.
//
// Completions come in the order of posting, and one that succeeds answers for all that was posted before it. So only the
// last work request of each part is signaled.
type lane struct {
	poller *poller
	qp     device.QP
	num    uint32
	size   int // work requests in the send queue

	// handed is advanced by the pumper before it posts: a completion may come before Post returns. Where Post did not
	// take everything, it is set back.
	handed atomic.Uint64
	filled uint64 // number of the first part that is not in the chain yet; of the pumper

	// Guarded by endpoint.mu. The pumper, who alone adds parts, reads those that he has added without it.
	dealt, answered uint64
	ring            []part // parts head to tail, each at its number modulo the length, which is a power of two
	head, tail      uint64
	status          device.Status // of the first completion that was not a success
	failed          uint64        // the work request that it answered
}

// part is a run of work requests of one transfer in the ledger of a lane. Its last one is signaled.
type part struct {
	transfer *transfer // nil for a probe, which is one work request of no bytes
	first    int       // index of its first work request in the transfer's plan
	count    int
	bytes    uint64
	last     uint64 // number of its last work request on the lane
}

func newLane(p *poller, qp device.QP, size int) *lane {
	return &lane{
		poller: p, qp: qp, num: qp.Num(), size: size,
		ring: make([]part, 1<<bits.Len(uint(size-1))), // a part has one work request at least
	}
}

func (l *lane) part(number uint64) *part { return &l.ring[number&uint64(len(l.ring)-1)] }

// room returns the credits of the lane. The caller holds endpoint.mu.
func (l *lane) room() int { return l.size - int(l.dealt-l.answered) }

// busy tells whether the device owes a completion. The caller holds endpoint.mu.
func (l *lane) busy() bool { return l.answered < l.handed.Load() }

// deal enters the next count work requests of a transfer, which have so many bytes, or a probe. The lane has room for
// them. The caller is the pumper, and holds endpoint.mu.
func (l *lane) deal(t *transfer, count int, bytes uint64) {
	p := l.part(l.tail)
	l.tail++
	l.dealt += uint64(count)
	l.poller.bytes += bytes
	*p = part{transfer: t, count: count, bytes: bytes, last: l.dealt}
	if t != nil {
		p.first = t.dealt
		t.dealt += count
		t.open += count
	}
}

// post hands what was dealt to the device: with one doorbell, unless it is more than the chain holds. The chain is empty
// before and after. The caller is the pumper, and does not hold endpoint.mu.
func (l *lane) post(c *device.Chain) error {
	id := l.handed.Load()
	for ; l.filled != l.tail; l.filled++ {
		p := l.part(l.filled)
		t := p.transfer
		if t == nil { // nothing is before it: a probe goes to a lane that is idle
			id++
			c.WRs = append(c.WRs, device.WR{ID: id, Op: device.Write, Signaled: true})
			continue
		}
		s := t.session
		keys := &s.keys[l.poller.index]
		op := device.Write
		if t.op == backend.Read {
			op = device.Read
		}
		for i := range t.plan.WRs[p.first:][:p.count] {
			w := &t.plan.WRs[p.first+i]
			if len(c.WRs) == cap(c.WRs) || len(c.SGEs)+int(w.SGEs) > cap(c.SGEs) {
				if err := l.submit(c, id); err != nil {
					return err
				}
			}
			id++
			c.WRs = append(c.WRs, device.WR{
				ID: id, Remote: s.farBase + w.Remote, RKey: keys.far[w.Remote>>s.farShift],
				FirstSGE: uint32(len(c.SGEs)), SGEs: uint16(w.SGEs), Op: op, Signaled: id == p.last,
			})
			for _, g := range t.plan.SGEs[w.FirstSGE:][:w.SGEs] {
				c.SGEs = append(c.SGEs, device.SGE{
					Addr: s.nearBase + g.Local, Length: g.Length, LKey: keys.near[g.Local>>s.nearShift],
				})
			}
		}
	}
	return l.submit(c, id)
}

// submit posts the chain, whose last work request is last.
func (l *lane) submit(c *device.Chain, last uint64) error {
	counts := &l.poller.endpoint.t.counts
	counts.workRequests.Add(uint64(len(c.WRs)))
	counts.sges.Add(uint64(len(c.SGEs)))
	counts.posts.Add(1)
	l.handed.Store(last)
	taken, err := l.qp.Post(c)
	if err != nil {
		l.handed.Store(last - uint64(len(c.WRs)-taken))
	}
	c.WRs, c.SGEs = c.WRs[:0], c.SGEs[:0]
	return err
}

// book enters a completion, and tells whether it answers anything: one that came before does not, nor one of a work
// request that is not outstanding. The caller holds endpoint.mu and the right to poll.
func (l *lane) book(c *device.Completion) bool {
	switch {
	case c.ID <= l.answered || c.ID > l.handed.Load():
		return false
	case l.status != device.Success:
		if c.Status == device.Success {
			return false // after an error, everything is flushed
		}
		l.answered = c.ID
	case c.Status == device.Success:
		l.retire(c.ID)
	default:
		if kindOf(c.Status) != unknown {
			l.retire(c.ID - 1)
		}
		l.answered = c.ID
		l.status, l.failed = c.Status, c.ID
		l.poller.endpoint.failLocked(l.failure(c), false)
	}
	return true
}

// retire enters that everything up to the work request last is done.
func (l *lane) retire(last uint64) {
	for ; l.head != l.tail; l.head++ {
		p := l.part(l.head)
		if p.last > last {
			break
		}
		l.poller.bytes -= p.bytes
		if p.transfer != nil {
			p.transfer.retire(p, l.poller)
		}
	}
	l.answered = last
}

// abandon empties the ledger and enters in the transfers what became of their work requests. The queue pair is closed:
// nothing touches the memory of this end any more.
func (l *lane) abandon() {
	v := verdict{status: l.status, failed: l.failed, handed: l.handed.Load()}
	for ; l.head != l.tail; l.head++ {
		p := l.part(l.head)
		t := p.transfer
		first := p.last - uint64(p.count) + 1
		culprit := kindOf(l.status) != unknown && first <= l.failed && l.failed <= p.last
		if t == nil {
			continue
		}
		if culprit {
			v.op = t.op
			t.culprit = p.first + int(l.failed-first)
		}
		for i := range p.count {
			t.fates[p.first+i] = v.fate(first+uint64(i), t.op)
		}
		t.open -= p.count
	}
}

// failure says, for people, which completion broke the endpoint.
func (l *lane) failure(c *device.Completion) *backend.Error {
	return &backend.Error{
		Code: backend.PathDown, Text: fmt.Sprintf("queue pair %#x of %s failed", l.num, l.poller.path.rail.name),
		Vendor: int(c.Vendor), VendorText: c.Status.String(),
	}
}

// kind is what the status of a work request tells about it and its neighbours on the lane. Where it tells anything, what
// was posted before is done.
type kind uint8

const (
	unknown kind = iota // nothing: it was flushed, or never answered, or the device is sick
	refused             // the target said no, and carries out nothing that was posted after
	local               // this end could not send it, and sends nothing that was posted after; or not store the answer
	silent              // the target does not answer: it may have carried out anything or nothing
)

func kindOf(s device.Status) kind {
	switch s {
	case device.RemoteInvalid, device.RemoteAccess, device.RemoteOperation:
		return refused
	case device.LocalLength, device.LocalQPOperation, device.LocalProtection:
		return local
	case device.RetriesExceeded, device.RNRExceeded:
		return silent
	}
	return unknown
}

// verdict is what is known of the work requests of a lane that are not answered with success, now that its queue pair is
// closed.
type verdict struct {
	status device.Status // of the first completion that was no success
	failed uint64        // the work request that it answered
	op     backend.Op    // what that was
	handed uint64        // the last one that the device has seen
}

// fate returns what became of a work request. What has left this host may still be stored at the target: a write that
// the target did not refuse is in doubt.
func (v *verdict) fate(id uint64, op backend.Op) backend.Outcome {
	k := kindOf(v.status)
	switch {
	case id > v.handed:
		return backend.NotSent
	case k != unknown && id < v.failed:
		return backend.Done
	case k == refused && id == v.failed:
		return backend.Failed
	case k == refused:
		return backend.NotSent
	case k == local && id > v.failed && v.op == backend.Write:
		return backend.NotSent // a read fails here when its answer comes, and what was posted after it has left by then
	case op == backend.Write:
		return backend.InDoubt
	}
	return backend.Failed
}
