package backendtest

import (
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Sink collects completions, until Next takes them. It keeps copies of what belongs to the backend, and account of
// transfers that complete twice, which fails the test at whatever is asked of the sink next. It can be the sink of several
// sessions whose transfers have different cookies. The zero value has nothing yet.
type Sink struct {
	mu    sync.Mutex
	got   []backend.Completion // that nobody has taken, oldest first
	twice []uint64             // cookies that came again while they were in got
	more  chan struct{}        // closed when something completes; nil while nobody waits
}

// Complete implements backend.Sink.
func (s *Sink) Complete(c backend.Completion) {
	c.Outcomes = slices.Clone(c.Outcomes)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.find(c.Cookie) >= 0 {
		s.twice = append(s.twice, c.Cookie)
	}
	s.got = append(s.got, c)
	if s.more != nil {
		close(s.more)
		s.more = nil
	}
}

// find returns where the completion of a transfer is, or -1. The lock is held.
func (s *Sink) find(cookie uint64) int {
	return slices.IndexFunc(s.got, func(c backend.Completion) bool { return c.Cookie == cookie })
}

// Has tells whether a transfer has completed that Next has not taken.
func (s *Sink) Has(cookie uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.find(cookie) >= 0
}

// Wait waits until a transfer has completed, and returns its completion without taking it.
func (s *Sink) Wait(t testing.TB, cookie uint64) (c backend.Completion) {
	t.Helper()
	s.until(t, func() bool {
		i := s.find(cookie)
		if i >= 0 {
			c = s.got[i]
		}
		return i >= 0
	}, "transfer %d does not complete", cookie)
	return c
}

// Next waits until something has completed, and takes the oldest completion. Its cookie can be used again.
func (s *Sink) Next(t testing.TB) (c backend.Completion) {
	t.Helper()
	s.until(t, func() bool {
		if len(s.got) == 0 {
			return false
		}
		c, s.got = s.got[0], s.got[1:]
		return true
	}, "nothing completes")
	return c
}

// Collect waits until n transfers have completed, and takes the completions, by their cookies.
func (s *Sink) Collect(t testing.TB, n int) map[uint64]backend.Completion {
	t.Helper()
	all := make(map[uint64]backend.Completion, n)
	for range n {
		c := s.Next(t)
		if _, twice := all[c.Cookie]; twice {
			t.Fatalf("completed twice: transfer %d", c.Cookie)
		}
		all[c.Cookie] = c
	}
	return all
}

// All returns the completions so far, oldest first, without taking them. There is one for each cookie.
func (s *Sink) All(t testing.TB) (all []backend.Completion) {
	t.Helper()
	s.until(t, func() bool {
		all = slices.Clone(s.got)
		return true
	}, "")
	return all
}

// Empty wants nothing to have completed that Next has not taken.
func (s *Sink) Empty(t testing.TB) {
	t.Helper()
	if all := s.All(t); len(all) > 0 {
		t.Fatalf("unexpected completions: %+v", all)
	}
}

// until calls look, with the lock held, until that has found something. Otherwise it says what does not happen.
func (s *Sink) until(t testing.TB, look func() (found bool), format string, args ...any) {
	t.Helper()
	for limit := time.After(Patience); ; {
		s.mu.Lock()
		found, twice := look(), s.twice
		if s.more == nil {
			s.more = make(chan struct{})
		}
		more := s.more
		s.mu.Unlock()
		switch {
		case len(twice) > 0:
			t.Fatalf("completed twice: transfers %v", twice)
		case found:
			return
		}
		select {
		case <-more:
		case <-limit:
			t.Fatalf(format+"\n%s", append(args, stacks())...)
		}
	}
}

// Signal is a sink that hands on the error of each completion and allocates nothing. It has room for as many transfers as
// are in flight, lest Complete block.
type Signal chan error

// Complete implements backend.Sink.
func (s Signal) Complete(c backend.Completion) { s <- c.Err }
