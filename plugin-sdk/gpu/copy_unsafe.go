package gpu

import (
	"runtime"
	"unsafe"

	"github.com/ebitengine/purego"
)

// Copy is one contiguous piece of a batch: addresses as the runtime knows them, and bytes.
type Copy struct{ To, From, Bytes uint64 }

// The calls of this file are those that transfers are made of. They allocate nothing.

// call calls a function of the runtime that returns a code. The arguments' slice is the Context's: one that the compiler
// makes for the call would be allocated each time.
func (c *Context) call(function uintptr, arguments []uintptr) int32 {
	code, _, _ := purego.SyscallN(function, arguments...)
	return int32(code) // the upper half of the register is anything
}

// Copy enqueues a copy on a stream. The direction follows from the addresses. It, Copy2D and CopyBatch allocate nothing.
func (c *Context) Copy(s Stream, k Copy) error {
	c.arguments = append(c.arguments[:0], uintptr(k.To), uintptr(k.From), uintptr(k.Bytes), memcpyDefault, uintptr(s))
	return c.check("MemcpyAsync", c.call(c.r.calls.memcpyAsync, c.arguments))
}

// Copy2D enqueues a copy of rows of width bytes, the first bytes of which are toPitch and fromPitch bytes apart.
func (c *Context) Copy2D(s Stream, to, toPitch, from, fromPitch, width, rows uint64) error {
	c.arguments = append(c.arguments[:0], uintptr(to), uintptr(toPitch), uintptr(from), uintptr(fromPitch),
		uintptr(width), uintptr(rows), memcpyDefault, uintptr(s))
	return c.check("Memcpy2DAsync", c.call(c.r.calls.memcpy2DAsync, c.arguments))
}

// batch is what a call for a batch reads. The runtimes have read it when the call returns.
type batch struct {
	to, from, bytes []uint64
	// attributes is one cudaMemcpyAttributes (driver_types.h, since 12.8), with room to spare: the order in which sources
	// are read, which is that of the stream, and then hints of places and flags, all of which may be zero. It holds from
	// copy number first on.
	attributes [16]uint32
	first      uint64
	// failed is where the runtime writes the number of a copy that it refused. It does so for some errors only: nobody
	// reads it.
	failed uint64
}

// CopyBatch enqueues many copies with one call, in no order among them. It is to be called only where the runtime
// HasBatch. One side at least of each copy is memory of the Context's device: some versions of HIP 7 end the process
// over others (ROCm/rocm-systems, pull request 6697). On an error nothing is known of any of the copies. It keeps the
// arrays of the largest batch so far.
func (c *Context) CopyBatch(s Stream, copies []Copy) error {
	if len(copies) == 0 {
		return nil // which the runtimes refuse
	}
	if c.batch == nil {
		c.batch = &batch{attributes: [16]uint32{accessOrderStream}}
	}
	b := c.batch
	b.to, b.from, b.bytes = b.to[:0], b.from[:0], b.bytes[:0]
	for _, k := range copies {
		b.to, b.from, b.bytes = append(b.to, k.To), append(b.from, k.From), append(b.bytes, k.Bytes)
	}
	// The addresses of b stay what they are for as long as it is kept alive: it lies on the heap, which does not move.
	c.arguments = append(c.arguments[:0], uintptr(unsafe.Pointer(&b.to[0])), uintptr(unsafe.Pointer(&b.from[0])),
		uintptr(unsafe.Pointer(&b.bytes[0])), uintptr(len(copies)))
	if c.r.kind == hip {
		// No attributes is what all versions take, and means the order of the stream.
		c.arguments = append(c.arguments, 0, 0, 0)
	} else {
		c.arguments = append(c.arguments, uintptr(unsafe.Pointer(&b.attributes)), uintptr(unsafe.Pointer(&b.first)), 1)
	}
	if c.r.kind == hip || c.r.version < cudaBatchWithoutIndex {
		c.arguments = append(c.arguments, uintptr(unsafe.Pointer(&b.failed)))
	}
	c.arguments = append(c.arguments, uintptr(s))
	code := c.call(c.r.calls.memcpyBatchAsync, c.arguments)
	runtime.KeepAlive(b)
	if code == codeNotSupported || code == codeNewerDriver {
		c.r.noBatch.Store(true)
	}
	return c.check("MemcpyBatchAsync", code)
}

// Record makes an event happen when everything that was enqueued on a stream so far has been done.
func (c *Context) Record(e Event, s Stream) error {
	c.arguments = append(c.arguments[:0], uintptr(e), uintptr(s))
	return c.check("EventRecord", c.call(c.r.calls.eventRecord, c.arguments))
}

// Done tells whether an event has happened, with the error of what was enqueued before it, if there was one. An event
// that was never recorded has.
func (c *Context) Done(e Event) (done bool, err error) {
	c.arguments = append(c.arguments[:0], uintptr(e))
	code := c.call(c.r.calls.eventQuery, c.arguments)
	if code == codeNotReady {
		return false, nil
	}
	err = c.check("EventQuery", code)
	return err == nil, err
}

// addressOf returns where memory begins.
func addressOf(memory []byte) uint64 {
	return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(memory))))
}
