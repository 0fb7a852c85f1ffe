package spool

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// maxGuests bounds the connections to one process.
const maxGuests = 1024

// guest is a connection to this process.
type guest struct {
	peer    backend.Peer
	secret  []byte
	mailbox string // of the peer
	dir     string // in it, for the answers; the peer removes it when the connection ends
	fenced  bool   // guarded by spool.mu
}

// needs says which right of the remote region an operation takes.
var needs = map[backend.Op]backend.Rights{backend.Write: backend.RemoteWrite, backend.Read: backend.RemoteRead}

// Lengths of what offers and answers are made of.
const (
	idBytes     = 16
	secretBytes = 32
)

// Answer implements backend.Backend. The offer names the initiator's mailbox, the connection, and the incarnation that
// it is meant for; the answer is this mailbox and a secret.
func (b *spool) Answer(_ context.Context, peer backend.Peer, offer []byte) ([]byte, error) {
	refuse := func(code backend.Code, text string) ([]byte, error) {
		return nil, fault(code, "answer", peer, text)
	}
	incarnation := strconv.AppendUint(nil, b.self.Incarnation, 16)
	if len(offer) <= 2*idBytes {
		return refuse(backend.BadRequest, "this is not an offer of the spool backend")
	}
	if string(offer[2*idBytes:]) != string(incarnation) {
		return refuse(backend.PeerGone, "the offer is for another incarnation of "+b.self.String())
	}
	g := &guest{peer: peer, secret: make([]byte, secretBytes), mailbox: hex.EncodeToString(offer[:idBytes])}
	rand.Read(g.secret)
	connection := hex.EncodeToString(offer[idBytes:][:idBytes])
	g.dir = filepath.Join(b.dir, g.mailbox, "out", connection)
	if _, err := os.Stat(g.dir); err != nil {
		return refuse(backend.PathDown, "the peer's mailbox is not to be seen: do both hosts share "+b.dir+"?")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.closed:
		return refuse(backend.PathDown, "the backend is closed")
	case b.guests[connection] != nil:
		return refuse(backend.BadRequest, "this offer was answered already")
	case len(b.guests) == maxGuests:
		return refuse(backend.Busy, "there are too many connections")
	}
	b.guests[connection] = g
	ours, err := hex.DecodeString(b.mailbox)
	return append(ours, g.secret...), err
}

// Fence implements backend.Backend. It breaks the peer's connections, because a request that the peer has posted may
// come into the mailbox at any later time.
func (b *spool) Fence(_ context.Context, peer backend.Peer) error {
	b.mu.Lock()
	for _, g := range b.guests {
		g.fenced = g.fenced || same(g.peer, peer)
	}
	b.mu.Unlock()
	b.settle()
	return nil
}

// serve takes requests out of the mailbox until the backend is closed.
func (b *spool) serve() {
	defer close(b.served)
	looked := time.Now()
	for pause := minPause; ; pause = min(2*pause, maxPause) {
		if b.takeSome() {
			pause = minPause
		}
		if time.Since(looked) > 40*maxPause {
			b.look()
			looked = time.Now()
		}
		select {
		case <-b.quit:
			return
		case <-time.After(pause):
		}
	}
}

// look forgets the connections that have ended, and fails those whose target has closed or died.
func (b *spool) look() {
	b.mu.Lock()
	guests, endpoints := maps.Clone(b.guests), maps.Clone(b.endpoints)
	b.mu.Unlock()
	for connection, g := range guests {
		if _, err := os.Stat(g.dir); err != nil || !b.alive(g.mailbox) {
			b.mu.Lock()
			delete(b.guests, connection)
			b.mu.Unlock()
		}
	}
	for e := range endpoints {
		if !b.alive(e.mailbox) {
			b.failEndpoints("the peer has closed its mailbox, or died", func(f *endpoint) bool { return e == f })
		}
	}
}

// takeSome carries out what is in the mailbox, and tells whether there was anything.
func (b *spool) takeSome() bool {
	in, err := os.Open(b.path("in"))
	if err != nil {
		return false
	}
	defer in.Close()
	names, _ := in.Readdirnames(64)
	for _, name := range names {
		connection, _, _ := strings.Cut(name, ".")
		b.mu.Lock()
		g := b.guests[connection]
		b.mu.Unlock()
		if g != nil && os.Rename(b.path("in", name), b.path("taken")) == nil {
			b.handle(g)
		} else {
			os.RemoveAll(b.path("in", name)) // rubbish
		}
	}
	return len(names) > 0
}

// handle carries out the request that was taken, and answers it.
func (b *spool) handle(g *guest) {
	defer os.RemoveAll(b.path("taken"))
	request, err := readMessage(b.path("taken"), g.secret)
	if err != nil {
		b.log.Warn("a request was dropped that the peer cannot have written", "peer", g.peer, "error", err)
		return
	}
	answer := message{Secret: g.secret, Number: request.Number}
	if answer.data, err = b.execute(g, request); err != nil {
		answer.Code, answer.Text = backend.CodeOf(err), err.Error()
	}
	// When this fails, the peer is gone or will say that there is no answer.
	_ = answer.write(b.path("answer"), filepath.Join(g.dir, strconv.FormatUint(request.Number, 10)))
}

// execute checks all of a request before it touches memory, and returns what was read.
func (b *spool) execute(g *guest, m *message) (data []byte, err error) {
	b.copying.Lock()
	defer b.copying.Unlock()
	b.mu.Lock()
	fenced, r := g.fenced, b.regions[m.Region]
	gone := r == nil || r.gone
	b.mu.Unlock()
	switch {
	case fenced:
		return nil, backend.Errorf(backend.PathDown, "the connection was fenced")
	case m.Op == 0:
		return nil, nil
	case needs[m.Op] == 0:
		return nil, backend.Errorf(backend.Unsupported, "%v is neither write nor read", m.Op)
	case gone:
		return nil, backend.Errorf(backend.BadRequest, "there is no region %d", m.Region)
	case r.Rights&needs[m.Op] == 0:
		return nil, backend.Errorf(backend.Denied, "region %d gives no right to %v", m.Region, m.Op)
	}
	var total uint64
	for _, s := range m.Ranges {
		if total += s.Length; !within(s.Offset, s.Length, uint64(len(r.Bytes))) || total > maxBytes {
			return nil, backend.Errorf(backend.BadRequest, "range [%d, +%d) of region %d, which has %d bytes",
				s.Offset, s.Length, m.Region, len(r.Bytes))
		}
	}
	if m.Op == backend.Write && total != uint64(len(m.data)) {
		return nil, backend.Errorf(backend.BadRequest, "%d bytes have come for ranges of %d", len(m.data), total)
	}
	for _, s := range m.Ranges {
		bytes := r.Bytes[s.Offset:][:s.Length]
		if m.Op == backend.Write {
			m.data = m.data[copy(bytes, m.data):]
		} else {
			data = append(data, bytes...)
		}
	}
	return data, nil
}
