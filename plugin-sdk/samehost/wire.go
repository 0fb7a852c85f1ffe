package samehost

import (
	"encoding/binary"
	"errors"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// protocolVersion changes when two versions cannot understand each other.
const protocolVersion = 2

const (
	maxMessage = MaxNote + 512 // bytes of one message on the socket
	maxText    = 256           // bytes of the words of a refusal
	maxString  = 1 << 12       // bytes of the name of a node
)

var errParse = errors.New("malformed message")

// offer is what an initiator tells the target: who it is, and whom it means.
type offer struct {
	from, to backend.Peer
}

func (o *offer) encode() []byte {
	b := []byte{protocolVersion}
	for _, p := range [...]backend.Peer{o.from, o.to} {
		b = appendString(b, p.Node)
		b = binary.BigEndian.AppendUint64(b, p.Incarnation)
	}
	return b
}

func parseOffer(b []byte) (o offer, err error) {
	p := parser{rest: b}
	p.version()
	for _, peer := range [...]*backend.Peer{&o.from, &o.to} {
		peer.Node = p.text(maxString)
		peer.Incarnation = p.uint64()
	}
	return o, p.end()
}

// answer is what the initiator needs to connect.
type answer struct {
	instance instanceID
	grant    uint64
	secret   secret
	socket   string // path
}

func (a *answer) encode() []byte {
	b := []byte{protocolVersion}
	b = append(b, a.instance[:]...)
	b = binary.BigEndian.AppendUint64(b, a.grant)
	b = append(b, a.secret[:]...)
	return appendString(b, a.socket)
}

func parseAnswer(b []byte) (a answer, err error) {
	p := parser{rest: b}
	p.version()
	p.fill(a.instance[:])
	a.grant = p.uint64()
	p.fill(a.secret[:])
	a.socket = p.text(maxSocketPath)
	return a, p.end()
}

// kind tells the messages on the socket apart.
type kind uint8

// The messages, in the order in which a connection sees them. The end of the stream is the last: from the target
// it says "let go of my memory", from the initiator "I have", as gone does.
const (
	hello     kind = 1 + iota // initiator: version, grant, nonce
	challenge                 // target: nonce, proof
	proof                     // initiator: proof
	welcome                   // target
	borrow                    // initiator: region, key
	lent                      // target: region, rights, size, note, and a file descriptor where there is one
	refused                   // target: region (zero during the handshake), code, text
	leaving                   // initiator: it has seen the end of the target's stream
	ask                       // initiator: note, the question; one at a time
	told                      // target: code (zero when all is well), text, note (the answer)
	gone                      // initiator: it holds nothing any more; the last one
)

// message is one message on the socket, with the fields of all kinds.
type message struct {
	kind   kind
	grant  uint64
	nonce  [32]byte
	proof  [32]byte
	region backend.RegionID
	key    regionKey
	rights backend.Rights
	size   uint64 // bytes
	code   backend.Code
	text   string
	note   []byte
}

func (m *message) append(b []byte) []byte {
	b = append(b, byte(m.kind))
	switch m.kind {
	case hello:
		b = append(b, protocolVersion)
		b = binary.BigEndian.AppendUint64(b, m.grant)
		b = append(b, m.nonce[:]...)
	case challenge:
		b = append(b, m.nonce[:]...)
		b = append(b, m.proof[:]...)
	case proof:
		b = append(b, m.proof[:]...)
	case borrow:
		b = binary.BigEndian.AppendUint64(b, uint64(m.region))
		b = append(b, m.key[:]...)
	case lent:
		b = binary.BigEndian.AppendUint64(b, uint64(m.region))
		b = append(b, byte(m.rights))
		b = binary.BigEndian.AppendUint64(b, m.size)
		b = appendString(b, m.note)
	case refused:
		b = binary.BigEndian.AppendUint64(b, uint64(m.region))
		b = append(b, byte(m.code))
		b = appendString(b, m.text[:min(len(m.text), maxText)])
	case ask:
		b = appendString(b, m.note)
	case told:
		b = append(b, byte(m.code))
		b = appendString(b, m.text[:min(len(m.text), maxText)])
		b = appendString(b, m.note)
	}
	return b
}

func parseMessage(b []byte) (m message, err error) {
	p := parser{rest: b}
	m.kind = kind(p.uint8())
	switch m.kind {
	case hello:
		p.version()
		m.grant = p.uint64()
		p.fill(m.nonce[:])
	case challenge:
		p.fill(m.nonce[:])
		p.fill(m.proof[:])
	case proof:
		p.fill(m.proof[:])
	case welcome, leaving, gone:
	case borrow:
		m.region = backend.RegionID(p.uint64())
		p.fill(m.key[:])
	case lent:
		m.region = backend.RegionID(p.uint64())
		m.rights = backend.Rights(p.uint8())
		m.size = p.uint64()
		m.note = p.bytes(MaxNote)
	case refused:
		m.region = backend.RegionID(p.uint64())
		m.code = backend.Code(p.uint8())
		m.text = p.text(maxText)
	case ask:
		m.note = p.bytes(MaxNote)
	case told:
		m.code = backend.Code(p.uint8())
		m.text = p.text(maxText)
		m.note = p.bytes(MaxNote)
	default:
		p.bad = true
	}
	return m, p.end()
}

func appendString[T string | []byte](b []byte, s T) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}

// parser takes fields off a message. After the first that is missing it yields zeros, and end reports it.
type parser struct {
	rest []byte
	bad  bool
}

func (p *parser) take(n int) []byte {
	if p.bad || n > len(p.rest) {
		p.bad = true
		return nil
	}
	b := p.rest[:n]
	p.rest = p.rest[n:]
	return b
}

func (p *parser) fill(dst []byte) { copy(dst, p.take(len(dst))) }

func (p *parser) uint8() uint8 {
	var b [1]byte
	p.fill(b[:])
	return b[0]
}

func (p *parser) uint64() uint64 {
	var b [8]byte
	p.fill(b[:])
	return binary.BigEndian.Uint64(b[:])
}

func (p *parser) text(limit int) string { return string(p.bytes(limit)) }

// bytes returns a copy.
func (p *parser) bytes(limit int) []byte {
	var b [2]byte
	p.fill(b[:])
	n := int(binary.BigEndian.Uint16(b[:]))
	if n > limit {
		p.bad = true
	}
	return append([]byte(nil), p.take(n)...)
}

func (p *parser) version() {
	if p.uint8() != protocolVersion {
		p.bad = true
	}
}

func (p *parser) end() error {
	if p.bad || len(p.rest) != 0 {
		return errParse
	}
	return nil
}
