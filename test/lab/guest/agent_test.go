package guest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// agentPort is where the agent of guest 1 listens.
const agentPort = 9077

// patience bounds most programs: in an emulated machine they take their time.
const patience = 2 * time.Minute

// TestAgent is guest 1 of two: it does what guest 2 asks for until that says that it is done.
func TestAgent(t *testing.T) {
	inRole(t, "1")
	a := newAgent()
	defer a.close()
	server := rpc.NewServer()
	if err := server.RegisterName("Agent", a); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", address(1, agentPort))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go server.ServeConn(conn)
		}
	}()
	<-a.done
}

// agent starts programs and remembers them.
type agent struct {
	done chan struct{}

	mu      sync.Mutex
	running map[string]*running
}

// running is a program that was started.
type running struct {
	cmd   *exec.Cmd
	log   *logged
	ended chan struct{} // closed when it has ended
}

func newAgent() *agent { return &agent{done: make(chan struct{}), running: map[string]*running{}} }

// close kills what still runs.
func (a *agent) close() {
	a.mu.Lock()
	names := make([]string, 0, len(a.running))
	for name := range a.running {
		names = append(names, name)
	}
	a.mu.Unlock()
	for _, name := range names {
		a.Stop(Ending{name, true}, &struct{}{})
	}
}

// Start starts a program and waits until its log has "ready: ".
func (a *agent) Start(p Program, _ *struct{}) error {
	if err := write(p.Files); err != nil {
		return err
	}
	r := &running{cmd: exec.Command(p.Argv[0], p.Argv[1:]...), log: &logged{}, ended: make(chan struct{})}
	r.cmd.Stderr = r.log
	if err := r.cmd.Start(); err != nil {
		return err
	}
	go func() {
		r.cmd.Wait()
		close(r.ended)
	}()
	a.mu.Lock()
	a.running[p.Name] = r
	a.mu.Unlock()
	for end := time.Now().Add(patience); ; {
		switch {
		case strings.Contains(r.log.String(), "ready: "):
			return nil
		case time.Now().After(end):
			return errors.Join(fmt.Errorf("not ready in time:\n%s", r.log), a.Stop(Ending{p.Name, true}, nil))
		}
		select {
		case <-r.ended:
			return fmt.Errorf("it ends:\n%s", r.log)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Stop ends a program.
func (a *agent) Stop(e Ending, _ *struct{}) error {
	a.mu.Lock()
	r := a.running[e.Name]
	delete(a.running, e.Name)
	a.mu.Unlock()
	if r == nil {
		return fmt.Errorf("there is no %s", e.Name)
	}
	signal := syscall.SIGTERM
	if e.Kill {
		signal = syscall.SIGKILL
	}
	r.cmd.Process.Signal(signal)
	select {
	case <-r.ended:
		return nil
	case <-time.After(patience):
		r.cmd.Process.Kill()
		<-r.ended
		return fmt.Errorf("%s does not stop:\n%s", e.Name, r.log)
	}
}

// Log returns what a program that was started has logged so far.
func (a *agent) Log(name string, log *string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r := a.running[name]; r != nil {
		*log = r.log.String()
	}
	return nil
}

// Run runs a program to its end.
func (a *agent) Run(p Program, out *Outcome) error {
	if err := write(p.Files); err != nil {
		return err
	}
	limit := cmp.Or(p.Limit, patience)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, p.Argv[0], p.Argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(p.Stdin), &stdout, &stderr
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		return err
	}
	if ctx.Err() != nil {
		return fmt.Errorf("not done within %v; so far:\n%s%s", limit, &stdout, &stderr)
	}
	*out = Outcome{cmd.ProcessState.ExitCode(), stdout.Bytes(), stderr.Bytes()}
	return nil
}

// Done ends TestAgent.
func (a *agent) Done(struct{}, *struct{}) error {
	close(a.done)
	return nil
}

func write(files map[string][]byte) error {
	for name, text := range files {
		if err := os.WriteFile(name, text, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// logged is a buffer that is written and read at the same time.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// remote is the agent of guest 1, seen from guest 2.
type remote struct{ *rpc.Client }

// dial finds the agent, which may come up later.
func dial(t *testing.T) remote {
	t.Helper()
	var c *rpc.Client
	eventually(t, "the agent of guest 1", func() (ok bool) {
		var err error
		c, err = rpc.Dial("tcp", address(1, agentPort))
		return err == nil
	})
	return remote{c}
}

func (r remote) Start(p Program, none *struct{}) error  { return r.Call("Agent.Start", p, none) }
func (r remote) Stop(e Ending, none *struct{}) error    { return r.Call("Agent.Stop", e, none) }
func (r remote) Run(p Program, out *Outcome) error      { return r.Call("Agent.Run", p, out) }
func (r remote) Log(name string, log *string) error     { return r.Call("Agent.Log", name, log) }
func (r remote) Done(in struct{}, none *struct{}) error { return r.Call("Agent.Done", in, none) }
