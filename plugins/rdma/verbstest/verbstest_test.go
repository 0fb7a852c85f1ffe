package verbstest_test

import (
	"bytes"
	"errors"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugins/rdma/device"
	"github.com/umbp/umbp/plugins/rdma/verbstest"
)

func wantErrno(t *testing.T, what string, err error, want syscall.Errno) {
	t.Helper()
	var refused *device.Error
	if !errors.As(err, &refused) || refused.Errno != want || refused.Device == "" || refused.Op == "" {
		t.Errorf("%s: %v, want a refusal with %v", what, err, want)
	}
}

func wantPanic(t *testing.T, what string, do func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Errorf("%s did not panic", what)
		}
	}()
	do()
}

func TestNames(t *testing.T) {
	f := verbstest.New(verbstest.Config{Devices: []verbstest.DeviceConfig{{}, {Name: "sim-b"}, {}}})
	if !f.Simulated() || f.Name() != "simulated verbs" {
		t.Errorf("the library is %q, simulated %v", f.Name(), f.Simulated())
	}
	names, err := f.Devices()
	if want := []string{"sim-b", "simulated0", "simulated2"}; err != nil || len(names) != 3 ||
		names[0] != want[0] || names[1] != want[1] || names[2] != want[2] {
		t.Errorf("devices %q, %v, want %q", names, err, want)
	}
	for _, devices := range [][]verbstest.DeviceConfig{{{Name: "mlx5_0"}}, {{Name: "sim"}, {Name: "sim"}}} {
		wantPanic(t, "a bad name", func() { verbstest.New(verbstest.Config{Devices: devices}) })
	}
	h := f.Host("sim-b")
	if names, err := h.Devices(); err != nil || len(names) != 1 || names[0] != "sim-b" {
		t.Errorf("devices of a host %q, %v", names, err)
	}
	_, err = h.Open("simulated0")
	wantErrno(t, "open a device of another host", err, syscall.ENODEV)
	_, err = f.Open("sim-c")
	wantErrno(t, "open a device that is not there", err, syscall.ENODEV)
	d, err := h.Open("sim-b")
	if err != nil {
		t.Fatal(err)
	}
	if a := d.Attr(); a.Name != "sim-b" || a.Firmware != "simulated" || a.MaxSGERead != 32 || a.Ports != 1 {
		t.Errorf("attributes %+v", a)
	}
	p, err := d.Port(1)
	if err != nil || !p.Active || p.State != "ACTIVE" || p.Link != device.Ethernet || p.MaxMessage != 8<<20 {
		t.Errorf("port %+v, %v", p, err)
	}
	gids, err := d.GIDs(1)
	if err != nil || len(gids) != 3 || gids[0].Type != device.GIDRoCEv1 || gids[1].Type != device.GIDRoCEv2 ||
		gids[2].Index != 3 {
		t.Errorf("GIDs %+v, %v", gids, err)
	}
	_, err = d.Port(2)
	wantErrno(t, "port 2 of 1", err, syscall.EINVAL)
	_, err = d.GIDs(0)
	wantErrno(t, "GIDs of port 0", err, syscall.EINVAL)
	check(t, d.Close())
}

func TestCreationLimits(t *testing.T) {
	f := verbstest.New(verbstest.Config{Devices: []verbstest.DeviceConfig{{
		Attr:    device.Attr{MaxQP: 1, MaxCQ: 1, MaxMR: 1, MaxCQE: 100, MaxMRSize: 64, MaxWR: 48, MaxSGE: 5},
		RoundUp: true,
	}}})
	d, err := f.Open("simulated0")
	if err != nil {
		t.Fatal(err)
	}
	memory := make([]byte, 65)
	for name, register := range map[string]struct {
		memory []byte
		access device.Access
	}{
		"nothing": {nil, everything}, "too much": {memory, everything}, "RemoteWrite alone": {memory[:8], device.RemoteWrite},
	} {
		_, err := d.Register(register.memory, register.access)
		wantErrno(t, "register "+name, err, syscall.EINVAL)
	}
	mr, err := d.Register(memory[:64], device.RemoteRead)
	check(t, err)
	_, err = d.Register(memory[:8], 0)
	wantErrno(t, "one region too many", err, syscall.ENOMEM)

	for _, entries := range []int{0, 101} {
		_, err = d.CreateCQ(entries)
		wantErrno(t, "a completion queue of a bad size", err, syscall.EINVAL)
	}
	cq, err := d.CreateCQ(100)
	check(t, err)
	_, err = d.CreateCQ(1)
	wantErrno(t, "one completion queue too many", err, syscall.ENOMEM)

	for _, cfg := range []device.QPConfig{{}, {CQ: cq, SGEs: 1}, {CQ: cq, SendWRs: 49, SGEs: 1}, {CQ: cq, SendWRs: 1},
		{CQ: cq, SendWRs: 1, SGEs: 6}} {
		_, err = d.CreateQP(cfg)
		wantErrno(t, "a bad queue pair", err, syscall.EINVAL)
	}
	qp, err := d.CreateQP(device.QPConfig{CQ: cq, SendWRs: 17, SGEs: 3})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := qp.Caps(), (device.Caps{SendWRs: 32, SGEs: 4}); got != want {
		t.Errorf("granted %+v, want %+v", got, want)
	}
	_, err = d.CreateQP(device.QPConfig{CQ: cq, SendWRs: 1, SGEs: 1})
	wantErrno(t, "one queue pair too many", err, syscall.ENOMEM)

	if got, want := f.Objects(), (verbstest.Objects{Devices: 1, Regions: 1, CQs: 1, QPs: 1}); got != want {
		t.Errorf("open are %+v, want %+v", got, want)
	}
	wantErrno(t, "close the completion queue before its queue pair", cq.Close(), syscall.EBUSY)
	wantErrno(t, "close the device before what it made", d.Close(), syscall.EBUSY)
	check(t, qp.Close())
	wantPanic(t, "a second QP.Close", func() { qp.Close() })
	wantPanic(t, "Fail after Close", func() { qp.Fail() })
	check(t, cq.Close())
	wantPanic(t, "a second CQ.Close", func() { cq.Close() })
	wantPanic(t, "Poll after Close", func() { cq.Poll() })
	check(t, mr.Close())
	wantPanic(t, "a second MR.Close", func() { mr.Close() })
	check(t, d.Close())
	wantPanic(t, "a second Device.Close", func() { d.Close() })
	if _, err := d.NextEvent(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("an event after Close: %v", err)
	}
	if got := f.Objects(); got != (verbstest.Objects{}) {
		t.Errorf("left open are %+v", got)
	}
}

// TestStates goes through the states, and tries at each what is not allowed there.
func TestStates(t *testing.T) {
	f := verbstest.New(verbstest.Config{Devices: make([]verbstest.DeviceConfig, 2)})
	a, b := newEnd(t, f, "simulated0", 4), newEnd(t, f, "simulated1", 4)
	check(t, a.qp.Close())
	var err error
	if a.qp, err = a.dev.CreateQP(device.QPConfig{CQ: a.cq, SendWRs: 4, SGEs: 4}); err != nil {
		t.Fatal(err)
	}
	refusePost := func(state string) {
		t.Helper()
		a.add(device.Write, 1, b, 0, 0, 8)
		n, err := a.post()
		if n != 0 {
			t.Errorf("%s: %d posts taken", state, n)
		}
		wantErrno(t, "post in "+state, err, syscall.EINVAL)
	}
	good := a.toward(b)

	refusePost("Reset")
	wantErrno(t, "Reset to ReadyToReceive", a.qp.ReadyToReceive(good), syscall.EINVAL)
	wantErrno(t, "Init with port 2", a.qp.Init(2, 0), syscall.EINVAL)
	check(t, a.qp.Init(1, everything))

	refusePost("Init")
	wantErrno(t, "Init twice", a.qp.Init(1, 0), syscall.EINVAL)
	wantErrno(t, "Init to ReadyToSend", a.qp.ReadyToSend(sender), syscall.EINVAL)
	for what, change := range map[string]func(*device.ReceiveAttr){
		"another port":         func(r *device.ReceiveAttr) { r.Port = 2 },
		"an unset GID":         func(r *device.ReceiveAttr) { r.GIDIndex = 2 },
		"the wrong link":       func(r *device.ReceiveAttr) { r.Link = device.InfiniBand },
		"a long number":        func(r *device.ReceiveAttr) { r.RemoteQPN = 1 << 24 },
		"a long PSN":           func(r *device.ReceiveAttr) { r.RemotePSN = 1 << 24 },
		"a small MTU":          func(r *device.ReceiveAttr) { r.MTU = 128 },
		"a large MTU":          func(r *device.ReceiveAttr) { r.MTU = 8192 },
		"an odd MTU":           func(r *device.ReceiveAttr) { r.MTU = 1500 },
		"too many reads":       func(r *device.ReceiveAttr) { r.ReadsServed = 129 },
		"a timer of 32":        func(r *device.ReceiveAttr) { r.MinRNRTimer = 32 },
		"a traffic class":      func(r *device.ReceiveAttr) { r.TrafficClass = 256 },
		"a service level":      func(r *device.ReceiveAttr) { r.ServiceLevel = 16 },
		"a negative hop limit": func(r *device.ReceiveAttr) { r.HopLimit = -1 },
	} {
		bad := good
		change(&bad)
		wantErrno(t, "ReadyToReceive with "+what, a.qp.ReadyToReceive(bad), syscall.EINVAL)
	}
	bad := good
	bad.GIDIndex = 1
	wantErrno(t, "from a link-local address to IPv4", a.qp.ReadyToReceive(bad), syscall.ENETUNREACH)
	bad = good
	bad.RemoteGID[15] = 99
	wantErrno(t, "to nobody", a.qp.ReadyToReceive(bad), syscall.ETIMEDOUT)
	check(t, a.qp.ReadyToReceive(good))

	refusePost("ReadyToReceive")
	for what, change := range map[string]func(*device.SendAttr){
		"a long PSN":           func(s *device.SendAttr) { s.PSN = 1 << 24 },
		"no timeout":           func(s *device.SendAttr) { s.Timeout = 0 },
		"8 retries":            func(s *device.SendAttr) { s.Retries = 8 },
		"RNR retries for ever": func(s *device.SendAttr) { s.RNRRetries = 7 },
		"too many reads":       func(s *device.SendAttr) { s.ReadsInitiated = 129 },
	} {
		bad := sender
		change(&bad)
		wantErrno(t, "ReadyToSend with "+what, a.qp.ReadyToSend(bad), syscall.EINVAL)
	}
	check(t, a.qp.ReadyToSend(sender))
	wantErrno(t, "ReadyToSend twice", a.qp.ReadyToSend(sender), syscall.EINVAL)
	info := f.QPs("simulated0")
	if len(info) != 1 || info[0].State != verbstest.ReadyToSend || info[0].Receive != good || info[0].Send != sender {
		t.Errorf("the queue pair is %+v", info)
	}

	check(t, a.qp.Fail())
	a.add(device.Write, 1, b, 0, 0, 8)
	a.add(device.Write, 2, b, 0, 0, 8).Signaled = false
	a.mustPost()
	a.statuses(1, device.Flushed, device.Flushed)
	wantErrno(t, "Init after an error", a.qp.Init(1, 0), syscall.EINVAL)
}

// TestUnheard connects an end that its peer does not hear.
func TestUnheard(t *testing.T) {
	for what, spoil := range map[string]func(f *verbstest.Fabric, a, b *end, toA, toB *device.ReceiveAttr){
		"the number of nobody": func(_ *verbstest.Fabric, _, _ *end, toB, _ *device.ReceiveAttr) { toB.RemoteQPN += 5 },
		"a target that expects another queue pair": func(_ *verbstest.Fabric, _, _ *end, _, toA *device.ReceiveAttr) {
			toA.RemoteQPN++
		},
		"a target that expects another address": func(_ *verbstest.Fabric, _, b *end, _, toA *device.ReceiveAttr) {
			toA.RemoteGID = b.routable().Addr
		},
		"a target that expects another PSN": func(_ *verbstest.Fabric, _, _ *end, _, toA *device.ReceiveAttr) {
			toA.RemotePSN++
		},
		"another version of RoCE": func(f *verbstest.Fabric, a, b *end, _, toA *device.ReceiveAttr) {
			for name, e := range map[string]*end{"simulated0": a, "simulated1": b} {
				gid := e.routable()
				f.SetGIDs(name, 1, []device.GID{{Index: 5, Addr: gid.Addr, Type: device.GIDRoCEv1}, gid})
			}
			toA.GIDIndex = 5
		},
	} {
		t.Run(what, func(t *testing.T) {
			f := verbstest.New(verbstest.Config{Devices: make([]verbstest.DeviceConfig, 2), Retry: time.Millisecond})
			a, b := newEnd(t, f, "simulated0", 8), newEnd(t, f, "simulated1", 8)
			toB, toA := a.toward(b), b.toward(a)
			spoil(f, a, b, &toB, &toA)
			for _, err := range []error{
				a.qp.ReadyToReceive(toB), b.qp.ReadyToReceive(toA), a.qp.ReadyToSend(sender),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			fill(a.memory[:8], 1)
			a.add(device.Write, 1, b, 0, 0, 8).Signaled = false
			a.add(device.Write, 2, b, 0, 0, 8).Signaled = false
			a.mustPost()
			a.statuses(1, device.RetriesExceeded, device.Flushed)
			if !bytes.Equal(b.memory[:8], make([]byte, 8)) {
				t.Error("bytes arrived")
			}
		})
	}
}

// TestDeadTarget ends the target's queue pair under the initiator.
func TestDeadTarget(t *testing.T) {
	for what, end := range map[string]func(*end) error{
		"failed": func(b *end) error { return b.qp.Fail() },
		"closed": func(b *end) error {
			qp := b.qp
			b.qp = nil
			return qp.Close()
		},
	} {
		t.Run(what, func(t *testing.T) {
			_, a, b := pair(t, 8)
			a.add(device.Write, 1, b, 0, 0, 8)
			a.mustPost()
			a.statuses(1, device.Success)
			check(t, end(b))
			a.add(device.Write, 2, b, 0, 0, 0)
			a.add(device.Read, 3, b, 0, 0, 8)
			a.mustPost()
			a.statuses(2, device.RetriesExceeded, device.Flushed)
		})
	}
}

// TestSendQueue fills the send queue and sees when it has room again.
func TestSendQueue(t *testing.T) {
	_, a, b := pair(t, 4)
	for id := range uint64(6) {
		a.add(device.Write, id, b, 0, 0, 8).Signaled = id == 2
	}
	taken, err := a.post()
	if taken != 4 {
		t.Errorf("%d taken into a queue of 4", taken)
	}
	wantErrno(t, "6 work requests into a queue of 4", err, syscall.ENOMEM)

	// The completion of the third gives back three places, and those of the unsignaled ones around it nothing.
	refuse := func() {
		t.Helper()
		a.add(device.Write, 4, b, 0, 0, 8)
		if n, err := a.post(); n != 0 || err == nil {
			t.Errorf("%d taken into a full queue", n)
		}
	}
	refuse()
	a.statuses(2, device.Success)
	for id := range uint64(3) {
		a.add(device.Write, 4+id, b, 0, 0, 8).Signaled = id == 2
	}
	a.mustPost()
	a.statuses(6, device.Success)
}

// TestUnsignaledFill fills the queue with work requests that nothing answers: it stays full.
func TestUnsignaledFill(t *testing.T) {
	f, a, b := pair(t, 4)
	for id := range uint64(4) {
		a.add(device.Write, id, b, 0, 0, 8).Signaled = false
	}
	a.mustPost()
	for f.QPs("simulated0")[0].Outstanding != 0 {
		time.Sleep(time.Millisecond)
	}
	a.add(device.Write, 5, b, 0, 0, 8)
	_, err := a.post()
	wantErrno(t, "post behind unsignaled work requests", err, syscall.ENOMEM)
}

func TestPostLimits(t *testing.T) {
	_, a, b := pair(t, 8)
	for what, spoil := range map[string]func(*device.WR){
		"five SGEs of four": func(wr *device.WR) {
			for range 4 {
				a.chain.SGEs = append(a.chain.SGEs, a.chain.SGEs[len(a.chain.SGEs)-1])
			}
			wr.SGEs = 5
		},
		"an SGE of no bytes": func(*device.WR) { a.chain.SGEs[len(a.chain.SGEs)-1].Length = 0 },
		"an unknown op":      func(wr *device.WR) { wr.Op = 7 },
	} {
		a.add(device.Write, 1, b, 0, 0, 8)
		spoil(a.add(device.Write, 2, b, 0, 0, 8))
		a.add(device.Write, 3, b, 0, 0, 8)
		taken, err := a.post()
		if taken != 1 {
			t.Errorf("%s: %d taken before it, want 1", what, taken)
		}
		wantErrno(t, what, err, syscall.EINVAL)
		a.statuses(1, device.Success)
	}
	a.add(device.Write, 1, b, 0, 0, 8).SGEs = 2
	wantPanic(t, "SGEs beyond the chain", func() { a.post() })
}

// TestRefusals are work requests that one of the ends refuses.
func TestRefusals(t *testing.T) {
	limits := verbstest.Config{Devices: []verbstest.DeviceConfig{{Attr: device.Attr{MaxSGERead: 1}, Ports: []verbstest.PortConfig{
		{Port: device.Port{Active: true, Link: device.Ethernet, MTU: 4096, MaxMessage: 4096}},
	}}, {}}}
	for what, c := range map[string]struct {
		op    device.Op
		spoil func(a, b *end, wr *device.WR, sge *device.SGE)
		want  device.Status
	}{
		"too long":      {device.Write, func(_, _ *end, _ *device.WR, s *device.SGE) { s.Length = 4097 }, device.LocalLength},
		"no such key":   {device.Write, func(_, _ *end, _ *device.WR, s *device.SGE) { s.LKey += 100 }, device.LocalProtection},
		"a remote key":  {device.Write, func(a, _ *end, _ *device.WR, s *device.SGE) { s.LKey = a.mr.RKey() }, device.LocalProtection},
		"before memory": {device.Write, func(a, _ *end, _ *device.WR, s *device.SGE) { s.Addr = a.base - 1 }, device.LocalProtection},
		"past memory": {device.Write, func(a, _ *end, _ *device.WR, s *device.SGE) {
			s.Addr = a.base + uint64(len(a.memory)) - 7
		}, device.LocalProtection},
		"two SGEs in a read": {device.Read, func(a, _ *end, wr *device.WR, _ *device.SGE) {
			a.chain.SGEs = append(a.chain.SGEs, a.chain.SGEs...)
			wr.SGEs = 2
		}, device.LocalQPOperation},
		"no such remote key": {device.Write, func(_, _ *end, wr *device.WR, _ *device.SGE) { wr.RKey += 100 }, device.RemoteAccess},
		"a local key": {device.Read, func(_, b *end, wr *device.WR, _ *device.SGE) {
			wr.RKey = b.mr.LKey()
		}, device.RemoteAccess},
		"before remote memory": {device.Read, func(_, b *end, wr *device.WR, _ *device.SGE) { wr.Remote = b.base - 1 }, device.RemoteAccess},
		"past remote memory": {device.Write, func(_, b *end, wr *device.WR, _ *device.SGE) {
			wr.Remote = b.base + uint64(len(b.memory)) - 7
		}, device.RemoteAccess},
		"an address that wraps": {device.Write, func(_, _ *end, wr *device.WR, _ *device.SGE) {
			wr.Remote = ^uint64(0) - 3
		}, device.RemoteAccess},
	} {
		t.Run(what, func(t *testing.T) {
			f, a, b := pairOf(t, limits, 8)
			a.add(device.Write, 1, b, 0, 0, 8).Signaled = false
			c.spoil(a, b, a.add(c.op, 2, b, 0, 0, 8), &a.chain.SGEs[1])
			a.chain.WRs[1].Signaled = false
			a.mustPost()
			a.statuses(2, c.want)
			a.add(device.Write, 3, b, 0, 0, 8).Signaled = false
			a.mustPost()
			a.statuses(3, device.Flushed)
			state := f.QPs("simulated1")[0].State
			if c.want == device.RemoteAccess {
				if e, err := b.dev.NextEvent(); err != nil || e.Kind != device.QPFailed || e.QPN != b.qp.Num() {
					t.Errorf("event %+v, %v", e, err)
				}
				if state != verbstest.Failed {
					t.Errorf("the target is %v", state)
				}
			} else if state != verbstest.ReadyToSend {
				t.Errorf("the target is %v", state)
			}
		})
	}
}

// TestRights tries each operation with each set of rights of the region and of the queue pair.
func TestRights(t *testing.T) {
	for _, op := range []device.Op{device.Write, device.Read} {
		need := device.RemoteWrite
		if op == device.Read {
			need = device.RemoteRead
		}
		for memory := range everything + 1 {
			for queue := range everything + 1 {
				for length := range 2 {
					if memory&device.RemoteWrite != 0 && memory&device.LocalWrite == 0 {
						continue
					}
					f := verbstest.New(verbstest.Config{Instant: true})
					a, b := newEnd(t, f, "simulated0", 8), newEnd(t, f, "simulated0", 8)
					check(t, b.qp.Close())
					var err error
					if b.qp, err = b.dev.CreateQP(device.QPConfig{CQ: b.cq, SendWRs: 8, SGEs: 1}); err != nil {
						t.Fatal(err)
					}
					check(t, b.qp.Init(1, queue))
					mr, err := b.dev.Register(b.memory, memory)
					check(t, err)
					connect(a, b)
					a.add(op, 1, b, 0, 0, length).RKey = mr.RKey()
					a.mustPost()
					switch {
					case queue&need == 0:
						a.statuses(1, device.RemoteInvalid)
					case memory&need == 0 && length > 0:
						a.statuses(1, device.RemoteAccess)
					default:
						a.statuses(1, device.Success)
					}
					check(t, mr.Close())
				}
			}
		}
	}
	_, a, b := pair(t, 8)
	mr, err := a.dev.Register(a.memory, 0)
	check(t, err)
	a.add(device.Write, 1, b, 0, 0, 8)
	a.chain.SGEs[0].LKey = mr.LKey()
	a.mustPost()
	a.statuses(1, device.Success)
	a.add(device.Read, 2, b, 0, 0, 8)
	a.chain.SGEs[0].LKey = mr.LKey()
	a.mustPost()
	a.statuses(2, device.LocalProtection)
	check(t, mr.Close())
}

// TestProtectionDomains uses memory of a second opening of the same device, at either end.
func TestProtectionDomains(t *testing.T) {
	f, a, b := pair(t, 8)
	a2, b2 := newEnd(t, f, "simulated0", 8), newEnd(t, f, "simulated1", 8)
	connect(a2, b2)
	a.add(device.Write, 1, b2, 0, 0, 8)
	a.mustPost()
	a.statuses(1, device.RemoteAccess)
	a2.add(device.Write, 2, b2, 0, 0, 8)
	a2.chain.SGEs[0].LKey = a.mr.LKey()
	a2.chain.SGEs[0].Addr = a.base
	a2.mustPost()
	a2.statuses(2, device.LocalProtection)
	if a.qp.Num() == a2.qp.Num() || a.qp.Num() != b.qp.Num() {
		t.Error("numbers of queue pairs are to differ on a device, and to begin alike on every one")
	}
}

// TestZeroLength needs no key, and moves nothing.
func TestZeroLength(t *testing.T) {
	_, a, b := pair(t, 8)
	for i, op := range []device.Op{device.Write, device.Read} {
		wr := a.add(op, uint64(i), b, 0, 0, 0)
		wr.RKey, wr.Remote = 0, 0
	}
	a.mustPost()
	a.statuses(0, device.Success, device.Success)
}

// TestReadsServed has more reads outstanding than the target serves.
func TestReadsServed(t *testing.T) {
	for reads, want := range map[int]device.Status{3: device.Success, 4: device.RemoteInvalid} {
		f := verbstest.New(verbstest.Config{Devices: make([]verbstest.DeviceConfig, 2)})
		a, b := newEnd(t, f, "simulated0", 8), newEnd(t, f, "simulated1", 8)
		toA := b.toward(a)
		toA.ReadsServed = 3
		check(t, a.qp.ReadyToReceive(a.toward(b)))
		check(t, b.qp.ReadyToReceive(toA))
		check(t, a.qp.ReadyToSend(sender))
		f.Pause("simulated0")
		for id := range reads {
			a.add(device.Read, uint64(id), b, 0, 0, 8).Signaled = id == reads-1
		}
		a.mustPost()
		f.Resume("simulated0")
		got := a.collect(1)
		if got[0].Status != want {
			t.Errorf("%d reads where 3 are served: %v, want %v", reads, got[0].Status, want)
		}
	}
	_, a, b := pair(t, 8)
	check(t, a.qp.Close())
	a.newQP(8)
	none := sender
	none.ReadsInitiated = 0
	check(t, a.qp.ReadyToReceive(a.toward(b)))
	check(t, a.qp.ReadyToSend(none))
	a.add(device.Read, 1, b, 0, 0, 8)
	a.mustPost()
	a.statuses(1, device.LocalQPOperation)
}

// TestMTU has ends that cut into packets differently: what fits in one packet of both goes.
func TestMTU(t *testing.T) {
	f := verbstest.New(verbstest.Config{Devices: make([]verbstest.DeviceConfig, 2)})
	a, b := newEnd(t, f, "simulated0", 8), newEnd(t, f, "simulated1", 8)
	toA := b.toward(a)
	toA.MTU = 1024
	check(t, a.qp.ReadyToReceive(a.toward(b)))
	check(t, b.qp.ReadyToReceive(toA))
	check(t, a.qp.ReadyToSend(sender))
	a.add(device.Write, 1, b, 0, 0, 1024)
	a.add(device.Write, 2, b, 0, 0, 1025)
	a.mustPost()
	a.statuses(1, device.Success, device.RemoteInvalid)
}

func TestInfiniBand(t *testing.T) {
	port := func(lid uint16) []verbstest.PortConfig {
		return []verbstest.PortConfig{{Port: device.Port{Active: true, Link: device.InfiniBand, MTU: 4096, LID: lid}}}
	}
	f := verbstest.New(verbstest.Config{Devices: []verbstest.DeviceConfig{{Ports: port(3)}, {Ports: port(4)}}})
	a, b := newEnd(t, f, "simulated0", 8), newEnd(t, f, "simulated1", 8)
	toB, toA := a.toward(b), b.toward(a)
	toB.Link, toA.Link = device.InfiniBand, device.InfiniBand
	toB.RemoteLID, toA.RemoteLID = 4, 3
	check(t, a.qp.ReadyToReceive(toB))
	check(t, b.qp.ReadyToReceive(toA))
	check(t, a.qp.ReadyToSend(sender))
	a.add(device.Write, 1, b, 0, 0, 64)
	a.mustPost()
	a.statuses(1, device.Success)
}

func TestOverflow(t *testing.T) {
	f, a, b := pair(t, 8)
	check(t, a.qp.Close())
	small, err := a.dev.CreateCQ(2)
	if err != nil {
		t.Fatal(err)
	}
	if a.qp, err = a.dev.CreateQP(device.QPConfig{CQ: small, SendWRs: 8, SGEs: 4}); err != nil {
		t.Fatal(err)
	}
	check(t, a.qp.Init(1, everything))
	check(t, b.qp.Close())
	b.newQP(8)
	connect(a, b)
	for id := range uint64(4) {
		a.add(device.Write, id, b, 0, 0, 8)
	}
	a.mustPost()
	if e, err := a.dev.NextEvent(); err != nil || e.Kind != device.CQFailed || e.CQ != small {
		t.Errorf("event %+v, %v", e, err)
	}
	if e, err := a.dev.NextEvent(); err != nil || e.Kind != device.QPFailed || e.QPN != a.qp.Num() {
		t.Errorf("event %+v, %v", e, err)
	}
	if got, err := small.Poll(); err != nil || len(got) != 2 {
		t.Errorf("%d completions, %v, want the 2 there was room for", len(got), err)
	}
	if state := f.QPs("simulated0")[0].State; state != verbstest.Failed {
		t.Errorf("the queue pair is %v", state)
	}
	check(t, a.qp.Close())
	a.qp = nil
	check(t, small.Close())

	// The event of a queue that is closed names none.
	f.Tell("simulated0", device.Event{Kind: device.CQFailed, CQ: small})
	if e, err := a.dev.NextEvent(); err != nil || e.Kind != device.CQFailed || e.CQ != nil {
		t.Errorf("event %+v, %v", e, err)
	}
}

func TestArmAndWait(t *testing.T) {
	_, a, b := pairOf(t, verbstest.Config{Instant: true}, 8)
	write := func() {
		a.add(device.Write, 1, b, 0, 0, 8)
		a.mustPost()
	}
	// returns reports whether Wait ends by itself: a deadline that has passed is what ends it otherwise.
	returns := func(deadline time.Time) chan struct{} {
		done := make(chan struct{})
		go func() {
			defer close(done)
			check(t, a.cq.Wait(deadline))
		}()
		return done
	}
	pending := func() bool {
		done := returns(time.Time{})
		select {
		case <-done:
			return true
		case <-time.After(20 * time.Millisecond):
			a.cq.Wake()
			<-done
			return false
		}
	}
	write()
	if pending() {
		t.Error("a completion before any Arm is an event")
	}
	check(t, a.cq.Arm())
	if pending() {
		t.Error("a completion before Arm is an event")
	}
	write()
	write()
	if !pending() {
		t.Error("a completion after Arm is no event")
	}
	if pending() {
		t.Error("a second completion after one Arm is an event of its own")
	}
	a.cq.Wake()
	if !pending() {
		t.Error("a Wake before Wait is lost")
	}
	done := returns(time.Now().Add(time.Hour))
	write() // not armed
	check(t, a.cq.Arm())
	write()
	<-done
	<-returns(time.Now().Add(time.Millisecond))
	<-returns(time.Now().Add(-time.Hour))
	if got, err := a.cq.Poll(); err != nil || len(got) != 5 {
		t.Errorf("%d completions, %v, want 5", len(got), err)
	}
}

// TestPollMost polls more than one Poll returns.
func TestPollMost(t *testing.T) {
	_, a, b := pairOf(t, verbstest.Config{Instant: true}, 100)
	for id := range uint64(100) {
		a.add(device.Write, id, b, 0, 0, 0)
	}
	a.mustPost()
	for _, want := range []int{device.MaxPoll, 100 - device.MaxPoll, 0} {
		if got, err := a.cq.Poll(); err != nil || len(got) != want {
			t.Errorf("%d completions, %v, want %d", len(got), err, want)
		}
	}
}

func TestEvents(t *testing.T) {
	f := verbstest.New(verbstest.Config{})
	var devices []device.Device
	for range 2 {
		d, err := f.Open("simulated0")
		if err != nil {
			t.Fatal(err)
		}
		devices = append(devices, d)
	}
	f.SetPort("simulated0", 1, false)
	if p, err := devices[0].Port(1); err != nil || p.Active || p.State != "DOWN" {
		t.Errorf("port %+v, %v", p, err)
	}
	f.SetPort("simulated0", 1, true)
	f.SetGIDs("simulated0", 1, nil)
	f.Fatal("simulated0")
	for _, d := range devices {
		for _, want := range []device.Event{
			{Kind: device.PortDown, Port: 1}, {Kind: device.PortUp, Port: 1}, {Kind: device.GIDChange, Port: 1},
			{Kind: device.DeviceFatal},
		} {
			want.Text = "simulated " + want.Kind.String()
			if got, err := d.NextEvent(); err != nil || got != want {
				t.Errorf("event %+v, %v, want %+v", got, err, want)
			}
		}
		ended := make(chan error)
		go func() {
			_, err := d.NextEvent()
			ended <- err
		}()
		check(t, d.Close())
		if err := <-ended; !errors.Is(err, os.ErrClosed) {
			t.Errorf("NextEvent at Close: %v", err)
		}
	}
}

// TestNothingLandsAfterClose closes the target's queue pair, or the region, in the midst of writes, and then uses its
// memory: the race detector, or the bytes, would tell of one that comes later.
func TestNothingLandsAfterClose(t *testing.T) {
	for round := range 30 {
		_, a, b := pair(t, 64)
		for i := range a.memory {
			a.memory[i] = 1
		}
		for id := range uint64(64) {
			a.add(device.Write, id, b, 0, 0, len(b.memory))
		}
		a.mustPost()
		if round%2 == 0 {
			check(t, b.qp.Close())
			b.qp = nil
		} else {
			check(t, b.mr.Close())
			b.mr = nil
		}
		clear(b.memory)
		time.Sleep(time.Duration(round) * 20 * time.Microsecond)
		if bytes.IndexByte(b.memory, 1) >= 0 {
			t.Fatal("bytes landed after Close")
		}
		a.collect(1)
	}
}

// TestQuietAfterClose closes the initiator's queue pair in the midst of reads: its memory is quiet, and no completion
// of it is left.
func TestQuietAfterClose(t *testing.T) {
	for range 30 {
		_, a, b := pair(t, 64)
		for i := range b.memory {
			b.memory[i] = 1
		}
		for id := range uint64(64) {
			a.add(device.Read, id, b, 0, 0, len(b.memory))
		}
		a.mustPost()
		a.collect(1)
		check(t, a.qp.Fail())
		check(t, a.qp.Close())
		a.qp = nil
		clear(a.memory)
		if got, err := a.cq.Poll(); err != nil || len(got) != 0 {
			t.Fatalf("completions after Close: %v, %v", got, err)
		}
		if bytes.IndexByte(a.memory, 1) >= 0 {
			t.Fatal("bytes landed after Close")
		}
	}
}

// TestManyQueuePairs posts random chains on several queue pairs at once, each with memory of its own, and compares
// bytes, order and counts.
func TestManyQueuePairs(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		instant := rapid.Bool().Draw(rt, "instant")
		f := verbstest.New(verbstest.Config{Devices: make([]verbstest.DeviceConfig, 2), Instant: instant})
		var wg sync.WaitGroup
		for lane := range rapid.IntRange(1, 4).Draw(rt, "lanes") {
			a, b := newEnd(t, f, "simulated0", 16), newEnd(t, f, "simulated1", 16)
			connect(a, b)
			fill(a.memory, uint64(2*lane))
			fill(b.memory, uint64(2*lane+1))
			nearWant, farWant := bytes.Clone(a.memory), bytes.Clone(b.memory)
			chains := rapid.SliceOfN(rapid.IntRange(1, 8), 1, 6).Draw(rt, "chains")
			type request struct{ op, local, remote, n, signaled int }
			var requests []request
			for _, n := range chains {
				for i := range n {
					r := request{
						op:    rapid.IntRange(0, 1).Draw(rt, "op"),
						local: rapid.IntRange(0, 1<<15).Draw(rt, "local"), remote: rapid.IntRange(0, 1<<15).Draw(rt, "remote"),
						n: rapid.IntRange(0, 1<<15).Draw(rt, "bytes"),
					}
					if i == n-1 {
						r.signaled = 1
					}
					requests = append(requests, r)
					if r.op == int(device.Write) {
						copy(farWant[r.remote:][:r.n], nearWant[r.local:])
					} else {
						copy(nearWant[r.local:][:r.n], farWant[r.remote:])
					}
				}
			}
			wg.Go(func() {
				id := uint64(0)
				for _, n := range chains {
					for range n {
						r := requests[id]
						a.add(device.Op(r.op), id, b, r.local, r.remote, r.n).Signaled = r.signaled != 0
						id++
					}
					if taken, err := a.post(); taken != n || err != nil {
						t.Errorf("%d of %d taken, %v", taken, n, err)
					}
					a.statuses(id-1, device.Success)
				}
				if !bytes.Equal(a.memory, nearWant) || !bytes.Equal(b.memory, farWant) {
					t.Error("bytes differ")
				}
			})
		}
		wg.Wait()
	})
}

// TestMisuse is what C code would not survive.
func TestMisuse(t *testing.T) {
	f, a, b := pair(t, 8)
	panics := make(chan any)
	for range 2 {
		go func() {
			defer func() { panics <- recover() }()
			check(t, a.cq.Wait(time.Time{}))
		}()
	}
	if <-panics == nil {
		t.Error("two goroutines wait, and none panics")
	}
	a.cq.Wake()
	if p := <-panics; p != nil {
		t.Errorf("the only one to wait panics: %v", p)
	}
	wantPanic(t, "a device that is not there", func() { f.Pause("simulated7") })
	a.add(device.Write, 1, b, 0, 0, 8)
	a.chain.Close()
	wantPanic(t, "a chain that is closed", func() { a.add(device.Write, 1, b, 0, 0, 8); _ = a.chain.SGEs[1] })
}

func TestInstantDoesNotAllocate(t *testing.T) {
	_, a, b := pairOf(t, verbstest.Config{Instant: true, NoBytes: true}, 64)
	once := func() {
		for id := range uint64(64) {
			a.add(device.Write, id, b, 0, 0, 64).Signaled = id == 63
		}
		a.mustPost()
		if got, err := a.cq.Poll(); err != nil || len(got) != 1 {
			t.Fatalf("%d completions, %v", len(got), err)
		}
	}
	once()
	if n := testing.AllocsPerRun(100, once); n != 0 {
		t.Errorf("%v allocations for a chain", n)
	}
}

func TestNoBytes(t *testing.T) {
	f, a, b := pairOf(t, verbstest.Config{NoBytes: true}, 8)
	fill(a.memory[:64], 1)
	a.add(device.Write, 1, b, 0, 0, 64)
	a.mustPost()
	a.statuses(1, device.Success)
	if !bytes.Equal(b.memory[:64], make([]byte, 64)) {
		t.Error("bytes moved")
	}
	if n := f.Counts().Bytes; n != 64 {
		t.Errorf("%d bytes counted", n)
	}
	f.SetNoBytes(false)
	a.add(device.Write, 2, b, 0, 0, 64)
	a.mustPost()
	a.statuses(2, device.Success)
	if !bytes.Equal(b.memory[:64], a.memory[:64]) {
		t.Error("no bytes moved")
	}
}
