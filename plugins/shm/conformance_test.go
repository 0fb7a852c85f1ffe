package shm

import (
	"testing"

	"github.com/umbp/umbp/plugin-sdk/conformance"
)

// TestConformance tries both ways in which transfers are copied.
func TestConformance(t *testing.T) {
	for name, inline := range map[string]string{"by workers": "0", "inline": "1MiB"} {
		t.Run(name, func(t *testing.T) {
			conformance.Run(t, conformance.Harness{
				Factory: Factory,
				Options: map[string]string{"socket_dir": socketDir(t), "inline_bytes": inline, "window": "64"},
			})
		})
	}
}
