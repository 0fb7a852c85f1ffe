package gpusim

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/ebitengine/purego"
)

// Codes that tests expect.
const (
	invalidValue     = 1
	outOfMemory      = 2
	notInitialized   = 3
	invalidPitch     = 12
	invalidPointer   = 17
	invalidDirection = 21
	noDevice         = 100
	invalidDevice    = 101
	invalidContext   = 201
	peerUnsupported  = 217
	invalidHandle    = 400
	notFound         = 500
	notReady         = 600
	alreadyEnabled   = 704
	peerNotEnabled   = 705
	contextDestroyed = 709
	registered       = 712
	notRegistered    = 713
	launchFailure    = 719
	unknown          = 999
)

const anyKind = 4 // of copy: as the addresses say

// rt calls a simulated runtime, on the thread that opened it.
type rt struct {
	tb      testing.TB
	library uintptr
	prefix  string
}

// open opens the runtime of a machine, and locks the goroutine to its thread for the time of the test.
func open(tb testing.TB, s *Sim) *rt {
	tb.Helper()
	r := openUnbound(tb, s)
	r.must("SetDevice", 0)
	return r
}

func openUnbound(tb testing.TB, s *Sim) *rt {
	tb.Helper()
	library, err := purego.Dlopen(s.Library, purego.RTLD_NOW|purego.RTLD_LOCAL)
	if err != nil {
		tb.Fatal(err)
	}
	r := &rt{tb: tb, library: library, prefix: "hip"}
	if strings.Contains(s.Library, "cuda") {
		r.prefix = "cuda"
	}
	runtime.LockOSThread()
	tb.Cleanup(runtime.UnlockOSThread)
	return r
}

func (r *rt) hip() bool { return r.prefix == "hip" }

// either returns what the runtimes answer differently.
func (r *rt) either(hip, cuda int) int {
	if r.hip() {
		return hip
	}
	return cuda
}

// call makes a call and returns its code. Arguments are numbers, or pointers to what the call reads or writes.
func (r *rt) call(name string, args ...any) int {
	r.tb.Helper()
	if !strings.HasPrefix(name, "cu") && !strings.HasPrefix(name, "hip") {
		name = r.prefix + name
	}
	f, err := purego.Dlsym(r.library, name)
	if err != nil {
		r.tb.Fatal(err)
	}
	words := make([]uintptr, len(args))
	for i, a := range args {
		switch a := a.(type) {
		case int:
			words[i] = uintptr(a)
		case uintptr:
			words[i] = a
		case *uintptr:
			words[i] = uintptr(unsafe.Pointer(a))
		case *int32:
			words[i] = uintptr(unsafe.Pointer(a))
		case []byte:
			words[i] = uintptr(unsafe.Pointer(unsafe.SliceData(a)))
		case []uintptr:
			words[i] = uintptr(unsafe.Pointer(unsafe.SliceData(a)))
		case *[8]uintptr:
			words[i] = uintptr(unsafe.Pointer(a))
		default:
			panic(fmt.Sprintf("argument %T", a))
		}
	}
	code, _, _ := purego.SyscallN(f, words...)
	runtime.KeepAlive(args)
	return int(int32(code))
}

// must makes a call that succeeds.
func (r *rt) must(name string, args ...any) {
	r.tb.Helper()
	r.answers(0, name, args...)
}

// answers makes a call that answers with a code.
func (r *rt) answers(code int, name string, args ...any) {
	r.tb.Helper()
	if got := r.call(name, args...); got != code {
		r.tb.Errorf("%s%v answers %d, want %d", name, args, got, code)
	}
}

// number makes a call that writes a number through its first argument.
func (r *rt) number(name string, args ...any) int {
	r.tb.Helper()
	var n int32
	r.must(name, append([]any{&n}, args...)...)
	return int(n)
}

// word makes a call that writes a word through its first argument.
func (r *rt) word(name string, args ...any) uintptr {
	r.tb.Helper()
	var w uintptr
	r.must(name, append([]any{&w}, args...)...)
	return w
}

func (r *rt) alloc(size int) uintptr { r.tb.Helper(); return r.word("Malloc", size) }
func (r *rt) stream() uintptr        { r.tb.Helper(); return r.word("StreamCreateWithFlags", 1) }
func (r *rt) event() uintptr         { r.tb.Helper(); return r.word("EventCreateWithFlags", 2) }

// awaits waits until an event has happened, and checks its code.
func (r *rt) awaits(code int, event uintptr) {
	r.tb.Helper()
	for {
		switch got := r.call("EventQuery", event); got {
		case notReady:
			runtime.Gosched()
		default:
			if got != code {
				r.tb.Errorf("the event answers %d, want %d", got, code)
			}
			return
		}
	}
}

// store and load move bytes to and from a device, at once.
func (r *rt) store(to uintptr, from []byte) {
	r.tb.Helper()
	r.must("Memcpy", to, from, len(from), anyKind)
}

func (r *rt) load(from uintptr, size int) []byte {
	r.tb.Helper()
	to := make([]byte, size)
	r.must("Memcpy", to, from, size, anyKind)
	return to
}

// open and close an allocation of another process. A handle goes by value, which is sixty-four bytes on the stack on amd64,
// behind the six registers; on arm64 the caller's copy is pointed to.
func (r *rt) importHandle(pointer *uintptr, handle *[8]uintptr) int {
	r.tb.Helper()
	flags := 1
	if runtime.GOARCH == "arm64" {
		return r.call("IpcOpenMemHandle", pointer, handle, flags)
	}
	args := []any{pointer, flags, 0, 0, 0, 0}
	for _, w := range handle {
		args = append(args, w)
	}
	return r.call("IpcOpenMemHandle", args...)
}

func (r *rt) export(pointer uintptr) *[8]uintptr {
	r.tb.Helper()
	h := new([8]uintptr)
	r.must("IpcGetMemHandle", h, pointer)
	return h
}

// batch enqueues a batch, with the arguments that the runtime's version takes.
func (r *rt) batch(version int, to, from, sizes []uintptr, failed *uintptr, stream uintptr) int {
	r.tb.Helper()
	attributes, indices := make([]byte, 24), []uintptr{0}
	attributes[0] = 1 // the source is read in the order of the stream
	switch {
	case r.hip():
		return r.call("MemcpyBatchAsync", to, from, sizes, len(to), 0, 0, 0, failed, stream)
	case version < 13000:
		return r.call("MemcpyBatchAsync", to, from, sizes, len(to), attributes, indices, 1, failed, stream)
	default:
		return r.call("MemcpyBatchAsync", to, from, sizes, len(to), attributes, indices, 1, stream)
	}
}

// pages returns memory that the garbage collector does not know, until the test has ended.
func pages(tb testing.TB, size int) []byte {
	tb.Helper()
	m := mapped(tb, size)
	tb.Cleanup(func() { unmap(tb, m) })
	return m
}

// mapped is pages that the test unmaps itself.
func mapped(tb testing.TB, size int) []byte {
	tb.Helper()
	m, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		tb.Fatal(err)
	}
	return m
}

func unmap(tb testing.TB, m []byte) {
	tb.Helper()
	if err := syscall.Munmap(m); err != nil {
		tb.Error(err)
	}
}

func addressOf(m []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(m))) }

// touchable tells whether the processor can read an address of this process.
func touchable(tb testing.TB, address uintptr) bool {
	tb.Helper()
	in, out, err := os.Pipe()
	if err != nil {
		tb.Fatal(err)
	}
	defer in.Close()
	defer out.Close()
	_, _, errno := syscall.Syscall(syscall.SYS_WRITE, out.Fd(), address, 1)
	if errno != 0 && !errors.Is(errno, syscall.EFAULT) {
		tb.Fatal(errno)
	}
	return errno == 0
}

// name returns the text of an array of bytes that C wrote.
func name(b []byte) string {
	text, _, _ := strings.Cut(string(b), "\x00")
	return text
}

// text calls what returns the name or the text of a code.
func (r *rt) text(function string, code int) string {
	r.tb.Helper()
	f, err := purego.Dlsym(r.library, r.prefix+function)
	if err != nil {
		r.tb.Fatal(err)
	}
	p, _, _ := purego.SyscallN(f, uintptr(code))
	b := unsafe.Slice(*(**byte)(unsafe.Pointer(&p)), 64)
	return name(b)
}

// has tells whether the library exports a call.
func (r *rt) has(name string) bool {
	_, err := purego.Dlsym(r.library, name)
	return err == nil
}
