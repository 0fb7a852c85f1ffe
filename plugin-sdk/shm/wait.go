package shm

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultLook is how long a receiver looks for the next record before it sleeps, while looking pays. It is a few times
// what it takes to be woken, and enough for a small transfer to a host nearby and back.
const DefaultLook = 100 * time.Microsecond

// pace decides whether to look before sleeping. Looking saves both ends a system call and the time to be woken, and
// costs a processor for as long as it lasts. So a receiver looks only as long as half of its looks find something.
// One that has stopped tries again when it has slept so shortly, several times in a row, that looks might have found
// what ended the sleeps; each attempt that fails doubles how often. An idle receiver never looks.
type pace struct {
	credit int // of looks that found something against those that did not
	short  int // short sleeps in a row
	wanted int // short sleeps that are followed by an attempt
}

const (
	maxCredit  = 16
	tryCredit  = 8 // of an attempt: the first looks make the scheduler find a processor for each end
	minShort   = 4
	maxShort   = 64
	shortSleep = 3 // times as long as a look: being woken is part of it
)

func (p *pace) looks() bool { return p.credit > 0 }

func (p *pace) found() {
	if p.credit < maxCredit {
		p.credit++
	} else {
		p.wanted = minShort
	}
}

func (p *pace) missed() {
	if p.credit--; p.credit == 0 {
		p.short, p.wanted = 0, min(2*p.wanted, maxShort)
	}
}

// slept is told how long the receiver has slept without having looked, in the time of a look.
func (p *pace) slept(looks float64) {
	if looks > shortSleep {
		p.short = 0
	} else if p.short++; p.short >= p.wanted {
		p.credit = tryCredit
	}
}

// wait returns true when there may be something to receive, or the queue is closed, and false after the deadline. The
// caller holds receiver.mu.
func (q *Queue) wait(deadline time.Time) bool {
	r := &q.receiver
	start := time.Now()
	if !deadline.IsZero() && !start.Before(deadline) {
		return false
	}
	looks := r.pace.looks()
	if looks && (q.expects == nil || q.expects()) {
		if q.spin(start) {
			r.pace.found()
			return true
		}
		r.pace.missed()
	}
	if !deadline.IsZero() {
		_ = q.wake.SetReadDeadline(deadline) // it fails when the queue has been closed
		defer q.wake.SetReadDeadline(time.Time{})
	}
	r.dozing = false
	q.looks.Store(r.pace.looks())
	_ = q.wakeConn.Read(q.doze) // it fails when the queue has been closed, and at the deadline
	q.looks.Store(false)
	q.sleeping.Store(0)
	if !looks {
		r.pace.slept(float64(time.Since(start)) / float64(q.look))
	}
	return true
}

// spin looks for a record for a while, and tells whether it may have found one.
func (q *Queue) spin(start time.Time) bool {
	taken := q.receiver.taken
	for time.Since(start) < q.look {
		for range 64 {
			if q.sharedSent.Load() != taken {
				return true
			}
		}
		if q.closed.Load() {
			return true
		}
		runtime.Gosched() // whoever is to act on what was received may run on this processor
	}
	return false
}

// dozeOn is called with the eventfd until it returns true: at first, and whenever the eventfd has become readable. It
// announces the sleep before it looks for records one last time, and a sender publishes before it looks for sleepers,
// so that at least one of them sees the other.
func (q *Queue) dozeOn(fd uintptr) bool {
	r := &q.receiver
	if r.dozing {
		return true
	}
	r.dozing = true
	// Empties the eventfd before anybody is asked to write to it: the poller reports changes only, and one that is
	// full would not change.
	var count [8]byte
	_, _ = unix.Read(int(fd), count[:])
	q.sleeping.Store(1)
	return q.sharedSent.Load() != r.taken
}
