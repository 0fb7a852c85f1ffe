package xgmi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
	"github.com/umbp/umbp/plugin-sdk/gpu"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
)

const (
	all = backend.RemoteRead | backend.RemoteWrite
	kib = 1 << 10
	mib = 1 << 20
)

type sink = backendtest.Sink

var (
	soon         = backendtest.Context
	must         = backendtest.Must
	wantCode     = backendtest.WantCode
	wantOutcomes = backendtest.WantOutcomes
	wantSame     = backendtest.WantSame
	until        = backendtest.Eventually
	filled       = backendtest.Filled
	peer         = backendtest.Peer
	bind         = backendtest.Bind
	post         = backendtest.Post
	model        = backendtest.Model
)

// TestMain runs the tests, or, in a process that the tests started, the other end.
func TestMain(m *testing.M) {
	backendtest.ServeChild(newChild())
	goleak.VerifyTestMain(m)
}

// host is a process that has memory of its own to register: this one, or a child.
type host struct {
	rt *gpu.Runtime
	// mapped is the memory that was made, newest last.
	mapped []func() error
}

func openHost(runtime, library string) (*host, error) {
	rt, err := gpu.Open(gpu.Options{Runtime: runtime, Library: library})
	if err != nil {
		return nil, err
	}
	return &host{rt: rt}, nil
}

// close frees the memory.
func (h *host) close() error {
	var errs []error
	for _, free := range h.mapped {
		errs = append(errs, free())
	}
	return errors.Join(append(errs, h.rt.Close())...)
}

// margin is what lies before and after each region in its allocation.
const margin = 3 * 4096

// memory makes a region on a device, or, with number -1, on the host.
func (h *host) memory(id backend.RegionID, device, size int, rights backend.Rights) (backend.Memory, error) {
	if device < 0 {
		m, err := backendtest.NewMemfd(id, size, rights, unix.F_SEAL_SHRINK)
		if err == nil {
			h.mapped = append(h.mapped, func() error { return backendtest.FreeMemfd(m) })
		}
		return m, err
	}
	m := backend.Memory{Region: id, Kind: backend.GPUMemory, Rights: rights, FD: -1}
	base, err := h.rt.Alloc(device, uint64(size+2*margin))
	if err != nil {
		return m, err
	}
	h.mapped = append(h.mapped, func() error { return h.rt.Free(device, base) })
	g, err := h.rt.Describe(base+margin, uint64(size))
	m.GPU = &g
	return m, err
}

func (h *host) number(m *backend.Memory) int {
	return slices.IndexFunc(h.rt.Devices(), func(d gpu.Device) bool { return d.PCI == m.GPU.Device })
}

// load returns what is in a region.
func (h *host) load(m *backend.Memory) ([]byte, error) {
	if m.GPU == nil {
		return slices.Clone(m.Bytes), nil
	}
	b := make([]byte, m.GPU.Size)
	return b, h.rt.Load(h.number(m), b, m.GPU.Address)
}

func (h *host) store(m *backend.Memory, b []byte) error {
	if m.GPU == nil {
		copy(m.Bytes, b)
		return nil
	}
	return h.rt.Store(h.number(m), m.GPU.Address, b)
}

// world is a simulated machine, and this process on it.
type world struct {
	*host
	t       testing.TB
	sim     *gpusim.Sim
	runtime string
	log     *logged
	loses   bool // a device, so that its memory cannot be freed
}

// newWorld makes a machine. When the test ends, nothing of it may be left in the runtime.
func newWorld(t testing.TB, m gpusim.Machine) *world {
	t.Helper()
	w := &world{t: t, sim: gpusim.New(t, m), runtime: m.Runtime, log: new(logged)}
	if w.runtime == "" {
		w.runtime = "hip"
	}
	var err error
	w.host, err = openHost(w.runtime, w.sim.Library)
	must(t, err)
	t.Cleanup(func() {
		w.sim.SetFaults()
		if err := w.close(); err != nil && !w.loses {
			t.Errorf("free the memory: %v", err)
		}
		if left := w.sim.Counts().Left(); left != (gpusim.Counts{}) {
			t.Errorf("left in the runtime: %+v", left)
		}
		if len(imports.m) != 0 {
			t.Errorf("%d imports are left", len(imports.m))
		}
	})
	return w
}

// region makes a region with contents of its own.
func (w *world) region(id backend.RegionID, device, size int, rights backend.Rights) backend.Memory {
	w.t.Helper()
	m, err := w.memory(id, device, size, rights)
	must(w.t, err)
	must(w.t, w.store(&m, filled(size, uint64(id))))
	return m
}

func (w *world) content(m backend.Memory) []byte {
	w.t.Helper()
	b, err := w.load(&m)
	must(w.t, err)
	return b
}

// options returns the options of an instance on this machine. More are given as name=value.
func (w *world) options(more ...string) map[string]string {
	of := []string{"socket_dir=" + backendtest.SocketDir(w.t), "runtime=" + w.runtime, "library=" + w.sim.Library}
	return backendtest.Options(append(of, more...)...)
}

// node opens an instance that is closed, without an error, when the test ends.
func (w *world) node(self backend.Peer, options ...string) *node {
	w.t.Helper()
	i, err := openInstance(self, w.options(options...), w.log)
	must(w.t, err)
	n := &node{i, self}
	w.t.Cleanup(func() {
		w.sim.SetFaults() // a test that failed may have left copies that stall
		if err := i.Close(); err != nil {
			w.t.Errorf("close: %v", err)
		}
		for _, d := range i.engine.devices {
			if d.lost.Load() == nil && d.driver != nil {
				for _, s := range d.driver.streams {
					if s.load != 0 || s.bytes != 0 || s.flight.n != 0 || s.queue.first != nil {
						w.t.Errorf("a stream of %s ends with load %d and %d bytes in flight", d, s.load, s.bytes)
					}
				}
			}
		}
	})
	return n
}

// node is an instance of this process.
type node struct {
	*instance
	self backend.Peer
}

func openInstance(self backend.Peer, options map[string]string, log backend.Logger) (*instance, error) {
	values, err := backend.CheckOptions(Factory.Options, options)
	if err != nil {
		return nil, err
	}
	return open(backend.Config{Self: self, Options: values, Log: log})
}

func (n *node) connect(t testing.TB, to backend.Peer, target backendtest.Target) backend.Endpoint {
	t.Helper()
	return backendtest.Connect(t, n, n.self, to, target)
}

// register registers a region and returns its descriptor.
func (n *node) register(t testing.TB, m backend.Memory) backend.Remote {
	t.Helper()
	return backendtest.Register(t, n, n.self, m)
}

// count returns one of the counters.
func (n *node) count(t testing.TB, name string) uint64 {
	t.Helper()
	return backendtest.Count(t, n, name)
}

// couple is an initiator and a target in this process, with a session between two regions.
type couple struct {
	*world
	a, b      *node
	near, far backend.Memory
	remote    backend.Remote
	endpoint  backend.Endpoint
	session   backend.Session
	sink      *sink
}

// newCouple makes regions of a size on two devices, -1 being the host.
func (w *world) newCouple(nearDevice, farDevice, size int, options ...string) *couple {
	w.t.Helper()
	c := &couple{world: w, a: w.node(peer("a", 1), options...), b: w.node(peer("b", 2), options...), sink: new(sink)}
	c.near, c.far = w.region(1, nearDevice, size, 0), w.region(5, farDevice, size, all)
	c.a.register(w.t, c.near)
	c.remote = c.b.register(w.t, c.far)
	c.endpoint = c.a.connect(w.t, c.b.self, c.b)
	c.session = bind(w.t, c.endpoint, 1, c.remote, c.sink)
	return c
}

// logged is what was logged at warning and above.
type logged struct {
	mu    sync.Mutex
	lines []string
}

func (l *logged) add(level, msg string, args []any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, level+" "+msg+" "+fmt.Sprint(args...))
}

func (l *logged) Debug(string, ...any)          {}
func (l *logged) Info(string, ...any)           {}
func (l *logged) Warn(msg string, args ...any)  { l.add("warn", msg, args) }
func (l *logged) Error(msg string, args ...any) { l.add("error", msg, args) }

// with returns the lines that contain all words.
func (l *logged) with(words ...string) (found []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.lines {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			found = append(found, line)
		}
	}
	return found
}

// contextUntil returns a context that ends with a channel.
func contextUntil[T any](end <-chan T) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		select {
		case <-end:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}
