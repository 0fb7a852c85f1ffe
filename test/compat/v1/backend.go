package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/umbp/umbp/test/compat/v1/backendpb"
)

// end is the backend: the initiator of its endpoints and the target of its guests.
type end struct {
	self     *backendpb.Peer
	dir      string
	listener net.Listener
	running  sync.WaitGroup

	copying sync.Mutex // held while a guest's request touches memory

	mu        sync.Mutex
	closed    bool
	regions   map[uint64]*region
	endpoints map[*endpoint]bool
	guests    map[[secretBytes]byte]*guest
}

const (
	secretBytes = 32
	patience    = 10 * time.Second
)

type region struct {
	id     uint64
	rights uint32
	size   uint64
	memory memory
	gone   bool
}

type guest struct {
	peer  *backendpb.Peer
	conn  net.Conn
	ended chan struct{}
}

func openEnd(self *backendpb.Peer) (*end, error) {
	dir, err := os.MkdirTemp(os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), "compat-")
	if err != nil {
		return nil, err
	}
	b := &end{
		self: self, dir: dir, regions: map[uint64]*region{}, endpoints: map[*endpoint]bool{},
		guests: map[[secretBytes]byte]*guest{},
	}
	if b.listener, err = net.Listen("unix", filepath.Join(dir, "s")); err != nil {
		return nil, err
	}
	b.running.Go(func() {
		for {
			conn, err := b.listener.Accept()
			if err != nil {
				return
			}
			b.running.Go(func() { b.welcome(conn) })
		}
	})
	return b, nil
}

func (b *end) register(kind uint32, r *region) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.closed:
		return &fault{pathDown, "the backend is closed"}
	case kind != hostMemory:
		return &fault{unsupported, "only host memory"}
	case b.regions[r.id] != nil:
		return &fault{badRequest, "the region is registered already"}
	}
	b.regions[r.id] = r
	return nil
}

func (b *end) deregister(id uint64) {
	b.mu.Lock()
	r := b.regions[id]
	if r == nil {
		b.mu.Unlock()
		return
	}
	r.gone = true
	var all []*endpoint
	for e := range b.endpoints {
		all = append(all, e)
	}
	b.mu.Unlock()
	for _, e := range all {
		e.drain("the region was deregistered", func(t *transfer) bool { return t.session.local == r })
	}
	b.copying.Lock()
	defer b.copying.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.regions[id] == r {
		delete(b.regions, id)
		r.memory.free()
	}
}

func (b *end) region(id uint64) *region {
	b.mu.Lock()
	defer b.mu.Unlock()
	if r := b.regions[id]; r != nil && !r.gone {
		return r
	}
	return nil
}

func (b *end) offer(peer *backendpb.Peer) ([]byte, error) {
	if peer.GetHost() == "" || peer.GetHost() != b.self.GetHost() {
		return nil, &fault{unsupported, "the peer is on another host"}
	}
	return order.AppendUint64(nil, peer.GetIncarnation()), nil
}

func (b *end) answer(peer *backendpb.Peer, offer []byte) ([]byte, error) {
	if len(offer) != 8 {
		return nil, &fault{badRequest, "this is no offer of compat-v1"}
	}
	if order.Uint64(offer) != b.self.GetIncarnation() {
		return nil, &fault{peerGone, "the offer is for another incarnation"}
	}
	var secret [secretBytes]byte
	rand.Read(secret[:])
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, &fault{pathDown, "the backend is closed"}
	}
	b.guests[secret] = &guest{peer: peer, ended: make(chan struct{})}
	return append(secret[:], b.listener.Addr().String()...), nil
}

// dismiss ends the connections that match, and returns when what they had begun is over.
func (b *end) dismiss(match func(*guest) bool) {
	b.mu.Lock()
	var leaving []*guest
	for secret, g := range b.guests {
		switch {
		case !match(g):
		case g.conn == nil:
			delete(b.guests, secret)
		default:
			g.conn.Close()
			leaving = append(leaving, g)
		}
	}
	b.mu.Unlock()
	for _, g := range leaving {
		<-g.ended
	}
}

func (b *end) fence(peer *backendpb.Peer) {
	b.dismiss(func(g *guest) bool { return same(g.peer, peer) })
}

func same(p, q *backendpb.Peer) bool {
	return p.GetNode() == q.GetNode() && p.GetIncarnation() == q.GetIncarnation()
}

func (b *end) close() {
	b.mu.Lock()
	b.closed = true
	var all []*endpoint
	for e := range b.endpoints {
		all = append(all, e)
	}
	b.mu.Unlock()
	for _, e := range all {
		e.close()
	}
	b.listener.Close()
	b.dismiss(func(*guest) bool { return true })
	b.running.Wait()
	os.RemoveAll(b.dir)
}

// welcome serves a guest. A request is a head of four numbers, ranges, and the bytes of a write; an answer is a code, a
// length, and bytes.
func (b *end) welcome(conn net.Conn) {
	defer conn.Close()
	var secret [secretBytes]byte
	conn.SetDeadline(time.Now().Add(patience))
	if readFull(conn, secret[:]) != nil {
		return
	}
	b.mu.Lock()
	g := b.guests[secret]
	if g == nil || g.conn != nil {
		b.mu.Unlock()
		return
	}
	g.conn = conn
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		delete(b.guests, secret)
		b.mu.Unlock()
		close(g.ended)
	}()
	conn.SetDeadline(time.Time{})
	if _, err := conn.Write([]byte("welcome")); err != nil {
		return
	}
	in := bufio.NewReader(conn)
	for {
		head := make([]byte, 32)
		if readFull(in, head) != nil {
			return
		}
		count, size := order.Uint64(head[16:]), order.Uint64(head[24:])
		if count > maxSegments || size > maxBytes {
			return
		}
		ranges, data := make([]byte, 16*count), make([]byte, size)
		if readFull(in, ranges, data) != nil {
			return
		}
		reply, err := b.execute(order.Uint64(head), order.Uint64(head[8:]), ranges, data)
		code := uint64(0)
		if err != nil {
			e := errorOf(err)
			code, reply = uint64(e.GetCode()), []byte(e.GetText())
		}
		answer := order.AppendUint64(order.AppendUint64(nil, code), uint64(len(reply)))
		if _, err := conn.Write(append(answer, reply...)); err != nil {
			return
		}
	}
}

func (b *end) execute(op, id uint64, ranges, data []byte) ([]byte, error) {
	b.copying.Lock()
	defer b.copying.Unlock()
	r := b.region(id)
	switch {
	case op != opWrite && op != opRead:
		return nil, &fault{unsupported, "no such operation"}
	case r == nil:
		return nil, &fault{badRequest, "no such region"}
	case op == opRead && r.rights&1 == 0, op == opWrite && r.rights&2 == 0:
		return nil, &fault{denied, "the region does not allow it"}
	}
	var total uint64
	for at := 0; at < len(ranges); at += 16 {
		offset, length := order.Uint64(ranges[at:]), order.Uint64(ranges[at+8:])
		if total += length; !within(offset, length, r.size) || total > maxBytes {
			return nil, &fault{badRequest, fmt.Sprintf("range [%d, +%d) of a region of %d bytes", offset, length, r.size)}
		}
	}
	if op == opRead {
		data = make([]byte, total)
	} else if total != uint64(len(data)) {
		return nil, &fault{badRequest, "another number of bytes"}
	}
	rest := data
	for at := 0; at < len(ranges); at += 16 {
		offset, length := order.Uint64(ranges[at:]), order.Uint64(ranges[at+8:])
		move := r.memory.store
		if op == opRead {
			move = r.memory.load
		}
		if err := move(offset, rest[:length]); err != nil {
			return nil, err
		}
		rest = rest[length:]
	}
	if op == opWrite {
		return nil, nil
	}
	return data, nil
}

// endpoint is a connection from here. Its goroutine carries out one transfer after the other.
type endpoint struct {
	end     *end
	peer    *backendpb.Peer
	conn    net.Conn
	answers chan []byte // code and bytes
	gone    chan struct{}
	wake    chan struct{}
	down    func()
	ended   chan struct{}

	mu    sync.Mutex
	err   error
	queue []*transfer
}

type segment struct{ local, remote, length uint64 }

type transfer struct {
	id, cookie uint64
	op         uint32
	segments   []segment
	session    *session
	why        error
	complete   func(outcome byte, err error)
	ended      chan struct{}
}

func (b *end) connect(peer *backendpb.Peer, answer []byte, timeout time.Duration, down func()) (*endpoint, error) {
	if len(answer) <= secretBytes {
		return nil, &fault{badRequest, "this is no answer of compat-v1"}
	}
	conn, err := net.DialTimeout("unix", string(answer[secretBytes:]), timeout)
	if err != nil {
		return nil, &fault{pathDown, err.Error()}
	}
	welcome := make([]byte, 7)
	conn.SetDeadline(time.Now().Add(timeout))
	if _, err = conn.Write(answer[:secretBytes]); err == nil {
		err = readFull(conn, welcome)
	}
	if err != nil || string(welcome) != "welcome" {
		conn.Close()
		return nil, &fault{pathDown, fmt.Sprintf("the peer does not let this end in: %v", err)}
	}
	conn.SetDeadline(time.Time{})
	e := &endpoint{
		end: b, peer: peer, conn: conn, answers: make(chan []byte), gone: make(chan struct{}),
		wake: make(chan struct{}, 1), down: down, ended: make(chan struct{}),
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		conn.Close()
		return nil, &fault{pathDown, "the backend is closed"}
	}
	b.endpoints[e] = true
	go e.read()
	go e.run()
	return e, nil
}

func (e *endpoint) read() {
	defer close(e.gone)
	for {
		head := make([]byte, 16)
		if readFull(e.conn, head) != nil {
			return
		}
		size := order.Uint64(head[8:])
		if size > maxBytes {
			return
		}
		answer := append(head[:8:8], make([]byte, size)...)
		if readFull(e.conn, answer[8:]) != nil {
			return
		}
		select {
		case e.answers <- answer:
		case <-e.ended:
			return
		}
	}
}

func (e *endpoint) fail(why error) {
	e.mu.Lock()
	first := e.err == nil
	if first {
		e.err = why
	}
	e.mu.Unlock()
	if first {
		e.conn.Close()
		e.down()
		e.nudge()
	}
}

func (e *endpoint) nudge() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

func (e *endpoint) close() {
	e.fail(&fault{pathDown, "the endpoint was closed"})
	<-e.ended
	<-e.gone
}

func (e *endpoint) run() {
	defer close(e.ended)
	defer func() {
		e.end.mu.Lock()
		defer e.end.mu.Unlock()
		delete(e.end.endpoints, e)
	}()
	for {
		e.mu.Lock()
		var t *transfer
		err := e.err
		if len(e.queue) > 0 {
			t = e.queue[0]
			if err == nil {
				err = t.why
			}
		}
		e.mu.Unlock()
		if t == nil {
			if err != nil {
				return
			}
			select {
			case <-e.wake:
			case <-e.gone:
				e.fail(&fault{pathDown, "the peer has closed the connection"})
			}
			continue
		}
		outcome := byte(notSent)
		if err == nil {
			outcome, err = e.carry(t)
		}
		t.complete(outcome, err)
		e.mu.Lock()
		e.queue = e.queue[1:]
		e.mu.Unlock()
		close(t.ended)
	}
}

func (e *endpoint) carry(t *transfer) (byte, error) {
	unknown, total := byte(notSent), uint64(0)
	if t.op == opWrite {
		unknown = inDoubt
	}
	broken := func(why string) (byte, error) {
		e.fail(&fault{pathDown, why})
		return unknown, &fault{pathDown, why}
	}
	var request bytes.Buffer
	head := order.AppendUint64(order.AppendUint64(nil, uint64(t.op)), t.session.remote)
	head = order.AppendUint64(head, uint64(len(t.segments)))
	var ranges []byte
	for _, s := range t.segments {
		total += s.length
		ranges = order.AppendUint64(order.AppendUint64(ranges, s.remote), s.length)
	}
	data := make([]byte, total)
	if t.op == opWrite {
		head = order.AppendUint64(head, total)
		rest := data
		for _, s := range t.segments {
			if err := t.session.local.memory.load(s.local, rest[:s.length]); err != nil {
				return notSent, err
			}
			rest = rest[s.length:]
		}
	} else {
		head, data = order.AppendUint64(head, 0), nil
	}
	for _, part := range [][]byte{head, ranges, data} {
		request.Write(part)
	}
	e.conn.SetWriteDeadline(time.Now().Add(patience))
	if _, err := io.Copy(e.conn, &request); err != nil {
		return broken(err.Error())
	}
	var answer []byte
	select {
	case answer = <-e.answers:
	case <-e.gone:
		return broken("the connection has ended")
	case <-time.After(patience):
		return broken("the peer does not answer")
	}
	if code := order.Uint64(answer); code != 0 {
		return notSent, &fault{uint32(code), "the peer refuses: " + string(answer[8:])}
	}
	if t.op == opWrite {
		return done, nil
	}
	rest := answer[8:]
	if uint64(len(rest)) != total {
		return broken("the peer answers with another number of bytes")
	}
	for _, s := range t.segments {
		if err := t.session.local.memory.store(s.local, rest[:s.length]); err != nil {
			return inDoubt, err
		}
		rest = rest[s.length:]
	}
	return done, nil
}

// interrupt marks the transfers that match, and returns them.
func (e *endpoint) interrupt(why string, match func(*transfer) bool) []*transfer {
	e.mu.Lock()
	defer e.mu.Unlock()
	var found []*transfer
	for _, t := range e.queue {
		if match(t) {
			t.why = &fault{cancelled, why}
			found = append(found, t)
		}
	}
	return found
}

func (e *endpoint) drain(why string, match func(*transfer) bool) {
	for _, t := range e.interrupt(why, match) {
		<-t.ended
	}
}

type session struct {
	endpoint *endpoint
	local    *region
	remote   uint64
	size     uint64
	closed   bool // guarded by endpoint.mu
}

func (e *endpoint) session(local uint64, remote *backendpb.Remote) (*session, error) {
	e.mu.Lock()
	err := e.err
	e.mu.Unlock()
	r := e.end.region(local)
	switch {
	case err != nil:
		return nil, err
	case !same(remote.GetPeer(), e.peer):
		return nil, &fault{peerGone, "the descriptor is of another incarnation"}
	case remote.GetKind() != hostMemory:
		return nil, &fault{unsupported, "only host memory"}
	case r == nil:
		return nil, &fault{badRequest, "the local region is not registered"}
	}
	return &session{endpoint: e, local: r, remote: remote.GetRegion(), size: remote.GetSize()}, nil
}

func (s *session) post(t *transfer) error {
	if len(t.segments) > maxSegments {
		return &fault{badRequest, "too many segments"}
	}
	for _, g := range t.segments {
		if !within(g.local, g.length, s.local.size) || !within(g.remote, g.length, s.size) {
			return &fault{badRequest, "a range is outside of its region"}
		}
	}
	t.session, t.ended = s, make(chan struct{})
	e := s.endpoint
	e.end.mu.Lock()
	defer e.end.mu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.err != nil:
		return e.err
	case s.closed || s.local.gone:
		return &fault{cancelled, "the session is closed, or its region deregistered"}
	case len(e.queue) > window: // the one whose completion is on its way may be there still
		return errors.New("more than the window")
	}
	e.queue = append(e.queue, t)
	e.nudge()
	return nil
}

func (s *session) cancel(cookie uint64) {
	s.endpoint.interrupt("cancelled by the host", func(t *transfer) bool { return t.session == s && t.cookie == cookie })
}

func (s *session) close() {
	s.endpoint.mu.Lock()
	s.closed = true
	s.endpoint.mu.Unlock()
	s.endpoint.drain("the session was closed", func(t *transfer) bool { return t.session == s })
}
