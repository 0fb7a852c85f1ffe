package shm

import (
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"net"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// maxConns bounds the connections from other processes, established or not.
const maxConns = 1024

// accept serves the initiators of other processes until the listener is closed.
func (i *instance) accept() {
	for {
		c, err := i.listener.AcceptUnix()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil: // for want of descriptors or memory: others may end and give some back
			i.log.Warn("cannot accept a connection", "backend", name, "error", err)
			time.Sleep(10 * time.Millisecond)
		case !i.track(c):
			c.Close()
		}
	}
}

// track starts to serve a connection, unless the instance is closed or has too many.
func (i *instance) track(c *net.UnixConn) bool {
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
func (i *instance) serve(c *net.UnixConn) {
	quiet := make(chan struct{})
	defer close(quiet)
	defer c.Close()

	c.SetReadDeadline(time.Now().Add(ioPatience))
	g, err := i.receiveGuest(c, quiet)
	if g != nil {
		defer i.forget(g)
	}
	if err != nil {
		if backend.CodeOf(err) == backend.Denied {
			i.log.Warn("refused a connection", "backend", name, "error", err)
		}
		return
	}
	c.SetReadDeadline(time.Time{})

	// Whatever the guest does wrong, and whatever fails here, only revokes it: the connection is read until its
	// end, because that is how the guest says that it has let go.
	for {
		m, _, err := receive(c, false)
		if err == nil {
			err = i.attend(c, g, &m)
		} else if !errors.Is(err, errParse) {
			return
		}
		if err != nil {
			i.revoke(g)
		}
	}
}

// receiveGuest is the target's half of the handshake. It may return both a guest and an error.
func (i *instance) receiveGuest(c *net.UnixConn, quiet <-chan struct{}) (*guest, error) {
	deny := func(err *backend.Error) (*guest, error) {
		return nil, errors.Join(err, send(c, &message{kind: refused, code: err.Code, text: err.Text}, -1))
	}
	if err := checkUser(c); err != nil {
		return nil, &backend.Error{Code: backend.Denied, Op: "establish", Backend: name, Err: err}
	}
	first, _, err := receive(c, false)
	if errors.Is(err, errParse) || err == nil && first.kind != hello {
		return deny(errMalformed("establish", "first message", backend.Peer{}))
	}
	if err != nil {
		return nil, err
	}
	key, ok := i.granted(first.grant)
	if !ok {
		return deny(errNoGrant)
	}
	ours := message{kind: challenge}
	rand.Read(ours.nonce[:])
	ours.proof = key.prove(targetProof, &first.nonce, &ours.nonce)
	if err := send(c, &ours, -1); err != nil {
		return nil, err
	}
	reply, _, err := receive(c, false)
	if err != nil && !errors.Is(err, errParse) {
		return nil, err
	}
	want := key.prove(initiatorProof, &first.nonce, &ours.nonce)
	if err != nil || reply.kind != proof || !hmac.Equal(reply.proof[:], want[:]) {
		return deny(errNoGrant)
	}
	g, refusal := i.admit(first.grant, func() { c.CloseWrite() }, quiet)
	if refusal != nil {
		return deny(refusal)
	}
	return g, send(c, &message{kind: welcome}, -1)
}

// revoke makes sure that the guest is lent nothing more, and asks it to leave.
func (i *instance) revoke(g *guest) {
	i.mu.Lock()
	g.revoked = true
	i.mu.Unlock()
	g.revoke()
}

// attend answers one message of a guest. An error says that the guest cannot stay.
func (i *instance) attend(c *net.UnixConn, g *guest, m *message) error {
	switch m.kind {
	case borrow:
	case leaving:
		return nil
	default:
		return errParse
	}
	r, refusal := i.lend(g, m.region, m.key, true)
	if refusal != nil {
		return send(c, &message{kind: refused, region: m.region, code: refusal.Code, text: refusal.Text}, -1)
	}
	return send(c, &message{
		kind: lent, region: m.region, rights: r.memory.Rights,
		size: uint64(len(r.memory.Bytes)), offset: uint64(r.memory.FDOffset),
	}, r.file)
}
