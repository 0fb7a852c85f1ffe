package tcp

import (
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/inuse"
)

// region is one registered region. Its memory may be touched only between users.Enter and users.Leave.
type region struct {
	id     backend.RegionID
	rights backend.Rights
	size   uint64
	bytes  []byte // nil once the region is deregistered, so that nothing points to memory that gets unmapped
	users  inuse.Gate
}

// forget drops a region that nobody uses any more. Only the first call for it has an effect.
func (t *transport) forget(r *region) {
	if t.regions.Remove(r.id, r) {
		r.bytes = nil
	}
}
