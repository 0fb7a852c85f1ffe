package rdma

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/device"
	"github.com/umbp/umbp/plugins/rdma/verbstest"
)

// The tests in this file try the ledger alone, step by step: nobody attends to the endpoint but the test, and the queue
// pairs are lists of what was posted.

// paperQP is a queue pair on paper.
type paperQP struct {
	device.QP
	num, size int
	posted    []device.WR
	doorbells int
	answered  int
	then      func() // called within Post, when the work requests are posted
	forget    bool   // what is posted
	posting   atomic.Bool
	closed    bool
}

func (q *paperQP) Num() uint32       { return uint32(q.num) }
func (q *paperQP) Caps() device.Caps { return device.Caps{SendWRs: q.size, SGEs: 32} }

func (q *paperQP) Post(c *device.Chain) (int, error) {
	q.posting.Store(true)
	defer q.posting.Store(false)
	q.doorbells++
	if !q.forget {
		q.posted = append(q.posted, c.WRs...)
	}
	if q.then != nil {
		q.then()
	}
	return len(c.WRs), nil
}

func (q *paperQP) Fail() error { return nil }

func (q *paperQP) Close() error {
	if q.posting.Load() {
		panic("closed while it is posted to")
	}
	q.closed = true
	return nil
}

// paperCQ has the completions that the test puts into it.
type paperCQ struct {
	device.CQ
	completions []device.Completion
}

func (c *paperCQ) Entries() int { return 1 << 20 }
func (c *paperCQ) Wake()        {}
func (c *paperCQ) Close() error { return nil }

func (c *paperCQ) Poll() ([]device.Completion, error) {
	all := c.completions
	c.completions = nil
	return all, nil
}

// paper is an endpoint over queue pairs on paper.
type paper struct {
	endpoint *endpoint
	session  *session
	qps      [][]*paperQP // by path
	cqs      []*paperCQ
	done     map[uint64]backend.Completion
}

func (p *paper) Complete(c backend.Completion) {
	if _, twice := p.done[c.Cookie]; twice {
		panic(fmt.Sprintf("transfer %d completed twice", c.Cookie))
	}
	c.Outcomes = slices.Clone(c.Outcomes)
	p.done[c.Cookie] = c
}

const paperPage = 4096

func newPaper(paths, qps, size, every int, stripe uint64) *paper {
	t := &transport{lib: verbstest.New(verbstest.Config{})}
	t.settings = settings{
		sendQueue: size, queuePairs: qps, sges: 16, signalEvery: every, window: 64, stripe: stripe,
		cancelGrace: time.Hour, probe: time.Hour, drain: 0,
	}
	t.log = slog.New(slog.DiscardHandler)
	p := &paper{done: map[uint64]backend.Completion{}}
	near := &region{id: 1, size: 1 << 40, base: 1 << 50, part: 1 << 40}
	k := &remoteKey{incarnation: 1, region: 2, size: 1 << 40, rights: backend.RemoteRead | backend.RemoteWrite, base: 1 << 51, part: 1 << 40}
	var ways []*path
	near.rails = make([]atomic.Pointer[registration], paths)
	for i := range paths {
		r := &rail{index: i, name: fmt.Sprint("paper", i), attr: device.Attr{MaxSGE: 32, MaxSGERead: 32}, port: device.Port{MaxMessage: 1 << 30}}
		near.rails[i].Store(&registration{rail: r, lkeys: []uint32{uint32(10 + i)}})
		k.rails = append(k.rails, railKeys{generation: 1, rkeys: []uint32{uint32(20 + i)}})
		cq := &paperCQ{}
		way := &path{rail: r, remote: i, generation: 1, cq: cq}
		var all []*paperQP
		for j := range qps {
			q := &paperQP{num: 100*i + j + 1, size: size}
			all = append(all, q)
			way.qps = append(way.qps, q)
		}
		p.qps, p.cqs, ways = append(p.qps, all), append(p.cqs, cq), append(ways, way)
	}
	t.regions.Add(near.id, near)
	peer := backend.Peer{Node: "b", Incarnation: 1}
	p.endpoint = t.assemble(peer, ways)
	s, err := p.endpoint.Session(context.Background(), 1, backend.Remote{
		Peer: peer, Region: 2, Kind: backend.HostMemory, Rights: k.rights, Size: k.size, Key: appendKey(nil, k),
	}, p)
	if err != nil {
		panic(err)
	}
	p.session = s.(*session)
	return p
}

// apart returns a transfer of n segments, none of which can share a work request with another.
func apart(op backend.Op, cookie uint64, n int) backend.Transfer {
	x := backend.Transfer{Op: op, Cookie: cookie}
	for i := range n {
		at := (cookie<<20 + uint64(i)) * 2 * paperPage
		x.Segments = append(x.Segments, backend.Segment{Local: at, Remote: at, Length: paperPage})
	}
	return x
}

// answer completes work requests of a queue pair up to the number id, as a device that is well would.
func (p *paper) answer(path, qp int, id int) {
	q := p.qps[path][qp]
	for ; q.answered < id; q.answered++ {
		if w := q.posted[q.answered]; w.Signaled {
			p.cqs[path].completions = append(p.cqs[path].completions, device.Completion{ID: w.ID, QPN: q.Num()})
		}
	}
	p.poll()
}

func (p *paper) poll() {
	for _, k := range p.endpoint.pollers {
		if !k.polling.TryLock() {
			continue // within a Post of its own
		}
		if _, err := k.poll(); err != nil {
			panic(err)
		}
		k.polling.Unlock()
	}
}

// answerAll completes everything that is posted, and what is posted then.
func (p *paper) answerAll() {
	for more := true; more; {
		p.poll()
		more = false
		for i := range p.qps {
			for j, q := range p.qps[i] {
				if q.answered < len(q.posted) {
					p.answer(i, j, len(q.posted))
					more = true
				}
			}
		}
	}
}

// settle ends what is left as supervise does, once the queue pairs are closed.
func (p *paper) settle() {
	for _, d := range p.endpoint.settle() {
		d.deliver()
	}
}

func (p *paper) outstanding() (n int) {
	for _, all := range p.qps {
		for _, q := range all {
			n += len(q.posted) - q.answered
		}
	}
	return n
}

// TestCreditsAreExact posts and answers at random. No queue pair ever holds more than its send queue, everything is
// posted once, in its order, and completes, and what is signaled is what was promised.
func TestCreditsAreExact(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		paths := rapid.IntRange(1, 2).Draw(rt, "paths")
		qps := rapid.IntRange(1, 3).Draw(rt, "queue pairs")
		size := rapid.IntRange(1, 40).Draw(rt, "send queue")
		every := rapid.IntRange(1, 50).Draw(rt, "signal every")
		stripe := rapid.SampledFrom([]uint64{paperPage, 5 * paperPage, 1 << 30}).Draw(rt, "stripe")
		p := newPaper(paths, qps, size, every, stripe)
		var cookie uint64
		wrs := map[uint64]int{}
		check := func(*rapid.T) {
			for _, all := range p.qps {
				for _, q := range all {
					if held := len(q.posted) - q.answered; held > size {
						rt.Fatalf("queue pair %d holds %d work requests, and its send queue %d", q.num, held, size)
					}
				}
			}
			if p.endpoint.queue.first != nil && p.outstanding() == 0 && !p.endpoint.pollers[0].pumps.Load() {
				rt.Fatalf("something is queued, and nothing is outstanding that would get it moving")
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"": check,
			"post": func(rt *rapid.T) {
				cookie++
				n := rapid.IntRange(1, 3*size).Draw(rt, "work requests")
				op := rapid.SampledFrom([]backend.Op{backend.Write, backend.Read}).Draw(rt, "op")
				switch err := p.session.Post(apart(op, cookie, n)); {
				case err == nil:
					wrs[cookie] = n
				case !errors.Is(err, backend.ErrBusy) || len(wrs)-len(p.done) < p.endpoint.t.settings.window:
					rt.Fatal(err)
				}
			},
			"answer": func(rt *rapid.T) {
				i, j := rapid.IntRange(0, paths-1).Draw(rt, "path"), rapid.IntRange(0, qps-1).Draw(rt, "queue pair")
				q := p.qps[i][j]
				p.answer(i, j, rapid.IntRange(q.answered, len(q.posted)).Draw(rt, "up to"))
			},
			"stray": func(rt *rapid.T) {
				i, j := rapid.IntRange(0, paths-1).Draw(rt, "path"), rapid.IntRange(0, qps-1).Draw(rt, "queue pair")
				q := p.qps[i][j]
				last := uint64(0) // that was answered with a completion
				for _, w := range q.posted[:q.answered] {
					if w.Signaled {
						last = w.ID
					}
				}
				strays := []device.Completion{
					{ID: rapid.Uint64Range(0, last).Draw(rt, "late"), QPN: q.Num()},
					{ID: rapid.Uint64Range(0, last).Draw(rt, "late"), QPN: q.Num(), Status: device.Flushed},
					{ID: uint64(len(q.posted)) + 1, QPN: q.Num()},
					{ID: uint64(len(q.posted)), QPN: 4711},
				}
				before := p.endpoint.t.counts.strays.Load()
				p.cqs[i].completions = append(p.cqs[i].completions, strays...)
				p.poll()
				if got := p.endpoint.t.counts.strays.Load() - before; got != uint64(len(strays)) {
					rt.Fatalf("%d completions counted as strays, not %d", got, len(strays))
				}
			},
		})
		p.answerAll()
		check(rt)
		signaled, posted, parts := 0, 0, 0
		for _, n := range wrs {
			posted += n
			parts += n/p.endpoint.signalEvery + 1
		}
		seen := map[uint64]uint64{}
		for _, all := range p.qps {
			for _, q := range all {
				for i, w := range q.posted {
					if w.ID != uint64(i+1) {
						rt.Fatalf("work request %d of queue pair %d has the ID %d", i, q.num, w.ID)
					}
					if w.Signaled {
						signaled++
					}
					posted--
					seen[w.Remote]++
				}
			}
		}
		for remote, times := range seen {
			if times != 1 {
				rt.Fatalf("the page at %#x was posted %d times", remote, times)
			}
		}
		if posted != 0 || len(p.done) != len(wrs) {
			rt.Fatalf("%d work requests were not posted; %d of %d transfers completed", posted, len(p.done), len(wrs))
		}
		if p.endpoint.stripe == 0 && signaled > parts {
			rt.Fatalf("%d work requests are signaled, more than %d", signaled, parts)
		}
		for cookie, c := range p.done {
			if c.Err != nil {
				rt.Fatalf("transfer %d: %v", cookie, c.Err)
			}
		}
		for _, l := range p.endpoint.lanes {
			if l.room() != size || l.head != l.tail {
				rt.Fatalf("after everything has completed, queue pair %d has %d credits of %d", l.num, l.room(), size)
			}
		}
		if len(p.endpoint.free) != p.endpoint.t.settings.window {
			rt.Fatalf("%d records of transfers are free, not %d", len(p.endpoint.free), p.endpoint.t.settings.window)
		}
	})
}

// TestSecondPartWithoutCredit has no credit left for the second part of a large transfer while the first is in flight:
// it waits, and goes on.
func TestSecondPartWithoutCredit(t *testing.T) {
	p := newPaper(1, 1, 8, 8, 0)
	must(t, p.session.Post(apart(backend.Write, 1, 20)))
	for _, want := range []struct{ answer, posted int }{{0, 8}, {3, 8}, {4, 12}, {8, 16}, {16, 20}, {19, 20}} {
		p.answer(0, 0, want.answer)
		if got := len(p.qps[0][0].posted); got != want.posted {
			t.Fatalf("after %d answers, %d work requests are posted, not %d", want.answer, got, want.posted)
		}
		if len(p.done) != 0 {
			t.Fatalf("completed after %d answers: %+v", want.answer, p.done)
		}
	}
	p.answer(0, 0, 20)
	if c, ok := p.done[1]; !ok || c.Err != nil {
		t.Fatalf("got %+v", p.done)
	}
}

// TestCancelledMakesRoom cancels what waits for more room than there is: what waits behind it, for less, goes on.
func TestCancelledMakesRoom(t *testing.T) {
	p := newPaper(1, 1, 8, 4, 0)
	for cookie, n := range []int{7, 4, 1} {
		must(t, p.session.Post(apart(backend.Write, uint64(cookie), n)))
	}
	if n := p.outstanding(); n != 7 {
		t.Fatalf("%d work requests are posted, not 7", n)
	}
	p.session.Cancel(1)
	if c, ok := p.done[1]; !ok || outcome(c, 0) != backend.NotSent {
		t.Fatalf("what was cancelled before any of it was posted completed as %+v", p.done)
	}
	if n := p.outstanding(); n != 8 {
		t.Fatalf("%d work requests are posted, not 8", n)
	}
	p.session.Cancel(0)
	if len(p.done) != 1 {
		t.Fatal("what was cancelled completed before the device had answered")
	}
	p.answerAll()
	if len(p.done) != 3 || p.done[0].Err != nil || p.done[2].Err != nil {
		t.Fatalf("got %+v", p.done)
	}
}

// TestDoorbells sees what has waited for room share a doorbell when there is some.
func TestDoorbells(t *testing.T) {
	p := newPaper(1, 1, 16, 8, 0)
	for cookie := range uint64(16 + 10) {
		must(t, p.session.Post(apart(backend.Write, cookie, 1)))
	}
	q := p.qps[0][0]
	before := q.doorbells
	p.answer(0, 0, 16)
	if len(q.posted) != 26 || q.doorbells != before+1 {
		t.Fatalf("%d work requests were posted with %d doorbells, not 10 with one", len(q.posted)-16, q.doorbells-before)
	}
	p.answerAll()
}

// TestCompletionsWithinPost has everything complete before Post returns, so that there is always room. Post does not stay
// for ever: it leaves the rest to the poller.
func TestCompletionsWithinPost(t *testing.T) {
	p := newPaper(1, 1, 8, 4, 0)
	q := p.qps[0][0]
	q.then = func() { p.answer(0, 0, len(q.posted)) }
	must(t, p.session.Post(apart(backend.Read, 1, 1000)))
	if len(q.posted) == 1000 {
		t.Fatal("Post did not return before all was posted")
	}
	for before := 0; len(q.posted) != before; {
		before = len(q.posted)
		if p.endpoint.queue.first != nil && !p.endpoint.busy() && !p.endpoint.pollers[0].pumps.Load() {
			t.Fatal("something is queued, and nobody knows that he has to post it")
		}
		p.poll()
	}
	if c, ok := p.done[1]; !ok || c.Err != nil {
		t.Fatalf("%d of 1000 work requests were posted, and nothing completed", len(q.posted))
	}
}

// TestFailureDuringPost ends the endpoint while somebody posts. The queue pair outlives the Post.
func TestFailureDuringPost(t *testing.T) {
	p := newPaper(1, 1, 8, 4, 0)
	q, e := p.qps[0][0], p.endpoint
	entered, leave := make(chan struct{}), make(chan struct{})
	q.then = func() {
		close(entered)
		<-leave
	}
	var posting sync.WaitGroup
	posting.Go(func() {
		if err := p.session.Post(apart(backend.Write, 1, 4)); err != nil {
			t.Error(err)
		}
	})
	<-entered
	go e.supervise()
	e.fail(backend.Errorf(backend.PathDown, "broken"), true)
	time.Sleep(20 * time.Millisecond)
	close(leave)
	posting.Wait()
	wantClosed(t, e.finished, "the end of the endpoint")
	if c, ok := p.done[1]; !ok || outcome(c, 3) != backend.InDoubt || !q.closed {
		t.Fatalf("got %+v", p.done)
	}
}

// TestBytesAhead sees large transfers wait where they can be cancelled, and not with the device.
func TestBytesAhead(t *testing.T) {
	p := newPaper(1, 2, 16, 4, 0)
	large := p.endpoint.pollers[0].ahead / 3
	for i := range uint64(5) {
		at := i * 2 * large
		must(t, p.session.Post(backend.Transfer{Op: backend.Read, Cookie: i, Segments: []backend.Segment{{Local: at, Remote: at, Length: large}}}))
	}
	if n := p.outstanding(); n != 3 {
		t.Fatalf("the device has %d transfers of %d bytes, not 3", n, large)
	}
	p.session.Cancel(4)
	if c, ok := p.done[4]; !ok || outcome(c, 0) != backend.NotSent {
		t.Fatalf("after the last one was cancelled: %+v", p.done)
	}
	wantCode(t, p.done[4].Err, backend.Cancelled)
	p.answer(0, 0, 1)
	if n := p.outstanding(); n != 3 {
		t.Fatalf("after one has ended, the device has %d transfers, not 3", n)
	}
	p.answerAll()
	if len(p.done) != 5 {
		t.Fatalf("%d of 5 transfers have completed", len(p.done))
	}
	if p.endpoint.pollers[0].bytes != 0 {
		t.Fatalf("%d bytes are left in the ledger", p.endpoint.pollers[0].bytes)
	}
}

// TestSingleWorkRequestsSpread sees groups of one work request go over all queue pairs of all paths.
func TestSingleWorkRequestsSpread(t *testing.T) {
	p := newPaper(2, 3, 16, 16, 1<<20)
	for i := range 12 {
		must(t, p.session.Post(apart(backend.Write, uint64(i), 1)))
	}
	for _, all := range p.qps {
		for _, q := range all {
			if len(q.posted) != 2 {
				t.Errorf("queue pair %d got %d of 12 work requests", q.num, len(q.posted))
			}
		}
	}
}

// TestOneValueUsesAllPaths posts one contiguous segment, and sees it go over both paths in equal shares.
func TestOneValueUsesAllPaths(t *testing.T) {
	p := newPaper(2, 1, 16, 4, 1<<20)
	whole := []backend.Segment{{Length: 8 << 20}}
	must(t, p.session.Post(backend.Transfer{Op: backend.Write, Segments: whole}))
	for i, all := range p.qps {
		if n := len(all[0].posted); n != 4 {
			t.Errorf("path %d got %d of 8 stripes", i, n)
		}
	}
	p.answerAll()
	if c, ok := p.done[0]; !ok || c.Err != nil {
		t.Errorf("completed: %v, %v", ok, c.Err)
	}
}

// outcome is what a completion says of a segment.
func outcome(c backend.Completion, i int) backend.Outcome {
	if c.Err == nil {
		return backend.Done
	}
	return c.Outcomes[i]
}

// TestErrorInTheMiddle has one work request of two transfers fail, with every status, and looks at each segment. The
// lane has work requests 1 to 10: a write of 4, and a write or read of 6, of which number 7 fails; 3 more are queued.
func TestErrorInTheMiddle(t *testing.T) {
	const n, s, f, d = backend.Done, backend.NotSent, backend.Failed, backend.InDoubt
	for _, c := range []struct {
		status       device.Status
		op           backend.Op
		failed, rest backend.Outcome
		before       backend.Outcome // of numbers 5 and 6
		first        bool            // whether the first transfer succeeds
	}{
		{device.RemoteAccess, backend.Write, f, s, n, true},
		{device.RemoteInvalid, backend.Write, f, s, n, true},
		{device.RemoteOperation, backend.Write, f, s, n, true},
		{device.LocalProtection, backend.Write, d, s, n, true},
		{device.LocalLength, backend.Write, d, s, n, true},
		{device.LocalQPOperation, backend.Write, d, s, n, true},
		{device.RetriesExceeded, backend.Write, d, d, n, true},
		{device.RNRExceeded, backend.Write, d, d, n, true},
		{device.FatalError, backend.Write, d, d, d, false},
		{device.Flushed, backend.Write, d, d, d, false},
		{device.Status(99), backend.Write, d, d, d, false},
		{device.RemoteAccess, backend.Read, f, s, n, true},
		{device.LocalProtection, backend.Read, f, f, n, true},
		{device.RetriesExceeded, backend.Read, f, f, n, true},
		{device.Flushed, backend.Read, f, f, f, false},
	} {
		t.Run(fmt.Sprint(c.op, " ", c.status), func(t *testing.T) {
			p := newPaper(1, 1, 10, 5, 0)
			for _, x := range []backend.Transfer{apart(backend.Write, 1, 4), apart(c.op, 2, 6), apart(c.op, 3, 3)} {
				must(t, p.session.Post(x))
			}
			if got := len(p.qps[0][0].posted); got != 10 {
				t.Fatalf("%d work requests are posted, not 10", got)
			}
			p.cqs[0].completions = []device.Completion{{ID: 7, QPN: 1, Status: c.status, Vendor: 0x88}}
			for id := 8; id <= 10; id++ {
				p.cqs[0].completions = append(p.cqs[0].completions, device.Completion{ID: uint64(id), QPN: 1, Status: device.Flushed})
			}
			p.poll()
			if p.endpoint.busy() {
				t.Error("everything was answered, and the ledger waits for more")
			}
			wantClosed(t, p.endpoint.Done(), "the failure of the endpoint")
			if _, early := p.done[1]; early != c.first {
				t.Errorf("the first transfer completed before the end: %v, want %v", early, c.first)
			}
			p.settle()
			for i, want := range []backend.Outcome{c.before, c.before, c.failed, c.rest, c.rest, c.rest} {
				if got := outcome(p.done[2], i); got != want {
					t.Errorf("segment %d of the transfer that failed is %s, not %s", i, got, want)
				}
			}
			for i := range 3 {
				if got := outcome(p.done[3], i); got != backend.NotSent {
					t.Errorf("segment %d of what was queued is %s", i, got)
				}
			}
			wantCode(t, p.done[2].Err, backend.PathDown)
			if c.first {
				var e *backend.Error
				if p.done[1].Err != nil || !errors.As(p.done[2].Err, &e) || e.VendorText != c.status.String() ||
					e.Region != 2 || e.Offset != (2<<20+2)*2*paperPage || e.Length != paperPage {
					t.Errorf("the errors are %v and %v", p.done[1].Err, p.done[2].Err)
				}
			}
		})
	}
}
