package rdma

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// The first bytes of a key, an offer and an answer say which it is, and in which version.
const (
	keyMagic    = "UMBPrdk1"
	offerMagic  = "UMBPrdo1"
	answerMagic = "UMBPrda1"
)

const (
	maxRails = 16   // of one process
	maxParts = 4096 // of one region
)

// remoteKey is what Register tells peers of a region: where it is, and what opens it on each rail.
type remoteKey struct {
	incarnation uint64
	region      backend.RegionID
	size        uint64
	rights      backend.Rights
	base        uint64 // address of the region's first byte, as the target's devices know it
	part        uint64 // bytes of a part, each of which has its own rkey; a power of two
	rails       []railKeys
}

// railKeys is what opens a region's parts on one rail.
type railKeys struct {
	generation uint32 // of the rail, when the region was registered on it; zero when it was not
	rkeys      []uint32
}

// appendKey appends the key, little-endian:
//
//	magic[8], incarnation u64, region u64, size u64, rights u8, base u64, part u64, rails u8,
//	for each rail: generation u32, and, where that is not zero, a u32 for each part,
//	CRC-32C u32 of all that
func appendKey(b []byte, k *remoteKey) []byte {
	start := len(b)
	b = append(b, keyMagic...)
	b = binary.LittleEndian.AppendUint64(b, k.incarnation)
	b = binary.LittleEndian.AppendUint64(b, uint64(k.region))
	b = binary.LittleEndian.AppendUint64(b, k.size)
	b = append(b, byte(k.rights))
	b = binary.LittleEndian.AppendUint64(b, k.base)
	b = binary.LittleEndian.AppendUint64(b, k.part)
	b = append(b, byte(len(k.rails)))
	for _, r := range k.rails {
		b = binary.LittleEndian.AppendUint32(b, r.generation)
		b = appendNumbers(b, r.rkeys)
	}
	return seal(b, start)
}

// parseKey reads what appendKey wrote. What it returns is consistent in itself.
func parseKey(b []byte) (*remoteKey, error) {
	d := unseal(b, keyMagic)
	k := &remoteKey{
		incarnation: d.uint64(),
		region:      backend.RegionID(d.uint64()),
		size:        d.uint64(),
		rights:      backend.Rights(d.byte()),
		base:        d.uint64(),
		part:        d.uint64(),
	}
	rails := int(d.byte())
	d.must(k.region != 0 && k.size != 0 && k.base+k.size > k.base)
	d.must(k.rights != 0 && k.rights&^(backend.RemoteRead|backend.RemoteWrite) == 0)
	d.must(k.part != 0 && k.part&(k.part-1) == 0)
	d.must(rails != 0 && rails <= maxRails)
	if d.must(!d.bad && parts(k.size, k.part) <= maxParts) {
		k.rails = make([]railKeys, rails)
		for i := range k.rails {
			r := &k.rails[i]
			if r.generation = d.uint32(); r.generation != 0 {
				r.rkeys = d.numbers(int(parts(k.size, k.part)))
			}
		}
	}
	if !d.complete() {
		return nil, backend.Errorf(backend.BadRequest, "the key of %d bytes is damaged, or of another version of this backend", len(b))
	}
	return k, nil
}

// check compares the key with the descriptor that it came in.
func (k *remoteKey) check(remote *backend.Remote) error {
	switch {
	case k.incarnation != remote.Peer.Incarnation:
		return backend.Errorf(backend.PeerGone, "the key is of incarnation %x", k.incarnation)
	case k.region != remote.Region:
		return backend.Errorf(backend.BadRequest, "the key is of region %d", k.region)
	case k.size != remote.Size:
		return backend.Errorf(backend.BadRequest, "the key is of a region of %d bytes, not %d", k.size, remote.Size)
	case k.rights != remote.Rights:
		return backend.Errorf(backend.BadRequest, "the key gives other rights (%d) than the descriptor says (%d)", k.rights, remote.Rights)
	}
	return nil
}

func appendNumbers(b []byte, numbers []uint32) []byte {
	for _, n := range numbers {
		b = binary.LittleEndian.AppendUint32(b, n)
	}
	return b
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// seal ends the message that begins at b[start] with its checksum. It is there to refuse what was damaged or cut on
// its way before it is tried: a device answers a wrong key or queue pair number by breaking the connection.
func seal(b []byte, start int) []byte {
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

// decoder reads untrusted bytes. Once they fall short or are wrong it is bad, and returns zeros.
type decoder struct {
	rest []byte
	bad  bool
}

// unseal returns a decoder of what stands in b between the magic and the checksum.
func unseal(b []byte, magic string) *decoder {
	if len(b) < len(magic)+4 || string(b[:len(magic)]) != magic {
		return &decoder{bad: true}
	}
	end := len(b) - 4
	return &decoder{
		rest: b[len(magic):end],
		bad:  crc32.Checksum(b[:end], castagnoli) != binary.LittleEndian.Uint32(b[end:]),
	}
}

var zeros [32]byte

// take returns the next n bytes, 32 at most.
func (d *decoder) take(n int) []byte {
	if d.bad = d.bad || len(d.rest) < n; d.bad {
		return zeros[:n]
	}
	b := d.rest[:n]
	d.rest = d.rest[n:]
	return b
}

func (d *decoder) byte() byte     { return d.take(1)[0] }
func (d *decoder) uint16() uint16 { return binary.LittleEndian.Uint16(d.take(2)) }
func (d *decoder) uint32() uint32 { return binary.LittleEndian.Uint32(d.take(4)) }
func (d *decoder) uint64() uint64 { return binary.LittleEndian.Uint64(d.take(8)) }

// numbers reads n numbers. It makes room for them only when they are there.
func (d *decoder) numbers(n int) []uint32 {
	if d.bad = d.bad || len(d.rest)/4 < n; d.bad {
		return nil
	}
	all := make([]uint32, n)
	for i := range all {
		all[i] = d.uint32()
	}
	return all
}

// must notes a fault unless ok, and tells whether there is none so far.
func (d *decoder) must(ok bool) bool {
	d.bad = d.bad || !ok
	return !d.bad
}

// complete tells whether everything was read, and nothing was wrong.
func (d *decoder) complete() bool { return !d.bad && len(d.rest) == 0 }
