package rdma

import (
	"maps"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/conformance"
	"github.com/umbp/umbp/plugins/rdma/verbstest"
)

// TestConformance runs the suite over simulated devices. Both ends are on one network, and use the same devices.
func TestConformance(t *testing.T) {
	for _, c := range []struct {
		name    string
		devices int
		options map[string]string
	}{
		{"default", 1, nil},
		{"tiny", 1, tiny},
		{"one of each", 1, map[string]string{
			"send_queue": "16", "signal_every": "1", "sges": "1", "window": "1", "queue_pairs": "1", "look": "0s",
		}},
		{"three devices", 3, tiny},
		{"no grace", 2, map[string]string{"cancel_grace": "0s", "stripe": "4KiB"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := verbstest.New(verbstest.Config{Devices: make([]verbstest.DeviceConfig, c.devices)})
			conformance.Run(t, conformance.Harness{Factory: Factory(f), Options: maps.Clone(c.options)})
			if left := f.Objects(); left != (verbstest.Objects{}) {
				t.Errorf("after everything was closed there are %+v", left)
			}
		})
	}
}
