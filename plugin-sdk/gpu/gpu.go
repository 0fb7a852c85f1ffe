package gpu

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
)

// Options says which runtime Open looks for. The zero value looks for both, HIP first.
type Options struct {
	// Runtime is "hip", "cuda", or empty for the first that is found with a device.
	Runtime string
	// Library is the path, or the name for the dynamic linker, of the runtime's library; empty looks for the known ones.
	// CUDA's driver, libcuda.so.1, is looked for beside it first.
	Library string
}

// Runtime is an opened runtime. Safe for concurrent use.
type Runtime struct {
	kind      *kind
	calls     calls
	library   string
	version   int // as the runtime writes it
	simulated bool
	devices   []Device
	// noBatch is set when the runtime has no call for batches, or its driver turned out not to know it.
	noBatch atomic.Bool

	// closed is closed by Close; what waits for a service waits for it, too.
	closed    chan struct{}
	closeOnce sync.Once
	ended     sync.WaitGroup // the services' goroutines

	mu       sync.Mutex
	services map[int]chan job // by device; noDevice for the calls that need none

	pinning sync.Mutex      // pinning takes its time
	pins    map[uint64]*pin // by address
}

// Device is one GPU of this process.
type Device struct {
	Number int    // as the runtime counts, from 0
	PCI    string // 0000:c1:00.0
	Name   string // for people
	Memory uint64 // bytes
}

// Link is what the runtime knows of the way from one device to another.
type Link struct {
	Access bool   // the one can address the memory of the other
	Type   string // "same GPU", "XGMI", "NVLink", "PCIe"; empty where the runtime does not tell
	Hops   int    // zero where the runtime does not tell
}

// Handle is an interprocess handle of an allocation.
type Handle [64]byte

// errClosed is what a closed runtime says.
var errClosed = errors.New("gpu: the runtime has been closed")

// Open opens a runtime. The error is *Missing when there is none, or none that suffices, or no device: it names what was
// looked for and where.
func Open(o Options) (*Runtime, error) {
	candidates, err := o.kinds()
	if err != nil {
		return nil, err
	}
	if !callable() {
		return nil, &Missing{What: "no GPU runtime is known for processors of type " + runtime.GOARCH}
	}
	var missing []*Missing
	for _, k := range candidates {
		r, err := k.open(o.Library)
		if err == nil {
			return r, nil
		}
		var m *Missing
		if !errors.As(err, &m) {
			return nil, err
		}
		// Of a library that was named and cannot be loaded, or is of this runtime, that is all there is to say.
		if o.Library != "" && (m.Library == "" || m.Version != "") {
			return nil, m
		}
		missing = append(missing, m)
	}
	if len(missing) == 1 {
		return nil, missing[0]
	}
	return nil, &Missing{What: "no GPU runtime with a device", Each: missing}
}

// Close forgets the runtime: its goroutines end, after the calls that they are in, and its methods fail from now on.
// Memory that was allocated stays so. Contexts go on working until they are unbound. The library itself stays loaded:
// runtimes do not survive being unloaded.
func (r *Runtime) Close() error {
	r.closeOnce.Do(func() {
		r.mu.Lock() // no service starts after this
		close(r.closed)
		r.mu.Unlock()
	})
	r.ended.Wait()
	return nil
}

// Name returns "hip" or "cuda".
func (r *Runtime) Name() string { return r.kind.name }

// Version returns the version of the runtime, as in 6.4.
func (r *Runtime) Version() string { return r.kind.version(r.version) }

// Library returns the file that the runtime was loaded from.
func (r *Runtime) Library() string { return r.library }

// Simulated tells whether it is the simulated runtime of the tests.
func (r *Runtime) Simulated() bool { return r.simulated }

// Devices returns the devices of this process, in the runtime's order. The caller must not change them.
func (r *Runtime) Devices() []Device { return r.devices }

// HasBatch tells whether the runtime copies batches with one call. A runtime that turns out to have the call, but not
// the driver for it, has it until the first batch.
func (r *Runtime) HasBatch() bool { return !r.noBatch.Load() }

// Link says how device number to can be reached from device number from.
func (r *Runtime) Link(from, to int) (Link, error) {
	for _, n := range []int{from, to} {
		if err := r.known(n); err != nil {
			return Link{}, err
		}
	}
	if from == to {
		return Link{Access: true, Type: "same GPU"}, nil
	}
	var l Link
	err := r.on(noDevice, func(c *Context) (err error) {
		l, err = c.link(int32(from), int32(to))
		return err
	})
	return l, err
}

// known refuses the number of a device that is not there.
func (r *Runtime) known(device int) error {
	if device < 0 || device >= len(r.devices) {
		return fmt.Errorf("gpu: no device number %d: %s has %d, counted from 0", device, r.kind.title, len(r.devices))
	}
	return nil
}

// open loads a runtime and asks for its devices. It is the first to call the library, and does so on a thread that ends
// with it.
func (k *kind) open(library string) (r *Runtime, err error) {
	aside(func() { r, err = k.load(library) })
	return r, err
}

// load does what open does, on the thread that it is called on.
func (k *kind) load(library string) (*Runtime, error) {
	r := &Runtime{
		kind:     k,
		closed:   make(chan struct{}),
		services: make(map[int]chan job),
		pins:     make(map[uint64]*pin),
	}
	lib, missing := k.find(library)
	if missing != nil {
		return nil, missing
	}
	r.library = lib.path
	lacks := func(what, remedy string) error {
		m := &Missing{Runtime: k.name, Library: lib.path, What: what, Remedy: remedy}
		if r.version != 0 {
			m.Version = r.Version()
		}
		return m
	}

	// The version first: it says most about why another name is not there.
	address := lib.symbol(k.name + "RuntimeGetVersion")
	if address == 0 {
		return nil, lacks(fmt.Sprintf("%s is no %s runtime: it lacks %sRuntimeGetVersion", lib.path, k.title, k.name), k.install)
	}
	assign(&r.calls.runtimeVersion, address)
	var version int32
	unversioned := r.calls.runtimeVersion(&version)
	title := k.title
	if unversioned == success {
		r.version = int(version)
		title += " " + r.Version()
	}

	driver := lib
	if k.driver != "" {
		if driver, missing = k.findDriver(lib.path); missing != nil {
			err := lacks(fmt.Sprintf("%s found (%s), %s", title, lib.path, missing.What), missing.Remedy).(*Missing)
			err.Looked = missing.Looked
			return nil, err
		}
	}
	if lacking := r.calls.bind(k, lib, driver); len(lacking) > 0 {
		return nil, lacks(fmt.Sprintf("%s (%s) lacks %s", lib.path, title, strings.Join(lacking, ", ")), k.install)
	}
	r.simulated = lib.symbol("umbpSimulatedRuntime") != 0
	r.noBatch.Store(r.calls.memcpyBatchAsync == 0 || r.version >= k.batchBefore)

	c := &Context{r: r, device: noDevice}
	var n int32
	err := c.check("GetDeviceCount", r.calls.getDeviceCount(&n))
	if err == nil {
		err = c.checkDriver("Init", r.calls.initialize(0))
	}
	if err != nil || n == 0 {
		why := ""
		if e := (*Error)(nil); errors.As(err, &e) {
			why = " (" + e.Name + ")"
		}
		return nil, lacks(fmt.Sprintf("%s found (%s), no device%s", title, lib.path, why), k.permit)
	}
	if err := c.check("RuntimeGetVersion", unversioned); err != nil {
		return nil, err // with a device, there is no reason for it
	}
	for i := range n {
		d, err := c.describe(i)
		if err != nil {
			return nil, err
		}
		for _, other := range r.devices {
			if other.PCI == d.PCI {
				return nil, lacks(fmt.Sprintf("%s found (%s), but its devices %d and %d are both %s: parts of a GPU are not told apart",
					title, lib.path, other.Number, d.Number, d.PCI), k.hide)
			}
		}
		r.devices = append(r.devices, d)
	}
	return r, nil
}

// describe asks for a device. None of the calls makes the runtime set the device up.
func (c *Context) describe(number int32) (Device, error) {
	f := &c.r.calls
	d := Device{Number: int(number)}
	var handle int32
	if err := c.checkDriver("DeviceGet", f.deviceGet(&handle, number)); err != nil {
		return d, err
	}
	text := make([]byte, 256)
	if err := c.checkDriver("DeviceGetName", f.deviceGetName(text, int32(len(text)), handle)); err != nil {
		return d, err
	}
	d.Name = untilZero(text)
	if err := c.checkDriver("DeviceTotalMem", f.deviceTotalMem(&d.Memory, handle)); err != nil {
		return d, err
	}
	text = make([]byte, 64)
	if err := c.check("DeviceGetPCIBusId", f.deviceGetPCIBusID(text, int32(len(text)), number)); err != nil {
		return d, err
	}
	pci, err := normalPCI(untilZero(text))
	if err != nil {
		return d, fmt.Errorf("gpu: device %d: %w", number, err)
	}
	d.PCI = pci
	return d, nil
}

// link asks for the way between two devices.
func (c *Context) link(from, to int32) (Link, error) {
	f := &c.r.calls
	var l Link
	var access int32
	if err := c.check("DeviceCanAccessPeer", f.deviceCanAccessPeer(&access, from, to)); err != nil {
		return l, err
	}
	l.Access = access != 0
	switch {
	case f.linkTypeAndHops != nil:
		var typ, hops uint32
		// A runtime that cannot tell leaves the words out.
		if f.linkTypeAndHops(from, to, &typ, &hops) == success {
			l.Type, l.Hops = hsaLinks[typ], int(hops)
		}
	case f.deviceGetP2PAttribute != nil && l.Access:
		// CUDA does not name the link. Atomic operations of the one GPU on the memory of the other are NVLink's: over
		// PCIe there are none.
		var atomics int32
		if f.deviceGetP2PAttribute(&atomics, cudaNativeAtomicSupported, from, to) == success {
			l.Type = "PCIe"
			if atomics != 0 {
				l.Type = "NVLink"
			}
		}
	}
	return l, nil
}
