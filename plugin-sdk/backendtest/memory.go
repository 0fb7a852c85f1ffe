package backendtest

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// memfdName is what the files of memory are called, in the lists of what a process has open and mapped.
const memfdName = "umbp-backendtest"

// NewMemfd makes a region of size bytes of a file in memory, which has the seals given, such as unix.F_SEAL_SHRINK. The
// region starts one page into the file: forgetting that offset is a favourite mistake. The caller hands it to FreeMemfd.
func NewMemfd(id backend.RegionID, size int, rights backend.Rights, seals int) (backend.Memory, error) {
	m := backend.Memory{Region: id, Kind: backend.HostMemory, Rights: rights, FDOffset: int64(os.Getpagesize())}
	var err error
	if m.FD, err = unix.MemfdCreate(memfdName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING); err != nil {
		return m, os.NewSyscallError("memfd_create", err)
	}
	if err = unix.Ftruncate(m.FD, m.FDOffset+int64(size)); err == nil {
		_, err = unix.FcntlInt(uintptr(m.FD), unix.F_ADD_SEALS, seals)
	}
	if err == nil {
		m.Bytes, err = unix.Mmap(m.FD, m.FDOffset, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err != nil {
		return m, errors.Join(err, unix.Close(m.FD))
	}
	return m, nil
}

// FreeMemfd unmaps a region and closes its file.
func FreeMemfd(m backend.Memory) error {
	return errors.Join(unix.Munmap(m.Bytes), unix.Close(m.FD))
}

// Memfd returns a region of a file that is sealed against shrinking, as a host's is. It is freed with the test.
func Memfd(t testing.TB, id backend.RegionID, size int, rights backend.Rights) backend.Memory {
	t.Helper()
	m, err := NewMemfd(id, size, rights, unix.F_SEAL_SHRINK)
	Must(t, err)
	t.Cleanup(func() {
		if err := FreeMemfd(m); err != nil {
			t.Errorf("free region %d: %v", id, err)
		}
	})
	return m
}

// Mappings lists the permissions, such as "rw-s", of this process's mappings of memory from NewMemfd, whichever process
// made it. They are sorted.
func Mappings() ([]string, error) {
	text, err := os.ReadFile("/proc/self/maps")
	var list []string
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "/memfd:"+memfdName) {
			list = append(list, strings.Fields(line)[1])
		}
	}
	slices.Sort(list)
	return list, err
}
