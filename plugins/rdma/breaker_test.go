package rdma

import (
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/device"
)

// clock is a time that tests set.
type clock struct{ now time.Time }

func (c *clock) pass(d time.Duration) { c.now = c.now.Add(d) }

func newBreakers() (*breakers, *clock) {
	s := &settings{breakerPause: 100 * time.Millisecond, breakerMaxPause: 30 * time.Second, breakerHold: 5 * time.Minute}
	c := &clock{time.Unix(1000, 0)}
	return &breakers{settings: s, now: func() time.Time { return c.now }, m: make(map[breakerKey]*breaker)}, c
}

var (
	node      = backend.Peer{Node: "n", Incarnation: 1}
	restarted = backend.Peer{Node: "n", Incarnation: 2}
	other     = backend.Peer{Node: "o", Incarnation: 1}

	curable = &backend.Error{Code: backend.PathDown, Err: statusError{device.RetriesExceeded}}
)

func (b *breakers) wait(rail int, peer backend.Peer) time.Duration {
	wait, _ := b.check(rail, peer)
	return wait
}

// TestBreakerPauses connects in vain, as soon as the breaker lets it.
func TestBreakerPauses(t *testing.T) {
	b, c := newBreakers()
	most := 100 * time.Millisecond
	for n := range 20 {
		if wait, reason := b.check(0, node); wait != 0 || reason != nil {
			t.Fatalf("attempt %d: held back for %s: %v", n, wait, reason)
		}
		b.refused(0, node, curable)
		wait, reason := b.check(0, node)
		if wait < most/2 || wait > most {
			t.Errorf("failure %d makes a pause of %s, not %s to %s", n+1, wait, most/2, most)
		}
		if !errors.Is(reason, error(curable)) {
			t.Errorf("the reason is %v", reason)
		}
		if b.wait(1, node) != 0 || b.wait(0, other) != 0 {
			t.Fatal("another rail, or another node, is held back, too")
		}
		c.pass(wait)
		most = min(2*most, 30*time.Second)
	}
	b.connected(0, node)
	b.refused(0, node, curable)
	if wait := b.wait(0, node); wait > 100*time.Millisecond {
		t.Errorf("after a success the first pause is %s", wait)
	}
}

// TestBreakerHolds tries what a new queue pair cannot cure, and what may have cured it.
func TestBreakerHolds(t *testing.T) {
	status := func(s device.Status) error {
		return &backend.Error{Code: backend.PathDown, Text: "x", Err: statusError{s}}
	}
	for name, c := range map[string]struct {
		err  error
		hold bool
	}{
		"no answer":         {curable, false},
		"flushed":           {status(device.Flushed), false},
		"access refused":    {status(device.RemoteAccess), true},
		"local protection":  {status(device.LocalProtection), true},
		"wrong bytes":       {backend.Errorf(backend.Integrity, "x"), true},
		"no route":          {fmt.Errorf("x: %w", &device.Error{Errno: syscall.ENETUNREACH}), true},
		"no such host":      {fmt.Errorf("x: %w", &device.Error{Errno: syscall.EHOSTUNREACH}), true},
		"not as it wants":   {fmt.Errorf("x: %w", &device.Error{Errno: syscall.EINVAL}), true},
		"nobody answers":    {fmt.Errorf("x: %w", &device.Error{Errno: syscall.ETIMEDOUT}), false},
		"not enough memory": {fmt.Errorf("x: %w", &device.Error{Errno: syscall.ENOMEM}), false},
	} {
		t.Run(name, func(t *testing.T) {
			for cure, do := range map[string]func(*breakers, *clock){
				"time":          func(_ *breakers, c *clock) { c.pass(5 * time.Minute) },
				"a new process": func(b *breakers, _ *clock) { b.check(0, restarted) },
				"a new address": func(b *breakers, _ *clock) { b.reset(0) },
			} {
				b, clock := newBreakers()
				b.refused(0, node, c.err)
				clock.pass(time.Second)
				if held := b.wait(0, node) > 0; held != c.hold {
					t.Errorf("after a second, held back: %v, want %v", held, c.hold)
				}
				do(b, clock)
				if wait := b.wait(0, node); wait != 0 {
					t.Errorf("after %s it is still held back for %s", cure, wait)
				}
			}
		})
	}
}

// TestBreakerBreaks breaks connections that had worked.
func TestBreakerBreaks(t *testing.T) {
	t.Run("in a row", func(t *testing.T) {
		b, c := newBreakers()
		for n := range freeBreaks {
			b.broke(0, node, device.RetriesExceeded)
			if wait := b.wait(0, node); wait != 0 {
				t.Fatalf("break %d makes a pause of %s", n+1, wait)
			}
			b.connected(0, node)
			c.pass(time.Second)
		}
		b.broke(0, node, device.RetriesExceeded)
		if b.wait(0, node) == 0 {
			t.Error("there is no pause at all")
		}
	})
	t.Run("now and then", func(t *testing.T) {
		b, c := newBreakers()
		for range 10 * freeBreaks {
			b.broke(0, node, device.RemoteAccess)
			if wait := b.wait(0, node); wait != 0 {
				t.Fatalf("there is a pause of %s", wait)
			}
			c.pass(inARow + 1)
		}
	})
	t.Run("access refused", func(t *testing.T) {
		b, _ := newBreakers()
		for range freeRefusals {
			b.broke(0, node, device.RemoteAccess)
		}
		if wait := b.wait(0, node); wait != 0 {
			t.Fatalf("there is a pause of %s", wait)
		}
		b.broke(0, node, device.RemoteAccess)
		if wait := b.wait(0, node); wait != 5*time.Minute {
			t.Errorf("there is a pause of %s", wait)
		}
	})
}

// TestBreakersAreBounded meets more nodes than are remembered. Those that hold something back are the last to go.
func TestBreakersAreBounded(t *testing.T) {
	b, c := newBreakers()
	for i := range maxBreakers / 2 {
		b.refused(0, backend.Peer{Node: fmt.Sprint("first", i), Incarnation: 1}, curable)
	}
	c.pass(time.Minute)
	for i := range maxBreakers {
		b.refused(0, backend.Peer{Node: fmt.Sprint("second", i), Incarnation: 1}, curable)
	}
	if len(b.m) > maxBreakers {
		t.Errorf("%d are remembered", len(b.m))
	}
	if b.wait(0, backend.Peer{Node: "second0", Incarnation: 1}) == 0 {
		t.Error("one that held something back was forgotten, though others held nothing")
	}
	for i := range maxBreakers {
		b.refused(0, backend.Peer{Node: fmt.Sprint("third", i), Incarnation: 1}, curable)
	}
	if len(b.m) > maxBreakers {
		t.Errorf("%d are remembered", len(b.m))
	}
}
