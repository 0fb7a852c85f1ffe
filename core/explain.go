package core

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/plan"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Explanation says what a batch would do: the same plan and the same choices that the batch itself would make,
// without moving a byte.
type Explanation struct {
	*plan.Explanation
	// Assumed says that the remote places are made up: no memory has been reserved, and each node is taken to have
	// one free run at the start of its pool.
	Assumed bool `json:"assumed_places"`
	// Left names the keys that would not move, with the reason.
	Left []LeftKey `json:"left_out,omitempty"`
}

// ExplainOptions say what is explained, and how much of it is spelled out. The zero value explains a buffer in host memory,
// in full.
type ExplainOptions struct {
	// Place is where the caller's buffer would lie: the PCI address of a GPU, as in backend.Link, or nothing for host
	// memory.
	Place string
	// Limit bounds the groups, segments and keys that are spelled out; zero means all.
	Limit int
}

// LeftKey is a key that would not move.
type LeftKey struct {
	Key    string `json:"key"`
	Reason string `json:"reason"`
}

// WriteText writes the explanation for people.
func (e *Explanation) WriteText(w io.Writer) error {
	if err := e.Explanation.WriteText(w); err != nil {
		return err
	}
	var b strings.Builder
	if e.Assumed {
		b.WriteString("\nnothing was reserved: each node is taken to have one free run at the start of its pool\n")
	}
	for _, k := range e.Left {
		fmt.Fprintf(&b, "\n%q does not move: %s\n", k.Key, k.Reason)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// ExplainGet explains how the values of the keys would be read into one registered buffer, one after the other.
func (c *PoolClient) ExplainGet(ctx context.Context, keys []string, opts ExplainOptions) (*Explanation, error) {
	return c.explain(ctx, keys, nil, opts)
}

// ExplainPut explains how values of the sizes given would be written from one registered buffer, one after the
// other.
func (c *PoolClient) ExplainPut(ctx context.Context, keys []string, sizes []uint64, opts ExplainOptions) (*Explanation, error) {
	if len(sizes) != len(keys) {
		return nil, backend.Errorf(backend.BadRequest, "%d keys and %d sizes", len(keys), len(sizes))
	}
	return c.explain(ctx, keys, sizes, opts)
}

func (c *PoolClient) explain(ctx context.Context, keys []string, sizes []uint64, opts ExplainOptions) (*Explanation, error) {
	if len(keys) > peer.MaxKeys {
		return nil, backend.Errorf(backend.BadRequest, "%d keys are more than the %d that can be explained at once", len(keys), peer.MaxKeys)
	}
	if !backend.ValidPlace(opts.Place) {
		return nil, backend.Errorf(backend.BadRequest, "%.*q is no place of memory: write the PCI address of a GPU", backend.MaxPlace, opts.Place)
	}
	ctx, end, err := c.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	items := make([]Item, len(keys))
	for i, key := range keys {
		items[i].Key = key
	}
	results := make([]Result, len(items))
	b := c.newBatch(items, results)
	defer b.recycle()
	b.check("explain")
	op := backend.Read
	if sizes == nil {
		b.explainPlaces(ctx, opts.Place)
	} else {
		op = backend.Write
		if err := b.assumePlaces(ctx, sizes, opts.Place); err != nil {
			return nil, err
		}
	}
	e := &Explanation{Explanation: &plan.Explanation{Op: op.String(), Shown: []plan.ExplainedGroup{}}, Assumed: sizes != nil}
	for _, p := range b.parts {
		if len(p.runs) > 0 {
			p.explain(e.Explanation, op, opts.Limit)
		}
	}
	for i, r := range results {
		switch {
		case r.Err != nil:
			e.Left = append(e.Left, LeftKey{keys[i], r.Err.Error()})
		case r.Status == Missing, r.Status == Exists:
			e.Left = append(e.Left, LeftKey{keys[i], "it " + map[Status]string{Missing: "is not in the pool", Exists: "is in the pool already"}[r.Status]})
		}
	}
	return e, nil
}

// explain adds the part's plan, and the choice for each of its groups, to the explanation.
func (p *part) explain(e *plan.Explanation, op backend.Op, limit int) {
	planned, err := p.plan(op)
	if err != nil {
		p.failRuns("explain", Failed, err)
		return
	}
	add := planned.Explain(p.names(), limit)
	for g := range add.Shown {
		p.explainChoice(&add.Shown[g], &planned.Groups[g], op)
	}
	e.Bytes += add.Bytes
	e.Runs += add.Runs
	e.Segments += add.Segments
	e.Groups += add.Groups
	e.Shown = append(e.Shown, add.Shown...)
	if limit > 0 && len(e.Shown) > limit {
		e.Shown = e.Shown[:limit]
	}
	e.MoreGroups = e.Groups - len(e.Shown)
}

// buffer stands for a buffer at a place, registered with every backend of the process.
func (b *batch) buffer(at string) *region.Region {
	r := &region.Region{Kind: backend.HostMemory, Keys: map[string][]byte{}}
	if at != "" {
		r.Kind, r.GPU = backend.GPUMemory, &backend.GPURange{Device: at}
	}
	for _, be := range b.client.engine.backends {
		if be.Backend != nil {
			r.Keys[be.Name] = nil
		}
	}
	return r
}

// explainPlaces enters the runs of values that are in the pool, for a buffer at a place.
func (b *batch) explainPlaces(ctx context.Context, at string) {
	if !b.locateParts(ctx, "explain", b.todo) {
		return
	}
	b.eachPart(func(p *part) { p.resolve(ctx, "explain") })
	local, offset := b.buffer(at), uint64(0)
	for _, p := range b.parts {
		b.failAll("explain", p.later, backend.Errorf(backend.Busy, "the node's answer had no room for it: explain fewer keys at once"))
		if p.node == nil || p.err != nil {
			continue
		}
		p.meetRegions()
		for k, i := range p.items {
			v := &p.resolved.Values[k]
			if v.Status != peer.OK || b.results[i].Err != nil {
				continue
			}
			b.places[i] = place{region: local, offset: offset}
			offset += v.Size
			if err := p.addRuns(i, p.resolved.Runs[v.FirstRun:v.FirstRun+v.RunCount], v.Size); err != nil {
				b.fail("explain", i, err)
			}
		}
		p.releaseSoon(ctx)
	}
}

// assumePlaces enters runs for values that are not in the pool, where the directory would place them, for a buffer at a
// place.
func (b *batch) assumePlaces(ctx context.Context, sizes []uint64, at string) error {
	b.wave = append(b.wave[:0], b.todo...)
	if err := b.askPlaces(ctx, func(i uint32) uint64 { return sizes[i] }); err != nil {
		return err
	}
	b.newParts(b.place.Nodes)
	for k, i := range b.wave {
		switch at := b.place.Placements[k]; {
		case at.Exists:
			b.results[i].Status = Exists
		case at.Node == directory.NoNode:
			b.fail("explain", i, backend.Errorf(backend.Busy, "no node can hold %d bytes", sizes[i]))
		default:
			b.parts[at.Node].add(i, &b.items[i])
		}
	}
	b.eachPart(func(p *part) { p.ask(ctx, func(context.Context) error { return nil }) })
	local, offset := b.buffer(at), uint64(0)
	for _, p := range b.parts {
		if p.err != nil {
			b.failAll("explain", p.items, p.err)
			continue
		}
		if len(p.items) > 0 {
			p.meetRegions()
		}
		var next uint64
		for _, i := range p.items {
			b.places[i] = place{region: local, offset: offset}
			if err := p.addRuns(i, []peer.Run{{Offset: next, Length: sizes[i]}}, sizes[i]); err != nil {
				b.fail("explain", i, err)
				continue
			}
			offset += sizes[i]
			next += sizes[i]
		}
	}
	return nil
}

func (p *part) names() plan.Names {
	return plan.Names{
		Local: func(n uint32) string {
			if at := p.locals[n].Place(); at != "" {
				return "buffer on GPU " + at
			}
			return "buffer"
		},
		Remote: func(n uint32) string {
			return fmt.Sprintf("%s region %d", p.remotes[n].Peer.Node, p.remotes[n].ID)
		},
		Key: func(n uint32) string { return p.batch.items[n].Key },
	}
}

// explainChoice enters the backend that the group would go by, and why no other.
func (p *part) explainChoice(e *plan.ExplainedGroup, g *plan.Group, op backend.Op) {
	choice := p.batch.client.engine.selector.Explain(selector.Query{
		Local: p.locals[g.Local], Remote: p.remotes[g.Remote], Op: op, Bytes: g.Bytes, Now: time.Now(),
	})
	for n, candidate := range choice.Candidates {
		if candidate.Usable && e.Backend == "" {
			e.Backend, e.Reason = candidate.Backend, fmt.Sprintf("%s (rule %d)", candidate.Reason, choice.Rule+1)
			continue
		}
		e.Rejected = append(e.Rejected, plan.RejectedBackend{Backend: choice.Candidates[n].Backend, Reason: candidate.Reason})
	}
}
