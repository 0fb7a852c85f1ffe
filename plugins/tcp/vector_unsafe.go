package tcp

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// vectorSize is how many pieces the kernel takes in one call.
const vectorSize = 1024

// vector is a reused list of memory pieces for writev and readv. The wrappers of x/sys allocate a new list for
// each call with more than eight pieces.
type vector struct {
	pieces [vectorSize]unix.Iovec
	n      int
}

// gather lists the next bytes of c, which may be nil, and then those of tail where all of c fits before it.
func (v *vector) gather(c *cursor, tail []byte) {
	v.n = 0
	if c != nil {
		if len(c.head) > 0 {
			v.add(c.head)
		}
		skip := c.skip
		for i := range c.spans {
			if v.n == vectorSize {
				return
			}
			s := &c.spans[i]
			v.add(c.mem[s.offset+skip : s.offset+s.length])
			skip = 0
		}
	}
	if len(tail) > 0 && v.n < vectorSize {
		v.add(tail)
	}
}

func (v *vector) add(b []byte) {
	v.pieces[v.n].Base = unsafe.SliceData(b)
	v.pieces[v.n].SetLen(len(b))
	v.n++
}

// writeTo sends what was gathered, and returns how many bytes the kernel took.
func (v *vector) writeTo(fd uintptr) (int, syscall.Errno) {
	raceBeforeWrite(v.pieces[:v.n])
	n, _, errno := unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&v.pieces[0])), uintptr(v.n))
	v.forget()
	return int(n), errno
}

// readFrom fills what was gathered, in order, and returns how many bytes came.
func (v *vector) readFrom(fd uintptr) (int, syscall.Errno) {
	n, _, errno := unix.Syscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&v.pieces[0])), uintptr(v.n))
	if errno == 0 {
		raceAfterRead(v.pieces[:v.n], int(n))
	}
	v.forget()
	return int(n), errno
}

// forget drops the pointers: memory that is unmapped later may become part of the Go heap, and the garbage
// collector does not forgive a stale pointer into it.
func (v *vector) forget() {
	clear(v.pieces[:v.n])
	v.n = 0
}
