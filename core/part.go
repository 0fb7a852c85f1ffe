package core

import (
	"context"
	"fmt"
	"time"

	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/dispatch"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/plan"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// part is a batch's business with one node. Each part goes its own way, from asking the node to settling with it,
// beside the others: a node that is slow, or silent, holds up its own keys and no others. A part writes to the
// batch's results and places of its own items only.
type part struct {
	batch *batch
	info  directory.Node
	node  *node
	err   error // of a call to the node, or of getting to know it

	items []uint32
	keys  []string
	sizes []uint64
	later []uint32 // items that found no staging memory, or no room in an answer
	again []uint32 // items that another node may take
	moved bool     // something was moved, or tried
	fence bool     // a write ended in doubt: the node must fence this process before it relies on the memory

	begun time.Time     // before the request was sent from which the node's promise counts
	ttl   time.Duration // of that promise

	runs    []plan.Run
	locals  []*region.Region
	remotes []*region.Descriptor
	planner plan.Planner
	job     dispatch.Job
	summed  []uint32 // items whose checksums are being made
	// unusable: a transfer may still be touching the part's memory. Neither the part nor the memory is used again.
	unusable bool

	allocated peer.AllocateReply
	commit    peer.CommitRequest
	committed peer.CommitReply
	abort     peer.AbortRequest
	resolved  peer.ResolveReply
	removed   peer.RemoveReply
}

// reset makes the part ready for another batch, and keeps its memory.
func (p *part) reset() {
	clear(p.keys[:cap(p.keys)])
	clear(p.locals[:cap(p.locals)])
	clear(p.remotes[:cap(p.remotes)])
	p.batch, p.info, p.node, p.err, p.fence, p.moved = nil, directory.Node{}, nil, nil, false, false
	p.items, p.keys, p.sizes = p.items[:0], p.keys[:0], p.sizes[:0]
	p.later, p.again, p.runs = p.later[:0], p.again[:0], p.runs[:0]
	p.locals, p.remotes = p.locals[:0], p.remotes[:0]
	p.commit.Slots, p.abort.Slots = p.commit.Slots[:0], p.abort.Slots[:0]
	p.allocated.Slots, p.resolved.Values = p.allocated.Slots[:0], p.resolved.Values[:0]
}

func (p *part) add(i uint32, item *Item) {
	p.items = append(p.items, i)
	p.keys = append(p.keys, item.Key)
	p.sizes = append(p.sizes, item.size())
}

// callTimeout bounds a call to a node that nothing has been promised for yet: a node that does not answer leaves time
// for another one.
const callTimeout = 5 * time.Second

// ask gets to know the part's node, and makes a call to it. The node's promises count from before the call.
func (p *part) ask(ctx context.Context, call func(ctx context.Context) error) {
	c := p.batch.client
	start := time.Now()
	defer func() { c.stats.control.Add(time.Since(start)) }()
	if p.node, p.err = c.node(ctx, p.info); p.err != nil {
		return
	}
	bounded := ctx
	if !p.node.local() {
		var cancel context.CancelFunc
		bounded, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	p.begun = time.Now()
	err := call(bounded)
	switch {
	case err == nil:
	case bounded.Err() != nil && ctx.Err() == nil: // the caller has not given up: the node is at fault
		p.lost(&backend.Error{Code: backend.PathDown, Peer: p.info.Peer, Text: fmt.Sprintf("no answer within %s", callTimeout), Err: err})
	default:
		p.lost(err)
	}
}

// lost notes that a call to the node failed. A node whose incarnation is gone is forgotten.
func (p *part) lost(err error) {
	p.err = err
	if backend.CodeOf(err) == backend.PeerGone {
		p.batch.client.forget(p.node)
	}
}

// short is the error of an answer that has not an entry for each thing that was asked about.
func (p *part) short(got, asked int, things string) error {
	return backend.Errorf(backend.Internal, "%s answered for %d %s of %d", p.node.peer, got, things, asked)
}

// addRuns enters the runs of one item. What a node says is checked against its own description: a run must lie in
// one of its regions, and the runs must make up the value.
func (p *part) addRuns(i uint32, runs []peer.Run, size uint64) error {
	at := &p.batch.places[i]
	local, offset, left := p.local(at.region), at.offset, size
	before := len(p.runs)
	for k := range runs {
		r := &runs[k]
		if err := p.checkRun(r, left, size); err != nil {
			p.runs = p.runs[:before]
			return err
		}
		// Filling in place saves the copy of a temporary, which costs more than all the rest.
		p.runs = append(p.runs, plan.Run{})
		run := &p.runs[len(p.runs)-1]
		run.Key, run.Local, run.Remote = i, local, r.Region
		run.LocalOffset, run.RemoteOffset, run.Length = offset, r.Offset, r.Length
		offset += r.Length
		left -= r.Length
	}
	if left != 0 {
		p.runs = p.runs[:before]
		return backend.Errorf(backend.Internal, "the node named runs of %d bytes for a value of %d", size-left, size)
	}
	return nil
}

func (p *part) checkRun(r *peer.Run, left, size uint64) error {
	if int(r.Region) >= len(p.remotes) {
		return backend.Errorf(backend.Internal, "the node named its region %d, and has %d", r.Region, len(p.remotes))
	}
	if have := p.remotes[r.Region].Size; r.Offset > have || r.Length > have-r.Offset {
		return backend.Errorf(backend.Internal, "the node named range [%d, +%d) of a region of %d bytes", r.Offset, r.Length, have)
	}
	if r.Length == 0 || r.Length > left {
		return backend.Errorf(backend.Internal, "the node named runs that do not make up the value's %d bytes", size)
	}
	return nil
}

// meetRegions enters the regions of the part's node.
func (p *part) meetRegions() {
	for i := range p.node.regions {
		p.remotes = append(p.remotes, &p.node.regions[i])
	}
}

// local returns the number of a local region. A batch has few: most often one.
func (p *part) local(r *region.Region) uint32 {
	for i := len(p.locals) - 1; i >= 0; i-- {
		if p.locals[i] == r {
			return uint32(i)
		}
	}
	p.locals = append(p.locals, r)
	return uint32(len(p.locals) - 1)
}

var errOutlived = fmt.Errorf("the node holds the memory no longer than this: %w", context.DeadlineExceeded)

// move plans and carries out the part's runs, no longer than the node's promise lasts, and enters into the results
// which way the items went and which failed.
func (p *part) move(ctx context.Context, name string, op backend.Op) {
	if len(p.runs) == 0 {
		return
	}
	c := p.batch.client
	start := time.Now()
	planned, err := p.plan(op)
	c.stats.plan.Add(time.Since(start))
	if err != nil {
		// The items' own memory does not overlap: that has been looked at. It is the node that names the same place
		// twice, and nothing of what it says is to be believed.
		p.failRuns(name, Failed, &backend.Error{Code: backend.Internal, Op: "plan", Peer: p.info.Peer, Err: err})
		return
	}
	p.moved = true
	p.job.Plan, p.job.Locals, p.job.Remotes = planned, p.locals, p.remotes
	p.job.Deadline, p.job.DeadlineCause = p.begun.Add(p.ttl), errOutlived
	err = c.engine.dispatcher.Run(ctx, &p.job)
	c.stats.dispatch.Add(p.job.Dispatching)
	c.stats.move.Add(p.job.Moving)
	c.stats.segments.Add(uint64(len(planned.Segments)))
	c.stats.runs.Add(uint64(len(p.runs)))
	if err != nil {
		p.unusable = true
		p.failRuns(name, InDoubt, err)
		return
	}
	p.settle(name, planned)
}

func (p *part) plan(op backend.Op) (*plan.Plan, error) {
	c := p.batch.client
	if c.opts.PerPage > 0 {
		return p.planner.PerPage(op, p.runs, c.opts.PerPage)
	}
	return p.planner.Plan(op, p.runs, c.engine.dispatcher.Limits())
}

func (p *part) failRuns(name string, status Status, err error) {
	for k := range p.runs {
		i := p.runs[k].Key
		p.batch.fail(name, i, err)
		p.batch.results[i].Status = status
	}
}

// settle enters what became of the groups into the results.
func (p *part) settle(name string, planned *plan.Plan) {
	b := p.batch
	var transfers uint64
	for g := range p.job.Results {
		r, group := &p.job.Results[g], &planned.Groups[g]
		transfers += uint64(r.Attempts)
		p.fence = p.fence || r.Fence
		path := Path{Node: p.info.Peer.Node, Attempts: int(r.Attempts)}
		if r.Backend >= 0 {
			path.Backend = b.client.engine.backends[r.Backend].Name
		}
		for s := group.First; s < group.First+group.Count; s++ {
			done := p.job.Outcomes[s] == backend.Done
			for _, i := range planned.Keys(s) {
				result := &b.results[i]
				path.Staged = b.places[i].staged
				result.Path = path
				if !done && result.Err == nil {
					b.fail(name, i, r.Err)
				}
			}
		}
	}
	b.client.stats.transfers.Add(transfers)
}
