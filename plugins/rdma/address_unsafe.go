package rdma

import "unsafe"

// address is where memory, which is off the Go heap, stands: devices are told addresses.
func address(memory []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(memory)))) }
