package verbstest

import "unsafe"

// address returns where memory starts, as work requests name it.
func address(memory []byte) uint64 {
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(memory))))
}
