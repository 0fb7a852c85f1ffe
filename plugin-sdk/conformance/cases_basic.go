package conformance

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

func info(r *rig) {
	b := r.initiator.backend
	i := b.Info()
	c := i.Capabilities
	if i.Name != r.h.Factory.Name {
		r.Errorf("Info.Name is %q, want %q as in Factory.Name", i.Name, r.h.Factory.Name)
	}
	if i.Version == "" {
		r.Errorf("Info.Version is empty")
	}
	if len(r.ops()) == 0 || c.Ops&^(backend.Write|backend.Read) != 0 {
		r.Errorf("Capabilities.Ops is %d: want write, read, or both", c.Ops)
	}
	if c.Local == 0 || c.Remote == 0 {
		r.Errorf("no kind of memory is claimed for the local or the remote side")
	}
	if c.Reach < backend.SameProcess || c.Reach > backend.Network {
		r.Errorf("Capabilities.Reach is %d, which is none", c.Reach)
	}
	if c.Window <= 0 {
		r.Errorf("Capabilities.Window is %d, want at least 1", c.Window)
	}
	if c.Limits.Segments < 0 {
		r.Errorf("Limits.Segments is negative")
	}
	listed := map[[2]string]bool{}
	for _, link := range c.Links {
		way := wayOf(link.Near, link.Far)
		if listed[[2]string{link.Near, link.Far}] {
			r.Errorf("Capabilities.Links lists %s twice", way)
		}
		listed[[2]string{link.Near, link.Far}] = true
		if !c.Local.Has(kindAt(link.Near)) || !c.Remote.Has(kindAt(link.Far)) {
			r.Errorf("Capabilities.Links lists %s, and Local or Remote lacks the kind of memory", way)
		}
		if link.Cost < 0 {
			r.Errorf("the cost of %s is %d: zero is the least", way, link.Cost)
		}
	}
	if f := r.h.Factory; f.Info != nil && len(r.h.Options) == 0 && r.h.Process == nil && !reflect.DeepEqual(i, *f.Info) {
		r.Errorf("Info is %+v, and Factory.Info says %+v", i, *f.Info)
	}
	if !reflect.DeepEqual(i, b.Info()) {
		r.Errorf("Info has changed after Open")
	}
}

func counters(r *rig) {
	counter := r.initiator.backend.(backend.Counter) // as everything that is watched
	before := counter.Counters()
	if len(before) == 0 {
		r.Skipf("the backend counts nothing")
	}
	seen := map[string]bool{}
	for _, c := range before {
		if c.Name == "" || strings.Trim(c.Name, "abcdefghijklmnopqrstuvwxyz0123456789_") != "" {
			r.Errorf("a counter is called %q: a name is made of lower-case letters, digits and underscores", c.Name)
		}
		if seen[c.Name] {
			r.Errorf("two counters are called %s", c.Name)
		}
		seen[c.Name] = true
	}
	endpoint := r.endpoint
	for round := range 3 {
		l := r.session(endpoint, r.initiator.area(small, 0), r.target.area(small, allRights))
		l.move(r.ops()[round%len(r.ops())], []backend.Segment{{Length: small}}, fmt.Sprintf("round %d", round))
		r.closeEndpoint(endpoint) // what a connection has counted stays when it goes
		endpoint = r.connect(r.initiator, r.target)
		after := counter.Counters()
		if len(after) != len(before) {
			r.Fatalf("there are %d counters, and there were %d", len(after), len(before))
		}
		for i, c := range after {
			switch was := before[i]; {
			case c.Name != was.Name:
				r.Errorf("counter %d is %s, and was %s", i, c.Name, was.Name)
			case c.Value < was.Value:
				r.Errorf("%s went back from %d to %d", c.Name, was.Value, c.Value)
			}
		}
		before = after
	}
}

// strange returns texts that are near the right one, and some that are not.
func (r *rig) strange(right []byte) [][]byte {
	noise := make([]byte, 256)
	r.rng.Read(noise)
	texts := [][]byte{nil, {}, {0}, noise, noise[:len(right)%len(noise)]}
	if len(right) > 0 {
		texts = append(texts, right[:len(right)-1], right[:len(right)/2], append(bytes.Clone(right), 0))
		for range 4 {
			flipped := bytes.Clone(right)
			flipped[r.rng.Uint64()%uint64(len(right))] ^= byte(1 + r.rng.Uint64()%255)
			texts = append(texts, flipped)
		}
	}
	return texts
}

func handshakeGarbage(r *rig) {
	offer := func() backend.Handshake {
		handshake, err := r.initiator.backend.Offer(r.ctx, r.target.peer)
		if err != nil {
			r.Fatalf("Offer: %v", err)
		}
		return handshake
	}
	ask := func(what string, f func(ctx context.Context) error) {
		ctx, cancel := context.WithTimeout(r.ctx, 300*time.Millisecond)
		defer cancel()
		// Some of a text may not matter; whoever accepts it does no wrong.
		if err := f(ctx); err != nil {
			r.identity(what, err)
		}
	}

	first := offer()
	for _, text := range r.strange(first.Offer()) {
		ask("Answer to a strange offer", func(ctx context.Context) error {
			_, err := r.target.backend.Answer(ctx, r.initiator.peer, text)
			return err
		})
	}
	answer, err := r.target.backend.Answer(r.ctx, r.initiator.peer, first.Offer())
	if err != nil {
		r.Fatalf("Answer to a good offer, after bad ones: %v", err)
	}
	first.Abandon()

	for _, text := range r.strange(answer) {
		handshake := offer()
		if _, err := r.target.backend.Answer(r.ctx, r.initiator.peer, handshake.Offer()); err != nil {
			r.Fatalf("Answer to a good offer: %v", err)
		}
		ask("Establish with a strange answer", func(ctx context.Context) error {
			endpoint, err := handshake.Establish(ctx, text)
			if err == nil {
				err = endpoint.Close()
			}
			return err
		})
	}
	for what, text := range map[string][]byte{"empty": nil, "noise": bytes.Repeat([]byte{0xa5}, 333)} {
		if _, err := r.target.backend.Answer(r.ctx, r.initiator.peer, text); err == nil {
			r.Errorf("Answer accepts an offer that is %s", what)
		}
		handshake := offer()
		ctx, cancel := r.timeout()
		if _, err := handshake.Establish(ctx, text); err == nil {
			r.Errorf("Establish accepts an answer that is %s", what)
		}
		cancel()
	}

	l := r.session(r.connect(r.initiator, r.target), r.initiator.area(small, 0), r.target.area(small, allRights))
	l.move(r.ops()[0], []backend.Segment{{Length: small}}, "after garbage")
}

func handshakeAbandon(r *rig) {
	for answered := range 2 {
		for range 20 {
			handshake, err := r.initiator.backend.Offer(r.ctx, r.target.peer)
			if err != nil {
				r.Fatalf("Offer: %v", err)
			}
			if answered == 1 {
				if _, err := r.target.backend.Answer(r.ctx, r.initiator.peer, handshake.Offer()); err != nil {
					r.Fatalf("Answer: %v", err)
				}
			}
			handshake.Abandon()
		}
	}
	l := r.session(r.connect(r.initiator, r.target), r.initiator.area(small, 0), r.target.area(small, allRights))
	l.move(r.ops()[0], []backend.Segment{{Length: small}}, "after handshakes that were abandoned")
}

func handshakeExpired(r *rig) {
	handshake, err := r.initiator.backend.Offer(r.ctx, r.target.peer)
	if err != nil {
		r.Fatalf("Offer: %v", err)
	}
	answer, err := r.target.backend.Answer(r.ctx, r.initiator.peer, handshake.Offer())
	if err != nil {
		r.Fatalf("Answer: %v", err)
	}
	expired, cancel := context.WithCancel(r.ctx)
	cancel()
	endpoint, err := handshake.Establish(expired, answer)
	if err == nil { // it did not have to wait
		err = endpoint.Close()
	}
	if err != nil {
		r.identity("Establish with a context that has ended", err, backend.Cancelled)
	}
}

// contexts makes every call that takes a context with one that has ended. Each may still do its work.
func contexts(r *rig) {
	l := r.link(small)
	spare := r.initiator.lend(small, allRights)
	ended, cancel := context.WithCancel(r.ctx)
	cancel()
	check := func(what string, err error) {
		if err != nil {
			r.identity(what+" with a context that has ended", err, backend.Cancelled)
		}
	}
	handshake, err := r.initiator.backend.Offer(ended, r.target.peer)
	check("Offer", err)
	if err == nil {
		handshake.Abandon()
	}
	if handshake, err = r.initiator.backend.Offer(r.ctx, r.target.peer); err != nil {
		r.Fatalf("Offer: %v", err)
	}
	_, err = r.target.backend.Answer(ended, r.initiator.peer, handshake.Offer())
	check("Answer", err)
	handshake.Abandon()

	session, err := r.endpoint.Session(ended, l.near.remote.Region, l.far.remote, l.sink)
	check("Session", err)
	if err == nil {
		check("Session, closed again", session.Close())
	}
	_, err = r.initiator.backend.Register(ended, spare.asMemory())
	check("Register", err)
	check("Deregister", r.initiator.backend.Deregister(ended, spare.remote.Region))
	spare.deregister()
	check("Fence", r.target.backend.Fence(ended, r.initiator.peer))
	r.fence()

	again := r.session(r.connect(r.initiator, r.target), l.near, l.far)
	again.move(r.ops()[0], []backend.Segment{{Length: small}}, "after calls whose context had ended")
}

func reach(r *rig) {
	if claimed := r.caps().Reach; claimed != backend.SameHost {
		r.Skipf("the reach is %s, and the suite has no peer that is farther away", claimed)
	}
	elsewhere := r.target.peer
	elsewhere.Host += "-elsewhere"
	endpoint, err := r.tryConnect(r.initiator, r.target, elsewhere)
	if err == nil {
		r.closeEndpoint(endpoint)
	}
	r.identity("a connection to a peer on another host", err, backend.Unsupported)
}

func registerTwice(r *rig) {
	l := r.link(small)
	_, err := r.initiator.backend.Register(r.ctx, l.near.asMemory())
	r.identity("Register of a region that is registered", err, backend.BadRequest)
	for _, op := range r.ops() {
		l.move(op, []backend.Segment{{Length: small}}, "after the refusal")
	}
}

// regionIDs tries numbers that some width of integer cannot hold, and the one that is no region.
func regionIDs(r *rig) {
	for _, id := range []backend.RegionID{1 << 32, 1<<63 + 1, math.MaxUint64} {
		near, far := r.initiator.lend(small, 0), r.target.lend(small, allRights)
		near.remote.Region, far.remote.Region = id, id
		near.register()
		far.register()
		l := r.session(r.endpoint, near, far)
		l.move(r.ops()[0], []backend.Segment{{Length: small}}, fmt.Sprintf("regions with the number %d", id))
	}
	none := r.initiator.lend(small, 0)
	none.remote.Region = 0
	r.identity("Register of region 0, which is none", none.tryRegister(), backend.BadRequest)
}

func registerKinds(r *rig) {
	l := r.link(small)
	caps := r.caps()
	for _, kind := range []backend.MemoryKind{0, backend.HostMemory, backend.GPUMemory, 7} {
		if !caps.Local.Has(kind) && !caps.Remote.Has(kind) {
			_, err := r.initiator.backend.Register(r.ctx, r.memoryOf(kind))
			r.identity("Register of "+kind.String()+" memory", err, backend.Unsupported)
		}
		if !caps.Remote.Has(kind) {
			remote := l.far.remote
			remote.Kind, remote.Place = kind, ""
			if kind == backend.GPUMemory {
				remote.Place = nowhere
			}
			_, err := r.trySession(r.endpoint, l.near, l.far, remote)
			r.identity("Session with remote "+kind.String()+" memory", err, backend.Unsupported)
		}
	}
	claimed := caps.Local.Has(backend.GPUMemory) || caps.Remote.Has(backend.GPUMemory)
	if claimed && l.near.remote.Kind != backend.GPUMemory && l.far.remote.Kind != backend.GPUMemory {
		r.Skipf("GPU memory is claimed, and this harness lends none: no case has tried it")
	}
}

// memoryOf returns memory of a kind, which need not exist, as the initiator would register it.
func (r *rig) memoryOf(kind backend.MemoryKind) backend.Memory {
	m := r.initiator.lendOf(SealedMemory, small, 0).asMemory()
	m.Kind = kind
	if kind == backend.GPUMemory {
		m.Bytes, m.FD, m.FDOffset = nil, -1, 0
		m.GPU = &backend.GPURange{
			Runtime: "hip", Device: nowhere, Address: 1 << 40, Size: small,
			Allocation: 2 * small, Offset: margin, Handle: bytes.Repeat([]byte{0xa5}, 64),
		}
	}
	return m
}

// links tries pairs of places that the backend does not list.
func links(r *rig) {
	caps := r.caps()
	if caps.Links == nil {
		r.Skipf("the backend moves bytes between all places: it lists no links")
	}
	l := r.link(small)
	if !r.claims(l.near, l.far) {
		r.Errorf("Session from %s succeeds, and Capabilities.Links does not list it", wayOf(l.near.remote.Place, l.far.remote.Place))
	}
	refused := func(near, far *area, remote backend.Remote) {
		if _, listed := caps.Link(near.remote.Place, remote.Place); !listed {
			_, err := r.trySession(r.endpoint, near, far, remote)
			way := wayOf(near.remote.Place, remote.Place)
			r.identity("Session from "+way+", which Capabilities.Links does not list", err, backend.Unsupported)
		}
	}
	places := []string{"", nowhere}
	for _, link := range caps.Links {
		places = append(places, link.Near, link.Far)
	}
	slices.Sort(places)
	for _, place := range slices.Compact(places) {
		// What the descriptor says is enough to refuse it, also where its region lies somewhere else.
		remote := l.far.remote
		remote.Kind, remote.Place = kindAt(place), place
		refused(l.near, l.far, remote)
	}
	if caps.Local.Has(backend.HostMemory) && caps.Remote.Has(backend.HostMemory) {
		near, far := r.initiator.lendOf(SealedMemory, small, 0), r.target.lendOf(SealedMemory, small, allRights)
		near.register()
		far.register()
		refused(near, far, far.remote)
	}
	for _, op := range r.ops() {
		l.move(op, []backend.Segment{{Length: small}}, "after the refusals")
	}
}

// noDescriptor lends memory that has no file descriptor, or no handle, which is what a GPU's memory has in its place.
func noDescriptor(r *rig) {
	near, far := r.initiator.lend(small, 0), r.target.lend(small, allRights)
	for _, a := range []*area{near, far} {
		a.bare = true
		if err := a.tryRegister(); err != nil {
			r.identity("Register of memory without a descriptor", err, backend.Unsupported)
			return
		}
	}
	l, err := r.trySession(r.endpoint, near, far, far.remote)
	if err != nil {
		r.identity("Session with a region without a descriptor", err, backend.Unsupported)
		if !r.caps().NeedsFD {
			r.Errorf("Session with a region without a descriptor, which NeedsFD does not ask for: %v", err)
		}
		return
	}
	for _, op := range r.ops() {
		l.move(op, []backend.Segment{{Local: 1, Remote: 3, Length: small - 3}}, "memory without a descriptor")
	}
}

func deregisterTwice(r *rig) {
	if err := r.initiator.backend.Deregister(r.ctx, 4711); err != nil {
		r.Errorf("Deregister of a region that never was: %v", err)
	}
	l := r.link(small)
	for range 2 {
		l.far.deregister()
		l.near.deregister()
	}
}

func deregisterNear(r *rig) {
	l := r.link(small)
	spare := r.initiator.area(small, 0)
	for _, op := range r.ops() {
		l.move(op, []backend.Segment{{Length: small}}, "before Deregister")
	}
	near, far := l.near.refill(), l.far.refill()
	l.near.deregister()
	for _, op := range r.ops() {
		p, err := l.try(op, []backend.Segment{{Length: small}})
		if err == nil {
			l.wait(p)
			err = p.err
		}
		r.identity("a "+op.String()+" with a local region that was deregistered", err)
	}
	_, err := r.trySession(r.connect(r.initiator, r.target), l.near, l.far, l.far.remote)
	r.identity("Session with a local region that was deregistered", err, backend.BadRequest)
	l.near.unchanged(near, "after Deregister of the local region")
	l.far.unchanged(far, "after Deregister of the local region")

	other := r.session(r.connect(r.initiator, r.target), spare, l.far)
	other.move(r.ops()[0], []backend.Segment{{Length: small}}, "another region, after Deregister")
}

func deregisterFar(r *rig) {
	l := r.link(small)
	for _, op := range r.ops() {
		l.move(op, []backend.Segment{{Length: small}}, "before Deregister")
	}
	l.far.deregister()
	l.untouched("after Deregister at the target", l.far.remote)
}

// untouched tries to reach the far region with every operation, over the session there is and over a new one, and
// wants errors and not a byte moved.
func (l *link) untouched(what string, remote backend.Remote) {
	r := l.r
	near, far := l.near.refill(), l.far.refill()
	for _, op := range r.ops() {
		again, err := r.trySession(r.connect(r.initiator, r.target), l.near, l.far, remote)
		if err != nil {
			r.identity(what+": Session", err)
		}
		for _, l := range []*link{l, again} {
			if l == nil {
				continue
			}
			p, err := l.try(op, []backend.Segment{{Length: small}})
			if err == nil {
				l.wait(p)
				err = p.err
				for i := range p.Segments {
					if p.outcome(i) == backend.Done {
						r.Errorf("%s: a %s ended Done", what, op)
					}
				}
			}
			r.identity(what+": a "+op.String(), err)
		}
	}
	r.fence()
	time.Sleep(settle)
	l.near.unchanged(near, what)
	l.far.unchanged(far, what)
}

// stress posts as many long transfers as the endpoint takes, up to n.
func (l *link) stress(op backend.Op, n int) []*posted {
	var all []*posted
	for range n {
		p, err := l.try(op, cut64(l.near.size))
		if err != nil {
			l.r.identity("Post of a legal "+op.String(), err, backend.Busy)
			break
		}
		all = append(all, p)
	}
	return all
}

func (l *link) waitAll(all []*posted) {
	for _, p := range all {
		l.wait(p)
	}
}

func deregisterWaits(r *rig) {
	for _, op := range r.ops() {
		for _, end := range []string{"initiator", "target"} {
			l := r.session(r.connect(r.initiator, r.target), r.initiator.area(large, 0), r.target.area(large, allRights))
			all := l.stress(op, 8)
			gone := l.near
			if end == "target" {
				gone = l.far
			}
			gone.deregister()
			if end == "initiator" {
				for _, p := range all {
					if !p.completed() {
						r.Errorf("Deregister at the %s returned before a %s of the region had completed", end, op)
						break
					}
				}
			}
			after := gone.refill()
			l.waitAll(all)
			time.Sleep(settle)
			gone.unchanged(after, fmt.Sprintf("a %s touched memory after Deregister at the %s", op, end))
		}
	}
}

func limits(r *rig) {
	limit := r.caps().Limits
	l := r.link(large)
	refused := func(what string, segments []backend.Segment) {
		near, far := l.near.refill(), l.far.refill()
		for _, op := range r.ops() {
			_, err := l.try(op, segments)
			r.identity("Post of "+what, err, backend.BadRequest)
		}
		l.near.unchanged(near, what)
		l.far.unchanged(far, what)
		l = r.session(r.connect(r.initiator, r.target), l.near, l.far)
	}
	many := func(n int) []backend.Segment {
		segments := make([]backend.Segment, n)
		for i := range segments {
			segments[i] = backend.Segment{Local: uint64(n-1-i) * 16, Remote: uint64(i)*16 + 3, Length: 8}
		}
		return segments
	}
	most := limit.Segments
	if most == 0 {
		most = 5000
	}
	if most <= large/16 {
		if limit.TransferBytes == 0 || uint64(most)*8 <= limit.TransferBytes {
			for _, op := range r.ops() {
				l.move(op, many(most), fmt.Sprintf("%d segments", most))
			}
		}
		if limit.Segments != 0 {
			refused("one segment more than Limits.Segments", many(most+1))
		}
	}
	whole := limit.Tighten(backend.Limits{SegmentBytes: large, TransferBytes: large})
	one := min(whole.SegmentBytes, whole.TransferBytes)
	for _, op := range r.ops() {
		l.move(op, []backend.Segment{{Length: one}}, fmt.Sprintf("one segment of %d bytes", one))
	}
	if one < large {
		refused("one byte more than the limits", []backend.Segment{{Length: one + 1}})
	}
	// Two segments, each within the limit of one, reach the limit of a transfer, and exceed it.
	if sum := whole.TransferBytes; sum < large && sum/2+1 <= whole.SegmentBytes && limit.Segments != 1 {
		two := []backend.Segment{{Length: sum / 2}, {Local: sum / 2, Remote: sum / 2, Length: sum - sum/2}}
		for _, op := range r.ops() {
			l.move(op, two, fmt.Sprintf("two segments of %d bytes together", sum))
		}
		two[1].Length++
		refused("one byte more than Limits.TransferBytes, in two segments", two)
	}
}
