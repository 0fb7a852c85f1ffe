package shm

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Limits of a record.
const (
	MaxSegments = 16384    // segments of a Post, and outcomes of a Completion
	MaxError    = 32 << 10 // bytes of Completion.Error
)

// Kind says what a record is.
type Kind uint8

// The kinds of records.
const (
	PostRecord       Kind = 1
	CancelRecord     Kind = 2
	CompletionRecord Kind = 3
)

// Post starts a transfer on a session. Host to plugin.
type Post struct {
	Session, Cookie uint64
	Op              backend.Op
	Segments        []backend.Segment
}

// Cancel asks that a transfer end soon. Host to plugin.
type Cancel struct {
	Session, Cookie uint64
}

// Completion answers a Post. Plugin to host.
type Completion struct {
	Session, Cookie uint64
	// Error is empty when every segment is done. Otherwise it is an encoded umbp.backend.v1.Error: errors take the
	// same form here as in calls.
	Error []byte
	// Outcomes comes with an error: what became of the first segments. Those without one are in doubt.
	Outcomes []backend.Outcome
}

// Every record begins with a head: kind u8, detail u8, zero u16, count u32, session u64, cookie u64.
const (
	headSize    = 24
	segmentSize = 24
)

type head struct {
	kind            Kind
	detail          uint8
	count           uint32
	session, cookie uint64
}

func (h head) append(b []byte) []byte {
	b = append(b, byte(h.kind), h.detail, 0, 0)
	b = binary.LittleEndian.AppendUint32(b, h.count)
	b = binary.LittleEndian.AppendUint64(b, h.session)
	return binary.LittleEndian.AppendUint64(b, h.cookie)
}

func parseHead(record []byte, kind Kind) (h head, rest []byte, err error) {
	if KindOf(record) != kind || record[2] != 0 || record[3] != 0 {
		return head{}, nil, badRecord(record)
	}
	return head{
		kind:    kind,
		detail:  record[1],
		count:   binary.LittleEndian.Uint32(record[4:]),
		session: binary.LittleEndian.Uint64(record[8:]),
		cookie:  binary.LittleEndian.Uint64(record[16:]),
	}, record[headSize:], nil
}

func badRecord(record []byte) error {
	return fmt.Errorf("malformed record of %d bytes that begins with % x", len(record), record[:min(len(record), headSize)])
}

// KindOf returns the kind of a record, zero when it is none that is known. Only its parser says whether it is sound.
func KindOf(record []byte) Kind {
	if len(record) < headSize || record[0] > byte(CompletionRecord) {
		return 0
	}
	return Kind(record[0])
}

// AppendPost appends the record to b. There are at most MaxSegments segments, and at least one.
func AppendPost(b []byte, p *Post) []byte {
	b = slices.Grow(b, headSize+segmentSize*len(p.Segments))
	b = head{PostRecord, uint8(p.Op), uint32(len(p.Segments)), p.Session, p.Cookie}.append(b)
	at := len(b)
	b = b[:at+segmentSize*len(p.Segments)]
	rest := b[at:]
	for i := range p.Segments {
		s, to := &p.Segments[i], rest[:segmentSize]
		binary.LittleEndian.PutUint64(to[0:], s.Local)
		binary.LittleEndian.PutUint64(to[8:], s.Remote)
		binary.LittleEndian.PutUint64(to[16:], s.Length)
		rest = rest[segmentSize:]
	}
	return b
}

// ParsePost reads what AppendPost wrote. The segments are put into room, or into a new slice where it is too small.
// What they say is not checked.
func ParsePost(record []byte, room []backend.Segment) (Post, error) {
	h, rest, err := parseHead(record, PostRecord)
	op := backend.Op(h.detail)
	if err != nil || op != backend.Write && op != backend.Read || h.count == 0 || h.count > MaxSegments ||
		len(rest) != segmentSize*int(h.count) {
		return Post{}, badRecord(record)
	}
	if cap(room) < int(h.count) {
		room = make([]backend.Segment, h.count)
	}
	p := Post{Session: h.session, Cookie: h.cookie, Op: op, Segments: room[:h.count]}
	for i := range p.Segments {
		from := rest[:segmentSize]
		p.Segments[i] = backend.Segment{
			Local:  binary.LittleEndian.Uint64(from[0:]),
			Remote: binary.LittleEndian.Uint64(from[8:]),
			Length: binary.LittleEndian.Uint64(from[16:]),
		}
		rest = rest[segmentSize:]
	}
	return p, nil
}

// AppendCancel appends the record to b.
func AppendCancel(b []byte, c Cancel) []byte {
	return head{kind: CancelRecord, session: c.Session, cookie: c.Cookie}.append(b)
}

// ParseCancel reads what AppendCancel wrote.
func ParseCancel(record []byte) (Cancel, error) {
	h, rest, err := parseHead(record, CancelRecord)
	if err != nil || h.detail != 0 || h.count != 0 || len(rest) != 0 {
		return Cancel{}, badRecord(record)
	}
	return Cancel{Session: h.session, Cookie: h.cookie}, nil
}

// AppendCompletion appends the record to b. Error has at most MaxError bytes, and there are at most MaxSegments
// outcomes, none without an error.
func AppendCompletion(b []byte, c *Completion) []byte {
	b = head{kind: CompletionRecord, count: uint32(len(c.Outcomes)), session: c.Session, cookie: c.Cookie}.append(b)
	for _, o := range c.Outcomes {
		b = append(b, byte(o))
	}
	return append(b, c.Error...)
}

// ParseCompletion reads what AppendCompletion wrote. The error is a part of record: it is to be decoded before the
// record is overwritten.
func ParseCompletion(record []byte) (Completion, error) {
	h, rest, err := parseHead(record, CompletionRecord)
	if err != nil || h.detail != 0 || h.count > MaxSegments || len(rest) < int(h.count) ||
		len(rest)-int(h.count) > MaxError || len(rest) > 0 && len(rest) == int(h.count) {
		return Completion{}, badRecord(record)
	}
	c := Completion{Session: h.session, Cookie: h.cookie}
	if len(rest) == 0 {
		return c, nil
	}
	c.Error = rest[h.count:]
	c.Outcomes = make([]backend.Outcome, h.count)
	for i, o := range rest[:h.count] {
		if backend.Outcome(o) > backend.InDoubt {
			return Completion{}, badRecord(record)
		}
		c.Outcomes[i] = backend.Outcome(o)
	}
	return c, nil
}
