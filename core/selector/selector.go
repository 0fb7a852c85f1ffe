// Package selector chooses the backend that carries a group.
//
// The operator writes an ordered policy: the first rule that matches a group names the backends that may carry
// it. The selector answers a query with a Choice, which is a plan and an explanation at once: the backends to
// try in their order, and for each backend of the process why it stands where it stands. Nothing is decided
// anywhere else, and nothing falls back to a slower path unless a rule allows it.
//
// Choices depend on the pair of regions and the places where these lie, the operation, the size class and the health of
// the paths. They are cached by these, and the cache is dropped when the policy or the health changes, a backend refuses a
// pair of regions, or the operator disables a backend.
package selector

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/core/internal/pathmap"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Rule says which backends carry the groups that it matches. It has Require, or Prefer and Allow.
type Rule struct {
	Match Match
	// Require: these backends, in this order, and no other.
	Require []string
	// Prefer: these first; then, where none of them can carry the group, those of Allow.
	Prefer, Allow []string
}

// Match restricts a rule. Zero fields match everything.
type Match struct {
	Local, Remote    backend.MemoryKind
	SameHost         *bool // both ends share a host
	SameNode         *bool // both ends are the same process
	Op               backend.Op
	MinSize, MaxSize uint64 // bytes of the group, both inclusive
}

// Query describes a group that wants a way.
type Query struct {
	Local  *region.Region
	Remote *region.Descriptor
	Op     backend.Op
	Bytes  uint64
	Now    time.Time
}

// Choice answers a query. It is shared and must not be modified.
type Choice struct {
	// Order holds the numbers of the backends to try, best first. Empty when none can carry the group.
	Order []int
	// Rule is the index of the rule that decided, or -1 when no rule matches.
	Rule int
	// Candidates explains every backend of the process: first those of the rule, in its order, then the others.
	Candidates []Candidate
	// Until is when a backend that is down now may be tried again; zero when none is down.
	Until time.Time

	// expires is when the answer may change by itself; zero when it does not.
	expires time.Time
}

// NoWay is the error of a group that no backend can carry: Unsupported, or PathDown where one is down.
func (c *Choice) NoWay(remote *region.Descriptor) error {
	err := &backend.Error{Code: backend.Unsupported, Op: "select backend", Peer: remote.Peer, Region: remote.ID,
		Text: "no backend can carry the group"}
	for _, candidate := range c.Candidates {
		err.Text += fmt.Sprintf("; %s: %s", candidate.Backend, candidate.Reason)
		if candidate.Down {
			err.Code = backend.PathDown
		}
	}
	return err
}

// Candidate is one backend's place in a choice.
type Candidate struct {
	Backend string
	Usable  bool
	Down    bool // it could carry the group, but cannot connect at present
	Reason  string
}

// SelectBackend is the question that the dispatcher asks for each group. *Selector answers it from the policy;
// tests may answer it from a table.
type SelectBackend interface {
	// SelectBackend returns the backends for a group, best first, with the reasons. It never returns nil, and it is
	// safe for concurrent use.
	SelectBackend(q Query) *Choice
	// PathFailed records that no connection to the peer could be made by the backend of that number: it is not
	// chosen for that peer until a pause has passed, which grows with every failure in a row.
	PathFailed(b int, peer backend.Peer, err error, now time.Time)
	// PathWorks records that a connection was made, which ends such a pause, and what PairRefused has told of the
	// connection before.
	PathWorks(b int, peer backend.Peer)
	// PairRefused records that the backend of that number has refused a session between two regions as Unsupported: it is
	// not chosen for them for some seconds. It works for others all the same.
	PairRefused(b int, local backend.RegionID, remote *region.Descriptor, err error, now time.Time)
}

// Backend is what the selector knows about one backend of this process; its number is its place in the list.
type Backend struct {
	Name string
	Info backend.Info
	// Unavailable says why the backend could not be opened; nil when it was.
	Unavailable error
}

// The pause after a failure to connect: it starts at the first, doubles to the last, and varies by a quarter so
// that the clients of a peer that went down do not all come back at once.
const (
	firstPause = 50 * time.Millisecond
	lastPause  = 5 * time.Second
)

// refusalPause is how long a backend that has refused a pair of regions is not asked again, unless it connects anew before or
// the operator sees to it. It may have had reasons that pass.
const refusalPause = 5 * time.Second

// cacheEntries bounds the cache. A process talks to fewer pairs of regions than that; one that does not pays a
// few microseconds for a choice now and then.
const cacheEntries = 1 << 14

// Selector implements SelectBackend by an ordered policy. Safe for concurrent use.
type Selector struct {
	self     backend.Peer
	backends []Backend

	// cache is immutable; a change replaces it.
	cache atomic.Pointer[snapshot]

	mu       sync.Mutex // guards the replacing of cache, and what follows
	health   map[path]*outage
	refusals map[pathmap.Key]refusal // by pair of regions; the Variant is the number of the backend
	disabled []bool                  // by number of the backend
}

type snapshot struct {
	rules   []Rule
	classes []uint64 // the sizes at which the answer may change, ascending
	choices *pathmap.Map[*Choice]
}

type path struct {
	backend int
	peer    backend.Peer
}

type outage struct {
	failures int
	until    time.Time
	err      error
}

type refusal struct {
	until time.Time
	err   error
}

// New returns a selector for the backends of the process self. The policy must have passed Validate.
func New(self backend.Peer, backends []Backend, rules []Rule) *Selector {
	s := &Selector{
		self: self, backends: backends, health: make(map[path]*outage), refusals: make(map[pathmap.Key]refusal),
		disabled: make([]bool, len(backends)),
	}
	s.SetPolicy(rules)
	return s
}

// Validate returns an error that names every fault of a policy: a rule that names no backend, or an unknown one,
// or one twice, or mixes require with prefer and allow.
func Validate(rules []Rule, known []string) error {
	var faults []error
	for i, r := range rules {
		named := slices.Concat(r.Require, r.Prefer, r.Allow)
		switch {
		case len(named) == 0:
			faults = append(faults, fmt.Errorf("rule %d names no backend", i+1))
		case len(r.Require) > 0 && len(r.Prefer)+len(r.Allow) > 0:
			faults = append(faults, fmt.Errorf("rule %d has require beside prefer or allow", i+1))
		}
		for n, name := range named {
			switch {
			case slices.Contains(named[:n], name):
				faults = append(faults, fmt.Errorf("rule %d names backend %q twice", i+1, name))
			case !slices.Contains(known, name):
				faults = append(faults, fmt.Errorf("rule %d names backend %q, which is not configured%s",
					i+1, name, backend.DidYouMean(name, known)))
			}
		}
	}
	return errors.Join(faults...)
}

// SetPolicy replaces the policy. Groups that have been chosen for go the way that they were given.
func (s *Selector) SetPolicy(rules []Rule) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cache.Store(&snapshot{rules: rules, classes: sizeClasses(rules), choices: &pathmap.Map[*Choice]{}})
}

// SetEnabled says whether the backend of that number may be chosen. All are, to begin with. Groups that have been
// chosen for go the way that they were given.
func (s *Selector) SetEnabled(b int, enabled bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disabled[b] = !enabled
	s.forgetRefusals(func(k pathmap.Key) bool { return k.Variant == uint64(b) })
	s.dropCache()
}

// Restarted says that the operator has had the backend of that number started anew: what it refused before does not count.
func (s *Selector) Restarted(b int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgetRefusals(func(k pathmap.Key) bool { return k.Variant == uint64(b) })
}

// Enabled tells whether the backend of that number may be chosen.
func (s *Selector) Enabled(b int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.disabled[b]
}

// SelectBackend implements the interface SelectBackend.
func (s *Selector) SelectBackend(q Query) *Choice {
	snap := s.cache.Load()
	if c, ok := snap.choices.Get(snap.key(&q)); ok && (c.expires.IsZero() || q.Now.Before(c.expires)) {
		return c
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	snap = s.cache.Load()
	c := s.choose(snap.rules, q)
	// The cache is copied for each new choice. That costs something for every new pair of regions, and keeps the
	// lock off every other query.
	known := snap.choices
	if known.Len() >= cacheEntries {
		known = &pathmap.Map[*Choice]{}
	}
	s.cache.Store(&snapshot{rules: snap.rules, classes: snap.classes, choices: known.With(snap.key(&q), c)})
	return c
}

// Unreachable returns why no group of up to q.Bytes bytes has a way now, nor soon, or nil where some group has one: sizes
// may differ in their rules.
func (s *Selector) Unreachable(q Query) error {
	snap := s.cache.Load()
	var largest *Choice
	for class := snap.class(q.Bytes); ; class-- {
		c := s.SelectBackend(q)
		if len(c.Order) > 0 || !c.Until.IsZero() {
			return nil
		}
		if largest == nil {
			largest = c
		}
		if class == 0 {
			return largest.NoWay(q.Remote)
		}
		q.Bytes = snap.classes[class-1] - 1
	}
}

// key names what a choice depends on, but for health.
func (s *snapshot) key(q *Query) pathmap.Key {
	return pathmap.Key{
		Local: q.Local.ID, Remote: q.Remote.ID, Peer: q.Remote.Peer.Incarnation,
		Variant: uint64(q.Op)<<16 | uint64(s.class(q.Bytes)),
	}
}

// Explain answers a query as SelectBackend does, and leaves no trace in the cache: it may be asked about regions
// that do not exist.
func (s *Selector) Explain(q Query) *Choice {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.choose(s.cache.Load().rules, q)
}

// PathFailed implements SelectBackend.
func (s *Selector) PathFailed(b int, peer backend.Peer, err error, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.health[path{b, peer}]
	if o == nil {
		s.forgetOldOutages(now)
		o = &outage{}
		s.health[path{b, peer}] = o
	}
	o.failures++
	o.err = err
	o.until = now.Add(pause(o.failures))
	s.dropCache()
}

// PathWorks implements SelectBackend.
func (s *Selector) PathWorks(b int, peer backend.Peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, was := s.health[path{b, peer}]; was {
		delete(s.health, path{b, peer})
		s.dropCache()
	}
	s.forgetRefusals(func(k pathmap.Key) bool { return k.Variant == uint64(b) && k.Peer == peer.Incarnation })
}

// PairRefused implements SelectBackend.
func (s *Selector) PairRefused(b int, local backend.RegionID, remote *region.Descriptor, err error, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.refusals) >= cacheEntries { // those that are still true will be made again
		clear(s.refusals)
	}
	s.refusals[pairKey(b, local, remote)] = refusal{until: now.Add(refusalPause), err: err}
	s.dropCache()
}

// forgetRefusals has the backend asked again for the pairs that match. It is called with s.mu held.
func (s *Selector) forgetRefusals(match func(pathmap.Key) bool) {
	before := len(s.refusals)
	maps.DeleteFunc(s.refusals, func(k pathmap.Key, _ refusal) bool { return match(k) })
	if len(s.refusals) < before {
		s.dropCache()
	}
}

func pairKey(b int, local backend.RegionID, remote *region.Descriptor) pathmap.Key {
	return pathmap.Key{Local: local, Remote: remote.ID, Peer: remote.Peer.Incarnation, Variant: uint64(b)}
}

// Outage describes a path that is not chosen at present.
type Outage struct {
	Backend string
	Peer    backend.Peer
	Until   time.Time
	Err     error
}

// Outages lists the paths that are not chosen at the time now.
func (s *Selector) Outages(now time.Time) []Outage {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Outage
	for p, o := range s.health {
		if now.Before(o.until) {
			list = append(list, Outage{Backend: s.backends[p.backend].Name, Peer: p.peer, Until: o.until, Err: o.err})
		}
	}
	sort.Slice(list, func(i, j int) bool {
		a, b := list[i], list[j]
		return a.Backend < b.Backend || a.Backend == b.Backend && a.Peer.String() < b.Peer.String()
	})
	return list
}

func (s *Selector) dropCache() {
	old := s.cache.Load()
	s.cache.Store(&snapshot{rules: old.rules, classes: old.classes, choices: &pathmap.Map[*Choice]{}})
}

// forgetOldOutages keeps the table of outages from growing with every peer that ever went away.
func (s *Selector) forgetOldOutages(now time.Time) {
	for p, o := range s.health {
		if now.Sub(o.until) > 10*lastPause {
			delete(s.health, p)
		}
	}
}

func pause(failures int) time.Duration {
	p := firstPause
	for i := 1; i < failures && p < lastPause; i++ {
		p *= 2
	}
	p = min(p, lastPause)
	return p - p/8 + time.Duration(rand.Int64N(int64(p/4)))
}

func (s *Selector) choose(rules []Rule, q Query) *Choice {
	c := &Choice{Rule: -1}
	for i := range rules {
		if rules[i].Match.matches(s.self, q) {
			c.Rule = i
			break
		}
	}
	var listed []string
	if c.Rule >= 0 {
		r := &rules[c.Rule]
		listed = slices.Concat(r.Require, r.Prefer, r.Allow)
	}
	for _, name := range listed {
		b := slices.IndexFunc(s.backends, func(b Backend) bool { return b.Name == name })
		if b < 0 {
			c.Candidates = append(c.Candidates, Candidate{Backend: name, Reason: "not configured in this process"})
			continue
		}
		reason, down := s.obstacle(b, q), false
		if reason == "" {
			if o := s.health[path{b, q.Remote.Peer}]; o != nil && q.Now.Before(o.until) {
				reason, down = fmt.Sprintf("down: %v", o.err), true
				c.Until = earlier(c.Until, o.until)
				c.expires = earlier(c.expires, o.until)
			}
		}
		if reason == "" {
			if r, ok := s.refusals[pairKey(b, q.Local.ID, q.Remote)]; ok && q.Now.Before(r.until) {
				reason = fmt.Sprintf("refused: %v", r.err)
				c.expires = earlier(c.expires, r.until)
			}
		}
		if reason != "" {
			c.Candidates = append(c.Candidates, Candidate{Backend: name, Down: down, Reason: reason})
			continue
		}
		reason = "chosen: the first of the rule that can carry it"
		if len(c.Order) > 0 {
			reason = "usable; tried if the ones before it fail"
		}
		if link, _ := s.backends[b].Info.Capabilities.Link(q.Local.Place(), q.Remote.Place); link.Text != "" {
			reason += " (" + link.Text + ")"
		}
		c.Candidates = append(c.Candidates, Candidate{Backend: name, Usable: true, Reason: reason})
		c.Order = append(c.Order, b)
	}
	for i := range s.backends {
		if !slices.Contains(listed, s.backends[i].Name) {
			reason := fmt.Sprintf("not named by rule %d", c.Rule+1)
			if c.Rule < 0 {
				reason = "no rule matches the group"
			}
			c.Candidates = append(c.Candidates, Candidate{Backend: s.backends[i].Name, Reason: reason})
		}
	}
	return c
}

// earlier returns the earlier of two times, of which the first may be zero for none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

// Disabled is the reason for a backend that SetEnabled has ruled out.
const Disabled = "disabled by the operator"

// obstacle says why a backend cannot carry the group, however well its paths are, or nothing.
func (s *Selector) obstacle(b int, q Query) string {
	be := &s.backends[b]
	switch {
	case be.Unavailable != nil:
		return "unavailable: " + be.Unavailable.Error()
	case s.disabled[b]:
		return Disabled
	}
	caps := &be.Info.Capabilities
	_, here := q.Local.Keys[be.Name]
	_, there := q.Remote.Keys[be.Name]
	_, linked := caps.Link(q.Local.Place(), q.Remote.Place)
	switch {
	case caps.Ops&q.Op == 0:
		return "cannot " + q.Op.String()
	case !caps.Local.Has(q.Local.Kind):
		return "cannot use local memory of kind " + q.Local.Kind.String()
	case !caps.Remote.Has(q.Remote.Kind):
		return "cannot reach memory of kind " + q.Remote.Kind.String()
	case caps.Reach == backend.SameProcess && !region.SameProcess(q.Remote.Peer.Incarnation):
		return "reaches its own process only"
	case caps.Reach == backend.SameHost && (q.Remote.Peer.Host == "" || q.Remote.Peer.Host != s.self.Host):
		return "reaches its own host only"
	case !linked:
		return "no link from " + placeWords(q.Local.Place()) + " to " + placeWords(q.Remote.Place)
	case !here:
		return "the local region is not registered with it"
	case !there:
		return "the peer has not registered the region with it"
	}
	return ""
}

func placeWords(place string) string {
	if place == "" {
		return "host memory"
	}
	return "GPU " + place
}

func (m *Match) matches(self backend.Peer, q Query) bool {
	sameHost := q.Remote.Peer.Host != "" && q.Remote.Peer.Host == self.Host
	return (m.Local == 0 || m.Local == q.Local.Kind) &&
		(m.Remote == 0 || m.Remote == q.Remote.Kind) &&
		(m.SameHost == nil || *m.SameHost == sameHost) &&
		(m.SameNode == nil || *m.SameNode == (q.Remote.Peer == self)) &&
		(m.Op == 0 || m.Op == q.Op) &&
		q.Bytes >= m.MinSize && (m.MaxSize == 0 || q.Bytes <= m.MaxSize)
}

// sizeClasses returns the sizes at which some rule begins or ceases to match.
func sizeClasses(rules []Rule) []uint64 {
	var at []uint64
	for _, r := range rules {
		if r.Match.MinSize > 0 {
			at = append(at, r.Match.MinSize)
		}
		if r.Match.MaxSize > 0 {
			at = append(at, r.Match.MaxSize+1)
		}
	}
	slices.Sort(at)
	return slices.Compact(at)
}

func (s *snapshot) class(bytes uint64) uint16 {
	var class uint16
	for _, at := range s.classes {
		if bytes < at {
			break
		}
		class++
	}
	return class
}
