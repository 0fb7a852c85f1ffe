package samehost_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/samehost"
)

// inProcess is about the least that a Mover can be: it reaches what lies in its own process, and copies.
type inProcess struct{}

func (inProcess) Admit(_ context.Context, m backend.Memory) (samehost.Region, error) {
	return region(m.Bytes), nil
}

func (inProcess) Map(context.Context, samehost.Lent) (samehost.Region, error) {
	return nil, backend.Errorf(backend.Unsupported, "only memory of this process can be reached")
}

func (inProcess) Join(_ context.Context, near, far samehost.Region, _ samehost.Target) (samehost.Path, error) {
	return path{near.(region), far.(region)}, nil
}

func (inProcess) Serve(context.Context, *samehost.Guest, []byte) ([]byte, error) {
	return nil, backend.Errorf(backend.Unsupported, "there is nothing to ask")
}

func (inProcess) Close() error { return nil }

type region []byte

func (r region) Size() uint64 { return uint64(len(r)) }

func (r region) Lend(backend.Rights) (samehost.Lent, error) {
	return samehost.Lent{}, backend.Errorf(backend.Unsupported, "only its own process can reach the region")
}

func (r region) Close() error { return nil }

type path struct{ near, far region }

func (p path) Start(t *samehost.Transfer) {
	for _, g := range t.Segments {
		near, far := p.near[g.Local:][:g.Length], p.far[g.Remote:][:g.Length]
		if t.Op == backend.Write {
			copy(far, near)
		} else {
			copy(near, far)
		}
	}
	t.Finish(nil, nil)
}

func (path) Stop(*samehost.Transfer) {} // Start is never long

func (path) Close() {}

// printer is a sink.
type printer struct{}

func (printer) Complete(c backend.Completion) { fmt.Println("transfer", c.Cookie, "ended with", c.Err) }

// A backend on this package is a Mover, and the Info that says what it can do.
func Example() {
	dir, err := os.MkdirTemp("", "umbp")
	check(err)
	defer os.RemoveAll(dir)
	options, err := backend.CheckOptions(samehost.Options(), map[string]string{"socket_dir": dir})
	check(err)
	info := backend.Info{Name: "example", Version: "1", Capabilities: backend.Capabilities{
		Ops:   backend.Write | backend.Read,
		Local: backend.Kinds(backend.HostMemory), Remote: backend.Kinds(backend.HostMemory),
		Reach:  backend.SameProcess,
		Limits: backend.Limits{Segments: 1024}, Window: options.Int("window"),
	}}
	open := func(self backend.Peer) backend.Backend {
		b, err := samehost.Open(backend.Config{Self: self, Options: options}, samehost.Settings{Info: info, Mover: inProcess{}})
		check(err)
		return b
	}
	ctx := context.Background()
	alice, bob := backend.Peer{Node: "alice", Incarnation: 1}, backend.Peer{Node: "bob", Incarnation: 2}
	initiator, target := open(alice), open(bob)

	from, to := []byte("hello"), make([]byte, 5)
	_, err = initiator.Register(ctx, backend.Memory{Region: 1, Kind: backend.HostMemory, Bytes: from, FD: -1})
	check(err)
	key, err := target.Register(ctx, backend.Memory{
		Region: 2, Kind: backend.HostMemory, Bytes: to, FD: -1, Rights: backend.RemoteWrite,
	})
	check(err)

	handshake, err := initiator.Offer(ctx, bob)
	check(err)
	answer, err := target.Answer(ctx, alice, handshake.Offer())
	check(err)
	endpoint, err := handshake.Establish(ctx, answer)
	check(err)
	session, err := endpoint.Session(ctx, 1, backend.Remote{Peer: bob, Region: 2, Kind: backend.HostMemory, Key: key}, printer{})
	check(err)
	check(session.Post(backend.Transfer{Op: backend.Write, Segments: []backend.Segment{{Length: 5}}, Cookie: 7}))
	check(initiator.Close())
	check(target.Close())
	fmt.Printf("%s\n", to)
	// Output:
	// transfer 7 ended with <nil>
	// hello
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
