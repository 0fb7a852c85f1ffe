package region

import "slices"

// keySet is an ordered set of numbers: a B+ tree. Every operation takes O(log n), most of it within few cache
// lines, and allocates only when the set grows beyond the largest that it has been.
type keySet struct {
	root *keyNode
	size int
	// Nodes that merges have freed, by kind.
	spareLeaves, spareInner []*keyNode
}

const (
	maxKeys = 32          // in a node
	minKeys = maxKeys / 4 // in a node other than the root
)

// keyNode is a leaf, which holds keys of the set, or an inner node: there keys[i] is a lower bound of the keys
// under kids[i], and greater than all keys under kids[i-1]. keys[0] of the leftmost nodes bounds nothing.
type keyNode struct {
	n    int
	keys [maxKeys]uint64
	kids *[maxKeys]*keyNode // nil in a leaf
}

func newKeySet() keySet { return keySet{root: &keyNode{}} }

// kid returns the index of the subtree that k belongs to.
func (n *keyNode) kid(k uint64) int {
	i, found := slices.BinarySearch(n.keys[1:n.n], k)
	if found {
		i++
	}
	return i
}

// atLeast returns the smallest key that is not below k.
func (s *keySet) atLeast(k uint64) (key uint64, ok bool) {
	n := s.root
	var next *keyNode // the subtree with the smallest of the keys that are greater than all under n
	for n.kids != nil {
		i := n.kid(k)
		if i+1 < n.n {
			next = n.kids[i+1]
		}
		n = n.kids[i]
	}
	if i, _ := slices.BinarySearch(n.keys[:n.n], k); i < n.n {
		return n.keys[i], true
	}
	if next == nil {
		return 0, false
	}
	for next.kids != nil {
		next = next.kids[0]
	}
	return next.keys[0], true
}

// below returns the greatest key that is less than k.
func (s *keySet) below(k uint64) (key uint64, ok bool) {
	n := s.root
	var last *keyNode // the subtree with the greatest of the keys that are less than all under n
	for n.kids != nil {
		i := n.kid(k)
		if i > 0 {
			last = n.kids[i-1]
		}
		n = n.kids[i]
	}
	if i, _ := slices.BinarySearch(n.keys[:n.n], k); i > 0 {
		return n.keys[i-1], true
	}
	if last == nil {
		return 0, false
	}
	for last.kids != nil {
		last = last.kids[last.n-1]
	}
	return last.keys[last.n-1], true
}

// insert adds a key that is not in the set. Full nodes are split on the way down, so that there is room for what
// comes up.
func (s *keySet) insert(k uint64) {
	if s.root.n == maxKeys {
		root := s.newNode(false)
		root.n, root.kids[0] = 1, s.root
		s.root = root
		s.split(root, 0)
	}
	n := s.root
	for n.kids != nil {
		i := n.kid(k)
		if n.kids[i].n == maxKeys {
			s.split(n, i)
			if k >= n.keys[i+1] {
				i++
			}
		}
		n = n.kids[i]
	}
	i, _ := slices.BinarySearch(n.keys[:n.n], k)
	n.open(i, 1)
	n.keys[i] = k
	s.size++
}

// remove takes a key that is in the set out of it.
func (s *keySet) remove(k uint64) {
	s.removeUnder(s.root, k)
	s.size--
	if root := s.root; root.kids != nil && root.n == 1 {
		s.root = root.kids[0]
		s.spare(root)
	}
}

func (s *keySet) removeUnder(n *keyNode, k uint64) {
	if n.kids == nil {
		i, _ := slices.BinarySearch(n.keys[:n.n], k)
		n.cut(i, 1)
		return
	}
	i := n.kid(k)
	s.removeUnder(n.kids[i], k)
	if n.kids[i].n < minKeys {
		s.refill(n, max(i-1, 0))
	}
}

// split moves the upper half of n's full kid i to a new kid i+1. There is room for it in n.
func (s *keySet) split(n *keyNode, i int) {
	left := n.kids[i]
	right := s.newNode(left.kids == nil)
	right.open(0, maxKeys/2)
	right.copyFrom(0, left, maxKeys/2, maxKeys/2)
	left.cut(maxKeys/2, maxKeys/2)

	n.open(i+1, 1)
	n.keys[i+1], n.kids[i+1] = right.keys[0], right
}

// refill joins kids i and i+1 of n where one node can hold them, and shares their keys evenly otherwise.
func (s *keySet) refill(n *keyNode, i int) {
	left, right := n.kids[i], n.kids[i+1]
	if left.n+right.n <= maxKeys {
		left.open(left.n, right.n)
		left.copyFrom(left.n-right.n, right, 0, right.n)
		n.cut(i+1, 1)
		s.spare(right)
		return
	}
	if left.n < right.n {
		move := (right.n - left.n) / 2
		left.open(left.n, move)
		left.copyFrom(left.n-move, right, 0, move)
		right.cut(0, move)
	} else {
		move := (left.n - right.n) / 2
		right.open(0, move)
		right.copyFrom(0, left, left.n-move, move)
		left.cut(left.n-move, move)
	}
	n.keys[i+1] = right.keys[0]
}

// open makes room for count entries at index i.
func (n *keyNode) open(i, count int) {
	copy(n.keys[i+count:], n.keys[i:n.n])
	if n.kids != nil {
		copy(n.kids[i+count:], n.kids[i:n.n])
	}
	n.n += count
}

// cut takes out count entries at index i.
func (n *keyNode) cut(i, count int) {
	copy(n.keys[i:], n.keys[i+count:n.n])
	if n.kids != nil {
		copy(n.kids[i:], n.kids[i+count:n.n])
	}
	n.n -= count
}

// copyFrom overwrites count entries at index i by those of from at index j.
func (n *keyNode) copyFrom(i int, from *keyNode, j, count int) {
	copy(n.keys[i:i+count], from.keys[j:])
	if n.kids != nil {
		copy(n.kids[i:i+count], from.kids[j:])
	}
}

// newNode returns an empty node.
func (s *keySet) newNode(leaf bool) *keyNode {
	spares := &s.spareInner
	if leaf {
		spares = &s.spareLeaves
	}
	if last := len(*spares) - 1; last >= 0 {
		n := (*spares)[last]
		*spares = (*spares)[:last]
		return n
	}
	if leaf {
		return &keyNode{}
	}
	return &keyNode{kids: new([maxKeys]*keyNode)}
}

// spare keeps a node that is out of the tree for newNode.
func (s *keySet) spare(n *keyNode) {
	n.n = 0
	if n.kids == nil {
		s.spareLeaves = append(s.spareLeaves, n)
	} else {
		s.spareInner = append(s.spareInner, n)
	}
}
