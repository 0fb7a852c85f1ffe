package verbstest

import (
	"sync/atomic"
	"syscall"
	"time"

	"github.com/umbp/umbp/plugins/rdma/device"
)

// completion is one on its way to Poll.
type completion struct {
	device.Completion
	cq       *completionQueue
	qp       *queuePair // nil for what no queue pair knows of
	sequence uint64     // of the work request on its queue pair
}

type completionQueue struct {
	dev     *opened
	polling atomic.Bool
	waiting atomic.Bool
	buffer  [device.MaxPoll]device.Completion
	bell    chan struct{} // has a token when a Wait is due to return
	timer   *time.Timer

	ring        []completion
	first, used int
	armed       bool
	dead        bool // it is lost
	qps         int
	closed      bool
}

func newCompletionQueue(d *opened, entries int) *completionQueue {
	c := &completionQueue{dev: d, ring: make([]completion, entries), bell: make(chan struct{}, 1),
		timer: time.NewTimer(time.Hour)}
	c.timer.Stop()
	return c
}

func (c *completionQueue) Entries() int { return len(c.ring) }

func (c *completionQueue) Poll() ([]device.Completion, error) {
	f := c.dev.fabric
	f.calls.Add(1)
	if c.polling.Swap(true) {
		panic("verbstest: two goroutines poll one completion queue of " + c.dev.hw.config.Name)
	}
	defer c.polling.Store(false)
	c.lock("Poll")
	defer f.mu.Unlock()
	if err := f.refuseAlive(c.dev.hw, AtPoll, "poll", 0); err != nil {
		return nil, err
	}
	n := min(c.used, device.MaxPoll)
	for i := range n {
		e := &c.ring[c.first]
		c.buffer[i] = e.Completion
		// Whatever was posted up to here gives back its place in the send queue.
		if e.qp != nil {
			e.qp.free = max(e.qp.free, e.sequence+1)
		}
		*e = completion{}
		if c.first++; c.first == len(c.ring) {
			c.first = 0
		}
	}
	c.used -= n
	f.counts.Polled += uint64(n)
	return c.buffer[:n:n], nil
}

func (c *completionQueue) Arm() error {
	c.dev.fabric.calls.Add(1)
	c.lock("Arm")
	defer c.dev.fabric.mu.Unlock()
	if err := c.dev.fabric.refuseAlive(c.dev.hw, AtArm, "arm", 0); err != nil {
		return err
	}
	c.armed = true
	return nil
}

func (c *completionQueue) Wait(deadline time.Time) error {
	f := c.dev.fabric
	f.calls.Add(1)
	if c.waiting.Swap(true) {
		panic("verbstest: two goroutines wait for one completion queue of " + c.dev.hw.config.Name)
	}
	defer c.waiting.Store(false)
	c.lock("Wait")
	err := f.refuseAlive(c.dev.hw, AtWait, "wait", 0)
	f.mu.Unlock()
	if err != nil {
		return err
	}
	if deadline.IsZero() {
		<-c.bell
		return nil
	}
	c.timer.Reset(time.Until(deadline))
	defer c.timer.Stop()
	select {
	case <-c.bell:
	case <-c.timer.C:
	}
	return nil
}

func (c *completionQueue) Wake() {
	c.lock("Wake")
	defer c.dev.fabric.mu.Unlock()
	c.rouse()
}

// rouse leaves a token in the bell.
func (c *completionQueue) rouse() {
	select {
	case c.bell <- struct{}{}:
	default:
	}
}

func (c *completionQueue) Close() error {
	c.lock("Close")
	defer c.dev.fabric.mu.Unlock()
	if c.qps != 0 {
		return c.dev.error("close completion queue", syscall.EBUSY)
	}
	if c.polling.Load() || c.waiting.Load() {
		panic("verbstest: a completion queue of " + c.dev.hw.config.Name + " closed while somebody polls or waits")
	}
	c.closed = true
	delete(c.dev.hw.cqs, c)
	c.dev.objects--
	return nil
}

func (c *completionQueue) lock(call string) {
	c.dev.fabric.mu.Lock()
	if c.closed {
		c.dev.fabric.mu.Unlock()
		panic("verbstest: " + call + " on a completion queue of " + c.dev.hw.config.Name + ", which is closed")
	}
}

// push adds a completion, unless there is nobody for it any more.
func (c *completionQueue) push(e completion) {
	if c.closed || c.dead {
		return
	}
	if c.used == len(c.ring) {
		c.lose()
		return
	}
	i := c.first + c.used
	if i >= len(c.ring) {
		i -= len(c.ring)
	}
	c.ring[i] = e
	c.used++
	if c.armed {
		c.armed = false
		c.rouse()
	}
}

// lose ends the completion queue, as an overflow does: what is in it may still be polled, but nothing comes after it.
func (c *completionQueue) lose() {
	c.dead = true
	c.dev.tell(device.Event{Kind: device.CQFailed, CQ: c})
	for _, q := range c.dev.hw.qps {
		if q.cq == c {
			q.breakDown()
		}
	}
}

// forget takes out what belongs to a queue pair that is closed.
func (c *completionQueue) forget(q *queuePair) {
	kept := 0
	for i := range c.used {
		e := c.ring[(c.first+i)%len(c.ring)]
		if e.qp != q {
			c.ring[(c.first+kept)%len(c.ring)] = e
			kept++
		}
	}
	for i := kept; i < c.used; i++ {
		c.ring[(c.first+i)%len(c.ring)] = completion{}
	}
	c.used = kept
}
