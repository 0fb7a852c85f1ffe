package spool

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// endpoint is a connection from this process. Each transfer on it has a goroutine while it is in flight.
type endpoint struct {
	b       *spool
	peer    backend.Peer
	name    string // of the connection
	mailbox string // of the peer
	secret  []byte
	number  atomic.Uint64 // of the last request
	done    chan struct{} // closed when the endpoint fails

	// Guarded by spool.mu.
	err    error
	flying int // transfers that take up room in the window
}

// handshake is a connection that is being set up: a directory for its answers.
type handshake struct{ *endpoint }

// Offer implements backend.Backend.
func (b *spool) Offer(_ context.Context, peer backend.Peer) (backend.Handshake, error) {
	e := &endpoint{b: b, peer: peer, name: newName(), done: make(chan struct{})}
	if err := os.Mkdir(e.answers(), 0o700); err != nil {
		return nil, &backend.Error{Code: backend.PathDown, Backend: name, Op: "offer", Peer: peer, Err: err}
	}
	return handshake{e}, nil
}

// answers returns the path of the answers, or of one among them.
func (e *endpoint) answers(parts ...string) string {
	return e.b.path(append([]string{"out", e.name}, parts...)...)
}

// Offer implements backend.Handshake.
func (h handshake) Offer() []byte {
	ids, _ := hex.DecodeString(h.b.mailbox + h.name)
	return strconv.AppendUint(ids, h.peer.Incarnation, 16)
}

// Abandon implements backend.Handshake.
func (h handshake) Abandon() { os.RemoveAll(h.answers()) }

// Establish implements backend.Handshake. A request that does nothing and its answer prove both ends, since each
// shows the secret.
func (h handshake) Establish(ctx context.Context, answer []byte) (backend.Endpoint, error) {
	e := h.endpoint
	if len(answer) != idBytes+secretBytes {
		h.Abandon()
		return nil, fault(backend.BadRequest, "establish", e.peer, "this is not an answer of the spool backend")
	}
	e.mailbox, e.secret = hex.EncodeToString(answer[:idBytes]), slices.Clone(answer[idBytes:])
	e.b.mu.Lock()
	if e.b.closed {
		e.err = fault(backend.PathDown, "establish", e.peer, "the backend is closed")
	} else {
		e.b.endpoints[e] = struct{}{}
	}
	e.b.mu.Unlock()
	_, _, err := e.exchange(&message{}, func() (why error, last bool) {
		if ctx.Err() != nil {
			return &backend.Error{Code: backend.Cancelled, Backend: name, Op: "establish", Peer: e.peer, Err: ctx.Err()}, true
		}
		return e.down(), true
	})
	if err != nil {
		e.b.failEndpoints(err.Error(), func(f *endpoint) bool { return f == e })
		h.Abandon()
		return nil, err
	}
	return e, nil
}

// down returns why the endpoint has failed, if it has.
func (e *endpoint) down() error {
	e.b.mu.Lock()
	defer e.b.mu.Unlock()
	return e.err
}

// Done implements backend.Endpoint.
func (e *endpoint) Done() <-chan struct{} { return e.done }

// Close implements backend.Endpoint.
func (e *endpoint) Close() error {
	e.b.failEndpoints("the endpoint was closed", func(f *endpoint) bool { return f == e })
	return e.b.drain(context.Background(), nil, func(j *job) bool { return j.e == e })
}

// failEndpoints ends endpoints for good. That the directory of a connection is gone tells the target.
func (b *spool) failEndpoints(why string, match func(*endpoint) bool) {
	b.mu.Lock()
	var failed []*endpoint
	for e := range b.endpoints {
		if match(e) {
			failed = append(failed, e)
			delete(b.endpoints, e)
			e.err = fault(backend.PathDown, "", e.peer, why)
			close(e.done)
		}
	}
	b.mu.Unlock()
	for _, e := range failed {
		os.RemoveAll(e.answers())
	}
}

// job is one accepted transfer.
type job struct {
	*session
	backend.Transfer
	why  error         // set when it should end early; guarded by spool.mu
	done chan struct{} // closed when Complete has returned
}

// interrupt asks the jobs that match to end early, and returns them.
func (b *spool) interrupt(why error, match func(*job) bool) []*job {
	b.mu.Lock()
	defer b.mu.Unlock()
	var found []*job
	for j := range b.jobs {
		if match(j) {
			found = append(found, j)
			if j.why == nil {
				j.why = why
			}
		}
	}
	return found
}

// drain interrupts jobs, and waits until their completions are through.
func (b *spool) drain(ctx context.Context, why error, match func(*job) bool) error {
	for _, j := range b.interrupt(why, match) {
		select {
		case <-j.done:
		case <-ctx.Done():
			return &backend.Error{Code: backend.Cancelled, Backend: name, Op: "drain", Peer: j.e.peer, Err: ctx.Err()}
		}
	}
	return nil
}

// stopped says why a job should end, if it should, and whether it cannot wait for the target's answer.
func (j *job) stopped() (why error, last bool) {
	if err := j.e.down(); err != nil {
		return err, true
	}
	j.e.b.mu.Lock()
	defer j.e.b.mu.Unlock()
	return j.why, false
}

// run carries a job out, and completes it.
func (j *job) run() {
	outcome, err := j.move()
	c := backend.Completion{Cookie: j.Cookie, Err: err}
	if err != nil { // the target carries out a request entirely or not at all
		c.Outcomes = slices.Repeat([]backend.Outcome{outcome}, len(j.Segments))
	}
	if backend.CodeOf(err) == backend.PathDown {
		j.e.b.failEndpoints(err.Error(), func(e *endpoint) bool { return e == j.e })
	}
	b := j.e.b
	b.mu.Lock()
	j.e.flying-- // there is room again: Complete may well call Post
	b.mu.Unlock()
	j.sink.Complete(c)
	b.mu.Lock()
	delete(b.jobs, j)
	b.mu.Unlock()
	close(j.done)
}

// move sends the request, and stores what comes back. After a write was sent, nothing here touches its memory.
func (j *job) move() (backend.Outcome, error) {
	request := &message{Op: j.Op, Region: j.remote.Region}
	var total uint64
	for _, s := range j.Segments {
		total += s.Length
		request.Ranges = append(request.Ranges, span{s.Remote, s.Length})
		if j.Op == backend.Write {
			request.data = append(request.data, j.local.Bytes[s.Local:][:s.Length]...)
		}
	}
	answer, taken, err := j.e.exchange(request, j.stopped)
	switch {
	case err != nil && taken && j.Op == backend.Write:
		return backend.InDoubt, err
	case err != nil:
		return backend.NotSent, err
	case j.Op == backend.Write:
		return backend.Done, nil
	case total != uint64(len(answer.data)):
		return backend.NotSent, fault(backend.PathDown, "read", j.e.peer, "the answer has another number of bytes")
	}
	for _, s := range j.Segments {
		answer.data = answer.data[copy(j.local.Bytes[s.Local:][:s.Length], answer.data):]
	}
	return backend.Done, nil
}

// exchange sends a request and waits for its answer. A request that should stop is withdrawn; when it is too late
// for that, the answer is awaited after all, unless that cannot wait, or takes too long. With an error, taken says
// whether the target may have carried the request out.
func (e *endpoint) exchange(m *message, stop func() (why error, last bool)) (answer *message, taken bool, err error) {
	if why, _ := stop(); why != nil {
		return nil, false, why
	}
	m.Secret, m.Number = e.secret, e.number.Add(1)
	number := strconv.FormatUint(m.Number, 10)
	request := filepath.Join(e.b.dir, e.mailbox, "in", e.name+"."+number)
	if err := m.write(e.answers("request"+number), request); err != nil {
		return nil, true, &backend.Error{Code: backend.PathDown, Backend: name, Op: "send", Peer: e.peer, Err: err}
	}
	deadline := time.Now().Add(e.b.patience)
	for pause := minPause; ; pause = min(2*pause, maxPause) {
		why, last := stop() // before looking for the answer: one that came before the end counts
		if time.Now().After(deadline) {
			why, last = fault(backend.PathDown, "wait", e.peer, "no answer for "+e.b.patience.String()), true
		}
		answer, err := readMessage(e.answers(number), e.secret)
		switch {
		case err == nil:
			os.Remove(e.answers(number))
			return answer, false, answer.refusal(e.peer)
		case !errors.Is(err, fs.ErrNotExist):
			why, last = &backend.Error{Code: backend.PathDown, Backend: name, Op: "read the answer", Peer: e.peer, Err: err}, true
		}
		if why != nil {
			if os.Remove(request) == nil { // the target has not taken it, and never will
				return nil, false, why
			}
			if last {
				return nil, true, why
			}
		}
		time.Sleep(pause)
	}
}

// refusal returns the error that an answer brings.
func (m *message) refusal(peer backend.Peer) error {
	switch {
	case m.Code == 0:
		return nil
	case m.Code == backend.Busy || !slices.Contains(backend.Codes, m.Code):
		m.Code = backend.Internal
	}
	return fault(m.Code, "", peer, fmt.Sprintf("refused by the target: %.300s", m.Text))
}

// session is a pair of regions.
type session struct {
	e      *endpoint
	local  *region
	remote backend.Remote
	sink   backend.Sink
	closed bool // guarded by spool.mu
}

// Session implements backend.Endpoint. The target looks its region up again for each request.
func (e *endpoint) Session(_ context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	e.b.mu.Lock()
	defer e.b.mu.Unlock()
	r := e.b.regions[local]
	switch {
	case e.err != nil:
		return nil, e.err
	case !same(remote.Peer, e.peer):
		return nil, fault(backend.PeerGone, "session", e.peer, "the descriptor is of "+remote.Peer.String())
	case remote.Kind != backend.HostMemory:
		return nil, fault(backend.Unsupported, "session", e.peer, "only host memory can be reached")
	case r == nil || r.gone:
		return nil, fault(backend.BadRequest, "session", e.peer, "the local region is not registered")
	}
	return &session{e: e, local: r, remote: remote, sink: sink}, nil
}

// Post implements backend.Session.
func (s *session) Post(t backend.Transfer) error {
	if err := s.check(t); err != nil {
		return err
	}
	t.Segments = slices.Clone(t.Segments) // the caller's slice is ours only while Post runs
	j := &job{session: s, Transfer: t, done: make(chan struct{})}
	b := s.e.b
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case s.e.err != nil:
		return s.e.err
	case s.closed || s.local.gone:
		return fault(backend.BadRequest, "post", s.e.peer, "the session is closed, or its local region deregistered")
	case s.e.flying == window:
		return backend.ErrBusy
	}
	s.e.flying++
	b.jobs[j] = struct{}{}
	go j.run()
	return nil
}

// check refuses what the contract or the descriptor does not allow.
func (s *session) check(t backend.Transfer) error {
	switch {
	case needs[t.Op] == 0:
		return fault(backend.Unsupported, "post", s.e.peer, t.Op.String()+" is neither write nor read")
	case s.remote.Rights&needs[t.Op] == 0:
		return fault(backend.Denied, "post", s.e.peer, "the remote region does not allow a "+t.Op.String())
	case len(t.Segments) == 0 || len(t.Segments) > maxSegments:
		return fault(backend.BadRequest, "post", s.e.peer, "a transfer has 1 to "+strconv.Itoa(maxSegments)+" segments")
	}
	var total uint64
	for _, g := range t.Segments {
		if total += g.Length; !within(g.Local, g.Length, uint64(len(s.local.Bytes))) || !within(g.Remote, g.Length, s.remote.Size) || total > maxBytes {
			err := fault(backend.BadRequest, "post", s.e.peer, "the range is empty, outside a region, or beyond the limits")
			err.Region, err.Offset, err.Length = s.remote.Region, g.Remote, g.Length
			return err
		}
	}
	return nil
}

// Cancel implements backend.Session.
func (s *session) Cancel(cookie uint64) {
	why := fault(backend.Cancelled, "", s.e.peer, "the host has cancelled it")
	s.e.b.interrupt(why, func(j *job) bool { return j.session == s && j.Cookie == cookie })
}

// Close implements backend.Session.
func (s *session) Close() error {
	s.e.b.mu.Lock()
	s.closed = true
	s.e.b.mu.Unlock()
	why := fault(backend.Cancelled, "", s.e.peer, "the session was closed")
	return s.e.b.drain(context.Background(), why, func(j *job) bool { return j.session == s })
}
