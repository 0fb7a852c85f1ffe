package core

import "unsafe"

// extent returns the addresses of the first byte of b and of the byte after its last. The caller holds the memory
// still until its call has returned.
func extent(b []byte) (start, end uintptr) {
	start = uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	return start, start + uintptr(len(b))
}
