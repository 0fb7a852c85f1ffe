package peer

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// model is the store as one would write it without a thought for speed: every page has an owner, lists are slices.
type model struct {
	*bench
	limits  Limits
	total   int
	owner   map[uint64]*modelSlot // by page; page numbers go on from region to region
	byKey   map[string]*modelSlot
	pending []*modelSlot
	recent  []*modelSlot // evictable, the least recently used first
	kept    []*modelSlot // published in vain
	leases  []*modelLease
	barred  map[backend.Peer][]*modelSlot // in quarantine
	evicted []string
	listed  []string // keys that the directory is to be told of as gone
	ids     map[SlotID]bool
	unfixed []*modelPublication
}

type modelSlot struct {
	id        SlotID
	key       string
	size      uint64
	client    backend.Peer
	deadline  time.Time
	runs      []Run
	leases    int
	published bool
}

type modelLease struct {
	id       LeaseID
	client   backend.Peer
	deadline time.Time
	slots    []*modelSlot
}

// modelPublication is a commit that the directory has not answered.
type modelPublication struct {
	p     *Publication
	slots []*modelSlot
}

func pages(size uint64) int { return int((size + testPage - 1) / testPage) }

func (m *model) used() int { return len(m.owner) }

// pagesOf lists the pages of runs, and checks that the runs are well formed.
func (m *model) pagesOf(t *rapid.T, runs []Run, size uint64) (out []uint64) {
	sum := uint64(0)
	for i, r := range runs {
		if r.Offset%testPage != 0 || r.Length == 0 || i < len(runs)-1 && r.Length%testPage != 0 {
			t.Fatalf("run %+v does not start and end with a page", r)
		}
		sum += r.Length
		for at := r.Offset; at < r.Offset+r.Length; at += testPage {
			out = append(out, uint64(r.Region)<<32|at/testPage)
		}
	}
	if sum != size {
		t.Fatalf("runs %+v hold %d bytes, want %d", runs, sum, size)
	}
	return out
}

func (m *model) own(t *rapid.T, s *modelSlot) {
	for _, page := range m.pagesOf(t, s.runs, s.size) {
		if other := m.owner[page]; other != nil {
			t.Fatalf("page %x goes to slot %d while slot %d (%q) has it", page, s.id, other.id, other.key)
		}
		m.owner[page] = s
	}
}

func (m *model) free(t *rapid.T, s *modelSlot) {
	for _, page := range m.pagesOf(t, s.runs, s.size) {
		delete(m.owner, page)
	}
}

func without[T comparable](list []T, x T) []T {
	return slices.DeleteFunc(list, func(y T) bool { return y == x })
}

func (m *model) drop(t *rapid.T, s *modelSlot) {
	delete(m.byKey, s.key)
	m.recent, m.kept = without(m.recent, s), without(m.kept, s)
	if s.leases == 0 {
		m.free(t, s)
	}
}

func (m *model) endLease(t *rapid.T, l *modelLease) {
	m.leases = without(m.leases, l)
	for _, s := range l.slots {
		s.leases--
		switch {
		case s.leases > 0:
		case m.byKey[s.key] != s:
			m.free(t, s)
		case s.published:
			m.recent = append(m.recent, s)
		}
	}
}

func (m *model) expire(t *rapid.T) {
	for len(m.pending) > 0 && m.pending[0].deadline.Before(m.clock) {
		s := m.pending[0]
		m.pending = m.pending[1:]
		m.barred[s.client] = append(m.barred[s.client], s)
	}
	for len(m.leases) > 0 && m.leases[0].deadline.Before(m.clock) {
		m.endLease(t, m.leases[0])
	}
}

// settle marks a slot as published.
func (m *model) settle(s *modelSlot) {
	if s.published {
		return
	}
	s.published = true
	m.kept = without(m.kept, s)
	if s.leases == 0 {
		m.recent = append(m.recent, s)
	}
}

func TestStoreAgreesWithModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limits := Limits{
			SlotTTL: 20 * time.Second, LeaseTTL: 10 * time.Second, Grace: time.Second,
			HighWatermark: 0.9, LowWatermark: 0.7,
		}
		regions := rapid.SliceOfN(rapid.IntRange(1, 12), 1, 3).Draw(t, "regions")
		m := &model{
			limits: limits, owner: map[uint64]*modelSlot{}, byKey: map[string]*modelSlot{}, ids: map[SlotID]bool{},
			barred: map[backend.Peer][]*modelSlot{},
		}
		for _, pages := range regions {
			m.total += pages
		}
		m.bench = newModelBench(t, StoreOptions{Regions: regions, Limits: limits, MaxPending: 10, MaxLeases: 4, ClientShare: 0.7})
		t.Repeat(map[string]func(*rapid.T){
			"":          m.check,
			"allocate":  func(t *rapid.T) { m.doAllocate(t) },
			"put":       m.doPut,
			"commit":    m.doCommit,
			"answer":    m.doAnswer,
			"unsettled": m.doUnsettled,
			"abort":     m.doAbort,
			"resolve":   m.doResolve,
			"release":   m.doRelease,
			"remove":    m.doRemove,
			"fence":     m.doFence,
			"wait": func(t *rapid.T) {
				m.clock = m.clock.Add(time.Duration(rapid.IntRange(1, 15).Draw(t, "seconds")) * time.Second)
				m.expire(t)
				m.Expire()
			},
		})
		m.emptyOut(t)
	})
}

func newModelBench(t *rapid.T, o StoreOptions) *bench {
	b := &bench{clock: time.Unix(1_000_000, 0)}
	o.PageSize = testPage
	o.Now = func() time.Time { return b.clock }
	o.Fence = func(context.Context, backend.Peer) error { return b.fenceErr }
	s, err := NewStore(o)
	if err != nil {
		t.Fatal(err)
	}
	b.Store = s
	return b
}

func drawPeer(t *rapid.T) backend.Peer {
	return rapid.SampledFrom([]backend.Peer{alice, bob}).Draw(t, "client")
}

func drawKeys(t *rapid.T) []string {
	return rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "f", "g", "h"}), 1, 5).Draw(t, "keys")
}

// doPut allocates and commits, and the directory agrees: without it, few runs would fill the pool.
func (m *model) doPut(t *rapid.T) {
	req, slots := m.doAllocate(t)
	commit := &CommitRequest{Client: req.Client}
	for _, s := range slots {
		if s.Status == OK {
			commit.Slots = append(commit.Slots, CommitSlot{ID: s.ID, Checksum: uint64(s.ID) * 3, HasChecksum: s.ID%2 == 0})
		}
	}
	m.commit(t, commit)
	publication := m.unfixed[len(m.unfixed)-1]
	m.unfixed = m.unfixed[:len(m.unfixed)-1]
	for range publication.slots {
		publication.p.Reply.Entered = append(publication.p.Reply.Entered, true)
	}
	for _, s := range publication.slots {
		m.settle(s)
	}
	if stale := m.Settle(publication.p); len(stale) > 0 {
		t.Fatalf("stale keys %q, want none", stale)
	}
}

func (m *model) doAllocate(t *rapid.T) (*AllocateRequest, []Slot) {
	req := &AllocateRequest{Client: drawPeer(t), Keys: drawKeys(t)}
	want := make([]Status, len(req.Keys))
	wanted, total, room := 0, 0, m.total-m.used()
	for _, s := range m.recent {
		room += pages(s.size)
	}
	for i, key := range req.Keys {
		size := uint64(rapid.IntRange(0, 6*testPage).Draw(t, "size"))
		req.Sizes = append(req.Sizes, size)
		switch s := m.byKey[key]; {
		case size == 0 || size > uint64(m.total)*testPage:
			want[i] = Refused
		case s != nil && s.published:
			want[i] = Exists
		case pages(size) > room-total:
			want[i] = NoSpace
		default:
			want[i] = OK
			wanted++
			total += pages(size)
		}
	}
	var reply AllocateReply
	err := m.Allocate(req, &reply)
	mine := 0
	for _, s := range m.pending {
		if s.client == req.Client {
			mine++
		}
	}
	if wanted > min(10-len(m.pending), 7-mine) {
		if !errors.Is(err, backend.ErrBusy) {
			t.Fatalf("allocate: %v, want Busy", err)
		}
		return req, nil
	}
	if err != nil {
		t.Fatal(err)
	}
	if float64(m.used()+total) > m.limits.HighWatermark*float64(m.total) && wanted > 0 {
		for len(m.recent) > 0 && float64(m.used()+total) > m.limits.LowWatermark*float64(m.total) {
			m.evicted = append(m.evicted, m.recent[0].key)
			m.listed = append(m.listed, m.recent[0].key)
			m.drop(t, m.recent[0])
		}
	}
	for i, key := range req.Keys {
		got := reply.Slots[i]
		if got.Status != want[i] {
			t.Fatalf("allocate %q: status %d, want %d", key, got.Status, want[i])
		}
		if got.Status != OK {
			continue
		}
		if m.ids[got.ID] {
			t.Fatalf("slot id %d is used twice", got.ID)
		}
		m.ids[got.ID] = true
		s := &modelSlot{
			id: got.ID, key: key, size: req.Sizes[i], client: req.Client,
			deadline: m.clock.Add(m.limits.SlotTTL + m.limits.Grace),
			runs:     slices.Clone(reply.Runs[got.FirstRun : got.FirstRun+got.RunCount]),
		}
		m.own(t, s)
		m.pending = append(m.pending, s)
	}
	return req, reply.Slots
}

// drawSlots picks slots that are pending, and some that are not.
func (m *model) drawSlots(t *rapid.T) (ids []SlotID) {
	known := []SlotID{0, 1, 1 << 40}
	for _, s := range m.pending {
		known = append(known, s.id, s.id)
	}
	return rapid.SliceOfN(rapid.SampledFrom(known), 1, 5).Draw(t, "slots")
}

func (m *model) takePending(id SlotID, client backend.Peer) *modelSlot {
	for _, s := range m.pending {
		if s.id == id && s.client == client {
			m.pending = without(m.pending, s)
			return s
		}
	}
	return nil
}

func (m *model) doCommit(t *rapid.T) {
	req := &CommitRequest{Client: drawPeer(t)}
	for _, id := range m.drawSlots(t) {
		req.Slots = append(req.Slots, CommitSlot{ID: id, Checksum: uint64(id) * 3, HasChecksum: id%2 == 0})
	}
	m.commit(t, req)
}

func (m *model) commit(t *rapid.T, req *CommitRequest) {
	var reply CommitReply
	p := new(Publication)
	m.Commit(req, &reply, p)
	publication := &modelPublication{p: p}
	for i, c := range req.Slots {
		want := Expired
		if s := m.takePending(c.ID, req.Client); s != nil {
			want = OK
			if first := m.byKey[s.key]; first != nil {
				want = Exists
				m.free(t, s)
				if !first.published {
					publication.slots = append(publication.slots, first)
				}
			} else {
				m.byKey[s.key] = s
				publication.slots = append(publication.slots, s)
			}
		}
		if reply.Statuses[i] != want {
			t.Fatalf("commit of slot %d: status %d, want %d", c.ID, reply.Statuses[i], want)
		}
	}
	m.expectPublication(t, publication)
}

func (m *model) expectPublication(t *rapid.T, publication *modelPublication) {
	var want []string
	for _, s := range publication.slots {
		want = append(want, s.key)
	}
	if !slices.Equal(publication.p.Request.Keys, want) {
		t.Fatalf("to publish: %q, want %q", publication.p.Request.Keys, want)
	}
	m.unfixed = append(m.unfixed, publication)
}

// doAnswer has the directory answer, or not answer, one of the publications that are on their way.
func (m *model) doAnswer(t *rapid.T) {
	if len(m.unfixed) == 0 {
		t.Skip("nothing is on its way")
	}
	publication := rapid.SampledFrom(m.unfixed).Draw(t, "publication")
	m.unfixed = without(m.unfixed, publication)
	if rapid.Bool().Draw(t, "lost") {
		m.Unsettle(publication.p)
		for _, s := range publication.slots {
			switch held := m.byKey[s.key]; {
			case held == nil:
				m.listed = append(m.listed, s.key)
			case held == s && !s.published:
				m.kept = append(without(m.kept, s), s)
			}
		}
		return
	}
	var want []string
	for _, s := range publication.slots {
		entered := rapid.Bool().Draw(t, "entered")
		publication.p.Reply.Entered = append(publication.p.Reply.Entered, entered)
		switch held := m.byKey[s.key]; {
		case held == nil && entered:
			want = append(want, s.key)
		case held != s:
		case entered:
			m.settle(s)
		default:
			m.drop(t, s)
		}
	}
	if stale := m.Settle(publication.p); !slices.Equal(stale, want) {
		t.Fatalf("stale keys %q, want %q", stale, want)
	}
}

func (m *model) doUnsettled(t *rapid.T) {
	publication := &modelPublication{p: new(Publication), slots: m.kept}
	m.kept = nil
	if m.Unsettled(publication.p) != (len(publication.slots) > 0) {
		t.Fatalf("unsettled: %q, want %d keys", publication.p.Request.Keys, len(publication.slots))
	}
	m.expectPublication(t, publication)
}

func (m *model) doAbort(t *rapid.T) {
	req := &AbortRequest{Client: drawPeer(t), Slots: m.drawSlots(t), Fence: rapid.Bool().Draw(t, "fence")}
	m.Abort(req)
	for _, id := range req.Slots {
		switch s := m.takePending(id, req.Client); {
		case s == nil:
		case req.Fence:
			m.barred[s.client] = append(m.barred[s.client], s)
		default:
			m.free(t, s)
		}
	}
}

func (m *model) doResolve(t *rapid.T) {
	req := &ResolveRequest{Client: drawPeer(t), Keys: drawKeys(t)}
	var reply ResolveReply
	err := m.Resolve(req, &reply)
	found := slices.ContainsFunc(req.Keys, func(key string) bool { return m.byKey[key] != nil })
	mine := 0
	for _, l := range m.leases {
		if l.client == req.Client {
			mine++
		}
	}
	busy := found && (len(m.leases) == 4 || mine == 3)
	for _, key := range req.Keys {
		if m.byKey[key] == nil {
			m.listed = append(m.listed, key)
		} else if busy {
			break
		}
	}
	if busy {
		if !errors.Is(err, backend.ErrBusy) {
			t.Fatalf("resolve: %v, want Busy", err)
		}
		return
	}
	if err != nil || found != (reply.Lease != 0) {
		t.Fatalf("resolve: %v, found %v, lease %d", err, found, reply.Lease)
	}
	l := &modelLease{id: reply.Lease, client: req.Client, deadline: m.clock.Add(m.limits.LeaseTTL + m.limits.Grace)}
	for i, key := range req.Keys {
		got, s := reply.Values[i], m.byKey[key]
		if s == nil {
			if got.Status != Missing {
				t.Fatalf("resolve %q: status %d, want Missing", key, got.Status)
			}
			continue
		}
		want := Value{
			Status: OK, Size: s.size, Generation: uint64(s.id), Checksum: uint64(s.id) * 3, HasChecksum: s.id%2 == 0,
			FirstRun: got.FirstRun, RunCount: uint32(len(s.runs)),
		}
		if got != want || !slices.Equal(reply.Runs[got.FirstRun:got.FirstRun+got.RunCount], s.runs) {
			t.Fatalf("resolve %q: %+v in %v, want %+v in %v", key, got, reply.Runs, want, s.runs)
		}
		s.leases++
		m.recent = without(m.recent, s)
		l.slots = append(l.slots, s)
	}
	if found {
		m.leases = append(m.leases, l)
	}
}

func (m *model) doRelease(t *rapid.T) {
	ids := []LeaseID{0, 1 << 40}
	for _, l := range m.leases {
		ids = append(ids, l.id)
	}
	req := &ReleaseRequest{Client: drawPeer(t), Lease: rapid.SampledFrom(ids).Draw(t, "lease")}
	var reply ReleaseReply
	m.Release(req, &reply)
	held := false
	for _, l := range m.leases {
		if l.id == req.Lease && l.client == req.Client {
			m.endLease(t, l)
			held = true
			break
		}
	}
	if reply.Held != held {
		t.Fatalf("release of lease %d by %v: held %v, want %v", req.Lease, req.Client, reply.Held, held)
	}
}

func (m *model) doRemove(t *rapid.T) {
	req := &RemoveRequest{Keys: drawKeys(t)}
	var reply RemoveReply
	m.Remove(req, &reply)
	for i, key := range req.Keys {
		want := Missing
		if s := m.byKey[key]; s != nil {
			want = OK
			m.drop(t, s)
		}
		if reply.Statuses[i] != want {
			t.Fatalf("remove %q: status %d, want %d", key, reply.Statuses[i], want)
		}
	}
}

func (m *model) doFence(t *rapid.T) {
	peer := drawPeer(t)
	m.fenceErr = nil
	if rapid.Bool().Draw(t, "fails") {
		m.fenceErr = errors.New("no")
	}
	if err := m.FenceClient(context.Background(), peer); err != m.fenceErr {
		t.Fatalf("fence: %v, want %v", err, m.fenceErr)
	}
	if m.fenceErr == nil {
		for _, s := range m.barred[peer] {
			m.free(t, s)
		}
		delete(m.barred, peer)
	}
}

func (m *model) check(t *rapid.T) {
	got := m.Stats()
	got.LargestFreeRun, got.Fragmentation, got.Expired, got.FenceFailures = 0, 0, 0, 0
	want := Stats{
		PageSize: testPage, Pages: uint64(m.total), FreePages: uint64(m.total - m.used()), Keys: uint64(len(m.byKey)),
		PendingSlots: uint64(len(m.pending)), Leases: uint64(len(m.leases)), Evictions: uint64(len(m.evicted)),
	}
	for _, slots := range m.barred {
		for _, s := range slots {
			want.QuarantinedPages += uint64(pages(s.size))
		}
	}
	if got != want {
		t.Fatalf("stats %+v, want %+v", got, want)
	}
}

// emptyOut ends everything and expects all that the store was made with.
func (m *model) emptyOut(t *rapid.T) {
	var keys []string
	for key := range m.byKey {
		keys = append(keys, key)
	}
	m.Remove(&RemoveRequest{Keys: keys}, new(RemoveReply))
	m.clock, m.fenceErr = m.clock.Add(time.Hour), nil
	m.Expire()
	m.FenceQuarantined(context.Background())
	evicted, _ := m.Evicted(nil)
	if !slices.Equal(evicted, m.listed) {
		t.Fatalf("to withdraw %q, want %q", evicted, m.listed)
	}
	if got := m.Stats(); got.FreePages != got.Pages || got.PendingSlots+got.Leases+got.QuarantinedPages != 0 {
		t.Fatalf("after everything has ended: %+v", got)
	}
	if idle := len(m.slabs) * slabSlots; idle != len(m.spareSlots) || len(m.clients) != 0 {
		t.Fatalf("%d of %d slots are spare, and %d clients are remembered", len(m.spareSlots), idle, len(m.clients))
	}
}
