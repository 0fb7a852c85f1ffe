package conformance

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Memory is memory to register: off the Go heap, with a file descriptor, or -1 where there is none. Bytes starts
// at offset 0 of the file. Free gives both back.
type Memory struct {
	Bytes []byte
	FD    int
	Free  func() error
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
