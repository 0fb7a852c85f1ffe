//go:build !cgo

package verbs

import "github.com/umbp/umbp/plugins/rdma/device"

// Library returns a library that has no devices, and says why.
func Library() device.Library { return stub{} }

type stub struct{}

func missing() error {
	return &device.Missing{
		What:   "this program was built without cgo, and " + soname + " cannot be reached from it",
		Remedy: "build it with CGO_ENABLED=1, gcc, and the header of libibverbs (Debian package libibverbs-dev)",
	}
}

func (stub) Name() string                       { return soname }
func (stub) Simulated() bool                    { return false }
func (stub) Devices() ([]string, error)         { return nil, missing() }
func (stub) Open(string) (device.Device, error) { return nil, missing() }
func (stub) Fork() device.Fork                  { return device.ForkDisabled }
func (stub) Calls() uint64                      { return 0 }

func (stub) NewChain(wrs, sges int) *device.Chain {
	c := &device.Chain{WRs: make([]device.WR, 0, wrs), SGEs: make([]device.SGE, 0, sges)}
	c.Close = func() { c.WRs, c.SGEs = nil, nil }
	return c
}
