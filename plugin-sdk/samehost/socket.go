package samehost

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxSocketPath is the longest path that a Unix socket address can hold.
	maxSocketPath = len(unix.RawSockaddrUnix{}.Path) - 1
	// network keeps the bounds of messages, so that a descriptor arrives with the message that it belongs to.
	network = "unixpacket"
	suffix  = ".sock"
)

// prepareDir returns the directory for sockets, which it creates where it is missing. It insists that nobody else
// can enter it.
func prepareDir(dir string) (string, error) {
	if dir == "" {
		dir = filepath.Join(os.TempDir(), fmt.Sprintf("umbp-%d", os.Geteuid()))
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("create the socket directory: %w", err)
	}
	info, err := os.Lstat(dir) // not Stat: another user could have put a symbolic link there
	if err != nil {
		return "", fmt.Errorf("check the socket directory: %w", err)
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.IsDir():
		return "", fmt.Errorf("socket directory %s is not a directory: remove it or set socket_dir", dir)
	case !ok || int(stat.Uid) != os.Geteuid():
		return "", fmt.Errorf("socket directory %s belongs to another user: set socket_dir", dir)
	case info.Mode().Perm()&0o077 != 0:
		return "", fmt.Errorf("socket directory %s is open to other users (mode %04o): chmod it to 0700", dir, info.Mode().Perm())
	}
	return dir, nil
}

// listen opens a socket in dir. It gets its name only once it listens, so that sweep never meets one that does
// not listen yet.
func listen(dir, id string) (*net.UnixListener, string, error) {
	path := filepath.Join(dir, id+suffix)
	if len(path) > maxSocketPath {
		return nil, "", fmt.Errorf("socket path %s is %d bytes too long: set a shorter socket_dir", path, len(path)-maxSocketPath)
	}
	early := strings.TrimSuffix(path, suffix)
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: early, Net: network})
	if err != nil {
		return nil, "", err
	}
	l.SetUnlinkOnClose(false) // it would remove the early name
	if err := os.Rename(early, path); err != nil {
		return nil, "", errors.Join(err, closeListener(l, early))
	}
	return l, path, nil
}

func closeListener(l *net.UnixListener, path string) error {
	err := l.Close()
	if gone := os.Remove(path); !errors.Is(gone, os.ErrNotExist) {
		err = errors.Join(err, gone)
	}
	return err
}

// sweep removes the sockets of processes that died without closing theirs: nobody listens on them. It does what
// it can; what it leaves behind does no harm.
func sweep(dir string) {
	paths, _ := filepath.Glob(filepath.Join(dir, "*"+suffix))
	for _, path := range paths {
		c, err := net.DialTimeout(network, path, ioPatience)
		if err == nil {
			c.Close()
		} else if errors.Is(err, unix.ECONNREFUSED) {
			os.Remove(path)
		}
	}
}

// checkUser refuses a connection to another user's process. It returns the number of the process, which is zero where
// that has none in this process's namespace.
func checkUser(c *net.UnixConn) (pid int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return 0, err
	}
	if int(cred.Uid) != os.Geteuid() {
		return 0, fmt.Errorf("the process at the other end belongs to user %d, this one to user %d", cred.Uid, os.Geteuid())
	}
	return int(cred.Pid), nil
}

// ioPatience bounds each step of a handshake and each write: the other end is on the same host.
const ioPatience = 5 * time.Second

// send writes one message, with a file descriptor unless fd is negative.
func send(c *net.UnixConn, m *message, fd int) error {
	var rights []byte
	if fd >= 0 {
		rights = unix.UnixRights(fd)
	}
	c.SetWriteDeadline(time.Now().Add(ioPatience))
	_, _, err := c.WriteMsgUnix(m.append(make([]byte, 0, maxMessage)), rights, nil)
	return err
}

// receive reads one message. An error of parsing is errParse; any other ends the stream. With withFile a message
// may bring a descriptor, which is the caller's to close, and is -1 when none came; without it, the kernel closes
// descriptors on their way.
func receive(c *net.UnixConn, withFile bool) (m message, fd int, err error) {
	var buf [maxMessage]byte
	var control []byte
	if withFile {
		control = make([]byte, unix.CmsgSpace(4))
	}
	n, controlLen, flags, _, err := c.ReadMsgUnix(buf[:], control) // descriptors arrive close-on-exec
	if err != nil {
		return message{}, -1, err
	}
	fds := descriptors(control[:controlLen])
	if len(fds) > 1 || flags&unix.MSG_TRUNC != 0 || withFile && flags&unix.MSG_CTRUNC != 0 {
		err = errParse
	} else {
		m, err = parseMessage(buf[:n])
	}
	if err == nil && len(fds) == 1 {
		return m, fds[0], nil
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
	return m, -1, err
}

// descriptors returns the file descriptors in a control message.
func descriptors(control []byte) (fds []int) {
	if len(control) == 0 {
		return nil
	}
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for i := range messages {
		some, err := unix.ParseUnixRights(&messages[i])
		if err == nil {
			fds = append(fds, some...)
		}
	}
	return fds
}
