package tcp

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// bufferBytes is how much is read ahead. A small frame arrives in one system call; of a large one, at most
	// this much is copied and the rest goes straight to its place.
	bufferBytes = 16 << 10
	// pieceBytes bounds one write under TLS, so that progress is seen.
	pieceBytes = 1 << 20
)

// stream is one connection, after its ends have proved themselves. One goroutine at a time may send, and one may
// receive; abort, interrupt and stalled may be called by anyone.
//
// On a plain TCP connection it gathers and scatters with writev and readv, without blocking a thread: a call that
// cannot go on waits in the runtime's poller. Under TLS it goes through tls.Conn.
type stream struct {
	tcp     *net.TCPConn
	tls     *tls.Conn       // nil without TLS
	raw     syscall.RawConn // of tcp, used without TLS
	aborted atomic.Bool

	// progress counts the steps of both directions. The janitor compares it to what it saw before.
	progress atomic.Uint64
	seen     uint64    // the janitor's
	since    time.Time // the janitor's: since when progress has been seen

	// Of the sender.
	sending  *cursor
	mayWait  bool
	sendErr  error
	sendVec  vector
	onWrite  func(fd uintptr) bool // made once, so that sending does not allocate
	gathered []byte                // under TLS

	// Of the receiver. What was read ahead is buffer[first:last].
	receiving   *cursor
	received    int
	receiveErr  error
	receiveVec  vector
	onRead      func(fd uintptr) bool
	buffer      []byte
	first, last int
}

// newStream takes over an established connection; secured is nil without TLS.
func newStream(conn *net.TCPConn, secured *tls.Conn) (*stream, error) {
	s := &stream{tcp: conn, tls: secured, buffer: make([]byte, bufferBytes)}
	if secured != nil {
		s.gathered = make([]byte, bufferBytes)
		return s, nil
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	s.raw, s.onWrite, s.onRead = raw, s.write, s.read
	return s, nil
}

// conn returns the connection with its encryption, if it has one.
func (s *stream) conn() net.Conn {
	if s.tls != nil {
		return s.tls
	}
	return s.tcp
}

// abort makes every send and receive, those under way too, fail soon. It does not block.
func (s *stream) abort() {
	s.aborted.Store(true)
	// The one error that this can return says that the connection is closed already.
	_ = s.tcp.SetDeadline(time.Unix(1, 0))
}

// interrupt makes the receive under way, or else the next one, fail soon with os.ErrDeadlineExceeded, after which
// the receiver may resume. It does not block.
func (s *stream) interrupt() {
	_ = s.tcp.SetReadDeadline(time.Unix(1, 0)) // as in abort
}

// resume lets the receiver go on where it was interrupted, unless the stream was aborted.
func (s *stream) resume() error {
	if err := s.tcp.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	if s.aborted.Load() { // then the deadline that was lifted may have been that of abort
		return os.ErrDeadlineExceeded
	}
	return nil
}

// close frees the connection. What has not left yet is thrown away if discard is set.
func (s *stream) close(discard bool) {
	if discard {
		_ = s.tcp.SetLinger(0) // at worst, the system goes on trying to send for a while
	}
	_ = s.tcp.Close()
}

// stalled tells whether the stream, being busy, has not moved for the given time. Only the janitor calls it.
func (s *stream) stalled(busy bool, now time.Time, limit time.Duration) bool {
	if p := s.progress.Load(); !busy || p != s.seen || s.since.IsZero() {
		s.seen, s.since = p, now
		return false
	}
	return now.Sub(s.since) >= limit
}

// trySend sends as much of c as goes without waiting. Under TLS that is nothing.
func (s *stream) trySend(c *cursor) error {
	if s.tls != nil {
		return nil
	}
	return s.rawSend(c, false)
}

// send sends all of c.
func (s *stream) send(c *cursor) error {
	if s.tls != nil {
		return s.secureSend(c)
	}
	return s.rawSend(c, true)
}

func (s *stream) rawSend(c *cursor, mayWait bool) error {
	s.sending, s.mayWait, s.sendErr = c, mayWait, nil
	err := s.raw.Write(s.onWrite)
	s.sending = nil
	if s.sendErr != nil {
		err = s.sendErr
	}
	return err
}

// write is called by the runtime when the socket may have room. It returns true when it is through.
func (s *stream) write(fd uintptr) bool {
	for s.sending.left > 0 {
		if s.aborted.Load() {
			s.sendErr = os.ErrDeadlineExceeded
			return true
		}
		s.sendVec.gather(s.sending, nil)
		n, errno := s.sendVec.writeTo(fd)
		switch errno {
		case 0:
			s.sending.advance(uint64(n))
			s.progress.Add(1)
		case syscall.EINTR:
		case syscall.EAGAIN:
			return !s.mayWait
		default:
			s.sendErr = os.NewSyscallError("writev", errno)
			return true
		}
	}
	return true
}

// secureSend counts bytes as sent before it hands them to the TLS layer: on a failure nobody can tell which of
// them have left.
func (s *stream) secureSend(c *cursor) error {
	for c.left > 0 {
		if s.aborted.Load() {
			return os.ErrDeadlineExceeded
		}
		piece := c.piece()
		if len(piece) >= len(s.gathered) {
			piece = piece[:min(len(piece), pieceBytes)]
			c.advance(uint64(len(piece)))
		} else {
			n := 0
			for c.left > 0 && n < len(s.gathered) {
				k := copy(s.gathered[n:], c.piece())
				c.advance(uint64(k))
				n += k
			}
			piece = s.gathered[:n]
		}
		if _, err := s.tls.Write(piece); err != nil {
			return err
		}
		s.progress.Add(1)
	}
	return nil
}

// peek returns the next n bytes, n at most bufferBytes, without consuming them. It waits for them as long as it
// takes. They are valid until the next call. The error is io.EOF only where no byte has come.
func (s *stream) peek(n int) ([]byte, error) {
	if s.last-s.first < n && s.first > 0 {
		s.last = copy(s.buffer, s.buffer[s.first:s.last])
		s.first = 0
	}
	for s.last-s.first < n {
		k, err := s.fill(nil)
		if err != nil {
			if errors.Is(err, io.EOF) && s.last > s.first {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		s.last += k
	}
	return s.buffer[s.first : s.first+n], nil
}

// consume goes on after n bytes that were peeked at.
func (s *stream) consume(n int) { s.first += n }

// drained tells whether nothing that was read ahead is left.
func (s *stream) drained() bool { return s.first == s.last }

// discard skips n bytes, and counts n down.
func (s *stream) discard(n *uint64) error {
	for *n > 0 {
		if _, err := s.peek(1); err != nil {
			return midFrame(err)
		}
		k := min(*n, uint64(s.last-s.first))
		s.consume(int(k))
		*n -= k
	}
	return nil
}

// receive fills all of c.
func (s *stream) receive(c *cursor) error {
	for c.left > 0 {
		if s.first < s.last {
			k := copy(c.piece(), s.buffer[s.first:s.last])
			s.first += k
			c.advance(uint64(k))
			continue
		}
		s.first, s.last = 0, 0
		k, err := s.fill(c)
		if err != nil {
			return midFrame(err)
		}
		into := min(uint64(k), c.left)
		c.advance(into)
		s.last = k - int(into)
	}
	return nil
}

func midFrame(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// fill reads at least one byte: first into c, where it is not nil, and what exceeds it into the free end of the
// buffer. It returns how many bytes came, and leaves it to the caller to account for them.
func (s *stream) fill(c *cursor) (int, error) {
	var n int
	var err error
	if s.tls != nil {
		target := s.buffer[s.last:]
		if c != nil {
			target = c.piece()
		}
		n, err = s.tls.Read(target)
		if n > 0 {
			err = nil // it comes again
		}
	} else {
		s.receiving, s.received, s.receiveErr = c, 0, nil
		err = s.raw.Read(s.onRead)
		s.receiving = nil
		if s.receiveErr != nil {
			err = s.receiveErr
		}
		n = s.received
	}
	if err == nil {
		s.progress.Add(1)
	}
	return n, err
}

// read is called by the runtime when the socket may have data. It returns true when it is through.
func (s *stream) read(fd uintptr) bool {
	for {
		if s.aborted.Load() {
			s.receiveErr = os.ErrDeadlineExceeded
			return true
		}
		s.receiveVec.gather(s.receiving, s.buffer[s.last:])
		n, errno := s.receiveVec.readFrom(fd)
		switch {
		case errno == syscall.EINTR:
		case errno == syscall.EAGAIN:
			return false
		case errno != 0:
			s.receiveErr = os.NewSyscallError("readv", errno)
			return true
		case n == 0:
			s.receiveErr = io.EOF
			return true
		default:
			s.received = n
			return true
		}
	}
}
