package shm

import (
	"sync/atomic"
	"unsafe"
)

// word64 returns the word at an offset of shared memory, which the other end uses at the same time. The offset is a
// multiple of 8, and the memory begins at a page.
func word64(memory []byte, offset int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&memory[offset : offset+8][0]))
}

// word32 is word64 for a shorter word.
func word32(memory []byte, offset int) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&memory[offset : offset+4][0]))
}
