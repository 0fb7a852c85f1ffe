package region

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

func newTestArena(t testing.TB, size uint64, opts ArenaOptions) *Arena {
	t.Helper()
	a, err := NewArena("test", size, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

// resident returns how many bytes of the arena have a page in the file, and are mapped.
func resident(t *testing.T, a *Arena) (allocated, mapped uint64) {
	t.Helper()
	var stat unix.Stat_t
	if err := unix.Fstat(a.FD(), &stat); err != nil {
		t.Fatal(err)
	}
	start, _ := extent(a.Bytes())
	return uint64(stat.Blocks) * 512, mappingBytes(os.DirFS("/"), start, "Rss")
}

func TestArenaIsSealed(t *testing.T) {
	a := newTestArena(t, 1<<20, ArenaOptions{})
	for _, size := range []int64{0, 4096, 1<<20 - 1, 1<<20 + 1, 1 << 30} {
		if err := unix.Ftruncate(a.FD(), size); !errors.Is(err, unix.EPERM) {
			t.Errorf("ftruncate to %d: %v", size, err)
		}
	}
	if _, err := unix.FcntlInt(uintptr(a.FD()), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); !errors.Is(err, unix.EPERM) {
		t.Errorf("another seal: %v", err)
	}
}

func TestArenaIsSharedThroughItsDescriptor(t *testing.T) {
	a := newTestArena(t, 1<<20, ArenaOptions{})
	file, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", a.FD()), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	peer, err := unix.Mmap(int(file.Fd()), 0, int(a.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(peer)

	a.Bytes()[0], a.Bytes()[1<<20-1] = 1, 2
	peer[4096] = 3
	if peer[0] != 1 || peer[1<<20-1] != 2 || a.Bytes()[4096] != 3 {
		t.Error("the two mappings differ")
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if peer[0] != 1 || peer[1<<20-1] != 2 {
		t.Error("the peer's mapping changed when the arena was closed")
	}
}

func TestArenaIsPopulated(t *testing.T) {
	const size = 2*populatePart + 12345 // of three parts, the last one odd
	for _, huge := range []HugePages{"", HugePagesAuto, HugePagesOff} {
		var reports []uint64
		a := newTestArena(t, size, ArenaOptions{HugePages: huge, Progress: func(done, total uint64) {
			if total != size {
				t.Errorf("total is %d", total)
			}
			reports = append(reports, done)
		}})
		if allocated, mapped := resident(t, a); allocated < size || mapped < size {
			t.Errorf("%q: of %d bytes %d are allocated and %d mapped", huge, size, allocated, mapped)
		}
		if len(reports) != 3 || !slices.IsSorted(reports) || reports[2] != size {
			t.Errorf("progress: %v", reports)
		}
		if a.HugePages() == "" || (a.HugePages() == "off") != (huge == HugePagesOff) {
			t.Errorf("%q: obtained %q", huge, a.HugePages())
		}
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestArenaIsPopulatedByOldKernels uses a range that madvise refuses, as kernels do that cannot populate.
func TestArenaIsPopulatedByOldKernels(t *testing.T) {
	const size = 1 << 20
	a, err := mapArena("test", size, HugePagesOff)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if allocated, mapped := resident(t, a); allocated != 0 || mapped != 0 {
		t.Fatalf("%d bytes are allocated and %d mapped before populating", allocated, mapped)
	}
	if err := a.populateRange(1, size); err != nil {
		t.Fatal(err)
	}
	if allocated, mapped := resident(t, a); allocated != size || mapped != size {
		t.Errorf("%d bytes are allocated and %d mapped", allocated, mapped)
	}
}

func TestArenaClosesTwice(t *testing.T) {
	a := newTestArena(t, 1<<20, ArenaOptions{})
	for range 2 {
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		if a.Bytes() != nil || a.FD() != -1 || a.Size() != 0 {
			t.Errorf("after Close: %d bytes, descriptor %d", a.Size(), a.FD())
		}
	}
}

func TestArenaLeaksNothing(t *testing.T) {
	count := func() (descriptors, mappings int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries), strings.Count(string(maps), "umbp-leak")
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	descriptors, _ := count()
	for range 200 {
		a, err := NewArena("leak", 1<<16, ArenaOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := NewArena("leak", 1<<16, ArenaOptions{Context: gone}); err == nil {
			t.Fatal("populated with a context that has ended")
		}
	}
	if after, mappings := count(); after > descriptors || mappings != 0 { // fewer, where those of an earlier test are collected
		t.Errorf("%d descriptors before, %d after; %d mappings are left", descriptors, after, mappings)
	}
}

func TestArenaIsCancelled(t *testing.T) {
	t.Cleanup(func(before int) func() { return func() { runtime.GOMAXPROCS(before) } }(runtime.GOMAXPROCS(1)))
	ctx, cancel := context.WithCancel(t.Context())
	var reports []uint64
	_, err := NewArena("test", 2*populatePart, ArenaOptions{Context: ctx, Progress: func(done, _ uint64) {
		reports = append(reports, done)
		cancel()
	}})
	if !errors.Is(err, backend.ErrCancelled) || !errors.Is(err, context.Canceled) {
		t.Errorf("error: %v", err)
	}
	if !slices.Equal(reports, []uint64{populatePart}) {
		t.Errorf("populated %v after it was cancelled", reports)
	}
}

func TestArenaRefuses(t *testing.T) {
	for _, test := range []struct {
		name string
		size uint64
		huge HugePages
		says []string
	}{
		{"t", 0, "", []string{"arena t", "give it a size"}},
		{"t", 1 << 63, "", []string{"give it a size"}},
		{"t", 1 << 60, "", []string{"1048576TiB", "lower the size"}},
		{"t", 4096, "requir", []string{`"requir"`, "auto, off or require", `did you mean "require"?`}},
		{"t", 3 << 20, HugePagesRequire, []string{"3145728", "multiple", "make it 4MiB"}},
		{strings.Repeat("x", 201), 4096, "", []string{"name", "shorten"}},
	} {
		_, err := NewArena(test.name, test.size, ArenaOptions{HugePages: test.huge})
		if backend.CodeOf(err) != backend.BadRequest {
			t.Errorf("%d bytes, huge pages %q: %v", test.size, test.huge, err)
			continue
		}
		for _, word := range test.says {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%q does not say %q", err, word)
			}
		}
	}
}

// TestArenaRequiresHugePages holds on hosts that have reserved huge pages, and on those that have not.
func TestArenaRequiresHugePages(t *testing.T) {
	a, err := NewArena("test", hugePageSize, ArenaOptions{HugePages: HugePagesRequire})
	if err != nil {
		if !strings.Contains(err.Error(), "vm.nr_hugepages, 1 more") {
			t.Errorf("%q does not say how to reserve huge pages", err)
		}
		return
	}
	defer a.Close()
	if a.HugePages() != "reserved pages of 2MiB" || a.Size() != hugePageSize {
		t.Errorf("obtained %d bytes, %s", a.Size(), a.HugePages())
	}
	if err := unix.Ftruncate(a.FD(), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("ftruncate: %v", err)
	}
}

// BenchmarkNewArena makes and closes an arena of 256 MiB.
func BenchmarkNewArena(b *testing.B) {
	const size = 256 << 20
	b.SetBytes(size)
	for b.Loop() {
		a, err := NewArena("bench", size, ArenaOptions{})
		if err != nil {
			b.Fatal(err)
		}
		a.Close()
	}
}
