package conformance

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Memory is memory to lend: of the host, where Bytes is set, or of a GPU.
type Memory struct {
	// Bytes is memory of the host, off the Go heap. It starts at offset 0 of the file FD, which is -1 where there is
	// none.
	Bytes []byte
	FD    int
	// GPU says where all of it lies when it is memory that the processor cannot address; FD is -1 then. Load copies from
	// it, and Store to it, at an offset in bytes, and the bytes are there when they return. They are called from any
	// goroutine, also while a backend moves other bytes, or the same.
	GPU   *backend.GPURange
	Load  func(to []byte, offset uint64) error
	Store func(offset uint64, from []byte) error
	// Free gives back what the memory holds.
	Free func() error
}

// region returns a part of the memory as it is registered; the fields that name the region are left to the caller.
func (m *Memory) region(offset, size int) backend.Memory {
	if m.GPU != nil {
		part := *m.GPU
		part.Address += uint64(offset)
		part.Offset += uint64(offset)
		part.Size = uint64(size)
		return backend.Memory{Kind: backend.GPUMemory, GPU: &part, FD: -1}
	}
	part := backend.Memory{Kind: backend.HostMemory, Bytes: m.Bytes[offset : offset+size : offset+size], FD: m.FD}
	if m.FD >= 0 {
		part.FDOffset = int64(offset)
	}
	return part
}

// SealedMemory returns memory as UMBP's hosts have it: a shared mapping of a memfd whose size is sealed.
func SealedMemory(size int) (Memory, error) {
	fd, err := unix.MemfdCreate("umbp-conformance", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return Memory{}, fmt.Errorf("create a memfd: %w", err)
	}
	fail := func(what string, err error) (Memory, error) {
		return Memory{}, errors.Join(fmt.Errorf("%s a memfd of %d bytes: %w", what, size, err), unix.Close(fd))
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return fail("grow", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return fail("seal", err)
	}
	mapping, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fail("map", err)
	}
	return Memory{Bytes: mapping, FD: fd, Free: func() error {
		return errors.Join(unix.Munmap(mapping), unix.Close(fd))
	}}, nil
}

// GPURuntime is what GPUMemory needs of a GPU's runtime. *gpu.Runtime has it; the suite itself needs no runtime to be
// built.
type GPURuntime interface {
	Alloc(device int, size uint64) (address uint64, err error)
	Free(device int, address uint64) error
	Describe(address, size uint64) (backend.GPURange, error)
	Load(device int, to []byte, address uint64) error
	Store(device int, address uint64, from []byte) error
}

// GPUMemory lends memory of a device, by its number, for a Harness. The runtime stays the caller's, and open for as long
// as the harness is used.
func GPUMemory(rt GPURuntime, device int) func(size int) (Memory, error) {
	return func(size int) (Memory, error) {
		address, err := rt.Alloc(device, uint64(size))
		if err != nil {
			return Memory{}, fmt.Errorf("allocate %d bytes on GPU %d: %w", size, device, err)
		}
		where, err := rt.Describe(address, uint64(size))
		if err != nil {
			err = fmt.Errorf("describe %d bytes of GPU %d: %w", size, device, err)
			return Memory{}, errors.Join(err, rt.Free(device, address))
		}
		return Memory{
			GPU: &where, FD: -1,
			Load:  func(to []byte, offset uint64) error { return rt.Load(device, to, address+offset) },
			Store: func(offset uint64, from []byte) error { return rt.Store(device, address+offset, from) },
			Free:  func() error { return rt.Free(device, address) },
		}, nil
	}
}
