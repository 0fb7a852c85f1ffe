package wire

import (
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/core/internal/wire/wirepb"
)

func TestKeysSurvive(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		keys := rapid.SliceOf(rapid.Map(rapid.SliceOf(rapid.Byte()), func(b []byte) string { return string(b) })).Draw(t, "keys")
		got, err := FromKeys(ToKeys(keys), len(keys))
		if err != nil || !slices.Equal(got, keys) {
			t.Fatalf("%q came back as %q, %v", keys, got, err)
		}
		if len(keys) > 0 {
			if got, err := FromKeys(ToKeys(keys), len(keys)-1); err == nil {
				t.Fatalf("%d keys came through a limit of one less", len(got))
			}
		}
	})
}

// What a server gets is untrusted: it is refused in words, or taken as it stands.
func FuzzKeys(f *testing.F) {
	f.Add([]byte("abc"), []byte{1, 2})
	f.Add([]byte("abc"), []byte{1, 3})
	f.Add([]byte("abc"), []byte{255})
	f.Add([]byte{}, []byte{0, 0})
	f.Fuzz(func(t *testing.T, text, lengths []byte) {
		p := &wirepb.Keys{Text: text}
		for _, l := range lengths {
			p.Lengths = append(p.Lengths, uint32(l)|uint32(l>>7)<<31)
		}
		keys, err := FromKeys(p, 1<<20)
		if err == nil && (len(keys) != len(lengths) || strings.Join(keys, "") != string(text)) {
			t.Errorf("%q with lengths %v came as %q", text, p.Lengths, keys)
		}
	})
}
