package gpu_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/gpu"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
)

func TestOpen(t *testing.T) {
	versions := map[int]string{50221153: "5.2", 60342131: "6.3", 70125424: "7.1", 11080: "11.8", 12080: "12.8", 13000: "13.0"}
	for _, m := range machines {
		m.Devices = []gpusim.Device{{PCI: "0000:C1:00.0", Name: "One", Memory: 1 << 30}, {PCI: "000A:0b:1f.1", Memory: 5 << 20}}
		sim, r := open(t, m)
		if r.Name() != m.Runtime || r.Version() != versions[m.Version] || !r.Simulated() {
			t.Errorf("%d: %s %s, simulated %v", m.Version, r.Name(), r.Version(), r.Simulated())
		}
		if r.Library() != sim.Library {
			t.Errorf("the library is %s, want %s", r.Library(), sim.Library)
		}
		if got, want := r.HasBatch(), m.Version == 70125424 || m.Version == 12080 || m.Version == 13000; got != want {
			t.Errorf("%s %d: HasBatch is %v", m.Runtime, m.Version, got)
		}
		devices := []gpu.Device{{0, "0000:c1:00.0", "One", 1 << 30}, {1, "000a:0b:1f.1", "Simulated GPU 1", 5 << 20}}
		if !slices.Equal(r.Devices(), devices) {
			t.Errorf("devices %v, want %v", r.Devices(), devices)
		}
	}
}

// TestUnknownVersions opens runtimes of major versions that nobody has seen yet: a batch may take other arguments there.
func TestUnknownVersions(t *testing.T) {
	for _, m := range []gpusim.Machine{{Runtime: "hip", Version: 80012345}, {Runtime: "cuda", Version: 14000}} {
		if _, r := open(t, m); r.HasBatch() {
			t.Errorf("%s %s has batches", r.Name(), r.Version())
		}
	}
}

// TestNamedOtherwise opens libraries whose names do not tell what they are of.
func TestNamedOtherwise(t *testing.T) {
	for _, runtime := range []string{"hip", "cuda"} {
		sim := gpusim.New(t, gpusim.Machine{Runtime: runtime})
		name := filepath.Join(sim.Dir, "runtime.so")
		driver := filepath.Join(sim.Dir, "libcuda.so.1") // a link to what is renamed
		os.Remove(driver)
		if err := errors.Join(os.Rename(sim.Library, name), os.Symlink("runtime.so", driver)); err != nil {
			t.Fatal(err)
		}
		r, err := gpu.Open(gpu.Options{Library: name})
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if r.Name() != runtime || r.Library() != name {
			t.Errorf("opened %s, %s, want %s, %s", r.Name(), r.Library(), runtime, name)
		}
	}
}

// TestFound looks for a library where the environment says that it is.
func TestFound(t *testing.T) {
	for variable, m := range map[string]gpusim.Machine{
		"ROCM_PATH": {Runtime: "hip"}, "HIP_PATH": {Runtime: "hip", Version: 60342131},
		"CUDA_HOME": {Runtime: "cuda"}, "CUDA_PATH": {Runtime: "cuda", Version: 13000},
	} {
		t.Run(variable, func(t *testing.T) {
			sim := gpusim.New(t, m)
			at := t.TempDir()
			if err := os.Symlink(sim.Dir, filepath.Join(at, "lib")); err != nil {
				t.Fatal(err)
			}
			t.Setenv(variable, at)
			// In a process of its own, since what is loaded already comes first.
			c := start(t, "open", m.Runtime)
			if line, _ := c.out.ReadString('\n'); strings.TrimSpace(line) != sim.Library {
				t.Errorf("opened %s, want %s", line, sim.Library)
			}
		})
	}
}

func TestMissing(t *testing.T) {
	empty := t.TempDir()
	broken := filepath.Join(t.TempDir(), "libamdhip64.so.6")
	if err := os.WriteFile(broken, []byte("no library"), 0o600); err != nil {
		t.Fatal(err)
	}
	alone := gpusim.New(t, gpusim.Machine{Runtime: "cuda"}) // without its driver
	if err := os.Remove(filepath.Join(alone.Dir, "libcuda.so.1")); err != nil {
		t.Fatal(err)
	}
	nameless := filepath.Join(t.TempDir(), "lib.so")
	if err := os.Link(broken, nameless); err != nil {
		t.Fatal(err)
	}
	lacking := gpusim.New(t, gpusim.Machine{Runtime: "hip", Version: 60342131, Missing: []string{"hipIpcOpenMemHandle", "hipMemcpyAsync"}})
	undriven := gpusim.New(t, gpusim.Machine{Runtime: "cuda", Missing: []string{"cuMemGetAddressRange_v2"}})
	unversioned := gpusim.New(t, gpusim.Machine{Missing: []string{"hipRuntimeGetVersion"}})
	bare := gpusim.New(t, gpusim.Machine{Devices: []gpusim.Device{}})
	old := gpusim.New(t, gpusim.Machine{Runtime: "cuda", Broken: 35})
	parted := gpusim.New(t, gpusim.Machine{Devices: []gpusim.Device{{PCI: "0000:01:00.0"}, {PCI: "0000:01:00.0"}}})

	for _, c := range []struct {
		name             string
		options          gpu.Options
		library, version string
		words            []string
	}{
		{"no file", gpu.Options{Runtime: "hip", Library: filepath.Join(empty, "libamdhip64.so.6")}, "", "",
			[]string{filepath.Join(empty, "libamdhip64.so.6") + " cannot be loaded", "No such file"}},
		{"no library", gpu.Options{Library: broken}, "", "", []string{broken + " cannot be loaded"}},
		{"no library of a known name", gpu.Options{Library: nameless}, "", "", []string{nameless + " cannot be loaded"}},
		{"another's", gpu.Options{Runtime: "cuda", Library: lacking.Library}, lacking.Library, "",
			[]string{lacking.Library + " is no CUDA runtime: it lacks cudaRuntimeGetVersion"}},
		{"no version", gpu.Options{Runtime: "hip", Library: unversioned.Library}, unversioned.Library, "", []string{"lacks hipRuntimeGetVersion"}},
		{"no symbols", gpu.Options{Runtime: "hip", Library: lacking.Library}, lacking.Library, "6.3",
			[]string{lacking.Library + " (HIP 6.3) lacks hipIpcOpenMemHandle, hipMemcpyAsync"}},
		{"no symbol of the driver's", gpu.Options{Library: undriven.Library}, undriven.Library, "12.8", []string{"(CUDA 12.8) lacks cuMemGetAddressRange_v2"}},
		{"no device", gpu.Options{Library: bare.Library}, bare.Library, "7.1", []string{"HIP 7.1 found (" + bare.Library + "), no device (hipErrorNoDevice)"}},
		{"old driver", gpu.Options{Library: old.Library}, old.Library, "12.8", []string{"CUDA 12.8 found (" + old.Library + "), no device (cudaErrorInsufficientDriver)"}},
		{"parts", gpu.Options{Library: parted.Library}, parted.Library, "7.1", []string{"devices 0 and 1 are both 0000:01:00.0"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := gpu.Open(c.options)
			var missing *gpu.Missing
			if !errors.As(err, &missing) {
				t.Fatalf("error %v, want *Missing", err)
			}
			want(t, err, c.words...)
			if missing.Library != c.library || missing.Version != c.version || missing.Remedy == "" || missing.Runtime == "" {
				t.Errorf("%#v, want library %q, version %q, a runtime and a remedy", missing, c.library, c.version)
			}
		})
	}

	t.Run("no driver", func(t *testing.T) {
		_, err := gpu.Open(gpu.Options{Library: alone.Library})
		var missing *gpu.Missing
		if err == nil || !errors.As(err, &missing) {
			t.Skip("there is a driver of NVIDIA's on this machine")
		}
		want(t, err, "CUDA 12.8 found ("+alone.Library+"), libcuda.so.1 not found; looked in "+alone.Dir+", the dynamic linker's path")
	})
	t.Run("neither", func(t *testing.T) {
		_, err := gpu.Open(gpu.Options{Library: "libc.so.6"})
		var missing *gpu.Missing
		if !errors.As(err, &missing) || len(missing.Each) != 2 {
			t.Fatalf("%#v", err)
		}
		want(t, err, "is no HIP runtime", "is no CUDA runtime")
	})
	t.Run("wrong runtime", func(t *testing.T) {
		_, err := gpu.Open(gpu.Options{Runtime: "opencl"})
		want(t, err, `runtime "opencl": want hip, cuda`)
		if missing := (*gpu.Missing)(nil); errors.As(err, &missing) {
			t.Error("a wrong option is said to be a missing runtime")
		}
	})
}

// TestOptional opens runtimes without the calls that only turn something off.
func TestOptional(t *testing.T) {
	_, r := open(t, gpusim.Machine{Runtime: "hip", Missing: []string{"hipMemcpyBatchAsync", "hipExtGetLinkTypeAndHopCount"}})
	if r.HasBatch() {
		t.Error("a runtime without hipMemcpyBatchAsync has batches")
	}
	if l, err := r.Link(0, 1); err != nil || l != (gpu.Link{Access: true}) {
		t.Errorf("link %+v, error %v", l, err)
	}
	_, r = open(t, gpusim.Machine{Runtime: "cuda", Missing: []string{"cudaDeviceGetP2PAttribute"}})
	if l, err := r.Link(0, 1); err != nil || l != (gpu.Link{Access: true}) {
		t.Errorf("link %+v, error %v", l, err)
	}
}

// TestInstalled opens what this machine has, in a process of its own that must not be harmed by it.
func TestInstalled(t *testing.T) {
	for _, runtime := range []string{"hip", "cuda"} {
		t.Run(runtime, func(t *testing.T) {
			r, err := gpu.Open(gpu.Options{Runtime: runtime})
			if err == nil {
				t.Logf("%s %s (%s): %+v", r.Name(), r.Version(), r.Library(), r.Devices())
				r.Close()
				return
			}
			var missing *gpu.Missing
			if !errors.As(err, &missing) {
				t.Fatalf("error %v, want *Missing", err)
			}
			t.Log(err)
			if missing.Library == "" {
				if runtime == "hip" && required("gpu-runtime") {
					t.Fatal("no HIP runtime is installed, and UMBP_TEST_REQUIRE has gpu-runtime")
				}
				t.Skipf("no runtime of kind %s is installed", runtime)
			}
			if runtime == "hip" && strings.Contains(missing.Library, "libamdhip64.so.5.2") {
				want(t, err, "HIP 5.2 found ("+missing.Library+"), no device (hipErrorNoDevice)")
			}
			// What another process says of it, with nothing else said and nothing broken.
			c := start(t, "open", runtime)
			c.in.Close()
			line, _ := c.out.ReadString('\n')
			if more, _ := c.out.ReadString(0); strings.TrimSpace(line) != err.Error() || more != "" {
				t.Errorf("another process says %q, then %q", line, more)
			}
		})
	}
}

func TestLink(t *testing.T) {
	devices := make([]gpusim.Device, 3)
	links := []gpusim.Link{{From: 0, To: 1, Hops: 2}, {From: 1, To: 0, PCIe: true}}
	for _, c := range []struct {
		runtime        string
		there, back    gpu.Link
		thereNotAtAll  gpu.Link
		sameDeviceLink gpu.Link
	}{
		{"hip", gpu.Link{Access: true, Type: "XGMI", Hops: 2}, gpu.Link{Access: true, Type: "PCIe", Hops: 1}, gpu.Link{Type: "PCIe", Hops: 2}, gpu.Link{Access: true, Type: "same GPU"}},
		{"cuda", gpu.Link{Access: true, Type: "NVLink"}, gpu.Link{Access: true, Type: "PCIe"}, gpu.Link{}, gpu.Link{Access: true, Type: "same GPU"}},
	} {
		_, r := open(t, gpusim.Machine{Runtime: c.runtime, Devices: devices, Links: links})
		for pair, want := range map[[2]int]gpu.Link{{0, 1}: c.there, {1, 0}: c.back, {0, 2}: c.thereNotAtAll, {2, 2}: c.sameDeviceLink} {
			if l, err := r.Link(pair[0], pair[1]); err != nil || l != want {
				t.Errorf("%s: link from %d to %d: %+v, error %v; want %+v", c.runtime, pair[0], pair[1], l, err, want)
			}
		}
		for _, pair := range [][2]int{{0, 3}, {-1, 0}} {
			_, err := r.Link(pair[0], pair[1])
			want(t, err, "no device number", "has 3")
		}
	}
}
