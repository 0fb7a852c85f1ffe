package rpc_test

import (
	"errors"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// echo completes what is posted, until the queue ends. It holds each back until hold lets it go.
func (p *queued) echo(t *testing.T, hold func()) {
	t.Helper()
	var running sync.WaitGroup
	running.Go(func() {
		var buf []byte
		for {
			var err error
			if buf, err = p.submissions.Receive(buf); err != nil {
				return
			}
			q, err := shm.ParsePost(buf, nil)
			if err != nil {
				continue
			}
			hold()
			if _, err := p.completions.Send(shm.AppendCompletion(nil, &shm.Completion{Session: q.Session, Cookie: q.Cookie})); err != nil {
				t.Error(err)
			}
		}
	})
	t.Cleanup(func() { p.submissions.Close(); running.Wait() })
}

func (b *bound) postWait(t *testing.T, cookie uint64) {
	t.Helper()
	transfer := backend.Transfer{Op: backend.Write, Segments: []backend.Segment{{Length: 8}}, Cookie: cookie}
	if err := b.Session.(backend.PostWaiter).PostWait(transfer); err != nil {
		t.Fatal(err)
	}
}

// withinPostWait tells whether the caller was called by PostWait.
func withinPostWait() bool {
	callers := make([]uintptr, 32)
	frames := runtime.CallersFrames(callers[:runtime.Callers(2, callers)])
	for {
		frame, more := frames.Next()
		if strings.HasSuffix(frame.Function, ").PostWait") {
			return true
		}
		if !more {
			return false
		}
	}
}

// TestPostWaitLeads: a lone PostWait after another receives the completion itself, unless the plugin, or the reader that
// is to step back, has got no time from the machine.
func TestPostWaitLeads(t *testing.T) {
	p := openQueued(t, nil, 0)
	p.echo(t, func() {})
	b := bind(t, p.calls, p.Client)
	var led atomic.Int64
	b.heard = func() {
		if withinPostWait() {
			led.Add(1)
		}
	}
	n := 0
	for deadline := time.Now().Add(patience); led.Load() < 30; {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d calls of PostWait have received their completion", led.Load(), n)
		}
		n++
		b.postWait(t, uint64(n))
		b.wait(t, n)
		time.Sleep(time.Millisecond) // for the reader to step back
	}
	n++
	b.mustPost(t, uint64(n), backend.Segment{Length: 8}) // and without a leader the reader is back
	b.wait(t, n)
}

// TestPostWaitIsBounded: a plugin that takes its time does not keep the caller, and what comes late is received.
func TestPostWaitIsBounded(t *testing.T) {
	p := openQueued(t, nil, 0)
	var slow atomic.Bool
	release := make(chan struct{})
	p.echo(t, func() {
		if slow.Load() {
			<-release
		}
	})
	b := bind(t, p.calls, p.Client)
	b.postWait(t, 1)
	b.wait(t, 1)
	time.Sleep(settle)
	slow.Store(true)
	b.postWait(t, 2)
	if len(b.completions()) != 1 {
		t.Fatal("a transfer has completed that the plugin holds back")
	}
	close(release)
	b.wait(t, 2)
}

// TestPostWaitAmongOthers mixes PostWait and Post from many goroutines: each transfer completes once.
func TestPostWaitAmongOthers(t *testing.T) {
	for name, hold := range map[string]func(){"at once": func() {}, "later": func() { time.Sleep(20 * time.Microsecond) }} {
		t.Run(name, func(t *testing.T) {
			p := openQueued(t, nil, 0)
			p.echo(t, hold)
			b := bind(t, p.calls, p.Client)
			const posters, each = 8, 200
			var all sync.WaitGroup
			for i := range uint64(posters) {
				all.Go(func() {
					for n := range uint64(each) {
						if cookie := i*each + n; i%2 == 0 {
							b.postWait(t, cookie)
						} else {
							b.mustPost(t, cookie, backend.Segment{Length: 8})
						}
						if n%50 == 0 {
							time.Sleep(time.Millisecond) // so that it becomes lonely now and then
						}
					}
				})
			}
			all.Wait()
			seen := map[uint64]bool{}
			for _, c := range b.wait(t, posters*each) {
				if c.Err != nil || seen[c.Cookie] {
					t.Fatalf("transfer %d completes twice, or with %v", c.Cookie, c.Err)
				}
				seen[c.Cookie] = true
			}
		})
	}
}

// TestLostWhileAPosterLeads: the loss of the process ends a lead, and completes its transfer.
func TestLostWhileAPosterLeads(t *testing.T) {
	p := openQueued(t, nil, 0)
	var slow atomic.Bool
	took := make(chan struct{})
	release := make(chan struct{})
	p.echo(t, func() {
		if slow.Load() {
			close(took)
			<-release
		}
	})
	defer close(release)
	b := bind(t, p.calls, p.Client)
	b.postWait(t, 1)
	b.wait(t, 1)
	time.Sleep(settle)
	slow.Store(true)
	led := make(chan struct{})
	go func() { defer close(led); b.postWait(t, 2) }()
	<-took
	p.Lost(errors.New("killed"))
	<-led
	c := b.wait(t, 2)[1]
	if !errors.Is(c.Err, backend.ErrPathDown) || len(c.Outcomes) > 0 && c.Outcomes[0] != backend.InDoubt {
		t.Errorf("the transfer ends with %v, outcomes %v", c.Err, c.Outcomes)
	}
}
