package rdma

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/inuse"
	"github.com/umbp/umbp/plugins/rdma/device"
)

// Factory returns the factory of the backend over the devices of a library. It is called rdma, and rdma-simulated over
// simulated devices.
func Factory(lib device.Library) backend.Factory {
	i := info(lib, readSettings(backend.Defaults(options)))
	return backend.Factory{
		Name: i.Name, Info: &i, Options: options,
		Open: func(ctx context.Context, cfg backend.Config) (backend.Backend, error) { return open(ctx, lib, cfg) },
		Examine: func(_ context.Context, v backend.Values) []backend.Finding {
			return examine(lib, readSettings(v), readLimits())
		},
	}
}

// maxSegments bounds the segments of one transfer: 256 MiB in pages of 4 KiB.
const maxSegments = 65536

// info is what the backend is with these settings. It touches no device.
func info(lib device.Library, s settings) backend.Info {
	i := backend.Info{
		Name:    "rdma",
		Version: "1.0.0",
		Capabilities: backend.Capabilities{
			Ops:    backend.Write | backend.Read,
			Local:  backend.Kinds(backend.HostMemory),
			Remote: backend.Kinds(backend.HostMemory),
			Reach:  backend.Network,
			Limits: backend.Limits{Segments: maxSegments},
			Window: s.window,
		},
	}
	if lib.Simulated() {
		i.Name, i.Capabilities.Simulated = "rdma-simulated", true
		i.Capabilities.Reach = backend.SameProcess // the network of the devices is within one
	}
	return i
}

// transport is the backend: the initiator of its endpoints, and the target of the connections it serves.
type transport struct {
	lib      device.Library
	self     backend.Peer
	settings settings
	log      backend.Logger
	info     backend.Info
	counts   counts
	limits   func() hostLimits
	part     uint64 // bytes of one memory region of the devices
	regions  inuse.Table[region]
	breakers breakers
	served   connections

	ctx     context.Context // ends when Close is called
	end     context.CancelFunc
	running sync.WaitGroup // goroutines and calls that Close waits for before it takes anything apart
	quiet   chan struct{}  // closed when Close is through

	memory sync.Mutex // held while regions are registered with devices or unregistered

	mu         sync.Mutex
	closed     bool
	slots      []slot
	endpoints  map[*endpoint][]*path
	handshakes map[*handshake]struct{} // neither established nor abandoned
}

// slot is the place of a rail.
type slot struct {
	spec       railSpec
	rail       *rail // nil while it is lost
	generation uint32
	reason     error // why it is lost
	closing    bool  // the device of the rail that was lost is not closed yet
}

func open(ctx context.Context, lib device.Library, cfg backend.Config) (backend.Backend, error) {
	s := readSettings(cfg.Options)
	t := &transport{
		lib:        lib,
		self:       cfg.Self,
		settings:   s,
		log:        cfg.Log,
		info:       info(lib, s),
		limits:     readLimits,
		quiet:      make(chan struct{}),
		endpoints:  make(map[*endpoint][]*path),
		handshakes: make(map[*handshake]struct{}),
	}
	t.breakers = breakers{settings: &t.settings, now: time.Now, m: make(map[breakerKey]*breaker)}
	t.served = connections{t: t, m: make(map[uint64]*served), limit: s.maxConnections}
	if t.log == nil {
		t.log = slog.New(slog.DiscardHandler)
	}
	if err := checkPeer(t.self); err != nil {
		return nil, t.fault("open", backend.Peer{}, err)
	}
	if err := ctx.Err(); err != nil {
		return nil, t.fault("open", backend.Peer{}, err)
	}
	t.ctx, t.end = context.WithCancel(context.Background())
	if err := t.openRails(); err != nil {
		t.end()
		return nil, t.fault("open", backend.Peer{}, &backend.Error{Code: backend.Unsupported, Err: err})
	}
	t.running.Go(t.watch)
	return t, nil
}

// openRails opens every rail, or none.
func (t *transport) openRails() error {
	specs, err := findRails(t.lib, t.settings.devices)
	if err != nil {
		return err
	}
	var rails []*rail
	usable := false
	var reasons several
	for i, spec := range specs {
		r, err := openRail(t.lib, spec, i, 1, &t.settings)
		if err == nil {
			if r.prober, err = newProber(t, r); err != nil {
				err = errors.Join(err, r.close())
			}
		}
		if err != nil {
			for _, r := range rails {
				r.prober.close()
				r.close()
			}
			return fmt.Errorf("open %s: %w", spec, err)
		}
		rails = append(rails, r)
		reasons = append(reasons, r.at.Load().err)
		usable = usable || r.at.Load().err == nil
	}
	if !usable {
		for _, r := range rails {
			r.prober.close()
			r.close()
		}
		return reasons
	}
	t.part = partSize(rails)
	for i, r := range rails {
		t.slots = append(t.slots, slot{spec: specs[i], rail: r, generation: 1})
		t.announce(r)
		t.start(r)
	}
	t.log.Info("RDMA devices are open", "backend", t.info.Name, "library", t.lib.Name(), "rails", len(rails), "fork", forkWords(t.lib.Fork()))
	return nil
}

// partSize is the largest power of two that every device takes as one memory region.
func partSize(rails []*rail) uint64 {
	part := uint64(1) << 63
	for _, r := range rails {
		if r.attr.MaxMRSize != 0 {
			part = min(part, 1<<(bits.Len64(r.attr.MaxMRSize)-1))
		}
	}
	return part
}

// announce logs what a rail is, and where it grants less than the options ask for.
func (t *transport) announce(r *rail) {
	at, s := r.at.Load(), &t.settings
	where := describeGID(at.gid)
	if at.err != nil {
		where = at.err.Error()
	}
	t.log.Info("RDMA port", "backend", t.info.Name, "port", r.name, "index", r.index, "firmware", r.attr.Firmware,
		"link", at.port.Link.String(), "mtu", at.port.MTU, "gid_index", at.gid.Index, "gid", where)
	for _, ask := range []struct {
		what         string
		asked, grant int
	}{
		{"send_queue", s.sendQueue, r.attr.MaxWR},
		{"sges of a write", s.sges, r.attr.MaxSGE},
		{"sges of a read", s.sges, r.attr.MaxSGERead},
		{"mtu", s.mtu, at.port.MTU},
	} {
		if ask.asked > ask.grant {
			t.log.Info("an RDMA device grants less than was asked for", "backend", t.info.Name, "port", r.name,
				"what", ask.what, "asked", ask.asked, "granted", ask.grant)
		}
	}
}

func forkWords(f device.Fork) string {
	switch f {
	case device.ForkUnneeded:
		return "the kernel keeps registered memory out of harm"
	case device.ForkEnabled:
		return "the library keeps registered memory out of a child, which costs mappings (vm.max_map_count)"
	}
	return "a fork may take registered memory away from the devices"
}

// start starts what attends to a rail.
func (t *transport) start(r *rail) {
	r.attended = make(chan struct{})
	go t.attend(r)
	r.prober.start()
}

func checkPeer(p backend.Peer) error {
	switch {
	case p.Node == "":
		return backend.Errorf(backend.BadRequest, "a peer has no node name")
	case p.Incarnation == 0:
		return backend.Errorf(backend.BadRequest, "node %q has no incarnation", p.Node)
	}
	return nil
}

// fault returns err as an error of this backend about a peer, which may be zero. The code stays.
func (t *transport) fault(op string, peer backend.Peer, err error) *backend.Error {
	if own, ok := err.(*backend.Error); ok {
		e := *own
		e.Backend, e.Op, e.Peer = t.info.Name, op, peer
		return &e
	}
	return &backend.Error{Code: backend.CodeOf(err), Backend: t.info.Name, Op: op, Peer: peer, Err: err}
}

var errClosed = backend.Errorf(backend.PathDown, "the backend is closed")

// begin counts the caller as running, unless the backend is closed.
func (t *transport) begin() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.running.Add(1)
	return true
}

// rails returns the rails that are not lost.
func (t *transport) rails() []*rail {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []*rail
	for i := range t.slots {
		if r := t.slots[i].rail; r != nil {
			all = append(all, r)
		}
	}
	return all
}

// Info implements backend.Backend.
func (t *transport) Info() backend.Info { return t.info }

// Register implements backend.Backend. It pins the memory once for each rail.
func (t *transport) Register(ctx context.Context, m backend.Memory) ([]byte, error) {
	refuse := func(err error) ([]byte, error) {
		e := t.fault("register", backend.Peer{}, err)
		e.Region = m.Region
		return nil, e
	}
	const rights = backend.RemoteRead | backend.RemoteWrite
	switch {
	case m.Kind != backend.HostMemory:
		return refuse(backend.Errorf(backend.Unsupported, "only host memory can be registered, not %s", m.Kind))
	case m.Region == 0:
		return refuse(backend.Errorf(backend.BadRequest, "the region has no id"))
	case len(m.Bytes) == 0:
		return refuse(backend.Errorf(backend.BadRequest, "the region has no bytes"))
	case m.Rights&^rights != 0:
		return refuse(backend.Errorf(backend.BadRequest, "the region gives rights that do not exist"))
	case parts(uint64(len(m.Bytes)), t.part) > maxParts:
		return refuse(backend.Errorf(backend.Unsupported, "the region has %s, and the devices take %s at once, %d times at most",
			backend.Size(len(m.Bytes)), backend.Size(t.part), maxParts))
	}
	if !t.begin() {
		return refuse(errClosed)
	}
	defer t.running.Done()
	t.memory.Lock()
	defer t.memory.Unlock()
	if t.regions.Get(m.Region) != nil {
		return refuse(backend.Errorf(backend.BadRequest, "a region of this id is registered already"))
	}
	r := newRegion(&m, t.part, len(t.slots))
	if err := t.pin(ctx, r); err != nil {
		return refuse(err)
	}
	t.regions.Add(r.id, r)
	if m.Rights == 0 {
		return nil, nil
	}
	return appendKey(nil, t.key(r)), nil
}

// pin registers a region on every rail, or none. The caller holds t.memory.
func (t *transport) pin(ctx context.Context, r *region) error {
	rails := t.rails()
	var limits hostLimits
	if !t.lib.Simulated() {
		limits = t.limits()
		if err := limits.checkPinning(r.size, len(rails), int(parts(r.size, r.part))); err != nil {
			return err
		}
	}
	for _, rail := range rails {
		g, err := rail.register(ctx, r.bytes, r.part, access(r.rights))
		switch {
		case err == nil:
			r.rails[rail.index].Store(g)
		case rail.ctx.Err() != nil:
			// It was lost meanwhile. When the device is opened again, the region is registered with it.
		default:
			return errors.Join(limits.explainPinning(fmt.Errorf("%s: %w", rail.name, err), r.size, len(rails)), t.unpin(r))
		}
	}
	return nil
}

// unpin unregisters a region. After an error it can be called again. The caller holds t.memory.
func (t *transport) unpin(r *region) error {
	for i := range r.rails {
		g := r.rails[i].Load()
		if g == nil {
			continue
		}
		if err := g.close(); err != nil {
			return &backend.Error{Code: backend.Internal, Text: "a device does not give the memory back", Err: fmt.Errorf("%s: %w", g.rail.name, err)}
		}
		r.rails[i].Store(nil)
	}
	return nil
}

// remove drops a region that nobody uses any more, and no device has. The caller holds t.memory.
func (t *transport) remove(r *region) {
	if t.regions.Remove(r.id, r) {
		r.bytes = nil
	}
}

// key returns the key of a region. The caller holds t.memory.
func (t *transport) key(r *region) *remoteKey {
	k := &remoteKey{
		incarnation: t.self.Incarnation, region: r.id, size: r.size, rights: r.rights, base: r.base, part: r.part,
		rails: make([]railKeys, len(r.rails)),
	}
	for i := range r.rails {
		if g := r.rails[i].Load(); g != nil {
			k.rails[i] = railKeys{generation: g.rail.generation, rkeys: g.rkeys}
		}
	}
	return k
}

// Deregister implements backend.Backend. It lets what uses the region finish, and breaks it when ctx ends first; so it
// always ends quiet, unless a device fails to let go of the memory.
func (t *transport) Deregister(ctx context.Context, id backend.RegionID) error {
	r := t.regions.Get(id)
	if r == nil {
		return nil
	}
	unused := r.users.Shut()
	select {
	case <-unused:
	case <-ctx.Done():
		t.failEndpoints(backend.Errorf(backend.PathDown, "region %d was deregistered during a transfer", id), false,
			func(e *endpoint, _ []*path) bool { return e.uses(r) })
		<-unused
	}
	t.memory.Lock()
	defer t.memory.Unlock()
	if err := t.unpin(r); err != nil {
		e := t.fault("deregister", backend.Peer{}, err)
		e.Region = id
		return e
	}
	t.remove(r)
	return nil
}

// failEndpoints fails the endpoints that are chosen, and returns them.
func (t *transport) failEndpoints(cause *backend.Error, fatal bool, chosen func(*endpoint, []*path) bool) []*endpoint {
	t.mu.Lock()
	var all []*endpoint
	for e, paths := range t.endpoints {
		if chosen(e, paths) {
			all = append(all, e)
		}
	}
	t.mu.Unlock()
	for _, e := range all {
		e.fail(cause, fatal)
	}
	return all
}

// adopt makes an endpoint of paths that are proven.
func (t *transport) adopt(peer backend.Peer, paths []*path) (*endpoint, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, errClosed
	}
	for _, p := range paths {
		if t.slots[p.rail.index].rail != p.rail {
			return nil, lostRail(p.rail) // whoever fails the endpoints of a rail would miss this one
		}
	}
	e := t.newEndpoint(peer, paths)
	t.endpoints[e] = paths
	return e, nil
}

// forget is called by an endpoint that has ended, whose queue pairs and completion queues are closed.
func (t *transport) forget(e *endpoint) {
	t.mu.Lock()
	paths := t.endpoints[e]
	delete(t.endpoints, e)
	t.mu.Unlock()
	for _, p := range paths {
		p.rail.users.Leave()
	}
}

// report is told by an endpoint which status broke one of its paths.
func (t *transport) report(r *rail, peer backend.Peer, status device.Status) {
	t.breakers.broke(r.index, peer, status)
}

// Fence implements backend.Backend: it destroys the queue pairs that serve the peer, after which nothing of it can land.
// Those of a device that has failed are certain to be gone only when it is closed.
func (t *transport) Fence(_ context.Context, peer backend.Peer) error {
	if err := t.served.drop(func(c *served) bool {
		return c.peer.Node == peer.Node && c.peer.Incarnation == peer.Incarnation
	}); err != nil {
		return t.fault("fence", peer, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.slots {
		if s.closing {
			return t.fault("fence", peer, &backend.Error{Code: backend.Busy, Text: "a device that has failed is being closed", Err: s.reason})
		}
	}
	return nil
}

// Close implements backend.Backend.
func (t *transport) Close() error {
	t.mu.Lock()
	first := !t.closed
	t.closed = true
	var idle []*handshake
	for h := range t.handshakes {
		idle = append(idle, h)
	}
	t.mu.Unlock()
	if !first {
		<-t.quiet
		return nil
	}
	t.end()
	for _, h := range idle {
		h.Abandon()
	}
	for _, e := range t.failEndpoints(errClosed, false, func(*endpoint, []*path) bool { return true }) {
		e.Close()
	}
	t.running.Wait()
	rails := t.rails()
	for _, r := range rails {
		r.spent.Store(true)
		r.lose(errClosed)
	}
	err := t.served.drop(func(*served) bool { return true })
	t.memory.Lock()
	defer t.memory.Unlock()
	for _, r := range t.regions.All() {
		<-r.users.Shut()
		err = errors.Join(err, t.unpin(r))
		t.remove(r)
	}
	for _, r := range rails {
		err = errors.Join(err, t.shut(r))
	}
	close(t.quiet)
	if err != nil {
		return t.fault("close", backend.Peer{}, err)
	}
	return nil
}

// shut closes a rail that is lost, when the last user has left it.
func (t *transport) shut(r *rail) error {
	<-r.users.Shut()
	err := errors.Join(r.prober.close(), r.close())
	if !errors.Is(err, syscall.EBUSY) { // a device that is not closed has no end of events
		<-r.attended
	}
	return err
}

// attend is the goroutine that hears of the events of a rail's device.
func (t *transport) attend(r *rail) {
	defer close(r.attended)
	for {
		ev, err := r.dev.NextEvent()
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			t.loseRail(r, fmt.Errorf("its events cannot be had any more: %w", err))
			return
		}
		t.heed(r, ev)
	}
}

// heed does what an event calls for.
func (t *transport) heed(r *rail, ev device.Event) {
	own := ev.Port == r.port.Number
	switch {
	case ev.Kind == device.DeviceFatal:
		r.spent.Store(true)
		t.loseRail(r, errors.New("the device has failed ("+ev.Text+")"))
	case ev.Kind == device.CQFailed && ev.CQ != nil && ev.CQ == r.prober.cq:
		t.loseRail(r, errors.New("the completion queue of the connections that it serves has failed"))
	case ev.Kind == device.CQFailed && ev.CQ != nil:
		t.failEndpoints(backend.Errorf(backend.PathDown, "%s: a completion queue has failed", r.name), true,
			func(_ *endpoint, paths []*path) bool {
				return slices.ContainsFunc(paths, func(p *path) bool { return p.cq == ev.CQ })
			})
	case ev.Kind == device.QPFailed:
		t.failEndpoints(backend.Errorf(backend.PathDown, "%s: queue pair %#x has failed (%s)", r.name, ev.QPN, ev.Text), false,
			func(_ *endpoint, paths []*path) bool {
				return slices.ContainsFunc(paths, func(p *path) bool { return p.rail == r && slices.Contains(p.nums, ev.QPN) })
			})
		t.dropServed(func(c *served) bool { return c.has(r, ev.QPN) })
	case own && (ev.Kind == device.PortDown || ev.Kind == device.PortUp || ev.Kind == device.GIDChange):
		if r.locate(&t.settings) {
			t.breakers.reset(r.index)
			t.announce(r)
		}
		if ev.Kind == device.PortDown {
			t.log.Warn("an RDMA port is down", "backend", t.info.Name, "port", r.name)
			t.failEndpoints(backend.Errorf(backend.PathDown, "%s is down", r.name), false, overRail(r))
		}
	}
}

func overRail(r *rail) func(*endpoint, []*path) bool {
	return func(_ *endpoint, paths []*path) bool {
		return slices.ContainsFunc(paths, func(p *path) bool { return p.rail == r })
	}
}

// dropServed drops served connections outside a Fence, where an error is only to be known of.
func (t *transport) dropServed(chosen func(*served) bool) {
	if err := t.served.drop(chosen); err != nil {
		t.log.Warn("a connection that was served could not be ended", "backend", t.info.Name, "error", err)
	}
}

// loseRail takes a rail out of use whose device has failed, the first time that it is called for it. What was in flight
// over it fails at once: no completion will tell.
func (t *transport) loseRail(r *rail, cause error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := &t.slots[r.index]
	if t.closed || s.rail != r {
		return
	}
	s.rail, s.closing, s.reason = nil, true, fmt.Errorf("%s: %w", r.name, cause)
	t.running.Add(1)
	go t.replace(r, s.reason)
}

// replace takes a lost rail apart and opens its device again, as often as it takes.
func (t *transport) replace(r *rail, cause error) {
	defer t.running.Done()
	t.log.Error("an RDMA device was lost", "backend", t.info.Name, "port", r.name, "error", cause)
	r.lose(cause)
	down := &backend.Error{Code: backend.PathDown, Err: cause}
	for _, e := range t.failEndpoints(down, true, overRail(r)) {
		e.Close()
	}
	t.mu.Lock()
	handshakes := make([]*handshake, 0, len(t.handshakes))
	for h := range t.handshakes {
		handshakes = append(handshakes, h)
	}
	t.mu.Unlock()
	for _, h := range handshakes {
		h.drop(r)
	}
	t.vacate(r)
	t.memory.Lock() // nothing reaches the regions over this rail any more, whether its device gives them back or not
	for _, region := range t.regions.All() {
		if g := region.rails[r.index].Swap(nil); g != nil {
			if err := g.close(); err != nil {
				t.log.Debug("a lost RDMA device did not give memory back", "backend", t.info.Name, "port", r.name, "error", err)
			}
		}
	}
	t.memory.Unlock()
	if err := t.shut(r); err != nil {
		t.log.Warn("a lost RDMA device was not closed in order", "backend", t.info.Name, "port", r.name, "error", err)
	}
	t.mu.Lock()
	t.slots[r.index].closing = false
	t.mu.Unlock()
	for n := 1; ; n++ {
		select {
		case <-t.ctx.Done():
			return
		case <-time.After(jitter(backoff(t.settings.breakerPause, t.settings.breakerMaxPause, n))):
		}
		err := t.reopen(r.index)
		if err == nil {
			return
		}
		t.log.Debug("an RDMA device cannot be opened again yet", "backend", t.info.Name, "port", r.name, "error", err)
	}
}

// vacate returns when nobody has anything of a lost rail any more. Queue pairs that serve peers, and are not destroyed at
// once, are tried again, up to the end of the backend.
func (t *transport) vacate(r *rail) {
	unused, closing := r.users.Shut(), t.ctx.Done()
	for pause := time.Millisecond; ; pause = min(2*pause, time.Second) {
		t.dropServed(func(c *served) bool { return c.over(r) })
		select {
		case <-unused:
			return
		case <-closing:
			r.spent.Store(true)
			closing = nil
		case <-time.After(pause):
		}
	}
}

// reopen opens the device of a slot again, and registers all regions with it.
func (t *transport) reopen(index int) (err error) {
	t.mu.Lock()
	spec, generation := t.slots[index].spec, t.slots[index].generation+1
	t.mu.Unlock()
	r, err := openRail(t.lib, spec, index, generation, &t.settings)
	if err != nil {
		return err
	}
	if r.prober, err = newProber(t, r); err != nil {
		return errors.Join(err, r.close())
	}
	t.memory.Lock()
	defer t.memory.Unlock()
	defer func() {
		if err != nil {
			for _, region := range t.regions.All() {
				if g := region.rails[index].Swap(nil); g != nil {
					err = errors.Join(err, g.close())
				}
			}
			err = errors.Join(err, r.prober.close(), r.close())
		}
	}()
	if r.attr.MaxMRSize != 0 && r.attr.MaxMRSize < t.part {
		return fmt.Errorf("%s has come back with memory regions of %d bytes only", spec, r.attr.MaxMRSize)
	}
	for _, region := range t.regions.All() {
		g, err := r.register(t.ctx, region.bytes, region.part, access(region.rights))
		if err != nil {
			return err
		}
		region.rails[index].Store(g)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return errClosed
	}
	t.slots[index] = slot{spec: spec, rail: r, generation: generation}
	t.breakers.reset(index)
	t.start(r)
	t.announce(r)
	t.log.Info("a lost RDMA device is open again", "backend", t.info.Name, "port", r.name)
	return nil
}

// watch is the janitor: it has the connections that are served probed.
func (t *transport) watch() {
	tick := time.NewTicker(min(max(t.settings.probe/4, 10*time.Millisecond), time.Second))
	defer tick.Stop()
	for {
		select {
		case <-t.ctx.Done():
			return
		case now := <-tick.C:
			t.served.probe(now)
		}
	}
}

// several are the errors of several rails: why none can be used.
type several []error

func (all several) Error() string {
	texts := make([]string, len(all))
	for i, err := range all {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}

// Unwrap returns them all, for errors.Is and errors.As.
func (all several) Unwrap() []error { return all }

// code is Busy when one of them is: there is a rail to wait for. Otherwise it is that of the first one with an identity.
func (all several) code() backend.Code {
	code := backend.PathDown
	for i := len(all) - 1; i >= 0; i-- {
		switch c := backend.CodeOf(all[i]); c {
		case backend.Busy:
			return c
		case backend.Internal:
		default:
			code = c
		}
	}
	return code
}

// with is err, and what went wrong after it, if anything did.
func with(err, next error) error {
	if next == nil {
		return err
	}
	return several{err, next}
}
