package peer

import (
	"slices"
	"strings"

	"github.com/umbp/umbp/core/directory"
)

// publishKeys is how many keys of a refill, or of what an unreachable directory left behind, go in one call.
const publishKeys = 2048

// Publication is committed slots on their way to the directory. The Store fills in the request, the caller says who
// and has the directory fill in the reply, and Settle brings the answer home. It can be used again and again.
type Publication struct {
	Request directory.PublishRequest
	Reply   directory.PublishReply
	// At has, for each key of the request, the index of the slot in the CommitRequest that led to it.
	At  []int
	ids []SlotID
}

func (p *Publication) reset() {
	p.Request.Keys, p.Request.Sizes = p.Request.Keys[:0], p.Request.Sizes[:0]
	p.Reply.Entered, p.At, p.ids = p.Reply.Entered[:0], p.At[:0], p.ids[:0]
}

func (p *Publication) add(sl *slot, at int) {
	p.Request.Keys = append(p.Request.Keys, sl.key)
	p.Request.Sizes = append(p.Request.Sizes, sl.size)
	p.At = append(p.At, at)
	p.ids = append(p.ids, sl.id)
}

// sequence draws the number of a request to the directory, under the lock under which what it says is true.
func (s *Store) sequence() uint64 {
	s.requests++
	return s.requests
}

// Renew draws a new number for a publication that is made again. Settle and Unsettle find out what has changed.
func (s *Store) Renew(p *Publication) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.Request.Sequence = s.sequence()
}

// Settle takes the directory's answer: what was entered may be evicted from now on, and what another node has is
// dropped here. It returns the keys that were entered although they went away while the directory was asked; the
// caller withdraws them.
func (s *Store) Settle(p *Publication) (stale []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, key := range p.Request.Keys {
		sl, entered := s.keys[key], p.Reply.Entered[i]
		switch {
		case sl == nil:
			if entered {
				stale = append(stale, key)
			}
		case sl.id != p.ids[i]: // another slot has taken the key over, and is published on its own
		case !entered:
			s.drop(sl)
		case sl.state == unpublished:
			sl.hook.unlink()
			sl.state = published
			if sl.leases == 0 {
				s.offer(sl)
			}
		}
	}
	return stale
}

// Unsettle notes that the directory did not answer. The keys stay, are not evicted, and come back from Unsettled;
// those that went away meanwhile may have been entered, or will be, and are withdrawn later.
func (s *Store) Unsettle(p *Publication) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.floor = max(s.floor, p.Request.Sequence+1)
	for i, key := range p.Request.Keys {
		sl := s.keys[key]
		switch {
		case sl == nil:
			s.withdrawLater(key)
		case sl.id == p.ids[i] && sl.state == unpublished:
			sl.hook.unlink()
			s.unsettled.pushBack(&sl.hook)
		}
	}
}

// Unsettled fills p with keys that the directory has not answered for, and says whether there were any. The caller
// publishes p, and passes it to Settle or Unsettle.
func (s *Store) Unsettled(p *Publication) bool {
	p.reset()
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(p.ids) < publishKeys {
		sl := s.unsettled.front()
		if sl == nil {
			break
		}
		sl.hook.unlink()
		p.add(sl, 0)
	}
	p.Request.Sequence, p.Request.Free = s.sequence(), s.freeBytes()
	return len(p.ids) > 0
}

// Walk calls visit with all keys that are committed when it starts, batch by batch, in p, until visit fails. It
// holds no lock during visit. Keys that come and go meanwhile may be in a batch or not.
func (s *Store) Walk(p *Publication, visit func() error) error {
	for at, more := 0, true; more; {
		p.reset()
		s.mu.Lock()
		for ; at < len(s.slabs) && len(p.ids)+slabSlots <= publishKeys; at++ {
			slab := s.slabs[at]
			for i := range slab {
				if sl := &slab[i]; sl.state == unpublished || sl.state == published {
					p.add(sl, 0)
				}
			}
		}
		more = at < len(s.slabs)
		p.Request.Sequence, p.Request.Free = s.sequence(), s.freeBytes()
		s.mu.Unlock()
		if len(p.ids) == 0 {
			continue
		}
		if err := visit(); err != nil {
			return err
		}
	}
	return nil
}

// withdrawLater remembers a key that is gone here and that the directory may still list.
func (s *Store) withdrawLater(key string) {
	if len(s.evicted) >= s.maxWithdrawals {
		s.overflow = true
		return
	}
	s.evicted = append(s.evicted, key)
}

// WithdrawLater puts keys back that Evicted returned and that could not be withdrawn.
func (s *Store) WithdrawLater(keys []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range keys {
		s.withdrawLater(key)
	}
}

// Evicted moves up to publishKeys keys that the directory still lists to out, the oldest first. Overflow says that
// there were more than the store remembers: the caller then makes the directory forget the whole node and publishes
// everything again, or reports with Overflow that it could not.
func (s *Store) Evicted(out []string) (keys []string, overflow bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.overflow {
		s.overflow = false
		clear(s.evicted)
		s.evicted = s.evicted[:0]
		return out[:0], true
	}
	n := min(len(s.evicted), publishKeys)
	out = append(out[:0], s.evicted[:n]...)
	s.evicted = slices.Delete(s.evicted, 0, n)
	return out, false
}

// Overflow makes the next call of Evicted report an overflow.
func (s *Store) Overflow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.overflow = true
}

// Absent fills req with those of the keys that are not committed. Keys that no store can hold are left out: the
// directory would refuse the others with them.
func (s *Store) Absent(keys []string, req *directory.WithdrawRequest) {
	req.Keys = make([]string, 0, len(keys))
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range keys {
		if validKey(key) && s.keys[key] == nil {
			req.Keys = append(req.Keys, key)
		}
	}
	req.Sequence, req.Floor, req.Free = s.sequence(), s.floor, s.freeBytes()
}

// ghost notes that somebody has come for a key that is not here. Most often the directory lists it: then it still
// has to hear of an eviction, or is in error for good. It is told when it has little else to hear, so that nobody
// can make it lose more important news by asking for what has never been.
func (s *Store) ghost(key string) {
	if len(s.evicted) < publishKeys && validKey(key) {
		s.withdrawLater(strings.Clone(key)) // the caller's may be a piece of something large
	}
}
