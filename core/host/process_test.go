package host

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/conformance"
	"github.com/umbp/umbp/plugin-sdk/null"
)

// These tests start processes.

// record is a log that can be looked at.
type record struct {
	mu    sync.Mutex
	lines []string
}

func (r *record) log(level, msg string, args []any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, level+" "+msg+" "+fmt.Sprintln(args...))
}

func (r *record) Debug(msg string, args ...any) { r.log("debug", msg, args) }
func (r *record) Info(msg string, args ...any)  { r.log("info", msg, args) }
func (r *record) Warn(msg string, args ...any)  { r.log("warn", msg, args) }
func (r *record) Error(msg string, args ...any) { r.log("error", msg, args) }

func (r *record) count(text string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.lines {
		if strings.Contains(l, text) {
			n++
		}
	}
	return n
}

// eventually waits for what must happen.
func eventually(t *testing.T, what string, happened func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !happened(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never happens: %s", what)
		}
	}
}

// open opens the plugin as Open does.
func (p *program) open(ctx context.Context, config backend.Config, keysChanged func(backend.RegionID, []byte)) (*Process, error) {
	p.t.Helper()
	config.Self = self
	backends, err := Open(ctx, config, []Spec{{Process: &p.spec, KeysChanged: keysChanged}})
	if err != nil {
		return nil, err
	}
	if backends[0].Err != nil {
		return nil, backends[0].Err
	}
	p.t.Cleanup(func() {
		if err := Close(backends); err != nil {
			p.t.Errorf("Close: %v", err)
		}
	})
	return backends[0].Process, nil
}

func (p *program) mustOpen(config backend.Config) *Process {
	p.t.Helper()
	process, err := p.open(p.t.Context(), config, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	return process
}

// send sends a signal to the process that serves.
func send(t *testing.T, p *Process, s unix.Signal) {
	t.Helper()
	state := p.State()
	if state.PID == 0 { // which would be this process and its group
		t.Fatalf("no process serves: %+v", state)
	}
	if err := unix.Kill(state.PID, s); err != nil {
		t.Fatal(err)
	}
}

// alive tells whether a process exists that has not ended. A zombie of this process's counts as alive.
func alive(pid int) bool { return unix.Kill(pid, 0) == nil }

// members counts the processes of a group that have not ended.
func members(t *testing.T, group int) (n int) {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has just ended
		}
		_, rest, _ := strings.Cut(string(text), ") ") // state, parent, group
		if words := strings.Fields(rest); words[0] != "Z" && words[2] == strconv.Itoa(group) {
			n++
		}
	}
	return n
}

// successor waits until another process serves.
func successor(t *testing.T, p *Process, restarts int) State {
	t.Helper()
	eventually(t, fmt.Sprintf("restart %d", restarts), func() bool {
		s := p.State()
		return s.Phase == Running && s.Restarts >= restarts
	})
	return p.State()
}

// link is a session with memory at one end and nobody at the other.
type link struct {
	backend.Session
	endpoint  backend.Endpoint
	completed chan backend.Completion
}

func (s *link) Complete(c backend.Completion) {
	c.Outcomes = append([]backend.Outcome(nil), c.Outcomes...)
	s.completed <- c
}

const pageSize = 4096

func lend(t testing.TB, p backend.Backend, id backend.RegionID) {
	t.Helper()
	memory, err := conformance.SealedMemory(pageSize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { memory.Free() })
	if _, err := p.Register(t.Context(), backend.Memory{Region: id, Kind: backend.HostMemory, Bytes: memory.Bytes, FD: memory.FD}); err != nil {
		t.Fatal(err)
	}
}

func connect(ctx context.Context, p backend.Backend, local backend.RegionID) (*link, error) {
	peer := backend.Peer{Node: "peer", Incarnation: 1}
	h, err := p.Offer(ctx, peer)
	if err != nil {
		return nil, err
	}
	e, err := h.Establish(ctx, h.Offer()) // null's answers are what its offers are
	if err != nil {
		return nil, err
	}
	s := &link{endpoint: e, completed: make(chan backend.Completion, 1024)}
	remote := backend.Remote{Peer: peer, Region: 1, Kind: backend.HostMemory, Rights: backend.RemoteRead | backend.RemoteWrite, Size: pageSize}
	if s.Session, err = e.Session(ctx, local, remote, s); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	return s, nil
}

func (s *link) post(cookie uint64) error {
	return s.Post(backend.Transfer{Op: backend.Write, Cookie: cookie, Segments: []backend.Segment{{Length: pageSize}}})
}

// TestServes opens a plugin, uses it, and closes it.
func TestServes(t *testing.T) {
	for name, stream := range map[string]bool{"queues": false, "stream": true} {
		t.Run(name, func(t *testing.T) {
			prog := newProgram(t)
			prog.spec.Stream = stream
			p := prog.mustOpen(backend.Config{})
			s := p.State()
			if s.Phase != Running || s.PID == 0 || s.PID == os.Getpid() || s.Restarts != 0 || s.Version != p.Info().Version {
				t.Errorf("the state is %+v", s)
			}
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", s.PID)); err != nil || exe != os.Args[0] {
				t.Errorf("the process runs %q, %v", exe, err)
			}
			lend(t, p, 1)
			l, err := connect(t.Context(), p, 1)
			if err != nil {
				t.Fatal(err)
			}
			if err := l.post(7); err != nil {
				t.Fatal(err)
			}
			if c := <-l.completed; c.Cookie != 7 || c.Err != nil {
				t.Errorf("it completes with %+v", c)
			}
			dir := p.sockets.path
			if err := p.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
			if alive(s.PID) {
				t.Error("the process has not been reaped")
			}
			if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is left behind", dir)
			}
		})
	}
}

// TestCounters: what a plugin counts arrives, through all that stands before it, from each process anew.
func TestCounters(t *testing.T) {
	prog := newProgram(t)
	prog.mood("fault post:off")
	backends, err := Open(t.Context(), backend.Config{Self: self}, []Spec{{Process: &prog.spec}})
	if err != nil {
		t.Fatal(err)
	}
	defer Close(backends)
	b := &backends[0]
	want := []backend.Count{{Name: "moods", Value: uint64(len("fault post:off"))}, {Name: "none"}}
	if got := b.Counters(); !slices.Equal(got, want) {
		t.Errorf("the counters are %v, want %v", got, want)
	}
	prog.mood("good")
	if err := b.Process.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	want[0].Value = uint64(len("good"))
	if got := b.Counters(); !slices.Equal(got, want) {
		t.Errorf("after a restart the counters are %v, want %v", got, want)
	}
	if err := Close(backends); err != nil {
		t.Fatal(err)
	}
	if got := b.Counters(); got != nil {
		t.Errorf("of a backend that is closed the counters are %v", got)
	}
}

// TestExamine: a plugin examines the machine without being opened, or it is said why it cannot.
func TestExamine(t *testing.T) {
	for name, c := range map[string]struct {
		mood, path string
		options    map[string]string
		want       string // in the one finding; empty for none
		state      backend.FindingState
	}{
		"in order":       {mood: "rather good", want: "rather good", state: backend.Warning},
		"no examining":   {mood: "describes no examining"},
		"a crash":        {mood: "examines a crash", want: "panic: the library is broken", state: backend.Problem},
		"nonsense":       {mood: "examines nonsense", want: "makes no sense", state: backend.Problem},
		"no plugin":      {mood: "good", path: "/nowhere/umbp-plugin", want: "/nowhere/umbp-plugin", state: backend.Problem},
		"a wrong option": {mood: "good", options: map[string]string{"colour": "red"}, want: "colour", state: backend.Problem},
	} {
		t.Run(name, func(t *testing.T) {
			prog := newProgram(t)
			prog.mood(c.mood)
			if c.path != "" {
				prog.spec.Path = c.path
			}
			findings := Examine(t.Context(), Spec{Process: &prog.spec, Options: c.options})
			if c.want == "" {
				if len(findings) != 0 {
					t.Errorf("it finds %+v", findings)
				}
				return
			}
			if len(findings) != 1 || findings[0].State != c.state || !strings.Contains(findings[0].Text, c.want) || findings[0].Remedy == "" {
				t.Errorf("it finds %+v, want one %s that says %q", findings, c.state, c.want)
			}
		})
	}
}

// TestExamineLinked: a backend that is linked in is asked directly.
func TestExamineLinked(t *testing.T) {
	f := null.Factory
	if findings := Examine(t.Context(), Spec{Factory: f}); findings != nil {
		t.Errorf("a backend that examines nothing finds %+v", findings)
	}
	want := []backend.Finding{{Subject: "something", Text: "is there"}}
	f.Examine = func(context.Context, backend.Values) []backend.Finding { return want }
	if findings := Examine(t.Context(), Spec{Factory: f}); !slices.Equal(findings, want) {
		t.Errorf("it finds %+v, want %+v", findings, want)
	}
}

// TestEnvironment: a plugin gets the variables that it is to get, and nothing else of the host's.
func TestEnvironment(t *testing.T) {
	t.Setenv("UMBP_SECRET", "xyzzy")
	t.Setenv("LANG", "C.UTF-8")
	p := newProgram(t).mustOpen(backend.Config{})
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.State().PID))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(env, []byte("xyzzy")) {
		t.Error("the plugin sees all of the host's environment")
	}
	for _, want := range []string{"LANG=C.UTF-8", "PATH=" + os.Getenv("PATH"), envProgram + "=plugin"} {
		if !bytes.Contains(env, []byte(want+"\x00")) {
			t.Errorf("the plugin does not see %s", want)
		}
	}
}

// TestUnavailable: a plugin that cannot be started is like a device that is not there; the reason is exact.
func TestUnavailable(t *testing.T) {
	short := func(p *program) { p.spec.Timing.Start = 300 * time.Millisecond }
	for name, c := range map[string]struct {
		mood  string
		spoil func(p *program)
		stuck bool // the time is over as soon as the process gets no further
		want  []string
	}{
		"missing":               {spoil: func(p *program) { p.spec.Path = "/nowhere/umbp-plugin" }, want: []string{"/nowhere/umbp-plugin", "no such file"}},
		"not executable":        {spoil: func(p *program) { p.spec.Path = "/etc/passwd" }, want: []string{"/etc/passwd", "permission denied"}},
		"a text":                {spoil: func(p *program) { p.spec.Path = script(p.t, "x") }, want: []string{"exec format error"}},
		"another program":       {spoil: func(p *program) { p.spec.Path = "/bin/true" }, want: []string{"/bin/true", "makes no sense: is it a plugin of UMBP?"}},
		"a program that fails":  {spoil: func(p *program) { p.spec.Path = "/bin/false" }, want: []string{"/bin/false", "exit status 1"}},
		"checksum":              {spoil: func(p *program) { p.spec.SHA256 = strings.Repeat("ab", 32) }, want: []string{"SHA-256", strings.Repeat("ab", 32), checksum(t, os.Args[0])}},
		"no description":        {mood: "describes nothing", want: []string{"makes no sense"}},
		"nonsense":              {mood: "describes nonsense", want: []string{"makes no sense"}},
		"endless description":   {mood: "describes without end", want: []string{"it prints too much"}},
		"no end of describing":  {mood: "describes for ever", spoil: short, want: []string{"was killed", "deadline exceeded"}},
		"crash when describing": {mood: "describes a crash", want: []string{"exit status 4", "no library"}},
		"described version":     {mood: "describes another version", want: []string{"[98 99]", "[1]", "install a version"}},
		"another backend":       {mood: "describes another backend", want: []string{"is the plugin of backend other, not of null"}},
		"crash":                 {mood: "exit", want: []string{"exit status 3", "there is no device"}},
		"panic":                 {mood: "panic", want: []string{"exit status 2", "panic: nothing works"}},
		"garbage":               {mood: "garbage", want: []string{"Segmentation fault (not really)"}},
		"much garbage":          {mood: "much garbage", want: []string{"xxxxxxxx"}},
		"silence":               {mood: "silent", stuck: true, want: []string{"was killed", "context canceled"}},
		"hang":                  {mood: "hangs", stuck: true, want: []string{"was killed", "context canceled"}},
		"version":               {mood: "version", want: []string{"99", "[1]"}},
		"no device":             {mood: "no device", want: []string{"there is no device"}},
	} {
		t.Run(name, func(t *testing.T) {
			prog := newProgram(t)
			if c.mood != "" {
				prog.mood(c.mood)
			}
			if c.spoil != nil {
				c.spoil(prog)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if c.stuck {
				go func() {
					for prog.hasMood() && ctx.Err() == nil {
						time.Sleep(time.Millisecond)
					}
					cancel()
				}()
			}
			_, err := prog.open(ctx, backend.Config{}, nil)
			if backend.CodeOf(err) != backend.Unsupported {
				t.Fatalf("open returns %v", err)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the reason does not say %q:\n%v", want, err)
				}
			}
			if len(err.Error()) > 2*outputShown {
				t.Errorf("the reason has %d bytes", len(err.Error()))
			}
		})
	}
}

func script(t *testing.T, text string) string {
	path := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func checksum(t *testing.T, path string) string {
	t.Helper()
	out, err := exec.Command("sha256sum", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out[:64])
}

// TestOpenErrors: what is wrong with the configuration, or with the backend itself, is an error as it is for a backend
// that is linked in.
func TestOpenErrors(t *testing.T) {
	prog := newProgram(t)
	_, err := Open(t.Context(), backend.Config{Self: self}, []Spec{{Process: &prog.spec, Options: map[string]string{"speed": "9"}}})
	if backend.CodeOf(err) != backend.BadRequest || !strings.Contains(err.Error(), "open backend null: check options: bad request: speed: unknown option") {
		t.Errorf("Open returns %v", err)
	}
	prog.mood("busy port")
	if _, err = prog.open(t.Context(), backend.Config{}, nil); backend.CodeOf(err) != backend.Internal || !strings.Contains(err.Error(), "the port is taken") {
		t.Errorf("Open returns %v", err)
	}
}

// TestChecksum: the right one is accepted at each start, in either case of letters.
func TestChecksum(t *testing.T) {
	prog := newProgram(t)
	prog.spec.SHA256 = strings.ToUpper(checksum(t, os.Args[0]))
	p := prog.mustOpen(backend.Config{})
	for range 2 {
		if err := p.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDeaths kills the process in mid-transfer, in one way after another. What was in flight ends when the process is
// gone, and another one serves.
func TestDeaths(t *testing.T) {
	signal := func(s unix.Signal) func(*testing.T, *Process) {
		return func(t *testing.T, p *Process) { send(t, p, s) }
	}
	tell := func(what string) func(*testing.T, *Process) {
		return func(t *testing.T, p *Process) {
			h, err := p.Offer(t.Context(), backend.Peer{Node: what, Incarnation: 1})
			if err == nil {
				h.Abandon()
			}
		}
	}
	for name, c := range map[string]struct {
		kill func(t *testing.T, p *Process)
		want []string
	}{
		"SIGKILL":         {signal(unix.SIGKILL), []string{"signal: killed"}},
		"SIGTERM":         {signal(unix.SIGTERM), []string{"signal: terminated"}},
		"SIGSTOP":         {signal(unix.SIGSTOP), []string{"was killed", "no sign of life within 5s"}},
		"exit":            {tell("exit"), []string{"exit status 5", "the device is gone"}},
		"panic":           {tell("panic"), []string{"exit status 2", "panic: the device is lost"}},
		"SIGABRT":         {tell("abort"), []string{"SIGABRT"}},
		"rubbish":         {tell("scribble"), []string{"was killed", "corrupt"}},
		"with a grandson": {func(t *testing.T, p *Process) { tell("fork")(t, p); signal(unix.SIGKILL)(t, p) }, []string{"signal: killed"}},
	} {
		t.Run(name, func(t *testing.T) {
			prog := newProgram(t)
			if name == "SIGSTOP" {
				prog.spec.Timing.PingTimeout = 0 // the default: it must be too long for a machine that is only slow
			}
			prog.mood("fault complete:drop")
			p := prog.mustOpen(backend.Config{})
			lend(t, p, 1)
			l, err := connect(t.Context(), p, 1)
			if err != nil {
				t.Fatal(err)
			}
			const posted = 16
			for cookie := range uint64(posted) {
				if err := l.post(cookie); err != nil {
					t.Fatal(err)
				}
			}
			pid := p.State().PID
			if members(t, pid) != 1 {
				t.Fatal("the process is not in a group of its own")
			}
			c.kill(t, p)

			seen := make(map[uint64]bool)
			for range posted {
				done := <-l.completed
				if alive(pid) {
					t.Fatal("a transfer completes while the process may be alive")
				}
				if seen[done.Cookie] = true; backend.CodeOf(done.Err) != backend.PathDown {
					t.Fatalf("a transfer completes with %+v", done)
				}
				for _, o := range done.Outcomes {
					if o != backend.NotSent && o != backend.InDoubt {
						t.Errorf("a segment is %s", o)
					}
				}
			}
			if len(seen) != posted {
				t.Errorf("%d transfers completed, of %d", len(seen), posted)
			}
			<-l.endpoint.Done()
			err = l.post(99)
			if backend.CodeOf(err) != backend.PathDown {
				t.Errorf("Post on the endpoint of a dead process returns %v", err)
			}
			if s := successor(t, p, 1); s.PID == pid {
				t.Errorf("the state is %+v", s)
			}
			for _, want := range c.want {
				if reason := p.State().Reason; !strings.Contains(reason, want) {
					t.Errorf("the reason does not say %q:\n%s", want, reason)
				}
			}
			eventually(t, "the whole group is gone", func() bool { return members(t, pid) == 0 })
			if l.Close(); l.endpoint.Close() != nil {
				t.Error("the endpoint of a dead process does not close")
			}
			if _, err := connect(t.Context(), p, 1); err != nil {
				t.Errorf("the new process: %v", err)
			}
		})
	}
}

// TestCrashLoop: after five deaths in a row there is no sixth process, until somebody asks for it.
func TestCrashLoop(t *testing.T) {
	prog := newProgram(t)
	prog.spec.Timing.Young = time.Hour
	p := prog.mustOpen(backend.Config{})
	lend(t, p, 1)
	prog.mood("exit")
	send(t, p, unix.SIGKILL)
	eventually(t, "it is down", func() bool { return p.State().Phase == Down })
	if s := p.State(); s.PID != 0 || s.Restarts != 0 || !strings.Contains(s.Reason, "there is no device") {
		t.Errorf("the state is %+v", s)
	}
	if err := p.Restart(t.Context()); err == nil || !strings.Contains(err.Error(), "there is no device") {
		t.Errorf("Restart returns %v", err)
	}
	eventually(t, "it is down again", func() bool { return p.State().Phase == Down })
	prog.mood("good")
	if err := p.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := connect(t.Context(), p, 1); err != nil {
		t.Errorf("the region is not there: %v", err)
	}
}

// TestKeysChange: this plugin draws its keys.
func TestKeysChange(t *testing.T) {
	var mu sync.Mutex
	keys := make(map[backend.RegionID][]byte)
	p, err := newProgram(t).open(t.Context(), backend.Config{}, func(id backend.RegionID, key []byte) {
		mu.Lock()
		defer mu.Unlock()
		keys[id] = key
	})
	if err != nil {
		t.Fatal(err)
	}
	lend(t, p, 1)
	lend(t, p, 2)
	if err := p.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(keys) != 2 || len(keys[1]) != 16 || bytes.Equal(keys[1], keys[2]) {
		t.Errorf("the new keys are %x", keys)
	}
}

// TestExchanged: the plugin's file is exchanged for one with other capabilities.
func TestExchanged(t *testing.T) {
	prog := newProgram(t)
	p := prog.mustOpen(backend.Config{})
	prog.mood("fewer")
	if err := p.Restart(t.Context()); err == nil || !strings.Contains(err.Error(), "restart umbp to use it") {
		t.Errorf("Restart returns %v", err)
	}
	eventually(t, "it is down", func() bool { return p.State().Phase == Down })
	prog.mood("good")
	if err := p.Restart(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestRestartUnderLoad restarts the process again and again. A caller that is patient, that is who posts again after
// Busy, and who connects anew when an endpoint is down, sees no transfer fail.
func TestRestartUnderLoad(t *testing.T) {
	prog := newProgram(t)
	prog.mood("fault complete:delay(1ms)")
	p := prog.mustOpen(backend.Config{})
	const callers, restarts = 4, 5
	for id := range backend.RegionID(callers) {
		lend(t, p, id+1)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var moved atomic.Int64
	var calling sync.WaitGroup
	for id := range backend.RegionID(callers) {
		calling.Go(func() {
			for ctx.Err() == nil {
				if err := patient(ctx, p, id+1, &moved); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for n := range restarts {
		before := moved.Load()
		eventually(t, "transfers go on", func() bool { return moved.Load() > before+100 || t.Failed() })
		if err := p.Restart(t.Context()); err != nil {
			t.Errorf("restart %d: %v", n, err)
		}
	}
	cancel()
	calling.Wait()
	if s := p.State(); s.Restarts != restarts {
		t.Errorf("the state is %+v", s)
	}
}

// patient posts on one connection for as long as it lasts.
func patient(ctx context.Context, p *Process, local backend.RegionID, moved *atomic.Int64) error {
	l, err := connect(context.WithoutCancel(ctx), p, local)
	if backend.CodeOf(err) == backend.PathDown {
		return nil // the process was ended between the calls that make a connection
	}
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer l.endpoint.Close()
	inFlight := 0
	for cookie := uint64(0); ; cookie++ {
		err := l.post(cookie)
		for err == nil && inFlight < 8 {
			inFlight++
			cookie++
			err = l.post(cookie)
		}
		if err == nil {
			inFlight++
		}
		for ; inFlight > 0; inFlight-- {
			if c := <-l.completed; c.Err != nil {
				return fmt.Errorf("a transfer failed: %w", c.Err)
			}
			moved.Add(1)
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
		case errors.Is(err, backend.ErrBusy):
			time.Sleep(backend.DefaultRetryAfter)
		default:
			<-l.endpoint.Done() // a refusal on an endpoint that is up would be a failure
			return nil
		}
	}
}

// TestLog: what a plugin logs and prints arrives, with its level and fields.
func TestLog(t *testing.T) {
	log := &record{}
	p := newProgram(t).mustOpen(backend.Config{Log: log})
	if _, err := p.Offer(t.Context(), backend.Peer{Node: "speak", Incarnation: 1}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"warn a field temperature 451 plugin null\n", "debug printed plugin null\n", "debug printed as a fault plugin null\n"} {
		eventually(t, want+" is logged", func() bool { return log.count(want) > 0 })
	}
	if log.count("error") != 0 {
		t.Errorf("errors are logged: %q", log.lines)
	}
}

// TestFloodOfLog: the plugin is not held up, the host's log is not filled.
func TestFloodOfLog(t *testing.T) {
	log := &record{}
	p := newProgram(t).mustOpen(backend.Config{Log: log})
	if _, err := p.Offer(t.Context(), backend.Peer{Node: "flood", Incarnation: 1}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the flood is counted", func() bool { return log.count("were left out") > 0 })
	if n := log.count("info again"); n == 0 || n > 20_000 {
		t.Errorf("%d lines of 200000 are logged", n)
	}
}

// TestLogLevel: a plugin does not write what the host would not log.
func TestLogLevel(t *testing.T) {
	if got := levelOf(hclog.New(&hclog.LoggerOptions{Level: hclog.Warn})); got != "warn" {
		t.Errorf("under a log of warnings the level is %q", got)
	}
	if got := levelOf(&record{}); got != "debug" {
		t.Errorf("under a log that does not tell the level is %q", got)
	}
}

// ownTemp gives the test a folder for temporary files that no other host takes stale folders away from. Its path is short
// enough for sockets.
func ownTemp(t *testing.T) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "umbp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("TMPDIR", dir)
}

// TestSocketDir: a folder whose owner lives is left alone, one whose owner is dead is not.
func TestSocketDir(t *testing.T) {
	ownTemp(t)
	first, err := newSocketDir()
	if err != nil {
		t.Fatal(err)
	}
	stale := first.path + "0"
	if err := os.Mkdir(stale, 0o700); err != nil {
		t.Fatal(err)
	}
	second, err := newSocketDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", filepath.Join("/tmp", strings.Repeat("x", longestTemp))) // too long for a socket's address
	third, err := newSocketDir()
	if err != nil {
		t.Fatal(err)
	}
	if filepath.Dir(third.path) != "/tmp" {
		t.Errorf("with a long path to temporary files, the folder is %s", third.path)
	}
	if _, err := os.Stat(stale); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a stale folder is left: %v", err)
	}
	if info, err := os.Stat(first.path); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder of a live owner: %v, %v", info, err)
	}
	for _, d := range []*socketDir{first, second, third} {
		d.close()
		if _, err := os.Stat(d.path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a folder is left: %v", err)
		}
	}
}

// TestHostIsKilled: nothing is left of a host that is killed; the next one takes away its folder.
func TestHostIsKilled(t *testing.T) {
	ownTemp(t)
	prog := newProgram(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envProgram+"=host")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	words := strings.Fields(line)
	if err != nil || len(words) != 2 {
		t.Fatalf("the host says %q, %v", line, err)
	}
	pid, err := strconv.Atoi(words[0])
	if err != nil || !alive(pid) {
		t.Fatalf("the plugin is process %q, %v", words[0], err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	// It is a child of somebody else's now, who may take his time to reap it.
	eventually(t, "the plugin ends", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(stat), ") Z ")
	})
	prog.mustOpen(backend.Config{})
	if _, err := os.Stat(words[1]); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left behind", words[1])
	}
}

// usage is what this process holds of the system.
type usage struct{ files, mappings, goroutines, threads, children int }

func measure(t *testing.T) usage {
	t.Helper()
	count := func(path string) int {
		entries, err := os.ReadDir(path)
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	children := 0
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		text, err := os.ReadFile(task)
		if err == nil {
			children += len(strings.Fields(string(text)))
		}
	}
	return usage{
		files: count("/proc/self/fd"), mappings: bytes.Count(maps, []byte("memfd:")),
		goroutines: runtime.NumGoroutine(), threads: count("/proc/self/task"), children: children,
	}
}

// TestThousandRestarts looks for what is left of each process: descriptors, mappings, goroutines, zombies, threads.
func TestThousandRestarts(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes half a minute")
	}
	prog := newProgram(t)
	prog.spec.Path = filepath.Join(build(t, "plugin-sdk/null/umbp-plugin-null"), "umbp-plugin-null")
	prog.spec.Timing.FirstPause = time.Nanosecond
	prog.spec.Timing.LongPause = time.Nanosecond
	p := prog.mustOpen(backend.Config{})
	lend(t, p, 1)
	rng := rand.New(rand.NewPCG(1, 2))
	restart := func(n int) {
		l, err := connect(t.Context(), p, 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.post(1); err != nil {
			t.Fatal(err)
		}
		<-l.completed
		if rng.IntN(2) == 0 {
			send(t, p, unix.SIGKILL)
		} else if err := p.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		successor(t, p, n)
		l.endpoint.Close()
	}
	const warm, all = 20, 1000
	for n := range warm {
		restart(n + 1)
	}
	var before usage
	eventually(t, "what was needed to start is gone", func() bool {
		last := before
		before = measure(t)
		time.Sleep(10 * time.Millisecond)
		return before == last
	})
	for n := warm; n < all; n++ {
		restart(n + 1)
	}
	var after usage
	// The numbers of threads and goroutines are in part the runtime's and the moment's affair, as long as they do not grow
	// with the number of processes.
	const some = (all - warm) / 20
	eventually(t, fmt.Sprintf("%+v is as it was, %+v", &after, before), func() bool {
		after = measure(t)
		return after.files <= before.files && after.mappings <= before.mappings && after.goroutines <= before.goroutines+some &&
			after.children <= before.children && after.threads <= before.threads+some
	})
	t.Logf("before: %+v, after: %+v", before, after)
}

// BenchmarkRoundTrip is the price of the process edge for one transfer at a time: the null backend moves nothing.
func BenchmarkRoundTrip(b *testing.B) {
	spec := ProcessSpec{Name: null.Name, Path: filepath.Join(build(b, "plugin-sdk/null/umbp-plugin-null"), "umbp-plugin-null")}
	stream := spec
	stream.Stream = true
	for _, c := range []struct {
		name string
		spec Spec
	}{{"linked", Spec{Factory: null.Factory}}, {"process", Spec{Process: &spec}}, {"stream", Spec{Process: &stream}}} {
		b.Run(c.name, func(b *testing.B) {
			backends, err := Open(b.Context(), backend.Config{Self: self}, []Spec{c.spec})
			if err != nil {
				b.Fatal(err)
			}
			defer Close(backends)
			lend(b, backends[0].Backend, 1)
			l, err := connect(b.Context(), backends[0].Backend, 1)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if err := l.post(1); err != nil {
					b.Fatal(err)
				}
				<-l.completed
			}
		})
	}
}

// BenchmarkRestart is how long a planned restart takes.
func BenchmarkRestart(b *testing.B) {
	spec := ProcessSpec{Name: null.Name, Path: filepath.Join(build(b, "plugin-sdk/null/umbp-plugin-null"), "umbp-plugin-null")}
	backends, err := Open(b.Context(), backend.Config{Self: self}, []Spec{{Process: &spec}})
	if err != nil {
		b.Fatal(err)
	}
	defer Close(backends)
	for b.Loop() {
		if err := backends[0].Process.Restart(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
