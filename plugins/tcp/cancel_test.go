package tcp

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// freeFlights counts the places in the window.
func (e *endpoint) freeFlights() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.free)
}

// TestCancelReadBeforeItsReply: the read completes at once, and what the target answers later goes nowhere.
func TestCancelReadBeforeItsReply(t *testing.T) {
	for name, answer := range map[string]func(t *testing.T, rt *rawTarget, id uint64){
		"payload": func(t *testing.T, rt *rawTarget, id uint64) {
			rt.reply(t, reply{id: id, bytes: 4096}, bytes.Repeat([]byte{1}, 4096)...)
		},
		"refusal": func(t *testing.T, rt *rawTarget, id uint64) {
			rt.reply(t, reply{code: backend.Denied, id: id, bytes: 2}, []byte("no")...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			rt := newRawTarget(t, 4096, map[string]string{"window": "2"})
			for _, transfer := range []backend.Transfer{read(1, evenly(4, 4096)...), write(2, evenly(1, 64)...)} {
				must(t, rt.session.Post(transfer))
			}
			first, second := rt.readRequest(t), rt.readRequest(t)
			for range 2 {
				rt.session.Cancel(1)
			}
			c := rt.completions.Next(t)
			fill(rt.near, 3)
			want := bytes.Clone(rt.near)
			wantCode(t, c.Err, backend.Cancelled)
			wantAll(t, c.Outcomes, 4, backend.Failed)
			if err := rt.session.Post(write(3, evenly(1, 64)...)); !errors.Is(err, backend.ErrBusy) {
				t.Fatalf("posting while the reply is to come: got %v, want busy", err)
			}
			answer(t, rt, first.id)
			rt.reply(t, reply{id: second.id})
			if c := rt.completions.Next(t); c.Cookie != 2 || c.Err != nil {
				t.Fatalf("the neighbour ended with %+v", c)
			}
			if !bytes.Equal(rt.near, want) {
				t.Fatal("a cancelled read touched memory after its completion")
			}
			rt.completions.Empty(t)
			wantAlive(t, rt.endpoint)
			if n := rt.endpoint.freeFlights(); n != 2 {
				t.Fatalf("%d places are free, want 2", n)
			}
		})
	}
}

func TestCancelReadInTheMiddleOfItsReply(t *testing.T) {
	rt := newRawTarget(t, 2*4096, nil)
	for _, transfer := range []backend.Transfer{read(1, evenly(4, 4096)...), read(2, backend.Segment{Local: 4096, Length: 64})} {
		must(t, rt.session.Post(transfer))
	}
	first, second := rt.readRequest(t), rt.readRequest(t)
	rt.reply(t, reply{id: first.id, bytes: 4096}, make([]byte, 1500)...)
	eventually(t, "the arrival of the first bytes", func() bool { return rt.endpoint.lanes[0].stream.progress.Load() >= 4 })
	for range 2 {
		rt.session.Cancel(1)
	}
	c := rt.completions.Next(t)
	fill(rt.near[:4096], 3)
	want := bytes.Clone(rt.near[:4096])
	wantCode(t, c.Err, backend.Cancelled)
	if outcomes := []backend.Outcome{backend.Done, backend.Failed, backend.Failed, backend.Failed}; !slices.Equal(c.Outcomes, outcomes) {
		t.Fatalf("outcomes are %v, want %v", c.Outcomes, outcomes)
	}
	if _, err := rt.conn.Write(make([]byte, 4096-1500)); err != nil {
		t.Fatal(err)
	}
	rt.reply(t, reply{id: second.id, bytes: 64}, bytes.Repeat([]byte{9}, 64)...)
	if c := rt.completions.Next(t); c.Cookie != 2 || c.Err != nil {
		t.Fatalf("the neighbour ended with %+v", c)
	}
	if !bytes.Equal(rt.near[:4096], want) {
		t.Fatal("a cancelled read touched memory after its completion")
	}
	if !bytes.Equal(rt.near[4096:][:64], bytes.Repeat([]byte{9}, 64)) {
		t.Fatal("the neighbour did not get its bytes")
	}
	wantAlive(t, rt.endpoint)
}

// TestCancelledReadThatStalls: the target never sends the rest, so the endpoint is given up in the end.
func TestCancelledReadThatStalls(t *testing.T) {
	rt := newRawTarget(t, 64, map[string]string{"io_timeout": "100ms"})
	must(t, rt.session.Post(read(1, evenly(1, 64)...)))
	rt.session.Cancel(1)
	wantCode(t, rt.completions.Next(t).Err, backend.Cancelled)
	wantClosed(t, rt.endpoint.Done(), "the end of the endpoint")
	must(t, rt.endpoint.Close())
	rt.completions.Empty(t)
}

// TestCancelledReadsLeaveTheirNeighboursAlone cancels every other read, wherever it has got to. What is cancelled
// must not touch its memory any more, not even while the rest of it arrives; what is not, succeeds.
func TestCancelledReadsLeaveTheirNeighboursAlone(t *testing.T) {
	authority := newAuthority(t)
	for name, credentials := range map[string]func(string) func(*backend.Config){
		"plain": func(string) func(*backend.Config) { return nil },
		"TLS":   func(node string) func(*backend.Config) { return authority.credentials(node, authority) },
	} {
		t.Run(name, func(t *testing.T) {
			const reads, each, rounds = 6, 512 << 10, 15
			a := node(t, "a", config{change: credentials("a")})
			b := node(t, "b", config{change: credentials("b")})
			near, far := make([]byte, reads*each), make([]byte, reads*each)
			a.lend(t, 1, near, 0)
			e := connect(t, a, b)
			completions := new(sink)
			s := bind(t, e, 1, b.lend(t, 1, far, everything), completions)
			fill(far, 1)
			for round := range rounds {
				clear(near)
				want := bytes.Clone(far)
				for i, g := range evenly(reads, len(far)) {
					must(t, s.Post(read(uint64(i), g)))
				}
				start := e.lanes[0].stream.progress.Load()
				eventually(t, "progress", func() bool {
					return e.lanes[0].stream.progress.Load() >= start+uint64(round) || len(completions.All(t)) == reads
				})
				for i := 0; i < reads; i += 2 {
					s.Cancel(uint64(i))
				}
				for range reads {
					c := completions.Next(t)
					if c.Err == nil {
						continue
					}
					if c.Cookie%2 != 0 {
						t.Fatalf("the neighbour %d ended with %v", c.Cookie, c.Err)
					}
					wantCode(t, c.Err, backend.Cancelled)
					at := c.Cookie * each
					for _, b := range [][]byte{near, want} { // the memory is ours again
						copy(b[at:], bytes.Repeat([]byte(fmt.Sprint(round)), each)[:each])
					}
				}
				eventually(t, "the end of the replies", func() bool { return e.freeFlights() == len(e.flights) })
				if !bytes.Equal(near, want) {
					t.Fatal("memory does not hold what was read last, or was put there last")
				}
			}
			wantAlive(t, e)
			must(t, s.Close())
		})
	}
}
