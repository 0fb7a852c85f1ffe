package rdma

import (
	"context"
	"fmt"
	"math/bits"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/inuse"
	"github.com/umbp/umbp/plugins/rdma/coalesce"
)

// session binds an endpoint to one local and one remote region.
type session struct {
	endpoint *endpoint
	near     *region
	remote   backend.Remote
	sink     backend.Sink
	users    inuse.Gate // calls of Post, and transfers that have not completed

	// How offsets become addresses and keys.
	nearBase, farBase   uint64
	nearShift, farShift uint // regions are registered in parts of a power of two bytes
	keys                []keys
	writes, reads       coalesce.Limits
}

// keys are those of the parts of both regions on one path.
type keys struct{ near, far []uint32 }

// Session implements backend.Endpoint.
func (e *endpoint) Session(_ context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	s := &session{endpoint: e, remote: remote, sink: sink}
	s.remote.Key = nil // the caller's
	s.near = e.t.regions.Get(local)
	if s.near == nil || !s.near.users.Enter() {
		err := s.fault(backend.BadRequest, "session", "the local region is not registered")
		err.Region = local
		return nil, err
	}
	defer s.near.users.Leave()
	if err := s.bind(remote.Key); err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.failure != nil {
		return nil, e.failure
	}
	return s, nil
}

// bind checks the remote region, and finds out how to reach it.
func (s *session) bind(key []byte) error {
	e, remote := s.endpoint, &s.remote
	refuse := func(code backend.Code, text string) error { return s.fault(code, "session", text) }
	switch {
	case remote.Peer.Node != e.peer.Node:
		return refuse(backend.BadRequest, "the region belongs to "+remote.Peer.String())
	case remote.Peer.Incarnation != e.peer.Incarnation:
		return refuse(backend.PeerGone, "the region belongs to "+remote.Peer.String())
	case remote.Kind != backend.HostMemory:
		return refuse(backend.Unsupported, "only host memory can be reached, not "+remote.Kind.String())
	case remote.Region == 0 || s.sink == nil:
		return refuse(backend.BadRequest, "a session needs a remote region and a sink")
	case remote.Rights == 0:
		return nil // there is no key, and no transfer will need it
	}
	k, err := parseKey(key)
	if err == nil {
		err = k.check(remote)
	}
	if err != nil {
		return refuse(backend.CodeOf(err), err.Error())
	}
	s.nearBase, s.farBase = s.near.base, k.base
	s.nearShift, s.farShift = uint(bits.TrailingZeros64(s.near.part)), uint(bits.TrailingZeros64(k.part))
	for _, p := range e.pollers {
		near := s.near.rails[p.path.rail.index].Load()
		if near == nil || near.rail != p.path.rail {
			return refuse(backend.PathDown, "the local region is not registered on "+p.path.rail.name+", which was lost or opened anew")
		}
		far := p.path.rkeys(k)
		if far == nil {
			return refuse(backend.PathDown, fmt.Sprintf("the remote region is not registered on device number %d of the peer, "+
				"as the endpoint knows it: the device was lost or opened anew", p.path.remote))
		}
		s.keys = append(s.keys, keys{near: near.lkeys, far: far})
	}
	s.writes, s.reads = e.writes, e.reads
	for _, l := range []*coalesce.Limits{&s.writes, &s.reads} {
		l.LocalPart, l.RemotePart = s.near.part, k.part
	}
	return nil
}

func (s *session) fault(code backend.Code, op, text string) *backend.Error {
	e := s.endpoint
	return &backend.Error{Code: code, Backend: e.t.info.Name, Op: op, Peer: e.peer, Region: s.remote.Region, Text: text}
}

func (s *session) deregistered() *backend.Error {
	err := s.fault(backend.BadRequest, "post", "the local region was deregistered")
	err.Region = s.near.id
	return err
}

// Post implements backend.Session.
func (s *session) Post(x backend.Transfer) error {
	t, err := s.begin(&x)
	if err != nil {
		return err
	}
	return s.endpoint.submit(t)
}

// PostWait implements backend.PostWaiter. The caller of a small transfer, on a path that nobody polls, polls it itself.
func (s *session) PostWait(x backend.Transfer) error {
	t, err := s.begin(&x)
	if err != nil {
		return err
	}
	return s.endpoint.submitAndHelp(t)
}

// begin checks a transfer, takes a record for it, and plans it. The caller submits it.
func (s *session) begin(x *backend.Transfer) (*transfer, error) {
	if err := s.check(x); err != nil {
		return nil, err
	}
	if !s.users.Enter() {
		return nil, s.fault(backend.BadRequest, "post", "the session is closed")
	}
	if !s.near.users.Enter() {
		s.users.Leave()
		return nil, s.deregistered()
	}
	t, err := s.endpoint.take()
	if err != nil {
		s.near.users.Leave()
		s.users.Leave()
		return nil, err
	}
	t.session, t.cookie, t.op, t.segments = s, x.Cookie, x.Op, len(x.Segments)
	limits := &s.writes
	if x.Op == backend.Read {
		limits = &s.reads
	}
	t.plan.Cut(x.Segments, *limits)
	t.prepare()
	return t, nil
}

// check refuses what can be refused before a byte has moved.
func (s *session) check(x *backend.Transfer) error {
	need := backend.RemoteWrite
	switch x.Op {
	case backend.Write:
	case backend.Read:
		need = backend.RemoteRead
	default:
		return s.fault(backend.Unsupported, "post", "a transfer is a write or a read, not "+x.Op.String())
	}
	limits := &s.endpoint.t.info.Capabilities.Limits
	switch n := len(x.Segments); {
	case s.remote.Rights&need == 0:
		return s.fault(backend.Denied, x.Op.String(), "the region does not give this right to peers")
	case n == 0:
		return s.fault(backend.BadRequest, x.Op.String(), "the transfer has no segments")
	case limits.Segments != 0 && n > limits.Segments:
		return s.fault(backend.BadRequest, x.Op.String(), "the transfer has more segments than Capabilities.Limits allow")
	}
	var total uint64
	most := limits.TransferBytes
	for i := range x.Segments {
		g := &x.Segments[i]
		switch {
		case !inside(g.Remote, g.Length, s.remote.Size):
			return s.outside(x.Op, s.remote.Region, g.Remote, g.Length, "the range is empty or outside the remote region")
		case !inside(g.Local, g.Length, s.near.size):
			return s.outside(x.Op, s.near.id, g.Local, g.Length, "the range is outside the local region")
		case limits.SegmentBytes != 0 && g.Length > limits.SegmentBytes, most != 0 && g.Length > most-total:
			return s.outside(x.Op, s.remote.Region, g.Remote, g.Length, "the transfer has more bytes than Capabilities.Limits allow")
		}
		total += g.Length
	}
	return nil
}

func inside(offset, length, size uint64) bool {
	return length != 0 && length <= size && offset <= size-length
}

func (s *session) outside(op backend.Op, region backend.RegionID, offset, length uint64, text string) error {
	err := s.fault(backend.BadRequest, op.String(), text)
	err.Region, err.Offset, err.Length = region, offset, length
	return err
}

// Cancel implements backend.Session. Of a transfer that is cancelled nothing more is posted. What the device has already
// gets a moment to end, as it nearly always does; then the endpoint is broken for it.
func (s *session) Cancel(cookie uint64) {
	s.endpoint.cancel(func(t *transfer) bool { return t.session == s && t.cookie == cookie })
}

// Close implements backend.Session.
func (s *session) Close() error {
	unused := s.users.Shut()
	s.endpoint.cancel(func(t *transfer) bool { return t.session == s })
	<-unused
	return nil
}
