package tcp

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

// receivedBy returns who receives on the first lane, and how often a poster has led there.
func (e *endpoint) receivedBy() (receiver, uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.lanes[0].receiver, e.lanes[0].turns
}

// lead posts until the poster is the one that receives. It returns the request, and what is closed when PostWait
// returns. Those that came before it were reads of zeros, or writes.
func (rt *rawTarget) lead(t *testing.T, transfer backend.Transfer) (received, <-chan struct{}) {
	t.Helper()
	for {
		returned := make(chan struct{})
		go func() {
			defer close(returned)
			if err := rt.session.PostWait(transfer); err != nil {
				t.Error(err)
			}
		}()
		r := rt.readRequest(t)
		if by, _ := rt.endpoint.receivedBy(); by == byPoster {
			return r, returned
		}
		rt.answer(t, r)
		if c := rt.completions.Next(t); c.Err != nil {
			t.Fatal(c.Err)
		}
		wantClosed(t, returned, "the return of PostWait")
	}
}

// answer carries a request out, as far as the initiator sees; what it reads is zeros.
func (rt *rawTarget) answer(t *testing.T, r received) {
	t.Helper()
	if r.op == backend.Write {
		rt.reply(t, reply{id: r.id})
	} else {
		rt.reply(t, reply{id: r.id, bytes: r.total}, make([]byte, r.total)...)
	}
}

// abandonLane makes transfers until nobody receives.
func (p *pair) abandonLane(t *testing.T) {
	t.Helper()
	eventually(t, "the retreat of the reader", func() bool {
		must(t, p.session.PostWait(read(1, evenly(1, 64)...)))
		if c := p.completions.Next(t); c.Err != nil {
			t.Fatal(c.Err)
		}
		by, _ := p.endpoint.receivedBy()
		return by == byNobody
	})
}

// TestPosterReceives: of a poster that leads to the end, the transfer has completed when PostWait returns.
func TestPosterReceives(t *testing.T) {
	p := newPair(t, 4096, nil)
	fill(p.far, 7)
	eventually(t, "a turn of the poster", func() bool {
		clear(p.near)
		_, before := p.endpoint.receivedBy()
		must(t, p.session.PostWait(read(1, evenly(1, 4096)...)))
		by, turns := p.endpoint.receivedBy()
		led := by == byNobody && turns > before
		if led && len(p.completions.All(t)) != 1 {
			t.Fatalf("%d completions, want 1", len(p.completions.All(t)))
		}
		if c := p.completions.Next(t); c.Err != nil {
			t.Fatal(c.Err)
		}
		if !bytes.Equal(p.near, p.far) {
			t.Fatal("wrong bytes")
		}
		return led
	})
}

// TestPosterIsNotKept plays a target that falls silent in the middle of a reply: the poster that receives it gets away,
// and the reader receives the rest.
func TestPosterIsNotKept(t *testing.T) {
	payload := make([]byte, 4096)
	fill(payload, 3)
	value := func(id uint64) []byte { return append(appendReply(nil, reply{id: id, bytes: 4096}), payload...) }
	refusal := func(id uint64) []byte {
		return append(appendReply(nil, reply{code: backend.Denied, id: id, bytes: 4}), "no, "...)
	}
	tests := map[string]struct {
		frame func(id uint64) []byte
		cut   int // bytes of the frame that come at once
		code  backend.Code
	}{
		"before the header": {value, 0, 0},
		"in the header":     {value, replySize - 1, 0},
		"at the payload":    {value, replySize, 0},
		"in the payload":    {value, replySize + 1500, 0},
		"in a refusal":      {refusal, replySize + 3, backend.Denied},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			rt := newRawTarget(t, 4096, nil)
			for range 2 { // the second time shows that the first has left nothing behind
				r, returned := rt.lead(t, read(1, evenly(4, 4096)...))
				frame := test.frame(r.id)
				send(t, rt.conn, frame[:test.cut])
				wantClosed(t, returned, "the return of PostWait")
				rt.completions.Empty(t)
				send(t, rt.conn, frame[test.cut:])
				c := rt.completions.Next(t)
				if test.code != 0 {
					wantCode(t, c.Err, test.code)
				} else if c.Err != nil || !bytes.Equal(rt.near, payload) {
					t.Fatalf("error %v, or wrong bytes", c.Err)
				}
				wantAlive(t, rt.endpoint)
			}
		})
	}
}

// TestEndOfALentRead ends a read in every way there is while its poster receives the reply.
func TestEndOfALentRead(t *testing.T) {
	ends := map[string]func(rt *rawTarget) error{
		"cancel":   func(rt *rawTarget) error { rt.session.Cancel(1); return nil },
		"session":  func(rt *rawTarget) error { return rt.session.Close() },
		"endpoint": func(rt *rawTarget) error { return rt.endpoint.Close() },
		"backend":  func(rt *rawTarget) error { return rt.endpoint.t.Close() },
		"target":   func(rt *rawTarget) error { return rt.conn.Close() },
	}
	for name, end := range ends {
		for _, cut := range []int{0, replySize - 1, replySize + 1500} {
			t.Run(name, func(t *testing.T) {
				rt := newRawTarget(t, 4096, nil)
				r, returned := rt.lead(t, read(1, evenly(4, 4096)...))
				frame := append(appendReply(nil, reply{id: r.id, bytes: 4096}), make([]byte, 4096)...)
				send(t, rt.conn, frame[:cut])
				must(t, end(rt))
				c := rt.completions.Next(t)
				if c.Err == nil {
					t.Fatal("a read that was ended succeeded")
				}
				fill(rt.near, 9)
				want := bytes.Clone(rt.near)
				if name == "cancel" {
					send(t, rt.conn, frame[cut:])
					r, _ := rt.lead(t, write(2, evenly(1, 64)...))
					rt.answer(t, r)
					if c := rt.completions.Next(t); c.Err != nil {
						t.Fatal(c.Err)
					}
					wantAlive(t, rt.endpoint)
					eventually(t, "the end of all flights", func() bool { return rt.endpoint.freeFlights() == len(rt.endpoint.flights) })
				}
				wantClosed(t, returned, "the return of PostWait")
				if !bytes.Equal(rt.near, want) {
					t.Fatal("a read touched memory after its completion")
				}
			})
		}
	}
}

func TestEndWhileNobodyReceives(t *testing.T) {
	p := newPair(t, 64, nil)
	p.abandonLane(t)
	p.b.server.abort(func(*served) bool { return true })
	wantClosed(t, p.endpoint.Done(), "the end of the endpoint")
}

func TestFenceWhileNobodyReceives(t *testing.T) {
	p := newPair(t, 64, nil)
	p.b.settings.fenceGrace = backendtest.Patience
	for range 3 {
		p.abandonLane(t)
		mustFence(t, p.b, p.a.self)
		wantAlive(t, p.endpoint)
	}
}

// TestReaderComesBack sees the right to receive with the reader as soon as there is something for it to receive. Without
// that it would come back, too, but only at the next tick.
func TestReaderComesBack(t *testing.T) {
	wantReader := func(t *testing.T, e *endpoint) {
		t.Helper()
		if by, _ := e.receivedBy(); by != byReader {
			t.Fatalf("receiver is %d, want the reader", by)
		}
	}
	t.Run("for a plain post", func(t *testing.T) {
		p := newPair(t, 64, nil)
		for range 10 {
			p.abandonLane(t)
			must(t, p.session.Post(write(2, evenly(1, 64)...)))
			wantReader(t, p.endpoint)
			if c := p.completions.Next(t); c.Err != nil {
				t.Fatal(c.Err)
			}
		}
	})
	t.Run("for what is behind the poster's", func(t *testing.T) {
		rt := newRawTarget(t, 64, nil)
		first, returned := rt.lead(t, read(1, evenly(1, 64)...))
		must(t, rt.session.PostWait(read(2, evenly(1, 64)...)))
		second := rt.readRequest(t)
		rt.answer(t, first)
		wantClosed(t, returned, "the return of PostWait")
		wantReader(t, rt.endpoint)
		rt.answer(t, second)
		for _, c := range rt.completions.Collect(t, 2) {
			if c.Err != nil {
				t.Fatal(c.Err)
			}
		}
	})
	t.Run("after an eviction that came too late", func(t *testing.T) {
		rt := newRawTarget(t, 64, nil)
		r, returned := rt.lead(t, write(1, evenly(1, 64)...))
		rt.endpoint.mu.Lock()
		rt.endpoint.lanes[0].evicted = true
		rt.endpoint.mu.Unlock()
		rt.answer(t, r)
		wantClosed(t, returned, "the return of PostWait")
		wantReader(t, rt.endpoint)
	})
	t.Run("for what was read ahead", func(t *testing.T) {
		rt := newRawTarget(t, 64, nil)
		r, returned := rt.lead(t, write(1, evenly(1, 64)...))
		send(t, rt.conn, appendReply(appendReply(nil, reply{id: r.id}), reply{code: statusFlush, id: 5}))
		wantClosed(t, returned, "the return of PostWait")
		wantReader(t, rt.endpoint)
		got := make([]byte, requestSize)
		if rt.readFull(t, got); !bytes.Equal(got, flushFrame(5)) {
			t.Fatalf("the wish for a flush is answered with %x", got)
		}
	})
}

// TestPostersBesideEachOther has goroutines post in both ways on one endpoint, while others fence it, cancel reads, and
// make posters hand over wherever they have got to.
func TestPostersBesideEachOther(t *testing.T) {
	const rounds, most = 150, 100 << 10
	tests := map[string]struct {
		workers int
		options map[string]string
	}{
		"one":       {1, map[string]string{"connections": "1"}},
		"piecemeal": {1, map[string]string{"connections": "1", "receive_buffer": "4KiB", "send_buffer": "4KiB"}},
		"one lane":  {4, map[string]string{"connections": "1"}},
		"two lanes": {6, map[string]string{"connections": "2"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, test.workers*most, test.options)
			p.b.settings.fenceGrace = backendtest.Patience
			stop := make(chan struct{})
			var disturbers, workers sync.WaitGroup
			disturb := func(f func()) {
				disturbers.Go(func() {
					random := rand.New(rand.NewPCG(1, 2))
					for {
						select {
						case <-stop:
							return
						case <-time.After(time.Duration(random.IntN(200)) * time.Microsecond):
							f()
						}
					}
				})
			}
			disturb(func() {
				p.endpoint.mu.Lock()
				defer p.endpoint.mu.Unlock()
				for _, l := range p.endpoint.lanes {
					if l.receiver == byPoster {
						l.evict()
					}
				}
			})
			disturb(func() { mustFence(t, p.b, p.a.self) })

			for w := range test.workers {
				completions := new(sink)
				s := bind(t, p.endpoint, 1, p.remote, completions)
				var reading atomic.Uint64 // the cookie of the read under way
				// Over another lane, a write could overtake the rest of a cancelled read.
				if len(p.endpoint.lanes) == 1 {
					disturb(func() { s.Cancel(reading.Load()) })
				}
				workers.Go(func() {
					random := rand.New(rand.NewPCG(3, uint64(w)))
					near, far := p.near[w*most:][:most], p.far[w*most:][:most]
					for cookie := uint64(1); cookie < 2*rounds; cookie += 2 {
						size := 1 + random.Uint64N(most)
						if random.IntN(2) == 0 {
							size = 1 + size%4096
						}
						g := backend.Segment{Local: uint64(w * most), Remote: uint64(w * most), Length: size}
						move := func(transfer backend.Transfer) error {
							post := s.Post
							if random.IntN(4) > 0 {
								post = s.PostWait
							}
							if err := post(transfer); err != nil {
								return err
							}
							return completions.Next(t).Err
						}
						fill(near, cookie)
						if err := move(write(cookie, g)); err != nil {
							t.Error(err)
							return
						}
						// A read that was cancelled before has left its memory alone, or this finds what it stored.
						if !bytes.Equal(far[:size], near[:size]) {
							t.Errorf("a write of %d bytes brought others", size)
							return
						}
						want := slices.Clone(near[:size])
						clear(near)
						reading.Store(cookie + 1)
						err := move(read(cookie+1, g))
						switch {
						case err == nil && !bytes.Equal(near[:size], want):
							t.Errorf("a read of %d bytes brought others", size)
							return
						case err != nil && backend.CodeOf(err) != backend.Cancelled:
							t.Error(err)
							return
						}
					}
				})
			}
			workers.Wait()
			close(stop)
			disturbers.Wait()
			wantAlive(t, p.endpoint)
			if _, turns := p.endpoint.receivedBy(); turns == 0 && test.workers == 1 {
				t.Error("no poster ever received")
			}
			must(t, errors.Join(p.endpoint.Close(), p.a.Close(), p.b.Close()))
		})
	}
}
