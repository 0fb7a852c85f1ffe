//go:build cgo

package verbs

/*
#cgo CFLAGS: -Wall
#cgo LDFLAGS: -ldl
#include <stdlib.h>
#include "verbs.h"
*/
import "C"

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/umbp/umbp/plugins/rdma/device"
)

// Library returns libibverbs, which is loaded when it is first asked for devices, and stays loaded.
func Library() device.Library { return &library{soname: soname} }

type library struct {
	soname string
	calls  atomic.Uint64

	mu    sync.Mutex
	verbs *C.struct_umbp_verbs // nil until it is loaded
	fork  device.Fork
	name  string // of the file
}

// load returns the functions of the library. Once it is there it is not looked for again; while it is not, each call
// looks again, since it may be installed in the meantime.
func (l *library) load() (*C.struct_umbp_verbs, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.verbs != nil {
		return l.verbs, nil
	}
	v := (*C.struct_umbp_verbs)(C.calloc(1, C.sizeof_struct_umbp_verbs))
	if v == nil {
		return nil, syscall.ENOMEM
	}
	name := C.CString(l.soname)
	defer C.free(unsafe.Pointer(name))
	if errno := C.umbp_load(v, name); errno != 0 {
		missing := &device.Missing{
			What:   C.GoString(&v.missing[0]), // of the loader, with the name of the library
			Remedy: "install it and the drivers' part of it (Debian packages libibverbs1 and ibverbs-providers)",
		}
		if syscall.Errno(errno) != syscall.ENOENT {
			missing.What = l.soname + " lacks the function " + missing.What
			missing.Remedy = "install version 32 of rdma-core, or a newer one (Debian packages libibverbs1 and ibverbs-providers)"
		}
		C.free(unsafe.Pointer(v))
		return nil, missing
	}
	switch C.umbp_fork(v) {
	case C.IBV_FORK_UNNEEDED:
		l.fork = device.ForkUnneeded
	case C.IBV_FORK_ENABLED:
		l.fork = device.ForkEnabled
	default:
		l.fork = device.ForkDisabled
	}
	if file, err := filepath.EvalSymlinks(C.GoString(&v.path[0])); err == nil {
		l.name = filepath.Base(file)
	}
	l.verbs = v
	return v, nil
}

func (l *library) Name() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return cmp.Or(l.name, l.soname)
}

func (l *library) Simulated() bool { return false }

func (l *library) Calls() uint64 { return l.calls.Load() }

// Fork says ForkDisabled until the library is loaded.
func (l *library) Fork() device.Fork {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.verbs == nil {
		return device.ForkDisabled
	}
	return l.fork
}

func (l *library) Devices() (names []string, err error) {
	err = l.list(func(_ *C.struct_umbp_verbs, _ **C.struct_ibv_device, all []string) error {
		names = all
		return nil
	})
	if err == nil && len(names) == 0 {
		err = unusable(sysfs)
	}
	slices.Sort(names)
	return names, err
}

// list calls f with the devices of this machine, while they are listed, and their names.
func (l *library) list(f func(v *C.struct_umbp_verbs, list **C.struct_ibv_device, names []string) error) error {
	v, err := l.load()
	if err != nil {
		return err
	}
	var list **C.struct_ibv_device
	var n C.int
	switch errno := syscall.Errno(C.umbp_devices(v, &list, &n)); errno {
	case 0:
	case syscall.ENOSYS, syscall.EPROTONOSUPPORT, syscall.EOPNOTSUPP, syscall.ENOENT:
		return &device.Missing{
			What: "the kernel has no RDMA devices (" + sysfs + " is not there)",
			Remedy: "load the driver of the adapter and ib_uverbs (the Debian package rdma-core does), " +
				"or try soft-RoCE: modprobe rdma_rxe; rdma link add rxe0 type rxe netdev INTERFACE",
		}
	default:
		return &device.Error{Device: l.soname, Op: "list devices", Errno: errno}
	}
	defer C.umbp_free_devices(v, list)
	names := make([]string, int(n))
	for i := range names {
		names[i] = C.GoString(C.umbp_device_name(v, list, C.int(i)))
	}
	return f(v, list, names)
}

// sysfs is where the kernel lists the devices that it has drivers for.
const sysfs = "/sys/class/infiniband"

// unusable says why the kernel has devices and the library lists none, if that is so.
func unusable(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) == 0 {
		return nil // no devices, and that is all
	}
	return &device.Missing{
		What: fmt.Sprintf("the kernel has the RDMA device %s, and libibverbs cannot use it", entries[0].Name()),
		Remedy: "load ib_uverbs (modprobe ib_uverbs), make /dev/infiniband visible to this process, " +
			"and install the drivers' part of the library (Debian package ibverbs-providers)",
	}
}

func (l *library) Open(name string) (opened device.Device, err error) {
	err = l.list(func(v *C.struct_umbp_verbs, list **C.struct_ibv_device, names []string) error {
		i := slices.Index(names, name)
		if i < 0 {
			return &device.Error{Device: name, Op: "open", Errno: syscall.ENODEV}
		}
		var ctx *C.struct_ibv_context
		if errno := C.umbp_open(v, list, C.int(i), &ctx); errno != 0 {
			return &device.Error{Device: name, Op: "open", Errno: syscall.Errno(errno)}
		}
		opened, err = newHCA(l, v, ctx, name)
		return err
	})
	if err != nil {
		return nil, err
	}
	return opened, nil
}

func (l *library) NewChain(wrs, sges int) *device.Chain {
	// malloc as cgo has it does not return when there is no memory.
	w := C.malloc(C.size_t(max(wrs, 1)) * C.sizeof_struct_umbp_wr)
	s := C.malloc(C.size_t(max(sges, 1)) * C.sizeof_struct_ibv_sge)
	c := &device.Chain{
		WRs:  unsafe.Slice((*device.WR)(w), wrs),
		SGEs: unsafe.Slice((*device.SGE)(s), sges),
	}
	clear(c.WRs)
	clear(c.SGEs)
	c.WRs, c.SGEs = c.WRs[:0], c.SGEs[:0]
	c.Close = sync.OnceFunc(func() {
		c.WRs, c.SGEs = nil, nil
		C.free(w)
		C.free(s)
	})
	return c
}

// closed is the answer of a handle that was closed.
func closed(name, op string) error {
	return fmt.Errorf("%s: %s: %w", name, op, os.ErrClosed)
}
