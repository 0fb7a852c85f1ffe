package region

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// HugePages says how an arena asks for huge pages, in the words of the configuration.
type HugePages string

// The ways to ask. Empty means HugePagesAuto.
const (
	HugePagesAuto    HugePages = "auto"    // use them where the host offers them for shared memory; never fail
	HugePagesOff     HugePages = "off"     // use small pages
	HugePagesRequire HugePages = "require" // use pages of 2 MiB that the host has reserved, or fail
)

// hugePageSize is the length that reserved huge pages come in.
const hugePageSize = 2 << 20

// populatePart is how much memory is populated between two looks at the context, and between two reports of
// progress.
const populatePart = 64 << 20

// ArenaOptions are the choices that NewArena leaves to its caller. The zero value serves.
type ArenaOptions struct {
	HugePages HugePages
	// Context ends the populating early. Nil means that nothing does.
	Context context.Context
	// Progress is told how many bytes of the total are populated, from time to time and at the end: never twice
	// at once, and with a growing number. It may be nil.
	Progress func(done, total uint64)
}

// Arena is memory outside the Go heap that other processes can map: an anonymous file that lives as long as
// someone has it open or mapped, and leaves no name behind. Its size is sealed, so that none of those who share
// it can cut it off under the others; all of it is populated, so that the first transfer does not pay for the
// zeroing of pages. It is left out of core dumps.
//
// Its methods may be called at the same time, except Close.
type Arena struct {
	name      string
	fd        int
	bytes     []byte
	hugePages string
}

// NewArena makes an arena of size bytes, all zero. It takes as long as the kernel needs to zero them, on all
// processors. The name is for people: it appears in /proc/PID/maps. The error is BadRequest when the size cannot
// be had on this host or does not suit the huge pages required, Cancelled when the context ended first, and
// Internal when the kernel refuses; each says what to change.
func NewArena(name string, size uint64, opts ArenaOptions) (*Arena, error) {
	if opts.HugePages == "" {
		opts.HugePages = HugePagesAuto
	}
	if opts.Context == nil {
		opts.Context = context.Background()
	}
	if err := checkArena(name, size, opts.HugePages); err != nil {
		return nil, err
	}
	a, err := mapArena(name, size, opts.HugePages)
	if err != nil {
		return nil, err
	}
	if err := a.populate(opts.Context, opts.Progress); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	a.hugePages = a.describeHugePages(opts.HugePages)
	return a, nil
}

// checkArena refuses what cannot succeed, before the kernel is asked: a process that populates more than there is
// would not get an error, but be killed.
func checkArena(name string, size uint64, huge HugePages) error {
	refuse := func(format string, args ...any) error {
		return arenaError(backend.BadRequest, name, nil, format, args...)
	}
	switch {
	case size == 0 || size > math.MaxInt64:
		return refuse("it cannot have %d bytes: give it a size", size)
	case len(name) > 200:
		return refuse("the name is longer than the 200 bytes that the kernel has room for: shorten it")
	}
	switch huge {
	case HugePagesAuto, HugePagesOff:
		if free, whose := availableMemory(os.DirFS("/")); size > free {
			return refuse("%v are needed and %s %v: lower the size of the arena, or make memory available",
				backend.Size(size), whose, backend.Size(free))
		}
	case HugePagesRequire: // the kernel reserves them, or says that it cannot
		if size%hugePageSize != 0 {
			return refuse("%d bytes are no multiple of the 2MiB of a huge page: make it %v, or do not require huge pages",
				size, backend.Size((size/hugePageSize+1)*hugePageSize))
		}
	default:
		return refuse("%q is no way to ask for huge pages: write auto, off or require%s", huge,
			backend.DidYouMean(string(huge), []string{"auto", "off", "require"}))
	}
	return nil
}

// mapArena makes and seals the file, and maps it.
func mapArena(name string, size uint64, huge HugePages) (*Arena, error) {
	flags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING | unix.MFD_NOEXEC_SEAL
	if huge == HugePagesRequire {
		flags |= unix.MFD_HUGETLB | unix.MFD_HUGE_2MB
	}
	fd, err := unix.MemfdCreate("umbp-"+name, flags)
	if errors.Is(err, unix.EINVAL) { // kernels before 6.3 do not know how to forbid executing
		fd, err = unix.MemfdCreate("umbp-"+name, flags&^unix.MFD_NOEXEC_SEAL)
	}
	if err != nil {
		return nil, arenaError(backend.Internal, name, err,
			"memfd_create failed: raise the limit of open files (ulimit -n)%s", hugeHint(huge, size))
	}
	a := &Arena{name: name, fd: fd}
	fail := func(what string, err error) (*Arena, error) {
		return nil, errors.Join(arenaError(backend.Internal, name, err,
			"%s of %v failed: check the limits on memory and files (ulimit -v, ulimit -f, vm.overcommit_memory)%s",
			what, backend.Size(size), hugeHint(huge, size)), a.Close())
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return fail("ftruncate", err)
	}
	const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return fail("sealing", err)
	}
	if a.bytes, err = unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fail("mmap", err)
	}
	// Wishes: a kernel that does not grant one leaves the memory as good as it was.
	_ = unix.Madvise(a.bytes, unix.MADV_DONTDUMP)
	switch huge {
	case HugePagesAuto:
		_ = unix.Madvise(a.bytes, unix.MADV_HUGEPAGE)
	case HugePagesOff:
		_ = unix.Madvise(a.bytes, unix.MADV_NOHUGEPAGE)
	}
	return a, nil
}

// hugeHint is what else may help when the kernel refuses, where huge pages are required.
func hugeHint(huge HugePages, size uint64) string {
	if huge != HugePagesRequire {
		return ""
	}
	return fmt.Sprintf(", reserve huge pages (sysctl vm.nr_hugepages, %d more than are in use), or do not require them",
		size/hugePageSize)
}

// populate makes the kernel find and zero all pages now, in parts on all processors: zeroing is most of the cost.
func (a *Arena) populate(ctx context.Context, progress func(done, total uint64)) error {
	var mu sync.Mutex // guards done, and calls progress in order
	done, total := uint64(0), a.Size()
	group, partCtx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for from := uint64(0); from < total && partCtx.Err() == nil; from += populatePart {
		group.Go(func() error {
			if partCtx.Err() != nil {
				return partCtx.Err()
			}
			to := min(from+populatePart, total)
			if err := a.populateRange(from, to); err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			done += to - from
			if progress != nil {
				progress(done, total)
			}
			return nil
		})
	}
	err := group.Wait()
	switch {
	case ctx.Err() != nil && done < total:
		return arenaError(backend.Cancelled, a.name, context.Cause(ctx),
			"%d of %d bytes were populated in time: give it longer, or lower its size", done, total)
	case err != nil:
		return arenaError(backend.BadRequest, a.name, err,
			"memory ran out after %d of %d bytes: lower its size, or make memory available", done, total)
	}
	return nil
}

func (a *Arena) populateRange(from, to uint64) error {
	for {
		err := unix.Madvise(a.bytes[from:to], unix.MADV_POPULATE_WRITE)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
		case errors.Is(err, unix.EINVAL): // kernels before 5.14 do not know it
			return a.touch(from, to)
		default:
			return err
		}
	}
}

// touch populates by writing to each page. The pages are allocated before: to touch one that the kernel cannot
// find would be a fault that kills the process, where fallocate returns an error.
func (a *Arena) touch(from, to uint64) error {
	if err := unix.Fallocate(a.fd, 0, int64(from), int64(to-from)); err != nil {
		return err
	}
	page := uint64(os.Getpagesize())
	for i := from; i < to; i += page {
		a.bytes[i] = 0
	}
	return nil
}

// describeHugePages looks at what the kernel has done about the wish.
func (a *Arena) describeHugePages(huge HugePages) string {
	switch huge {
	case HugePagesOff:
		return "off"
	case HugePagesRequire:
		return "reserved pages of 2MiB"
	}
	start, _ := extent(a.bytes)
	mapped := mappingBytes(os.DirFS("/"), start, "ShmemPmdMapped", "FilePmdMapped")
	if mapped == 0 {
		return "none: the host offers none for shared memory (/sys/kernel/mm/transparent_hugepage/shmem_enabled)"
	}
	return fmt.Sprintf("transparent, for %v of %v", backend.Size(mapped), backend.Size(a.Size()))
}

// Bytes returns the memory; nil after Close.
func (a *Arena) Bytes() []byte { return a.bytes }

// FD returns the file descriptor of the memory, which starts at offset zero; -1 after Close. It stays the
// arena's: whoever wants to keep it duplicates it.
func (a *Arena) FD() int { return a.fd }

// Size returns the size in bytes; zero after Close.
func (a *Arena) Size() uint64 { return uint64(len(a.bytes)) }

// HugePages tells, for people, which huge pages were obtained.
func (a *Arena) HugePages() string { return a.hugePages }

// Close unmaps the memory and closes the file; other processes keep what they have mapped. Slices of Bytes must
// not be used any more: the owner closes when the regions in the arena have left every backend. Closing twice is
// not an error.
func (a *Arena) Close() error {
	if a.fd < 0 {
		return nil
	}
	var unmapped error
	if a.bytes != nil {
		unmapped = unix.Munmap(a.bytes)
	}
	err := errors.Join(unmapped, unix.Close(a.fd))
	a.bytes, a.fd = nil, -1
	if err != nil {
		return arenaError(backend.Internal, a.name, err, "it was not closed cleanly: this is a defect, please report it")
	}
	return nil
}

func arenaError(code backend.Code, name string, cause error, format string, args ...any) error {
	return &backend.Error{
		Code: code, Op: "arena " + name, Text: fmt.Sprintf(format, args...), Err: cause,
	}
}
