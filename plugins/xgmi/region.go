package xgmi

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/gpu"
	"github.com/umbp/umbp/plugin-sdk/samehost"
)

// region is a region of this process, or one that another process lends and that is mapped here.
type region struct {
	e      *engine // that took it in
	device *device // nil for host memory
	size   uint64
	lent   samehost.Lent // what other processes get; File is -1 for GPU memory, and for host memory that has none
	// refusal says why other processes get nothing.
	refusal *backend.Error

	// Of GPU memory: where it begins, as the runtime knows it.
	address uint64

	// Of host memory.
	bytes []byte
	pin   struct {
		sync.Mutex
		tried   bool
		address uint64
		held    bool
	}

	// giveBack undoes what taking it in did.
	giveBack func() error
}

// place returns where the region lies, in the words of backend.Link.
func (r *region) place() string {
	if r.device == nil {
		return ""
	}
	return r.device.PCI
}

// Size implements samehost.Region.
func (r *region) Size() uint64 { return r.size }

// Lend implements samehost.Region.
func (r *region) Lend(backend.Rights) (samehost.Lent, error) {
	if r.refusal != nil {
		return samehost.Lent{}, r.refusal
	}
	return r.lent, nil
}

// Close implements samehost.Region.
func (r *region) Close() error {
	err := r.unpin()
	if r.giveBack != nil {
		err = firstError(err, r.giveBack())
	}
	if r.lent.File >= 0 {
		err = firstError(err, unix.Close(r.lent.File))
	}
	return err
}

// Admit implements samehost.Mover.
func (e *engine) Admit(_ context.Context, m backend.Memory) (samehost.Region, error) {
	r, err := e.admit(m)
	if err != nil {
		return nil, err
	}
	return r, nil
}

func (e *engine) admit(m backend.Memory) (*region, error) {
	if err := m.Check(); err != nil {
		return nil, err
	}
	if m.Kind == backend.GPUMemory {
		return e.admitGPU(m.GPU)
	}
	switch {
	case len(m.Bytes) == 0:
		return nil, backend.Errorf(backend.BadRequest, "the region is empty")
	case m.FD >= 0 && (m.FDOffset < 0 || m.FDOffset > math.MaxInt64-int64(len(m.Bytes))):
		return nil, backend.Errorf(backend.BadRequest, "a file offset of %d is out of range", m.FDOffset)
	}
	r := &region{e: e, size: uint64(len(m.Bytes)), bytes: m.Bytes, lent: samehost.Lent{
		Rights: m.Rights, Size: uint64(len(m.Bytes)), File: -1, Note: encodeHost(uint64(m.FDOffset)),
	}}
	if m.FD < 0 {
		r.refusal = backend.Errorf(backend.Unsupported, "the region was registered without a file descriptor: only its own process can reach it")
	} else if m.Rights != 0 {
		var err error
		if r.lent.File, err = samehost.Reopen(m.FD, m.Rights); err != nil {
			return nil, &backend.Error{Code: backend.Internal, Text: "duplicate the descriptor of the memory", Err: err}
		}
	}
	return r, nil
}

func (e *engine) admitGPU(g *backend.GPURange) (*region, error) {
	if g.Address == 0 {
		return e.importRange(g, g.Size)
	}
	d, err := e.find(g)
	if err != nil {
		return nil, err
	}
	got, err := e.rt.Describe(g.Address, g.Size)
	if err != nil {
		return nil, &backend.Error{Code: backend.Unsupported, Text: fmt.Sprintf("the runtime does not know %d bytes at %#x as memory of a GPU", g.Size, g.Address), Err: err}
	}
	if got.Device != g.Device || got.Allocation != g.Allocation || got.Offset != g.Offset {
		return nil, backend.Errorf(backend.BadRequest,
			"the region is said to be at offset %d of an allocation of %d bytes on %s, and the runtime has it at offset %d of %d bytes on %s: describe it with gpu.Runtime.Describe",
			g.Offset, g.Allocation, g.Device, got.Offset, got.Allocation, got.Device)
	}
	r := &region{e: e, device: d, size: g.Size, address: g.Address}
	r.offer(g)
	return r, nil
}

// offer makes the range known to other processes, by the handle that it came with.
func (r *region) offer(g *backend.GPURange) {
	r.lent = samehost.Lent{Size: g.Size, File: -1, Note: encodeGPU(g)}
	if len(g.Handle) == 0 {
		r.refusal = backend.Errorf(backend.Unsupported, "the runtime gives no handle for the memory: only its own process can reach it")
	}
}

// Map implements samehost.Mover.
func (e *engine) Map(_ context.Context, l samehost.Lent) (samehost.Region, error) {
	r, err := e.mapLent(l)
	if err != nil {
		return nil, err
	}
	return r, nil
}

func (e *engine) mapLent(l samehost.Lent) (*region, error) {
	if l.File < 0 {
		g, err := parseGPU(l.Note, l.Size)
		if err != nil {
			return nil, &backend.Error{Code: backend.Unsupported, Err: err}
		}
		return e.importRange(g, l.Size)
	}
	offset, err := parseHost(l.Note)
	if err != nil {
		return nil, &backend.Error{Code: backend.Unsupported, Err: err}
	}
	whole, bytes, err := samehost.MapFile(l.File, offset, l.Size, l.Rights)
	if err != nil {
		return nil, &backend.Error{Code: backend.Unsupported, Err: err}
	}
	return &region{
		e: e, size: l.Size, bytes: bytes, lent: samehost.Lent{File: -1},
		giveBack: func() error { return unix.Munmap(whole) },
	}, nil
}

// find returns the device that a range lies on. The range may come from a peer.
func (e *engine) find(g *backend.GPURange) (*device, error) {
	if err := g.Check(); err != nil {
		return nil, err
	}
	if g.Runtime != e.rt.Name() {
		return nil, backend.Errorf(backend.Unsupported, "the memory is of runtime %q, and this process uses %q", g.Runtime, e.rt.Name())
	}
	d := e.device(g.Device)
	if d == nil {
		return nil, backend.Errorf(backend.Unsupported, "GPU %s is not among those that this process uses: %s; see *_VISIBLE_DEVICES and the option devices",
			g.Device, e.places())
	}
	if why := d.lost.Load(); why != nil {
		return nil, d.refusal(backend.Unsupported, why)
	}
	return d, nil
}

// importRange makes a range of another process usable.
func (e *engine) importRange(g *backend.GPURange, size uint64) (*region, error) {
	d, err := e.find(g)
	if err != nil {
		return nil, err
	}
	key := importKey{library: e.rt.Library(), device: d.PCI}
	if len(g.Handle) != len(key.handle) {
		return nil, backend.Errorf(backend.Unsupported,
			"the memory has a handle of %d bytes, and one that can be imported has %d", len(g.Handle), len(key.handle))
	}
	copy(key.handle[:], g.Handle)
	m, err := imports.take(key, func() (mapping, error) { return e.openImport(d, key.handle) })
	if err != nil {
		return nil, d.fault(backend.Unsupported, "the memory of another process cannot be imported", err)
	}
	r := &region{e: e, device: d, size: size, address: m.address + g.Offset, giveBack: func() error { return e.unimport(key, d) }}
	// A copy that runs over the end of an allocation may end this process.
	if g.Allocation > m.bytes {
		r.giveBack()
		return nil, backend.Errorf(backend.BadRequest, "the allocation is said to have %d bytes, and has %d", g.Allocation, m.bytes)
	}
	r.offer(g)
	return r, nil
}

// openImport maps an allocation of another process.
func (e *engine) openImport(d *device, h gpu.Handle) (m mapping, err error) {
	err = d.run(func(c *gpu.Context) (err error) {
		if m.address, err = c.Import(h); err != nil {
			return err
		}
		e.counts.imports.Add(1)
		start, size, err := c.Range(m.address)
		if err != nil {
			e.counts.importsClosed.Add(1)
			return errors.Join(err, c.Unimport(m.address))
		}
		m.bytes = start + size - m.address
		return nil
	})
	return m, err
}

// unimport ends the use of an import. A device that is lost has taken its imports along.
func (e *engine) unimport(key importKey, d *device) error {
	return imports.give(key, func(address uint64) error {
		e.counts.importsClosed.Add(1)
		err := d.run(func(c *gpu.Context) error { return c.Unimport(address) })
		if err != nil && d.lost.Load() == nil {
			return d.fault(backend.Internal, "an import cannot be closed", err)
		}
		return nil
	})
}

// reach returns where the runtime finds the region. Host memory is pinned when the first path needs it, and stays so: it
// takes long. What cannot be pinned, because the system does not let so much memory be locked, or the memory may only be
// read, is copied all the same, if slower.
func (r *region) reach() uint64 {
	if r.device != nil {
		return r.address
	}
	p := &r.pin
	p.Lock()
	defer p.Unlock()
	if p.tried {
		return p.address
	}
	p.tried = true
	err := r.e.anyDevice().run(func(c *gpu.Context) (err error) {
		p.address, err = c.Pin(r.bytes)
		return err
	})
	if p.held = err == nil; !p.held {
		p.address = address(r.bytes)
		r.e.log.Warn("host memory cannot be pinned: it is copied slowly", "backend", name, "bytes", r.size, "error", err)
	}
	return p.address
}

// unpin undoes what reach did.
func (r *region) unpin() error {
	if !r.pin.held {
		return nil
	}
	d := r.e.anyDevice()
	err := d.run(func(c *gpu.Context) error { return c.Unpin(r.bytes) })
	if err != nil && d.lost.Load() == nil {
		return d.fault(backend.Internal, "host memory cannot be unpinned", err)
	}
	return nil
}
