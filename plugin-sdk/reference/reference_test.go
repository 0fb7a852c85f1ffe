package reference_test

import (
	"context"
	"errors"
	"testing"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/conformance"
	"github.com/umbp/umbp/plugin-sdk/reference"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConformance(t *testing.T) {
	conformance.Run(t, conformance.Harness{Factory: reference.NewNetwork().Factory()})
}

func TestConformanceSmallWindow(t *testing.T) {
	conformance.Run(t, conformance.Harness{
		Factory: reference.NewNetwork().Factory(), Options: map[string]string{"window": "2"},
	})
}

// TestPair moves bytes both ways over a pair.
func TestPair(t *testing.T) {
	near, far := []byte("0123456789"), []byte("abcdefghij")
	session, sink := bind(t, near, far)
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		err := session.Post(backend.Transfer{
			Op: op, Cookie: uint64(op), Segments: []backend.Segment{{Local: 2, Remote: 5, Length: 3}},
		})
		if err != nil {
			t.Fatal(err)
		}
		if c := <-sink.done; c.Err != nil || c.Cookie != uint64(op) {
			t.Fatalf("%v completed with %+v", op, c)
		}
		copy(near, "xxxxxxxxxx")
	}
	if string(far) != "abcde234ij" || string(near) != "xxxxxxxxxx" {
		t.Errorf("near %q, far %q", near, far)
	}
}

func TestOpenTwice(t *testing.T) {
	factory := reference.NewNetwork().Factory()
	options, err := backend.CheckOptions(factory.Options, nil)
	if err != nil {
		t.Fatal(err)
	}
	cfg := backend.Config{Self: backend.Peer{Node: "n", Incarnation: 3}, Options: options}
	first, err := factory.Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := factory.Open(context.Background(), cfg); !errors.Is(err, backend.ErrBadRequest) {
		t.Errorf("the same incarnation twice: %v, want BadRequest", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := factory.Open(context.Background(), cfg)
	if err != nil {
		t.Fatalf("after Close: %v", err)
	}
	again.Close()
}

// TestWaitsEndWithTheContext holds a completion up, as a host must not, and sees what waits for it give up.
func TestWaitsEndWithTheContext(t *testing.T) {
	pair, session, sink := bindPair(t, make([]byte, 8), make([]byte, 8))
	sink.hold = make(chan struct{})
	if err := session.Post(backend.Transfer{Op: backend.Write, Segments: []backend.Segment{{Length: 8}}}); err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for what, wait := range map[string]func(context.Context) error{
		"Deregister near": func(ctx context.Context) error { return pair.Initiator.Deregister(ctx, 1) },
		"Deregister far":  func(ctx context.Context) error { return pair.Target.Deregister(ctx, 1) },
		"Fence":           func(ctx context.Context) error { return pair.Target.Fence(ctx, pair.InitiatorPeer) },
	} {
		if err := wait(ended); !errors.Is(err, backend.ErrCancelled) || !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v, want Cancelled, because of the context", what, err)
		}
	}
	close(sink.hold)
	for range 2 { // what was given up is done by calling again
		for _, b := range []backend.Backend{pair.Initiator, pair.Target} {
			if err := b.Deregister(context.Background(), 1); err != nil {
				t.Error(err)
			}
		}
	}
	<-sink.done
}

// TestNoAllocation posts and completes on a warm endpoint.
func TestNoAllocation(t *testing.T) {
	session, sink := bind(t, make([]byte, 64), make([]byte, 64))
	segments := []backend.Segment{{Length: 8}, {Local: 16, Remote: 16, Length: 8}}
	transfer := func() {
		if err := session.Post(backend.Transfer{Op: backend.Write, Segments: segments}); err != nil {
			t.Fatal(err)
		}
		<-sink.done
	}
	for range 64 {
		transfer() // every slot of the window once
	}
	if n := testing.AllocsPerRun(200, transfer); n != 0 {
		t.Errorf("%v allocations for one transfer, want none", n)
	}
}

type sink struct {
	done chan backend.Completion
	hold chan struct{}
}

func (s *sink) Complete(c backend.Completion) {
	if s.hold != nil {
		<-s.hold
	}
	s.done <- c
}

func bind(t *testing.T, near, far []byte) (backend.Session, *sink) {
	t.Helper()
	_, session, sink := bindPair(t, near, far)
	return session, sink
}

// bindPair lends each end of a new pair its memory as region 1, and binds the two.
func bindPair(t *testing.T, near, far []byte) (*reference.Pair, backend.Session, *sink) {
	t.Helper()
	ctx := context.Background()
	pair, err := reference.NewPair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pair.Close(); err != nil {
			t.Error(err)
		}
	})
	memory := backend.Memory{Region: 1, Kind: backend.HostMemory, Bytes: near, FD: -1}
	if _, err := pair.Initiator.Register(ctx, memory); err != nil {
		t.Fatal(err)
	}
	memory.Bytes, memory.Rights = far, backend.RemoteRead|backend.RemoteWrite
	key, err := pair.Target.Register(ctx, memory)
	if err != nil {
		t.Fatal(err)
	}
	s := &sink{done: make(chan backend.Completion, 1)}
	session, err := pair.Endpoint.Session(ctx, 1, backend.Remote{
		Peer: pair.TargetPeer, Region: 1, Kind: backend.HostMemory, Rights: memory.Rights, Size: uint64(len(far)), Key: key,
	}, s)
	if err != nil {
		t.Fatal(err)
	}
	return pair, session, s
}
