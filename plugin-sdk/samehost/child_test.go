package samehost

import (
	"context"
	"errors"
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

// childEnv makes the test binary serve as the other process.
const childEnv = "UMBP_SAMEHOST_TEST_CHILD"

// Child is an instance in another process, driven over the standard input and output: the control plane of these
// tests. It is exported because net/rpc asks for that.
type Child struct {
	mu        sync.Mutex
	instance  *Instance
	memories  map[backend.RegionID]backend.Memory
	handshake backend.Handshake
	endpoint  backend.Endpoint
	session   backend.Session
	posted    uint64
	moved     chan struct{} // closed after the first transfer of Hammer
}

type stdio struct {
	io.Reader
	io.Writer
}

func (stdio) Close() error { return nil }

func serveChild() {
	server := rpc.NewServer()
	c := &Child{memories: make(map[backend.RegionID]backend.Memory), moved: make(chan struct{})}
	if err := server.Register(c); err != nil {
		panic(err)
	}
	server.ServeConn(stdio{os.Stdin, os.Stdout}) // until the parent ends, whatever its way
}

// Nothing stands for an argument or a reply that is not there.
type Nothing struct{}

// OpenArgs are the arguments of Open.
type OpenArgs struct {
	Self    backend.Peer
	Options map[string]string
}

// Open opens the instance.
func (c *Child) Open(a OpenArgs, _ *Nothing) (err error) {
	c.instance, err = openInstance(a.Self, a.Options)
	return err
}

// RegionArgs describe a region to make.
type RegionArgs struct {
	ID     backend.RegionID
	Size   int
	Rights backend.Rights
	Seals  int
	Seed   uint64 // of the first contents
}

// Register makes a region and returns its key.
func (c *Child) Register(a RegionArgs, key *[]byte) error {
	m, err := newMemory(a.ID, a.Size, a.Rights, a.Seals)
	if err != nil {
		return err
	}
	fill(m.Bytes, a.Seed)
	c.mu.Lock()
	c.memories[a.ID] = m
	c.mu.Unlock()
	*key, err = c.instance.Register(context.Background(), m)
	return err
}

// Deregister ends a region and unmaps it.
func (c *Child) Deregister(id backend.RegionID, _ *Nothing) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := c.instance.Deregister(ctx, id); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	freeMemory(c.memories[id])
	delete(c.memories, id)
	return nil
}

// PeerArgs are a peer and its offer.
type PeerArgs struct {
	Peer  backend.Peer
	Bytes []byte
}

// Answer is the target's half of connecting.
func (c *Child) Answer(a PeerArgs, answer *[]byte) (err error) {
	*answer, err = c.instance.Answer(context.Background(), a.Peer, a.Bytes)
	return err
}

// Offer begins to connect to a peer.
func (c *Child) Offer(peer backend.Peer, offer *[]byte) (err error) {
	if c.handshake, err = c.instance.Offer(context.Background(), peer); err == nil {
		*offer = c.handshake.Offer()
	}
	return err
}

// Establish connects to the peer.
func (c *Child) Establish(answer []byte, _ *Nothing) (err error) {
	c.endpoint, err = c.handshake.Establish(context.Background(), answer)
	return err
}

// HammerArgs say between which regions to copy.
type HammerArgs struct {
	Local  backend.RegionID
	Remote backend.Remote
}

// Session opens a session and posts nothing.
func (c *Child) Session(a HammerArgs, _ *Nothing) (err error) {
	c.session, err = c.endpoint.Session(context.Background(), a.Local, a.Remote, c)
	return err
}

// Hammer writes the whole remote region again and again until the endpoint fails. It returns after the first time.
func (c *Child) Hammer(a HammerArgs, _ *Nothing) (err error) {
	if c.session, err = c.endpoint.Session(context.Background(), a.Local, a.Remote, c); err != nil {
		return err
	}
	if err := c.hit(a.Remote.Size); err != nil {
		return err
	}
	<-c.moved
	return nil
}

func (c *Child) hit(size uint64) error {
	c.mu.Lock()
	c.posted++
	cookie := c.posted
	c.mu.Unlock()
	return post(c.session, backend.Write, cookie, backend.Segment{Length: size})
}

// Complete makes the child a sink. It is no method for the parent.
func (c *Child) Complete(done backend.Completion) {
	if done.Cookie == 1 {
		close(c.moved)
	}
	c.hit(uint64(len(c.memories[1].Bytes))) // refused once the endpoint has failed
}

// Ended waits until the endpoint has failed, and says why a transfer is refused now.
func (c *Child) Ended(size uint64, code *backend.Code) error {
	<-c.endpoint.Done()
	*code = backend.CodeOf(c.hit(size))
	return nil
}

// Cut closes the connection of the endpoint, and says nothing.
func (c *Child) Cut(_ Nothing, _ *Nothing) error {
	return c.endpoint.(*endpoint).reach.(*socketReach).conn.Close()
}

// Counts returns how many descriptors are open and how many mappings there are.
func (c *Child) Counts(_ Nothing, counts *[2]int) (err error) {
	*counts, err = held()
	return err
}

// Close closes the instance.
func (c *Child) Close(_ Nothing, _ *Nothing) error { return c.instance.Close() }

// child is the parent's handle of another process.
type child struct {
	self backend.Peer
	cmd  *exec.Cmd
	rpc  *rpc.Client
}

func startChild(t testing.TB, self backend.Peer) *child {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	c := &child{self: self, cmd: cmd, rpc: rpc.NewClient(struct {
		io.Reader
		io.WriteCloser
	}{out, in})}
	t.Cleanup(c.kill)
	must(t, c.call("Open", OpenArgs{Self: self, Options: map[string]string{"socket_dir": socketDir(t)}}, &Nothing{}))
	return c
}

func (c *child) kill() {
	c.cmd.Process.Kill()
	c.cmd.Wait()
	c.rpc.Close()
}

// stop stops the child and returns when its last thread stands still.
func (c *child) stop(t testing.TB) {
	t.Helper()
	must(t, c.cmd.Process.Signal(unix.SIGSTOP))
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(c.cmd.Process.Pid, &status, unix.WUNTRACED, nil)
		if err != unix.EINTR {
			must(t, err)
			break
		}
	}
	if !status.Stopped() {
		t.Fatalf("the child is not stopped, its status is %#x", status)
	}
}

func (c *child) call(method string, args, reply any) error {
	call := c.rpc.Go("Child."+method, args, reply, make(chan *rpc.Call, 1))
	select {
	case <-call.Done:
		return call.Error
	case <-time.After(patience):
		return errors.New("the child does not answer to " + method)
	}
}

// Answer makes a child a target.
func (c *child) Answer(_ context.Context, peer backend.Peer, offer []byte) (answer []byte, err error) {
	err = c.call("Answer", PeerArgs{peer, offer}, &answer)
	return answer, err
}

// register makes the child make a region.
func (c *child) register(t testing.TB, a RegionArgs) backend.Remote {
	t.Helper()
	if a.Seals == 0 {
		a.Seals = unix.F_SEAL_SHRINK
	}
	var key []byte
	must(t, c.call("Register", a, &key))
	return backend.Remote{
		Peer: c.self, Region: a.ID, Kind: backend.HostMemory, Rights: a.Rights, Size: uint64(a.Size), Key: key,
	}
}

// connectTo makes the child an initiator.
func (c *child) connectTo(t testing.TB, i *Instance) {
	t.Helper()
	var offer []byte
	must(t, c.call("Offer", i.self, &offer))
	answer, err := i.Answer(soon(t), c.self, offer)
	must(t, err)
	must(t, c.call("Establish", answer, &Nothing{}))
}
