package rpc_test

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/null"
	pb "github.com/umbp/umbp/plugin-sdk/proto/backendpb"
	"github.com/umbp/umbp/plugin-sdk/rpc"
)

// counting is a null backend that counts how often it is asked.
type counting struct {
	backend.Backend
	asked atomic.Uint64
}

func (c *counting) Counters() []backend.Count {
	return []backend.Count{{Name: "asked", Value: c.asked.Add(1)}, {Name: "most", Value: 1<<64 - 1}, {Name: "none"}}
}

func countingFactory() backend.Factory {
	f := null.Factory
	open := f.Open
	f.Open = func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
		b, err := open(ctx, cfg)
		return &counting{Backend: b}, err
	}
	return f
}

func TestCounters(t *testing.T) {
	p, err := start(t.Context(), countingFactory(), backend.Config{Self: near}, setup{})
	if err != nil {
		t.Fatal(err)
	}
	for n := range uint64(2) {
		want := []backend.Count{{Name: "asked", Value: n + 1}, {Name: "most", Value: 1<<64 - 1}, {Name: "none"}}
		if got := p.Counters(); !slices.Equal(got, want) {
			t.Errorf("the counters are %v, want %v", got, want)
		}
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if got := p.Counters(); got != nil {
		t.Errorf("after Close the counters are %v", got)
	}
}

// TestCountsNothing: a backend need not count, and a plugin need not know of counters.
func TestCountsNothing(t *testing.T) {
	p, err := start(t.Context(), null.Factory, backend.Config{Self: near}, setup{})
	if err != nil {
		t.Fatal(err)
	}
	if got := p.Counters(); got != nil {
		t.Errorf("a backend that counts nothing has counters %v", got)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	old := openQueued(t, nil, 0) // which does not implement the call
	if got := old.Counters(); got != nil || old.Err() != nil {
		t.Errorf("a plugin that does not know the call has counters %v, and is broken: %v", got, old.Err())
	}
}

// silly is a plugin that answers with what it was told to, and without that not at all.
type silly struct {
	*calls
	reply *pb.CountersReply
}

func (s silly) Counters(ctx context.Context, _ *pb.CountersRequest) (*pb.CountersReply, error) {
	if s.reply == nil {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return s.reply, nil
}

// TestCountersThatMakeNoSense: a plugin without sound counters has none, and is not broken for it.
func TestCountersThatMakeNoSense(t *testing.T) {
	var many []*pb.Count
	for n := range 1001 {
		many = append(many, &pb.Count{Name: fmt.Sprint("n", n)})
	}
	for name, reply := range map[string]*pb.CountersReply{
		"no answer":      nil,
		"no name":        {Counts: []*pb.Count{{Name: "a"}, {Value: 1}}},
		"a bad name":     {Counts: []*pb.Count{{Name: "work requests"}}},
		"twice the same": {Counts: []*pb.Count{{Name: "a"}, {Name: "b"}, {Name: "a"}}},
		"too many":       {Counts: many},
	} {
		t.Run(name, func(t *testing.T) {
			raw := newCalls(pb.DataPath_DATA_PATH_STREAM, pb.MemoryAccess_MEMORY_ACCESS_MESSAGES)
			raw.transfers = func(s grpc.BidiStreamingServer[pb.HostFrame, pb.PluginFrame]) error {
				<-s.Context().Done()
				return nil
			}
			w, _ := rawWire(t, silly{raw, reply}, false)
			c, err := rpc.Open(t.Context(), rpc.Options{Name: "raw", Conn: w.conn, Config: backend.Config{Self: near}})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if got := c.Counters(); got != nil || c.Err() != nil {
				t.Errorf("the counters are %v, the client is broken: %v", got, c.Err())
			}
		})
	}
}
