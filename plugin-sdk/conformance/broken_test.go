package conformance_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/conformance"
	"github.com/umbp/umbp/plugin-sdk/reference"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestDefectsAreCaught breaks the reference backend, in one way at a time, and wants the case that tries the
// broken rule to fail, for the right reason.
func TestDefectsAreCaught(t *testing.T) {
	for _, d := range []struct {
		name   string
		caught string // by this case
		saying string // in the words of this failure
		lab    *lab
	}{
		{"completes twice", "complete/once", "a second completion", &lab{
			complete: func(s *session, c backend.Completion) {
				s.sink.Complete(c)
				s.sink.Complete(c)
			},
		}},
		{"loses every hundredth completion", "complete/once", "nothing after", &lab{
			impatient: true,
			complete: func(s *session, c backend.Completion) {
				if c.Cookie%100 != 0 {
					s.sink.Complete(c)
				}
			},
		}},
		{"keeps the caller's segments", "bytes/segments-reused", "Segments overwritten after Post", &lab{
			post: func(s *session, t backend.Transfer) error {
				s.later(func() backend.Transfer {
					t.Segments = readLate(t.Segments)
					return t
				})
				return nil
			},
		}},
		{"says done and moves nothing", "bytes/edges", "the first byte: after a write", &lab{
			post: func(s *session, t backend.Transfer) error {
				s.sink.Complete(backend.Completion{Cookie: t.Cookie})
				return nil
			},
		}},
		{"writes one byte too many", "bytes/edges", "the first byte: after a write", &lab{
			post: func(s *session, t backend.Transfer) error {
				if end := t.Segments[0].Remote + t.Segments[0].Length; t.Op == backend.Write && end < uint64(len(s.far)) {
					s.far[end]++
				}
				return s.Session.Post(t)
			},
		}},
		{"drops the last segment", "bytes/random", "is wrong", &lab{
			post: func(s *session, t backend.Transfer) error {
				if n := len(t.Segments); n > 1 {
					t.Segments = t.Segments[:n-1]
				}
				return s.Session.Post(t)
			},
		}},
		{"accepts what overflows", "refuse/ranges", "a remote offset that overflows: succeeded", &lab{
			post: func(s *session, t backend.Transfer) error {
				for _, g := range t.Segments {
					if g.Remote+g.Length < g.Remote {
						s.sink.Complete(backend.Completion{Cookie: t.Cookie})
						return nil
					}
				}
				return s.Session.Post(t)
			},
		}},
		{"moves before it checks", "refuse/ranges", "after a refusal of", &lab{
			post: func(s *session, t backend.Transfer) error {
				if g := t.Segments[0]; t.Op == backend.Write && g.Remote == 0 && g.Length == 4096 {
					copy(s.far, s.near[:4096])
				}
				return s.Session.Post(t)
			},
		}},
		{"errors without identity", "refuse/ranges", "is not a *backend.Error", &lab{
			post: func(s *session, t backend.Transfer) error {
				if err := s.Session.Post(t); err != nil {
					return errors.New(err.Error())
				}
				return nil
			},
		}},
		{"gives every right", "refuse/rights", "Post accepts a write", &lab{
			register: func(m backend.Memory) backend.Memory {
				m.Rights = backend.RemoteRead | backend.RemoteWrite
				return m
			},
		}},
		{"asks for no key", "refuse/forged", "a key with one bit flipped: succeeded", &lab{
			remote: func(l *lab, _ backend.Peer, remote backend.Remote) backend.Remote {
				if key := l.key(remote); key != nil {
					remote.Key = key
				}
				return remote
			},
		}},
		{"takes any incarnation", "incarnation/descriptor", "an older incarnation: succeeded", &lab{
			remote: func(_ *lab, peer backend.Peer, remote backend.Remote) backend.Remote {
				remote.Peer = peer
				return remote
			},
		}},
		{"keeps no window", "window/busy", "Capabilities.Window is 1", &lab{window: 1}},
		{"completes what it cancels at once", "cancel/quiet", "got after the completion", &lab{
			post: func(s *session, t backend.Transfer) error { return s.delayed(t) },
			cancel: func(s *session, cookie uint64) {
				s.swallow()
				s.sink.Complete(backend.Completion{Cookie: cookie, Err: backend.ErrCancelled})
			},
		}},
		{"calls what it cancelled done", "cancel/quiet", "is Done, and its bytes are not", &lab{
			complete: func(s *session, c backend.Completion) {
				c.Err = nil
				s.sink.Complete(c)
			},
		}},
		{"ignores Cancel", "cancel/early", "each was carried out in full", &lab{
			cancel: func(*session, uint64) {},
		}},
		{"forgets completions when a session closes", "close/session", "Session.Close returned before", &lab{
			close: func(s *session) error {
				s.swallow()
				return s.Session.Close()
			},
		}},
		{"completes after a session is closed", "close/session", "Session.Close returned before", &lab{
			post:  func(s *session, t backend.Transfer) error { return s.delayed(t) },
			close: func(*session) error { return nil },
		}},
		{"does not wait to fence", "fence/quiet", "touched memory after it", &lab{
			post: func(s *session, t backend.Transfer) error { return s.delayed(t) },
		}},
		{"does not wait to deregister", "region/waits", "Deregister at the", &lab{
			post:       func(s *session, t backend.Transfer) error { return s.delayed(t) },
			deregister: func(backend.RegionID) error { return nil },
		}},
		{"registers twice", "region/twice", "succeeded, want an error", &lab{
			twice: true,
		}},
		{"leaves goroutines behind", "resources", "goroutines", &lab{
			impatient: true,
			open:      func(l *lab) { l.tasks.Go(func() { <-l.ended }) },
		}},
		{"leaves descriptors behind", "resources", "descriptors are open", &lab{
			open: func(l *lab) {
				f, err := os.Open(os.DevNull)
				if err != nil {
					panic(err)
				}
				l.files = append(l.files, f)
			},
		}},
	} {
		t.Run(d.name, func(t *testing.T) {
			failures := d.lab.try(t, d.caught)
			if !strings.Contains(strings.Join(failures, "\n"), d.saying) {
				t.Errorf("%s does not say %q; its failures: %q", d.caught, d.saying, failures)
			}
		})
	}
}

// TestLabItself finds nothing where nothing is broken: what catches the defects is not the lab.
func TestLabItself(t *testing.T) {
	for _, c := range conformance.Cases() {
		if failures := new(lab).try(t, c.Name); len(failures) > 0 {
			t.Errorf("%s: %q", c.Name, failures)
		}
	}
}

// lab opens reference backends with one defect. Hooks that are nil leave things as they are.
type lab struct {
	post       func(*session, backend.Transfer) error
	complete   func(*session, backend.Completion)
	cancel     func(*session, uint64)
	close      func(*session) error
	register   func(backend.Memory) backend.Memory
	deregister func(backend.RegionID) error
	remote     func(*lab, backend.Peer, backend.Remote) backend.Remote
	open       func(*lab)
	window     int
	twice      bool
	impatient  bool // the case is to wait in vain

	mu      sync.Mutex
	regions map[where]region
	tasks   sync.WaitGroup
	ended   chan struct{}
	files   []*os.File
	lent    [][]byte
}

type where struct {
	node        string
	incarnation uint64
	region      backend.RegionID
}

type region struct {
	bytes, key []byte
}

// try runs one case and returns how it failed.
func (l *lab) try(t *testing.T, name string) []string {
	t.Helper()
	l.regions, l.ended = map[where]region{}, make(chan struct{})
	defer func() {
		close(l.ended)
		l.tasks.Wait()
		for _, f := range l.files {
			f.Close()
		}
		for _, m := range l.lent { // only now: the defects touch memory when they should not
			unix.Munmap(m)
		}
	}()
	harness := conformance.Harness{
		Factory:  reference.NewNetwork().Factory(),
		Patience: 5 * time.Second,
		NewMemory: func(size int) (conformance.Memory, error) {
			mapping, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
			l.lent = append(l.lent, mapping)
			return conformance.Memory{Bytes: mapping, FD: -1, Free: func() error { return nil }}, err
		},
	}
	if l.impatient {
		harness.Patience = 500 * time.Millisecond
	}
	if l.window != 0 {
		harness.Options = map[string]string{"window": "4096"}
	}
	open := harness.Factory.Open
	harness.Factory.Open = func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
		b, err := open(ctx, cfg)
		if err != nil {
			return nil, err
		}
		if l.open != nil {
			l.open(l)
		}
		return &end{Backend: b, lab: l, self: cfg.Self}, nil
	}
	for _, c := range conformance.Cases() {
		if c.Name == name {
			return record(func(tb conformance.TB) { c.Run(tb, harness) })
		}
	}
	t.Fatalf("there is no case %q", name)
	return nil
}

// recorder is a conformance.TB that remembers failures.
type recorder struct {
	mu       sync.Mutex
	failures []string
}

func record(f func(conformance.TB)) []string {
	r := &recorder{}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		f(r)
	}()
	<-ended
	return r.failures
}

func (r *recorder) Helper()             {}
func (r *recorder) Logf(string, ...any) {}
func (r *recorder) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures = append(r.failures, fmt.Sprintf(format, args...))
}
func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

type end struct {
	backend.Backend
	lab  *lab
	self backend.Peer
}

func (e *end) Info() backend.Info {
	i := e.Backend.Info()
	if e.lab.window != 0 {
		i.Capabilities.Window = e.lab.window
	}
	return i
}

func (e *end) Register(ctx context.Context, m backend.Memory) ([]byte, error) {
	if e.lab.register != nil {
		m = e.lab.register(m)
	}
	key, err := e.Backend.Register(ctx, m)
	if err != nil && e.lab.twice {
		return nil, nil
	}
	e.lab.mu.Lock()
	defer e.lab.mu.Unlock()
	e.lab.regions[where{e.self.Node, e.self.Incarnation, m.Region}] = region{m.Bytes, key}
	return key, err
}

func (e *end) Deregister(ctx context.Context, id backend.RegionID) error {
	if e.lab.deregister != nil {
		return e.lab.deregister(id)
	}
	return e.Backend.Deregister(ctx, id)
}

func (e *end) Offer(ctx context.Context, peer backend.Peer) (backend.Handshake, error) {
	h, err := e.Backend.Offer(ctx, peer)
	return handshake{h, e, peer}, err
}

type handshake struct {
	backend.Handshake
	end  *end
	peer backend.Peer
}

func (h handshake) Establish(ctx context.Context, answer []byte) (backend.Endpoint, error) {
	e, err := h.Handshake.Establish(ctx, answer)
	if err != nil {
		return nil, err
	}
	return endpoint{e, h.end, h.peer}, nil
}

type endpoint struct {
	backend.Endpoint
	end  *end
	peer backend.Peer
}

func (e endpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	l := e.end.lab
	s := &session{
		lab: l, sink: sink,
		near: l.at(e.end.self, local).bytes, far: l.at(remote.Peer, remote.Region).bytes,
	}
	if l.remote != nil {
		remote = l.remote(l, e.peer, remote)
	}
	var err error
	s.Session, err = e.Endpoint.Session(ctx, local, remote, s)
	return s, err
}

func (l *lab) at(p backend.Peer, id backend.RegionID) region {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.regions[where{p.Node, p.Incarnation, id}]
}

func (l *lab) key(r backend.Remote) []byte { return l.at(r.Peer, r.Region).key }

// session is a session and its sink.
type session struct {
	backend.Session
	lab       *lab
	sink      backend.Sink
	near, far []byte

	mu   sync.Mutex
	mute bool
}

func (s *session) swallow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mute = true
}

func (s *session) Complete(c backend.Completion) {
	s.mu.Lock()
	mute := s.mute
	s.mu.Unlock()
	switch {
	case mute:
	case s.lab.complete != nil:
		s.lab.complete(s, c)
	default:
		s.sink.Complete(c)
	}
}

func (s *session) Post(t backend.Transfer) error {
	if s.lab.post != nil && len(t.Segments) > 0 {
		return s.lab.post(s, t)
	}
	return s.Session.Post(t)
}

func (s *session) Cancel(cookie uint64) {
	if s.lab.cancel != nil {
		s.lab.cancel(s, cookie)
		return
	}
	s.Session.Cancel(cookie)
}

func (s *session) Close() error {
	if s.lab.close != nil {
		return s.lab.close(s)
	}
	return s.Session.Close()
}

// later accepts a transfer now and posts it a moment after.
func (s *session) later(t func() backend.Transfer) {
	s.lab.tasks.Go(func() {
		time.Sleep(10 * time.Millisecond) // later than the case needs to look away, and before it looks again
		if t := t(); s.Session.Post(t) != nil {
			s.Complete(backend.Completion{Cookie: t.Cookie, Err: backend.ErrPathDown})
		}
	})
}

func (s *session) delayed(t backend.Transfer) error {
	t.Segments = append([]backend.Segment(nil), t.Segments...)
	s.later(func() backend.Transfer { return t })
	return nil
}

// readLate reads a slice that is no longer its own, which is the defect. The race detector would rightly stop it.
//
//go:norace
func readLate(segments []backend.Segment) []backend.Segment {
	late := make([]backend.Segment, len(segments))
	//lint:ignore S1001 the race detector would see copy
	for i := range segments {
		late[i] = segments[i]
	}
	return late
}
