package tcp

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

func flushFrame(id uint64) []byte { return appendRequest(nil, request{op: opFlush, id: id}) }

func mustFence(t testing.TB, target *transport, peer backend.Peer) {
	t.Helper()
	must(t, target.Fence(context.Background(), peer))
}

func wantAlive(t testing.TB, e *endpoint) {
	t.Helper()
	select {
	case <-e.Done():
		t.Fatalf("the endpoint has ended: %v", e.failure)
	default:
	}
}

// send writes a frame by hand.
func send(t testing.TB, conn net.Conn, frame []byte) {
	t.Helper()
	if _, err := conn.Write(frame); err != nil {
		t.Fatal(err)
	}
}

func wantReply(t testing.TB, conn net.Conn, want reply) {
	t.Helper()
	if got, _ := readReply(t, conn); got != want {
		t.Fatalf("got reply %+v, want %+v", got, want)
	}
}

// TestFenceBreaksWhatIsStuck fences an initiator that has stopped half-way through a write.
func TestFenceBreaksWhatIsStuck(t *testing.T) {
	far := make([]byte, 1<<20)
	a := node(t, "a", config{options: map[string]string{"connections": "1"}})
	b := node(t, "b", config{})
	b.settings.fenceGrace = 1
	b.lend(t, 1, far, everything)
	bystander := connect(t, node(t, "c", config{}), b)
	conn, rest := halfWrite(t, a, b, far)

	otherIncarnation := a.self
	otherIncarnation.Incarnation++
	mustFence(t, b, otherIncarnation)
	if b.regions.Get(1).users.Inside() != 1 {
		t.Fatal("fencing another incarnation ended the write")
	}
	mustFence(t, b, a.self)
	if n := b.regions.Get(1).users.Inside(); n != 0 {
		t.Fatalf("%d writes go on after the fence", n)
	}
	clear(far) // the pages are used again
	_, _ = conn.Write(rest)
	if b, err := io.ReadAll(conn); len(b) > replySize || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("got %d bytes, %v; want the end of the connection, after a wish for a flush at most", len(b), err)
	}
	if !bytes.Equal(far, make([]byte, len(far))) {
		t.Fatal("a write before the fence stored after it")
	}
	wantAlive(t, bystander)
	connect(t, a, b) // and the peer may come back
}

// TestFenceWaitsForWhatWasPosted plays an initiator with a write under way, and one that is still on its way.
func TestFenceWaitsForWhatWasPosted(t *testing.T) {
	far := make([]byte, 1<<20)
	a := node(t, "a", config{options: map[string]string{"connections": "1"}})
	b := node(t, "b", config{})
	b.settings.fenceGrace = backendtest.Patience
	b.lend(t, 1, far, everything)
	for id := uint64(1); id <= 2; id++ { // the second fence is of no less worth
		conn, rest := halfWrite(t, a, b, far)
		fenced := make(chan error, 1)
		go func() { fenced <- b.Fence(context.Background(), a.self) }()
		wantReply(t, conn, reply{code: statusFlush, id: 1})
		send(t, conn, rest)
		wantReply(t, conn, reply{id: 1})
		send(t, conn, writeFrame(7, 1, span{0, 64}))
		wantReply(t, conn, reply{id: 7})
		select {
		case err := <-fenced:
			t.Fatalf("Fence returned %v before the flush came", err)
		default:
		}
		send(t, conn, flushFrame(1))
		must(t, <-fenced)
		send(t, conn, readFrame(8, 1, span{0, 64}))
		wantReply(t, conn, reply{id: 8, bytes: 64})
		conn.Close()
		eventually(t, "the end of the connection", func() bool { return b.serves() == 0 })
	}
}

// TestFenceInTheHandshake: what is being set up has posted nothing, and must not fail.
func TestFenceInTheHandshake(t *testing.T) {
	t.Run("granted", func(t *testing.T) {
		a, b := node(t, "a", config{}), node(t, "b", config{})
		h, granted := granted(t, a, b)
		mustFence(t, b, a.self)
		e, err := h.Establish(t.Context(), granted.encode())
		must(t, err)
		wantAlive(t, e.(*endpoint))
	})
	t.Run("proving", func(t *testing.T) {
		a, b := node(t, "a", config{}), node(t, "b", config{})
		b.lend(t, 1, make([]byte, 64), everything)
		h, granted := granted(t, a, b)
		var conns [2]net.Conn
		var proofs [2]*exchange
		for i := range conns {
			conns[i], proofs[i] = dialExchange(t, h, &granted, uint16(i))
		}
		must(t, proofs[0].initiate(conns[0]))
		mustFence(t, b, a.self) // with one of two connections through
		must(t, proofs[1].initiate(conns[1]))
		for _, conn := range conns {
			send(t, conn, readFrame(5, 1, span{0, 64}))
			wantReply(t, conn, reply{id: 5, bytes: 64}) // and no wish for a flush before it
		}
	})
}

// TestFenceSparesWhatIsHealthy fences an endpoint that was never used, and one that is busy.
func TestFenceSparesWhatIsHealthy(t *testing.T) {
	authority := newAuthority(t)
	for name, credentials := range map[string]func(string) func(*backend.Config){
		"plain": func(string) func(*backend.Config) { return nil },
		"TLS":   func(node string) func(*backend.Config) { return authority.credentials(node, authority) },
	} {
		t.Run(name, func(t *testing.T) {
			const size = 512 << 10
			a := node(t, "a", config{change: credentials("a")})
			b := node(t, "b", config{change: credentials("b")})
			b.settings.fenceGrace = backendtest.Patience
			p := &pair{near: make([]byte, size), completions: new(sink)}
			a.lend(t, 1, p.near, 0)
			remote := b.lend(t, 1, make([]byte, size), everything)
			e := connect(t, a, b)
			p.session = bind(t, e, 1, remote, p.completions)
			mustFence(t, b, a.self)
			p.must(t, write(1, evenly(1, size)...))

			var fences sync.WaitGroup
			for range 2 {
				fences.Go(func() {
					for range 20 {
						mustFence(t, b, a.self)
					}
				})
			}
			for range 20 {
				for i, g := range evenly(8, size) {
					transfer := write(uint64(i), g)
					if i%2 == 1 {
						transfer.Op = backend.Read
					}
					if err := p.session.Post(transfer); err != nil {
						t.Error(err)
						break
					}
				}
				for _, c := range p.completions.Collect(t, 8) {
					if c.Err != nil {
						t.Error(c.Err)
					}
				}
			}
			fences.Wait()
			wantAlive(t, e)
		})
	}
}

// TestFlushStaysBehindWhatWasPosted plays the target: of a lane that is blocked by its first write, it sees the
// flush behind what was posted before it asked, and before the rest.
func TestFlushStaysBehindWhatWasPosted(t *testing.T) {
	const size = 16 << 20
	rt := newRawTarget(t, size, nil)
	post := func(cookie uint64, size int) {
		must(t, rt.session.Post(write(cookie, evenly(1, size)...)))
	}
	lane := rt.endpoint.lanes[0]
	ask := func(id uint64) {
		rt.reply(t, reply{code: statusFlush, id: id})
		eventually(t, "the arrival of the wish", func() bool {
			rt.endpoint.mu.Lock()
			defer rt.endpoint.mu.Unlock()
			return lane.flushAsked == id
		})
	}
	post(0, size)
	post(1, 64)
	ask(7)
	post(2, 64)
	ask(8)
	post(3, 64)
	got := make([]byte, requestSize)
	for _, want := range []request{
		{op: backend.Write, id: 1}, {op: backend.Write, id: 2}, {op: opFlush, id: 7},
		{op: backend.Write, id: 3}, {op: backend.Write, id: 4}, {op: opFlush, id: 8},
	} {
		rt.readFull(t, got)
		r, err := parseRequest(got)
		if err != nil || r.op != want.op || r.id != want.id {
			t.Fatalf("got %+v, %v; want operation %d, id %d", r, err, want.op, want.id)
		}
		if r.op == backend.Write {
			rt.readFull(t, make([]byte, spanSize+r.total))
			rt.reply(t, reply{id: r.id})
		}
	}
	for _, c := range rt.completions.Collect(t, 4) {
		if c.Err != nil {
			t.Error(c.Err)
		}
	}
	ask(9) // of an idle lane
	rt.readFull(t, got)
	if !bytes.Equal(got, flushFrame(9)) {
		t.Fatalf("an idle lane answers the wish for a flush with %x", got)
	}
}

func TestFenceIsBoundedByItsContext(t *testing.T) {
	b := node(t, "b", config{})
	peer := backend.Peer{Node: "a", Incarnation: 1}
	client, conn := tcpPair(t)
	defer client.Close()
	s, err := newStream(conn, nil)
	must(t, err)
	c := newServed(b, peer, s, new(atomic.Int32))
	b.server.mu.Lock()
	b.server.serving[c] = struct{}{} // nobody serves it, so it never gets quiet
	b.server.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	wantCode(t, b.Fence(ctx, peer), backend.Cancelled)
	close(c.quiet)
	must(t, b.Fence(t.Context(), peer))
	s.close(true)
}

// TestFlushGathersWhatIsOnItsWay plays the host of a backend in a process of its own: posts that have not arrived when
// the target asks go ahead of the flush, and where they never come, no flush does.
func TestFlushGathersWhatIsOnItsWay(t *testing.T) {
	asked := make(chan chan error)
	rt := newRawTargetFor(t, 64, config{change: func(c *backend.Config) {
		c.Posted = func(context.Context) error {
			answer := make(chan error)
			asked <- answer
			return <-answer
		}
	}})
	got := make([]byte, requestSize)
	expect := func(op backend.Op, id uint64) {
		t.Helper()
		rt.readFull(t, got)
		if r, err := parseRequest(got); err != nil || r.op != op || r.id != id {
			t.Fatalf("got %+v, %v; want operation %d, id %d", r, err, op, id)
		}
	}
	rt.reply(t, reply{code: statusFlush, id: 5})
	first := <-asked
	rt.reply(t, reply{code: statusFlush, id: 6}) // while it gathers for the one before
	must(t, rt.session.Post(write(0, evenly(1, 64)...)))
	expect(backend.Write, 1)
	rt.readFull(t, make([]byte, spanSize+64))
	rt.reply(t, reply{id: 1})
	rt.completions.Collect(t, 1)
	first <- nil
	expect(opFlush, 5)
	second := <-asked // more may have been posted before 6 was asked for
	second <- nil
	expect(opFlush, 6)

	rt.reply(t, reply{code: statusFlush, id: 7})
	(<-asked) <- errors.New("the host does not answer")
	must(t, rt.session.Post(write(1, evenly(1, 64)...)))
	expect(backend.Write, 2) // and no flush before it
}
