package shm

import (
	"cmp"
	"context"
	"sync"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// maxSpare bounds the segments that an endpoint's unused transfers have room for: 24 MiB.
const maxSpare = 1 << 20

// endpoint is the initiator's end of a connection.
type endpoint struct {
	instance *instance
	peer     backend.Peer
	reach    reach
	done     chan struct{} // closed when the endpoint fails
	quiet    chan struct{} // closed when nothing of it can touch any memory any more

	mu       sync.Mutex
	err      *backend.Error // why it failed
	sessions map[*session]struct{}
	accepted int         // transfers that take room in the window
	free     []*transfer // warm ones, for the next Post
	spare    int         // segments that free ones have room for
	// transfers counts what keeps the endpoint from being quiet; it grows only while err is nil.
	transfers sync.WaitGroup
}

func newEndpoint(i *instance, peer backend.Peer) *endpoint {
	return &endpoint{
		instance: i, peer: peer,
		done: make(chan struct{}), quiet: make(chan struct{}),
		sessions: make(map[*session]struct{}),
	}
}

// keep ends the endpoint once it has failed.
func (e *endpoint) keep() {
	<-e.done
	e.transfers.Wait()
	e.reach.leave()
	e.instance.disown(e)
	close(e.quiet)
}

// fail refuses transfers from now on and stops those in flight. The first reason counts.
func (e *endpoint) fail(why *backend.Error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil {
		return
	}
	e.err = why
	for s := range e.sessions {
		for _, t := range s.inFlight {
			e.instance.copier.stop(t)
		}
	}
	close(e.done)
}

// Done implements backend.Endpoint.
func (e *endpoint) Done() <-chan struct{} { return e.done }

// Close implements backend.Endpoint.
func (e *endpoint) Close() error {
	e.fail(&backend.Error{Code: backend.PathDown, Backend: name, Peer: e.peer, Text: "the endpoint is closed"})
	<-e.quiet
	return nil
}

// Session implements backend.Endpoint. What the remote region is, and what may be done with it, the target says
// and not the descriptor, which only opens it.
func (e *endpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	fail := func(code backend.Code, text string) (backend.Session, error) {
		return nil, &backend.Error{
			Code: code, Op: "session", Backend: name, Peer: e.peer, Region: remote.Region, Text: text,
		}
	}
	if remote.Peer.Node != e.peer.Node || remote.Peer.Incarnation != e.peer.Incarnation {
		return fail(backend.PeerGone, "the descriptor is of "+remote.Peer.String()+": fetch it anew")
	}
	if remote.Kind != backend.HostMemory {
		return fail(backend.Unsupported, "memory of kind "+remote.Kind.String()+" cannot be mapped")
	}
	var key regionKey
	if len(remote.Key) != len(key) {
		return fail(backend.Denied, "the region has no key of this backend, or it gives peers no rights")
	}
	copy(key[:], remote.Key)
	if err := e.failure(); err != nil {
		return nil, err
	}
	far, err := e.reach.open(ctx, remote.Region, key)
	if err != nil {
		return nil, cmp.Or(e.failure(), err)
	}
	s := &session{endpoint: e, local: local, remote: remote.Region, far: far, sink: sink}
	if err := e.attach(s); err != nil {
		return nil, err
	}
	// The local region is looked up when Deregister can find the session, so that it cannot miss one.
	if s.near, err = e.instance.near(local); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// failure returns why the endpoint failed, or nil.
func (e *endpoint) failure() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err == nil {
		return nil
	}
	return e.err
}

func (e *endpoint) attach(s *session) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil {
		return e.err
	}
	e.sessions[s] = struct{}{}
	return nil
}

// sessionsOf returns the sessions whose near end is the given region.
func (e *endpoint) sessionsOf(local backend.RegionID) (list []*session) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for s := range e.sessions {
		if s.local == local {
			list = append(list, s)
		}
	}
	return list
}
