package shm

import (
	"context"
	"crypto/rand"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// regionKey is what a peer must show to be lent a region.
type regionKey [16]byte

// region is one registered region of this process.
type region struct {
	memory backend.Memory // its FD is the host's and is not used here after Register
	key    regionKey      // where the region has rights
	// file is a descriptor of our own with no more than the region's rights, for guests in other processes; -1
	// when there is none.
	file int
	// leaving is set, under instance.mu, when Deregister has begun: nobody new may use the region.
	leaving bool
}

// Register implements backend.Backend.
func (i *instance) Register(_ context.Context, m backend.Memory) ([]byte, error) {
	fail := func(code backend.Code, text string, err error) ([]byte, error) {
		return nil, &backend.Error{Code: code, Op: "register", Backend: name, Region: m.Region, Text: text, Err: err}
	}
	switch {
	case m.Kind != backend.HostMemory:
		return fail(backend.Unsupported, fmt.Sprintf("memory of kind %s cannot be shared; register host memory", m.Kind), nil)
	case m.Region == 0:
		return fail(backend.BadRequest, "zero is no region id", nil)
	case len(m.Bytes) == 0:
		return fail(backend.BadRequest, "the region is empty", nil)
	case m.Rights&^(backend.RemoteRead|backend.RemoteWrite) != 0:
		return fail(backend.BadRequest, fmt.Sprintf("rights %#x do not exist", m.Rights), nil)
	case m.FD >= 0 && (m.FDOffset < 0 || m.FDOffset > math.MaxInt64-int64(len(m.Bytes))):
		return fail(backend.BadRequest, fmt.Sprintf("a file offset of %d is out of range", m.FDOffset), nil)
	}
	r := &region{memory: m, file: -1}
	if m.Rights != 0 && m.FD >= 0 {
		var err error
		if r.file, err = leastRights(m.FD, m.Rights); err != nil {
			return fail(backend.Internal, "duplicate the descriptor of the memory", err)
		}
	}
	rand.Read(r.key[:])

	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		r.close()
		return nil, errClosed("register")
	}
	if i.regions[m.Region] != nil {
		r.close()
		return fail(backend.BadRequest, "the region is registered already", nil)
	}
	i.regions[m.Region] = r
	if m.Rights == 0 {
		return nil, nil
	}
	return append([]byte(nil), r.key[:]...), nil
}

// leastRights duplicates the descriptor, without the right to write where guests have none.
func leastRights(fd int, rights backend.Rights) (int, error) {
	if rights&backend.RemoteWrite != 0 {
		return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	}
	return unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
}

// close gives back what the region holds.
func (r *region) close() error {
	if r.file < 0 {
		return nil
	}
	return unix.Close(r.file)
}

// Deregister implements backend.Backend. It breaks the endpoints of the peers that were lent the region: they
// connect anew. When it returns an error, the region is out of use but still held; Deregister again later.
func (i *instance) Deregister(ctx context.Context, id backend.RegionID) error {
	i.mu.Lock()
	r := i.regions[id]
	if r == nil {
		i.mu.Unlock()
		return nil
	}
	r.leaving = true
	endpoints := keys(i.endpoints)
	i.mu.Unlock()

	for _, e := range endpoints {
		for _, s := range e.sessionsOf(id) {
			s.Close()
		}
	}
	err := i.evict(ctx, "deregister", func(g *guest) bool {
		_, holds := g.holds[id]
		return holds
	})
	if err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.regions[id] != r { // another Deregister, or Close, was faster
		return nil
	}
	delete(i.regions, id)
	return r.close()
}

// near returns the bytes of a region of this process, for its own transfers.
func (i *instance) near(id backend.RegionID) ([]byte, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if r := i.regions[id]; r != nil && !r.leaving {
		return r.memory.Bytes, nil
	}
	return nil, &backend.Error{
		Code: backend.BadRequest, Op: "session", Backend: name, Region: id,
		Text: "the local region is not registered",
	}
}
