package fault_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/conformance"
	"github.com/umbp/umbp/plugin-sdk/fault"
	"github.com/umbp/umbp/plugin-sdk/reference"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestConformance: a wrapper whose script does nothing that breaks the contract is a backend like any other.
func TestConformance(t *testing.T) {
	conformance.Run(t, conformance.Harness{
		Factory: fault.WrapFactory(reference.NewNetwork().Factory(), parse(t, "complete:10*off->delay(300us)")),
	})
}

// TestBreaches: the two verbs that are meant to break the contract do, and the suite sees it.
func TestBreaches(t *testing.T) {
	for text, want := range map[string]string{
		"complete:dup":     "a second completion",
		"complete:corrupt": "is wrong",
	} {
		name := map[string]string{"complete:dup": "complete/once", "complete:corrupt": "bytes/edges"}[text]
		for _, c := range conformance.Cases() {
			if c.Name != name {
				continue
			}
			r := c.Try(conformance.Harness{
				Factory: fault.WrapFactory(reference.NewNetwork().Factory(), parse(t, text)),
			})
			if !strings.Contains(r.Detail, want) {
				t.Errorf("%s: %s finds %q, want %q", text, name, r.Detail, want)
			}
		}
	}
}

// rig is a connected pair whose both ends are wrapped with one script. Setting it up uses every point but post,
// complete, fence and close once.
type rig struct {
	*reference.Pair
	*sink
	near, far   backend.Backend
	endpoint    backend.Endpoint
	session     backend.Session
	here, there []byte
	remote      backend.Remote
}

func newRig(t *testing.T, s *fault.Script) *rig {
	t.Helper()
	pair, err := reference.NewPair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pair.Close() })
	r := &rig{
		Pair: pair, sink: &sink{c: make(chan backend.Completion, 100)},
		near: fault.Wrap(pair.Initiator, s), far: fault.Wrap(pair.Target, s),
		here: bytes.Repeat([]byte{1}, 4096), there: bytes.Repeat([]byte{2}, 4096),
	}
	t.Cleanup(func() { r.near.Close() })
	key, err := pair.Target.Register(ctx, backend.Memory{
		Region: 1, Kind: backend.HostMemory, Rights: backend.RemoteRead | backend.RemoteWrite, Bytes: r.there, FD: -1,
	})
	if err != nil {
		t.Fatal(err)
	}
	r.remote = backend.Remote{
		Peer: pair.TargetPeer, Region: 1, Kind: backend.HostMemory,
		Rights: backend.RemoteRead | backend.RemoteWrite, Size: 4096, Key: key,
	}
	if err := r.register(1); err != nil {
		t.Fatal(err)
	}
	if r.endpoint, err = r.connect(); err != nil {
		t.Fatal(err)
	}
	if r.session, err = r.bind(r.endpoint); err != nil {
		t.Fatal(err)
	}
	return r
}

var ctx = context.Background()

func (r *rig) register(id backend.RegionID) error {
	_, err := r.near.Register(ctx, backend.Memory{Region: id, Kind: backend.HostMemory, Bytes: r.here, FD: -1})
	return err
}

func (r *rig) connect() (backend.Endpoint, error) {
	return reference.Connect(ctx, r.near, r.InitiatorPeer, r.far, r.TargetPeer)
}

func (r *rig) bind(e backend.Endpoint) (backend.Session, error) {
	return e.Session(ctx, 1, r.remote, r.sink)
}

// three segments of 16 bytes
var segments = []backend.Segment{{Length: 16}, {Local: 16, Remote: 16, Length: 16}, {Local: 32, Remote: 32, Length: 16}}

func (r *rig) post(op backend.Op, cookie uint64) error {
	return r.session.Post(backend.Transfer{Op: op, Segments: segments, Cookie: cookie})
}

// sink hands completions to the test.
type sink struct{ c chan backend.Completion }

func (s *sink) Complete(c backend.Completion) {
	c.Outcomes = slices.Clone(c.Outcomes)
	s.c <- c
}

func (s *sink) next(t *testing.T) backend.Completion {
	t.Helper()
	select {
	case c := <-s.c:
		return c
	case <-time.After(time.Minute):
		t.Fatal("no completion")
		return backend.Completion{}
	}
}

func (s *sink) none(t *testing.T) {
	t.Helper()
	select {
	case c := <-s.c:
		t.Fatalf("a completion that was to be held back: %+v", c)
	case <-time.After(5 * time.Millisecond):
	}
}

func parse(t *testing.T, text string) *fault.Script {
	t.Helper()
	s, err := fault.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestCalls injects one fault into each call that can have one, and sees the next call succeed.
func TestCalls(t *testing.T) {
	register := func(r *rig) error { return r.register(2) }
	offer := func(r *rig) error {
		h, err := r.near.Offer(ctx, r.TargetPeer)
		if err == nil {
			h.Abandon()
		}
		return err
	}
	connect := func(r *rig) error {
		_, err := r.connect()
		return err
	}
	bind := func(r *rig) error {
		_, err := r.bind(r.endpoint)
		return err
	}
	post := func(r *rig) error { return r.post(backend.Write, 1) }
	fence := func(r *rig) error { return r.far.Fence(ctx, r.InitiatorPeer) }
	for _, c := range []struct {
		text  string
		point fault.Point
		call  func(*rig) error
		want  backend.Code
	}{
		{"register:1*off->1*error(denied)", fault.Register, register, backend.Denied},
		{"offer:1*off->1*error(peergone)", fault.Offer, offer, backend.PeerGone},
		{"answer:1*off->1*error(busy)", fault.Answer, connect, backend.Busy},
		{"establish:1*off->1*error(badrequest)", fault.Establish, connect, backend.BadRequest},
		{"session:1*off->1*error(integrity)", fault.Session, bind, backend.Integrity},
		{"post:1*error(unsupported)", fault.Post, post, backend.Unsupported},
		{"post:1*busy", fault.Post, post, backend.Busy},
		{"fence:1*error(internal)", fault.Fence, fence, backend.Internal},
	} {
		t.Run(c.text, func(t *testing.T) {
			script := parse(t, c.text)
			r := newRig(t, script)
			if err := c.call(r); backend.CodeOf(err) != c.want {
				t.Errorf("first call: %v, want %v", err, c.want)
			}
			if err := c.call(r); err != nil {
				t.Errorf("second call: %v", err)
			}
			if script.Fired(c.point) != 1 {
				t.Errorf("Fired = %d, want 1", script.Fired(c.point))
			}
		})
	}
}

func TestDelayedCallEndsWithItsContext(t *testing.T) {
	r := newRig(t, parse(t, "fence:delay(1h)"))
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if err := r.far.Fence(ended, r.InitiatorPeer); backend.CodeOf(err) != backend.Cancelled || !errors.Is(err, context.Canceled) {
		t.Errorf("Fence = %v, want Cancelled, because of the context", err)
	}
}

func TestCloseFails(t *testing.T) {
	r := newRig(t, parse(t, "close:1*error(internal)"))
	if err := r.near.Close(); !errors.Is(err, backend.ErrInternal) {
		t.Errorf("Close = %v, want the injected error", err)
	}
	<-r.endpoint.Done() // closed all the same
	if err := r.near.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

// TestCompletions injects faults that come with the completion.
func TestCompletions(t *testing.T) {
	const done, failed, doubt = backend.Done, backend.Failed, backend.InDoubt
	for _, c := range []struct {
		text     string
		want     backend.Code
		outcomes []backend.Outcome
	}{
		{"complete:off", 0, nil},
		{"complete:delay(1ms)", 0, nil},
		{"complete:error(integrity)", backend.Integrity, []backend.Outcome{failed, failed, failed}},
		{"complete:partial(0)", backend.PathDown, []backend.Outcome{doubt, doubt, doubt}},
		{"complete:partial(2)", backend.PathDown, []backend.Outcome{done, done, doubt}},
		{"complete:partial(3)", 0, nil},
		{"complete:kill", backend.PathDown, []backend.Outcome{doubt, doubt, doubt}},
	} {
		t.Run(c.text, func(t *testing.T) {
			r := newRig(t, parse(t, c.text))
			if err := r.post(backend.Write, 77); err != nil {
				t.Fatal(err)
			}
			got := r.next(t)
			if got.Cookie != 77 || backend.CodeOf(got.Err) != c.want || (got.Err != nil && !slices.Equal(got.Outcomes, c.outcomes)) {
				t.Errorf("got %+v, want %v and %v", got, c.want, c.outcomes)
			}
			if strings.HasSuffix(c.text, "kill") {
				<-r.endpoint.Done()
				if err := r.post(backend.Write, 78); !errors.Is(err, backend.ErrPathDown) {
					t.Errorf("Post after kill: %v, want PathDown", err)
				}
			}
		})
	}
}

func TestDup(t *testing.T) {
	r := newRig(t, parse(t, "complete:1*dup"))
	if err := r.post(backend.Write, 5); err != nil {
		t.Fatal(err)
	}
	if a, b := r.next(t), r.next(t); a.Cookie != 5 || b.Cookie != 5 || a.Err != nil || b.Err != nil {
		t.Errorf("got %+v and %+v, want the same twice", a, b)
	}
}

func TestCorrupt(t *testing.T) {
	r := newRig(t, parse(t, "complete:corrupt"))
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		if err := r.post(op, 1); err != nil {
			t.Fatal(err)
		}
		if c := r.next(t); c.Err != nil {
			t.Fatal(c.Err)
		}
	}
	// The write made all bytes 1, and the read got them back.
	want := bytes.Repeat([]byte{1}, 48)
	if !bytes.Equal(r.there[:48], want) {
		t.Error("a write was corrupted")
	}
	if want[0] = 0; !bytes.Equal(r.here[:48], want) {
		t.Errorf("after a read: % x, want one bit of the first byte flipped", r.here[:48])
	}
}

func TestKillAtPost(t *testing.T) {
	script := parse(t, "post:1*off->1*kill;complete:drop")
	r := newRig(t, script)
	if err := r.post(backend.Write, 1); err != nil {
		t.Fatal(err)
	}
	r.none(t)
	if err := r.post(backend.Write, 2); !errors.Is(err, backend.ErrPathDown) {
		t.Errorf("the post that kills: %v, want PathDown", err)
	}
	<-r.endpoint.Done()
	if c := r.next(t); c.Cookie != 1 || c.Err == nil {
		t.Errorf("the transfer in flight ended with %+v, want an error", c)
	}
	if _, err := r.bind(r.endpoint); !errors.Is(err, backend.ErrPathDown) {
		t.Errorf("Session after kill: %v, want PathDown", err)
	}
}

func TestKillAtSession(t *testing.T) {
	r := newRig(t, parse(t, "session:1*off->kill"))
	if _, err := r.bind(r.endpoint); !errors.Is(err, backend.ErrPathDown) {
		t.Errorf("Session = %v, want PathDown", err)
	}
	<-r.endpoint.Done()
}

// TestHeldUntil holds completions back, and wants them when the transfer is over for another reason. Each ends
// in what the verb promises.
func TestHeldUntil(t *testing.T) {
	for name, end := range map[string]func(r *rig) error{
		"Cancel": func(r *rig) error {
			r.session.Cancel(1)
			return nil
		},
		"Session.Close":  func(r *rig) error { return r.session.Close() },
		"Endpoint.Close": func(r *rig) error { return r.endpoint.Close() },
		"Backend.Close":  func(r *rig) error { return r.near.Close() },
		"Deregister":     func(r *rig) error { return r.near.Deregister(ctx, 1) },
	} {
		for text, want := range map[string]backend.Code{"complete:drop": backend.Cancelled, "complete:delay(1h)": 0} {
			t.Run(name+" "+text, func(t *testing.T) {
				script := parse(t, text)
				r := newRig(t, script)
				if err := r.post(backend.Read, 1); err != nil {
					t.Fatal(err)
				}
				for script.Fired(fault.Complete) == 0 {
					time.Sleep(time.Millisecond)
				}
				r.none(t)
				if err := end(r); err != nil {
					t.Fatal(err)
				}
				if name != "Cancel" && len(r.sink.c) != 1 {
					t.Errorf("%s returned with %d completions delivered, want 1", name, len(r.sink.c))
				}
				c := r.next(t)
				if backend.CodeOf(c.Err) != want {
					t.Errorf("ended with %v, want %v", c.Err, want)
				}
				if doubt := slices.Repeat([]backend.Outcome{backend.InDoubt}, 3); want != 0 && !slices.Equal(c.Outcomes, doubt) {
					t.Errorf("outcomes %v, want all in doubt", c.Outcomes)
				}
				if err := r.session.Close(); err != nil {
					t.Error(err)
				}
				r.none(t)
			})
		}
	}
}

// TestDropKeepsTheWindow: what is held back still counts.
func TestDropKeepsTheWindow(t *testing.T) {
	r := newRig(t, parse(t, "complete:drop"))
	window := r.near.Info().Capabilities.Window
	accepted := 0
	for i := range 10 * window {
		if r.post(backend.Write, uint64(i)) == nil {
			accepted++
		}
		time.Sleep(10 * time.Microsecond)
	}
	if accepted < window || accepted > 2*window {
		t.Errorf("%d transfers were accepted and none completed, with a window of %d", accepted, window)
	}
	r.sink.c = make(chan backend.Completion, accepted)
	if err := r.session.Close(); err != nil {
		t.Fatal(err)
	}
	if len(r.sink.c) != accepted {
		t.Errorf("%d completions for %d transfers", len(r.sink.c), accepted)
	}
}
