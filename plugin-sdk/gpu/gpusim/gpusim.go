package gpusim

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// maxDevices is what the library has room for.
const maxDevices = 16

// Machine says what New simulates. The zero value is a machine with HIP 7.1 and two GPUs, each reached from the other by XGMI.
type Machine struct {
	// Runtime is "hip" or "cuda"; empty is hip.
	Runtime string
	// Version is what the runtime says that it is, in its own counting: 60342131 is HIP 6.3, 12080 is CUDA 12.8. Zero is
	// 70125424 or 12080. Batches are there from HIP 7.1 and CUDA 12.8 on.
	Version int
	// Devices are the GPUs; nil: two.
	Devices []Device
	// Links are the pairs with peer access, in one direction each; nil: all pairs, by XGMI. An empty slice: none.
	Links []Link
	// Rate is how many bytes per second a copy moves; zero: as many as it can.
	Rate uint64
	// Missing names calls that the library lacks, such as hipIpcOpenMemHandle.
	Missing []string
	// Broken is the code that all calls answer but those that ask for the version, such as 35 for a driver that is too old;
	// zero: the runtime works.
	Broken int
	// ContextForPointers makes CUDA's cuPointerGetAttribute fail on a thread without a context. What asks for the memory's
	// type and device seems to be answered there, other attributes are not.
	ContextForPointers bool
}

// Device is one GPU of a machine.
type Device struct {
	PCI    string // such as 0000:c1:00.0; empty: one of its own
	Name   string // empty: "Simulated GPU n"
	Memory uint64 // bytes; zero: 16 GiB
}

// Link gives the device From access to the memory of the device To, both by their place in Machine.Devices.
type Link struct {
	From, To int
	// PCIe says that the link is PCIe, and not XGMI. (What CUDA tells of its links is their rank alone.)
	PCIe bool
	Hops int // zero: one
}

// Sim is a simulated machine.
type Sim struct {
	Dir     string // holds nothing but the machine
	Library string // the path of the runtime's library, for gpu.Options
	Devices []Device

	tb      testing.TB
	mu      sync.Mutex
	edition uint64
}

// New makes a machine, which is gone when the test has ended. It fails the test if there is no C compiler.
func New(tb testing.TB, m Machine) *Sim {
	tb.Helper()
	if !slices.Contains([]string{"", "hip", "cuda"}, m.Runtime) {
		tb.Fatalf("there is no runtime %q to simulate", m.Runtime)
	}
	if len(m.Devices) > maxDevices {
		tb.Fatalf("%d devices; a simulated machine has room for %d", len(m.Devices), maxDevices)
	}
	m = m.complete()
	s := &Sim{Dir: tb.TempDir(), Devices: m.Devices, tb: tb}
	s.Library = filepath.Join(s.Dir, m.soname())
	library, err := compiled(m.flags())
	if err != nil {
		tb.Fatal(err)
	}
	// A copy, not a link: the linker of a process tells libraries apart by their files.
	s.write(filepath.Base(s.Library), library)
	if m.Runtime == "cuda" {
		if err := os.Symlink(filepath.Base(s.Library), filepath.Join(s.Dir, "libcuda.so.1")); err != nil {
			tb.Fatal(err)
		}
	}
	s.write("machine", m.text())
	s.write("edition", make([]byte, 8))
	return s
}

func (s *Sim) write(name string, content []byte) {
	s.tb.Helper()
	if err := os.WriteFile(filepath.Join(s.Dir, name), content, 0o600); err != nil {
		s.tb.Fatal(err)
	}
}

// complete fills in what the zero values stand for.
func (m Machine) complete() Machine {
	m.Runtime = cmp.Or(m.Runtime, "hip")
	m.Version = cmp.Or(m.Version, map[string]int{"hip": 70125424, "cuda": 12080}[m.Runtime])
	if m.Devices == nil {
		m.Devices = make([]Device, 2)
	}
	m.Devices = slices.Clone(m.Devices)
	for i := range m.Devices {
		d := &m.Devices[i]
		d.PCI = cmp.Or(d.PCI, fmt.Sprintf("0000:%02x:00.0", 0xc1+i))
		d.Name = cmp.Or(d.Name, fmt.Sprintf("Simulated GPU %d", i))
		d.Memory = cmp.Or(d.Memory, 16<<30)
	}
	if m.Links == nil {
		for from := range m.Devices {
			for to := range m.Devices {
				if from != to {
					m.Links = append(m.Links, Link{From: from, To: to})
				}
			}
		}
	}
	return m
}

// soname returns the name that the linker knows the real library by.
func (m Machine) soname() string {
	if m.Runtime == "cuda" {
		return fmt.Sprintf("libcudart.so.%d", m.Version/1000)
	}
	return fmt.Sprintf("libamdhip64.so.%d", m.Version/10_000_000)
}

// flags returns what makes the library of the runtime and the version, less the calls that it lacks: those are compiled under
// another name.
func (m Machine) flags() []string {
	flags := []string{fmt.Sprintf("-DVERSION=%d", m.Version)}
	missing, batches := slices.Clone(m.Missing), m.Version >= 12080
	if m.Runtime == "hip" {
		flags, batches = append(flags, "-DHIP"), m.Version >= 70100000
	}
	if !batches {
		missing = append(missing, m.Runtime+"MemcpyBatchAsync")
	}
	if m.ContextForPointers {
		flags = append(flags, "-DCONTEXT_FOR_POINTERS=true")
	}
	for _, name := range missing {
		flags = append(flags, fmt.Sprintf("-D%s=missing_%s", name, name))
	}
	return flags
}

// text returns the file that the library reads.
func (m Machine) text() []byte {
	var b strings.Builder
	for _, d := range m.Devices {
		fmt.Fprintf(&b, "device %s %d %s\n", d.PCI, d.Memory, d.Name)
	}
	for _, l := range m.Links {
		kind := 4 // XGMI, as HSA counts
		if l.PCIe {
			kind = 2
		}
		fmt.Fprintf(&b, "link %d %d %d %d\n", l.From, l.To, kind, cmp.Or(l.Hops, 1))
	}
	if m.Rate != 0 {
		fmt.Fprintf(&b, "rate %d\n", m.Rate)
	}
	if m.Broken != 0 {
		fmt.Fprintf(&b, "broken %d\n", m.Broken)
	}
	return []byte(b.String())
}
