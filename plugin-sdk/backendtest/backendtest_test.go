package backendtest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// TestFails has everything that can fail a test do so. Time is that of a bubble, in which waiting in vain takes none.
func TestFails(t *testing.T) {
	refusal := fmt.Errorf("wrapped: %w", backend.Errorf(backend.Denied, "no key"))
	closed := make(chan struct{})
	close(closed)
	completed := func(cookies ...uint64) *Sink {
		s := new(Sink)
		for _, c := range cookies {
			s.Complete(backend.Completion{Cookie: c})
		}
		return s
	}
	p := &paper{}
	for name, c := range map[string]struct {
		test  func(t testing.TB)
		words []string
	}{
		"an error":            {func(t testing.TB) { Must(t, refusal) }, []string{"no key"}},
		"another code":        {func(t testing.TB) { WantCode(t, refusal, backend.Busy) }, []string{"no key", "busy"}},
		"no code":             {func(t testing.TB) { WantCode(t, errors.New("odd"), backend.Internal) }, []string{"odd"}},
		"no error":            {func(t testing.TB) { WantCode(t, nil, backend.Denied) }, []string{"nil"}},
		"a missing word":      {func(t testing.TB) { WantCode(t, refusal, backend.Denied, "no", "lock") }, []string{`"lock"`}},
		"other outcomes":      {func(t testing.TB) { WantOutcomes(t, backend.Completion{Cookie: 5, Err: refusal}, backend.Done) }, []string{"transfer 5", "done", "no key"}},
		"other bytes":         {func(t testing.TB) { WantSame(t, "it", []byte("abc"), []byte("abd")) }, []string{"it: byte 2 is 0x63, want 0x64"}},
		"too few bytes":       {func(t testing.TB) { WantSame(t, "it", []byte("ab"), []byte("abd")) }, []string{"it: 2 bytes, want 3"}},
		"too many bytes":      {func(t testing.TB) { WantSame(t, "it", []byte("abd"), []byte("ab")) }, []string{"it: 3 bytes, want 2"}},
		"never closed":        {func(t testing.TB) { WantClosed(t, make(chan struct{}), "a break") }, []string{"a break", "goroutine "}},
		"closed":              {func(t testing.TB) { WantOpen(t, closed, "a break") }, []string{"a break"}},
		"never true":          {func(t testing.TB) { Eventually(t, "luck", func() bool { return false }) }, []string{"luck", "goroutine "}},
		"no completion":       {func(t testing.TB) { completed().Next(t) }, []string{"nothing completes", "goroutine "}},
		"another completion":  {func(t testing.TB) { completed(1, 2).Wait(t, 3) }, []string{"transfer 3", "goroutine "}},
		"too few completions": {func(t testing.TB) { completed(1, 2).Collect(t, 3) }, []string{"nothing completes"}},
		"a completion":        {func(t testing.TB) { completed(4).Empty(t) }, []string{"Cookie:4"}},
		"twice, at Wait":      {func(t testing.TB) { completed(8, 9, 8).Wait(t, 9) }, []string{"twice", "[8]"}},
		"twice, at Next":      {func(t testing.TB) { completed(9, 8, 8).Next(t) }, []string{"twice", "[8]"}},
		"twice, at All":       {func(t testing.TB) { completed(8, 8).All(t) }, []string{"twice", "[8]"}},
		"twice, at Empty":     {func(t testing.TB) { completed(8, 8).Empty(t) }, []string{"twice", "[8]"}},
		"twice, after Collect": {func(t testing.TB) {
			s := completed(8)
			s.Collect(t, 1)
			s.Complete(backend.Completion{Cookie: 8})
			s.Empty(t)
		}, []string{"Cookie:8"}},
		"twice, taken": {func(t testing.TB) {
			s := completed(8)
			go func() { time.Sleep(time.Millisecond); s.Complete(backend.Completion{Cookie: 8}) }()
			s.Collect(t, 2)
		}, []string{"twice"}},
		"an unknown counter":  {func(t testing.TB) { Count(t, p, "pens") }, []string{`"pens"`}},
		"an unknown option":   {func(t testing.TB) { Open(t, paperFactory, backend.Config{}, Options("size=3")) }, []string{"size"}},
		"an error at the end": {func(t testing.TB) { Open(t, paperFactory, backend.Config{}, Options("colour=red")) }, []string{"red does not close"}},
		"a refused region":    {func(t testing.TB) { Register(t, p, p.self, backend.Memory{}) }, []string{"region 0"}},
		"a refused session":   {func(t testing.TB) { Bind(t, new(line), 0, backend.Remote{}, nil) }, []string{"region 0"}},
		"a refused peer":      {func(t testing.TB) { Connect(t, p, p.self, p.self, &paper{refuse: refusal}) }, []string{"no key"}},
		"a wrong size":        {func(t testing.TB) { Memfd(t, 1, -1<<20, 0) }, []string{"invalid"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { wantFailure(t, c.test, c.words...) })
		})
	}
	if !p.abandoned {
		t.Error("the handshake was not abandoned when the target refused")
	}
}

// TestPasses has nothing fail a test that need not.
func TestPasses(t *testing.T) {
	closed := make(chan struct{})
	close(closed)
	n := 0
	got := failures(func(t testing.TB) {
		Must(t, nil)
		WantCode(t, fmt.Errorf("wrapped: %w", backend.Errorf(backend.Denied, "no key")), backend.Denied, "no", "key")
		WantOutcomes(t, backend.Completion{})
		WantOutcomes(t, backend.Completion{Outcomes: []backend.Outcome{backend.Done}}, backend.Done)
		WantSame(t, "it", nil, []byte{})
		WantSame(t, "it", []byte("x"), []byte("x"))
		WantClosed(t, closed, "a break")
		WantOpen(t, make(chan struct{}), "a break")
		Eventually(t, "three", func() bool { n++; return n == 3 })
		new(Sink).Empty(t)
		if Count(t, new(paper), "sheets") != 7 {
			t.Errorf("another count")
		}
	})
	if got != nil {
		t.Errorf("failures: %q", got)
	}
}

// TestContext has a context end with its test.
func TestContext(t *testing.T) {
	var err, later error
	failures(func(t testing.TB) {
		ctx := Context(t)
		err = ctx.Err()
		t.Cleanup(func() {})
		t.(*trial).cleanups = append([]func(){func() { later = ctx.Err() }}, t.(*trial).cleanups...)
	})
	if err != nil || later == nil {
		t.Errorf("within the test its state is %v, after it %v", err, later)
	}
}

func TestFill(t *testing.T) {
	seen := map[string]uint64{}
	for _, seed := range []uint64{0, 1, 1 << 8, 1 << 16, 1 << 63} {
		b := make([]byte, 32)
		Fill(b, seed)
		if !bytes.Equal(b, Filled(32, seed)) {
			t.Errorf("seed %d gives other bytes the second time", seed)
		}
		if other, ok := seen[string(b)]; ok {
			t.Errorf("the seeds %d and %d give the same bytes", seed, other)
		}
		seen[string(b)] = seed
	}
}

// TestSink takes some completions, and leaves others.
func TestSink(t *testing.T) {
	s := new(Sink)
	outcomes := []backend.Outcome{backend.Failed}
	for _, cookie := range []uint64{5, 3, 4} {
		s.Complete(backend.Completion{Cookie: cookie, Outcomes: outcomes, Err: backend.ErrBusy})
	}
	outcomes[0] = backend.Done // they belong to the backend
	WantOutcomes(t, s.Wait(t, 3), backend.Failed)
	if !s.Has(3) || s.Has(6) {
		t.Errorf("it has 3: %v; it has 6: %v", s.Has(3), s.Has(6))
	}
	if c := s.Next(t); c.Cookie != 5 || s.Has(5) {
		t.Errorf("took %+v, and it has 5: %v; want 5, and not", c, s.Has(5))
	}
	s.Complete(backend.Completion{Cookie: 5}) // which is free
	var order []uint64
	for _, c := range s.All(t) {
		order = append(order, c.Cookie)
	}
	if want := []uint64{3, 4, 5}; !reflect.DeepEqual(order, want) {
		t.Errorf("it has %v, want %v", order, want)
	}
	if got := s.Collect(t, 2); len(got) != 2 || got[3].Cookie != 3 || got[4].Cookie != 4 {
		t.Errorf("collected %+v, want 3 and 4", got)
	}
	s.Next(t)
	s.Empty(t)
}

// TestSinkWaits has goroutines wait at the same time.
func TestSinkWaits(t *testing.T) {
	s, got := new(Sink), make(chan uint64)
	for cookie := range uint64(8) {
		go func() { got <- s.Wait(t, cookie).Cookie }()
	}
	for cookie := range uint64(8) {
		s.Complete(backend.Completion{Cookie: 7 - cookie})
		if n := <-got; n != 7-cookie {
			t.Errorf("a wait for %d ended when %d completed", n, 7-cookie)
		}
	}
}

func TestPost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := &queue{busy: 1}
		WantCode(t, Post(q, backend.Write, 3, backend.Segment{Length: 9}), backend.Busy)
		segments := []backend.Segment{{Length: 9}}
		Must(t, Post(q, backend.Write, 3, segments...))
		if got := q.posted[0]; got.Op != backend.Write || got.Cookie != 3 || len(got.Segments) != 1 || got.Segments[0].Length == 9 {
			t.Errorf("the session has kept %+v, want a write with segments that were overwritten", got)
		}
		if segments[0].Length != 9 {
			t.Error("the caller's segments were overwritten")
		}
		q.busy = 3
		Must(t, PostWhenFree(q, backend.Read, 4))
		if q.busy != 0 || len(q.posted) != 2 {
			t.Errorf("%d transfers were posted, want 2", len(q.posted))
		}
		q.busy = 1 << 30
		WantCode(t, PostWhenFree(q, backend.Read, 5), backend.Busy)
	})
}

// TestModel moves segments of an end to the other, and leaves the rest alone.
func TestModel(t *testing.T) {
	segments := []backend.Segment{{Local: 4, Remote: 0, Length: 2}, {Local: 0, Remote: 3, Length: 1}}
	for op, want := range map[backend.Op][2]string{backend.Write: {"abcdef", "efCaEF"}, backend.Read: {"DbcdAB", "ABCDEF"}} {
		near, far := []byte("abcdef"), []byte("ABCDEF")
		Model(op, near, far, segments...)
		if got := [2]string{string(near), string(far)}; got != want {
			t.Errorf("a %s makes %q, want %q", op, got, want)
		}
	}
}

// TestEnds opens, describes and connects.
func TestEnds(t *testing.T) {
	a, b := Peer("a", 1), Peer("b", 2)
	if a.Host == "" || a.Host != b.Host {
		t.Errorf("the hosts are %q and %q, want the same", a.Host, b.Host)
	}
	options := Options("colour=green", "colour=a=b")
	from := Open(t, paperFactory, backend.Config{Self: a}, options)
	to := Open(t, paperFactory, backend.Config{Self: b}, nil)
	if got := from.(*paper); got.options != "a=b" || got.self != a || to.(*paper).options != "white" {
		t.Errorf("opened %+v and %+v", got, to)
	}
	e := Connect(t, from, a, b, to).(*line)
	if want := "b@2 answers a@1: a@1 to b@2"; e.answer != want {
		t.Errorf("established by %q, want %q", e.answer, want)
	}
	Bind(t, e, 1, backend.Remote{}, nil)
	m := backend.Memory{Region: 4, Kind: backend.GPUMemory, Rights: backend.RemoteRead, GPU: &backend.GPURange{Device: "0000:01:00.0", Size: 77}, Bytes: make([]byte, 4)}
	want := backend.Remote{
		Peer: a, Region: 4, Kind: backend.GPUMemory, Rights: backend.RemoteRead, Size: 77, Place: "0000:01:00.0",
		Key: []byte("a=b 4 77, fd true, 00000000"),
	}
	if got := Register(t, from, a, m); !reflect.DeepEqual(got, want) {
		t.Errorf("registered %+v (%s), want %+v", got, got.Key, want)
	}
}

func TestSocketDir(t *testing.T) {
	var dir string
	failures(func(t testing.TB) {
		dir = SocketDir(t)
		Must(t, os.WriteFile(filepath.Join(dir, "x"), nil, 0o600))
	})
	if _, err := os.Stat(dir); dir == "" || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%q is left after its test: %v", dir, err)
	}
}

// TestMemfd looks at a region through its file, and at what is left of it.
func TestMemfd(t *testing.T) {
	count := func() int {
		list, err := Mappings()
		Must(t, err)
		return len(list)
	}
	before := count()
	got := failures(func(t testing.TB) {
		m := Memfd(t, 3, 5000, backend.RemoteRead)
		if m.Region != 3 || m.Rights != backend.RemoteRead || m.Kind != backend.HostMemory || len(m.Bytes) != 5000 || m.FDOffset == 0 {
			t.Errorf("got %d bytes of %+v", len(m.Bytes), m.Region)
		}
		Fill(m.Bytes, 1)
		through := make([]byte, 5000)
		_, err := unix.Pread(m.FD, through, m.FDOffset)
		Must(t, err)
		WantSame(t, "what the file has", through, m.Bytes)
		if err := unix.Ftruncate(m.FD, 0); !errors.Is(err, unix.EPERM) {
			t.Errorf("shrinking the file: %v", err)
		}
		if n := count(); n != before+1 {
			t.Errorf("%d mappings, before there were %d", n, before)
		}
	})
	if got != nil {
		t.Errorf("failures: %q", got)
	}
	if n := count(); n != before {
		t.Errorf("%d mappings are left, before there were %d", n, before)
	}
	unsealed, err := NewMemfd(3, 5000, 0, 0)
	Must(t, err)
	Must(t, unix.Ftruncate(unsealed.FD, 0))
	Must(t, FreeMemfd(unsealed))
	wantFailure(t, func(t testing.TB) { Must(t, FreeMemfd(unsealed)) }, "bad file descriptor")
}
