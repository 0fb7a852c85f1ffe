package core

import (
	"time"

	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// KnownNodes returns how many incarnations of nodes the client knows.
func (c *PoolClient) KnownNodes() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.nodes)
}

// FailPath makes the selector believe that a backend cannot connect to a peer.
func (e *Engine) FailPath(b int, p backend.Peer, err error) {
	e.selector.PathFailed(b, p, err, time.Now())
}

// TellKey does what a backend does whose process has been started anew: it tells the key that a region has now.
func (e *Engine) TellKey(backendName string, id backend.RegionID, key []byte) {
	specs := e.withKeys([]host.Spec{{Factory: backend.Factory{Name: backendName}}})
	specs[0].KeysChanged(id, key)
}
