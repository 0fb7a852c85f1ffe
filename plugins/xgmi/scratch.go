package xgmi

import (
	"encoding/binary"
	"math/rand/v2"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// scratchBytes is the size of the memory that a self-test moves.
const scratchBytes = 16 * scratchPage

const scratchPage = 4 << 10

// scratch is memory for a self-test. It lies in the second half of its allocation, so that a backend that forgot about
// offsets would find other bytes.
type scratch struct {
	*region
	place string
	bytes []byte // of host memory
}

// newScratch allocates scratch at a place that this process uses. It is given back with its region.
func (e *engine) newScratch(place string) (*scratch, error) {
	s := &scratch{place: place}
	if place == "" {
		return s, s.onHost(e)
	}
	d := e.device(place)
	if d == nil {
		return nil, backend.Errorf(backend.Unsupported, "GPU %s is not among those that this process uses: %s", place, e.places())
	}
	base, err := e.rt.Alloc(d.Number, 2*scratchBytes)
	if err != nil {
		return nil, d.fault(backend.Unsupported, "no memory for a self-test", err)
	}
	free := func() error { return e.rt.Free(d.Number, base) }
	g, err := e.rt.Describe(base+scratchBytes, scratchBytes)
	if err == nil {
		s.region, err = e.admitGPU(&g)
	}
	if err != nil {
		free()
		return nil, d.fault(backend.Unsupported, "no memory for a self-test", err)
	}
	s.giveBack = free
	return s, nil
}

func (s *scratch) onHost(e *engine) error {
	fd, err := unix.MemfdCreate("umbp-xgmi-scratch", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, 2*scratchBytes); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK); err != nil {
		return err
	}
	whole, err := unix.Mmap(fd, 0, 2*scratchBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	s.bytes = whole[scratchBytes:]
	s.region, err = e.admit(backend.Memory{
		Kind: backend.HostMemory, Rights: scratchRights, Bytes: s.bytes, FD: fd, FDOffset: scratchBytes,
	})
	if err != nil {
		unix.Munmap(whole)
		return err
	}
	s.giveBack = func() error { return unix.Munmap(whole) }
	return nil
}

const scratchRights = backend.RemoteRead | backend.RemoteWrite

// store overwrites the scratch.
func (s *scratch) store(b []byte) error {
	if s.device == nil {
		copy(s.bytes, b)
		return nil
	}
	return s.e.rt.Store(s.device.Number, s.address, b)
}

// load returns what is in the scratch.
func (s *scratch) load() ([]byte, error) {
	b := make([]byte, scratchBytes)
	if s.device == nil {
		copy(b, s.bytes)
		return b, nil
	}
	return b, s.e.rt.Load(s.device.Number, b, s.address)
}

// pattern returns bytes that are different for each seed.
func pattern(seed uint64) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	b := make([]byte, scratchBytes)
	rand.NewChaCha8(key).Read(b)
	return b
}

// wrongByte is the first byte that a self-test found wrong.
type wrongByte struct {
	offset    uint64 // in the far scratch
	got, want byte
}

// compare looks for the first byte that is wrong, and returns nil where there is none.
func compare(got, want []byte) *wrongByte {
	for i := range want {
		if got[i] != want[i] {
			return &wrongByte{uint64(i), got[i], want[i]}
		}
	}
	return nil
}
