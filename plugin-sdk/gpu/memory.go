package gpu

import (
	"errors"
	"fmt"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Describe returns the range of size bytes at an address of this process, ready to be registered: its allocation, the
// offset in it, and a handle where the runtime gives one. Memory that the runtime does not export, such as that of a pool
// or of a virtual mapping, has no handle.
func (r *Runtime) Describe(address, size uint64) (backend.GPURange, error) {
	g := backend.GPURange{Runtime: r.kind.name, Address: address, Size: size}
	var ordinal uint64
	locate := func(c *Context) error {
		where, err := c.attribute(pointerMemoryType, address)
		if err != nil {
			return err
		}
		if where == r.kind.hostMemory(r.version) {
			return errors.New("it is host memory, which is registered as such")
		}
		n, err := c.attribute(pointerDeviceOrdinal, address)
		ordinal = uint64(n)
		return err
	}
	// On a thread without a device, so that none is set up only to be asked of another one's memory. Open MPI and KvikIO
	// ask CUDA like that, but its manual does not promise that there is an answer.
	err := r.on(noDevice, locate)
	if e := (*Error)(nil); errors.As(err, &e) && e.Code == codeInvalidContext {
		err = r.on(0, locate)
	}
	if err == nil {
		err = r.known(int(ordinal))
	}
	if err == nil {
		g.Device = r.devices[ordinal].PCI
		err = r.on(int(ordinal), func(c *Context) error {
			base, whole, err := c.within(address, size)
			if err != nil {
				return err
			}
			g.Allocation, g.Offset = whole, address-base
			var h ipcHandle
			switch err := c.check("IpcGetMemHandle", r.calls.ipcGetMemHandle(&h, base)); {
			case err == nil:
				g.Handle = h.Reserved[:]
			case Lost(err):
				return err
			}
			return nil
		})
	}
	if err != nil {
		return backend.GPURange{}, fmt.Errorf("gpu: %d bytes at %#x: %w", size, address, err)
	}
	return g, nil
}

// Alloc allocates memory on a device; Free gives it back, after what runs on the device. They, Load and Store may be
// called from any goroutine; those for one device wait for one another.
func (r *Runtime) Alloc(device int, size uint64) (address uint64, err error) {
	if err := r.known(device); err != nil {
		return 0, err
	}
	if size == 0 {
		return 0, errors.New("gpu: an allocation of no bytes") // which the runtimes take for one
	}
	err = r.on(device, func(c *Context) error {
		return c.check("Malloc", r.calls.malloc(&address, size))
	})
	return address, err
}

// Free gives back what Alloc allocated on the device.
func (r *Runtime) Free(device int, address uint64) error {
	if err := r.known(device); err != nil {
		return err
	}
	return r.on(device, func(c *Context) error { return c.check("Free", r.calls.free(address)) })
}

// Load copies from a device's memory into to, Store from from into it; both return when the bytes are there. A range that
// does not lie within one allocation is refused: the device would not survive touching it, and on some machines neither
// would the process.
func (r *Runtime) Load(device int, to []byte, address uint64) error {
	return r.move(device, address, len(to), func(c *Context) error {
		return c.check("Memcpy", r.calls.load(to, address, uint64(len(to)), memcpyDefault))
	})
}

// Store is described at Load.
func (r *Runtime) Store(device int, address uint64, from []byte) error {
	return r.move(device, address, len(from), func(c *Context) error {
		if err := c.check("Memcpy", r.calls.store(address, from, uint64(len(from)), memcpyDefault)); err != nil {
			return err
		}
		// Memory that is not pinned has only been read when the copy returns; it may still be on its way.
		return c.check("StreamSynchronize", r.calls.streamSynchronize(0))
	})
}

// move is what Load and Store have in common.
func (r *Runtime) move(device int, address uint64, n int, f func(c *Context) error) error {
	if err := r.known(device); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	return r.on(device, func(c *Context) error {
		if _, _, err := c.within(address, uint64(n)); err != nil {
			return fmt.Errorf("gpu: %d bytes at %#x: %w", n, address, err)
		}
		return f(c)
	})
}

// attribute asks for a number of the memory at an address.
func (c *Context) attribute(which int32, address uint64) (uint32, error) {
	var value uint64 // the runtimes write 32 bits of it, the first ones
	if err := c.checkDriver("PointerGetAttribute", c.r.calls.pointerGetAttribute(&value, which, address)); err != nil {
		return 0, err
	}
	return uint32(value), nil
}

// within returns the allocation that a range lies in, all of it.
func (c *Context) within(address, size uint64) (base, whole uint64, err error) {
	base, whole, err = c.Range(address)
	if err != nil {
		return 0, 0, err
	}
	if size == 0 {
		return 0, 0, errors.New("there are no bytes")
	}
	if offset := address - base; offset > whole || size > whole-offset {
		return 0, 0, fmt.Errorf("the allocation that it begins in ends before it does: it has %d bytes from %#x on", whole, base)
	}
	return base, whole, nil
}
