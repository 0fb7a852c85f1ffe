package tcp

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// The first bytes of each message say which it is, and in which version.
const (
	offerMagic  = "UMBPtco1"
	answerMagic = "UMBPtca1"
	helloMagic  = "UMBPtch1"
)

const (
	secretSize = 32
	nonceSize  = 32
	proofSize  = sha256.Size

	maxName        = 255  // bytes of a node's name or of an address
	maxConnections = 64   // of one endpoint
	maxMessage     = 8192 // bytes of an offer or an answer
)

type (
	grantID [16]byte
	nonce   [nonceSize]byte
	proof   [proofSize]byte
)

// fillRandom fills b with random bytes.
func fillRandom(b []byte) {
	rand.Read(b) // never fails: it ends the process instead
}

// offer is what the initiator sends to the target over the control plane.
type offer struct {
	initiator, target backend.Peer
	connections       int
	nonce             nonce
}

// answer is what the target sends back.
type answer struct {
	target    backend.Peer
	grant     grantID
	secret    [secretSize]byte
	addresses []string
}

func (o *offer) encode() []byte {
	b := []byte(offerMagic)
	b = appendPeer(b, o.initiator)
	b = appendPeer(b, o.target)
	b = append(b, byte(o.connections))
	return append(b, o.nonce[:]...)
}

func parseOffer(b []byte) (offer, error) {
	var o offer
	d := decoder{rest: b, bad: len(b) > maxMessage}
	d.expect(offerMagic)
	o.initiator = d.peer()
	o.target = d.peer()
	o.connections = int(d.byte())
	copy(o.nonce[:], d.take(nonceSize))
	if !d.complete() || o.connections == 0 || o.connections > maxConnections {
		return offer{}, backend.Errorf(backend.BadRequest, "the offer of %d bytes is malformed, or of another version of this backend", len(b))
	}
	return o, nil
}

func (a *answer) encode() []byte {
	b := []byte(answerMagic)
	b = appendPeer(b, a.target)
	b = append(b, a.grant[:]...)
	b = append(b, a.secret[:]...)
	b = append(b, byte(len(a.addresses)))
	for _, address := range a.addresses {
		b = appendString(b, address)
	}
	return b
}

func parseAnswer(b []byte) (answer, error) {
	var a answer
	d := decoder{rest: b, bad: len(b) > maxMessage}
	d.expect(answerMagic)
	a.target = d.peer()
	copy(a.grant[:], d.take(len(a.grant)))
	copy(a.secret[:], d.take(secretSize))
	for range d.byte() {
		a.addresses = append(a.addresses, d.string())
	}
	if !d.complete() || len(a.addresses) == 0 || len(a.addresses) > maxAddresses {
		return answer{}, backend.Errorf(backend.BadRequest, "the answer of %d bytes is malformed, or of another version of this backend", len(b))
	}
	return a, nil
}

func appendString(b []byte, s string) []byte { return append(append(b, byte(len(s))), s...) }

func appendPeer(b []byte, p backend.Peer) []byte {
	return appendString(binary.LittleEndian.AppendUint64(b, p.Incarnation), p.Node)
}

// decoder reads untrusted bytes. Once they fall short or are wrong it is bad, and returns zeros.
type decoder struct {
	rest []byte
	bad  bool
}

func (d *decoder) take(n int) []byte {
	if d.bad = d.bad || len(d.rest) < n; d.bad {
		return make([]byte, n)
	}
	b := d.rest[:n]
	d.rest = d.rest[n:]
	return b
}

func (d *decoder) byte() byte     { return d.take(1)[0] }
func (d *decoder) string() string { return string(d.take(int(d.byte()))) }

func (d *decoder) peer() backend.Peer {
	incarnation := binary.LittleEndian.Uint64(d.take(8))
	return backend.Peer{Node: d.string(), Incarnation: incarnation}
}

func (d *decoder) expect(s string) { d.bad = string(d.take(len(s))) != s || d.bad }

// complete tells whether everything was read, and nothing was wrong.
func (d *decoder) complete() bool { return !d.bad && len(d.rest) == 0 }

// hello is the first message on a connection.
type hello struct {
	target uint64 // incarnation that the initiator means
	grant  grantID
	index  uint16 // of the connection in its endpoint
	nonce  nonce
}

const helloSize = len(helloMagic) + 8 + 16 + 2 + nonceSize

func (h *hello) encode() []byte {
	b := binary.LittleEndian.AppendUint64([]byte(helloMagic), h.target)
	b = append(b, h.grant[:]...)
	b = binary.LittleEndian.AppendUint16(b, h.index)
	return append(b, h.nonce[:]...)
}

func readHello(r io.Reader) (hello, error) {
	var b [helloSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return hello{}, err
	}
	var h hello
	d := decoder{rest: b[:]}
	d.expect(helloMagic)
	h.target = binary.LittleEndian.Uint64(d.take(8))
	copy(h.grant[:], d.take(len(h.grant)))
	h.index = binary.LittleEndian.Uint16(d.take(2))
	copy(h.nonce[:], d.take(nonceSize))
	if d.bad {
		return hello{}, errors.New("what came is no hello of this protocol")
	}
	return h, nil
}

// The roles keep a proof of one end from being played back as the other's.
const (
	targetRole    = "umbp tcp v1 target"
	initiatorRole = "umbp tcp v1 initiator"
)

// exchange is all that both ends of one connection have to agree on.
type exchange struct {
	secret            [secretSize]byte
	initiator, target backend.Peer
	offer             nonce
	hello             hello
	challenge         nonce  // the target's
	session           []byte // keying material of the TLS session; empty without TLS
}

func (x *exchange) prove(role string) proof {
	b := appendString(nil, role)
	b = appendPeer(b, x.initiator)
	b = appendPeer(b, x.target)
	b = append(b, x.offer[:]...)
	b = append(b, x.hello.encode()...)
	b = append(b, x.challenge[:]...)
	b = append(b, x.session...)
	mac := hmac.New(sha256.New, x.secret[:])
	mac.Write(b)
	return proof(mac.Sum(nil))
}

func (x *exchange) proves(role string, p []byte) bool {
	expected := x.prove(role)
	return hmac.Equal(expected[:], p)
}

// bind ties the exchange to the TLS session, so that nobody can sit in the middle of two of them.
func (x *exchange) bind(conn net.Conn) error {
	secured, ok := conn.(*tls.Conn)
	if !ok {
		return nil
	}
	state := secured.ConnectionState()
	var err error
	x.session, err = state.ExportKeyingMaterial("EXPERIMENTAL umbp tcp", nil, 32)
	return err
}

// initiate is the initiator's half of the exchange; it fills in the nonce of the hello.
func (x *exchange) initiate(conn net.Conn) error {
	fillRandom(x.hello.nonce[:])
	if err := x.bind(conn); err != nil {
		return err
	}
	if _, err := conn.Write(x.hello.encode()); err != nil {
		return err
	}
	var challenge [1 + nonceSize + proofSize]byte
	if _, err := io.ReadFull(conn, challenge[:]); err != nil {
		return err
	}
	if err := refusedBy(challenge[0]); err != nil {
		return err
	}
	copy(x.challenge[:], challenge[1:])
	if !x.proves(targetRole, challenge[1+nonceSize:]) {
		return backend.Errorf(backend.Denied, "the target does not know the secret of its answer")
	}
	p := x.prove(initiatorRole)
	if _, err := conn.Write(p[:]); err != nil {
		return err
	}
	var verdict [1]byte
	if _, err := io.ReadFull(conn, verdict[:]); err != nil {
		return err
	}
	return refusedBy(verdict[0])
}

// respond is the target's half, after the hello. The verdict is left to the caller.
func (x *exchange) respond(conn net.Conn) error {
	fillRandom(x.challenge[:])
	if err := x.bind(conn); err != nil {
		return err
	}
	p := x.prove(targetRole)
	challenge := append([]byte{0}, x.challenge[:]...)
	if _, err := conn.Write(append(challenge, p[:]...)); err != nil {
		return err
	}
	var theirs proof
	if _, err := io.ReadFull(conn, theirs[:]); err != nil {
		return err
	}
	if !x.proves(initiatorRole, theirs[:]) {
		return backend.Errorf(backend.Denied, "the initiator does not know the secret that it was granted")
	}
	return nil
}

// refuseHello tells the initiator why there will be no challenge.
func refuseHello(conn net.Conn, code backend.Code) {
	// The connection ends either way; an initiator that the reason does not reach sees that.
	_, _ = conn.Write(append([]byte{byte(code)}, make([]byte, nonceSize+proofSize)...))
}

// refusedBy turns a status byte of the target into an error.
func refusedBy(status byte) error {
	switch code := backend.Code(status); code {
	case 0:
		return nil
	case backend.PeerGone:
		return backend.Errorf(code, "another incarnation answers at this address")
	case backend.Denied:
		return backend.Errorf(code, "the target refused the connection: the grant is unknown, used or expired, or the secret is wrong")
	case backend.Busy:
		return backend.Errorf(code, "the target serves as many connections as it may")
	default:
		return protocolError("a handshake has the status %d", status)
	}
}
