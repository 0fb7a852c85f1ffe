package rdma

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/device"
)

const (
	proofSize  = 32      // random bytes of a proof
	proofPage  = 4096    // bytes that they fill, and that are read: the largest packet
	maxLanes   = 16      // queue pairs of one path
	maxReads   = 255     // outstanding on one queue pair
	maxFresh   = 4096    // regions in an answer
	maxMessage = 1 << 20 // bytes of an offer or an answer
	hopLimit   = 64
)

// path is a way to a peer: a rail of this end, connected with one of the other end. Until an endpoint takes it over it
// belongs to its handshake. The endpoint closes the queue pairs and then the completion queue, and transport.forget
// does the rest.
type path struct {
	rail *rail
	cq   device.CQ
	qps  []device.QP
	nums []uint32 // of the queue pairs
	psn  uint32   // that they send first
	at   *station // where the rail was when it was offered

	remote     int    // index of the target's rail
	generation uint32 // of that rail
	fresh      map[backend.RegionID][]uint32
	mtu        int
}

// rkeys returns what opens the parts of the peer's region over this path, or nil when it cannot be reached: the peer's
// device was opened again since the key was made, and the region is not registered with it.
func (p *path) rkeys(k *remoteKey) []uint32 {
	if p.remote < len(k.rails) && k.rails[p.remote].generation == p.generation {
		return k.rails[p.remote].rkeys
	}
	if fresh := p.fresh[k.region]; uint64(len(fresh)) == parts(k.size, k.part) {
		return fresh
	}
	return nil
}

// end is one end of a path, as offers and answers tell of it.
type end struct {
	rail    int // index
	link    device.Link
	gidType device.GIDType
	gid     [16]byte
	lid     uint16
	mtu     int
	reads   int // of an initiator: outstanding on one queue pair; of a target: served at once on one
	psn     uint32
	qpns    []uint32
}

// offer is what the initiator sends to the target over the control plane.
type offer struct {
	initiator, target uint64 // incarnations
	ends              []end
}

// answer is what the target sends back.
type answer struct {
	target uint64 // incarnation
	paths  []answeredPath
}

// answeredPath is the target's end of one of the paths that were offered.
type answeredPath struct {
	offered int // position in the offer
	end
	generation uint32 // of the target's rail
	// The proof is read over each queue pair. Bytes that are right show that it leads to this process and that the whole
	// path works.
	proofAddress uint64
	proofKey     uint32
	proof        [proofSize]byte
	// fresh are the keys of the target's regions on a device that was opened anew, which older keys do not open.
	fresh map[backend.RegionID][]uint32
}

// encode returns, little-endian: magic[8], incarnations of initiator and target u64, number of ends u8, ends, CRC-32C u32.
func (o *offer) encode() []byte {
	b := []byte(offerMagic)
	b = binary.LittleEndian.AppendUint64(b, o.initiator)
	b = binary.LittleEndian.AppendUint64(b, o.target)
	b = append(b, byte(len(o.ends)))
	for i := range o.ends {
		b = o.ends[i].append(b)
	}
	return seal(b, 0)
}

func parseOffer(b []byte) (offer, error) {
	d := unseal(b, offerMagic)
	d.must(len(b) <= maxMessage)
	o := offer{initiator: d.uint64(), target: d.uint64()}
	n := int(d.byte())
	d.must(n != 0 && n <= maxRails)
	for i := 0; i < n && !d.bad; i++ {
		o.ends = append(o.ends, d.end())
		d.must(i == 0 || o.ends[i-1].rail < o.ends[i].rail)
	}
	if !d.complete() {
		return offer{}, backend.Errorf(backend.BadRequest, "the offer of %d bytes is damaged, or of another version of this backend", len(b))
	}
	return o, nil
}

// encode returns, little-endian: magic[8], incarnation of the target u64, number of paths u8, paths, CRC-32C u32. A path
// is its position in the offer u8, an end, generation u32, address u64, key u32 and bytes[32] of the proof, the number
// of regions with fresh keys u16, and for each of them its id u64, number of parts u16, and a u32 for each part.
func (a *answer) encode() []byte {
	b := []byte(answerMagic)
	b = binary.LittleEndian.AppendUint64(b, a.target)
	b = append(b, byte(len(a.paths)))
	for i := range a.paths {
		p := &a.paths[i]
		b = append(b, byte(p.offered))
		b = p.end.append(b)
		b = binary.LittleEndian.AppendUint32(b, p.generation)
		b = binary.LittleEndian.AppendUint64(b, p.proofAddress)
		b = binary.LittleEndian.AppendUint32(b, p.proofKey)
		b = append(b, p.proof[:]...)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(p.fresh)))
		for id, rkeys := range p.fresh {
			b = binary.LittleEndian.AppendUint64(b, uint64(id))
			b = binary.LittleEndian.AppendUint16(b, uint16(len(rkeys)))
			b = appendNumbers(b, rkeys)
		}
	}
	return seal(b, 0)
}

func parseAnswer(b []byte) (answer, error) {
	d := unseal(b, answerMagic)
	d.must(len(b) <= maxMessage)
	a := answer{target: d.uint64()}
	n := int(d.byte())
	d.must(n != 0 && n <= maxRails)
	for i := 0; i < n && !d.bad; i++ {
		p := answeredPath{offered: int(d.byte())}
		p.end = d.end()
		p.generation = d.uint32()
		p.proofAddress, p.proofKey = d.uint64(), d.uint32()
		copy(p.proof[:], d.take(proofSize))
		d.must(p.generation != 0)
		d.must(i == 0 || a.paths[i-1].offered < p.offered)
		fresh := int(d.uint16())
		d.must(fresh <= maxFresh)
		for f := 0; f < fresh && !d.bad; f++ {
			id, rkeys := backend.RegionID(d.uint64()), d.numbers(int(d.uint16()))
			if d.must(len(rkeys) != 0 && len(rkeys) <= maxParts && p.fresh[id] == nil) {
				if p.fresh == nil {
					p.fresh = make(map[backend.RegionID][]uint32)
				}
				p.fresh[id] = rkeys
			}
		}
		a.paths = append(a.paths, p)
	}
	if !d.complete() {
		return answer{}, backend.Errorf(backend.BadRequest, "the answer of %d bytes is damaged, or of another version of this backend", len(b))
	}
	return a, nil
}

// append appends: rail u8, link u8, type of GID u8, GID [16], LID u16, MTU u16, reads u8, PSN u32, number of queue pairs
// u8, and a u32 for each.
func (e *end) append(b []byte) []byte {
	b = append(b, byte(e.rail), byte(e.link), byte(e.gidType))
	b = append(b, e.gid[:]...)
	b = binary.LittleEndian.AppendUint16(b, e.lid)
	b = binary.LittleEndian.AppendUint16(b, uint16(e.mtu))
	b = append(b, byte(e.reads))
	b = binary.LittleEndian.AppendUint32(b, e.psn)
	b = append(b, byte(len(e.qpns)))
	return appendNumbers(b, e.qpns)
}

func (d *decoder) end() end {
	e := end{rail: int(d.byte()), link: device.Link(d.byte()), gidType: device.GIDType(d.byte())}
	copy(e.gid[:], d.take(16))
	e.lid, e.mtu, e.reads, e.psn = d.uint16(), int(d.uint16()), int(d.byte()), d.uint32()
	e.qpns = d.numbers(int(d.byte()))
	const number = 1<<24 - 1 // as wide as a PSN and the number of a queue pair are
	d.must(e.rail < maxRails)
	d.must(e.link == device.InfiniBand && e.gidType == device.GIDInfiniBand ||
		e.link == device.Ethernet && (e.gidType == device.GIDRoCEv1 || e.gidType == device.GIDRoCEv2) && e.gid != [16]byte{})
	d.must(slices.Contains([]int{256, 512, 1024, 2048, 4096}, e.mtu))
	d.must(e.reads != 0 && e.psn <= number)
	d.must(len(e.qpns) != 0 && len(e.qpns) <= maxLanes)
	for i, n := range e.qpns {
		d.must(n <= number && !slices.Contains(e.qpns[:i], n))
	}
	return e
}

// fits tells whether two ends can talk, or why not.
func (e *end) fits(o *end) error {
	ip4 := func(e *end) bool { return netip.AddrFrom16(e.gid).Is4In6() }
	family := map[bool]string{true: "IPv4", false: "IPv6"}
	switch {
	case e.link != o.link:
		return fmt.Errorf("%s on one end and %s on the other", e.link, o.link)
	case e.gidType != o.gidType:
		return fmt.Errorf("%s on one end and %s on the other; set gid_index so that both are the same", e.gidType, o.gidType)
	case e.link == device.Ethernet && ip4(e) != ip4(o):
		return fmt.Errorf("a GID of %s on one end and of %s on the other; set gid_index so that both are the same",
			family[ip4(e)], family[ip4(o)])
	}
	return nil
}

// describe fills in what a rail tells of itself.
func (r *rail) describe(at *station, s *settings) end {
	mtu := at.port.MTU
	if s.mtu != 0 {
		mtu = min(mtu, s.mtu)
	}
	return end{rail: r.index, link: at.port.Link, gidType: at.gid.Type, gid: at.gid.Addr, lid: at.port.LID, mtu: mtu}
}

// ready returns where the rail is, or why it cannot be used. A port that was of no use is looked at again.
func (r *rail) ready(s *settings) (*station, error) {
	if r.at.Load().err != nil {
		r.locate(s)
	}
	at := r.at.Load()
	return at, at.err
}

// lostRail says that a rail was lost.
func lostRail(r *rail) *backend.Error {
	return &backend.Error{Code: backend.PathDown, Text: r.name + " was lost", Err: context.Cause(r.ctx)}
}

func randomPSN() uint32 {
	var b [4]byte
	rand.Read(b[:])
	return binary.LittleEndian.Uint32(b[:]) & (1<<24 - 1)
}

// refusal is a call of a device that failed, as an error of the contract: no room is Busy.
func refusal(r *rail, err error) error {
	e := &backend.Error{Code: backend.PathDown, Err: fmt.Errorf("%s: %w", r.name, err)}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		e.Vendor, e.VendorText = int(errno), errno.Error()
		if errno == syscall.ENOMEM || errno == syscall.EAGAIN {
			e.Code = backend.Busy
		}
	}
	return e
}

// handshake is the initiator's half of a connection that is being set up.
type handshake struct {
	t    *transport
	peer backend.Peer
	raw  []byte

	mu    sync.Mutex
	taken bool    // by Establish or Abandon
	paths []*path // as they were offered; nil for one whose rail was lost
}

// Offer implements backend.Backend. It makes the queue pairs of every rail that may be used to reach the peer.
func (t *transport) Offer(ctx context.Context, peer backend.Peer) (backend.Handshake, error) {
	refuse := func(err error) (backend.Handshake, error) { return nil, t.fault("offer", peer, err) }
	if err := checkPeer(peer); err != nil {
		return refuse(err)
	}
	if err := ctx.Err(); err != nil {
		return refuse(err)
	}
	if !t.begin() {
		return refuse(errClosed)
	}
	defer t.running.Done()

	var paths []*path
	o := offer{initiator: t.self.Incarnation, target: peer.Incarnation}
	var held several
	var wait time.Duration
	for i := range t.slots {
		r, reason := t.rail(i)
		var pause time.Duration
		if reason == nil {
			if pause, reason = t.breakers.check(i, peer); reason != nil {
				reason = fmt.Errorf("%s is held back for %s: %v", r.name, pause.Round(time.Millisecond), reason)
			}
		}
		var p *path
		var e end
		if reason == nil {
			p, e, reason = t.newPath(r)
		}
		if reason != nil {
			held = append(held, reason)
			if pause = max(pause, t.settings.breakerPause); wait == 0 || pause < wait {
				wait = pause
			}
			continue
		}
		paths = append(paths, p)
		o.ends = append(o.ends, e)
	}
	if len(paths) == 0 {
		return refuse(&backend.Error{Code: held.code(), Text: "no device can be used", RetryAfter: wait, Err: held})
	}
	h := &handshake{t: t, peer: peer, raw: o.encode(), paths: paths}
	t.mu.Lock()
	t.handshakes[h] = struct{}{}
	closed := t.closed
	var gone []*rail // whoever lost them has not seen the handshake
	for _, p := range paths {
		if t.slots[p.rail.index].rail != p.rail {
			gone = append(gone, p.rail)
		}
	}
	t.mu.Unlock()
	if closed {
		h.Abandon()
		return refuse(errClosed)
	}
	for _, r := range gone {
		h.drop(r)
	}
	return h, nil
}

// rail returns the rail of a slot, or why there is none.
func (t *transport) rail(index int) (*rail, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.slots[index].rail, t.slots[index].reason
}

// newPath makes the initiator's end of a path.
func (t *transport) newPath(r *rail) (*path, end, error) {
	s := &t.settings
	at, err := r.ready(s)
	if err != nil {
		return nil, end{}, err
	}
	if !r.users.Enter() {
		return nil, end{}, lostRail(r)
	}
	p := &path{rail: r, psn: randomPSN(), at: at}
	depth := min(s.sendQueue, r.attr.MaxWR)
	if p.cq, err = r.dev.CreateCQ(min(s.queuePairs*depth, r.attr.MaxCQE)); err != nil {
		r.users.Leave()
		return nil, end{}, refusal(r, err)
	}
	// The target may write to these queue pairs for its probes, which have no bytes. What else it could do it can do
	// over connections of its own.
	const access = device.RemoteWrite
	for range s.queuePairs {
		qp, err := r.dev.CreateQP(device.QPConfig{CQ: p.cq, SendWRs: depth, SGEs: min(s.sges, r.attr.MaxSGE)})
		if err == nil {
			p.qps, p.nums = append(p.qps, qp), append(p.nums, qp.Num())
			err = qp.Init(r.port.Number, access)
		}
		if err != nil {
			return nil, end{}, with(refusal(r, err), p.close())
		}
	}
	e := r.describe(at, s)
	e.reads, e.psn, e.qpns = max(1, min(r.attr.MaxReadsInitiated, maxReads)), p.psn, p.nums
	return p, e, nil
}

// close closes a path that no endpoint has taken over.
func (p *path) close() error {
	var err error
	for _, qp := range p.qps {
		err = errors.Join(err, qp.Close())
	}
	err = errors.Join(err, p.cq.Close())
	p.rail.users.Leave()
	return err
}

// Offer implements backend.Handshake.
func (h *handshake) Offer() []byte { return h.raw }

// take gives the handshake's paths to the caller, who is the only one to get them.
func (h *handshake) take() (paths []*path, ok bool) {
	h.t.mu.Lock()
	delete(h.t.handshakes, h)
	h.t.mu.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	ok = !h.taken
	h.taken = true
	paths, h.paths = h.paths, nil
	return paths, ok
}

// drop closes the path over a rail that was lost, if the handshake still waits for its answer.
func (h *handshake) drop(r *rail) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i, p := range h.paths {
		if p != nil && p.rail == r {
			h.t.closePath(p)
			h.paths[i] = nil
		}
	}
}

// Abandon implements backend.Handshake.
func (h *handshake) Abandon() {
	paths, _ := h.take()
	for _, p := range paths {
		if p != nil {
			h.t.closePath(p)
		}
	}
}

func (t *transport) closePath(p *path) {
	if err := p.close(); err != nil {
		t.log.Warn("a path could not be closed", "backend", t.info.Name, "port", p.rail.name, "error", err)
	}
}

// Establish implements backend.Handshake. The paths that pass their test become the endpoint; that one does not pass is
// no failure as long as another does.
func (h *handshake) Establish(ctx context.Context, raw []byte) (backend.Endpoint, error) {
	t := h.t
	paths, ok := h.take()
	refuse := func(err error) (backend.Endpoint, error) {
		for _, p := range paths {
			if p != nil {
				t.closePath(p)
			}
		}
		return nil, t.fault("establish", h.peer, err)
	}
	if !t.begin() {
		return refuse(errClosed)
	}
	defer t.running.Done()
	if !ok {
		return refuse(backend.Errorf(backend.BadRequest, "the handshake was used before"))
	}
	a, err := parseAnswer(raw)
	if err != nil {
		return refuse(err)
	}
	if a.target != h.peer.Incarnation {
		return refuse(backend.Errorf(backend.PeerGone, "incarnation %x answered", a.target))
	}
	if a.paths[len(a.paths)-1].offered >= len(paths) {
		return refuse(backend.Errorf(backend.BadRequest, "the answer is to another offer: it has more paths"))
	}

	callers := ctx
	ctx, cancel := context.WithTimeout(ctx, t.settings.connectTimeout)
	defer cancel()
	defer context.AfterFunc(t.ctx, cancel)()
	failures := make([]error, len(paths))
	var proofs sync.WaitGroup
	for i := range a.paths {
		if p := paths[a.paths[i].offered]; p != nil {
			proofs.Go(func() { failures[a.paths[i].offered] = t.connect(ctx, p, &a.paths[i]) })
		}
	}
	proofs.Wait()

	var proven []*path
	var failed several
	for i := range a.paths {
		k := a.paths[i].offered
		switch err := failures[k]; {
		case paths[k] == nil:
			failed = append(failed, backend.Errorf(backend.PathDown, "a device was lost during the handshake"))
		case err == nil:
			proven = append(proven, paths[k])
			paths[k] = nil
			t.breakers.connected(proven[len(proven)-1].rail.index, h.peer)
		default:
			failed = append(failed, err)
			if callers.Err() == nil && t.ctx.Err() == nil {
				t.breakers.refused(paths[k].rail.index, h.peer, err)
			}
		}
	}
	if len(proven) == 0 {
		switch {
		case callers.Err() != nil:
			return refuse(&backend.Error{Code: backend.Cancelled, Err: callers.Err()})
		case t.ctx.Err() != nil:
			return refuse(errClosed)
		}
		return refuse(&backend.Error{Code: failed.code(), Err: failed})
	}
	for _, err := range failed {
		t.log.Warn("a path to a peer does not work, and is left out", "backend", t.info.Name, "peer", h.peer.String(), "error", err)
	}
	e, err := t.adopt(h.peer, proven)
	if err != nil {
		paths = append(paths, proven...)
		return refuse(err)
	}
	for _, p := range paths {
		if p != nil {
			t.closePath(p)
		}
	}
	return e, nil
}

// statusError is a work request that did not succeed.
type statusError struct{ status device.Status }

func (e statusError) Error() string { return e.status.String() }

// connect connects a path with what the target answered, and proves it.
func (t *transport) connect(ctx context.Context, p *path, a *answeredPath) error {
	s, r := &t.settings, p.rail
	broken := func(op string, err error) error {
		e := &backend.Error{Code: backend.PathDown, Text: r.name + ": " + op, Err: err}
		if errno, ok := errors.AsType[syscall.Errno](err); ok {
			e.Vendor, e.VendorText = int(errno), errno.Error()
		}
		return e
	}
	own := r.describe(p.at, s)
	if err := own.fits(&a.end); err != nil {
		return broken("the ends do not fit", err)
	}
	if len(a.qpns) != len(p.qps) {
		return backend.Errorf(backend.BadRequest, "the answer has %d queue pairs for the %d that were offered", len(a.qpns), len(p.qps))
	}
	p.remote, p.generation, p.fresh, p.mtu = a.rail, a.generation, a.fresh, min(own.mtu, a.mtu)
	for i, qp := range p.qps {
		if err := qp.ReadyToReceive(s.receive(r, p.at, &a.end, i, p.mtu, 1)); err != nil {
			return broken("connect a queue pair", err)
		}
		if err := qp.ReadyToSend(s.send(p.psn, max(1, min(a.reads, r.attr.MaxReadsInitiated, maxReads)))); err != nil {
			return broken("connect a queue pair", err)
		}
	}
	err := t.prove(ctx, p, a)
	if err == nil || backend.CodeOf(err) == backend.Integrity {
		return err
	}
	return broken("the first read from the peer", err)
}

// receive is what a queue pair needs to receive from the i-th one of the other end.
func (s *settings) receive(r *rail, at *station, other *end, i, mtu, reads int) device.ReceiveAttr {
	return device.ReceiveAttr{
		Port: r.port.Number, GIDIndex: at.gid.Index,
		RemoteGID: other.gid, RemoteLID: other.lid, RemoteQPN: other.qpns[i], RemotePSN: other.psn,
		MTU: mtu, ReadsServed: reads, MinRNRTimer: s.minRNRTimer,
		TrafficClass: s.trafficClass, ServiceLevel: s.serviceLevel, HopLimit: hopLimit, Link: at.port.Link,
	}
}

func (s *settings) send(psn uint32, reads int) device.SendAttr {
	return device.SendAttr{PSN: psn, Timeout: s.timeout, Retries: s.retries, RNRRetries: s.rnrRetries, ReadsInitiated: reads}
}

// prove reads the target's proof over every queue pair, one after the other.
func (t *transport) prove(ctx context.Context, p *path, a *answeredPath) error {
	landing, err := newScratch(p.rail.dev, proofPage, device.LocalWrite)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(p.rail.ctx, func() { cancel(lostRail(p.rail)) })()
	want := bytes.Repeat(a.proof[:], proofPage/proofSize)
	for i := range p.qps {
		clear(landing.bytes)
		if err = t.readProof(ctx, p, i, a, landing); err != nil {
			break
		}
		if !bytes.Equal(landing.bytes, want) {
			err = backend.Errorf(backend.Integrity, "%s: what was read over queue pair %#x is not what the peer has in its memory", p.rail.name, p.nums[i])
			break
		}
	}
	if err != nil {
		// The device may still store what was read. It is quiet when the queue pairs are closed.
		for _, qp := range p.qps {
			err = with(err, qp.Close())
		}
		p.qps = nil
	}
	if closing := landing.close(); closing != nil {
		t.log.Warn("a device does not give memory back", "backend", t.info.Name, "port", p.rail.name, "error", closing)
	}
	return err
}

// readProof reads the proof over one queue pair.
func (t *transport) readProof(ctx context.Context, p *path, lane int, a *answeredPath, landing *scratch) error {
	chain := t.lib.NewChain(1, 1)
	defer chain.Close()
	chain.WRs = append(chain.WRs, device.WR{Remote: a.proofAddress, RKey: a.proofKey, SGEs: 1, Op: device.Read, Signaled: true})
	chain.SGEs = append(chain.SGEs, device.SGE{Addr: address(landing.bytes), Length: proofPage, LKey: landing.mr.LKey()})
	if _, err := p.qps[lane].Post(chain); err != nil {
		return err
	}
	defer wakeAtEnd(ctx, p.cq)()
	for armed := false; ; armed = !armed {
		completions, err := p.cq.Poll()
		for _, c := range completions {
			if c.QPN != p.nums[lane] {
				t.counts.strays.Add(1)
				continue
			}
			if c.Status != device.Success {
				return statusError{c.Status}
			}
			return nil
		}
		switch {
		case err != nil:
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case !armed:
			err = p.cq.Arm()
		default:
			err = p.cq.Wait(time.Time{})
		}
		if err != nil {
			return err
		}
	}
}

// wakeAtEnd wakes who waits for a completion queue when ctx ends. After the function that it returns was called, it does
// not touch the queue any more.
func wakeAtEnd(ctx context.Context, cq device.CQ) (stop func()) {
	woken := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(woken)
		cq.Wake()
	})
	return func() {
		if !cancel() {
			<-woken
		}
	}
}
