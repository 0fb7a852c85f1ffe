package rdma

import (
	"errors"
	"fmt"
	"slices"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/device"
)

// examine looks at what the backend needs on this machine: the library, devices, ports and GIDs, and limits.
func examine(lib device.Library, s settings, limits hostLimits) []backend.Finding {
	names, err := lib.Devices()
	if err != nil {
		return []backend.Finding{unusable("library", err)}
	}
	findings := []backend.Finding{{Subject: "library", Text: lib.Name()}}
	used, err := findRails(lib, s.devices)
	if err != nil {
		findings = append(findings, unusable("devices", err))
	}
	usable := false
	for _, name := range names {
		found, ok := examineDevice(lib, name, used, &s)
		findings = append(findings, found...)
		usable = usable || ok
	}
	if err == nil && !usable {
		findings = append(findings, backend.Finding{Subject: "devices", State: backend.Problem,
			Text: "no port can be used", Remedy: "see the ports above"})
	}
	return append(findings, examineMemory(limits, lib.Simulated()), examineFork(lib.Fork()))
}

// unusable is the finding of an error that keeps the backend from working.
func unusable(subject string, err error) backend.Finding {
	if m, ok := errors.AsType[*device.Missing](err); ok {
		return backend.Finding{Subject: subject, State: backend.Problem, Text: m.What, Remedy: m.Remedy}
	}
	return backend.Finding{Subject: subject, State: backend.Problem, Text: err.Error()}
}

// examineDevice opens a device for a moment. It tells whether one of its ports can be used.
func examineDevice(lib device.Library, name string, used []railSpec, s *settings) (findings []backend.Finding, usable bool) {
	subject := "device " + name
	d, err := lib.Open(name)
	if err != nil {
		return []backend.Finding{{Subject: subject, State: backend.Warning, Text: err.Error(),
			Remedy: "see that this user may open /dev/infiniband/uverbs*, also within a container"}}, false
	}
	defer d.Close()
	a := d.Attr()
	regions := "any size"
	if a.MaxMRSize < plenty {
		regions = backend.Size(a.MaxMRSize).String()
	}
	findings = append(findings, backend.Finding{Subject: subject, Text: fmt.Sprintf(
		"firmware %s; ports: %d; queue pairs: %d; work requests in one: %d; SGEs: %d in a write, %d in a read; reads at once: %d; memory regions of %s",
		a.Firmware, a.Ports, a.MaxQP, a.MaxWR, a.MaxSGE, a.MaxSGERead, a.MaxReadsInitiated, regions)})
	for n := 1; n <= a.Ports; n++ {
		f, ok := examinePort(d, railSpec{name, n}, used, s)
		findings = append(findings, f)
		usable = usable || ok
	}
	return findings, usable
}

func examinePort(d device.Device, spec railSpec, used []railSpec, s *settings) (f backend.Finding, usable bool) {
	f.Subject = "port " + spec.String()
	p, err := d.Port(spec.port)
	var gids []device.GID
	if err == nil {
		gids, err = d.GIDs(spec.port)
	}
	if err != nil {
		f.State, f.Text = backend.Warning, err.Error()
		return f, false
	}
	f.Text = fmt.Sprintf("%s, %s, MTU %d, messages of %s", p.State, p.Link, p.MTU, backend.Size(p.MaxMessage))
	if p.Rate > 0 {
		f.Text += fmt.Sprintf(", %g Gbit/s", float64(p.Rate)/1000)
	}
	chosen, err := chooseGID(p.Link, gids, s.gidIndex)
	for _, g := range gids {
		f.Text += fmt.Sprintf("; GID %d: %s", g.Index, describeGID(g))
		if g.Interface != "" {
			f.Text += " on " + g.Interface
		}
		if err == nil && g == chosen {
			f.Text += " (chosen)"
		}
	}
	wanted := slices.Contains(used, spec)
	switch {
	case !p.Active:
		f.State, f.Remedy = backend.Warning, "plug the cable in, or set the network interface of the device up"
		if !wanted {
			f.State = backend.Fine // one of several ports that nobody uses
			f.Remedy = ""
		}
	case !wanted:
		f.Text += "; not used (option devices)"
	case err != nil:
		f.State, f.Remedy = backend.Warning, err.Error()
	case p.Link == device.Ethernet && rank(chosen) > 1 && s.gidIndex < 0:
		f.State = backend.Warning
		f.Remedy = "the GID chosen does not reach beyond the link: give the network interface a routable address"
		usable = true
	default:
		usable = true
	}
	return f, usable
}

// plenty is as many bytes as are never a limit in practice.
const plenty = 1 << 40

func examineMemory(l hostLimits, simulated bool) backend.Finding {
	f := backend.Finding{Subject: "locked memory"}
	switch {
	case simulated:
		f.Text = "simulated devices lock none"
	case l.exempt:
		f.Text = "without limit, by CAP_IPC_LOCK"
	case l.memlock == unlimited:
		f.Text = "without limit (RLIMIT_MEMLOCK)"
	default:
		f.Text = fmt.Sprintf("%s at most (RLIMIT_MEMLOCK); every region needs its size, once for each port in use", backend.Size(l.memlock))
		if l.memlock < plenty {
			f.State, f.Remedy = backend.Warning, lockRemedy
		}
	}
	return f
}

func examineFork(state device.Fork) backend.Finding {
	f := backend.Finding{Subject: "fork", Text: forkWords(state)}
	if state == device.ForkDisabled {
		f.State, f.Remedy = backend.Warning, "use Linux 5.12 or later, where the kernel copies registered pages at fork"
	}
	return f
}
