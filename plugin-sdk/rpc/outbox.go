package rpc

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/plugin-sdk/shm"
)

// sender sends records that must arrive. Those for which there is no room wait, in order; whoever uses it bounds
// their number.
type sender struct {
	queue   *shm.Queue
	fail    func(error)  // is told when the queue is corrupt
	waiting atomic.Int64 // records in backlog

	mu      sync.Mutex
	backlog []waitingRecord
	retry   *time.Timer
	closed  bool
}

type waitingRecord struct {
	record []byte
	sent   func()
}

// retryInterval is how long a sender waits for room.
const retryInterval = time.Millisecond

// send sends the record, or keeps a copy to do so later. Then it calls sent, if it is not nil.
func (s *sender) send(record []byte, sent func()) {
	if s.waiting.Load() == 0 && s.try(record, sent) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.backlog = append(s.backlog, waitingRecord{append([]byte(nil), record...), sent})
	if s.waiting.Add(1) == 1 {
		s.retry = time.AfterFunc(retryInterval, s.flush)
	}
}

// try tells whether nothing is left to be done about the record.
func (s *sender) try(record []byte, sent func()) bool {
	_, err := s.queue.Send(record)
	if errors.Is(err, shm.ErrFull) {
		return false
	}
	if err != nil && !errors.Is(err, shm.ErrClosed) {
		s.fail(err)
	}
	if sent != nil {
		sent()
	}
	return true
}

// flush sends what waits, as far as there is room.
func (s *sender) flush() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.backlog) > 0 && !s.closed {
		if first := s.backlog[0]; !s.try(first.record, first.sent) {
			s.retry.Reset(retryInterval)
			return
		}
		s.backlog = s.backlog[1:]
		s.waiting.Add(-1)
	}
}

func (s *sender) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.backlog = nil
	if s.retry != nil {
		s.retry.Stop()
	}
}

// outbox holds messages that wait to be sent, in order. Positions count them, from one.
type outbox[F any] struct {
	mu     sync.Mutex
	queued []queuedFrame[F]
	size   int    // of those queued
	added  uint64 // position of the last one added
	sent   uint64 // position of the last one that was given to send
	wake   chan struct{}
}

type queuedFrame[F any] struct {
	frame F
	size  int
}

// add appends a message of the given size and returns its position, or zero when the messages of a size that wait
// would have more than limit together. A message without a size always has room.
func (o *outbox[F]) add(frame F, size, limit int) (position uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if size > 0 && o.size > 0 && o.size+size > limit {
		return 0
	}
	o.queued = append(o.queued, queuedFrame[F]{frame, size})
	o.size += size
	o.added++
	select {
	case o.signal() <- struct{}{}:
	default:
	}
	return o.added
}

// signal returns the channel that tells run of new messages. The caller holds mu.
func (o *outbox[F]) signal() chan struct{} {
	if o.wake == nil {
		o.wake = make(chan struct{}, 1)
	}
	return o.wake
}

// next takes the first message. Without one it returns the channel to wait on.
func (o *outbox[F]) next() (frame F, ok bool, wake <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.queued) == 0 {
		return frame, false, o.signal()
	}
	first := o.queued[0]
	o.queued[0] = queuedFrame[F]{}
	if o.queued = o.queued[1:]; len(o.queued) == 0 {
		o.queued = nil
	}
	o.size -= first.size
	o.sent++
	return first.frame, true, nil
}

// taken tells whether the message at a position was given to send.
func (o *outbox[F]) taken(position uint64) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return position <= o.sent
}

// run sends messages until ctx ends or sending fails.
func (o *outbox[F]) run(ctx context.Context, send func(F) error) error {
	for {
		frame, ok, wake := o.next()
		if ok {
			if err := send(frame); err != nil {
				return err
			}
			continue
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
