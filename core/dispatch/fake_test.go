package dispatch_test

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/core/dispatch"
	"github.com/umbp/umbp/core/plan"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a backend whose completions the test plays by hand. It moves no bytes.
type fake struct {
	name   string
	window int
	// The hooks are called without locks; nil ones do nothing. An error of onPost refuses the transfer.
	onEstablish func(ctx context.Context, peer backend.Peer) error
	onSession   func(e *fakeEndpoint) error
	onPost      func(p *posted) error
	// onPostWait makes sessions PostWaiters, whose PostWait it is.
	onPostWait func(s *fakeSession, t backend.Transfer) error
	// onCancel is told of each Cancel of a transfer in flight.
	onCancel func(p *posted)

	accepted chan *posted // transfers accepted, in order

	mu        sync.Mutex
	endpoints int
}

func newFake(name string, window int) *fake {
	return &fake{name: name, window: window, accepted: make(chan *posted, 10_000)}
}

func (f *fake) Info() backend.Info {
	host := backend.Kinds(backend.HostMemory)
	return backend.Info{Name: f.name, Capabilities: backend.Capabilities{
		Ops: backend.Write | backend.Read, Local: host, Remote: host, Reach: backend.Network, Window: f.window,
		Limits: backend.Limits{Segments: 8},
	}}
}

func (f *fake) Register(context.Context, backend.Memory) ([]byte, error)     { return nil, nil }
func (f *fake) Deregister(context.Context, backend.RegionID) error           { return nil }
func (f *fake) Answer(context.Context, backend.Peer, []byte) ([]byte, error) { return nil, nil }
func (f *fake) Fence(context.Context, backend.Peer) error                    { return nil }
func (f *fake) Close() error                                                 { return nil }
func (f *fake) Offer(_ context.Context, p backend.Peer) (backend.Handshake, error) {
	return fakeShake{f, p}, nil
}

type fakeShake struct {
	f    *fake
	peer backend.Peer
}

func (h fakeShake) Offer() []byte { return []byte(h.f.name) }
func (h fakeShake) Abandon()      {}

func (h fakeShake) Establish(ctx context.Context, _ []byte) (backend.Endpoint, error) {
	if h.f.onEstablish != nil {
		if err := h.f.onEstablish(ctx, h.peer); err != nil {
			return nil, err
		}
	}
	h.f.mu.Lock()
	defer h.f.mu.Unlock()
	e := &fakeEndpoint{f: h.f, peer: h.peer, number: h.f.endpoints, done: make(chan struct{}), flying: map[*posted]bool{}}
	h.f.endpoints++
	return e, nil
}

type fakeEndpoint struct {
	f      *fake
	peer   backend.Peer
	number int // among those of the fake
	done   chan struct{}

	mu     sync.Mutex
	closed bool
	flying map[*posted]bool // true once Post has accepted it
}

func (e *fakeEndpoint) Session(_ context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	if e.f.onSession != nil {
		if err := e.f.onSession(e); err != nil {
			return nil, err
		}
	}
	s := &fakeSession{e: e, remote: remote, sink: sink}
	if e.f.onPostWait != nil {
		return waitingSession{s}, nil
	}
	return s, nil
}

func (e *fakeEndpoint) Done() <-chan struct{} { return e.done }

// fail breaks the endpoint; what is in flight stays so until Close.
func (e *fakeEndpoint) fail() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.closed {
		e.closed = true
		close(e.done)
	}
}

func (e *fakeEndpoint) Close() error {
	e.fail()
	e.end(func(*posted) bool { return true }, backend.PathDown)
	return nil
}

// end fails the transfers in flight that match, none of which has sent anything.
func (e *fakeEndpoint) end(match func(*posted) bool, code backend.Code) {
	e.mu.Lock()
	var all []*posted
	for p := range e.flying {
		if match(p) {
			all = append(all, p)
		}
	}
	e.mu.Unlock()
	for _, p := range all {
		p.fail(code, slices.Repeat([]backend.Outcome{backend.NotSent}, len(p.Segments))...)
	}
}

type fakeSession struct {
	e      *fakeEndpoint
	remote backend.Remote
	sink   backend.Sink
}

// posted is a transfer that a fake has accepted, or is about to.
type posted struct {
	backend.Transfer
	s *fakeSession
}

func (s *fakeSession) Post(t backend.Transfer) error {
	e := s.e
	p := &posted{t, s}
	p.Segments = slices.Clone(t.Segments)
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return backend.Errorf(backend.PathDown, "the fake endpoint is closed")
	}
	e.flying[p] = false
	e.mu.Unlock()
	if e.f.onPost != nil {
		if err := e.f.onPost(p); err != nil {
			e.mu.Lock()
			delete(e.flying, p)
			e.mu.Unlock()
			return err
		}
	}
	e.mu.Lock()
	if _, flying := e.flying[p]; flying {
		e.flying[p] = true
	}
	e.mu.Unlock()
	e.f.accepted <- p
	return nil
}

type waitingSession struct{ *fakeSession }

func (s waitingSession) PostWait(t backend.Transfer) error { return s.e.f.onPostWait(s.fakeSession, t) }

func (s *fakeSession) Cancel(cookie uint64) {
	s.e.mu.Lock()
	var found *posted
	for p, accepted := range s.e.flying {
		if accepted && p.Cookie == cookie && p.s == s {
			found = p
		}
	}
	s.e.mu.Unlock()
	if found != nil && s.e.f.onCancel != nil {
		s.e.f.onCancel(found)
	}
}

func (s *fakeSession) Close() error {
	s.e.end(func(p *posted) bool { return p.s == s }, backend.Cancelled)
	return nil
}

// complete answers the transfer, once; the second call does nothing.
func (p *posted) complete(c backend.Completion) {
	e := p.s.e
	e.mu.Lock()
	_, flying := e.flying[p]
	delete(e.flying, p)
	e.mu.Unlock()
	if flying {
		c.Cookie = p.Cookie
		p.s.sink.Complete(c)
	}
}

func (p *posted) done() { p.complete(backend.Completion{}) }

func (p *posted) fail(code backend.Code, outcomes ...backend.Outcome) {
	p.complete(backend.Completion{Err: backend.Errorf(code, "the test says so"), Outcomes: outcomes})
}

// way names the endpoint that the transfer came by: backend#number.
func (p *posted) way() string { return fmt.Sprintf("%s#%d", p.s.e.f.name, p.s.e.number) }

// next waits for the next transfer that the fake accepts.
func (f *fake) next(t *testing.T) *posted {
	t.Helper()
	return receive(t, f.accepted)
}

// nothing checks that no transfer waits to be received. It sees only what has happened already, so it is used
// where a post would have come before something that the test has waited for.
func (f *fake) nothing(t *testing.T) {
	t.Helper()
	select {
	case p := <-f.accepted:
		t.Fatalf("a transfer is posted by %s: %+v", p.way(), p.Transfer)
	default:
	}
}

// patience is how long a test waits for what must happen, and how long the dispatchers of tests wait that are not about
// that: a machine may be so busy that a process stands still for seconds.
const patience = time.Minute

// inBubble makes a subtest that has a time of its own, which passes only while all of it waits.
func inBubble(f func(t *testing.T)) func(t *testing.T) {
	return func(t *testing.T) { synctest.Test(t, f) }
}

// receive fails the test instead of letting it hang.
func receive[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatal("nothing came")
		panic("unreachable")
	}
}

// order selects the backends in the order of their numbers, and notes what it is told.
type order struct {
	choice *selector.Choice
	// before, if not nil, is asked first; it returns nil where the choice is to be given.
	before func(q selector.Query) *selector.Choice
	mu     sync.Mutex
	news   []string
}

func (o *order) SelectBackend(q selector.Query) *selector.Choice {
	if o.before != nil {
		if c := o.before(q); c != nil {
			return c
		}
	}
	return o.choice
}

func (o *order) PathFailed(b int, peer backend.Peer, err error, _ time.Time) {
	o.note("failed %d %s: %v", b, peer.Node, backend.CodeOf(err))
}

func (o *order) PathWorks(b int, peer backend.Peer) { o.note("works %d %s", b, peer.Node) }

func (o *order) PairRefused(b int, local backend.RegionID, remote *region.Descriptor, err error, _ time.Time) {
	o.note("refused %d %d→%s/%d: %v", b, local, remote.Peer.Node, remote.ID, backend.CodeOf(err))
}

func (o *order) note(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.news = append(o.news, fmt.Sprintf(format, args...))
}

func (o *order) heard() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.news)
}

// rig is a dispatcher over fakes.
type rig struct {
	*dispatch.Dispatcher
	t      *testing.T
	names  []string
	policy *order
}

func newRig(t *testing.T, opts dispatch.Options, fakes ...*fake) *rig {
	t.Helper()
	r := &rig{t: t, policy: &order{choice: &selector.Choice{}}}
	for i, f := range fakes {
		opts.Backends = append(opts.Backends, dispatch.Backend{Name: f.name, Backend: f})
		r.names = append(r.names, f.name)
		r.policy.choice.Order = append(r.policy.choice.Order, i)
	}
	opts.Select = r.policy
	opts.ConnectTimeout, opts.QuietTimeout = cmp.Or(opts.ConnectTimeout, patience), cmp.Or(opts.QuietTimeout, patience)
	if opts.Carry == nil {
		opts.Carry = func(context.Context, backend.Peer, string, []byte) ([]byte, map[backend.RegionID][]byte, error) {
			return nil, nil, nil
		}
	}
	r.Dispatcher = dispatch.New(opts)
	t.Cleanup(r.Close)
	return r
}

var (
	near  = &region.Region{ID: 1, Kind: backend.HostMemory}
	peerX = backend.Peer{Node: "x", Incarnation: 11}
	peerY = backend.Peer{Node: "y", Incarnation: 12}
)

// descriptor describes a region of a peer that every backend of the rig can reach.
func (r *rig) descriptor(p backend.Peer) *region.Descriptor {
	d := &region.Descriptor{Peer: p, ID: 5, Kind: backend.HostMemory, Size: 1 << 30, Keys: map[string][]byte{}}
	for _, name := range r.names {
		d.Keys[name] = nil
	}
	return d
}

// job makes a job whose groups have so many segments each, all to one peer. Segment n lies at n*100 locally and at
// n*1000 remotely, and has 10+n bytes.
func (r *rig) job(op backend.Op, to backend.Peer, groups ...int) *dispatch.Job {
	p := &plan.Plan{Op: op}
	for _, n := range groups {
		g := plan.Group{First: len(p.Segments), Count: n}
		for range n {
			s := segment(len(p.Segments))
			p.Segments = append(p.Segments, s)
			g.Bytes += s.Length
		}
		p.Groups = append(p.Groups, g)
	}
	return &dispatch.Job{Plan: p, Locals: []*region.Region{near}, Remotes: []*region.Descriptor{r.descriptor(to)}}
}

func segment(n int) backend.Segment {
	return backend.Segment{Local: uint64(n) * 100, Remote: uint64(n) * 1000, Length: uint64(10 + n)}
}

func segments(numbers ...int) []backend.Segment {
	var all []backend.Segment
	for _, n := range numbers {
		all = append(all, segment(n))
	}
	return all
}

// run runs the job beside the test.
func (r *rig) run(ctx context.Context, j *dispatch.Job) <-chan error {
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx, j) }()
	return ended
}

// wait waits for a job to end, and for nil.
func (r *rig) wait(ended <-chan error) {
	r.t.Helper()
	if err := receive(r.t, ended); err != nil {
		r.t.Fatal(err)
	}
}

// check compares what became of the job. The errors are given by their codes; zero is none.
func (r *rig) check(j *dispatch.Job, outcomes []backend.Outcome, results ...dispatch.Result) {
	r.t.Helper()
	if !slices.Equal(j.Outcomes, outcomes) {
		r.t.Errorf("outcomes %v, want %v", j.Outcomes, outcomes)
	}
	if len(j.Results) != len(results) {
		r.t.Fatalf("%d results, want %d", len(j.Results), len(results))
	}
	for i, want := range results {
		got := j.Results[i]
		if backend.CodeOf(got.Err) != backend.CodeOf(want.Err) {
			r.t.Errorf("group %d: error %v, want code %v", i, got.Err, backend.CodeOf(want.Err))
		}
		got.Err = want.Err
		if got != want {
			r.t.Errorf("group %d: %+v, want %+v", i, got, want)
		}
	}
}

func outcomes(o backend.Outcome, n int) []backend.Outcome {
	return slices.Repeat([]backend.Outcome{o}, n)
}
