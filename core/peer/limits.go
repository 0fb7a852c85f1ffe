package peer

import (
	"errors"
	"fmt"
	"time"
)

// What one call may carry. They bound the memory that a single request can claim of a node, and keep every message
// below MaxMessageBytes.
const (
	MaxKeys      = 4096    // keys or slots in one call
	MaxKeyLength = 1024    // bytes in one key
	MaxRuns      = 1 << 18 // runs in one reply
)

// Limits are what may be changed while a pool serves. They hold for what is allocated, resolved and evicted from
// then on. A field that is zero means its default.
type Limits struct {
	// SlotTTL is how long a slot waits to be committed; 30 seconds by default. It is the time that a client has to
	// move a whole batch, and how long the memory of a client that died stays taken.
	SlotTTL time.Duration
	// LeaseTTL is how long a resolved value is held for a reader that does not release it; 10 seconds by default.
	// It is the time that a client has to read a whole batch, and how long a reader that died keeps its values
	// from being evicted.
	LeaseTTL time.Duration
	// Grace is added to both before the node acts on them; 500 milliseconds by default. Clients count from before
	// their request was sent, so that it is not for clocks: it is the time that cancelling a transfer takes.
	Grace time.Duration
	// HighWatermark is the share of the pages in use at which eviction starts, 0.95 by default, and LowWatermark
	// the share at which it ends, 0.90 by default. The distance makes one pass serve many calls.
	HighWatermark, LowWatermark float64
}

// withDefaults fills in what is zero and checks the rest. The error names every fault.
func (l Limits) withDefaults() (Limits, error) {
	setDefault(&l.SlotTTL, 30*time.Second)
	setDefault(&l.LeaseTTL, 10*time.Second)
	setDefault(&l.Grace, 500*time.Millisecond)
	setDefault(&l.HighWatermark, 0.95)
	setDefault(&l.LowWatermark, min(0.90, l.HighWatermark))
	var faults []error
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"slot ttl", l.SlotTTL}, {"lease ttl", l.LeaseTTL}, {"grace", l.Grace}} {
		if d.value < 0 {
			faults = append(faults, fmt.Errorf("%s %v: it must not be negative", d.name, d.value))
		}
	}
	if !(l.LowWatermark > 0 && l.LowWatermark <= l.HighWatermark && l.HighWatermark <= 1) {
		faults = append(faults, fmt.Errorf("watermarks: low %g, high %g: they must obey 0 < low <= high <= 1",
			l.LowWatermark, l.HighWatermark))
	}
	return l, errors.Join(faults...)
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}
