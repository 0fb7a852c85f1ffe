package core

import (
	"context"

	"github.com/umbp/umbp/core/peer"
)

// Exists tells which keys the pool holds: the status of a result is Exists or Missing.
func (c *PoolClient) Exists(ctx context.Context, keys ...string) []Result {
	return c.onKeys(ctx, opExists, keys, func(ctx context.Context, b *batch) {
		b.locateParts(ctx, "exists", b.todo)
		for _, p := range b.parts {
			for _, i := range p.items {
				b.results[i] = Result{Status: Exists, Path: Path{Node: p.info.Peer.Node}}
			}
		}
	})
}

// Remove deletes values: the status of a result is Removed or Missing. Removed values are gone for every client
// when Remove returns; a get under way still gets what it came for.
func (c *PoolClient) Remove(ctx context.Context, keys ...string) []Result {
	return c.onKeys(ctx, opRemove, keys, func(ctx context.Context, b *batch) {
		if b.locateParts(ctx, "remove", b.todo) {
			b.eachPart(func(p *part) { p.remove(ctx) })
		}
	})
}

func (p *part) remove(ctx context.Context) {
	p.ask(ctx, func(ctx context.Context) error {
		req := peer.RemoveRequest{To: p.node.peer.Incarnation, Keys: p.keys}
		if err := p.node.service.Remove(ctx, &req, &p.removed); err != nil {
			return err
		}
		if got := len(p.removed.Statuses); got != len(p.items) {
			return p.short(got, len(p.items), "keys")
		}
		return nil
	})
	if p.gone("remove") {
		return
	}
	for k, i := range p.items {
		result := &p.batch.results[i]
		*result = Result{Status: Missing, Path: Path{Node: p.info.Peer.Node}}
		if p.removed.Statuses[k] == peer.OK {
			result.Status = Removed
		}
	}
}

// Stat tells the sizes of values, and the nodes that hold them: the status of a result is Found or Missing. It
// counts as a use of the values.
func (c *PoolClient) Stat(ctx context.Context, keys ...string) []Result {
	return c.onKeys(ctx, opStat, keys, func(ctx context.Context, b *batch) {
		for len(b.todo) > 0 && b.locateParts(ctx, "stat", b.todo) {
			b.eachPart(func(p *part) {
				p.resolve(ctx, "stat")
				p.releaseSoon(ctx)
			})
			b.later = b.later[:0]
			for _, p := range b.parts {
				b.later = append(b.later, p.later...)
			}
			b.todo = append(b.todo[:0], b.later...)
		}
		for i := range b.results {
			if r := &b.results[i]; r.Err == nil && r.Path.Node != "" && r.Status != Missing {
				r.Status = Found
			}
		}
	})
}

// onKeys runs a call about keys, as many at once as one call to a node may name.
func (c *PoolClient) onKeys(ctx context.Context, op op, keys []string, f func(ctx context.Context, b *batch)) []Result {
	items := make([]Item, len(keys))
	for i, key := range keys {
		items[i].Key = key
	}
	return c.call(ctx, op, items, func(ctx context.Context, b *batch) {
		for all := b.todo; len(all) > 0; {
			n := min(len(all), peer.MaxKeys)
			b.todo, all = all[:n], all[n:]
			f(ctx, b)
		}
	})
}
