package verbstest

import (
	"fmt"
	"math/bits"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/umbp/umbp/plugins/rdma/device"
)

// State is the state of a queue pair.
type State uint8

// The states.
const (
	Reset State = iota
	Initialized
	ReadyToReceive
	ReadyToSend
	Failed
)

func (s State) String() string {
	switch s {
	case Initialized:
		return "INIT"
	case ReadyToReceive:
		return "RTR"
	case ReadyToSend:
		return "RTS"
	case Failed:
		return "ERR"
	}
	return "RESET"
}

// slot is a work request in a send queue.
type slot struct {
	wr      device.WR
	sges    []device.SGE
	begun   bool
	moved   bool // its bytes have moved, though it has no answer
	trigger *Trigger
}

type queuePair struct {
	dev     *opened
	cq      *completionQueue
	num     uint32
	caps    device.Caps
	posting atomic.Bool

	state   State
	closed  bool
	port    int
	access  device.Access
	receive device.ReceiveAttr
	send    device.SendAttr

	source   device.GID // its own address
	routes   int        // Fabric.routes when peer was looked up
	peer     *hardware  // where RemoteGID is; nil when it is nowhere
	peerPort int

	// Sequence numbers of work requests: free ≤ next ≤ tail ≤ free + len(slots). What is before next is answered.
	slots            []slot
	free, next, tail uint64

	running bool // a goroutine carries out work requests
	serving int  // work requests of others that move bytes for this queue pair now
	patient *time.Timer
	expired bool // the request at next had no answer for Config.Retry

	holding bool // completions are held
	stray   bool // those that are held outlive the queue pair
	held    []completion

	regions []*region // scratch of the work request that is carried out
	views   [][]byte
}

func newQueuePair(d *opened, cq *completionQueue, cfg device.QPConfig) *queuePair {
	hw := d.hw
	for hw.lastQPN = (hw.lastQPN + 1) & 0xffffff; hw.lastQPN < 17 || hw.qps[hw.lastQPN] != nil; {
		hw.lastQPN = (hw.lastQPN + 1) & 0xffffff
	}
	caps := device.Caps{SendWRs: cfg.SendWRs, SGEs: cfg.SGEs}
	if hw.config.RoundUp {
		caps.SendWRs = min(roundUp(caps.SendWRs), hw.config.Attr.MaxWR)
		caps.SGEs = min(roundUp(caps.SGEs), hw.config.Attr.MaxSGE)
	}
	q := &queuePair{dev: d, cq: cq, num: hw.lastQPN, caps: caps, slots: make([]slot, caps.SendWRs)}
	hw.qps[q.num] = q
	d.objects++
	cq.qps++
	return q
}

func roundUp(n int) int { return 1 << bits.Len(uint(n-1)) }

func (q *queuePair) Num() uint32       { return q.num }
func (q *queuePair) Caps() device.Caps { return q.caps }

func (q *queuePair) Init(port int, access device.Access) error {
	q.lock("Init")
	defer q.dev.fabric.mu.Unlock()
	if err := q.dev.fabric.refuse(q.dev, AtInit, "init", q.num); err != nil {
		return err
	}
	if q.state != Reset || port < 1 || port > len(q.dev.hw.ports) {
		return q.dev.error("init", syscall.EINVAL)
	}
	q.state, q.port, q.access = Initialized, port, access
	return nil
}

func (q *queuePair) ReadyToReceive(a device.ReceiveAttr) error {
	q.lock("ReadyToReceive")
	defer q.dev.fabric.mu.Unlock()
	const op = "ready to receive"
	if err := q.dev.fabric.refuse(q.dev, AtReadyToReceive, op, q.num); err != nil {
		return err
	}
	if q.state != Initialized || a.Port != q.port {
		return q.dev.error(op, syscall.EINVAL)
	}
	port := &q.dev.hw.ports[q.port-1]
	source, known := port.at(a.GIDIndex)
	switch {
	case !known, a.Link != port.Link, a.RemoteQPN > 0xffffff, a.RemotePSN > 0xffffff,
		a.MTU < 256 || a.MTU > port.MTU || a.MTU&(a.MTU-1) != 0,
		a.ReadsServed < 0 || a.ReadsServed > q.dev.hw.config.Attr.MaxReadsServed,
		a.MinRNRTimer < 0 || a.MinRNRTimer > 31,
		a.TrafficClass < 0 || a.TrafficClass > 255, a.ServiceLevel < 0 || a.ServiceLevel > 15,
		a.HopLimit < 0 || a.HopLimit > 255:
		return q.dev.error(op, syscall.EINVAL)
	case port.Link == device.Ethernet && isV4(source.Addr) != isV4(a.RemoteGID), !port.Active:
		return q.dev.error(op, syscall.ENETUNREACH)
	}
	q.source, q.receive = source, a
	q.resolve()
	if q.peer == nil && port.Link == device.Ethernet {
		return q.dev.error(op, syscall.ETIMEDOUT)
	}
	q.state = ReadyToReceive
	return nil
}

func isV4(addr [16]byte) bool {
	return [12]byte(addr[:12]) == [12]byte{10: 0xff, 11: 0xff}
}

func (q *queuePair) ReadyToSend(a device.SendAttr) error {
	q.lock("ReadyToSend")
	defer q.dev.fabric.mu.Unlock()
	const op = "ready to send"
	if err := q.dev.fabric.refuse(q.dev, AtReadyToSend, op, q.num); err != nil {
		return err
	}
	switch {
	case q.state != ReadyToReceive, a.PSN > 0xffffff, a.Timeout < 1 || a.Timeout > 31,
		a.Retries < 0 || a.Retries > 7, a.RNRRetries < 0 || a.RNRRetries > 6,
		a.ReadsInitiated < 0 || a.ReadsInitiated > q.dev.hw.config.Attr.MaxReadsInitiated:
		return q.dev.error(op, syscall.EINVAL)
	}
	q.state, q.send = ReadyToSend, a
	return nil
}

func (q *queuePair) Fail() error {
	q.lock("Fail")
	defer q.dev.fabric.mu.Unlock()
	if err := q.dev.fabric.refuse(q.dev, AtFail, "fail", q.num); err != nil {
		return err
	}
	q.state = Failed
	q.kick()
	return nil
}

func (q *queuePair) Post(c *device.Chain) (int, error) {
	f := q.dev.fabric
	f.calls.Add(1)
	if q.posting.Swap(true) {
		panic(fmt.Sprintf("verbstest: two goroutines post to queue pair %d of %s", q.num, q.dev.hw.config.Name))
	}
	defer q.posting.Store(false)
	q.lock("Post")
	defer f.mu.Unlock()
	taken, err := q.take(c)
	f.count(q, c, taken, err)
	if taken > 0 {
		q.kick()
	}
	return taken, err
}

// take copies as much of the chain into the send queue as is allowed there.
func (q *queuePair) take(c *device.Chain) (int, error) {
	const op = "post"
	if q.state != ReadyToSend && q.state != Failed {
		return 0, q.dev.error(op, syscall.EINVAL)
	}
	limit := len(c.WRs)
	t := q.dev.fabric.meetCall(AtPost, q.dev.hw.config.Name, q.num)
	if t != nil {
		limit = min(limit, t.fault.Take)
	}
	all := slices.Clip(c.SGEs) // a work request that names more of them is a defect, and panics
	for i := range c.WRs[:limit] {
		wr := &c.WRs[i]
		sges := all[wr.FirstSGE:][:wr.SGEs]
		if q.tail-q.free == uint64(len(q.slots)) {
			return i, q.dev.error(op, syscall.ENOMEM)
		}
		if len(sges) > q.caps.SGEs || wr.Op > device.Read {
			return i, q.dev.error(op, syscall.EINVAL)
		}
		for j := range sges {
			if sges[j].Length == 0 {
				return i, q.dev.error(op, syscall.EINVAL)
			}
		}
		s := q.slot(q.tail)
		*s = slot{wr: *wr, sges: append(s.sges[:0], sges...)}
		q.tail++
	}
	if t != nil {
		return limit, t.err(q.dev, op)
	}
	return limit, nil
}

func (q *queuePair) slot(sequence uint64) *slot { return &q.slots[sequence%uint64(len(q.slots))] }

func (q *queuePair) Close() error {
	f := q.dev.fabric
	q.lock("Close")
	defer f.mu.Unlock()
	if err := f.refuseAlive(q.dev.hw, AtCloseQP, "destroy queue pair", q.num); err != nil {
		return err
	}
	if q.posting.Load() {
		panic(fmt.Sprintf("verbstest: queue pair %d of %s closed while somebody posts", q.num, q.dev.hw.config.Name))
	}
	q.closed = true
	q.state = Failed
	delete(q.dev.hw.qps, q.num)
	q.calm()
	for q.running || q.serving != 0 {
		f.idle.Wait()
	}
	q.cq.forget(q)
	if q.stray {
		for _, e := range q.held {
			e.qp = nil
			f.strays = append(f.strays, e)
		}
	}
	q.held = nil
	q.cq.qps--
	q.dev.objects--
	return nil
}

func (q *queuePair) lock(call string) {
	q.dev.fabric.mu.Lock()
	if q.closed {
		q.dev.fabric.mu.Unlock()
		panic(fmt.Sprintf("verbstest: %s on queue pair %d of %s, which is closed", call, q.num, q.dev.hw.config.Name))
	}
}
