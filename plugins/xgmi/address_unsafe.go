package xgmi

import "unsafe"

// address returns where memory off the Go heap begins.
func address(memory []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(memory)))) }
