package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
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

func completePostInside(r *rig) {
	l := r.link(small)
	op := r.ops()[0]
	const chain = 300
	ended := make(chan struct{})
	var once sync.Once
	left := chain
	l.sink.then = func(*posted) { // one at a time: each completion posts the next transfer
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

func sessionsConcurrent(r *rig) {
	const workers, rounds, part = 4, 30, small / 2
	type job struct {
		l     *link
		shift uint64
		seed  uint64
	}
	var jobs []job
	for w := range workers / 2 {
		l := r.link(small) // two workers share a session, each with one half of the regions
		jobs = append(jobs, job{l, 0, uint64(w)}, job{l, part, uint64(w) + 100})
	}
	faults := make(chan string, workers)
	var wg sync.WaitGroup
	for _, j := range jobs {
		wg.Go(func() {
			if fault := hammer(j.l, j.shift, part, rounds, rand.New(rand.NewPCG(j.seed, 1))); fault != "" {
				faults <- fault
			}
		})
	}
	r.guard("concurrent sessions", wg.Wait)
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
			if !bytes.Equal(l.near.bytes[s.Local:][:s.Length], l.far.bytes[s.Remote:][:s.Length]) {
				return fmt.Sprintf("a %s beside others brought wrong bytes", op)
			}
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
	const rounds = 30
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
		if tried > 0 && tried <= rounds {
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
			nearBefore, farBefore := near.refill(), far.refill()
			p := l.post(op, cut64(large))
			if round%2 == 1 {
				time.Sleep(time.Duration(round) * 100 * time.Microsecond)
			}
			l.Cancel(p.Cookie)
			l.wait(p)
			if op == backend.Read {
				l.verify(p, nearBefore, farBefore, "a cancelled read")
			}
			nearAfter := near.refill()
			time.Sleep(settle)
			near.unchanged(nearAfter, "a cancelled "+op.String()+" touched memory after its completion")
			if op == backend.Write {
				r.fence()
				mixed(r, p, nearBefore, farBefore, far)
			}
			l.closeSession()
		}
	}
}

// mixed checks the target of a write that was cancelled and is fenced: each byte is the old one or the new one,
// and in segments whose outcome is certain it is the one that the outcome says.
func mixed(r *rig, p *posted, source, before []byte, far *area) {
	r.Helper()
	for i, s := range p.Segments {
		was, sent, is := before[margin+s.Remote:][:s.Length], source[margin+s.Local:][:s.Length], far.bytes[s.Remote:][:s.Length]
		switch p.outcome(i) {
		case backend.Done:
			if !bytes.Equal(is, sent) {
				r.Fatalf("segment %d of a cancelled write is Done, and its bytes are not those that were to be written", i)
			}
			continue
		case backend.NotSent:
			if !bytes.Equal(is, was) {
				r.Fatalf("segment %d of a cancelled write is NotSent, and the target has changed", i)
			}
			continue
		}
		if bytes.Equal(is, sent) || bytes.Equal(is, was) {
			continue
		}
		for k := range is {
			if is[k] != was[k] && is[k] != sent[k] {
				r.Fatalf("segment %d of a cancelled write brought bytes that the initiator's memory got after the completion", i)
			}
		}
	}
}
