package plan

import (
	"cmp"
	"math/bits"
	"slices"
)

// place is where something lies, as far as sorting is concerned.
type place struct {
	region, offset uint64
}

// sorter sorts places, by region and then by offset, and keeps its memory from one call to the next.
//
// Comparing places costs a mispredicted branch at nearly every step. So a place and its index are squeezed into
// one word (regions are numbered densely, and offsets are multiples of a page, which leaves few bits that differ)
// and the words are sorted digit by digit, without comparing.
type sorter struct {
	words, spare []uint64
	order        []uint32
}

const (
	digitBits = 8
	// fewPlaces is where counting digits starts to beat comparing.
	fewPlaces = 48
)

// sort returns the indexes of the places in sorted order; equal places keep theirs. The result is valid until the
// next call.
func (s *sorter) sort(places []place) []uint32 {
	var regions, offsets uint64
	for _, p := range places {
		regions |= p.region
		offsets |= p.offset
	}
	// The low bits that are zero in every offset do not matter.
	shift := min(bits.TrailingZeros64(offsets), bits.Len64(offsets))
	offsetBits := bits.Len64(offsets) - shift
	indexBits := bits.Len(uint(len(places)))
	keyBits := bits.Len64(regions) + offsetBits

	s.order = slices.Grow(s.order[:0], len(places))[:len(places)]
	if len(places) < fewPlaces || keyBits+indexBits > 64 {
		for i := range s.order {
			s.order[i] = uint32(i)
		}
		slices.SortFunc(s.order, func(a, b uint32) int {
			return cmp.Or(
				cmp.Compare(places[a].region, places[b].region),
				cmp.Compare(places[a].offset, places[b].offset),
				cmp.Compare(a, b))
		})
		return s.order
	}

	s.words = slices.Grow(s.words[:0], len(places))[:len(places)]
	s.spare = slices.Grow(s.spare[:0], len(places))[:len(places)]
	for i, p := range places {
		s.words[i] = (p.region<<offsetBits|p.offset>>shift)<<indexBits | uint64(i)
	}
	for bit := indexBits; bit < indexBits+keyBits; bit += digitBits {
		s.sortDigit(bit)
	}
	for i, w := range s.words {
		s.order[i] = uint32(w & (1<<indexBits - 1))
	}
	return s.order
}

// sortDigit sorts the words by the digit that begins at bit; words with the same digit keep their order.
func (s *sorter) sortDigit(bit int) {
	var next [1 << digitBits]uint32 // first how many words have a digit, then where the next one of them goes
	for _, w := range s.words {
		next[w>>bit%(1<<digitBits)]++
	}
	sum := uint32(0)
	for digit, count := range next {
		next[digit] = sum
		sum += count
	}
	for _, w := range s.words {
		at := &next[w>>bit%(1<<digitBits)]
		s.spare[*at] = w
		*at++
	}
	s.words, s.spare = s.spare, s.words
}
