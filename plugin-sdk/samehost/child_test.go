package samehost

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

// child is an instance in another process.
type child struct {
	backendtest.Child
	session backend.Session
	size    uint64 // of what Hammer copies
	posted  atomic.Uint64
	moved   chan struct{} // closed after the first transfer of Hammer
}

type regionArgs = backendtest.RegionArgs

func newChild() *child {
	return &child{Child: backendtest.Child{Factory: testFactory()}, moved: make(chan struct{})}
}

func startChild(t testing.TB, self backend.Peer) *backendtest.Process {
	t.Helper()
	return backendtest.StartChild(t, self, map[string]string{"socket_dir": socketDir(t)})
}

// SessionArgs say between which regions to copy. They are exported, as methods of the child are, because net/rpc asks for
// that.
type SessionArgs struct {
	Local  backend.RegionID
	Remote backend.Remote
}

// Session opens a session and posts nothing.
func (c *child) Session(a SessionArgs, _ *struct{}) (err error) {
	c.session, err = c.Endpoint.Session(context.Background(), a.Local, a.Remote, c)
	return err
}

// Hammer writes the whole remote region again and again until the endpoint fails. It returns after the first time.
func (c *child) Hammer(a SessionArgs, _ *struct{}) error {
	if err := c.Session(a, nil); err != nil {
		return err
	}
	c.size = a.Remote.Size
	if err := c.hit(c.size); err != nil {
		return err
	}
	<-c.moved
	return nil
}

func (c *child) hit(size uint64) error {
	return post(c.session, backend.Write, c.posted.Add(1), backend.Segment{Length: size})
}

// Complete makes the child a sink. It is no method for the parent.
func (c *child) Complete(done backend.Completion) {
	if done.Cookie == 1 {
		close(c.moved)
	}
	c.hit(c.size) // refused once the endpoint has failed
}

// Ended waits until the endpoint has failed, and says why a transfer is refused now.
func (c *child) Ended(size uint64, code *backend.Code) error {
	<-c.Endpoint.Done()
	*code = backend.CodeOf(c.hit(size))
	return nil
}

// Cut closes the connection of the endpoint, and says nothing.
func (c *child) Cut(struct{}, *struct{}) error {
	return c.Endpoint.(*endpoint).reach.(*socketReach).conn.Close()
}

// Counts returns how many descriptors are open and how many mappings there are.
func (c *child) Counts(_ struct{}, counts *[2]int) (err error) {
	*counts, err = held()
	return err
}
