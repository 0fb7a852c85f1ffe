package xgmi

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
)

// scattered are segments that are copied one by one, of 1000 bytes each: no two are at the distance of two others.
func scattered(n uint64) (list []backend.Segment) {
	for i := range n {
		list = append(list, backend.Segment{Local: 2000 * i, Remote: 2000*i + 10*i*i, Length: 1000})
	}
	return list
}

// joined are segments that make one copy, and rows such that make a grid.
func joined(n uint64) (list []backend.Segment) {
	for i := range n {
		list = append(list, backend.Segment{Local: 1000 * i, Remote: 1000 * i, Length: 1000})
	}
	return list
}

func rows(n uint64) (list []backend.Segment) {
	for i := range n {
		list = append(list, backend.Segment{Local: 1000 * i, Remote: 3000 * i, Length: 1000})
	}
	return list
}

// TestBadMemory has copies to one range of the far memory fail, whenever they are tried. Only the segments fail that touch
// it, however the runtime reports it.
func TestBadMemory(t *testing.T) {
	long := []backend.Segment{{Length: 400 * kib}, {Local: 512 * kib, Remote: 512 * kib, Length: 10}}
	for _, c := range []struct {
		name     string
		segments []backend.Segment
		bad      []int // indexes of the segments whose fifth byte is bad
		options  []string
	}{
		{"copies", scattered(7), []int{2}, []string{"batch=off"}},
		{"a batch", scattered(7), []int{0, 3}, nil},
		{"one copy", joined(7), []int{4}, nil},
		{"a grid", rows(7), []int{6}, nil},
		{"all of a grid", rows(4), []int{0, 1, 2, 3}, nil},
		{"parts of a segment", long, []int{0}, nil},
		{"behind parts of a segment", long, []int{1}, nil},
		{"joined to parts of a segment", append(joined(2), backend.Segment{Local: 2000, Remote: 2000, Length: 400 * kib}), []int{1}, nil},
	} {
		for _, effect := range []gpusim.Effect{gpusim.Refuse, gpusim.Fail} {
			for _, op := range []backend.Op{backend.Write, backend.Read} {
				t.Run(c.name+map[gpusim.Effect]string{gpusim.Refuse: " refused ", gpusim.Fail: " failed "}[effect]+op.String(), func(t *testing.T) {
					w := newWorld(t, gpusim.Machine{})
					k := w.newCouple(0, 1, mib, append(c.options, "part_bytes=64KiB", "streams=1")...)
					near, far := w.content(k.near), w.content(k.far)
					want := make([]backend.Outcome, len(c.segments))
					var good []backend.Segment
					var faults []gpusim.Fault
					for i, s := range c.segments {
						want[i] = backend.Done
						if slices.Contains(c.bad, i) {
							want[i] = backend.Failed
							faults = append(faults, gpusim.Fault{Effect: effect, Address: k.far.GPU.Address + s.Remote + 5, Bytes: 1, Code: 999})
						} else {
							good = append(good, s)
						}
					}
					w.sim.SetFaults(faults...)
					must(t, post(k.session, op, 1, c.segments...))
					done := k.sink.Wait(t, 1)
					wantCode(t, done.Err, backend.Internal, "hipErrorUnknown", "GPU 0000:c1:00.0 (Simulated GPU 0)")
					wantOutcomes(t, done, want...)
					model(op, near, far, good...)
					for _, s := range good { // what else was tried may be there or not
						wantSame(t, "near", w.content(k.near)[s.Local:][:s.Length], near[s.Local:][:s.Length])
						wantSame(t, "far", w.content(k.far)[s.Remote:][:s.Length], far[s.Remote:][:s.Length])
					}
					// The session goes on.
					w.sim.SetFaults()
					must(t, post(k.session, op, 2, c.segments...))
					must(t, k.sink.Wait(t, 2).Err)
					if err := k.a.engine.devices[0].lost.Load(); err != nil {
						t.Errorf("the device counts as lost: %v", *err)
					}
				})
			}
		}
	}
}

// TestOneFails has one copy of several transfers fail once. The segments are copied again, and all is well.
func TestOneFails(t *testing.T) {
	for _, c := range []struct {
		name  string
		fault gpusim.Fault
	}{
		{"a copy", gpusim.Fault{Effect: gpusim.Fail, After: 5, Times: 1}},
		{"the record of an event", gpusim.Fault{Call: gpusim.Records, After: 2, Times: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, gpusim.Machine{})
			k := w.newCouple(0, 1, mib, "part_bytes=64KiB", "streams=1")
			near, far := w.content(k.near), w.content(k.far)
			w.sim.SetFaults(c.fault)
			for i := range uint64(4) {
				s := backend.Segment{Local: i * mib / 4, Remote: i * mib / 4, Length: mib / 4}
				must(t, post(k.session, backend.Write, i+1, s))
				model(backend.Write, near, far, s)
			}
			for i := range uint64(4) {
				must(t, k.sink.Wait(t, i+1).Err)
			}
			wantSame(t, "far region", w.content(k.far), far)
			if n := k.a.count(t, "copies"); n <= 16+16 {
				t.Errorf("%d copies: nothing was copied again", n)
			}
		})
	}
}

// TestScarcity has the runtime refuse what is needed besides copies.
func TestScarcity(t *testing.T) {
	for _, c := range []struct {
		name      string
		near, far int
		fault     gpusim.Call
		code      backend.Code // 0: it works nonetheless
		words     string
	}{
		{"streams", 0, 1, gpusim.Streams, backend.Unsupported, "cannot be used"},
		{"memory for the self-test", 0, 1, gpusim.Allocations, backend.Unsupported, "no memory for a self-test"},
		{"peer access", 0, 1, gpusim.Peers, backend.Unsupported, "no access to the memory of GPU 0000:c2:00.0"},
		{"pinned memory", 0, -1, gpusim.Registrations, 0, ""},
		{"events", 0, 1, gpusim.Events, backend.Unsupported, "no event"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, gpusim.Machine{})
			a, b := w.node(peer("a", 1)), w.node(peer("b", 2))
			near, far := w.region(1, c.near, mib, 0), w.region(5, c.far, mib, all)
			a.register(t, near)
			remote := b.register(t, far)
			e, k := a.connect(t, b.self, b), new(sink)
			w.sim.SetFaults(gpusim.Fault{Call: c.fault})
			s, err := e.Session(soon(t), 1, remote, k)
			if c.code != 0 {
				wantCode(t, err, c.code, c.words)
				w.sim.SetFaults()
				if c.name == "events" { // the self-test has failed, which this connection remembers
					e = a.connect(t, b.self, b)
				}
				s, err = e.Session(soon(t), 1, remote, k)
			} else if len(w.log.with("warn", "cannot be pinned")) == 0 {
				t.Error("it is not logged")
			}
			must(t, err)
			must(t, post(s, backend.Write, 1, backend.Segment{Length: mib}))
			must(t, k.Wait(t, 1).Err)
			wantSame(t, "far region", w.content(far), w.content(near))
		})
	}
}

// TestNoEvent has a transfer fail for want of an event, half way.
func TestNoEvent(t *testing.T) {
	w := newWorld(t, gpusim.Machine{})
	k := w.newCouple(0, 1, mib, "part_bytes=64KiB", "streams=1", "self_test=false")
	w.sim.SetFaults(gpusim.Fault{Effect: gpusim.Stall}, gpusim.Fault{Call: gpusim.Events, After: 2})
	must(t, post(k.session, backend.Write, 1, slices.Repeat([]backend.Segment{{Length: 64 * kib}}, 1)...))
	must(t, post(k.session, backend.Write, 2, backend.Segment{Length: mib}))
	until(t, "the second transfer is refused", func() bool { return k.a.count(t, "copies") == 2 })
	w.sim.SetFaults()
	must(t, k.sink.Wait(t, 1).Err)
	c := k.sink.Wait(t, 2)
	wantCode(t, c.Err, backend.Internal, "no event")
	wantOutcomes(t, c, backend.Failed) // a part of it was copied
}

// TestDeviceLost loses the initiator's device half way through a transfer, with others behind it.
func TestDeviceLost(t *testing.T) {
	const n = 16
	w := newWorld(t, gpusim.Machine{})
	w.loses = true
	k := w.newCouple(0, 1, mib, "part_bytes=64KiB", "streams=1")
	a, b := k.a, k.b
	others := new(sink)
	a.register(t, w.region(2, 1, mib, 0))
	second := a.connect(t, b.self, b)
	onOther, err := second.Session(soon(t), 2, k.remote, others) // moved by the other device
	must(t, err)
	idle := bind(t, a.connect(t, b.self, b), 1, k.remote, others)
	farLost := bind(t, a.connect(t, b.self, b), 2, b.register(t, w.region(6, 0, mib, all)), others)

	var parts []backend.Segment
	for i := range uint64(n) {
		parts = append(parts, backend.Segment{Local: i * 64 * kib, Remote: i * 64 * kib, Length: 64 * kib})
	}
	near, far := w.content(k.near), w.content(k.far)
	w.sim.SetFaults(gpusim.Fault{Effect: gpusim.Lose, From: w.sim.Devices[0].PCI, After: 5})
	for i := range uint64(3) {
		must(t, post(k.session, backend.Write, i+1, parts...))
	}
	c := k.sink.Wait(t, 1)
	wantCode(t, c.Err, backend.PathDown, "GPU 0000:c1:00.0 (Simulated GPU 0) is lost", "hipErrorLaunchFailure")
	done := slices.IndexFunc(c.Outcomes, func(o backend.Outcome) bool { return o != backend.Done })
	if done < 0 || done > 5 || !slices.IsSorted(ranks(c.Outcomes)) || c.Outcomes[done] != backend.Failed || c.Outcomes[n-1] != backend.NotSent {
		t.Errorf("outcomes %v, want some done, some failed, some not sent", c.Outcomes)
	}
	for _, cookie := range []uint64{2, 3} {
		late := k.sink.Wait(t, cookie)
		wantCode(t, late.Err, backend.PathDown)
		wantOutcomes(t, late, make([]backend.Outcome, n)...)
	}
	// The endpoint has failed, and others that use the device fail with the next transfer.
	<-k.endpoint.Done()
	wantCode(t, post(k.session, backend.Write, 4, parts...), backend.PathDown)
	must(t, post(idle, backend.Write, 5, parts...))
	wantCode(t, others.Wait(t, 5).Err, backend.PathDown)
	copies := a.count(t, "copies")
	must(t, post(farLost, backend.Write, 7, backend.Segment{Length: 10})) // another device would copy to it
	c7 := others.Wait(t, 7)
	wantCode(t, c7.Err, backend.PathDown, "is lost to this process")
	wantOutcomes(t, c7, backend.NotSent)
	if n := a.count(t, "copies"); n != copies {
		t.Errorf("%d copies to a device that is lost", n-copies)
	}
	// There is no new way to it.
	_, err = a.connect(t, b.self, b).Session(soon(t), 1, k.remote, k.sink)
	wantCode(t, err, backend.Unsupported, "is lost to this process")
	_, err = a.Register(soon(t), backend.Memory{Region: 9, Kind: backend.GPUMemory, GPU: k.near.GPU, FD: -1})
	wantCode(t, err, backend.Unsupported, "is lost to this process")
	// Other devices go on.
	must(t, post(onOther, backend.Read, 6, parts...))
	must(t, others.Wait(t, 6).Err)
	got := w.content(k.far)
	for i, o := range c.Outcomes {
		at, end := i*64*kib, (i+1)*64*kib
		switch o {
		case backend.Done:
			wantSame(t, "what is done", got[at:end], near[at:end])
		case backend.NotSent:
			wantSame(t, "what is not sent", got[at:end], far[at:end])
		}
	}
	if lines := w.log.with("error", "is lost"); len(lines) != 1 {
		t.Errorf("logged %q, want one line", lines)
	}
}

// ranks gives outcomes the order in which a transfer that is broken off has them.
func ranks(outcomes []backend.Outcome) (list []int) {
	for _, o := range outcomes {
		list = append(list, map[backend.Outcome]int{backend.Done: 0, backend.Failed: 1, backend.NotSent: 2, backend.InDoubt: 9}[o])
	}
	return list
}

// TestQuiet has copies stall: nothing completes before they are done, whatever the host wants.
func TestQuiet(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(k *couple)
		code backend.Code
	}{
		{"cancel", func(k *couple) { k.session.Cancel(1) }, backend.Cancelled},
		{"close the session", func(k *couple) { k.session.Close() }, backend.Cancelled},
		{"close the endpoint", func(k *couple) { k.endpoint.Close() }, backend.PathDown},
		{"close the initiator", func(k *couple) { k.a.Close() }, backend.PathDown},
		{"fence", func(k *couple) { k.b.Fence(soon(k.t), k.a.self) }, backend.PathDown},
		{"deregister the near region", func(k *couple) { k.a.Deregister(soon(k.t), 1) }, backend.Cancelled},
		{"deregister the far region", func(k *couple) { k.b.Deregister(soon(k.t), 5) }, backend.PathDown},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, gpusim.Machine{})
			k := w.newCouple(0, 1, mib, "part_bytes=64KiB", "streams=1")
			before := k.a.count(t, "copies")
			near, far := w.content(k.near), w.content(k.far)
			w.sim.SetFaults(gpusim.Fault{Effect: gpusim.Stall})
			must(t, post(k.session, backend.Write, 1, joined(600)...))
			until(t, "some parts are submitted", func() bool { return k.a.count(t, "copies") == before+ahead })
			ended := make(chan struct{})
			go func() {
				c.end(k)
				close(ended)
			}()
			if c.name == "cancel" {
				<-ended
			} else {
				time.Sleep(20 * time.Millisecond)
				select {
				case <-ended:
					t.Error("it returned while copies were under way")
				default:
				}
			}
			if k.sink.Has(1) {
				t.Error("the transfer completed while copies were under way")
			}
			w.sim.SetFaults()
			<-ended
			done := k.sink.Wait(t, 1)
			wantCode(t, done.Err, c.code)
			// Four parts were submitted, of 66 segments each, and no more.
			const sent = ahead * 66
			for i, o := range done.Outcomes {
				if o != backend.Done && i < sent || o != backend.NotSent && i >= sent {
					t.Fatalf("segment %d of %d: %v", i, len(done.Outcomes), o)
				}
			}
			copy(far[:sent*1000], near)
			wantSame(t, "far region", w.content(k.far), far)
		})
	}
}

// TestFewAhead has many small copies wait: only some of them are given to the GPU ahead of time.
func TestFewAhead(t *testing.T) {
	const n = 8 * partOps
	w := newWorld(t, gpusim.Machine{})
	k := w.newCouple(0, 1, n*4*kib, "batch=off", "self_test=false", "streams=1")
	var pages []backend.Segment
	for i := range uint64(n) {
		pages = append(pages, backend.Segment{Local: (n - 1 - i) * 4 * kib, Remote: i * 4 * kib, Length: kib})
	}
	w.sim.SetFaults(gpusim.Fault{Effect: gpusim.Stall})
	must(t, post(k.session, backend.Write, 1, pages...))
	until(t, "some parts are submitted", func() bool { return k.a.count(t, "copies") >= ahead*partOps })
	time.Sleep(20 * time.Millisecond) // for more to be submitted, which must not be
	if sent := k.a.count(t, "copies"); sent != ahead*partOps {
		t.Errorf("%d copies are submitted, want %d", sent, ahead*partOps)
	}
	w.sim.SetFaults()
	must(t, k.sink.Wait(t, 1).Err)
	wantSame(t, "the last page", w.content(k.far)[(n-1)*4*kib:][:kib], w.content(k.near)[:kib])
}

// TestRepairStopped cancels a transfer one of whose copies failed: its copies are not made again one by one.
func TestRepairStopped(t *testing.T) {
	w := newWorld(t, gpusim.Machine{})
	k := w.newCouple(0, 1, mib, "part_bytes=64KiB", "streams=1", "self_test=false")
	w.sim.SetFaults(gpusim.Fault{Effect: gpusim.Fail, After: 1, Times: 1}, gpusim.Fault{Effect: gpusim.Stall})
	must(t, post(k.session, backend.Write, 1, backend.Segment{Length: 64 * kib}, backend.Segment{Local: 512 * kib, Remote: 256 * kib, Length: 64 * kib}))
	until(t, "both parts are submitted", func() bool { return k.a.count(t, "events") == 2 })
	k.session.Cancel(1)
	w.sim.SetFaults(gpusim.Fault{Effect: gpusim.Fail, Times: 1})
	done := k.sink.Wait(t, 1)
	wantCode(t, done.Err, backend.Cancelled)
	if n := k.a.count(t, "copies"); n != 2 || slices.Contains(done.Outcomes, backend.NotSent) {
		t.Errorf("%d copies and outcomes %v, want 2 copies and no segment that is not sent", n, done.Outcomes)
	}
}

// TestCancelInLine cancels transfers of which nothing was submitted: they end at once, though what is before them does not.
func TestCancelInLine(t *testing.T) {
	w := newWorld(t, gpusim.Machine{})
	k := w.newCouple(0, 1, mib, "part_bytes=64KiB", "streams=1")
	w.sim.SetFaults(gpusim.Fault{Effect: gpusim.Stall})
	for i := range uint64(4) {
		must(t, post(k.session, backend.Write, i+1, backend.Segment{Length: mib}))
	}
	for _, cookie := range []uint64{3, 2} {
		k.session.Cancel(cookie)
		c := k.sink.Wait(t, cookie)
		wantCode(t, c.Err, backend.Cancelled)
		wantOutcomes(t, c, backend.NotSent)
	}
	if k.sink.Has(1) {
		t.Error("the first transfer completed while its copies were under way")
	}
	w.sim.SetFaults()
	must(t, k.sink.Wait(t, 1).Err)
	must(t, k.sink.Wait(t, 4).Err)
}

// TestCorruptPair has the bytes between two GPUs come out wrong, in one direction.
func TestCorruptPair(t *testing.T) {
	for _, c := range []struct {
		name     string
		from, to int
		words    string
	}{
		{"what is read", 1, 0, "what was read is wrong: byte "},
		{"what is written", 0, 1, "what was written is wrong: byte "},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, gpusim.Machine{})
			a, b := w.node(peer("a", 1)), w.node(peer("b", 2))
			a.register(t, w.region(1, 0, mib, 0))
			remote, same := b.register(t, w.region(5, 1, mib, all)), b.register(t, w.region(6, 0, mib, all))
			w.sim.SetFaults(gpusim.Fault{Effect: gpusim.Corrupt, From: w.sim.Devices[c.from].PCI, To: w.sim.Devices[c.to].PCI})
			e := a.connect(t, b.self, b)

			// Many sessions at once wait for one test, and all hear of it; and so do later ones.
			var group sync.WaitGroup
			for range 8 {
				group.Go(func() {
					_, err := e.Session(soon(t), 1, remote, new(sink))
					if backend.CodeOf(err) != backend.Unsupported {
						t.Errorf("got %v, want unsupported", err)
					}
				})
			}
			group.Wait()
			_, err := e.Session(soon(t), 1, remote, new(sink))
			wantCode(t, err, backend.Unsupported, "GPU 0000:c1:00.0 (Simulated GPU 0)", "GPU 0000:c2:00.0 (Simulated GPU 1)", c.words)
			if tests, failed := a.count(t, "self_tests"), a.count(t, "self_tests_failed"); tests != 1 || failed != 1 {
				t.Errorf("%d self-tests, of which %d failed; want 1 and 1", tests, failed)
			}
			if lines := w.log.with("error", "0000:c1:00.0", "0000:c2:00.0", c.words); len(lines) != 1 {
				t.Errorf("logged %q, want one line", w.log.with())
			}
			// Another pair of the same connection is good.
			bind(t, e, 1, same, new(sink))
			// Another connection makes its own test.
			w.sim.SetFaults()
			bind(t, a.connect(t, b.self, b), 1, remote, new(sink))
			_, err = e.Session(soon(t), 1, remote, new(sink))
			wantCode(t, err, backend.Unsupported)
			// What is remembered of a connection goes with it.
			must(t, e.Close())
			a.engine.tests.mu.Lock()
			defer a.engine.tests.mu.Unlock()
			if n := len(a.engine.tests.m); n != 1 {
				t.Errorf("%d connections are remembered, want 1", n)
			}
		})
	}
}

// TestSelfTestCancelled gives up waiting for a self-test. The next session makes it.
func TestSelfTestCancelled(t *testing.T) {
	w := newWorld(t, gpusim.Machine{})
	a, b := w.node(peer("a", 1)), w.node(peer("b", 2))
	a.register(t, w.region(1, 0, mib, 0))
	remote := b.register(t, w.region(5, 1, mib, all))
	e := a.connect(t, b.self, b)
	w.sim.SetFaults(gpusim.Fault{Effect: gpusim.Stall})
	results := make(chan error, 2)
	sessionOf := func(end <-chan struct{}) {
		ctx, cancel := contextUntil(end)
		defer cancel()
		_, err := e.Session(ctx, 1, remote, new(sink))
		results <- err
	}
	end := make(chan struct{})
	go sessionOf(end)
	until(t, "the self-test has begun", func() bool { return a.count(t, "copies") > 0 })
	go sessionOf(end)
	close(end)
	wantCode(t, <-results, backend.Cancelled) // one waits for the other, which waits for its copies
	w.sim.SetFaults()
	wantCode(t, <-results, backend.Cancelled)
	bind(t, e, 1, remote, new(sink))
	if failed := a.count(t, "self_tests_failed"); failed != 0 {
		t.Errorf("%d self-tests failed", failed)
	}
}

// TestSelfTestsShareScratch has two GPUs test the way to the same place at once, over one connection: they do not find each
// other's patterns.
func TestSelfTestsShareScratch(t *testing.T) {
	w := newWorld(t, gpusim.Machine{})
	a, b := w.node(peer("a", 1)), w.node(peer("b", 2))
	a.register(t, w.region(1, 0, mib, 0))
	a.register(t, w.region(2, 1, mib, 0))
	remote := b.register(t, w.region(5, 1, mib, all))
	e := a.connect(t, b.self, b)
	w.sim.SetFaults(gpusim.Fault{Effect: gpusim.Stall})
	results := make(chan error, 2)
	begin := func(near backend.RegionID) {
		_, err := e.Session(soon(t), near, remote, new(sink))
		results <- err
	}
	go begin(1)
	until(t, "the first self-test has begun", func() bool { return a.count(t, "copies") > 0 })
	go begin(2)
	time.Sleep(20 * time.Millisecond) // for the second to do what it must not
	w.sim.SetFaults()
	must(t, <-results)
	must(t, <-results)
	if n := a.count(t, "self_tests"); n != 2 {
		t.Errorf("%d self-tests, want 2", n)
	}
}

// TestSelfTestInLine gives up waiting for a self-test that waits for its turn on the device.
func TestSelfTestInLine(t *testing.T) {
	w := newWorld(t, gpusim.Machine{})
	k := w.newCouple(0, 1, mib, "part_bytes=64KiB", "streams=1")
	other := k.b.register(t, w.region(6, -1, mib, all))
	before := k.a.count(t, "copies")
	w.sim.SetFaults(gpusim.Fault{Effect: gpusim.Stall})
	must(t, post(k.session, backend.Write, 1, backend.Segment{Length: mib}))
	until(t, "the device is busy", func() bool { return k.a.count(t, "copies") == before+ahead })
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() {
		_, err := k.endpoint.Session(ctx, 1, other, k.sink)
		result <- err
	}()
	until(t, "the self-test has begun", func() bool { return k.a.count(t, "self_tests") == 2 })
	cancel()
	wantCode(t, <-result, backend.Cancelled)
	w.sim.SetFaults()
	must(t, k.sink.Wait(t, 1).Err)
}

// TestScratchIsGivenBack counts the memory that self-tests take.
func TestScratchIsGivenBack(t *testing.T) {
	w := newWorld(t, gpusim.Machine{})
	a, b := w.node(peer("a", 1)), w.node(peer("b", 2))
	a.register(t, w.region(1, 0, mib, 0))
	remote := b.register(t, w.region(5, 1, mib, all))
	before := w.sim.Counts().Allocations
	var ends []backend.Endpoint
	for range 3 {
		e := a.connect(t, b.self, b)
		ends = append(ends, e)
		for range 2 {
			bind(t, e, 1, remote, new(sink))
		}
	}
	if n := w.sim.Counts().Allocations - before; n != 3 {
		t.Errorf("%d allocations for three connections, want 3", n)
	}
	for _, e := range ends {
		must(t, e.Close())
	}
	if n := w.sim.Counts().Allocations - before; n != 0 {
		t.Errorf("%d allocations are left", n)
	}
}
