package xgmi

import (
	"context"
	"strings"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
)

func TestExamine(t *testing.T) {
	for _, c := range []struct {
		name    string
		machine gpusim.Machine
		option  string
		fault   func(s *gpusim.Sim) gpusim.Fault
		want    []string // state, subject and parts of the text, separated by |
	}{
		{"all is well", gpusim.Machine{}, "", nil, []string{
			"fine|runtime|hip 7.1|libamdhip64.so.7|with batches|simulated",
			"fine|device 0000:c1:00.0|number 0, Simulated GPU 0, 16GiB",
			"fine|device 0000:c2:00.0|number 1, Simulated GPU 1, 16GiB",
			"fine|links of 0000:c1:00.0|self-test passed: 0000:c1:00.0 to host memory (GPU and host memory), host memory to 0000:c1:00.0|0000:c1:00.0 to 0000:c1:00.0 (same GPU), 0000:c1:00.0 to 0000:c2:00.0 (XGMI, 1 hop)",
			"fine|links of 0000:c2:00.0",
		}},
		{"one device, without batches", gpusim.Machine{Version: 60342131}, "devices=1", nil, []string{
			"fine|runtime|hip 6.3|without batches",
			"fine|device 0000:c1:00.0|not used (option devices)",
			"fine|device 0000:c2:00.0",
			"fine|links of 0000:c2:00.0",
		}},
		{"no link", gpusim.Machine{Runtime: "cuda", Links: []gpusim.Link{{From: 0, To: 1, PCIe: true}}}, "", nil, []string{
			"fine|runtime|cuda 12.8", "fine|device 0000:c1:00.0", "fine|device 0000:c2:00.0",
			"fine|links of 0000:c1:00.0|0000:c2:00.0 (PCIe)",
			"fine|links of 0000:c2:00.0",
			"warning|link 0000:c2:00.0 to 0000:c1:00.0|no access",
		}},
		{"a pair that corrupts", gpusim.Machine{Devices: make([]gpusim.Device, 1)}, "",
			func(s *gpusim.Sim) gpusim.Fault {
				return gpusim.Fault{Effect: gpusim.Corrupt, From: gpusim.Host, To: s.Devices[0].PCI}
			}, []string{
				"fine|runtime", "fine|device",
				"fine|links of 0000:c1:00.0|self-test passed: 0000:c1:00.0 to 0000:c1:00.0 (same GPU)",
				"problem|link 0000:c1:00.0 to host memory|what was read is wrong: byte ",
				"problem|link host memory to 0000:c1:00.0|what was written is wrong: byte ",
			}},
		{"no device", gpusim.Machine{Devices: []gpusim.Device{}}, "", nil, []string{"problem|runtime|no device"}},
		{"no such device", gpusim.Machine{}, "devices=9", nil, []string{"problem|runtime|there is no GPU 9"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := &world{t: t, sim: gpusim.New(t, c.machine), runtime: c.machine.Runtime}
			if w.runtime == "" {
				w.runtime = "auto"
			}
			if c.fault != nil {
				w.sim.SetFaults(c.fault(w.sim))
			}
			var options []string
			if c.option != "" {
				options = append(options, c.option)
			}
			values, err := backend.CheckOptions(Factory.Options, w.options(options...))
			must(t, err)
			found := Factory.Examine(context.Background(), values)
			for i, f := range found {
				line := f.State.String() + "|" + f.Subject + "|" + f.Text + "|" + f.Remedy
				if f.State != backend.Fine && f.Remedy == "" && c.option == "" {
					t.Errorf("no remedy: %s", line)
				}
				if i >= len(c.want) {
					t.Errorf("more than expected: %s", line)
					continue
				}
				for part := range strings.SplitSeq(c.want[i], "|") {
					if !strings.Contains(line, part) {
						t.Errorf("finding %d is %s, want %s", i, line, c.want[i])
					}
				}
			}
			if len(found) < len(c.want) {
				t.Errorf("%d findings, want %d", len(found), len(c.want))
			}
			if left := w.sim.Counts().Left(); left != (gpusim.Counts{}) {
				t.Errorf("left in the runtime: %+v", left)
			}
		})
	}
}

// TestExamineWithoutRuntime has no library at all.
func TestExamineWithoutRuntime(t *testing.T) {
	values, err := backend.CheckOptions(Factory.Options, map[string]string{"library": "/nowhere/libamdhip64.so.6", "runtime": "hip"})
	must(t, err)
	found := Factory.Examine(context.Background(), values)
	if len(found) != 1 || found[0].State != backend.Problem || !strings.Contains(found[0].Text, "/nowhere/libamdhip64.so.6") || found[0].Remedy == "" {
		t.Errorf("found %+v", found)
	}
}
