package samehost

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

// dial connects to an instance as a process does that knows the protocol and means no good.
func dial(t testing.TB, i *Instance) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix(network, nil, &net.UnixAddr{Name: i.socket, Net: network})
	must(t, err)
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(backendtest.Patience))
	return c
}

// answered returns what an initiator named a was answered.
func answered(t testing.TB, i *Instance) *answer {
	t.Helper()
	o := offer{from: peer("a", 1), to: i.self}
	b, err := i.Answer(soon(t), o.from, o.encode())
	must(t, err)
	a, err := parseAnswer(b)
	must(t, err)
	return &a
}

// wantRefused wants a refusal with the code, and then the end of the stream.
func wantRefused(t testing.TB, c *net.UnixConn, code backend.Code) {
	t.Helper()
	m, _, err := receive(c, false)
	must(t, err)
	if m.kind != refused || m.code != code {
		t.Fatalf("got message %+v, want a refusal with code %q", m, code)
	}
	wantEnd(t, c)
}

func wantEnd(t testing.TB, c *net.UnixConn) {
	t.Helper()
	if m, _, err := receive(c, false); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
		t.Fatalf("got message %+v and error %v, want the end of the stream", m, err)
	}
}

func TestHostileBeforeProof(t *testing.T) {
	b := newInstance(t, peer("b", 2))
	raw := func(t *testing.T, c *net.UnixConn, bytes []byte) {
		_, err := c.Write(bytes)
		must(t, err)
	}
	for _, c := range []struct {
		name string
		do   func(t *testing.T, c *net.UnixConn)
		code backend.Code // zero: the connection just ends
	}{
		{"goes away", func(t *testing.T, c *net.UnixConn) { must(t, c.CloseWrite()) }, 0},
		{"garbage", func(t *testing.T, c *net.UnixConn) { raw(t, c, []byte("GET / HTTP/1.1")) }, backend.BadRequest},
		{"too long", func(t *testing.T, c *net.UnixConn) { raw(t, c, make([]byte, 4*maxMessage)) }, backend.BadRequest},
		{"other version", func(t *testing.T, c *net.UnixConn) {
			b := (&message{kind: hello}).append(nil)
			b[1]++
			raw(t, c, b)
		}, backend.BadRequest},
		{"borrows at once", func(t *testing.T, c *net.UnixConn) {
			must(t, send(c, &message{kind: borrow, region: 5}, -1))
		}, backend.BadRequest},
		{"no grant", func(t *testing.T, c *net.UnixConn) {
			must(t, send(c, &message{kind: hello, grant: 99}, -1))
		}, backend.Denied},
		{"wrong proof", func(t *testing.T, c *net.UnixConn) {
			must(t, send(c, &message{kind: hello, grant: answered(t, b).grant}, -1))
			_, _, err := receive(c, false)
			must(t, err)
			must(t, send(c, &message{kind: proof}, -1))
		}, backend.Denied},
		{"returns the target's proof", func(t *testing.T, c *net.UnixConn) {
			must(t, send(c, &message{kind: hello, grant: answered(t, b).grant}, -1))
			m, _, err := receive(c, false)
			must(t, err)
			must(t, send(c, &message{kind: proof, proof: m.proof}, -1))
		}, backend.Denied},
		{"borrows before its proof", func(t *testing.T, c *net.UnixConn) {
			must(t, send(c, &message{kind: hello, grant: answered(t, b).grant}, -1))
			_, _, err := receive(c, false)
			must(t, err)
			must(t, send(c, &message{kind: borrow, region: 5}, -1))
		}, backend.Denied},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn := dial(t, b)
			c.do(t, conn)
			if c.code == 0 {
				wantEnd(t, conn)
			} else {
				wantRefused(t, conn, c.code)
			}
		})
	}
	if len(b.guests) != 0 {
		t.Errorf("%d became guests", len(b.guests))
	}
}

// guestConn connects and proves itself.
func guestConn(t testing.TB, i *Instance) *net.UnixConn {
	t.Helper()
	c := dial(t, i)
	_, err := introduce(c, answered(t, i), testName)
	must(t, err)
	return c
}

// noteOf is the note of a region at an offset of its file.
func noteOf(offset uint64) []byte { return binary.BigEndian.AppendUint64(nil, offset) }

func TestHostileGuest(t *testing.T) {
	b := newInstance(t, peer("b", 2))
	moverOf(b).serve = func(ctx context.Context, _ *Guest, _ []byte) ([]byte, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	good := register(t, b, memory(t, 5, 4096, backend.RemoteRead))
	register(t, b, memory(t, 6, 4096, 0))
	key := regionKey(good.Key)

	t.Run("refusals leave it connected", func(t *testing.T) {
		c := guestConn(t, b)
		for _, r := range []struct {
			region backend.RegionID
			key    regionKey
			code   backend.Code
		}{
			{0, key, backend.BadRequest},
			{math.MaxUint64, key, backend.BadRequest},
			{6, regionKey{}, backend.Denied},
			{5, regionKey{}, backend.Denied},
		} {
			must(t, send(c, &message{kind: borrow, region: r.region, key: r.key}, -1))
			m, _, err := receive(c, false)
			must(t, err)
			if m.kind != refused || m.region != r.region || m.code != r.code {
				t.Errorf("region %d: got %+v, want a refusal with code %q", r.region, m, r.code)
			}
		}
		// What it is lent cannot be written, mapped or not.
		must(t, send(c, &message{kind: borrow, region: 5, key: key}, -1))
		m, fd, err := receive(c, true)
		must(t, err)
		defer unix.Close(fd)
		if m.kind != lent || m.size != 4096 || !bytes.Equal(m.note, noteOf(4096)) || m.rights != backend.RemoteRead {
			t.Errorf("got %+v", m)
		}
		if _, err := unix.Pwrite(fd, []byte{1}, 4096); err == nil {
			t.Error("the descriptor of a region without RemoteWrite can be written")
		}
		if _, _, err := MapFile(fd, 4096, m.size, all); err == nil {
			t.Error("the descriptor of a region without RemoteWrite can be mapped for writing")
		}
	})
	for _, h := range []struct {
		name string
		do   func(t *testing.T, c *net.UnixConn)
	}{
		{"garbage", func(t *testing.T, c *net.UnixConn) { c.Write([]byte{99, 1, 2}) }},
		{"second hello", func(t *testing.T, c *net.UnixConn) { must(t, send(c, &message{kind: hello}, -1)) }},
		{"too long", func(t *testing.T, c *net.UnixConn) { c.Write(make([]byte, 100*maxMessage)) }},
		{"two questions at once", func(t *testing.T, c *net.UnixConn) {
			must(t, send(c, &message{kind: ask, note: []byte("wait")}, -1))
			must(t, send(c, &message{kind: ask}, -1))
		}},
		{"a target's message", func(t *testing.T, c *net.UnixConn) { must(t, send(c, &message{kind: lent, region: 5}, 0)) }},
	} {
		t.Run(h.name, func(t *testing.T) {
			c := guestConn(t, b)
			h.do(t, c)
			wantEnd(t, c)
			// It has been revoked, and counts as there until it closes.
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
			defer cancel()
			wantCode(t, b.Fence(ctx, peer("a", 1)), backend.Cancelled)
			must(t, send(c, &message{kind: borrow, region: 5, key: key}, -1)) // nobody answers
			must(t, c.Close())
			must(t, b.Fence(soon(t), peer("a", 1)))
		})
	}
	t.Run("descriptors sent to the target are closed", func(t *testing.T) {
		c := guestConn(t, b)
		before, err := held()
		must(t, err)
		for range 50 {
			must(t, send(c, &message{kind: leaving}, 0))
		}
		must(t, send(c, &message{kind: borrow, region: 77}, -1))
		_, _, err = receive(c, false) // all before it have been read
		must(t, err)
		after, err := held()
		must(t, err)
		if after != before {
			t.Errorf("%d descriptors are open, before there were %d", after[0], before[0])
		}
	})
}

// fakeTarget listens as a target would and lets a script speak after the handshake. It returns an answer.
func fakeTarget(t testing.TB, script func(c *net.UnixConn)) *answer {
	t.Helper()
	a := &answer{instance: instanceID{1}, grant: 1, secret: secret{2}, socket: filepath.Join(socketDir(t), "x")}
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: a.socket, Net: network})
	must(t, err)
	ended := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-ended })
	go func() {
		defer close(ended)
		c, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(backendtest.Patience))
		m, _, err := receive(c, false)
		if err != nil {
			return
		}
		reply := message{kind: challenge}
		reply.proof = a.secret.prove(testName, targetProof, &m.nonce, &reply.nonce)
		send(c, &reply, -1)
		receive(c, false)
		send(c, &message{kind: welcome}, -1)
		script(c)
		receive(c, false)
	}()
	return a
}

func establish(t testing.TB, a *answer) (backend.Endpoint, error) {
	t.Helper()
	i := newInstance(t, peer("a", 1))
	register(t, i, memory(t, 1, 4096, 0))
	h, err := i.Offer(soon(t), peer("evil", 6))
	must(t, err)
	return h.Establish(soon(t), a.encode())
}

func TestHostileTarget(t *testing.T) {
	file := func(size, seals int) int {
		m, err := backendtest.NewMemfd(5, size, all, seals)
		must(t, err)
		must(t, unix.Munmap(m.Bytes))
		t.Cleanup(func() { unix.Close(m.FD) })
		return m.FD
	}
	sealed, unsealed := file(8192, unix.F_SEAL_SHRINK), file(8192, unix.F_SEAL_GROW)
	ordinary, err := os.CreateTemp(socketDir(t), "x")
	must(t, err)
	must(t, ordinary.Truncate(1<<20))
	defer ordinary.Close()
	ok := message{kind: lent, region: 5, rights: all, size: 8192, note: noteOf(4096)}
	with := func(change func(m *message)) message {
		m := ok
		change(&m)
		return m
	}
	var before [2]int
	for i, h := range []struct {
		name  string
		reply message
		fd    int
		code  backend.Code
		text  string
	}{
		{"unsealed", ok, unsealed, backend.Unsupported, "F_SEAL_SHRINK"},
		{"ordinary file", ok, int(ordinary.Fd()), backend.Unsupported, "F_SEAL_SHRINK"},
		{"not a file", ok, 0, backend.Unsupported, "F_SEAL_SHRINK"},
		{"too small", with(func(m *message) { m.size++ }), sealed, backend.Unsupported, "12289 of a file of 12288"},
		{"size zero", with(func(m *message) { m.size = 0 }), sealed, backend.Unsupported, "cannot be"},
		{"size overflow", with(func(m *message) { m.size = math.MaxUint64 }), sealed, backend.Unsupported, "cannot be"},
		{"offset overflow", with(func(m *message) { m.note = noteOf(math.MaxUint64 - 4096) }), sealed, backend.Unsupported, "cannot be"},
		{"sum overflow", with(func(m *message) { m.note = noteOf(math.MaxInt64 - 4096) }), sealed, backend.Unsupported, "cannot be"},
		{"made-up code", message{kind: refused, region: 5, code: 200, text: "x"}, -1, backend.Internal, "x"},
		{"no descriptor", ok, -1, backend.Unsupported, "F_SEAL_SHRINK"},
		{"no note", with(func(m *message) { m.note = nil }), sealed, backend.Unsupported, "a note of 0 bytes"},
		{"an answer to no question", message{kind: told}, -1, backend.PathDown, "malformed"},
		{"descriptor with an answer", message{kind: told}, sealed, backend.PathDown, "malformed"},
		{"descriptor with a refusal", message{kind: refused, region: 5}, sealed, backend.PathDown, "malformed"},
		{"other region", with(func(m *message) { m.region = 6 }), sealed, backend.PathDown, "malformed"},
		{"other message", message{kind: hello}, -1, backend.PathDown, "malformed"},
	} {
		t.Run(h.name, func(t *testing.T) {
			e, err := establish(t, fakeTarget(t, func(c *net.UnixConn) {
				receive(c, false)
				send(c, &h.reply, h.fd)
			}))
			must(t, err)
			remote := backend.Remote{Peer: peer("evil", 6), Region: 5, Kind: backend.HostMemory, Key: make([]byte, 16)}
			_, err = e.Session(soon(t), 1, remote, new(sink))
			wantCode(t, err, h.code, h.text)
		})
		now, err := held()
		must(t, err)
		if i == 0 { // the first may have had something to set up
			before = now
		}
		if now != before {
			t.Errorf("after %q %d descriptors and %d mappings are left, before there were %d and %d",
				h.name, now[0], now[1], before[0], before[1])
		}
	}
	t.Run("answers twice, with two descriptors", func(t *testing.T) {
		e, err := establish(t, fakeTarget(t, func(c *net.UnixConn) {
			receive(c, false)
			send(c, &ok, sealed)
			c.WriteMsgUnix(ok.append(nil), unix.UnixRights(sealed, sealed), nil)
		}))
		must(t, err)
		remote := backend.Remote{Peer: peer("evil", 6), Region: 5, Kind: backend.HostMemory, Key: make([]byte, 16)}
		e.Session(soon(t), 1, remote, new(sink)) // whether it sees the first answer is open
		wantDone(t, e.Done())
	})
	t.Run("speaks without being asked", func(t *testing.T) {
		e, err := establish(t, fakeTarget(t, func(c *net.UnixConn) { send(c, &ok, sealed) }))
		must(t, err)
		wantDone(t, e.Done())
	})
	t.Run("does not know the secret", func(t *testing.T) {
		a := fakeTarget(t, func(c *net.UnixConn) {})
		_, err := establish(t, &answer{instance: a.instance, grant: 1, secret: secret{9}, socket: a.socket})
		wantCode(t, err, backend.Denied)
	})
	t.Run("never answers", func(t *testing.T) {
		a := &answer{socket: filepath.Join(socketDir(t), "x")}
		l, err := net.ListenUnix(network, &net.UnixAddr{Name: a.socket, Net: network})
		must(t, err)
		defer l.Close()
		i := newInstance(t, peer("a", 1))
		h, err := i.Offer(soon(t), peer("evil", 6))
		must(t, err)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer cancel()
		_, err = h.Establish(ctx, a.encode())
		wantCode(t, err, backend.Cancelled)
	})
	t.Run("never lends", func(t *testing.T) {
		release := make(chan struct{})
		e, err := establish(t, fakeTarget(t, func(c *net.UnixConn) { <-release }))
		must(t, err)
		defer close(release)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer cancel()
		remote := backend.Remote{Peer: peer("evil", 6), Region: 5, Kind: backend.HostMemory, Key: make([]byte, 16)}
		_, err = e.Session(ctx, 1, remote, new(sink))
		wantCode(t, err, backend.Cancelled)
	})
}
