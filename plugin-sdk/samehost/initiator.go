package samehost

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// socketReach is the way to a target in another process.
type socketReach struct {
	endpoint *endpoint
	conn     *net.UnixConn
	ended    chan struct{}  // closed when nothing is read any more
	mapping  sync.WaitGroup // calls of Mover.Map
	// asking holds where the answer goes while a question is with the target.
	asking chan chan message

	mu     sync.Mutex
	opened map[backend.RegionID]*mapping
}

// mapping is a region of the target that was asked for. The fields under ready do not change once it is closed.
type mapping struct {
	key      regionKey // it was, or will be, opened with
	answered bool      // belongs to the reading goroutine

	ready chan struct{}
	area  area
	err   error
}

// reachSocket connects to the target that answered, and proves both ends to each other.
func reachSocket(ctx context.Context, a *answer, e *endpoint) (*socketReach, error) {
	fail := func(code backend.Code, err error) (*socketReach, error) {
		if ctx.Err() != nil {
			code, err = backend.Cancelled, ctx.Err()
		}
		return nil, &backend.Error{Code: code, Op: "establish", Backend: e.instance.name, Peer: e.peer, Err: err}
	}
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, network, a.socket)
	if err != nil {
		return fail(backend.PathDown, err)
	}
	conn := c.(*net.UnixConn)
	conn.SetReadDeadline(time.Now().Add(ioPatience))
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(0, 1)) })
	code, err := introduce(conn, a, e.instance.name)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return fail(code, err)
	}
	conn.SetReadDeadline(time.Time{})
	r := &socketReach{
		endpoint: e, conn: conn,
		ended:  make(chan struct{}),
		asking: make(chan chan message, 1),
		opened: make(map[backend.RegionID]*mapping),
	}
	go r.read()
	return r, nil
}

// introduce is the initiator's half of the handshake, for a backend of that name. The code is for the error.
func introduce(c *net.UnixConn, a *answer, name string) (backend.Code, error) {
	if _, err := checkUser(c); err != nil {
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
	want := a.secret.prove(name, targetProof, &ours.nonce, &theirs.nonce)
	if !hmac.Equal(theirs.proof[:], want[:]) {
		return backend.Denied, errors.New("the process that listens does not know the secret")
	}
	reply := message{kind: proof, proof: a.secret.prove(name, initiatorProof, &ours.nonce, &theirs.nonce)}
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

// refuse makes an error about a region, or, where it is zero, about a question.
func (r *socketReach) refuse(op string, id backend.RegionID, code backend.Code, text string, err error) *backend.Error {
	return &backend.Error{
		Code: code, Op: op, Backend: r.endpoint.instance.name, Peer: r.endpoint.peer, Region: id, Text: text, Err: err,
	}
}

// write sends a request of ours. An error is a *backend.Error.
func (r *socketReach) write(op string, m *message) error {
	err := send(r.conn, m, -1)
	if err == nil || errors.Is(err, unix.EPIPE) { // what a broken pipe means, the reader finds out
		return nil
	}
	down := r.refuse(op, m.region, backend.PathDown, "", err)
	r.endpoint.fail(down)
	return down
}

func (r *socketReach) open(ctx context.Context, id backend.RegionID, key regionKey) (area, error) {
	r.mu.Lock()
	m := r.opened[id]
	if m != nil && m.key != key {
		r.mu.Unlock()
		return area{}, r.refuse("session", id, backend.Denied, "the key does not open the region: fetch its descriptor anew", nil)
	}
	ask := m == nil
	if ask {
		m = &mapping{key: key, ready: make(chan struct{})}
		r.opened[id] = m
	}
	r.mu.Unlock()

	if ask {
		if err := r.write("session", &message{kind: borrow, region: id, key: key}); err != nil {
			return area{}, err
		}
	}
	select {
	case <-m.ready:
		return m.area, m.err
	case <-r.ended:
		return area{}, r.refuse("session", id, backend.PathDown, "the connection to the peer ended", nil)
	case <-ctx.Done():
		return area{}, r.refuse("session", id, backend.Cancelled, "", ctx.Err())
	}
}

func (r *socketReach) ask(ctx context.Context, question []byte) ([]byte, error) {
	answer := make(chan message, 1)
	select {
	case r.asking <- answer:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := r.write("ask", &message{kind: ask, note: question}); err != nil {
		return nil, err
	}
	// Where nobody waits for the answer any more, the reader still takes it, and with it the turn of the next question.
	select {
	case m := <-answer:
		if m.code != 0 {
			return nil, r.refuse("ask", 0, knownCode(m.code), m.text, nil)
		}
		return m.note, nil
	case <-ctx.Done():
		return nil, ctx.Err()
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
			r.endpoint.fail(r.diagnose(err))
			return
		}
	}
}

// take handles one message of the target. It uses up the descriptor.
func (r *socketReach) take(m *message, fd int) error {
	if fd >= 0 && m.kind != lent {
		unix.Close(fd)
		return errParse
	}
	switch m.kind {
	case told:
		select {
		case answer := <-r.asking:
			answer <- *m
			return nil
		default:
			return errParse
		}
	case lent, refused:
	default:
		return errParse
	}
	r.mu.Lock()
	asked := r.opened[m.region]
	r.mu.Unlock()
	if asked == nil || asked.answered {
		if fd >= 0 {
			unix.Close(fd)
		}
		return errParse
	}
	asked.answered = true
	if m.kind == refused {
		r.settle(m.region, asked, r.refuse("session", m.region, knownCode(m.code), m.text, nil))
		return nil
	}
	// Mapping may take its time; the reader has to see meanwhile whether the target wants its memory back.
	r.mapping.Go(func() { r.settle(m.region, asked, r.mapLent(asked, m, fd)) })
	return nil
}

// mapLent has the mover map what the target lent. It uses up the descriptor.
func (r *socketReach) mapLent(asked *mapping, m *message, fd int) error {
	if fd >= 0 {
		defer unix.Close(fd)
	}
	e := r.endpoint
	region, err := e.instance.mover.Map(e.ctx, Lent{Rights: m.rights, Size: m.size, File: fd, Note: m.note})
	if err != nil {
		return e.instance.explain(err, "session", e.peer, m.region)
	}
	asked.area = area{region: region, rights: m.rights}
	return nil
}

// settle ends the wait for a region. One that cannot be had can be asked for again.
func (r *socketReach) settle(id backend.RegionID, asked *mapping, err error) {
	if err != nil {
		r.mu.Lock()
		delete(r.opened, id)
		r.mu.Unlock()
	}
	asked.err = err
	close(asked.ready)
}

// errCut does not say that the peer is gone: where the backend is a process of its own, another one may follow it.
var errCut = errors.New("the process at the other end has ended, or it has cut the connection")

// diagnose says what the end of the stream means. A target that lives and wants its memory back has shut down
// only its sending side: a message to it goes through. One that is gone cannot be written to.
func (r *socketReach) diagnose(err error) *backend.Error {
	e := r.endpoint
	if errors.Is(err, io.EOF) && send(r.conn, &message{kind: leaving}, -1) == nil {
		return e.instance.errRevoked(e.peer)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
		err = errCut
	}
	return &backend.Error{Code: backend.PathDown, Backend: e.instance.name, Peer: e.peer, Err: err}
}

func (r *socketReach) leave() {
	r.conn.SetReadDeadline(time.Unix(0, 1)) // wake the reader
	<-r.ended
	r.mapping.Wait()
	for id, m := range r.opened {
		if m.area.region == nil {
			continue
		}
		if err := m.area.region.Close(); err != nil {
			e := r.endpoint
			e.instance.log.Warn("cannot let go of a peer's region", "backend", e.instance.name, "peer", e.peer, "region", id, "error", err)
		}
	}
	send(r.conn, &message{kind: gone}, -1) // where it does not get through, the end of the stream says much the same
	r.conn.Close()
}
