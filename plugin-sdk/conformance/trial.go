package conformance

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// trial is one run of a case: what it has found, and what it is waiting for. A case ends by itself, or it is given up
// when a call to the backend does not return.
type trial struct {
	mu       sync.Mutex
	failures []string
	notes    []string
	skipped  bool
	stuck    bool // something did not come in time: memory may still be in use
	opened   []backend.Backend
	lastCall uint64
	calls    map[uint64]call // that have not returned
}

// call is a call to the backend.
type call struct {
	what  string
	start time.Time
}

// Errorf notes a failure; the case goes on.
func (t *trial) Errorf(format string, args ...any) {
	t.note(&t.failures, position()+fmt.Sprintf(format, args...))
}

// Fatalf notes a failure and ends the goroutine, which is that of the case. Its deferred calls clean up.
func (t *trial) Fatalf(format string, args ...any) {
	t.note(&t.failures, position()+fmt.Sprintf(format, args...))
	runtime.Goexit()
}

// Logf notes what is worth knowing also when the case passes.
func (t *trial) Logf(format string, args ...any) { t.note(&t.notes, fmt.Sprintf(format, args...)) }

// Skipf says why nothing, or nothing more, can be tried, and ends the goroutine, which is that of the case.
func (t *trial) Skipf(format string, args ...any) {
	t.mu.Lock()
	t.skipped = true
	t.mu.Unlock()
	t.Logf(format, args...)
	runtime.Goexit()
}

func (t *trial) note(list *[]string, text string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	*list = append(*list, text)
}

// position returns where in a case a failure was noticed.
func position() string {
	callers := make([]uintptr, 32)
	frames := runtime.CallersFrames(callers[:runtime.Callers(3, callers)])
	for {
		frame, more := frames.Next()
		if file := filepath.Base(frame.File); strings.HasPrefix(file, "cases_") {
			return fmt.Sprintf("%s:%d: ", file, frame.Line)
		}
		if !more {
			return ""
		}
	}
}

// wait waits until c is closed, and tells whether it is in time.
func (t *trial) wait(c <-chan struct{}, patience time.Duration) bool {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-c:
		return true
	case <-timer.C:
		t.mu.Lock()
		defer t.mu.Unlock()
		t.stuck = true
		return false
	}
}

func (t *trial) result(c Case) Result {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := Result{Name: c.Name, Rule: c.Rule, Verdict: Pass, Detail: strings.Join(t.notes, "\n")}
	switch {
	case len(t.failures) > 0:
		r.Verdict, r.Detail = Fail, strings.Join(t.failures, "\n")
	case t.skipped:
		r.Verdict = Skip
	}
	return r
}

// calling notes that a call to the backend is under way, until the function returned is called.
func (t *trial) calling(what string) (returned func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lastCall++
	id := t.lastCall
	t.calls[id] = call{what, time.Now()}
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.calls, id)
	}
}

// overdue names the calls that have been under way for longer than patience, if any.
func (t *trial) overdue(patience time.Duration) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var late []string
	for _, id := range slices.Sorted(maps.Keys(t.calls)) {
		if c := t.calls[id]; time.Since(c.start) > patience && !slices.Contains(late, c.what) {
			late = append(late, c.what)
		}
	}
	return late
}

// supervise returns when the case has ended, or when a call to the backend has not returned for so long that the case
// is given up. It gives calls twice the patience: those that take a context have an end of their own before.
func (t *trial) supervise(ended <-chan struct{}, patience time.Duration) {
	tick := time.NewTicker(patience / 8)
	defer tick.Stop()
	for {
		select {
		case <-ended:
			return
		case <-tick.C:
		}
		late := t.overdue(2 * patience)
		if late == nil {
			continue
		}
		t.note(&t.failures, fmt.Sprintf("not returned after %s: %s", 2*patience, strings.Join(late, ", ")))
		t.abandon(ended, patience)
		return
	}
}

// abandon closes what the case has opened, so that processes end, and leaves the rest behind: the goroutine that does
// not return, and memory that may still be in use.
func (t *trial) abandon(ended <-chan struct{}, patience time.Duration) {
	t.mu.Lock()
	t.stuck = true
	opened := slices.Clone(t.opened)
	t.mu.Unlock()
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		var wg sync.WaitGroup
		for _, b := range opened {
			wg.Go(func() { b.Close() })
		}
		wg.Wait()
		<-ended // closing may have set the call free
	}()
	t.wait(closed, patience)
}

// watched is a backend whose calls are noted.
type watched struct {
	backend.Backend
	t *trial
}

func (w watched) Register(ctx context.Context, m backend.Memory) ([]byte, error) {
	defer w.t.calling("Backend.Register")()
	return w.Backend.Register(ctx, m)
}

func (w watched) Deregister(ctx context.Context, id backend.RegionID) error {
	defer w.t.calling("Backend.Deregister")()
	return w.Backend.Deregister(ctx, id)
}

func (w watched) Offer(ctx context.Context, peer backend.Peer) (backend.Handshake, error) {
	defer w.t.calling("Backend.Offer")()
	h, err := w.Backend.Offer(ctx, peer)
	if err != nil {
		return nil, err
	}
	return watchedHandshake{h, w.t}, nil
}

func (w watched) Answer(ctx context.Context, peer backend.Peer, offer []byte) ([]byte, error) {
	defer w.t.calling("Backend.Answer")()
	return w.Backend.Answer(ctx, peer, offer)
}

func (w watched) Fence(ctx context.Context, peer backend.Peer) error {
	defer w.t.calling("Backend.Fence")()
	return w.Backend.Fence(ctx, peer)
}

// Counters implements backend.Counter, for backends that do.
func (w watched) Counters() []backend.Count {
	defer w.t.calling("Backend.Counters")()
	if c, ok := w.Backend.(backend.Counter); ok {
		return c.Counters()
	}
	return nil
}

func (w watched) Close() error {
	defer w.t.calling("Backend.Close")()
	return w.Backend.Close()
}

type watchedHandshake struct {
	backend.Handshake
	t *trial
}

func (w watchedHandshake) Establish(ctx context.Context, answer []byte) (backend.Endpoint, error) {
	defer w.t.calling("Handshake.Establish")()
	e, err := w.Handshake.Establish(ctx, answer)
	if err != nil {
		return nil, err
	}
	return watchedEndpoint{e, w.t}, nil
}

func (w watchedHandshake) Abandon() {
	defer w.t.calling("Handshake.Abandon")()
	w.Handshake.Abandon()
}

type watchedEndpoint struct {
	backend.Endpoint
	t *trial
}

func (w watchedEndpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	defer w.t.calling("Endpoint.Session")()
	s, err := w.Endpoint.Session(ctx, local, remote, sink)
	if err != nil {
		return nil, err
	}
	if p, ok := s.(backend.PostWaiter); ok {
		return watchedWaiter{watchedSession{s, w.t}, p}, nil
	}
	return watchedSession{s, w.t}, nil
}

func (w watchedEndpoint) Close() error {
	defer w.t.calling("Endpoint.Close")()
	return w.Endpoint.Close()
}

type watchedSession struct {
	backend.Session
	t *trial
}

func (w watchedSession) Post(transfer backend.Transfer) error {
	defer w.t.calling("Session.Post")()
	return w.Session.Post(transfer)
}

func (w watchedSession) Cancel(cookie uint64) {
	defer w.t.calling("Session.Cancel")()
	w.Session.Cancel(cookie)
}

func (w watchedSession) Close() error {
	defer w.t.calling("Session.Close")()
	return w.Session.Close()
}

type watchedWaiter struct {
	watchedSession
	waiter backend.PostWaiter
}

func (w watchedWaiter) PostWait(transfer backend.Transfer) error {
	defer w.t.calling("Session.PostWait")()
	return w.waiter.PostWait(transfer)
}
