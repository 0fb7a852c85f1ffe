package verbs

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/plugins/rdma/device"
)

// scratch is a folder for as long as the tests run.
var scratch string

func TestMain(m *testing.M) {
	var err error
	if scratch, err = os.MkdirTemp("", "verbs-test-"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(scratch)
		os.Exit(code)
	}))
}

// TestDevices asks for the devices of this machine, whatever they are.
func TestDevices(t *testing.T) {
	l := Library()
	if l.Simulated() || l.Name() != soname || l.Calls() != 0 {
		t.Errorf("Library() = %q, simulated %v, %d calls", l.Name(), l.Simulated(), l.Calls())
	}
	names, err := l.Devices()
	if missing := (*device.Missing)(nil); errors.As(err, &missing) {
		t.Logf("%v", err)
		if missing.What == "" || missing.Remedy == "" {
			t.Errorf("Devices: %#v, want what is missing, and what to do about it", missing)
		}
		if _, err := l.Open("rxe0"); !errors.As(err, &missing) {
			t.Errorf("Open: %v, want what Devices said", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %q", l.Name(), names)
	if !slices.IsSorted(names) {
		t.Errorf("devices are not sorted: %q", names)
	}
}

func TestChain(t *testing.T) {
	for _, size := range [][2]int{{0, 0}, {1, 0}, {0, 1}, {512, 8192}} {
		c := Library().NewChain(size[0], size[1])
		if len(c.WRs) != 0 || len(c.SGEs) != 0 || cap(c.WRs) != size[0] || cap(c.SGEs) != size[1] {
			t.Errorf("NewChain(%d, %d) has %d WRs of %d, %d SGEs of %d", size[0], size[1], len(c.WRs), cap(c.WRs), len(c.SGEs), cap(c.SGEs))
		}
		for i := range size[0] {
			c.WRs = append(c.WRs, device.WR{ID: uint64(i)})
		}
		for i := range size[1] {
			c.SGEs = append(c.SGEs, device.SGE{LKey: uint32(i)})
		}
		for i := range c.WRs {
			if c.WRs[i] != (device.WR{ID: uint64(i)}) {
				t.Fatalf("WR %d is %+v", i, c.WRs[i])
			}
		}
		c.Close()
		if c.WRs != nil || c.SGEs != nil {
			t.Error("a closed chain has room")
		}
		c.Close()
	}
}

// required says whether this run must have what the tests need.
func required(what string) bool {
	return slices.Contains(strings.Split(os.Getenv("UMBP_TEST_REQUIRE"), ","), what)
}
