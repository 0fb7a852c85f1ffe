//go:build cgo

package verbs

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// channel waits, in Go's network poller, for a file descriptor of the library's to become readable.
type channel struct {
	file *os.File
	raw  syscall.RawConn
	take func(fd uintptr) bool

	mu   sync.Mutex // held by who waits
	done bool
	err  error // of take's last call
}

// newChannel makes fd not block. It keeps a duplicate, since the library closes fd itself. take is called when there
// may be something to take from fd, and returns EAGAIN when there is not.
func newChannel(fd int, name string, take func() syscall.Errno) (*channel, error) {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(own, true); err != nil { // of both: they share their flags
		unix.Close(own)
		return nil, err
	}
	c := &channel{file: os.NewFile(uintptr(own), name)}
	c.raw, err = c.file.SyscallConn()
	if err == nil {
		err = c.file.SetReadDeadline(time.Time{}) // fails when the poller cannot wait for it
	}
	if err != nil {
		c.file.Close()
		return nil, err
	}
	c.take = func(uintptr) bool {
		c.err = nil
		switch errno := take(); errno {
		case 0:
			return true
		case syscall.EAGAIN:
			return false
		default:
			c.err = errno
			return true
		}
	}
	return c, nil
}

// deadline makes wait return at t; a zero t never does.
func (c *channel) deadline(t time.Time) error {
	if c.file.SetReadDeadline(t) != nil {
		return os.ErrClosed // nothing else fails once it has succeeded
	}
	return nil
}

// wait returns when something was taken, or the deadline has passed, which is os.ErrDeadlineExceeded.
func (c *channel) wait() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done {
		return os.ErrClosed
	}
	c.err = nil
	err := c.raw.Read(c.take)
	switch {
	case err == nil:
		return c.err
	case errors.Is(err, os.ErrDeadlineExceeded):
		return err
	default: // the file is closed: nothing else fails here
		return os.ErrClosed
	}
}

// close ends a wait that runs, and returns when it has ended. Closing it again does nothing.
func (c *channel) close() {
	c.file.Close() // fails the second time
	c.mu.Lock()
	c.done = true
	c.mu.Unlock()
}

// errnoOf returns the errno that an error of the operating system has.
func errnoOf(err error) syscall.Errno {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return syscall.EIO
}
