package rdma

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/device"
	"github.com/umbp/umbp/plugins/rdma/verbstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// long bounds what must end, and does so at once unless something is broken.
const long = 20 * time.Second

// openNode opens a backend on the devices of lib. It is closed with the test.
func openNode(t testing.TB, lib device.Library, name string, opts map[string]string) *transport {
	t.Helper()
	values, err := backend.CheckOptions(options, opts)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Factory(lib).Open(context.Background(), backend.Config{
		Self: backend.Peer{Node: name, Incarnation: 7, Host: "here"}, Options: values,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("close %s: %v", name, err)
		}
	})
	return b.(*transport)
}

// lend registers memory and returns it as peers see it.
func (t *transport) lend(tb testing.TB, id backend.RegionID, bytes []byte, rights backend.Rights) backend.Remote {
	tb.Helper()
	key, err := t.Register(context.Background(), backend.Memory{
		Region: id, Kind: backend.HostMemory, Rights: rights, Bytes: bytes, FD: -1,
	})
	if err != nil {
		tb.Fatal(err)
	}
	return backend.Remote{Peer: t.self, Region: id, Kind: backend.HostMemory, Rights: rights, Size: uint64(len(bytes)), Key: key}
}

// tryConnect sets up a connection.
func tryConnect(initiator, target *transport) (*endpoint, error) {
	ctx, cancel := context.WithTimeout(context.Background(), long)
	defer cancel()
	h, err := initiator.Offer(ctx, target.self)
	if err != nil {
		return nil, err
	}
	answer, err := target.Answer(ctx, initiator.self, h.Offer())
	if err != nil {
		h.Abandon()
		return nil, err
	}
	e, err := h.Establish(ctx, answer)
	if err != nil {
		return nil, err
	}
	return e.(*endpoint), nil
}

// rig is an initiator and a target on one simulated network, connected, with a region of each.
type rig struct {
	fabric      *verbstest.Fabric
	a, b        *transport
	near, far   []byte
	remote      backend.Remote
	endpoint    *endpoint
	session     *session
	completions sink
}

// newRig gives each end a device of its own for each of those that cfg has, or one, if it has none. Those of the
// initiator are called sim-a0, sim-a1 and so on. Bytes move until the ends are connected, whatever cfg says.
func newRig(t testing.TB, cfg verbstest.Config, size int, opts map[string]string) *rig {
	t.Helper()
	hosts := map[string][]string{}
	if len(cfg.Devices) == 0 {
		cfg.Devices = make([]verbstest.DeviceConfig, 1)
	}
	var all []verbstest.DeviceConfig
	for _, host := range []string{"a", "b"} {
		for i, d := range cfg.Devices {
			d.Name = "sim-" + host + string(rune('0'+i))
			all = append(all, d)
			hosts[host] = append(hosts[host], d.Name)
		}
	}
	cfg.Devices = all
	quiet := cfg.NoBytes
	cfg.NoBytes = false
	r := &rig{fabric: verbstest.New(cfg), near: make([]byte, size), far: make([]byte, size), completions: newSink()}
	t.Cleanup(func() {
		if left := r.fabric.Objects(); left != (verbstest.Objects{}) {
			t.Errorf("after everything was closed there are %+v", left)
		}
	})
	r.a = openNode(t, r.fabric.Host(hosts["a"]...), "a", opts)
	r.b = openNode(t, r.fabric.Host(hosts["b"]...), "b", opts)
	r.a.lend(t, 1, r.near, 0)
	r.remote = r.b.lend(t, 2, r.far, backend.RemoteRead|backend.RemoteWrite)
	r.connect(t)
	r.fabric.SetNoBytes(quiet)
	return r
}

// connect gives the rig a new endpoint and a session over it.
func (r *rig) connect(t testing.TB) {
	t.Helper()
	var err error
	if r.endpoint, err = tryConnect(r.a, r.b); err != nil {
		t.Fatal(err)
	}
	r.session = r.bind(t, r.completions)
}

// bind returns one more session between the two regions.
func (r *rig) bind(t testing.TB, sink backend.Sink) *session {
	t.Helper()
	s, err := r.endpoint.Session(context.Background(), 1, r.remote, sink)
	if err != nil {
		t.Fatal(err)
	}
	return s.(*session)
}

// sink hands completions to the test.
type sink chan backend.Completion

func newSink() sink { return make(sink, 4096) }

func (s sink) Complete(c backend.Completion) {
	c.Outcomes = slices.Clone(c.Outcomes)
	s <- c
}

func (s sink) next(t testing.TB) backend.Completion {
	t.Helper()
	select {
	case c := <-s:
		return c
	case <-time.After(long):
		t.Fatalf("no completion\n%s", stacks())
		panic("unreachable")
	}
}

func (s sink) empty(t testing.TB) {
	t.Helper()
	select {
	case c := <-s:
		t.Fatalf("unexpected completion %+v", c)
	default:
	}
}

func stacks() string {
	b := make([]byte, 1<<20)
	return string(b[:runtime.Stack(b, true)])
}

func wantCode(t testing.TB, err error, code backend.Code) {
	t.Helper()
	var e *backend.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Fatalf("got error %v, want code %q", err, code)
	}
}

func wantClosed(t testing.TB, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(long):
		t.Fatalf("%s did not happen\n%s", what, stacks())
	}
}

// eventually waits for a condition that another goroutine brings about.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(long); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s did not come about\n%s", what, stacks())
		}
	}
}

func pattern(b []byte, seed int) {
	x := uint32(seed)*2654435761 + 1
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
}
