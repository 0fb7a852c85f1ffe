package tcp

import (
	"bytes"
	"context"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

// wantCut checks the outcomes of a Write that broke on the way: a part in doubt, and the rest not sent.
func wantCut(t *testing.T, outcomes []backend.Outcome, segments int) {
	t.Helper()
	if len(outcomes) != segments {
		t.Fatalf("%d outcomes for %d segments", len(outcomes), segments)
	}
	cut := slices.Index(outcomes, backend.NotSent)
	if cut <= 0 || slices.ContainsFunc(outcomes[:cut], func(o backend.Outcome) bool { return o != backend.InDoubt }) ||
		slices.ContainsFunc(outcomes[cut:], func(o backend.Outcome) bool { return o != backend.NotSent }) {
		t.Fatalf("outcomes are %v: want some in doubt, then some not sent", outcomes)
	}
}

func wantAll(t *testing.T, outcomes []backend.Outcome, n int, want backend.Outcome) {
	t.Helper()
	if !slices.Equal(outcomes, slices.Repeat([]backend.Outcome{want}, n)) {
		t.Fatalf("outcomes are %v, want %d times %q", outcomes, n, want)
	}
}

func TestCancel(t *testing.T) {
	const size = 64 << 20
	rt := newRawTarget(t, size, nil) // it reads nothing
	for cookie, transfer := range []backend.Transfer{
		write(0, evenly(64, size)...), read(1, evenly(2, 64)...), write(2, evenly(3, 99)...),
	} {
		if err := rt.session.Post(transfer); err != nil {
			t.Fatal(cookie, err)
		}
	}
	rt.session.Cancel(17) // unknown

	rt.session.Cancel(1) // waits behind the first one
	c := rt.completions.Next(t)
	wantCode(t, c.Err, backend.Cancelled)
	wantAll(t, c.Outcomes, 2, backend.NotSent)
	if c.Cookie != 1 {
		t.Fatalf("transfer %d was cancelled, want 1", c.Cookie)
	}
	wantOpen(t, rt.endpoint.Done(), "cancelling a transfer that had not begun broke the endpoint")

	rt.readHead(t) // so the first one has begun
	rt.session.Cancel(0)
	all := rt.completions.Collect(t, 2)
	clear(rt.near) // quiet: the race detector sees it if anybody still sends from here
	wantCode(t, all[0].Err, backend.Cancelled)
	wantCut(t, all[0].Outcomes, 64)
	wantCode(t, all[2].Err, backend.PathDown)
	wantAll(t, all[2].Outcomes, 3, backend.NotSent)
	wantClosed(t, rt.endpoint.Done(), "the end of the endpoint")
	wantCode(t, rt.session.Post(write(3, evenly(1, 8)...)), backend.PathDown)
}

func TestCutInTheMiddleOfAWrite(t *testing.T) {
	const size = 64 << 20
	rt := newRawTarget(t, size, nil)
	must(t, rt.session.Post(write(1, evenly(64, size)...)))
	rt.readHead(t)
	rt.readFull(t, make([]byte, 100<<10))
	rt.conn.Close()
	c := rt.completions.Next(t)
	wantCode(t, c.Err, backend.PathDown)
	wantCut(t, c.Outcomes, 64)
	wantClosed(t, rt.endpoint.Done(), "the end of the endpoint")
}

func TestCutInTheMiddleOfARead(t *testing.T) {
	rt := newRawTarget(t, 3000, nil)
	must(t, rt.session.Post(read(1, evenly(3, 3000)...)))
	r := rt.readRequest(t)
	rt.reply(t, reply{id: r.id, bytes: 3000}, make([]byte, 2999)...)
	rt.conn.Close()
	c := rt.completions.Next(t)
	wantCode(t, c.Err, backend.PathDown)
	if want := []backend.Outcome{backend.Done, backend.Done, backend.Failed}; !slices.Equal(c.Outcomes, want) {
		t.Fatalf("outcomes are %v, want %v", c.Outcomes, want)
	}
}

func TestAnyLaneEndsTheEndpoint(t *testing.T) {
	p := newPair(t, 64, map[string]string{"connections": "3"})
	p.endpoint.lanes[2].stream.close(true)
	wantClosed(t, p.endpoint.Done(), "the end of the endpoint")
	wantCode(t, p.session.Post(write(1, evenly(1, 64)...)), backend.PathDown)
	_, err := p.endpoint.Session(t.Context(), 1, p.remote, p.completions)
	wantCode(t, err, backend.PathDown)
}

func TestCloseCompletesWhatIsInFlight(t *testing.T) {
	for name, end := range map[string]func(rt *rawTarget) error{
		"session":  func(rt *rawTarget) error { return rt.session.Close() },
		"endpoint": func(rt *rawTarget) error { return rt.endpoint.Close() },
		"backend":  func(rt *rawTarget) error { return rt.endpoint.t.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			rt := newRawTarget(t, 1<<20, nil)
			for i := range uint64(5) {
				must(t, rt.session.Post(read(i, evenly(1, 100)...)))
			}
			for range 2 {
				must(t, end(rt))
			}
			if len(rt.completions.All(t)) != 5 {
				t.Fatalf("%d completions when Close had returned, want 5", len(rt.completions.All(t)))
			}
			for _, c := range rt.completions.Collect(t, 5) {
				if c.Err == nil {
					t.Errorf("transfer %d succeeded", c.Cookie)
				}
			}
			if name == "session" {
				wantAlive(t, rt.endpoint) // for other sessions
			}
			if rt.session.Post(read(9, evenly(1, 100)...)) == nil {
				t.Error("posting after Close was accepted")
			}
		})
	}
}

// TestRestartedTarget kills a target and starts its next incarnation at the same address.
func TestRestartedTarget(t *testing.T) {
	a := node(t, "a", config{})
	a.lend(t, 1, make([]byte, 64), 0)
	b := node(t, "b", config{})
	remote := b.lend(t, 1, make([]byte, 64), everything)
	address := b.server.addresses[0]
	old := connect(t, a, b)
	completions := new(sink)
	s := bind(t, old, 1, remote, completions)
	h, granted := granted(t, a, b)
	must(t, b.Close())
	wantClosed(t, old.Done(), "the end of the endpoint to the old incarnation")
	wantCode(t, s.Post(write(1, evenly(1, 64)...)), backend.PathDown)

	b2 := node(t, "b", config{
		peer:    backendtest.Peer("b", 8),
		options: map[string]string{"listen": address},
	})
	_, err := h.Establish(t.Context(), granted.encode())
	wantCode(t, err, backend.PeerGone) // what the old incarnation granted
	_, err = b2.Answer(t.Context(), a.self, h.Offer())
	wantCode(t, err, backend.PeerGone) // what the old incarnation was offered

	fresh := connect(t, a, b2)
	_, err = fresh.Session(t.Context(), 1, remote, completions)
	wantCode(t, err, backend.PeerGone) // what the old incarnation lent
	far := make([]byte, 64)
	s = bind(t, fresh, 1, b2.lend(t, 1, far, everything), completions)
	must(t, s.Post(write(2, evenly(1, 64)...)))
	if c := completions.Next(t); c.Err != nil {
		t.Fatal(c.Err)
	}
}

// TestRestartedInitiator: what the target granted and serves to an incarnation ends when the next one comes.
func TestRestartedInitiator(t *testing.T) {
	b := node(t, "b", config{})
	a := node(t, "a", config{})
	old := connect(t, a, b)
	h, granted := granted(t, a, b)
	a2 := node(t, "a", config{peer: backendtest.Peer("a", 70)})
	connect(t, a2, b)
	wantClosed(t, old.Done(), "the end of the old incarnation's endpoint")
	_, err := h.Establish(t.Context(), granted.encode())
	wantCode(t, err, backend.Denied)
}

func TestIdleConnectionsLiveOn(t *testing.T) {
	p := newPair(t, 4096, map[string]string{"keepalive": "1s", "user_timeout": "1s"})
	p.must(t, write(1, evenly(1, 4096)...))
	time.Sleep(100 * time.Millisecond) // the target has sent its reply, and is on its way to idleness
	for hours := range 3 {             // the janitor comes by, long after
		later := time.Now().Add(time.Duration(hours) * time.Hour)
		p.endpoint.checkProgress(later)
		p.b.server.sweep(later)
	}
	time.Sleep(1500 * time.Millisecond) // the system sends probes
	p.must(t, read(2, evenly(1, 4096)...))
	wantOpen(t, p.endpoint.Done(), "the endpoint did not survive an idle time")
}

func TestSilentTargetIsGivenUp(t *testing.T) {
	rt := newRawTarget(t, 64, map[string]string{"io_timeout": "100ms"})
	must(t, rt.session.Post(write(1, evenly(1, 64)...)))
	c := rt.completions.Next(t)
	wantCode(t, c.Err, backend.PathDown)
	wantAll(t, c.Outcomes, 1, backend.InDoubt)
}

func TestStuckInitiatorIsGivenUp(t *testing.T) {
	b := node(t, "b", config{options: map[string]string{"io_timeout": "100ms"}})
	b.lend(t, 1, make([]byte, 64), everything)
	for name, sent := range map[string]int{"in the header": 1, "in the table": requestSize + 3, "in the payload": requestSize + spanSize + 5} {
		t.Run(name, func(t *testing.T) {
			a := node(t, "a", config{options: map[string]string{"connections": "1"}})
			conn := rawInitiator(t, a, b)
			frame := writeFrame(1, 1, span{0, 64})
			if _, err := conn.Write(frame[:sent]); err != nil {
				t.Fatal(err)
			}
			wantEnd(t, conn)
		})
	}
}

// TestHalfReadReplyIsGivenUp: an initiator that does not take the payload it has asked for does not hold the target.
func TestHalfReadReplyIsGivenUp(t *testing.T) {
	b := node(t, "b", config{options: map[string]string{"io_timeout": "100ms"}})
	b.lend(t, 1, make([]byte, 64<<20), everything)
	a := node(t, "a", config{options: map[string]string{"connections": "1"}})
	conn := rawInitiator(t, a, b)
	if _, err := conn.Write(readFrame(1, 1, span{0, 64 << 20})); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end of the connection", func() bool { return b.serves() == 0 })
}

func (t *transport) serves() int {
	t.server.mu.Lock()
	defer t.server.mu.Unlock()
	return len(t.server.serving)
}

// halfWrite posts a Write of 1 MiB of ones to region 1 of b, by hand, and stops half-way, when the target is
// storing it. It returns the rest.
func halfWrite(t *testing.T, a, b *transport, far []byte) (net.Conn, []byte) {
	t.Helper()
	conn := rawInitiator(t, a, b)
	frame := writeFrame(1, 1, span{0, uint64(len(far))})
	for i := range frame[requestSize+spanSize:] {
		frame[requestSize+spanSize+i] = 1
	}
	half := len(frame) / 2
	if _, err := conn.Write(frame[:half]); err != nil {
		t.Fatal(err)
	}
	region := b.regions.Get(1)
	eventually(t, "storing", func() bool {
		b.server.mu.Lock()
		defer b.server.mu.Unlock()
		for c := range b.server.serving {
			if c.using.Load() == region && c.stream.progress.Load() > 1 {
				return true
			}
		}
		return false
	})
	return conn, frame[half:]
}

func TestDeregisterWaitsForTransfers(t *testing.T) {
	far := make([]byte, 1<<20)
	a := node(t, "a", config{options: map[string]string{"connections": "1"}})
	b := node(t, "b", config{})
	b.lend(t, 1, far, everything)
	conn, rest := halfWrite(t, a, b, far)
	done := make(chan error, 1)
	go func() { done <- b.Deregister(context.Background(), 1) }()
	eventually(t, "the end of new uses", func() bool { return b.regions.Get(1).users.IsShut() })
	select {
	case err := <-done:
		t.Fatalf("Deregister returned %v while a peer was writing", err)
	default:
	}
	if _, err := conn.Write(rest); err != nil {
		t.Fatal(err)
	}
	if r, _ := readReply(t, conn); r.code != 0 {
		t.Fatalf("the write was answered with %q", r.code)
	}
	must(t, <-done)
	if !bytes.Equal(far, bytes.Repeat([]byte{1}, len(far))) {
		t.Fatal("the write is not in place")
	}
	if _, err := conn.Write(writeFrame(2, 1, span{0, 1})); err != nil {
		t.Fatal(err)
	}
	if r, _ := readReply(t, conn); r.code != backend.BadRequest {
		t.Fatalf("a write to a region that is gone was answered with %q", r.code)
	}
}

func TestDeregisterBreaksTransfersWhenItsContextEnds(t *testing.T) {
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	t.Run("target", func(t *testing.T) {
		far := make([]byte, 1<<20)
		a := node(t, "a", config{options: map[string]string{"connections": "1"}})
		b := node(t, "b", config{})
		b.lend(t, 1, far, everything)
		conn, _ := halfWrite(t, a, b, far)
		must(t, b.Deregister(ended, 1))
		clear(far)
		wantEnd(t, conn)
	})
	t.Run("initiator", func(t *testing.T) {
		rt := newRawTarget(t, 4096, nil)
		must(t, rt.session.Post(read(1, evenly(1, 4096)...)))
		must(t, rt.endpoint.t.Deregister(ended, 1))
		clear(rt.near)
		if len(rt.completions.All(t)) != 1 {
			t.Fatal("Deregister returned before the transfer had completed")
		}
		wantCode(t, rt.completions.Next(t).Err, backend.PathDown)
		if rt.session.Post(read(2, evenly(1, 4096)...)) == nil {
			t.Fatal("posting from a region that is gone was accepted")
		}
	})
}

func tcpPair(t *testing.T) (client, server *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	s, err := l.Accept()
	must(t, err)
	return c.(*net.TCPConn), s.(*net.TCPConn)
}
