package core

import (
	"sync/atomic"
	"time"
)

// op is what a call does, as metrics name it.
type op uint8

const (
	opPut op = iota
	opGet
	opExists
	opRemove
	opStat
	ops = iota
)

var opNames = [ops]string{"put", "get", "exists", "remove", "stat"}

func (o op) String() string { return opNames[o] }

// nanos is a sum of durations.
type nanos struct{ n atomic.Int64 }

func (n *nanos) Add(d time.Duration) { n.n.Add(int64(d)) }

// Stats counts what a client has done. The fields are added to once for each batch.
type Stats struct {
	control, plan, dispatch, move, verify, staging nanos

	runs, segments, transfers atomic.Uint64
	bytes                     [ops]atomic.Uint64
	stagedBytes, unsummed     atomic.Uint64
	batches                   [ops]atomic.Uint64
	results                   [ops][len(statusNames)]atomic.Uint64
}

func (s *Stats) finish(o op, items []Item, results []Result) {
	var byStatus [len(statusNames)]uint64
	var bytes, unsummed uint64
	for i := range results {
		r := &results[i]
		byStatus[r.Status]++
		if r.Status == Stored || r.Status == Found {
			bytes += r.Size
			if !items[i].addressable() {
				unsummed++
			}
		}
	}
	s.batches[o].Add(1)
	s.bytes[o].Add(bytes)
	s.unsummed.Add(unsummed)
	for status, n := range byStatus {
		if n > 0 {
			s.results[o][status].Add(n)
		}
	}
}

// Snapshot is the state of a client's counters at one moment. Differences between two of them say what happened in
// between.
type Snapshot struct {
	// Where the time of batches went: calls to the directory and to nodes; planning; selecting, looking up sessions
	// and posting; waiting for backends; checksums, and copying values out of the staging memory; copying values into
	// it. The parts of a batch that go to several nodes run beside each other, and their times are added up.
	Control, Plan, Dispatch, Move, Verify, Staging time.Duration

	Runs, Segments, Transfers uint64
	StagedBytes               uint64
	// Unsummed counts the values stored or found in memory that the processor cannot address: no checksum of them was made
	// or compared.
	Unsummed uint64
	Ops      []OpSnapshot
}

// OpSnapshot is the part of a Snapshot that is about one operation.
type OpSnapshot struct {
	Op      string
	Batches uint64
	Bytes   uint64            // of values stored or found
	Results map[Status]uint64 // keys, by what became of them
}

// Stats returns the client's counters.
func (c *PoolClient) Stats() Snapshot {
	s := &c.stats
	snap := Snapshot{
		Control: time.Duration(s.control.n.Load()), Plan: time.Duration(s.plan.n.Load()),
		Dispatch: time.Duration(s.dispatch.n.Load()), Move: time.Duration(s.move.n.Load()),
		Verify: time.Duration(s.verify.n.Load()), Staging: time.Duration(s.staging.n.Load()),
		Runs: s.runs.Load(), Segments: s.segments.Load(), Transfers: s.transfers.Load(),
		StagedBytes: s.stagedBytes.Load(), Unsummed: s.unsummed.Load(),
	}
	for o := range ops {
		by := OpSnapshot{Op: opNames[o], Batches: s.batches[o].Load(), Bytes: s.bytes[o].Load(), Results: map[Status]uint64{}}
		for status := range statusNames {
			if n := s.results[o][status].Load(); n > 0 {
				by.Results[Status(status)] = n
			}
		}
		snap.Ops = append(snap.Ops, by)
	}
	return snap
}
