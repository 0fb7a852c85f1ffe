package samehost

import (
	"cmp"
	"context"
	"fmt"
	"sync"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// endpoint is the initiator's end of a connection. For the mover it is the target.
type endpoint struct {
	instance *Instance
	peer     backend.Peer
	reach    reach
	ctx      context.Context // it ends when the endpoint fails
	cancel   context.CancelFunc
	quiet    chan struct{} // closed when nothing of it can touch any memory any more

	mu       sync.Mutex
	err      *backend.Error // why it failed
	sessions map[*session]struct{}
	accepted int         // transfers that take room in the window
	free     []*Transfer // warm ones, for the next Post
	spare    int         // segments that free ones have room for
	ended    bool        // its regions are closed
	onEnd    []func()
	// users counts the mover's calls of Ask and Open; it grows only while err is nil.
	users sync.WaitGroup
}

func newEndpoint(i *Instance, peer backend.Peer) *endpoint {
	e := &endpoint{
		instance: i, peer: peer,
		quiet:    make(chan struct{}),
		sessions: make(map[*session]struct{}),
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	return e
}

// keep ends the endpoint once it has failed.
func (e *endpoint) keep() {
	<-e.ctx.Done()
	e.mu.Lock()
	sessions := keys(e.sessions)
	e.mu.Unlock()
	for _, s := range sessions {
		s.Close()
	}
	e.users.Wait()
	e.reach.leave()

	e.mu.Lock()
	e.ended = true
	e.mu.Unlock()
	for _, f := range e.onEnd {
		f()
	}
	e.instance.disown(e)
	close(e.quiet)
}

// fail refuses transfers from now on and stops those in flight. The first reason counts.
func (e *endpoint) fail(why *backend.Error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.fall(why)
}

// fall is fail, under endpoint.mu.
func (e *endpoint) fall(why *backend.Error) {
	if e.err != nil {
		return
	}
	e.err = why
	for s := range e.sessions {
		for _, t := range s.inFlight {
			t.stop()
		}
	}
	e.cancel()
}

// Done implements backend.Endpoint.
func (e *endpoint) Done() <-chan struct{} { return e.ctx.Done() }

// Close implements backend.Endpoint.
func (e *endpoint) Close() error {
	e.fail(&backend.Error{Code: backend.PathDown, Backend: e.instance.name, Peer: e.peer, Text: "the endpoint is closed"})
	<-e.quiet
	return nil
}

// Session implements backend.Endpoint. What the remote region is, and what may be done with it, the target says
// and not the descriptor, which only opens it.
func (e *endpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	key, err := e.check(local, &remote)
	if err != nil {
		return nil, err
	}
	joining, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(e.ctx, cancel)()
	s := &session{
		endpoint: e, local: local, remote: remote.Region, sink: sink,
		cancel: cancel, quiet: make(chan struct{}),
	}
	if err := e.attach(s); err != nil {
		return nil, err
	}
	err = s.join(joining, key)
	s.users.Done()
	if err == nil {
		return s, nil
	}
	s.Close()
	if joining.Err() != nil && ctx.Err() == nil { // by Deregister, where the endpoint has not failed
		_, unregistered := e.instance.near(local)
		err = cmp.Or(unregistered, err)
	}
	return nil, cmp.Or(e.failure(), err)
}

// check refuses regions that cannot belong together, and returns the key to the remote one.
func (e *endpoint) check(local backend.RegionID, remote *backend.Remote) (key regionKey, err error) {
	fail := func(code backend.Code, text string) (regionKey, error) {
		return regionKey{}, &backend.Error{
			Code: code, Op: "session", Backend: e.instance.name, Peer: e.peer, Region: remote.Region, Text: text,
		}
	}
	if remote.Peer.Node != e.peer.Node || remote.Peer.Incarnation != e.peer.Incarnation {
		return fail(backend.PeerGone, "the descriptor is of "+remote.Peer.String()+": fetch it anew")
	}
	if !e.instance.info.Capabilities.Remote.Has(remote.Kind) {
		return fail(backend.Unsupported, "memory of kind "+remote.Kind.String()+" cannot be mapped")
	}
	if near, err := e.instance.near(local); err == nil { // where there is none, whoever looks it up for good says so
		if _, ok := e.instance.info.Capabilities.Link(near.place, remote.Place); !ok {
			return fail(backend.Unsupported, fmt.Sprintf("there is no link from %s to %s", placeName(near.place), placeName(remote.Place)))
		}
	}
	if len(remote.Key) != len(key) {
		return fail(backend.Denied, "the region has no key of this backend, or it gives peers no rights")
	}
	copy(key[:], remote.Key)
	return key, e.failure()
}

// placeName says what a place is.
func placeName(place string) string {
	if place == "" {
		return "host memory"
	}
	return "GPU " + place
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

// attach adds a session that is to be joined.
func (e *endpoint) attach(s *session) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil {
		return e.err
	}
	e.sessions[s] = struct{}{}
	s.users.Add(1)
	return nil
}

// detach removes a session that has ended.
func (e *endpoint) detach(s *session) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.sessions, s)
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

// use keeps the endpoint from becoming quiet until done is called, unless it has failed. The context that it returns
// also ends when the endpoint fails.
func (e *endpoint) use(ctx context.Context) (_ context.Context, done func(), err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil {
		return nil, nil, e.err
	}
	e.users.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(e.ctx, cancel)
	return ctx, func() { stop(); cancel(); e.users.Done() }, nil
}

// Ask implements Target.
func (e *endpoint) Ask(ctx context.Context, question []byte) ([]byte, error) {
	if len(question) > MaxNote {
		return nil, &backend.Error{
			Code: backend.BadRequest, Op: "ask", Backend: e.instance.name, Peer: e.peer,
			Text: fmt.Sprintf("the question of %d bytes exceeds %d", len(question), MaxNote),
		}
	}
	ctx, done, err := e.use(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	answer, err := e.reach.ask(ctx, question)
	if err != nil {
		return nil, cmp.Or(e.failure(), error(e.instance.explain(err, "ask", e.peer, 0)))
	}
	return answer, nil
}

// Open implements Target.
func (e *endpoint) Open(ctx context.Context, id backend.RegionID, key []byte) (Region, error) {
	if len(key) != len(regionKey{}) {
		return nil, &backend.Error{
			Code: backend.Denied, Op: "open", Backend: e.instance.name, Peer: e.peer, Region: id,
			Text: fmt.Sprintf("a key of %d bytes opens no region", len(key)),
		}
	}
	ctx, done, err := e.use(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	a, err := e.reach.open(ctx, id, regionKey(key))
	if err != nil {
		return nil, cmp.Or(e.failure(), err)
	}
	return a.region, nil
}

// OnEnd implements Target.
func (e *endpoint) OnEnd(f func()) {
	e.mu.Lock()
	if !e.ended {
		e.onEnd = append(e.onEnd, f)
		f = func() {}
	}
	e.mu.Unlock()
	f()
}

// Peer implements Target.
func (e *endpoint) Peer() backend.Peer { return e.peer }
