package verbstest

import (
	"slices"
	"syscall"

	"github.com/umbp/umbp/plugins/rdma/device"
)

// Point is where a fault strikes: at a call, or at the carrying out of a work request.
type Point uint8

// The points. All but AtWR are calls, which Fault.Err refuses.
const (
	AtWR Point = iota
	AtDevices
	AtOpen
	AtPort
	AtGIDs
	AtRegister
	AtCreateCQ
	AtCreateQP
	AtInit
	AtReadyToReceive
	AtReadyToSend
	AtFail
	AtPost
	AtPoll
	AtArm
	AtWait
	AtCloseMR
	AtCloseQP
)

// Effect is what a fault does to a work request.
type Effect uint8

// The effects. Those from Hold on strike only work requests that are answered when all is well, so signaled
// ones.
const (
	// Complete answers with Fault.Status, when as many bytes as Fault.Landed says have moved. A remote status fails the
	// target's queue pair, too.
	Complete Effect = iota
	// Swallow loses the request, or with Fault.Landed its acknowledgement, as often as it is repeated.
	Swallow
	// Kill is a fatal error of the device that carries out the work request.
	Kill
	// Corrupt changes a byte on its way.
	Corrupt
	// Hold keeps back the completion, and all that follow on the queue pair, until Fabric.Release.
	Hold
	// Lose never tells of the completion.
	Lose
	// Duplicate tells of it twice.
	Duplicate
	// Foreign tells first of one with the same ID on a queue pair that does not exist.
	Foreign
	// Echo tells of it again at the next Fabric.Release, even when the queue pair is closed by then.
	Echo
)

// Landed is how much of a work request has moved when a fault ends it.
type Landed uint8

// The amounts.
const (
	Nothing Landed = iota
	Half
	All
)

func (l Landed) of(n uint64) uint64 {
	switch l {
	case All:
		return n
	case Half:
		return n / 2
	}
	return 0
}

// Fault is something to go wrong.
type Fault struct {
	At     Point
	Device string // by name; empty: any
	QPN    uint32 // zero: any
	// Match, unless nil, narrows AtWR to work requests that it wants. It must not call the fabric.
	Match func(device string, qpn uint32, wr device.WR) bool

	Skip  int // strikes after so many that would have been struck
	Times int // strikes so often; zero: once; negative: always

	Err  error // of a call. A syscall.Errno becomes a *device.Error
	Take int   // AtPost: work requests of the chain that are taken in spite of Err

	Effect Effect        // AtWR
	Status device.Status // of Complete
	Landed Landed        // of Complete, Swallow and Kill
	Stray  bool          // of Hold: completions are told of by Release even when the queue pair is closed by then
}

// Trigger is a fault that was injected.
type Trigger struct {
	fabric *Fabric
	fault  Fault
	seen   int
	hits   int
}

// Inject adds a fault. When several would strike the same, the one that was added first does.
func (f *Fabric) Inject(fault Fault) *Trigger {
	if fault.Device != "" {
		f.named(fault.Device)
	}
	if fault.Times == 0 {
		fault.Times = 1
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	t := &Trigger{fabric: f, fault: fault}
	f.faults = append(f.faults, t)
	return t
}

// Hits is how often the fault has struck.
func (t *Trigger) Hits() int {
	t.fabric.mu.Lock()
	defer t.fabric.mu.Unlock()
	return t.hits
}

// Remove ends the fault. What it holds stays held.
func (t *Trigger) Remove() {
	t.fabric.mu.Lock()
	defer t.fabric.mu.Unlock()
	t.fabric.faults = slices.DeleteFunc(t.fabric.faults, func(other *Trigger) bool { return other == t })
}

// err is the refusal of a call.
func (t *Trigger) err(d *opened, op string) error {
	if errno, ok := t.fault.Err.(syscall.Errno); ok {
		return d.error(op, errno)
	}
	return t.fault.Err
}

// strikes counts something that the fault is meant for.
func (t *Trigger) strikes() bool {
	t.seen++
	if t.seen <= t.fault.Skip || t.fault.Times >= 0 && t.hits >= t.fault.Times {
		return false
	}
	t.hits++
	return true
}

func (t *Trigger) meant(at Point, device string, qpn uint32) bool {
	return t.fault.At == at && (t.fault.Device == "" || t.fault.Device == device) &&
		(t.fault.QPN == 0 || t.fault.QPN == qpn)
}

// meetCall returns the fault that strikes a call, or nil.
func (f *Fabric) meetCall(at Point, device string, qpn uint32) *Trigger {
	for _, t := range f.faults {
		if t.meant(at, device, qpn) && t.strikes() {
			return t
		}
	}
	return nil
}

// meetWR returns the fault that strikes a work request, or nil.
func (f *Fabric) meetWR(q *queuePair, s *slot) *Trigger {
	for _, t := range f.faults {
		name := q.dev.hw.config.Name
		if t.meant(AtWR, name, q.num) && (t.fault.Effect < Hold || s.wr.Signaled) &&
			(t.fault.Match == nil || t.fault.Match(name, q.num, s.wr)) && t.strikes() {
			return t
		}
	}
	return nil
}

// fault is what strikes the work request; the zero Fault is not one, so Success says that nothing does.
func (s *slot) fault() *Fault {
	if s.trigger == nil {
		return &none
	}
	return &s.trigger.fault
}

// none completes with success, all bytes moved.
var none = Fault{Effect: Complete, Status: device.Success, Landed: All}

// refuse returns the error of a call that a device carries out, if it is to fail.
func (f *Fabric) refuse(d *opened, at Point, op string, qpn uint32) error {
	if d.dead {
		return d.error(op, syscall.EIO)
	}
	return f.refuseAlive(d.hw, at, op, qpn)
}

// refuseAlive is refuse for a call that a device with a fatal error still carries out.
func (f *Fabric) refuseAlive(hw *hardware, at Point, op string, qpn uint32) error {
	t := f.meetCall(at, hw.config.Name, qpn)
	if t == nil {
		return nil
	}
	if errno, ok := t.fault.Err.(syscall.Errno); ok {
		return &device.Error{Device: hw.config.Name, Op: op, Errno: errno}
	}
	return t.fault.Err
}

// Release delivers the completions that are held, and the echoes, and holds none from here on.
func (f *Fabric) Release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, hw := range f.hardware {
		for _, q := range hw.qps {
			q.holding = false
			for _, e := range q.held {
				q.cq.push(e)
			}
			q.held = nil
		}
	}
	for _, e := range f.strays {
		e.cq.push(e)
	}
	f.strays = nil
}

// Pause lets the device begin no further work request as initiator. What has begun ends; what is flushed is flushed.
// Posts are taken as always.
func (f *Fabric) Pause(device string) { f.allow(device, func(int) int { return 0 }) }

// Step lets the device begin n more work requests than it may already, and then no further one. Without a Pause before it,
// the device may begin n.
func (f *Fabric) Step(device string, n int) {
	f.allow(device, func(budget int) int { return max(budget, 0) + n })
}

// Resume ends a Pause.
func (f *Fabric) Resume(device string) { f.allow(device, func(int) int { return -1 }) }

func (f *Fabric) allow(device string, change func(budget int) int) {
	hw := f.named(device)
	f.mu.Lock()
	defer f.mu.Unlock()
	hw.budget = change(hw.budget)
	f.kickAll()
}

// kickAll lets every queue pair look again.
func (f *Fabric) kickAll() {
	for _, hw := range f.hardware {
		for _, q := range hw.qps {
			q.kick()
		}
	}
}

// Unplug makes everything vanish that goes to the device or comes from it, without an event, until Plug.
func (f *Fabric) Unplug(device string) { f.plug(device, true) }

// Plug ends Unplug. Requests that have not been given up meanwhile get through.
func (f *Fabric) Plug(device string) { f.plug(device, false) }

func (f *Fabric) plug(device string, unplug bool) {
	hw := f.named(device)
	f.mu.Lock()
	defer f.mu.Unlock()
	hw.unplug = unplug
	f.kickAll()
}

// SetPort takes a port down or up, which is an event. Requests through a port that is down vanish.
func (f *Fabric) SetPort(name string, port int, active bool) {
	hw := f.named(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	p := &hw.ports[port-1]
	p.Active, p.State = active, portState(active)
	kind := device.PortDown
	if active {
		kind = device.PortUp
	}
	hw.tell(device.Event{Kind: kind, Port: port})
	f.kickAll()
}

// SetGIDs changes the table of a port, which is an event. Requests to or from an address that is gone vanish.
func (f *Fabric) SetGIDs(name string, port int, table []device.GID) {
	hw := f.named(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	hw.ports[port-1].Table = slices.Clone(table)
	f.routes++
	hw.tell(device.Event{Kind: device.GIDChange, Port: port})
	f.kickAll()
}

// Break fails a queue pair of the device by itself, which is an event; number zero fails them all.
func (f *Fabric) Break(name string, qpn uint32) {
	hw := f.named(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, q := range hw.qps {
		if qpn == 0 || q.num == qpn {
			q.breakDown()
		}
	}
}

// LoseCQs loses every completion queue of the device, with its queue pairs, as an overflow does, which are events.
func (f *Fabric) LoseCQs(name string) {
	hw := f.named(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range hw.cqs {
		c.lose()
	}
}

// Fatal is a fatal error of the device: an event, and silence from then on. Nothing is completed any more, posts are
// taken until send queues are full, and calls that need the device fail with EIO. Closing works. The device cannot be
// opened until Repair.
func (f *Fabric) Fatal(name string) {
	hw := f.named(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kill(hw)
}

func (f *Fabric) kill(hw *hardware) {
	hw.fatal = true
	for d := range hw.opened {
		d.dead = true
	}
	hw.tell(device.Event{Kind: device.DeviceFatal})
	f.kickAll()
}

// Repair lets the device be opened again after Fatal. Who had it open then gets no further with that.
func (f *Fabric) Repair(name string) {
	hw := f.named(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	hw.fatal = false
}

// Tell makes e an event of a device, without anything else happening.
func (f *Fabric) Tell(name string, e device.Event) {
	hw := f.named(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	hw.tell(e)
}
