package shm

import (
	"sync"

	"github.com/umbp/umbp/plugin-sdk/samehost"
)

// copier is the pool of goroutines that copy. It serves transfers in the order in which they were posted, each
// with all workers at once: part by part, so that the last worker to finish is never far behind the others.
type copier struct {
	workers sync.WaitGroup

	mu     sync.Mutex
	work   sync.Cond // signalled when queue or closed changes
	closed bool
	// queue is the head of a ring of the transfers that have parts to take. Its length is bounded by the windows
	// of the endpoints.
	queue task
}

// task is what the copier knows of a transfer: its Transfer.State. Workers take parts off its front and copy them side by
// side; whoever puts back the last finishes it. All of it is under copier.mu.
type task struct {
	transfer      *samehost.Transfer
	path          *path
	cursor        cursor
	out           int  // parts being copied
	queued        bool // it is in the copier's queue
	before, after *task
}

func startCopier(workers int) *copier {
	c := new(copier)
	c.work.L = &c.mu
	c.queue.before, c.queue.after = &c.queue, &c.queue
	for range workers {
		c.workers.Go(c.run)
	}
	return c
}

// close ends the workers. The queue is empty: the endpoints have ended.
func (c *copier) close() {
	c.mu.Lock()
	c.closed = true
	c.work.Broadcast()
	c.mu.Unlock()
	c.workers.Wait()
}

func (c *copier) run() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		t := c.queue.after
		switch {
		case t != &c.queue:
			c.advance(t)
		case c.closed:
			return
		default:
			c.work.Wait()
		}
	}
}

// advance copies one part of the transfer at the head of the queue. It holds the lock when it is called and when
// it returns.
func (c *copier) advance(t *task) {
	p := t.cursor.take(t.transfer)
	if p.bytes == 0 || t.cursor.next == len(t.transfer.Segments) {
		c.remove(t)
	}
	t.out++
	c.mu.Unlock()
	t.path.copy(t.transfer, p)
	c.mu.Lock()
	t.out--
	if t.out == 0 && !t.queued {
		c.mu.Unlock()
		t.transfer.Finish(t.cursor.outcomes(t.transfer), nil)
		c.mu.Lock()
	}
}

// add queues a transfer.
func (c *copier) add(x *samehost.Transfer, p *path) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t, _ := x.State.(*task)
	if t == nil {
		t = &task{transfer: x}
		x.State = t
	}
	t.path, t.cursor = p, cursor{}
	if x.Stopped() {
		c.insert(t, &c.queue)
	} else {
		c.insert(t, c.queue.before)
	}
	if x.Bytes > partBytes {
		c.work.Broadcast()
	} else {
		c.work.Signal() // there is work for one only
	}
}

// hurry has a worker finish a stopped transfer next, of which no further part is taken.
func (c *copier) hurry(x *samehost.Transfer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t, _ := x.State.(*task); t != nil && t.queued {
		c.remove(t)
		c.insert(t, &c.queue)
	}
}

func (c *copier) insert(t, before *task) {
	t.queued = true
	t.before, t.after = before, before.after
	t.before.after, t.after.before = t, t
}

func (c *copier) remove(t *task) {
	t.queued = false
	t.before.after, t.after.before = t.after, t.before
	t.before, t.after = nil, nil
}
