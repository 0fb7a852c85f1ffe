package backendtest_test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
	"github.com/umbp/umbp/plugin-sdk/reference"
)

// TestUse is what the comment of the package shows.
func TestUse(t *testing.T) {
	Factory := reference.NewNetwork().Factory()

	a, b := backendtest.Peer("a", 1), backendtest.Peer("b", 2)
	initiator := backendtest.Open(t, Factory, backend.Config{Self: a}, nil)
	target := backendtest.Open(t, Factory, backend.Config{Self: b}, nil)
	backendtest.Register(t, initiator, a, backendtest.Memfd(t, 1, 4096, 0))
	remote := backendtest.Register(t, target, b, backendtest.Memfd(t, 2, 4096, backend.RemoteWrite))

	sink := new(backendtest.Sink)
	endpoint := backendtest.Connect(t, initiator, a, b, target)
	session := backendtest.Bind(t, endpoint, 1, remote, sink)
	backendtest.Must(t, backendtest.Post(session, backend.Write, 7, backend.Segment{Length: 4096}))
	backendtest.Must(t, sink.Wait(t, 7).Err)
}

// Two ends are opened and connected, and move bytes. A test has a testing.TB, and so the shorter forms: Open, Register and
// Connect, Memfd for memory, and a Sink, which waits.
func Example() {
	factory := reference.NewNetwork().Factory()
	self, peer := backendtest.Peer("a", 1), backendtest.Peer("b", 2)
	initiator, err := backendtest.TryOpen(factory, backend.Config{Self: self}, backendtest.Options("window=8"))
	check(err)
	defer initiator.Close()
	target, err := backendtest.TryOpen(factory, backend.Config{Self: peer}, nil)
	check(err)
	defer target.Close()

	near, err := backendtest.NewMemfd(1, 4096, 0, 0)
	check(err)
	defer backendtest.FreeMemfd(near)
	far, err := backendtest.NewMemfd(2, 4096, backend.RemoteWrite, 0)
	check(err)
	defer backendtest.FreeMemfd(far)
	backendtest.Fill(near.Bytes, 1)

	endpoint, err := backendtest.TryConnect(initiator, self, peer, target)
	check(err)
	defer endpoint.Close()
	_, err = initiator.Register(context.Background(), near)
	check(err)
	key, err := target.Register(context.Background(), far)
	check(err)
	done := make(backendtest.Signal, 1)
	session, err := endpoint.Session(context.Background(), 1, backendtest.Describe(peer, far, key), done)
	check(err)
	check(backendtest.Post(session, backend.Write, 7, backend.Segment{Length: 4096}))
	check(<-done)
	fmt.Println(bytes.Equal(far.Bytes, backendtest.Filled(4096, 1)))
	// Output: true
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
