package rdma

import (
	"sync/atomic"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/inuse"
	"github.com/umbp/umbp/plugins/rdma/device"
)

// region is one registered region. Its memory may be touched only between users.Enter and users.Leave.
type region struct {
	id     backend.RegionID
	rights backend.Rights
	size   uint64
	base   uint64 // address of its first byte
	part   uint64 // bytes of one memory region of the devices, a power of two; the last one may be shorter
	bytes  []byte // nil once the region is deregistered, so that nothing points to memory that gets unmapped
	users  inuse.Gate

	// rails holds, by the index of a rail, what the device made of the region; nil where the rail is lost. It is
	// changed under transport.memory, and read by the data path.
	rails []atomic.Pointer[registration]
}

// registration is a region as one rail's device knows it.
type registration struct {
	rail  *rail
	mrs   []device.MR // by part
	lkeys []uint32
	rkeys []uint32
}

func newRegion(m *backend.Memory, part uint64, rails int) *region {
	return &region{
		id: m.Region, rights: m.Rights, size: uint64(len(m.Bytes)), base: address(m.Bytes), part: part, bytes: m.Bytes,
		rails: make([]atomic.Pointer[registration], rails),
	}
}

// access is what a device may do with the memory of a region.
func access(rights backend.Rights) device.Access {
	a := device.LocalWrite
	if rights&backend.RemoteRead != 0 {
		a |= device.RemoteRead
	}
	if rights&backend.RemoteWrite != 0 {
		a |= device.RemoteWrite
	}
	return a
}

// parts is how many parts of the given size a region has.
func parts(size, part uint64) uint64 { return (size-1)/part + 1 }
