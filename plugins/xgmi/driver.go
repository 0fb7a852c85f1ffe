package xgmi

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/gpu"
	"github.com/umbp/umbp/plugins/xgmi/shape"
)

const (
	// ahead is how many full parts a stream is given at once, by their bytes and by their copies. At 1.5 TB/s, which is a
	// copy within one GPU of today, four parts of 32 MiB keep it busy for 90 µs; over a link of 50 GB/s it takes 3 ms until
	// they are through, and a transfer that was cancelled is quiet.
	ahead = 4
	// maxFlight bounds the parts on a stream, and with them the events. Transfers of one small copy each are parts, too.
	maxFlight = 64

	// spin is how long the driver looks for an event without a pause: about as long as a copy of 1 MiB takes over a link.
	// It does not even yield: that takes a goroutine with a thread of its own two switches of threads.
	spin = 40 * time.Microsecond
	// Then it sleeps, longer and longer. The system adds some 50 µs to each nap.
	minNap = 5 * time.Microsecond
	maxNap = 100 * time.Microsecond
	// Where nothing has happened for long, something is slow or stuck: a nap may then be as long as a sixteenth of that, up
	// to longNap, so that waiting takes next to nothing.
	longNap = time.Millisecond
	// drainTries is how often a stream that reports an error is asked whether it is empty.
	drainTries = 3
)

// driver copies over one device. All calls of the runtime are made by its goroutine, on a thread of the device.
type driver struct {
	device *device
	wake   chan struct{} // one token: there is something to look at
	ended  chan struct{} // closed when the goroutine has ended

	mu      sync.Mutex
	arrived queue // bounded by the windows of the endpoints
	closing bool

	stops atomic.Bool // an order was stopped that may be in a stream's queue

	// The rest is the goroutine's own.
	c       *gpu.Context
	streams []*stream
	events  []gpu.Event // not in use
	batch   []gpu.Copy
	nap     nap
}

// stream is one of the runtime's. What is given to it happens in order.
type stream struct {
	id     gpu.Stream
	queue  queue  // jobs that have parts to submit
	load   uint64 // bytes of the jobs that were assigned and have not ended
	flight ring   // parts that were submitted
	bytes  uint64 // of those
	copies uint32 // of those
}

// part is one that was submitted.
type part struct {
	job   *job
	index int
	event gpu.Event
}

// ring is a queue of parts.
type ring struct {
	parts    [maxFlight]part
	first, n int
}

func (r *ring) push(p part) {
	r.parts[(r.first+r.n)%maxFlight] = p
	r.n++
}

func (r *ring) at(i int) *part { return &r.parts[(r.first+i)%maxFlight] }

func (r *ring) pop() part {
	p := r.parts[r.first]
	r.parts[r.first] = part{}
	r.first = (r.first + 1) % maxFlight
	r.n--
	return p
}

// startDriver returns when the streams are there.
func startDriver(dev *device) (*driver, error) {
	if why := dev.lost.Load(); why != nil {
		return nil, *why
	}
	d := &driver{device: dev, wake: make(chan struct{}, 1), ended: make(chan struct{})}
	ready := make(chan error, 1)
	go d.run(ready)
	err := <-ready
	if err != nil {
		<-d.ended
	}
	return d, err
}

// close ends the goroutine. There are no jobs any more.
func (d *driver) close() {
	d.mu.Lock()
	d.closing = true
	d.mu.Unlock()
	d.rouse()
	<-d.ended
}

// add takes a job over.
func (d *driver) add(j *job) {
	d.mu.Lock()
	d.arrived.push(j)
	d.mu.Unlock()
	d.rouse()
}

// lookForStopped has the driver look for orders that were stopped. It never blocks.
func (d *driver) lookForStopped() {
	d.stops.Store(true)
	d.rouse()
}

func (d *driver) rouse() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

func (d *driver) run(ready chan<- error) {
	defer close(d.ended)
	c, err := d.device.e.rt.Bind(d.device.Number)
	if err != nil {
		ready <- err
		return
	}
	defer c.Unbind()
	d.c = c
	defer d.destroy()
	for range d.device.e.settings.streams {
		id, err := c.NewStream()
		if err != nil {
			ready <- err
			return
		}
		d.streams = append(d.streams, &stream{id: id})
	}
	ready <- nil
	d.loop()
}

// destroy gives the runtime its own back. On a device that is lost there is nothing to give.
func (d *driver) destroy() {
	var err error
	for _, s := range d.streams {
		err = firstError(err, d.c.DestroyStream(s.id))
	}
	for _, e := range d.events {
		err = firstError(err, d.c.DestroyEvent(e))
	}
	if err != nil && d.device.lost.Load() == nil {
		d.device.e.log.Warn("a GPU's streams and events are not given back", "backend", name, "device", d.device.PCI, "error", err)
	}
}

func firstError(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// loop ends when the driver is closed. While nothing is under way it sleeps.
func (d *driver) loop() {
	for {
		closing := d.take()
		if d.stops.Swap(false) {
			d.dropStopped()
		}
		moved, busy := false, false
		for _, s := range d.streams {
			m, err := d.advance(s)
			if err != nil {
				d.lose(err)
			}
			moved = moved || m
			busy = busy || s.flight.n > 0 || s.queue.first != nil
		}
		switch {
		case moved:
			d.nap.reset()
		case busy:
			d.nap.take()
		case closing:
			return
		default:
			<-d.wake
			d.nap.reset()
		}
	}
}

// take deals what has arrived to the streams. It tells whether the driver is being closed.
func (d *driver) take() (closing bool) {
	d.mu.Lock()
	arrived := d.arrived
	d.arrived = queue{}
	closing = d.closing
	d.mu.Unlock()

	why := d.device.lost.Load()
	for arrived.first != nil {
		j := arrived.pop()
		switch {
		case why != nil:
			j.err = d.device.refusal(backend.PathDown, why)
			j.finish()
		case j.order.Stopped():
			j.finish()
		default:
			s := d.streams[0]
			for _, other := range d.streams {
				if other.load < s.load {
					s = other
				}
			}
			j.stream = s
			for i := range j.plan.Parts {
				s.load += j.plan.Parts[i].Bytes
			}
			s.queue.push(j)
		}
	}
	return closing
}

// dropStopped takes the orders that were stopped out of the queues. What was submitted of them comes to its end.
func (d *driver) dropStopped() {
	for _, s := range d.streams {
		all := s.queue
		s.queue = queue{}
		for all.first != nil {
			if j := all.pop(); !j.order.Stopped() {
				s.queue.push(j)
			} else if j.out == 0 {
				s.end(j)
			}
		}
	}
}

// end completes a job of the stream.
func (s *stream) end(j *job) {
	for i := range j.plan.Parts {
		s.load -= j.plan.Parts[i].Bytes
	}
	j.finish()
}

// advance looks for parts that have ended, and submits more. An error says that the device is lost.
func (d *driver) advance(s *stream) (moved bool, err error) {
	for s.flight.n > 0 {
		done, err := d.c.Done(s.flight.at(0).event)
		if err != nil {
			return true, d.repair(s, err)
		}
		if !done {
			break
		}
		d.retire(s)
		moved = true
	}
	most := ahead * d.device.e.settings.partBytes
	for s.queue.first != nil && s.flight.n < maxFlight && s.bytes < most && s.copies < ahead*partOps {
		moved = true
		if err := d.submit(s); err != nil {
			return true, err
		}
	}
	return moved, nil
}

// retire ends the oldest part of a stream, which nothing touches any more.
func (d *driver) retire(s *stream) {
	p := s.flight.pop()
	d.events = append(d.events, p.event)
	j := p.job
	s.bytes -= j.plan.Parts[p.index].Bytes
	s.copies -= j.plan.Parts[p.index].Count
	j.out--
	if j.out == 0 && j != s.queue.first {
		s.end(j)
	}
}

// submit gives the next part of the first job to the stream, with an event behind it.
func (d *driver) submit(s *stream) error {
	event, err := d.event()
	if err != nil {
		return d.refuse(s, err)
	}
	j := s.queue.first
	p := part{job: j, index: j.next, event: event}
	ops := &j.plan.Parts[j.next]
	j.next++
	j.out++
	s.flight.push(p)
	s.bytes += ops.Bytes
	s.copies += ops.Count
	if !j.unsent() {
		s.queue.pop()
	}

	err = d.issue(s, j, j.plan.Ops[ops.First:][:ops.Count])
	if err == nil {
		err = d.c.Record(event, s.id)
		d.device.e.counts.events.Add(1)
	}
	if err != nil {
		return d.repair(s, err)
	}
	return nil
}

// event returns one that is not in use.
func (d *driver) event() (gpu.Event, error) {
	if n := len(d.events) - 1; n >= 0 {
		e := d.events[n]
		d.events = d.events[:n]
		return e, nil
	}
	return d.c.NewEvent()
}

// refuse fails the first job of a stream for want of an event: what was submitted of it comes to its end.
func (d *driver) refuse(s *stream, err error) error {
	if gpu.Lost(err) {
		return err
	}
	j := s.queue.pop()
	if j.err == nil {
		j.err = d.device.fault(backend.Internal, "no event", err)
	}
	if j.out == 0 {
		s.end(j)
	}
	return nil
}

// issue enqueues the copies of a part. A copy that is refused fails its segment; an error says that it is not known what
// was enqueued, or that the device is lost.
func (d *driver) issue(s *stream, j *job, ops []shape.Op) error {
	d.batch = d.batch[:0]
	for i := range ops {
		o := &ops[i]
		if o.Batched {
			to, _, from, _ := j.ends(o)
			d.batch = append(d.batch, gpu.Copy{To: to, From: from, Bytes: o.Width})
			continue
		}
		err := d.enqueue(s, j, o)
		if err != nil && (gpu.Lost(err) || o.First != o.Last) {
			return err
		}
		if err != nil {
			j.fail(o.First, o.Last, d.device.fault(backend.Internal, "a copy was refused", err))
		}
	}
	if len(d.batch) == 0 {
		return nil
	}
	counts := &d.device.e.counts
	counts.batches.Add(1)
	counts.batchedCopies.Add(uint64(len(d.batch)))
	return d.c.CopyBatch(s.id, d.batch)
}

// enqueue enqueues one copy by a call of its own.
func (d *driver) enqueue(s *stream, j *job, o *shape.Op) error {
	to, toPitch, from, fromPitch := j.ends(o)
	if o.Rows > 1 {
		d.device.e.counts.copies2D.Add(1)
		return d.c.Copy2D(s.id, to, toPitch, from, fromPitch, o.Width, uint64(o.Rows))
	}
	d.device.e.counts.copies.Add(1)
	return d.c.Copy(s.id, gpu.Copy{To: to, From: from, Bytes: o.Width})
}

// repair deals with an error that may be of any copy on the stream. When the stream is empty, the copies of all its parts
// are made again, one by one, to find out which segments fail. To copy twice does no harm: nothing else writes to either
// end while a transfer is under way. An error says that the device is lost.
func (d *driver) repair(s *stream, why error) error {
	if gpu.Lost(why) {
		return why
	}
	if _, err := d.drain(s); err != nil {
		return err
	}
	for s.flight.n > 0 {
		p := s.flight.at(0)
		for i := range p.job.plan.Parts[p.index].Count {
			if err := d.repeat(s, p.job, &p.job.plan.Ops[p.job.plan.Parts[p.index].First+i]); err != nil {
				return err
			}
		}
		d.retire(s)
	}
	return nil
}

// drain waits until the stream is empty, and returns what went wrong on it meanwhile. An error says that the device is
// lost: it counts as that, too, when it keeps failing, for then nothing is known of it.
func (d *driver) drain(s *stream) (trouble, err error) {
	for range drainTries {
		err = d.c.Wait(s.id)
		if err == nil || gpu.Lost(err) {
			return trouble, err
		}
		trouble = firstError(trouble, err)
	}
	return trouble, err
}

// repeat makes a copy again, on a stream that is empty, and where that fails each of its segments by itself. An order that
// was stopped does not wait for that: it fails. An error says that the device is lost.
func (d *driver) repeat(s *stream, j *job, o *shape.Op) error {
	if j.order.Stopped() {
		j.fail(o.First, o.Last, nil)
		return nil
	}
	trouble := d.enqueue(s, j, o)
	if gpu.Lost(trouble) {
		return trouble
	}
	late, err := d.drain(s)
	if err != nil {
		return err
	}
	trouble = firstError(trouble, late)
	switch {
	case trouble == nil:
		return nil
	case o.First == o.Last:
		j.fail(o.First, o.Last, d.device.fault(backend.Internal, "a copy failed", trouble))
		return nil
	}
	for i := o.First; i <= o.Last; i++ {
		g := j.segments[i]
		if o.Rows == 1 { // which may begin and end within a segment
			skip := max(o.Remote, g.Remote) - g.Remote
			g.Length = min(g.Remote+g.Length, o.Remote+o.Width) - g.Remote - skip
			g.Local, g.Remote = g.Local+skip, g.Remote+skip
		}
		piece := shape.Op{Local: g.Local, Remote: g.Remote, Width: g.Length, Rows: 1, First: i, Last: i}
		if err := d.repeat(s, j, &piece); err != nil {
			return err
		}
	}
	return nil
}

// lose ends everything: the device is lost, and touches nothing any more.
func (d *driver) lose(why error) {
	d.device.lose(why)
	refusal := d.device.refusal(backend.PathDown, d.device.lost.Load())
	for _, s := range d.streams {
		for s.flight.n > 0 {
			p := s.flight.at(0)
			ops := p.job.plan.Parts[p.index]
			first, last := &p.job.plan.Ops[ops.First], &p.job.plan.Ops[ops.First+ops.Count-1]
			p.job.fail(first.First, last.Last, refusal)
			p.job.err = refusal
			d.retire(s)
		}
		for s.queue.first != nil {
			j := s.queue.pop()
			j.err = refusal
			s.end(j)
		}
	}
}

// nap is how the driver waits for an event.
type nap struct {
	since time.Time // of the last progress; zero: just now
	next  time.Duration
}

func (n *nap) reset() { n.since = time.Time{} }

// take waits a moment. The system's sleep blocks the thread, which is the driver's own: Go's timers are late by a
// millisecond where nothing else runs. What arrives meanwhile waits for the end of the nap.
func (n *nap) take() {
	if n.since.IsZero() {
		n.since, n.next = time.Now(), minNap
	}
	waited := time.Since(n.since)
	if waited < spin {
		return
	}
	pause := unix.NsecToTimespec(int64(n.next))
	unix.Nanosleep(&pause, nil) // a signal may end it early
	n.next = min(2*n.next, max(maxNap, waited/16), longNap)
}
