package null_test

import (
	"context"
	"runtime"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/conformance"
	"github.com/umbp/umbp/plugin-sdk/null"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestConformance tries the rules of the near end: there is no other.
func TestConformance(t *testing.T) {
	conformance.Run(t, conformance.Harness{Factory: null.Factory, NearEndOnly: true})
}

func TestSaysThatItIsSimulated(t *testing.T) {
	b := open(t, nil)
	info := b.Info()
	if !info.Capabilities.Simulated {
		t.Error("Capabilities.Simulated is false: a benchmark would report bytes that never moved")
	}
	if want := "1 (moves no bytes)"; info.Version != want {
		t.Errorf("Version = %q, want %q", info.Version, want)
	}
	if info.Capabilities.Window != 32768 {
		t.Errorf("Window = %d, want the default of 32768", info.Capabilities.Window)
	}
}

// TestMovesNoBytes reads and writes, and finds the memory of this side as it was.
func TestMovesNoBytes(t *testing.T) {
	_, session, sink, memory := connect(t)
	for i := range memory {
		memory[i] = byte(i)
	}
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		if err := session.Post(backend.Transfer{Op: op, Segments: whole}); err != nil {
			t.Fatal(err)
		}
	}
	for sink.n.Load() < 2 {
		runtime.Gosched()
	}
	for i := range memory {
		if memory[i] != byte(i) {
			t.Fatalf("byte %d changed", i)
		}
	}
}

// TestGPUMemory: a region of a GPU is as large as its range says, and one that contradicts itself is refused.
func TestGPUMemory(t *testing.T) {
	b := open(t, nil)
	memory := func(id backend.RegionID) backend.Memory {
		return backend.Memory{Region: id, Kind: backend.GPUMemory, FD: -1, GPU: &backend.GPURange{
			Runtime: "hip", Device: "0000:c1:00.0", Address: 1 << 46, Size: 100, Allocation: 4096, Offset: 512,
		}}
	}
	if _, err := b.Register(t.Context(), memory(1)); err != nil {
		t.Fatal(err)
	}
	session, sink := connectTo(t, b)
	for _, c := range []struct {
		segment backend.Segment
		code    backend.Code
	}{
		{backend.Segment{Length: 100}, 0}, {backend.Segment{Local: 1, Length: 100}, backend.BadRequest},
		{backend.Segment{Local: 100, Length: 1}, backend.BadRequest}, {backend.Segment{Local: 1<<64 - 1, Length: 2}, backend.BadRequest},
	} {
		if err := session.Post(backend.Transfer{Op: backend.Read, Segments: []backend.Segment{c.segment}}); backend.CodeOf(err) != c.code {
			t.Errorf("%+v: %v, want code %d", c.segment, err, c.code)
		}
	}
	if sink.n.Load() != 1 {
		t.Errorf("%d transfers have completed, want 1", sink.n.Load())
	}
	for name, change := range map[string]func(*backend.Memory){
		"no range":      func(m *backend.Memory) { m.GPU = nil },
		"no size":       func(m *backend.Memory) { m.GPU.Size = 0 },
		"beyond":        func(m *backend.Memory) { m.GPU.Offset = 4000 },
		"of the host":   func(m *backend.Memory) { m.Kind = backend.HostMemory },
		"with bytes":    func(m *backend.Memory) { m.Bytes = make([]byte, 100) },
		"without an id": func(m *backend.Memory) { m.Region = 0 },
	} {
		m := memory(2)
		change(&m)
		if _, err := b.Register(t.Context(), m); backend.CodeOf(err) != backend.BadRequest {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestNoAllocation posts and completes on a warm endpoint.
func TestNoAllocation(t *testing.T) {
	_, session, sink, _ := connect(t)
	var want int64
	allocs := testing.AllocsPerRun(100, func() {
		want++
		if err := session.Post(backend.Transfer{Op: backend.Write, Segments: whole}); err != nil {
			t.Fatal(err)
		}
		for sink.n.Load() < want {
			runtime.Gosched()
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations for one transfer, want none", allocs)
	}
}

// BenchmarkPostComplete is the cost of one transfer of one segment, posted and completed, in rounds of half the
// window: post 16384 in a row, then wait until all have completed.
func BenchmarkPostComplete(b *testing.B) {
	const round = 16384
	_, session, sink, _ := connect(b)
	b.ReportAllocs()
	posted := int64(0)
	for posted < int64(b.N) {
		for range min(round, int64(b.N)-posted) {
			if err := session.Post(backend.Transfer{Op: backend.Write, Segments: whole, Cookie: uint64(posted)}); err != nil {
				b.Fatal(err)
			}
			posted++
		}
		for sink.n.Load() < posted {
			runtime.Gosched()
		}
	}
}

// BenchmarkPost128 is one transfer of 128 segments: what checking costs.
func BenchmarkPost128(b *testing.B) {
	_, session, sink, _ := connect(b)
	segments := make([]backend.Segment, 128)
	for i := range segments {
		segments[i] = backend.Segment{Local: uint64(i) * 8, Remote: uint64(i) * 8, Length: 8}
	}
	b.ReportAllocs()
	for posted := int64(0); posted < int64(b.N); {
		if session.Post(backend.Transfer{Op: backend.Write, Segments: segments}) == nil {
			posted++
		} else {
			runtime.Gosched()
		}
	}
	for sink.n.Load() < int64(b.N) {
		runtime.Gosched()
	}
}

var whole = []backend.Segment{{Length: 4096}}

type counter struct{ n atomic.Int64 }

func (c *counter) Complete(done backend.Completion) {
	if done.Err != nil {
		panic(done.Err)
	}
	c.n.Add(1)
}

var self = backend.Peer{Node: "a", Incarnation: 1}

func open(tb testing.TB, raw map[string]string) backend.Backend {
	tb.Helper()
	options, err := backend.CheckOptions(null.Factory.Options, raw)
	if err != nil {
		tb.Fatal(err)
	}
	b, err := null.Factory.Open(context.Background(), backend.Config{Self: self, Options: options})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { b.Close() })
	return b
}

func connect(tb testing.TB) (backend.Backend, backend.Session, *counter, []byte) {
	tb.Helper()
	b := open(tb, nil)
	memory := make([]byte, 4096)
	if _, err := b.Register(context.Background(), backend.Memory{Region: 1, Kind: backend.HostMemory, Bytes: memory, FD: -1}); err != nil {
		tb.Fatal(err)
	}
	session, sink := connectTo(tb, b)
	return b, session, sink, memory
}

// connectTo opens a session from region 1 to one of another peer.
func connectTo(tb testing.TB, b backend.Backend) (backend.Session, *counter) {
	tb.Helper()
	ctx := context.Background()
	sink, peer := &counter{}, backend.Peer{Node: "b", Incarnation: 2}
	handshake, err := b.Offer(ctx, peer)
	if err != nil {
		tb.Fatal(err)
	}
	answer, err := b.Answer(ctx, self, handshake.Offer())
	if err != nil {
		tb.Fatal(err)
	}
	endpoint, err := handshake.Establish(ctx, answer)
	if err != nil {
		tb.Fatal(err)
	}
	session, err := endpoint.Session(ctx, 1, backend.Remote{
		Peer: peer, Region: 7, Kind: backend.HostMemory, Rights: backend.RemoteRead | backend.RemoteWrite, Size: 4096,
	}, sink)
	if err != nil {
		tb.Fatal(err)
	}
	return session, sink
}
