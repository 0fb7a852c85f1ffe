package region

import (
	"container/list"
	"context"
	"fmt"
	"math"
	"sync"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// maxStagingWaiters is how many callers may wait for staging memory before the next one is told Busy.
const maxStagingWaiters = 1024

// Staging lends pieces of a region to values whose own memory lies in none. It counts offsets only: the memory
// behind them is the owner's. Callers that wait are served in the order in which they came, so that a large
// piece is not starved by small ones. It is safe for concurrent use, and has no goroutine of its own.
type Staging struct {
	unit, size uint64

	mu      sync.Mutex
	pages   *Pages    // of unit bytes each
	scratch []Run     // for Pages.Alloc
	waiters list.List // of *waiter, the first to come in front
}

// waiter is a caller of Acquire in the queue.
type waiter struct {
	n      uint64
	offset uint64        // written before ready is closed
	served chan struct{} // closed when the memory is the waiter's, and it has left the queue
}

// NewStaging returns the staging of size bytes, all of them free. Memory is lent in whole units; what is left of
// size behind the last whole unit is not used. It panics when unit is zero, or when there are more units than 32
// bits can count.
func NewStaging(size, unit uint64) *Staging {
	if unit == 0 || size/unit > math.MaxUint32 {
		panic(fmt.Sprintf("region: staging of %d bytes in units of %d: the units must be counted by 32 bits", size, unit))
	}
	units := size / unit
	return &Staging{unit: unit, size: units * unit, pages: NewPages(int(units))}
}

// TryAcquire takes n contiguous bytes if they are free and no one waits for memory. The offset is a multiple of
// the unit. It never succeeds for no bytes, nor for more than there are.
func (s *Staging) TryAcquire(n uint64) (offset uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n == 0 || n > s.size || s.waiters.Len() > 0 {
		return 0, false
	}
	return s.take(n)
}

// Acquire takes n contiguous bytes, and waits for them where they are not free. The offset is a multiple of the
// unit. The error is BadRequest when n is zero or more than there is, Busy when too many wait already, and
// Cancelled when the context ends first; nothing is held then.
func (s *Staging) Acquire(ctx context.Context, n uint64) (offset uint64, err error) {
	if n == 0 || n > s.size {
		return 0, &backend.Error{Code: backend.BadRequest, Op: "stage", Text: fmt.Sprintf(
			"%v cannot be staged in a staging memory of %v: register the memory that the value lies in, "+
				"or raise client.staging_size", backend.Size(n), backend.Size(s.size))}
	}
	if ctx.Err() != nil {
		return 0, s.cancelled(ctx, n)
	}

	s.mu.Lock()
	if s.waiters.Len() == 0 {
		if offset, ok := s.take(n); ok {
			s.mu.Unlock()
			return offset, nil
		}
	}
	if s.waiters.Len() >= maxStagingWaiters {
		s.mu.Unlock()
		return 0, &backend.Error{Code: backend.Busy, Op: "stage", Text: fmt.Sprintf(
			"%d callers wait for staging memory already: raise client.staging_size, or register the memory that "+
				"the values lie in", maxStagingWaiters)}
	}
	w := &waiter{n: n, served: make(chan struct{})}
	place := s.waiters.PushBack(w)
	s.mu.Unlock()

	select {
	case <-w.served:
		return w.offset, nil
	case <-ctx.Done():
		s.leave(w, place)
		return 0, s.cancelled(ctx, n)
	}
}

// leave takes a waiter that gives up out of the queue. If it was served at the same moment, its memory goes to
// those behind it; if it was not, they may need less than it did.
func (s *Staging) leave(w *waiter, place *list.Element) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-w.served:
		s.pages.Free(s.run(w.offset, w.n))
	default:
		s.waiters.Remove(place)
	}
	s.serve()
}

// Release gives back n bytes at offset, as they were acquired. It panics when they are not in use.
func (s *Staging) Release(offset, n uint64) {
	if n == 0 || n > s.size || offset > s.size-n || offset%s.unit != 0 {
		panic(fmt.Sprintf("region: release of staging range [%d, +%d): not one that was acquired", offset, n))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pages.Free(s.run(offset, n))
	s.serve()
}

// Size returns the bytes that can be lent.
func (s *Staging) Size() uint64 { return s.size }

// InUse returns the bytes that are lent, in whole units.
func (s *Staging) InUse() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.size - uint64(s.pages.FreePages())*s.unit
}

// serve gives memory to those who wait, as far as it goes in their order. The lock is held.
func (s *Staging) serve() {
	for place := s.waiters.Front(); place != nil; place = s.waiters.Front() {
		w := place.Value.(*waiter)
		offset, ok := s.take(w.n)
		if !ok {
			return
		}
		s.waiters.Remove(place)
		w.offset = offset
		close(w.served)
	}
}

// take takes n bytes if some free run is long enough. The lock is held.
func (s *Staging) take(n uint64) (offset uint64, ok bool) {
	units := int(s.run(0, n).Count)
	if units > s.pages.LargestRun() {
		return 0, false
	}
	s.scratch, _ = s.pages.Alloc(units, s.scratch[:0]) // one run, since one is long enough
	return uint64(s.scratch[0].First) * s.unit, true
}

// run returns the units that a range fills.
func (s *Staging) run(offset, n uint64) Run {
	return Run{First: uint32(offset / s.unit), Count: uint32((n + s.unit - 1) / s.unit)}
}

func (s *Staging) cancelled(ctx context.Context, n uint64) error {
	return &backend.Error{Code: backend.Cancelled, Op: "stage", Err: context.Cause(ctx), Text: fmt.Sprintf(
		"no room for %v in staging memory in time (%v of %v in use): raise client.staging_size or the deadline",
		backend.Size(n), backend.Size(s.InUse()), backend.Size(s.size))}
}
