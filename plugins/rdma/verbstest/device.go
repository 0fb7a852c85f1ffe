package verbstest

import (
	"os"
	"slices"
	"sync"
	"syscall"

	"github.com/umbp/umbp/plugins/rdma/device"
)

// opened is a device that somebody has opened: the protection domain of what is made of it.
type opened struct {
	fabric *Fabric
	hw     *hardware

	news    sync.Cond // of events and closed
	events  []device.Event
	objects int // that are not closed yet
	closed  bool
	dead    bool // the device has failed since
}

func (d *opened) Attr() device.Attr { return d.hw.config.Attr }

func (d *opened) Port(number int) (device.Port, error) {
	d.lock("Port")
	defer d.fabric.mu.Unlock()
	if err := d.fabric.refuse(d, AtPort, "query port", 0); err != nil {
		return device.Port{}, err
	}
	if number < 1 || number > len(d.hw.ports) {
		return device.Port{}, d.error("query port", syscall.EINVAL)
	}
	return d.hw.ports[number-1].Port, nil
}

func (d *opened) GIDs(port int) ([]device.GID, error) {
	d.lock("GIDs")
	defer d.fabric.mu.Unlock()
	if err := d.fabric.refuse(d, AtGIDs, "query GIDs", 0); err != nil {
		return nil, err
	}
	if port < 1 || port > len(d.hw.ports) {
		return nil, d.error("query GIDs", syscall.EINVAL)
	}
	return slices.Clone(d.hw.ports[port-1].Table), nil
}

func (d *opened) Register(memory []byte, access device.Access) (device.MR, error) {
	d.lock("Register")
	defer d.fabric.mu.Unlock()
	if err := d.fabric.refuse(d, AtRegister, "register", 0); err != nil {
		return nil, err
	}
	attr := &d.hw.config.Attr
	switch {
	case len(memory) == 0, uint64(len(memory)) > attr.MaxMRSize,
		access&device.RemoteWrite != 0 && access&device.LocalWrite == 0:
		return nil, d.error("register", syscall.EINVAL)
	case len(d.hw.lkeys) >= attr.MaxMR:
		return nil, d.error("register", syscall.ENOMEM)
	}
	// Odd numbers are local keys, even ones remote keys.
	d.hw.lastKey += 2
	r := &region{dev: d, memory: memory, base: address(memory), access: access,
		lkey: d.hw.lastKey | 1, rkey: d.hw.lastKey &^ 1}
	d.hw.lkeys[r.lkey], d.hw.rkeys[r.rkey] = r, r
	d.objects++
	return r, nil
}

func (d *opened) CreateCQ(entries int) (device.CQ, error) {
	d.lock("CreateCQ")
	defer d.fabric.mu.Unlock()
	if err := d.fabric.refuse(d, AtCreateCQ, "create completion queue", 0); err != nil {
		return nil, err
	}
	switch {
	case entries < 1 || entries > d.hw.config.Attr.MaxCQE:
		return nil, d.error("create completion queue", syscall.EINVAL)
	case len(d.hw.cqs) >= d.hw.config.Attr.MaxCQ:
		return nil, d.error("create completion queue", syscall.ENOMEM)
	}
	cq := newCompletionQueue(d, entries)
	d.hw.cqs[cq] = struct{}{}
	d.objects++
	return cq, nil
}

func (d *opened) CreateQP(cfg device.QPConfig) (device.QP, error) {
	d.lock("CreateQP")
	defer d.fabric.mu.Unlock()
	if err := d.fabric.refuse(d, AtCreateQP, "create queue pair", 0); err != nil {
		return nil, err
	}
	attr := &d.hw.config.Attr
	cq, ok := cfg.CQ.(*completionQueue)
	switch {
	case !ok || cq.dev != d || cq.closed,
		cfg.SendWRs < 1 || cfg.SendWRs > attr.MaxWR, cfg.SGEs < 1 || cfg.SGEs > attr.MaxSGE:
		return nil, d.error("create queue pair", syscall.EINVAL)
	case len(d.hw.qps) >= attr.MaxQP:
		return nil, d.error("create queue pair", syscall.ENOMEM)
	}
	return newQueuePair(d, cq, cfg), nil
}

func (d *opened) NextEvent() (device.Event, error) {
	d.fabric.mu.Lock()
	defer d.fabric.mu.Unlock()
	for len(d.events) == 0 && !d.closed {
		d.news.Wait()
	}
	if d.closed {
		return device.Event{}, os.ErrClosed
	}
	e := d.events[0]
	d.events = d.events[1:]
	if cq, ok := e.CQ.(*completionQueue); ok && cq.closed {
		e.CQ = nil
	}
	return e, nil
}

func (d *opened) Close() error {
	d.lock("Close")
	defer d.fabric.mu.Unlock()
	if d.objects != 0 {
		return d.error("close", syscall.EBUSY)
	}
	d.closed = true
	delete(d.hw.opened, d)
	d.news.Broadcast()
	return nil
}

// lock takes the lock of the fabric for a call on an open device.
func (d *opened) lock(call string) {
	d.fabric.mu.Lock()
	if d.closed {
		d.fabric.mu.Unlock()
		panic("verbstest: " + call + " on " + d.hw.config.Name + ", which is closed")
	}
}

func (d *opened) error(op string, errno syscall.Errno) error {
	return &device.Error{Device: d.hw.config.Name, Op: op, Errno: errno}
}

// tell makes e an event of d.
func (d *opened) tell(e device.Event) {
	e.Text = "simulated " + e.Kind.String()
	d.events = append(d.events, e)
	d.news.Broadcast()
}

// tell makes e an event of everybody who has opened the device.
func (hw *hardware) tell(e device.Event) {
	for d := range hw.opened {
		d.tell(e)
	}
}

// region is registered memory.
type region struct {
	dev        *opened
	memory     []byte
	base       uint64
	access     device.Access
	lkey, rkey uint32
	users      int // work requests that move its bytes now
	closed     bool
}

func (r *region) LKey() uint32 { return r.lkey }
func (r *region) RKey() uint32 { return r.rkey }

func (r *region) Close() error {
	f := r.dev.fabric
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.closed {
		panic("verbstest: a region of " + r.dev.hw.config.Name + " closed twice")
	}
	if err := f.refuseAlive(r.dev.hw, AtCloseMR, "deregister", 0); err != nil {
		return err
	}
	r.closed = true
	delete(r.dev.hw.lkeys, r.lkey)
	delete(r.dev.hw.rkeys, r.rkey)
	for r.users != 0 {
		f.idle.Wait()
	}
	r.dev.objects--
	return nil
}

// covers says whether the region has these bytes.
func (r *region) covers(addr, length uint64) bool {
	size := uint64(len(r.memory))
	return addr >= r.base && addr-r.base <= size && length <= size-(addr-r.base)
}

func (r *region) slice(addr, length uint64) []byte {
	return r.memory[addr-r.base:][:length]
}
