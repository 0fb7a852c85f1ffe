package xgmi

import (
	"encoding/binary"
	"errors"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// noteVersion is the first byte of a note, a question and an answer. A peer that speaks another one is refused.
const noteVersion = 1

var errNote = errors.New("what the peer says is malformed, or of another version of this backend")

// encoder appends numbers and short strings.
type encoder []byte

func newEncoder(kind byte) encoder { return encoder{noteVersion, kind} }

func (e *encoder) number(n uint64) { *e = binary.LittleEndian.AppendUint64(*e, n) }

// text appends a string of at most 255 bytes.
func (e *encoder) text(s string) { *e = append(append(*e, byte(len(s))), s...) }

// decoder reads what an encoder wrote. Once something is missing, it reads zeros, and end says so.
type decoder struct {
	rest []byte
	bad  bool
}

// newDecoder begins with a note of the kind given.
func newDecoder(note []byte, kind byte) *decoder {
	if len(note) < 2 || note[0] != noteVersion || note[1] != kind {
		return &decoder{bad: true}
	}
	return &decoder{rest: note[2:]}
}

func (d *decoder) take(n int) []byte {
	if d.bad = d.bad || n > len(d.rest); d.bad {
		return make([]byte, n)
	}
	b := d.rest[:n]
	d.rest = d.rest[n:]
	return b
}

func (d *decoder) number() uint64 { return binary.LittleEndian.Uint64(d.take(8)) }

func (d *decoder) text() string { return string(d.take(int(d.take(1)[0]))) }

func (d *decoder) end() error {
	if d.bad || len(d.rest) > 0 {
		return errNote
	}
	return nil
}

// The kinds of notes.
const (
	hostNote = 'h' // where in its file a region of host memory begins
	gpuNote  = 'g' // a GPURange, but for the address and the size
)

func encodeHost(fileOffset uint64) []byte {
	e := newEncoder(hostNote)
	e.number(fileOffset)
	return e
}

func parseHost(note []byte) (fileOffset uint64, err error) {
	d := newDecoder(note, hostNote)
	fileOffset = d.number()
	return fileOffset, d.end()
}

func encodeGPU(g *backend.GPURange) []byte {
	e := newEncoder(gpuNote)
	e.text(g.Runtime)
	e.text(g.Device)
	e.number(g.Allocation)
	e.number(g.Offset)
	e.text(string(g.Handle))
	return e
}

func parseGPU(note []byte, size uint64) (*backend.GPURange, error) {
	d := newDecoder(note, gpuNote)
	g := &backend.GPURange{
		Runtime: d.text(), Device: d.text(), Allocation: d.number(), Offset: d.number(), Handle: []byte(d.text()), Size: size,
	}
	return g, d.end()
}

// The kinds of questions and answers of a self-test. All are about the scratch that the target has at a place for the
// guest that asks.
const (
	fillQuestion  = 'f' // place, seed: fill it with a pattern
	checkQuestion = 'c' // place, seed: compare it with a pattern
	fillAnswer    = 'F' // id and key of its region
	checkAnswer   = 'C' // whether a byte is wrong, where, what it is, and what it should be
)

func encodeQuestion(kind byte, place string, seed uint64) []byte {
	e := newEncoder(kind)
	e.text(place)
	e.number(seed)
	return e
}

func parseQuestion(note []byte) (kind byte, place string, seed uint64, err error) {
	if len(note) < 2 || note[1] != fillQuestion && note[1] != checkQuestion {
		return 0, "", 0, errNote
	}
	d := newDecoder(note, note[1])
	place, seed = d.text(), d.number()
	return note[1], place, seed, d.end()
}

func encodeFilled(id backend.RegionID, key []byte) []byte {
	e := newEncoder(fillAnswer)
	e.number(uint64(id))
	e.text(string(key))
	return e
}

func parseFilled(note []byte) (id backend.RegionID, key []byte, err error) {
	d := newDecoder(note, fillAnswer)
	id, key = backend.RegionID(d.number()), []byte(d.text())
	return id, key, d.end()
}

func encodeChecked(wrong *wrongByte) []byte {
	e := newEncoder(checkAnswer)
	if wrong != nil {
		e.number(wrong.offset)
		e.text(string([]byte{wrong.got, wrong.want}))
	}
	return e
}

func parseChecked(note []byte) (*wrongByte, error) {
	d := newDecoder(note, checkAnswer)
	if !d.bad && len(d.rest) == 0 {
		return nil, nil
	}
	w := &wrongByte{offset: d.number()}
	values := d.text()
	if err := d.end(); err != nil || len(values) != 2 {
		return nil, errNote
	}
	w.got, w.want = values[0], values[1]
	return w, nil
}
