package backendtest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// child has methods of its own, as that of a backend's tests may.
type child struct{ Child }

// Sum adds numbers, of which there have to be some. It prints, too, which must not disturb the calls.
func (*child) Sum(numbers []int, sum *int) error {
	fmt.Println("adding", numbers)
	if len(numbers) == 0 {
		return errors.New("there is nothing to add")
	}
	for _, n := range numbers {
		*sum += n
	}
	return nil
}

// First returns the first bytes of a region.
func (c *child) First(id backend.RegionID, first *[]byte) error {
	*first = c.Memory(id)[:8]
	return nil
}

// Answered returns what the endpoint was established by.
func (c *child) Answered(_ struct{}, text *string) error {
	*text = c.Endpoint.(*line).answer
	return nil
}

// Count returns how many mappings there are.
func (c *child) Count(_ struct{}, n *int) error {
	list, err := Mappings()
	*n = len(list)
	return err
}

// TestProcess has a process of its own do what it is asked.
func TestProcess(t *testing.T) {
	self := Peer("far", 9)
	p := StartChild(t, self, Options("colour=blue"))
	if p.Pid == os.Getpid() || p.Self != self {
		t.Errorf("started %d as %v", p.Pid, p.Self)
	}
	var sum int
	Must(t, p.Call("Sum", []int{1, 2, 4}, &sum))
	if sum != 7 {
		t.Errorf("the sum is %d", sum)
	}
	if err := p.Call("Sum", []int{}, &sum); err == nil || err.Error() != "there is nothing to add" {
		t.Errorf("got error %v", err)
	}

	remote := p.Register(t, RegionArgs{ID: 3, Size: 100, Rights: backend.RemoteRead, Seed: 5})
	if want := fmt.Sprintf("blue 3 100, fd true, %x", Filled(4, 5)); string(remote.Key) != want {
		t.Errorf("registered %q, want %q", remote.Key, want)
	}
	if remote.Peer != self || remote.Region != 3 || remote.Size != 100 || remote.Rights != backend.RemoteRead || remote.Kind != backend.HostMemory {
		t.Errorf("registered %+v", remote)
	}
	if bare := p.Register(t, RegionArgs{ID: 4, Size: 100, Bare: true}); !strings.Contains(string(bare.Key), "fd false") {
		t.Errorf("registered %q", bare.Key)
	}
	var first []byte
	Must(t, p.Call("First", backend.RegionID(3), &first))
	WantSame(t, "memory of the child", first, Filled(100, 5)[:8])
	for _, id := range []backend.RegionID{3, 4, 5} { // and one that is not its own
		Must(t, p.Call("Deregister", id, nil))
	}
	var n int
	Must(t, p.Call("Count", nil, &n))
	if n != 0 {
		t.Errorf("%d mappings are left in the child", n)
	}

	here := &paper{self: Peer("near", 1)}
	e := Connect(t, here, here.self, self, p).(*line)
	if want := "far@9 answers near@1: near@1 to far@9"; e.answer != want {
		t.Errorf("established by %q, want %q", e.answer, want)
	}
	p.ConnectTo(t, here.self, here)
	var text string
	Must(t, p.Call("Answered", nil, &text))
	if want := "near@1 answers far@9: far@9 to near@1"; text != want {
		t.Errorf("the child established by %q, want %q", text, want)
	}
	Must(t, p.Call("Close", nil, nil))
	wantFailure(t, func(t testing.TB) { StartChild(t, self, Options("size=3")) }, "size")
}

// TestStop stops a process, has it go on, and ends it.
func TestStop(t *testing.T) {
	p := StartChild(t, Peer("far", 9), nil)
	p.Stop(t)
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Pid))
	Must(t, err)
	if _, state, _ := strings.Cut(string(stat), ") "); !strings.HasPrefix(state, "T") {
		t.Errorf("the state of the process is %.1s, want T", state)
	}
	Must(t, p.Signal(unix.SIGCONT))
	var sum int
	Must(t, p.Call("Sum", []int{1}, &sum))
	p.End()
	p.End()
	if err := unix.Kill(p.Pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("after its end, the process is there: %v", err)
	}
	if err := p.Call("Sum", []int{1}, &sum); err == nil {
		t.Error("a process that has ended answers")
	}
}

// TestNoAnswer calls a process that does not answer. Time is that of a bubble, in which waiting takes none.
func TestNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cmd := exec.Command("sleep", "1000")
		Must(t, cmd.Start())
		near, far := net.Pipe()
		go io.Copy(io.Discard, far)
		p := &Process{Process: cmd.Process, cmd: cmd, rpc: rpc.NewClient(near)}
		err := p.Call("Sum", []int{1}, new(int))
		if err == nil || !strings.Contains(err.Error(), "does not answer to Sum") {
			t.Errorf("got error %v", err)
		}
		cmd.Wait()
		if got := cmd.ProcessState.Sys().(syscall.WaitStatus).Signal(); got != syscall.SIGQUIT {
			t.Errorf("the process ended by signal %v, want that it prints its stacks", got)
		}
		p.End()
	})
}
