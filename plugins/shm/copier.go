package shm

import "sync"

// copier is the pool of goroutines that copy. It serves transfers in the order in which they were posted, each
// with all workers at once: part by part, so that the last worker to finish is never far behind the others.
type copier struct {
	workers sync.WaitGroup

	mu     sync.Mutex
	work   sync.Cond // signalled when queue or closed changes
	closed bool
	// queue is the head of a ring of the transfers that have parts to take. Its length is bounded by the windows
	// of the endpoints.
	queue transfer
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
func (c *copier) advance(t *transfer) {
	p := t.take()
	if t.next == len(t.segments) || p.bytes == 0 {
		c.remove(t)
	}
	t.out++
	c.mu.Unlock()
	t.copy(p)
	c.mu.Lock()
	t.out--
	if t.out == 0 && !t.queued {
		c.mu.Unlock()
		t.finish()
		c.mu.Lock()
	}
}

// add queues a transfer of so many bytes.
func (c *copier) add(t *transfer, bytes uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.stopped.Load() {
		c.insert(t, &c.queue)
	} else {
		c.insert(t, c.queue.before)
	}
	if bytes > partBytes {
		c.work.Broadcast()
	} else {
		c.work.Signal() // there is work for one only
	}
}

// stop lets no further part of a transfer be taken. A worker finishes it next. The caller makes sure that it has
// not finished yet.
func (c *copier) stop(t *transfer) {
	t.stopped.Store(true)
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.queued {
		c.remove(t)
		c.insert(t, &c.queue)
	}
}

func (c *copier) insert(t, before *transfer) {
	t.queued = true
	t.before, t.after = before, before.after
	t.before.after, t.after.before = t, t
}

func (c *copier) remove(t *transfer) {
	t.queued = false
	t.before.after, t.after.before = t.after, t.before
	t.before, t.after = nil, nil
}
