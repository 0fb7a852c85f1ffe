package tcp

import (
	"encoding/binary"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

const (
	requestMagic = 0x51524d55 // "UMRQ"
	replyMagic   = 0x50524d55 // "UMRP"

	requestSize = 40 // bytes of a request's header
	spanSize    = 16 // bytes of an entry of its table
	replySize   = 24 // bytes of a reply's header

	// A flush goes there and back: the target asks with the status, the initiator answers with the operation.
	opFlush     backend.Op   = 4
	statusFlush backend.Code = 0xff

	maxSegments = 16384   // in one transfer: a table of 256 KiB, for 64 MiB of 4 KiB pages
	maxTransfer = 1 << 30 // bytes in one transfer
	maxRefusal  = 512     // bytes of a refusal's text
)

// span is one contiguous range of a region.
type span struct{ offset, length uint64 }

// inside tells whether the span is not empty and lies in a region of the given size. No sum can overflow.
func (s span) inside(size uint64) bool {
	return s.length != 0 && s.length <= size && s.offset <= size-s.length
}

type request struct {
	op     backend.Op
	id     uint64
	region backend.RegionID
	count  uint32 // entries of the table
	total  uint64 // bytes
}

func appendRequest(b []byte, r request) []byte {
	b = binary.LittleEndian.AppendUint32(b, requestMagic)
	b = append(b, byte(r.op), 0, 0, 0)
	b = binary.LittleEndian.AppendUint64(b, r.id)
	b = binary.LittleEndian.AppendUint64(b, uint64(r.region))
	b = binary.LittleEndian.AppendUint32(b, r.count)
	b = append(b, 0, 0, 0, 0)
	return binary.LittleEndian.AppendUint64(b, r.total)
}

// parseRequest reads the header in b[:requestSize]. What it returns is within the limits of the protocol; whether
// it is allowed is another question.
func parseRequest(b []byte) (request, error) {
	r := request{
		op:     backend.Op(b[4]),
		id:     binary.LittleEndian.Uint64(b[8:]),
		region: backend.RegionID(binary.LittleEndian.Uint64(b[16:])),
		count:  binary.LittleEndian.Uint32(b[24:]),
		total:  binary.LittleEndian.Uint64(b[32:]),
	}
	switch {
	case binary.LittleEndian.Uint32(b) != requestMagic:
		return request{}, protocolError("a request begins with %x", b[:4])
	case b[5]|b[6]|b[7]|b[28]|b[29]|b[30]|b[31] != 0:
		return request{}, protocolError("a reserved byte of a request is not zero")
	case r.op == opFlush && (r.region != 0 || r.count != 0 || r.total != 0):
		return request{}, protocolError("a flush names something to move")
	case r.op == opFlush:
		return r, nil
	case r.op != backend.Write && r.op != backend.Read:
		return request{}, protocolError("a request has the unknown operation %d", b[4])
	case r.count == 0 || r.count > maxSegments:
		return request{}, protocolError("a request has %d segments, not 1 to %d", r.count, maxSegments)
	case r.total == 0 || r.total > maxTransfer:
		return request{}, protocolError("a request moves %d bytes, not 1 to %d", r.total, maxTransfer)
	}
	return r, nil
}

func appendSpan(b []byte, s span) []byte {
	b = binary.LittleEndian.AppendUint64(b, s.offset)
	return binary.LittleEndian.AppendUint64(b, s.length)
}

func parseSpan(b []byte) span {
	return span{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}
}

type reply struct {
	code  backend.Code // zero when the request was carried out; statusFlush when this answers none
	id    uint64       // of the request, or the flush
	bytes uint64       // that follow
}

func appendReply(b []byte, r reply) []byte {
	b = binary.LittleEndian.AppendUint32(b, replyMagic)
	b = append(b, byte(r.code), 0, 0, 0)
	b = binary.LittleEndian.AppendUint64(b, r.id)
	return binary.LittleEndian.AppendUint64(b, r.bytes)
}

// parseReply reads the header in b[:replySize].
func parseReply(b []byte) (reply, error) {
	r := reply{
		code:  backend.Code(b[4]),
		id:    binary.LittleEndian.Uint64(b[8:]),
		bytes: binary.LittleEndian.Uint64(b[16:]),
	}
	switch {
	case binary.LittleEndian.Uint32(b) != replyMagic:
		return reply{}, protocolError("a reply begins with %x", b[:4])
	case b[5]|b[6]|b[7] != 0:
		return reply{}, protocolError("a reserved byte of a reply is not zero")
	}
	switch r.code {
	case 0:
	case statusFlush:
		if r.bytes != 0 {
			return reply{}, protocolError("the wish for a flush has %d bytes", r.bytes)
		}
	case backend.BadRequest, backend.Denied:
		if r.bytes > maxRefusal {
			return reply{}, protocolError("the text of a refusal has %d bytes, more than %d", r.bytes, maxRefusal)
		}
	default:
		return reply{}, protocolError("a reply has the status %d", b[4])
	}
	return r, nil
}

// protocolError says that the peer sent what this protocol does not allow.
func protocolError(format string, args ...any) error {
	e := backend.Errorf(backend.Internal, format, args...)
	e.Text = "the peer broke the protocol: " + e.Text
	return e
}

// cursor walks over the bytes of a frame: first a head, then spans of a region's memory.
type cursor struct {
	head  []byte
	mem   []byte
	spans []span
	skip  uint64 // bytes of spans[0] that are through
	left  uint64 // bytes to go
}

func newCursor(head, mem []byte, spans []span, total uint64) cursor {
	return cursor{head: head, mem: mem, spans: spans, left: uint64(len(head)) + total}
}

// piece returns the next contiguous bytes. There are some while left is not zero.
func (c *cursor) piece() []byte {
	if len(c.head) > 0 {
		return c.head
	}
	s := c.spans[0]
	return c.mem[s.offset+c.skip : s.offset+s.length]
}

// advance marks the next n bytes as through.
func (c *cursor) advance(n uint64) {
	c.left -= n
	k := min(n, uint64(len(c.head)))
	c.head = c.head[k:]
	for n -= k; n > 0; {
		rest := c.spans[0].length - c.skip
		if n < rest {
			c.skip += n
			return
		}
		n -= rest
		c.spans, c.skip = c.spans[1:], 0
	}
}
