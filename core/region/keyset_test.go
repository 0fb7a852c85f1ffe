package region

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// TestKeySetAgainstSlice grows and shrinks a set through several levels of the tree, and compares it with a
// sorted slice at every step.
func TestKeySetAgainstSlice(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	set, want := newKeySet(), []uint64{}
	insert := func() {
		k := random.Uint64N(1 << 14)
		if i, found := slices.BinarySearch(want, k); !found {
			want = slices.Insert(want, i, k)
			set.insert(k)
		}
	}
	remove := func(i int) {
		set.remove(want[i])
		want = slices.Delete(want, i, i+1)
	}
	step := func() {
		k := random.Uint64N(1 << 14)
		i, _ := slices.BinarySearch(want, k)
		if got, ok := set.atLeast(k); ok != (i < len(want)) || ok && got != want[i] {
			t.Fatalf("atLeast(%d) = %d, %v", k, got, ok)
		}
		if got, ok := set.below(k); ok != (i > 0) || ok && got != want[i-1] {
			t.Fatalf("below(%d) = %d, %v", k, got, ok)
		}
		if set.size != len(want) {
			t.Fatalf("size is %d, want %d", set.size, len(want))
		}
	}
	for range 3 {
		for len(want) < 6_000 {
			insert()
			step()
		}
		checkKeySet(t, &set, want)
		for range 6_000 { // mixed, so that nodes both split and join
			if random.IntN(2) == 0 {
				insert()
			} else {
				remove(random.IntN(len(want)))
			}
			step()
		}
		checkKeySet(t, &set, want)
		for len(want) > 1_500 {
			remove(0) // from one end: nodes empty and are refilled from one side
			step()
		}
		checkKeySet(t, &set, want)
		for len(want) > 0 {
			remove(random.IntN(len(want)))
			step()
		}
		checkKeySet(t, &set, want)
	}
}

// checkKeySet walks the tree: it holds the keys in order, its leaves lie at one depth, and no node is sparse.
func checkKeySet(t *testing.T, s *keySet, want []uint64) {
	t.Helper()
	var keys []uint64
	depthOfLeaves := -1
	var walk func(n *keyNode, depth int)
	walk = func(n *keyNode, depth int) {
		if n != s.root && n.n < minKeys {
			t.Fatalf("a node at depth %d has %d entries", depth, n.n)
		}
		if n.kids == nil {
			if depthOfLeaves >= 0 && depth != depthOfLeaves {
				t.Fatalf("leaves lie at depths %d and %d", depthOfLeaves, depth)
			}
			depthOfLeaves = depth
			keys = append(keys, n.keys[:n.n]...)
			return
		}
		for i, kid := range n.kids[:n.n] {
			if i > 0 && len(keys) > 0 && keys[len(keys)-1] >= n.keys[i] {
				t.Fatalf("key %d lies before its bound %d", keys[len(keys)-1], n.keys[i])
			}
			before := len(keys)
			walk(kid, depth+1)
			if i > 0 && keys[before] < n.keys[i] {
				t.Fatalf("key %d lies after its bound %d", keys[before], n.keys[i])
			}
		}
	}
	walk(s.root, 0)
	if !slices.Equal(keys, want) {
		t.Fatalf("the tree holds %d keys, not the %d wanted", len(keys), len(want))
	}
}
