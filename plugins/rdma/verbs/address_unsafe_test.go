package verbs

import "unsafe"

// address is where memory lies, as a device knows it.
func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }
