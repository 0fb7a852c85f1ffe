package rdma

import (
	"bytes"
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/device"
)

var exported = cmp.AllowUnexported(remoteKey{}, railKeys{}, offer{}, answer{}, answeredPath{}, end{})

func drawKey(t *rapid.T) *remoteKey {
	k := &remoteKey{
		incarnation: rapid.Uint64().Draw(t, "incarnation"),
		region:      backend.RegionID(rapid.Uint64Min(1).Draw(t, "region")),
		rights:      backend.Rights(rapid.IntRange(1, 3).Draw(t, "rights")),
		part:        1 << rapid.IntRange(0, 63).Draw(t, "part"),
	}
	limit := uint64(math.MaxUint64)
	if k.part < limit/maxParts {
		limit = k.part * maxParts
	}
	// Few parts, mostly: the numbers are not what is of interest.
	if few := 8 * k.part; few/8 == k.part && rapid.IntRange(0, 20).Draw(t, "many") != 0 {
		limit = min(limit, few)
	}
	k.size = rapid.Uint64Range(1, limit).Draw(t, "size")
	k.base = rapid.Uint64Range(0, math.MaxUint64-k.size).Draw(t, "base")
	for range rapid.IntRange(1, maxRails).Draw(t, "rails") {
		r := railKeys{generation: rapid.Uint32Range(0, 3).Draw(t, "generation")}
		if r.generation != 0 {
			r.rkeys = make([]uint32, parts(k.size, k.part))
			for i := range r.rkeys {
				r.rkeys[i] = uint32(i) * 2654435761
			}
		}
		k.rails = append(k.rails, r)
	}
	return k
}

func drawEnd(t *rapid.T, rail int) end {
	e := end{
		rail:  rail,
		link:  rapid.SampledFrom([]device.Link{device.InfiniBand, device.Ethernet}).Draw(t, "link"),
		lid:   rapid.Uint16().Draw(t, "lid"),
		mtu:   256 << rapid.IntRange(0, 4).Draw(t, "mtu"),
		reads: rapid.IntRange(1, 255).Draw(t, "reads"),
		psn:   rapid.Uint32Range(0, 1<<24-1).Draw(t, "psn"),
		qpns:  rapid.SliceOfNDistinct(rapid.Uint32Range(0, 1<<24-1), 1, maxLanes, rapid.ID[uint32]).Draw(t, "queue pairs"),
	}
	e.gid[15] = 1
	copy(e.gid[:15], rapid.SliceOfN(rapid.Byte(), 15, 15).Draw(t, "gid"))
	if e.link == device.Ethernet {
		e.gidType = rapid.SampledFrom([]device.GIDType{device.GIDRoCEv1, device.GIDRoCEv2}).Draw(t, "type")
	}
	return e
}

func drawOffer(t *rapid.T) offer {
	o := offer{initiator: rapid.Uint64().Draw(t, "initiator"), target: rapid.Uint64().Draw(t, "target")}
	for i := range rapid.IntRange(1, maxRails).Draw(t, "ends") {
		o.ends = append(o.ends, drawEnd(t, i))
	}
	return o
}

func drawAnswer(t *rapid.T) answer {
	a := answer{target: rapid.Uint64().Draw(t, "target")}
	for i := range rapid.IntRange(1, maxRails).Draw(t, "paths") {
		p := answeredPath{
			offered: i, end: drawEnd(t, rapid.IntRange(0, maxRails-1).Draw(t, "rail")),
			generation:   rapid.Uint32Min(1).Draw(t, "generation"),
			proofAddress: rapid.Uint64().Draw(t, "address"), proofKey: rapid.Uint32().Draw(t, "key"),
		}
		copy(p.proof[:], rapid.SliceOfN(rapid.Byte(), proofSize, proofSize).Draw(t, "proof"))
		for range rapid.IntRange(0, 3).Draw(t, "fresh") {
			if p.fresh == nil {
				p.fresh = make(map[backend.RegionID][]uint32)
			}
			p.fresh[backend.RegionID(rapid.Uint64().Draw(t, "region"))] = rapid.SliceOfN(rapid.Uint32(), 1, 5).Draw(t, "rkeys")
		}
		a.paths = append(a.paths, p)
	}
	return a
}

func parseKeyText(b []byte) (any, error)    { return parseKey(b) }
func parseOfferText(b []byte) (any, error)  { return parseOffer(b) }
func parseAnswerText(b []byte) (any, error) { return parseAnswer(b) }

// TestRoundTrip writes and reads messages of every kind. Any bit that changes, any byte that is missing or too many, is
// noticed.
func TestRoundTrip(t *testing.T) {
	for name, c := range map[string]struct {
		draw  func(*rapid.T) (message any, text []byte)
		parse func([]byte) (any, error)
	}{
		"key":    {func(t *rapid.T) (any, []byte) { k := drawKey(t); return k, appendKey(nil, k) }, parseKeyText},
		"offer":  {func(t *rapid.T) (any, []byte) { o := drawOffer(t); return o, o.encode() }, parseOfferText},
		"answer": {func(t *rapid.T) (any, []byte) { a := drawAnswer(t); return a, a.encode() }, parseAnswerText},
	} {
		t.Run(name, rapid.MakeCheck(func(t *rapid.T) {
			message, text := c.draw(t)
			got, err := c.parse(text)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(message, got, exported); diff != "" {
				t.Fatal(diff)
			}
			damaged := bytes.Clone(text)
			bit := rapid.IntRange(0, 8*len(text)-1).Draw(t, "bit")
			damaged[bit/8] ^= 1 << (bit % 8)
			cut := rapid.IntRange(0, len(text)-1).Draw(t, "cut")
			for what, b := range map[string][]byte{"damaged": damaged, "cut": text[:cut], "too long": append(bytes.Clone(text), 0)} {
				if _, err := c.parse(b); backend.CodeOf(err) != backend.BadRequest {
					t.Fatalf("%s: got error %v", what, err)
				}
			}
		}))
	}
}

func sampleEnd() end {
	return end{rail: 0, link: device.Ethernet, gidType: device.GIDRoCEv2, gid: [16]byte{15: 1}, mtu: 1024, reads: 1, qpns: []uint32{7}}
}

// TestHostile has messages that are well sealed, and that no honest peer would send.
func TestHostile(t *testing.T) {
	goodKey := func() *remoteKey {
		return &remoteKey{
			incarnation: 1, region: 1, size: 4096, rights: backend.RemoteRead, base: 4096, part: 1 << 20,
			rails: []railKeys{{generation: 1, rkeys: []uint32{1}}},
		}
	}
	if _, err := parseKey(appendKey(nil, goodKey())); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(*remoteKey){
		"no region":               func(k *remoteKey) { k.region = 0 },
		"no bytes":                func(k *remoteKey) { k.size = 0 },
		"an end beyond memory":    func(k *remoteKey) { k.base = math.MaxUint64 - 100 },
		"no rights":               func(k *remoteKey) { k.rights = 0 },
		"rights that are none":    func(k *remoteKey) { k.rights = 4 },
		"no part":                 func(k *remoteKey) { k.part = 0 },
		"an odd part":             func(k *remoteKey) { k.part = 3 << 19 },
		"millions of parts":       func(k *remoteKey) { k.part, k.size = 1, 1<<40 },
		"no rails":                func(k *remoteKey) { k.rails = nil },
		"too many rails":          func(k *remoteKey) { k.rails = make([]railKeys, maxRails+1) },
		"a part without a key":    func(k *remoteKey) { k.rails[0].rkeys = nil },
		"more keys than parts":    func(k *remoteKey) { k.rails[0].rkeys = []uint32{1, 2} },
		"keys of no registration": func(k *remoteKey) { k.rails[0].generation = 0 },
	} {
		k := goodKey()
		change(k)
		if _, err := parseKey(appendKey(nil, k)); backend.CodeOf(err) != backend.BadRequest {
			t.Errorf("a key with %s: got error %v", what, err)
		}
	}

	for what, change := range map[string]func(*end){
		"a rail too high":        func(e *end) { e.rail = maxRails },
		"an unknown link":        func(e *end) { e.link = 9 },
		"a GID of another link":  func(e *end) { e.link = device.InfiniBand },
		"no GID":                 func(e *end) { e.gid = [16]byte{} },
		"a strange MTU":          func(e *end) { e.mtu = 1000 },
		"no reads":               func(e *end) { e.reads = 0 },
		"a PSN too wide":         func(e *end) { e.psn = 1 << 24 },
		"no queue pairs":         func(e *end) { e.qpns = nil },
		"too many queue pairs":   func(e *end) { e.qpns = make([]uint32, maxLanes+1) },
		"a queue pair too wide":  func(e *end) { e.qpns[0] = 1 << 24 },
		"one queue pair twice":   func(e *end) { e.qpns = []uint32{7, 8, 7} },
		"two hundred and some":   func(e *end) { e.qpns = make([]uint32, 255) },
		"an unknown type of GID": func(e *end) { e.gidType = 7 },
	} {
		e := sampleEnd()
		change(&e)
		o := offer{initiator: 1, target: 2, ends: []end{e}}
		if _, err := parseOffer(o.encode()); backend.CodeOf(err) != backend.BadRequest {
			t.Errorf("an offer with %s: got error %v", what, err)
		}
		a := answer{target: 2, paths: []answeredPath{{end: e, generation: 1}}}
		if _, err := parseAnswer(a.encode()); backend.CodeOf(err) != backend.BadRequest {
			t.Errorf("an answer with %s: got error %v", what, err)
		}
	}

	path := func(offered int) answeredPath {
		return answeredPath{offered: offered, end: sampleEnd(), generation: 1}
	}
	fresh := path(0)
	fresh.fresh = map[backend.RegionID][]uint32{1: nil}
	void := path(0)
	void.generation = 0
	second := sampleEnd()
	second.rail = 1
	for what, text := range map[string][]byte{
		"an offer of nothing":                (&offer{}).encode(),
		"an offer of one rail twice":         (&offer{ends: []end{sampleEnd(), sampleEnd()}}).encode(),
		"an offer that is not in order":      (&offer{ends: []end{second, sampleEnd()}}).encode(),
		"an answer":                          (&answer{paths: []answeredPath{path(0)}}).encode(),
		"an answer with nothing":             (&answer{}).encode(),
		"an answer to one path twice":        (&answer{paths: []answeredPath{path(1), path(1)}}).encode(),
		"an answer with a region and no key": (&answer{paths: []answeredPath{fresh}}).encode(),
		"an answer of no generation":         (&answer{paths: []answeredPath{void}}).encode(),
		"much":                               seal(append([]byte(offerMagic), make([]byte, maxMessage)...), 0),
		"nothing":                            nil,
	} {
		if _, err := parseOffer(text); backend.CodeOf(err) != backend.BadRequest {
			t.Errorf("%s as an offer: got error %v", what, err)
		}
		if _, err := parseAnswer(text); what != "an answer" && backend.CodeOf(err) != backend.BadRequest {
			t.Errorf("%s as an answer: got error %v", what, err)
		}
	}
}

// fuzz checks that what is read can be written, and reads the same again. The checksum is made right, so that the fuzzer
// gets behind it.
func fuzz(f *testing.F, parse func([]byte) (any, error), write func(any) []byte) {
	f.Fuzz(func(t *testing.T, text []byte) {
		parse(text) // as it is
		text = seal(bytes.Clone(text), 0)
		first, err := parse(text)
		if err != nil {
			return
		}
		again, err := parse(write(first))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(first, again, exported); diff != "" {
			t.Fatal(diff)
		}
	})
}

// unsealed is a message without its checksum.
func unsealed(b []byte) []byte { return b[:len(b)-4] }

func FuzzKey(f *testing.F) {
	f.Add(unsealed(appendKey(nil, &remoteKey{
		incarnation: 1, region: 1, size: 4097, rights: backend.RemoteRead, base: 4096, part: 4096,
		rails: []railKeys{{generation: 1, rkeys: []uint32{1, 2}}, {}},
	})))
	fuzz(f, parseKeyText, func(k any) []byte { return appendKey(nil, k.(*remoteKey)) })
}

func FuzzOffer(f *testing.F) {
	f.Add(unsealed((&offer{initiator: 1, target: 2, ends: []end{sampleEnd()}}).encode()))
	fuzz(f, parseOfferText, func(o any) []byte { m := o.(offer); return m.encode() })
}

func FuzzAnswer(f *testing.F) {
	f.Add(unsealed((&answer{target: 2, paths: []answeredPath{
		{end: sampleEnd(), generation: 2, fresh: map[backend.RegionID][]uint32{3: {4, 5}}},
	}}).encode()))
	fuzz(f, parseAnswerText, func(a any) []byte { m := a.(answer); return m.encode() })
}
