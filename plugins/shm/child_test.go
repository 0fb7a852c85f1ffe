package shm

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net/rpc"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/samehost"
)

// childEnv makes the test binary serve as the other process.
const childEnv = "UMBP_SHM_TEST_CHILD"

// Child is a target in another process, driven over the standard input and output: the control plane of these tests. It
// is exported because net/rpc asks for that.
type Child struct {
	instance *samehost.Instance
	memories map[backend.RegionID]backend.Memory
}

type stdio struct {
	io.Reader
	io.Writer
}

func (stdio) Close() error { return nil }

func serveChild() {
	server := rpc.NewServer()
	c := &Child{memories: make(map[backend.RegionID]backend.Memory)}
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
	c.instance, _, err = openInstance(a.Self, a.Options)
	return err
}

// RegionArgs describe a region to make.
type RegionArgs struct {
	ID     backend.RegionID
	Size   int
	Rights backend.Rights
	Seed   uint64 // of the first contents
	NoFile bool   // it is registered without its descriptor
}

// Register makes a region and returns its key.
func (c *Child) Register(a RegionArgs, key *[]byte) error {
	m, err := newMemory(a.ID, a.Size, a.Rights, unix.F_SEAL_SHRINK)
	if err != nil {
		return err
	}
	fill(m.Bytes, a.Seed)
	c.memories[a.ID] = m
	if a.NoFile {
		m.FD = -1
	}
	*key, err = c.instance.Register(context.Background(), m)
	return err
}

// Fill gives a region new contents.
func (c *Child) Fill(a RegionArgs, _ *Nothing) error {
	fill(c.memories[a.ID].Bytes, a.Seed)
	return nil
}

// Sum returns the checksum of a region.
func (c *Child) Sum(id backend.RegionID, sum *[sha256.Size]byte) error {
	*sum = sha256.Sum256(c.memories[id].Bytes)
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
	var key []byte
	must(t, c.call("Register", a, &key))
	return backend.Remote{
		Peer: c.self, Region: a.ID, Kind: backend.HostMemory, Rights: a.Rights, Size: uint64(a.Size), Key: key,
	}
}

func (c *child) sum(t testing.TB, id backend.RegionID) (sum [sha256.Size]byte) {
	t.Helper()
	must(t, c.call("Sum", id, &sum))
	return sum
}
