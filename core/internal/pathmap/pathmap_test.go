package pathmap

import (
	"maps"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// TestAgainstMap does at random what the users of the package do, and compares with a map of the language.
func TestAgainstMap(t *testing.T) {
	// Few different keys, so that they meet again.
	keys := rapid.Custom(func(t *rapid.T) Key {
		small := rapid.Uint64Range(0, 3)
		return Key{
			Local: backend.RegionID(small.Draw(t, "local")), Remote: backend.RegionID(small.Draw(t, "remote")),
			Peer: small.Draw(t, "peer"), Variant: small.Draw(t, "variant"),
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		m, want := &Map[int]{}, map[Key]int{}
		for step := range rapid.IntRange(0, 60).Draw(t, "steps") {
			before, old := m, maps.Collect(m.All())
			if rapid.IntRange(0, 9).Draw(t, "filter") == 0 {
				odd := func(_ Key, v int) bool { return v%2 == 1 }
				m = m.Filter(odd)
				maps.DeleteFunc(want, func(k Key, v int) bool { return !odd(k, v) })
			} else {
				k := keys.Draw(t, "key")
				m = m.With(k, step)
				want[k] = step
			}
			if diff := cmp.Diff(want, maps.Collect(m.All())); diff != "" {
				t.Fatalf("step %d: entries differ (-want +got):\n%s", step, diff)
			}
			if diff := cmp.Diff(old, maps.Collect(before.All())); diff != "" {
				t.Fatalf("step %d changed the map that it started from (-before +after):\n%s", step, diff)
			}
			if m.Len() != len(want) {
				t.Fatalf("step %d: Len = %d, want %d", step, m.Len(), len(want))
			}
			probe := keys.Draw(t, "probe")
			got, ok := m.Get(probe)
			if v, held := want[probe]; got != v || ok != held {
				t.Fatalf("step %d: Get(%+v) = %d, %t, want %d, %t", step, probe, got, ok, v, held)
			}
		}
	})
}

func TestGetAllocatesNothing(t *testing.T) {
	k := Key{Local: 1, Remote: 2, Peer: 3}
	m := (&Map[int]{}).With(k, 7)
	if n := testing.AllocsPerRun(100, func() { m.Get(k) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkGet(b *testing.B) {
	k := Key{Local: 4, Remote: 2, Peer: 0x9f3c5a7713c4d2e1, Variant: 1}
	m := &Map[int]{}
	for i := range backend.RegionID(16) {
		m = m.With(Key{Local: i, Remote: 2, Peer: k.Peer, Variant: 1}, int(i))
	}
	for b.Loop() {
		if _, ok := m.Get(k); !ok {
			b.Fatal("missing")
		}
	}
}
