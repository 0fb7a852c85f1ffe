package rpc_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/conformance"
	pb "github.com/umbp/umbp/plugin-sdk/proto/backendpb"
	"github.com/umbp/umbp/plugin-sdk/reference"
	"github.com/umbp/umbp/plugin-sdk/rpc"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// This file has plugins that are written by hand against the protocol, without a Server. One is whole, and moves bytes
// by messages; the others do something wrong.

// calls answers every call as a plugin would that has no trouble. Tests replace what they want otherwise.
type calls struct {
	pb.UnimplementedBackendServer
	info      *pb.Info
	path      pb.DataPath
	access    pb.MemoryAccess
	takesGPU  bool
	attach    func(context.Context, *pb.AttachRequest) (*pb.AttachReply, error)
	establish func(context.Context, *pb.EstablishRequest) (*pb.EstablishReply, error)
	closing   func()
	closeEnd  func(context.Context, *pb.CloseSessionRequest) (*pb.CloseSessionReply, error)
	events    func(*pb.EventsRequest, grpc.ServerStreamingServer[pb.Event]) error
	transfers func(grpc.BidiStreamingServer[pb.HostFrame, pb.PluginFrame]) error
	opened    chan *pb.OpenSessionRequest // what OpenSession was called with
}

func newCalls(path pb.DataPath, access pb.MemoryAccess) *calls {
	return &calls{
		path: path, access: access, opened: make(chan *pb.OpenSessionRequest, 100),
		info: &pb.Info{Name: "raw", Version: "1", Capabilities: &pb.Capabilities{Ops: 3, Local: 2, Remote: 2, Reach: 2, Window: 1 << 15}},
	}
}

func (c *calls) Open(context.Context, *pb.OpenRequest) (*pb.OpenReply, error) {
	return &pb.OpenReply{Info: c.info, DataPath: c.path, MemoryAccess: c.access, TakesGpu: c.takesGPU}, nil
}

func (c *calls) Attach(ctx context.Context, q *pb.AttachRequest) (*pb.AttachReply, error) {
	return c.attach(ctx, q)
}

func (c *calls) Register(context.Context, *pb.RegisterRequest) (*pb.RegisterReply, error) {
	return &pb.RegisterReply{Key: []byte("key")}, nil
}

func (c *calls) Deregister(context.Context, *pb.DeregisterRequest) (*pb.DeregisterReply, error) {
	return &pb.DeregisterReply{}, nil
}

func (c *calls) Offer(context.Context, *pb.OfferRequest) (*pb.OfferReply, error) {
	return &pb.OfferReply{Handshake: 5, Offer: []byte("offer")}, nil
}

func (c *calls) Answer(context.Context, *pb.AnswerRequest) (*pb.AnswerReply, error) {
	return &pb.AnswerReply{Answer: []byte("answer")}, nil
}

func (c *calls) Establish(ctx context.Context, q *pb.EstablishRequest) (*pb.EstablishReply, error) {
	if c.establish != nil {
		return c.establish(ctx, q)
	}
	return &pb.EstablishReply{Endpoint: 9}, nil
}

func (c *calls) Abandon(context.Context, *pb.AbandonRequest) (*pb.AbandonReply, error) {
	return &pb.AbandonReply{}, nil
}

func (c *calls) OpenSession(_ context.Context, q *pb.OpenSessionRequest) (*pb.OpenSessionReply, error) {
	c.opened <- q
	return &pb.OpenSessionReply{}, nil
}

func (c *calls) CloseSession(ctx context.Context, q *pb.CloseSessionRequest) (*pb.CloseSessionReply, error) {
	if c.closeEnd != nil {
		return c.closeEnd(ctx, q)
	}
	return &pb.CloseSessionReply{}, nil
}

func (c *calls) CloseEndpoint(context.Context, *pb.CloseEndpointRequest) (*pb.CloseEndpointReply, error) {
	return &pb.CloseEndpointReply{}, nil
}

func (c *calls) Close(context.Context, *pb.CloseRequest) (*pb.CloseReply, error) {
	if c.closing != nil {
		c.closing()
	}
	return &pb.CloseReply{}, nil
}

func (c *calls) Ping(context.Context, *pb.PingRequest) (*pb.PingReply, error) {
	return &pb.PingReply{}, nil
}

func (c *calls) Events(q *pb.EventsRequest, s grpc.ServerStreamingServer[pb.Event]) error {
	if c.events != nil {
		return c.events(q, s)
	}
	<-s.Context().Done()
	return nil
}

func (c *calls) Transfers(s grpc.BidiStreamingServer[pb.HostFrame, pb.PluginFrame]) error {
	return c.transfers(s)
}

// rawWire serves c, and returns the plugin's end of the passage, if there is one.
func rawWire(t *testing.T, c pb.BackendServer, passage bool) (w *wire, theirs *shm.Passage) {
	t.Helper()
	w, err := newWire(passage, func(r grpc.ServiceRegistrar, far *shm.Passage) {
		theirs = far
		pb.RegisterBackendServer(r, c)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if theirs != nil {
			theirs.Close()
		}
		w.close()
	})
	return w, theirs
}

// queued is a plugin whose queues are in the test's hands.
type queued struct {
	*calls
	*rpc.Client
	submissions, completions *shm.Queue
	memory                   conformance.Memory
}

func openQueued(t *testing.T, change func(*calls), callTimeout time.Duration) *queued {
	t.Helper()
	p := &queued{calls: newCalls(pb.DataPath_DATA_PATH_QUEUES, pb.MemoryAccess_MEMORY_ACCESS_MAPPED)}
	if change != nil {
		change(p.calls)
	}
	w, theirs := rawWire(t, p.calls, true)
	p.attach = func(_ context.Context, q *pb.AttachRequest) (*pb.AttachReply, error) {
		tag, files, err := theirs.Receive()
		if err != nil || tag != q.GetTag() || len(files) != 4 {
			return nil, fmt.Errorf("message %d of %d files, %v; want %d", tag, len(files), err, q.GetTag())
		}
		p.submissions, err = shm.Attach(files[0], files[1])
		if err != nil {
			return nil, err
		}
		p.completions, err = shm.Attach(files[2], files[3])
		return &pb.AttachReply{}, err
	}
	ctx, cancel := patient(t)
	defer cancel()
	var err error
	p.Client, err = rpc.Open(ctx, rpc.Options{
		Name: "raw", Conn: w.conn, Passage: w.host, Config: backend.Config{Self: near}, CallTimeout: callTimeout,
	})
	if err != nil {
		t.Fatal(err)
	}
	if p.memory, err = conformance.SealedMemory(1 << 20); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Lost(errors.New("the test is over"))
		if err := p.Client.Close(); err != nil {
			t.Error(err)
		}
		p.submissions.Close()
		p.completions.Close()
		p.memory.Free()
	})
	if _, err := p.Client.Register(ctx, backend.Memory{Region: 1, Kind: backend.HostMemory, Bytes: p.memory.Bytes, FD: p.memory.FD}); err != nil {
		t.Fatal(err)
	}
	return p
}

// bound is a session of a raw plugin, and what its sink has got.
type bound struct {
	backend.Session
	endpoint backend.Endpoint
	id       uint64 // of the session

	heard func() // called within Complete, may be nil

	mu   sync.Mutex
	got  []backend.Completion
	more chan struct{}
}

func (b *bound) Complete(c backend.Completion) {
	if b.heard != nil {
		b.heard()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	c.Outcomes = slices.Clone(c.Outcomes)
	b.got = append(b.got, c)
	select {
	case b.more <- struct{}{}:
	default:
	}
}

func (b *bound) completions() []backend.Completion {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.got)
}

// wait waits until n completions are there, and returns them.
func (b *bound) wait(t *testing.T, n int) []backend.Completion {
	t.Helper()
	for {
		if got := b.completions(); len(got) >= n {
			return got
		}
		select {
		case <-b.more:
		case <-time.After(patience):
			t.Fatalf("%d completions, want %d", len(b.completions()), n)
		}
	}
}

// patience is how long a test waits for what must happen.
const patience = time.Minute

// settle is how long a test leaves something the chance to happen that must not.
const settle = 20 * time.Millisecond

func await(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("%s: nothing after %s", what, patience)
	}
}

// patient returns a context for what has to work: some clients here have little patience of their own.
func patient(t *testing.T) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), patience)
}

func bind(t *testing.T, c *calls, b backend.Backend) *bound {
	t.Helper()
	ctx, cancel := patient(t)
	defer cancel()
	endpoint, err := reference.Connect(ctx, b, near, b, far)
	if err != nil {
		t.Fatal(err)
	}
	s := &bound{endpoint: endpoint, more: make(chan struct{}, 1)}
	s.Session, err = endpoint.Session(ctx, 1, backend.Remote{
		Peer: far, Region: 1, Kind: backend.HostMemory, Rights: backend.RemoteRead | backend.RemoteWrite, Size: 1 << 20, Key: []byte("key"),
	}, s)
	if err != nil {
		t.Fatal(err)
	}
	s.id = (<-c.opened).GetSession()
	return s
}

func (b *bound) mustPost(t *testing.T, cookie uint64, segments ...backend.Segment) {
	t.Helper()
	if err := b.Post(backend.Transfer{Op: backend.Write, Cookie: cookie, Segments: segments}); err != nil {
		t.Fatal(err)
	}
}

// nextPost takes a Post out of the queue.
func (p *queued) nextPost(t *testing.T) shm.Post {
	t.Helper()
	record, err := p.submissions.Receive(nil)
	if err != nil {
		t.Fatal(err)
	}
	post, err := shm.ParsePost(record, nil)
	if err != nil {
		t.Fatal(err)
	}
	return post
}

func (p *queued) send(t *testing.T, record []byte) {
	t.Helper()
	if _, err := p.completions.Send(record); err != nil {
		t.Fatal(err)
	}
}

func completion(session, cookie uint64, outcomes ...backend.Outcome) []byte {
	c := shm.Completion{Session: session, Cookie: cookie, Outcomes: outcomes}
	if len(outcomes) > 0 {
		c.Error = []byte{8, byte(backend.PathDown)} // the field code
	}
	return shm.AppendCompletion(nil, &c)
}

// TestPluginsThatBreak: what makes no sense breaks the client. It completes nothing: only the end of the process does.
func TestPluginsThatBreak(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, p *queued, b *bound, post shm.Post){
		"a session that does not exist": func(t *testing.T, p *queued, b *bound, post shm.Post) {
			p.send(t, completion(post.Session+1, post.Cookie))
		},
		"a transfer that does not exist": func(t *testing.T, p *queued, b *bound, post shm.Post) {
			p.send(t, completion(post.Session, post.Cookie+1))
		},
		"a transfer that has completed": func(t *testing.T, p *queued, b *bound, post shm.Post) {
			b.mustPost(t, 8, backend.Segment{Length: 1})
			p.nextPost(t)
			p.send(t, completion(post.Session, 8))
			p.send(t, completion(post.Session, 8))
		},
		"more outcomes than segments": func(t *testing.T, p *queued, b *bound, post shm.Post) {
			p.send(t, completion(post.Session, post.Cookie, 1, 1, 1))
		},
		"an outcome that does not exist": func(t *testing.T, p *queued, b *bound, post shm.Post) {
			p.send(t, completion(post.Session, post.Cookie, 4))
		},
		"an error that cannot be read": func(t *testing.T, p *queued, b *bound, post shm.Post) {
			p.send(t, append(completion(post.Session, post.Cookie), 0xff))
		},
		"a record that is none": func(t *testing.T, p *queued, b *bound, post shm.Post) {
			p.send(t, []byte("rubbish, and more of it than a head"))
		},
		"a record that is not for the host": func(t *testing.T, p *queued, b *bound, post shm.Post) {
			p.send(t, shm.AppendPost(nil, &post))
		},
		"a position that cannot be": func(t *testing.T, p *queued, b *bound, post shm.Post) {
			memory, wake := p.completions.Files()
			if _, err := memory.WriteAt([]byte("\xff\xff\xff\xff\xff\xff\xff\x7f"), 64); err != nil {
				t.Fatal(err)
			}
			if _, err := wake.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := openQueued(t, nil, 0)
			b := bind(t, p.calls, p.Client)
			b.mustPost(t, 7, backend.Segment{Length: 4096}, backend.Segment{Local: 8192, Remote: 8192, Length: 1})
			post := p.nextPost(t)
			before := len(b.completions())
			spoil(t, p, b, post)
			await(t, "Broken", p.Broken())
			await(t, "Endpoint.Done", b.endpoint.Done())
			if p.Err() == nil {
				t.Error("Err is nil")
			}
			err := b.Post(backend.Transfer{Op: backend.Write, Cookie: 9, Segments: []backend.Segment{{Length: 1}}})
			if !errors.Is(err, backend.ErrPathDown) {
				t.Errorf("Post: %v, want PathDown", err)
			}
			if err := p.Client.Fence(t.Context(), far); !errors.Is(err, backend.ErrPathDown) || !strings.Contains(err.Error(), p.Err().Error()) {
				t.Errorf("Fence: %v, want PathDown because of %v", err, p.Err())
			}
			time.Sleep(settle)
			for _, c := range b.completions()[before:] {
				if c.Cookie == 7 {
					t.Errorf("the transfer completed with %v, and the plugin may still be at it", c.Err)
				}
			}
			if n := p.InFlight(); n != 1 {
				t.Errorf("%d in flight, want 1", n)
			}
			cause := errors.New("killed")
			p.Lost(cause)
			got := b.completions()
			last := got[len(got)-1]
			if last.Cookie != 7 || !errors.Is(last.Err, backend.ErrPathDown) || !errors.Is(last.Err, cause) || len(last.Outcomes) != 0 {
				t.Errorf("after Lost: %+v, want cookie 7, in doubt, PathDown because of %v", last, cause)
			}
			if p.InFlight() != 0 {
				t.Error("something is in flight after Lost")
			}
		})
	}
}

// TestCompletionAfterClose: a session is closed when nothing is in flight, and nothing may come after.
func TestCompletionAfterClose(t *testing.T) {
	p := openQueued(t, nil, 0)
	b := bind(t, p.calls, p.Client)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	p.send(t, completion(b.id, 1))
	await(t, "Broken", p.Broken())
}

// TestBusyIsNoEnd: a transfer cannot end with Busy; a plugin that says so is wrong, and not more.
func TestBusyIsNoEnd(t *testing.T) {
	p := openQueued(t, nil, 0)
	b := bind(t, p.calls, p.Client)
	b.mustPost(t, 7, backend.Segment{Length: 1})
	p.nextPost(t)
	p.send(t, shm.AppendCompletion(nil, &shm.Completion{Session: b.id, Cookie: 7, Error: []byte{8, byte(backend.Busy)}, Outcomes: []backend.Outcome{backend.Failed}}))
	if c := b.wait(t, 1)[0]; backend.CodeOf(c.Err) != backend.Internal || !slices.Equal(c.Outcomes, []backend.Outcome{backend.Failed}) {
		t.Errorf("completed with %+v, want Internal", c)
	}
}

// TestLost: what the plugin has taken is in doubt, the rest was not sent.
func TestLost(t *testing.T) {
	p := openQueued(t, nil, 0)
	b := bind(t, p.calls, p.Client)
	b.mustPost(t, 1, backend.Segment{Length: 1}, backend.Segment{Remote: 1, Length: 1})
	b.mustPost(t, 2, backend.Segment{Length: 1}, backend.Segment{Remote: 1, Length: 1})
	b.mustPost(t, 3, backend.Segment{Length: 1})
	p.nextPost(t)
	if n := p.InFlight(); n != 3 {
		t.Errorf("%d in flight, want 3", n)
	}
	cause := errors.New("signal: killed")
	p.Lost(cause)
	p.Lost(errors.New("once more"))
	got := b.completions()
	slices.SortFunc(got, func(x, y backend.Completion) int { return int(x.Cookie) - int(y.Cookie) })
	want := [][]backend.Outcome{nil, {backend.NotSent, backend.NotSent}, {backend.NotSent}}
	if len(got) != len(want) {
		t.Fatalf("%d completions, want %d", len(got), len(want))
	}
	for i, c := range got {
		if !slices.Equal(c.Outcomes, want[i]) || !errors.Is(c.Err, backend.ErrPathDown) || !errors.Is(c.Err, cause) {
			t.Errorf("transfer %d: %+v, want outcomes %v and PathDown because of %v", c.Cookie, c, want[i], cause)
		}
	}
	await(t, "Endpoint.Done", b.endpoint.Done())
	refused := map[string]error{
		"Post":      b.Post(backend.Transfer{Op: backend.Write, Segments: []backend.Segment{{Length: 1}}}),
		"Ping":      p.Client.Ping(t.Context()),
		"Fence":     p.Client.Fence(t.Context(), far),
		"Establish": second(reference.Connect(t.Context(), p.Client, near, p.Client, far)),
		"Answer":    second(p.Client.Answer(t.Context(), far, nil)),
		"Session":   second(b.endpoint.Session(t.Context(), 1, backend.Remote{Kind: backend.HostMemory}, b)),
		"Register": second(p.Client.Register(t.Context(), backend.Memory{
			Region: 2, Kind: backend.HostMemory, Bytes: p.memory.Bytes, FD: p.memory.FD,
		})),
	}
	for what, err := range refused {
		if !errors.Is(err, backend.ErrPathDown) || !errors.Is(err, cause) {
			t.Errorf("%s: %v, want PathDown because of %v", what, err, cause)
		}
	}
	for what, err := range map[string]error{
		"Session.Close": b.Close(), "Endpoint.Close": b.endpoint.Close(), "Close": p.Client.Close(),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if p.Err() != nil {
		t.Errorf("a plugin that is lost is broken, too: %v", p.Err())
	}
}

func second[T any](_ T, err error) error { return err }

// TestFullQueue: when the plugin takes nothing, Post says Busy, and what is cancelled waits. Then everything arrives,
// each Cancel once, and behind its Post.
func TestFullQueue(t *testing.T) {
	p := openQueued(t, nil, 0)
	b := bind(t, p.calls, p.Client)
	big, small := slices.Repeat([]backend.Segment{{Length: 1}}, shm.MaxSegments), []backend.Segment{{Length: 1}}
	cookie := uint64(0)
	post := func(segments []backend.Segment) error {
		cookie++
		return b.Post(backend.Transfer{Op: backend.Write, Cookie: cookie, Segments: segments})
	}
	for _, segments := range [][]backend.Segment{big, small} {
		for {
			err := post(segments)
			if errors.Is(err, backend.ErrBusy) {
				cookie--
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	posted := int(cookie)
	if p.InFlight() != posted {
		t.Errorf("%d in flight, want %d: what was refused is not", p.InFlight(), posted)
	}
	for range 2 {
		for c := range cookie {
			b.Cancel(c + 1)
		}
	}
	const posts, cancels = 1, 2
	seen := map[uint64]int{}
	for range 2 * posted {
		record, err := p.submissions.Receive(nil)
		if err != nil {
			t.Fatal(err)
		}
		switch shm.KindOf(record) {
		case shm.PostRecord:
			q, err := shm.ParsePost(record, nil)
			if err != nil || seen[q.Cookie] != 0 {
				t.Fatalf("a Post of %d, %v, after %d", q.Cookie, err, seen[q.Cookie])
			}
			seen[q.Cookie] |= posts
		default:
			q, err := shm.ParseCancel(record)
			if err != nil || seen[q.Cookie] != posts {
				t.Fatalf("a Cancel of %d, %v, after %d", q.Cookie, err, seen[q.Cookie])
			}
			seen[q.Cookie] |= cancels
		}
	}
	b.mustPost(t, 1<<40, small...)
	if q := p.nextPost(t); q.Cookie != 1<<40 {
		t.Errorf("next comes %d: something came twice", q.Cookie)
	}
}

// TestFlushesThatNobodyTakes: a plugin that asks for them and does not take them is broken; they do not pile up.
func TestFlushesThatNobodyTakes(t *testing.T) {
	ask := make(chan struct{})
	p := openQueued(t, func(c *calls) {
		c.events = func(_ *pb.EventsRequest, s grpc.ServerStreamingServer[pb.Event]) error {
			<-ask
			for cookie := range uint64(10000) {
				if err := s.Send(&pb.Event{Event: &pb.Event_Flush{Flush: &pb.Flush{Cookie: cookie}}}); err != nil {
					return err
				}
			}
			<-s.Context().Done()
			return nil
		}
	}, 0)
	b := bind(t, p.calls, p.Client)
	cookie := uint64(0)
	for _, n := range []int{shm.MaxSegments, 1} {
		for b.Post(backend.Transfer{Op: backend.Write, Cookie: cookie, Segments: slices.Repeat([]backend.Segment{{Length: 1}}, n)}) == nil {
			cookie++
		}
	}
	close(ask)
	await(t, "Broken", p.Broken())
	if !strings.Contains(p.Err().Error(), "asks for flushes and takes none") {
		t.Errorf("it is broken because of %v", p.Err())
	}
}

// TestCancelIsNotLost cancels while the transfer is being posted. The plugin completes nothing but what it sees
// cancelled, and a Cancel that overtakes its Post has no effect.
func TestCancelIsNotLost(t *testing.T) {
	p := openQueued(t, nil, 0)
	b := bind(t, p.calls, p.Client)
	var plugin sync.WaitGroup
	defer plugin.Wait()
	defer p.submissions.Close()
	plugin.Go(func() {
		posted := map[uint64]bool{}
		for {
			record, err := p.submissions.Receive(nil)
			if err != nil {
				return
			}
			if q, err := shm.ParsePost(record, nil); err == nil {
				posted[q.Cookie] = true
			} else if q, err := shm.ParseCancel(record); err == nil && posted[q.Cookie] {
				delete(posted, q.Cookie)
				_, _ = p.completions.Send(completion(q.Session, q.Cookie, backend.NotSent))
			}
		}
	})
	segments := slices.Repeat([]backend.Segment{{Length: 1}}, 2000)
	for cookie := range uint64(500) {
		posted := make(chan struct{})
		var canceller sync.WaitGroup
		canceller.Go(func() {
			for {
				b.Cancel(cookie)
				select {
				case <-posted:
					b.Cancel(cookie)
					return
				default:
				}
			}
		})
		b.mustPost(t, cookie, segments...)
		close(posted)
		canceller.Wait()
		b.wait(t, int(cookie)+1)
	}
}

// TestLostStream: what has not been given to the stream was not sent.
func TestLostStream(t *testing.T) {
	raw := newCalls(pb.DataPath_DATA_PATH_STREAM, pb.MemoryAccess_MEMORY_ACCESS_MESSAGES)
	taken := make(chan uint64, 1)
	raw.transfers = func(s grpc.BidiStreamingServer[pb.HostFrame, pb.PluginFrame]) error {
		frame, err := s.Recv()
		if err != nil {
			return err
		}
		taken <- frame.GetPost().GetCookie()
		<-s.Context().Done() // and takes no more
		return nil
	}
	w, _ := rawWire(t, raw, false)
	client, err := rpc.Open(t.Context(), rpc.Options{Name: "raw", Conn: w.conn})
	if err != nil {
		t.Fatal(err)
	}
	lendPlain(t, client, 1<<20, 0)
	b := bind(t, raw, client)
	last := uint64(0)
	for { // until the stream is full, and what waits for it as well
		err := b.Post(backend.Transfer{Op: backend.Write, Cookie: last, Segments: slices.Repeat([]backend.Segment{{Length: 1}}, shm.MaxSegments)})
		if errors.Is(err, backend.ErrBusy) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		last++
	}
	if cookie := <-taken; cookie != 0 {
		t.Fatalf("transfer %d came first", cookie)
	}
	client.Lost(errors.New("killed"))
	got := b.completions()
	if len(got) != int(last) {
		t.Fatalf("%d completions, want %d", len(got), last)
	}
	for _, c := range got {
		switch c.Cookie {
		case 0:
			if len(c.Outcomes) != 0 {
				t.Errorf("what the plugin has taken ends with %v, want in doubt", c.Outcomes[0])
			}
		case last - 1:
			if len(c.Outcomes) != shm.MaxSegments || c.Outcomes[0] != backend.NotSent {
				t.Errorf("what waited ends with %d outcomes, want not sent", len(c.Outcomes))
			}
		}
	}
}

// TestCookieInFlight: two transfers of one cookie could not be told apart.
func TestCookieInFlight(t *testing.T) {
	p := openQueued(t, nil, 0)
	b := bind(t, p.calls, p.Client)
	b.mustPost(t, 1, backend.Segment{Length: 1})
	if err := b.Post(backend.Transfer{Op: backend.Write, Cookie: 1, Segments: []backend.Segment{{Length: 1}}}); !errors.Is(err, backend.ErrBadRequest) {
		t.Errorf("got %v, want BadRequest", err)
	}
}

// TestPluginsThatDoNotAnswer: closing breaks them, and waits for the end of the process.
func TestPluginsThatDoNotAnswer(t *testing.T) {
	hang := make(chan struct{})
	defer close(hang)
	for name, change := range map[string]func(*calls){
		"no completion": nil,
		"no answer": func(c *calls) {
			c.closeEnd = func(ctx context.Context, _ *pb.CloseSessionRequest) (*pb.CloseSessionReply, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}
		},
		"not even a status": func(c *calls) {
			c.closeEnd = func(context.Context, *pb.CloseSessionRequest) (*pb.CloseSessionReply, error) {
				<-hang
				return nil, io.EOF
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := openQueued(t, change, 30*time.Millisecond)
			b := bind(t, p.calls, p.Client)
			b.mustPost(t, 7, backend.Segment{Length: 1})
			p.nextPost(t)
			closed := make(chan struct{})
			go func() {
				defer close(closed)
				if err := b.Close(); err != nil {
					t.Error(err)
				}
			}()
			await(t, "Broken", p.Broken())
			select {
			case <-closed:
				t.Error("Close has returned with a transfer in flight")
			case <-time.After(settle):
			}
			p.Lost(errors.New("killed"))
			await(t, "Close", closed)
			b.wait(t, 1)
		})
	}
}

func TestStreamEnds(t *testing.T) {
	end := make(chan struct{})
	p := openQueued(t, func(c *calls) {
		c.events = func(_ *pb.EventsRequest, s grpc.ServerStreamingServer[pb.Event]) error {
			<-end
			return s.Send(&pb.Event{}) // of a later version
		}
	}, 0)
	close(end)
	await(t, "Broken", p.Broken())
	if !strings.Contains(p.Err().Error(), "the stream of events") {
		t.Errorf("it is broken because of %v", p.Err())
	}
}

func TestOneEndpointTwice(t *testing.T) {
	p := openQueued(t, nil, 0)
	if _, err := reference.Connect(t.Context(), p.Client, near, p.Client, far); err != nil {
		t.Fatal(err)
	}
	if _, err := reference.Connect(t.Context(), p.Client, near, p.Client, far); !errors.Is(err, backend.ErrInternal) {
		t.Errorf("got %v, want Internal", err)
	}
	await(t, "Broken", p.Broken())
}

// TestDownBeforeItIsKnown: an endpoint may fail before the answer to Establish has arrived.
func TestDownBeforeItIsKnown(t *testing.T) {
	down := make(chan *pb.Event)
	sent := make(chan struct{})
	p := openQueued(t, func(c *calls) {
		c.events = func(_ *pb.EventsRequest, s grpc.ServerStreamingServer[pb.Event]) error {
			for {
				select {
				case e := <-down:
					if err := s.Send(e); err != nil {
						return err
					}
					sent <- struct{}{}
				case <-s.Context().Done():
					return nil
				}
			}
		}
		c.establish = func(ctx context.Context, _ *pb.EstablishRequest) (*pb.EstablishReply, error) {
			down <- &pb.Event{Event: &pb.Event_EndpointDown{EndpointDown: &pb.EndpointDown{Endpoint: 9}}}
			<-sent
			time.Sleep(settle) // it may be on its way; the other order is no problem
			return &pb.EstablishReply{Endpoint: 9}, nil
		}
	}, 0)
	endpoint, err := reference.Connect(t.Context(), p.Client, near, p.Client, far)
	if err != nil {
		t.Fatal(err)
	}
	await(t, "Endpoint.Done", endpoint.Done())
}

func TestOpenRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*calls)
		code   backend.Code
		want   string
	}{
		"another name": {func(c *calls) { c.info.Name = "other" }, backend.BadRequest, `the plugin calls its backend "other"`},
		"nonsense":     {func(c *calls) { c.info.Capabilities.Window = 0 }, backend.Internal, "a window of 0"},
		"queues":       {func(c *calls) { c.path = pb.DataPath_DATA_PATH_QUEUES }, backend.Internal, "the plugin has chosen DATA_PATH_QUEUES"},
		"mapping":      {func(c *calls) { c.access = pb.MemoryAccess_MEMORY_ACCESS_MAPPED }, backend.Internal, "and MEMORY_ACCESS_MAPPED"},
		"no choice":    {func(c *calls) { c.path = 0 }, backend.Internal, "DATA_PATH_UNSPECIFIED"},
	} {
		t.Run(name, func(t *testing.T) {
			raw := newCalls(pb.DataPath_DATA_PATH_STREAM, pb.MemoryAccess_MEMORY_ACCESS_MESSAGES)
			c.change(raw)
			w, _ := rawWire(t, raw, false)
			_, err := rpc.Open(t.Context(), rpc.Options{Name: "raw", Conn: w.conn})
			if backend.CodeOf(err) != c.code || !strings.Contains(fmt.Sprint(err), c.want) {
				t.Errorf("got %v, want %v: %s", err, c.code, c.want)
			}
		})
	}
}

// hand is a whole plugin that is written by hand: it moves bytes by messages. A pair of them knows each other, as by a
// wire.
type hand struct {
	*calls
	peer *hand

	mu      sync.Mutex
	stream  grpc.BidiStreamingServer[pb.HostFrame, pb.PluginFrame]
	lastID  uint64
	waiting map[uint64]chan *pb.MemoryReply
	remotes map[uint64]*pb.OpenSessionRequest
	copies  sync.WaitGroup
}

func newHand() *hand {
	h := &hand{
		calls:   newCalls(pb.DataPath_DATA_PATH_STREAM, pb.MemoryAccess_MEMORY_ACCESS_MESSAGES),
		waiting: map[uint64]chan *pb.MemoryReply{}, remotes: map[uint64]*pb.OpenSessionRequest{},
	}
	h.transfers = h.run
	return h
}

func (h *hand) OpenSession(ctx context.Context, q *pb.OpenSessionRequest) (*pb.OpenSessionReply, error) {
	h.mu.Lock()
	h.remotes[q.GetSession()] = q
	h.mu.Unlock()
	return h.calls.OpenSession(ctx, q)
}

// run receives posts and memory.
func (h *hand) run(stream grpc.BidiStreamingServer[pb.HostFrame, pb.PluginFrame]) error {
	h.mu.Lock()
	h.stream = stream
	h.mu.Unlock()
	defer h.copies.Wait()
	for {
		frame, err := stream.Recv()
		if err != nil {
			h.mu.Lock()
			for _, w := range h.waiting {
				close(w)
			}
			h.waiting = nil
			h.mu.Unlock()
			return nil
		}
		switch f := frame.GetFrame().(type) {
		case *pb.HostFrame_Post:
			h.copies.Go(func() { h.copy(f.Post) })
		case *pb.HostFrame_Memory:
			h.mu.Lock()
			w := h.waiting[f.Memory.GetId()]
			delete(h.waiting, f.Memory.GetId())
			h.mu.Unlock()
			w <- f.Memory
		}
	}
}

func (h *hand) send(frame *pb.PluginFrame) {
	h.mu.Lock()
	defer h.mu.Unlock()
	_ = h.stream.Send(frame)
}

// ask asks the host for memory, or stores there. Nil: the host is gone.
func (h *hand) ask(q *pb.MemoryRequest) *pb.MemoryReply {
	w := make(chan *pb.MemoryReply, 1)
	h.mu.Lock()
	if h.waiting == nil {
		h.mu.Unlock()
		return nil
	}
	h.lastID++
	q.Id = h.lastID
	h.waiting[q.Id] = w
	h.mu.Unlock()
	h.send(&pb.PluginFrame{Frame: &pb.PluginFrame_Memory{Memory: q}})
	return <-w
}

// copy carries out one transfer, 1 MiB at a time.
func (h *hand) copy(post *pb.Post) {
	h.mu.Lock()
	s := h.remotes[post.GetSession()]
	h.mu.Unlock()
	c := &pb.Completion{Session: post.GetSession(), Cookie: post.GetCookie()}
	for n := post.GetSegments(); len(n) > 0 && c.Error == nil; n = n[3:] {
		from, to := h, h.peer
		load := &pb.MemoryRequest{Region: s.GetLocal(), Offset: n[0], Length: n[2]}
		store := &pb.MemoryRequest{Region: s.GetRemote().GetRegion(), Offset: n[1], Length: n[2], Store: true}
		if backend.Op(post.GetOp()) == backend.Read {
			from, to = to, from
			load.Region, load.Offset, store.Region, store.Offset = store.Region, store.Offset, load.Region, load.Offset
		}
		loaded := from.ask(load)
		if c.Error = loaded.GetError(); c.Error == nil {
			store.Data = loaded.GetData()
			c.Error = to.ask(store).GetError()
		}
	}
	if c.Error != nil {
		c.Outcomes = bytes.Repeat([]byte{byte(backend.Failed)}, len(post.GetSegments())/3)
	}
	h.send(&pb.PluginFrame{Frame: &pb.PluginFrame_Completion{Completion: c}})
}

func openHand(t *testing.T, h *hand) *rpc.Client {
	t.Helper()
	w, _ := rawWire(t, h, false)
	c, err := rpc.Open(t.Context(), rpc.Options{Name: "raw", Conn: w.conn, Config: backend.Config{Self: near}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// lendPlain lends memory that has no descriptor.
func lendPlain(t *testing.T, c *rpc.Client, size int, rights backend.Rights) []byte {
	t.Helper()
	memory := make([]byte, size)
	for i := range memory {
		memory[i] = byte(i * (3 + int(rights)) >> 4)
	}
	if _, err := c.Register(t.Context(), backend.Memory{Region: 1, Kind: backend.HostMemory, Rights: rights, Bytes: memory, FD: -1}); err != nil {
		t.Fatal(err)
	}
	return memory
}

// TestMemoryByMessages moves bytes with plugins that know nothing of shared memory.
func TestMemoryByMessages(t *testing.T) {
	a, b := newHand(), newHand()
	a.peer = b
	near, far := openHand(t, a), openHand(t, b)
	here, there := lendPlain(t, near, 1<<20, 0), lendPlain(t, far, 1<<20, backend.RemoteRead|backend.RemoteWrite)
	s := bind(t, a.calls, near)
	segments := []backend.Segment{{Local: 5, Remote: 100, Length: 70000}, {Local: 200000, Remote: 300000, Length: 1}, {Local: 400000, Remote: 500000, Length: 400001}}
	for i, op := range []backend.Op{backend.Write, backend.Read} {
		wantHere, wantThere := bytes.Clone(here), bytes.Clone(there)
		for _, g := range segments {
			if l, r := wantHere[g.Local:][:g.Length], wantThere[g.Remote:][:g.Length]; op == backend.Write {
				copy(r, l)
			} else {
				copy(l, r)
			}
		}
		if err := s.Post(backend.Transfer{Op: op, Cookie: uint64(i), Segments: segments}); err != nil {
			t.Fatal(err)
		}
		if c := s.wait(t, i+1)[i]; c.Err != nil || c.Cookie != uint64(i) {
			t.Fatalf("a %s completed with %+v", op, c)
		}
		if !bytes.Equal(here, wantHere) || !bytes.Equal(there, wantThere) {
			t.Errorf("after a %s a byte is wrong", op)
		}
		for k := range there {
			there[k] ^= 0x5a
		}
	}
}

// TestGPUMemoryNeedsANewPlugin: one that was built before memory of a GPU could be lent would wait for a descriptor, and one
// that asks for bytes by messages could not be given any.
func TestGPUMemoryNeedsANewPlugin(t *testing.T) {
	claim := func(c *calls) { c.info.Capabilities.Local = 6 }
	old := openQueued(t, claim, 0)
	messages := newHand()
	claim(messages.calls)
	for want, c := range map[string]*rpc.Client{"build it with a newer SDK": old.Client, "asks for memory by messages": openHand(t, messages)} {
		_, err := c.Register(t.Context(), gpuMemory(9))
		if backend.CodeOf(err) != backend.Unsupported || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want Unsupported: %s", err, want)
		}
	}
}

// TestGPUMemoryIsAsLargeAsItsRange: what is posted is checked against it, and the place of the far end travels.
func TestGPUMemoryIsAsLargeAsItsRange(t *testing.T) {
	p := openQueued(t, func(c *calls) { c.info.Capabilities.Local, c.info.Capabilities.Remote, c.takesGPU = 6, 6, true }, 0)
	m := gpuMemory(9)
	if _, err := p.Client.Register(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	h, err := p.Client.Offer(t.Context(), far)
	if err != nil {
		t.Fatal(err)
	}
	e, err := h.Establish(t.Context(), []byte("answer"))
	if err != nil {
		t.Fatal(err)
	}
	remote := farRegion
	remote.Kind, remote.Place = backend.GPUMemory, "0000:c2:00.0"
	s, err := e.Session(t.Context(), 9, remote, &bound{more: make(chan struct{}, 1)})
	if err != nil {
		t.Fatal(err)
	}
	if got := (<-p.opened).GetRemote(); got.GetPlace() != "0000:c2:00.0" || got.GetKind() != 2 {
		t.Errorf("the plugin was asked for %v", got)
	}
	for _, g := range []backend.Segment{{Local: 1, Length: 4096}, {Local: 4096, Length: 1}, {Local: 1<<64 - 1, Length: 2}} {
		if err := s.Post(backend.Transfer{Op: backend.Read, Segments: []backend.Segment{g}}); backend.CodeOf(err) != backend.BadRequest {
			t.Errorf("%+v of a region of %d bytes: %v", g, m.Size(), err)
		}
	}
}

// TestMemoryIsChecked: what the plugin asks for has to be within a region that is registered.
func TestMemoryIsChecked(t *testing.T) {
	h := newHand()
	c := openHand(t, h)
	memory := lendPlain(t, c, 1<<20+1, 0)
	before := bytes.Clone(memory)
	for name, q := range map[string]*pb.MemoryRequest{
		"no such region":   {Region: 2, Length: 1},
		"no length":        {Region: 1},
		"too much":         {Region: 1, Length: 1<<20 + 1},
		"one byte past":    {Region: 1, Offset: 1 << 20, Length: 2},
		"behind the end":   {Region: 1, Offset: 1<<20 + 1, Length: 1},
		"an overflow":      {Region: 1, Offset: 1<<64 - 1, Length: 2},
		"less than length": {Region: 1, Length: 3, Store: true, Data: []byte("ab")},
		"more than length": {Region: 1, Length: 1, Store: true, Data: []byte("ab")},
		"store past end":   {Region: 1, Offset: 1 << 20, Length: 2, Store: true, Data: []byte("ab")},
	} {
		if r := h.ask(q); r.GetError().GetCode() != uint32(backend.BadRequest) || r.GetData() != nil {
			t.Errorf("%s: %v", name, r)
		}
	}
	if !bytes.Equal(memory, before) {
		t.Error("what was refused has been stored")
	}
	if r := h.ask(&pb.MemoryRequest{Region: 1, Offset: 1, Length: 1 << 20}); r.GetError() != nil || !bytes.Equal(r.GetData(), memory[1:]) {
		t.Errorf("the largest request: %v", r.GetError())
	}
	if err := c.Deregister(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	if r := h.ask(&pb.MemoryRequest{Region: 1, Length: 1}); r.GetError().GetCode() != uint32(backend.BadRequest) {
		t.Errorf("after Deregister: %v", r)
	}
}

// TestMemoryRequestsThatBreak: those that come in too great a number, and those of a plugin that has chosen otherwise.
func TestMemoryRequestsThatBreak(t *testing.T) {
	frame := func(q *pb.MemoryRequest) *pb.PluginFrame {
		return &pb.PluginFrame{Frame: &pb.PluginFrame_Memory{Memory: q}}
	}
	for name, c := range map[string]struct {
		path   pb.DataPath
		access pb.MemoryAccess
		send   *pb.PluginFrame
		want   string
	}{
		"many": {pb.DataPath_DATA_PATH_STREAM, pb.MemoryAccess_MEMORY_ACCESS_MESSAGES,
			frame(&pb.MemoryRequest{Region: 1, Length: 1 << 20}), "more than 16 requests open"},
		"mapped": {pb.DataPath_DATA_PATH_STREAM, pb.MemoryAccess_MEMORY_ACCESS_MAPPED,
			frame(&pb.MemoryRequest{Region: 1, Length: 1}), "although it has chosen to map it"},
		"outcome": {pb.DataPath_DATA_PATH_STREAM, pb.MemoryAccess_MEMORY_ACCESS_MESSAGES,
			&pb.PluginFrame{Frame: &pb.PluginFrame_Completion{Completion: &pb.Completion{Outcomes: []byte{9}}}}, "outcome 9"},
	} {
		t.Run(name, func(t *testing.T) {
			raw := newCalls(c.path, c.access)
			registered := make(chan struct{})
			raw.transfers = func(s grpc.BidiStreamingServer[pb.HostFrame, pb.PluginFrame]) error {
				<-registered
				for range 40 { // and takes no answer
					if err := s.Send(c.send); err != nil {
						break
					}
				}
				<-s.Context().Done()
				return nil
			}
			w, _ := rawWire(t, raw, true)
			client, err := rpc.Open(t.Context(), rpc.Options{Name: "raw", Conn: w.conn, Passage: w.host})
			if err != nil {
				t.Fatal(err)
			}
			defer client.Lost(errors.New("killed"))
			m, err := conformance.SealedMemory(1 << 20)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Free()
			if _, err := client.Register(t.Context(), backend.Memory{Region: 1, Kind: backend.HostMemory, Bytes: m.Bytes, FD: m.FD}); err != nil {
				t.Fatal(err)
			}
			close(registered)
			await(t, "Broken", client.Broken())
			if !strings.Contains(client.Err().Error(), c.want) {
				t.Errorf("it is broken because of %v, want %q", client.Err(), c.want)
			}
		})
	}
}

// TestPingWhileItCloses: a plugin that takes its time to close its backend is alive.
func TestPingWhileItCloses(t *testing.T) {
	asked, release := make(chan struct{}), make(chan struct{})
	p := openQueued(t, func(c *calls) {
		c.closing = func() { close(asked); <-release }
	}, 0)
	closed := make(chan error, 1)
	go func() { closed <- p.Client.Close() }()
	await(t, "the call of Close", asked)
	if err := p.Client.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	close(release)
	if err := <-closed; err != nil {
		t.Error(err)
	}
}
