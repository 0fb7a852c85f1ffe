package main

import (
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/umbp/umbp/test/compat/v1/backendpb"
)

// completion is one on its way to the host.
type completion struct {
	session, cookie uint64
	failure         *backendpb.Error
	outcomes        []byte
}

// record returns the completion as a record of the queue.
func (c *completion) record() []byte {
	record := make([]byte, 24, 24+len(c.outcomes)+256)
	record[0] = 3
	order.PutUint32(record[4:], uint32(len(c.outcomes)))
	order.PutUint64(record[8:], c.session)
	order.PutUint64(record[16:], c.cookie)
	if c.failure == nil {
		return record
	}
	failure, err := proto.Marshal(c.failure)
	must(err)
	return append(append(record, c.outcomes...), failure...)
}

// outbox keeps what the host has not taken yet. The windows bound it, and the requests that may be open.
type outbox struct {
	mu          sync.Mutex
	changed     sync.Cond
	completions []*completion
	requests    []*backendpb.MemoryRequest
	queue       bool // completions go by the queue
}

func (o *outbox) init() { o.changed.L = &o.mu }

func (o *outbox) add(c *completion) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.completions = append(o.completions, c)
	o.changed.Broadcast()
}

func (o *outbox) ask(q *backendpb.MemoryRequest) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.requests = append(o.requests, q)
	o.changed.Broadcast()
}

// drain sends completions by the queue. One that is full is tried again.
func (o *outbox) drain(send func(*completion) error) {
	o.mu.Lock()
	o.queue = true
	for {
		for len(o.completions) == 0 {
			o.changed.Wait()
		}
		c := o.completions[0]
		o.completions = o.completions[1:]
		o.mu.Unlock()
		err := send(c)
		for errors.Is(err, errFull) {
			time.Sleep(time.Millisecond)
			err = send(c)
		}
		must(err)
		o.mu.Lock()
	}
}

// drainFrames sends all that travels by the stream, until that ends.
func (o *outbox) drainFrames(send func(*backendpb.PluginFrame) error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		var frame *backendpb.PluginFrame
		switch {
		case len(o.requests) > 0:
			frame = &backendpb.PluginFrame{Frame: &backendpb.PluginFrame_Memory{Memory: o.requests[0]}}
			o.requests = o.requests[1:]
		case len(o.completions) > 0 && !o.queue:
			c := o.completions[0]
			o.completions = o.completions[1:]
			frame = &backendpb.PluginFrame{Frame: &backendpb.PluginFrame_Completion{Completion: &backendpb.Completion{
				Session: c.session, Cookie: c.cookie, Error: c.failure, Outcomes: c.outcomes,
			}}}
		default:
			o.changed.Wait()
			continue
		}
		o.mu.Unlock()
		err := send(frame)
		o.mu.Lock()
		if err != nil {
			return
		}
	}
}

// memory is the bytes of a region.
type memory interface {
	load(offset uint64, into []byte) error
	store(offset uint64, from []byte) error
	free()
}

// mappedMemory is memory that the host has passed the descriptor of.
type mappedMemory struct {
	mapping, bytes []byte
}

func mapMemory(fd int, offset int64, size uint64) (memory, error) {
	skip := offset % int64(unix.Getpagesize())
	mapping, err := unix.Mmap(fd, offset-skip, int(skip+int64(size)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return &mappedMemory{mapping, mapping[skip:]}, nil
}

func (m *mappedMemory) load(offset uint64, into []byte) error {
	copy(into, m.bytes[offset:])
	return nil
}

func (m *mappedMemory) store(offset uint64, from []byte) error {
	copy(m.bytes[offset:], from)
	return nil
}

func (m *mappedMemory) free() { must(unix.Munmap(m.mapping)) }

// messages asks the host for memory.
type messages struct {
	out  *outbox
	room chan struct{}

	mu   sync.Mutex
	last uint64
	open map[uint64]chan *backendpb.MemoryReply
}

func (m *messages) init(out *outbox) {
	m.out, m.room, m.open = out, make(chan struct{}, 16), map[uint64]chan *backendpb.MemoryReply{}
}

func (m *messages) ask(q *backendpb.MemoryRequest) (*backendpb.MemoryReply, error) {
	m.room <- struct{}{}
	answer := make(chan *backendpb.MemoryReply, 1)
	m.mu.Lock()
	m.last++
	q.Id = m.last
	m.open[q.Id] = answer
	m.mu.Unlock()
	m.out.ask(q)
	reply := <-answer
	if e := reply.GetError(); e != nil {
		return nil, &fault{e.GetCode(), e.GetText()}
	}
	return reply, nil
}

func (m *messages) answered(reply *backendpb.MemoryReply) {
	m.mu.Lock()
	answer := m.open[reply.GetId()]
	delete(m.open, reply.GetId())
	m.mu.Unlock()
	if answer != nil {
		<-m.room
		answer <- reply
	}
}

// remoteMemory is a region that is not mapped.
type remoteMemory struct {
	messages *messages
	region   uint64
}

const messageBytes = 1 << 20

func (r *remoteMemory) load(offset uint64, into []byte) error {
	for len(into) > 0 {
		n := min(len(into), messageBytes)
		reply, err := r.messages.ask(&backendpb.MemoryRequest{Region: r.region, Offset: offset, Length: uint64(n)})
		if err != nil {
			return err
		}
		if copy(into, reply.GetData()) != n {
			return errors.New("the host sends another number of bytes")
		}
		offset, into = offset+uint64(n), into[n:]
	}
	return nil
}

func (r *remoteMemory) store(offset uint64, from []byte) error {
	for len(from) > 0 {
		n := min(len(from), messageBytes)
		_, err := r.messages.ask(&backendpb.MemoryRequest{
			Region: r.region, Offset: offset, Length: uint64(n), Store: true, Data: from[:n],
		})
		if err != nil {
			return err
		}
		offset, from = offset+uint64(n), from[n:]
	}
	return nil
}

func (r *remoteMemory) free() {}
