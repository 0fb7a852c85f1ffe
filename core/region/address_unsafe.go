package region

import "unsafe"

// extent returns the addresses of the first byte of b and of the byte after its last. It is meant for memory
// that does not move: what is mapped, and what callers hold still while they transfer it.
func extent(b []byte) (start, end uintptr) {
	start = uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	return start, start + uintptr(len(b))
}
