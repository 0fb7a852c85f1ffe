package conformance_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/conformance"
)

// fakeGPUs is a runtime whose addresses lead nowhere: only those who ask it get at the bytes. Nothing that is freed is
// unmapped before unmap, since defects touch memory when they should not.
type fakeGPUs struct {
	mu   sync.Mutex
	made []allocation
	free int // how many of them were given back
	deaf error
}

// allocation is one allocation: the n-th has the handle n and begins at firstAddress + n * addressStep.
type allocation struct {
	device int
	hidden []byte
}

const (
	firstAddress = 1 << 44
	addressStep  = 1 << 32
)

var _ conformance.GPURuntime = (*fakeGPUs)(nil)

// pci is the place of a device.
func pci(device int) string { return fmt.Sprintf("0000:%02x:00.0", device) }

func (g *fakeGPUs) Alloc(device int, size uint64) (uint64, error) {
	hidden, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return 0, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.made = append(g.made, allocation{device, hidden})
	return firstAddress + uint64(len(g.made)-1)*addressStep, nil
}

func (g *fakeGPUs) Free(device int, address uint64) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.free++
	return nil
}

// at finds the allocation that an address lies in, and the offset.
func (g *fakeGPUs) at(address uint64) (n, offset uint64) {
	return (address - firstAddress) / addressStep, (address - firstAddress) % addressStep
}

func (g *fakeGPUs) bytes(n, offset, size uint64) []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.made[n].hidden[offset : offset+size : offset+size]
}

func (g *fakeGPUs) Describe(address, size uint64) (backend.GPURange, error) {
	if g.deaf != nil {
		return backend.GPURange{}, g.deaf
	}
	n, offset := g.at(address)
	g.mu.Lock()
	defer g.mu.Unlock()
	a := g.made[n]
	return backend.GPURange{
		Runtime: "hip", Device: pci(a.device), Address: address, Size: size,
		Allocation: uint64(len(a.hidden)), Offset: offset, Handle: binary.BigEndian.AppendUint64(nil, n),
	}, nil
}

// open returns the bytes of a range: as another process would, by its handle, and by its address where it has none.
func (g *fakeGPUs) open(r *backend.GPURange) []byte {
	if len(r.Handle) == 0 {
		n, offset := g.at(r.Address)
		return g.bytes(n, offset, r.Size)
	}
	return g.bytes(binary.BigEndian.Uint64(r.Handle), r.Offset, r.Size)
}

func (g *fakeGPUs) Load(device int, to []byte, address uint64) error {
	n, offset := g.at(address)
	copy(to, g.bytes(n, offset, uint64(len(to))))
	return g.deaf
}

func (g *fakeGPUs) Store(device int, address uint64, from []byte) error {
	n, offset := g.at(address)
	copy(g.bytes(n, offset, uint64(len(from))), from)
	return nil
}

func (g *fakeGPUs) unmap() {
	for _, a := range g.made {
		unix.Munmap(a.hidden)
	}
}

// links are the pairs of places that a backend which knows these GPUs lists: all but the host's memory with itself.
func (*fakeGPUs) links() (all []backend.Link) {
	places := []string{"", pci(1), pci(2)}
	for _, near := range places {
		for _, far := range places {
			if near != "" || far != "" {
				all = append(all, backend.Link{Near: near, Far: far})
			}
		}
	}
	return all
}

// TestMemoryIsGivenBack: memory that cannot be described is not kept.
func TestMemoryIsGivenBack(t *testing.T) {
	gpus := &fakeGPUs{deaf: errors.New("no such range")}
	defer gpus.unmap()
	_, err := conformance.GPUMemory(gpus, 1)(1 << 20)
	if !errors.Is(err, gpus.deaf) || gpus.free != 1 {
		t.Errorf("GPUMemory: %v, and %d allocations were given back", err, gpus.free)
	}
}

// TestHarnessOfAnother: who lends what the backend does not claim is told so.
func TestHarnessOfAnother(t *testing.T) {
	host := func(i *backend.Info) {
		i.Capabilities.Local, i.Capabilities.Remote = backend.Kinds(backend.HostMemory), backend.Kinds(backend.HostMemory)
	}
	unlinked := func(i *backend.Info) { i.Capabilities.Links = i.Capabilities.Links[:1] }
	for saying, l := range map[string]*lab{
		"the harness lends gpu memory, which the backend does not claim": {
			near: 1, info: host,
			register: func(_ *lab, m backend.Memory) (backend.Memory, error) { return m, backend.ErrUnsupported },
		},
		"the harness lends memory to move from GPU 0000:01:00.0 to GPU 0000:02:00.0, which the backend does not claim": {
			near: 1, far: 2, info: unlinked,
			session: func(*lab, backend.RegionID) (backend.RegionID, error) { return 0, backend.ErrUnsupported },
		},
	} {
		if r := l.try(t, "bytes/edges"); r.Verdict != conformance.Fail || !strings.Contains(r.Detail, saying) {
			t.Errorf("bytes/edges ends with %s: %s", r.Verdict, r.Detail)
		}
	}
}

// TestMemoryThatCannotBeRead fails a case, also where it is noticed beside the case's own goroutine.
func TestMemoryThatCannotBeRead(t *testing.T) {
	for _, name := range []string{"bytes/edges", "concurrent/sessions"} {
		l := &lab{near: 1, far: 2}
		l.open = func(l *lab) { l.gpus.deaf = errors.New("the device is lost") }
		r := l.try(t, name)
		if r.Verdict != conformance.Fail || !strings.Contains(r.Detail, "the device is lost") {
			t.Errorf("%s ends with %s: %s", name, r.Verdict, r.Detail)
		}
	}
}
