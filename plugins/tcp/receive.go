package tcp

import (
	"errors"
	"os"
	"strconv"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// receiver says who holds the right to receive on a lane. Handing a reply from one goroutine to another takes about as
// long as the reply itself, so a poster that waits for it, and for nothing else, receives it: it leads. It may do so
// while nobody holds the right, which the reader gives up when it sees that posters wait.
type receiver uint8

const (
	byReader receiver = iota // the reader goroutine, or it is in recall
	byPoster                 // the poster of the one flight that was awaited when it took the right
	byNobody                 // nothing is awaited
)

// leadTick is how often the reader looks at a lane that it does not receive on. A poster that still leads at the
// second look, or nobody who has led since the first, loses the right to receive.
const leadTick = backend.MaxPostWait / 2

// enlist sees to it that somebody receives the reply to a flight that is submitted, and tells whether it is the poster
// who has to. The caller holds e.mu.
func (l *lane) enlist(f *flight) (leads bool) {
	switch {
	case l.receiver != byNobody:
		return false
	case f.alone:
		l.receiver = byPoster
		l.turns++
		return true
	}
	l.receiver = byReader
	l.recall <- struct{}{}
	return false
}

// read is the reader goroutine. It never waits for a writer, so that a target that is blocked in sending gets on,
// and reads again.
func (l *lane) read() {
	tick := time.NewTimer(leadTick)
	defer tick.Stop()
	for {
		gone, err := l.readReply()
		if err != nil {
			l.e.fail(err)
			return
		}
		if gone && !l.standBy(tick) {
			return
		}
	}
}

// standBy waits for the right to receive, and takes it where it is not used. It reports false when the endpoint has
// failed.
func (l *lane) standBy(tick *time.Timer) bool {
	var seen uint64
	for {
		tick.Reset(leadTick)
		select {
		case <-l.e.done:
			return false
		case <-l.recall:
			return true
		case <-tick.C:
		}
		l.e.mu.Lock()
		unused := l.turns == seen
		seen = l.turns
		switch {
		case unused && l.receiver == byNobody:
			l.receiver = byReader // to notice the end of the connection, and wishes for a flush
			l.e.mu.Unlock()
			return true
		case unused && l.receiver == byPoster:
			l.evict()
		}
		l.e.mu.Unlock()
	}
}

// evict makes the poster that receives hand over, wherever it has got to. The caller holds e.mu.
func (l *lane) evict() {
	l.evicted = true
	l.stream.interrupt()
}

// lead receives for a poster, until the reply to its flight has come or the reader takes over.
func (l *lane) lead() {
	for {
		gone, err := l.readReply()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			l.e.mu.Lock()
			if l.evicted {
				gone, err = true, l.handOver()
			}
			l.e.mu.Unlock()
		}
		if err != nil {
			l.e.fail(err)
			return
		}
		if gone {
			return
		}
	}
}

// handOver gives the right to receive from a poster to the reader. The caller holds e.mu.
func (l *lane) handOver() error {
	if l.evicted {
		l.evicted = false
		if err := l.stream.resume(); err != nil {
			return err
		}
	}
	l.receiver = byReader
	l.recall <- struct{}{}
	return nil
}

// release decides who receives after the reply to a flight, and tells whether it is another than before. The caller
// holds e.mu.
func (l *lane) release(f *flight) (gone bool, err error) {
	alone := f.alone && l.awaiting.first == nil && l.stream.drained()
	switch {
	case l.evicted || l.receiver == byPoster && !alone:
		return true, l.handOver()
	case alone:
		l.receiver = byNobody
	}
	return alone, nil
}

// readReply receives one reply, or what is still to come of the one in hand, and tells whether the right to receive is
// gone afterwards. What a reply says is untrusted: it can only answer the oldest flight, with what that has asked for.
// After an interruption it can be called again.
func (l *lane) readReply() (gone bool, err error) {
	r := &l.reply
	if !l.midway {
		b, err := l.stream.peek(replySize)
		if err != nil {
			return false, err
		}
		if *r, err = parseReply(b); err != nil {
			return false, err
		}
		if r.code == statusFlush {
			l.stream.consume(replySize)
			l.answerFlush(r.id)
			return false, nil
		}
	}

	l.e.mu.Lock()
	f := l.awaiting.first
	awaited := f != nil && f.id == r.id
	if awaited {
		f.receiving = r.code == 0 && f.op == backend.Read && !f.abandoned
	}
	l.e.mu.Unlock()
	if !awaited {
		return false, protocolError("a reply to request %d is not the one awaited", r.id)
	}
	var refusal *backend.Error
	switch {
	case r.code != 0:
		refusal, err = l.readRefusal(f)
	case l.midway:
		err = l.receive(f)
	case r.bytes != f.in.left:
		err = protocolError("a reply carries %d bytes, not %d", r.bytes, f.in.left)
	default:
		l.stream.consume(replySize)
		l.midway = true
		err = l.receive(f)
	}
	if err != nil {
		return false, err
	}
	l.midway = false

	l.e.mu.Lock()
	l.awaiting.pop()
	f.answered, f.refusal = true, refusal
	finish := f.sent
	if finish {
		f.state = ending
	}
	gone, err = l.release(f)
	l.e.mu.Unlock()
	if finish {
		l.e.finish(f)
	}
	return gone, err
}

// readRefusal receives the text of a refusal, and only then consumes its header.
func (l *lane) readRefusal(f *flight) (*backend.Error, error) {
	b, err := l.stream.peek(replySize + int(l.reply.bytes))
	if err != nil {
		return nil, err
	}
	text := string(b[replySize:])
	l.stream.consume(len(b))
	return &backend.Error{Code: l.reply.code, Backend: name, Op: f.op.String(), Peer: l.e.peer,
		Region: f.session.remote.Region, Text: "the target says " + strconv.Quote(text)}, nil
}

// receive stores the payload of a Read where it belongs, and throws away what comes once the Read is cancelled.
func (l *lane) receive(f *flight) error {
	switch {
	case f.op == backend.Write:
		return nil
	case f.abandoned: // nobody changes it in a flight that the receiver has in hand
		return l.stream.discard(&f.in.left)
	}
	err := l.stream.receive(&f.in)
	l.e.mu.Lock()
	f.receiving = false // from here on, Cancel does not interrupt
	interrupted := f.cancelled
	l.e.mu.Unlock()
	if !interrupted || err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	if err := l.stream.resume(); err != nil {
		return err
	}
	if err == nil {
		return nil // everything was there already
	}
	l.e.mu.Lock()
	c := f.abandon()
	l.e.mu.Unlock()
	f.session.deliver(c)
	return l.stream.discard(&f.in.left)
}
