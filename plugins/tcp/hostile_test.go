package tcp

import (
	"bytes"
	"io"
	"math"
	"net"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

func TestFramesRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		r := request{
			op:     rapid.SampledFrom([]backend.Op{backend.Write, backend.Read}).Draw(rt, "op"),
			id:     rapid.Uint64().Draw(rt, "id"),
			region: backend.RegionID(rapid.Uint64().Draw(rt, "region")),
			count:  rapid.Uint32Range(1, maxSegments).Draw(rt, "count"),
			total:  rapid.Uint64Range(1, maxTransfer).Draw(rt, "total"),
		}
		b := appendRequest(nil, r)
		if got, err := parseRequest(b); err != nil || got != r || len(b) != requestSize {
			rt.Fatalf("got %+v of %d bytes, %v; want %+v", got, len(b), err, r)
		}
		p := reply{id: r.id, bytes: r.total}
		b = appendReply(nil, p)
		if got, err := parseReply(b); err != nil || got != p || len(b) != replySize {
			rt.Fatalf("got %+v of %d bytes, %v; want %+v", got, len(b), err, p)
		}
		s := span{rapid.Uint64().Draw(rt, "offset"), rapid.Uint64().Draw(rt, "length")}
		if got := parseSpan(appendSpan(nil, s)); got != s {
			rt.Fatalf("got %+v, want %+v", got, s)
		}
		size := rapid.Uint64().Draw(rt, "size")
		end := new(bigSum).add(s.offset, s.length)
		if want := s.length > 0 && end.hi == 0 && end.lo <= size; s.inside(size) != want {
			rt.Fatalf("%+v inside a region of %d bytes: got %v", s, size, !want)
		}
	})
}

// bigSum adds without overflow.
type bigSum struct{ hi, lo uint64 }

func (b *bigSum) add(x, y uint64) *bigSum {
	b.lo = x + y
	if b.lo < x {
		b.hi = 1
	}
	return b
}

// TestHostileInitiator sends what no initiator of ours would, over a connection that has proved itself. After a
// refusal the connection lives on; after what is no request at all, it ends. Memory stays as it is either way.
func TestHostileInitiator(t *testing.T) {
	b := node(t, "b", config{})
	far, secret := make([]byte, 4096), make([]byte, 4096)
	fill(far, 1)
	fill(secret, 2)
	wantFar, wantSecret := bytes.Clone(far), bytes.Clone(secret)
	b.lend(t, 1, far, everything)
	b.lend(t, 2, secret, 0)
	b.lend(t, 3, make([]byte, 64), backend.RemoteWrite)
	b.lend(t, 4, make([]byte, 64), backend.RemoteRead)

	// damaged returns a good request with one byte changed.
	damaged := func(at int, value byte) []byte {
		f := readFrame(1, 1, span{0, 64})
		f[at] = value
		return f
	}
	announcing := func(r request, spans ...span) []byte {
		f := appendRequest(nil, r)
		for _, s := range spans {
			f = appendSpan(f, s)
		}
		return f
	}
	tests := map[string]struct {
		frame []byte
		code  backend.Code // of the refusal; zero when the connection has to end
	}{
		"write beyond the end":  {writeFrame(5, 1, span{4000, 97}), backend.BadRequest},
		"read beyond the end":   {readFrame(5, 1, span{4096, 1}), backend.BadRequest},
		"second range beyond":   {writeFrame(5, 1, span{0, 10}, span{4090, 7}), backend.BadRequest},
		"offset that overflows": {readFrame(5, 1, span{math.MaxUint64, 2}), backend.BadRequest},
		"empty range":           {readFrame(5, 1, span{0, 1}, span{5, 0}), backend.BadRequest},
		"unknown region":        {writeFrame(5, 99, span{0, 10}), backend.BadRequest},
		"region zero":           {readFrame(5, 0, span{0, 10}), backend.BadRequest},
		"read without rights":   {readFrame(5, 2, span{0, 10}), backend.Denied},
		"write without rights":  {writeFrame(5, 2, span{0, 10}), backend.Denied},
		"read of write-only":    {readFrame(5, 3, span{0, 10}), backend.Denied},
		"write to read-only":    {writeFrame(5, 4, span{0, 10}), backend.Denied},
		"wrong magic":           {damaged(0, 'X'), 0},
		"unknown operation":     {damaged(4, 3), 0},
		"reserved byte":         {damaged(6, 1), 0},
		"reserved word":         {damaged(31, 1), 0},
		"no segments":           {announcing(request{op: backend.Read, region: 1, total: 64}), 0},
		"giant table":           {announcing(request{op: backend.Read, region: 1, count: math.MaxUint32, total: 64}), 0},
		"giant transfer":        {announcing(request{op: backend.Write, region: 1, count: 1, total: math.MaxUint64}), 0},
		"total too small":       {announcing(request{op: backend.Read, region: 1, count: 1, total: 63}, span{0, 64}), 0},
		"total too large":       {announcing(request{op: backend.Read, region: 1, count: 1, total: 65}, span{0, 64}), 0},
		"lengths that overflow": {announcing(request{op: backend.Read, region: 1, count: 2, total: 64}, span{0, math.MaxUint64}, span{0, 65}), 0},
		"flush not asked for":   {flushFrame(1), 0},
		"flush with a payload":  {announcing(request{op: opFlush, id: 1, total: 64}), 0},
		"random bytes":          {bytes.Repeat([]byte{0xa5, 0x17, 0xff}, 100), 0},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			a := node(t, "a", config{options: map[string]string{"connections": "1", "listen": "off"}})
			conn := rawInitiator(t, a, b)
			if _, err := conn.Write(test.frame); err != nil {
				t.Fatal(err)
			}
			if test.code == 0 {
				wantEnd(t, conn)
			} else {
				r, text := readReply(t, conn)
				if r.code != test.code || r.id != 5 || len(text) == 0 {
					t.Fatalf("got reply %+v %q, want code %q", r, text, test.code)
				}
				if _, err := conn.Write(readFrame(6, 1, span{0, 64})); err != nil {
					t.Fatal(err)
				}
				if r, payload := readReply(t, conn); r.code != 0 || r.id != 6 || !bytes.Equal(payload, wantFar[:64]) {
					t.Fatalf("after the refusal, a good read got %+v", r)
				}
			}
			conn.Close()
			must(t, b.Fence(t.Context(), a.self))
			if !bytes.Equal(far, wantFar) || !bytes.Equal(secret, wantSecret) {
				t.Fatal("memory has changed")
			}
		})
	}
}

// TestRefusalIsAttributed: the target refuses what the initiator could not know, and nothing else breaks.
func TestRefusalIsAttributed(t *testing.T) {
	p := newPair(t, 4096, nil)
	must(t, p.b.Deregister(t.Context(), 2))
	p.b.lend(t, 3, make([]byte, 64), 0)
	forged := p.remote
	forged.Region = 3
	forgedSession := bind(t, p.endpoint, 1, forged, p.completions)
	for name, test := range map[string]struct {
		session  *session
		transfer backend.Transfer
		code     backend.Code
	}{
		"write to a region that is gone":  {p.session, write(1, evenly(4, 4096)...), backend.BadRequest},
		"read from a region that is gone": {p.session, read(1, evenly(4, 4096)...), backend.BadRequest},
		"write with forged rights":        {forgedSession, write(1, evenly(4, 64)...), backend.Denied},
		"read with forged rights":         {forgedSession, read(1, evenly(4, 64)...), backend.Denied},
	} {
		t.Run(name, func(t *testing.T) {
			must(t, test.session.Post(test.transfer))
			c := p.completions.Next(t)
			wantCode(t, c.Err, test.code)
			wantAll(t, c.Outcomes, 4, backend.Failed)
			if !strings.Contains(c.Err.Error(), "b@7") || !strings.Contains(c.Err.Error(), "region") {
				t.Errorf("the error does not say where: %v", c.Err)
			}
		})
	}
	wantOpen(t, p.endpoint.Done(), "a refusal broke the endpoint")
}

// TestHostileTarget answers a read of 64 bytes, or nothing, with what no target of ours would.
func TestHostileTarget(t *testing.T) {
	tests := map[string]func(id uint64) []byte{
		"wrong id": func(id uint64) []byte {
			return append(appendReply(nil, reply{id: id + 1, bytes: 64}), make([]byte, 64)...)
		},
		"too short":       func(id uint64) []byte { return append(appendReply(nil, reply{id: id, bytes: 63}), make([]byte, 63)...) },
		"too long":        func(id uint64) []byte { return append(appendReply(nil, reply{id: id, bytes: 65}), make([]byte, 65)...) },
		"giant":           func(id uint64) []byte { return appendReply(nil, reply{id: id, bytes: math.MaxUint64}) },
		"giant refusal":   func(id uint64) []byte { return appendReply(nil, reply{code: backend.Denied, id: id, bytes: 1 << 30}) },
		"refusal as busy": func(id uint64) []byte { return appendReply(nil, reply{code: backend.Busy, id: id}) },
		"unknown status":  func(id uint64) []byte { return appendReply(nil, reply{code: 77, id: id}) },
		"flush of bytes":  func(id uint64) []byte { return appendReply(nil, reply{code: statusFlush, id: id, bytes: 64}) },
		"wrong magic":     func(uint64) []byte { return bytes.Repeat([]byte{7}, 64) },
		"reserved byte":   func(id uint64) []byte { b := appendReply(nil, reply{id: id, bytes: 64}); b[6] = 1; return b },
	}
	for name, answer := range tests {
		for how, post := range map[string]func(t *testing.T, rt *rawTarget, transfer backend.Transfer) received{
			"to the reader": func(t *testing.T, rt *rawTarget, transfer backend.Transfer) received {
				must(t, rt.session.Post(transfer))
				return rt.readRequest(t)
			},
			"to the poster": func(t *testing.T, rt *rawTarget, transfer backend.Transfer) received {
				r, _ := rt.lead(t, transfer)
				return r
			},
		} {
			t.Run(name+" "+how, func(t *testing.T) {
				rt := newRawTarget(t, 128, nil)
				id := post(t, rt, read(1, backend.Segment{Length: 64})).id
				if _, err := rt.conn.Write(answer(id)); err != nil {
					t.Fatal(err)
				}
				c := rt.completions.Next(t)
				wantCode(t, c.Err, backend.PathDown)
				if !strings.Contains(c.Err.Error(), "protocol") {
					t.Errorf("the error does not name the cause: %v", c.Err)
				}
				wantAll(t, c.Outcomes, 1, backend.Failed)
				if !bytes.Equal(rt.near[64:], make([]byte, 64)) {
					t.Error("memory outside the transfer has changed")
				}
			})
		}
	}
	t.Run("reply to nothing", func(t *testing.T) {
		rt := newRawTarget(t, 64, nil)
		rt.reply(t, reply{id: 1})
		wantClosed(t, rt.endpoint.Done(), "the end of the endpoint")
		rt.completions.Empty(t)
	})
	t.Run("reply twice", func(t *testing.T) {
		rt := newRawTarget(t, 64, nil)
		must(t, rt.session.Post(write(1, evenly(1, 64)...)))
		id := rt.readRequest(t).id
		rt.reply(t, reply{id: id})
		if c := rt.completions.Next(t); c.Err != nil {
			t.Fatal(c.Err)
		}
		rt.reply(t, reply{id: id})
		wantClosed(t, rt.endpoint.Done(), "the end of the endpoint")
	})
	t.Run("ack before the end", func(t *testing.T) {
		const size = 64 << 20
		rt := newRawTarget(t, size, nil)
		must(t, rt.session.Post(write(1, evenly(64, size)...)))
		rt.reply(t, reply{id: rt.readHead(t).id})
		rt.conn.Close()
		c := rt.completions.Next(t)
		wantCode(t, c.Err, backend.PathDown)
		wantCut(t, c.Outcomes, 64)
	})
	t.Run("refusal with control characters", func(t *testing.T) {
		rt := newRawTarget(t, 64, nil)
		must(t, rt.session.Post(write(1, evenly(1, 64)...)))
		rt.reply(t, reply{code: backend.Denied, id: rt.readRequest(t).id, bytes: 3}, []byte("a\n\x1b")...)
		c := rt.completions.Next(t)
		wantCode(t, c.Err, backend.Denied)
		if strings.ContainsAny(c.Err.Error(), "\n\x1b") {
			t.Errorf("the target wrote into the log: %q", c.Err)
		}
	})
}

// FuzzRequests feeds a served connection with whatever the fuzzer makes up. It must end without a panic, and
// must not touch the region that gives no rights.
func FuzzRequests(f *testing.F) {
	f.Add(writeFrame(1, 1, span{0, 64}))
	f.Add(readFrame(2, 1, span{8, 8}, span{0, 4096}))
	f.Add(append(readFrame(3, 2, span{0, 8}), writeFrame(4, 9, span{0, 3})...))
	f.Add(appendRequest(nil, request{op: backend.Read, region: 1, count: math.MaxUint32, total: 1}))
	b := node(f, "b", config{})
	closed := make([]byte, 4096)
	b.lend(f, 1, make([]byte, 4096), everything)
	b.lend(f, 2, closed, 0)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(f, err)
	f.Cleanup(func() { l.Close() })
	f.Fuzz(func(t *testing.T, input []byte) {
		client, err := net.Dial("tcp", l.Addr().String())
		must(t, err)
		defer client.Close()
		conn, err := l.Accept()
		must(t, err)
		stream, err := newStream(conn.(*net.TCPConn), nil)
		must(t, err)
		drained := make(chan struct{})
		go func() {
			defer close(drained)
			_, _ = io.Copy(io.Discard, client)
		}()
		ended := make(chan error, 1)
		go func() { ended <- newServed(b, backend.Peer{}, stream, nil).serve() }()
		_, _ = client.Write(input)
		_ = client.(*net.TCPConn).CloseWrite()
		select {
		case err := <-ended:
			if err == nil {
				t.Error("serving ended without a reason")
			}
		case <-time.After(backendtest.Patience):
			t.Error("serving does not end")
		}
		stream.close(true)
		<-drained
		if !bytes.Equal(closed, make([]byte, len(closed))) {
			t.Fatal("a region without rights was written")
		}
		if n := b.regions.Get(1).users.Inside(); n != 0 {
			t.Fatalf("%d users of the region are left over", n)
		}
	})
}

func FuzzReplies(f *testing.F) {
	f.Add(appendReply(nil, reply{id: 1, bytes: 5}))
	f.Add(appendReply(nil, reply{code: backend.Denied, id: 1, bytes: 5}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < replySize {
			return
		}
		r, err := parseReply(b)
		if err == nil && !bytes.Equal(appendReply(nil, r), b[:replySize]) {
			t.Fatalf("%x was read as %+v", b[:replySize], r)
		}
	})
}

func FuzzAnswers(f *testing.F) {
	a := answer{target: backend.Peer{Node: "b", Incarnation: 1}, addresses: []string{"127.0.0.1:1"}}
	f.Add(a.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseAnswer(b)
		if err == nil && !bytes.Equal(a.encode(), b) {
			t.Fatalf("%x was read as %+v", b, a)
		}
	})
}
