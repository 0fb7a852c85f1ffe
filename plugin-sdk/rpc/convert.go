package rpc

import (
	"cmp"
	"errors"
	"math"
	"strings"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/proto/backendpb"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// Limits of an error on the wire. With them an encoded error is never longer than shm.MaxError.
const (
	maxText   = 2048 // of Error.Text, in bytes
	maxWord   = 256  // of each of its other texts
	maxCauses = 8    // how deep causes go
)

// textOf cuts a text to what may travel. Texts of protocol buffers are UTF-8.
func textOf(s string, limit int) string {
	return strings.ToValidUTF8(s[:min(len(s), limit)], "?")
}

func peerOut(p backend.Peer) *backendpb.Peer {
	return &backendpb.Peer{Node: p.Node, Incarnation: p.Incarnation, Host: p.Host}
}

func peerIn(p *backendpb.Peer) backend.Peer {
	return backend.Peer{Node: p.GetNode(), Incarnation: p.GetIncarnation(), Host: p.GetHost()}
}

func remoteOut(r backend.Remote) *backendpb.Remote {
	return &backendpb.Remote{
		Peer: peerOut(r.Peer), Region: uint64(r.Region), Kind: uint32(r.Kind), Rights: uint32(r.Rights), Size: r.Size,
		Place: r.Place, Key: r.Key,
	}
}

// remoteIn leaves what does not fit into its type zero, which no backend accepts: there is no such kind, and a region
// without rights cannot be reached. What cannot be a place takes the kind with it.
func remoteIn(r *backendpb.Remote) backend.Remote {
	in := backend.Remote{
		Peer: peerIn(r.GetPeer()), Region: backend.RegionID(r.GetRegion()), Kind: backend.MemoryKind(narrow(r.GetKind())),
		Rights: backend.Rights(narrow(r.GetRights())), Size: r.GetSize(), Place: r.GetPlace(), Key: r.GetKey(),
	}
	if !backend.ValidPlace(in.Place) {
		in.Kind, in.Place = 0, ""
	}
	return in
}

// gpuOut leaves the address out, which means nothing in another process; nil for nil.
func gpuOut(g *backend.GPURange) *backendpb.GPURange {
	if g == nil {
		return nil
	}
	return &backendpb.GPURange{Runtime: g.Runtime, Device: g.Device, Allocation: g.Allocation, Offset: g.Offset, Handle: g.Handle}
}

// gpuIn decodes where a region of so many bytes lies; nil for nil. It checks nothing.
func gpuIn(g *backendpb.GPURange, size uint64) *backend.GPURange {
	if g == nil {
		return nil
	}
	return &backend.GPURange{
		Runtime: g.GetRuntime(), Device: g.GetDevice(), Size: size, Allocation: g.GetAllocation(), Offset: g.GetOffset(), Handle: g.GetHandle(),
	}
}

func narrow(n uint32) uint8 {
	if n > 255 {
		return 0
	}
	return uint8(n)
}

// errorOut encodes an error; nil for nil. An error that is no *backend.Error keeps its code and its text. A cause that
// is none keeps its text, with code zero.
func errorOut(err error) *backendpb.Error {
	if err == nil {
		return nil
	}
	e, ok := err.(*backend.Error)
	if !ok {
		e = &backend.Error{Code: backend.CodeOf(err), Text: err.Error()}
	}
	out := chainOut(e, maxCauses)
	out.Code = cmp.Or(out.Code, uint32(backend.Internal)) // a defect, and still an error
	return out
}

func chainOut(e *backend.Error, depth int) *backendpb.Error {
	out := &backendpb.Error{
		Code: uint32(e.Code), Op: textOf(e.Op, maxWord), Backend: textOf(e.Backend, maxWord),
		Region: uint64(e.Region), Offset: e.Offset, Length: e.Length,
		Vendor: int64(e.Vendor), VendorText: textOf(e.VendorText, maxWord), Text: textOf(e.Text, maxText),
		RetryAfterNs: int64(e.RetryAfter),
	}
	if e.Peer != (backend.Peer{}) {
		out.Peer = &backendpb.Peer{
			Node: textOf(e.Peer.Node, maxWord), Incarnation: e.Peer.Incarnation, Host: textOf(e.Peer.Host, maxWord),
		}
	}
	if e.Err == nil || depth == 1 {
		return out
	}
	if cause, ok := e.Err.(*backend.Error); ok {
		out.Cause = chainOut(cause, depth-1)
	} else {
		out.Cause = &backendpb.Error{Text: textOf(e.Err.Error(), maxText)}
	}
	return out
}

// errorIn decodes an error; nil for nil. It does not trust it: a code that is not known becomes Internal.
func errorIn(e *backendpb.Error) error {
	if e == nil {
		return nil
	}
	return chainIn(e, maxCauses)
}

func chainIn(e *backendpb.Error, depth int) *backend.Error {
	out := &backend.Error{
		Code: codeIn(e.GetCode()), Op: e.GetOp(), Backend: e.GetBackend(), Peer: peerIn(e.GetPeer()),
		Region: backend.RegionID(e.GetRegion()), Offset: e.GetOffset(), Length: e.GetLength(),
		Vendor: int(e.GetVendor()), VendorText: e.GetVendorText(), Text: e.GetText(),
		RetryAfter: max(0, time.Duration(e.GetRetryAfterNs())),
	}
	switch cause := e.GetCause(); {
	case cause == nil || depth == 1:
	case cause.GetCode() == 0:
		out.Err = errors.New(cause.GetText())
	default:
		out.Err = chainIn(cause, depth-1)
	}
	return out
}

func codeIn(code uint32) backend.Code {
	for _, known := range backend.Codes {
		if code == uint32(known) {
			return known
		}
	}
	return backend.Internal
}

func infoOut(i backend.Info) *backendpb.Info {
	c := i.Capabilities
	return &backendpb.Info{Name: i.Name, Version: i.Version, Capabilities: &backendpb.Capabilities{
		Ops: uint32(c.Ops), Local: uint32(c.Local), Remote: uint32(c.Remote), Reach: uint32(c.Reach), NeedsFd: c.NeedsFD,
		LimitSegments: uint64(c.Limits.Segments), LimitSegmentBytes: c.Limits.SegmentBytes,
		LimitTransferBytes: c.Limits.TransferBytes, Window: uint32(c.Window), Simulated: c.Simulated, Links: linksOut(c.Links),
	}}
}

// linksOut keeps apart nil, which means all places, and an empty list, which means none.
func linksOut(links []backend.Link) *backendpb.Links {
	if links == nil {
		return nil
	}
	out := &backendpb.Links{}
	for _, l := range links {
		out.Links = append(out.Links, &backendpb.Link{
			Near: textOf(l.Near, backend.MaxPlace), Far: textOf(l.Far, backend.MaxPlace), Cost: int64(l.Cost), Text: textOf(l.Text, maxWord),
		})
	}
	return out
}

// maxLinks bounds the links of one backend: all pairs of 63 GPUs and the host.
const maxLinks = 4096

func linksIn(links *backendpb.Links) ([]backend.Link, error) {
	if links == nil {
		return nil, nil
	}
	if n := len(links.GetLinks()); n > maxLinks {
		return nil, backend.Errorf(backend.BadRequest, "%d links, more than %d", n, maxLinks)
	}
	in := []backend.Link{}
	for i, l := range links.GetLinks() {
		if !backend.ValidPlace(l.GetNear()) || !backend.ValidPlace(l.GetFar()) || len(l.GetText()) > maxWord || l.GetCost() < 0 ||
			l.GetCost() > math.MaxInt {
			return nil, backend.Errorf(backend.BadRequest, "link %d from %.*q to %.*q, with a text of %d bytes, and cost %d",
				i, backend.MaxPlace, l.GetNear(), backend.MaxPlace, l.GetFar(), len(l.GetText()), l.GetCost())
		}
		in = append(in, backend.Link{Near: l.GetNear(), Far: l.GetFar(), Cost: int(l.GetCost()), Text: l.GetText()})
	}
	return in, nil
}

// maxWindow is the widest window that a host grants: it remembers what is in flight.
const maxWindow = 1 << 20

// infoIn decodes what a plugin says of itself, and refuses what makes no sense. Transfers are limited to what a record
// can carry.
func infoIn(i *backendpb.Info) (backend.Info, error) {
	c := i.GetCapabilities()
	info := backend.Info{Name: i.GetName(), Version: i.GetVersion(), Capabilities: backend.Capabilities{
		Ops: backend.Op(narrow(c.GetOps())), Local: backend.MemoryKindSet(narrow(c.GetLocal())),
		Remote: backend.MemoryKindSet(narrow(c.GetRemote())), Reach: backend.Reach(narrow(c.GetReach())), NeedsFD: c.GetNeedsFd(),
		Limits: backend.Limits{
			Segments: int(min(c.GetLimitSegments(), shm.MaxSegments)), SegmentBytes: c.GetLimitSegmentBytes(),
			TransferBytes: c.GetLimitTransferBytes(),
		}.Tighten(backend.Limits{Segments: shm.MaxSegments}),
		Window: int(min(c.GetWindow(), maxWindow)), Simulated: c.GetSimulated(),
	}}
	fault := func(format string, args ...any) (backend.Info, error) {
		err := backend.Errorf(backend.Internal, "the plugin claims what makes no sense: "+format, args...)
		err.Backend, err.Op = info.Name, "open"
		return backend.Info{}, err
	}
	got := &info.Capabilities
	var err error
	got.Links, err = linksIn(c.GetLinks())
	switch {
	case err != nil:
		return fault("%v", err)
	case got.Ops == 0 || got.Ops&^(backend.Write|backend.Read) != 0:
		return fault("operations %d", c.GetOps())
	case got.Local == 0 || got.Remote == 0:
		return fault("no kind of memory at one end")
	case got.Reach < backend.SameProcess || got.Reach > backend.Network:
		return fault("a reach of %d", c.GetReach())
	case got.Window == 0:
		return fault("a window of 0")
	case len(info.Version) > maxWord:
		return fault("a version of %d bytes", len(info.Version))
	}
	return info, nil
}

// maxCounts bounds the counters of one backend.
const maxCounts = 1000

func countsOut(counts []backend.Count) []*backendpb.Count {
	var out []*backendpb.Count
	for _, c := range counts {
		out = append(out, &backendpb.Count{Name: c.Name, Value: c.Value})
	}
	return out
}

// countsIn decodes the counters of a plugin; none when there are too many, or when a name makes no sense or is there
// twice.
func countsIn(counts []*backendpb.Count) []backend.Count {
	if len(counts) > maxCounts {
		return nil
	}
	var in []backend.Count
	known := make(map[string]struct{}, len(counts))
	for _, c := range counts {
		if known[c.GetName()] = struct{}{}; !validName(c.GetName(), "_") {
			return nil
		}
		in = append(in, backend.Count{Name: c.GetName(), Value: c.GetValue()})
	}
	if len(known) != len(in) {
		return nil
	}
	return in
}
