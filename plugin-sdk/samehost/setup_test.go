package samehost

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

func wantEmpty(t testing.TB, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	must(t, err)
	if len(left) > 0 {
		t.Errorf("left in the socket directory: %v", left)
	}
}

func TestSocketDir(t *testing.T) {
	for _, c := range []struct {
		name    string
		prepare func(path string) error
		text    string // of the error; empty when it works
	}{
		{"missing", func(string) error { return nil }, ""},
		{"private", func(path string) error { return os.Mkdir(path, 0o700) }, ""},
		{"open to others", func(path string) error { return os.Mkdir(path, 0o755) }, "open to other users"},
		{"file", func(path string) error { return os.WriteFile(path, nil, 0o600) }, "not a directory"},
		{"symbolic link", func(path string) error { return os.Symlink(os.TempDir(), path) }, "not a directory"},
		{"parent missing", func(path string) error { return os.Remove(filepath.Dir(path)) }, "create the socket directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(socketDir(t), "s")
			must(t, c.prepare(dir))
			i, err := openInstance(peer("a", 1), map[string]string{"socket_dir": dir})
			if c.text == "" {
				must(t, err)
				info, err := os.Stat(dir)
				must(t, err)
				if info.Mode().Perm() != 0o700 {
					t.Errorf("the directory has mode %o", info.Mode().Perm())
				}
				must(t, i.Close())
				must(t, i.Close())
				wantEmpty(t, dir)
				return
			}
			wantCode(t, err, backend.BadRequest, c.text)
		})
	}
	long := filepath.Join(socketDir(t), strings.Repeat("x", 80))
	_, err := openInstance(peer("a", 1), map[string]string{"socket_dir": long})
	if err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("got %v, want an error about a path that is too long", err)
	}
}

func TestDefaultSocketDir(t *testing.T) {
	temp := socketDir(t)
	t.Setenv("TMPDIR", temp)
	i := newInstance(t, peer("a", 1), "socket_dir=")
	if parent := filepath.Dir(filepath.Dir(i.socket)); parent != temp {
		t.Errorf("the socket is %s, want it in a directory in %s", i.socket, temp)
	}
}

// TestSweep leaves sockets that are listened on and removes those of the dead.
func TestSweep(t *testing.T) {
	dir := socketDir(t)
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: filepath.Join(dir, "dead"+suffix), Net: network})
	must(t, err)
	l.SetUnlinkOnClose(false)
	must(t, l.Close())
	first := newInstance(t, peer("a", 1), "socket_dir="+dir)
	newInstance(t, peer("b", 2), "socket_dir="+dir)
	left, err := os.ReadDir(dir)
	must(t, err)
	if len(left) != 2 {
		t.Errorf("the directory has %v, want the two sockets in use", left)
	}
	if _, err := os.Stat(first.socket); err != nil {
		t.Errorf("the socket of a living instance is gone: %v", err)
	}
}

func TestOfferAndAnswerRefuse(t *testing.T) {
	a, b := newInstance(t, peer("a", 1)), newInstance(t, peer("b", 2))
	offer := func(to backend.Peer) []byte {
		h, err := a.Offer(soon(t), to)
		must(t, err)
		defer h.Abandon()
		return h.Offer()
	}
	_, err := a.Offer(soon(t), backend.Peer{Node: "b", Incarnation: 2, Host: "elsewhere"})
	wantCode(t, err, backend.Unsupported)
	_, err = a.Offer(soon(t), peer(strings.Repeat("b", 1<<16), 2))
	wantCode(t, err, backend.BadRequest)
	_, err = b.Answer(soon(t), a.self, nil)
	wantCode(t, err, backend.BadRequest)
	_, err = b.Answer(soon(t), a.self, append(offer(b.self), 0))
	wantCode(t, err, backend.BadRequest)
	_, err = b.Answer(soon(t), peer("c", 1), offer(b.self))
	wantCode(t, err, backend.Denied)
	_, err = b.Answer(soon(t), a.self, offer(peer("b", 1)))
	wantCode(t, err, backend.PeerGone)
}

func TestAnswersAreBounded(t *testing.T) {
	a, b := newInstance(t, peer("a", 1)), newInstance(t, peer("b", 2))
	h, err := a.Offer(soon(t), b.self)
	must(t, err)
	for range maxGrants {
		_, err := b.Answer(soon(t), a.self, h.Offer())
		must(t, err)
	}
	_, err = b.Answer(soon(t), a.self, h.Offer())
	wantCode(t, err, backend.Busy)

	b.mu.Lock()
	for _, g := range b.grants {
		g.expires = time.Now().Add(-time.Second)
	}
	b.mu.Unlock()
	_, err = b.Answer(soon(t), a.self, h.Offer()) // takes the place of one that ran out
	must(t, err)
}

// TestEstablishRefuses spoils an answer, for a target in this process and for one in another.
func TestEstablishRefuses(t *testing.T) {
	a, b := newInstance(t, peer("a", 1)), newInstance(t, peer("b", 2))
	c := startChild(t, peer("c", 3))
	for _, target := range []struct {
		name string
		to   backend.Peer
		by   backendtest.Target
	}{{"one process", b.self, b}, {"two processes", c.Self, c}} {
		establish := func(change func(x *answer) []byte) error {
			h, err := a.Offer(soon(t), target.to)
			must(t, err)
			bytes, err := target.by.Answer(soon(t), a.self, h.Offer())
			must(t, err)
			x, err := parseAnswer(bytes)
			must(t, err)
			_, err = h.Establish(soon(t), change(&x))
			return err
		}
		for _, r := range []struct {
			name   string
			change func(x *answer) []byte
			code   backend.Code
		}{
			{"wrong secret", func(x *answer) []byte { x.secret[7] ^= 1; return x.encode() }, backend.Denied},
			{"wrong grant", func(x *answer) []byte { x.grant += 1000; return x.encode() }, backend.Denied},
			{"nothing", func(x *answer) []byte { return nil }, backend.BadRequest},
			{"too much", func(x *answer) []byte { return append(x.encode(), 0) }, backend.BadRequest},
			{"unknown instance", func(x *answer) []byte { x.instance, x.socket = instanceID{}, x.socket+"x"; return x.encode() }, backend.PathDown},
			{"relative path", func(x *answer) []byte { x.instance, x.socket = instanceID{}, "@x"; return x.encode() }, backend.BadRequest},
		} {
			t.Run(target.name+"/"+r.name, func(t *testing.T) { wantCode(t, establish(r.change), r.code) })
		}
		t.Run(target.name+"/used twice", func(t *testing.T) {
			h, err := a.Offer(soon(t), target.to)
			must(t, err)
			bytes, err := target.by.Answer(soon(t), a.self, h.Offer())
			must(t, err)
			_, err = h.Establish(soon(t), bytes)
			must(t, err)
			_, err = h.Establish(soon(t), bytes)
			wantCode(t, err, backend.Denied)
		})
	}
}

func TestExpiredGrant(t *testing.T) {
	a, b := newInstance(t, peer("a", 1)), newInstance(t, peer("b", 2))
	h, err := a.Offer(soon(t), b.self)
	must(t, err)
	bytes, err := b.Answer(soon(t), a.self, h.Offer())
	must(t, err)
	b.mu.Lock()
	b.grants[b.lastGrant].expires = time.Now().Add(-time.Second)
	b.mu.Unlock()
	_, err = h.Establish(soon(t), bytes)
	wantCode(t, err, backend.Denied)
}

func TestEverythingAfterClose(t *testing.T) {
	p := newPair(t, 4096)
	h, err := p.a.Offer(soon(t), p.b.self)
	must(t, err)
	bytes, err := p.b.Answer(soon(t), p.a.self, h.Offer())
	must(t, err)
	must(t, p.b.Close())
	wantDone(t, p.endpoint.Done())
	wantCode(t, post(p.session, backend.Write, 1, backend.Segment{Length: 1}), backend.PathDown)
	_, err = h.Establish(soon(t), bytes)
	wantCode(t, err, backend.PathDown)
	_, err = p.b.Answer(soon(t), p.a.self, h.Offer())
	wantCode(t, err, backend.PathDown)
	_, err = p.b.Register(soon(t), p.far)
	wantCode(t, err, backend.PathDown)
	must(t, p.b.Deregister(soon(t), 2))
	must(t, p.b.Fence(soon(t), p.a.self))

	c := newInstance(t, peer("c", 3))
	h, err = p.a.Offer(soon(t), c.self)
	must(t, err)
	bytes, err = c.Answer(soon(t), p.a.self, h.Offer())
	must(t, err)
	must(t, p.a.Close())
	_, err = h.Establish(soon(t), bytes)
	wantCode(t, err, backend.PathDown)
	must(t, p.session.Close())
}

func TestInfo(t *testing.T) {
	info := newInstance(t, peer("a", 1), "window=7").Info()
	if info.Name != testName || info.Capabilities.Window != 7 {
		t.Errorf("got %+v", info)
	}
}

// TestOpenFails wants the mover closed.
func TestOpenFails(t *testing.T) {
	m := newCopyMover()
	_, err := openInstance(peer("a", 1), map[string]string{"socket_dir": "/proc/none/none"}, func(s *Settings) { s.Mover = m })
	wantCode(t, err, backend.BadRequest)
	if !m.closed {
		t.Error("the mover is left open")
	}
}

// TestOtherBackend hands over an answer that was given by another backend than the one that asks.
func TestOtherBackend(t *testing.T) {
	a := newInstance(t, peer("a", 1))
	b, err := openInstance(peer("b", 2), map[string]string{"socket_dir": socketDir(t)}, func(s *Settings) { s.Info.Name = "other" })
	must(t, err)
	closeLater(t, b)
	for _, way := range []string{"one process", "two processes"} {
		t.Run(way, func(t *testing.T) {
			h, err := a.Offer(soon(t), b.self)
			must(t, err)
			answer, err := b.Answer(soon(t), a.self, h.Offer())
			must(t, err)
			if way == "two processes" {
				asFromElsewhere(b)
			}
			_, err = h.Establish(soon(t), answer)
			wantCode(t, err, backend.Denied)
		})
	}
}
