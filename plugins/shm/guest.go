package shm

import (
	"context"
	"crypto/subtle"
	"errors"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// guest is an endpoint as its target sees it: someone who may hold our regions.
type guest struct {
	peer backend.Peer
	// revoke asks the guest to let go of everything. It does not block, and may be called more than once.
	revoke func()
	// quiet is closed when nothing of the guest can touch our memory any more.
	quiet <-chan struct{}

	// Under instance.mu:
	revoked bool // it is lent nothing more
	holds   map[backend.RegionID]struct{}
}

// lend looks up a region for a guest and notes that the guest holds it. From then on the region stays as it is
// until the guest is quiet.
func (i *instance) lend(g *guest, id backend.RegionID, key regionKey, needFile bool) (*region, *backend.Error) {
	fail := func(code backend.Code, text string) (*region, *backend.Error) {
		return nil, &backend.Error{
			Code: code, Op: "session", Backend: name, Peer: i.self, Region: id, Text: text,
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	r := i.regions[id]
	switch {
	case g.revoked:
		return fail(backend.PathDown, "the peer has ended the connection: connect again")
	case r == nil || r.leaving:
		return fail(backend.BadRequest, "the peer has no such region")
	case r.memory.Rights == 0:
		return fail(backend.Denied, "the region gives peers no rights")
	case subtle.ConstantTimeCompare(key[:], r.key[:]) != 1:
		return fail(backend.Denied, "the key does not open the region: fetch its descriptor anew")
	case needFile && r.file < 0:
		return fail(backend.Unsupported, "the region was registered without a file descriptor: only its own process can reach it")
	}
	g.holds[id] = struct{}{}
	return r, nil
}

// forget removes a guest that is quiet, or about to be.
func (i *instance) forget(g *guest) {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.guests, g)
}

// evict revokes the guests that match and waits until they are quiet.
func (i *instance) evict(ctx context.Context, op string, match func(*guest) bool) error {
	var leaving []*guest
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
			continue
		default:
		}
		select {
		case <-g.quiet:
		case <-ctx.Done():
			errs = append(errs, &backend.Error{
				Code: backend.Cancelled, Op: op, Backend: name, Peer: g.peer, Err: ctx.Err(),
				Text: "the peer has not let go of this process's memory: keep the memory out of use and try again",
			})
		}
	}
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}
