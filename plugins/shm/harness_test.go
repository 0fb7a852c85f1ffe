package shm

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/samehost"
)

// patience is how long a test waits for what must happen. No test depends on its length.
const patience = 30 * time.Second

const all = backend.RemoteRead | backend.RemoteWrite

func soon(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func peer(node string, incarnation uint64) backend.Peer {
	return backend.Peer{Node: node, Incarnation: incarnation, Host: "here"}
}

// newMemory makes a region of a memfd. It starts one page into the file and ends before a page does.
func newMemory(id backend.RegionID, size int, rights backend.Rights, seals int) (backend.Memory, error) {
	const before = 4096
	fd, err := unix.MemfdCreate("umbp-shm-test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return backend.Memory{}, err
	}
	if err := unix.Ftruncate(fd, int64(before+size)); err != nil {
		return backend.Memory{}, err
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return backend.Memory{}, err
	}
	b, err := unix.Mmap(fd, before, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return backend.Memory{}, err
	}
	return backend.Memory{
		Region: id, Kind: backend.HostMemory, Rights: rights, Bytes: b, FD: fd, FDOffset: before,
	}, nil
}

func freeMemory(m backend.Memory) {
	unix.Munmap(m.Bytes)
	unix.Close(m.FD)
}

func memory(t testing.TB, id backend.RegionID, size int, rights backend.Rights) backend.Memory {
	t.Helper()
	m, err := newMemory(id, size, rights, unix.F_SEAL_SHRINK)
	must(t, err)
	t.Cleanup(func() { freeMemory(m) })
	return m
}

// socketDir returns a new directory with a short name: socket paths are bounded.
func socketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "umbp")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// spy is a mover that remembers the last path.
type spy struct {
	*mover
	path atomic.Pointer[path]
}

// Join implements samehost.Mover.
func (s *spy) Join(ctx context.Context, near, far samehost.Region, target samehost.Target) (samehost.Path, error) {
	p, err := s.mover.Join(ctx, near, far, target)
	if err == nil {
		s.path.Store(p.(*path))
	}
	return p, err
}

func openInstance(self backend.Peer, options map[string]string) (*samehost.Instance, *spy, error) {
	values, err := backend.CheckOptions(Factory.Options, options)
	if err != nil {
		return nil, nil, err
	}
	m := &spy{mover: newMover(values)}
	i, err := samehost.Open(backend.Config{Self: self, Options: values}, samehost.Settings{Info: info(values), Mover: m})
	return i, m, err
}

// instance is an opened backend with what tests look at.
type instance struct {
	*samehost.Instance
	self  backend.Peer
	mover *spy
}

// newInstance opens an instance that is closed, without an error, when the test ends. Options are name=value.
func newInstance(t testing.TB, self backend.Peer, options ...string) *instance {
	t.Helper()
	raw := map[string]string{"socket_dir": socketDir(t)}
	for _, o := range options {
		name, value, _ := strings.Cut(o, "=")
		raw[name] = value
	}
	i, m, err := openInstance(self, raw)
	must(t, err)
	t.Cleanup(func() {
		if err := i.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return &instance{i, self, m}
}

// answerer is a target: an instance here, or one in a child process.
type answerer interface {
	Answer(ctx context.Context, peer backend.Peer, offer []byte) ([]byte, error)
}

func connect(t testing.TB, from *instance, to backend.Peer, target answerer) backend.Endpoint {
	t.Helper()
	h, err := from.Offer(soon(t), to)
	must(t, err)
	a, err := target.Answer(soon(t), from.self, h.Offer())
	must(t, err)
	e, err := h.Establish(soon(t), a)
	must(t, err)
	return e
}

// register registers a region and returns its descriptor.
func register(t testing.TB, i *instance, m backend.Memory) backend.Remote {
	t.Helper()
	key, err := i.Register(soon(t), m)
	must(t, err)
	return backend.Remote{
		Peer: i.self, Region: m.Region, Kind: m.Kind, Rights: m.Rights, Size: uint64(len(m.Bytes)), Key: key,
	}
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

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantCode(t testing.TB, err error, code backend.Code) {
	t.Helper()
	var e *backend.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Fatalf("got %v, want code %q", err, code)
	}
}

// fill writes bytes that are different for each seed.
func fill(b []byte, seed uint64) {
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	rand.NewChaCha8(key).Read(b)
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

// protections lists the permissions of the mappings of test memory, sorted, from /proc/self/maps.
func protections(t testing.TB) (list []string) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/maps")
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "memfd:umbp-shm-test") {
			list = append(list, strings.Fields(line)[1])
		}
	}
	slices.Sort(list)
	return list
}
