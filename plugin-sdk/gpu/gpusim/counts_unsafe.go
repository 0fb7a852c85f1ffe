package gpusim

import (
	"runtime"
	"unsafe"

	"github.com/ebitengine/purego"
)

// Counts is what a process did on a machine (the first group), and what it has open there.
type Counts struct {
	Copies   int64 // single asynchronous copies of one row
	Copies2D int64
	Batches  int64
	Batched  int64 // copies in them

	Imports, Allocations, Pinned, Streams, Events int64
}

// Counts returns the counts of this process.
func (s *Sim) Counts() Counts {
	s.tb.Helper()
	library, err := purego.Dlopen(s.Library, purego.RTLD_NOW|purego.RTLD_LOCAL)
	if err != nil {
		s.tb.Fatal(err)
	}
	count, err := purego.Dlsym(library, "umbpSimulatedCount")
	if err != nil {
		s.tb.Fatal(err)
	}
	get := func(name string) int64 {
		text := append([]byte(name), 0)
		n, _, _ := purego.SyscallN(count, uintptr(unsafe.Pointer(&text[0])))
		runtime.KeepAlive(text)
		return int64(n)
	}
	return Counts{
		Copies: get("copies"), Copies2D: get("copies2d"), Batches: get("batches"), Batched: get("batched"),
		Imports: get("imports"), Allocations: get("allocations"), Pinned: get("pinned"), Streams: get("streams"), Events: get("events"),
	}
}

// Left returns what is open, without what was done: a test that leaves nothing behind leaves the zero value.
func (c Counts) Left() Counts {
	c.Copies, c.Copies2D, c.Batches, c.Batched = 0, 0, 0, 0
	return c
}
