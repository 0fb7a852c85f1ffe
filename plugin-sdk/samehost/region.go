package samehost

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"strings"
	"sync"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// regionKey is what a peer must show to be lent a region.
type regionKey [16]byte

// region is one region of this process.
type region struct {
	id     backend.RegionID
	own    bool   // it is the mover's, and none of the host's
	place  string // of backend.Link
	rights backend.Rights
	key    regionKey // where the region has rights

	// Set before state is usable, for good:
	region Region
	lent   Lent
	unlent *backend.Error // why guests in other processes are not lent it

	closing  sync.Once
	closeErr error

	state regionState // under Instance.mu
}

type regionState uint8

const (
	arriving regionState = iota // the mover has not admitted it yet
	usable
	ending // nobody new may use it
)

// Register implements backend.Backend.
func (i *Instance) Register(ctx context.Context, m backend.Memory) ([]byte, error) {
	fail := func(code backend.Code, text string) ([]byte, error) {
		return nil, &backend.Error{Code: code, Op: "register", Backend: i.name, Region: m.Region, Text: text}
	}
	switch {
	case !i.info.Capabilities.Local.Has(m.Kind):
		return fail(backend.Unsupported, fmt.Sprintf("memory of kind %s cannot be shared; register %s memory", m.Kind, i.kinds()))
	case m.Region == 0:
		return fail(backend.BadRequest, "zero is no region id")
	case m.Rights&^(backend.RemoteRead|backend.RemoteWrite) != 0:
		return fail(backend.BadRequest, fmt.Sprintf("rights %#x do not exist", m.Rights))
	}
	if err := m.Check(); err != nil {
		return nil, i.explain(err, "register", backend.Peer{}, m.Region)
	}
	r := &region{id: m.Region, place: m.Place(), rights: m.Rights}
	rand.Read(r.key[:])

	// The id is taken before the mover is asked, which then never sees the same region twice.
	i.mu.Lock()
	switch {
	case i.closed:
		i.mu.Unlock()
		return nil, i.errClosed("register")
	case i.regions[m.Region] != nil:
		i.mu.Unlock()
		return fail(backend.BadRequest, "the region is registered already")
	}
	i.regions[m.Region] = r
	i.tasks.Add(1)
	i.mu.Unlock()
	defer i.tasks.Done()

	var err error
	if r.region, err = i.mover.Admit(ctx, m); err != nil {
		i.mu.Lock()
		defer i.mu.Unlock()
		delete(i.regions, m.Region)
		return nil, i.explain(err, "register", backend.Peer{}, m.Region)
	}
	i.prepare(r)

	i.mu.Lock()
	defer i.mu.Unlock()
	r.state = usable
	if i.closed { // Close gives the region back
		return nil, i.errClosed("register")
	}
	if m.Rights == 0 {
		return nil, nil
	}
	return append([]byte(nil), r.key[:]...), nil
}

// Lend registers a region of the mover's own, to be opened by guests through Target.Open. It is not among the host's
// regions: its id is drawn at random, from 1<<63 up. The region is the instance's from then on, but for an error.
func (i *Instance) Lend(own Region, rights backend.Rights) (backend.RegionID, []byte, error) {
	r := &region{own: true, rights: rights, region: own, state: usable}
	rand.Read(r.key[:])
	i.prepare(r)

	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return 0, nil, i.errClosed("lend")
	}
	for r.id == 0 || i.regions[r.id] != nil {
		r.id = drawID()
	}
	i.regions[r.id] = r
	return r.id, append([]byte(nil), r.key[:]...), nil
}

// drawID draws an id that no host will ever happen to use.
func drawID() backend.RegionID {
	var b [8]byte
	rand.Read(b[:])
	return backend.RegionID(binary.NativeEndian.Uint64(b[:]) | 1<<63)
}

// prepare asks the mover for what guests in other processes need.
func (i *Instance) prepare(r *region) {
	if r.rights == 0 {
		return
	}
	var err error
	if r.lent, err = r.region.Lend(r.rights); err != nil {
		r.unlent = i.explain(err, "session", i.self, r.id)
	} else if len(r.lent.Note) > MaxNote {
		r.unlent = &backend.Error{
			Code: backend.Internal, Op: "session", Backend: i.name, Peer: i.self, Region: r.id,
			Text: fmt.Sprintf("the region's note of %d bytes exceeds %d", len(r.lent.Note), MaxNote),
		}
	}
}

// kinds names the kinds of memory that can be registered.
func (i *Instance) kinds() string {
	var list []string
	for _, k := range []backend.MemoryKind{backend.HostMemory, backend.GPUMemory} {
		if i.info.Capabilities.Local.Has(k) {
			list = append(list, k.String())
		}
	}
	return strings.Join(list, " or ")
}

// Deregister implements backend.Backend. It breaks the endpoints of the peers that were lent the region: they
// connect anew. When it returns an error, the region is out of use but still held; Deregister again later.
func (i *Instance) Deregister(ctx context.Context, id backend.RegionID) error {
	return i.remove(ctx, "deregister", id, false)
}

// Withdraw ends what Lend began: as Deregister does, it evicts the guests that hold the region, and it closes it. An
// unknown region is not an error.
func (i *Instance) Withdraw(ctx context.Context, id backend.RegionID) error {
	return i.remove(ctx, "withdraw", id, true)
}

func (i *Instance) remove(ctx context.Context, op string, id backend.RegionID, own bool) error {
	i.mu.Lock()
	r := i.regions[id]
	if r == nil || r.own != own || r.state == arriving {
		i.mu.Unlock()
		return nil
	}
	r.state = ending
	endpoints := keys(i.endpoints)
	i.mu.Unlock()

	var sessions []*session
	for _, e := range endpoints {
		sessions = append(sessions, e.sessionsOf(id)...)
	}
	for _, s := range sessions {
		go s.Close() // it ends with the session's transfers, which may take longer than the caller waits
	}
	for _, s := range sessions {
		select {
		case <-s.quiet:
		case <-ctx.Done():
			return &backend.Error{
				Code: backend.Cancelled, Op: op, Backend: i.name, Peer: s.endpoint.peer, Region: id, Err: ctx.Err(),
				Text: "transfers still use the region: keep the memory as it is and try again",
			}
		}
	}
	err := i.evict(ctx, op, func(g *Guest) bool {
		_, holds := g.holds[id]
		return holds
	})
	if err != nil {
		return err
	}
	err = i.closeRegion(op, r)
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.regions[id] == r {
		delete(i.regions, id)
	}
	return err
}

// closeRegion gives back what a region holds that nobody uses any more. It may be called more than once, and returns
// when the region is closed.
func (i *Instance) closeRegion(op string, r *region) error {
	r.closing.Do(func() {
		if err := r.region.Close(); err != nil {
			r.closeErr = i.explain(err, op, backend.Peer{}, r.id)
		}
	})
	return r.closeErr
}

// near returns a region of the host's, for its own transfers.
func (i *Instance) near(id backend.RegionID) (*region, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if r := i.regions[id]; r != nil && !r.own && r.state == usable {
		return r, nil
	}
	return nil, &backend.Error{
		Code: backend.BadRequest, Op: "session", Backend: i.name, Region: id,
		Text: "the local region is not registered",
	}
}
