package shm

import (
	"crypto/sha256"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

// child is a target in another process.
type child struct{ backendtest.Child }

type regionArgs = backendtest.RegionArgs

func startChild(t testing.TB, self backend.Peer) *backendtest.Process {
	t.Helper()
	return backendtest.StartChild(t, self, map[string]string{"socket_dir": socketDir(t)})
}

// Fill gives a region new contents.
func (c *child) Fill(a regionArgs, _ *struct{}) error {
	fill(c.Memory(a.ID), a.Seed)
	return nil
}

// Sum returns the checksum of a region.
func (c *child) Sum(id backend.RegionID, sum *[sha256.Size]byte) error {
	*sum = sha256.Sum256(c.Memory(id))
	return nil
}
