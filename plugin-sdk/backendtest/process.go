package backendtest

import (
	"context"
	"fmt"
	"io"
	"net/rpc"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// childEnv is set in the environment of processes that StartChild starts.
const childEnv = "UMBP_BACKENDTEST_CHILD"

// ServeChild makes the process the other end, if StartChild has started it, and does not return then. Otherwise it does
// nothing. TestMain calls it before anything else:
//
//	func TestMain(m *testing.M) {
//		backendtest.ServeChild(&backendtest.Child{Factory: Factory})
//		m.Run()
//	}
//
// The receiver is a Child, or a pointer to a struct that embeds one and has more methods, which tests call by
// Process.Call: exported ones with the arguments and the error that package net/rpc asks for. Calls run side by side. The
// standard input and output belong to them; what the process prints goes to the standard error.
func ServeChild(receiver any) {
	if os.Getenv(childEnv) == "" {
		return
	}
	os.Unsetenv(childEnv) // lest what it starts be one too
	server := rpc.NewServer()
	if err := server.RegisterName("Child", receiver); err != nil {
		panic(err)
	}
	conn := struct {
		io.Reader
		io.WriteCloser
	}{os.Stdin, os.Stdout}
	os.Stdout = os.Stderr
	server.ServeConn(conn) // until the parent ends, whatever its way
	os.Exit(0)
}

// Child is a backend in a process of its own. Its methods are there for Process to call, and for those of a struct that
// embeds it.
type Child struct {
	// Factory is of the backend.
	Factory backend.Factory
	// Backend is set by Open, and Endpoint by Establish.
	Backend  backend.Backend
	Endpoint backend.Endpoint

	handshake backend.Handshake
	mu        sync.Mutex
	memories  map[backend.RegionID]backend.Memory
}

// OpenArgs are the arguments of Open: the process, and the options that are not to have their defaults.
type OpenArgs struct {
	Self    backend.Peer
	Options map[string]string
}

// Open opens the backend.
func (c *Child) Open(a OpenArgs, _ *struct{}) (err error) {
	c.Backend, err = TryOpen(c.Factory, backend.Config{Self: a.Self}, a.Options)
	return err
}

// RegionArgs describe a region of a Child.
type RegionArgs struct {
	ID     backend.RegionID
	Size   int // in bytes
	Rights backend.Rights
	Seed   uint64 // of its first contents, see Fill
	// Bare says that the region is registered without its descriptor.
	Bare bool
}

// Register makes a region, as Memfd does, and registers it.
func (c *Child) Register(a RegionArgs, key *[]byte) error {
	m, err := NewMemfd(a.ID, a.Size, a.Rights, unix.F_SEAL_SHRINK)
	if err != nil {
		return err
	}
	Fill(m.Bytes, a.Seed)
	c.mu.Lock()
	if c.memories == nil {
		c.memories = make(map[backend.RegionID]backend.Memory)
	}
	c.memories[a.ID] = m
	c.mu.Unlock()
	if a.Bare {
		m.FD = -1
	}
	*key, err = c.Backend.Register(context.Background(), m)
	return err
}

// Memory returns the memory of a region that Register made.
func (c *Child) Memory(id backend.RegionID) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.memories[id].Bytes
}

// Deregister deregisters a region, and frees it if Register made it.
func (c *Child) Deregister(id backend.RegionID, _ *struct{}) error {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	if err := c.Backend.Deregister(ctx, id); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	m, ok := c.memories[id]
	if !ok {
		return nil
	}
	delete(c.memories, id)
	return FreeMemfd(m)
}

// AnswerArgs are a peer and its offer.
type AnswerArgs struct {
	Peer  backend.Peer
	Offer []byte
}

// Answer is the target's half of connecting.
func (c *Child) Answer(a AnswerArgs, answer *[]byte) (err error) {
	*answer, err = c.Backend.Answer(context.Background(), a.Peer, a.Offer)
	return err
}

// Offer begins to connect to a peer.
func (c *Child) Offer(peer backend.Peer, offer *[]byte) (err error) {
	if c.handshake, err = c.Backend.Offer(context.Background(), peer); err == nil {
		*offer = c.handshake.Offer()
	}
	return err
}

// Establish finishes what Offer began.
func (c *Child) Establish(answer []byte, _ *struct{}) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	c.Endpoint, err = c.handshake.Establish(ctx, answer)
	return err
}

// Close closes the backend.
func (c *Child) Close(struct{}, *struct{}) error { return c.Backend.Close() }

// Process is the parent's handle of another process that has the other end. It is a Target. Its Kill does not wait for the
// end, as End does.
type Process struct {
	*os.Process
	Self backend.Peer

	cmd *exec.Cmd
	rpc *rpc.Client
}

// StartChild starts the test binary once more, as ServeChild says, and opens the backend there. The process ends with the
// test.
func StartChild(t testing.TB, self backend.Peer, options map[string]string) *Process {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	Must(t, err)
	out, err := cmd.StdoutPipe()
	Must(t, err)
	Must(t, cmd.Start())
	p := &Process{Process: cmd.Process, Self: self, cmd: cmd, rpc: rpc.NewClient(struct {
		io.Reader
		io.WriteCloser
	}{out, in})}
	t.Cleanup(p.End)
	Must(t, p.Call("Open", OpenArgs{self, options}, nil))
	return p
}

// End kills the process, and returns when it has ended. Ending it twice does no harm.
func (p *Process) End() {
	p.Kill()
	p.cmd.Wait()
	p.rpc.Close()
}

// Stop stops the process, which SIGCONT lets go on, and returns when its last thread stands still.
func (p *Process) Stop(t testing.TB) {
	t.Helper()
	Must(t, p.Signal(unix.SIGSTOP))
	var status unix.WaitStatus
	_, err := unix.Wait4(p.Pid, &status, unix.WUNTRACED, nil)
	for err == unix.EINTR {
		_, err = unix.Wait4(p.Pid, &status, unix.WUNTRACED, nil)
	}
	Must(t, err)
	if !status.Stopped() {
		t.Fatalf("the child is not stopped, its status is %#x", status)
	}
}

// Call calls a method of the child. Without an argument, or a reply, it is nil here, and the method has a struct{} there. Of
// an error of the method's only the text is left. A child that does not answer prints its stacks, and ends.
func (p *Process) Call(method string, argument, reply any) error {
	if argument == nil {
		argument = struct{}{}
	}
	if reply == nil {
		reply = new(struct{})
	}
	call := p.rpc.Go("Child."+method, argument, reply, make(chan *rpc.Call, 1))
	select {
	case <-call.Done:
		return call.Error
	case <-time.After(Patience):
	}
	p.Signal(unix.SIGQUIT) // at which it prints its stacks, and ends, unless it is stopped
	select {
	case <-call.Done:
	case <-time.After(time.Second):
	}
	return fmt.Errorf("the child does not answer to %s", method)
}

// Answer makes the child the target of a connection.
func (p *Process) Answer(_ context.Context, peer backend.Peer, offer []byte) (answer []byte, err error) {
	err = p.Call("Answer", AnswerArgs{peer, offer}, &answer)
	return answer, err
}

// ConnectTo makes the child the initiator of a connection to a peer, whose target answers.
func (p *Process) ConnectTo(t testing.TB, to backend.Peer, target Target) {
	t.Helper()
	var offer []byte
	Must(t, p.Call("Offer", to, &offer))
	answer, err := target.Answer(Context(t), p.Self, offer)
	Must(t, err)
	Must(t, p.Call("Establish", answer, nil))
}

// Register makes the child make a region, and returns it as peers see it.
func (p *Process) Register(t testing.TB, a RegionArgs) backend.Remote {
	t.Helper()
	var key []byte
	Must(t, p.Call("Register", a, &key))
	return backend.Remote{
		Peer: p.Self, Region: a.ID, Kind: backend.HostMemory, Rights: a.Rights, Size: uint64(a.Size), Key: key,
	}
}
