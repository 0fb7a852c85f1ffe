package rdma

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/inuse"
	"github.com/umbp/umbp/plugins/rdma/device"
)

// rail is one port of a device, as it was opened. A device that failed for good is opened again as a new rail, of the
// same index and the next generation; the old one is never repaired.
type rail struct {
	index      int    // the same in keys, offers and answers
	generation uint32 // counts from 1 how often the device was opened
	name       string // "mlx5_0 port 1"
	dev        device.Device
	attr       device.Attr
	port       device.Port // when it was opened

	at atomic.Pointer[station]

	// ctx ends when the rail is lost; its cause says why. users are those who have objects of the device: when the gate
	// is shut and drained, it can be closed.
	ctx   context.Context
	lose  context.CancelCauseFunc
	users inuse.Gate

	// spent is set when the device has failed, and with that ended its work, or when the backend closes. What it does not
	// destroy then is left to it; of any other device it is tried until it succeeds.
	spent atomic.Bool

	proof  *scratch // that peers read to see that they have reached this process
	prober *prober

	attended chan struct{} // closed when the goroutine that hears of the device's events has ended
}

// station is where a rail is in its network.
type station struct {
	port device.Port
	gid  device.GID
	err  error // why the port cannot be used at present; nil when it can
}

// railSpec names a port that is to be used, wherever it may be opened.
type railSpec struct {
	device string
	port   int
}

func (s railSpec) String() string { return s.device + " port " + strconv.Itoa(s.port) }

// openRail opens a device for the use of one of its ports.
func openRail(lib device.Library, spec railSpec, index int, generation uint32, s *settings) (*rail, error) {
	dev, err := lib.Open(spec.device)
	if err != nil {
		return nil, err
	}
	r := &rail{index: index, generation: generation, name: spec.String(), dev: dev, attr: dev.Attr()}
	r.ctx, r.lose = context.WithCancelCause(context.Background())
	if r.port, err = dev.Port(spec.port); err == nil {
		r.locate(s)
		r.proof, err = newScratch(dev, proofPage, device.LocalWrite|device.RemoteRead)
	}
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	rand.Read(r.proof.bytes[:proofSize])
	for i := proofSize; i < proofPage; i += proofSize {
		copy(r.proof.bytes[i:], r.proof.bytes[:proofSize])
	}
	return r, nil
}

// close frees what the rail has of its own. Nobody uses the device any more.
func (r *rail) close() error { return errors.Join(r.proof.close(), r.dev.Close()) }

// locate asks the device where the rail is now, and tells whether that has changed. A rail that is lost is asked no more:
// its device may be closed.
func (r *rail) locate(s *settings) bool {
	if !r.users.Enter() {
		return false
	}
	defer r.users.Leave()
	now := &station{}
	if now.port, now.err = r.dev.Port(r.port.Number); now.err == nil {
		var gids []device.GID
		if gids, now.err = r.dev.GIDs(r.port.Number); now.err == nil {
			now.gid, now.err = chooseGID(now.port.Link, gids, s.gidIndex)
		}
		if !now.port.Active {
			now.err = fmt.Errorf("the port is %s", now.port.State)
		}
	}
	if now.err != nil {
		now.err = fmt.Errorf("%s: %w", r.name, now.err)
	}
	before := r.at.Swap(now)
	return before == nil || before.gid != now.gid || before.port.LID != now.port.LID || (before.err == nil) != (now.err == nil)
}

// chooseGID returns the GID to use on a port. On Ethernet, a GID that packets can be routed by comes before one that
// is good on one link only, and RoCEv2 before RoCEv1, which no router carries. On InfiniBand, the first one is the
// port's own.
func chooseGID(link device.Link, gids []device.GID, index int) (device.GID, error) {
	if link != device.InfiniBand && link != device.Ethernet {
		return device.GID{}, errors.New("the port is on neither InfiniBand nor Ethernet")
	}
	if link == device.InfiniBand && index < 0 {
		index = 0
	}
	gids = slices.DeleteFunc(slices.Clone(gids), func(g device.GID) bool { return g.Addr == [16]byte{} })
	if index >= 0 {
		for _, g := range gids {
			if g.Index == index {
				return g, nil
			}
		}
		return device.GID{}, fmt.Errorf("the port has no GID of index %d; it has %s", index, listGIDs(gids))
	}
	if len(gids) == 0 {
		return device.GID{}, errors.New("the port has no GID: give its network interface an address")
	}
	return slices.MinFunc(gids, func(a, b device.GID) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.Index, b.Index))
	}), nil
}

// rank orders GIDs of an Ethernet port, the best first.
func rank(g device.GID) int {
	addr := netip.AddrFrom16(g.Addr)
	local := addr.Unmap().IsLinkLocalUnicast()
	switch {
	case g.Type != device.GIDRoCEv2:
		return 3
	case local:
		return 2
	case addr.Is4In6():
		return 0
	}
	return 1
}

// listGIDs renders GIDs for people.
func listGIDs(gids []device.GID) string {
	if len(gids) == 0 {
		return "none"
	}
	texts := make([]string, len(gids))
	for i, g := range gids {
		texts[i] = fmt.Sprintf("%d: %s", g.Index, describeGID(g))
	}
	return strings.Join(texts, ", ")
}

func describeGID(g device.GID) string {
	return g.Type.String() + " " + netip.AddrFrom16(g.Addr).Unmap().String()
}

// findRails returns the ports that the option devices means, and opens none for good. Where it names none, they are all
// that are active.
func findRails(lib device.Library, wanted []string) ([]railSpec, error) {
	names, err := lib.Devices()
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		return nil, &device.Missing{
			What:   lib.Name() + " finds no device",
			Remedy: `load the driver of the adapter, or make a soft-RoCE device with "rdma link add rxe0 type rxe netdev DEV"`,
		}
	}
	var found []railSpec
	var faults []error
	idle := "" // ports that are not active
	look := func(name string, port int) {
		d, err := lib.Open(name)
		if err != nil {
			faults = append(faults, err)
			return
		}
		defer d.Close()
		if port > d.Attr().Ports {
			faults = append(faults, fmt.Errorf("option devices: %s has %d ports, and no port %d", name, d.Attr().Ports, port))
			return
		}
		for n := 1; n <= d.Attr().Ports; n++ {
			spec := railSpec{name, n}
			p, err := d.Port(n)
			switch {
			case port != 0 && n != port:
			case err != nil:
				faults = append(faults, err)
			case p.Active || port != 0:
				found = append(found, spec)
			default:
				idle += fmt.Sprintf("; %s is %s", spec, p.State)
			}
		}
	}
	if len(wanted) == 0 {
		for _, name := range slices.Sorted(slices.Values(names)) {
			look(name, 0)
		}
	}
	for _, text := range wanted {
		name, port, given := strings.Cut(text, ":")
		number, err := strconv.Atoi(port)
		switch {
		case !slices.Contains(names, name):
			return nil, fmt.Errorf("option devices: there is no device %q%s; there are %s", name,
				backend.DidYouMean(name, names), strings.Join(names, ", "))
		case given && (err != nil || number < 1):
			return nil, fmt.Errorf("option devices: %q names no port; write %s:1", text, name)
		}
		look(name, number)
	}
	switch {
	case len(found) == 0 && len(faults) > 0:
		return nil, errors.Join(faults...)
	case len(found) == 0:
		return nil, &device.Missing{
			What:   "no port is active" + idle,
			Remedy: "plug the cable in, or set the network interface of the device up",
		}
	case len(wanted) > 0 && len(faults) > 0:
		return nil, errors.Join(faults...) // what was asked for by name is not there
	}
	for i, spec := range found {
		if slices.Contains(found[:i], spec) {
			return nil, fmt.Errorf("option devices: %s is named twice", spec)
		}
	}
	if len(found) > maxRails {
		return nil, fmt.Errorf("there are %d active ports, more than the %d that can be used: name some in option devices", len(found), maxRails)
	}
	return found, nil
}

// register registers a region with the rail's device, in parts.
func (r *rail) register(ctx context.Context, memory []byte, part uint64, a device.Access) (*registration, error) {
	g := &registration{rail: r}
	for at := uint64(0); at < uint64(len(memory)); {
		end := at + min(part, uint64(len(memory))-at)
		err := ctx.Err()
		if err == nil {
			var mr device.MR
			if mr, err = r.dev.Register(memory[at:end], a); err == nil {
				g.mrs = append(g.mrs, mr)
				g.lkeys, g.rkeys = append(g.lkeys, mr.LKey()), append(g.rkeys, mr.RKey())
			}
		}
		if err != nil {
			return nil, errors.Join(err, g.close())
		}
		at = end
	}
	return g, nil
}

// close unregisters what is still registered. After an error it can be called again.
func (g *registration) close() error {
	for len(g.mrs) > 0 {
		last := len(g.mrs) - 1
		if err := g.mrs[last].Close(); err != nil {
			return err
		}
		g.mrs = g.mrs[:last]
	}
	return nil
}

// scratch is a little memory off the Go heap, registered with one device.
type scratch struct {
	bytes []byte
	mr    device.MR
}

func newScratch(dev device.Device, size int, a device.Access) (*scratch, error) {
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map memory: %w", err)
	}
	mr, err := dev.Register(b, a)
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(b))
	}
	return &scratch{bytes: b, mr: mr}, nil
}

// close keeps the memory mapped when the device may still touch it.
func (p *scratch) close() error {
	if err := p.mr.Close(); err != nil {
		return err
	}
	return unix.Munmap(p.bytes)
}
