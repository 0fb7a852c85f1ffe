package null

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// endpoint is a peer that need not exist. All it holds is its sessions.
type endpoint struct {
	backend *null
	peer    backend.Peer
	done    chan struct{} // closed when Close begins

	mu       sync.Mutex
	closed   bool
	sessions map[*session]struct{}
}

func newEndpoint(b *null, peer backend.Peer) *endpoint {
	return &endpoint{backend: b, peer: peer, done: make(chan struct{}), sessions: map[*session]struct{}{}}
}

// Session implements backend.Endpoint.
func (e *endpoint) Session(_ context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	if remote.Peer.Node != e.peer.Node || remote.Peer.Incarnation != e.peer.Incarnation {
		return nil, refuse(backend.PeerGone, "session", e.peer, "the descriptor is of "+remote.Peer.String()+": fetch it anew")
	}
	if !kinds.Has(remote.Kind) {
		return nil, refuse(backend.Unsupported, "session", e.peer, "remote memory of this kind is not claimed")
	}
	size, err := e.backend.region(local)
	if err != nil {
		err.Peer = e.peer
		return nil, err
	}
	s := &session{
		endpoint: e, localSize: size, remoteSize: remote.Size, rights: remote.Rights,
		local: local, remote: remote.Region, sink: sink, drained: make(chan struct{}),
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, refuse(backend.PathDown, "session", e.peer, "the endpoint is closed")
	}
	e.sessions[s] = struct{}{}
	return s, nil
}

// Done implements backend.Endpoint.
func (e *endpoint) Done() <-chan struct{} { return e.done }

// Close implements backend.Endpoint.
func (e *endpoint) Close() error {
	e.mu.Lock()
	if !e.closed {
		e.closed = true
		close(e.done)
	}
	e.mu.Unlock()
	e.closeSessions(context.Background(), func(*session) bool { return true })
	e.backend.mu.Lock()
	defer e.backend.mu.Unlock()
	delete(e.backend.endpoints, e)
	return nil
}

// closeSessions closes the sessions that match, and waits until no Post is within one.
func (e *endpoint) closeSessions(ctx context.Context, match func(*session) bool) error {
	e.mu.Lock()
	var list []*session
	for s := range e.sessions {
		if match(s) {
			list = append(list, s)
		}
	}
	e.mu.Unlock()
	for _, s := range list {
		if err := s.close(ctx); err != nil {
			return err
		}
	}
	return nil
}

// session holds copies of what Post compares with, so that it follows no pointers.
type session struct {
	endpoint              *endpoint
	localSize, remoteSize uint64
	rights                backend.Rights
	local, remote         backend.RegionID
	sink                  backend.Sink

	// posts counts the calls that are within Post; shut is added to it when the session is closed, and drained closed
	// when it is, and no call is left.
	posts   atomic.Int64
	drained chan struct{}

	shutting, draining sync.Once
}

const shut = -1 << 62

// Post implements backend.Session. The transfer completes before Post returns.
func (s *session) Post(t backend.Transfer) error {
	if err := s.check(&t); err != nil {
		return err
	}
	open := s.posts.Add(1) > 0
	if open {
		s.sink.Complete(backend.Completion{Cookie: t.Cookie})
	}
	s.leave()
	if !open {
		return s.unusable()
	}
	return nil
}

// leave ends a Post.
func (s *session) leave() {
	if s.posts.Add(-1) == shut {
		s.draining.Do(func() { close(s.drained) })
	}
}

// check refuses a transfer that the contract forbids. A range is checked without adding its offset and length,
// whose sum may overflow.
func (s *session) check(t *backend.Transfer) error {
	switch t.Op {
	case backend.Write:
		if s.rights&backend.RemoteWrite == 0 {
			return refuse(backend.Denied, "post", s.endpoint.peer, "peers may not write the remote region")
		}
	case backend.Read:
		if s.rights&backend.RemoteRead == 0 {
			return refuse(backend.Denied, "post", s.endpoint.peer, "peers may not read the remote region")
		}
	default:
		return refuse(backend.Unsupported, "post", s.endpoint.peer, t.Op.String()+" is neither write nor read")
	}
	if len(t.Segments) == 0 {
		return refuse(backend.BadRequest, "post", s.endpoint.peer, "a transfer has at least one segment")
	}
	for i := range t.Segments {
		g := &t.Segments[i]
		if g.Length-1 >= s.localSize || g.Local > s.localSize-g.Length { // a length of zero wraps, and is refused
			return s.outside(s.local, g.Local, g.Length)
		}
		if g.Length > s.remoteSize || g.Remote > s.remoteSize-g.Length {
			return s.outside(s.remote, g.Remote, g.Length)
		}
	}
	return nil
}

func (s *session) outside(region backend.RegionID, offset, length uint64) error {
	return &backend.Error{
		Code: backend.BadRequest, Backend: Name, Op: "post", Peer: s.endpoint.peer,
		Region: region, Offset: offset, Length: length, Text: "the range is empty or not within the region",
	}
}

// unusable says why a session refuses every transfer.
func (s *session) unusable() error {
	select {
	case <-s.endpoint.done:
		return refuse(backend.PathDown, "post", s.endpoint.peer, "the endpoint is closed")
	default:
	}
	err := refuse(backend.BadRequest, "post", s.endpoint.peer, "the session is closed, or its local region was deregistered")
	err.Region = s.local
	return err
}

// Cancel implements backend.Session. Every transfer has ended.
func (s *session) Cancel(uint64) {}

// Close implements backend.Session.
func (s *session) Close() error { return s.close(context.Background()) }

func (s *session) close(ctx context.Context) error {
	s.shutting.Do(func() {
		s.posts.Add(shut + 1) // as one more Post, so that whoever leaves last finds the session shut
		s.leave()
	})
	select {
	case <-s.drained:
	case <-ctx.Done():
		return &backend.Error{Code: backend.Cancelled, Backend: Name, Op: "close session", Peer: s.endpoint.peer, Err: ctx.Err()}
	}
	s.endpoint.mu.Lock()
	defer s.endpoint.mu.Unlock()
	delete(s.endpoint.sessions, s)
	return nil
}
