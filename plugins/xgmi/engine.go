package xgmi

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/gpu"
	"github.com/umbp/umbp/plugin-sdk/samehost"
	"github.com/umbp/umbp/plugins/xgmi/shape"
)

// engine is the samehost.Mover of an opened backend.
type engine struct {
	rt       *gpu.Runtime
	settings settings
	log      backend.Logger
	devices  []*device
	links    []backend.Link
	counts   counts
	tests    tests
	loans    loans
	// instance is what the engine moves for. It is set before the first guest can ask for anything.
	instance *samehost.Instance
}

const (
	// partOps bounds a part by what it takes to submit: a few microseconds for each copy, so that a part of small copies
	// keeps the driver busy for a millisecond.
	partOps = 256
	// batchBytes is the longest copy that goes in a batch. To longer ones a call of their own is no burden.
	batchBytes = 256 << 10
	// minBatch is the least number of copies that pay for a batch, which takes longer to submit than a copy does.
	minBatch = 4
)

// openEngine finds the runtime, the devices and the links between them. Whoever calls it closes it.
func openEngine(s settings, log backend.Logger) (*engine, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	rt, err := gpu.Open(s.gpu)
	if err != nil {
		return nil, err
	}
	e := &engine{rt: rt, settings: s, log: log}
	chosen, err := s.choose(rt.Devices())
	if err != nil {
		rt.Close() // of the two errors, this one would not be the cause
		return nil, err
	}
	for _, d := range chosen {
		e.devices = append(e.devices, &device{Device: d, e: e})
	}
	e.links = e.findLinks()
	return e, nil
}

// limits is what the plans of transfers keep to. A runtime may find out late that its driver has no batches.
func (e *engine) limits() shape.Limits {
	l := shape.Limits{PartBytes: e.settings.partBytes, PartOps: partOps, MinBatch: minBatch}
	if e.settings.batch && e.rt.HasBatch() {
		l.Batch = batchBytes
	}
	return l
}

// Close implements samehost.Mover.
func (e *engine) Close() error {
	for _, d := range e.devices {
		d.close()
	}
	return e.rt.Close()
}

// hostCost is the cost of a link that goes through the host, by PCIe as a rule. It is more than the hops between GPUs
// that have links of their own.
const hostCost = 16

// findLinks lists the pairs of places that bytes can be moved between.
func (e *engine) findLinks() (links []backend.Link) {
	for _, near := range e.devices {
		links = append(links,
			backend.Link{Near: near.PCI, Cost: hostCost, Text: "GPU and host memory"},
			backend.Link{Far: near.PCI, Cost: hostCost, Text: "host memory and GPU"})
		for _, far := range e.devices {
			l, err := e.link(near, far)
			if err != nil {
				e.log.Warn("the runtime does not tell how two GPUs are linked: no bytes are moved between them",
					"backend", name, "near", near.PCI, "far", far.PCI, "error", err)
			}
			if l.Access {
				links = append(links, describeLink(near, far, l))
			}
		}
	}
	return links
}

// link is what the runtime knows of the way between two devices.
func (e *engine) link(near, far *device) (gpu.Link, error) {
	if near == far {
		return gpu.Link{Access: true, Type: "same GPU"}, nil
	}
	return e.rt.Link(near.Number, far.Number)
}

func describeLink(near, far *device, l gpu.Link) backend.Link {
	out := backend.Link{Near: near.PCI, Far: far.PCI, Text: l.Type}
	switch {
	case near == far:
	case l.Type == "" || l.Type == "PCIe":
		out.Cost = hostCost
	default:
		out.Cost = max(1, l.Hops)
	}
	switch {
	case l.Type == "":
		out.Text = "peer access"
	case l.Hops == 1:
		out.Text += ", 1 hop"
	case l.Hops > 1:
		out.Text += fmt.Sprintf(", %d hops", l.Hops)
	}
	return out
}

// device returns the device at a PCI address, or nil when this process does not use one there.
func (e *engine) device(pci string) *device {
	for _, d := range e.devices {
		if d.PCI == pci {
			return d
		}
	}
	return nil
}

// anyDevice returns a device for what any of them can do: one that is not lost, if there is one.
func (e *engine) anyDevice() *device {
	for _, d := range e.devices {
		if d.lost.Load() == nil {
			return d
		}
	}
	return e.devices[0]
}

// places names the devices in use, for errors.
func (e *engine) places() string {
	words := make([]string, len(e.devices))
	for i, d := range e.devices {
		words[i] = d.PCI
	}
	return strings.Join(words, ", ")
}

// device is a GPU that this process uses.
type device struct {
	gpu.Device
	e *engine
	// lost is why the device is not used any more.
	lost atomic.Pointer[error]

	mu     sync.Mutex
	peers  map[*device]struct{} // whose memory it can address
	driver *driver              // nil until the first path needs it
}

func (d *device) String() string { return fmt.Sprintf("GPU %s (%s)", d.PCI, d.Name) }

// run calls f on a thread that belongs to the device. Whatever takes a while to set up is done there and not by the
// driver, whose transfers would wait for it.
func (d *device) run(f func(*gpu.Context) error) error {
	if why := d.lost.Load(); why != nil {
		return *why
	}
	result := make(chan error, 1)
	go func() {
		c, err := d.e.rt.Bind(d.Number)
		if err == nil {
			err = f(c)
			c.Unbind()
		}
		result <- err
	}()
	err := <-result
	if gpu.Lost(err) {
		d.lose(err)
	}
	return err
}

// lose takes the device out of use. The first reason counts, and is logged.
func (d *device) lose(why error) {
	if d.lost.CompareAndSwap(nil, &why) {
		d.e.log.Error("a GPU is lost: it is not used any more until this process starts anew",
			"backend", name, "device", d.PCI, "name", d.Name, "error", why)
	}
}

// refusal is the error for those who want to use a device that is lost.
func (d *device) refusal(code backend.Code, why *error) *backend.Error {
	return fault(code, d.String()+" is lost to this process, which has to start anew", *why)
}

// fault is the error of a call of the runtime for the device, which may say that the device is lost.
func (d *device) fault(code backend.Code, text string, err error) *backend.Error {
	if gpu.Lost(err) {
		d.lose(err)
	}
	return fault(code, d.String()+": "+text, err)
}

// fault makes an error of what a call of the runtime returned.
func fault(code backend.Code, text string, err error) *backend.Error {
	out := &backend.Error{Code: code, Text: text, Err: err}
	if v, ok := errors.AsType[*gpu.Error](err); ok {
		out.Vendor, out.VendorText = v.Code, v.Name
	}
	return out
}

// reach lets the device address the memory of another one.
func (d *device) reach(other *device) error {
	d.mu.Lock()
	_, done := d.peers[other]
	d.mu.Unlock()
	if done || other == d {
		return nil
	}
	l, err := d.e.link(d, other)
	if err == nil && !l.Access {
		return backend.Errorf(backend.Unsupported, "%s has no access to the memory of %s", d, other)
	}
	if err == nil {
		err = d.run(func(c *gpu.Context) error { return c.EnablePeer(other.Number) })
	}
	if err != nil {
		return d.fault(backend.Unsupported, "no access to the memory of "+other.String(), err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.peers == nil {
		d.peers = make(map[*device]struct{})
	}
	d.peers[other] = struct{}{}
	return nil
}

// drive returns the driver of the device, started when it is needed for the first time.
func (d *device) drive() (*driver, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.driver == nil {
		r, err := startDriver(d)
		if err != nil {
			return nil, d.fault(backend.Unsupported, "the device cannot be used", err)
		}
		d.driver = r
	}
	return d.driver, nil
}

// close ends the driver. Nobody uses it any more.
func (d *device) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.driver != nil {
		d.driver.close()
	}
}
