package samehost

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
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
	fd, err := unix.MemfdCreate("umbp-samehost-test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
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

// openInstance opens an instance with a copyMover. Settings can be changed before.
func openInstance(self backend.Peer, options map[string]string, change ...func(*Settings)) (*Instance, error) {
	values, err := backend.CheckOptions(Options(), options)
	if err != nil {
		return nil, err
	}
	return openWith(backend.Config{Self: self, Options: values}, change...)
}

func openWith(cfg backend.Config, change ...func(*Settings)) (*Instance, error) {
	host := backend.Kinds(backend.HostMemory)
	s := Settings{Mover: newCopyMover(), Info: backend.Info{Name: testName, Version: "1", Capabilities: backend.Capabilities{
		Ops: backend.Write | backend.Read, Local: host, Remote: host, Reach: backend.SameHost,
		NeedsFD: true, Limits: backend.Limits{Segments: 1 << 14}, Window: cfg.Options.Int("window"),
	}}}
	for _, f := range change {
		f(&s)
	}
	return Open(cfg, s)
}

// testName is the name of the backend.
const testName = "copy"

// newInstance opens an instance that is closed, without an error, when the test ends. Options are name=value.
func newInstance(t testing.TB, self backend.Peer, options ...string) *Instance {
	t.Helper()
	raw := map[string]string{"socket_dir": socketDir(t)}
	for _, o := range options {
		name, value, _ := strings.Cut(o, "=")
		raw[name] = value
	}
	i, err := openInstance(self, raw)
	must(t, err)
	closeLater(t, i)
	return i
}

func closeLater(t testing.TB, i *Instance) {
	t.Cleanup(func() {
		if err := i.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
}

// newUntilExit is newInstance, with UntilExit.
func newUntilExit(t testing.TB, self backend.Peer) *Instance {
	t.Helper()
	i, err := openInstance(self, map[string]string{"socket_dir": socketDir(t)}, func(s *Settings) { s.UntilExit = true })
	must(t, err)
	closeLater(t, i)
	return i
}

// asFromElsewhere has an instance reached from now on as if the initiators were in other processes.
func asFromElsewhere(i *Instance) { instances.Delete(i.id) }

// answerer is a target: an instance here, or one in a child process.
type answerer interface {
	Answer(ctx context.Context, peer backend.Peer, offer []byte) ([]byte, error)
}

func connect(t testing.TB, from *Instance, to backend.Peer, target answerer) *endpoint {
	t.Helper()
	h, err := from.Offer(soon(t), to)
	must(t, err)
	a, err := target.Answer(soon(t), from.self, h.Offer())
	must(t, err)
	e, err := h.Establish(soon(t), a)
	must(t, err)
	return e.(*endpoint)
}

// register registers a region and returns its descriptor.
func register(t testing.TB, i *Instance, m backend.Memory) backend.Remote {
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

func wantText(t testing.TB, err error, text string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) {
		t.Fatalf("got %v, want an error that says %q", err, text)
	}
}

func wantDone(t testing.TB, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("the endpoint does not end")
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

// held counts what this process holds: open descriptors, and mappings of test memory.
func held() (counts [2]int, err error) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return counts, err
	}
	text, err := os.ReadFile("/proc/self/maps")
	return [2]int{len(entries), strings.Count(string(text), "memfd:umbp-samehost-test")}, err
}
