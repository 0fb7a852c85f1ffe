package xgmi

import (
	"bytes"
	"reflect"
	"testing"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/samehost"
)

func TestNotesSurvive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := &backend.GPURange{
			Runtime:    rapid.StringN(0, 8, 16).Draw(t, "runtime"),
			Device:     rapid.StringN(0, 16, backend.MaxPlace).Draw(t, "device"),
			Allocation: rapid.Uint64().Draw(t, "allocation"), Offset: rapid.Uint64().Draw(t, "offset"),
			Handle: rapid.SliceOfN(rapid.Byte(), 0, 255).Draw(t, "handle"), Size: rapid.Uint64().Draw(t, "size"),
		}
		note := encodeGPU(g)
		got, err := parseGPU(note, g.Size)
		if err != nil || !reflect.DeepEqual(got, g) || len(note) > samehost.MaxNote {
			t.Fatalf("%d bytes: got %+v, %v; want %+v", len(note), got, err, g)
		}
		seed := rapid.Uint64().Draw(t, "seed")
		for _, kind := range []byte{fillQuestion, checkQuestion} {
			k, place, s, err := parseQuestion(encodeQuestion(kind, g.Device, seed))
			if k != kind || place != g.Device || s != seed || err != nil {
				t.Fatalf("got %c %q %d, %v", k, place, s, err)
			}
		}
		id, key, err := parseFilled(encodeFilled(backend.RegionID(seed), g.Handle))
		if id != backend.RegionID(seed) || !bytes.Equal(key, g.Handle) || err != nil {
			t.Fatalf("got %d %x, %v", id, key, err)
		}
		offset, err := parseHost(encodeHost(seed))
		if offset != seed || err != nil {
			t.Fatalf("got %d, %v", offset, err)
		}
		for _, want := range []*wrongByte{nil, {offset: seed, got: byte(seed), want: 7}} {
			w, err := parseChecked(encodeChecked(want))
			if !reflect.DeepEqual(w, want) || err != nil {
				t.Fatalf("got %+v, %v; want %+v", w, err, want)
			}
		}
	})
}

// FuzzNotes parses what a peer may send. What is taken is what was encoded.
func FuzzNotes(f *testing.F) {
	g := &backend.GPURange{Runtime: "hip", Device: "0000:c1:00.0", Allocation: 1 << 20, Offset: 4096, Handle: make([]byte, 64)}
	for _, seed := range [][]byte{
		nil, {noteVersion}, encodeGPU(g), encodeHost(1), encodeQuestion(fillQuestion, "", 1), encodeQuestion(checkQuestion, "x", 2),
		encodeFilled(1<<63, make([]byte, 16)), encodeChecked(nil), encodeChecked(&wrongByte{1, 2, 3}),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, note []byte) {
		same := func(again []byte) {
			if !bytes.Equal(again, note) {
				t.Errorf("%x was read as %x", note, again)
			}
		}
		if g, err := parseGPU(note, 1); err == nil {
			same(encodeGPU(g))
		}
		if offset, err := parseHost(note); err == nil {
			same(encodeHost(offset))
		}
		if kind, place, seed, err := parseQuestion(note); err == nil {
			same(encodeQuestion(kind, place, seed))
		}
		if id, key, err := parseFilled(note); err == nil {
			same(encodeFilled(id, key))
		}
		if w, err := parseChecked(note); err == nil {
			same(encodeChecked(w))
		}
	})
}
