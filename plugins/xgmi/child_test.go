package xgmi

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

// child is an instance in another process, and memory of that process.
type child struct {
	backendtest.Child
	host    *host
	session backend.Session
	sink    sink

	mu       sync.Mutex
	memories map[backend.RegionID]backend.Memory
}

func newChild() *child {
	return &child{Child: backendtest.Child{Factory: Factory}, memories: make(map[backend.RegionID]backend.Memory)}
}

// Open opens the runtime, and the instance.
func (c *child) Open(a backendtest.OpenArgs, _ *struct{}) (err error) {
	if c.host, err = openHost(a.Options["runtime"], a.Options["library"]); err != nil {
		return err
	}
	return c.Child.Open(a, nil)
}

// RegionArgs describe a region to make. What the methods of the child are given is exported because net/rpc asks for that.
type RegionArgs struct {
	ID           backend.RegionID
	Device, Size int
	Rights       backend.Rights
}

// Register makes a region and returns its descriptor. Its contents are those of its id.
func (c *child) Register(a RegionArgs, remote *backend.Remote) error {
	m, err := c.host.memory(a.ID, a.Device, a.Size, a.Rights)
	if err != nil {
		return err
	}
	return c.add(m, remote)
}

// Slices makes several regions of one allocation, of the size given each, with ids from the one given on.
func (c *child) Slices(a RegionArgs, remotes *[]backend.Remote) error {
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

func (c *child) add(m backend.Memory, remote *backend.Remote) error {
	if err := c.host.store(&m, filled(int(m.Size()), uint64(m.Region))); err != nil {
		return err
	}
	c.mu.Lock()
	c.memories[m.Region] = m
	c.mu.Unlock()
	key, err := c.Backend.Register(context.Background(), m)
	*remote = backendtest.Describe(backend.Peer{}, m, key)
	return err
}

// Range makes memory and returns where it lies. It is not registered.
func (c *child) Range(a RegionArgs, g *backend.GPURange) error {
	m, err := c.host.memory(a.ID, a.Device, a.Size, 0)
	if err == nil {
		*g = *m.GPU
	}
	return err
}

// Import registers memory of the parent's at the child's instance, as the host of a process of its own would.
func (c *child) Import(m backend.Memory, remote *backend.Remote) error {
	key, err := c.Backend.Register(context.Background(), m)
	*remote = backendtest.Describe(backend.Peer{}, m, key)
	return err
}

// Load returns the contents of a region.
func (c *child) Load(id backend.RegionID, content *[]byte) (err error) {
	m := c.memories[id]
	*content, err = c.host.load(&m)
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
func (c *child) Session(a PostArgs, _ *struct{}) (err error) {
	c.session, err = c.Endpoint.Session(context.Background(), a.Local, a.Remote, &c.sink)
	return err
}

// Post posts a transfer on the session.
func (c *child) Post(a PostArgs, _ *struct{}) error {
	return post(c.session, a.Op, a.Cookie, a.Segments...)
}

// Completed tells whether a transfer has completed.
func (c *child) Completed(cookie uint64, is *bool) error {
	*is = c.sink.Has(cookie)
	return nil
}

// Cut has the kernel end every connection of the process, which lives on and notices nothing.
func (c *child) Cut(struct{}, *struct{}) error {
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
func (c *child) Count(name string, n *uint64) error {
	for _, k := range c.Backend.(*instance).Counters() {
		if k.Name == name {
			*n = k.Value
		}
	}
	return nil
}

// Close closes the instance and frees the memory.
func (c *child) Close(struct{}, *struct{}) error {
	return errors.Join(c.Backend.Close(), c.host.close())
}

// process is the parent's handle of a child.
type process struct{ *backendtest.Process }

// child starts another process on the machine.
func (w *world) child(self backend.Peer, options ...string) process {
	w.t.Helper()
	return process{backendtest.StartChild(w.t, self, w.options(options...))}
}

// register makes the child make a region.
func (p process) register(t testing.TB, a RegionArgs) backend.Remote {
	t.Helper()
	var r backend.Remote
	must(t, p.Call("Register", a, &r))
	r.Peer = p.Self
	return r
}

func (p process) content(t testing.TB, id backend.RegionID) (b []byte) {
	t.Helper()
	must(t, p.Call("Load", id, &b))
	return b
}

func (p process) count(t testing.TB, name string) (n uint64) {
	t.Helper()
	must(t, p.Call("Count", name, &n))
	return n
}
