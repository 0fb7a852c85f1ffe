package rdma

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// hostLimits is what the system allows this process in pinned memory.
type hostLimits struct {
	memlock uint64 // bytes; unlimited is no limit
	pinned  uint64 // bytes that the process has pinned already
	exempt  bool   // the process may lock as much as it likes
	maxMaps int    // mappings of one process; 0 when that is not known
}

const unlimited = math.MaxUint64

// readLimits asks the system. What it cannot find out is no limit: the kernel has the last word in any case.
func readLimits() hostLimits {
	l := hostLimits{memlock: unlimited}
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) == nil && limit.Cur != unix.RLIM_INFINITY {
		l.memlock = limit.Cur
	}
	status, _ := os.ReadFile("/proc/self/status")
	for lines := bufio.NewScanner(bytes.NewReader(status)); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimSpace(value)
		switch key {
		case "VmPin":
			kib, _ := strconv.ParseUint(strings.TrimSuffix(value, " kB"), 10, 64)
			l.pinned = kib << 10
		case "CapEff":
			mask, _ := strconv.ParseUint(value, 16, 64)
			l.exempt = mask&(1<<unix.CAP_IPC_LOCK) != 0
		}
	}
	maps, _ := os.ReadFile("/proc/sys/vm/max_map_count")
	l.maxMaps, _ = strconv.Atoi(strings.TrimSpace(string(maps)))
	return l
}

// lockRemedy says how to raise the limit on locked memory, for each way a process may have been started.
const lockRemedy = "set LimitMEMLOCK=infinity in the systemd unit, --ulimit memlock=-1 for docker, " +
	`"* - memlock unlimited" in /etc/security/limits.conf for a login, or give the process CAP_IPC_LOCK`

// mapsRemedy is the same for mappings.
const mapsRemedy = "raise it with sysctl vm.max_map_count=N, or use devices that take larger memory regions"

// checkPinning refuses to pin so many bytes on each of so many rails, in so many parts, when that cannot work. Every
// device pins for itself, and all count.
func (l *hostLimits) checkPinning(bytes uint64, rails, parts int) error {
	need := bytes * uint64(rails)
	if !l.exempt && l.memlock != unlimited && (l.pinned > l.memlock || need > l.memlock-l.pinned) {
		return backend.Errorf(backend.Denied, "the process may lock %s (RLIMIT_MEMLOCK) and has locked %s; %s: %s",
			backend.Size(l.memlock), backend.Size(l.pinned), needs(bytes, rails), lockRemedy)
	}
	// A device's memory region may cost the kernel two mappings: one that it is, and one that it was cut from.
	if l.maxMaps != 0 && parts*rails > l.maxMaps/4 {
		return backend.Errorf(backend.Denied, "the region has %d parts on %d ports, too many for %d mappings (vm.max_map_count): %s",
			parts, rails, l.maxMaps, mapsRemedy)
	}
	return nil
}

func needs(bytes uint64, rails int) string {
	if rails == 1 {
		return fmt.Sprintf("the region needs %s", backend.Size(bytes))
	}
	return fmt.Sprintf("the region needs %s on each of %d ports", backend.Size(bytes), rails)
}

// explainPinning says what an error of registering means, where the kernel's number does not say it.
func (l *hostLimits) explainPinning(err error, bytes uint64, rails int) *backend.Error {
	e := &backend.Error{Code: backend.CodeOf(err), Err: err}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		e.Vendor, e.VendorText = int(errno), errno.Error()
	}
	if errors.Is(err, syscall.ENOMEM) {
		limit := "any amount of memory"
		if !l.exempt && l.memlock != unlimited {
			limit = backend.Size(l.memlock).String()
		}
		e.Code = backend.Denied
		e.Text = fmt.Sprintf("the kernel pins no more memory: the process may lock %s (RLIMIT_MEMLOCK) and has locked %s; %s: %s",
			limit, backend.Size(l.pinned), needs(bytes, rails), lockRemedy)
	}
	return e
}
