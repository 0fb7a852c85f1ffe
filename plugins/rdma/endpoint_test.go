package rdma

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/device"
	"github.com/umbp/umbp/plugins/rdma/verbstest"
)

// parked waits until all pollers of the endpoint have gone to sleep for lack of work.
func (r *rig) parked(t testing.TB) {
	t.Helper()
	eventually(t, "that the pollers park", func() bool {
		r.endpoint.mu.Lock()
		defer r.endpoint.mu.Unlock()
		for _, p := range r.endpoint.pollers {
			if !p.parked || p.helped {
				return false
			}
		}
		return true
	})
}

// TestPostWaitPolls sees a transfer complete on the goroutine of its caller, while the poller sleeps.
func TestPostWaitPolls(t *testing.T) {
	r := newRig(t, verbstest.Config{Instant: true}, 4096, map[string]string{"look": "10ms"})
	for i := range uint64(20) {
		r.parked(t)
		must(t, r.session.PostWait(backend.Transfer{Op: backend.Write, Cookie: i, Segments: []backend.Segment{{Length: 4096}}}))
		if len(r.completions.All(t)) == 0 {
			t.Fatal("PostWait returned before the transfer had completed, which took no time")
		}
		if c := r.completions.Next(t); c.Err != nil || c.Cookie != i {
			t.Fatalf("got %+v", c)
		}
		r.parked(t)
	}
}

// TestPostWaitGivesUp has nothing complete while PostWait polls: it leaves the transfer to the poller.
func TestPostWaitGivesUp(t *testing.T) {
	r := newRig(t, verbstest.Config{}, 4096, nil)
	r.fabric.Pause("sim-a0")
	r.parked(t)
	must(t, r.session.PostWait(backend.Transfer{Op: backend.Read, Segments: []backend.Segment{{Length: 4096}}}))
	r.completions.Empty(t)
	r.fabric.Resume("sim-a0")
	if c := r.completions.Next(t); c.Err != nil {
		t.Fatal(c.Err)
	}
	r.parked(t)
}

// TestDeregisteredBeforeSubmit deregisters the local region while a transfer is being planned. It is not accepted any more,
// so that nobody waits for one that started late.
func TestDeregisteredBeforeSubmit(t *testing.T) {
	r := newRig(t, verbstest.Config{}, 4096, nil)
	planned, err := r.session.begin(&backend.Transfer{Op: backend.Write, Segments: []backend.Segment{{Length: 1}}})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	gone := make(chan error)
	go func() { gone <- r.a.Deregister(ctx, 1) }()
	eventually(t, "the shutting of the region", r.session.near.users.IsShut)
	wantCode(t, r.endpoint.submit(planned), backend.BadRequest)
	if err := <-gone; err != nil {
		t.Error(err)
	}
	select {
	case <-r.endpoint.Done():
		t.Error("the endpoint ended for a transfer that was refused")
	default:
	}
}

// TestLostQueue has each call fail that completions depend on. None is to be had any more: everything ends at once.
func TestLostQueue(t *testing.T) {
	for at, name := range map[verbstest.Point]string{verbstest.AtPoll: "poll", verbstest.AtArm: "arm", verbstest.AtWait: "wait"} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, verbstest.Config{}, 4096, map[string]string{"look": "0s", "drain": "1m"})
			r.parked(t)
			r.fabric.Pause("sim-a0")
			fault := r.fabric.Inject(verbstest.Fault{At: at, Device: "sim-a0", Err: syscall.EIO})
			must(t, r.session.Post(backend.Transfer{Op: backend.Write, Segments: []backend.Segment{{Length: 4096}}}))
			c := r.completions.Next(t)
			wantCode(t, c.Err, backend.PathDown)
			if !errors.Is(c.Err, syscall.EIO) || c.Outcomes[0] != backend.InDoubt {
				t.Errorf("got %+v", c)
			}
			if fault.Hits() != 1 {
				t.Errorf("the fault struck %d times", fault.Hits())
			}
			wantClosed(t, r.endpoint.finished, "the end of the endpoint")
			r.fabric.Resume("sim-a0")
		})
	}
}

// TestPollerPumps leaves a queued transfer to a poller that is parked.
func TestPollerPumps(t *testing.T) {
	r := newRig(t, twoDevices, 4096, nil)
	r.parked(t)
	x, err := r.session.begin(&backend.Transfer{Op: backend.Write, Segments: []backend.Segment{{Length: 4096}}})
	must(t, err)
	r.endpoint.mu.Lock()
	err = r.endpoint.accept(x)
	r.endpoint.pollers[0].take()
	r.endpoint.mu.Unlock()
	must(t, err)
	if c := r.completions.Next(t); c.Err != nil {
		t.Fatal(c.Err)
	}
	r.parked(t)
}

// TestDrain has a completion come when the endpoint has failed already: it counts.
func TestDrain(t *testing.T) {
	r := newRig(t, verbstest.Config{}, 4096, map[string]string{"drain": "1m"})
	fill(r.near, 1)
	r.fabric.Inject(verbstest.Fault{Effect: verbstest.Hold, Device: "sim-a0"})
	bytesBefore := r.fabric.Counts().Bytes
	must(t, r.session.Post(backend.Transfer{Op: backend.Write, Segments: []backend.Segment{{Length: 4096}}}))
	eventually(t, "that the bytes are in place", func() bool { return r.fabric.Counts().Bytes == bytesBefore+4096 })
	r.endpoint.fail(backend.Errorf(backend.PathDown, "broken"), false)
	r.completions.Empty(t)
	r.fabric.Release()
	if c := r.completions.Next(t); c.Err != nil {
		t.Errorf("what the device has done completed as %+v", c)
	}
	wantClosed(t, r.endpoint.finished, "the end of the endpoint")
}

// TestIdleRecordsShrink sees the memory of a large transfer go after the connection was quiet.
func TestIdleRecordsShrink(t *testing.T) {
	r := newRig(t, verbstest.Config{}, benchPages*benchPage, map[string]string{"probe": "1h"})
	must(t, r.session.Post(backend.Transfer{Op: backend.Write, Segments: pages(benchPages, false)}))
	if c := r.completions.Next(t); c.Err != nil {
		t.Fatal(c.Err)
	}
	room := func() (n int) {
		r.endpoint.mu.Lock()
		defer r.endpoint.mu.Unlock()
		for i := range r.endpoint.transfers {
			n = max(n, cap(r.endpoint.transfers[i].plan.WRs))
		}
		return n
	}
	r.parked(t)
	r.endpoint.probe()
	if room() < benchPages {
		t.Fatalf("right after the transfer its record has room for %d work requests only", room())
	}
	r.parked(t)
	r.endpoint.probe()
	if room() != 0 {
		t.Fatalf("after the connection was quiet, a record has room for %d work requests", room())
	}
	r.parked(t)
}

// TestClosingIsNoFailure looks at what is counted as the failure of an endpoint.
func TestClosingIsNoFailure(t *testing.T) {
	r := newRig(t, verbstest.Config{}, 4096, nil)
	r.endpoint.Close()
	if n := r.a.counts.failures.Load(); n != 0 {
		t.Errorf("a closed endpoint counts as %d failures", n)
	}
	r.connect(t)
	r.fabric.Break("sim-a0", 0)
	wantClosed(t, r.endpoint.finished, "the end of the endpoint")
	if n := r.a.counts.failures.Load(); n != 1 {
		t.Errorf("a broken endpoint counts as %d failures", n)
	}
}

// chaos is a region of each end of which a goroutine of TestChaos has a part of its own.
type chaos struct {
	*rig
	reconnecting sync.Mutex
}

// open returns a session of its own for a worker. When the connection is broken, it fences the target, so that what is in
// doubt is quiet, and connects anew, as often as it takes.
func (c *chaos) open(t *testing.T, sink backend.Sink) *session {
	c.reconnecting.Lock()
	defer c.reconnecting.Unlock()
	for {
		s, err := c.endpoint.Session(context.Background(), 1, c.remote, sink)
		if err == nil {
			return s.(*session)
		}
		if err := c.b.Fence(context.Background(), c.a.self); err != nil {
			t.Error(err)
		}
		if e, err := tryConnect(c.a, c.b); err == nil {
			c.endpoint = e
		} else {
			time.Sleep(time.Millisecond)
		}
	}
}

// TestChaos moves random transfers, and cancels some, while devices do everything wrong that they can. Each transfer
// completes once, and what its completion says of each segment is true.
func TestChaos(t *testing.T) {
	const workers, rounds, part = 6, 60, 96 << 10
	options := map[string]string{"cancel_grace": "2ms", "drain": "5ms", "breaker_pause": "1ms", "breaker_max_pause": "1ms", "breaker_hold": "1ms"}
	for k, v := range tiny {
		options[k] = v
	}
	c := &chaos{rig: newRig(t, verbstest.Config{Devices: make([]verbstest.DeviceConfig, 2), Retry: time.Millisecond}, workers*part, options)}
	stop := make(chan struct{})
	var faults sync.WaitGroup
	faults.Go(func() { c.wreck(stop) })
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() { c.work(t, uint64(w), rounds, part) })
	}
	all.Wait()
	close(stop)
	faults.Wait()
	if n := c.a.counts.failures.Load(); n < 5 {
		t.Errorf("only %d endpoints broke: there was no chaos", n)
	}
}

// wreck injects one fault after the other.
func (c *chaos) wreck(stop chan struct{}) {
	rng := rand.New(rand.NewPCG(3, 4))
	statuses := []device.Status{
		device.LocalProtection, device.LocalLength, device.RemoteAccess, device.RemoteOperation, device.RetriesExceeded, device.FatalError,
	}
	for {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(rng.IntN(5000)) * time.Microsecond):
		}
		name := fmt.Sprint("sim-a", rng.IntN(2))
		f := verbstest.Fault{Device: name, Skip: rng.IntN(200), Landed: verbstest.Landed(rng.IntN(3))}
		switch rng.IntN(7) {
		case 0:
			f.Effect, f.Status = verbstest.Complete, statuses[rng.IntN(len(statuses))]
		case 1:
			f.Effect = verbstest.Swallow
		case 2:
			f.Effect = verbstest.Lose
		case 3:
			f.Effect = verbstest.Duplicate
		case 4:
			f.Effect = verbstest.Foreign
		case 5:
			f = verbstest.Fault{Device: name, At: verbstest.AtPost, Skip: rng.IntN(20), Err: syscall.ENOMEM, Take: rng.IntN(3)}
		case 6:
			c.fabric.Break(name, 0)
			continue
		}
		trigger := c.fabric.Inject(f)
		time.Sleep(2 * time.Millisecond)
		trigger.Remove()
	}
}

// work moves segments within one part of both regions.
func (c *chaos) work(t *testing.T, worker uint64, rounds int, part uint64) {
	rng := rand.New(rand.NewPCG(worker, 1))
	done := new(sink)
	base := worker * part
	near, far := c.near[base:][:part], c.far[base:][:part]
	for round := range rounds {
		op := backend.Write
		source, sink := near, far
		if rng.IntN(2) == 0 {
			op, source, sink = backend.Read, far, near
		}
		fill(source, rng.Uint64())
		fill(sink, rng.Uint64())
		before := bytes.Clone(sink)
		n := 1 + rng.IntN(60)
		size := part / uint64(n)
		x := backend.Transfer{Op: op, Cookie: uint64(round)}
		for i := range uint64(n) {
			length := 1 + rng.Uint64N(size)
			x.Segments = append(x.Segments, backend.Segment{
				Local: base + (uint64(n)-1-i)*size, Remote: base + i*size, Length: length,
			})
		}
		s := c.open(t, done)
		post := s.Post
		if rng.IntN(4) == 0 {
			post = s.PostWait
		}
		err := post(x)
		for errors.Is(err, backend.ErrBusy) {
			time.Sleep(100 * time.Microsecond)
			err = post(x)
		}
		if err != nil {
			wantRefusal(t, err)
			s.Close()
			continue
		}
		if rng.IntN(4) == 0 {
			time.Sleep(time.Duration(rng.IntN(300)) * time.Microsecond)
			s.Cancel(x.Cookie)
		} else {
			// What was lost never ends by itself: a host cancels it at its deadline.
			late := time.AfterFunc(50*time.Millisecond, func() { s.Cancel(x.Cookie) })
			defer late.Stop()
		}
		got := done.Next(t)
		s.Close()
		done.Empty(t)
		if got.Err != nil {
			// What is in doubt may still be stored at the target until it is fenced.
			if err := c.b.Fence(context.Background(), c.a.self); err != nil {
				t.Error(err)
			}
		}
		for i, g := range x.Segments {
			from, to := g.Local-base, g.Remote-base
			if op == backend.Read {
				from, to = to, from
			}
			is, sent, was := sink[to:][:g.Length], source[from:][:g.Length], before[to:][:g.Length]
			switch o := outcome(got, i); {
			case o == backend.Done && !bytes.Equal(is, sent):
				t.Errorf("worker %d, round %d: segment %d of a %s is done, and not in place", worker, round, i, op)
			case o == backend.NotSent && !bytes.Equal(is, was):
				t.Errorf("worker %d, round %d: segment %d of a %s is not sent, and the destination has changed", worker, round, i, op)
			}
		}
	}
}

func wantRefusal(t *testing.T, err error) {
	if code := backend.CodeOf(err); code != backend.PathDown {
		t.Errorf("a legal transfer was refused: %v", err)
	}
}
