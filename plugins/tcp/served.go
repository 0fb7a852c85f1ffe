package tcp

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// served is a connection of a peer, at the target. One goroutine serves it: it reads a request, checks it, moves
// the bytes, answers, and reads the next one.
type served struct {
	t       *transport
	peer    backend.Peer
	stream  *stream
	opening *atomic.Int32          // connections of the same endpoint that were not told yet that they may send
	busy    atomic.Bool            // a request has begun and is not answered yet
	using   atomic.Pointer[region] // the region that the request in hand may touch
	quiet   chan struct{}          // closed when the goroutine has left all memory for good

	sending sync.Mutex            // held while a reply, or the wish for a flush, is sent
	fencing chan struct{}         // of capacity 1: filled by the one that waits for a flush
	flushes uint64                // that were asked for; it belongs to the one that fences
	flush   atomic.Pointer[flush] // the one that is awaited

	spans []span // of the request in hand
	head  []byte
	in    cursor
	out   cursor
}

// flush is what the target asks the initiator to send behind everything that was posted before.
type flush struct {
	id     uint64
	passed chan struct{} // closed when it has come
}

func newServed(t *transport, peer backend.Peer, s *stream, opening *atomic.Int32) *served {
	return &served{
		t: t, peer: peer, stream: s, opening: opening,
		quiet: make(chan struct{}), fencing: make(chan struct{}, 1),
	}
}

// begin tells the peer that it may send, and ends the time limit of the handshake, unless the connection was aborted.
func (c *served) begin() error {
	c.sending.Lock() // keeps the wish for a flush behind the verdict
	c.opening.Add(-1)
	_, err := c.stream.conn().Write([]byte{0})
	c.sending.Unlock()
	if err != nil {
		return err
	}
	if err := c.stream.tcp.SetDeadline(time.Time{}); err != nil {
		return err
	}
	if c.stream.aborted.Load() { // then the deadline that was lifted may have been that of abort
		return net.ErrClosed
	}
	return nil
}

// serve answers requests until the connection ends, and returns why it did. io.EOF says that the peer closed it
// between two requests.
func (c *served) serve() error {
	for {
		if _, err := c.stream.peek(1); err != nil {
			return err
		}
		c.busy.Store(true)
		b, err := c.stream.peek(requestSize)
		if err != nil {
			return midFrame(err)
		}
		r, err := parseRequest(b)
		if err != nil {
			return err
		}
		c.stream.consume(requestSize)
		if r.op == opFlush {
			err = c.passFlush(r.id)
		} else {
			err = c.answer(r)
		}
		if err != nil {
			return err
		}
		c.busy.Store(false)
	}
}

// answer carries out one request or refuses it. An error ends the connection.
func (c *served) answer(r request) error {
	target := c.enter(r.region)
	if target != nil {
		defer c.leave(target)
	}
	refusal, err := c.readTable(r, target)
	switch {
	case err != nil:
		return err
	case refusal != nil:
		return c.refuse(r, refusal)
	case r.op == backend.Write:
		c.in = newCursor(nil, target.bytes, c.spans, r.total)
		if err := c.stream.receive(&c.in); err != nil {
			return err
		}
		c.in = cursor{}
		c.head = appendReply(c.head[:0], reply{id: r.id})
		c.out = newCursor(c.head, nil, nil, 0)
	default:
		c.head = appendReply(c.head[:0], reply{id: r.id, bytes: r.total})
		c.out = newCursor(c.head, target.bytes, c.spans, r.total)
	}
	err = c.send(&c.out)
	c.out = cursor{}
	return err
}

// send sends a whole frame. Only a fence ever has to wait for its turn here.
func (c *served) send(frame *cursor) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	return c.stream.send(frame)
}

// enter returns the region, whose memory may be touched until leave, or nil when there is none to be used.
func (c *served) enter(id backend.RegionID) *region {
	target := c.t.regions.Get(id)
	if target == nil {
		return nil
	}
	c.using.Store(target) // before entering, so that Deregister finds everyone who is inside
	if !target.users.Enter() {
		c.using.Store(nil)
		return nil
	}
	return target
}

func (c *served) leave(target *region) {
	c.using.Store(nil)
	target.users.Leave()
}

// readTable reads the table of a request and decides whether all of it is allowed, before any byte moves. The
// region is nil when it does not exist.
func (c *served) readTable(r request, target *region) (refusal *backend.Error, err error) {
	refuse := func(code backend.Code, format string, args ...any) {
		if refusal == nil {
			refusal = backend.Errorf(code, format, args...)
		}
	}
	right := backend.RemoteRead
	if r.op == backend.Write {
		right = backend.RemoteWrite
	}
	var size uint64
	switch {
	case target == nil:
		refuse(backend.BadRequest, "region %d does not exist", r.region)
	case target.rights&right == 0:
		refuse(backend.Denied, "region %d does not allow peers to %s", r.region, r.op)
	default:
		size = target.size
	}
	c.spans = c.spans[:0]
	var total uint64
	for range r.count {
		b, err := c.stream.peek(spanSize)
		if err != nil {
			return nil, midFrame(err)
		}
		s := parseSpan(b)
		c.stream.consume(spanSize)
		if s.length > r.total-total {
			return nil, protocolError("the segments of a request move more than its %d bytes", r.total)
		}
		total += s.length
		if refusal == nil && !s.inside(size) {
			refuse(backend.BadRequest, "range [%d, +%d) is empty or outside region %d of %d bytes", s.offset, s.length, r.region, size)
		}
		c.spans = append(c.spans, s)
	}
	if total != r.total {
		return nil, protocolError("the segments of a request move %d bytes, not %d", total, r.total)
	}
	return refusal, nil
}

// refuse skips the payload, so that the connection stays usable, and says why.
func (c *served) refuse(r request, refusal *backend.Error) error {
	if r.op == backend.Write {
		if err := c.stream.discard(&r.total); err != nil {
			return err
		}
	}
	text := refusal.Text[:min(len(refusal.Text), maxRefusal)]
	c.head = appendReply(c.head[:0], reply{code: refusal.Code, id: r.id, bytes: uint64(len(text))})
	c.head = append(c.head, text...)
	c.out = newCursor(c.head, nil, nil, 0)
	return c.send(&c.out)
}

// fence returns nil when nothing that the peer posted on this connection before the call can touch memory any more.
//
// It asks the initiator for a flush. The initiator learns that after the call, and queues the flush behind all that
// is posted on the lane by then. TCP keeps the order, and one goroutine here carries out one request after the
// other: when it meets the flush, it is through with everything that was posted before the call. So a healthy
// connection lives on, and so do the transfers on it. One whose flush does not come in time is aborted, and then
// nobody reads from it any more. A connection of an endpoint that is opening has nothing to be waited for: the initiator
// posts once it was told by all of the endpoint's connections that it may send, and one of them was not told yet.
func (c *served) fence(ctx context.Context) error {
	if c.opening.Load() > 0 {
		return nil
	}
	grace, cancel := context.WithTimeout(ctx, c.t.settings.fenceGrace)
	defer cancel()
	defer context.AfterFunc(grace, c.stream.abort)()
	select {
	case c.fencing <- struct{}{}:
		defer func() { <-c.fencing }()
	case <-c.quiet:
		return nil
	case <-ctx.Done():
		return notQuiet(ctx)
	}
	c.flushes++
	f := &flush{id: c.flushes, passed: make(chan struct{})}
	c.flush.Store(f)
	frame := newCursor(appendReply(nil, reply{code: statusFlush, id: f.id}), nil, nil, 0)
	if err := c.send(&frame); err != nil {
		c.stream.abort() // what cannot be sent to need not be read from
	}
	select {
	case <-f.passed:
		return nil
	case <-c.quiet:
		return nil
	case <-ctx.Done():
		return notQuiet(ctx)
	}
}

func notQuiet(ctx context.Context) error {
	return &backend.Error{Code: backend.Cancelled, Text: "a connection of the peer is not quiet yet", Err: ctx.Err()}
}

// passFlush notes that the flush has come.
func (c *served) passFlush(id uint64) error {
	f := c.flush.Swap(nil)
	if f == nil || f.id != id {
		return protocolError("flush %d was not asked for", id)
	}
	close(f.passed)
	return nil
}
