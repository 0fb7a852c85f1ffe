package samehost

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// maxConns bounds the connections from other processes, established or not.
const maxConns = 1024

// accept serves the initiators of other processes until the listener is closed.
func (i *Instance) accept() {
	for {
		c, err := i.listener.AcceptUnix()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil: // for want of descriptors or memory: others may end and give some back
			i.log.Warn("cannot accept a connection", "backend", i.name, "error", err)
			time.Sleep(10 * time.Millisecond)
		case !i.track(c):
			c.Close()
		}
	}
}

// track starts to serve a connection, unless the instance is closed or has too many.
func (i *Instance) track(c *net.UnixConn) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed || len(i.conns) >= maxConns {
		return false
	}
	i.conns[c] = struct{}{}
	i.tasks.Go(func() {
		i.serve(c)
		i.mu.Lock()
		delete(i.conns, c)
		i.mu.Unlock()
	})
	return true
}

// serve is the target's end of one connection.
func (i *Instance) serve(c *net.UnixConn) {
	defer c.Close()
	quiet := make(chan struct{})

	c.SetReadDeadline(time.Now().Add(ioPatience))
	g, process, err := i.receiveGuest(c, quiet)
	if process != nil {
		defer process.Close()
	}
	if g == nil {
		if code := backend.CodeOf(err); code == backend.Denied || code == backend.Unsupported {
			i.log.Warn("refused a connection", "backend", i.name, "error", err)
		}
		return
	}
	if err == nil {
		c.SetReadDeadline(time.Time{})
		if !i.attend(c, g, process) {
			return // whoever waits for the guest to be quiet must never learn that it is
		}
	}
	c.Close()
	i.forget(g)
	close(quiet)
}

// receiveGuest is the target's half of the handshake. It may return both a guest and an error, and the guest's process
// with either.
func (i *Instance) receiveGuest(c *net.UnixConn, quiet <-chan struct{}) (g *Guest, process *os.File, err error) {
	deny := func(err *backend.Error) (*Guest, *os.File, error) {
		return nil, process, errors.Join(err, send(c, &message{kind: refused, code: err.Code, text: err.Text}, -1))
	}
	if _, err := checkUser(c); err != nil {
		return nil, nil, &backend.Error{Code: backend.Denied, Op: "establish", Backend: i.name, Err: err}
	}
	first, _, err := receive(c, false)
	if errors.Is(err, errParse) || err == nil && first.kind != hello {
		return deny(i.errMalformed("establish", "first message", backend.Peer{}))
	}
	if err != nil {
		return nil, nil, err
	}
	key, ok := i.granted(first.grant)
	if !ok {
		return deny(i.errNoGrant())
	}
	if i.untilExit {
		// Whoever answers the challenge was alive when this looked for the process: its number was not another's.
		if process, err = i.processOf(c); err != nil {
			return deny(&backend.Error{Code: backend.Unsupported, Op: "establish", Backend: i.name, Text: err.Error()})
		}
	}
	ours := message{kind: challenge}
	rand.Read(ours.nonce[:])
	ours.proof = key.prove(i.name, targetProof, &first.nonce, &ours.nonce)
	if err := send(c, &ours, -1); err != nil {
		return nil, process, err
	}
	reply, _, err := receive(c, false)
	if err != nil && !errors.Is(err, errParse) {
		return nil, process, err
	}
	want := key.prove(i.name, initiatorProof, &first.nonce, &ours.nonce)
	if err != nil || reply.kind != proof || !hmac.Equal(reply.proof[:], want[:]) {
		return deny(i.errNoGrant())
	}
	g, refusal := i.admit(first.grant, func() { c.CloseWrite() }, quiet)
	if refusal != nil {
		return deny(refusal)
	}
	return g, process, send(c, &message{kind: welcome}, -1)
}

// attend serves a guest until it is quiet: until it leaves in order, or else until the end of the stream, and until that
// of its process, if there is one to wait for. It tells whether the guest is quiet: it is not where this instance was
// closed before.
//
// Whatever the guest does wrong, and whatever fails here, only revokes it: the connection is read on, because that is how
// the guest says that it has let go.
func (i *Instance) attend(c *net.UnixConn, g *Guest, process *os.File) bool {
	v := visit{instance: i, conn: c, guest: g}
	ctx, cancel := context.WithCancel(i.ctx)
	end := v.read(ctx)
	cancel()
	v.answering.Wait()
	switch {
	case end == nil:
		return true
	case process == nil:
		return errors.Is(end, io.EOF) || errors.Is(end, unix.ECONNRESET)
	}
	return i.awaitExit(process)
}

// revoke makes sure that the guest is lent nothing more, and asks it to leave.
func (i *Instance) revoke(g *Guest) {
	i.mu.Lock()
	g.revoked = true
	i.mu.Unlock()
	g.revoke()
}

// visit is the time from a guest's welcome to the end of its stream.
type visit struct {
	instance  *Instance
	conn      *net.UnixConn
	guest     *Guest
	asked     atomic.Bool    // a question is with the mover
	answering sync.WaitGroup // as asked, and until the answer is sent
}

// read takes what the guest sends, until it says that it has let go of everything, and returns nil then, or why the
// stream ended without that. The context is for the mover's answers.
func (v *visit) read(ctx context.Context) error {
	reset := false
	for {
		m, _, err := receive(v.conn, false)
		switch {
		case err == nil && m.kind == gone:
			return nil
		case err == nil:
			err = v.take(ctx, &m)
		case errors.Is(err, unix.ECONNRESET) && !reset:
			// The guest closed the socket before it had read everything. What it sent before that is still to come.
			reset = true
			continue
		case !errors.Is(err, errParse):
			return err
		}
		if err != nil {
			v.instance.revoke(v.guest)
		}
	}
}

// take handles one message of the guest. An error says that the guest cannot stay.
func (v *visit) take(ctx context.Context, m *message) error {
	switch m.kind {
	case borrow:
		return v.lend(m)
	case ask:
		if !v.asked.CompareAndSwap(false, true) {
			return errParse
		}
		v.answering.Wait() // for the last answer to be sent: the answers to a guest that does not read must not pile up
		v.answering.Go(func() { v.answer(ctx, m.note) })
	case leaving:
	default:
		return errParse
	}
	return nil
}

func (v *visit) lend(m *message) error {
	r, refusal := v.instance.lend(v.guest, m.region, m.key, true)
	if refusal != nil {
		return send(v.conn, &message{kind: refused, region: m.region, code: refusal.Code, text: words(refusal)}, -1)
	}
	reply := message{kind: lent, region: m.region, rights: r.rights, size: r.lent.Size, note: r.lent.Note}
	return send(v.conn, &reply, r.lent.File)
}

// answer answers a question. The mover may take its time, while the guest's other messages are served.
func (v *visit) answer(ctx context.Context, question []byte) {
	i := v.instance
	b, refusal := i.answer(ctx, v.guest, question)
	reply := message{kind: told, note: b}
	if refusal != nil {
		reply = message{kind: told, code: refusal.Code, text: words(refusal)}
	}
	v.asked.Store(false) // before the guest can know that it may ask again
	if err := send(v.conn, &reply, -1); err != nil {
		i.revoke(v.guest)
	}
}

// words returns what a guest is told of an error.
func words(e *backend.Error) string {
	if e.Text == "" && e.Err != nil {
		return e.Err.Error()
	}
	return e.Text
}

// awaitExit waits until a process has ended, and returns false where this instance is closed before.
func (i *Instance) awaitExit(process *os.File) bool {
	wake := context.AfterFunc(i.ctx, func() { process.SetReadDeadline(time.Unix(0, 1)) })
	defer wake()
	raw, err := process.SyscallConn()
	if err != nil {
		return false
	}
	return raw.Read(hasEnded) == nil
}
