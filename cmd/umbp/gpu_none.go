//go:build noxgmi

package main

import (
	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// openGPU says that this program has no GPUs.
func openGPU(config.GPU, string) (*gpuDevice, error) {
	return nil, backend.Errorf(backend.Unsupported, "this umbp was built without GPUs, with the tag noxgmi; use one that was not")
}

// gpuLimits are none without GPUs.
func gpuLimits(config.GPU) []limit { return nil }
