package region

import (
	"context"
	"sync"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// uses counts who is using a region's memory, so that it is not unmapped under them.
type uses struct {
	mu      sync.Mutex
	open    bool
	holders int
	drained chan struct{} // made by Drained, closed when the last holder has let go
}

// Open lets the region be held. A region that is in a table but not open is being registered, or deregistered.
func (r *Region) Open() {
	r.uses.mu.Lock()
	defer r.uses.mu.Unlock()
	r.uses.open = true
}

// Hold keeps the region's memory in place until Release, and reports whether it could: false means that the region
// is not open.
func (r *Region) Hold() bool {
	r.uses.mu.Lock()
	defer r.uses.mu.Unlock()
	if r.uses.open {
		r.uses.holders++
	}
	return r.uses.open
}

// Release ends a Hold.
func (r *Region) Release() {
	r.uses.mu.Lock()
	defer r.uses.mu.Unlock()
	r.uses.holders--
	if r.uses.holders == 0 && r.uses.drained != nil {
		close(r.uses.drained)
		r.uses.drained = nil
	}
}

// Close lets nobody hold the region any more. Drained tells when the last holder has let go.
func (r *Region) Close() {
	r.uses.mu.Lock()
	defer r.uses.mu.Unlock()
	r.uses.open = false
}

// Drained waits until nobody holds the region, which must be closed. The error is Cancelled.
func (r *Region) Drained(ctx context.Context) error {
	r.uses.mu.Lock()
	if r.uses.holders == 0 {
		r.uses.mu.Unlock()
		return nil
	}
	if r.uses.drained == nil {
		r.uses.drained = make(chan struct{})
	}
	drained := r.uses.drained
	r.uses.mu.Unlock()
	select {
	case <-drained:
		return nil
	case <-ctx.Done():
		return &backend.Error{Code: backend.Cancelled, Op: "deregister", Region: r.ID,
			Text: "calls that use the memory have not ended", Err: context.Cause(ctx)}
	}
}
