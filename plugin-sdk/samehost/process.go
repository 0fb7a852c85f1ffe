package samehost

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// processOf returns a pidfd of the process that made the connection. It must have been alive afterwards: only then is
// its number surely not that of another process by now.
func processOf(c *net.UnixConn) (*os.File, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var fdErr error
	err = raw.Control(func(socket uintptr) {
		fd, fdErr = unix.GetsockoptInt(int(socket), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	})
	if errors.Is(fdErr, unix.ENOPROTOOPT) { // before Linux 6.5
		pid, err := checkUser(c)
		if err != nil {
			return nil, err
		}
		return processByNumber(pid)
	}
	if err := errors.Join(err, fdErr); err != nil {
		return nil, fmt.Errorf("the process of the peer cannot be watched, and without that nobody knows when its device has stopped: %w", err)
	}
	return watched(fd)
}

// processByNumber returns a pidfd of the process with a number of this process's namespace.
func processByNumber(pid int) (*os.File, error) {
	if pid == 0 {
		return nil, errors.New("the process of the peer is in another pid namespace, where its end cannot be seen: run both in one, or on Linux 6.5 or later")
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("watch process %d of the peer: %w", pid, err)
	}
	return watched(fd)
}

// watched returns a pidfd that a goroutine can wait for.
func watched(fd int) (*os.File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// hasEnded tells whether the process of a pidfd has ended.
func hasEnded(fd uintptr) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, 0)
		if !errors.Is(err, unix.EINTR) {
			return n == 1
		}
	}
}
