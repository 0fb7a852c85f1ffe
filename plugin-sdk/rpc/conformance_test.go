package rpc_test

import (
	"testing"

	"github.com/umbp/umbp/plugin-sdk/conformance"
	"github.com/umbp/umbp/plugin-sdk/null"
	"github.com/umbp/umbp/plugin-sdk/reference"
)

func TestConformance(t *testing.T) {
	for name, s := range map[string]setup{
		"queues":             {},
		"queues/window of 1": {raw: map[string]string{"window": "1"}},
		"stream":             {stream: true},
	} {
		t.Run(name, func(t *testing.T) {
			conformance.Run(t, conformance.Harness{Factory: over(reference.NewNetwork().Factory(), s)})
		})
	}
}

// TestConformanceInPost tries a backend that completes every transfer within Post.
func TestConformanceInPost(t *testing.T) {
	for name, s := range map[string]setup{"queues": {}, "stream": {stream: true}} {
		t.Run(name, func(t *testing.T) {
			conformance.Run(t, conformance.Harness{Factory: over(null.Factory, s), NearEndOnly: true})
		})
	}
}
