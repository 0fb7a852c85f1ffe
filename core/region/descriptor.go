package region

import "github.com/umbp/umbp/plugin-sdk/backend"

// Descriptor is what a peer needs to reach a region of this process. It carries no address: peers name bytes by
// their offset in the region.
type Descriptor struct {
	Peer   backend.Peer
	ID     backend.RegionID
	Kind   backend.MemoryKind
	Rights backend.Rights
	Size   uint64 // bytes
	Place  string // PCI address of the GPU whose memory it is; empty for host memory
	// Keys holds the opaque key of each backend that the region is registered with, by backend name.
	Keys map[string][]byte
}

// Remote returns the descriptor as one backend sees it, and whether the region is registered with that backend.
func (d *Descriptor) Remote(backendName string) (backend.Remote, bool) {
	key, ok := d.Keys[backendName]
	return backend.Remote{
		Peer: d.Peer, Region: d.ID, Kind: d.Kind, Rights: d.Rights, Size: d.Size, Place: d.Place, Key: key,
	}, ok
}
