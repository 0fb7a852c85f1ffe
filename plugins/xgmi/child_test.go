package xgmi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/rpc"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// childEnv makes the test binary serve as the other process.
const childEnv = "UMBP_XGMI_TEST_CHILD"

// Child is an instance in another process, driven over the standard input and output: the control plane of these
// tests. It is exported because net/rpc asks for that.
type Child struct {
	host      *host
	node      *instance
	handshake backend.Handshake
	endpoint  backend.Endpoint
	session   backend.Session
	sink      *sink

	mu       sync.Mutex
	memories map[backend.RegionID]backend.Memory
}

type stdio struct {
	io.Reader
	io.Writer
}

func (stdio) Close() error { return nil }

func serveChild() {
	server := rpc.NewServer()
	if err := server.Register(&Child{memories: make(map[backend.RegionID]backend.Memory), sink: newSink()}); err != nil {
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
	if c.host, err = openHost(a.Options["runtime"], a.Options["library"]); err != nil {
		return err
	}
	c.node, err = openInstance(a.Self, a.Options, nil)
	return err
}

// RegionArgs describe a region to make.
type RegionArgs struct {
	ID           backend.RegionID
	Device, Size int
	Rights       backend.Rights
}

// Register makes a region and returns its descriptor. Its contents are those of its id.
func (c *Child) Register(a RegionArgs, remote *backend.Remote) error {
	m, err := c.host.memory(a.ID, a.Device, a.Size, a.Rights)
	if err != nil {
		return err
	}
	return c.add(m, remote)
}

// Slices makes several regions of one allocation, of the size given each, with ids from the one given on.
func (c *Child) Slices(a RegionArgs, remotes *[]backend.Remote) error {
	const n = 8
	whole, err := c.host.memory(a.ID, a.Device, n*a.Size, a.Rights)
	if err != nil {
		return err
	}
	for i := range uint64(n) {
		g, err := c.host.rt.Describe(whole.GPU.Address+i*uint64(a.Size), uint64(a.Size))
		if err != nil {
			return err
		}
		m := whole
		m.Region, m.GPU = a.ID+backend.RegionID(i), &g
		var remote backend.Remote
		if err := c.add(m, &remote); err != nil {
			return err
		}
		*remotes = append(*remotes, remote)
	}
	return nil
}

func (c *Child) add(m backend.Memory, remote *backend.Remote) error {
	if err := c.host.store(&m, filled(int(m.Size()), uint64(m.Region))); err != nil {
		return err
	}
	c.mu.Lock()
	c.memories[m.Region] = m
	c.mu.Unlock()
	key, err := c.node.Register(context.Background(), m)
	*remote = describe(backend.Peer{}, m, key)
	return err
}

// Range makes memory and returns where it lies. It is not registered.
func (c *Child) Range(a RegionArgs, g *backend.GPURange) error {
	m, err := c.host.memory(a.ID, a.Device, a.Size, 0)
	if err == nil {
		*g = *m.GPU
	}
	return err
}

// Deregister ends a region.
func (c *Child) Deregister(id backend.RegionID, _ *Nothing) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return c.node.Deregister(ctx, id)
}

// Import registers memory of the parent's at the child's instance, as the host of a process of its own would.
func (c *Child) Import(m backend.Memory, remote *backend.Remote) error {
	key, err := c.node.Register(context.Background(), m)
	*remote = describe(backend.Peer{}, m, key)
	return err
}

// Load returns the contents of a region.
func (c *Child) Load(id backend.RegionID, content *[]byte) (err error) {
	m := c.memories[id]
	*content, err = c.host.load(&m)
	return err
}

// PeerArgs are a peer and its offer.
type PeerArgs struct {
	Peer  backend.Peer
	Bytes []byte
}

// Answer is the target's half of connecting.
func (c *Child) Answer(a PeerArgs, answer *[]byte) (err error) {
	*answer, err = c.node.Answer(context.Background(), a.Peer, a.Bytes)
	return err
}

// Offer begins to connect to a peer.
func (c *Child) Offer(peer backend.Peer, offer *[]byte) (err error) {
	if c.handshake, err = c.node.Offer(context.Background(), peer); err == nil {
		*offer = c.handshake.Offer()
	}
	return err
}

// Establish connects to the peer.
func (c *Child) Establish(answer []byte, _ *Nothing) (err error) {
	c.endpoint, err = c.handshake.Establish(context.Background(), answer)
	return err
}

// PostArgs are a session to make, and a transfer to post on it.
type PostArgs struct {
	Local    backend.RegionID
	Remote   backend.Remote
	Op       backend.Op
	Cookie   uint64
	Segments []backend.Segment
}

// Session opens a session.
func (c *Child) Session(a PostArgs, _ *Nothing) (err error) {
	c.session, err = c.endpoint.Session(context.Background(), a.Local, a.Remote, c.sink)
	return err
}

// Post posts a transfer on the session.
func (c *Child) Post(a PostArgs, _ *Nothing) error {
	return post(c.session, a.Op, a.Cookie, a.Segments...)
}

// Completed tells whether a transfer has completed.
func (c *Child) Completed(cookie uint64, is *bool) error {
	_, *is = c.sink.has(cookie)
	return nil
}

// Cut has the kernel end every connection of the process, which lives on and notices nothing.
func (c *Child) Cut(_ Nothing, _ *Nothing) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range entries {
		var fd int
		fmt.Sscan(e.Name(), &fd)
		if link, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(link, "socket:") {
			unix.Shutdown(fd, unix.SHUT_RDWR)
		}
	}
	return nil
}

// Count returns a counter of the instance.
func (c *Child) Count(name string, n *uint64) error {
	for _, k := range c.node.Counters() {
		if k.Name == name {
			*n = k.Value
		}
	}
	return nil
}

// Close closes the instance and frees the memory.
func (c *Child) Close(_ Nothing, _ *Nothing) error {
	return errors.Join(c.node.Close(), c.host.close())
}

// child is the parent's handle of another process.
type child struct {
	self backend.Peer
	cmd  *exec.Cmd
	rpc  *rpc.Client
}

// child starts another process on the machine.
func (w *world) child(self backend.Peer, options ...string) *child {
	t := w.t
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
	must(t, c.call("Open", OpenArgs{Self: self, Options: w.options(options...)}, &Nothing{}))
	return c
}

func (c *child) kill() {
	c.cmd.Process.Kill()
	c.cmd.Wait()
	c.rpc.Close()
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
	var r backend.Remote
	must(t, c.call("Register", a, &r))
	r.Peer = c.self
	return r
}

func (c *child) content(t testing.TB, id backend.RegionID) (b []byte) {
	t.Helper()
	must(t, c.call("Load", id, &b))
	return b
}

func (c *child) count(t testing.TB, name string) (n uint64) {
	t.Helper()
	must(t, c.call("Count", name, &n))
	return n
}

// connectTo makes the child an initiator.
func (c *child) connectTo(t testing.TB, n *node) {
	t.Helper()
	var offer []byte
	must(t, c.call("Offer", n.self, &offer))
	answer, err := n.Answer(soon(t), c.self, offer)
	must(t, err)
	must(t, c.call("Establish", answer, &Nothing{}))
}
