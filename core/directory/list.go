package directory

import (
	"cmp"
	"context"
	"slices"
	"strings"
)

// List implements Directory. It walks over all entries in small steps and keeps the smallest keys, so that it
// needs memory for one page only and holds up nobody. Keys that come or go meanwhile may or may not be listed.
func (d *Memory) List(ctx context.Context, req *ListRequest) (*ListReply, error) {
	if err := req.check(ctx); err != nil {
		return nil, err
	}
	limit := min(cmp.Or(req.Limit, defaultLimit), maxLimit)
	p := page{size: limit + 1} // one more than asked for tells whether there are more
	if err := d.walk(ctx, req, &p); err != nil {
		return nil, err
	}
	p.shrink()
	reply := &ListReply{Entries: p.entries, More: len(p.entries) > limit}
	if reply.More {
		reply.Entries = reply.Entries[:limit]
	}
	return reply, nil
}

// walk shows every entry that req asks for to p.
func (d *Memory) walk(ctx context.Context, req *ListRequest, p *page) error {
	d.rlock()
	defer d.mu.RUnlock()
	visited := 0
	for key, e := range d.entries {
		if !e.owner.gone && key > req.After && strings.HasPrefix(key, req.Prefix) {
			p.add(Entry{Key: key, Size: e.size, Node: e.owner.node.Peer.Node})
		}
		if visited++; visited%step == 0 || p.full() {
			d.mu.RUnlock()
			if p.full() {
				p.shrink()
			}
			err := checkContext(ctx, "list")
			d.rlock()
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// page keeps the entries with the smallest keys among those that are added. It holds up to twice its size and
// then drops the larger half, which costs less than keeping them in order.
type page struct {
	size    int
	entries []Entry
	ceiling string // a key from here on is too large; empty when none is known to be
}

func (p *page) add(e Entry) {
	if p.ceiling == "" || e.Key < p.ceiling {
		p.entries = append(p.entries, e)
	}
}

func (p *page) full() bool { return len(p.entries) == 2*p.size }

// shrink sorts the page and cuts it to its size. A key that was withdrawn and published again during the walk may
// have been seen twice.
func (p *page) shrink() {
	slices.SortFunc(p.entries, func(a, b Entry) int { return strings.Compare(a.Key, b.Key) })
	p.entries = slices.CompactFunc(p.entries, func(a, b Entry) bool { return a.Key == b.Key })
	if len(p.entries) >= p.size {
		p.entries = p.entries[:p.size]
		p.ceiling = p.entries[p.size-1].Key
	}
}
