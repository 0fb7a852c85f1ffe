package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

func windowBusy(r *rig) {
	window := r.caps().Window
	posts := min(4*window+256, 200_000)
	size := max(1, min(small, (64<<20)/posts))
	l := r.link(small)
	op := r.ops()[0]
	var completed int // guarded by the sink's lock
	count := func() int {
		l.sink.mu.Lock()
		defer l.sink.mu.Unlock()
		return completed
	}
	l.sink.then = func(*posted) {
		l.sink.mu.Lock()
		defer l.sink.mu.Unlock()
		completed++
	}

	var all []*posted
	busy := 0
	for range posts {
		p, err := l.try(op, []backend.Segment{{Length: uint64(size)}})
		switch {
		case err == nil:
			all = append(all, p)
			// A slot may be free some time before its completion is delivered, but not for as long as it likes.
			if open := len(all) - count(); open > 3*window+64 {
				r.Fatalf("%d transfers are in flight, and Capabilities.Window is %d", open, window)
			}
		case errors.Is(err, backend.ErrBusy):
			busy++
			// Before the first completion it is certain what is in flight.
			if count() == 0 && len(all) < window {
				r.Fatalf("Busy with %d transfers in flight, and Capabilities.Window is %d", len(all), window)
			}
			time.Sleep(backend.DefaultRetryAfter / 10)
		default:
			r.Fatalf("Post: %v", err)
		}
	}
	l.waitAll(all)
	for _, p := range all {
		if p.err != nil {
			r.Fatalf("a legal %s failed: %v", op, p.err)
		}
	}
	r.Logf("%d accepted, %d times Busy", len(all), busy)
	l.move(op, []backend.Segment{{Length: small}}, "after a full window")
}

// windowRoom keeps the window full: each completion posts one transfer, for which there must be room. The case itself
// posts Window transfers and no more, so that nobody else can have taken it.
func windowRoom(r *rig) {
	window := r.caps().Window
	l := r.link(small)
	op := r.ops()[0]
	segments := []backend.Segment{{Length: 64}}
	left := window + 2000 // completions to come; guarded by the sink's lock
	ended := make(chan struct{})
	var once sync.Once
	l.sink.then = func(*posted) {
		l.sink.mu.Lock()
		left--
		last, more := left == 0, left >= window
		l.sink.mu.Unlock()
		if more {
			if _, err := l.try(op, segments); err != nil {
				once.Do(func() {
					r.Errorf("Post within Complete, of a transfer that has left a full window: %v", err)
					close(ended)
				})
			}
		}
		if last {
			once.Do(func() { close(ended) })
		}
	}
	for range window {
		if _, err := l.try(op, segments); err != nil {
			r.Fatalf("Post, with fewer than %d transfers in flight: %v", window, err)
		}
	}
	r.await("the end of transfers that keep the window full", ended)
}

// neverBlocks posts within Complete for as long as there is room. A Post that waits for room there waits for itself,
// if completions come from one goroutine.
func neverBlocks(r *rig) {
	const fills = 8
	l := r.link(small)
	op := r.ops()[0]
	fill := func() {
		for range r.caps().Window + 64 {
			if _, err := l.try(op, []backend.Segment{{Length: 4096}}); err != nil {
				if !errors.Is(err, backend.ErrBusy) {
					r.Errorf("Post until there is no more room: %v", err)
				}
				return
			}
		}
	}
	filled := make(chan struct{})
	var begun, ended atomic.Int64
	l.sink.then = func(*posted) {
		if begun.Add(1) > fills {
			return
		}
		fill()
		if ended.Add(1) == fills {
			close(filled)
		}
	}
	fill()
	r.await("completions, within which transfers are posted until there is no more room", filled)
	l.closeSession()
}

func completeOnce(r *rig) {
	for _, op := range r.ops() {
		l := r.link(small)
		var all []*posted
		for range 500 {
			all = append(all, l.post(op, []backend.Segment{{Length: 64}, {Local: 128, Remote: 100, Length: 64}}))
		}
		l.waitAll(all)
		time.Sleep(settle)
		l.closeSession()
	}
}

// completeCookies uses numbers that some width of integer cannot hold, the same ones on two sessions of an endpoint,
// and uses them again when they have come back.
func completeCookies(r *rig) {
	one := r.link(small)
	two := r.session(r.endpoint, one.near, one.far)
	for range 2 {
		var all []*posted
		for _, cookie := range []uint64{0, 1, 1 << 32, 1 << 63, math.MaxUint64} {
			for _, l := range []*link{one, two} {
				l.sink.lastCookie = cookie - 1
				all = append(all, l.post(r.ops()[0], []backend.Segment{{Length: 64}}))
			}
		}
		for _, p := range all {
			one.wait(p)
			if p.err != nil {
				r.Errorf("a legal transfer with cookie %d failed: %v", p.Cookie, p.err)
			}
		}
	}
}

func completePostInside(r *rig) {
	l := r.link(small)
	op := r.ops()[0]
	const chain = 300
	ended := make(chan struct{})
	var once sync.Once
	left := chain
	l.sink.then = func(p *posted) { // one at a time: each completion posts the next transfer
		l.Cancel(p.Cookie) // completed: ignored
		if left--; left == 0 {
			once.Do(func() { close(ended) })
			return
		}
		if _, err := l.try(op, []backend.Segment{{Length: 64}}); err != nil {
			r.Errorf("Post within Complete: %v", err)
			once.Do(func() { close(ended) })
		}
	}
	l.post(op, []backend.Segment{{Length: 64}})
	r.await(fmt.Sprintf("the end of %d transfers, each posted within the completion before", chain), ended)
}

func concurrentSessions(r *rig) {
	one, two := r.link(small), r.link(small)
	r.hammers([]*link{one, one, two, two}, 30)
}

// hammers moves random segments over several links at once, each in a part of its own of their regions.
func (r *rig) hammers(links []*link, rounds int) {
	part := uint64(small / len(links))
	faults := make(chan string, len(links))
	used := map[*area]uint64{}
	var wg sync.WaitGroup
	for i, l := range links {
		shift := used[l.near] * part
		used[l.near]++
		wg.Go(func() {
			if fault := hammer(l, shift, part, rounds, rand.New(rand.NewPCG(uint64(i), 1))); fault != "" {
				faults <- fault
			}
		})
	}
	r.guard("transfers beside each other", wg.Wait)
	close(faults)
	for fault := range faults {
		r.Errorf("%s", fault)
	}
}

// hammer moves random segments within one part of a link's regions and compares what arrives. It runs beside
// others, and returns what went wrong.
func hammer(l *link, shift, part uint64, rounds int, rng *rand.Rand) string {
	r := l.r
	most := r.caps().Limits.Tighten(backend.Limits{Segments: 50}).Segments
	for round := range rounds {
		op := r.ops()[round%len(r.ops())]
		segments := scatter(rng, part, 1+rng.IntN(most))
		for i := range segments {
			segments[i].Local += shift
			segments[i].Remote += shift
		}
		p, err := l.try(op, segments)
		for errors.Is(err, backend.ErrBusy) {
			time.Sleep(backend.DefaultRetryAfter / 10)
			p, err = l.try(op, segments)
		}
		if err != nil {
			return fmt.Sprintf("Post of a legal %s: %v", op, err)
		}
		<-p.done // bounded by the guard around all workers
		if p.err != nil {
			return fmt.Sprintf("a legal %s failed: %v", op, p.err)
		}
		if r.h.NearEndOnly {
			continue
		}
		for _, s := range segments {
			if !bytes.Equal(l.near.at(s.Local, s.Length), l.far.at(s.Remote, s.Length)) {
				return fmt.Sprintf("a %s beside others brought wrong bytes", op)
			}
		}
	}
	return ""
}

// concurrentCalls sets up and tears down connections, regions and sessions in both directions at once.
func concurrentCalls(r *rig) {
	const workers, rounds = 4, 6
	faults := make(chan string, workers)
	var wg sync.WaitGroup
	for w := range workers {
		near, far := r.initiator.lend(small, 0), r.target.lend(small, allRights)
		if w%2 == 1 && !r.h.NearEndOnly && r.claims(far, near) {
			near, far = far, near
			near.remote.Rights, far.remote.Rights = far.remote.Rights, near.remote.Rights
		}
		wg.Go(func() {
			for round := range rounds {
				if fault := r.cycle(near, far, uint64(w*rounds+round)); fault != "" {
					faults <- fault
					return
				}
				near.remote.Region += 1000 // ids are never used twice
				far.remote.Region += 1000
			}
		})
	}
	r.guard("connections beside each other", wg.Wait)
	close(faults)
	for fault := range faults {
		r.Errorf("%s", fault)
	}
}

// cycle is the life of a connection, from Register to Deregister. It runs beside others, and returns what went wrong.
func (r *rig) cycle(near, far *area, seed uint64) string {
	fault := func(what string, err error) string {
		return fmt.Sprintf("%s of %s beside others: %v", what, near.node.peer, err)
	}
	for _, a := range []*area{near, far} {
		if err := a.tryRegister(); err != nil {
			return fault("Register", err)
		}
	}
	endpoint, err := r.tryConnect(near.node, far.node, far.node.peer)
	if err != nil {
		return fault("a connection", err)
	}
	l, err := r.trySession(endpoint, near, far, far.remote)
	if err != nil {
		return fault("Session", err)
	}
	if text := hammer(l, 0, small, 3, rand.New(rand.NewPCG(seed, 2))); text != "" {
		return text
	}
	ctx, cancel := r.timeout()
	defer cancel()
	for _, end := range []struct {
		what string
		call func() error
	}{
		{"Session.Close", l.Close},
		{"Deregister", func() error { return near.node.backend.Deregister(ctx, near.remote.Region) }},
		{"Deregister at the target", func() error { return far.node.backend.Deregister(ctx, far.remote.Region) }},
		{"Endpoint.Close", endpoint.Close},
	} {
		if err := end.call(); err != nil {
			return fault(end.what, err)
		}
	}
	return ""
}

func cancelUnknown(r *rig) {
	l := r.link(small)
	l.Cancel(12345)
	for _, op := range r.ops() {
		l.move(op, []backend.Segment{{Length: small}}, "after Cancel of an unknown cookie")
	}
	l.Cancel(1) // completed
	l.move(r.ops()[0], []backend.Segment{{Length: small}}, "after Cancel of a completed transfer")
}

func cancelRace(r *rig) {
	for _, op := range r.ops() {
		for range 10 {
			l := r.session(r.connect(r.initiator, r.target), r.initiator.area(small, 0), r.target.area(small, allRights))
			all := l.stress(op, 6)
			var wg sync.WaitGroup
			for range 2 {
				wg.Go(func() {
					for _, p := range all {
						l.Cancel(p.Cookie)
					}
				})
			}
			r.guard("Cancel", wg.Wait)
			l.waitAll(all)
			l.closeSession()
		}
	}
}

func cancelEarly(r *rig) {
	const (
		rounds = 30
		enough = 10 // a few rounds may all have come too late, where a transfer is over as soon as it is posted
	)
	for _, op := range r.ops() {
		near, far := r.initiator.area(large, 0), r.target.area(large, allRights)
		tried := 0
		for range rounds {
			l := r.session(r.connect(r.initiator, r.target), near, far)
			all := l.stress(op, 4)
			open := 0
			for i := range all {
				p := all[len(all)-1-i] // the last first: it has furthest to go
				if !p.completed() {
					open++
				}
				l.Cancel(p.Cookie)
			}
			l.waitAll(all)
			l.closeSession()
			for _, p := range all {
				if p.err != nil {
					r.identity("the completion of a cancelled "+op.String(), p.err, backend.Cancelled, backend.PathDown)
					tried = rounds + 1
				}
			}
			if tried > rounds {
				break
			}
			if open > 1 { // one that is open may be as good as through
				tried++
			}
		}
		if tried >= enough && tried <= rounds {
			r.Errorf("in %d rounds of cancelling several transfers of %d bytes in flight, each was carried out in full", tried, large)
		}
	}
}

// cancelQuiet overwrites the initiator's memory as soon as a cancelled transfer has completed. A read must not
// touch it any more; and what a write still stores at the target must not be what is there now.
func cancelQuiet(r *rig) {
	for _, op := range r.ops() {
		near, far := r.initiator.area(large, 0), r.target.area(large, allRights)
		for round := range 4 {
			l := r.session(r.connect(r.initiator, r.target), near, far)
			l.interrupt(op, time.Duration(round%2*round)*100*time.Microsecond, func(p *posted) { l.Cancel(p.Cookie) }, r.fence)
			l.closeSession()
		}
	}
}

// interrupt ends a transfer before its time, and compares what its completion says with the memory of both ends.
func (l *link) interrupt(op backend.Op, after time.Duration, end func(*posted), fence func()) {
	r := l.r
	near, far := l.near.refill(), l.far.refill()
	p := l.post(op, cut64(l.near.size))
	time.Sleep(after)
	end(p)
	l.wait(p)
	if op == backend.Read {
		l.verify(p, near, far, "a read that was ended early")
	}
	nearAfter := l.near.refill()
	time.Sleep(settle)
	l.near.unchanged(nearAfter, "a "+op.String()+" that was ended early touched memory after its completion")
	if op == backend.Write {
		fence()
		mixed(r, p, near, far, l.far)
	}
}

// mixed checks the target of a write that was ended early and is fenced: each byte is the old one or the new one,
// and in segments whose outcome is certain it is the one that the outcome says.
func mixed(r *rig, p *posted, source, before []byte, far *area) {
	for i, s := range p.Segments {
		was, sent, is := before[margin+s.Remote:][:s.Length], source[margin+s.Local:][:s.Length], far.at(s.Remote, s.Length)
		switch p.outcome(i) {
		case backend.Done:
			if !bytes.Equal(is, sent) {
				r.Fatalf("segment %d of a write that was ended early is Done, and its bytes are not those that were to be written", i)
			}
			continue
		case backend.NotSent:
			if !bytes.Equal(is, was) {
				r.Fatalf("segment %d of a write that was ended early is NotSent, and the target has changed", i)
			}
			continue
		}
		if bytes.Equal(is, sent) || bytes.Equal(is, was) {
			continue
		}
		for k := range is {
			if is[k] != was[k] && is[k] != sent[k] {
				r.Fatalf("segment %d of a write that was ended early brought bytes that the initiator's memory got after the completion", i)
			}
		}
	}
}
