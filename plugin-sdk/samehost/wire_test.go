package samehost

import (
	"bytes"
	"reflect"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// everyMessage has one of each kind.
func everyMessage() []message {
	var nonce, mac [32]byte
	fill(nonce[:], 1)
	fill(mac[:], 2)
	return []message{
		{kind: hello, grant: 1 << 40, nonce: nonce},
		{kind: challenge, nonce: nonce, proof: mac},
		{kind: proof, proof: mac},
		{kind: welcome},
		{kind: borrow, region: 1 << 50, key: regionKey(nonce[:16])},
		{kind: lent, region: 3, rights: all, size: 1 << 40, note: []byte{1, 2}},
		{kind: refused, region: 3, code: backend.Denied, text: "no"},
		{kind: leaving},
		{kind: ask, note: []byte("question")},
		{kind: told, note: []byte("answer")},
		{kind: told, code: backend.Busy, text: "later"},
		{kind: gone},
	}
}

func TestMessages(t *testing.T) {
	for _, m := range everyMessage() {
		b := m.append(nil)
		got, err := parseMessage(b)
		must(t, err)
		if !reflect.DeepEqual(got, m) {
			t.Errorf("kind %d: got %+v, want %+v", m.kind, got, m)
		}
		if _, err := parseMessage(append(b, 0)); err == nil {
			t.Errorf("kind %d: a byte too many is accepted", m.kind)
		}
		if _, err := parseMessage(b[:len(b)-1]); err == nil {
			t.Errorf("kind %d: a byte too few is accepted", m.kind)
		}
	}
	for _, k := range []kind{lent, refused, ask, told} {
		long := message{kind: k, text: string(make([]byte, 2*maxText)), note: make([]byte, MaxNote)}
		if n := len(long.append(nil)); n > maxMessage {
			t.Errorf("kind %d: a long one takes %d bytes", k, n)
		}
		if _, err := parseMessage(long.append(nil)); err != nil {
			t.Errorf("kind %d: a long one is refused", k)
		}
		long.note = make([]byte, MaxNote+1)
		if _, err := parseMessage(long.append(nil)); k != refused && err == nil {
			t.Errorf("kind %d: a note beyond the limit is accepted", k)
		}
	}
}

// FuzzParse feeds all parsers: what they accept, they write back as it was.
func FuzzParse(f *testing.F) {
	for _, m := range everyMessage() {
		f.Add(m.append(nil))
	}
	f.Add((&offer{from: peer("a", 1), to: peer("b", 2)}).encode())
	f.Add((&answer{grant: 7, socket: "/run/x.sock"}).encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		check := func(what string, err error, again func() []byte) {
			if err == nil && !bytes.Equal(again(), b) {
				t.Errorf("%s: %x is written back as %x", what, b, again())
			}
		}
		m, err := parseMessage(b)
		check("message", err, func() []byte { return m.append(nil) })
		o, err := parseOffer(b)
		check("offer", err, o.encode)
		a, err := parseAnswer(b)
		check("answer", err, a.encode)
		if len(a.socket) > maxSocketPath {
			t.Errorf("a socket path of %d bytes", len(a.socket))
		}
	})
}
