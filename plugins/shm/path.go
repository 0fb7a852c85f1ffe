package shm

import (
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/samehost"
)

const (
	// partBytes is about how much one worker copies before it looks for a cancellation: between this and three
	// times as much. That takes a fraction of a millisecond. A longer segment is cut into pieces of this size up
	// to twice as much, never less, because memmove bypasses the caches only from 1 MiB on, which makes it twice
	// as fast for bytes that do not fit there.
	partBytes = 1 << 20
	// partSegments bounds a part of very small segments.
	partSegments = 1 << 10
)

// path is a session's way: two ranges of memory, both in this process's address space.
type path struct {
	mover     *mover
	near, far []byte
}

// Start implements samehost.Path.
func (p *path) Start(t *samehost.Transfer) {
	if t.Bytes > p.mover.inline {
		p.mover.copier.add(t, p)
		return
	}
	var c cursor
	for next := c.take(t); next.bytes > 0; next = c.take(t) {
		p.copy(t, next)
	}
	t.Finish(c.outcomes(t), nil)
}

// Stop implements samehost.Path.
func (p *path) Stop(t *samehost.Transfer) { p.mover.copier.hurry(t) }

// Close implements samehost.Path.
func (p *path) Close() {}

// cursor says how far a transfer came: the first byte that no part has taken is byte offset of segment next.
type cursor struct {
	next   int
	offset uint64
}

// part is a piece of a transfer: so many bytes, from byte offset of segment first on.
type part struct {
	first         int
	offset, bytes uint64
}

// take cuts the next part off the transfer. It is empty when nothing is left, or the transfer was stopped.
func (c *cursor) take(t *samehost.Transfer) part {
	p := part{first: c.next, offset: c.offset}
	if t.Stopped() {
		return p
	}
	for last := min(c.next+partSegments, len(t.Segments)); c.next < last && p.bytes < partBytes; {
		rest := t.Segments[c.next].Length - c.offset
		if rest >= 2*partBytes {
			p.bytes += partBytes
			c.offset += partBytes
		} else {
			p.bytes += rest
			c.next, c.offset = c.next+1, 0
		}
	}
	return p
}

// outcomes tells segment by segment how far the transfer came, and returns nil where it came to its end. All parts that
// were taken have been copied.
func (c *cursor) outcomes(t *samehost.Transfer) []backend.Outcome {
	if c.next == len(t.Segments) {
		return nil
	}
	list := make([]backend.Outcome, len(t.Segments)) // NotSent
	for i := range c.next {
		list[i] = backend.Done
	}
	if c.offset > 0 {
		list[c.next] = backend.Failed
	}
	return list
}

// copy moves the bytes of a part.
func (p *path) copy(t *samehost.Transfer, x part) {
	for i := x.first; x.bytes > 0; i++ {
		g := t.Segments[i]
		n := min(g.Length-x.offset, x.bytes)
		l := p.near[g.Local+x.offset:][:n]
		r := p.far[g.Remote+x.offset:][:n]
		if t.Op == backend.Write {
			copy(r, l)
		} else {
			copy(l, r)
		}
		x.offset = 0
		x.bytes -= n
	}
}
