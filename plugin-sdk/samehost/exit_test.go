package samehost

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// TestUntilExit ends connections in different ways. The process at their other end is this one: it does not end.
func TestUntilExit(t *testing.T) {
	for _, c := range []struct {
		name  string
		end   func(t *testing.T, c *net.UnixConn)
		quiet bool
	}{
		{"left in order", func(t *testing.T, c *net.UnixConn) {
			must(t, send(c, &message{kind: gone}, -1))
		}, true},
		{"left in order, with an answer that was not read", func(t *testing.T, c *net.UnixConn) {
			must(t, send(c, &message{kind: ask, note: []byte("x")}, -1))
			wantReadable(t, c)
			for range 200 { // so that the target is still reading when the socket is closed
				must(t, send(c, &message{kind: leaving}, -1))
			}
			must(t, send(c, &message{kind: gone}, -1))
		}, true},
		{"cut", func(*testing.T, *net.UnixConn) {}, false},
		{"cut, with an answer that was not read", func(t *testing.T, c *net.UnixConn) {
			must(t, send(c, &message{kind: ask, note: []byte("x")}, -1))
			wantReadable(t, c)
		}, false},
		{"cut after it saw the end", func(t *testing.T, c *net.UnixConn) {
			must(t, send(c, &message{kind: leaving}, -1))
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, err := openInstance(peer("b", 2), map[string]string{"socket_dir": socketDir(t)}, func(s *Settings) { s.UntilExit = true })
			must(t, err)
			left := make(chan struct{}, 1)
			guests := make(chan *Guest, 2)
			moverOf(b).serve = func(_ context.Context, g *Guest, _ []byte) ([]byte, error) {
				guests <- g
				return nil, nil
			}
			conn := guestConn(t, b)
			must(t, send(conn, &message{kind: ask}, -1))
			_, _, err = receive(conn, false)
			must(t, err)
			(<-guests).OnLeave(func() { left <- struct{}{} })
			c.end(t, conn)
			must(t, conn.Close())
			if c.quiet {
				must(t, b.Fence(soon(t), peer("a", 1)))
				must(t, b.Close())
			} else {
				wantCode(t, b.Fence(briefly(t), peer("a", 1)), backend.Cancelled)
				wantCode(t, b.Close(), backend.Cancelled)
			}
			if called := len(left) == 1; called != c.quiet {
				t.Errorf("OnLeave was called: %v, want %v", called, c.quiet)
			}
		})
	}
}

// wantReadable waits until there is something to read.
func wantReadable(t testing.TB, c *net.UnixConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	must(t, err)
	must(t, raw.Read(hasEnded)) // it looks for what can be read, whatever the descriptor
}

// TestUntilExitOfChild has a child go: in order, while it lives on, and killed.
func TestUntilExitOfChild(t *testing.T) {
	b := newUntilExit(t, peer("b", 2))
	far := memory(t, 5, mib, all)
	remote := register(t, b, far)
	a := startChild(t, peer("a", 1))
	a.Register(t, regionArgs{ID: 1, Size: mib})
	a.ConnectTo(t, b.self, b)
	must(t, a.Call("Session", SessionArgs{Local: 1, Remote: remote}, nil))
	must(t, b.Fence(soon(t), a.Self)) // the child lets go, and lives

	a.ConnectTo(t, b.self, b)
	must(t, a.Call("Hammer", SessionArgs{Local: 1, Remote: remote}, nil))
	a.Stop(t)
	wantCode(t, b.Fence(briefly(t), a.Self), backend.Cancelled)
	must(t, a.Kill())
	must(t, b.Fence(soon(t), a.Self))
	var info unix.Siginfo
	must(t, unix.Waitid(unix.P_PID, a.Pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil))
	if info.Signo != int32(unix.SIGCHLD) {
		t.Error("the fence returned before the process had ended")
	}
	wantUntouched(t, far.Bytes)
}

// TestCutByLivingChild has a child close its socket without a word and live on, as when a device has not stopped yet: the
// fence waits for the end of the process.
func TestCutByLivingChild(t *testing.T) {
	b := newUntilExit(t, peer("b", 2))
	a := startChild(t, peer("a", 1))
	a.ConnectTo(t, b.self, b)
	must(t, a.Call("Cut", nil, nil))
	wantCode(t, b.Fence(briefly(t), a.Self), backend.Cancelled)
	must(t, a.Kill())
	must(t, b.Fence(soon(t), a.Self))
}

// TestUnwatchable has a target that cannot see the initiator's process.
func TestUnwatchable(t *testing.T) {
	a, b := newInstance(t, peer("a", 1)), newUntilExit(t, peer("b", 2))
	asFromElsewhere(b)
	b.processOf = func(*net.UnixConn) (*os.File, error) { return processByNumber(0) }
	h, err := a.Offer(soon(t), b.self)
	must(t, err)
	answer, err := b.Answer(soon(t), a.self, h.Offer())
	must(t, err)
	_, err = h.Establish(soon(t), answer)
	wantCode(t, err, backend.Unsupported, "another pid namespace")
}

// TestProcesses finds a process by the connection and by its number.
func TestProcesses(t *testing.T) {
	if _, err := processByNumber(1 << 30); !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.EINVAL) {
		t.Errorf("a process that does not exist: got %v", err)
	}
	b := newInstance(t, peer("b", 2))
	conn := dial(t, b)
	own, err := processOf(conn)
	must(t, err)
	defer own.Close()
	pid, err := checkUser(conn)
	must(t, err)
	if pid != os.Getpid() || hasEnded(own.Fd()) {
		t.Errorf("the process of a connection to ourselves is %d and has ended: %v", pid, hasEnded(own.Fd()))
	}

	cmd := exec.Command("sleep", "1000")
	must(t, cmd.Start())
	p, err := processByNumber(cmd.Process.Pid)
	must(t, err)
	defer p.Close()
	ended := make(chan bool)
	go func() { ended <- b.awaitExit(p) }()
	select {
	case <-ended:
		t.Fatal("a process has ended that lives")
	case <-time.After(10 * time.Millisecond):
	}
	must(t, cmd.Process.Signal(syscall.SIGKILL))
	if !<-ended {
		t.Error("the end of the process was not seen")
	}
	cmd.Wait()
	if !b.awaitExit(p) { // again, when it has long ended
		t.Error("the end of the process was not seen")
	}
}
