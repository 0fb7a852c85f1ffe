package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// outputPatience is how long after a plugin's death its output is still read. The pipes end by themselves, unless
// something that left the plugin's process group holds on to them.
const outputPatience = time.Second

// child is one process of a plugin. It is the runner that go-plugin starts, because the one that go-plugin has kills
// only the process itself, and reaps it only when its output has ended.
type child struct {
	cmd    *exec.Cmd
	stdout *output
	log    *logPipe
	exited chan struct{} // closed when the process has been reaped, and its output read

	mu     sync.Mutex
	pid    int  // does not change once the process is started
	killed bool // by kill, before it was started, or before it was known to have ended
	reaped bool // its id may be another's
}

// newChild prepares a process. It is the head of a group of its own, and the kernel kills it when the thread that started
// it ends. The command's ExtraFiles are closed when Start returns.
func newChild(cmd *exec.Cmd) *child {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	return &child{cmd: cmd, log: newLogPipe(), exited: make(chan struct{})}
}

// Start implements runner.Runner. The thread that it is called on has to live as long as the process.
func (c *child) Start(context.Context) error {
	var ours, theirs [2]*os.File
	err := func() (err error) {
		for i := range ours {
			if ours[i], theirs[i], err = os.Pipe(); err != nil {
				return err
			}
		}
		c.cmd.Stdout, c.cmd.Stderr = theirs[0], theirs[1]
		return c.fork()
	}()
	for _, f := range append(theirs[:], c.cmd.ExtraFiles...) {
		f.Close()
	}
	if err != nil {
		ours[0].Close()
		ours[1].Close()
		close(c.exited)
		return err
	}
	c.stdout = &output{File: ours[0]}
	go c.log.take(&output{File: ours[1]})
	go c.reap(ours[:])
	return nil
}

// fork starts the process, unless it has been killed already.
func (c *child) fork() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.killed {
		return errors.New("there was no time left to start the process")
	}
	if err := c.cmd.Start(); err != nil {
		return err
	}
	c.pid = c.cmd.Process.Pid
	return nil
}

// reap waits for the end of the process.
func (c *child) reap(output []*os.File) {
	defer close(c.exited)
	// The process stays a zombie until the rest of its group has been killed: so long, the group's id is not given to
	// another.
	for errors.Is(unix.Waitid(unix.P_PID, c.pid, nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR) {
	}
	c.mu.Lock()
	_ = unix.Kill(-c.pid, unix.SIGKILL)
	_ = c.cmd.Wait() // its error is in ProcessState
	c.reaped = true
	c.mu.Unlock()
	for _, f := range output {
		_ = f.SetReadDeadline(time.Now().Add(outputPatience))
	}
	<-c.log.done
}

// kill ends the process and all of its group. Where the process has ended by itself, and reap is about to see it, reap does
// the rest, and the process is not said to have been killed.
func (c *child) kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reaped || c.pid != 0 && c.isZombie() {
		return
	}
	c.killed = true
	if c.pid != 0 {
		_ = unix.Kill(-c.pid, unix.SIGKILL)
	}
}

// isZombie tells whether the process, which has not been reaped, has ended.
func (c *child) isZombie() bool {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, c.pid, &info, unix.WEXITED|unix.WNOWAIT|unix.WNOHANG, nil)
	return err == nil && info.Signo != 0
}

// Kill implements runner.Runner.
func (c *child) Kill(context.Context) error {
	c.kill()
	return nil
}

// Wait implements runner.Runner.
func (c *child) Wait(ctx context.Context) error {
	select {
	case <-c.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ended says how the process ended, and what it wrote. It has exited.
func (c *child) ended() *ExitError {
	e := &ExitError{Path: c.cmd.Path, PID: c.pid, Output: c.log.tail.String()}
	status, ok := c.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !c.killed || !ok || status.Signal() != unix.SIGKILL {
		e.Status = c.cmd.ProcessState.String()
	}
	return e
}

// Stdout implements runner.Runner.
func (c *child) Stdout() io.ReadCloser { return &announcement{output: c.stdout} }

// Stderr implements runner.Runner.
func (c *child) Stderr() io.ReadCloser { return c.log }

// Name implements runner.Runner.
func (c *child) Name() string { return c.cmd.Path }

// ID implements runner.Runner.
func (c *child) ID() string { return strconv.Itoa(c.pid) }

// Diagnose implements runner.Runner.
func (c *child) Diagnose(context.Context) string { return "" }

// PluginToHost implements runner.Runner.
func (c *child) PluginToHost(network, address string) (string, string, error) {
	return network, address, nil
}

// HostToPlugin implements runner.Runner.
func (c *child) HostToPlugin(network, address string) (string, string, error) {
	return network, address, nil
}

// An ExitError says how a plugin's process ended. It wraps no error: the identity of whatever was wrong with the process
// is not that of the calls that failed for it.
type ExitError struct {
	Path string
	PID  int
	// Status is "exit status 2" or "signal: segmentation fault"; empty where the host has killed the process.
	Status string
	// Err is why the host has killed it.
	Err error
	// Output is the last of what the process wrote to its standard error, at most 64 KiB.
	Output string
}

// outputShown bounds the output in the text of an ExitError, in bytes.
const outputShown = 2 << 10

// crash is how the last words of a Go program begin.
var crash = regexp.MustCompile(`(?m)^(panic: |fatal error: |SIG[A-Z]+: )`)

// Error shows as much of the output as is of use: from where a Go program panics, or the last of it.
func (e *ExitError) Error() string {
	text := fmt.Sprintf("the plugin's process %d (%s) ended: %s", e.PID, e.Path, e.Status)
	if e.Status == "" {
		text = fmt.Sprintf("the plugin's process %d (%s) was killed", e.PID, e.Path)
	}
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	output := strings.TrimSpace(e.Output)
	if output == "" {
		return text + "; it wrote nothing"
	}
	if crashes := crash.FindAllStringIndex(output, -1); len(crashes) > 0 {
		i := crashes[len(crashes)-1][0]
		return text + "; it wrote:\n" + output[i:min(len(output), i+outputShown)]
	}
	return text + "; it wrote at last:\n" + output[max(0, len(output)-outputShown):]
}
