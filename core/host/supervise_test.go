package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// These tests drive the supervisor with instances that are no processes, in a time of their own.

// fake is an instance: its process and its client.
type fake struct {
	backend.Backend
	info   backend.Info
	broken chan struct{}
	lost   chan struct{} // closed by Lost
	exited chan struct{} // closed when the process is gone

	mu         sync.Mutex
	registered map[backend.RegionID]bool
	status     string // with which the process ends by itself
	ordered    bool   // it was stopped in order
	released   bool
	closed     bool
	lostFor    error

	// What it does, if not nil.
	ping, register, deregister, fence, close func() error

	inFlight atomic.Int64
	key      []byte
}

func newFake() *fake {
	return &fake{
		info:   backend.Info{Name: "fake", Version: "1", Capabilities: backend.Capabilities{Window: 1}},
		broken: make(chan struct{}), lost: make(chan struct{}), exited: make(chan struct{}),
		registered: make(map[backend.RegionID]bool), key: []byte("key"),
	}
}

// set exchanges one of the things that it does.
func (f *fake) set(what *func() error, do func() error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	*what = do
}

func (f *fake) run(what *func() error) error {
	f.mu.Lock()
	do := *what
	f.mu.Unlock()
	if do == nil {
		return nil
	}
	return do()
}

func (f *fake) Info() backend.Info         { return f.info }
func (f *fake) Ping(context.Context) error { return f.run(&f.ping) }
func (f *fake) Broken() <-chan struct{}    { return f.broken }
func (f *fake) Err() error                 { return errors.New("it talks nonsense") }
func (f *fake) InFlight() int              { return int(f.inFlight.Load()) }
func (f *fake) Counters() []backend.Count  { return []backend.Count{{Name: "calls", Value: 7}} }

func (f *fake) Lost(cause error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case <-f.exited:
	default:
		panic("Lost while the process may be alive")
	}
	f.lostFor = cause
	close(f.lost)
}

func (f *fake) Register(_ context.Context, m backend.Memory) ([]byte, error) {
	if err := f.run(&f.register); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.registered[m.Region] = true
	return f.key, nil
}

func (f *fake) Deregister(_ context.Context, id backend.RegionID) error {
	if err := f.run(&f.deregister); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.registered, id)
	return nil
}

func (f *fake) Fence(context.Context, backend.Peer) error { return f.run(&f.fence) }

func (f *fake) Offer(context.Context, backend.Peer) (backend.Handshake, error) {
	return fakeHandshake{f}, nil
}

func (f *fake) Answer(context.Context, backend.Peer, []byte) ([]byte, error) { return nil, nil }

// Close waits for Lost when the process does not do it.
func (f *fake) Close() error {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	return f.run(&f.close)
}

func (f *fake) done() <-chan struct{} { return f.exited }

// die ends the process by itself.
func (f *fake) die(status string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case <-f.exited:
	default:
		f.status = status
		close(f.exited)
	}
}

func (f *fake) stop(orderly bool) {
	f.die("")
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ordered = orderly
}

func (f *fake) ended() *ExitError { return &ExitError{Path: "fake", PID: 7, Status: f.status} }

func (f *fake) release() {
	<-f.exited
	f.mu.Lock()
	defer f.mu.Unlock()
	f.released = true
}

type fakeHandshake struct{ f *fake }

func (h fakeHandshake) Offer() []byte { return nil }
func (h fakeHandshake) Abandon()      {}
func (h fakeHandshake) Establish(context.Context, []byte) (backend.Endpoint, error) {
	return fakeEndpoint(h), nil
}

type fakeEndpoint struct{ f *fake }

func (e fakeEndpoint) Done() <-chan struct{} { return e.f.lost }
func (e fakeEndpoint) Close() error          { return nil }
func (e fakeEndpoint) Session(context.Context, backend.RegionID, backend.Remote, backend.Sink) (backend.Session, error) {
	return fakeSession(e), nil
}

// fakeSession accepts everything, and completes nothing by itself.
type fakeSession struct{ f *fake }

func (s fakeSession) Post(backend.Transfer) error {
	select {
	case <-s.f.lost:
		return backend.ErrPathDown
	default:
		s.f.inFlight.Add(1)
		return nil
	}
}
func (s fakeSession) PostWait(t backend.Transfer) error { return s.Post(t) }
func (s fakeSession) Cancel(uint64)                     {}
func (s fakeSession) Close() error                      { return nil }

// lab is a Process whose instances are fakes.
type lab struct {
	*Process
	t        *testing.T
	begun    time.Time
	mu       sync.Mutex
	launched []*fake
	at       []time.Duration // of each launch
	// next makes the instance of a launch, counted from 0; a plain one when it is nil.
	next func(n int) (*fake, error)
	keys map[backend.RegionID]string // as KeysChanged told
}

func newLab(t *testing.T, next func(n int) (*fake, error)) *lab {
	l := &lab{t: t, begun: time.Now(), next: next, keys: make(map[backend.RegionID]string)}
	l.Process = newProcess(ProcessSpec{Name: "fake"}, backend.Config{}, func(id backend.RegionID, key []byte) {
		l.keys[id] = string(key)
	})
	l.launch = func(context.Context) (*instance, error) {
		l.mu.Lock()
		n, next := len(l.at), l.next
		l.at = append(l.at, time.Since(l.begun))
		l.mu.Unlock()
		f, err := newFake(), error(nil)
		if next != nil {
			f, err = next(n)
		}
		if err != nil {
			return nil, err
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		l.launched = append(l.launched, f)
		return &instance{client: f, process: f, pid: 100 + n}, nil
	}
	if err := l.open(t.Context()); err != nil {
		t.Fatal(err)
	}
	return l
}

// last returns the instance that was launched last.
func (l *lab) last() *fake {
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.launched[len(l.launched)-1]
}

func (l *lab) close() {
	l.t.Helper()
	if err := l.Close(); err != nil {
		l.t.Errorf("Close: %v", err)
	}
	if s := l.State(); s.Phase != Down || s.PID != 0 {
		l.t.Errorf("after Close the state is %+v", s)
	}
	for n, f := range l.launched {
		if !f.released || f.lostFor == nil {
			l.t.Errorf("instance %d was not cleaned up", n)
		}
	}
}

func (l *lab) phase(want Phase) State {
	l.t.Helper()
	synctest.Wait()
	s := l.State()
	if s.Phase != want {
		l.t.Fatalf("the phase is %s, want %s: %+v", s.Phase, want, s)
	}
	return s
}

// register registers regions.
func (l *lab) register(ids ...backend.RegionID) {
	l.t.Helper()
	for _, id := range ids {
		if _, err := l.Register(l.t.Context(), backend.Memory{Region: id, FD: -1}); err != nil {
			l.t.Fatal(err)
		}
	}
}

// inBubble makes a subtest that has a time of its own.
func inBubble(f func(t *testing.T)) func(t *testing.T) {
	return func(t *testing.T) { synctest.Test(t, f) }
}

// TestPauses crashes instances at various ages, and looks when the next ones are launched.
func TestPauses(t *testing.T) {
	for name, c := range map[string]struct {
		ages  []time.Duration // of the instances at their deaths
		waits []time.Duration // until the next
		down  bool            // there is none after the last
	}{
		"young": {
			ages:  []time.Duration{0, 9 * time.Second, time.Second, 0, 0},
			waits: []time.Duration{100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond, 800 * time.Millisecond},
			down:  true,
		},
		"old enough": {
			ages: slices.Repeat([]time.Duration{11 * time.Second}, 11),
			waits: []time.Duration{
				100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond, 800 * time.Millisecond,
				1600 * time.Millisecond, 3200 * time.Millisecond, 6400 * time.Millisecond, 12800 * time.Millisecond,
				25600 * time.Millisecond, 30 * time.Second, 30 * time.Second,
			},
		},
		"healthy": {
			ages:  []time.Duration{0, 0, time.Minute, 0},
			waits: []time.Duration{100 * time.Millisecond, 200 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond},
		},
		"four young ones, one that is not": {
			ages: []time.Duration{0, 0, 0, 0, 10 * time.Second, 0, 0, 0, 0},
			waits: []time.Duration{
				100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond, 800 * time.Millisecond,
				1600 * time.Millisecond, 3200 * time.Millisecond, 6400 * time.Millisecond, 12800 * time.Millisecond, 25600 * time.Millisecond,
			},
		},
	} {
		t.Run(name, inBubble(func(t *testing.T) {
			l := newLab(t, nil)
			for n, age := range c.ages {
				time.Sleep(age)
				died := time.Since(l.begun)
				l.last().die("exit status 3")
				synctest.Wait()
				if n == len(c.waits) {
					break
				}
				time.Sleep(c.waits[n] - time.Nanosecond)
				synctest.Wait()
				if len(l.at) != n+1 {
					t.Fatalf("instance %d was launched %s after the death of the one before, want %s", n+1, l.at[n+1]-died, c.waits[n])
				}
				l.phase(Restarting)
				time.Sleep(time.Nanosecond)
				if s := l.phase(Running); s.Restarts != n+1 || s.PID != 101+n {
					t.Fatalf("after %d restarts the state is %+v", n+1, s)
				}
			}
			if c.down {
				time.Sleep(24 * time.Hour)
				if s := l.phase(Down); !strings.Contains(s.Reason, "exit status 3") || s.PID != 0 {
					t.Errorf("the state is %+v", s)
				}
				if _, err := l.Offer(t.Context(), backend.Peer{}); !errors.Is(err, backend.ErrPathDown) || !strings.Contains(err.Error(), "exit status 3") {
					t.Errorf("Offer returns %v", err)
				}
				if err := l.Restart(t.Context()); err != nil {
					t.Fatal(err)
				}
				l.phase(Running)
				l.last().die("")
				time.Sleep(100 * time.Millisecond) // the pauses begin anew
				l.phase(Running)
			}
			l.close()
		}))
	}
}

// TestStartsFail: starts that fail count like crashes.
func TestStartsFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, func(n int) (*fake, error) {
			if n >= 1 {
				return nil, fmt.Errorf("no luck the %d. time", n)
			}
			return newFake(), nil
		})
		l.register(1)
		l.last().die("signal: aborted")
		time.Sleep(time.Hour)
		if s := l.phase(Down); s.Reason != "no luck the 4. time" || s.Restarts != 0 {
			t.Errorf("the state is %+v", s)
		}
		want := []time.Duration{0, 100 * time.Millisecond, 300 * time.Millisecond, 700 * time.Millisecond, 1500 * time.Millisecond}
		if !slices.Equal(l.at, want) {
			t.Errorf("launched at %v, want %v", l.at, want)
		}
		if err := l.Restart(t.Context()); err == nil || err.Error() != "no luck the 5. time" {
			t.Errorf("Restart returns %v", err)
		}
		l.mu.Lock()
		l.next = nil
		l.mu.Unlock()
		time.Sleep(time.Second)
		l.phase(Running)
		if !l.last().registered[1] {
			t.Error("the region was forgotten")
		}
		l.close()
	})
}

// TestFirstStartFails: there is no backend then, and nothing is left of it.
func TestFirstStartFails(t *testing.T) {
	none := errors.New("no such file")
	p := newProcess(ProcessSpec{Name: "fake"}, backend.Config{}, nil)
	p.launch = func(context.Context) (*instance, error) { return nil, none }
	if err := p.open(t.Context()); !errors.Is(err, none) {
		t.Errorf("open returns %v", err)
	}
	if err := p.Restart(t.Context()); !errors.Is(err, backend.ErrPathDown) {
		t.Errorf("Restart returns %v", err)
	}
}

// TestStartIsBounded: a process that does not come to serve is given up.
func TestStartIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProcess(ProcessSpec{Name: "fake"}, backend.Config{}, nil)
		p.launch = func(ctx context.Context) (*instance, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		begun := time.Now()
		if err := p.open(t.Context()); !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) != 30*time.Second {
			t.Errorf("open returns %v after %s", err, time.Since(begun))
		}
	})
}

// TestFailures: each way to fail ends the process, loses what was in flight after it, and says why.
func TestFailures(t *testing.T) {
	for name, c := range map[string]struct {
		fail func(f *fake)
		want string
	}{
		"exit":   {func(f *fake) { f.die("exit status 4") }, "ended: exit status 4; it wrote nothing"},
		"broken": {func(f *fake) { close(f.broken) }, "was killed: it talks nonsense"},
		"hang": {func(f *fake) {
			f.set(&f.ping, func() error { time.Sleep(5 * time.Second); return context.DeadlineExceeded })
		}, "was killed: it gave no sign of life within 5s"},
		"exit, which breaks the data path": {func(f *fake) { f.die("exit status 5"); close(f.broken) }, "ended: exit status 5; it wrote nothing"},
	} {
		t.Run(name, inBubble(func(t *testing.T) {
			l := newLab(t, nil)
			f := l.last()
			// No ping runs when it is exchanged.
			time.Sleep(100 * time.Millisecond)
			c.fail(f)
			<-f.lost
			if f.ordered || f.closed || !strings.Contains(f.lostFor.Error(), c.want) {
				t.Errorf("closed %v, in order %v, lost because of %v; want %q", f.closed, f.ordered, f.lostFor, c.want)
			}
			time.Sleep(time.Second)
			if s := l.phase(Running); !strings.Contains(s.Reason, c.want) {
				t.Errorf("the state is %+v", s)
			}
			l.close()
		}))
	}
}

// TestReplay: a new instance gets the regions, and the new keys are told before it serves.
func TestReplay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := []string{"key", "key", "other", "other"}
		l := newLab(t, func(n int) (*fake, error) {
			f := newFake()
			f.key = []byte(keys[n])
			return f, nil
		})
		l.register(3, 1, 2)
		if err := l.Deregister(t.Context(), 2); err != nil {
			t.Fatal(err)
		}
		for n, want := range []map[backend.RegionID]string{{}, {1: "other", 3: "other"}, {}} {
			clear(l.keys)
			l.last().die("")
			time.Sleep(time.Second)
			l.phase(Running)
			if f := l.last(); !maps.Equal(f.registered, map[backend.RegionID]bool{1: true, 3: true}) {
				t.Errorf("restart %d: registered are %v", n, f.registered)
			}
			if !maps.Equal(l.keys, want) {
				t.Errorf("restart %d: the new keys are %v, want %v", n, l.keys, want)
			}
		}
		l.close()
	})
}

// TestReplayFails: an instance that does not take a region back does not serve.
func TestReplayFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, func(n int) (*fake, error) {
			f := newFake()
			if n == 1 {
				f.register = func() error { return backend.Errorf(backend.Internal, "no memory can be pinned") }
			}
			return f, nil
		})
		l.register(5)
		l.last().die("")
		time.Sleep(150 * time.Millisecond)
		if s := l.phase(Restarting); !strings.Contains(s.Reason, "register region 5 again: internal error: no memory can be pinned") {
			t.Errorf("the state is %+v", s)
		}
		time.Sleep(time.Second)
		l.phase(Running)
		l.close()
	})
}

// TestCapabilitiesChanged: nobody above could know, so the new instance is refused, and no other is tried.
func TestCapabilitiesChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, func(n int) (*fake, error) {
			f := newFake()
			f.info.Capabilities.Window += n
			return f, nil
		})
		err := l.Restart(t.Context())
		if err == nil || !strings.Contains(err.Error(), "other capabilities: restart umbp to use it") {
			t.Errorf("Restart returns %v", err)
		}
		l.phase(Down)
		if len(l.at) != 2 {
			t.Errorf("%d launches, want 2", len(l.at))
		}
		l.close()
	})
}

// TestWithoutInstance: what fails, and what succeeds, between two instances.
func TestWithoutInstance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, nil)
		l.register(1, 2)
		l.last().die("exit status 6")
		l.phase(Restarting)

		for name, call := range map[string]func() error{
			"Register": func() error { _, err := l.Register(t.Context(), backend.Memory{Region: 3, FD: -1}); return err },
			"Offer":    func() error { _, err := l.Offer(t.Context(), backend.Peer{}); return err },
			"Answer":   func() error { _, err := l.Answer(t.Context(), backend.Peer{}, nil); return err },
		} {
			err := call()
			if backend.CodeOf(err) != backend.PathDown || !strings.Contains(err.Error(), "is being restarted") || !strings.Contains(err.Error(), "exit status 6") {
				t.Errorf("%s returns %v", name, err)
			}
		}
		if err := l.Fence(t.Context(), backend.Peer{}); err != nil {
			t.Errorf("Fence returns %v", err)
		}
		if err := l.Deregister(t.Context(), 2); err != nil {
			t.Errorf("Deregister returns %v", err)
		}
		time.Sleep(time.Second)
		l.phase(Running)
		if f := l.last(); !maps.Equal(f.registered, map[backend.RegionID]bool{1: true}) {
			t.Errorf("registered again are %v", f.registered)
		}
		l.close()
	})
}

// TestCalmWaits: Fence and Deregister do not return while the process that fails under them, or the one after it, may
// touch memory.
func TestCalmWaits(t *testing.T) {
	for name, call := range map[string]func(l *lab) error{
		"fence":      func(l *lab) error { return l.Fence(l.t.Context(), backend.Peer{}) },
		"deregister": func(l *lab) error { return l.Deregister(l.t.Context(), 1) },
	} {
		t.Run(name, inBubble(func(t *testing.T) {
			down := func() error { return backend.Errorf(backend.PathDown, "the socket is closed") }
			replaying := make(chan struct{})
			l := newLab(t, func(n int) (*fake, error) {
				f := newFake()
				switch n {
				case 0:
					f.deregister, f.fence = down, down
				case 1:
					f.register = func() error { <-replaying; return errors.New("not this time") }
				}
				return f, nil
			})
			l.register(1, 2)

			// The socket fails before anybody has seen the process fail.
			first := l.last()
			first.set(&first.ping, down)
			returned := make(chan error, 1)
			go func() { returned <- call(l) }()
			synctest.Wait()
			select {
			case err := <-returned:
				t.Fatalf("it returns %v while the process is alive", err)
			default:
			}
			time.Sleep(time.Second) // the supervisor's own ping
			if err := <-returned; err != nil {
				t.Errorf("it returns %v", err)
			}
			<-first.lost

			// A region is being registered again.
			time.Sleep(200 * time.Millisecond)
			l.phase(Restarting)
			go func() { returned <- call(l) }()
			synctest.Wait()
			select {
			case err := <-returned:
				t.Fatalf("it returns %v while a process is given memory", err)
			default:
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			defer cancel()
			if err := l.Fence(ctx, backend.Peer{}); backend.CodeOf(err) != backend.Cancelled {
				t.Errorf("Fence returns %v when its time is over", err)
			}
			close(replaying)
			if err := <-returned; err != nil {
				t.Errorf("it returns %v", err)
			}
			time.Sleep(time.Second)
			l.phase(Running)
			if name == "deregister" && l.last().registered[1] {
				t.Error("the region is registered again after Deregister")
			}
			l.close()
		}))
	}
}

// TestCalmSettles: where peers touch memory by themselves, they get a moment to hear of the death.
func TestCalmSettles(t *testing.T) {
	for name, tc := range map[string]struct {
		lend func(*backend.Capabilities)
		want time.Duration
	}{
		"by a descriptor": {func(c *backend.Capabilities) { c.NeedsFD = true }, settling},
		"within the host": {func(c *backend.Capabilities) { c.Reach = backend.SameHost }, settling},
		"not at all":      {func(c *backend.Capabilities) { c.Reach = backend.Network }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLab(t, func(int) (*fake, error) {
					f := newFake()
					tc.lend(&f.info.Capabilities)
					return f, nil
				})
				died := time.Now()
				l.last().die("")
				synctest.Wait()
				if err := l.Fence(t.Context(), backend.Peer{}); err != nil || time.Since(died) != tc.want {
					t.Errorf("Fence returns %v after %s, want nil after %s", err, time.Since(died), tc.want)
				}
				if err := l.Restart(t.Context()); err != nil {
					t.Fatal(err)
				}
				restarted := time.Now()
				if err := l.Fence(t.Context(), backend.Peer{}); err != nil || time.Since(restarted) != 0 {
					t.Errorf("after an orderly restart Fence returns %v after %s, want nil at once", err, time.Since(restarted))
				}
				l.close()
			})
		})
	}
}

// TestRegisterRaces: the process ends while it registers a region. Nobody may believe in the region then.
func TestRegisterRaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, nil)
		f := l.last()
		f.set(&f.register, func() error { f.die(""); <-f.lost; return nil })
		_, err := l.Register(t.Context(), backend.Memory{Region: 9, FD: -1})
		if backend.CodeOf(err) != backend.PathDown {
			t.Errorf("Register returns %v", err)
		}
		time.Sleep(time.Second)
		if f := l.last(); len(f.registered) != 0 {
			t.Errorf("registered again are %v", f.registered)
		}
		l.close()
	})
}

// TestPlannedRestart: Posts are Busy, what is in flight may finish, callers wait for the next instance.
func TestPlannedRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, nil)
		l.register(1)
		f := l.last()
		h, err := l.Offer(t.Context(), backend.Peer{})
		if err != nil {
			t.Fatal(err)
		}
		e, err := h.Establish(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		s, err := e.Session(t.Context(), 1, backend.Remote{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.(backend.PostWaiter).PostWait(backend.Transfer{}); err != nil {
			t.Fatal(err)
		}

		restarted := make(chan error, 1)
		go func() { restarted <- l.Restart(t.Context()) }()
		time.Sleep(5 * time.Second)
		l.phase(Restarting)
		if err := s.Post(backend.Transfer{}); !errors.Is(err, backend.ErrBusy) {
			t.Errorf("Post returns %v during the drain", err)
		}
		if err := s.(backend.PostWaiter).PostWait(backend.Transfer{}); !errors.Is(err, backend.ErrBusy) {
			t.Errorf("PostWait returns %v during the drain", err)
		}
		if f.closed {
			t.Fatal("it was closed while a transfer was in flight")
		}
		called := make(chan error, 3)
		go func() {
			_, err := l.Register(t.Context(), backend.Memory{Region: 2, FD: -1})
			called <- err
		}()
		go func() { _, err := l.Offer(t.Context(), backend.Peer{}); called <- err }()
		go func() { _, err := l.Answer(t.Context(), backend.Peer{}, nil); called <- err }()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := l.Offer(ctx, backend.Peer{}); backend.CodeOf(err) != backend.Cancelled {
			t.Errorf("Offer returns %v when its time is over", err)
		}
		if len(called) != 0 {
			t.Fatalf("a call did not wait: %v", <-called)
		}
		f.inFlight.Add(-1)
		if err := <-restarted; err != nil {
			t.Errorf("Restart returns %v", err)
		}
		if err := s.Post(backend.Transfer{}); !errors.Is(err, backend.ErrPathDown) {
			t.Errorf("Post returns %v after the restart", err)
		}
		if !f.closed || !f.ordered {
			t.Errorf("closed %v, ended in order %v", f.closed, f.ordered)
		}
		for range 3 {
			if err := <-called; err != nil {
				t.Errorf("a call that has waited returns %v", err)
			}
		}
		if f := l.last(); !maps.Equal(f.registered, map[backend.RegionID]bool{1: true, 2: true}) {
			t.Errorf("registered are %v", f.registered)
		}
		l.close()
	})
}

// TestPlannedRestartIsBounded: neither transfers that do not end nor a backend that does not close hold it up for ever,
// and a process that dies meanwhile is not waited for.
func TestPlannedRestartIsBounded(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(f *fake)
		took  time.Duration
		want  string
	}{
		"transfers stay": {func(f *fake) { f.inFlight.Add(1) }, 10 * time.Second, ""},
		"close hangs":    {func(f *fake) { f.set(&f.close, func() error { <-f.lost; return nil }) }, 10 * time.Second, "did not close the backend within 10s"},
		"close fails":    {func(f *fake) { f.set(&f.close, func() error { return errors.New("a peer holds on") }) }, 0, ""},
		"death in the drain": {func(f *fake) {
			f.inFlight.Add(1)
			time.AfterFunc(3*time.Second, func() { f.die("exit status 1") })
		}, 3 * time.Second, "exit status 1"},
	} {
		t.Run(name, inBubble(func(t *testing.T) {
			l := newLab(t, nil)
			f := l.last()
			c.spoil(f)
			begun := time.Now()
			if err := l.Restart(t.Context()); err != nil || time.Since(begun).Truncate(time.Second) != c.took {
				t.Errorf("Restart returns %v after %s, want nil after %s", err, time.Since(begun), c.took)
			}
			if !strings.Contains(f.lostFor.Error(), c.want) {
				t.Errorf("what was in flight is lost because of %v, want %q", f.lostFor, c.want)
			}
			l.close()
		}))
	}
}

// TestRestartGivenUp: the caller leaves, the restart goes on.
func TestRestartGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, nil)
		l.last().inFlight.Add(1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		for _, want := range []string{"the restart goes on", "the restart has not begun"} {
			if err := l.Restart(ctx); backend.CodeOf(err) != backend.Cancelled || !strings.Contains(err.Error(), want) {
				t.Errorf("Restart returns %v", err)
			}
		}
		time.Sleep(time.Minute)
		if s := l.phase(Running); s.Restarts != 1 {
			t.Errorf("the state is %+v", s)
		}
		l.close()
	})
}

// TestCloseInEveryPhase: Close ends whatever the supervisor is at.
func TestCloseInEveryPhase(t *testing.T) {
	for name, c := range map[string]struct {
		next    func(n int) (*fake, error)
		prepare func(l *lab)
	}{
		"running": {nil, func(*lab) {}},
		"paused":  {nil, func(l *lab) { l.last().die("") }},
		"down": {func(n int) (*fake, error) {
			if n > 0 {
				return nil, errors.New("no")
			}
			return newFake(), nil
		}, func(l *lab) { l.last().die(""); time.Sleep(time.Hour) }},
		"draining": {nil, func(l *lab) {
			l.last().inFlight.Add(1)
			go l.Restart(l.t.Context())
		}},
	} {
		t.Run(name, inBubble(func(t *testing.T) {
			l := newLab(t, c.next)
			l.register(1)
			c.prepare(l)
			synctest.Wait()
			begun := time.Now()
			l.close()
			l.close()
			if took := time.Since(begun); took != 0 {
				t.Errorf("Close waits for %s", took)
			}
			if _, err := l.Register(t.Context(), backend.Memory{Region: 2, FD: -1}); backend.CodeOf(err) != backend.PathDown || !strings.Contains(err.Error(), "the backend is closed") {
				t.Errorf("Register returns %v", err)
			}
			if err := l.Deregister(t.Context(), 1); err != nil {
				t.Errorf("Deregister returns %v", err)
			}
			if err := l.Fence(t.Context(), backend.Peer{}); err != nil {
				t.Errorf("Fence returns %v", err)
			}
		}))
	}
}

// TestCloseFails: what the backend says when it is closed is what Close says.
func TestCloseFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, nil)
		holds := errors.New("a peer holds on")
		f := l.last()
		f.set(&f.close, func() error { return holds })
		if err := l.Close(); !errors.Is(err, holds) {
			t.Errorf("Close returns %v", err)
		}
	})
}

// TestPromptExit: a process that ends as soon as it has answered has closed its backend, and has not failed.
func TestPromptExit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, nil)
		f := l.last()
		f.set(&f.close, func() error {
			f.die("exit status 0")
			time.Sleep(dyingTime / 2) // until the answer is here
			return nil
		})
		if err := l.Close(); err != nil {
			t.Errorf("Close returns %v", err)
		}
	})
}

func TestExitErrorShowsWhatMatters(t *testing.T) {
	long := strings.Repeat("goroutine 7 [running]\n", 1000)
	for _, c := range []struct {
		output      string
		want, never string
	}{
		{"", "it wrote nothing", ""},
		{"one\ntwo\n", "it wrote at last:\none\ntwo", ""},
		{"early\n" + long, "goroutine 7", "early"},
		{"early\n" + long + "panic: all is lost\n\n" + long, "it wrote:\npanic: all is lost\n\ngoroutine 7", "early"},
		{"early\nSIGABRT: abort\n" + long, "it wrote:\nSIGABRT: abort\n", "early"},
		{"fatal error: out of memory\n" + long, "it wrote:\nfatal error: out of memory\n", ""},
	} {
		e := &ExitError{Path: "/p", PID: 3, Status: "exit status 2", Output: c.output}
		text := e.Error()
		if !strings.HasPrefix(text, "the plugin's process 3 (/p) ended: exit status 2; ") || !strings.Contains(text, c.want) ||
			(c.never != "" && strings.Contains(text, c.never)) || len(text) > outputShown+100 {
			t.Errorf("after %.20q... the text is %d bytes: %.200s", c.output, len(text), text)
		}
	}
	if bytes.Contains([]byte((&ExitError{Err: errors.New("why")}).Error()), []byte("ended")) {
		t.Error("a process that was killed is said to have ended by itself")
	}
}
