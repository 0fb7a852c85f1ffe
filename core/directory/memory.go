package directory

import (
	"cmp"
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// DefaultTTL is how long a membership lasts when Options does not say.
const DefaultTTL = 3 * time.Second

const (
	// step is how many entries a walk over all of them visits before it lets others have the lock.
	step = 4096
	// replacedKept is how many replaced incarnations of a node are remembered, to be refused.
	replacedKept = 16
)

// Options configures a Memory. The zero value is ready to use.
type Options struct {
	// TTL is how long a membership lasts unless the node joins again; 0 means DefaultTTL. Not negative.
	TTL time.Duration
	// Now is the clock by which memberships run out; nil means time.Now.
	Now func() time.Time
}

// Memory is a Directory in the memory of this process. It is safe for concurrent use.
//
// An entry points at the member that holds it. When a membership ends, the member is marked as gone, and with
// that all its entries are void at once, however many they are: whoever finds a void entry treats it as absent.
// A goroutine ends memberships whose time has run out, which every call does too before it answers, and removes
// void entries in small steps.
type Memory struct {
	ttl time.Duration
	now func() time.Time

	mu      sync.RWMutex
	entries map[string]entry
	void    int                // how many of the entries are void
	records map[string]*record // by the name of the node
	members []*member          // ordered by name
	expiry  time.Time          // no membership runs out before it

	// placing guards the running estimates, member.placed and member.turn, together with mu held for reading;
	// mu held for writing guards them alone.
	placing sync.Mutex
	turn    float64 // the least turn that a member starts from; see place.go

	scratch sync.Pool // of *scratch
	closing sync.Once
	stop    chan struct{} // closed by Close
	stopped sync.WaitGroup
}

// entry is one key. It is void when its owner is gone.
type entry struct {
	owner    *member
	size     uint64 // bytes
	sequence uint64 // of the youngest Publish that entered it
}

// member is one membership of one incarnation of a node.
type member struct {
	node     Node
	number   uint64 // JoinReply.Membership
	floor    uint64 // the greatest WithdrawRequest.Floor
	index    int    // in Memory.members
	deadline time.Time
	entries  int
	gone     bool

	placed uint64  // bytes placed here since the node last said what it has free
	turn   float64 // when it is the node's turn to evict; see place.go
}

// record is what is known of a node by its name, whether it is a member or not.
type record struct {
	live        *member  // nil when it is not a member
	incarnation uint64   // that joined last
	replaced    []uint64 // those before it, oldest first
}

// NewMemory returns an empty directory. Close ends it.
func NewMemory(opts Options) *Memory {
	d := &Memory{
		ttl:     cmp.Or(opts.TTL, DefaultTTL),
		now:     opts.Now,
		entries: make(map[string]entry),
		records: make(map[string]*record),
		scratch: sync.Pool{New: func() any { return new(scratch) }},
		stop:    make(chan struct{}),
	}
	if d.now == nil {
		d.now = time.Now
	}
	d.stopped.Go(d.reap)
	return d
}

// Close ends the directory's goroutine. It is called after the last call of another method has returned. Closing
// twice is not an error.
func (d *Memory) Close() error {
	d.closing.Do(func() { close(d.stop) })
	d.stopped.Wait()
	return nil
}

// Join implements Directory.
func (d *Memory) Join(ctx context.Context, node *Node) (JoinReply, error) {
	if err := node.check(ctx); err != nil {
		return JoinReply{}, err
	}
	now := d.lock()
	defer d.mu.Unlock()
	m, err := d.admit(node.Peer)
	if err != nil {
		return JoinReply{}, err
	}
	m.node = *node
	m.report(node.Free)
	m.deadline = now.Add(d.ttl) // which is not before d.expiry, since that was set no later
	return JoinReply{TTL: d.ttl, Membership: m.number}, nil
}

// admit returns the membership of peer, which it begins when there is none. Incarnations have no order: the one
// that joined last is the current one, and those that it replaced stay out.
func (d *Memory) admit(peer backend.Peer) (*member, error) {
	r := d.records[peer.Node]
	switch {
	case r != nil && slices.Contains(r.replaced, peer.Incarnation):
		return nil, &backend.Error{Code: backend.PeerGone, Op: "join", Peer: peer,
			Text: "a newer process has joined under this name; give each process a name of its own"}
	case (r == nil || r.live == nil) && len(d.members) == MaxNodes:
		return nil, &backend.Error{Code: backend.Busy, Op: "join", Peer: peer,
			Text: "the directory has all the members that it can have", RetryAfter: d.ttl}
	case r == nil:
		r = d.remember(peer)
	case r.incarnation != peer.Incarnation:
		d.drop(r.live)
		r.replace(peer.Incarnation)
	}
	if r.live == nil {
		r.live = &member{number: 1 + rand.Uint64N(math.MaxUint64)}
		at, _ := slices.BinarySearchFunc(d.members, peer.Node, func(m *member, name string) int {
			return strings.Compare(m.node.Peer.Node, name)
		})
		d.members = slices.Insert(d.members, at, r.live)
		d.number(at)
	}
	return r.live, nil
}

// Leave implements Directory.
func (d *Memory) Leave(ctx context.Context, peer backend.Peer) error {
	if err := checkContext(ctx, "leave"); err != nil {
		return err
	}
	d.lock()
	defer d.mu.Unlock()
	d.drop(d.member(peer))
	return nil
}

// Nodes implements Directory.
func (d *Memory) Nodes(ctx context.Context) ([]Node, error) {
	if err := checkContext(ctx, "nodes"); err != nil {
		return nil, err
	}
	d.rlock()
	defer d.mu.RUnlock()
	nodes := make([]Node, len(d.members))
	for i, m := range d.members {
		nodes[i] = m.node
	}
	return nodes, nil
}

// Publish implements Directory.
func (d *Memory) Publish(ctx context.Context, req *PublishRequest, reply *PublishReply) error {
	if err := req.check(ctx); err != nil {
		return err
	}
	reply.Entered = slices.Grow(reply.Entered[:0], len(req.Keys))[:len(req.Keys)]
	d.lock()
	defer d.mu.Unlock()
	m := d.member(req.Peer)
	switch {
	case m == nil || req.Membership != 0 && req.Membership != m.number:
		return &backend.Error{Code: backend.PeerGone, Op: "publish", Peer: req.Peer,
			Text: "it is not a member of the directory, or not the member that it was; join first"}
	case req.Sequence < m.floor:
		return &backend.Error{Code: backend.Busy, Op: "publish", Peer: req.Peer,
			Text: "a younger withdrawal has made it void; publish again"}
	}
	m.report(req.Free)
	for i, key := range req.Keys {
		e, ok := d.entries[key]
		if ok && e.owner.gone {
			d.void--
			ok = false
		}
		if reply.Entered[i] = !ok || e.owner == m; !reply.Entered[i] {
			continue
		}
		if !ok {
			m.entries++
		}
		next := entry{owner: m, size: req.Sizes[i], sequence: req.Sequence}
		if !ok || e != next && e.sequence <= req.Sequence {
			// A copy of the key, since the caller's may be a piece of something large.
			d.entries[strings.Clone(key)] = next
		}
	}
	return nil
}

// Withdraw implements Directory.
func (d *Memory) Withdraw(ctx context.Context, req *WithdrawRequest) error {
	if err := req.check(ctx); err != nil {
		return err
	}
	d.lock()
	defer d.mu.Unlock()
	m := d.member(req.Peer)
	if m == nil {
		return nil // and its entries are void
	}
	m.report(req.Free)
	m.floor = max(m.floor, req.Floor)
	for _, key := range req.Keys {
		if e, ok := d.entries[key]; ok && e.owner == m && e.sequence <= req.Sequence {
			delete(d.entries, key)
			m.entries--
		}
	}
	return nil
}

// Locate implements Directory.
func (d *Memory) Locate(ctx context.Context, req *LocateRequest, reply *LocateReply) error {
	if err := req.check(ctx); err != nil {
		return err
	}
	reply.At = slices.Grow(reply.At[:0], len(req.Keys))[:len(req.Keys)]
	reply.Nodes = reply.Nodes[:0]
	s := d.scratch.Get().(*scratch)
	defer d.scratch.Put(s)
	d.rlock()
	defer d.mu.RUnlock()
	s.begin(len(d.members))
	for i, key := range req.Keys {
		reply.At[i] = NoNode
		if m := d.owner(key); m != nil {
			reply.At[i] = s.mention(m, &reply.Nodes)
		}
	}
	return nil
}

// lock locks for writing, ends the memberships that have run out, and returns the time.
func (d *Memory) lock() time.Time {
	d.mu.Lock()
	now := d.now()
	d.expire(now)
	return now
}

// rlock locks for reading, with every membership that has run out ended.
func (d *Memory) rlock() {
	d.mu.RLock()
	if d.now().Before(d.expiry) {
		return
	}
	d.mu.RUnlock()
	d.lock()
	d.mu.Unlock()
	d.mu.RLock()
}

// member returns the membership of this very incarnation, or nil.
func (d *Memory) member(peer backend.Peer) *member {
	r := d.records[peer.Node]
	if r == nil || r.incarnation != peer.Incarnation {
		return nil
	}
	return r.live
}

// owner returns the member that holds key, or nil.
func (d *Memory) owner(key string) *member {
	if e, ok := d.entries[key]; ok && !e.owner.gone {
		return e.owner
	}
	return nil
}

// expire ends the memberships that have run out.
func (d *Memory) expire(now time.Time) {
	if now.Before(d.expiry) {
		return
	}
	d.expiry = now.Add(d.ttl)
	d.members = slices.DeleteFunc(d.members, func(m *member) bool {
		if !now.Before(m.deadline) {
			d.forget(m)
			return true
		}
		if m.deadline.Before(d.expiry) {
			d.expiry = m.deadline
		}
		return false
	})
	d.number(0)
}

// drop ends one membership; nil is none.
func (d *Memory) drop(m *member) {
	if m != nil {
		d.forget(m)
		d.members = slices.Delete(d.members, m.index, m.index+1)
		d.number(m.index)
	}
}

// forget makes the entries of m void.
func (d *Memory) forget(m *member) {
	m.gone = true
	d.void += m.entries
	d.records[m.node.Peer.Node].live = nil
}

// number gives the members from the one at index from on their indices anew.
func (d *Memory) number(from int) {
	for i := from; i < len(d.members); i++ {
		d.members[i].index = i
	}
}

// remember makes the record of a node that is not known. The number of records is bounded: one of a node that is
// not a member makes way when there are too many.
func (d *Memory) remember(peer backend.Peer) *record {
	if len(d.records) >= 2*MaxNodes {
		for name, r := range d.records {
			if r.live == nil {
				delete(d.records, name)
				break
			}
		}
	}
	r := &record{incarnation: peer.Incarnation}
	d.records[peer.Node] = r
	return r
}

// replace makes incarnation the last one that joined.
func (r *record) replace(incarnation uint64) {
	if len(r.replaced) == replacedKept {
		r.replaced = slices.Delete(r.replaced, 0, 1)
	}
	r.replaced = append(r.replaced, r.incarnation)
	r.incarnation = incarnation
}

// report takes in what the node says it has free.
func (m *member) report(free uint64) {
	m.node.Free = min(free, m.node.Capacity)
	m.placed = 0
}

// reap ends memberships in time and removes void entries, for directories that nobody uses.
func (d *Memory) reap() {
	ticker := time.NewTicker(d.ttl)
	defer ticker.Stop()
	for {
		select {
		case <-d.stop:
			return
		case <-ticker.C:
			d.sweep()
		}
	}
}

// sweep removes the void entries.
func (d *Memory) sweep() {
	d.lock()
	defer d.mu.Unlock()
	visited := 0
	for key, e := range d.entries {
		if d.void == 0 {
			return
		}
		if e.owner.gone {
			delete(d.entries, key)
			d.void--
		}
		if visited++; visited%step == 0 {
			// Others may change the map while it is being walked, as long as it is not at the same instant.
			d.mu.Unlock()
			stopping := d.stopping()
			d.mu.Lock()
			if stopping {
				return
			}
		}
	}
}

// stopping tells whether Close has been called.
func (d *Memory) stopping() bool {
	select {
	case <-d.stop:
		return true
	default:
		return false
	}
}

// scratch is what one call needs besides its reply.
type scratch struct {
	at       []int  // by member.index: 1 + the index in the reply's nodes; 0 when it has not been mentioned
	missing  []int  // indices of the keys to be placed
	excluded []bool // by member.index
	chooser  chooser
}

// begin prepares for a call with that many members.
func (s *scratch) begin(members int) {
	s.at = slices.Grow(s.at[:0], members)[:members]
	clear(s.at)
}

// mention returns the index of m in nodes, and appends it there when it is new.
func (s *scratch) mention(m *member, nodes *[]Node) int {
	if s.at[m.index] == 0 {
		*nodes = append(*nodes, m.node)
		s.at[m.index] = len(*nodes)
	}
	return s.at[m.index] - 1
}
