package tcp

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// handshake is the initiator's half of a connection that is being set up. It holds nothing that has to be freed.
type handshake struct {
	t     *transport
	offer offer
	raw   []byte
}

// Offer implements backend.Backend.
func (t *transport) Offer(_ context.Context, peer backend.Peer) (backend.Handshake, error) {
	if err := checkPeer(peer); err != nil {
		return nil, fault("offer", peer, err)
	}
	h := &handshake{t: t, offer: offer{initiator: t.self, target: peer, connections: t.settings.connections}}
	fillRandom(h.offer.nonce[:])
	h.raw = h.offer.encode()
	return h, nil
}

// Offer implements backend.Handshake.
func (h *handshake) Offer() []byte { return h.raw }

// Abandon implements backend.Handshake.
func (h *handshake) Abandon() {}

// Establish implements backend.Handshake.
func (h *handshake) Establish(ctx context.Context, raw []byte) (backend.Endpoint, error) {
	refuse := func(err error) (backend.Endpoint, error) { return nil, fault("establish", h.offer.target, err) }
	a, err := parseAnswer(raw)
	if err != nil {
		return refuse(err)
	}
	if a.target.Node != h.offer.target.Node || a.target.Incarnation != h.offer.target.Incarnation {
		return refuse(backend.Errorf(backend.PeerGone, "%s answered", a.target))
	}
	if !h.t.begin() {
		return refuse(errClosed)
	}
	defer h.t.running.Done()

	callers := ctx
	ctx, cancel := context.WithTimeout(ctx, h.t.settings.connectTimeout)
	defer cancel()
	defer context.AfterFunc(h.t.ctx, cancel)()

	streams, err := h.connect(ctx, &a)
	if err != nil {
		switch {
		case callers.Err() != nil:
			err = &backend.Error{Code: backend.Cancelled, Err: err}
		case h.t.ctx.Err() != nil:
			err = errClosed
		}
		return refuse(err)
	}
	return h.t.newEndpoint(h.offer.target, streams)
}

var errClosed = backend.Errorf(backend.PathDown, "the backend is closed")

// begin counts the caller as running, unless the backend is closed.
func (t *transport) begin() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.running.Add(1)
	return true
}

// connect tries the target's addresses one after the other, each with its share of the time that is left.
func (h *handshake) connect(ctx context.Context, a *answer) ([]*stream, error) {
	var failed error
	deadline, _ := ctx.Deadline() // set by Establish
	for i, address := range a.addresses {
		now := time.Now()
		share := deadline.Sub(now) / time.Duration(len(a.addresses)-i)
		attempt, cancel := context.WithDeadline(ctx, now.Add(share))
		streams, err := h.connectTo(attempt, a, address)
		cancel()
		if err == nil {
			return streams, nil
		}
		if failed = err; backend.CodeOf(err) != backend.PathDown || ctx.Err() != nil {
			break // another address leads to the same answer
		}
	}
	return nil, failed
}

// connectTo opens all connections of the endpoint at one address, or none.
func (h *handshake) connectTo(ctx context.Context, a *answer, address string) ([]*stream, error) {
	streams := make([]*stream, h.offer.connections)
	group, ctx := errgroup.WithContext(ctx)
	for i := range streams {
		group.Go(func() (err error) {
			streams[i], err = h.connectOne(ctx, a, address, uint16(i))
			return err
		})
	}
	err := group.Wait()
	if err == nil {
		return streams, nil
	}
	for _, s := range streams {
		if s != nil {
			s.close(true)
		}
	}
	return nil, err
}

func (h *handshake) connectOne(ctx context.Context, a *answer, address string, index uint16) (*stream, error) {
	dialer := net.Dialer{Control: h.t.settings.control}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, unreachable(address, err)
	}
	tcp := conn.(*net.TCPConn)
	s, err := h.prove(ctx, tcp, a, address, index)
	if err != nil {
		tcp.Close()
		return nil, unreachable(address, err)
	}
	return s, nil
}

// prove proves both ends of one connection to each other.
func (h *handshake) prove(ctx context.Context, tcp *net.TCPConn, a *answer, address string, index uint16) (*stream, error) {
	if err := h.t.settings.tune(tcp); err != nil {
		return nil, err
	}
	// The context ends with its deadline, and then every read and write here does.
	stop := context.AfterFunc(ctx, func() { _ = tcp.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var conn net.Conn = tcp
	var secured *tls.Conn
	if h.t.client != nil {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return nil, err
		}
		config := h.t.client.Clone()
		config.ServerName = host
		secured = tls.Client(tcp, config)
		conn = secured
		if err := secured.HandshakeContext(ctx); err != nil {
			if isNetwork(err) {
				return nil, err
			}
			return nil, &backend.Error{Code: backend.Denied, Text: "no TLS session", Err: err}
		}
	}
	x := exchange{
		secret: a.secret, initiator: h.offer.initiator, target: h.offer.target, offer: h.offer.nonce,
		hello: hello{target: h.offer.target.Incarnation, grant: a.grant, index: index},
	}
	if err := x.initiate(conn); err != nil {
		return nil, err
	}
	if !stop() {
		return nil, context.Cause(ctx) // the deadline in the past stands, or is about to
	}
	return newStream(tcp, secured)
}

// hungUp tells whether the target closed the connection without a word.
func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET)
}

// isNetwork tells whether the network failed, rather than the peer refusing.
func isNetwork(err error) bool {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Op != "remote error" // a TLS alert that the peer sent
	}
	return hungUp(err) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// unreachable makes an error with a code of any that connecting can end with.
func unreachable(address string, err error) error {
	if own, ok := err.(*backend.Error); ok {
		return own
	}
	e := &backend.Error{Code: backend.PathDown, Text: "cannot connect to " + address, Err: err}
	if hungUp(err) {
		e.Text += ": the target hung up in the handshake; do both ends use credentials, or neither?"
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" {
		e.Code, e.Text = backend.Denied, "the target refused the TLS session"
	}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		e.Vendor, e.VendorText = int(errno), errno.Error()
	}
	return e
}
