package region

import "github.com/umbp/umbp/plugin-sdk/backend"

// Region is one range of this process's memory that transfers may start or end in. Once a region is in a Table
// it does not change; Table.SetKey puts a new one in its place.
type Region struct {
	// ID is given by Table.Add.
	ID     backend.RegionID
	Kind   backend.MemoryKind
	Rights backend.Rights
	// Bytes is the memory. It is off the Go heap, and stays mapped until the region has left the table and every
	// backend. Nil for memory of a GPU, which the processor cannot address.
	Bytes []byte
	// GPU says where memory of a GPU lies, with its address in this process; nil for host memory. What holds for the
	// memory behind Bytes holds for it.
	GPU *backend.GPURange
	// FD is a file descriptor of the memory, or -1 when it has none; FDOffset is where in the file the region
	// starts. The descriptor stays the caller's.
	FD       int
	FDOffset int64
	// Keys holds what each backend's Register returned, by backend name. A backend that the region is not
	// registered with has no entry; one that needs no key has a nil one.
	Keys map[string][]byte

	uses *uses // shared by the copies that SetKey makes; set by Table.Add
}

// Memory returns the region as it is handed to Backend.Register.
func (r *Region) Memory() backend.Memory {
	return backend.Memory{
		Region: r.ID, Kind: r.Kind, Rights: r.Rights, Bytes: r.Bytes, GPU: r.GPU, FD: r.FD, FDOffset: r.FDOffset,
	}
}

// Size returns the size of the region in bytes.
func (r *Region) Size() uint64 {
	if r.GPU != nil {
		return r.GPU.Size
	}
	return uint64(len(r.Bytes))
}

// Place returns where the region lies: the PCI address of its GPU, or nothing for host memory.
func (r *Region) Place() string {
	if r.GPU != nil {
		return r.GPU.Device
	}
	return ""
}

// Extent returns the addresses of the region's first byte and of the byte after its last. Host memory and the memory of
// every GPU share one address space: nothing lies twice at one address.
func (r *Region) Extent() (start, end uintptr) {
	if r.GPU != nil {
		return uintptr(r.GPU.Address), uintptr(r.GPU.Address + r.GPU.Size)
	}
	return extent(r.Bytes)
}

// Descriptor returns the region as peers are told of it; self is this process. The keys are shared, and must not
// be changed.
func (r *Region) Descriptor(self backend.Peer) Descriptor {
	return Descriptor{
		Peer: self, ID: r.ID, Kind: r.Kind, Rights: r.Rights, Size: r.Size(), Place: r.Place(), Keys: r.Keys,
	}
}
