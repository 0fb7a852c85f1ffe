package rpc_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/conformance"
	"github.com/umbp/umbp/plugin-sdk/null"
	pb "github.com/umbp/umbp/plugin-sdk/proto/backendpb"
	"github.com/umbp/umbp/plugin-sdk/reference"
	"github.com/umbp/umbp/plugin-sdk/rpc"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// moody says Busy to every second Post, although it has room.
type moody struct {
	backend.Session
	posts *atomic.Int64
}

func (m moody) Post(t backend.Transfer) error {
	switch m.posts.Add(1) % 4 {
	case 0:
		return backend.ErrBusy
	case 2:
		return &backend.Error{Code: backend.Busy, RetryAfter: 50 * time.Microsecond}
	}
	return m.Session.Post(t)
}

// TestConformanceOfTheMoody: a plugin keeps what its backend has no room for, and tries again.
func TestConformanceOfTheMoody(t *testing.T) {
	var posts atomic.Int64
	f := wrapSessions(reference.NewNetwork().Factory(), func(s backend.Session, _ backend.Sink) backend.Session {
		return moody{s, &posts}
	})
	conformance.Run(t, conformance.Harness{Factory: over(f, setup{})})
	if posts.Load() == 0 {
		t.Error("nothing was posted")
	}
}

// hooks is the null backend with something in the way of its calls.
type hooks struct {
	backend.Backend
	register   func(context.Context, backend.Memory)
	deregister func(backend.RegionID)
	offer      func(context.Context)
	establish  func(context.Context)
	session    func(context.Context)
	posted     func(context.Context) error
	abandoned  chan struct{}
	closed     chan string // "session" or "endpoint", when one is closed
}

func newHooks() *hooks {
	return &hooks{abandoned: make(chan struct{}, 16), closed: make(chan string, 16)}
}

func (h *hooks) factory() backend.Factory {
	return backend.Factory{Name: null.Name, Open: func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
		var err error
		h.posted = cfg.Posted
		h.Backend, err = null.Factory.Open(ctx, cfg)
		return h, err
	}}
}

func (h *hooks) Register(ctx context.Context, m backend.Memory) ([]byte, error) {
	if h.register != nil {
		h.register(ctx, m)
	}
	return h.Backend.Register(ctx, m)
}

func (h *hooks) Deregister(ctx context.Context, id backend.RegionID) error {
	if h.deregister != nil {
		h.deregister(id)
	}
	return h.Backend.Deregister(ctx, id)
}

func (h *hooks) Offer(ctx context.Context, peer backend.Peer) (backend.Handshake, error) {
	if h.offer != nil {
		h.offer(ctx)
	}
	inner, err := h.Backend.Offer(ctx, peer)
	return hookedHandshake{inner, h}, err
}

type hookedHandshake struct {
	backend.Handshake
	*hooks
}

func (h hookedHandshake) Offer() []byte { return h.Handshake.Offer() }
func (h hookedHandshake) Abandon()      { h.abandoned <- struct{}{} }

func (h hookedHandshake) Establish(ctx context.Context, answer []byte) (backend.Endpoint, error) {
	if h.establish != nil {
		h.establish(ctx)
	}
	inner, err := h.Handshake.Establish(ctx, answer)
	return hookedEndpoint{inner, h.hooks}, err
}

type hookedEndpoint struct {
	backend.Endpoint
	hooks *hooks
}

func (e hookedEndpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	if e.hooks.session != nil {
		e.hooks.session(ctx)
	}
	inner, err := e.Endpoint.Session(ctx, local, remote, sink)
	return hookedSession{inner, e.hooks}, err
}

func (e hookedEndpoint) Close() error {
	e.hooks.closed <- "endpoint"
	return e.Endpoint.Close()
}

type hookedSession struct {
	backend.Session
	hooks *hooks
}

func (s hookedSession) Close() error {
	s.hooks.closed <- "session"
	return s.Session.Close()
}

func mustStart(t *testing.T, f backend.Factory, s setup) *plugin {
	t.Helper()
	p, err := start(t.Context(), f, backend.Config{Self: near}, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func sealed(t *testing.T, size int) conformance.Memory {
	t.Helper()
	m, err := conformance.SealedMemory(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Free(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func lend(t *testing.T, b backend.Backend) {
	t.Helper()
	m := sealed(t, 1<<20)
	if _, err := b.Register(t.Context(), backend.Memory{Region: 1, Kind: backend.HostMemory, Bytes: m.Bytes, FD: m.FD}); err != nil {
		t.Fatal(err)
	}
}

var farRegion = backend.Remote{Peer: far, Region: 7, Kind: backend.HostMemory, Rights: backend.RemoteRead | backend.RemoteWrite, Size: 1 << 20}

// TestRegisterMaps: the backend gets the same memory, wherever in its file it lies, and a descriptor that stays good.
func TestRegisterMaps(t *testing.T) {
	h := newHooks()
	var got backend.Memory
	h.register = func(_ context.Context, m backend.Memory) { got = m }
	h.deregister = func(backend.RegionID) {
		var s unix.Stat_t
		if err := unix.Fstat(got.FD, &s); err != nil || s.Size != 1<<20 {
			t.Errorf("the descriptor is of a file of %d bytes, %v", s.Size, err)
		}
		if got.Bytes[0] != 42 {
			t.Errorf("byte 0 is %d, want 42", got.Bytes[0])
		}
	}
	p := mustStart(t, h.factory(), setup{})
	m := sealed(t, 1<<20)
	for id, offset := range []int{0, 4096, 5000, 1<<20 - 1} {
		want := backend.Memory{
			Region: backend.RegionID(id + 1), Kind: backend.HostMemory, Rights: backend.RemoteRead,
			Bytes: m.Bytes[offset:], FD: m.FD, FDOffset: int64(offset),
		}
		if _, err := p.Register(t.Context(), want); err != nil {
			t.Fatal(err)
		}
		if got.Region != want.Region || got.Kind != want.Kind || got.Rights != want.Rights || got.FDOffset != want.FDOffset ||
			len(got.Bytes) != len(want.Bytes) || got.FD == want.FD || &got.Bytes[0] == &want.Bytes[0] {
			t.Errorf("offset %d: the backend got region %d, kind %v, rights %v, offset %d, %d bytes", offset,
				got.Region, got.Kind, got.Rights, got.FDOffset, len(got.Bytes))
		}
		m.Bytes[offset] = 42
		if err := p.Deregister(t.Context(), want.Region); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRegisterRefuses(t *testing.T) {
	p := mustStart(t, reference.NewNetwork().Factory(), setup{})
	m := sealed(t, 8192)
	good := backend.Memory{Region: 1, Kind: backend.HostMemory, Bytes: m.Bytes, FD: m.FD}
	pipe, other, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	defer other.Close()
	for name, c := range map[string]struct {
		change func(*backend.Memory)
		code   backend.Code
		want   string
	}{
		"no descriptor":    {func(m *backend.Memory) { m.FD = -1 }, backend.Unsupported, "no file descriptor"},
		"closed":           {func(m *backend.Memory) { m.FD = 1 << 20 }, backend.BadRequest, "bad file descriptor"},
		"a pipe":           {func(m *backend.Memory) { m.FD = int(pipe.Fd()) }, backend.BadRequest, "mmap"},
		"too short a file": {func(m *backend.Memory) { m.FDOffset = 1 }, backend.BadRequest, "8192 bytes at offset 1 of a file of 8192"},
		"before the file":  {func(m *backend.Memory) { m.FDOffset = -4096 }, backend.BadRequest, "at offset -4096"},
		"no id":            {func(m *backend.Memory) { m.Region = 0 }, backend.BadRequest, "needs an id"},
		"no memory":        {func(m *backend.Memory) { m.Bytes = nil }, backend.BadRequest, "needs an id and memory"},
		"gpu":              {func(m *backend.Memory) { m.Kind = backend.GPUMemory }, backend.Unsupported, "gpu memory is not claimed"},
	} {
		memory := good
		c.change(&memory)
		_, err := p.Register(t.Context(), memory)
		var e *backend.Error
		if !errors.As(err, &e) || e.Code != c.code || e.Region != memory.Region || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %v: %s", name, err, c.code, c.want)
		}
	}
	if _, err := p.Register(t.Context(), good); err != nil {
		t.Errorf("after the refusals: %v", err)
	}
}

// gpuMemory is a range in the middle of an allocation of a GPU's memory.
func gpuMemory(id backend.RegionID) backend.Memory {
	return backend.Memory{Region: id, Kind: backend.GPUMemory, Rights: backend.RemoteRead, FD: -1, GPU: &backend.GPURange{
		Runtime: "hip", Device: "0000:c1:00.0", Address: 1 << 46, Size: 4096, Allocation: 1 << 20, Offset: 8192, Handle: []byte("handle"),
	}}
}

// TestGPUMemory: what describes memory of a GPU travels, but for its address; nothing is mapped, and no descriptor comes.
func TestGPUMemory(t *testing.T) {
	h := newHooks()
	var got backend.Memory
	h.register = func(_ context.Context, m backend.Memory) { got = m }
	p := mustStart(t, h.factory(), setup{})
	for id := range backend.RegionID(3) {
		m := gpuMemory(id + 1)
		if _, err := p.Register(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		m.GPU.Address = 0
		if !reflect.DeepEqual(got, m) {
			t.Errorf("the backend got %+v, %+v, want %+v, %+v", got, got.GPU, m, m.GPU)
		}
		for range 2 {
			if err := p.Deregister(t.Context(), m.Region); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestGPUMemoryRefused(t *testing.T) {
	h := newHooks()
	p := mustStart(t, h.factory(), setup{})
	host := sealed(t, 4096)
	for name, c := range map[string]struct {
		change func(*backend.Memory)
		code   backend.Code
		want   string
	}{
		"no handle":     {func(m *backend.Memory) { m.GPU.Handle = nil }, backend.Unsupported, "no interprocess handle"},
		"no range":      {func(m *backend.Memory) { m.GPU = nil }, backend.BadRequest, "where a GPU's memory lies"},
		"host memory":   {func(m *backend.Memory) { m.Kind, m.Bytes = backend.HostMemory, host.Bytes }, backend.BadRequest, "where a GPU's memory lies"},
		"bytes":         {func(m *backend.Memory) { m.Bytes = host.Bytes }, backend.BadRequest, "neither bytes nor"},
		"a descriptor":  {func(m *backend.Memory) { m.FD = host.FD }, backend.BadRequest, "neither bytes nor"},
		"beyond":        {func(m *backend.Memory) { m.GPU.Offset = m.GPU.Allocation - m.GPU.Size + 1 }, backend.BadRequest, "do not lie within"},
		"a long handle": {func(m *backend.Memory) { m.GPU.Handle = make([]byte, 257) }, backend.BadRequest, "257 bytes"},
		"no id":         {func(m *backend.Memory) { m.Region = 0 }, backend.BadRequest, "needs an id"},
	} {
		m := gpuMemory(7)
		c.change(&m)
		_, err := p.Register(t.Context(), m)
		var e *backend.Error
		if !errors.As(err, &e) || e.Code != c.code || e.Region != m.Region || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %v: %s", name, err, c.code, c.want)
		}
	}
	if _, err := p.Register(t.Context(), gpuMemory(7)); err != nil {
		t.Errorf("after the refusals: %v", err)
	}
}

// TestGivingUp: whoever gives up a call leaves nothing behind in the plugin.
func TestGivingUp(t *testing.T) {
	ctx := func() (context.Context, context.CancelFunc) { return context.WithCancel(t.Context()) }
	hang := func(ctx context.Context, cancel context.CancelFunc) func(context.Context) {
		return func(inPlugin context.Context) {
			cancel()
			<-inPlugin.Done() // and goes on nevertheless
		}
	}
	cancelled := func(t *testing.T, err error) {
		t.Helper()
		if !errors.Is(err, backend.ErrCancelled) || !errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want Cancelled, because of the context", err)
		}
	}
	t.Run("register", func(t *testing.T) {
		h := newHooks()
		p := mustStart(t, h.factory(), setup{})
		m := sealed(t, 4096)
		memory := backend.Memory{Region: 1, Kind: backend.HostMemory, Bytes: m.Bytes, FD: m.FD}
		c, cancel := ctx()
		wait := hang(c, cancel)
		h.register = func(ctx context.Context, _ backend.Memory) {
			if wait != nil {
				wait(ctx)
			}
		}
		_, err := p.Register(c, memory)
		cancelled(t, err)
		wait = nil
		for { // until it is undone
			_, err = p.Register(t.Context(), memory)
			if !errors.Is(err, backend.ErrBadRequest) {
				break
			}
			time.Sleep(time.Millisecond)
		}
		if err != nil {
			t.Errorf("once more: %v", err)
		}
	})
	t.Run("offer", func(t *testing.T) {
		h := newHooks()
		p := mustStart(t, h.factory(), setup{})
		c, cancel := ctx()
		release := make(chan struct{})
		h.offer = func(context.Context) {
			cancel()
			<-release
		}
		_, err := p.Offer(c, far)
		cancelled(t, err)
		close(release)
		await(t, "Abandon", h.abandoned)
	})
	t.Run("establish", func(t *testing.T) {
		h := newHooks()
		p := mustStart(t, h.factory(), setup{})
		handshake, err := p.Offer(t.Context(), far)
		if err != nil {
			t.Fatal(err)
		}
		c, cancel := ctx()
		h.establish = hang(c, cancel)
		_, err = handshake.Establish(c, handshake.Offer())
		cancelled(t, err)
		if what := <-h.closed; what != "endpoint" {
			t.Errorf("a %s was closed", what)
		}
	})
	t.Run("session", func(t *testing.T) {
		h := newHooks()
		p := mustStart(t, h.factory(), setup{})
		lend(t, p)
		endpoint, err := reference.Connect(t.Context(), p, near, p, far)
		if err != nil {
			t.Fatal(err)
		}
		c, cancel := ctx()
		h.session = hang(c, cancel)
		_, err = endpoint.Session(c, 1, farRegion, &counter{})
		cancelled(t, err)
		if what := <-h.closed; what != "session" {
			t.Errorf("a %s was closed", what)
		}
	})
}

// gate is a session whose Post waits, as no Post may.
type gate struct {
	backend.Session
	entered, release chan struct{}
}

func (g gate) Post(t backend.Transfer) error {
	g.entered <- struct{}{}
	<-g.release
	return g.Session.Post(t)
}

// TestPosted: Config.Posted returns when the backend has everything that the host had posted.
func TestPosted(t *testing.T) {
	for name, s := range map[string]setup{"queues": {}, "stream": {stream: true}} {
		t.Run(name, func(t *testing.T) {
			h := newHooks()
			g := gate{entered: make(chan struct{}), release: make(chan struct{})}
			p := mustStart(t, wrapSessions(h.factory(), func(s backend.Session, _ backend.Sink) backend.Session {
				return gate{s, g.entered, g.release}
			}), s)
			if err := h.posted(t.Context()); err != nil {
				t.Errorf("with nothing posted: %v", err)
			}
			done := make(waiter, 3)
			session := bindNull(t, p, done)
			for cookie := range uint64(3) {
				if err := session.Post(backend.Transfer{Op: backend.Write, Cookie: cookie, Segments: []backend.Segment{{Length: 1}}}); err != nil {
					t.Fatal(err)
				}
			}
			answer := make(chan error, 1)
			<-g.entered
			go func() { answer <- h.posted(t.Context()) }()
			for i := range 3 {
				time.Sleep(settle / 4)
				select {
				case err := <-answer:
					t.Errorf("it has returned %v, and %d transfers are not with the backend", err, 3-i)
				default:
				}
				g.release <- struct{}{}
				if i < 2 {
					<-g.entered
				}
			}
			if err := <-answer; err != nil {
				t.Error(err)
			}
			for range 3 {
				<-done
			}
			expired, cancel := context.WithCancel(t.Context())
			cancel()
			if err := h.posted(expired); err != nil && !errors.Is(err, backend.ErrCancelled) {
				t.Errorf("with a context that has ended: %v", err)
			}
		})
	}
}

// TestPostedWaitsForTheBusy: what waits for room in the plugin is not with the backend yet.
func TestPostedWaitsForTheBusy(t *testing.T) {
	h := newHooks()
	var busy atomic.Bool
	tried := make(chan struct{}, 1000)
	p := mustStart(t, wrapSessions(h.factory(), func(s backend.Session, _ backend.Sink) backend.Session {
		return busyWhile{s, &busy, tried}
	}), setup{})
	sink := &counter{}
	session := bindNull(t, p, sink)
	busy.Store(true)
	for cookie := range uint64(2) {
		if err := session.Post(backend.Transfer{Op: backend.Write, Cookie: cookie, Segments: []backend.Segment{{Length: 1}}}); err != nil {
			t.Fatal(err)
		}
	}
	<-tried
	short, cancel := context.WithTimeout(t.Context(), settle)
	defer cancel()
	if err := h.posted(short); !errors.Is(err, backend.ErrCancelled) {
		t.Errorf("with a transfer that waits: %v, want Cancelled", err)
	}
	busy.Store(false)
	if err := h.posted(t.Context()); err != nil {
		t.Error(err)
	}
	if n := sink.n.Load(); n > 2 {
		t.Errorf("%d completions", n)
	}
	if err := session.Close(); err != nil {
		t.Fatal(err)
	}
	if n := sink.n.Load(); n != 2 {
		t.Errorf("%d completions, want 2", n)
	}
}

type busyWhile struct {
	backend.Session
	busy  *atomic.Bool
	tried chan struct{}
}

func (b busyWhile) Post(t backend.Transfer) error {
	if b.busy.Load() {
		select {
		case b.tried <- struct{}{}:
		default:
		}
		return backend.ErrBusy
	}
	return b.Session.Post(t)
}

// recorder is a sink that keeps what it gets.
type recorder struct {
	mu  sync.Mutex
	got []backend.Completion
}

func (r *recorder) Complete(c backend.Completion) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.Outcomes = slices.Clone(c.Outcomes)
	r.got = append(r.got, c)
}

// wait waits until n completions are there.
func (r *recorder) wait(t *testing.T, n int) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		r.mu.Lock()
		got := len(r.got)
		r.mu.Unlock()
		if got >= n {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d completions, want %d", got, n)
		}
		time.Sleep(time.Millisecond)
	}
}

// TestEndsOfTheBusy: what waits for room ends when it is cancelled, or with its session, endpoint or backend, and was
// not sent.
func TestEndsOfTheBusy(t *testing.T) {
	for name, c := range map[string]struct {
		posts int // those that close do so when they know that it has arrived
		end   func(p *plugin, e backend.Endpoint, s backend.Session)
		want  backend.Code
	}{
		"cancel": {2, func(_ *plugin, _ backend.Endpoint, s backend.Session) {
			s.Cancel(1)
			s.Cancel(0)
		}, backend.Cancelled},
		"session":  {1, func(_ *plugin, _ backend.Endpoint, s backend.Session) { s.Close() }, backend.Cancelled},
		"endpoint": {1, func(_ *plugin, e backend.Endpoint, _ backend.Session) { e.Close() }, backend.PathDown},
		"backend":  {1, func(p *plugin, _ backend.Endpoint, _ backend.Session) { p.Close() }, backend.PathDown},
	} {
		t.Run(name, func(t *testing.T) {
			var busy atomic.Bool
			busy.Store(true)
			tried := make(chan struct{}, 1)
			p := mustStart(t, wrapSessions(null.Factory, func(s backend.Session, _ backend.Sink) backend.Session {
				return busyWhile{s, &busy, tried}
			}), setup{})
			lend(t, p)
			endpoint, err := reference.Connect(t.Context(), p, near, p, far)
			if err != nil {
				t.Fatal(err)
			}
			sink := &recorder{}
			session, err := endpoint.Session(t.Context(), 1, farRegion, sink)
			if err != nil {
				t.Fatal(err)
			}
			for cookie := range uint64(c.posts) {
				if err := session.Post(backend.Transfer{Op: backend.Read, Cookie: cookie, Segments: []backend.Segment{{Length: 1}, {Length: 2}}}); err != nil {
					t.Fatal(err)
				}
			}
			<-tried
			c.end(p, endpoint, session)
			sink.wait(t, c.posts)
			if err := session.Close(); err != nil {
				t.Fatal(err)
			}
			if len(sink.got) != c.posts {
				t.Fatalf("%d completions, want %d", len(sink.got), c.posts)
			}
			for _, got := range sink.got {
				if backend.CodeOf(got.Err) != c.want || !slices.Equal(got.Outcomes, []backend.Outcome{backend.NotSent, backend.NotSent}) {
					t.Errorf("completed with %+v, want %v and nothing sent", got, c.want)
				}
			}
		})
	}
}

// failing completes every transfer with an error and an outcome for each segment.
type failing struct {
	backend.Session
	sink backend.Sink
}

func (f failing) Post(t backend.Transfer) error {
	f.sink.Complete(backend.Completion{
		Cookie: t.Cookie, Err: backend.Errorf(backend.PathDown, "no luck"), Outcomes: slices.Repeat([]backend.Outcome{backend.Failed}, len(t.Segments)),
	})
	return nil
}

// TestManyCompletions: more completions than the queue has room for arrive all the same, while the host is slow.
func TestManyCompletions(t *testing.T) {
	for name, s := range map[string]setup{"queues": {}, "stream": {stream: true}} {
		t.Run(name, func(t *testing.T) {
			p := mustStart(t, wrapSessions(null.Factory, func(s backend.Session, sink backend.Sink) backend.Session {
				return failing{s, sink}
			}), s)
			lend(t, p)
			endpoint, err := reference.Connect(t.Context(), p, near, p, far)
			if err != nil {
				t.Fatal(err)
			}
			const transfers = 200
			slow := &slowSink{recorder: &recorder{}, release: make(chan struct{})}
			session, err := endpoint.Session(t.Context(), 1, farRegion, slow)
			if err != nil {
				t.Fatal(err)
			}
			segments := slices.Repeat([]backend.Segment{{Length: 1}}, shm.MaxSegments)
			for cookie := uint64(0); cookie < transfers; {
				switch err := session.Post(backend.Transfer{Op: backend.Write, Cookie: cookie, Segments: segments}); {
				case err == nil:
					cookie++
				case errors.Is(err, backend.ErrBusy):
					time.Sleep(backend.DefaultRetryAfter)
				default:
					t.Fatal(err)
				}
			}
			close(slow.release)
			slow.wait(t, transfers)
			if err := session.Close(); err != nil {
				t.Fatal(err)
			}
			if len(slow.got) != transfers {
				t.Fatalf("%d completions, want %d", len(slow.got), transfers)
			}
			for i, c := range slow.got {
				if c.Cookie != uint64(i) || !errors.Is(c.Err, backend.ErrPathDown) || len(c.Outcomes) != len(segments) || c.Outcomes[77] != backend.Failed {
					t.Fatalf("completion %d is of transfer %d: %v, %d outcomes", i, c.Cookie, c.Err, len(c.Outcomes))
				}
			}
		})
	}
}

// slowSink holds the first completion back, as no sink may.
type slowSink struct {
	*recorder
	release chan struct{}
}

func (s *slowSink) Complete(c backend.Completion) {
	<-s.release
	s.recorder.Complete(c)
}

// TestErrorsArrive: an error of the backend's is the same for the host, and so is a refusal by the plugin's backend that
// comes when the host has accepted the transfer.
func TestErrorsArrive(t *testing.T) {
	want := &backend.Error{Code: backend.Denied, Op: "post", Backend: "x", Peer: far, Region: 9, Offset: 8, Length: 7, Vendor: 5, VendorText: "EIO", Text: "no", RetryAfter: 3}
	p := mustStart(t, wrapSessions(null.Factory, func(s backend.Session, _ backend.Sink) backend.Session { return refusing{s, want} }), setup{})
	sink := &recorder{}
	session := bindNull(t, p, sink)
	if err := session.Post(backend.Transfer{Op: backend.Write, Segments: []backend.Segment{{Length: 1}}}); err != nil {
		t.Fatal(err)
	}
	sink.wait(t, 1)
	if got, ok := sink.got[0].Err.(*backend.Error); !ok || *got != *want || !slices.Equal(sink.got[0].Outcomes, []backend.Outcome{backend.NotSent}) {
		t.Errorf("completed with %+v, want %+v", sink.got[0], want)
	}
}

type refusing struct {
	backend.Session
	err error
}

func (r refusing) Post(backend.Transfer) error { return r.err }

// TestProcessKilled kills a process with a transfer in flight.
func TestProcessKilled(t *testing.T) {
	p := startProcess(t, "stuck")
	sink := &recorder{}
	session := bindNull(t, p, sink)
	if err := session.Post(backend.Transfer{Op: backend.Write, Cookie: 3, Segments: []backend.Segment{{Length: 1}}}); err != nil {
		t.Fatal(err)
	}
	if err := p.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	await(t, "Broken", p.Broken())
	cause := p.cmd.Wait()
	if p.InFlight() != 1 {
		t.Error("the transfer has completed before the process was reaped")
	}
	p.Lost(cause)
	if len(sink.got) != 1 || sink.got[0].Cookie != 3 || !errors.Is(sink.got[0].Err, backend.ErrPathDown) || !errors.Is(sink.got[0].Err, cause) {
		t.Errorf("completed with %+v, want PathDown because of %v", sink.got, cause)
	}
	if err := session.Close(); err != nil {
		t.Error(err)
	}
	if err := p.Client.Close(); err != nil {
		t.Error(err)
	}
}

// rawHost is a host that is written by hand.
type rawHost struct {
	pb.BackendClient
	wire   *wire
	server *rpc.Server
}

func newRawHost(t *testing.T, f backend.Factory) *rawHost {
	t.Helper()
	h := &rawHost{}
	var err error
	h.wire, err = newWire(true, func(r grpc.ServiceRegistrar, far *shm.Passage) {
		h.server = rpc.NewServer(f, far, nil)
		h.server.Register(r)
	})
	if err != nil {
		t.Fatal(err)
	}
	h.BackendClient = pb.NewBackendClient(h.wire.conn)
	t.Cleanup(func() {
		if err := errors.Join(h.server.Close(), h.wire.close()); err != nil {
			t.Error(err)
		}
	})
	return h
}

func (h *rawHost) open(t *testing.T, path pb.DataPath) {
	t.Helper()
	reply, err := h.Open(t.Context(), &pb.OpenRequest{
		Self: &pb.Peer{Node: "near", Incarnation: 1}, DataPaths: []pb.DataPath{path},
		MemoryAccesses: []pb.MemoryAccess{pb.MemoryAccess_MEMORY_ACCESS_MESSAGES, pb.MemoryAccess_MEMORY_ACCESS_MAPPED},
	})
	if err != nil || reply.GetError() != nil || reply.GetDataPath() != path {
		t.Fatalf("Open: %v, %v", reply, err)
	}
}

// attach hands the plugin new queues, which stay the test's.
func (h *rawHost) attach(t *testing.T) (submissions, completions *shm.Queue, reply *pb.AttachReply) {
	t.Helper()
	var files []*os.File
	for _, q := range []**shm.Queue{&submissions, &completions} {
		var err error
		if *q, err = shm.Create(shm.DefaultCapacity); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { (*q).Close() })
		memory, wake := (*q).Files()
		files = append(files, memory, wake)
	}
	if err := h.wire.host.Send(1, files...); err != nil {
		t.Fatal(err)
	}
	reply, err := h.Attach(t.Context(), &pb.AttachRequest{Tag: 1})
	if err != nil {
		t.Fatal(err)
	}
	return submissions, completions, reply
}

// endpoint connects, and returns the endpoint's id.
func (h *rawHost) endpoint(t *testing.T) uint64 {
	t.Helper()
	offer, err := h.Offer(t.Context(), &pb.OfferRequest{Peer: &pb.Peer{Node: "far", Incarnation: 2}})
	if err != nil {
		t.Fatal(err)
	}
	answer, err := h.Answer(t.Context(), &pb.AnswerRequest{Offer: offer.GetOffer()})
	if err != nil {
		t.Fatal(err)
	}
	reply, err := h.Establish(t.Context(), &pb.EstablishRequest{Handshake: offer.GetHandshake(), Answer: answer.GetAnswer()})
	if err != nil || reply.GetEndpoint() == 0 {
		t.Fatal(reply, err)
	}
	return reply.GetEndpoint()
}

func code(e interface{ GetError() *pb.Error }) backend.Code {
	return backend.Code(e.GetError().GetCode())
}

// TestHostOutOfOrder: a host that does not keep to the order of the calls is told so.
func TestHostOutOfOrder(t *testing.T) {
	ctx := t.Context()
	h := newRawHost(t, null.Factory)
	for what, err := range map[string]error{
		"Register":   second(h.Register(ctx, &pb.RegisterRequest{})),
		"Deregister": second(h.Deregister(ctx, &pb.DeregisterRequest{})),
		"Offer":      second(h.Offer(ctx, &pb.OfferRequest{})),
		"Answer":     second(h.Answer(ctx, &pb.AnswerRequest{})),
		"Fence":      second(h.Fence(ctx, &pb.FenceRequest{})),
		"Close":      second(h.Close(ctx, &pb.CloseRequest{})),
	} {
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%s before Open: %v", what, err)
		}
	}
	h.open(t, pb.DataPath_DATA_PATH_QUEUES)
	if reply, err := h.Open(ctx, &pb.OpenRequest{}); err != nil || code(reply) != backend.BadRequest {
		t.Errorf("Open twice: %v, %v", reply, err)
	}
	endpoint := h.endpoint(t)
	session := &pb.OpenSessionRequest{Endpoint: endpoint, Local: 1, Session: 1, Remote: &pb.Remote{
		Peer: &pb.Peer{Node: "far", Incarnation: 2}, Region: 7, Kind: 1, Rights: 3, Size: 4096,
	}}
	if reply, err := h.OpenSession(ctx, session); err != nil || code(reply) != backend.BadRequest {
		t.Errorf("OpenSession before Attach: %v, %v", reply, err)
	}
	if _, _, reply := h.attach(t); reply.GetError() != nil {
		t.Fatal(reply)
	}
	if _, _, reply := h.attach(t); code(reply) != backend.BadRequest {
		t.Errorf("Attach twice: %v", reply)
	}
	if reply, err := h.Establish(ctx, &pb.EstablishRequest{Handshake: 4711}); err != nil || code(reply) != backend.BadRequest {
		t.Errorf("Establish without Offer: %v, %v", reply, err)
	}
	m := sealed(t, 4096)
	passed := func(tag uint64, count int) {
		f, err := os.OpenFile(fmt.Sprint("/proc/self/fd/", m.FD), os.O_RDWR, 0)
		if err == nil {
			err = h.wire.host.Send(tag, slices.Repeat([]*os.File{f}, count)...)
			f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range []struct {
		name  string
		files int
		q     *pb.RegisterRequest
		want  backend.Code
	}{
		{"a size of zero", 1, &pb.RegisterRequest{Region: 2, Kind: 1}, backend.BadRequest},
		{"a size that overflows", 1, &pb.RegisterRequest{Region: 2, Kind: 1, Size: 1<<64 - 1, FdOffset: 1}, backend.BadRequest},
		{"two descriptors", 2, &pb.RegisterRequest{Region: 2, Kind: 1, Size: 4096}, backend.BadRequest},
		{"a kind that does not exist", 1, &pb.RegisterRequest{Region: 2, Kind: 257, Size: 4096}, backend.Unsupported},
		{"all well", 1, &pb.RegisterRequest{Region: 1, Kind: 1, Size: 4096, HasFd: true}, 0},
		{"once more", 1, &pb.RegisterRequest{Region: 1, Kind: 1, Size: 4096}, backend.BadRequest},
	} {
		c.q.Tag = uint64(100 + i)
		passed(c.q.Tag, c.files)
		if reply, err := h.Register(ctx, c.q); err != nil || code(reply) != c.want {
			t.Errorf("Register with %s: %v, %v", c.name, reply, err)
		}
	}
	short, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	if reply, err := h.Register(short, &pb.RegisterRequest{Region: 9, Tag: 999}); err == nil && code(reply) != backend.Cancelled {
		t.Errorf("Register without a descriptor: %v", reply)
	}
	if reply, err := h.OpenSession(ctx, session); err != nil || reply.GetError() != nil {
		t.Errorf("OpenSession: %v, %v", reply, err)
	}
	if reply, err := h.OpenSession(ctx, session); err != nil || code(reply) != backend.BadRequest {
		t.Errorf("OpenSession twice: %v, %v", reply, err)
	}
	session.Session = 0
	if reply, err := h.OpenSession(ctx, session); err != nil || code(reply) != backend.BadRequest {
		t.Errorf("OpenSession of session zero: %v, %v", reply, err)
	}
	session.Session, session.Endpoint = 5, 4711
	if reply, err := h.OpenSession(ctx, session); err != nil || code(reply) != backend.PathDown {
		t.Errorf("OpenSession on no endpoint: %v, %v", reply, err)
	}
	for what, err := range map[string]error{
		"CloseSession":  second(h.CloseSession(ctx, &pb.CloseSessionRequest{Session: 4711})),
		"CloseEndpoint": second(h.CloseEndpoint(ctx, &pb.CloseEndpointRequest{Endpoint: 4711})),
		"Abandon":       second(h.Abandon(ctx, &pb.AbandonRequest{Handshake: 4711})),
		"Deregister":    second(h.Deregister(ctx, &pb.DeregisterRequest{Region: 4711})),
	} {
		if err != nil {
			t.Errorf("%s of what is not there: %v", what, err)
		}
	}
	stream, err := h.Transfers(ctx)
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("Transfers beside queues: %v", err)
	}
}

// TestAbandonAfterEstablish ends the endpoint of which the host has not heard.
func TestAbandonAfterEstablish(t *testing.T) {
	hooks := newHooks()
	h := newRawHost(t, hooks.factory())
	h.open(t, pb.DataPath_DATA_PATH_STREAM)
	offer, err := h.Offer(t.Context(), &pb.OfferRequest{Peer: &pb.Peer{Node: "far", Incarnation: 2}})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []backend.Code{0, backend.BadRequest} {
		reply, err := h.Establish(t.Context(), &pb.EstablishRequest{Handshake: offer.GetHandshake(), Answer: offer.GetOffer()})
		if err != nil || code(reply) != want {
			t.Errorf("Establish number %d: %v, %v", i+1, reply, err)
		}
	}
	for range 2 {
		if _, err := h.Abandon(t.Context(), &pb.AbandonRequest{Handshake: offer.GetHandshake()}); err != nil {
			t.Fatal(err)
		}
	}
	if what := <-hooks.closed; what != "endpoint" {
		t.Errorf("a %s was closed", what)
	}
	select {
	case what := <-hooks.closed:
		t.Errorf("a %s was closed as well", what)
	default:
	}
}

// TestHostPostsNonsense: a Post that is well formed is answered whatever it says; one that is not ends the data path.
func TestHostPostsNonsense(t *testing.T) {
	h := newRawHost(t, stuck())
	h.open(t, pb.DataPath_DATA_PATH_QUEUES)
	submissions, completions, _ := h.attach(t)
	m := sealed(t, 4096)
	f, err := os.OpenFile(fmt.Sprint("/proc/self/fd/", m.FD), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := h.wire.host.Send(2, f); err != nil {
		t.Fatal(err)
	}
	if reply, err := h.Register(t.Context(), &pb.RegisterRequest{Region: 1, Kind: 1, Size: 4096, Tag: 2}); err != nil || reply.GetError() != nil {
		t.Fatal(reply, err)
	}
	reply, err := h.OpenSession(t.Context(), &pb.OpenSessionRequest{Endpoint: h.endpoint(t), Local: 1, Session: 1, Remote: &pb.Remote{
		Peer: &pb.Peer{Node: "far", Incarnation: 2}, Region: 7, Kind: 1, Rights: 3, Size: 4096,
	}})
	if err != nil || reply.GetError() != nil {
		t.Fatal(reply, err)
	}
	post := func(session, cookie uint64) {
		record := shm.AppendPost(nil, &shm.Post{Session: session, Cookie: cookie, Op: backend.Write, Segments: []backend.Segment{{Length: 1}}})
		for {
			_, err := submissions.Send(record)
			if err == nil {
				return
			}
			if !errors.Is(err, shm.ErrFull) {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
	}
	answer := func() shm.Completion {
		record, err := completions.Receive(nil)
		if err != nil {
			t.Fatal(err)
		}
		c, err := shm.ParseCompletion(record)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	post(4711, 5)
	if c := answer(); c.Session != 4711 || c.Cookie != 5 || !slices.Equal(c.Outcomes, []backend.Outcome{backend.NotSent}) {
		t.Errorf("on a session that does not exist: %+v", c)
	}
	const window = 1 << 15
	for cookie := range uint64(window + 1) {
		post(1, cookie)
	}
	if c := answer(); c.Session != 1 || c.Cookie != window || !slices.Equal(c.Outcomes, []backend.Outcome{backend.NotSent}) {
		t.Errorf("one more than the window: %+v", c)
	}
	if _, err := submissions.Send(shm.AppendCancel(nil, shm.Cancel{Session: 4711, Cookie: 1})); err != nil {
		t.Fatal(err)
	}
	if _, err := submissions.Send(shm.AppendCancel(nil, shm.Cancel{Cookie: 1})); err != nil { // nobody asked for it
		t.Fatal(err)
	}
	if _, err := submissions.Send([]byte("rubbish, and more of it than a head")); err != nil {
		t.Fatal(err)
	}
	await(t, "HostGone", h.server.HostGone())
}

// TestStreamNonsense: a message that is not well formed ends the stream.
func TestStreamNonsense(t *testing.T) {
	for name, post := range map[string]*pb.Post{
		"no operation": {Segments: []uint64{0, 0, 1}}, "both": {Op: 3, Segments: []uint64{0, 0, 1}},
		"no segments": {Op: 1}, "half a segment": {Op: 1, Segments: []uint64{0, 0, 1, 2}},
		"too many": {Op: 1, Segments: make([]uint64, 3*shm.MaxSegments+3)}, "another operation": {Op: 257, Segments: []uint64{0, 0, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			h := newRawHost(t, null.Factory)
			h.open(t, pb.DataPath_DATA_PATH_STREAM)
			stream, err := h.Transfers(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.Send(&pb.HostFrame{Frame: &pb.HostFrame_Post{Post: post}}); err != nil {
				t.Fatal(err)
			}
			if frame, err := stream.Recv(); err == nil || err == io.EOF {
				t.Errorf("got %v, %v, want the end", frame, err)
			}
		})
	}
}

// TestOpenNeedsDescriptors: a Server cannot ask for memory by messages.
func TestOpenNeedsDescriptors(t *testing.T) {
	h := newRawHost(t, null.Factory)
	for _, q := range []*pb.OpenRequest{
		{DataPaths: []pb.DataPath{1, 2}, MemoryAccesses: []pb.MemoryAccess{pb.MemoryAccess_MEMORY_ACCESS_MESSAGES}},
	} {
		if reply, err := h.Open(t.Context(), q); err != nil || code(reply) != backend.Unsupported {
			t.Errorf("%v: %v, %v", q, reply, err)
		}
	}
	h = newRawHost(t, null.Factory)
	if reply, err := h.Open(t.Context(), &pb.OpenRequest{
		DataPaths: []pb.DataPath{77}, MemoryAccesses: []pb.MemoryAccess{pb.MemoryAccess_MEMORY_ACCESS_MAPPED},
	}); err != nil || code(reply) != backend.Unsupported {
		t.Errorf("a data path of a later version: %v, %v", reply, err)
	}
	h = newRawHost(t, reference.NewNetwork().Factory())
	if reply, err := h.Open(t.Context(), &pb.OpenRequest{
		DataPaths: []pb.DataPath{1}, MemoryAccesses: []pb.MemoryAccess{pb.MemoryAccess_MEMORY_ACCESS_MAPPED}, Options: map[string]string{"windov": "3"},
	}); err != nil || code(reply) != backend.BadRequest || !strings.Contains(reply.GetError().String(), "did you mean") {
		t.Errorf("a wrong option: %v, %v", reply, err)
	}
}

// TestUnclaimedDescriptors: descriptors whose call does not come are closed in the end.
func TestUnclaimedDescriptors(t *testing.T) {
	h := newRawHost(t, null.Factory)
	h.open(t, pb.DataPath_DATA_PATH_QUEUES)
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before := descriptors(t)
	for tag := range uint64(500) {
		if err := h.wire.host.Send(tag, f); err != nil {
			t.Fatal(err)
		}
	}
	// The last one is there when this call has found it.
	if reply, err := h.Attach(t.Context(), &pb.AttachRequest{Tag: 499}); err != nil || code(reply) != backend.BadRequest {
		t.Fatal(reply, err)
	}
	if n := descriptors(t) - before; n > 64 {
		t.Errorf("%d descriptors are kept", n)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(open)
}

func TestClosedAndGone(t *testing.T) {
	h := newRawHost(t, null.Factory)
	h.open(t, pb.DataPath_DATA_PATH_STREAM)
	select {
	case <-h.server.Closed():
		t.Error("Closed before Close")
	case <-h.server.HostGone():
		t.Error("HostGone with a host")
	default:
	}
	for range 2 {
		if reply, err := h.BackendClient.Close(t.Context(), &pb.CloseRequest{}); err != nil || reply.GetError() != nil {
			t.Fatal(reply, err)
		}
		await(t, "Closed", h.server.Closed())
	}
	if err := h.wire.host.Close(); err != nil {
		t.Fatal(err)
	}
	await(t, "HostGone", h.server.HostGone())
}
