//go:build !noxgmi

package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/gpu"
	"github.com/umbp/umbp/plugins/xgmi"
)

// Unless the tag noxgmi leaves GPUs out, the backend for them is linked in. The program then needs the system's dynamic
// linker, also when it is built without cgo.
func init() { factories = append(factories, xgmi.Factory) }

// openGPU opens a runtime and finds a device of it: by number, by PCI address, or the first where it is named by nothing.
func openGPU(c config.GPU, device string) (*gpuDevice, error) {
	o := gpu.Options{Library: c.Library}
	switch c.Runtime {
	case "", "auto":
	case "hip", "cuda":
		o.Runtime = c.Runtime
	default: // from a command that reads no configuration, where it would have been checked
		return nil, &usageError{fmt.Errorf("--gpu.runtime %q is not one of auto, hip, cuda", c.Runtime)}
	}
	rt, err := gpu.Open(o)
	if err != nil {
		return nil, &backend.Error{Code: backend.Unsupported, Op: "open a GPU", Err: err}
	}
	text := fmt.Sprintf("%s %s", rt.Name(), rt.Version())
	if rt.Simulated() {
		text += ", simulated"
	}
	var known []string
	for _, d := range rt.Devices() {
		if device == "" || d.IsCalled(device) {
			return &gpuDevice{gpuRuntime: rt, number: d.Number, pci: d.PCI, name: d.Name + ", " + text}, nil
		}
		known = append(known, fmt.Sprintf("%d (%s, %s)", d.Number, d.PCI, d.Name))
	}
	err = &usageError{fmt.Errorf("there is no GPU %q; %s, from %s, has %s", device, text, rt.Library(), strings.Join(known, ", "))}
	return nil, errors.Join(err, rt.Close())
}
