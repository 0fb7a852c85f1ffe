package xgmi

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/samehost"
	"github.com/umbp/umbp/plugins/xgmi/shape"
)

// A self-test moves patterns between scratch at the places of a path, over a path like it, before the first session of a
// connection uses it:
//
//	initiator                                             target
//	 "fill scratch at this place with pattern 1"     →     allocates, fills, lends it
//	 reads it into scratch of its own, and compares
//	 writes pattern 2
//	 "does it have pattern 2?"                       →     compares
//
// It is done twice, with copies of one page and then with the copies that a transfer would be made of. There are machines
// where a peer's memory can be addressed and comes out as other bytes, and runtimes that have mixed up allocations: such
// a pair is not used.

// tests are the verdicts on the pairs of places of each connection of an initiator.
type tests struct {
	mu sync.Mutex
	m  map[samehost.Target]*tested
}

type pair struct{ near, far string }

// tested is what is known of one connection.
type tested struct {
	// turn has one token in it while nobody tests: the target has one scratch for each of its places.
	turn chan struct{}
	// verdicts has nil for a pair that passed. It is under tests.mu.
	verdicts map[pair]*backend.Error
}

// of returns what is known of a connection, for as long as it lives.
func (t *tests) of(target samehost.Target) *tested {
	t.mu.Lock()
	one, known := t.m[target]
	if !known {
		if t.m == nil {
			t.m = make(map[samehost.Target]*tested)
		}
		one = &tested{turn: make(chan struct{}, 1), verdicts: make(map[pair]*backend.Error)}
		one.turn <- struct{}{}
		t.m[target] = one
	}
	t.mu.Unlock()
	if !known {
		target.OnEnd(func() {
			t.mu.Lock()
			defer t.mu.Unlock()
			delete(t.m, target)
		})
	}
	return one
}

// verdict returns what is known of a pair, and whether anything is.
func (t *tests) verdict(one *tested, p pair) (failure *backend.Error, known bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	failure, known = one.verdicts[p]
	return failure, known
}

// prove returns nil when the places of a path have passed the self-test of this connection. Who comes while another test
// of the connection is under way waits for it.
func (e *engine) prove(ctx context.Context, p *path, target samehost.Target) error {
	places := pair{p.near.place(), p.far.place()}
	one := e.tests.of(target)
	failure, known := e.tests.verdict(one, places)
	if !known {
		select {
		case <-one.turn:
		case <-ctx.Done():
			return ctx.Err()
		}
		defer func() { one.turn <- struct{}{} }()
		failure, known = e.tests.verdict(one, places) // of who had the turn before
	}
	if !known {
		var err error
		if failure, err = e.test(ctx, places, &remoteEnd{target, places.far}); err != nil {
			return err // nothing is known: the next session tries again
		}
		e.tests.mu.Lock()
		one.verdicts[places] = failure
		e.tests.mu.Unlock()
	}
	if failure == nil {
		return nil
	}
	return failure
}

// farEnd is the far scratch of a self-test.
type farEnd interface {
	// fill allocates the scratch, fills it with a pattern, and returns its region.
	fill(ctx context.Context, seed uint64) (*region, error)
	check(ctx context.Context, seed uint64) (*wrongByte, error)
}

// test tests a pair of places. The failure says what is wrong with them, the error why that could not be found out.
func (e *engine) test(ctx context.Context, places pair, end farEnd) (failure *backend.Error, err error) {
	e.counts.selfTests.Add(1)
	found, err := e.exchange(ctx, places, end)
	if found == nil {
		return nil, err
	}
	e.counts.selfTestsFailed.Add(1)
	near, far := e.where(places.near), e.where(places.far)
	e.log.Error("a self-test has failed: bytes do not move unharmed between these places, which are not used together",
		"backend", name, "near", near, "far", far, "found", found.Error())
	failure = fault(backend.Unsupported, "the self-test between "+near+" and "+far+" has failed", found)
	return failure, nil
}

// where names a place for people.
func (e *engine) where(place string) string {
	if d := e.device(place); d != nil {
		return d.String()
	}
	return "host memory"
}

// exchange does what a self-test does. Found is what is wrong: bytes, or copies that fail.
func (e *engine) exchange(ctx context.Context, places pair, end farEnd) (found, err error) {
	near, err := e.newScratch(places.near)
	if err != nil {
		return nil, err
	}
	defer near.Close()
	seed := rand.Uint64()
	far, err := end.fill(ctx, seed)
	if err != nil {
		return nil, err
	}
	if far.size != scratchBytes || far.place() != places.far {
		return nil, backend.Errorf(backend.Internal, "the peer's scratch has %d bytes at %q", far.size, far.place())
	}
	way, err := e.join(near.region, far)
	if err != nil {
		return nil, err
	}
	for _, limits := range []shape.Limits{
		{PartBytes: scratchPage, PartOps: 4}, // pages, in parts
		e.limits(),
	} {
		if err := near.store(make([]byte, scratchBytes)); err != nil {
			return nil, err
		}
		if found, err := way.try(ctx, backend.Read, limits); found != nil || err != nil {
			return found, err
		}
		got, err := near.load()
		if err != nil {
			return nil, err
		}
		if w := compare(scatter(got, false), pattern(seed)); w != nil {
			return fmt.Errorf("what was read is wrong: byte %d of %d is %#x, and not %#x", w.offset, scratchBytes, w.got, w.want), nil
		}

		seed = rand.Uint64()
		if err := near.store(scatter(pattern(seed), true)); err != nil {
			return nil, err
		}
		if found, err := way.try(ctx, backend.Write, limits); found != nil || err != nil {
			return found, err
		}
		w, err := end.check(ctx, seed)
		if err != nil {
			return nil, err
		}
		if w != nil {
			return fmt.Errorf("what was written is wrong: byte %d of %d is %#x, and not %#x", w.offset, scratchBytes, w.got, w.want), nil
		}
	}
	return nil, nil
}

// testSegments are all pages of the scratch: half of them the rows of a grid, half of them one by one.
var testSegments = func() (list []backend.Segment) {
	const pages = scratchBytes / scratchPage
	for i := range uint64(pages / 2) { // to the even pages, forwards
		list = append(list, backend.Segment{Local: 2 * i * scratchPage, Remote: i * scratchPage, Length: scratchPage})
	}
	for i := uint64(pages / 2); i < pages; i++ { // to the odd ones, backwards
		list = append(list, backend.Segment{Local: (2*(pages-i) - 1) * scratchPage, Remote: i * scratchPage, Length: scratchPage})
	}
	return list
}()

// scatter returns what the near scratch has when the far one has b, or the other way round.
func scatter(b []byte, toNear bool) []byte {
	out := make([]byte, len(b))
	for _, s := range testSegments {
		if toNear {
			copy(out[s.Local:][:s.Length], b[s.Remote:])
		} else {
			copy(out[s.Remote:][:s.Length], b[s.Local:])
		}
	}
	return out
}

// try moves the segments of the self-test. It returns when nothing touches them any more. Found is the error of copies
// that failed.
func (p *path) try(ctx context.Context, op backend.Op, limits shape.Limits) (found, err error) {
	t := &trial{ctx: ctx, ended: make(chan struct{})}
	defer context.AfterFunc(ctx, p.driver.lookForStopped)()
	p.move(t, op, testSegments, limits)
	<-t.ended
	switch {
	case t.outcomes == nil:
		return nil, nil
	case t.err == nil:
		return nil, ctx.Err()
	case t.err.Code == backend.PathDown: // the device is lost: that says nothing about the pair
		t.err.Code = backend.Unsupported
		return nil, t.err
	}
	return t.err, nil
}

// trial is an order of a self-test.
type trial struct {
	ctx      context.Context
	ended    chan struct{}
	outcomes []backend.Outcome
	err      *backend.Error
}

// Stopped implements order.
func (t *trial) Stopped() bool { return t.ctx.Err() != nil }

// Finish implements order.
func (t *trial) Finish(outcomes []backend.Outcome, err *backend.Error) {
	t.outcomes, t.err = outcomes, err
	close(t.ended)
}

// remoteEnd is the far scratch at a target.
type remoteEnd struct {
	target samehost.Target
	place  string
}

func (r *remoteEnd) fill(ctx context.Context, seed uint64) (*region, error) {
	answer, err := r.target.Ask(ctx, encodeQuestion(fillQuestion, r.place, seed))
	if err != nil {
		return nil, err
	}
	id, key, err := parseFilled(answer)
	if err != nil {
		return nil, err
	}
	far, err := r.target.Open(ctx, id, key)
	if err != nil {
		return nil, err
	}
	return far.(*region), nil
}

func (r *remoteEnd) check(ctx context.Context, seed uint64) (*wrongByte, error) {
	answer, err := r.target.Ask(ctx, encodeQuestion(checkQuestion, r.place, seed))
	if err != nil {
		return nil, err
	}
	return parseChecked(answer)
}

// loans is what a target has allocated for the self-tests of its guests: one for each place and guest, until the
// guest has left.
type loans struct {
	mu sync.Mutex
	m  map[*samehost.Guest]map[string]*loan
}

type loan struct {
	*scratch
	id  backend.RegionID
	key []byte
}

func (l *loans) get(g *samehost.Guest, place string) *loan {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.m[g][place]
}

// Serve implements samehost.Mover: it is the target's part in a self-test.
func (e *engine) Serve(_ context.Context, g *samehost.Guest, question []byte) ([]byte, error) {
	kind, place, seed, err := parseQuestion(question)
	if err != nil {
		return nil, &backend.Error{Code: backend.BadRequest, Err: err}
	}
	s := e.loans.get(g, place)
	if kind == checkQuestion {
		if s == nil {
			return nil, backend.Errorf(backend.BadRequest, "no self-test has begun at %q", place)
		}
		got, err := s.load()
		if err != nil {
			return nil, err
		}
		return encodeChecked(compare(got, pattern(seed))), nil
	}
	if s == nil {
		if s, err = e.lend(g, place); err != nil {
			return nil, err
		}
	}
	if err := s.store(pattern(seed)); err != nil {
		return nil, err
	}
	return encodeFilled(s.id, s.key), nil
}

// lend allocates scratch and lends it to a guest until it has left. A guest asks one question at a time.
func (e *engine) lend(g *samehost.Guest, place string) (*loan, error) {
	own, err := e.newScratch(place)
	if err != nil {
		return nil, err
	}
	s := &loan{scratch: own}
	if s.id, s.key, err = e.instance.Lend(own.region, scratchRights); err != nil {
		own.Close()
		return nil, err
	}
	e.loans.mu.Lock()
	places := e.loans.m[g]
	first := places == nil
	if first {
		if e.loans.m == nil {
			e.loans.m = make(map[*samehost.Guest]map[string]*loan)
		}
		places = make(map[string]*loan)
		e.loans.m[g] = places
	}
	places[place] = s
	e.loans.mu.Unlock()
	if first {
		g.OnLeave(func() { e.takeBack(g) })
	}
	return s, nil
}

// takeBack frees the scratch of a guest that has left.
func (e *engine) takeBack(g *samehost.Guest) {
	e.loans.mu.Lock()
	places := e.loans.m[g]
	delete(e.loans.m, g)
	e.loans.mu.Unlock()
	for _, s := range places {
		if err := e.instance.Withdraw(context.Background(), s.id); err != nil {
			e.log.Warn("the scratch of a self-test is not given back", "backend", name, "place", s.place, "error", err)
		}
	}
}
