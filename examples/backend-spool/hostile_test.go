package spool_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	spool "github.com/umbp/umbp/examples/backend-spool"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

var (
	initiatorPeer = backend.Peer{Node: "initiator", Incarnation: 1, Host: "a"}
	targetPeer    = backend.Peer{Node: "target", Incarnation: 2, Host: "b"}
	ctx           = context.Background()
)

func openSpool(t *testing.T, dir string, self backend.Peer) backend.Backend {
	t.Helper()
	options, err := backend.CheckOptions(spool.Factory.Options, map[string]string{"dir": dir})
	if err != nil {
		t.Fatal(err)
	}
	b, err := spool.Factory.Open(ctx, backend.Config{Self: self, Options: options})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func lend(t *testing.T, b backend.Backend, rights backend.Rights) []byte {
	t.Helper()
	memory := bytes.Repeat([]byte("umbp"), 1024)
	if _, err := b.Register(ctx, backend.Memory{Region: 1, Kind: backend.HostMemory, Rights: rights, Bytes: memory, FD: -1}); err != nil {
		t.Fatal(err)
	}
	return memory
}

// until waits for what must come. Where the patience of a backend counts, a test has a clock of its own, by synctest: what
// is done takes no time, and nobody waits for what does not come.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never came: " + what)
		}
	}
}

// stranger is the far end of a connection, played by the test: it knows the secret and the files, and keeps no rule.
type stranger struct {
	t       *testing.T
	dir     string
	mailbox string
	lock    *os.File
	secret  []byte
	theirs  string // mailbox of the backend that is tried
	conn    string
}

func newStranger(t *testing.T, dir string) *stranger {
	t.Helper()
	s := &stranger{t: t, dir: dir, mailbox: strings.Repeat("ab", 16), secret: bytes.Repeat([]byte{7}, 32)}
	for _, d := range []string{"in", "out"} {
		if err := os.MkdirAll(s.path(s.mailbox, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if s.lock, err = os.Create(s.path(s.mailbox, "lock")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.lock.Close() })
	if err := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *stranger) path(parts ...string) string {
	return filepath.Join(append([]string{s.dir}, parts...)...)
}

// put writes a file in one step, as the backend does.
func (s *stranger) put(path, text string) {
	s.t.Helper()
	if err := errors.Join(os.WriteFile(s.path(s.mailbox, "new"), []byte(text), 0o600), os.Rename(s.path(s.mailbox, "new"), path)); err != nil {
		s.t.Error(err)
	}
}

func (s *stranger) message(fields map[string]any, data string) string {
	m := map[string]any{"Secret": s.secret, "Number": 1}
	for k, v := range fields {
		m[k] = v
	}
	head, err := json.Marshal(m)
	if err != nil {
		s.t.Fatal(err)
	}
	return string(head) + "\n" + data
}

// accept lets the backend connect to the stranger, as a target that behaves until then.
func (s *stranger) accept(b backend.Backend) (backend.Endpoint, backend.Session, chan backend.Completion) {
	s.t.Helper()
	h, err := b.Offer(ctx, targetPeer)
	if err != nil {
		s.t.Fatal(err)
	}
	s.theirs, s.conn = hex.EncodeToString(h.Offer()[:16]), hex.EncodeToString(h.Offer()[16:32])
	answer, _ := hex.DecodeString(s.mailbox)
	established := make(chan backend.Endpoint, 1)
	go func() {
		e, err := h.Establish(ctx, append(answer, s.secret...))
		if err != nil {
			s.t.Error(err)
		}
		established <- e
	}()
	s.take("1")
	s.put(s.answer("1"), s.message(nil, ""))
	e := <-established
	if e == nil {
		s.t.FailNow()
	}
	done := make(chan backend.Completion, 1)
	session, err := e.Session(ctx, 1, backend.Remote{
		Peer: targetPeer, Region: 1, Kind: backend.HostMemory, Rights: backend.RemoteRead | backend.RemoteWrite, Size: 4096,
	}, sink(done))
	if err != nil {
		s.t.Fatal(err)
	}
	return e, session, done
}

// take removes a request, as a target does that begins to carry it out.
func (s *stranger) take(number string) {
	s.t.Helper()
	until(s.t, "request "+number, func() bool { return os.Remove(s.path(s.mailbox, "in", s.conn+"."+number)) == nil })
}

func (s *stranger) answer(number string) string { return s.path(s.theirs, "out", s.conn, number) }

type sink chan backend.Completion

func (s sink) Complete(c backend.Completion) { s <- c }

// TestHostileTarget: whatever a target answers, a read ends, and no byte of it comes into the region.
func TestHostileTarget(t *testing.T) {
	for name, c := range map[string]struct {
		answer func(s *stranger)
		code   backend.Code
		fails  bool // the endpoint
	}{
		"too few bytes":      {func(s *stranger) { s.put(s.answer("2"), s.message(nil, "abc")) }, backend.PathDown, true},
		"too many bytes":     {func(s *stranger) { s.put(s.answer("2"), s.message(nil, strings.Repeat("x", 65))) }, backend.PathDown, true},
		"a wrong secret":     {func(s *stranger) { s.secret = s.secret[1:]; s.put(s.answer("2"), s.message(nil, "abc")) }, backend.PathDown, true},
		"no message":         {func(s *stranger) { s.put(s.answer("2"), "\x00\xff") }, backend.PathDown, true},
		"nothing":            {func(s *stranger) {}, backend.PathDown, true},
		"a refusal":          {func(s *stranger) { s.put(s.answer("2"), s.message(map[string]any{"Code": 6}, "")) }, backend.Denied, false},
		"a code of tomorrow": {func(s *stranger) { s.put(s.answer("2"), s.message(map[string]any{"Code": 99}, "")) }, backend.Internal, false},
		"a long text": {func(s *stranger) {
			s.put(s.answer("2"), s.message(map[string]any{"Code": 6, "Text": strings.Repeat("x", 1<<20)}, ""))
		}, backend.Denied, false},
		"busy, after the fact": {func(s *stranger) { s.put(s.answer("2"), s.message(map[string]any{"Code": 2}, "")) }, backend.Internal, false},
		"a directory":          {func(s *stranger) { os.Mkdir(s.answer("2"), 0o700) }, backend.PathDown, true},
		"a pipe":               {func(s *stranger) { syscall.Mkfifo(s.answer("2"), 0o600) }, backend.PathDown, true},
		"a link":               {func(s *stranger) { os.Symlink("/dev/zero", s.answer("2")) }, backend.PathDown, true},
		"its death":            {func(s *stranger) { s.lock.Close() }, backend.PathDown, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := shared(t)
				b, s := openSpool(t, dir, initiatorPeer), newStranger(t, dir)
				memory := lend(t, b, 0)
				before := bytes.Clone(memory)
				e, session, done := s.accept(b)
				if err := session.Post(backend.Transfer{Op: backend.Read, Cookie: 1, Segments: []backend.Segment{{Length: 64}}}); err != nil {
					t.Fatal(err)
				}
				s.take("2")
				c.answer(s)
				completion := <-done
				if backend.CodeOf(completion.Err) != c.code || len(completion.Err.Error()) > 1000 {
					t.Errorf("completed with %v, want the code %q", completion.Err, c.code)
				}
				if !bytes.Equal(memory, before) {
					t.Error("the region has changed")
				}
				if c.fails {
					<-e.Done()
					return
				}
				if err := session.Post(backend.Transfer{Op: backend.Read, Cookie: 2, Segments: []backend.Segment{{Length: 4}}}); err != nil {
					t.Fatal(err)
				}
				s.take("3")
				s.put(s.answer("3"), s.message(nil, "good"))
				if completion := <-done; completion.Err != nil || string(memory[:4]) != "good" {
					t.Errorf("afterwards: %v, %q", completion.Err, memory[:4])
				}
			})
		})
	}
}

// TestCancel: a request that nobody has taken is withdrawn; one that was taken stays in doubt when nobody answers.
func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := shared(t)
		b, s := openSpool(t, dir, initiatorPeer), newStranger(t, dir)
		lend(t, b, 0)
		e, session, done := s.accept(b)
		post := func(cookie uint64) {
			t.Helper()
			if err := session.Post(backend.Transfer{Op: backend.Write, Cookie: cookie, Segments: []backend.Segment{{Length: 64}}}); err != nil {
				t.Fatal(err)
			}
		}
		post(1)
		request := s.path(s.mailbox, "in", s.conn+".2")
		until(t, "the request", func() bool { _, err := os.Stat(request); return err == nil })
		session.Cancel(1)
		if c := <-done; !errors.Is(c.Err, backend.ErrCancelled) || len(c.Outcomes) != 1 || c.Outcomes[0] != backend.NotSent {
			t.Errorf("not taken: %+v", c)
		}
		if _, err := os.Stat(request); err == nil {
			t.Error("the request is still there")
		}
		post(2)
		s.take("3")
		session.Cancel(2)
		if c := <-done; !errors.Is(c.Err, backend.ErrPathDown) || len(c.Outcomes) != 1 || c.Outcomes[0] != backend.InDoubt {
			t.Errorf("taken: %+v", c)
		}
		<-e.Done()
	})
}

// TestHostileInitiator: what is in the mailbox touches no memory that it must not, and does not stay.
func TestHostileInitiator(t *testing.T) {
	dir := shared(t)
	b, s := openSpool(t, dir, targetPeer), newStranger(t, dir)
	memory := lend(t, b, backend.RemoteWrite)
	before := bytes.Clone(memory)

	s.conn = strings.Repeat("cd", 16)
	if err := os.Mkdir(s.path(s.mailbox, "out", s.conn), 0o700); err != nil {
		t.Fatal(err)
	}
	ids, _ := hex.DecodeString(s.mailbox + s.conn)
	answer, err := b.Answer(ctx, initiatorPeer, append(ids, '2'))
	if err != nil {
		t.Fatal(err)
	}
	s.theirs, s.secret = hex.EncodeToString(answer[:16]), answer[16:]
	in := s.path(s.theirs, "in")
	request := func(fields map[string]any, data string) string {
		all := map[string]any{"Op": 1, "Region": 1, "Ranges": []any{map[string]any{"Offset": 0, "Length": 4}}}
		for k, v := range fields {
			all[k] = v
		}
		return s.message(all, data)
	}
	ranges := func(offset, length uint64) map[string]any {
		return map[string]any{"Ranges": []any{map[string]uint64{"Offset": offset, "Length": length}}}
	}
	out := s.path(s.mailbox, "out", s.conn, "1")
	for what, c := range map[string]struct {
		text string
		code string // in the answer; empty for none
	}{
		"no message":              {"rubbish", ""},
		"another secret":          {strings.Replace(request(nil, "evil"), `"Secret":"`, `"Secret":"AAAA`, 1), ""},
		"no region":               {request(map[string]any{"Region": 9}, "evil"), `"Code":5`},
		"no right":                {request(map[string]any{"Op": 2}, ""), `"Code":6`},
		"no operation":            {request(map[string]any{"Op": 3}, "evil"), `"Code":9`},
		"one past the end":        {request(ranges(4093, 4), "evil"), `"Code":5`},
		"an offset that wraps":    {request(ranges(math.MaxUint64-1, 4), "evil"), `"Code":5`},
		"a length that wraps":     {request(ranges(4, math.MaxUint64-1), "evil"), `"Code":5`},
		"fewer bytes than ranges": {request(nil, "evi"), `"Code":5`},
		"more bytes than ranges":  {request(nil, "evil!"), `"Code":5`},
		"an empty range":          {request(ranges(4, 0), ""), `"Code":5`},
	} {
		s.put(filepath.Join(in, s.conn+".x"), c.text)
		until(t, what+" is taken", func() bool { return empty(in) })
		if c.code != "" {
			until(t, what+" is refused", func() bool { _, err := os.Stat(out); return err == nil })
			answer, err := os.ReadFile(out)
			if err := errors.Join(err, os.Remove(out)); err != nil || !bytes.Contains(answer, []byte(c.code)) {
				t.Errorf("%s: the answer is %.200s (%v), want %s", what, answer, err, c.code)
			}
		}
		if !bytes.Equal(memory, before) {
			t.Fatalf("%s: the region has changed", what)
		}
	}
	for _, rubbish := range []string{s.conn, s.conn + ".dir", "..x", strings.Repeat("ef", 16) + ".1"} {
		made := s.path(s.mailbox, "rubbish") // and moved there, since it may be removed at once
		if err := errors.Join(os.MkdirAll(filepath.Join(made, "deep"), 0o700), os.Rename(made, filepath.Join(in, rubbish))); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/dev/zero", filepath.Join(in, s.conn+".link")); err != nil {
		t.Fatal(err)
	}
	until(t, "rubbish is removed", func() bool { return empty(in) })

	s.put(filepath.Join(in, s.conn+".77"), request(map[string]any{"Number": 77}, "good"))
	until(t, "the answer", func() bool {
		text, err := os.ReadFile(s.path(s.mailbox, "out", s.conn, "77"))
		return err == nil && bytes.Contains(text, []byte(`"Number":77`)) && !bytes.Contains(text, []byte("Code"))
	})
	if err := b.Deregister(ctx, 1); err != nil {
		t.Fatal(err)
	}
	if string(memory[:4]) != "good" || !bytes.Equal(memory[4:], before[4:]) {
		t.Error("a good request, after all of these, was not carried out")
	}
}

func empty(dir string) bool {
	entries, err := os.ReadDir(dir)
	return err == nil && len(entries) == 0
}

// TestDeath: an endpoint on which nothing happens notices that its target has died.
func TestDeath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := shared(t)
		b, s := openSpool(t, dir, initiatorPeer), newStranger(t, dir)
		lend(t, b, 0)
		e, session, _ := s.accept(b)
		s.lock.Close()
		<-e.Done()
		if err := session.Post(backend.Transfer{Op: backend.Read, Segments: []backend.Segment{{Length: 4}}}); !errors.Is(err, backend.ErrPathDown) {
			t.Errorf("Post afterwards: %v, want PathDown", err)
		}
	})
}

// TestSweep: what a killed process has left is removed by the next one, and what a living one has is not.
func TestSweep(t *testing.T) {
	dir := shared(t)
	alive := newStranger(t, dir)
	killed := filepath.Join(dir, strings.Repeat("00", 16))
	if err := errors.Join(os.MkdirAll(filepath.Join(killed, "in"), 0o700), os.WriteFile(filepath.Join(killed, "lock"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	b := openSpool(t, dir, targetPeer)
	if _, err := os.Stat(killed); err == nil {
		t.Error("the mailbox of a killed process stays")
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != alive.mailbox {
		t.Errorf("in the directory are %v, %v; want only the mailbox of the process that lives", entries, err)
	}
}

func TestDirectory(t *testing.T) {
	open := shared(t)
	if err := os.Chmod(open, 0o750); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(shared(t), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"", "relative", open, file, filepath.Join(open, "missing")} {
		options, err := backend.CheckOptions(spool.Factory.Options, map[string]string{"dir": dir})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := spool.Factory.Open(ctx, backend.Config{Self: targetPeer, Options: options}); !errors.Is(err, backend.ErrBadRequest) {
			t.Errorf("dir %q: %v, want BadRequest", dir, err)
		}
	}
}
