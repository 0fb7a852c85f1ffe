package shm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// MaxFiles is how many descriptors one message of a Passage carries at most.
const MaxFiles = 8

const (
	passageMagic   = 0x50424d55 // "UMBP"
	passageMessage = 16         // bytes: magic, count, tag

	// sendPatience bounds a Send to a process that does not receive.
	sendPatience = 5 * time.Second
)

// Passage carries file descriptors between two processes. The host makes it before it starts a plugin, and the plugin
// inherits its other end: no name in any file system leads to it. Its methods may be called at the same time, with
// one goroutine at a time in Receive.
type Passage struct {
	conn   *net.UnixConn
	closed atomic.Bool
}

// NewPassage returns the host's end, and the plugin's as a file to start it with. The caller closes the file when the
// plugin has been started: as long as a copy is open, the host does not see the plugin end.
func NewPassage() (host *Passage, plugin *os.File, err error) {
	// A message arrives as it was sent, with its descriptors, or not at all.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("create a passage: %w", os.NewSyscallError("socketpair", err))
	}
	plugin = os.NewFile(uintptr(fds[1]), "umbp-passage")
	host, err = OpenPassage(os.NewFile(uintptr(fds[0]), "umbp-passage"))
	if err != nil {
		return nil, nil, errors.Join(err, plugin.Close())
	}
	return host, plugin, nil
}

// OpenPassage opens the end that f is. It takes f over, and closes it.
func OpenPassage(f *os.File) (*Passage, error) {
	conn, err := net.FileConn(f) // a copy, close-on-exec
	err = errors.Join(err, f.Close())
	unixConn, ok := conn.(*net.UnixConn)
	if err == nil && !ok {
		err = fmt.Errorf("%s is a socket of another family", f.Name())
	}
	if err != nil {
		if conn != nil {
			err = errors.Join(err, conn.Close())
		}
		return nil, fmt.Errorf("open a passage: %w", err)
	}
	return &Passage{conn: unixConn}, nil
}

// Send passes copies of the files, under a tag that tells the other end what they are. The files stay the caller's. It
// waits for a few seconds when the other end does not receive.
func (p *Passage) Send(tag uint64, files ...*os.File) error {
	if len(files) > MaxFiles {
		return fmt.Errorf("pass descriptors: %d are more than the %d that a message carries", len(files), MaxFiles)
	}
	fds := make([]int, len(files))
	for i, f := range files {
		conn, err := f.SyscallConn() // not Fd, which may change the file
		if err == nil {
			err = conn.Control(func(fd uintptr) { fds[i] = int(fd) })
		}
		if err != nil {
			return fmt.Errorf("pass descriptors: %w", err)
		}
	}
	message := make([]byte, 0, passageMessage)
	message = binary.LittleEndian.AppendUint32(message, passageMagic)
	message = binary.LittleEndian.AppendUint32(message, uint32(len(files)))
	message = binary.LittleEndian.AppendUint64(message, tag)
	err := p.conn.SetWriteDeadline(time.Now().Add(sendPatience))
	if err == nil {
		_, _, err = p.conn.WriteMsgUnix(message, unix.UnixRights(fds...), nil)
	}
	runtime.KeepAlive(files)
	if err != nil {
		return fmt.Errorf("pass descriptors: %w", err)
	}
	return nil
}

// Receive waits for a message and returns its tag and its files, which are the caller's to close. It returns io.EOF
// when the other end has been closed, with its process or without, and net.ErrClosed when this one has. After any
// other error the passage is of no more use.
func (p *Passage) Receive() (tag uint64, files []*os.File, err error) {
	var message [passageMessage]byte
	control := make([]byte, unix.CmsgSpace(4*MaxFiles))
	n, controlLen, flags, _, err := p.conn.ReadMsgUnix(message[:], control) // they arrive close-on-exec
	if err != nil {
		return 0, nil, receiveError(err)
	}
	defer func() {
		if err != nil {
			for _, f := range files {
				_ = f.Close()
			}
			files = nil
		}
	}()
	files, err = filesOf(control[:controlLen])
	if err != nil {
		return 0, files, receiveError(err)
	}
	magic := binary.LittleEndian.Uint32(message[0:])
	count := binary.LittleEndian.Uint32(message[4:])
	tag = binary.LittleEndian.Uint64(message[8:])
	switch {
	case n != passageMessage || flags&unix.MSG_TRUNC != 0 || magic != passageMagic:
		return 0, files, receiveError(errors.New("a malformed message"))
	case uint64(count) != uint64(len(files)):
		return 0, files, receiveError(fmt.Errorf("%d of %d descriptors came: raise the limit of open files (ulimit -n)",
			len(files), count))
	}
	return tag, files, nil
}

func receiveError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
		return io.EOF
	}
	return fmt.Errorf("receive descriptors: %w", err)
}

// filesOf returns the files that came in a control message.
func filesOf(control []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, err
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "umbp-passed"))
		}
	}
	return files, nil
}

// Close ends Receive, and is seen by the other end as io.EOF. Closing twice is not an error.
func (p *Passage) Close() error {
	if p.closed.Swap(true) {
		return nil
	}
	return p.conn.Close()
}
