package rpc

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/proto/backendpb"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// path is how a host's transfers get to the plugin. None of its methods blocks.
type path interface {
	// post sends a transfer and returns its position, which is not zero. shm.ErrFull says that there is no room.
	post(p shm.Post) (position uint64, err error)
	// posted follows each post: somebody has to receive what comes of it.
	posted()
	// await follows a post in place of posted, and may use the caller to receive until that flight has completed, for
	// backend.MaxPostWait at most.
	await(s *session, cookie, serial uint64)
	// cancel sends a Cancel as soon as there is room, behind what was posted until now, and then calls sent.
	cancel(c shm.Cancel, sent func())
	// taken tells whether the plugin may have taken what was sent at a position. It is called after close.
	taken(position uint64) bool
	close()
}

// queuePath is the path through shared memory.
type queuePath struct {
	client                   *Client
	submissions, completions *shm.Queue
	sender                   *sender
	turn                     turn // to receive from completions
}

func newQueuePath(c *Client) (*queuePath, error) {
	submissions, err := shm.Create(submissionsCapacity)
	if err != nil {
		return nil, err
	}
	completions, err := shm.Create(completionsCapacity)
	if err != nil {
		return nil, errors.Join(err, submissions.Close())
	}
	return &queuePath{
		client: c, submissions: submissions, completions: completions, sender: &sender{queue: submissions, fail: c.fail},
		turn: turn{recall: make(chan struct{}, 1)},
	}, nil
}

// files returns what the plugin attaches, in the order of the protocol.
func (p *queuePath) files() []*os.File {
	submissions, wakePlugin := p.submissions.Files()
	completions, wakeHost := p.completions.Files()
	return []*os.File{submissions, wakePlugin, completions, wakeHost}
}

// records holds buffers to encode records in.
var records = sync.Pool{New: func() any { return new([]byte) }}

func (p *queuePath) post(t shm.Post) (uint64, error) {
	if p.sender.waiting.Load() > 0 {
		return 0, shm.ErrFull
	}
	buf := records.Get().(*[]byte)
	*buf = shm.AppendPost((*buf)[:0], &t)
	position, err := p.submissions.Send(*buf)
	records.Put(buf)
	return position, err
}

func (p *queuePath) posted() { p.turn.attend() }

func (p *queuePath) await(s *session, cookie, serial uint64) {
	if p.turn.take() {
		p.lead(s, cookie, serial)
	} else {
		p.turn.attend()
	}
}

func (p *queuePath) cancel(c shm.Cancel, sent func()) {
	p.sender.send(shm.AppendCancel(nil, c), sent)
}

func (p *queuePath) taken(position uint64) bool { return p.submissions.Taken(position) }

func (p *queuePath) close() {
	p.sender.close()
	p.submissions.Close()
	p.completions.Close()
}

func (p *queuePath) complete(record []byte) error {
	c, err := shm.ParseCompletion(record)
	if err != nil {
		return err
	}
	var failure *backendpb.Error
	if len(c.Error) > 0 {
		failure = &backendpb.Error{}
		if err := proto.Unmarshal(c.Error, failure); err != nil {
			return err
		}
	}
	return p.client.complete(c.Session, c.Cookie, failure, c.Outcomes)
}

// streamPath is the plain path, and serves memory where the plugin asks for it.
type streamPath struct {
	client      *Client
	stream      grpc.BidiStreamingClient[backendpb.HostFrame, backendpb.PluginFrame]
	transfers   bool // it is the data path
	serveMemory bool
	frames      outbox[*backendpb.HostFrame]
	asked       atomic.Int64 // memory requests without an answer
}

// maxUnsent bounds the transfers that wait for the stream, in bytes of their segments.
const maxUnsent = submissionsCapacity

// segmentSize is what a segment takes on its way.
const segmentSize = 24

func (p *streamPath) post(t shm.Post) (uint64, error) {
	frame := &backendpb.Post{Session: t.Session, Cookie: t.Cookie, Op: uint32(t.Op), Segments: make([]uint64, 0, 3*len(t.Segments))}
	for _, g := range t.Segments {
		frame.Segments = append(frame.Segments, g.Local, g.Remote, g.Length)
	}
	position := p.frames.add(&backendpb.HostFrame{Frame: &backendpb.HostFrame_Post{Post: frame}}, segmentSize*len(t.Segments), maxUnsent)
	if position == 0 {
		return 0, shm.ErrFull
	}
	return position, nil
}

func (p *streamPath) posted() {}

func (p *streamPath) await(*session, uint64, uint64) {}

func (p *streamPath) cancel(c shm.Cancel, sent func()) {
	p.frames.add(&backendpb.HostFrame{Frame: &backendpb.HostFrame_Cancel{
		Cancel: &backendpb.Cancel{Session: c.Session, Cookie: c.Cookie},
	}}, 0, 0)
	sent()
}

func (p *streamPath) taken(position uint64) bool { return p.frames.taken(position) }

func (p *streamPath) close() {}

// send sends the frames until the client's life ends.
func (p *streamPath) send() {
	err := p.frames.run(p.client.life, func(frame *backendpb.HostFrame) error {
		if frame.GetMemory() != nil {
			p.asked.Add(-1) // before the plugin can ask again
		}
		return p.stream.Send(frame)
	})
	p.client.streamEnded("transfers", err)
}

// receive delivers completions, and serves memory, until the stream ends.
func (p *streamPath) receive() {
	for {
		frame, err := p.stream.Recv()
		if err != nil {
			p.client.streamEnded("transfers", err)
			return
		}
		if err := p.handle(frame); err != nil {
			p.client.fail(err)
			return
		}
	}
}

func (p *streamPath) handle(frame *backendpb.PluginFrame) error {
	c := p.client
	switch f := frame.GetFrame().(type) {
	case *backendpb.PluginFrame_Completion:
		if !p.transfers {
			return c.errorf(backend.Internal, "complete", "the plugin sends a completion by messages, although it has chosen queues")
		}
		outcomes := make([]backend.Outcome, len(f.Completion.GetOutcomes()))
		for i, o := range f.Completion.GetOutcomes() {
			if outcomes[i] = backend.Outcome(o); outcomes[i] > backend.InDoubt {
				return c.errorf(backend.Internal, "complete", "the plugin sends outcome %d, which does not exist", o)
			}
		}
		return c.complete(f.Completion.GetSession(), f.Completion.GetCookie(), f.Completion.GetError(), outcomes)
	case *backendpb.PluginFrame_Memory:
		if !p.serveMemory {
			return c.errorf(backend.Internal, "memory", "the plugin asks for memory by messages, although it has chosen to map it")
		}
		if p.asked.Add(1) > maxMemoryRequests {
			return c.errorf(backend.Internal, "memory", "the plugin has more than %d requests open", maxMemoryRequests)
		}
		reply := c.serveMemory(f.Memory)
		p.frames.add(&backendpb.HostFrame{Frame: &backendpb.HostFrame_Memory{Memory: reply}}, 0, 0)
	}
	return nil // what is not known is ignored
}
