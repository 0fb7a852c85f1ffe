// Package pathmap maps pairs of regions to what is known about the way between them.
//
// The dispatcher asks for every transfer which way was chosen and which session leads there, so a look-up takes no
// lock and costs a few nanoseconds. Maps are immutable; a change makes a new one, which happens when a pair of
// regions meets for the first time, or a connection fails.
package pathmap

import (
	"iter"
	"math/bits"
	"math/rand/v2"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Key names a way between two regions.
type Key struct {
	Local, Remote backend.RegionID
	Peer          uint64 // incarnation of the remote region's process: random, and so as good as its whole name
	Variant       uint64 // tells several ways between the same regions apart
}

// seed makes it hard for peers, who choose the ids of their regions, to make keys collide.
var seed = [...]uint64{rand.Uint64() | 1, rand.Uint64() | 1, rand.Uint64() | 1, rand.Uint64() | 1}

func (k *Key) hash() uint64 {
	hi, lo := bits.Mul64(uint64(k.Local)^seed[0], uint64(k.Remote)^seed[1])
	hi2, lo2 := bits.Mul64(k.Peer^seed[2], k.Variant^seed[3])
	return hi ^ lo ^ hi2 ^ lo2
}

// Map is an immutable map. The zero value is empty.
type Map[V any] struct {
	slots []slot[V] // a power of two of them, half of them free at least; probed one after the other
	len   int
}

type slot[V any] struct {
	used  bool
	key   Key
	value V
}

// Len returns the number of entries.
func (m *Map[V]) Len() int { return m.len }

// Get returns the value of a key.
func (m *Map[V]) Get(k Key) (value V, ok bool) {
	if m.len == 0 {
		return value, false
	}
	mask := uint64(len(m.slots) - 1)
	for i := k.hash() & mask; m.slots[i].used; i = (i + 1) & mask {
		if m.slots[i].key == k {
			return m.slots[i].value, true
		}
	}
	return value, false
}

// All returns the entries, in no order.
func (m *Map[V]) All() iter.Seq2[Key, V] {
	return func(yield func(Key, V) bool) {
		for i := range m.slots {
			if s := &m.slots[i]; s.used && !yield(s.key, s.value) {
				return
			}
		}
	}
}

// With returns a map that has the entry too, in the place of one with the same key.
func (m *Map[V]) With(k Key, v V) *Map[V] {
	return build(m.len+1, func(yield func(Key, V) bool) {
		for key, value := range m.All() {
			if key != k {
				yield(key, value)
			}
		}
		yield(k, v)
	})
}

// Filter returns a map of the entries that keep says true of.
func (m *Map[V]) Filter(keep func(Key, V) bool) *Map[V] {
	return build(m.len, func(yield func(Key, V) bool) {
		for key, value := range m.All() {
			if keep(key, value) {
				yield(key, value)
			}
		}
	})
}

// build makes a map of at most n entries whose keys are distinct.
func build[V any](n int, entries iter.Seq2[Key, V]) *Map[V] {
	m := &Map[V]{slots: make([]slot[V], 2<<bits.Len(uint(n)))}
	mask := uint64(len(m.slots) - 1)
	for k, v := range entries {
		i := k.hash() & mask
		for m.slots[i].used {
			i = (i + 1) & mask
		}
		m.slots[i] = slot[V]{true, k, v}
		m.len++
	}
	return m
}
