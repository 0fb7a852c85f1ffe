package samehost

import (
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Reopen duplicates the descriptor of a region, without the right to write where guests have none. The descriptor is the
// caller's.
func Reopen(fd int, rights backend.Rights) (int, error) {
	if rights&backend.RemoteWrite != 0 {
		return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	}
	return unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
}

// MapFile maps a region that a peer lent: size bytes from offset of its file, to be written only where there is
// RemoteWrite. It trusts none of its arguments, for the peer may be broken, and maps only what cannot shrink under this
// process. What it returns first is to be unmapped in the end: the region and what precedes it in its page.
func MapFile(fd int, offset, size uint64, rights backend.Rights) (whole, region []byte, err error) {
	page := uint64(unix.Getpagesize())
	start := offset &^ (page - 1)
	if size == 0 || offset > math.MaxInt64 || size > math.MaxInt64-offset || size > math.MaxInt-page {
		return nil, nil, fmt.Errorf("the peer's region of %d bytes at offset %d of its file cannot be", size, offset)
	}
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		return nil, nil, errors.New("the file of the peer's region could shrink under this process: it must be a memfd sealed with F_SEAL_SHRINK")
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, nil, fmt.Errorf("measure the file of the peer's region: %w", err)
	}
	if uint64(stat.Size) < offset+size {
		return nil, nil, fmt.Errorf("the peer's region ends at offset %d of a file of %d bytes", offset+size, stat.Size)
	}
	protection := unix.PROT_READ
	if rights&backend.RemoteWrite != 0 {
		protection |= unix.PROT_WRITE
	}
	whole, err = unix.Mmap(fd, int64(start), int(offset-start+size), protection, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, fmt.Errorf("map the peer's region: %w", err)
	}
	return whole, whole[offset-start:], nil
}
