package rdma

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/device"
)

// breakers keep this end from trying a way to a peer again and again that does not work: there is one for each rail and
// node.
//
// A failure to connect opens it for a pause, which doubles with each further one. That a connection which worked breaks
// is no reason to wait, unless it happens again and again. An error that a new queue pair cannot cure holds the breaker
// open for long, since each attempt costs both ends. What may have cured it closes it: another incarnation of the node,
// a change of the port or its GID.
type breakers struct {
	settings *settings
	now      func() time.Time

	mu sync.Mutex
	m  map[breakerKey]*breaker
}

type breakerKey struct {
	rail int
	node string
}

type breaker struct {
	incarnation uint64
	refused     int // failures to connect since the last success
	breaks      int // breaks in a row, each soon after the one before
	broke       time.Time
	until       time.Time // not before
	reason      error
}

const (
	// freeBreaks is how many connections in a row may break before there is a pause. Fences and cancellations break
	// connections that are in order.
	freeBreaks = 8
	// freeRefusals is the same where the peer refused access. A region that was deregistered under way is no reason to
	// leave the path; one key after the other that is not right is.
	freeRefusals = 3
	// inARow is how soon one break follows another so that they count together.
	inARow = 10 * time.Second
	// maxBreakers bounds what is remembered; beyond, what no longer holds anything back is forgotten.
	maxBreakers = 4096
)

// check returns nil when the rail may be used to connect to the peer, or why not and from when on.
func (b *breakers) check(rail int, peer backend.Peer) (wait time.Duration, reason error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	k := breakerKey{rail, peer.Node}
	s := b.m[k]
	if s == nil {
		return 0, nil
	}
	if s.incarnation != peer.Incarnation {
		delete(b.m, k)
		return 0, nil
	}
	if wait = s.until.Sub(b.now()); wait <= 0 {
		return 0, nil
	}
	return wait, s.reason
}

// connected notes that a path was proven.
func (b *breakers) connected(rail int, peer backend.Peer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s := b.m[breakerKey{rail, peer.Node}]; s != nil {
		s.refused = 0
	}
}

// refused notes that connecting over the rail failed.
func (b *breakers) refused(rail int, peer backend.Peer, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.get(rail, peer)
	s.refused++
	if s.reason = err; incurable(err) {
		b.open(s, b.settings.breakerHold)
	} else {
		b.pause(s, s.refused)
	}
}

// broke notes that a connection which had worked broke, and the status that told of it.
func (b *breakers) broke(rail int, peer backend.Peer, status device.Status) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s, now := b.get(rail, peer), b.now()
	if now.Sub(s.broke) > inARow {
		s.breaks = 0
	}
	s.breaks++
	s.broke = now
	s.reason = fmt.Errorf("%d connections in a row broke, the last one with: %s", s.breaks, status)
	switch denied := status == device.RemoteAccess || status == device.LocalProtection; {
	case denied && s.breaks > freeRefusals:
		b.open(s, b.settings.breakerHold)
	case s.breaks > freeBreaks:
		b.pause(s, s.breaks-freeBreaks)
	}
}

// reset forgets what is held against a rail: it has changed.
func (b *breakers) reset(rail int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for k := range b.m {
		if k.rail == rail {
			delete(b.m, k)
		}
	}
}

func (b *breakers) get(rail int, peer backend.Peer) *breaker {
	k := breakerKey{rail, peer.Node}
	s := b.m[k]
	if s == nil || s.incarnation != peer.Incarnation {
		if len(b.m) >= maxBreakers {
			b.tidy()
		}
		s = &breaker{incarnation: peer.Incarnation}
		b.m[k] = s
	}
	return s
}

// tidy forgets what holds nothing back, or, when there is no such thing, everything.
func (b *breakers) tidy() {
	now := b.now()
	for k, s := range b.m {
		if !now.Before(s.until) {
			delete(b.m, k)
		}
	}
	if len(b.m) >= maxBreakers {
		clear(b.m)
	}
}

// pause opens the breaker for the n-th failure.
func (b *breakers) pause(s *breaker, n int) {
	b.open(s, jitter(backoff(b.settings.breakerPause, b.settings.breakerMaxPause, n)))
}

func (b *breakers) open(s *breaker, pause time.Duration) { s.until = b.now().Add(pause) }

// backoff is the pause after the n-th failure in a row: it doubles, up to most.
func backoff(first, most time.Duration, n int) time.Duration {
	pause := first
	for ; n > 1 && pause < most; n-- {
		pause *= 2
	}
	return min(pause, most)
}

// jitter returns something between half of d and d, so that those who failed together do not come back together.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

// incurable tells whether another attempt at connecting would end like the last one.
func incurable(err error) bool {
	if s, ok := errors.AsType[statusError](err); ok {
		return s.status == device.RemoteAccess || s.status == device.LocalProtection
	}
	if backend.CodeOf(err) == backend.Integrity {
		return true
	}
	for _, errno := range []syscall.Errno{syscall.ENETUNREACH, syscall.EHOSTUNREACH, syscall.EINVAL} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}
