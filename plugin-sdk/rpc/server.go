package rpc

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/proto/backendpb"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// Server is the plugin's half: it opens one backend when the host asks for it, and drives it.
type Server struct {
	factory backend.Factory
	log     backend.Logger
	inbox   *inbox // nil without a passage
	calls   service

	closed  chan struct{}
	gone    chan struct{}
	life    context.Context // ends with Close
	end     context.CancelFunc
	running sync.WaitGroup
	closing sync.Once
	failed  error // what Close returns

	flying      atomic.Int64 // transfers that the host has posted and that have not completed
	submissions *shm.Queue   // set before anything is posted; nil where transfers travel by messages

	mu         sync.Mutex
	ended      bool // nothing new is begun
	isClosed   bool
	isGone     bool
	opening    bool            // Open was called
	backend    backend.Backend // nil until it is open
	window     int
	replies    replies
	queues     []*shm.Queue
	lastID     uint64 // of handshakes and endpoints
	handshakes map[uint64]*dial
	endpoints  map[uint64]*served
	sessions   map[uint64]*servedSession
	regions    map[uint64]*mapping
	events     outbox[*backendpb.Event]
	signs      map[uint64]chan struct{} // asked of the host: see posted
}

// replies is how completions get to the host. It does not block: what has no room waits.
type replies interface {
	complete(session, cookie uint64, failure error, outcomes []backend.Outcome)
	close()
}

// NewServer returns a server for the backend of a factory. passage is the plugin's end of the passage, which the server
// owns from here on; nil when there is none. log may be nil.
func NewServer(f backend.Factory, passage *shm.Passage, log backend.Logger) *Server {
	s := &Server{
		factory: f, log: log, closed: make(chan struct{}), gone: make(chan struct{}),
		handshakes: map[uint64]*dial{}, endpoints: map[uint64]*served{}, sessions: map[uint64]*servedSession{},
		regions: map[uint64]*mapping{}, signs: map[uint64]chan struct{}{},
	}
	s.calls.server = s
	s.life, s.end = context.WithCancel(context.Background())
	if passage != nil {
		s.inbox = newInbox(passage)
		s.running.Go(func() { s.hostGone(s.inbox.run()) })
	}
	return s
}

// Register makes the service known to a gRPC server.
func (s *Server) Register(r grpc.ServiceRegistrar) { backendpb.RegisterBackendServer(r, &s.calls) }

// Closed is closed when the host has closed the backend: the process should end soon. The reply to the host may still be
// on its way, and then the host ends the process.
func (s *Server) Closed() <-chan struct{} { return s.closed }

// HostGone is closed when the host has closed its end of the passage, which it does by ending, or when the data path is
// corrupt: the process should call Close and end.
func (s *Server) HostGone() <-chan struct{} { return s.gone }

// hostClosed closes Closed.
func (s *Server) hostClosed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	if !s.isClosed {
		s.isClosed = true
		close(s.closed)
	}
}

// hostGone closes HostGone.
func (s *Server) hostGone(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isGone {
		return
	}
	if s.log != nil && !s.ended {
		s.log.Warn("the plugin ends", "reason", why)
	}
	s.ended, s.isGone = true, true
	close(s.gone)
}

// Close closes the backend, if it is open, and frees everything. It returns when nothing of the backend runs any more.
// Closing twice is not an error.
func (s *Server) Close() error {
	s.closing.Do(func() { s.failed = s.close() })
	return s.failed
}

func (s *Server) close() error {
	s.mu.Lock()
	s.ended = true
	b := s.backend
	s.mu.Unlock()
	var err error
	if b != nil {
		s.settle()
		err = b.Close() // transfers complete
	}
	s.end()
	if s.inbox != nil {
		err = errors.Join(err, s.inbox.passage.Close())
	}
	s.mu.Lock()
	queues, out, regions := s.queues, s.replies, s.regions
	s.regions = map[uint64]*mapping{}
	s.mu.Unlock()
	if out != nil {
		out.close()
	}
	for _, q := range queues {
		err = errors.Join(err, q.Close())
	}
	s.running.Wait()
	if s.inbox != nil {
		s.inbox.close()
	}
	for _, m := range regions {
		err = errors.Join(err, m.free())
	}
	return err
}

// inbox receives descriptors, and keeps them until the call comes that they belong to.
type inbox struct {
	passage *shm.Passage

	mu      sync.Mutex
	arrived map[uint64][]*os.File
	order   []uint64      // of arrival
	changed chan struct{} // closed when something arrives; replaced
	err     error         // why nothing arrives any more
}

// maxUnclaimed bounds the messages whose call has not come. A call that was given up never comes: the oldest go.
const maxUnclaimed = 64

func newInbox(p *shm.Passage) *inbox {
	return &inbox{passage: p, arrived: map[uint64][]*os.File{}, changed: make(chan struct{})}
}

// run receives until the passage ends, and returns why it did.
func (b *inbox) run() error {
	for {
		tag, files, err := b.passage.Receive()
		if errors.Is(err, io.EOF) {
			err = backend.Errorf(backend.PathDown, "the host has gone")
		}
		b.add(tag, files, err)
		if err != nil {
			return err
		}
	}
}

func (b *inbox) add(tag uint64, files []*os.File, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil {
		b.err = err
	} else {
		if len(b.order) == maxUnclaimed {
			closeFiles(b.arrived[b.order[0]])
			delete(b.arrived, b.order[0])
			b.order = b.order[1:]
		}
		closeFiles(b.arrived[tag]) // a tag that is used twice
		b.arrived[tag] = files
		b.order = append(b.order, tag)
	}
	close(b.changed)
	b.changed = make(chan struct{})
}

// take returns the files of a message. It waits for them: they may be slower than the call.
func (b *inbox) take(ctx context.Context, tag uint64, count int) ([]*os.File, error) {
	for {
		b.mu.Lock()
		files, ok := b.arrived[tag]
		if ok {
			delete(b.arrived, tag)
			b.order = slices.DeleteFunc(b.order, func(t uint64) bool { return t == tag })
		}
		changed, err := b.changed, b.err
		b.mu.Unlock()
		switch {
		case ok && len(files) != count:
			closeFiles(files)
			return nil, backend.Errorf(backend.BadRequest, "message %d brought %d descriptors, want %d", tag, len(files), count)
		case ok:
			return files, nil
		case err != nil:
			return nil, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, &backend.Error{Code: backend.Cancelled, Text: "waiting for descriptors", Err: ctx.Err()}
		}
	}
}

func (b *inbox) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, files := range b.arrived {
		closeFiles(files)
	}
	clear(b.arrived)
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // nothing was written
	}
}

// service is the gRPC service. It has a type of its own so that a Server does not show these methods.
type service struct {
	backendpb.UnimplementedBackendServer
	server *Server
}

func badRequest(format string, args ...any) *backendpb.Error {
	return errorOut(backend.Errorf(backend.BadRequest, format, args...))
}

// opened returns the backend, or a status for a host that calls out of order.
func (s *Server) opened() (backend.Backend, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.backend == nil {
		return nil, status.Error(codes.FailedPrecondition, "the backend is not open: call Open first")
	}
	return s.backend, nil
}

// Open implements backendpb.BackendServer.
func (v *service) Open(ctx context.Context, q *backendpb.OpenRequest) (*backendpb.OpenReply, error) {
	s := v.server
	s.mu.Lock()
	twice := s.opening || s.ended
	if !twice {
		s.opening = true
		s.running.Add(1) // Close waits
		defer s.running.Done()
	}
	s.mu.Unlock()
	if twice {
		return &backendpb.OpenReply{Error: badRequest("the backend was opened before: start a new process")}, nil
	}
	reply, err := s.open(ctx, q)
	if err != nil {
		return &backendpb.OpenReply{Error: errorOut(err)}, nil
	}
	return reply, nil
}

func (s *Server) open(ctx context.Context, q *backendpb.OpenRequest) (*backendpb.OpenReply, error) {
	fault := func(code backend.Code, text string, cause error) (*backendpb.OpenReply, error) {
		return nil, &backend.Error{Code: code, Op: "open", Backend: s.factory.Name, Text: text, Err: cause}
	}
	reply := &backendpb.OpenReply{MemoryAccess: backendpb.MemoryAccess_MEMORY_ACCESS_MAPPED, TakesGpu: true}
	switch {
	case s.inbox == nil || !slices.Contains(q.GetMemoryAccesses(), backendpb.MemoryAccess_MEMORY_ACCESS_MAPPED):
		return fault(backend.Unsupported, "this plugin maps memory, and the host passes no descriptors: start it with a passage", nil)
	case slices.Contains(q.GetDataPaths(), backendpb.DataPath_DATA_PATH_QUEUES):
		reply.DataPath = backendpb.DataPath_DATA_PATH_QUEUES
	case slices.Contains(q.GetDataPaths(), backendpb.DataPath_DATA_PATH_STREAM):
		reply.DataPath = backendpb.DataPath_DATA_PATH_STREAM
	default:
		return fault(backend.Unsupported, "the host offers no data path that this plugin knows", nil)
	}
	options, err := backend.CheckOptions(s.factory.Options, q.GetOptions())
	if err != nil {
		return fault(backend.BadRequest, "check options", err)
	}
	cfg := backend.Config{Self: peerIn(q.GetSelf()), Options: options, Insecure: q.GetInsecure(), Log: s.log, Posted: s.posted}
	if k := q.GetCredentials(); k != nil {
		cfg.Credentials = &backend.Credentials{CertFile: k.GetCertFile(), KeyFile: k.GetKeyFile(), CAFile: k.GetCaFile()}
	}
	b, err := s.factory.Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	info := b.Info()
	reply.Info = infoOut(info)
	s.mu.Lock()
	ended := s.ended
	if !ended {
		s.backend, s.window = b, info.Capabilities.Window
		if reply.DataPath == backendpb.DataPath_DATA_PATH_STREAM {
			s.replies = &streamReplies{}
		}
	}
	s.mu.Unlock()
	if ended {
		return fault(backend.PathDown, "the plugin is ending", b.Close())
	}
	return reply, nil
}

// Attach implements backendpb.BackendServer.
func (v *service) Attach(ctx context.Context, q *backendpb.AttachRequest) (*backendpb.AttachReply, error) {
	if err := v.server.attach(ctx, q.GetTag(), time.Duration(q.GetLookNs())); err != nil {
		return &backendpb.AttachReply{Error: errorOut(err)}, nil
	}
	return &backendpb.AttachReply{}, nil
}

func (s *Server) attach(ctx context.Context, tag uint64, look time.Duration) error {
	if _, err := s.opened(); err != nil {
		return err
	}
	files, err := s.inbox.take(ctx, tag, 4)
	if err != nil {
		return err
	}
	submissions, err := shm.Attach(files[0], files[1])
	if err != nil {
		closeFiles(files[2:])
		return err
	}
	completions, err := shm.Attach(files[2], files[3])
	if err != nil {
		return errors.Join(err, submissions.Close())
	}
	s.mu.Lock()
	refused := s.ended || s.replies != nil
	if !refused {
		s.queues = []*shm.Queue{submissions, completions}
		s.submissions = submissions
		s.replies = &queueReplies{sender{queue: completions, fail: s.hostGone}}
		if look <= 0 {
			look = DefaultLook
		}
		s.running.Go(func() { s.receive(submissions, min(look, maxLook)) })
	}
	s.mu.Unlock()
	if refused {
		_, _ = submissions.Close(), completions.Close()
		return backend.Errorf(backend.BadRequest, "the data path is chosen already")
	}
	return nil
}

// Ping implements backendpb.BackendServer.
func (v *service) Ping(context.Context, *backendpb.PingRequest) (*backendpb.PingReply, error) {
	return &backendpb.PingReply{}, nil
}

// Register implements backendpb.BackendServer.
func (v *service) Register(ctx context.Context, q *backendpb.RegisterRequest) (*backendpb.RegisterReply, error) {
	b, err := v.server.opened()
	if err != nil {
		return nil, err
	}
	key, err := v.server.register(ctx, b, q)
	return &backendpb.RegisterReply{Key: key, Error: errorOut(err)}, nil
}

// Deregister implements backendpb.BackendServer.
func (v *service) Deregister(ctx context.Context, q *backendpb.DeregisterRequest) (*backendpb.DeregisterReply, error) {
	b, err := v.server.opened()
	if err != nil {
		return nil, err
	}
	return &backendpb.DeregisterReply{Error: errorOut(v.server.deregister(ctx, b, q.GetRegion()))}, nil
}

// Answer implements backendpb.BackendServer.
func (v *service) Answer(ctx context.Context, q *backendpb.AnswerRequest) (*backendpb.AnswerReply, error) {
	b, err := v.server.opened()
	if err != nil {
		return nil, err
	}
	answer, err := b.Answer(ctx, peerIn(q.GetPeer()), q.GetOffer())
	if err != nil {
		return &backendpb.AnswerReply{Error: errorOut(err)}, nil
	}
	return &backendpb.AnswerReply{Answer: answer}, nil
}

// Fence implements backendpb.BackendServer.
func (v *service) Fence(ctx context.Context, q *backendpb.FenceRequest) (*backendpb.FenceReply, error) {
	b, err := v.server.opened()
	if err != nil {
		return nil, err
	}
	return &backendpb.FenceReply{Error: errorOut(b.Fence(ctx, peerIn(q.GetPeer())))}, nil
}

// Counters implements backendpb.BackendServer.
func (v *service) Counters(context.Context, *backendpb.CountersRequest) (*backendpb.CountersReply, error) {
	b, err := v.server.opened()
	if err != nil {
		return nil, err
	}
	reply := &backendpb.CountersReply{}
	if c, ok := b.(backend.Counter); ok {
		reply.Counts = countsOut(c.Counters())
	}
	return reply, nil
}

// Close implements backendpb.BackendServer. The data path stays: completions may be on their way.
func (v *service) Close(context.Context, *backendpb.CloseRequest) (*backendpb.CloseReply, error) {
	b, err := v.server.opened()
	if err != nil {
		return nil, err
	}
	v.server.settle() // what still comes is told so, and not what a backend says that is closing
	err = b.Close()
	v.server.settle()
	defer v.server.hostClosed()
	return &backendpb.CloseReply{Error: errorOut(err)}, nil
}

// Events implements backendpb.BackendServer.
func (v *service) Events(_ *backendpb.EventsRequest, stream grpc.ServerStreamingServer[backendpb.Event]) error {
	ctx, cancel := v.server.until(stream.Context())
	defer cancel()
	return v.server.events.run(ctx, stream.Send)
}

// until returns a context that ends with ctx and with Close.
func (s *Server) until(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.life, cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}

// withTimeout bounds ctx, where there is a bound.
func withTimeout(ctx context.Context, ns int64) (context.Context, context.CancelFunc) {
	if ns <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, time.Duration(ns))
}
