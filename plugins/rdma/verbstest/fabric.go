package verbstest

import (
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/umbp/umbp/plugins/rdma/device"
)

// Config is what a fabric is made of.
type Config struct {
	// Devices are at least one; none means one with all defaults.
	Devices []DeviceConfig
	// Retry is how long a request may go unanswered before its queue pair gives up. It stands for the timeout and the
	// retries of the queue pair, which take too long for tests. Zero means 5ms.
	Retry time.Duration
	// Instant carries work requests out within Post, on the caller's goroutine: for benchmarks, and where a test wants
	// no parallelism.
	Instant bool
	// NoBytes checks work requests and completes them, but moves no byte: for benchmarks of what posts them.
	NoBytes bool
	// Fork is what the library says about fork.
	Fork device.Fork
}

// DeviceConfig is one device. What is zero has the value of soft-RoCE.
type DeviceConfig struct {
	// Name starts with "sim", so that no log line mistakes the device for a real one. Empty means simulated0, simulated1
	// and so on, by position.
	Name string
	Attr device.Attr
	// Ports are one active Ethernet port of 4096 bytes, if there are none. The number of a port is its position. One
	// without GIDs has a link-local one for RoCEv1 and one for RoCEv2, and one with the address 192.0.2.x, x being the
	// position of the device counted from 1, at the indexes 0, 1 and 3.
	Ports []PortConfig
	// RoundUp grants send queues and SGEs as the next power of two, as some drivers do.
	RoundUp bool
}

// PortConfig is one port.
type PortConfig struct {
	device.Port
	Table []device.GID
}

// Fabric is a network of simulated devices. Its methods may be called from any goroutine.
type Fabric struct {
	cfg   Config
	calls atomic.Uint64

	mu       sync.Mutex // everything below, and all that belongs to devices, but for the bytes of regions
	idle     sync.Cond  // something that a Close may wait for is over
	names    []string
	hardware map[string]*hardware
	routes   int // counts changes of GIDs
	faults   []*Trigger
	strays   []completion // held, and no longer of any queue pair
	counts   Counts
	record   bool
	posts    []Post
}

// hardware is a device as it sits on the fabric, however often it is opened.
type hardware struct {
	config  DeviceConfig
	ports   []PortConfig
	opened  map[*opened]struct{}
	qps     map[uint32]*queuePair
	lkeys   map[uint32]*region
	rkeys   map[uint32]*region
	cqs     map[*completionQueue]struct{}
	lastQPN uint32
	lastKey uint32
	budget  int // work requests that may begin; negative: any number
	unplug  bool
	fatal   bool // it cannot be opened
}

// New makes a network. It panics on a configuration that makes no sense.
func New(cfg Config) *Fabric {
	if len(cfg.Devices) == 0 {
		cfg.Devices = []DeviceConfig{{}}
	}
	if cfg.Retry == 0 {
		cfg.Retry = 5 * time.Millisecond
	}
	f := &Fabric{cfg: cfg, hardware: make(map[string]*hardware)}
	f.idle.L = &f.mu
	for i, c := range cfg.Devices {
		hw := newHardware(i, c)
		name := hw.config.Name
		if !strings.HasPrefix(name, "sim") {
			panic(fmt.Sprintf("verbstest: the name of device %q does not start with sim", name))
		}
		if f.hardware[name] != nil {
			panic(fmt.Sprintf("verbstest: there are two devices %q", name))
		}
		f.hardware[name] = hw
		f.names = append(f.names, name)
	}
	slices.Sort(f.names)
	return f
}

func newHardware(position int, c DeviceConfig) *hardware {
	if c.Name == "" {
		c.Name = fmt.Sprintf("simulated%d", position)
	}
	if len(c.Ports) == 0 {
		c.Ports = []PortConfig{{Port: device.Port{
			Active: true, Link: device.Ethernet, MTU: 4096, MaxMessage: 8 << 20, GIDs: 16,
		}}}
	}
	a := &c.Attr
	a.Name, a.Firmware, a.Ports = c.Name, "simulated", len(c.Ports)
	a.MaxQP = or(a.MaxQP, 1<<16)
	a.MaxCQ = or(a.MaxCQ, 1<<16)
	a.MaxMR = or(a.MaxMR, 1<<16)
	a.MaxCQE = or(a.MaxCQE, 1<<16)
	a.MaxMRSize = or(a.MaxMRSize, 1<<40)
	a.MaxWR = or(a.MaxWR, 1<<14)
	a.MaxSGE = or(a.MaxSGE, 32)
	a.MaxSGERead = or(a.MaxSGERead, 32)
	a.MaxReadsServed = or(a.MaxReadsServed, 128)
	a.MaxReadsInitiated = or(a.MaxReadsInitiated, 128)

	// Keys start elsewhere on each device, so that one used with the wrong device is noticed; numbers of queue pairs start
	// at the same one, so that users who tell queue pairs apart by number alone are found out.
	hash := fnv.New32a()
	hash.Write([]byte(c.Name))
	hw := &hardware{
		config:  c,
		opened:  make(map[*opened]struct{}),
		qps:     make(map[uint32]*queuePair),
		lkeys:   make(map[uint32]*region),
		rkeys:   make(map[uint32]*region),
		cqs:     make(map[*completionQueue]struct{}),
		lastQPN: 16,
		lastKey: hash.Sum32(),
		budget:  -1,
	}
	for i, p := range c.Ports {
		p.Number = i + 1
		p.MaxMessage = or(p.MaxMessage, 8<<20)
		p.State = portState(p.Active)
		if p.Table == nil {
			p.Table = defaultTable(position, i, c.Name, p.Link)
		}
		p.Table = slices.Clone(p.Table)
		p.GIDs = max(p.GIDs, len(p.Table))
		hw.ports = append(hw.ports, p)
	}
	return hw
}

func or[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

func portState(active bool) string {
	if active {
		return "ACTIVE"
	}
	return "DOWN"
}

func defaultTable(position, port int, name string, link device.Link) []device.GID {
	local := [16]byte{0: 0xfe, 1: 0x80, 8: 0x02, 13: byte(position), 14: byte(port), 15: 1}
	if link == device.InfiniBand {
		return []device.GID{{Addr: local}}
	}
	v4 := [16]byte{10: 0xff, 11: 0xff, 12: 192, 13: 0, 14: 2 + byte(port), 15: byte(position + 1)}
	return []device.GID{
		{Index: 0, Addr: local, Type: device.GIDRoCEv1, Interface: name},
		{Index: 1, Addr: local, Type: device.GIDRoCEv2, Interface: name},
		{Index: 3, Addr: v4, Type: device.GIDRoCEv2, Interface: name},
	}
}

// SetNoBytes changes what Config.NoBytes says, for work requests that are carried out from now on. A connection that is
// set up proves itself by bytes that move, so a benchmark of the backend connects first.
func (f *Fabric) SetNoBytes(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cfg.NoBytes = on
}

// Name says what it is.
func (f *Fabric) Name() string { return "simulated verbs" }

// Simulated is true.
func (f *Fabric) Simulated() bool { return true }

// Fork is what Config says.
func (f *Fabric) Fork() device.Fork { return f.cfg.Fork }

// Calls counts posts, polls, arms and waits, on all devices together.
func (f *Fabric) Calls() uint64 { return f.calls.Load() }

// NewChain returns a chain. It is on the Go heap.
func (f *Fabric) NewChain(wrs, sges int) *device.Chain {
	c := &device.Chain{WRs: make([]device.WR, 0, wrs), SGEs: make([]device.SGE, 0, sges)}
	c.Close = func() { c.WRs, c.SGEs = nil, nil }
	return c
}

// Devices lists all devices of the fabric.
func (f *Fabric) Devices() ([]string, error) { return f.list(f.names) }

func (f *Fabric) list(names []string) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if t := f.meetCall(AtDevices, "", 0); t != nil {
		return nil, t.fault.Err
	}
	return slices.Clone(names), nil
}

// Open opens a device of the fabric.
func (f *Fabric) Open(name string) (device.Device, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	hw := f.hardware[name]
	if hw == nil {
		return nil, &device.Error{Device: name, Op: "open", Errno: syscall.ENODEV}
	}
	if hw.fatal {
		return nil, &device.Error{Device: name, Op: "open", Errno: syscall.EIO}
	}
	if err := f.refuseAlive(hw, AtOpen, "open", 0); err != nil {
		return nil, err
	}
	d := &opened{fabric: f, hw: hw}
	d.news.L = &f.mu
	hw.opened[d] = struct{}{}
	return d, nil
}

// Host returns the library as one host of the network sees it, which has these devices only. It panics when there is
// none of a name.
func (f *Fabric) Host(devices ...string) device.Library {
	for _, name := range devices {
		f.named(name)
	}
	devices = slices.Clone(devices)
	slices.Sort(devices)
	return &host{Fabric: f, names: devices}
}

type host struct {
	*Fabric
	names []string
}

func (h *host) Devices() ([]string, error) { return h.list(h.names) }

func (h *host) Open(name string) (device.Device, error) {
	if !slices.Contains(h.names, name) {
		return nil, &device.Error{Device: name, Op: "open", Errno: syscall.ENODEV}
	}
	return h.Fabric.Open(name)
}

// named returns a device that a test names.
func (f *Fabric) named(name string) *hardware {
	hw := f.hardware[name]
	if hw == nil {
		panic(fmt.Sprintf("verbstest: no device %q; there are %q", name, slices.Sorted(maps.Keys(f.hardware))))
	}
	return hw
}

// at returns the entry at an index of the table of GIDs.
func (p *PortConfig) at(index int) (device.GID, bool) {
	for _, g := range p.Table {
		if g.Index == index {
			return g, true
		}
	}
	return device.GID{}, false
}
