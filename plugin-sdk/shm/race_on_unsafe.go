//go:build race

package shm

import (
	"runtime"
	"unsafe"
)

// The race detector does not follow shared memory. These two tell it what holds where both ends of a queue are in
// one process: what is received was sent before.

var throughQueue byte

func raceRelease() { runtime.RaceReleaseMerge(unsafe.Pointer(&throughQueue)) }
func raceAcquire() { runtime.RaceAcquire(unsafe.Pointer(&throughQueue)) }
