package rpc

import (
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/proto/backendpb"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// DefaultLook spares a transfer that follows another within a millisecond the time to wake the plugin, which is as long
// as a small transfer. A plugin that is used more rarely does not look.
const DefaultLook = time.Millisecond

// maxLook bounds what the host asks for.
const maxLook = 100 * time.Millisecond

// receive posts what comes through the queue. While nothing is in flight, it looks for so long for what comes next.
func (s *Server) receive(submissions *shm.Queue, look time.Duration) {
	var buf []byte
	var room []backend.Segment
	submissions.Expect(func() bool { return s.flying.Load() == 0 }, look)
	for {
		var err error
		if buf, err = submissions.Receive(buf); errors.Is(err, shm.ErrClosed) {
			return
		}
		if err == nil {
			room, err = s.submit(buf, room)
		}
		if err != nil {
			s.hostGone(err)
			return
		}
	}
}

// submit carries out one record. Segments are put into room, which it returns, larger where it had to be.
func (s *Server) submit(record []byte, room []backend.Segment) ([]backend.Segment, error) {
	if shm.KindOf(record) == shm.CancelRecord {
		c, err := shm.ParseCancel(record)
		if err == nil {
			s.cancel(c.Session, c.Cookie)
		}
		return room, err
	}
	p, err := shm.ParsePost(record, room)
	if err != nil {
		return room, err
	}
	s.post(p.Session, backend.Transfer{Op: p.Op, Segments: p.Segments, Cookie: p.Cookie})
	return p.Segments, nil
}

// queueReplies are replies through the completion queue.
type queueReplies struct{ sender sender }

func (r *queueReplies) close() { r.sender.close() }

func (r *queueReplies) complete(session, cookie uint64, failure error, outcomes []backend.Outcome) {
	c := shm.Completion{Session: session, Cookie: cookie}
	if failure != nil {
		c.Error, _ = proto.Marshal(errorOut(failure)) // whose texts are UTF-8: it cannot fail
		c.Outcomes = outcomes[:min(len(outcomes), shm.MaxSegments)]
	}
	buf := records.Get().(*[]byte)
	*buf = shm.AppendCompletion((*buf)[:0], &c)
	r.sender.send(*buf, nil)
	records.Put(buf)
}

// streamReplies are replies by messages.
type streamReplies struct {
	frames outbox[*backendpb.PluginFrame]
}

func (r *streamReplies) close() {}

func (r *streamReplies) complete(session, cookie uint64, failure error, outcomes []backend.Outcome) {
	c := &backendpb.Completion{Session: session, Cookie: cookie, Error: errorOut(failure)}
	if failure != nil {
		c.Outcomes = make([]byte, len(outcomes))
		for i, o := range outcomes {
			c.Outcomes[i] = byte(o)
		}
	}
	r.frames.add(&backendpb.PluginFrame{Frame: &backendpb.PluginFrame_Completion{Completion: c}}, 0, 0)
}

// Transfers implements backendpb.BackendServer.
func (v *service) Transfers(stream grpc.BidiStreamingServer[backendpb.HostFrame, backendpb.PluginFrame]) error {
	s := v.server
	ctx, cancel := s.until(stream.Context())
	s.mu.Lock()
	replies, ok := s.replies.(*streamReplies)
	if ok = ok && !s.ended; ok {
		s.running.Go(func() {
			defer cancel() // which ends the call, and that ends Recv
			for {
				frame, err := stream.Recv()
				if err == nil {
					err = s.frame(frame)
				}
				if err != nil {
					return
				}
			}
		})
	}
	s.mu.Unlock()
	if !ok {
		cancel()
		return status.Error(codes.FailedPrecondition, "the stream is not the data path")
	}
	defer cancel()
	return replies.frames.run(ctx, stream.Send)
}

// frame carries out one message of the host.
func (s *Server) frame(frame *backendpb.HostFrame) error {
	switch f := frame.GetFrame().(type) {
	case *backendpb.HostFrame_Cancel:
		s.cancel(f.Cancel.GetSession(), f.Cancel.GetCookie())
	case *backendpb.HostFrame_Post:
		numbers := f.Post.GetSegments()
		op := backend.Op(narrow(f.Post.GetOp()))
		if op != backend.Write && op != backend.Read || len(numbers) == 0 || len(numbers)%3 != 0 || len(numbers) > 3*shm.MaxSegments {
			return status.Errorf(codes.InvalidArgument, "a malformed post of transfer %d on session %d", f.Post.GetCookie(), f.Post.GetSession())
		}
		segments := make([]backend.Segment, len(numbers)/3)
		for i := range segments {
			segments[i] = backend.Segment{Local: numbers[3*i], Remote: numbers[3*i+1], Length: numbers[3*i+2]}
		}
		s.post(f.Post.GetSession(), backend.Transfer{Op: op, Segments: segments, Cookie: f.Post.GetCookie()})
	}
	return nil
}
