package shm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// create returns both ends of a queue.
func create(t testing.TB, capacity int) (sender, receiver *Queue) {
	t.Helper()
	sender, err := Create(capacity)
	must(t, err)
	receiver = attach(t, sender)
	t.Cleanup(func() {
		must(t, sender.Close())
		must(t, receiver.Close())
	})
	return sender, receiver
}

// newEcho returns a queue to an end that sends everything back, and the queue that it comes back by.
func newEcho(t testing.TB, process bool) (there, back *Queue) {
	t.Helper()
	there, back, files := queues(t, DefaultCapacity)
	if process {
		startChild(t, echo, files...)
		return there, back
	}
	in, out := attach(t, there), attach(t, back)
	done := make(chan error)
	go func() { done <- echoRecords(in, out, -1) }()
	t.Cleanup(func() {
		must(t, in.Close())
		if err := <-done; err != ErrClosed {
			t.Error(err)
		}
		must(t, out.Close())
	})
	return there, back
}

// attach opens the other end of a queue in this process.
func attach(t testing.TB, q *Queue) *Queue {
	t.Helper()
	memory, wake := q.Files()
	other, err := Attach(dup(memory), dup(wake))
	must(t, err)
	return other
}

// dup copies a file's descriptor.
func dup(f *os.File) *os.File {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		panic(err)
	}
	runtime.KeepAlive(f)
	return os.NewFile(uintptr(fd), f.Name())
}

func eventfd(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	must(t, err)
	return os.NewFile(uintptr(fd), "eventfd")
}

// holdings are what a process holds of the kernel.
type holdings struct{ files, mappings int }

// leak tells whether there is more of anything than before. There may be less: what an earlier test has left to the
// garbage collector goes at some time.
func (h holdings) leak(before holdings) bool {
	return h.files > before.files || h.mappings > before.mappings
}

func held(t testing.TB) (h holdings) {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	maps, err := os.ReadFile("/proc/self/maps")
	must(t, err)
	return holdings{files: len(files), mappings: bytes.Count(maps, []byte("memfd:umbp-"))}
}

// wakesOf returns what an eventfd has counted, and resets it.
func wakesOf(t testing.TB, wake *os.File) uint64 {
	t.Helper()
	var count [8]byte
	_, err := unix.Read(int(wake.Fd()), count[:])
	if errors.Is(err, unix.EAGAIN) {
		return 0
	}
	must(t, err)
	return binary.NativeEndian.Uint64(count[:])
}
