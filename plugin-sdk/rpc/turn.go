package rpc

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// turn says who receives completions from the queue. To hand one from the goroutine that receives to the one that waits
// for it takes longer than the queue does, so a poster that waits for its transfer, and for nothing else, receives: it
// leads. It may do so while it is nobody's turn, which the reader sees to when nothing is in flight and posters wait.
// While it is nobody's turn, nothing is in flight.
type turn struct {
	holder atomic.Int32 // changed with mu held
	wanted atomic.Bool  // a poster would have led
	mu     sync.Mutex
	recall chan struct{} // gives the reader its turn
}

const (
	byReader int32 = iota // the reader goroutine, or it is in recall
	byPoster
	byNobody
)

// take makes it the caller's turn, if it is nobody's.
func (t *turn) take() bool {
	if t.holder.Load() != byNobody {
		t.wanted.Store(true)
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	free := t.holder.Load() == byNobody
	if free {
		t.holder.Store(byPoster)
	}
	return free
}

// drop ends a turn. It is the reader's then, if anything is in flight.
func (t *turn) drop(flying *atomic.Int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.holder.Store(byNobody)
	if flying.Load() > 0 { // posters count first, and look for the holder then
		t.callReader()
	}
}

// attend sees to it that somebody receives what was posted.
func (t *turn) attend() {
	if t.holder.Load() != byNobody {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.holder.Load() == byNobody {
		t.callReader()
	}
}

func (t *turn) callReader() {
	t.holder.Store(byReader)
	t.recall <- struct{}{}
}

// receive is the reader goroutine. It delivers completions until the queue is closed.
func (p *queuePath) receive() {
	var buf []byte
	for {
		var err error
		if buf, err = p.receiveOne(buf, time.Time{}); err != nil {
			return
		}
		if p.client.flying.Load() > 0 || !p.turn.wanted.Swap(false) {
			continue
		}
		p.turn.drop(&p.client.flying)
		select {
		case <-p.turn.recall:
		case <-p.client.life.Done():
			return
		}
	}
}

// receiveOne delivers one completion. An error other than os.ErrDeadlineExceeded is the end, and has been seen to.
func (p *queuePath) receiveOne(buf []byte, deadline time.Time) ([]byte, error) {
	buf, err := p.completions.ReceiveUntil(buf, deadline)
	if err == nil {
		err = p.complete(buf)
	}
	if err != nil && !errors.Is(err, shm.ErrClosed) && !errors.Is(err, os.ErrDeadlineExceeded) {
		p.client.fail(err)
	}
	return buf, err
}

// lead receives for a poster whose turn it is, until its flight has completed, or for as long as it may.
func (p *queuePath) lead(s *session, cookie, serial uint64) {
	if p.client.enter() {
		defer p.client.running.Done()
		deadline := time.Now().Add(backend.MaxPostWait)
		buf := records.Get().(*[]byte)
		defer records.Put(buf)
		for s.flies(cookie, serial) {
			var err error
			if *buf, err = p.receiveOne(*buf, deadline); err != nil {
				break
			}
		}
	}
	p.turn.drop(&p.client.flying)
}
