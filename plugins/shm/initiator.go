package shm

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// socketReach is the way to a target in another process.
type socketReach struct {
	conn  *net.UnixConn
	peer  backend.Peer
	fail  func(*backend.Error) // of the endpoint
	ended chan struct{}        // closed when nothing is read any more

	mu     sync.Mutex
	opened map[backend.RegionID]*mapping
}

// mapping is a region of the target that was asked for. The fields under ready do not change once it is closed.
type mapping struct {
	key regionKey // it was, or will be, opened with

	ready chan struct{}
	area  area
	whole []byte // to unmap: area.bytes and what precedes them in their page
	err   error
}

// reachSocket connects to the target that answered, and proves both ends to each other.
func reachSocket(ctx context.Context, a *answer, e *endpoint) (*socketReach, error) {
	fail := func(code backend.Code, err error) (*socketReach, error) {
		if ctx.Err() != nil {
			code, err = backend.Cancelled, ctx.Err()
		}
		return nil, &backend.Error{Code: code, Op: "establish", Backend: name, Peer: e.peer, Err: err}
	}
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, network, a.socket)
	if err != nil {
		return fail(backend.PathDown, err)
	}
	conn := c.(*net.UnixConn)
	conn.SetReadDeadline(time.Now().Add(ioPatience))
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(0, 1)) })
	code, err := introduce(conn, a)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return fail(code, err)
	}
	conn.SetReadDeadline(time.Time{})
	r := &socketReach{
		conn: conn, peer: e.peer, fail: e.fail,
		ended:  make(chan struct{}),
		opened: make(map[backend.RegionID]*mapping),
	}
	go r.read()
	return r, nil
}

// introduce is the initiator's half of the handshake. The code is for the error.
func introduce(c *net.UnixConn, a *answer) (backend.Code, error) {
	if err := checkUser(c); err != nil {
		return backend.Denied, err
	}
	ours := message{kind: hello, grant: a.grant}
	rand.Read(ours.nonce[:])
	if err := send(c, &ours, -1); err != nil {
		return backend.PathDown, err
	}
	theirs, code, err := expect(c, challenge)
	if err != nil {
		return code, err
	}
	want := a.secret.prove(targetProof, &ours.nonce, &theirs.nonce)
	if !hmac.Equal(theirs.proof[:], want[:]) {
		return backend.Denied, errors.New("the process that listens does not know the secret")
	}
	reply := message{kind: proof, proof: a.secret.prove(initiatorProof, &ours.nonce, &theirs.nonce)}
	if err := send(c, &reply, -1); err != nil {
		return backend.PathDown, err
	}
	_, code, err = expect(c, welcome)
	return code, err
}

// expect receives one step of the handshake.
func expect(c *net.UnixConn, want kind) (message, backend.Code, error) {
	m, _, err := receive(c, false)
	switch {
	case err != nil:
		return m, backend.PathDown, err
	case m.kind == refused:
		return m, knownCode(m.code), errors.New(m.text)
	case m.kind != want:
		return m, backend.PathDown, errParse
	}
	return m, 0, nil
}

// knownCode keeps a peer from making up codes.
func knownCode(c backend.Code) backend.Code {
	if slices.Contains(backend.Codes, c) {
		return c
	}
	return backend.Internal
}

func (r *socketReach) open(ctx context.Context, id backend.RegionID, key regionKey) (area, error) {
	fail := func(code backend.Code, text string, err error) (area, error) {
		return area{}, &backend.Error{
			Code: code, Op: "session", Backend: name, Peer: r.peer, Region: id, Text: text, Err: err,
		}
	}
	r.mu.Lock()
	m := r.opened[id]
	if m != nil && m.key != key {
		r.mu.Unlock()
		return fail(backend.Denied, "the key does not open the region: fetch its descriptor anew", nil)
	}
	ask := m == nil
	if ask {
		m = &mapping{key: key, ready: make(chan struct{})}
		r.opened[id] = m
	}
	r.mu.Unlock()

	if ask {
		err := send(r.conn, &message{kind: borrow, region: id, key: key}, -1)
		if err != nil && !errors.Is(err, unix.EPIPE) { // what a broken pipe means, the reader finds out
			r.fail(&backend.Error{Code: backend.PathDown, Op: "session", Backend: name, Peer: r.peer, Err: err})
			return fail(backend.PathDown, "", err)
		}
	}
	select {
	case <-m.ready:
		return m.area, m.err
	case <-r.ended:
		return fail(backend.PathDown, "the connection to the peer ended", nil)
	case <-ctx.Done():
		return fail(backend.Cancelled, "", ctx.Err())
	}
}

// read takes what the target sends, until the stream ends, and fails the endpoint then.
func (r *socketReach) read() {
	defer close(r.ended)
	for {
		m, fd, err := receive(r.conn, true)
		if err == nil {
			err = r.take(&m, fd)
		}
		if err != nil {
			r.fail(r.diagnose(err))
			return
		}
	}
}

// take handles one message of the target. It uses up the descriptor.
func (r *socketReach) take(m *message, fd int) error {
	if fd >= 0 {
		defer unix.Close(fd) // a mapping outlives the descriptor
	}
	r.mu.Lock()
	asked := r.opened[m.region]
	r.mu.Unlock()
	if asked == nil || asked.isReady() || (m.kind == lent) != (fd >= 0) {
		return errParse
	}
	fail := func(code backend.Code, text string) {
		asked.err = &backend.Error{
			Code: code, Op: "session", Backend: name, Peer: r.peer, Region: m.region, Text: text,
		}
		r.mu.Lock()
		delete(r.opened, m.region) // so that it can be asked for again
		r.mu.Unlock()
	}
	switch m.kind {
	case lent:
		whole, bytes, err := mapFile(fd, m.offset, m.size, m.rights)
		if err != nil {
			fail(backend.Unsupported, err.Error())
			break
		}
		asked.whole, asked.area = whole, area{bytes: bytes, rights: m.rights}
	case refused:
		fail(knownCode(m.code), m.text)
	default:
		return errParse
	}
	close(asked.ready)
	return nil
}

// isReady may be called by the reading goroutine only, which is the one that makes mappings ready.
func (m *mapping) isReady() bool {
	select {
	case <-m.ready:
		return true
	default:
		return false
	}
}

// errCut does not say that the peer is gone: where the backend is a process of its own, another one may follow it.
var errCut = errors.New("the process at the other end has ended, or it has cut the connection")

// diagnose says what the end of the stream means. A target that lives and wants its memory back has shut down
// only its sending side: a message to it goes through. One that is gone cannot be written to.
func (r *socketReach) diagnose(err error) *backend.Error {
	if errors.Is(err, io.EOF) && send(r.conn, &message{kind: leaving}, -1) == nil {
		return errRevoked(r.peer)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
		return &backend.Error{Code: backend.PathDown, Backend: name, Peer: r.peer, Err: errCut}
	}
	return &backend.Error{Code: backend.PathDown, Backend: name, Peer: r.peer, Err: err}
}

func (r *socketReach) leave() {
	r.conn.SetReadDeadline(time.Unix(0, 1)) // wake the reader
	<-r.ended
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.opened {
		if m.whole != nil {
			unix.Munmap(m.whole)
		}
	}
	r.conn.Close()
}

// mapFile maps a region that a peer lent. It trusts none of its arguments: the peer may be broken.
func mapFile(fd int, offset, size uint64, rights backend.Rights) (whole, bytes []byte, err error) {
	page := uint64(unix.Getpagesize())
	start := offset &^ (page - 1)
	if size == 0 || offset > math.MaxInt64 || size > math.MaxInt64-offset || size > math.MaxInt-page {
		return nil, nil, fmt.Errorf("the peer's region of %d bytes at offset %d of its file cannot be", size, offset)
	}
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		return nil, nil, errors.New("the file of the peer's region could shrink under this process: it must be a memfd sealed with F_SEAL_SHRINK")
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, nil, fmt.Errorf("measure the file of the peer's region: %w", err)
	}
	if uint64(stat.Size) < offset+size {
		return nil, nil, fmt.Errorf("the peer's region ends at offset %d of a file of %d bytes", offset+size, stat.Size)
	}
	protection := unix.PROT_READ
	if rights&backend.RemoteWrite != 0 {
		protection |= unix.PROT_WRITE
	}
	whole, err = unix.Mmap(fd, int64(start), int(offset-start+size), protection, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, fmt.Errorf("map the peer's region: %w", err)
	}
	return whole, whole[offset-start:], nil
}
