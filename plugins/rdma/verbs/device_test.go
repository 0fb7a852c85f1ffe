package verbs

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugins/rdma/device"
)

// The tests of this file need a device. They connect two of its queue pairs to each other.

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

// names returns the devices, or skips the test when there are none.
func names(tb testing.TB) []string {
	tb.Helper()
	all, err := Library().Devices()
	switch {
	case err == nil && len(all) > 0:
		return all
	case required("rdma"):
		tb.Fatalf("no RDMA device: %q, %v", all, err)
	default:
		tb.Skipf("no RDMA device: %v (tests for one run in the lab: make test-rdma)", err)
	}
	return nil
}

// open opens the first device, and closes it after the test.
func open(tb testing.TB) (device.Library, device.Device) {
	tb.Helper()
	name := names(tb)[0]
	l := Library()
	d, err := l.Open(name)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { closeAll(tb, d) })
	return l, d
}

func closeAll[T interface{ Close() error }](tb testing.TB, all ...T) {
	tb.Helper()
	for _, c := range all {
		if err := c.Close(); err != nil {
			tb.Errorf("close %T: %v", c, err)
		}
	}
}

// mapped returns memory that is not the Go heap's.
func mapped(tb testing.TB, size int) []byte {
	tb.Helper()
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Munmap(mem) })
	return mem
}

// memory is registered memory.
type memory struct {
	device.MR
	bytes []byte
}

func register(tb testing.TB, d device.Device, size int, access device.Access) *memory {
	tb.Helper()
	mem := mapped(tb, size)
	mr, err := d.Register(mem, access)
	if err != nil {
		tb.Fatal(err)
	}
	m := &memory{mr, mem}
	tb.Cleanup(func() {
		if m.MR != nil {
			closeAll(tb, m.MR)
		}
	})
	return m
}

func (m *memory) sge(offset, length int) device.SGE {
	return device.SGE{Addr: address(m.bytes) + uint64(offset), Length: uint32(length), LKey: m.LKey()}
}

// add appends a work request to a chain.
func add(c *device.Chain, wr device.WR, sges ...device.SGE) {
	wr.FirstSGE, wr.SGEs = uint32(len(c.SGEs)), uint16(len(sges))
	c.WRs = append(c.WRs, wr)
	c.SGEs = append(c.SGEs, sges...)
}

// end is one of two queue pairs that are connected to each other.
type end struct {
	device.QP
	cq device.CQ
}

func newEnd(tb testing.TB, d device.Device, wrs, sges, entries int) *end {
	tb.Helper()
	cq, err := d.CreateCQ(entries)
	if err != nil {
		tb.Fatal(err)
	}
	qp, err := d.CreateQP(device.QPConfig{CQ: cq, SendWRs: wrs, SGEs: sges})
	if err != nil {
		tb.Fatal(err)
	}
	e := &end{qp, cq}
	tb.Cleanup(func() {
		if e.QP != nil {
			closeAll(tb, e.QP)
		}
		if e.cq != nil {
			closeAll(tb, e.cq)
		}
	})
	return e
}

func worth(g device.GID) (n int) {
	if g.Type == device.GIDRoCEv2 {
		n += 2
	}
	if net.IP(g.Addr[:]).To4() != nil {
		n++
	}
	return n
}

// port returns an active port of the device, and a GID of it, of RoCEv2 and IPv4 where it has one.
func port(tb testing.TB, d device.Device) (device.Port, device.GID) {
	tb.Helper()
	for n := 1; n <= d.Attr().Ports; n++ {
		p, err := d.Port(n)
		if err != nil {
			tb.Fatal(err)
		}
		gids, err := d.GIDs(n)
		if err != nil {
			tb.Fatal(err)
		}
		if !p.Active || len(gids) == 0 {
			continue
		}
		// An IPv4 address can be used as soon as it is there; one of IPv6 is first looked for on the network.
		slices.SortStableFunc(gids, func(a, b device.GID) int { return cmp.Compare(worth(b), worth(a)) })
		return p, gids[0]
	}
	tb.Fatal("no active port with a GID")
	return device.Port{}, device.GID{}
}

// connect makes e ready to send to the queue pair qpn of the same device. An acknowledgement that does not come is
// waited for a long time, and by soft-RoCE for ever.
func (e *end) connect(tb testing.TB, d device.Device, qpn uint32) {
	tb.Helper()
	p, gid := port(tb, d)
	err := e.Init(p.Number, device.LocalWrite|device.RemoteWrite|device.RemoteRead)
	if err == nil {
		err = e.ReadyToReceive(device.ReceiveAttr{
			Port: p.Number, GIDIndex: gid.Index, Link: p.Link,
			RemoteGID: gid.Addr, RemoteLID: p.LID, RemoteQPN: qpn, RemotePSN: 0x123456,
			MTU: p.MTU, ReadsServed: min(16, d.Attr().MaxReadsServed), MinRNRTimer: 12, HopLimit: 64,
		})
	}
	if err == nil {
		err = e.ReadyToSend(device.SendAttr{
			PSN: 0x123456, Timeout: 18, Retries: 7, RNRRetries: 6, ReadsInitiated: min(16, d.Attr().MaxReadsInitiated),
		})
	}
	if err != nil {
		tb.Fatal(err)
	}
}

// pair returns two queue pairs that are connected to each other.
func pair(tb testing.TB, d device.Device, wrs, sges int) (a, b *end) {
	tb.Helper()
	a, b = newEnd(tb, d, wrs, sges, wrs+1), newEnd(tb, d, 1, 1, 2)
	a.connect(tb, d, b.Num())
	b.connect(tb, d, a.Num())
	return a, b
}

func (e *end) post(tb testing.TB, c *device.Chain) {
	tb.Helper()
	if n, err := e.Post(c); n != len(c.WRs) || err != nil {
		tb.Fatalf("posted %d of %d work requests: %v", n, len(c.WRs), err)
	}
}

// each calls f for the next n completions. It waits as the backend does: poll, arm, poll once more, wait.
func each(tb testing.TB, cq device.CQ, n int, f func(device.Completion)) {
	tb.Helper()
	deadline := time.Now().Add(patience)
	for armed, seen := false, 0; ; {
		got, err := cq.Poll()
		if err != nil {
			tb.Fatal(err)
		}
		for _, w := range got {
			f(w)
		}
		seen += len(got)
		switch {
		case seen > n:
			tb.Fatalf("%d completions, want %d", seen, n)
		case seen == n:
			return
		case time.Now().After(deadline):
			tb.Fatalf("%d completions within %v, want %d", seen, patience, n)
		case len(got) > 0:
		case !armed:
			err, armed = cq.Arm(), true
		default:
			err, armed = cq.Wait(deadline), false
		}
		if err != nil {
			tb.Fatal(err)
		}
	}
}

// await returns the next n completions.
func (e *end) await(tb testing.TB, n int) (all []device.Completion) {
	tb.Helper()
	each(tb, e.cq, n, func(w device.Completion) { all = append(all, w) })
	return all
}

func chain(tb testing.TB, l device.Library, wrs, sges int) *device.Chain {
	c := l.NewChain(wrs, sges)
	tb.Cleanup(c.Close)
	return c
}

func fill(b []byte, seed uint64) {
	r := rand.NewChaCha8([32]byte{byte(seed), 1})
	r.Read(b)
}

func TestAttributes(t *testing.T) {
	l, d := open(t)
	a := d.Attr()
	t.Logf("%s: %+v", l.Name(), a)
	if a.Name != names(t)[0] || a.Ports < 1 || a.MaxQP < 1 || a.MaxCQ < 1 || a.MaxMR < 1 || a.MaxCQE < 1 ||
		a.MaxMRSize == 0 || a.MaxWR < 1 || a.MaxSGE < 1 || a.MaxSGERead < 1 || a.MaxReadsServed < 1 || a.MaxReadsInitiated < 1 {
		t.Errorf("attributes: %+v", a)
	}
	p, gid := port(t, d)
	t.Logf("%+v; %s %+v; fork %d", p, hex.EncodeToString(gid.Addr[:]), gid, l.Fork())
	if p.Number < 1 || p.State != "ACTIVE" || p.MTU < 256 || p.MaxMessage == 0 || p.GIDs < 1 {
		t.Errorf("port: %+v", p)
	}
	gids, err := d.GIDs(p.Number)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range gids {
		if g.Index < 0 || g.Index >= p.GIDs || g.Addr == [16]byte{} {
			t.Errorf("GID: %+v", g)
		}
		if p.Link != device.Ethernet {
			continue
		}
		if _, err := net.InterfaceByName(g.Interface); err != nil {
			t.Errorf("GID %d belongs to the interface %q: %v", g.Index, g.Interface, err)
		}
	}
	for _, n := range []int{-1, 0, a.Ports + 1, 257} {
		if _, err := d.Port(n); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("Port(%d): %v, want EINVAL", n, err)
		}
	}
	if _, err := l.Open("none"); !errors.Is(err, syscall.ENODEV) {
		t.Errorf("Open of a device that is not there: %v, want ENODEV", err)
	}
}

// TestBytes writes and reads back, in sizes about the edges of packets.
func TestBytes(t *testing.T) {
	l, d := open(t)
	const size = 1 << 20
	local, remote := register(t, d, size, device.LocalWrite), register(t, d, size, device.LocalWrite|device.RemoteWrite|device.RemoteRead)
	a, _ := pair(t, d, 16, 1)
	c := chain(t, l, 1, 1)
	for i, length := range []int{0, 1, 7, 4095, 4096, 4097, 65536, size - 64} {
		fill(local.bytes, uint64(i))
		want := slices.Clone(local.bytes[3 : 3+length])
		clear(remote.bytes)
		for _, op := range []device.Op{device.Write, device.Read} {
			c.WRs, c.SGEs = c.WRs[:0], c.SGEs[:0]
			wr := device.WR{ID: uint64(i)<<32 | uint64(op), Op: op, Signaled: true, Remote: address(remote.bytes) + 5, RKey: remote.RKey()}
			if length > 0 {
				add(c, wr, local.sge(3, length))
			} else {
				add(c, wr)
			}
			a.post(t, c)
			if got, want := a.await(t, 1)[0], (device.Completion{ID: wr.ID, QPN: a.Num()}); got != want {
				t.Fatalf("%d bytes: %+v, want %+v", length, got, want)
			}
			if op == device.Write {
				if !bytes.Equal(remote.bytes[5:5+length], want) || remote.bytes[4] != 0 || remote.bytes[5+length] != 0 {
					t.Fatalf("%d bytes were not written as they are", length)
				}
				clear(local.bytes)
			} else if !bytes.Equal(local.bytes[3:3+length], want) || local.bytes[2] != 0 || local.bytes[3+length] != 0 {
				t.Fatalf("%d bytes were not read as they are", length)
			}
		}
	}
}

// TestLongChain posts work requests of several SGEs each, few of them signaled, with one call.
func TestLongChain(t *testing.T) {
	l, d := open(t)
	const wrs, sges, every, piece = 100, 4, 8, 97
	local := register(t, d, wrs*sges*128, device.LocalWrite)
	remote := register(t, d, wrs*sges*128, device.LocalWrite|device.RemoteWrite|device.RemoteRead)
	a, _ := pair(t, d, wrs, sges)
	fill(local.bytes, 1)
	want := slices.Clone(local.bytes)
	c := chain(t, l, wrs, wrs*sges)
	for _, op := range []device.Op{device.Write, device.Read} {
		c.WRs, c.SGEs = c.WRs[:0], c.SGEs[:0]
		var signaled []device.Completion
		for i := range wrs {
			wr := device.WR{
				ID: uint64(i) + 1<<63, Op: op, Signaled: i%every == every-1 || i == wrs-1,
				Remote: address(remote.bytes) + uint64(i*sges*128), RKey: remote.RKey(),
			}
			if wr.Signaled {
				signaled = append(signaled, device.Completion{ID: wr.ID, QPN: a.Num()})
			}
			var list []device.SGE
			for j := range sges {
				list = append(list, local.sge((i*sges+j)*128, piece+j))
			}
			add(c, wr, list...)
		}
		calls := l.Calls()
		a.post(t, c)
		if n := l.Calls() - calls; n != 1 {
			t.Errorf("a post of %d work requests took %d calls", wrs, n)
		}
		if got := a.await(t, len(signaled)); !slices.Equal(got, signaled) {
			t.Fatalf("completions: %v, want %v", got, signaled)
		}
		for i := range wrs {
			at := i * sges * 128
			for j := range sges {
				from := (i*sges + j) * 128
				if !bytes.Equal(remote.bytes[at:at+piece+j], want[from:from+piece+j]) ||
					!bytes.Equal(local.bytes[from:from+piece+j], want[from:from+piece+j]) {
					t.Fatalf("operation %d: SGE %d of work request %d is wrong", op, j, i)
				}
				at += piece + j
			}
		}
		clear(local.bytes)
	}
}

// TestManyReads posts more reads than may be outstanding at once.
func TestManyReads(t *testing.T) {
	l, d := open(t)
	const n = 300
	local := register(t, d, n*64, device.LocalWrite)
	remote := register(t, d, n*64, device.LocalWrite|device.RemoteRead)
	fill(remote.bytes, 2)
	a, _ := pair(t, d, n, 1)
	c := chain(t, l, n, n)
	for i := range n {
		add(c, device.WR{ID: uint64(i), Op: device.Read, Signaled: i == n-1, Remote: address(remote.bytes) + uint64(i*64), RKey: remote.RKey()}, local.sge(i*64, 64))
	}
	a.post(t, c)
	a.await(t, 1)
	if !bytes.Equal(local.bytes, remote.bytes) {
		t.Error("reads brought other bytes")
	}
}

// TestPollMany polls more completions than one poll returns.
func TestPollMany(t *testing.T) {
	l, d := open(t)
	const n = device.MaxPoll + 20
	a, _ := pair(t, d, n, 1)
	remote := register(t, d, 4096, device.LocalWrite|device.RemoteWrite)
	c := chain(t, l, n, 0)
	for i := range n {
		add(c, device.WR{ID: uint64(i), Signaled: true, Remote: address(remote.bytes), RKey: remote.RKey()})
	}
	a.post(t, c)
	time.Sleep(200 * time.Millisecond) // for all of them to be there
	var counts []int
	var next uint64
	for start := time.Now(); next < n; {
		got, err := a.cq.Poll()
		if err != nil || time.Since(start) > patience {
			t.Fatalf("%d completions: %v", next, err)
		}
		if len(got) > 0 {
			counts = append(counts, len(got))
		}
		for _, w := range got {
			if w.ID != next || w.Status != device.Success {
				t.Fatalf("completion %+v, want of work request %d", w, next)
			}
			next++
		}
	}
	t.Logf("polls: %v", counts)
	if slices.Max(counts) > device.MaxPoll || len(counts) < 2 {
		t.Errorf("polls returned %v completions", counts)
	}
}

// TestFlush fails a queue pair whose work requests nobody answers.
func TestFlush(t *testing.T) {
	l, d := open(t)
	a := newEnd(t, d, 64, 1, 65)
	dead := newEnd(t, d, 1, 1, 2) // never ready to receive
	a.connect(t, d, dead.Num())
	m := register(t, d, 4096, device.LocalWrite|device.RemoteWrite)
	c := chain(t, l, 10, 10)
	for i := range 10 {
		add(c, device.WR{ID: uint64(i), Remote: address(m.bytes), RKey: m.RKey()}, m.sge(0, 16))
	}
	a.post(t, c)
	if err := a.Fail(); err != nil {
		t.Fatal(err)
	}
	for i, w := range a.await(t, 10) {
		if w.ID != uint64(i) || w.QPN != a.Num() || w.Status != device.Flushed {
			t.Errorf("completion %d: %+v, want it flushed", i, w)
		}
	}
	// What is posted afterwards is refused, or flushed.
	n, err := a.Post(c)
	t.Logf("posted to a failed queue pair: %d, %v", n, err)
	a.await(t, n)
}

// What a device says to a key that is not good. Soft-RoCE has its own word for a local one.
var (
	remoteError = []device.Status{device.RemoteAccess}
	localError  = []device.Status{device.LocalProtection, device.LocalQPOperation}
)

// TestBadKey breaks one work request in a chain.
func TestBadKey(t *testing.T) {
	const n, k = 20, 7
	for name, spoil := range map[string]func(wr *device.WR, sge *device.SGE) []device.Status{
		"rkey":   func(wr *device.WR, _ *device.SGE) []device.Status { wr.RKey ^= 0x5a00; return remoteError },
		"range":  func(wr *device.WR, _ *device.SGE) []device.Status { wr.Remote += 1 << 20; return remoteError },
		"rights": func(wr *device.WR, _ *device.SGE) []device.Status { wr.Op = device.Read; return remoteError },
		"lkey":   func(_ *device.WR, sge *device.SGE) []device.Status { sge.LKey ^= 0x5a00; return localError },
	} {
		t.Run(name, func(t *testing.T) {
			l, d := open(t)
			local := register(t, d, 4096, device.LocalWrite)
			remote := register(t, d, 4096, device.LocalWrite|device.RemoteWrite)
			a, _ := pair(t, d, n, 1)
			fill(local.bytes, 3)
			c := chain(t, l, n, n)
			for i := range n {
				add(c, device.WR{ID: uint64(i), Remote: address(remote.bytes) + uint64(i*16), RKey: remote.RKey()}, local.sge(i*16, 16))
			}
			statuses := spoil(&c.WRs[k], &c.SGEs[k])
			// A device may see a bad lkey before it executes what comes first, so let that be through.
			rest := chain(t, l, n, n)
			rest.WRs, rest.SGEs = append(rest.WRs, c.WRs[k:]...), append(rest.SGEs, c.SGEs...)
			c.WRs = c.WRs[:k]
			c.WRs[k-1].Signaled = true
			a.post(t, c)
			if w := a.await(t, 1)[0]; w.ID != k-1 || w.Status != device.Success {
				t.Fatalf("completion: %+v", w)
			}
			if taken, err := a.Post(rest); taken != n-k {
				t.Fatalf("posted %d of %d: %v", taken, n-k, err)
			}
			for i, w := range a.await(t, n-k) {
				want := device.Completion{ID: uint64(k + i), QPN: a.Num(), Status: device.Flushed, Vendor: w.Vendor}
				if i == 0 && slices.Contains(statuses, w.Status) {
					want.Status = w.Status
				}
				if w != want {
					t.Errorf("completion %d: %+v, want %+v", i, w, want)
				}
			}
			if !bytes.Equal(remote.bytes[:k*16], local.bytes[:k*16]) {
				t.Error("what was posted before the bad work request is not there")
			}
			if !bytes.Equal(remote.bytes[k*16:n*16], make([]byte, (n-k)*16)) {
				t.Error("something was written after the bad work request")
			}
		})
	}
}

// TestFull posts more than the send queue takes.
func TestFull(t *testing.T) {
	l, d := open(t)
	a := newEnd(t, d, 16, 1, 1024)
	dead := newEnd(t, d, 1, 1, 2)
	a.connect(t, d, dead.Num())
	room := a.Caps().SendWRs
	t.Logf("granted %+v", a.Caps())
	if room < 16 || a.Caps().SGEs < 1 {
		t.Fatalf("granted %+v, asked for 16 and 1", a.Caps())
	}
	m := register(t, d, 4096, device.LocalWrite|device.RemoteWrite)
	// A queue may have room for more than was granted. Chains of this length do not fill it exactly.
	const n = 13
	c := chain(t, l, n, 0)
	posted := 0
	for {
		c.WRs = c.WRs[:0]
		for i := range n {
			add(c, device.WR{ID: uint64(posted + i), Remote: address(m.bytes), RKey: m.RKey()})
		}
		taken, err := a.Post(c)
		posted += taken
		if err == nil && taken == n && posted < 1000 {
			continue
		}
		if !errors.Is(err, syscall.ENOMEM) || taken >= n || posted < room {
			t.Fatalf("posted %d of %d, %d in all, with room for %d: %v, want ENOMEM", taken, n, posted, room, err)
		}
		t.Logf("the last chain was taken to %d of %d, %d in all", taken, n, posted)
		break
	}
	if taken, err := a.Post(c); taken != 0 || !errors.Is(err, syscall.ENOMEM) {
		t.Errorf("posted %d to a full queue: %v, want ENOMEM", taken, err)
	}
	if err := a.Fail(); err != nil {
		t.Fatal(err)
	}
	for i, w := range a.await(t, posted) {
		if w.ID != uint64(i) || w.Status != device.Flushed {
			t.Errorf("completion %d: %+v", i, w)
		}
	}
}

// TestLongerThanQueue posts a chain that no send queue of this length could take.
func TestLongerThanQueue(t *testing.T) {
	l, d := open(t)
	a, _ := pair(t, d, 16, 1)
	room := a.Caps().SendWRs
	m := register(t, d, 4096, device.LocalWrite|device.RemoteWrite)
	c := chain(t, l, room+1, 0)
	for i := range room + 1 {
		add(c, device.WR{ID: uint64(i), Signaled: i >= room-1, Remote: address(m.bytes), RKey: m.RKey()})
	}
	if n, err := a.Post(c); n != room || !errors.Is(err, syscall.ENOMEM) {
		t.Fatalf("posted %d, %v; want %d, ENOMEM", n, err, room)
	}
	if w := a.await(t, 1)[0]; w.ID != uint64(room-1) || w.Status != device.Success {
		t.Errorf("completion %+v", w)
	}
}

// TestMalformed posts chains that name SGEs they do not have. Nothing of them is posted.
func TestMalformed(t *testing.T) {
	l, d := open(t)
	a, _ := pair(t, d, 16, 4)
	m := register(t, d, 4096, device.LocalWrite|device.RemoteWrite)
	for _, wr := range []device.WR{
		{FirstSGE: 2, SGEs: 1}, {FirstSGE: 0, SGEs: 3}, {FirstSGE: 1<<32 - 1, SGEs: 2}, {FirstSGE: 3}, {Op: 2},
	} {
		c := chain(t, l, 2, 2)
		add(c, device.WR{Signaled: true, Remote: address(m.bytes), RKey: m.RKey()}, m.sge(0, 1), m.sge(1, 1))
		c.WRs = append(c.WRs, wr)
		if n, err := a.Post(c); n != 0 || !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%+v: posted %d, %v; want EINVAL", wr, n, err)
		}
	}
	c := chain(t, l, 1, 1)
	if n, err := a.Post(c); n != 0 || err != nil {
		t.Errorf("an empty chain: posted %d, %v", n, err)
	}
	add(c, device.WR{ID: 9, Signaled: true, Remote: address(m.bytes), RKey: m.RKey()}, m.sge(0, 1))
	a.post(t, c)
	if w := a.await(t, 1)[0]; w.ID != 9 || w.Status != device.Success {
		t.Errorf("completion %+v, want of 9", w)
	}
}

// TestWait wants each way for a Wait to return.
func TestWait(t *testing.T) {
	l, d := open(t)
	a, _ := pair(t, d, 16, 1)
	m := register(t, d, 4096, device.LocalWrite|device.RemoteWrite)
	c := chain(t, l, 1, 1)
	add(c, device.WR{ID: 1, Signaled: true, Remote: address(m.bytes), RKey: m.RKey()}, m.sge(0, 1))

	start := time.Now()
	if err := a.cq.Wait(start.Add(20 * time.Millisecond)); err != nil || time.Since(start) < 20*time.Millisecond {
		t.Errorf("Wait for 20ms: %v after %v", err, time.Since(start))
	}
	if err := a.cq.Wait(start); err != nil {
		t.Errorf("Wait with a deadline that has passed: %v", err)
	}
	a.cq.Wake()
	if err := a.cq.Wait(time.Time{}); err != nil {
		t.Errorf("Wait after Wake: %v", err)
	}
	for range 200 {
		woken := make(chan error)
		go func() { woken <- a.cq.Wait(time.Time{}) }()
		a.cq.Wake()
		if err := <-woken; err != nil {
			t.Fatal(err)
		}
	}
	a.cq.Wait(time.Unix(1, 0)) // takes what may be left of the last Wake
	for range 20 {
		if err := a.cq.Arm(); err != nil {
			t.Fatal(err)
		}
		a.post(t, c)
		if err := a.cq.Wait(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		a.await(t, 1)
	}
	closing := make(chan error)
	go func() { closing <- a.cq.Wait(time.Time{}) }()
	time.Sleep(5 * time.Millisecond)
	closeAll(t, a.QP)
	closeAll(t, a.cq)
	if err := <-closing; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait while the queue is closed: %v", err)
	}
	a.QP, a.cq = nil, nil
}

// TestDeregistered uses memory regions that are closed, at both ends.
func TestDeregistered(t *testing.T) {
	for name, remote := range map[string]bool{"remote": true, "local": false} {
		t.Run(name, func(t *testing.T) {
			l, d := open(t)
			a, _ := pair(t, d, 16, 1)
			here, there := register(t, d, 4096, device.LocalWrite), register(t, d, 4096, device.LocalWrite|device.RemoteWrite)
			c := chain(t, l, 1, 1)
			add(c, device.WR{ID: 1, Signaled: true, Remote: address(there.bytes), RKey: there.RKey()}, here.sge(0, 64))
			a.post(t, c)
			if w := a.await(t, 1)[0]; w.Status != device.Success {
				t.Fatalf("%+v", w)
			}
			want, m := localError, here
			if remote {
				want, m = remoteError, there
			}
			closeAll(t, m.MR)
			if err := m.Close(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("closed twice: %v", err)
			}
			m.MR = nil
			if taken, err := a.Post(c); taken != 1 {
				t.Fatal(err)
			}
			if w := a.await(t, 1)[0]; !slices.Contains(want, w.Status) {
				t.Errorf("%v, want %v", w.Status, want)
			}
		})
	}
}

func TestRegister(t *testing.T) {
	_, d := open(t)
	if _, err := d.Register(nil, device.LocalWrite); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("register nothing: %v, want EINVAL", err)
	}
	mem := mapped(t, 8192)
	if err := unix.Mprotect(mem, unix.PROT_READ); err != nil {
		t.Fatal(err)
	}
	_, err := d.Register(mem, device.LocalWrite)
	if e := (*device.Error)(nil); !errors.As(err, &e) || e.Errno == 0 || e.Device != d.Attr().Name || e.Op == "" {
		t.Errorf("register memory that cannot be written, to be written: %v", err)
	}
}

// TestClosed uses everything after it is closed, and closes it too early.
func TestClosed(t *testing.T) { testClosed(t, Library(), names(t)[0]) }

func testClosed(t *testing.T, l device.Library, name string) {
	d, err := l.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	mem := mapped(t, 4096)
	mr, err := d.Register(mem, device.LocalWrite)
	if err != nil {
		t.Fatal(err)
	}
	cq, err := d.CreateCQ(16)
	if err != nil {
		t.Fatal(err)
	}
	if cq.Entries() < 16 {
		t.Errorf("%d entries, asked for 16", cq.Entries())
	}
	qp, err := d.CreateQP(device.QPConfig{CQ: cq, SendWRs: 8, SGEs: 1})
	if err != nil {
		t.Fatal(err)
	}
	busy := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, syscall.EBUSY) {
			t.Errorf("%s: %v, want EBUSY", what, err)
		}
	}
	gone := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: %v, want os.ErrClosed", what, err)
		}
	}
	busy("close a device with objects", d.Close())
	busy("close a completion queue with a queue pair", cq.Close())
	if _, err := cq.Poll(); err != nil {
		t.Errorf("poll after a close that was refused: %v", err)
	}

	closeAll(t, qp)
	c := chain(t, l, 1, 0)
	add(c, device.WR{})
	_, err = qp.Post(c)
	gone("post", err)
	gone("init", qp.Init(1, device.LocalWrite))
	gone("ready to receive", qp.ReadyToReceive(device.ReceiveAttr{MTU: 1024}))
	gone("ready to send", qp.ReadyToSend(device.SendAttr{}))
	gone("fail", qp.Fail())
	gone("close", qp.Close())

	closeAll(t, cq)
	_, err = cq.Poll()
	gone("poll", err)
	gone("arm", cq.Arm())
	gone("wait", cq.Wait(time.Time{}))
	cq.Wake()
	gone("wait", cq.Wait(time.Now()))
	gone("close", cq.Close())
	_, err = d.CreateQP(device.QPConfig{CQ: cq, SendWRs: 8, SGEs: 1})
	gone("create a queue pair", err)

	busy("close a device with a memory region", d.Close())
	closeAll(t, mr)
	if mr.LKey() == 0 && mr.RKey() == 0 {
		t.Error("a memory region without keys")
	}

	event := make(chan error)
	go func() {
		for {
			if _, err := d.NextEvent(); err != nil {
				event <- err
				return
			}
		}
	}()
	time.Sleep(5 * time.Millisecond)
	closeAll(t, d)
	gone("next event", <-event)
	_, err = d.NextEvent()
	gone("next event", err)
	_, err = d.Port(1)
	gone("port", err)
	_, err = d.GIDs(1)
	gone("GIDs", err)
	_, err = d.Register(mem, device.LocalWrite)
	gone("register", err)
	_, err = d.CreateCQ(1)
	gone("create a completion queue", err)
	gone("close", d.Close())
}

// TestConfig asks for queue pairs and completion queues that cannot be.
func TestConfig(t *testing.T) {
	_, d := open(t)
	_, other := open(t)
	cq, err := d.CreateCQ(1)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(t, cq)
	for _, n := range []int{-1, 0, 1 << 40, d.Attr().MaxCQE + 1} {
		if _, err := d.CreateCQ(n); err == nil {
			t.Errorf("CreateCQ(%d) succeeded", n)
		}
	}
	for _, cfg := range []device.QPConfig{
		{CQ: nil, SendWRs: 1, SGEs: 1}, {CQ: cq, SendWRs: 0, SGEs: 1}, {CQ: cq, SendWRs: 1, SGEs: 0}, {CQ: cq, SendWRs: -1, SGEs: 1},
		{CQ: cq, SendWRs: d.Attr().MaxWR + 1, SGEs: 1}, {CQ: cq, SendWRs: 1, SGEs: d.Attr().MaxSGE + 1}, {CQ: cq, SendWRs: 1 << 40, SGEs: 1},
	} {
		if _, err := d.CreateQP(cfg); err == nil {
			t.Errorf("CreateQP(%+v) succeeded", cfg)
		}
	}
	if _, err := other.CreateQP(device.QPConfig{CQ: cq, SendWRs: 1, SGEs: 1}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("a queue pair with the completion queue of another device: %v, want EINVAL", err)
	}
	qp, err := d.CreateQP(device.QPConfig{CQ: cq, SendWRs: 1, SGEs: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(t, qp)
	for _, a := range []device.ReceiveAttr{{MTU: 0}, {MTU: 1500}, {MTU: 4096, GIDIndex: -1}, {MTU: 4096, GIDIndex: 256}, {MTU: 4096, ReadsServed: 256}} {
		if err := qp.ReadyToReceive(a); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%+v: %v, want EINVAL", a, err)
		}
	}
	if err := qp.Init(257, 0); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("port 257: %v, want EINVAL", err)
	}
	if err := qp.ReadyToSend(device.SendAttr{Retries: 256 + 7}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("263 retries: %v, want EINVAL", err)
	}
	if err := qp.ReadyToSend(device.SendAttr{Timeout: 14}); err == nil {
		t.Error("a queue pair in Reset was made ready to send")
	}
}

// TestFreed opens and closes everything, and counts what is left.
func TestFreed(t *testing.T) { testFreed(t, Library(), names(t)[0]) }

func testFreed(t *testing.T, l device.Library, name string) {
	round := func() {
		d, err := l.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		mem := mapped(t, 65536)
		mr, err := d.Register(mem, device.LocalWrite|device.RemoteRead)
		if err != nil {
			t.Fatal(err)
		}
		cq, err := d.CreateCQ(64)
		if err != nil {
			t.Fatal(err)
		}
		qp, err := d.CreateQP(device.QPConfig{CQ: cq, SendWRs: 16, SGEs: 4})
		if err != nil {
			t.Fatal(err)
		}
		_, err1 := d.CreateQP(device.QPConfig{CQ: cq, SendWRs: d.Attr().MaxWR + 1, SGEs: 1})
		_, err2 := d.CreateCQ(d.Attr().MaxCQE + 1)
		_, err3 := d.Register(nil, 0)
		_, err4 := l.Open("none")
		if err1 == nil || err2 == nil || err3 == nil || err4 == nil {
			t.Fatal(err1, err2, err3, err4)
		}
		closeAll(t, qp)
		closeAll(t, mr)
		closeAll(t, cq)
		closeAll(t, d)
	}
	round()
	before := descriptors(t)
	for range 20 {
		round()
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d file descriptors, %d before", after, before)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// TestLeftInQueue closes one of two queue pairs whose completions nobody has polled.
func TestLeftInQueue(t *testing.T) {
	l, d := open(t)
	const n = 50
	a := newEnd(t, d, n, 1, 2*n)
	a.connect(t, d, newEnd(t, d, 1, 1, 2).Num())
	qp, err := d.CreateQP(device.QPConfig{CQ: a.cq, SendWRs: n, SGEs: 1})
	if err != nil {
		t.Fatal(err)
	}
	b := &end{QP: qp}
	t.Cleanup(func() {
		if b.QP != nil {
			closeAll(t, b.QP)
		}
	})
	b.connect(t, d, newEnd(t, d, 1, 1, 2).Num())
	c := chain(t, l, n, 0)
	for i := range n {
		add(c, device.WR{ID: uint64(i)})
	}
	for _, e := range []*end{a, b} {
		e.post(t, c)
		if err := e.Fail(); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(50 * time.Millisecond) // for completions to be there; with or without them the rest must hold
	closeAll(t, b.QP)
	b.QP = nil
	for i, w := range a.await(t, n) {
		if w.QPN != a.Num() || w.ID != uint64(i) {
			t.Errorf("completion %d: %+v, want one of the queue pair that is open", i, w)
		}
	}
	if got, err := a.cq.Poll(); len(got) > 0 || err != nil {
		t.Errorf("completions after the last: %v, %v", got, err)
	}
}

// TestOverflow lets a completion queue overflow, and wants to hear of it, and of which.
func TestOverflow(t *testing.T) {
	l, d := open(t)
	if !strings.HasPrefix(d.Attr().Name, "rxe") {
		t.Skip("what a device does when a completion queue overflows is its own")
	}
	a := newEnd(t, d, 64, 1, 1)
	a.connect(t, d, newEnd(t, d, 1, 1, 2).Num())
	c := chain(t, l, 64, 0)
	for range 64 {
		add(c, device.WR{})
	}
	a.post(t, c)
	if err := a.Fail(); err != nil {
		t.Fatal(err)
	}
	if e, err := d.NextEvent(); e.Kind != device.CQFailed || e.CQ != a.cq || err != nil {
		t.Errorf("%+v, %v; want of the completion queue", e, err)
	}
}

// TestLinkEvents takes the link of a device down, and up again. UMBP_TEST_LINK names its network interface; without it
// no link is touched.
func TestLinkEvents(t *testing.T) {
	link := os.Getenv("UMBP_TEST_LINK")
	if link == "" {
		t.Skip("UMBP_TEST_LINK does not name a network interface to take down")
	}
	d, err := Library().Open(names(t)[0])
	if err != nil {
		t.Fatal(err)
	}
	p, _ := port(t, d)
	events := make(chan device.Event)
	ended := make(chan error)
	stop := make(chan struct{})
	go func() {
		for {
			e, err := d.NextEvent()
			if err != nil {
				ended <- err
				return
			}
			select {
			case events <- e:
			case <-stop:
			}
		}
	}()
	for _, c := range []struct {
		set    string
		kind   device.EventKind
		active bool
	}{{"down", device.PortDown, false}, {"up", device.PortUp, true}} {
		if out, err := exec.Command("ip", "link", "set", link, c.set).CombinedOutput(); err != nil {
			t.Fatalf("ip link set %s %s: %v: %s", link, c.set, err, out)
		}
		for timeout := time.After(patience); ; {
			select {
			case e := <-events:
				t.Logf("%s: %s %+v", c.set, e.Kind, e)
				if e.Kind != c.kind {
					continue
				}
				if e.Port != p.Number || e.Text == "" {
					t.Errorf("%+v, want of port %d", e, p.Number)
				}
			case <-timeout:
				t.Fatalf("no %s event", c.kind)
			}
			break
		}
		if now, err := d.Port(p.Number); err != nil || now.Active != c.active {
			t.Errorf("link %s: %+v, %v", c.set, now, err)
		}
	}
	// Two queue pairs can be connected again.
	l, d2 := open(t)
	a, _ := pair(t, d2, 1, 1)
	one := chain(t, l, 1, 0)
	m := register(t, d2, 4096, device.LocalWrite|device.RemoteWrite)
	add(one, device.WR{Signaled: true, Remote: address(m.bytes), RKey: m.RKey()})
	a.post(t, one)
	if w := a.await(t, 1)[0]; w.Status != device.Success {
		t.Errorf("after the link came back: %+v", w)
	}
	close(stop)
	closeAll(t, d)
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("NextEvent after Close: %v", err)
	}
}

// TestConcurrent posts to several queue pairs of one completion queue at once.
func TestConcurrent(t *testing.T) {
	l, d := open(t)
	const qps, rounds, wrs = 4, 20, 8
	cq, err := d.CreateCQ(qps * 64)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeAll(t, cq) })
	remote := register(t, d, qps*4096, device.LocalWrite|device.RemoteWrite)
	local := register(t, d, qps*4096, device.LocalWrite)
	fill(local.bytes, 4)
	var ends [qps]*end
	credits := map[uint32]chan bool{}
	for i := range ends {
		qp, err := d.CreateQP(device.QPConfig{CQ: cq, SendWRs: 2 * wrs, SGEs: 1})
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = &end{QP: qp}
		t.Cleanup(func() { closeAll(t, qp) })
		other := newEnd(t, d, 1, 1, 2)
		ends[i].connect(t, d, other.Num())
		other.connect(t, d, qp.Num())
		credits[qp.Num()] = make(chan bool, rounds+2)
		credits[qp.Num()] <- true
		credits[qp.Num()] <- true
	}
	var posters sync.WaitGroup
	for i, e := range ends {
		c := chain(t, l, wrs, wrs)
		posters.Go(func() {
			for range rounds {
				<-credits[e.Num()]
				c.WRs, c.SGEs = c.WRs[:0], c.SGEs[:0]
				for j := range wrs {
					add(c, device.WR{
						ID: uint64(j), Signaled: j == wrs-1,
						Remote: address(remote.bytes) + uint64(i*4096+j*512), RKey: remote.RKey(),
					}, local.sge(i*4096+j*512, 512))
				}
				if n, err := e.Post(c); err != nil {
					t.Errorf("posted %d: %v", n, err)
					return
				}
			}
		})
	}
	each(t, cq, qps*rounds, func(w device.Completion) {
		if w.Status != device.Success || w.ID != wrs-1 || credits[w.QPN] == nil {
			t.Fatalf("completion %+v", w)
		}
		credits[w.QPN] <- true
	})
	posters.Wait()
	if !bytes.Equal(local.bytes, remote.bytes) {
		t.Error("bytes differ")
	}
}
