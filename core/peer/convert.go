package peer

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/umbp/umbp/core/internal/wire"
	"github.com/umbp/umbp/core/peer/peerpb"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Conversions between the types of Service and those of the wire. What comes from the wire is untrusted: columns
// that disagree are an error, never a panic. Slices are shared with the message where the types allow it: a message
// is made for one call and is not used again.

// malformed is the error for a message that contradicts itself.
func malformed(message string, format string, args ...any) error {
	return backend.Errorf(backend.BadRequest, "malformed %s: %s", message, fmt.Sprintf(format, args...))
}

// columns checks that every column has an entry for each row.
func columns(message string, rows int, lengths ...int) error {
	for _, n := range lengths {
		if n != rows {
			return malformed(message, "columns of %d and %d entries", rows, n)
		}
	}
	return nil
}

func runsToProto(runs []Run) *peerpb.Runs {
	p := &peerpb.Runs{
		Regions: make([]uint32, len(runs)), Offsets: make([]uint64, len(runs)), Lengths: make([]uint64, len(runs)),
	}
	for i, r := range runs {
		p.Regions[i], p.Offsets[i], p.Lengths[i] = r.Region, r.Offset, r.Length
	}
	return p
}

// runsFromProto appends the runs to out. They are as many as the keys' counts add up to.
func runsFromProto(p *peerpb.Runs, counts []uint32, out []Run) ([]Run, error) {
	regions, offsets, lengths := p.GetRegions(), p.GetOffsets(), p.GetLengths()
	if err := columns("runs", len(regions), len(offsets), len(lengths)); err != nil {
		return out, err
	}
	total := uint64(0)
	for _, n := range counts {
		total += uint64(n)
	}
	if total != uint64(len(regions)) || total > math.MaxUint32 {
		return out, malformed("runs", "%d runs, and the keys have %d", len(regions), total)
	}
	for i, r := range regions {
		out = append(out, Run{Region: r, Offset: offsets[i], Length: lengths[i]})
	}
	return out, nil
}

func statusesToProto(statuses []Status) []peerpb.Status {
	p := make([]peerpb.Status, len(statuses))
	for i, s := range statuses {
		p[i] = peerpb.Status(s)
	}
	return p
}

// statusFromProto reads a status that this version does not know as Unknown.
func statusFromProto(s peerpb.Status) Status {
	if s < 0 || s > peerpb.Status(Refused) {
		return Unknown
	}
	return Status(s)
}

func statusesFromProto(p []peerpb.Status, out []Status) []Status {
	out = out[:0]
	for _, s := range p {
		out = append(out, statusFromProto(s))
	}
	return out
}

// slotIDs are the same numbers under another type, which Go does not share slices across.
func slotIDs[To, From ~uint64](ids []From) []To {
	out := make([]To, len(ids))
	for i, id := range ids {
		out[i] = To(id)
	}
	return out
}

func descriptionToProto(d *Description) *peerpb.DescribeReply {
	p := &peerpb.DescribeReply{Peer: wire.ToPeer(d.Peer), PageSize: d.PageSize}
	for _, r := range d.Regions {
		p.Regions = append(p.Regions, &peerpb.Region{
			Peer: wire.ToPeer(r.Peer), Id: uint64(r.ID), Kind: uint32(r.Kind), Rights: uint32(r.Rights), Size: r.Size,
			Place: r.Place, Keys: r.Keys,
		})
	}
	return p
}

func descriptionFromProto(p *peerpb.DescribeReply) (*Description, error) {
	d := &Description{Peer: wire.FromPeer(p.GetPeer()), PageSize: p.GetPageSize()}
	for i, r := range p.GetRegions() {
		if r.GetKind() > math.MaxUint8 || r.GetRights() > math.MaxUint8 {
			return nil, malformed("description", "region %d: kind %d, rights %d", i, r.GetKind(), r.GetRights())
		}
		if !backend.ValidPlace(r.GetPlace()) {
			return nil, malformed("description", "region %d: %.*q is no place", i, backend.MaxPlace, r.GetPlace())
		}
		d.Regions = append(d.Regions, region.Descriptor{
			Peer: wire.FromPeer(r.GetPeer()), ID: backend.RegionID(r.GetId()), Kind: backend.MemoryKind(r.GetKind()),
			Rights: backend.Rights(r.GetRights()), Size: r.GetSize(), Place: r.GetPlace(), Keys: r.GetKeys(),
		})
	}
	return d, nil
}

func answerToProto(r *AnswerRequest) *peerpb.AnswerRequest {
	return &peerpb.AnswerRequest{From: wire.ToPeer(r.From), To: r.To, Backend: r.Backend, Offer: r.Offer}
}

func answerFromProto(p *peerpb.AnswerRequest) *AnswerRequest {
	return &AnswerRequest{From: wire.FromPeer(p.GetFrom()), To: p.GetTo(), Backend: p.GetBackend(), Offer: p.GetOffer()}
}

func answeredToProto(r *AnswerReply) *peerpb.AnswerReply {
	return &peerpb.AnswerReply{Answer: r.Answer, Keys: regionKeys[uint64](r.Keys)}
}

func answeredFromProto(p *peerpb.AnswerReply) *AnswerReply {
	return &AnswerReply{Answer: p.GetAnswer(), Keys: regionKeys[backend.RegionID](p.GetKeys())}
}

// regionKeys is the same map under another type, which Go does not share maps across.
func regionKeys[To, From ~uint64](keys map[From][]byte) map[To][]byte {
	out := make(map[To][]byte, len(keys))
	for id, key := range keys {
		out[To(id)] = key
	}
	return out
}

func allocateToProto(r *AllocateRequest) *peerpb.AllocateRequest {
	return &peerpb.AllocateRequest{Client: wire.ToPeer(r.Client), To: r.To, Keys: wire.ToKeys(r.Keys), Sizes: r.Sizes}
}

// allocateFromProto gives each key a string of its own: the node keeps some, and they must not keep the others.
func allocateFromProto(p *peerpb.AllocateRequest) (*AllocateRequest, error) {
	keys, err := wire.FromKeys(p.GetKeys(), MaxKeys)
	if err != nil {
		return nil, err
	}
	for i, key := range keys {
		keys[i] = strings.Clone(key)
	}
	return &AllocateRequest{Client: wire.FromPeer(p.GetClient()), To: p.GetTo(), Keys: keys, Sizes: p.GetSizes()}, nil
}

func allocatedToProto(r *AllocateReply) *peerpb.AllocateReply {
	n := len(r.Slots)
	p := &peerpb.AllocateReply{
		Statuses: make([]peerpb.Status, n), Slots: make([]uint64, n), RunCounts: make([]uint32, n),
		Runs: runsToProto(r.Runs), TtlNs: int64(r.TTL),
	}
	for i, s := range r.Slots {
		p.Statuses[i], p.Slots[i], p.RunCounts[i] = peerpb.Status(s.Status), uint64(s.ID), s.RunCount
	}
	return p
}

func allocatedFromProto(p *peerpb.AllocateReply, rows int, r *AllocateReply) error {
	r.Slots, r.Runs, r.TTL = r.Slots[:0], r.Runs[:0], time.Duration(p.GetTtlNs())
	statuses, ids, counts := p.GetStatuses(), p.GetSlots(), p.GetRunCounts()
	if err := columns("slots", rows, len(statuses), len(ids), len(counts)); err != nil {
		return err
	}
	var err error
	if r.Runs, err = runsFromProto(p.GetRuns(), counts, r.Runs); err != nil {
		return err
	}
	first := uint32(0)
	for i, s := range statuses {
		r.Slots = append(r.Slots, Slot{
			Status: statusFromProto(s), ID: SlotID(ids[i]), FirstRun: first, RunCount: counts[i],
		})
		first += counts[i]
	}
	return nil
}

func commitToProto(r *CommitRequest) *peerpb.CommitRequest {
	n := len(r.Slots)
	p := &peerpb.CommitRequest{
		Client: wire.ToPeer(r.Client), To: r.To, Fence: r.Fence,
		Slots: make([]uint64, n), Checksums: make([]uint64, n), HasChecksum: make([]bool, n),
	}
	for i, s := range r.Slots {
		p.Slots[i], p.Checksums[i], p.HasChecksum[i] = uint64(s.ID), s.Checksum, s.HasChecksum
	}
	return p
}

func commitFromProto(p *peerpb.CommitRequest) (*CommitRequest, error) {
	ids, checksums, has := p.GetSlots(), p.GetChecksums(), p.GetHasChecksum()
	if err := columns("slots", len(ids), len(checksums), len(has)); err != nil {
		return nil, err
	}
	r := &CommitRequest{
		Client: wire.FromPeer(p.GetClient()), To: p.GetTo(), Fence: p.GetFence(), Slots: make([]CommitSlot, len(ids)),
	}
	for i, id := range ids {
		r.Slots[i] = CommitSlot{ID: SlotID(id), Checksum: checksums[i], HasChecksum: has[i]}
	}
	return r, nil
}

func abortToProto(r *AbortRequest) *peerpb.AbortRequest {
	return &peerpb.AbortRequest{Client: wire.ToPeer(r.Client), To: r.To, Slots: slotIDs[uint64](r.Slots), Fence: r.Fence}
}

func abortFromProto(p *peerpb.AbortRequest) *AbortRequest {
	return &AbortRequest{
		Client: wire.FromPeer(p.GetClient()), To: p.GetTo(), Slots: slotIDs[SlotID](p.GetSlots()), Fence: p.GetFence(),
	}
}

func resolveToProto(r *ResolveRequest) *peerpb.ResolveRequest {
	return &peerpb.ResolveRequest{Client: wire.ToPeer(r.Client), To: r.To, Keys: wire.ToKeys(r.Keys)}
}

func resolveFromProto(p *peerpb.ResolveRequest) (*ResolveRequest, error) {
	keys, err := wire.FromKeys(p.GetKeys(), MaxKeys)
	return &ResolveRequest{Client: wire.FromPeer(p.GetClient()), To: p.GetTo(), Keys: keys}, err
}

func resolvedToProto(r *ResolveReply) *peerpb.ResolveReply {
	n := len(r.Values)
	p := &peerpb.ResolveReply{
		Statuses: make([]peerpb.Status, n), Sizes: make([]uint64, n), Generations: make([]uint64, n),
		Checksums: make([]uint64, n), HasChecksum: make([]bool, n), RunCounts: make([]uint32, n),
		Runs: runsToProto(r.Runs), Lease: uint64(r.Lease), TtlNs: int64(r.TTL),
	}
	for i, v := range r.Values {
		p.Statuses[i], p.Sizes[i], p.Generations[i] = peerpb.Status(v.Status), v.Size, v.Generation
		p.Checksums[i], p.HasChecksum[i], p.RunCounts[i] = v.Checksum, v.HasChecksum, v.RunCount
	}
	return p
}

func resolvedFromProto(p *peerpb.ResolveReply, rows int, r *ResolveReply) error {
	r.Values, r.Runs, r.Lease, r.TTL = r.Values[:0], r.Runs[:0], LeaseID(p.GetLease()), time.Duration(p.GetTtlNs())
	statuses, counts := p.GetStatuses(), p.GetRunCounts()
	if err := columns("values", rows, len(statuses), len(p.GetSizes()), len(p.GetGenerations()),
		len(p.GetChecksums()), len(p.GetHasChecksum()), len(counts)); err != nil {
		return err
	}
	var err error
	if r.Runs, err = runsFromProto(p.GetRuns(), counts, r.Runs); err != nil {
		return err
	}
	first := uint32(0)
	for i, s := range statuses {
		r.Values = append(r.Values, Value{
			Status: statusFromProto(s), Size: p.GetSizes()[i], Generation: p.GetGenerations()[i],
			Checksum: p.GetChecksums()[i], HasChecksum: p.GetHasChecksum()[i], FirstRun: first, RunCount: counts[i],
		})
		first += counts[i]
	}
	return nil
}

func releaseToProto(r *ReleaseRequest) *peerpb.ReleaseRequest {
	return &peerpb.ReleaseRequest{Client: wire.ToPeer(r.Client), To: r.To, Lease: uint64(r.Lease)}
}

func releaseFromProto(p *peerpb.ReleaseRequest) *ReleaseRequest {
	return &ReleaseRequest{Client: wire.FromPeer(p.GetClient()), To: p.GetTo(), Lease: LeaseID(p.GetLease())}
}

func releasedToProto(r *ReleaseReply) *peerpb.ReleaseReply { return &peerpb.ReleaseReply{Held: r.Held} }

func releasedFromProto(p *peerpb.ReleaseReply) *ReleaseReply { return &ReleaseReply{Held: p.GetHeld()} }

func removeToProto(r *RemoveRequest) *peerpb.RemoveRequest {
	return &peerpb.RemoveRequest{To: r.To, Keys: wire.ToKeys(r.Keys)}
}

func removeFromProto(p *peerpb.RemoveRequest) (*RemoveRequest, error) {
	keys, err := wire.FromKeys(p.GetKeys(), MaxKeys)
	return &RemoveRequest{To: p.GetTo(), Keys: keys}, err
}

func statsToProto(s *Stats) *peerpb.StatsReply {
	return &peerpb.StatsReply{
		Peer: wire.ToPeer(s.Peer), PageSize: s.PageSize, Pages: s.Pages, FreePages: s.FreePages,
		LargestFreeRun: s.LargestFreeRun, Fragmentation: s.Fragmentation, Keys: s.Keys, PendingSlots: s.PendingSlots,
		Leases: s.Leases, QuarantinedPages: s.QuarantinedPages, Evictions: s.Evictions, Expired: s.Expired,
		FenceFailures: s.FenceFailures,
	}
}

func statsFromProto(p *peerpb.StatsReply) *Stats {
	return &Stats{
		Peer: wire.FromPeer(p.GetPeer()), PageSize: p.GetPageSize(), Pages: p.GetPages(), FreePages: p.GetFreePages(),
		LargestFreeRun: p.GetLargestFreeRun(), Fragmentation: p.GetFragmentation(), Keys: p.GetKeys(),
		PendingSlots: p.GetPendingSlots(), Leases: p.GetLeases(), QuarantinedPages: p.GetQuarantinedPages(),
		Evictions: p.GetEvictions(), Expired: p.GetExpired(), FenceFailures: p.GetFenceFailures(),
	}
}
