package tcp

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// ledger has a channel for each cookie, with room for the completions that should not come too.
type ledger []chan struct{}

func (l ledger) Complete(c backend.Completion) { l[c.Cookie] <- struct{}{} }

// TestEveryTransferCompletesOnce ends endpoints in every way there is, while others post and cancel.
func TestEveryTransferCompletesOnce(t *testing.T) {
	const posters, each = 4, 60
	ends := map[string]func(p *pair, s *session) error{
		"session":    func(_ *pair, s *session) error { return s.Close() },
		"endpoint":   func(p *pair, _ *session) error { return p.endpoint.Close() },
		"initiator":  func(p *pair, _ *session) error { return p.a.Close() },
		"target":     func(p *pair, _ *session) error { return p.b.Close() },
		"fence":      func(p *pair, _ *session) error { return p.b.Fence(context.Background(), p.a.self) },
		"near":       func(p *pair, _ *session) error { return p.a.Deregister(context.Background(), 1) },
		"far":        func(p *pair, _ *session) error { return p.b.Deregister(context.Background(), 2) },
		"connection": func(p *pair, _ *session) error { p.endpoint.lanes[0].stream.abort(); return nil },
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			for round := range 4 {
				p := newPair(t, 2*posters*64<<10, map[string]string{"window": "3"})
				l := make(ledger, posters*each)
				accepted := make([]bool, len(l))
				for i := range l {
					l[i] = make(chan struct{}, 4)
				}
				s := bind(t, p.endpoint, 1, p.remote, l)
				var wg sync.WaitGroup
				for w := range posters {
					wg.Go(func() {
						random := rand.New(rand.NewPCG(uint64(round), uint64(w)))
						endAt := -1
						if w == 0 {
							endAt = random.IntN(each)
						}
						for i := range each {
							if i == endAt {
								if err := end(p, s); err != nil {
									t.Error(err)
								}
							}
							cookie, at := uint64(w*each+i), uint64(w)*64<<10
							transfer := write(cookie, backend.Segment{Local: at, Remote: at, Length: 1 + random.Uint64N(64<<10)})
							if random.IntN(2) == 0 {
								transfer.Op = backend.Read // of memory that nobody writes: see the package comment on cancelling
								transfer.Segments[0].Remote += posters * 64 << 10
							}
							post := s.Post
							if random.IntN(2) == 0 {
								post = s.PostWait
							}
							err := post(transfer)
							if accepted[cookie] = err == nil; err != nil {
								continue
							}
							if random.IntN(100) == 0 {
								s.Cancel(cookie)
							}
							<-l[cookie] // the transfers of one poster share memory: one ends before the next begins
						}
					})
				}
				wg.Wait()
				must(t, errors.Join(s.Close(), p.a.Close(), p.b.Close()))
				for cookie := range l {
					if len(l[cookie]) != 0 {
						t.Fatalf("transfer %d, accepted %v, completed %d times too often", cookie, accepted[cookie], len(l[cookie]))
					}
				}
			}
		})
	}
}
