package xgmi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/gpu"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
)

// patience is how long a test waits for what must happen. No test depends on its length.
const patience = 30 * time.Second

const (
	all = backend.RemoteRead | backend.RemoteWrite
	kib = 1 << 10
	mib = 1 << 20
)

func soon(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func peer(node string, incarnation uint64) backend.Peer {
	return backend.Peer{Node: node, Incarnation: incarnation, Host: "here"}
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
	m := backend.Memory{Region: id, Kind: backend.GPUMemory, Rights: rights, FD: -1}
	if device < 0 {
		m.Kind, m.FDOffset = backend.HostMemory, margin
		return m, h.hostMemory(&m, size)
	}
	base, err := h.rt.Alloc(device, uint64(size+2*margin))
	if err != nil {
		return m, err
	}
	h.mapped = append(h.mapped, func() error { return h.rt.Free(device, base) })
	g, err := h.rt.Describe(base+margin, uint64(size))
	m.GPU = &g
	return m, err
}

func (h *host) hostMemory(m *backend.Memory, size int) error {
	fd, err := unix.MemfdCreate("umbp-xgmi-test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return err
	}
	m.FD = fd
	h.mapped = append(h.mapped, func() error { return unix.Close(fd) })
	if err := unix.Ftruncate(fd, int64(size+2*margin)); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK); err != nil {
		return err
	}
	whole, err := unix.Mmap(fd, 0, size+2*margin, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	h.mapped = append(h.mapped, func() error { return unix.Munmap(whole) })
	m.Bytes = whole[margin:][:size:size]
	return nil
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
	raw := map[string]string{"socket_dir": socketDir(w.t), "runtime": w.runtime, "library": w.sim.Library}
	for _, o := range more {
		name, value, _ := strings.Cut(o, "=")
		raw[name] = value
	}
	return raw
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

// socketDir returns a new directory with a short name: socket paths are bounded.
func socketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "umbp")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// answerer is a target: an instance here, or one in a child process.
type answerer interface {
	Answer(ctx context.Context, peer backend.Peer, offer []byte) ([]byte, error)
}

func (n *node) connect(t testing.TB, to backend.Peer, target answerer) backend.Endpoint {
	t.Helper()
	h, err := n.Offer(soon(t), to)
	must(t, err)
	a, err := target.Answer(soon(t), n.self, h.Offer())
	must(t, err)
	e, err := h.Establish(soon(t), a)
	must(t, err)
	return e
}

// register registers a region and returns its descriptor.
func (n *node) register(t testing.TB, m backend.Memory) backend.Remote {
	t.Helper()
	key, err := n.Register(soon(t), m)
	must(t, err)
	return describe(n.self, m, key)
}

func describe(of backend.Peer, m backend.Memory, key []byte) backend.Remote {
	return backend.Remote{
		Peer: of, Region: m.Region, Kind: m.Kind, Rights: m.Rights, Size: m.Size(), Place: m.Place(), Key: key,
	}
}

// count returns one of the counters.
func (n *node) count(t testing.TB, name string) uint64 {
	t.Helper()
	for _, c := range n.Counters() {
		if c.Name == name {
			return c.Value
		}
	}
	t.Fatalf("no counter %q", name)
	return 0
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
	c := &couple{world: w, a: w.node(peer("a", 1), options...), b: w.node(peer("b", 2), options...), sink: newSink()}
	c.near, c.far = w.region(1, nearDevice, size, 0), w.region(5, farDevice, size, all)
	c.a.register(w.t, c.near)
	c.remote = c.b.register(w.t, c.far)
	c.endpoint = c.a.connect(w.t, c.b.self, c.b)
	var err error
	c.session, err = c.endpoint.Session(soon(w.t), 1, c.remote, c.sink)
	must(w.t, err)
	return c
}

// sink collects completions. It keeps copies, as the contract says.
type sink struct {
	mu   sync.Mutex
	got  map[uint64]backend.Completion
	more chan struct{}
	twin []uint64 // cookies that completed twice
}

func newSink() *sink {
	return &sink{got: make(map[uint64]backend.Completion), more: make(chan struct{}, 1)}
}

func (s *sink) Complete(c backend.Completion) {
	c.Outcomes = slices.Clone(c.Outcomes)
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.got[c.Cookie]; ok {
		s.twin = append(s.twin, c.Cookie)
	}
	s.got[c.Cookie] = c
	select {
	case s.more <- struct{}{}:
	default:
	}
}

func (s *sink) has(cookie uint64) (backend.Completion, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.got[cookie]
	return c, ok
}

// wait returns the completion of a cookie. One goroutine at a time may wait.
func (s *sink) wait(t testing.TB, cookie uint64) backend.Completion {
	t.Helper()
	for limit := time.After(patience); ; {
		if c, ok := s.has(cookie); ok {
			if len(s.twin) > 0 {
				t.Fatalf("completed twice: %v", s.twin)
			}
			return c
		}
		select {
		case <-s.more:
		case <-limit:
			t.Fatalf("transfer %d does not complete", cookie)
		}
	}
}

// post posts a transfer and overwrites the caller's segments at once, as a host may.
func post(s backend.Session, op backend.Op, cookie uint64, segments ...backend.Segment) error {
	mine := slices.Clone(segments)
	err := s.Post(backend.Transfer{Op: op, Segments: mine, Cookie: cookie})
	for i := range mine {
		mine[i] = backend.Segment{Local: 1 << 60, Remote: 1 << 60, Length: 1 << 60}
	}
	return err
}

// until waits for what must come true without a sign.
func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	for limit := time.Now().Add(patience); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("never comes true: " + what)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantCode(t testing.TB, err error, code backend.Code, words ...string) {
	t.Helper()
	var e *backend.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Fatalf("got %v, want code %q", err, code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Fatalf("got %v, want it to say %q", err, w)
		}
	}
}

func wantOutcomes(t testing.TB, c backend.Completion, want ...backend.Outcome) {
	t.Helper()
	if !slices.Equal(c.Outcomes, want) {
		t.Fatalf("outcomes %v, want %v (%v)", c.Outcomes, want, c.Err)
	}
}

// filled returns bytes that are different for each seed.
func filled(n int, seed uint64) []byte {
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return b
}

func wantSame(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("%s: byte %d is %#x, want %#x", what, i, got[i], want[i])
		}
	}
	t.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
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
