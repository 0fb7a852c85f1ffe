package peer

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// StoreOptions is what a Store is made with.
type StoreOptions struct {
	PageSize uint64 // bytes
	Regions  []int  // pages of each region of the pool; runs never cross regions
	Limits   Limits
	// MaxPending bounds the slots that are allocated and not committed; 65,536 by default. MaxLeases bounds the
	// leases; 4,096 by default. MaxWithdrawals bounds the evicted keys that the directory has not heard of yet;
	// 262,144 by default. A call that would exceed one of the first two ends with Busy.
	MaxPending, MaxLeases, MaxWithdrawals int
	// ClientShare is the share of the first two that one client may have, so that it cannot keep the others out;
	// 0.5 by default, and no more than 1. A call that would exceed it ends with Busy.
	ClientShare float64
	// Fence is called, outside all locks, before pages are used again that a client may still be storing to. See
	// backend.Backend.
	Fence func(ctx context.Context, client backend.Peer) error
	// Evicting is called, under the lock, when an eviction has given Evicted something to return. It must not block
	// nor call the store. May be nil.
	Evicting func()
	// Now is the clock; time.Now when nil.
	Now func() time.Time
}

// Store keeps the books of a pool: which pages belong to which slot, which slots are readable under which key, who
// is reading them, and which go first when room is needed. It moves no bytes and knows no directory.
//
// A slot goes one way: pending, from Allocate on; committed; and free again. It ends early when it is aborted or
// its time runs out, and it passes through quarantine when its client may still be storing to it then.
//
// It may be used by any number of goroutines. Each call takes the one lock once, whatever the size of its batch,
// and never holds it while it fences. The strings of keys that are allocated are kept.
type Store struct {
	fence          func(ctx context.Context, client backend.Peer) error
	evicting       func()
	now            func() time.Duration // since the store was made
	pageSize       uint64
	pages          int
	maxWithdrawals int
	clientPending  int // slots that one client may have pending
	clientLeases   int
	maxRuns        int // in one reply; smaller in tests

	mu      sync.Mutex
	limits  Limits
	regions []*region.Pages
	freed   pageRun // given back last and not in regions yet: what follows is most often its neighbour
	free    int     // pages, in all regions and in freed

	keys        map[string]*slot // committed
	pending     table[slot]
	pendingList list[slot]
	unsettled   list[slot] // committed, and the directory did not answer
	recent      list[slot] // published and not leased; the least recently used first
	evictable   int        // pages of those in recent
	leases      table[lease]
	leaseList   list[lease]
	clients     map[backend.Peer]*client

	requests uint64   // to the directory: the greatest Sequence
	floor    uint64   // above the Sequence of every publication that the directory did not answer
	evicted  []string // keys that the directory still lists
	// overflow says that evicted was full: the directory lists keys that nobody remembers.
	overflow bool

	quarantined                        int // pages
	evictions, expiries, fenceFailures uint64

	slabs        [][]slot
	spareSlots   []*slot
	spareLeases  []*lease
	spareClients []*client
	// Scratch space of Allocate: the pages that each key needs, and the runs that are taken; those before carved
	// have been handed out.
	need   []int
	taken  []pageRun
	carved int
	runs   []region.Run
}

// slot is pages that belong to one value, or will.
type slot struct {
	hook        hook[slot] // in pendingList, unsettled or recent
	state       slotState
	hasChecksum bool
	leases      int
	pages       int
	id          SlotID
	size        uint64 // bytes
	checksum    uint64
	key         string
	client      *client       // while pending or in quarantine
	deadline    time.Duration // while pending
	runs        []pageRun
	first       [1]pageRun // most slots are one run: it needs no allocation
}

type slotState uint8

const (
	idle        slotState = iota // in no use; among spareSlots
	pending                      // in the table of pending slots
	unpublished                  // in keys; the directory may not list it yet
	published                    // in keys
	removed                      // in keys no more, but leased
	quarantined                  // its client may still be storing to it
)

// pageRun is consecutive pages of one region.
type pageRun struct {
	region uint32
	region.Run
}

// lease holds the slots of one Resolve.
type lease struct {
	hook     hook[lease]
	id       LeaseID
	client   *client
	deadline time.Duration
	slots    []*slot
}

// client is a peer that has something in the store.
type client struct {
	peer       backend.Peer
	references int // pending slots, leases and slots in quarantine
	pending    int // slots
	leases     int
	quarantine []*slot
	// After a fence has failed: when to try again, and how long to wait after that.
	retryAt, backoff time.Duration
}

// How often a client is fenced that cannot be, how many clients are fenced at once, and how long one may take.
const (
	minFenceBackoff = 100 * time.Millisecond
	maxFenceBackoff = 10 * time.Second
	maxFences       = 8
	fenceTimeout    = 5 * time.Second
)

const (
	slabSlots       = 256 // slots that are made at once
	keptRuns        = 64  // capacity of a slot's runs that is worth keeping
	keptLeasedSlots = 1024
)

// NewStore makes a store over pages that are all free. The error names every option that is wrong.
func NewStore(o StoreOptions) (*Store, error) {
	setDefault(&o.MaxPending, 1<<16)
	setDefault(&o.MaxLeases, 1<<12)
	setDefault(&o.MaxWithdrawals, 1<<18)
	setDefault(&o.ClientShare, 0.5)
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Evicting == nil {
		o.Evicting = func() {}
	}
	limits, err := o.Limits.withDefaults()
	faults := []error{err}
	if o.PageSize == 0 {
		faults = append(faults, errors.New("page size: it must not be zero"))
	}
	if o.Fence == nil {
		faults = append(faults, errors.New("fence: it must not be nil"))
	}
	if min(o.MaxPending, o.MaxLeases, o.MaxWithdrawals) < 0 {
		faults = append(faults, errors.New("max pending, max leases, max withdrawals: they must not be negative"))
	}
	if !(o.ClientShare > 0 && o.ClientShare <= 1) {
		faults = append(faults, fmt.Errorf("client share %g: it must obey 0 < share <= 1", o.ClientShare))
	}
	start := o.Now()
	s := &Store{
		fence:          o.Fence,
		evicting:       o.Evicting,
		now:            func() time.Duration { return o.Now().Sub(start) },
		pageSize:       o.PageSize,
		maxWithdrawals: o.MaxWithdrawals,
		clientPending:  int(math.Ceil(o.ClientShare * float64(o.MaxPending))),
		clientLeases:   int(math.Ceil(o.ClientShare * float64(o.MaxLeases))),
		maxRuns:        MaxRuns,
		limits:         limits,
		keys:           make(map[string]*slot),
		clients:        make(map[backend.Peer]*client),
	}
	for i, pages := range o.Regions {
		if pages <= 0 || pages > math.MaxUint32 {
			faults = append(faults, fmt.Errorf("region %d: %d pages: there must be at least one, and they are counted in 32 bits", i, pages))
			continue
		}
		s.regions = append(s.regions, region.NewPages(pages))
		s.pages += pages
	}
	if err := errors.Join(faults...); err != nil {
		return nil, &backend.Error{Code: backend.BadRequest, Op: "new store", Err: err}
	}
	s.free = s.pages
	s.pending, s.leases = newTable[slot](o.MaxPending), newTable[lease](o.MaxLeases)
	s.pendingList.init()
	s.unsettled.init()
	s.recent.init()
	s.leaseList.init()
	return s, nil
}

// SetLimits changes the limits. Slots and leases that exist keep the times that their clients were told.
func (s *Store) SetLimits(l Limits) error {
	l, err := l.withDefaults()
	if err != nil {
		return &backend.Error{Code: backend.BadRequest, Op: "set limits", Err: err}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limits = l
	return nil
}

// Allocate reserves a slot for each key, as Service.Allocate does. A batch that fits is allocated in one piece, so
// that neighbours in the batch are neighbours in memory and travel in one segment. One that does not is allocated
// key by key, for as many keys as there is room for.
//
// A key that is pending elsewhere, or is not in the directory yet, gets another slot: it is not there for everyone
// until it is published, and it may never be.
func (s *Store) Allocate(req *AllocateRequest, reply *AllocateReply) error {
	reply.Slots = sized(reply.Slots, len(req.Keys))
	reply.Runs = reply.Runs[:0]
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	s.expire(now)
	reply.TTL = s.limits.SlotTTL

	wanted, total := s.admit(req, reply.Slots)
	if wanted == 0 {
		return nil
	}
	client := s.refer(req.Client)
	defer s.dereference(client, 0)
	switch {
	case wanted > s.pending.room():
		return backend.Errorf(backend.Busy, "%d slots are waiting to be committed, and there may be no more than %d: commit or abort some",
			s.pending.live, s.pending.limit)
	case wanted > s.clientPending-client.pending:
		return backend.Errorf(backend.Busy, "%d slots of the client are waiting to be committed, and it may have no more than %d: commit or abort some",
			client.pending, s.clientPending)
	}
	s.makeRoom(total)
	together := s.take(total, s.maxRuns-wanted)
	deadline := now + s.limits.SlotTTL + s.limits.Grace
	for i, pages := range s.need {
		if pages == 0 {
			continue
		}
		if !together && !s.take(pages, s.maxRuns-len(reply.Runs)) {
			reply.Slots[i].Status = NoSpace
			continue
		}
		sl := s.newSlot()
		s.carve(sl, pages)
		sl.state, sl.key, sl.size, sl.client, sl.deadline = pending, req.Keys[i], req.Sizes[i], client, deadline
		sl.id = SlotID(s.pending.add(sl))
		s.pendingList.pushBack(&sl.hook)
		client.references++
		client.pending++
		first := len(reply.Runs)
		reply.Runs = s.appendRuns(reply.Runs, sl)
		reply.Slots[i] = Slot{Status: OK, ID: sl.id, FirstRun: uint32(first), RunCount: uint32(len(sl.runs))}
	}
	return nil
}

// admit fills s.need with the pages of each key that a slot is to be made for, and the statuses of the others: what
// finds no room even when all is evicted that may be, is not to evict anything.
func (s *Store) admit(req *AllocateRequest, slots []Slot) (wanted, total int) {
	s.need = sized(s.need, len(req.Keys))
	capacity := uint64(s.pages) * s.pageSize
	room := s.free + s.evictable
	for i, key := range req.Keys {
		size := req.Sizes[i]
		if !validKey(key) || size == 0 || size > capacity {
			slots[i].Status = Refused
			continue
		}
		if held := s.keys[key]; held != nil && held.state == published {
			slots[i].Status = Exists
			continue
		}
		pages := int((size-1)/s.pageSize + 1)
		if pages > room-total {
			slots[i].Status = NoSpace
			continue
		}
		s.need[i] = pages
		wanted++
		total += pages
	}
	return wanted, total
}

func validKey(key string) bool { return key != "" && len(key) <= MaxKeyLength }

// makeRoom evicts when the pages asked for would lift the use above the high watermark.
func (s *Store) makeRoom(pages int) {
	all := float64(s.pages)
	if float64(s.pages-s.free+pages) <= s.limits.HighWatermark*all {
		return
	}
	defer s.evicting()
	stay := s.limits.LowWatermark*all - float64(pages)
	for float64(s.pages-s.free) > stay {
		victim := s.recent.front()
		if victim == nil {
			return
		}
		s.withdrawLater(victim.key)
		s.drop(victim)
		s.evictions++
	}
}

// take moves n free pages to s.taken, in as few runs as possible and no more than maxRuns, or none at all.
func (s *Store) take(n, maxRuns int) bool {
	if n > s.free {
		return false
	}
	s.flushFreed()
	s.taken, s.carved = s.taken[:0], 0
	for left := n; left > 0; {
		at := s.bestRegion(left)
		pages := s.regions[at]
		part := min(left, pages.FreePages())
		s.runs, _ = pages.Alloc(part, s.runs[:0]) // they are free: it cannot refuse
		for _, r := range s.runs {
			s.taken = append(s.taken, pageRun{uint32(at), r})
		}
		s.free -= part
		left -= part
	}
	if len(s.taken) > maxRuns {
		s.giveBack(s.taken)
		return false
	}
	return true
}

// bestRegion is the first region that has n pages in one run, or else the one with the most free pages.
func (s *Store) bestRegion(n int) int {
	best := 0
	for i, pages := range s.regions {
		if pages.LargestRun() >= n {
			return i
		}
		if pages.FreePages() > s.regions[best].FreePages() {
			best = i
		}
	}
	return best
}

// carve gives a slot the next n of the pages that were taken.
func (s *Store) carve(sl *slot, n int) {
	sl.pages = n
	for n > 0 {
		next := &s.taken[s.carved]
		piece := *next
		piece.Count = min(piece.Count, uint32(n))
		sl.runs = append(sl.runs, piece)
		n -= int(piece.Count)
		next.First += piece.Count
		next.Count -= piece.Count
		if next.Count == 0 {
			s.carved++
		}
	}
}

// appendRuns appends the runs of a slot in bytes. The last one is cut to the size of the value.
func (s *Store) appendRuns(out []Run, sl *slot) []Run {
	left := sl.size
	for _, r := range sl.runs {
		length := min(left, uint64(r.Count)*s.pageSize)
		out = append(out, Run{Region: r.region, Offset: uint64(r.First) * s.pageSize, Length: length})
		left -= length
	}
	return out
}

// Commit makes slots readable at this node, as far as Service.Commit allows, and fills p with the keys that the
// directory has to hear of. The caller publishes p, and passes it to Settle or Unsettle.
//
// p also holds the keys whose slot came second to one that is not published yet: who is told that a key exists may
// rely on finding it.
func (s *Store) Commit(req *CommitRequest, reply *CommitReply, p *Publication) {
	reply.Statuses = sized(reply.Statuses, len(req.Slots))
	p.reset()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire(s.now())
	client := s.clients[req.Client]
	for i, c := range req.Slots {
		sl := s.pending.get(uint64(c.ID))
		if sl == nil || sl.client != client {
			reply.Statuses[i] = Expired
			continue
		}
		s.endPending(sl)
		s.dereference(client, 1)
		if first := s.keys[sl.key]; first != nil {
			reply.Statuses[i] = Exists
			if first.state == unpublished {
				p.add(first, i)
			}
			s.recycle(sl)
			continue
		}
		reply.Statuses[i] = OK
		sl.state, sl.client = unpublished, nil
		sl.checksum, sl.hasChecksum = c.Checksum, c.HasChecksum
		s.keys[sl.key] = sl
		p.add(sl, i)
	}
	p.Request.Sequence, p.Request.Free = s.sequence(), s.freeBytes()
}

// Abort gives slots back. With Fence in the request their pages stay out of use until the client is fenced. Slots
// that are not the client's, or not pending, are left alone.
func (s *Store) Abort(req *AbortRequest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire(s.now())
	client := s.clients[req.Client]
	for _, id := range req.Slots {
		sl := s.pending.get(uint64(id))
		if sl == nil || sl.client != client {
			continue
		}
		s.endPending(sl)
		if req.Fence {
			s.quarantine(sl)
			continue
		}
		s.dereference(client, 1)
		s.recycle(sl)
	}
}

// Resolve tells where values lie and puts those that are found under one lease, as Service.Resolve does.
func (s *Store) Resolve(req *ResolveRequest, reply *ResolveReply) error {
	reply.Values = sized(reply.Values, len(req.Keys))
	reply.Runs, reply.Lease = reply.Runs[:0], 0
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	s.expire(now)
	reply.TTL = s.limits.LeaseTTL
	var l *lease
	for i, key := range req.Keys {
		sl := s.keys[key]
		if sl == nil {
			reply.Values[i].Status = Missing
			s.ghost(key)
			continue
		}
		if len(reply.Runs)+len(sl.runs) > s.maxRuns {
			continue // Unknown: the caller asks again
		}
		if l == nil {
			if s.leases.room() == 0 {
				return backend.Errorf(backend.Busy, "there are %d leases, and there may be no more: release some", s.leases.live)
			}
			c := s.refer(req.Client)
			if c.leases == s.clientLeases {
				return backend.Errorf(backend.Busy, "the client has %d leases, and may have no more: release some", c.leases)
			}
			l = s.newLease(c, now)
		}
		s.hold(sl)
		sl.leases++
		l.slots = append(l.slots, sl)
		first := len(reply.Runs)
		reply.Runs = s.appendRuns(reply.Runs, sl)
		reply.Values[i] = Value{
			Status: OK, Size: sl.size, Generation: uint64(sl.id), Checksum: sl.checksum, HasChecksum: sl.hasChecksum,
			FirstRun: uint32(first), RunCount: uint32(len(sl.runs)),
		}
	}
	if l != nil {
		reply.Lease = l.id
	}
	return nil
}

// Release ends a lease, and tells whether there was one to end. One that is not the client's is left alone.
func (s *Store) Release(req *ReleaseRequest, reply *ReleaseReply) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire(s.now())
	l := s.leases.get(uint64(req.Lease))
	if reply.Held = l != nil && l.client.peer == req.Client; reply.Held {
		s.endLease(l)
	}
}

// Remove deletes keys. The pages of those that are leased follow when the last lease has ended.
func (s *Store) Remove(req *RemoveRequest, reply *RemoveReply) {
	reply.Statuses = sized(reply.Statuses, len(req.Keys))
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, key := range req.Keys {
		reply.Statuses[i] = Missing
		if sl := s.keys[key]; sl != nil {
			reply.Statuses[i] = OK
			s.drop(sl)
		}
	}
}

// Expire takes back slots and leases whose time has run out. Every other call does so first; it is for times
// without calls.
func (s *Store) Expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire(s.now())
}

// expire looks only at the oldest: after a time to live has been shortened, what is younger may wait for what was
// promised longer.
func (s *Store) expire(now time.Duration) {
	for sl := s.pendingList.front(); sl != nil && sl.deadline < now; sl = s.pendingList.front() {
		s.endPending(sl)
		s.quarantine(sl)
		s.expiries++
	}
	for l := s.leaseList.front(); l != nil && l.deadline < now; l = s.leaseList.front() {
		s.endLease(l)
	}
}

// reapInterval is how often to call Expire: often enough for what expires to be a little late only.
func (s *Store) reapInterval() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return min(max(min(s.limits.SlotTTL, s.limits.LeaseTTL)/4, 10*time.Millisecond), time.Second)
}

// FenceClient fences a client. When it returns nil, nothing that the client posted before can touch the pool any
// more, and the pages that were in quarantine for it are free.
func (s *Store) FenceClient(ctx context.Context, peer backend.Peer) error {
	ctx, cancel := context.WithTimeout(ctx, fenceTimeout)
	defer cancel()
	s.mu.Lock()
	var held []*slot
	if c := s.clients[peer]; c != nil {
		held, c.quarantine = c.quarantine, nil
	}
	s.mu.Unlock()

	err := s.fence(ctx, peer)

	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.fenceFailures++
	}
	if len(held) == 0 {
		return err
	}
	c := held[0].client // what is held refers to it: it is still there
	if err != nil {
		c.quarantine = append(c.quarantine, held...)
		c.backoff = min(max(2*c.backoff, minFenceBackoff), maxFenceBackoff)
		c.retryAt = s.now() + c.backoff
		return err
	}
	c.backoff = 0
	for _, sl := range held {
		s.quarantined -= sl.pages
		s.recycle(sl)
	}
	s.dereference(c, len(held))
	return nil
}

// FenceQuarantined fences every client that has pages in quarantine, unless a fence of it has failed a short while
// ago, and returns when all have been tried.
func (s *Store) FenceQuarantined(ctx context.Context) {
	var due []backend.Peer
	s.mu.Lock()
	if s.quarantined > 0 {
		now := s.now()
		for peer, c := range s.clients {
			if len(c.quarantine) > 0 && c.retryAt <= now {
				due = append(due, peer)
			}
		}
	}
	s.mu.Unlock()
	var fences errgroup.Group
	fences.SetLimit(maxFences)
	for _, peer := range due {
		fences.Go(func() error {
			_ = s.FenceClient(ctx, peer) // counted, and tried again later
			return nil
		})
	}
	_ = fences.Wait()
}

// Stats returns the state of the pool, but for Stats.Peer.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expire(s.now())
	s.flushFreed()
	st := Stats{
		PageSize: s.pageSize, Pages: uint64(s.pages), FreePages: uint64(s.free), Keys: uint64(len(s.keys)),
		PendingSlots: uint64(s.pending.live), Leases: uint64(s.leases.live), QuarantinedPages: uint64(s.quarantined),
		Evictions: s.evictions, Expired: s.expiries, FenceFailures: s.fenceFailures,
	}
	for _, pages := range s.regions {
		st.LargestFreeRun = max(st.LargestFreeRun, uint64(pages.LargestRun()))
		if s.free > 0 {
			st.Fragmentation += pages.Fragmentation() * float64(pages.FreePages()) / float64(s.free)
		}
	}
	return st
}

// FreeBytes returns how much could be stored without evicting.
func (s *Store) FreeBytes() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.freeBytes()
}

func (s *Store) freeBytes() uint64 { return uint64(s.free) * s.pageSize }

// Capacity returns the size of the pool in bytes.
func (s *Store) Capacity() uint64 { return uint64(s.pages) * s.pageSize }

// endPending takes a slot out of the table of pending ones. It goes somewhere else at once.
func (s *Store) endPending(sl *slot) {
	sl.hook.unlink()
	s.pending.remove(uint64(sl.id))
	sl.client.pending--
}

// quarantine keeps the pages of a slot out of use until its client is fenced.
func (s *Store) quarantine(sl *slot) {
	sl.state = quarantined
	sl.client.quarantine = append(sl.client.quarantine, sl)
	s.quarantined += sl.pages
}

// drop ends a committed slot. Its pages are free once nobody reads them.
func (s *Store) drop(sl *slot) {
	delete(s.keys, sl.key)
	s.hold(sl)
	sl.hook.unlink() // where it is unsettled
	sl.state = removed
	if sl.leases == 0 {
		s.recycle(sl)
	}
}

// offer lets a published slot be evicted, after those that are offered already.
func (s *Store) offer(sl *slot) {
	s.recent.pushBack(&sl.hook)
	s.evictable += sl.pages
}

// hold takes back what offer did, where it did.
func (s *Store) hold(sl *slot) {
	if sl.state == published && sl.leases == 0 {
		sl.hook.unlink()
		s.evictable -= sl.pages
	}
}

// newSlot returns an idle slot, without pages.
func (s *Store) newSlot() *slot {
	if len(s.spareSlots) == 0 {
		slab := make([]slot, slabSlots)
		s.slabs = append(s.slabs, slab)
		for i := range slices.Backward(slab) { // so that they are used, and walked, from the first on
			sl := &slab[i]
			sl.hook.item, sl.runs = sl, sl.first[:0]
			s.spareSlots = append(s.spareSlots, sl)
		}
	}
	last := len(s.spareSlots) - 1
	sl := s.spareSlots[last]
	s.spareSlots = s.spareSlots[:last]
	return sl
}

// recycle frees the pages of a slot that nothing knows any more, and the slot.
func (s *Store) recycle(sl *slot) {
	s.giveBack(sl.runs)
	runs := sl.runs[:0]
	if cap(runs) > keptRuns {
		runs = sl.first[:0]
	}
	*sl = slot{hook: hook[slot]{item: sl}, runs: runs}
	s.spareSlots = append(s.spareSlots, sl)
}

// giveBack frees pages. The values of a batch lie side by side and mostly end together: they are joined before they
// go back to their region, which then has one run to take instead of hundreds.
func (s *Store) giveBack(runs []pageRun) {
	for _, r := range runs {
		s.free += int(r.Count)
		if r.region == s.freed.region && r.First == s.freed.First+s.freed.Count {
			s.freed.Count += r.Count
			continue
		}
		s.flushFreed()
		s.freed = r
	}
}

func (s *Store) flushFreed() {
	if s.freed.Count > 0 {
		s.regions[s.freed.region].Free(s.freed.Run)
		s.freed.Count = 0
	}
}

func (s *Store) newLease(c *client, now time.Duration) *lease {
	var l *lease
	if last := len(s.spareLeases) - 1; last >= 0 {
		l = s.spareLeases[last]
		s.spareLeases = s.spareLeases[:last]
	} else {
		l = new(lease)
		l.hook.item = l
	}
	l.client = c
	c.references++
	c.leases++
	l.deadline = now + s.limits.LeaseTTL + s.limits.Grace
	l.id = LeaseID(s.leases.add(l))
	s.leaseList.pushBack(&l.hook)
	return l
}

// endLease lets go of what a lease held. A value counts as used when its last lease ends.
func (s *Store) endLease(l *lease) {
	for _, sl := range l.slots {
		sl.leases--
		switch {
		case sl.leases > 0:
		case sl.state == removed:
			s.recycle(sl)
		case sl.state == published:
			s.offer(sl)
		}
	}
	l.hook.unlink()
	s.leases.remove(uint64(l.id))
	l.client.leases--
	s.dereference(l.client, 1)
	clear(l.slots)
	l.slots, l.client = l.slots[:0], nil
	if cap(l.slots) > keptLeasedSlots {
		l.slots = nil
	}
	s.spareLeases = append(s.spareLeases, l)
}

// refer returns the record of a client. The caller adds a reference, or calls dereference.
func (s *Store) refer(peer backend.Peer) *client {
	c := s.clients[peer]
	if c == nil {
		if last := len(s.spareClients) - 1; last >= 0 {
			c = s.spareClients[last]
			s.spareClients = s.spareClients[:last]
		} else {
			c = new(client)
		}
		*c = client{peer: peer}
		s.clients[peer] = c
	}
	return c
}

// dereference takes n references away, and forgets a client that has nothing left in the store.
func (s *Store) dereference(c *client, n int) {
	c.references -= n
	if c.references == 0 {
		delete(s.clients, c.peer)
		s.spareClients = append(s.spareClients, c)
	}
}

// sized returns a slice of n zero values, in the memory of s where it is large enough.
func sized[T any](s []T, n int) []T {
	s = slices.Grow(s[:0], n)[:n]
	clear(s)
	return s
}
