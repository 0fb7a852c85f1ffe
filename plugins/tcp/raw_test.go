package tcp

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

// received is a request that a raw target has read.
type received struct {
	request
	spans   []span
	payload []byte
}

// readRequest reads one request, with its payload.
func (rt *rawTarget) readRequest(t testing.TB) received {
	t.Helper()
	r := rt.readHead(t)
	if r.op == 1 {
		r.payload = make([]byte, r.total)
		rt.readFull(t, r.payload)
	}
	return r
}

// readHead reads one request up to its payload.
func (rt *rawTarget) readHead(t testing.TB) received {
	t.Helper()
	must(t, rt.conn.SetDeadline(time.Now().Add(backendtest.Patience)))
	head := make([]byte, requestSize)
	rt.readFull(t, head)
	parsed, err := parseRequest(head)
	must(t, err)
	r := received{request: parsed}
	table := make([]byte, spanSize*parsed.count)
	rt.readFull(t, table)
	for ; len(table) > 0; table = table[spanSize:] {
		r.spans = append(r.spans, parseSpan(table))
	}
	return r
}

func (rt *rawTarget) readFull(t testing.TB, b []byte) {
	t.Helper()
	if _, err := io.ReadFull(rt.conn, b); err != nil {
		t.Fatal(err)
	}
}

// reply sends a reply's header and what follows it.
func (rt *rawTarget) reply(t testing.TB, r reply, rest ...byte) {
	t.Helper()
	if _, err := rt.conn.Write(append(appendReply(nil, r), rest...)); err != nil {
		t.Fatal(err)
	}
}

// requestFrame is a request without payload, as an initiator sends it; total is the sum of the spans.
func requestFrame(op backend.Op, id uint64, region backend.RegionID, spans ...span) []byte {
	r := request{op: op, id: id, region: region, count: uint32(len(spans))}
	for _, s := range spans {
		r.total += s.length
	}
	b := appendRequest(nil, r)
	for _, s := range spans {
		b = appendSpan(b, s)
	}
	return b
}

func readFrame(id uint64, region backend.RegionID, spans ...span) []byte {
	return requestFrame(backend.Read, id, region, spans...)
}

// writeFrame is a whole write, whose payload is zeros.
func writeFrame(id uint64, region backend.RegionID, spans ...span) []byte {
	b := requestFrame(backend.Write, id, region, spans...)
	for _, s := range spans {
		b = append(b, make([]byte, s.length)...)
	}
	return b
}

// readReply reads a reply and what follows its header.
func readReply(t testing.TB, conn net.Conn) (reply, []byte) {
	t.Helper()
	head := make([]byte, replySize)
	if _, err := io.ReadFull(conn, head); err != nil {
		t.Fatal(err)
	}
	r, err := parseReply(head)
	must(t, err)
	rest := make([]byte, r.bytes)
	if _, err := io.ReadFull(conn, rest); err != nil {
		t.Fatal(err)
	}
	return r, rest
}

// wantEnd checks that the other end closes the connection without sending anything.
func wantEnd(t testing.TB, conn net.Conn) {
	t.Helper()
	must(t, conn.SetReadDeadline(time.Now().Add(backendtest.Patience)))
	n, err := conn.Read(make([]byte, 1))
	if n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("read %d bytes, error %v; want the end of the connection", n, err)
	}
}
