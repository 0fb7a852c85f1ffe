package dispatch_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/umbp/umbp/core/dispatch"
	"github.com/umbp/umbp/core/plan"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/fault"
	"github.com/umbp/umbp/plugin-sdk/reference"
)

// opened is a process of a test: its backends, by name, and one registered region.
type opened struct {
	self     backend.Peer
	names    []string
	backends map[string]backend.Backend
	region   *region.Region
}

func openAll(tb testing.TB, node string, size int, options map[string]string, factories ...backend.Factory) *opened {
	tb.Helper()
	o := &opened{self: backend.Peer{Node: node, Incarnation: region.NewIncarnation()}, backends: map[string]backend.Backend{}}
	o.region = &region.Region{
		ID: 1, Kind: backend.HostMemory, Rights: backend.RemoteRead | backend.RemoteWrite, Bytes: make([]byte, size), FD: -1,
		Keys: map[string][]byte{},
	}
	for _, f := range factories {
		values, err := backend.CheckOptions(f.Options, options)
		if err != nil {
			tb.Fatal(err)
		}
		b, err := f.Open(context.Background(), backend.Config{Self: o.self, Options: values})
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { b.Close() })
		o.names = append(o.names, f.Name)
		o.backends[f.Name] = b
		if o.region.Keys[f.Name], err = b.Register(context.Background(), o.region.Memory()); err != nil {
			tb.Fatal(err)
		}
	}
	return o
}

// dispatcher makes a dispatcher of o's that reaches the others.
func (o *opened) dispatcher(tb testing.TB, others ...*opened) *dispatch.Dispatcher {
	opts := dispatch.Options{ConnectTimeout: patience, QuietTimeout: patience, Carry: func(ctx context.Context, to backend.Peer, name string, offer []byte) ([]byte, map[backend.RegionID][]byte, error) {
		i := slices.IndexFunc(others, func(o *opened) bool { return o.self == to })
		answer, err := others[i].backends[name].Answer(ctx, o.self, offer)
		return answer, nil, err
	}}
	var known []selector.Backend
	for _, name := range o.names {
		b := o.backends[name]
		opts.Backends = append(opts.Backends, dispatch.Backend{Name: name, Backend: b})
		known = append(known, selector.Backend{Name: name, Info: b.Info()})
	}
	opts.Select = selector.New(o.self, known, []selector.Rule{{Require: o.names}})
	d := dispatch.New(opts)
	tb.Cleanup(d.Close)
	return d
}

// TestFaultyBackend runs many jobs at once over a backend that fails in every way that the contract allows, with a
// good one behind it. Every job ends well, and every byte is where it belongs.
func TestFaultyBackend(t *testing.T) {
	script, err := fault.Parse("session:off->error(pathdown)->1*error(denied); " +
		"post:5*off->3*busy->10*off->error(denied)->20*off->error(internal)->30*off->5*kill; " +
		"complete:10*off->2*partial(1)->10*off->dup->10*off->kill->30*off->error(internal)->20*delay(100us)->partial(0)->dup")
	if err != nil {
		t.Fatal(err)
	}
	faulty, good := reference.NewNetwork().Factory(), reference.NewNetwork().Factory()
	faulty.Name, good.Name = "faulty", "good"
	const workers, rounds, part = 8, 20, 64 << 10
	window := map[string]string{"window": "3"}
	target := openAll(t, "target", workers*part, window, faulty, good)
	client := openAll(t, "client", 2*workers*part, window, fault.WrapFactory(faulty, script), good)
	d := client.dispatcher(t, target)

	deadline := time.Now().Add(patience)
	tried := func() bool {
		return script.Fired(fault.Post) >= 6 && script.Fired(fault.Complete) >= 30 && d.Counters(1).Bytes.Load() > 0
	}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			descriptor := target.region.Descriptor(target.self)
			j := &dispatch.Job{Locals: []*region.Region{client.region}, Remotes: []*region.Descriptor{&descriptor}}
			var planner plan.Planner
			rnd := rand.New(rand.NewPCG(uint64(w), 7))
			// What is written lies in the first half of the client's memory, what is read in the second.
			sent := client.region.Bytes[w*part : (w+1)*part]
			got := client.region.Bytes[(workers+w)*part:][:part]
			// The outages that the faults lead to last for a while, in which the good backend carries everything.
			for round := 0; round < rounds || !tried() && time.Now().Before(deadline); round++ {
				for i := range sent {
					sent[i] = byte(rnd.Uint32())
				}
				for _, op := range []backend.Op{backend.Write, backend.Read} {
					local := uint64(w * part)
					if op == backend.Read {
						local = uint64((workers + w) * part)
					}
					if err := run(t, d, j, &planner, op, local, uint64(w*part), part, rnd); err != nil {
						t.Errorf("worker %d, round %d, %v: %v", w, round, op, err)
						return
					}
				}
				if !bytes.Equal(sent, got) {
					t.Errorf("worker %d, round %d: what came back is not what was written", w, round)
					return
				}
			}
		})
	}
	wg.Wait()
	if !tried() {
		t.Errorf("%d faults at post, %d at completions, %d bytes by the good backend: the test has not tried what it should",
			script.Fired(fault.Post), script.Fired(fault.Complete), d.Counters(1).Bytes.Load())
	}
}

// run moves part bytes in shuffled pieces, planned into small groups.
func run(t *testing.T, d *dispatch.Dispatcher, j *dispatch.Job, planner *plan.Planner, op backend.Op, local, remote uint64, size uint64, rnd *rand.Rand) error {
	const piece = 4 << 10
	var runs []plan.Run
	for _, n := range rnd.Perm(int(size / piece)) {
		at := uint64(n) * piece
		runs = append(runs, plan.Run{Key: uint32(n), LocalOffset: local + at, RemoteOffset: remote + at, Length: piece})
	}
	p, err := planner.Plan(op, runs, backend.Limits{Segments: 3, SegmentBytes: 3 << 10})
	if err != nil {
		return err
	}
	j.Plan = p
	if err := d.Run(t.Context(), j); err != nil {
		return err
	}
	for i, r := range j.Results {
		if r.Err != nil {
			return fmt.Errorf("group %d after %d attempts: %w", i, r.Attempts, r.Err)
		}
	}
	if i := slices.IndexFunc(j.Outcomes, func(o backend.Outcome) bool { return o != backend.Done }); i >= 0 {
		return fmt.Errorf("no error, and segment %d is %v", i, j.Outcomes[i])
	}
	return nil
}

// TestManyJobsOneWindow is for the race detector: jobs of many goroutines, half of them cancelled on the way, share
// the window of one endpoint.
func TestManyJobsOneWindow(t *testing.T) {
	window := map[string]string{"window": "2"}
	factory := reference.NewNetwork().Factory()
	target := openAll(t, "target", 1<<20, window, factory)
	client := openAll(t, "client", 1<<20, window, factory)
	d := client.dispatcher(t, target)
	descriptor := target.region.Descriptor(target.self)
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			p := &plan.Plan{Op: backend.Write}
			for g := range 8 {
				at := uint64((w*8 + g) * 4096)
				p.Groups = append(p.Groups, plan.Group{First: g, Count: 1, Bytes: 4096})
				p.Segments = append(p.Segments, backend.Segment{Local: at, Remote: at, Length: 4096})
			}
			j := &dispatch.Job{Plan: p, Locals: []*region.Region{client.region}, Remotes: []*region.Descriptor{&descriptor}}
			for round := range 50 {
				ctx, cancel := context.WithCancel(t.Context())
				if w%2 == 0 {
					go cancel()
				}
				if err := d.Run(ctx, j); err != nil {
					t.Errorf("round %d: %v", round, err)
				}
				for i, r := range j.Results {
					if (r.Err == nil) != (j.Outcomes[i] == backend.Done) || r.Err != nil && w%2 != 0 {
						t.Errorf("round %d, group %d: %v, and %v", round, i, j.Outcomes[i], r.Err)
					}
				}
				cancel()
			}
		})
	}
	wg.Wait()
}

// TestWarmJobAllocatesNothing runs a job whose groups exceed the window, so that the queue is used, too.
func TestWarmJobAllocatesNothing(t *testing.T) {
	factory := reference.NewNetwork().Factory()
	client := openAll(t, "client", 1<<20, map[string]string{"window": "16"}, factory)
	target := openAll(t, "target", 1<<20, nil, factory)
	d := client.dispatcher(t, target)
	descriptor := target.region.Descriptor(target.self)
	p := &plan.Plan{Op: backend.Write}
	for g := range 64 {
		p.Groups = append(p.Groups, plan.Group{First: g, Count: 1, Bytes: 4096})
		p.Segments = append(p.Segments, backend.Segment{Local: uint64(g * 4096), Remote: uint64(g * 4096), Length: 4096})
	}
	j := &dispatch.Job{Plan: p, Locals: []*region.Region{client.region}, Remotes: []*region.Descriptor{&descriptor}}
	allocs := testing.AllocsPerRun(50, func() {
		if err := d.Run(context.Background(), j); err != nil || j.Results[63].Err != nil {
			t.Fatal(err, j.Results[63].Err)
		}
	})
	if allocs != 0 {
		t.Errorf("a warm job of 64 groups makes %v allocations, want none", allocs)
	}
}
