package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// xgmiName is the backend for GPU memory, linked in or not.
const xgmiName = "xgmi"

// place is where a command allocates memory. The zero value is the host's.
type place struct {
	gpu    bool
	device string // of a GPU, as openGPU takes it
}

// placeHelp ends the help of a flag that parsePlace reads.
const placeHelp = "host, gpu, or gpu:N for one by its number or PCI address"

// parsePlace reads a place as people write it.
func parsePlace(text string) (place, error) {
	kind, device, named := strings.Cut(text, ":")
	switch {
	case text == "host":
		return place{}, nil
	case kind == "gpu" && named == (device != ""):
		return place{gpu: true, device: device}, nil
	}
	return place{}, fmt.Errorf("%q is no place for memory: write host, gpu, or gpu:N, where N is a number or a PCI address, as in gpu:0000:c1:00.0", text)
}

func (p place) String() string {
	switch {
	case !p.gpu:
		return "host"
	case p.device == "":
		return "gpu"
	}
	return "gpu:" + p.device
}

// poolPlace is where the configuration wants the pool.
func poolPlace(c *config.Config) place {
	if c.Pool.Memory != "gpu" {
		return place{}
	}
	return place{gpu: true, device: c.Pool.Device}
}

// open opens the device of a place that is a GPU's, and returns nil for the host.
func (p place) open(c config.GPU) (*gpuDevice, error) {
	if !p.gpu {
		return nil, nil
	}
	return openGPU(c, p.device)
}

// find returns the PCI address of the GPU that a place is on, or nothing for the host.
func (p place) find(c config.GPU) (pci string, err error) {
	device, err := p.open(c)
	if err != nil || device == nil {
		return "", err
	}
	return device.pci, device.Close()
}

// needsGPUBackend says what to do about an error of registering a GPU's memory, where no backend takes it.
func needsGPUBackend(err error) error {
	if errors.Is(err, backend.ErrUnsupported) {
		return fmt.Errorf("%w\nmemory of a GPU needs a backend for it, such as xgmi, in backends and in a rule of selection", err)
	}
	return err
}

// simulatedDevices tells whether a backend that has moved bytes for the engine works by simulated devices.
func simulatedDevices(engine *core.Engine) bool {
	return slices.ContainsFunc(engine.BackendStates(), func(b core.BackendState) bool {
		return b.Info != nil && b.Info.Capabilities.Simulated && engine.Counters(b.Name).Transfers.Load() > 0
	})
}

// gpuRuntime is what a *gpu.Runtime does here. Umbp without GPUs has none.
type gpuRuntime interface {
	Alloc(device int, size uint64) (address uint64, err error)
	Free(device int, address uint64) error
	Describe(address, size uint64) (backend.GPURange, error)
	Load(device int, to []byte, address uint64) error
	Store(device int, address uint64, from []byte) error
	Close() error
}

// gpuDevice is a GPU, and the runtime that allocates on it.
type gpuDevice struct {
	gpuRuntime
	number int
	pci    string
	name   string // for people, with the runtime
}

func (d *gpuDevice) String() string { return fmt.Sprintf("GPU %s (%s)", d.pci, d.name) }

// alloc allocates memory on the device, until free is called.
func (d *gpuDevice) alloc(size uint64) (r backend.GPURange, free func() error, err error) {
	address, err := d.Alloc(d.number, size)
	if err != nil {
		return r, nil, fmt.Errorf("allocate %s on %s: %w", humanSize(size), d, err)
	}
	free = func() error { return d.Free(d.number, address) }
	if r, err = d.Describe(address, size); err != nil {
		return r, nil, fmt.Errorf("describe %s on %s: %w", humanSize(size), d, errors.Join(err, free()))
	}
	return r, free, nil
}
