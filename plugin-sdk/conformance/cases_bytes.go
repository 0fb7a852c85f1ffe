package conformance

import (
	"fmt"
	"math"
	"math/rand/v2"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

func bytesEdges(r *rig) {
	l := r.link(small)
	last := uint64(small - 1)
	for _, c := range []struct {
		name     string
		segments []backend.Segment
	}{
		{"the first byte", []backend.Segment{{Local: 0, Remote: 0, Length: 1}}},
		{"the last byte", []backend.Segment{{Local: last, Remote: last, Length: 1}}},
		{"first to last", []backend.Segment{{Local: 0, Remote: last, Length: 1}}},
		{"last to first", []backend.Segment{{Local: last, Remote: 0, Length: 1}}},
		{"unaligned on one side", []backend.Segment{{Local: 64, Remote: 3, Length: 4096}}},
		{"unaligned on both", []backend.Segment{{Local: 7, Remote: 4093, Length: 12289}}},
		{"the whole region", []backend.Segment{{Length: small}}},
		{"neighbours", triples([][3]uint64{{0, 0, 100}, {100, 100, 200}, {300, 300, 1}})},
		{"neighbours that cross over", triples([][3]uint64{{4096, 0, 4096}, {0, 4096, 4096}})},
		{"neighbours far away only", triples([][3]uint64{{9000, 0, 10}, {5000, 10, 10}, {100, 20, 10}})},
		{"many bytes", single(1000)},
	} {
		for _, op := range r.ops() {
			l.near.refill()
			l.far.refill()
			l.move(op, c.segments, c.name)
		}
	}
	if r.caps().Ops&backend.Write != 0 {
		l.move(backend.Write, triples([][3]uint64{{0, 0, 512}, {0, 1024, 512}, {0, 4096, 512}}), "one source, written to three places")
	}
	if r.caps().Ops&backend.Read != 0 {
		l.move(backend.Read, triples([][3]uint64{{0, 64, 512}, {1024, 64, 512}, {4096, 64, 512}}), "one source, read to three places")
	}
}

// triples makes segments of (local, remote, length).
func triples(all [][3]uint64) []backend.Segment {
	segments := make([]backend.Segment, len(all))
	for i, t := range all {
		segments[i] = backend.Segment{Local: t[0], Remote: t[1], Length: t[2]}
	}
	return segments
}

// single returns n segments of one byte, 3 bytes apart.
func single(n int) []backend.Segment {
	segments := make([]backend.Segment, n)
	for i := range segments {
		segments[i] = backend.Segment{Local: uint64(n-i) * 3, Remote: uint64(i) * 3, Length: 1}
	}
	return segments
}

func bytesRandom(r *rig) {
	l := r.link(small)
	rng := rand.New(r.rng)
	most := r.caps().Limits.Tighten(backend.Limits{Segments: 300}).Segments
	for round := range 40 {
		op := r.ops()[round%len(r.ops())]
		segments := scatter(rng, small, 1+rng.IntN(most))
		l.move(op, segments, fmt.Sprintf("round %d, %d segments", round, len(segments)))
	}
}

// segmentsReused leans on link.try, which overwrites the slice as soon as Post has returned. It queues several
// transfers, so that the backend gets to most of them later.
func segmentsReused(r *rig) {
	for _, op := range r.ops() {
		l := r.link(large)
		near, far := l.near.refill(), l.far.refill()
		all := l.stress(op, 4)
		l.waitAll(all)
		for _, p := range all {
			if p.err != nil {
				r.Fatalf("a legal %s failed: %v", op, p.err)
			}
		}
		l.verify(all[0], near, far, "Segments overwritten after Post")
	}
}

func bytesTwoWays(r *rig) {
	here, there := r.initiator.area(small, allRights), r.target.area(small, allRights)
	if !r.claims(there, here) {
		r.Skipf("the way back, %s, is not claimed", wayOf(there.remote.Place, here.remote.Place))
	}
	back := r.connect(r.target, r.initiator)
	forth, back1 := r.session(r.endpoint, here, there), r.session(back, there, here)
	for _, op := range r.ops() {
		for _, l := range []*link{forth, back1} {
			l.near.refill()
			l.move(op, []backend.Segment{{Local: 5, Remote: 77, Length: 65537}}, "from the "+l.near.node.peer.Node)
		}
	}
}

func postWait(r *rig) {
	l := r.link(small)
	waiter, ok := l.Session.(backend.PostWaiter)
	if !ok {
		r.Skipf("sessions have no PostWait")
	}
	l.waiter = waiter
	rng := rand.New(r.rng)
	most := r.caps().Limits.Tighten(backend.Limits{Segments: 300}).Segments
	for round := range 40 {
		op := r.ops()[round%len(r.ops())]
		size := uint64(small)
		if round%2 == 0 {
			size = 4096 // small ones are what the posting goroutine is likely to carry out
		}
		l.move(op, scatter(rng, size, 1+rng.IntN(most)), fmt.Sprintf("round %d by PostWait", round))
	}
	_, err := l.try(r.ops()[0], []backend.Segment{{Remote: small, Length: 1}})
	r.identity("PostWait with a bad range", err, backend.BadRequest)

	other := r.session(r.endpoint, l.near, l.far)
	jobs := []*link{l, other, l, other} // two goroutines wait beside two that do not
	r.hammers(jobs, 20)
	l.closeSession()
	l.refuses("after Session.Close")
}

func refuseRanges(r *rig) {
	const size = small
	good := backend.Segment{Local: 0, Remote: 0, Length: 4096}
	for _, c := range []struct {
		name string
		bad  backend.Segment
	}{
		{"a length of zero", backend.Segment{Local: 8192, Remote: 8192}},
		{"one byte past the local end", backend.Segment{Local: size - 99, Remote: 8192, Length: 100}},
		{"one byte past the remote end", backend.Segment{Local: 8192, Remote: size - 99, Length: 100}},
		{"the byte after the local end", backend.Segment{Local: size, Remote: 8192, Length: 1}},
		{"the byte after the remote end", backend.Segment{Local: 8192, Remote: size, Length: 1}},
		{"far outside, locally", backend.Segment{Local: 1 << 40, Remote: 8192, Length: 16}},
		{"far outside, remotely", backend.Segment{Local: 8192, Remote: 1 << 40, Length: 16}},
		{"a local offset that overflows", backend.Segment{Local: math.MaxUint64 - 7, Remote: 8192, Length: 16}},
		{"a remote offset that overflows", backend.Segment{Local: 8192, Remote: math.MaxUint64 - 7, Length: 16}},
		{"a sum of exactly 2^64", backend.Segment{Local: 8192, Remote: math.MaxUint64 - 15, Length: 16}},
		{"a length that overflows", backend.Segment{Local: 8192, Remote: 8192, Length: math.MaxUint64 - 4096}},
		{"a length with the sign bit", backend.Segment{Local: 8192, Remote: 8192, Length: 1 << 63}},
		{"an offset with the sign bit", backend.Segment{Local: 8192, Remote: 1 << 63, Length: 16}},
		{"a length of 2^32", backend.Segment{Local: 8192, Remote: 8192, Length: 1 << 32}},
		{"an offset of 2^32", backend.Segment{Local: 1 << 32, Remote: 8192, Length: 16}},
		{"longer than the region", backend.Segment{Local: 0, Remote: 8192, Length: size + 1}},
	} {
		near, far := r.initiator.area(size, 0), r.target.area(size, allRights)
		for _, op := range r.ops() {
			for _, segments := range [][]backend.Segment{{c.bad}, {good, c.bad}} {
				l := r.session(r.connect(r.initiator, r.target), near, far)
				nearBefore, farBefore := near.refill(), far.refill()
				p, err := l.try(op, segments)
				r.identity("Post with "+c.name, err, backend.BadRequest)
				if err == nil {
					l.wait(p)
				}
				near.unchanged(nearBefore, "after a refusal of "+c.name)
				far.unchanged(farBefore, "after a refusal of "+c.name)
			}
		}
	}
	l := r.link(size)
	_, err := l.try(r.ops()[0], nil)
	r.identity("Post without segments", err, backend.BadRequest)
}

// refuseHarmless posts bad transfers among good ones, on one session.
func refuseHarmless(r *rig) {
	bad := map[string]backend.Transfer{
		"no segments":        {},
		"a range outside":    {Segments: []backend.Segment{{Length: 64}, {Remote: large, Length: 64}}},
		"an operation of 99": {Op: 99, Segments: []backend.Segment{{Length: 64}}},
	}
	if most := r.caps().Limits.Segments; most != 0 && most < large/16 {
		bad["too many segments"] = backend.Transfer{Segments: single(most + 1)}
	}
	for _, op := range r.ops() {
		l := r.link(large)
		near, far := l.near.contents(), l.far.contents()
		var all []*posted
		for what, t := range bad {
			all = append(all, l.stress(op, 2)...)
			if t.Op == 0 {
				t.Op = op
			}
			_, err := l.try(t.Op, t.Segments)
			r.identity("Post with "+what, err, backend.BadRequest, backend.Unsupported)
		}
		l.waitAll(all)
		for _, p := range all {
			if p.err != nil {
				r.Fatalf("a legal %s, among others that were refused, failed: %v", op, p.err)
			}
		}
		l.verify(all[0], near, far, "among transfers that were refused")
		l.move(op, single(100), "after transfers that were refused")
		if done(r.endpoint) {
			r.Errorf("the endpoint has failed because transfers were refused")
		}
	}
}

func done(endpoint backend.Endpoint) bool {
	select {
	case <-endpoint.Done():
		return true
	default:
		return false
	}
}

func refuseOperations(r *rig) {
	near, far := r.initiator.area(small, 0), r.target.area(small, allRights)
	for _, op := range []backend.Op{0, backend.Write, backend.Read, backend.Write | backend.Read, 4, 255} {
		if op == backend.Write || op == backend.Read {
			if r.caps().Ops&op != 0 {
				continue
			}
		}
		l := r.session(r.connect(r.initiator, r.target), near, far)
		nearBefore, farBefore := near.refill(), far.refill()
		_, err := l.try(op, []backend.Segment{{Length: 64}})
		codes := []backend.Code{backend.Unsupported, backend.BadRequest}
		if op == backend.Write || op == backend.Read {
			codes = codes[:1]
		}
		r.identity("Post of "+op.String(), err, codes...)
		near.unchanged(nearBefore, "after "+op.String())
		far.unchanged(farBefore, "after "+op.String())
	}
}

func refuseRights(r *rig) {
	near := r.initiator.area(small, allRights) // whatever its rights, they are not what counts
	for _, c := range []struct {
		rights  backend.Rights
		refused backend.Op
	}{
		{0, backend.Write}, {0, backend.Read},
		{backend.RemoteRead, backend.Write}, {backend.RemoteWrite, backend.Read},
	} {
		if r.caps().Ops&c.refused == 0 {
			continue
		}
		far := r.target.area(small, c.rights)
		nearBefore, farBefore := near.refill(), far.refill()
		l, err := r.trySession(r.connect(r.initiator, r.target), near, far, far.remote)
		if err == nil {
			var p *posted
			p, err = l.try(c.refused, []backend.Segment{{Length: 4096}})
			if err == nil {
				l.wait(p)
				r.Errorf("Post accepts a %s that the region's rights forbid", c.refused)
			}
		}
		r.identity("a "+c.refused.String()+" without the right to it", err, backend.Denied)
		near.unchanged(nearBefore, "after a "+c.refused.String()+" without the right to it")
		far.unchanged(farBefore, "after a "+c.refused.String()+" without the right to it")

		if allowed := (backend.Write | backend.Read) &^ c.refused; c.rights != 0 && r.caps().Ops&allowed != 0 {
			l := r.session(r.connect(r.initiator, r.target), near, far)
			l.move(allowed, []backend.Segment{{Length: 4096}}, "with the one right that there is")
		}
	}
}

func refuseRegions(r *rig) {
	l := r.link(small)
	unknown := &area{node: r.initiator, remote: backend.Remote{Region: 4711}}
	_, err := r.trySession(r.connect(r.initiator, r.target), unknown, l.far, l.far.remote)
	r.identity("Session with a local region that never was", err, backend.BadRequest)
}

func refuseForged(r *rig) {
	victim, other := r.target.area(small, 0), r.target.area(small, allRights)
	near := r.initiator.area(2*small, 0)
	for _, c := range []struct {
		name    string
		far     *area
		forge   func(*backend.Remote)
		segment backend.Segment
	}{
		{"rights that were not given", victim, func(f *backend.Remote) { f.Rights = allRights }, backend.Segment{Length: 4096}},
		{"the key of another region", victim, func(f *backend.Remote) { f.Rights, f.Key = allRights, other.remote.Key }, backend.Segment{Length: 4096}},
		{"a size that is too large", other, func(f *backend.Remote) { f.Size = 2 * small }, backend.Segment{Remote: small - 64, Length: 4096}},
		{"an endless size", other, func(f *backend.Remote) { f.Size = math.MaxUint64 }, backend.Segment{Remote: math.MaxUint64 - 4095, Length: 4095}},
		{"a region that never was", other, func(f *backend.Remote) { f.Region = 4711 }, backend.Segment{Length: 4096}},
		{"a key with one bit flipped", other, func(f *backend.Remote) { f.Key = flipped(f.Key) }, backend.Segment{Length: 4096}},
		{"a key cut short", other, func(f *backend.Remote) { f.Key = f.Key[:len(f.Key)-1] }, backend.Segment{Length: 4096}},
	} {
		if len(c.far.remote.Key) == 0 && c.far == other && c.name[:5] == "a key" {
			continue // peers need no key
		}
		forged := c.far.remote
		c.forge(&forged)
		for _, op := range r.ops() {
			nearBefore, victimBefore, otherBefore := near.refill(), victim.refill(), other.refill()
			l, err := r.trySession(r.connect(r.initiator, r.target), near, c.far, forged)
			if err == nil {
				var p *posted
				p, err = l.try(op, []backend.Segment{c.segment})
				if err == nil {
					l.wait(p)
					err = p.err
				}
			}
			r.identity(fmt.Sprintf("a %s with %s", op, c.name), err,
				backend.Denied, backend.BadRequest, backend.PeerGone, backend.PathDown, backend.Unsupported)
			r.fence()
			near.unchanged(nearBefore, c.name)
			victim.unchanged(victimBefore, c.name)
			other.unchanged(otherBefore, c.name)
		}
	}
}

func flipped(key []byte) []byte {
	f := append([]byte(nil), key...)
	f[len(f)/2] ^= 0x10
	return f
}
