package samehost

import (
	"context"
	"net"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// TestCloseIsNotQuiet closes an instance whose guest has not let go: nobody is told that the guest is quiet, neither who
// waits for it meanwhile nor who asks afterwards.
func TestCloseIsNotQuiet(t *testing.T) {
	fence := func(b *Instance, ctx context.Context) error { return b.Fence(ctx, peer("a", 1)) }
	deregister := func(b *Instance, ctx context.Context) error { return b.Deregister(ctx, 5) }
	for _, c := range []struct {
		name      string
		wait      func(*Instance, context.Context) error
		untilExit bool // the guest cuts its connection; otherwise it stays
	}{
		{"fence", fence, false},
		{"fence until exit", fence, true},
		{"deregister", deregister, false},
		{"deregister until exit", deregister, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b, err := openInstance(peer("b", 2), map[string]string{"socket_dir": socketDir(t)}, func(s *Settings) { s.UntilExit = c.untilExit })
			must(t, err)
			remote := register(t, b, memory(t, 5, 4096, all))
			conn := guestConn(t, b)
			must(t, send(conn, &message{kind: borrow, region: 5, key: regionKey(remote.Key)}, -1))
			_, _, err = receive(conn, false)
			must(t, err)
			result := make(chan error)
			go func() { result <- c.wait(b, context.Background()) }()
			wantEnd(t, conn)
			if c.untilExit {
				must(t, conn.Close())
			}
			wantCode(t, b.Close(), backend.Cancelled)
			wantCode(t, <-result, backend.PathDown)
			err = b.Fence(soon(t), peer("a", 1))
			wantCode(t, err, backend.PathDown, "peer a@1")
		})
	}
}

// TestGoneBeforeTheEnd has a guest leave in order whose socket somebody holds open, as a child of its process may.
func TestGoneBeforeTheEnd(t *testing.T) {
	for _, untilExit := range []bool{false, true} {
		b := newInstance(t, peer("b", 2))
		if untilExit {
			b = newUntilExit(t, peer("b", 2))
		}
		conn := guestConn(t, b)
		must(t, send(conn, &message{kind: gone}, -1))
		must(t, b.Fence(soon(t), peer("a", 1)))
		wantEnd(t, conn)
	}
}

// closeNotifier is a mover that tells when it is closed.
type closeNotifier struct {
	*copyMover
	closed atomic.Bool
}

func (m *closeNotifier) Close() error {
	m.closed.Store(true)
	return m.copyMover.Close()
}

func newCloseNotifier(t *testing.T, self backend.Peer) (*Instance, *closeNotifier) {
	t.Helper()
	m := &closeNotifier{copyMover: newCopyMover()}
	i, err := openInstance(self, map[string]string{"socket_dir": socketDir(t)}, func(s *Settings) { s.Mover = m })
	must(t, err)
	return i, m
}

// TestCloseWaitsForAnswers closes an instance whose mover takes longer with an answer than Close has patience with guests.
func TestCloseWaitsForAnswers(t *testing.T) {
	a := newInstance(t, peer("a", 1))
	b, m := newCloseNotifier(t, peer("b", 2))
	asked, release, tooSoon := make(chan struct{}), make(chan struct{}), make(chan bool, 1)
	m.serve = func(context.Context, *Guest, []byte) ([]byte, error) {
		close(asked)
		<-release
		tooSoon <- m.closed.Load()
		return nil, nil
	}
	e := connect(t, a, b.self, b)
	go e.Ask(soon(t), nil)
	<-asked
	closed := make(chan error, 1)
	go func() { closed <- b.Close() }()
	<-b.ctx.Done() // Close waits no longer for the guest
	select {
	case err := <-closed:
		t.Errorf("Close has returned (%v), and the mover still answers", err)
	case <-briefly(t).Done():
	}
	close(release)
	if <-tooSoon {
		t.Error("the mover was closed while it answered")
	}
	if !t.Failed() {
		wantCode(t, <-closed, backend.Cancelled)
	}
}

// TestNoLeaveAfterClose has a guest leave of which Close did not wait for the end: the mover is closed, and hears no more.
func TestNoLeaveAfterClose(t *testing.T) {
	a := newInstance(t, peer("a", 1))
	b, m := newCloseNotifier(t, peer("b", 2))
	register(t, a, memory(t, 1, 4096, 0))
	remote := register(t, b, memory(t, 2, 4096, all))
	var late atomic.Bool
	m.serve = func(_ context.Context, g *Guest, _ []byte) ([]byte, error) {
		g.OnLeave(func() { late.Store(true) })
		return nil, nil
	}
	e := connect(t, a, b.self, b)
	_, err := e.Ask(soon(t), nil)
	must(t, err)
	moverOf(a).hold(t)
	s := bind(t, e, 1, remote, new(sink))
	must(t, post(s, backend.Write, 1, backend.Segment{Length: 1}))
	wantCode(t, b.Close(), backend.Cancelled)
	moverOf(a).release()
	must(t, e.Close())
	if late.Load() {
		t.Error("OnLeave was called after Close")
	}
}

// TestGuestDoesNotRead asks for a guest that takes no answer: the goroutines that have one to send do not pile up.
func TestGuestDoesNotRead(t *testing.T) {
	b := newInstance(t, peer("b", 2))
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: filepath.Join(socketDir(t), "x"), Net: network})
	must(t, err)
	defer l.Close()
	theirs, err := net.DialUnix(network, nil, l.Addr().(*net.UnixAddr))
	must(t, err)
	defer theirs.Close()
	ours, err := l.AcceptUnix()
	must(t, err)
	defer ours.Close()
	must(t, ours.SetWriteBuffer(1))

	v := visit{instance: b, conn: ours, guest: &Guest{instance: b, peer: peer("a", 1), revoke: func() {}}}
	const flood = 1000
	var taken, most atomic.Int64
	before := runtime.NumGoroutine()
	ctx, done := soon(t), make(chan struct{})
	go func() {
		defer close(done)
		for range flood {
			if err := v.take(ctx, &message{kind: ask, note: make([]byte, MaxNote)}); err != nil {
				t.Errorf("a question that came after the answer to the last: %v", err)
			}
			for v.asked.Load() {
				runtime.Gosched()
			}
			taken.Add(1)
			most.Store(max(most.Load(), int64(runtime.NumGoroutine()-before)))
		}
	}()
	for last := int64(-1); last != taken.Load(); { // until no answer fits into the socket any more
		last = taken.Load()
		time.Sleep(20 * time.Millisecond)
	}
	must(t, theirs.Close())
	<-done
	v.answering.Wait()
	if n := most.Load(); n > 50 {
		t.Errorf("%d goroutines served a guest that reads no answer", n)
	}
}
