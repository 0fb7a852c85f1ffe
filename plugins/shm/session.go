package shm

import (
	"fmt"
	"sync"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// session is an endpoint bound to two regions.
type session struct {
	endpoint      *endpoint
	local, remote backend.RegionID
	near          []byte
	far           area
	sink          backend.Sink

	// Under endpoint.mu:
	closed   bool
	inFlight []*transfer
	// transfers counts those whose Complete has not returned; it grows only while closed is false.
	transfers sync.WaitGroup
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
	own.segments = append(own.segments[:0], t.Segments...)
	if bytes > s.endpoint.instance.inline {
		s.endpoint.instance.copier.add(own, bytes)
		return nil
	}
	for p := own.take(); p.bytes > 0; p = own.take() {
		own.copy(p)
	}
	own.finish()
	return nil
}

// check refuses what must not be copied, and returns how many bytes it is.
func (s *session) check(op backend.Op, segments []backend.Segment) (bytes uint64, err error) {
	fail := func(code backend.Code, text string) (uint64, error) {
		return 0, &backend.Error{
			Code: code, Op: "post", Backend: name, Peer: s.endpoint.peer, Region: s.remote, Text: text,
		}
	}
	var need backend.Rights
	switch op {
	case backend.Write:
		need = backend.RemoteWrite
	case backend.Read:
		need = backend.RemoteRead
	default:
		return fail(backend.Unsupported, "there is no operation "+op.String())
	}
	switch {
	case s.far.rights&need == 0:
		return fail(backend.Denied, "the region does not give peers the right to "+op.String())
	case len(segments) == 0:
		return fail(backend.BadRequest, "the transfer has no segments")
	case len(segments) > maxSegments:
		return fail(backend.BadRequest, fmt.Sprintf("%d segments exceed the limit of %d: cut the transfer", len(segments), maxSegments))
	}
	near, far := uint64(len(s.near)), uint64(len(s.far.bytes))
	for _, g := range segments {
		// Written so that no sum can overflow.
		nearFits := g.Local <= near && g.Length <= near-g.Local
		farFits := g.Remote <= far && g.Length <= far-g.Remote
		if g.Length == 0 || !nearFits || !farFits {
			return 0, s.misfit(g, nearFits)
		}
		bytes += g.Length // at most maxSegments times the size of a mapping: far from overflowing
	}
	return bytes, nil
}

// misfit says what is wrong with a segment.
func (s *session) misfit(g backend.Segment, nearFits bool) error {
	e := &backend.Error{Code: backend.BadRequest, Op: "post", Backend: name, Peer: s.endpoint.peer, Length: g.Length}
	switch {
	case g.Length == 0:
		e.Region, e.Offset, e.Text = s.remote, g.Remote, fmt.Sprintf("the segment at offset %d is empty", g.Remote)
	case !nearFits:
		e.Region, e.Offset, e.Text = s.local, g.Local, fmt.Sprintf("the segment lies outside the local region of %d bytes", len(s.near))
	default:
		e.Region, e.Offset, e.Text = s.remote, g.Remote, fmt.Sprintf("the segment lies outside the remote region of %d bytes", len(s.far.bytes))
	}
	return e
}

// admit gives a new transfer its place in the window.
func (s *session) admit(op backend.Op, cookie uint64) (*transfer, error) {
	e := s.endpoint
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.err != nil:
		return nil, e.err
	case s.closed:
		return nil, &backend.Error{Code: backend.BadRequest, Op: "post", Backend: name, Peer: e.peer, Text: "the session is closed"}
	case e.accepted == e.instance.info.Capabilities.Window:
		return nil, backend.ErrBusy
	}
	t := e.reuse()
	t.session, t.op, t.cookie = s, op, cookie
	t.place = len(s.inFlight)
	s.inFlight = append(s.inFlight, t)
	e.accepted++
	e.transfers.Add(1)
	s.transfers.Add(1)
	return t, nil
}

// Cancel implements backend.Session.
func (s *session) Cancel(cookie uint64) {
	s.endpoint.mu.Lock()
	defer s.endpoint.mu.Unlock()
	for _, t := range s.inFlight {
		if t.cookie == cookie {
			s.endpoint.instance.copier.stop(t)
		}
	}
}

// Close implements backend.Session.
func (s *session) Close() error {
	e := s.endpoint
	e.mu.Lock()
	s.closed = true
	delete(e.sessions, s)
	for _, t := range s.inFlight {
		e.instance.copier.stop(t)
	}
	e.mu.Unlock()
	s.transfers.Wait()
	return nil
}
