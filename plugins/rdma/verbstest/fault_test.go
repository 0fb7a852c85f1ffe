package verbstest_test

import (
	"bytes"
	"errors"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/umbp/umbp/plugins/rdma/device"
	"github.com/umbp/umbp/plugins/rdma/verbstest"
)

// writes posts n signaled writes of 64 bytes each, with IDs from first on, of bytes that are not zero.
func (a *end) writes(b *end, first uint64, n int) {
	a.t.Helper()
	fill(a.memory, 1)
	for i := range n {
		a.add(device.Write, first+uint64(i), b, 64*i, 64*i, 64)
	}
	a.mustPost()
}

// arrived says of each piece of 64 bytes how many of its first bytes are there.
func (a *end) arrived(b *end, pieces int) []int {
	n := make([]int, pieces)
	for i := range n {
		for n[i] < 64 && a.memory[64*i+n[i]] == b.memory[64*i+n[i]] {
			n[i]++
		}
	}
	return n
}

func TestErrorAtWorkRequest(t *testing.T) {
	for what, c := range map[string]struct {
		fault  verbstest.Fault
		want   device.Status
		landed int
		target verbstest.State
	}{
		"nothing landed": {verbstest.Fault{Status: device.LocalProtection}, device.LocalProtection, 0, verbstest.ReadyToSend},
		"half landed":    {verbstest.Fault{Status: device.FatalError, Landed: verbstest.Half}, device.FatalError, 32, verbstest.ReadyToSend},
		"all landed":     {verbstest.Fault{Status: device.RetriesExceeded, Landed: verbstest.All}, device.RetriesExceeded, 64, verbstest.ReadyToSend},
		"refused":        {verbstest.Fault{Status: device.RemoteOperation}, device.RemoteOperation, 0, verbstest.Failed},
		"swallowed":      {verbstest.Fault{Effect: verbstest.Swallow}, device.RetriesExceeded, 0, verbstest.ReadyToSend},
		"not acknowledged": {verbstest.Fault{Effect: verbstest.Swallow, Landed: verbstest.All}, device.RetriesExceeded, 64,
			verbstest.ReadyToSend},
	} {
		t.Run(what, func(t *testing.T) {
			f, a, b := pair(t, 8)
			c.fault.Skip = 2
			trigger := f.Inject(c.fault)
			a.writes(b, 0, 4)
			a.statuses(0, device.Success, device.Success, c.want, device.Flushed)
			if got, want := a.arrived(b, 4), []int{64, 64, c.landed, 0}; !slices.Equal(got, want) {
				t.Errorf("arrived %v, want %v", got, want)
			}
			if state := f.QPs("simulated1")[0].State; state != c.target {
				t.Errorf("the target is %v, want %v", state, c.target)
			}
			if n := trigger.Hits(); n != 1 {
				t.Errorf("the fault struck %d times", n)
			}
		})
	}
}

func TestFaultSelection(t *testing.T) {
	f, a, b := pair(t, 16)
	reads := f.Inject(verbstest.Fault{Effect: verbstest.Corrupt, Times: -1,
		Match: func(_ string, _ uint32, wr device.WR) bool { return wr.Op == device.Read }})
	other := f.Inject(verbstest.Fault{Status: device.FatalError, Device: "simulated1"})
	number := f.Inject(verbstest.Fault{Status: device.FatalError, QPN: a.qp.Num() + 1})
	a.writes(b, 0, 4)
	a.statuses(0, make([]device.Status, 4)...)
	for id := range uint64(2) {
		a.add(device.Read, id, b, 1024, 0, 64)
	}
	a.mustPost()
	a.statuses(0, device.Success, device.Success)
	if a.memory[1024] != b.memory[0]^0xff || !bytes.Equal(a.memory[1025:1088], b.memory[1:64]) {
		t.Error("one byte is to differ")
	}
	if r, o, n := reads.Hits(), other.Hits(), number.Hits(); r != 2 || o != 0 || n != 0 {
		t.Errorf("faults struck %d, %d and %d times, want 2, 0 and 0", r, o, n)
	}
	reads.Remove()
	a.add(device.Read, 2, b, 1024, 0, 64)
	a.mustPost()
	a.statuses(2, device.Success)
	if !bytes.Equal(a.memory[1024:1088], b.memory[:64]) {
		t.Error("a fault struck that was removed")
	}
	f.Inject(verbstest.Fault{Effect: verbstest.Corrupt})
	a.writes(b, 3, 1)
	a.statuses(3, device.Success)
	if b.memory[0] != a.memory[0]^0xff || !bytes.Equal(b.memory[1:64], a.memory[1:64]) {
		t.Error("one byte is to differ")
	}
}

func TestRefusedCalls(t *testing.T) {
	f := verbstest.New(verbstest.Config{})
	missing := &device.Missing{What: "no library", Remedy: "install it"}
	f.Inject(verbstest.Fault{At: verbstest.AtDevices, Err: missing})
	if _, err := f.Devices(); !errors.Is(err, missing) {
		t.Errorf("Devices: %v", err)
	}
	refuse := func(what string, at verbstest.Point, call func() error) {
		t.Helper()
		f.Inject(verbstest.Fault{At: at, Device: "simulated0", Err: syscall.ENETUNREACH})
		wantErrno(t, what, call(), syscall.ENETUNREACH)
	}
	refuse("open", verbstest.AtOpen, func() error { _, err := f.Open("simulated0"); return err })
	a, b := newEnd(t, f, "simulated0", 8), newEnd(t, f, "simulated0", 8)
	refuse("port", verbstest.AtPort, func() error { _, err := a.dev.Port(1); return err })
	refuse("GIDs", verbstest.AtGIDs, func() error { _, err := a.dev.GIDs(1); return err })
	refuse("register", verbstest.AtRegister, func() error { _, err := a.dev.Register(a.memory, 0); return err })
	refuse("create CQ", verbstest.AtCreateCQ, func() error { _, err := a.dev.CreateCQ(8); return err })
	refuse("create QP", verbstest.AtCreateQP, func() error { _, err := a.dev.CreateQP(device.QPConfig{}); return err })
	check(t, a.qp.Close())
	var err error
	if a.qp, err = a.dev.CreateQP(device.QPConfig{CQ: a.cq, SendWRs: 8, SGEs: 4}); err != nil {
		t.Fatal(err)
	}
	refuse("init", verbstest.AtInit, func() error { return a.qp.Init(1, everything) })
	check(t, a.qp.Init(1, everything))
	refuse("receive", verbstest.AtReadyToReceive, func() error { return a.qp.ReadyToReceive(a.toward(b)) })
	check(t, a.qp.ReadyToReceive(a.toward(b)))
	refuse("send", verbstest.AtReadyToSend, func() error { return a.qp.ReadyToSend(sender) })
	check(t, a.qp.ReadyToSend(sender))
	refuse("arm", verbstest.AtArm, a.cq.Arm)
	refuse("wait", verbstest.AtWait, func() error { return a.cq.Wait(time.Time{}) })
	refuse("poll", verbstest.AtPoll, func() error { _, err := a.cq.Poll(); return err })
	refuse("fail", verbstest.AtFail, a.qp.Fail)
	refuse("destroy", verbstest.AtCloseQP, a.qp.Close)
	refuse("deregister", verbstest.AtCloseMR, a.mr.Close)
}

func TestPartialPost(t *testing.T) {
	f, a, b := pair(t, 8)
	for _, take := range []int{0, 2} {
		f.Record()
		f.Inject(verbstest.Fault{At: verbstest.AtPost, Err: syscall.ENOMEM, Take: take})
		for id := range uint64(4) {
			a.add(device.Write, id, b, 0, 0, 8)
		}
		taken, err := a.post()
		if taken != take {
			t.Errorf("%d taken, want %d", taken, take)
		}
		wantErrno(t, "post", err, syscall.ENOMEM)
		a.statuses(0, make([]device.Status, take)...)
		posts := f.Posts()
		if len(posts) != 1 || posts[0].Device != "simulated0" || posts[0].QPN != a.qp.Num() || len(posts[0].WRs) != 4 ||
			len(posts[0].SGEs) != 4 || posts[0].Taken != take || posts[0].Err != err {
			t.Errorf("recorded %+v", posts)
		}
	}
}

func TestPauseAndStep(t *testing.T) {
	f, a, b := pair(t, 8)
	f.Pause("simulated0")
	a.writes(b, 0, 4)
	f.Step("simulated0", 1)
	a.statuses(0, device.Success)
	time.Sleep(2 * time.Millisecond)
	if got, want := a.arrived(b, 4), []int{64, 0, 0, 0}; !slices.Equal(got, want) {
		t.Errorf("arrived %v, want %v", got, want)
	}
	if n := f.QPs("simulated0")[0].Outstanding; n != 3 {
		t.Errorf("%d outstanding, want 3", n)
	}
	f.Step("simulated0", 2)
	a.statuses(1, device.Success, device.Success)
	b.writes(a, 9, 1) // the other device goes on
	b.statuses(9, device.Success)
	f.Resume("simulated0")
	a.statuses(3, device.Success)
	f.Step("simulated0", 1)
	f.Step("simulated0", 2) // on top
	a.writes(b, 4, 5)
	a.statuses(4, device.Success, device.Success, device.Success)
	check(t, a.qp.Fail())
	a.statuses(7, device.Flushed, device.Flushed)
}

// cuts are ways to make what the first device of a pair sends vanish, and to end that.
var cuts = map[string][2]func(*verbstest.Fabric){
	"initiator": {
		func(f *verbstest.Fabric) { f.Unplug("simulated0") }, func(f *verbstest.Fabric) { f.Plug("simulated0") },
	},
	"target": {
		func(f *verbstest.Fabric) { f.Unplug("simulated1") }, func(f *verbstest.Fabric) { f.Plug("simulated1") },
	},
	"port": {
		func(f *verbstest.Fabric) { f.SetPort("simulated1", 1, false) },
		func(f *verbstest.Fabric) { f.SetPort("simulated1", 1, true) },
	},
}

func TestCut(t *testing.T) {
	for what, cut := range cuts {
		f, a, b := pair(t, 8)
		cut[0](f)
		a.writes(b, 0, 2)
		a.statuses(0, device.RetriesExceeded, device.Flushed)
		if got, want := a.arrived(b, 2), []int{0, 0}; !slices.Equal(got, want) {
			t.Errorf("%s: arrived %v", what, got)
		}
	}
}

// TestCutForAWhile cuts the network for less time than a request is repeated.
func TestCutForAWhile(t *testing.T) {
	f, a, b := pairOf(t, verbstest.Config{Retry: time.Hour}, 8)
	for _, cut := range cuts {
		clear(b.memory)
		cut[0](f)
		a.writes(b, 0, 2)
		time.Sleep(2 * time.Millisecond)
		cut[1](f)
		a.statuses(0, device.Success, device.Success)
	}
}

// TestGIDGone takes away the address that a queue pair sends from, or to.
func TestGIDGone(t *testing.T) {
	for _, name := range []string{"simulated0", "simulated1"} {
		f, a, b := pair(t, 8)
		f.SetGIDs(name, 1, []device.GID{{Index: 0, Type: device.GIDRoCEv2}})
		a.writes(b, 0, 1)
		a.statuses(0, device.RetriesExceeded)
	}
}

func TestBreak(t *testing.T) {
	f, a, b := pair(t, 8)
	f.Pause("simulated0")
	a.writes(b, 0, 2)
	f.Break("simulated0", a.qp.Num())
	a.statuses(0, device.Flushed, device.Flushed)
	if e, err := a.dev.NextEvent(); err != nil || e.Kind != device.QPFailed || e.QPN != a.qp.Num() {
		t.Errorf("event %+v, %v", e, err)
	}
	f.Break("simulated1", 0)
	if e, err := b.dev.NextEvent(); err != nil || e.QPN != b.qp.Num() {
		t.Errorf("event %+v, %v", e, err)
	}
}

func TestLoseCQs(t *testing.T) {
	f, a, b := pair(t, 8)
	f.Pause("simulated0")
	a.writes(b, 0, 2)
	f.LoseCQs("simulated0")
	for _, want := range []device.EventKind{device.CQFailed, device.QPFailed} {
		if e, err := a.dev.NextEvent(); err != nil || e.Kind != want {
			t.Errorf("event %+v, %v, want %v", e, err, want)
		}
	}
	f.Resume("simulated0")
	if got, err := a.cq.Poll(); err != nil || len(got) != 0 {
		t.Errorf("completions in a lost queue: %v, %v", got, err)
	}
}

// TestFatal ends a device with work in flight, at once and at a work request: nothing answers.
func TestFatal(t *testing.T) {
	for _, scripted := range []bool{false, true} {
		f, a, b := pair(t, 8)
		if scripted {
			f.Inject(verbstest.Fault{Effect: verbstest.Kill, Skip: 1, Landed: verbstest.Half})
		} else {
			f.Pause("simulated0")
		}
		a.writes(b, 0, 3)
		if !scripted {
			f.Step("simulated0", 1)
			a.statuses(0, device.Success)
			f.Fatal("simulated0")
		}
		if e, err := a.dev.NextEvent(); err != nil || e.Kind != device.DeviceFatal {
			t.Errorf("event %+v, %v", e, err)
		}
		f.Resume("simulated0")
		if scripted {
			a.statuses(0, device.Success)
			if got, want := a.arrived(b, 3), []int{64, 32, 0}; !slices.Equal(got, want) {
				t.Errorf("arrived %v, want %v", got, want)
			}
		}
		wantErrno(t, "Fail on a dead device", a.qp.Fail(), syscall.EIO)
		_, err := a.dev.CreateCQ(8)
		wantErrno(t, "CreateCQ on a dead device", err, syscall.EIO)
		a.writes(b, 5, 1)
		b.writes(a, 0, 1)
		b.statuses(0, device.RetriesExceeded) // nobody is there
		if got, err := a.cq.Poll(); err != nil || len(got) != 0 {
			t.Errorf("completions of a dead device: %v, %v", got, err)
		}
		_, err = f.Open("simulated0")
		wantErrno(t, "Open of a dead device", err, syscall.EIO)
		f.Repair("simulated0")
		again, third := newEnd(t, f, "simulated0", 8), newEnd(t, f, "simulated1", 8)
		connect(again, third)
		again.writes(third, 0, 1)
		again.statuses(0, device.Success)
		wantErrno(t, "Fail after the repair", a.qp.Fail(), syscall.EIO)
	}
}

func TestHold(t *testing.T) {
	f, a, b := pair(t, 8)
	f.Inject(verbstest.Fault{Effect: verbstest.Hold, Skip: 1})
	a.writes(b, 0, 3)
	a.statuses(0, device.Success)
	for f.QPs("simulated0")[0].Outstanding != 0 {
		time.Sleep(time.Millisecond)
	}
	if got, want := a.arrived(b, 3), []int{64, 64, 64}; !slices.Equal(got, want) {
		t.Errorf("arrived %v, want %v", got, want)
	}
	check(t, a.qp.Fail())
	a.writes(b, 3, 1)
	if got, err := a.cq.Poll(); err != nil || len(got) != 0 {
		t.Errorf("completions that are held: %v, %v", got, err)
	}
	f.Release()
	a.statuses(1, device.Success, device.Success, device.Flushed)
}

func TestEcho(t *testing.T) {
	f, a, b := pair(t, 8)
	f.Inject(verbstest.Fault{Effect: verbstest.Echo, Skip: 1})
	a.writes(b, 0, 3)
	a.statuses(0, make([]device.Status, 3)...)
	num := a.qp.Num()
	check(t, a.qp.Close())
	a.qp = nil
	if got, err := a.cq.Poll(); err != nil || len(got) != 0 {
		t.Errorf("an echo before Release: %v, %v", got, err)
	}
	f.Release()
	if got, err := a.cq.Poll(); err != nil || len(got) != 1 || got[0] != (device.Completion{ID: 1, QPN: num}) {
		t.Errorf("the echo is %v, %v", got, err)
	}
}

// TestHoldBeyondClose holds completions of a queue pair that is closed.
func TestHoldBeyondClose(t *testing.T) {
	for _, stray := range []bool{false, true} {
		f, a, b := pair(t, 8)
		f.Inject(verbstest.Fault{Effect: verbstest.Hold, Stray: stray})
		a.writes(b, 7, 1)
		for f.QPs("simulated0")[0].Outstanding != 0 {
			time.Sleep(time.Millisecond)
		}
		num := a.qp.Num()
		check(t, a.qp.Close())
		a.qp = nil
		f.Release()
		got, err := a.cq.Poll()
		if err != nil {
			t.Error(err)
		}
		if stray && (len(got) != 1 || got[0].ID != 7 || got[0].QPN != num) || !stray && len(got) != 0 {
			t.Errorf("stray %v: completions %v", stray, got)
		}
	}
}

func TestWrongCompletions(t *testing.T) {
	f, a, b := pair(t, 8)
	for _, effect := range []verbstest.Effect{verbstest.Lose, verbstest.Duplicate, verbstest.Foreign} {
		f.Inject(verbstest.Fault{Effect: effect, Skip: 1})
		a.writes(b, 0, 3)
		want := []device.Completion{{ID: 0, QPN: a.qp.Num()}, {ID: 1, QPN: a.qp.Num()}, {ID: 2, QPN: a.qp.Num()}}
		switch effect {
		case verbstest.Lose:
			want = slices.Delete(want, 1, 2)
		case verbstest.Duplicate:
			want = slices.Insert(want, 2, want[1])
		case verbstest.Foreign:
			want = slices.Insert(want, 1, device.Completion{ID: 1, QPN: 0xffffff})
		}
		if got := a.collect(len(want)); !slices.Equal(got, want) {
			t.Errorf("effect %d: completions %v, want %v", effect, got, want)
		}
		if got, want := a.arrived(b, 3), []int{64, 64, 64}; !slices.Equal(got, want) {
			t.Errorf("effect %d: arrived %v, want %v", effect, got, want)
		}
	}
}
