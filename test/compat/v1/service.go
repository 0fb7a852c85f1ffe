package main

import (
	"context"
	"errors"
	"math"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/test/compat/v1/backendpb"
)

// service is what the host calls.
type service struct {
	backendpb.UnimplementedBackendServer
	passage *passage
	backend *end
	out     outbox
	memory  messages
	mapped  bool
	// closed is closed by Close, and unwatched when the host takes no more events.
	closed, unwatched chan struct{}

	mu        sync.Mutex
	last      uint64
	dials     map[uint64]*dialling
	endpoints map[uint64]*endpoint
	sessions  map[uint64]*session
	events    chan *backendpb.Event
}

// dialling is a handshake, and the endpoint that it becomes.
type dialling struct {
	peer     *backendpb.Peer
	begun    bool
	settled  chan struct{}
	endpoint uint64
}

// fault is an error with a code of the contract.
type fault struct {
	code uint32
	text string
}

func (f *fault) Error() string { return f.text }

const (
	internal, peerGone, pathDown, badRequest, denied, cancelled, unsupported = 1, 3, 4, 5, 6, 8, 9
	notSent, done, inDoubt                                                   = 0, 1, 3
	opWrite, opRead                                                          = 1, 2
	hostMemory                                                               = 1
	window                                                                   = 32
	maxSegments                                                              = 4096
	maxBytes                                                                 = 16 << 20
)

func errorOf(err error) *backendpb.Error {
	if err == nil {
		return nil
	}
	var f *fault
	if !errors.As(err, &f) {
		f = &fault{internal, err.Error()}
	}
	return &backendpb.Error{Code: f.code, Text: f.text, Backend: "compat-v1"}
}

func (s *service) Open(_ context.Context, q *backendpb.OpenRequest) (*backendpb.OpenReply, error) {
	path, access := backendpb.DataPath_DATA_PATH_QUEUES, backendpb.MemoryAccess_MEMORY_ACCESS_MAPPED
	if q.GetOptions()["path"] == "stream" {
		path = backendpb.DataPath_DATA_PATH_STREAM
	}
	if q.GetOptions()["memory"] == "messages" {
		access = backendpb.MemoryAccess_MEMORY_ACCESS_MESSAGES
	}
	if unused, err := time.ParseDuration(q.GetOptions()["unused"]); err != nil || unused == 0 {
		return &backendpb.OpenReply{Error: errorOf(&fault{badRequest, "an option has not come"})}, nil
	}
	b, err := openEnd(q.GetSelf())
	if err != nil {
		return &backendpb.OpenReply{Error: errorOf(err)}, nil
	}
	s.backend, s.mapped = b, access == backendpb.MemoryAccess_MEMORY_ACCESS_MAPPED
	s.dials, s.endpoints, s.sessions = map[uint64]*dialling{}, map[uint64]*endpoint{}, map[uint64]*session{}
	s.events = make(chan *backendpb.Event, 4096)
	s.out.init()
	s.memory.init(&s.out)
	host := uint32(1 << hostMemory)
	return &backendpb.OpenReply{DataPath: path, MemoryAccess: access, Info: &backendpb.Info{
		Name: "compat-v1", Version: "1", Capabilities: &backendpb.Capabilities{
			Ops: opWrite | opRead, Local: host, Remote: host, Reach: 2, Window: window,
			LimitSegments: maxSegments, LimitSegmentBytes: maxBytes, LimitTransferBytes: maxBytes,
		},
	}}, nil
}

func (s *service) Attach(_ context.Context, q *backendpb.AttachRequest) (*backendpb.AttachReply, error) {
	files, err := s.passage.take(q.GetTag(), 4)
	if err != nil {
		return nil, err
	}
	submissions, err := attachQueue(files[0], files[1])
	if err != nil {
		return nil, err
	}
	completions, err := attachQueue(files[2], files[3])
	if err != nil {
		return nil, err
	}
	go s.out.drain(func(c *completion) error { return completions.send(c.record()) })
	go func() { must(submissions.receive(s.record)) }()
	return &backendpb.AttachReply{}, nil
}

func (s *service) Ping(context.Context, *backendpb.PingRequest) (*backendpb.PingReply, error) {
	return &backendpb.PingReply{}, nil
}

func (s *service) Register(ctx context.Context, q *backendpb.RegisterRequest) (*backendpb.RegisterReply, error) {
	r := &region{id: q.GetRegion(), rights: q.GetRights(), size: q.GetSize(), memory: &remoteMemory{&s.memory, q.GetRegion()}}
	if s.mapped {
		files, err := s.passage.take(q.GetTag(), 1)
		if err != nil {
			return nil, err
		}
		defer unix.Close(files[0])
		m, err := mapMemory(files[0], q.GetFdOffset(), q.GetSize())
		if err != nil {
			return &backendpb.RegisterReply{Error: errorOf(err)}, nil
		}
		r.memory = m
	}
	err := s.backend.register(q.GetKind(), r)
	if err != nil {
		r.memory.free()
	} else if ctx.Err() != nil {
		s.backend.deregister(r.id)
	}
	return &backendpb.RegisterReply{Error: errorOf(err)}, nil
}

func (s *service) Deregister(_ context.Context, q *backendpb.DeregisterRequest) (*backendpb.DeregisterReply, error) {
	s.backend.deregister(q.GetRegion())
	return &backendpb.DeregisterReply{}, nil
}

func (s *service) next() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last++
	return s.last
}

func (s *service) Offer(ctx context.Context, q *backendpb.OfferRequest) (*backendpb.OfferReply, error) {
	offer, err := s.backend.offer(q.GetPeer())
	if err != nil {
		return &backendpb.OfferReply{Error: errorOf(err)}, nil
	}
	id := s.next()
	if ctx.Err() == nil {
		s.mu.Lock()
		s.dials[id] = &dialling{peer: q.GetPeer(), settled: make(chan struct{})}
		s.mu.Unlock()
	}
	return &backendpb.OfferReply{Handshake: id, Offer: offer}, nil
}

func (s *service) Establish(ctx context.Context, q *backendpb.EstablishRequest) (*backendpb.EstablishReply, error) {
	s.mu.Lock()
	d := s.dials[q.GetHandshake()]
	if d == nil || d.begun {
		s.mu.Unlock()
		return &backendpb.EstablishReply{Error: errorOf(&fault{badRequest, "no such handshake"})}, nil
	}
	d.begun = true
	s.mu.Unlock()
	defer close(d.settled)
	timeout := time.Duration(q.GetTimeoutNs())
	if timeout == 0 {
		timeout = patience
	}
	id := s.next()
	e, err := s.backend.connect(d.peer, q.GetAnswer(), timeout, func() {
		s.events <- &backendpb.Event{Event: &backendpb.Event_EndpointDown{EndpointDown: &backendpb.EndpointDown{Endpoint: id}}}
	})
	if err == nil && ctx.Err() != nil {
		e.close()
		err = &fault{cancelled, "the call was given up"}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		delete(s.dials, q.GetHandshake())
		return &backendpb.EstablishReply{Error: errorOf(err)}, nil
	}
	d.endpoint = id
	s.endpoints[id] = e
	return &backendpb.EstablishReply{Endpoint: id}, nil
}

func (s *service) Abandon(_ context.Context, q *backendpb.AbandonRequest) (*backendpb.AbandonReply, error) {
	s.mu.Lock()
	d := s.dials[q.GetHandshake()]
	delete(s.dials, q.GetHandshake())
	begun := d != nil && d.begun
	s.mu.Unlock()
	if begun {
		<-d.settled
		s.closeEndpoint(d.endpoint)
	}
	return &backendpb.AbandonReply{}, nil
}

func (s *service) Answer(_ context.Context, q *backendpb.AnswerRequest) (*backendpb.AnswerReply, error) {
	answer, err := s.backend.answer(q.GetPeer(), q.GetOffer())
	return &backendpb.AnswerReply{Answer: answer, Error: errorOf(err)}, nil
}

func (s *service) Fence(_ context.Context, q *backendpb.FenceRequest) (*backendpb.FenceReply, error) {
	s.backend.fence(q.GetPeer())
	return &backendpb.FenceReply{}, nil
}

func (s *service) CloseEndpoint(_ context.Context, q *backendpb.CloseEndpointRequest) (*backendpb.CloseEndpointReply, error) {
	s.closeEndpoint(q.GetEndpoint())
	return &backendpb.CloseEndpointReply{}, nil
}

func (s *service) closeEndpoint(id uint64) {
	s.mu.Lock()
	e := s.endpoints[id]
	delete(s.endpoints, id)
	for n, d := range s.dials {
		if d.endpoint == id {
			delete(s.dials, n)
		}
	}
	for n, session := range s.sessions {
		if session.endpoint == e {
			delete(s.sessions, n)
		}
	}
	s.mu.Unlock()
	if e != nil {
		e.close()
	}
}

func (s *service) OpenSession(ctx context.Context, q *backendpb.OpenSessionRequest) (*backendpb.OpenSessionReply, error) {
	s.mu.Lock()
	e := s.endpoints[q.GetEndpoint()]
	s.mu.Unlock()
	if e == nil {
		return &backendpb.OpenSessionReply{Error: errorOf(&fault{pathDown, "the endpoint is closed"})}, nil
	}
	session, err := e.session(q.GetLocal(), q.GetRemote())
	if err == nil && ctx.Err() == nil {
		s.mu.Lock()
		s.sessions[q.GetSession()] = session
		s.mu.Unlock()
	}
	return &backendpb.OpenSessionReply{Error: errorOf(err)}, nil
}

func (s *service) CloseSession(_ context.Context, q *backendpb.CloseSessionRequest) (*backendpb.CloseSessionReply, error) {
	s.mu.Lock()
	session := s.sessions[q.GetSession()]
	delete(s.sessions, q.GetSession())
	s.mu.Unlock()
	if session != nil {
		session.close()
	}
	return &backendpb.CloseSessionReply{}, nil
}

func (s *service) Close(context.Context, *backendpb.CloseRequest) (*backendpb.CloseReply, error) {
	s.backend.close()
	close(s.closed)
	return &backendpb.CloseReply{}, nil
}

func (s *service) Events(_ *backendpb.EventsRequest, stream backendpb.Backend_EventsServer) error {
	for {
		select {
		case event := <-s.events:
			if err := stream.Send(event); err != nil {
				return err
			}
		case <-stream.Context().Done():
			close(s.unwatched)
			return nil
		}
	}
}

func (s *service) Transfers(stream backendpb.Backend_TransfersServer) error {
	go s.out.drainFrames(stream.Send)
	for {
		frame, err := stream.Recv()
		if err != nil {
			return nil
		}
		switch f := frame.GetFrame().(type) {
		case *backendpb.HostFrame_Post:
			p := f.Post
			numbers := p.GetSegments()
			if len(numbers)%3 != 0 {
				return errors.New("segments have three numbers each")
			}
			t := &transfer{id: p.GetSession(), cookie: p.GetCookie(), op: p.GetOp()}
			for i := 0; i < len(numbers); i += 3 {
				t.segments = append(t.segments, segment{numbers[i], numbers[i+1], numbers[i+2]})
			}
			s.post(t)
		case *backendpb.HostFrame_Cancel:
			s.cancel(f.Cancel.GetSession(), f.Cancel.GetCookie())
		case *backendpb.HostFrame_Memory:
			s.memory.answered(f.Memory)
		}
	}
}

// record takes a record of the submission queue.
func (s *service) record(record []byte) error {
	if len(record) < 24 {
		return errors.New("a record is too short")
	}
	count, id, cookie := order.Uint32(record[4:]), order.Uint64(record[8:]), order.Uint64(record[16:])
	switch {
	case record[0] == 1 && uint64(len(record)) == 24+24*uint64(count) && count > 0 && record[2] == 0 && record[3] == 0:
		t := &transfer{id: id, cookie: cookie, op: uint32(record[1]), segments: make([]segment, count)}
		for i := range t.segments {
			at := record[24+24*i:]
			t.segments[i] = segment{order.Uint64(at), order.Uint64(at[8:]), order.Uint64(at[16:])}
		}
		s.post(t)
	case record[0] == 2 && len(record) == 24 && order.Uint64(record)>>8 == 0:
		s.cancel(id, cookie)
	default:
		return errors.New("a record is malformed")
	}
	return nil
}

func (s *service) find(id uint64) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sessions[id]
}

// post answers every transfer, also one whose session does not exist any more.
func (s *service) post(t *transfer) {
	t.complete = func(outcome byte, err error) {
		c := &completion{session: t.id, cookie: t.cookie, failure: errorOf(err)}
		if err != nil {
			c.outcomes = make([]byte, len(t.segments))
			for i := range c.outcomes {
				c.outcomes[i] = outcome
			}
		}
		s.out.add(c)
	}
	session := s.find(t.id)
	if session == nil {
		t.complete(notSent, &fault{cancelled, "the session is closed"})
		return
	}
	if err := session.post(t); err != nil {
		t.complete(notSent, err)
	}
}

func (s *service) cancel(id, cookie uint64) {
	if session := s.find(id); session != nil {
		session.cancel(cookie)
	}
}

// within checks a range without adding.
func within(offset, length, size uint64) bool {
	return length != 0 && length <= size && offset <= size-length && length <= math.MaxInt32
}
