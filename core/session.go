package core

import (
	"context"
	"errors"
	"sync"

	"github.com/umbp/umbp/core/dispatch"
	"github.com/umbp/umbp/core/plan"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Session moves bytes between one local and one remote region, for connectors that do their own bookkeeping: no
// keys, no directory, no slots. It goes the same way as a batch of values from the planner on, and gets the same
// care: selection by policy, resends, deadlines that end quietly. Safe for concurrent use.
//
// The remote descriptor comes from the peer's Engine.Descriptor, by whatever means the connector has, and
// Engine.AddPeer must have told how to carry offers to the peer.
type Session struct {
	engine *Engine
	local  *region.Region
	remote *region.Descriptor
	moves  sync.Pool // of *sessionMove
}

// sessionMove is the working memory of one call.
type sessionMove struct {
	runs    []plan.Run
	planner plan.Planner
	job     dispatch.Job
}

// Report says how a batch of segments went.
type Report struct {
	// Outcomes has one entry for each segment given, in order.
	Outcomes []backend.Outcome
	// Err is nil when all are Done; otherwise it joins what went wrong.
	Err  error
	Path Path
	// Fence says that a write ended in doubt on the way, even if a later one was done: have the peer call
	// Engine.Fence before it relies on the memory or uses it for something else.
	Fence bool
}

// Descriptor returns what peers need to reach a region of this process.
func (e *Engine) Descriptor(id backend.RegionID) (region.Descriptor, error) {
	r, ok := e.regions.Get(id)
	if !ok {
		return region.Descriptor{}, backend.Errorf(backend.BadRequest, "region %d is not registered", id)
	}
	return r.Descriptor(e.self), nil
}

// Open returns a session between a registered region and a peer's. It does no I/O: connections are made when the
// session is first used, and made anew when they have failed.
func (e *Engine) Open(local backend.RegionID, remote region.Descriptor) (*Session, error) {
	r, ok := e.regions.Get(local)
	if !ok {
		return nil, backend.Errorf(backend.BadRequest, "region %d is not registered", local)
	}
	return &Session{engine: e, local: r, remote: &remote}, nil
}

// Write moves the segments from the local to the remote region. It returns when nothing touches the local memory
// any more. The remote ranges must not overlap. The segments are the caller's again when it returns.
func (s *Session) Write(ctx context.Context, segments []backend.Segment) Report {
	return s.move(ctx, backend.Write, segments)
}

// Read moves the segments from the remote to the local region. It returns when nothing touches the local memory
// any more. The local ranges must not overlap.
func (s *Session) Read(ctx context.Context, segments []backend.Segment) Report {
	return s.move(ctx, backend.Read, segments)
}

func (s *Session) move(ctx context.Context, op backend.Op, segments []backend.Segment) Report {
	report := Report{Outcomes: make([]backend.Outcome, len(segments)), Path: Path{Node: s.remote.Peer.Node}}
	if report.Err = s.check(segments); report.Err != nil {
		return report
	}
	m, _ := s.moves.Get().(*sessionMove)
	if m == nil {
		m = &sessionMove{}
	}
	m.runs = m.runs[:0]
	for i, seg := range segments {
		m.runs = append(m.runs, plan.Run{
			Key: uint32(i), LocalOffset: seg.Local, RemoteOffset: seg.Remote, Length: seg.Length,
		})
	}
	p, err := m.planner.Plan(op, m.runs, s.engine.dispatcher.Limits())
	if err != nil {
		report.Err = err
		return report
	}
	m.job.Plan = p
	m.job.Locals = append(m.job.Locals[:0], s.local)
	m.job.Remotes = append(m.job.Remotes[:0], s.remote)
	if err := s.engine.dispatcher.Run(ctx, &m.job); err != nil {
		report.Err = err
		report.Fence = op == backend.Write
		for i := range report.Outcomes {
			report.Outcomes[i] = backend.InDoubt
		}
		return report
	}
	m.report(&report, s.engine, p)
	s.moves.Put(m)
	return report
}

func (s *Session) check(segments []backend.Segment) error {
	for i, seg := range segments {
		for _, side := range []struct {
			name         string
			offset, size uint64
		}{{"local", seg.Local, s.local.Size()}, {"remote", seg.Remote, s.remote.Size}} {
			if side.offset > side.size || seg.Length > side.size-side.offset {
				return backend.Errorf(backend.BadRequest, "segment %d: range [%d, +%d) is not in the %s region of %d bytes",
					i, side.offset, seg.Length, side.name, side.size)
			}
		}
	}
	return nil
}

// report turns the outcomes of the plan's segments into those of the caller's.
func (m *sessionMove) report(report *Report, e *Engine, p *plan.Plan) {
	var errs []error
	for g := range m.job.Results {
		r := &m.job.Results[g]
		report.Fence = report.Fence || r.Fence
		report.Path.Attempts += int(r.Attempts)
		if r.Backend >= 0 {
			report.Path.Backend = e.backends[r.Backend].Name
		}
		if r.Err != nil {
			errs = append(errs, r.Err)
		}
	}
	if report.Err = errors.Join(errs...); report.Err == nil {
		for i := range report.Outcomes {
			report.Outcomes[i] = backend.Done
		}
		return
	}
	seen := make([]bool, len(report.Outcomes))
	for n, o := range m.job.Outcomes {
		for _, i := range p.Keys(n) {
			if seen[i] {
				report.Outcomes[i] = both(report.Outcomes[i], o)
				continue
			}
			report.Outcomes[i], seen[i] = o, true
		}
	}
}

// both is the outcome of a segment that was cut in two.
func both(a, b backend.Outcome) backend.Outcome {
	switch {
	case a == b:
		return a
	case a == backend.InDoubt || b == backend.InDoubt:
		return backend.InDoubt
	}
	return backend.Failed // a part of it may be in place, and nothing touches it any more
}
