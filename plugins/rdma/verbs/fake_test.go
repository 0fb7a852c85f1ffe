//go:build cgo

package verbs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugins/rdma/device"
)

// The tests of this file load testdata/fake.c in place of libibverbs.

// built is the fake library, compiled once.
var built = sync.OnceValues(func() (string, error) { return compile(scratch) })

// compile makes the library of testdata/fake.c in a folder.
func compile(dir string, flags ...string) (file string, err error) {
	if _, err := exec.LookPath("gcc"); err != nil {
		return "", err
	}
	file = filepath.Join(dir, "libibverbs.so.1")
	flags = append(flags, "-Wall", "-Werror", "-O1", "-g", "-shared", "-fPIC", "-pthread", "-o", file, filepath.Join("testdata", "fake.c"))
	if out, err := exec.Command("gcc", flags...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("gcc %s: %w\n%s", strings.Join(flags, " "), err, out)
	}
	return file, nil
}

// usable returns the library of a file, or skips the test where there is no compiler, as in the lab.
func usable(tb testing.TB, file string, err error) *library {
	tb.Helper()
	if errors.Is(err, exec.ErrNotFound) {
		tb.Skip("gcc is not there to compile the fake library")
	}
	if err != nil {
		tb.Fatal(err)
	}
	return &library{soname: file}
}

// fake returns the fake library.
func fake(tb testing.TB) *library {
	tb.Helper()
	file, err := built()
	return usable(tb, file, err)
}

// fresh returns a fake library of its own, with none of the state that other tests have left.
func fresh(tb testing.TB, flags ...string) *library {
	tb.Helper()
	file, err := compile(tb.TempDir(), flags...)
	return usable(tb, file, err)
}

func openFake(tb testing.TB) (device.Library, device.Device) {
	tb.Helper()
	l := fake(tb)
	d, err := l.Open("fake0")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { closeAll(tb, d) })
	return l, d
}

func fakeQueue(tb testing.TB, d device.Device, wrs int) *end {
	tb.Helper()
	return newEnd(tb, d, wrs, 4, 2*wrs)
}

func isMissing(err error, words ...string) bool {
	var missing *device.Missing
	return errors.As(err, &missing) && missing.Remedy != "" &&
		!slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(err.Error(), w) })
}

func TestMissing(t *testing.T) {
	l := &library{soname: "libibverbs-that-is-not-there.so.1"}
	if _, err := l.Devices(); !isMissing(err, l.soname, "No such file", "libibverbs1", "ibverbs-providers") {
		t.Errorf("without the library: %v", err)
	}
	if l.Name() != l.soname || l.Fork() != device.ForkDisabled {
		t.Errorf("not loaded: %q, fork %d", l.Name(), l.Fork())
	}
	if _, err := l.Open("fake0"); !isMissing(err) {
		t.Errorf("open without the library: %v", err)
	}
	// The library comes while the program runs.
	l.soname = fake(t).soname
	if _, err := l.Devices(); err != nil {
		t.Errorf("with a library that was not there before: %v", err)
	}
	lacking := fresh(t, "-DLACKING")
	if _, err := lacking.Devices(); !isMissing(err, "ibv_fork_init", "rdma-core") {
		t.Errorf("a library that lacks a function: %v", err)
	}
}

func TestList(t *testing.T) {
	l := fake(t)
	if got, err := l.Devices(); err != nil || !slices.Equal(got, []string{"fake0", "fake1"}) {
		t.Errorf("devices: %q, %v", got, err)
	}
	if l.Name() != "libibverbs.so.1" {
		t.Errorf("name: %q", l.Name())
	}
	for _, errno := range []syscall.Errno{syscall.ENOSYS, syscall.EPROTONOSUPPORT} {
		t.Setenv("FAKE_FAIL", "get_device_list:"+strconv.Itoa(int(errno)))
		if _, err := l.Devices(); !isMissing(err, "kernel", "rdma_rxe") {
			t.Errorf("a kernel without RDMA (%v): %v", errno, err)
		}
	}
	t.Setenv("FAKE_FAIL", "get_device_list:12")
	if _, err := l.Devices(); !errors.Is(err, syscall.ENOMEM) || isMissing(err) {
		t.Errorf("no memory: %v", err)
	}
	t.Setenv("FAKE_FAIL", "")
	if _, err := l.Open("fake2"); !errors.Is(err, syscall.ENODEV) || !strings.Contains(err.Error(), "fake2") {
		t.Errorf("open of a device that is not there: %v", err)
	}
}

func TestUnusable(t *testing.T) {
	dir := t.TempDir()
	if err := unusable(dir); err != nil {
		t.Errorf("no devices: %v", err)
	}
	if err := unusable(filepath.Join(dir, "none")); err != nil {
		t.Errorf("no RDMA: %v", err)
	}
	if err := os.Mkdir(filepath.Join(dir, "mlx5_0"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unusable(dir); !isMissing(err, "mlx5_0", "ib_uverbs") {
		t.Errorf("a device that the library does not list: %v", err)
	}
}

func TestFork(t *testing.T) {
	for fail, want := range map[string]device.Fork{
		"":                device.ForkEnabled,
		"fork_unneeded:1": device.ForkUnneeded,
		"fork_init:22":    device.ForkDisabled,
	} {
		t.Setenv("FAKE_FAIL", fail)
		l := fake(t)
		if _, err := l.Devices(); err != nil || l.Fork() != want {
			t.Errorf("%q: fork %d, want %d; %v", fail, l.Fork(), want, err)
		}
	}
}

func TestFakeAttributes(t *testing.T) {
	_, d := openFake(t)
	if got, want := d.Attr(), (device.Attr{
		Name: "fake0", Firmware: "0 alive", Ports: 2,
		MaxQP: 1, MaxWR: 2000, MaxSGE: 3, MaxSGERead: 4, MaxCQ: 5, MaxCQE: 4095, MaxMR: 7, MaxReadsServed: 8, MaxReadsInitiated: 9,
		MaxMRSize: 1 << 40,
	}); got != want {
		t.Errorf("attributes: %+v, want %+v", got, want)
	}
	for i, want := range []device.Port{
		{Number: 1, Active: true, State: "ACTIVE", Link: device.Ethernet, MTU: 2048, MaxMessage: 1 << 31, LID: 7, GIDs: 5, Rate: 100000},
		{Number: 2, State: "ARMED", Link: device.InfiniBand, MTU: 2048, MaxMessage: 1 << 31, LID: 7, GIDs: 5, Rate: 100000},
	} {
		if got, err := d.Port(i + 1); got != want || err != nil {
			t.Errorf("port: %+v, want %+v; %v", got, want, err)
		}
	}
	gids, err := d.GIDs(2)
	if want := []device.GID{
		{Index: 0, Addr: [16]byte{0: 0xfe, 15: 2}, Type: device.GIDRoCEv1, Interface: "lo"},
		{Index: 3, Addr: [16]byte{15: 9}, Type: device.GIDRoCEv2},
		{Index: 4, Addr: [16]byte{15: 4}, Type: device.GIDInfiniBand},
	}; !slices.Equal(gids, want) || err != nil {
		t.Errorf("GIDs: %+v, want %+v; %v", gids, want, err)
	}
	mem := mapped(t, 8192)
	mr, err := d.Register(mem[:5000], device.RemoteRead|device.RemoteWrite|device.LocalWrite)
	if err != nil {
		t.Fatal(err)
	}
	if mr.LKey() != 5000 || mr.RKey() != 1|2|4 { // the fake's keys are the length and the access flags
		t.Errorf("keys %d and %d", mr.LKey(), mr.RKey())
	}
	closeAll(t, mr)
}

func TestFakeClosed(t *testing.T) { testClosed(t, fake(t), "fake0") }
func TestFakeFreed(t *testing.T)  { testFreed(t, fake(t), "fake0") }

// TestErrors makes each function of the library fail, and wants its errno, and nothing left behind.
func TestErrors(t *testing.T) {
	l := fresh(t)
	mem := mapped(t, 4096)
	c := chain(t, l, 1, 0)
	add(c, device.WR{})
	// use goes through the life of a device, on to the end whatever fails, and returns the errors.
	use := func() (errs []error) {
		try := func(err error) bool {
			if err != nil {
				errs = append(errs, err)
			}
			return err == nil
		}
		d, err := l.Open("fake0")
		if !try(err) {
			return errs
		}
		_, err = d.Port(1)
		try(err)
		_, err = d.GIDs(1)
		try(err)
		mr, err := d.Register(mem, device.LocalWrite)
		if try(err) {
			defer func() { try(d.Close()) }()
			defer func() { try(mr.Close()) }()
		} else {
			defer func() { try(d.Close()) }()
		}
		cq, err := d.CreateCQ(4)
		if !try(err) {
			return errs
		}
		defer func() { try(cq.Close()) }()
		_, err = cq.Poll()
		try(err)
		try(cq.Arm())
		try(cq.Wait(time.Now().Add(-time.Second)))
		qp, err := d.CreateQP(device.QPConfig{CQ: cq, SendWRs: 1, SGEs: 1})
		if !try(err) {
			return errs
		}
		defer func() { try(qp.Close()) }()
		_, err = qp.Post(c)
		try(err)
		try(qp.Fail())
		return errs
	}
	if errs := use(); len(errs) > 0 {
		t.Fatalf("when nothing fails: %v", errs)
	}
	before := descriptors(t)
	for _, name := range []string{
		"open_device", "query_device", "alloc_pd", "query_port", "query_gid_ex", "reg_mr", "create_comp_channel", "create_cq",
		"poll_cq", "req_notify_cq", "create_qp", "post_send", "post_send_silent", "modify_qp",
		"close_device", "dealloc_pd",
	} {
		t.Setenv("FAKE_FAIL", name+":42")
		errs := use()
		if len(errs) == 0 {
			t.Errorf("%s fails, and nothing tells", name)
		}
		for _, err := range errs {
			var e *device.Error
			if !errors.As(err, &e) || e.Errno != 42 || e.Device != "fake0" || e.Op == "" {
				t.Errorf("%s fails with 42: %v", name, err)
			}
		}
		t.Setenv("FAKE_FAIL", "")
		d, err := l.Open("fake0")
		if err != nil {
			t.Fatal(err)
		}
		alive := "0 alive"
		if name == "dealloc_pd" { // which is left to the kernel
			alive = "1 alive"
		}
		if d.Attr().Firmware != alive {
			t.Errorf("%s has failed, and left %s", name, d.Attr().Firmware)
		}
		closeAll(t, d)
		if after := descriptors(t); after != before {
			t.Errorf("%s has failed, and left %d file descriptors", name, after-before)
		}
	}
	// What cannot be destroyed keeps what it was made of, and can be closed later.
	for _, name := range []string{"dereg_mr", "destroy_qp", "destroy_cq", "destroy_comp_channel"} {
		d, err := l.Open("fake0")
		if err != nil {
			t.Fatal(err)
		}
		mr, err1 := d.Register(mem, device.LocalWrite)
		cq, err2 := d.CreateCQ(4)
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		qp, err := d.CreateQP(device.QPConfig{CQ: cq, SendWRs: 1, SGEs: 1})
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv("FAKE_FAIL", name+":42")
		failed := 0
		for _, c := range []interface{ Close() error }{qp, cq, mr, d} {
			if err := c.Close(); errors.Is(err, syscall.Errno(42)) {
				failed++
			} else if err != nil && !errors.Is(err, syscall.EBUSY) {
				t.Errorf("%s fails: %v", name, err)
			}
		}
		if failed != 1 {
			t.Errorf("%s fails, and %d objects tell", name, failed)
		}
		// A completion queue that is half closed is closed when the library's is gone, and open until then.
		gone := name == "dereg_mr" || name == "destroy_comp_channel"
		_, polled := cq.Poll()
		for _, err := range []error{polled, cq.Arm()} {
			if gone && !errors.Is(err, os.ErrClosed) || !gone && err != nil {
				t.Errorf("%s fails, and the completion queue says %v", name, err)
			}
		}
		t.Setenv("FAKE_FAIL", "")
		for _, c := range []interface{ Close() error }{qp, cq, mr, d} {
			if err := c.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
				t.Errorf("%s no longer fails: %v", name, err)
			}
		}
	}
	if d, err := l.Open("fake0"); err != nil || d.Attr().Firmware != "1 alive" {
		t.Errorf("left: %v, %v", d.Attr().Firmware, err)
	} else {
		closeAll(t, d)
	}
}

// TestModify sets all attributes that a queue pair is given. The fake knows what they must be.
func TestModify(t *testing.T) {
	_, d := openFake(t)
	qp := fakeQueue(t, d, 1)
	if err := qp.Init(2, device.LocalWrite|device.RemoteRead); err != nil {
		t.Error(err)
	}
	a := device.ReceiveAttr{
		Port: 2, GIDIndex: 4, RemoteGID: [16]byte{0: 1, 15: 16}, RemoteLID: 77, RemoteQPN: 0xabcdef, RemotePSN: 0xfedcba, MTU: 1024,
		ReadsServed: 11, MinRNRTimer: 12, TrafficClass: 106, ServiceLevel: 3, HopLimit: 64, Link: device.Ethernet,
	}
	if err := qp.ReadyToReceive(a); err != nil {
		t.Error(err)
	}
	a.Link = device.InfiniBand
	if err := qp.ReadyToReceive(a); err != nil {
		t.Error(err)
	}
	a.RemoteLID = 0 // beyond a router
	if err := qp.ReadyToReceive(a); err != nil {
		t.Error(err)
	}
	if err := qp.ReadyToSend(device.SendAttr{PSN: 0xabc, Timeout: 14, Retries: 7, RNRRetries: 6, ReadsInitiated: 5}); err != nil {
		t.Error(err)
	}
	if err := qp.Fail(); err != nil {
		t.Error(err)
	}
	if caps := qp.Caps(); caps != (device.Caps{SendWRs: 4, SGEs: 6}) {
		t.Errorf("granted %+v", caps)
	}
}

// sum is what the fake makes of a work request.
func sum(wr *device.WR, sges []device.SGE) uint32 {
	s := wr.Remote + 3*uint64(wr.RKey) + 5*uint64(wr.Op) + 7*uint64(wr.SGEs)
	for _, g := range sges[wr.FirstSGE:][:wr.SGEs] {
		s = s*31 + g.Addr + 11*uint64(g.Length) + 13*uint64(g.LKey)
	}
	return uint32(s ^ s>>32)
}

// TestLayout posts any work requests, and wants C to have seen them as Go wrote them.
func TestLayout(t *testing.T) {
	l, d := openFake(t)
	const room = 40
	qp := fakeQueue(t, d, room)
	c := chain(t, l, room, 4*room)
	rapid.Check(t, func(t *rapid.T) {
		c.WRs, c.SGEs = c.WRs[:0], c.SGEs[:0]
		var want []device.Completion
		n := rapid.IntRange(1, room).Draw(t, "work requests")
		for i := range n {
			var sges []device.SGE
			for range rapid.IntRange(0, 4).Draw(t, "SGEs") {
				sges = append(sges, device.SGE{Addr: rapid.Uint64().Draw(t, "address"), Length: rapid.Uint32().Draw(t, "length"), LKey: rapid.Uint32().Draw(t, "lkey")})
			}
			add(c, device.WR{
				ID: rapid.Uint64().Draw(t, "id"), Op: device.Op(rapid.IntRange(0, 1).Draw(t, "op")),
				Remote: rapid.Uint64().Draw(t, "remote"), RKey: rapid.Uint32().Draw(t, "rkey"),
				Signaled: i == n-1 || rapid.Bool().Draw(t, "signaled"),
			}, sges...)
			if wr := &c.WRs[i]; wr.Signaled {
				want = append(want, device.Completion{ID: wr.ID, QPN: qp.Num(), Vendor: sum(wr, c.SGEs)})
			}
		}
		before := l.Calls()
		if taken, err := qp.Post(c); taken != n || err != nil {
			t.Fatalf("posted %d of %d: %v", taken, n, err)
		}
		if got, err := qp.cq.Poll(); !slices.Equal(got, want) || err != nil {
			t.Fatalf("completions %v, want %v; %v", got, want, err)
		}
		if calls := l.Calls() - before; calls != 2 {
			t.Fatalf("one post and one poll took %d calls", calls)
		}
	})
}

// TestPartial posts more than there is room for.
func TestPartial(t *testing.T) {
	l, d := openFake(t)
	qp := fakeQueue(t, d, 5)
	room := qp.Caps().SendWRs // 8
	c := chain(t, l, 20, 0)
	for i := range 20 {
		add(c, device.WR{ID: uint64(i), Signaled: i%2 == 1})
	}
	all := c.WRs
	post := func(wrs []device.WR, want int, wantErr error) {
		t.Helper()
		c.WRs = wrs
		if taken, err := qp.Post(c); taken != want || !errors.Is(err, wantErr) {
			t.Errorf("posted %d of %d, %v; want %d, %v", taken, len(wrs), err, want, wantErr)
		}
	}
	post(all[:6], 6, nil)
	post(all[6:10], 2, syscall.ENOMEM)
	post(all[10:], 0, syscall.ENOMEM)
	qp.await(t, 4)
	post(all, room, syscall.ENOMEM) // longer than the queue
	qp.await(t, 4)
	t.Setenv("FAKE_FAIL", "post_send:22")
	post(all[:2], 0, syscall.EINVAL)
	t.Setenv("FAKE_FAIL", "post_send_silent:5")
	post(all[:2], 2, syscall.EIO) // nobody knows: they may be with the device
	t.Setenv("FAKE_FAIL", "status:10")
	post(all[:2], 2, nil)
	if w := qp.await(t, 1)[0]; w.ID != 1 || w.Status != device.RemoteAccess {
		t.Errorf("completion %+v", w)
	}
}

// TestKept closes queue pairs whose completions are in the queue, and polls the rest.
func TestKept(t *testing.T) {
	l, d := openFake(t)
	const n = 100
	a := newEnd(t, d, n, 1, 3*n)
	var others [2]device.QP
	for i := range others {
		var err error
		if others[i], err = d.CreateQP(device.QPConfig{CQ: a.cq, SendWRs: n, SGEs: 1}); err != nil {
			t.Fatal(err)
		}
	}
	c := chain(t, l, 1, 0)
	for i := range n {
		c.WRs = append(c.WRs[:0], device.WR{ID: uint64(i), Signaled: true})
		a.post(t, c)
		for _, qp := range others {
			if _, err := qp.Post(c); err != nil {
				t.Fatal(err)
			}
		}
	}
	last, err := a.cq.Poll()
	if err != nil || len(last) != device.MaxPoll {
		t.Fatalf("polled %d: %v", len(last), err)
	}
	seen := slices.Clone(last)
	closeAll(t, others[0], others[1])
	if !slices.Equal(seen, last) {
		t.Error("closing a queue pair changed what was polled before")
	}
	c.WRs = append(c.WRs[:0], device.WR{ID: n, Signaled: true})
	a.post(t, c)
	next := uint64(0)
	for _, w := range seen {
		if w.QPN == a.Num() {
			next = w.ID + 1
		}
	}
	for _, w := range a.await(t, n+1-int(next)) {
		if w.QPN != a.Num() || w.ID != next {
			t.Fatalf("completion %+v, want %d of %d", w, next, a.Num())
		}
		next++
	}
	if rest, err := a.cq.Poll(); len(rest) > 0 || err != nil {
		t.Errorf("left: %v, %v", rest, err)
	}
}

// TestPolls polls more than fits into one poll.
func TestPolls(t *testing.T) {
	l, d := openFake(t)
	const n = 150
	qp := fakeQueue(t, d, n)
	c := chain(t, l, n, 0)
	for i := range n {
		add(c, device.WR{ID: uint64(i), Signaled: true})
	}
	qp.post(t, c)
	for _, want := range []int{64, 64, 22, 0} {
		if got, err := qp.cq.Poll(); len(got) != want || err != nil {
			t.Errorf("polled %d, want %d: %v", len(got), want, err)
		}
	}
}

// TestEvents wants each asynchronous event as what it is. That an event is acknowledged is seen when its object can
// be closed.
func TestEvents(t *testing.T) {
	_, d := openFake(t)
	qp := fakeQueue(t, d, 1)
	type event = device.Event
	for number, want := range []event{
		{Kind: device.CQFailed, CQ: qp.cq},
		{Kind: device.QPFailed, QPN: qp.Num()},
		{Kind: device.QPFailed, QPN: qp.Num()},
		{Kind: device.QPFailed, QPN: qp.Num()},
		{QPN: qp.Num()},
		{QPN: qp.Num()},
		{QPN: qp.Num()},
		{QPN: qp.Num()},
		{Kind: device.DeviceFatal},
		{Kind: device.PortUp, Port: 2},
		{Kind: device.PortDown, Port: 2},
		{Port: 2},
		{Port: 2},
		{Port: 2},
		{},
		{},
		{QPN: qp.Num()},
		{Port: 2},
		{Kind: device.GIDChange, Port: 2},
		{},
		{}, // of a library that knows more events
	} {
		t.Setenv("FAKE_EVENT", strconv.Itoa(number))
		if _, err := d.Port(2); err != nil {
			t.Fatal(err)
		}
		want.Text = "event " + strconv.Itoa(number)
		if got, err := d.NextEvent(); got != want || err != nil {
			t.Errorf("event %d: %+v, want %+v; %v", number, got, want, err)
		}
	}
	// A completion queue that is closed has no name any more.
	t.Setenv("FAKE_EVENT", "0")
	if _, err := d.Port(1); err != nil {
		t.Fatal(err)
	}
	q := qp.cq.(*cq)
	q.hca.cqMu.Lock()
	delete(q.hca.cqs, q.name)
	q.hca.cqMu.Unlock()
	if got, err := d.NextEvent(); got.Kind != device.CQFailed || got.CQ != nil || err != nil {
		t.Errorf("event of a completion queue that is closed: %+v, %v", got, err)
	}
	t.Setenv("FAKE_FAIL", "get_async_event:19")
	if _, err := d.NextEvent(); !errors.Is(err, syscall.ENODEV) {
		t.Errorf("event of a device that is gone: %v", err)
	}
	t.Setenv("FAKE_FAIL", "")
}

// TestWaits lets one goroutine wait for completions while others post, wake it and close the queue.
func TestWaits(t *testing.T) {
	l, d := openFake(t)
	const n = 2000
	qp := fakeQueue(t, d, n)
	c := chain(t, l, 1, 0)
	add(c, device.WR{Signaled: true})

	start := time.Now()
	if err := qp.cq.Wait(start.Add(20 * time.Millisecond)); err != nil || time.Since(start) < 20*time.Millisecond {
		t.Errorf("waited %v of 20ms: %v", time.Since(start), err)
	}
	t.Setenv("FAKE_FAIL", "get_cq_event:5")
	if err := qp.cq.Wait(time.Time{}); !errors.Is(err, syscall.EIO) {
		t.Errorf("a channel that fails: %v", err)
	}
	t.Setenv("FAKE_FAIL", "")

	var posters sync.WaitGroup
	posters.Go(func() {
		for range n {
			if _, err := qp.Post(c); err != nil {
				t.Error(err)
			}
		}
	})
	each(t, qp.cq, n, func(device.Completion) {})
	posters.Wait()

	// A Wake ends the Wait that runs, or the next one.
	turn := make(chan bool)
	posters.Go(func() {
		for range turn {
			qp.cq.Wake()
		}
	})
	for range n {
		turn <- true
		start := time.Now()
		if err := qp.cq.Wait(start.Add(patience)); err != nil || time.Since(start) >= patience {
			t.Fatalf("Wait was not woken: %v after %v", err, time.Since(start))
		}
	}
	close(turn)
	posters.Wait()

	closing := make(chan error)
	go func() {
		for {
			if err := qp.cq.Wait(time.Time{}); err != nil {
				closing <- err
				return
			}
		}
	}()
	posters.Go(func() {
		for range 100 {
			qp.cq.Wake()
		}
	})
	closeAll(t, qp.QP)
	closeAll(t, qp.cq)
	if err := <-closing; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait while the queue is closed: %v", err)
	}
	posters.Wait()
	qp.QP, qp.cq = nil, nil
}

func TestAllocs(t *testing.T) {
	l, d := openFake(t)
	qp := fakeQueue(t, d, 8)
	c := chain(t, l, 4, 4)
	for i := range 4 {
		add(c, device.WR{Signaled: i == 3}, device.SGE{Length: 1})
	}
	if n := testing.AllocsPerRun(200, func() {
		if err := qp.cq.Arm(); err != nil {
			t.Fatal(err)
		}
		qp.post(t, c)
		if err := qp.cq.Wait(time.Time{}); err != nil {
			t.Fatal(err)
		}
		if got, err := qp.cq.Poll(); len(got) != 1 || err != nil {
			t.Fatal(got, err)
		}
	}); n != 0 {
		t.Errorf("%v allocations for arm, post, wait and poll", n)
	}
}

func BenchmarkPollEmpty(b *testing.B) {
	_, d := openFake(b)
	qp := fakeQueue(b, d, 8)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := qp.cq.Poll(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPost(b *testing.B) {
	for _, n := range []int{1, 16, 64} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			l, d := openFake(b)
			qp := fakeQueue(b, d, n)
			c := chain(b, l, n, n)
			for i := range n {
				add(c, device.WR{Signaled: i == n-1}, device.SGE{Length: 1})
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := qp.Post(c); err != nil {
					b.Fatal(err)
				}
				if _, err := qp.cq.Poll(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
