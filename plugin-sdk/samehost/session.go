package samehost

import (
	"context"
	"fmt"
	"sync"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// session is an endpoint bound to two regions.
type session struct {
	endpoint      *endpoint
	local, remote backend.RegionID
	sink          backend.Sink
	cancel        context.CancelFunc // ends join
	quiet         chan struct{}      // closed when it has ended

	// Set by join, for good:
	path      Path
	near, far uint64         // sizes of the regions in bytes
	rights    backend.Rights // to the far one

	// Under endpoint.mu:
	closed   bool
	inFlight []*Transfer
	// users counts join, and the transfers whose Complete has not returned; it grows only while closed is false.
	users sync.WaitGroup

	ending sync.Once
}

// join makes the session's path.
func (s *session) join(ctx context.Context, key regionKey) error {
	e := s.endpoint
	far, err := e.reach.open(ctx, s.remote, key)
	if err != nil {
		return err
	}
	// The local region is looked up when Deregister can find the session, so that it cannot miss one.
	near, err := e.instance.near(s.local)
	if err != nil {
		return err
	}
	path, err := e.instance.mover.Join(ctx, near.region, far.region, e)
	if err != nil {
		return e.instance.explain(err, "session", e.peer, s.remote)
	}
	s.path, s.rights = path, far.rights
	s.near, s.far = near.region.Size(), far.region.Size()
	return nil
}

// Post implements backend.Session.
func (s *session) Post(t backend.Transfer) error {
	bytes, err := s.check(t.Op, t.Segments)
	if err != nil {
		return err
	}
	own, err := s.admit(t.Op, t.Cookie)
	if err != nil {
		return err
	}
	own.Segments, own.Bytes = append(own.Segments[:0], t.Segments...), bytes
	s.path.Start(own)
	return nil
}

// check refuses what must not be moved, and returns how many bytes it is.
func (s *session) check(op backend.Op, segments []backend.Segment) (bytes uint64, err error) {
	fail := func(code backend.Code, text string) (uint64, error) {
		return 0, &backend.Error{
			Code: code, Op: "post", Backend: s.endpoint.instance.name, Peer: s.endpoint.peer, Region: s.remote, Text: text,
		}
	}
	c := &s.endpoint.instance.info.Capabilities
	var need backend.Rights
	switch op {
	case backend.Write:
		need = backend.RemoteWrite
	case backend.Read:
		need = backend.RemoteRead
	}
	switch {
	case need == 0 || c.Ops&op == 0:
		return fail(backend.Unsupported, "there is no operation "+op.String())
	case s.rights&need == 0:
		return fail(backend.Denied, "the region does not give peers the right to "+op.String())
	case len(segments) == 0:
		return fail(backend.BadRequest, "the transfer has no segments")
	case len(segments) > c.Limits.Segments:
		return fail(backend.BadRequest, fmt.Sprintf("%d segments exceed the limit of %d: cut the transfer", len(segments), c.Limits.Segments))
	}
	for _, g := range segments {
		// Written so that no sum can overflow.
		nearFits := g.Local <= s.near && g.Length <= s.near-g.Local
		farFits := g.Remote <= s.far && g.Length <= s.far-g.Remote
		if g.Length == 0 || !nearFits || !farFits {
			return 0, s.misfit(g, nearFits)
		}
		bytes += g.Length // at most so many segments times the size of a region: far from overflowing
	}
	return bytes, nil
}

// misfit says what is wrong with a segment.
func (s *session) misfit(g backend.Segment, nearFits bool) error {
	e := &backend.Error{
		Code: backend.BadRequest, Op: "post", Backend: s.endpoint.instance.name, Peer: s.endpoint.peer, Length: g.Length,
	}
	switch {
	case g.Length == 0:
		e.Region, e.Offset, e.Text = s.remote, g.Remote, fmt.Sprintf("the segment at offset %d is empty", g.Remote)
	case !nearFits:
		e.Region, e.Offset, e.Text = s.local, g.Local, fmt.Sprintf("the segment lies outside the local region of %d bytes", s.near)
	default:
		e.Region, e.Offset, e.Text = s.remote, g.Remote, fmt.Sprintf("the segment lies outside the remote region of %d bytes", s.far)
	}
	return e
}

// admit gives a new transfer its place in the window.
func (s *session) admit(op backend.Op, cookie uint64) (*Transfer, error) {
	e := s.endpoint
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.err != nil:
		return nil, e.err
	case s.closed:
		return nil, &backend.Error{
			Code: backend.BadRequest, Op: "post", Backend: e.instance.name, Peer: e.peer, Text: "the session is closed",
		}
	case e.accepted == e.instance.info.Capabilities.Window:
		return nil, backend.ErrBusy
	}
	t := e.reuse()
	t.session, t.Op, t.cookie = s, op, cookie
	t.place = len(s.inFlight)
	s.inFlight = append(s.inFlight, t)
	e.accepted++
	s.users.Add(1)
	return t, nil
}

// Cancel implements backend.Session.
func (s *session) Cancel(cookie uint64) {
	s.endpoint.mu.Lock()
	defer s.endpoint.mu.Unlock()
	for _, t := range s.inFlight {
		if t.cookie == cookie {
			t.stop()
		}
	}
}

// Close implements backend.Session.
func (s *session) Close() error {
	s.stop()
	s.ending.Do(func() {
		s.users.Wait()
		if s.path != nil {
			s.path.Close()
		}
		s.endpoint.detach(s)
		close(s.quiet)
	})
	return nil
}

// stop refuses transfers from now on, stops those in flight, and ends join.
func (s *session) stop() {
	s.cancel()
	s.endpoint.mu.Lock()
	defer s.endpoint.mu.Unlock()
	s.closed = true
	for _, t := range s.inFlight {
		t.stop()
	}
}
