package xgmi_test

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/conformance"
	"github.com/umbp/umbp/plugin-sdk/gpu"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
	"github.com/umbp/umbp/plugins/xgmi"

	// What is built here comes from the cache of the go command, and so would the result of the tests, if it did not know
	// what they depend on.
	_ "github.com/umbp/umbp/plugin-sdk/serve"
)

// way is a pair of places, as umbp conformance calls them.
type way struct{ near, far string }

func (w way) String() string { return w.near + " to " + w.far }

// everyWay lists the ways on a machine with two GPUs.
var everyWay = []way{
	{"gpu:0", "gpu:0"}, {"gpu:0", "gpu:1"}, {"host", "gpu:0"}, {"gpu:0", "host"},
}

// lender returns what lends memory at a place.
func lender(rt *gpu.Runtime, place string) func(size int) (conformance.Memory, error) {
	switch place {
	case "gpu:0":
		return conformance.GPUMemory(rt, 0)
	case "gpu:1":
		return conformance.GPUMemory(rt, 1)
	}
	return conformance.SealedMemory
}

// open opens a runtime until the test ends.
func open(t *testing.T, o gpu.Options) *gpu.Runtime {
	t.Helper()
	rt, err := gpu.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rt.Close(); err != nil {
			t.Errorf("close the runtime: %v", err)
		}
	})
	return rt
}

// sockets returns a directory with a short name: the addresses of sockets are bounded.
func sockets(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "umbp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestConformance tries the backend linked in, on simulated GPUs, over every pair of places.
func TestConformance(t *testing.T) {
	tiny := map[string]string{"streams": "1", "part_bytes": "64KiB", "window": "2", "batch": "off"}
	for _, c := range []struct {
		name    string
		machine gpusim.Machine
		options map[string]string
		ways    []way
	}{
		{"hip", gpusim.Machine{Runtime: "hip"}, nil, everyWay},
		{"hip 5.2, slow", gpusim.Machine{Runtime: "hip", Version: 50221151, Rate: 8 << 30}, tiny, everyWay[1:2]},
		{"cuda", gpusim.Machine{Runtime: "cuda"}, nil, everyWay[1:3]},
	} {
		t.Run(c.name, func(t *testing.T) {
			sim := gpusim.New(t, c.machine)
			rt := open(t, gpu.Options{Runtime: c.machine.Runtime, Library: sim.Library})
			options := map[string]string{"library": sim.Library, "socket_dir": sockets(t)}
			maps.Copy(options, c.options)
			for _, w := range c.ways {
				t.Run(w.String(), func(t *testing.T) {
					conformance.Run(t, conformance.Harness{
						Factory: xgmi.Factory, Options: options,
						NewMemory: lender(rt, w.near), NewFarMemory: lender(rt, w.far),
					})
					if left := sim.Counts().Left(); left != (gpusim.Counts{}) {
						t.Errorf("after everything was closed there are %+v", left)
					}
				})
			}
		})
	}
}

// TestConformanceAsProcess tries umbp-plugin-xgmi, as it is shipped: the memory is umbp's, and each end imports it.
func TestConformanceAsProcess(t *testing.T) {
	if testing.Short() {
		t.Skip("it builds programs")
	}
	bin := programs(t)
	for _, c := range []struct {
		machine gpusim.Machine
		ways    []way
	}{
		{gpusim.Machine{Runtime: "hip"}, everyWay[1:3]},
		{gpusim.Machine{Runtime: "cuda"}, everyWay[1:2]},
	} {
		t.Run(c.machine.Runtime, func(t *testing.T) {
			sim := gpusim.New(t, c.machine)
			for _, w := range c.ways {
				t.Run(w.String(), func(t *testing.T) {
					asProcess(t, bin, w, "--gpu.library", sim.Library, "--option", "library="+sim.Library)
				})
			}
		})
	}
}

// programs builds umbp and the plugin as they are shipped, and returns the folder that they are in.
func programs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("go", "build", "-o", dir+"/", "github.com/umbp/umbp/cmd/umbp", "github.com/umbp/umbp/plugins/xgmi/umbp-plugin-xgmi")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return dir
}

// asProcess has umbp try the plugin between two places.
func asProcess(t *testing.T, bin string, w way, args ...string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(filepath.Join(bin, "umbp"), append([]string{
		"conformance", "--json", "--plugin", filepath.Join(bin, "umbp-plugin-xgmi"), "--memory", w.near, "--far-memory", w.far,
		"--option", "socket_dir=" + sockets(t),
	}, args...)...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && stdout.Len() == 0 {
		t.Fatalf("%s: %v\n%s", cmd, err, &stderr)
	}
	var report struct{ Cases []conformance.Result }
	if err := json.Unmarshal(stdout.Bytes(), &report); err != nil {
		t.Fatalf("%s: %v", cmd, err)
	}
	if all := len(conformance.Cases()); len(report.Cases) != all {
		t.Errorf("%d of %d cases were tried", len(report.Cases), all)
	}
	for _, c := range report.Cases {
		t.Run(c.Name, func(t *testing.T) {
			switch c.Verdict {
			case conformance.Fail:
				t.Errorf("%s: %s", c.Rule, c.Detail)
			case conformance.Skip:
				t.Skip(c.Detail)
			}
		})
	}
}
