package rdma

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/device"
)

func TestCheckPinning(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		name         string
		limits       hostLimits
		bytes        uint64
		rails, parts int
		want         string // part of the refusal; empty: fine
	}{
		{"enough", hostLimits{memlock: 8 * mib}, 8 * mib, 1, 1, ""},
		{"a byte too much", hostLimits{memlock: 8 * mib}, 8*mib + 1, 1, 1, "may lock 8MiB (RLIMIT_MEMLOCK) and has locked 0B"},
		{"with what is locked", hostLimits{memlock: 8 * mib, pinned: 4 * mib}, 5 * mib, 1, 1, "has locked 4MiB; the region needs 5MiB: set LimitMEMLOCK=infinity"},
		{"more is locked than may be", hostLimits{memlock: 8 * mib, pinned: 9 * mib}, 1, 1, 1, "has locked 9MiB"},
		{"once for each rail", hostLimits{memlock: 8 * mib}, 3 * mib, 3, 1, "needs 3MiB on each of 3 ports"},
		{"exempt", hostLimits{memlock: 8 * mib, exempt: true}, 1 << 40, 4, 1, ""},
		{"no limit", hostLimits{memlock: unlimited, pinned: 1 << 50}, 1 << 50, 4, 1, ""},
		{"few mappings, few parts", hostLimits{memlock: unlimited, maxMaps: 65530}, mib, 2, 100, ""},
		{"few mappings, many parts", hostLimits{memlock: unlimited, maxMaps: 1000}, mib, 2, 126, "252"},
	} {
		err := c.limits.checkPinning(c.bytes, c.rails, c.parts)
		switch {
		case c.name == "few mappings, many parts":
			if err == nil || !strings.Contains(err.Error(), "vm.max_map_count") {
				t.Errorf("%s: got %v", c.name, err)
			}
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.want != "" && (backend.CodeOf(err) != backend.Denied || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: got %v, want a refusal with %q", c.name, err, c.want)
		}
	}
}

func TestExplainPinning(t *testing.T) {
	refused := func(errno syscall.Errno) error {
		return fmt.Errorf("x: %w", &device.Error{Device: "mlx5_0", Op: "register", Errno: errno})
	}
	l := hostLimits{memlock: 8 << 20, pinned: 1 << 20}
	e := l.explainPinning(refused(syscall.ENOMEM), 2<<20, 1)
	for _, want := range []string{"8MiB", "1MiB", "2MiB", "LimitMEMLOCK=infinity", "--ulimit memlock=-1", "limits.conf", "mlx5_0"} {
		if !strings.Contains(e.Error(), want) {
			t.Errorf("%q does not name %s", e, want)
		}
	}
	if e.Code != backend.Denied || e.Vendor != int(syscall.ENOMEM) || !errors.Is(e, syscall.ENOMEM) {
		t.Errorf("got %#v", e)
	}
	if e := l.explainPinning(refused(syscall.EFAULT), 1, 1); e.Code != backend.Internal || strings.Contains(e.Error(), "memlock") {
		t.Errorf("a bad address is explained as %v", e)
	}
	if s := new(hostLimits{memlock: unlimited}).explainPinning(refused(syscall.ENOMEM), 1, 1).Error(); !strings.Contains(s, "any amount") {
		t.Errorf("without a limit it says %q", s)
	}
}

// TestReadLimits looks at this machine: whatever it allows, the parts fit together.
func TestReadLimits(t *testing.T) {
	l := readLimits()
	if l.memlock == 0 || l.maxMaps < 1000 {
		t.Errorf("got %+v", l)
	}
}

func TestTimeoutExponent(t *testing.T) {
	for d, want := range map[time.Duration]int{
		10 * time.Microsecond: 2, 16384 * time.Nanosecond: 2, 16385 * time.Nanosecond: 3,
		67 * time.Millisecond: 14, 10 * time.Second: 22, 1: 1, math.MaxInt64: 31,
	} {
		if got := timeoutExponent(d); got != want {
			t.Errorf("%s: got %d, want %d", d, got, want)
		}
	}
}
