package rdma_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
	"github.com/umbp/umbp/plugins/rdma"
	"github.com/umbp/umbp/plugins/rdma/device"
	"github.com/umbp/umbp/plugins/rdma/verbstest"
)

// The tests in this file try the backend as a host sees it, on simulated devices on which things go wrong.

type journal = backendtest.Sink

var (
	must     = backendtest.Must
	wantCode = backendtest.WantCode
	until    = backendtest.Eventually
)

// host is a process that uses the backend.
type host struct {
	backend.Backend
	self backend.Peer
}

// openHost opens the backend on devices of a fabric. It is closed with the test.
func openHost(t testing.TB, f *verbstest.Fabric, self backend.Peer, options map[string]string, devices ...string) *host {
	t.Helper()
	factory := rdma.Factory(f.Host(devices...))
	all := map[string]string{"drain": "20ms", "cancel_grace": "5ms", "breaker_pause": "1ms",
		"breaker_max_pause": "1ms", "breaker_hold": "1ms", "connect_timeout": "1s", "probe": "1h"}
	for name, value := range options {
		all[name] = value
	}
	return &host{backendtest.Open(t, factory, backend.Config{Self: self}, all), self}
}

// lend registers memory and returns it as peers see it.
func (h *host) lend(t testing.TB, id backend.RegionID, memory []byte, rights backend.Rights) backend.Remote {
	t.Helper()
	return backendtest.Register(t, h, h.self, backend.Memory{Region: id, Kind: backend.HostMemory, Rights: rights, Bytes: memory, FD: -1})
}

// reach connects h to a peer.
func (h *host) reach(peer *host) (backend.Endpoint, error) {
	return backendtest.TryConnect(h, h.self, peer.self, peer)
}

// count returns one of the backend's counters.
func (h *host) count(t testing.TB, name string) uint64 {
	t.Helper()
	return backendtest.Count(t, h.Backend.(backend.Counter), name)
}

func wantEnd(t testing.TB, e backend.Endpoint) {
	t.Helper()
	backendtest.WantClosed(t, e.Done(), "the end of the endpoint")
}

// link is two hosts with a region each, and a session from one to the other.
type link struct {
	t         testing.TB
	fabric    *verbstest.Fabric
	a, b      *host
	near, far []byte
	remote    backend.Remote
	endpoint  backend.Endpoint
	session   backend.Session
	done      *journal
	cookie    uint64
}

// piece is the length of the segments of these tests.
const piece = 256

var (
	peerA = backend.Peer{Node: "a", Incarnation: 11, Host: "x"}
	peerB = backend.Peer{Node: "b", Incarnation: 12, Host: "y"}
)

// newLink makes a link of two hosts, with room for as many segments. One has the devices whose names begin with sim-a,
// the other one those with sim-b; where none are given, each has one, which is called so.
func newLink(t testing.TB, cfg verbstest.Config, segments int, options map[string]string) *link {
	t.Helper()
	if cfg.Devices == nil {
		cfg.Devices = []verbstest.DeviceConfig{{Name: "sim-a"}, {Name: "sim-b"}}
	}
	f := verbstest.New(cfg)
	t.Cleanup(func() {
		if open := f.Objects(); open != (verbstest.Objects{}) {
			t.Errorf("left open: %+v", open)
		}
	})
	var names [2][]string
	for _, d := range cfg.Devices {
		for i, prefix := range []string{"sim-a", "sim-b"} {
			if strings.HasPrefix(d.Name, prefix) {
				names[i] = append(names[i], d.Name)
			}
		}
	}
	l := &link{
		t: t, fabric: f,
		a: openHost(t, f, peerA, options, names[0]...), b: openHost(t, f, peerB, options, names[1]...),
		near: make([]byte, 2*piece*segments), far: make([]byte, 2*piece*segments),
		done: new(journal),
	}
	l.a.lend(t, 1, l.near, 0)
	l.remote = l.b.lend(t, 2, l.far, backend.RemoteRead|backend.RemoteWrite)
	l.connect()
	return l
}

func (l *link) connect() {
	l.t.Helper()
	l.endpoint = backendtest.Connect(l.t, l.a, l.a.self, l.b.self, l.b)
	l.session = backendtest.Bind(l.t, l.endpoint, 1, l.remote, l.done)
}

// ends returns the memory that an operation reads and the memory that it writes.
func (l *link) ends(op backend.Op) (source, destination []byte) {
	if op == backend.Read {
		return l.far, l.near
	}
	return l.near, l.far
}

// prepare makes the bytes of an operation such that it shows whether they have moved.
func (l *link) prepare(op backend.Op) {
	source, destination := l.ends(op)
	l.cookie++
	r := rand.New(rand.NewPCG(l.cookie, 0))
	for i := 0; i < len(source); i += 8 {
		binary.LittleEndian.PutUint64(source[i:], r.Uint64()|0x0101010101010101)
	}
	clear(destination)
}

// group returns a transfer of the segments first to first+n, each of which needs a work request of its own.
func (l *link) group(op backend.Op, first, n int) backend.Transfer {
	l.cookie++
	x := backend.Transfer{Op: op, Cookie: l.cookie}
	for i := first; i < first+n; i++ {
		at := uint64(2 * piece * i)
		x.Segments = append(x.Segments, backend.Segment{Local: at, Remote: at, Length: piece})
	}
	return x
}

// shut closes both ends before the test is over.
func (l *link) shut() {
	l.t.Helper()
	for _, h := range []*host{l.a, l.b} {
		if err := h.Close(); err != nil {
			l.t.Error(err)
		}
	}
}

func (l *link) post(x backend.Transfer) {
	l.t.Helper()
	must(l.t, l.session.Post(x))
}

// judge holds a completion against the bytes: what is done is there, and of what was not sent nothing is.
func (l *link) judge(x backend.Transfer, c backend.Completion) []backend.Outcome {
	l.t.Helper()
	outcomes := c.Outcomes
	if c.Err == nil {
		outcomes = slices.Repeat([]backend.Outcome{backend.Done}, len(x.Segments))
	}
	if c.Cookie != x.Cookie || len(outcomes) != len(x.Segments) {
		l.t.Fatalf("the completion of %d with %d outcomes answers %d of %d segments", c.Cookie, len(outcomes), x.Cookie, len(x.Segments))
	}
	source, destination := l.ends(x.Op)
	for i, s := range x.Segments {
		got := destination[s.Local:][:s.Length]
		switch outcomes[i] {
		case backend.Done:
			if !bytes.Equal(got, source[s.Local:][:s.Length]) {
				l.t.Errorf("segment %d is done, and its bytes are not there", i)
			}
		case backend.NotSent:
			if !bytes.Equal(got, make([]byte, s.Length)) {
				l.t.Errorf("segment %d was not sent, and bytes of it are there", i)
			}
		}
	}
	return outcomes
}

// tally counts outcomes.
func tally(outcomes []backend.Outcome) map[backend.Outcome]int {
	n := make(map[backend.Outcome]int)
	for _, o := range outcomes {
		n[o]++
	}
	return n
}

// narrow are options with which little is in flight: one queue pair of 16 work requests.
func narrow(options ...string) map[string]string {
	all := map[string]string{"queue_pairs": "1", "send_queue": "16", "signal_every": "4"}
	for i := 0; i < len(options); i += 2 {
		all[options[i]] = options[i+1]
	}
	return all
}

// outstanding is how many work requests the initiator's device has not answered.
func (l *link) outstanding() (n int) {
	for _, q := range l.fabric.QPs("sim-a") {
		n += q.Outstanding
	}
	return n
}

// TestSecondPartFindsNoCredit posts a group larger than the send queue. The parts that find no credit wait while those
// before them are in flight, and whatever happens to these, every segment has its own fate.
func TestSecondPartFindsNoCredit(t *testing.T) {
	const segments = 40
	for what, c := range map[string]struct {
		then func(l *link)
		end  bool
		want map[backend.Outcome]int
	}{
		"all goes on": {func(l *link) { l.fabric.Resume("sim-a") }, false, map[backend.Outcome]int{backend.Done: segments}},
		"the device fails": {func(l *link) { l.fabric.Fatal("sim-a") }, true,
			map[backend.Outcome]int{backend.Done: 8, backend.InDoubt: 16, backend.NotSent: 16}},
		"the queue pair fails": {func(l *link) { l.fabric.Break("sim-a", 0) }, true,
			map[backend.Outcome]int{backend.Done: 8, backend.InDoubt: 16, backend.NotSent: 16}},
		"it is cancelled, and does not end": {func(l *link) { l.session.Cancel(l.cookie) }, true,
			map[backend.Outcome]int{backend.Done: 8, backend.InDoubt: 16, backend.NotSent: 16}},
		"it is cancelled, and ends": {func(l *link) {
			l.session.Cancel(l.cookie)
			l.fabric.Resume("sim-a")
		}, false, map[backend.Outcome]int{backend.Done: 24, backend.NotSent: 16}},
		"the target refuses one": {func(l *link) {
			l.fabric.Inject(verbstest.Fault{Device: "sim-a", Skip: 2, Status: device.RemoteAccess})
			l.fabric.Resume("sim-a")
		}, true, map[backend.Outcome]int{backend.Done: 10, backend.Failed: 1, backend.NotSent: 29}},
		"the session is closed": {func(l *link) {
			closed := make(chan error)
			go func() { closed <- l.session.Close() }()
			awaitFirst(l.t, l.done)
			if err := <-closed; err != nil {
				l.t.Error(err)
			}
		}, true, map[backend.Outcome]int{backend.Done: 8, backend.InDoubt: 16, backend.NotSent: 16}},
	} {
		t.Run(what, func(t *testing.T) {
			options := narrow("connect_timeout", "1m") // before which the target does not probe, or its probes count, too
			if what == "it is cancelled, and ends" {
				options["cancel_grace"] = "10s"
			}
			l := newLink(t, verbstest.Config{}, segments, options)
			l.prepare(backend.Write)
			before := l.fabric.Counts().WRs
			l.fabric.Pause("sim-a")
			x := l.group(backend.Write, 0, segments)
			l.post(x)
			posted := func(n uint64) {
				t.Helper()
				until(t, fmt.Sprintf("the post of %d work requests", n), func() bool {
					return l.fabric.Counts().WRs-before >= n
				})
				time.Sleep(time.Millisecond)
				if got := l.fabric.Counts().WRs - before; got != n {
					t.Fatalf("%d work requests are posted, want %d", got, n)
				}
			}
			posted(16)
			l.fabric.Step("sim-a", 3) // not a whole part: no credit comes back
			until(t, "three answers", func() bool { return l.outstanding() == 13 })
			posted(16)
			l.fabric.Step("sim-a", 5) // two parts
			posted(24)
			l.done.Empty(t)
			c.then(l)
			got := tally(l.judge(x, l.done.Next(t)))
			if fmt.Sprint(got) != fmt.Sprint(c.want) {
				t.Errorf("outcomes %v, want %v", got, c.want)
			}
			if c.end {
				wantEnd(t, l.endpoint)
			} else {
				// All credits are back: the same again goes through.
				l.fabric.Resume("sim-a")
				l.prepare(backend.Write)
				x = l.group(backend.Write, 0, segments)
				l.post(x)
				if c := l.done.Next(t); c.Err != nil {
					t.Error(c.Err)
				} else {
					l.judge(x, c)
				}
			}
			l.done.Empty(t)
		})
	}
}

// awaitFirst waits until there is a completion, and leaves it there.
func awaitFirst(t testing.TB, j *journal) {
	t.Helper()
	until(t, "a completion", func() bool { return len(j.All(t)) > 0 })
}

// TestGroupsLargerThanTheQueue posts many groups of all sizes at once, in both directions.
func TestGroupsLargerThanTheQueue(t *testing.T) {
	const segments = 600
	l := newLink(t, verbstest.Config{}, segments, map[string]string{"queue_pairs": "2", "send_queue": "16", "signal_every": "5"})
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		l.prepare(op)
		groups := map[uint64]backend.Transfer{}
		for at, n := 0, 1; at < segments; at, n = at+n, n*2 {
			x := l.group(op, at, min(n, segments-at))
			groups[x.Cookie] = x
			l.post(x)
		}
		for range len(groups) {
			c := l.done.Next(t)
			if c.Err != nil {
				t.Fatal(c.Err)
			}
			l.judge(groups[c.Cookie], c)
		}
	}
	l.done.Empty(t)
}

// TestSmallGroupsSpread posts groups of one work request: they go over all queue pairs.
func TestSmallGroupsSpread(t *testing.T) {
	l := newLink(t, verbstest.Config{}, 32, map[string]string{"queue_pairs": "4"})
	l.prepare(backend.Write)
	l.fabric.Record()
	for i := range 32 {
		x := l.group(backend.Write, i, 1)
		l.post(x)
		l.judge(x, l.done.Next(t))
	}
	perQP := map[uint32]int{}
	for _, p := range l.fabric.Posts() {
		perQP[p.QPN] += p.Taken
		if len(p.WRs) != 1 {
			t.Errorf("a chain of %d work requests", len(p.WRs))
		}
	}
	for _, n := range perQP {
		if n != 8 || len(perQP) != 4 {
			t.Fatalf("work requests by queue pair: %v, want 4 times 8", perQP)
		}
	}
}

// TestErrorInTheMiddleOfAGroup has a work request end with each status, after none, half or all of its bytes have
// landed. It and its neighbours say what became of them.
func TestErrorInTheMiddleOfAGroup(t *testing.T) {
	const segments, at = 12, 5
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		for _, status := range []device.Status{device.LocalLength, device.LocalQPOperation, device.LocalProtection,
			device.RemoteInvalid, device.RemoteAccess, device.RemoteOperation, device.RetriesExceeded, device.RNRExceeded,
			device.FatalError, device.Flushed, device.Status(77)} {
			for _, landed := range []verbstest.Landed{verbstest.Nothing, verbstest.Half, verbstest.All} {
				t.Run(fmt.Sprint(op, " ", status, " ", landed), func(t *testing.T) {
					l := newLink(t, verbstest.Config{}, segments, narrow())
					l.prepare(op)
					trigger := l.fabric.Inject(verbstest.Fault{Device: "sim-a", Skip: at, Status: status, Landed: landed})
					x := l.group(op, 0, segments)
					l.post(x)
					c := l.done.Next(t)
					wantCode(t, c.Err, backend.PathDown)
					outcomes := l.judge(x, c)
					if n := trigger.Hits(); n != 1 {
						t.Errorf("the fault struck %d times", n)
					}
					// The first part was answered by itself. The one of the culprit is done up to it when the status
					// is about the culprit.
					for i, o := range outcomes[:at] {
						if known := i < 4 || status != device.FatalError && status != device.Flushed && status != 77; known && o != backend.Done {
							t.Errorf("segment %d, before the error, is %v", i, o)
						}
					}
					for i, o := range outcomes[at:] {
						if o == backend.Done || op == backend.Read && o == backend.InDoubt {
							t.Errorf("segment %d is %v", at+i, o)
						}
					}
					wantEnd(t, l.endpoint)
				})
			}
		}
	}
}

// TestPartialPost has the device take only a part of a chain, or nothing of it though there is room. What it did not take
// was not sent.
func TestPartialPost(t *testing.T) {
	const segments = 12
	for _, take := range []int{0, 1, 7, 11} {
		for _, op := range []backend.Op{backend.Write, backend.Read} {
			l := newLink(t, verbstest.Config{}, segments, narrow())
			l.prepare(op)
			l.fabric.Pause("sim-a")
			l.fabric.Inject(verbstest.Fault{At: verbstest.AtPost, Device: "sim-a", Err: syscall.ENOMEM, Take: take})
			x := l.group(op, 0, segments)
			l.post(x)
			wantEnd(t, l.endpoint)
			c := l.done.Next(t)
			wantCode(t, c.Err, backend.PathDown)
			if !errors.Is(c.Err, syscall.ENOMEM) {
				t.Errorf("the error does not say why: %v", c.Err)
			}
			for i, o := range l.judge(x, c) {
				want := backend.NotSent
				if i < take {
					if want = backend.InDoubt; op == backend.Read {
						want = backend.Failed
					}
				}
				if o != want {
					t.Errorf("%v, %d taken: segment %d is %v, want %v", op, take, i, o, want)
				}
			}
			wantCode(t, l.session.Post(l.group(op, 0, 1)), backend.PathDown)
		}
	}
}

// TestDeviceFatal kills the device with work in flight. No completion of the device ever comes, and none is waited for.
func TestDeviceFatal(t *testing.T) {
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		l := newLink(t, verbstest.Config{}, 40, narrow("drain", "1m"))
		l.prepare(op)
		l.fabric.Pause("sim-a")
		x, y := l.group(op, 0, 10), l.group(op, 10, 30)
		l.post(x)
		l.post(y)
		until(t, "posts", func() bool { return l.outstanding() == 14 })
		l.fabric.Fatal("sim-a")
		in := backend.InDoubt
		if op == backend.Read {
			in = backend.Failed
		}
		all := map[uint64]backend.Completion{}
		for range 2 {
			c := l.done.Next(t)
			wantCode(t, c.Err, backend.PathDown)
			all[c.Cookie] = c
		}
		for i, o := range append(l.judge(x, all[x.Cookie]), l.judge(y, all[y.Cookie])...) {
			want := in
			if i >= 14 { // there was no room for the second part of y
				want = backend.NotSent
			}
			if o != want {
				t.Errorf("%v: segment %d is %v, want %v", op, i, o, want)
			}
		}
		wantEnd(t, l.endpoint)
	}
}

// TestQuietAfterDeadline cancels what is in flight. When the completion comes, the memory is free for other uses: the
// device comes back to life, and touches nothing.
func TestQuietAfterDeadline(t *testing.T) {
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		l := newLink(t, verbstest.Config{}, 12, narrow())
		l.prepare(op)
		l.fabric.Pause("sim-a")
		x := l.group(op, 0, 12)
		l.post(x)
		until(t, "posts", func() bool { return l.outstanding() == 12 })
		l.session.Cancel(x.Cookie)
		c := l.done.Next(t)
		wantCode(t, c.Err, backend.Cancelled)
		l.judge(x, c)
		clear(l.near) // the race detector sees it if anybody still uses it
		l.fabric.Resume("sim-a")
		if op == backend.Write {
			must(t, l.b.Fence(context.Background(), l.a.self))
		}
		time.Sleep(5 * time.Millisecond)
		if !bytes.Equal(l.near, make([]byte, len(l.near))) {
			t.Errorf("%v: the local memory changed after the completion", op)
		}
	}
}

// TestLateCompletion holds the completion of a work request until its transfer was cancelled and its queue pair closed.
// It comes late, and is nobody's.
func TestLateCompletion(t *testing.T) {
	for _, stray := range []bool{false, true} {
		l := newLink(t, verbstest.Config{}, 12, narrow())
		l.prepare(backend.Write)
		l.fabric.Inject(verbstest.Fault{Device: "sim-a", Effect: verbstest.Hold, Stray: stray})
		x := l.group(backend.Write, 0, 12)
		l.post(x)
		until(t, "the carrying out", func() bool { return l.fabric.Counts().WRs >= 12 && l.outstanding() == 0 })
		l.done.Empty(t)
		l.session.Cancel(x.Cookie)
		c := l.done.Next(t)
		wantCode(t, c.Err, backend.Cancelled)
		for i, o := range l.judge(x, c) {
			if o != backend.InDoubt {
				t.Errorf("segment %d is %v", i, o)
			}
		}
		wantEnd(t, l.endpoint)
		l.fabric.Release()
		l.connect()
		l.prepare(backend.Write)
		x = l.group(backend.Write, 0, 12)
		l.post(x)
		if c := l.done.Next(t); c.Err != nil {
			t.Error(c.Err)
		} else {
			l.judge(x, c)
		}
		l.done.Empty(t)
	}
}

// TestWrongCompletions has the device tell of a completion twice, under a queue pair that does not exist, or not at all.
// Transfers complete once; the last one of which no word comes ends when it is cancelled.
func TestWrongCompletions(t *testing.T) {
	for effect, strays := range map[verbstest.Effect]uint64{verbstest.Duplicate: 3, verbstest.Foreign: 3, verbstest.Lose: 0} {
		l := newLink(t, verbstest.Config{}, 30, narrow())
		before := l.a.count(t, "stray_completions")
		l.prepare(backend.Write)
		// Of the 8 that are signaled, the first, the third and the fifth.
		for i := range 3 {
			l.fabric.Inject(verbstest.Fault{Device: "sim-a", Effect: effect, Skip: i})
		}
		x := l.group(backend.Write, 0, 30)
		l.post(x)
		if c := l.done.Next(t); c.Err != nil {
			t.Fatal(c.Err)
		} else {
			l.judge(x, c)
		}
		until(t, "the count of strays", func() bool { return l.a.count(t, "stray_completions")-before == strays })
		select {
		case <-l.endpoint.Done():
			t.Error("a wrong completion broke the endpoint")
		default:
		}
		l.done.Empty(t)
	}

	l := newLink(t, verbstest.Config{}, 4, narrow())
	l.prepare(backend.Write)
	l.fabric.Inject(verbstest.Fault{Device: "sim-a", Effect: verbstest.Lose})
	x := l.group(backend.Write, 0, 4)
	l.post(x)
	until(t, "the carrying out", func() bool { return l.outstanding() == 0 })
	l.session.Cancel(x.Cookie)
	c := l.done.Next(t)
	wantCode(t, c.Err, backend.Cancelled)
	l.judge(x, c)
}

// TestSessionsEndApart cancels one of two transfers in flight: when it ends in its grace, the other is not touched.
func TestSessionsEndApart(t *testing.T) {
	l := newLink(t, verbstest.Config{}, 40, narrow("cancel_grace", "10s"))
	l.prepare(backend.Write)
	l.fabric.Pause("sim-a")
	x, y := l.group(backend.Write, 0, 20), l.group(backend.Write, 20, 20)
	l.post(x)
	l.post(y)
	until(t, "posts", func() bool { return l.outstanding() == 16 })
	l.session.Cancel(x.Cookie)
	l.fabric.Resume("sim-a")
	for range 2 {
		switch c := l.done.Next(t); c.Cookie {
		case x.Cookie:
			wantCode(t, c.Err, backend.Cancelled)
			if got := tally(l.judge(x, c)); got[backend.Done] != 16 || got[backend.NotSent] != 4 {
				t.Errorf("outcomes of what was cancelled: %v", got)
			}
		case y.Cookie:
			if c.Err != nil {
				t.Error(c.Err)
			}
			l.judge(y, c)
		}
	}
}

// TestBlackHoleDelaysNobodyElse has a peer that does not answer. Transfers to another one go on.
func TestBlackHoleDelaysNobodyElse(t *testing.T) {
	l := newLink(t, verbstest.Config{
		Devices: []verbstest.DeviceConfig{{Name: "sim-a"}, {Name: "sim-b"}, {Name: "sim-c"}}, Retry: time.Hour,
	}, 40, narrow())
	c := openHost(t, l.fabric, backend.Peer{Node: "c", Incarnation: 13, Host: "z"}, nil, "sim-c")
	memory := make([]byte, len(l.far))
	remote := c.lend(t, 3, memory, backend.RemoteWrite)
	e, err := l.a.reach(c)
	must(t, err)
	done := new(journal)
	s, err := e.Session(context.Background(), 1, remote, done)
	must(t, err)
	l.prepare(backend.Write)
	l.fabric.Unplug("sim-b")
	x := l.group(backend.Write, 0, 40)
	l.post(x)
	for range 20 {
		must(t, s.Post(l.group(backend.Write, 0, 40)))
		if c := done.Next(t); c.Err != nil {
			t.Fatal(c.Err)
		}
	}
	l.done.Empty(t)
	if err := l.endpoint.Close(); err != nil {
		t.Error(err)
	}
	outcome := l.done.Next(t)
	wantCode(t, outcome.Err, backend.PathDown)
	if got := tally(l.judge(x, outcome)); got[backend.InDoubt] != 16 || got[backend.NotSent] != 24 {
		t.Errorf("outcomes %v", got)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

// TestPeerRestarts closes the target, and opens it anew under the same name on the same device. The old endpoint ends at
// its next use, and what it knew opens nothing of the new incarnation.
func TestPeerRestarts(t *testing.T) {
	l := newLink(t, verbstest.Config{}, 12, narrow())
	l.prepare(backend.Write)
	old := l.remote
	must(t, l.b.Close())
	again := peerB
	again.Incarnation++
	l.b = openHost(t, l.fabric, again, narrow(), "sim-b")
	l.far = make([]byte, len(l.far))
	l.remote = l.b.lend(t, 2, l.far, backend.RemoteRead|backend.RemoteWrite)

	_, err := l.endpoint.Session(context.Background(), 1, l.remote, l.done)
	if code := backend.CodeOf(err); code != backend.PeerGone && code != backend.PathDown {
		t.Errorf("a session with the new incarnation over the old endpoint: %v", err)
	}
	x := l.group(backend.Write, 0, 12)
	if err := l.session.Post(x); err == nil {
		c := l.done.Next(t)
		wantCode(t, c.Err, backend.PathDown)
		l.judge(x, c)
	} else {
		wantCode(t, err, backend.PathDown)
	}
	wantEnd(t, l.endpoint)

	l.connect()
	_, err = l.endpoint.Session(context.Background(), 1, old, l.done)
	wantCode(t, err, backend.PeerGone)
	forged := old
	forged.Peer = again
	_, err = l.endpoint.Session(context.Background(), 1, forged, l.done)
	if err == nil {
		t.Error("a key of the old incarnation was accepted")
	}
	l.prepare(backend.Write)
	x = l.group(backend.Write, 0, 12)
	l.post(x)
	if c := l.done.Next(t); c.Err != nil {
		t.Error(c.Err)
	} else {
		l.judge(x, c)
	}
}

// TestCrossingConnects has two hosts connect to each other at the same time, again and again.
func TestCrossingConnects(t *testing.T) {
	l := newLink(t, verbstest.Config{}, 8, narrow())
	l.b.lend(t, 5, make([]byte, piece), 0)
	memory := make([]byte, piece)
	remote := l.a.lend(t, 4, memory, backend.RemoteWrite)
	cross := func(from, to *host, near backend.RegionID, far backend.Remote) {
		done := make(backendtest.Signal, 1)
		for i := range 10 {
			e, err := from.reach(to)
			if err != nil {
				t.Error(err)
				return
			}
			s, err := e.Session(context.Background(), near, far, done)
			if err != nil {
				t.Error(err)
				return
			}
			x := backend.Transfer{Op: backend.Write, Cookie: uint64(i), Segments: []backend.Segment{{Length: 64}}}
			if err := s.Post(x); err != nil {
				t.Error(err)
				return
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			if err := e.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	var both sync.WaitGroup
	both.Go(func() { cross(l.a, l.b, 1, l.remote) })
	both.Go(func() { cross(l.b, l.a, 5, remote) })
	both.Wait()
}

// TestIdle leaves a connection alone for many probes: it stays, and works. Then the peer vanishes, and both ends notice
// without using it.
func TestIdle(t *testing.T) {
	l := newLink(t, verbstest.Config{}, 12, narrow("probe", "100ms", "connect_timeout", "100ms"))
	l.prepare(backend.Write)
	until(t, "probes", func() bool { return l.a.count(t, "probes") >= 3 && l.b.count(t, "probes") >= 3 })
	x := l.group(backend.Write, 0, 12)
	l.post(x)
	if c := l.done.Next(t); c.Err != nil {
		t.Fatal(c.Err)
	}
	l.fabric.Unplug("sim-a")
	wantEnd(t, l.endpoint)
	until(t, "the end of what the target served", func() bool { return len(l.fabric.QPs("sim-b")) == 0 })
	l.fabric.Plug("sim-a")
	l.connect()
	x = l.group(backend.Write, 0, 12)
	l.post(x)
	if c := l.done.Next(t); c.Err != nil {
		t.Fatal(c.Err)
	}
}

// TestClosedInitiator closes the initiator. The target gives back what it served it with.
func TestClosedInitiator(t *testing.T) {
	l := newLink(t, verbstest.Config{}, 12, narrow("probe", "100ms", "connect_timeout", "100ms"))
	if len(l.fabric.QPs("sim-b")) == 0 {
		t.Fatal("the target has no queue pair")
	}
	must(t, l.endpoint.Close())
	until(t, "the end of what the target served", func() bool { return len(l.fabric.QPs("sim-b")) == 0 })
}

// TestFence fences an initiator whose writes are on their way: none of them lands afterwards.
func TestFence(t *testing.T) {
	for range 10 {
		l := newLink(t, verbstest.Config{}, 64, map[string]string{"queue_pairs": "2"})
		l.prepare(backend.Write)
		x := l.group(backend.Write, 0, 64)
		l.post(x)
		must(t, l.b.Fence(context.Background(), l.a.self))
		frozen := bytes.Clone(l.far) // the race detector sees it if anything still lands
		c := l.done.Next(t)
		outcomes := c.Outcomes
		for i, o := range outcomes {
			if o == backend.Done && !bytes.Equal(frozen[2*piece*i:][:piece], l.near[2*piece*i:][:piece]) {
				t.Errorf("segment %d is done, and was not in place after the fence", i)
			}
		}
		if !bytes.Equal(l.far, frozen) {
			t.Error("bytes landed after the fence")
		}
	}
}

// TestEvents tells the backend of what happens to devices and queues by itself. The endpoint ends, and a new one works.
func TestEvents(t *testing.T) {
	for what, strike := range map[string]func(l *link){
		"the queue pairs fail":           func(l *link) { l.fabric.Break("sim-a", 0) },
		"the completion queues are lost": func(l *link) { l.fabric.LoseCQs("sim-a") },
		"the target's completion queue is lost, and used": func(l *link) {
			l.fabric.LoseCQs("sim-b")
			l.session.Post(l.group(backend.Write, 0, 1))
		},
		"the target's queue pairs fail, and are used": func(l *link) {
			l.fabric.Break("sim-b", 0)
			l.session.Post(l.group(backend.Write, 0, 1))
		},
	} {
		t.Run(what, func(t *testing.T) {
			l := newLink(t, verbstest.Config{}, 12, narrow())
			strike(l)
			wantEnd(t, l.endpoint)
			l.done = new(journal)
			l.again()
			l.works(backend.Write, 12)
		})
	}
}

// TestWrongProof has the target's proof damaged on its way, and the one of every other queue pair lost: the path is not
// used.
func TestWrongProof(t *testing.T) {
	for what, c := range map[string]struct {
		fault verbstest.Fault
		want  backend.Code
	}{
		"damaged":   {verbstest.Fault{Effect: verbstest.Corrupt}, backend.Integrity},
		"refused":   {verbstest.Fault{Status: device.RemoteAccess}, backend.PathDown},
		"no answer": {verbstest.Fault{Effect: verbstest.Swallow}, backend.PathDown},
	} {
		for skip := range 2 { // the second queue pair is proven, too
			t.Run(fmt.Sprint(what, skip), func(t *testing.T) {
				l := newLink(t, verbstest.Config{}, 12, nil)
				c.fault.Device, c.fault.Skip = "sim-a", skip
				c.fault.Match = func(_ string, _ uint32, wr device.WR) bool { return wr.Op == device.Read }
				trigger := l.fabric.Inject(c.fault)
				_, err := l.a.reach(l.b)
				wantCode(t, err, c.want)
				if trigger.Hits() != 1 {
					t.Errorf("the fault struck %d times", trigger.Hits())
				}
			})
		}
	}
}

// TestRefusedSetUp has each call of the set-up fail at each of its uses. Nothing is left behind, and the next attempt
// works.
func TestRefusedSetUp(t *testing.T) {
	for point, name := range map[verbstest.Point]string{
		verbstest.AtCreateCQ: "CreateCQ", verbstest.AtCreateQP: "CreateQP", verbstest.AtInit: "Init",
		verbstest.AtReadyToReceive: "ReadyToReceive", verbstest.AtReadyToSend: "ReadyToSend", verbstest.AtPost: "Post",
	} {
		for _, at := range []string{"sim-a", "sim-b"} {
			for skip := 0; ; skip++ {
				l := newLink(t, verbstest.Config{}, 4, nil)
				must(t, l.endpoint.Close())
				must(t, l.b.Fence(context.Background(), l.a.self))
				before := l.fabric.Objects()
				errno := syscall.ENOMEM
				if point == verbstest.AtReadyToReceive {
					errno = syscall.ETIMEDOUT
				}
				trigger := l.fabric.Inject(verbstest.Fault{At: point, Device: at, Skip: skip, Err: errno})
				e, err := l.a.reach(l.b)
				if trigger.Hits() == 0 {
					if err != nil {
						t.Errorf("%s on %s, %d: no fault struck, and it does not connect: %v", name, at, skip, err)
					}
					break
				}
				if err == nil {
					t.Errorf("%s on %s, use %d, failed, and it connects", name, at, skip)
					e.Close()
				} else if !errors.Is(err, errno) && at == "sim-a" {
					t.Errorf("%s on %s, use %d: the error does not say why: %v", name, at, skip, err)
				}
				must(t, l.b.Fence(context.Background(), l.a.self))
				until(t, name+" on "+at+": giving back", func() bool { return l.fabric.Objects() == before })
				until(t, "another attempt", func() bool {
					e, err = l.a.reach(l.b)
					return err == nil
				})
			}
		}
	}
}

// TestRefusedRegister has the registration of a region fail. It can be tried again.
func TestRefusedRegister(t *testing.T) {
	l := newLink(t, verbstest.Config{}, 4, nil)
	before := l.fabric.Objects()
	l.fabric.Inject(verbstest.Fault{At: verbstest.AtRegister, Err: syscall.ENOMEM})
	m := backend.Memory{Region: 9, Kind: backend.HostMemory, Bytes: make([]byte, 64), FD: -1}
	_, err := l.a.Register(context.Background(), m)
	if !errors.Is(err, syscall.ENOMEM) {
		t.Errorf("register: %v", err)
	}
	if now := l.fabric.Objects(); now != before {
		t.Errorf("open are %+v, before it were %+v", now, before)
	}
	if _, err := l.a.Register(context.Background(), m); err != nil {
		t.Error(err)
	}
}

// TestLateDuplicates has the device tell again of completions that were handled long ago: of the proofs, and of work
// requests. Nothing completes by them that is still in flight.
func TestLateDuplicates(t *testing.T) {
	l := newLink(t, verbstest.Config{}, 12, map[string]string{"signal_every": "4"})
	must(t, l.endpoint.Close())
	l.fabric.Inject(verbstest.Fault{Device: "sim-a", Effect: verbstest.Echo, Times: -1})
	l.connect()
	for range 3 {
		l.prepare(backend.Write)
		l.fabric.Pause("sim-a")
		var all []backend.Transfer
		for i := range 4 { // on every queue pair
			x := l.group(backend.Write, i, 1)
			all = append(all, x)
			l.post(x)
		}
		before := l.a.count(t, "stray_completions")
		l.fabric.Release()
		until(t, "the count of strays", func() bool { return l.a.count(t, "stray_completions") > before })
		time.Sleep(time.Millisecond)
		l.done.Empty(t)
		l.fabric.Resume("sim-a")
		for range all {
			c := l.done.Next(t)
			if c.Err != nil {
				t.Fatal(c.Err)
			}
			l.judge(all[slices.IndexFunc(all, func(x backend.Transfer) bool { return x.Cookie == c.Cookie })], c)
		}
	}
}

// works posts a group, and everything of it arrives.
func (l *link) works(op backend.Op, segments int) {
	l.t.Helper()
	l.prepare(op)
	x := l.group(op, 0, segments)
	l.post(x)
	c := l.done.Next(l.t)
	if c.Err != nil {
		l.t.Fatal(c.Err)
	}
	l.judge(x, c)
}

// again connects as soon as that is possible.
func (l *link) again() {
	l.t.Helper()
	until(l.t, "another connection", func() bool {
		var err error
		if l.endpoint, err = l.a.reach(l.b); err != nil {
			return false
		}
		l.session, err = l.endpoint.Session(context.Background(), 1, l.remote, l.done)
		return err == nil
	})
}

// TestDeviceComesBack has the device of either host fail for good, and then be there again. Regions and their keys that
// peers have go on to be good.
func TestDeviceComesBack(t *testing.T) {
	for _, name := range []string{"sim-a", "sim-b"} {
		l := newLink(t, verbstest.Config{}, 12, narrow("probe", "100ms"))
		l.works(backend.Write, 12)
		l.fabric.Fatal(name)
		wantEnd(t, l.endpoint)
		l.fabric.Repair(name)
		l.again()
		l.works(backend.Write, 12)
		l.works(backend.Read, 12)
	}
}

// TestPortComesBack takes a port down and up again.
func TestPortComesBack(t *testing.T) {
	for _, name := range []string{"sim-a", "sim-b"} {
		l := newLink(t, verbstest.Config{}, 12, narrow("probe", "100ms", "connect_timeout", "100ms"))
		l.fabric.SetPort(name, 1, false)
		wantEnd(t, l.endpoint)
		if _, err := l.a.reach(l.b); err == nil {
			t.Error("it connects through a port that is down")
		}
		l.fabric.SetPort(name, 1, true)
		l.again()
		l.works(backend.Write, 12)
	}
}

// twice are two devices for each host.
var twice = []verbstest.DeviceConfig{{Name: "sim-a0"}, {Name: "sim-a1"}, {Name: "sim-b0"}, {Name: "sim-b1"}}

// TestTwoRails uses two devices for one transfer. When one is lost, the other one goes on alone, and both once it is back.
func TestTwoRails(t *testing.T) {
	l := newLink(t, verbstest.Config{Devices: twice}, 64, map[string]string{"stripe": "4KiB", "probe": "100ms"})
	used := func() []string {
		l.t.Helper()
		l.fabric.Record()
		l.works(backend.Write, 64)
		var names []string
		for _, p := range l.fabric.Posts() {
			if slices.ContainsFunc(p.WRs, func(wr device.WR) bool { return wr.SGEs > 0 }) && !slices.Contains(names, p.Device) {
				names = append(names, p.Device)
			}
		}
		slices.Sort(names)
		return names
	}
	if got := used(); !slices.Equal(got, []string{"sim-a0", "sim-a1"}) {
		t.Errorf("carried by %q", got)
	}
	for _, lost := range []string{"sim-a0", "sim-b1"} {
		l.fabric.Fatal(lost)
		wantEnd(t, l.endpoint)
		l.again()
		if got := used(); len(got) != 1 {
			t.Errorf("without %s, carried by %q", lost, got)
		}
		l.fabric.Repair(lost)
		until(t, "the use of both devices", func() bool {
			must(t, l.endpoint.Close())
			l.again()
			return len(used()) == 2
		})
	}
}

// TestReadsAtOnce reads more than either end can have outstanding: both ends keep to the lesser of the two.
func TestReadsAtOnce(t *testing.T) {
	for _, c := range []struct{ initiated, served, want int }{{16, 4, 4}, {3, 16, 3}, {1, 1, 1}} {
		l := newLink(t, verbstest.Config{Devices: []verbstest.DeviceConfig{
			{Name: "sim-a", Attr: device.Attr{MaxReadsInitiated: c.initiated}},
			{Name: "sim-b", Attr: device.Attr{MaxReadsServed: c.served}},
		}}, 4*c.initiated, nil)
		for _, q := range l.fabric.QPs("sim-a") {
			if got := q.Send.ReadsInitiated; got != c.want {
				t.Errorf("%+v: the initiator has %d outstanding", c, got)
			}
		}
		for _, q := range l.fabric.QPs("sim-b") {
			if got := q.Receive.ReadsServed; got != c.want {
				t.Errorf("%+v: the target serves %d", c, got)
			}
		}
		l.works(backend.Read, 4*c.initiated)
	}
}

// TestOnePathUnproven has one of two paths fail its proof: the other one is the endpoint.
func TestOnePathUnproven(t *testing.T) {
	l := newLink(t, verbstest.Config{Devices: twice}, 12, nil)
	must(t, l.endpoint.Close())
	l.fabric.Inject(verbstest.Fault{Device: "sim-a1", Effect: verbstest.Corrupt})
	l.fabric.Record()
	l.connect()
	for range 8 {
		l.works(backend.Write, 12)
	}
	for _, p := range l.fabric.Posts() {
		if p.Device == "sim-a1" && p.WRs[0].Op == device.Write && p.WRs[0].SGEs > 0 {
			t.Fatal("the path without proof carries data")
		}
	}
}

// TestRegionGone deregisters the target's region under the feet of a transfer: what is on its way then fails, and nothing
// lands in the memory afterwards.
func TestRegionGone(t *testing.T) {
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		l := newLink(t, verbstest.Config{}, 12, narrow())
		l.prepare(op)
		l.fabric.Pause("sim-a")
		x := l.group(op, 0, 12)
		l.post(x)
		until(t, "posts", func() bool { return l.outstanding() == 12 })
		l.fabric.Step("sim-a", 4)
		until(t, "the first part", func() bool { return l.outstanding() == 8 })
		must(t, l.b.Deregister(context.Background(), 2))
		frozen := bytes.Clone(l.far)
		l.fabric.Resume("sim-a")
		c := l.done.Next(t)
		wantCode(t, c.Err, backend.PathDown)
		for i, o := range l.judge(x, c) {
			want := backend.NotSent
			switch {
			case i < 4:
				want = backend.Done
			case i == 4:
				want = backend.Failed
			}
			if o != want {
				t.Errorf("%v: segment %d is %v, want %v", op, i, o, want)
			}
		}
		if !bytes.Equal(l.far, frozen) {
			t.Error("bytes landed after Deregister")
		}
	}
}

// TestFenceThatFails has the device not destroy a queue pair. Then it is not certain to be quiet, and Fence says so, until
// it is.
func TestFenceThatFails(t *testing.T) {
	l := newLink(t, verbstest.Config{}, 12, nil)
	l.prepare(backend.Write)
	l.fabric.Pause("sim-a")
	x := l.group(backend.Write, 0, 12)
	l.post(x)
	for skip := range 2 {
		l.fabric.Inject(verbstest.Fault{At: verbstest.AtCloseQP, Device: "sim-b", Err: syscall.EIO, Skip: skip})
	}
	for range 2 {
		if err := l.b.Fence(context.Background(), l.a.self); !errors.Is(err, syscall.EIO) {
			t.Errorf("fence: %v", err)
		}
	}
	if err := l.b.Fence(context.Background(), l.a.self); err != nil {
		t.Errorf("another fence: %v", err)
	}
	frozen := bytes.Clone(l.far)
	l.fabric.Resume("sim-a")
	l.judge(x, l.done.Next(t))
	if !bytes.Equal(l.far, frozen) {
		t.Error("bytes landed after the fence")
	}
}

// TestQueuePairThatStays has the initiator's device first refuse to end a queue pair. The memory of what is in flight is
// not handed back before it does.
func TestQueuePairThatStays(t *testing.T) {
	l := newLink(t, verbstest.Config{}, 12, narrow())
	l.prepare(backend.Read)
	l.fabric.Pause("sim-a")
	x := l.group(backend.Read, 0, 12)
	l.post(x)
	until(t, "posts", func() bool { return l.outstanding() == 12 })
	l.fabric.Inject(verbstest.Fault{At: verbstest.AtFail, Device: "sim-a", Err: syscall.EIO, Times: -1})
	l.fabric.Inject(verbstest.Fault{At: verbstest.AtCloseQP, Device: "sim-a", Err: syscall.EIO, Times: 3})
	l.session.Cancel(x.Cookie)
	c := l.done.Next(t)
	wantCode(t, c.Err, backend.Cancelled)
	clear(l.near)
	l.fabric.Resume("sim-a")
	time.Sleep(time.Millisecond)
	if !bytes.Equal(l.near, make([]byte, len(l.near))) {
		t.Error("bytes landed after the completion")
	}
}

// TestQueueIsLostAndQueuePairStays is the same where no completions are to be had: that says nothing of what the device
// still does.
func TestQueueIsLostAndQueuePairStays(t *testing.T) {
	l := newLink(t, verbstest.Config{}, 12, narrow())
	l.prepare(backend.Read)
	l.fabric.Pause("sim-a")
	x := l.group(backend.Read, 0, 12)
	l.post(x)
	until(t, "posts", func() bool { return l.outstanding() == 12 })
	l.fabric.Inject(verbstest.Fault{At: verbstest.AtCloseQP, Device: "sim-a", Err: syscall.EIO, Times: 10})
	l.fabric.LoseCQs("sim-a")
	l.judge(x, l.done.Next(t))
	if left := l.fabric.QPs("sim-a"); len(left) != 0 {
		t.Errorf("the memory was handed back, and there are %+v", left)
	}
}

// TestMemoryThatIsNotGivenBack has the device refuse to let go of a region: Deregister says so, and can be repeated.
func TestMemoryThatIsNotGivenBack(t *testing.T) {
	l := newLink(t, verbstest.Config{}, 12, nil)
	l.fabric.Inject(verbstest.Fault{At: verbstest.AtCloseMR, Device: "sim-b", Err: syscall.EBUSY})
	if err := l.b.Deregister(context.Background(), 2); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("deregister: %v", err)
	}
	if err := l.b.Deregister(context.Background(), 2); err != nil {
		t.Errorf("another deregister: %v", err)
	}
}

// TestLocalRegionGone deregisters the initiator's region while the device does not get on with what is in flight. When
// that has returned, nothing touches the memory.
func TestLocalRegionGone(t *testing.T) {
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		l := newLink(t, verbstest.Config{}, 40, narrow())
		l.prepare(op)
		l.fabric.Pause("sim-a")
		x := l.group(op, 0, 40)
		l.post(x)
		until(t, "posts", func() bool { return l.outstanding() == 16 })
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Millisecond)
		defer cancel()
		must(t, l.a.Deregister(ctx, 1))
		frozen := bytes.Clone(l.near)
		clear(l.near)
		l.fabric.Resume("sim-a")
		copy(l.near, frozen)
		c := l.done.Next(t)
		wantCode(t, c.Err, backend.PathDown)
		l.judge(x, c)
		wantEnd(t, l.endpoint)
	}
}

// TestCloseInFlight closes the backend of either end with transfers in flight.
func TestCloseInFlight(t *testing.T) {
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		for _, initiator := range []bool{true, false} {
			l := newLink(t, verbstest.Config{}, 40, narrow())
			l.prepare(op)
			l.fabric.Pause("sim-a")
			x := l.group(op, 0, 40)
			l.post(x)
			until(t, "posts", func() bool { return l.outstanding() == 16 })
			l.fabric.Step("sim-a", 6) // a whole part and a half; another one is posted
			until(t, "more posts", func() bool { return l.outstanding() == 14 })
			end := l.a
			if !initiator {
				end = l.b
			}
			must(t, end.Close())
			if initiator && len(l.done.All(t)) != 1 {
				t.Error("Close returned before what was in flight had completed")
			}
			l.fabric.Resume("sim-a")
			c := l.done.Next(t)
			wantCode(t, c.Err, backend.PathDown)
			if got := tally(l.judge(x, c)); got[backend.Done] < 4 || got[backend.NotSent] < 16 {
				t.Errorf("%v, initiator %v: outcomes %v", op, initiator, got)
			}
			wantEnd(t, l.endpoint)
		}
	}
}

// TestTightLimits moves random groups over devices that allow little, and compares with a plain copy.
func TestTightLimits(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		tight := verbstest.DeviceConfig{
			Attr: device.Attr{
				MaxSGE:     rapid.IntRange(1, 4).Draw(rt, "SGEs"),
				MaxSGERead: rapid.IntRange(1, 4).Draw(rt, "SGEs of a read"),
				MaxMRSize:  4096 << rapid.IntRange(0, 2).Draw(rt, "bytes of a memory region"), // a page for the proof
				MaxWR:      rapid.IntRange(16, 64).Draw(rt, "send queue"),
			},
			Ports: []verbstest.PortConfig{{Port: device.Port{
				Active: true, Link: device.Ethernet, MTU: 1024, MaxMessage: rapid.Uint64Range(4096, 9000).Draw(rt, "bytes of a message"),
			}}},
			RoundUp: rapid.Bool().Draw(rt, "round up"),
		}
		devices := []verbstest.DeviceConfig{tight, tight}
		devices[0].Name, devices[1].Name = "sim-a", "sim-b"
		l := newLink(t, verbstest.Config{Devices: devices}, 64, map[string]string{
			"send_queue": "16", "signal_every": strconv.Itoa(rapid.IntRange(1, 16).Draw(rt, "signal every")),
			"sges": strconv.Itoa(rapid.IntRange(1, 8).Draw(rt, "SGEs asked for")),
		})
		for _, op := range []backend.Op{backend.Write, backend.Read} {
			l.prepare(op)
			source, destination := l.ends(op)
			want := bytes.Clone(destination)
			l.cookie++
			x := backend.Transfer{Op: op, Cookie: l.cookie}
			// The pieces of the remote end are in order. Those of the local end are, or are shuffled.
			var lengths []int
			for total := 0; total < len(l.near)/2; {
				n := rapid.OneOf(rapid.IntRange(1, 64), rapid.IntRange(1, 6000)).Draw(rt, "length")
				lengths = append(lengths, n)
				total += n
			}
			gap := rapid.SampledFrom([]int{0, 0, 3}).Draw(rt, "gap")
			places := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "order"), 0)).Perm(len(lengths))
			if rapid.Bool().Draw(rt, "in order") {
				slices.Sort(places)
			}
			starts := make([]int, len(lengths))
			at := 0
			for _, i := range places {
				starts[i] = at
				at += lengths[i]
			}
			remote := 0
			for i, n := range lengths {
				if remote+n > len(l.far) || starts[i]+n > len(l.near) {
					break
				}
				s := backend.Segment{Local: uint64(starts[i]), Remote: uint64(remote), Length: uint64(n)}
				x.Segments = append(x.Segments, s)
				if op == backend.Write {
					copy(want[s.Remote:][:n], source[s.Local:])
				} else {
					copy(want[s.Local:][:n], source[s.Remote:])
				}
				remote += n + gap
			}
			l.post(x)
			if c := l.done.Next(t); c.Err != nil {
				rt.Fatal(c.Err)
			}
			if !bytes.Equal(destination, want) {
				rt.Fatalf("%v: bytes differ", op)
			}
		}
		l.shut()
	})
}

// TestRandomFaults posts at random from several goroutines while faults of all kinds strike. Every transfer completes once, what
// completes is true, and nothing is left.
func TestRandomFaults(t *testing.T) {
	const workers, rounds, each = 4, 60, 48
	for seed := range uint64(3) {
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) {
			l := newLink(t, verbstest.Config{Retry: time.Millisecond, Devices: twice}, workers*each,
				map[string]string{"queue_pairs": "2", "send_queue": "16", "signal_every": "3", "stripe": "4KiB", "connect_timeout": "100ms"})
			var mu sync.Mutex // guards endpoint
			endpoint := l.endpoint
			// current returns an endpoint that has not failed, if there is a way to one.
			current := func() backend.Endpoint {
				mu.Lock()
				defer mu.Unlock()
				select {
				case <-endpoint.Done():
					if e, err := l.a.reach(l.b); err == nil {
						endpoint = e
					}
				default:
				}
				return endpoint
			}
			stop := make(chan struct{})
			var striker, posters sync.WaitGroup
			striker.Go(func() {
				r := rand.New(rand.NewPCG(seed, 1))
				for {
					select {
					case <-stop:
						return
					case <-time.After(time.Duration(r.IntN(10)) * time.Millisecond):
					}
					near := []string{"sim-a0", "sim-a1"}[r.IntN(2)]
					any := []string{near, "sim-b0", "sim-b1"}[r.IntN(3)]
					moment := func() { time.Sleep(time.Duration(r.IntN(2000)) * time.Microsecond) }
					switch r.IntN(11) {
					case 0:
						l.fabric.Inject(verbstest.Fault{Device: near, Landed: verbstest.Landed(r.IntN(3)), Skip: r.IntN(100),
							Status: []device.Status{device.RemoteAccess, device.LocalProtection, device.RetriesExceeded, device.FatalError}[r.IntN(4)]})
					case 1:
						l.fabric.Inject(verbstest.Fault{At: verbstest.AtPost, Device: near, Err: syscall.ENOMEM, Take: r.IntN(4), Skip: r.IntN(50)})
					case 2:
						l.fabric.Inject(verbstest.Fault{Device: near, Landed: verbstest.All, Skip: r.IntN(100),
							Effect: []verbstest.Effect{verbstest.Duplicate, verbstest.Foreign, verbstest.Echo, verbstest.Swallow}[r.IntN(4)]})
					case 3:
						l.fabric.Break(any, 0)
					case 4:
						l.fabric.Unplug(any)
						moment()
						l.fabric.Plug(any)
					case 5:
						l.fabric.Pause(near)
						moment()
						l.fabric.Resume(near)
					case 6:
						l.b.Fence(context.Background(), l.a.self)
					case 7:
						l.fabric.Inject(verbstest.Fault{Device: near, Effect: verbstest.Hold, Stray: true, Skip: r.IntN(20)})
						moment()
						l.fabric.Release()
					case 8:
						l.fabric.Fatal(any)
						moment()
						l.fabric.Repair(any)
					case 9:
						l.fabric.SetPort(any, 1, false)
						moment()
						l.fabric.SetPort(any, 1, true)
					case 10:
						l.fabric.LoseCQs(any)
					}
				}
			})
			good := make([]int, workers)
			for w := range workers {
				posters.Go(func() {
					r := rand.New(rand.NewPCG(seed, uint64(w+2)))
					done := new(journal)
					mine := &link{t: t, near: l.near, far: l.far}
					for round := 0; round < rounds; {
						s, err := current().Session(context.Background(), 1, l.remote, done)
						if err != nil {
							time.Sleep(time.Millisecond)
							continue
						}
						for ; round < rounds; round++ {
							op := []backend.Op{backend.Write, backend.Read}[r.IntN(2)]
							mine.cookie = uint64(round)
							x := mine.group(op, w*each, 1+r.IntN(each))
							source, destination := mine.ends(op)
							for _, g := range x.Segments {
								for i := range g.Length {
									source[g.Local+i] = byte(1 + r.IntN(255))
								}
								clear(destination[g.Local:][:g.Length])
							}
							if s.Post(x) != nil {
								break
							}
							if r.IntN(8) == 0 {
								s.Cancel(x.Cookie)
							}
							c := done.Next(t)
							if c.Err == nil {
								good[w]++
							}
							if op == backend.Write && slices.Contains(c.Outcomes, backend.InDoubt) {
								// Its memory is free only after a fence.
								until(t, "a fence", func() bool { return l.b.Fence(context.Background(), l.a.self) == nil })
							}
							mine.judge(x, c)
						}
						if err := s.Close(); err != nil {
							t.Error(err)
						}
					}
				})
			}
			posters.Wait()
			close(stop)
			striker.Wait()
			l.fabric.Release()
			if slices.Max(good) == 0 {
				t.Errorf("none of %d transfers succeeded", workers*rounds)
			}
		})
	}
}
