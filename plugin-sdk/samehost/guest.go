package samehost

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// servePatience bounds the answer to one question.
const servePatience = 10 * time.Second

// Guest is an endpoint as its target sees it: someone who may hold our regions. The methods may be called at any time.
type Guest struct {
	instance *Instance
	peer     backend.Peer
	// revoke asks the guest to let go of everything. It does not block, and may be called more than once.
	revoke func()
	// quiet is closed when nothing of the guest can touch our memory any more.
	quiet <-chan struct{}

	// Under Instance.mu:
	revoked bool // it is lent nothing more
	left    bool // nothing of it can touch our memory any more
	holds   map[backend.RegionID]struct{}
	onLeave []func()
}

// Peer is who the guest is.
func (g *Guest) Peer() backend.Peer { return g.peer }

// OnLeave has f called once, on some goroutine, when nothing of the guest can touch our memory any more: at once where
// that is so already, and not at all where the instance is closed before. The guest counts as quiet when f has returned,
// which Instance.Close waits for; f may call Withdraw.
func (g *Guest) OnLeave(f func()) {
	g.instance.mu.Lock()
	if !g.left {
		g.onLeave = append(g.onLeave, f)
		f = func() {}
	}
	g.instance.mu.Unlock()
	f()
}

// lend looks up a region for a guest and notes that the guest holds it. From then on the region stays as it is
// until the guest is quiet.
func (i *Instance) lend(g *Guest, id backend.RegionID, key regionKey, elsewhere bool) (*region, *backend.Error) {
	fail := func(code backend.Code, text string) (*region, *backend.Error) {
		return nil, &backend.Error{
			Code: code, Op: "session", Backend: i.name, Peer: i.self, Region: id, Text: text,
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	r := i.regions[id]
	switch {
	case g.revoked:
		return fail(backend.PathDown, "the peer has ended the connection: connect again")
	case r == nil || r.state != usable:
		return fail(backend.BadRequest, "the peer has no such region")
	case r.rights == 0:
		return fail(backend.Denied, "the region gives peers no rights")
	case subtle.ConstantTimeCompare(key[:], r.key[:]) != 1:
		return fail(backend.Denied, "the key does not open the region: fetch its descriptor anew")
	case elsewhere && r.unlent != nil:
		return nil, r.unlent
	}
	g.holds[id] = struct{}{}
	return r, nil
}

// answer has the mover answer a question of a guest's.
func (i *Instance) answer(ctx context.Context, g *Guest, question []byte) ([]byte, *backend.Error) {
	i.mu.Lock()
	revoked := g.revoked
	if !revoked {
		i.tasks.Add(1)
		defer i.tasks.Done()
	}
	i.mu.Unlock()
	if revoked {
		return nil, i.errRevoked(i.self)
	}
	ctx, cancel := context.WithTimeout(ctx, servePatience)
	defer cancel()
	b, err := i.mover.Serve(ctx, g, question)
	switch {
	case err != nil:
		return nil, i.explain(err, "ask", i.self, 0)
	case len(b) > MaxNote:
		return nil, &backend.Error{
			Code: backend.Internal, Op: "ask", Backend: i.name, Peer: i.self,
			Text: fmt.Sprintf("the answer of %d bytes exceeds %d", len(b), MaxNote),
		}
	}
	return b, nil
}

// forget removes a guest that has left.
func (i *Instance) forget(g *Guest) {
	i.mu.Lock()
	g.revoked, g.left = true, true
	clear(g.holds) // so that what is called here can withdraw what the guest held
	onLeave := g.onLeave
	g.onLeave = nil
	if i.ctx.Err() != nil { // Close has given up waiting for the guest
		onLeave = nil
	} else {
		i.tasks.Add(1)
		defer i.tasks.Done()
	}
	i.mu.Unlock()
	for _, f := range onLeave {
		f()
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.guests, g)
}

// evict revokes the guests that match and waits until they are quiet.
func (i *Instance) evict(ctx context.Context, op string, match func(*Guest) bool) error {
	var leaving []*Guest
	i.mu.Lock()
	for g := range i.guests {
		if match(g) {
			g.revoked = true
			leaving = append(leaving, g)
		}
	}
	i.mu.Unlock()

	for _, g := range leaving {
		g.revoke()
	}
	var errs []error
	for _, g := range leaving {
		select {
		case <-g.quiet:
		case <-ctx.Done():
		case <-i.ctx.Done():
		}
		select {
		case <-g.quiet:
			continue
		default:
		}
		err := &backend.Error{
			Code: backend.Cancelled, Op: op, Backend: i.name, Peer: g.peer, Err: ctx.Err(),
			Text: "the peer has not let go of this process's memory: keep the memory out of use and try again",
		}
		if i.ctx.Err() != nil {
			err.Code = backend.PathDown
			err.Text = "the backend was closed before the peer had let go of this process's memory: keep the memory out of use"
		}
		errs = append(errs, err)
	}
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}
