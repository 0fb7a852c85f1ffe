//go:build !noxgmi

package main

import (
	"io"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
)

// TestBenchGPU: batches between memory of GPUs and of the host, every byte of the last calls compared. It is told that
// the GPUs are simulated.
func TestBenchGPU(t *testing.T) {
	sim := gpusim.New(t, gpusim.Machine{})
	plugins := pluginFolder(t)
	for _, ends := range [][2]string{{"gpu:0", "gpu:1"}, {"gpu", "gpu:0000:c1:00.0"}, {"host", "gpu"}, {"gpu", "host"}} {
		for _, op := range []string{"batch-put", "batch-get"} {
			t.Run(op+"/"+ends[0]+"/"+ends[1], func(t *testing.T) {
				defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
				for _, r := range benchTable(t, 4, op, "--backend", "xgmi", "--memory", ends[0], "--pool-memory", ends[1], "--gpu.library", sim.Library,
					"--mode", "in-process,process", "--plugins.dir", plugins, "--batch", "8", "--per-item-pages", "3", "--page-bytes", "1024", "--iters", "2") {
					if !r.Simulated || r.Memory != ends[0] || r.PoolMemory != ends[1] || r.Carried["xgmi"] != 8 || r.Verified != 8*3*1024 {
						t.Errorf("%+v", r)
					}
					if r.Plan == perPage && r.Transfers != 24 || r.Plan == grouped && r.Transfers != 1 {
						t.Errorf("%s: %d transfers", r.Plan, r.Transfers)
					}
					if r.Counts["copies"] == 0 {
						t.Errorf("%s, %s: the backend counts no copies: %v", r.Mode, r.Plan, r.Counts)
					}
				}
			})
		}
	}
	stdout, stderr, code := benchCommandLine(t, "batch-put", "--backend", "xgmi", "--memory", "gpu", "--pool-memory", "gpu", "--gpu.library", sim.Library,
		"--batch", "2", "--per-item-pages", "1", "--iters", "1")
	if want := "over xgmi between gpu and gpu, 2 x 1 pages of 4 KiB = 8 KiB a call (simulated: there is no such device); 1 calls"; code != exitOK || !strings.Contains(stdout, want) {
		t.Errorf("exit code %d; the table lacks %q:\n%s%s", code, want, stdout, stderr)
	}
}

// TestBenchGPUMixed: half of the values stay in the caller's own pool, on the same GPU or another one.
func TestBenchGPUMixed(t *testing.T) {
	sim := gpusim.New(t, gpusim.Machine{Runtime: "cuda"})
	for _, r := range benchTable(t, 2, "batch-put", "--scenario", "mixed", "--backend", "xgmi", "--memory", "gpu:0", "--pool-memory", "gpu:1",
		"--gpu.library", sim.Library, "--gpu.runtime", "cuda", "--batch", "8", "--per-item-pages", "1", "--iters", "1") {
		if r.Carried["xgmi"] != 8 || r.Verified != 8*4096 {
			t.Errorf("%+v", r)
		}
	}
}

// TestBenchGPUMistakes: what cannot be measured is refused before anything is opened, or says what is missing.
func TestBenchGPUMistakes(t *testing.T) {
	sim := gpusim.New(t, gpusim.Machine{Links: []gpusim.Link{}})
	for _, c := range []struct {
		args, want string
		code       int
	}{
		{"--backend xgmi", "--backend xgmi is for a GPU's memory: add --memory gpu, --pool-memory gpu, or both", exitUsage},
		{"--backend null --memory vram", `--memory "vram" is no place for memory: write host, gpu, or gpu:N`, exitUsage},
		{"--backend null --pool-memory gpu:", `--pool-memory "gpu:" is no place for memory`, exitUsage},
		{"--backend xgmi --memory gpu --scenario all_stg", "--scenario all_stg is of memory that is not registered", exitUsage},
		{"--backend xgmi --memory gpu --verify all", "--verify must be off with --memory gpu", exitUsage},
		{"--backend xgmi --memory gpu --gpu.runtime rocm", `--gpu.runtime "rocm" is not one of auto, hip, cuda`, exitUsage},
		{"--backend xgmi --memory gpu:5 --gpu.library " + sim.Library, `there is no GPU "5"; hip 7`, exitUsage},
		{"--backend xgmi --memory gpu --gpu.library /nowhere/libamdhip64.so.6", "/nowhere/libamdhip64.so.6", exitFailure},
		{"--backend shm --memory gpu --gpu.library " + sim.Library, "shm: ", exitFailure},
		{"--backend xgmi --memory gpu:0 --pool-memory gpu:1 --gpu.library " + sim.Library, "no link from GPU 0000:c1:00.0 to GPU 0000:c2:00.0", exitFailure},
	} {
		_, stderr, code := benchCommandLine(t, append([]string{"batch-put", "--batch", "2", "--per-item-pages", "1", "--iters", "1"}, strings.Fields(c.args)...)...)
		if code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%s: exit code %d, and not %d with %q:\n%s", c.args, code, c.code, c.want, stderr)
		}
	}
	// A mistake is told, and nothing that only follows from it.
	if _, stderr, _ := benchCommandLine(t, "batch-put", "--backend", "xgmi", "--memory", "gpu:"); strings.Contains(stderr, "--backend") {
		t.Error(stderr)
	}
}

// TestGPULimits measures beside the runtime's own copies, which have the same way.
func TestGPULimits(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	sim := gpusim.New(t, gpusim.Machine{})
	measured := 0
	for _, l := range gpuLimits(config.GPU{Runtime: "auto", Library: sim.Library}) {
		if !strings.HasSuffix(l.name, "_1m") && l.name != "gpu_pages_4k" {
			continue
		}
		measured++
		l.turns = 1
		row, err := l.run(t.Context(), 1, newPace(io.Discard))
		if err != nil {
			t.Fatal(err)
		}
		if row.UMBP <= 0 || row.Limit <= 0 || !strings.Contains(row.On, "GPU 0000:c1:00.0 (Simulated GPU 0, hip") || !strings.Contains(row.On, "simulated) to 0000:c2:00.0, XGMI") {
			t.Errorf("%+v", row)
		}
	}
	if measured != 3 {
		t.Errorf("%d limits were measured", measured)
	}
	stdout, stderr, code := benchCommandLine(t, "limits", "--only", "gpu_copy_read_64m", "--gpu.library", "/nowhere/libamdhip64.so.6")
	if code != exitOK || !strings.Contains(stdout, "not measured: ") || !strings.Contains(stdout, "/nowhere/libamdhip64.so.6") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
}
