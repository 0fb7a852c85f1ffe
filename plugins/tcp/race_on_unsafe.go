//go:build race

package tcp

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The race detector does not see what system calls do to memory. These two tell it, and that what is received
// was sent before.

var throughKernel byte

func raceBeforeWrite(pieces []unix.Iovec) {
	for i := range pieces {
		runtime.RaceReadRange(unsafe.Pointer(pieces[i].Base), int(pieces[i].Len))
	}
	runtime.RaceReleaseMerge(unsafe.Pointer(&throughKernel))
}

func raceAfterRead(pieces []unix.Iovec, n int) {
	runtime.RaceAcquire(unsafe.Pointer(&throughKernel))
	for i := range pieces {
		k := min(n, int(pieces[i].Len))
		if k <= 0 {
			return
		}
		runtime.RaceWriteRange(unsafe.Pointer(pieces[i].Base), k)
		n -= k
	}
}
