package tcp

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

func TestMessagesRoundTrip(t *testing.T) {
	peers := rapid.Custom(func(rt *rapid.T) backend.Peer {
		return backend.Peer{Node: rapid.StringN(0, 40, maxName).Draw(rt, "node"), Incarnation: rapid.Uint64().Draw(rt, "incarnation")}
	})
	rapid.Check(t, func(rt *rapid.T) {
		o := offer{initiator: peers.Draw(rt, "initiator"), target: peers.Draw(rt, "target"), connections: rapid.IntRange(1, maxConnections).Draw(rt, "connections")}
		fillRandom(o.nonce[:])
		if got, err := parseOffer(o.encode()); err != nil || got != o {
			rt.Fatalf("got offer %+v, %v; want %+v", got, err, o)
		}
		a := answer{target: o.target, addresses: rapid.SliceOfN(rapid.StringN(1, 40, maxName), 1, maxAddresses).Draw(rt, "addresses")}
		fillRandom(a.secret[:])
		got, err := parseAnswer(a.encode())
		if err != nil || !bytes.Equal(got.encode(), a.encode()) {
			rt.Fatalf("got answer %+v, %v; want %+v", got, err, a)
		}
		cut := rapid.IntRange(0, len(a.encode())-1).Draw(rt, "cut")
		if _, err := parseAnswer(a.encode()[:cut]); err == nil {
			rt.Fatalf("an answer cut at %d of %d bytes was accepted", cut, len(a.encode()))
		}
		if _, err := parseOffer(append(o.encode(), 0)); err == nil {
			rt.Fatal("an offer with a byte too many was accepted")
		}
	})
}

func TestAnswerRefuses(t *testing.T) {
	a, b := node(t, "a", config{}), node(t, "b", config{options: map[string]string{"max_connections": "3"}})
	hs, err := a.Offer(t.Context(), b.self)
	must(t, err)
	raw := hs.Offer()
	_, err = b.Answer(t.Context(), backend.Peer{Node: "c", Incarnation: 7}, raw)
	wantCode(t, err, backend.BadRequest)
	_, err = b.Answer(t.Context(), backend.Peer{Node: "a", Incarnation: 8}, raw)
	wantCode(t, err, backend.BadRequest)
	_, err = b.Answer(t.Context(), backend.Peer{Node: "a", Incarnation: 7, Host: "elsewhere"}, raw)
	wantCode(t, err, backend.Unsupported) // b listens on loopback
	_, err = b.Answer(t.Context(), a.self, []byte("garbage"))
	wantCode(t, err, backend.BadRequest)
	_, err = a.Answer(t.Context(), a.self, raw)
	wantCode(t, err, backend.PeerGone)

	if _, err := b.Answer(t.Context(), a.self, raw); err != nil { // promises 2 of 3 connections
		t.Fatal(err)
	}
	_, err = b.Answer(t.Context(), a.self, raw)
	wantCode(t, err, backend.Busy)
	b.server.sweep(time.Now().Add(time.Hour)) // nobody came for them
	connect(t, a, b)

	off := node(t, "c", config{options: map[string]string{"listen": "off"}})
	_, err = off.Answer(t.Context(), a.self, raw)
	wantCode(t, err, backend.Unsupported)
	must(t, off.Fence(t.Context(), a.self))
}

func TestEstablishRefusesAnswersOfOthers(t *testing.T) {
	a, b := node(t, "a", config{}), node(t, "b", config{})
	h, ans := granted(t, a, b)
	ans.target.Incarnation++
	_, err := h.Establish(t.Context(), ans.encode())
	wantCode(t, err, backend.PeerGone)
	_, err = h.Establish(t.Context(), []byte("garbage"))
	wantCode(t, err, backend.BadRequest)
	_, err = h.Establish(t.Context(), nil)
	wantCode(t, err, backend.BadRequest)
}

func TestWrongSecret(t *testing.T) {
	a, b := node(t, "a", config{}), node(t, "b", config{})
	h, ans := granted(t, a, b)
	ans.secret[5] ^= 1
	_, err := h.Establish(t.Context(), ans.encode())
	wantCode(t, err, backend.Denied)

	// An initiator that does not check the target gets no further either.
	conn, x := dialExchange(t, h, &ans, 0)
	challenge := sendHello(t, conn, x)
	copy(x.challenge[:], challenge[1:])
	p := x.prove(initiatorRole)
	if _, err := conn.Write(p[:]); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, conn, backend.Denied)
	if b.serves() != 0 {
		t.Fatal("the target serves a connection without the secret")
	}
}

func sendHello(t *testing.T, conn net.Conn, x *exchange) []byte {
	t.Helper()
	if _, err := conn.Write(x.hello.encode()); err != nil {
		t.Fatal(err)
	}
	challenge := make([]byte, 1+nonceSize+proofSize)
	if _, err := io.ReadFull(conn, challenge); err != nil {
		t.Fatal(err)
	}
	return challenge
}

func wantStatus(t *testing.T, conn net.Conn, want backend.Code) {
	t.Helper()
	var status [1]byte
	if _, err := io.ReadFull(conn, status[:]); err != nil || backend.Code(status[0]) != want {
		t.Fatalf("got status %d, %v; want %d", status[0], err, want)
	}
	wantEnd(t, conn)
}

// tap records what is sent.
type tap struct {
	net.Conn
	sent bytes.Buffer
}

func (c *tap) Write(b []byte) (int, error) {
	c.sent.Write(b)
	return c.Conn.Write(b)
}

func TestReplayedHandshake(t *testing.T) {
	a, b := node(t, "a", config{}), node(t, "b", config{}) // two connections: the grant stays open after one
	h, ans := granted(t, a, b)
	conn, x := dialExchange(t, h, &ans, 0)
	recorded := &tap{Conn: conn}
	must(t, x.initiate(recorded))
	again, _ := dialExchange(t, h, &ans, 0)
	if _, err := again.Write(recorded.sent.Bytes()); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(again, make([]byte, 1+nonceSize+proofSize)); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, again, backend.Denied)

	// Not even the one who knows the secret connects twice, or more often than it was granted.
	for _, index := range []uint16{0, 2} {
		twice, x := dialExchange(t, h, &ans, index)
		wantCode(t, x.initiate(twice), backend.Denied)
	}
	second, x := dialExchange(t, h, &ans, 1)
	must(t, x.initiate(second))
	_, err := h.Establish(t.Context(), ans.encode())
	wantCode(t, err, backend.Denied) // the grant is used up
}

func TestProofsDependOnEverything(t *testing.T) {
	base := func() exchange {
		return exchange{
			initiator: backend.Peer{Node: "a", Incarnation: 1}, target: backend.Peer{Node: "b", Incarnation: 2}, session: []byte{1},
		}
	}
	reference := base()
	seen := map[proof]string{reference.prove(targetRole): "nothing"}
	for what, change := range map[string]func(*exchange){
		"secret":                func(x *exchange) { x.secret[31]++ },
		"initiator":             func(x *exchange) { x.initiator.Node = "c" },
		"initiator incarnation": func(x *exchange) { x.initiator.Incarnation++ },
		"target":                func(x *exchange) { x.target.Node = "c" },
		"target incarnation":    func(x *exchange) { x.target.Incarnation++ },
		"offer":                 func(x *exchange) { x.offer[0]++ },
		"grant":                 func(x *exchange) { x.hello.grant[0]++ },
		"index":                 func(x *exchange) { x.hello.index++ },
		"initiator's nonce":     func(x *exchange) { x.hello.nonce[0]++ },
		"target's nonce":        func(x *exchange) { x.challenge[0]++ },
		"TLS session":           func(x *exchange) { x.session[0]++ },
	} {
		x := base()
		change(&x)
		p := x.prove(targetRole)
		if other, same := seen[p]; same {
			t.Errorf("changing %s gives the same proof as changing %s", what, other)
		}
		seen[p] = what
	}
	if _, same := seen[reference.prove(initiatorRole)]; same {
		t.Error("both roles give the same proof")
	}
}

func TestGarbageAtTheListener(t *testing.T) {
	a, b := node(t, "a", config{}), node(t, "b", config{options: map[string]string{"connect_timeout": "1s"}})
	for name, garbage := range map[string][]byte{
		"HTTP":    []byte("GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: something that is long enough to fill a hello\r\n\r\n"),
		"zeros":   make([]byte, 4096),
		"nothing": nil,
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", b.server.addresses[0])
			must(t, err)
			defer conn.Close()
			if _, err := conn.Write(garbage); err != nil {
				t.Fatal(err)
			}
			if garbage == nil {
				// Many that say nothing do not keep others out for longer than the handshake may take.
				for range maxUnproven {
					silent, err := net.Dial("tcp", b.server.addresses[0])
					must(t, err)
					defer silent.Close()
				}
				eventually(t, "connecting past the silent ones", func() bool {
					_, err := establish(a, b)
					return err == nil
				})
				return
			}
			wantEnd(t, conn)
		})
	}
	connect(t, a, b)
}

// TestBlackHole: a peer that never answers ends by its deadline, and delays nobody else.
func TestBlackHole(t *testing.T) {
	a := node(t, "a", config{options: map[string]string{"connect_timeout": "1s"}})
	b := node(t, "b", config{})
	l, err := net.Listen("tcp", "127.0.0.1:0") // the system accepts, nobody answers
	must(t, err)
	defer l.Close()
	stuck := func(ctx context.Context) <-chan error {
		result := make(chan error, 1)
		go func() {
			target := backend.Peer{Node: "hole", Incarnation: 1}
			h, err := a.Offer(ctx, target)
			if err == nil {
				ans := answer{target: target, addresses: []string{l.Addr().String()}}
				_, err = h.Establish(ctx, ans.encode())
			}
			result <- err
		}()
		return result
	}
	byDeadline := stuck(t.Context())
	ctx, cancel := context.WithCancel(t.Context())
	byCaller := stuck(ctx)
	connect(t, a, b)
	select {
	case err := <-byCaller:
		t.Fatalf("connecting to the black hole ended with %v before anybody gave it up", err)
	default:
	}
	cancel()
	wantCode(t, <-byCaller, backend.Cancelled)
	wantCode(t, <-byDeadline, backend.PathDown)

	byClose := stuck(t.Context())
	must(t, a.Close())
	wantCode(t, <-byClose, backend.PathDown)
}

func TestNextAddressIsTried(t *testing.T) {
	a, b := node(t, "a", config{}), node(t, "b", config{})
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	address := nobody.Addr().String()
	nobody.Close()
	h, ans := granted(t, a, b)
	ans.addresses = append([]string{address}, ans.addresses...)
	if _, err := h.Establish(t.Context(), ans.encode()); err != nil {
		t.Fatal(err)
	}
	ans.addresses = []string{address}
	_, err = h.Establish(t.Context(), ans.encode())
	wantCode(t, err, backend.PathDown)
	if !strings.Contains(err.Error(), address) {
		t.Errorf("the error does not name the address: %v", err)
	}
}

func TestListening(t *testing.T) {
	insecure := func(c *backend.Config) { c.Insecure = true }
	tests := map[string]struct {
		options map[string]string
		change  func(*backend.Config)
		fault   string // part of the error; empty when it opens
		want    string // prefix of the first address
	}{
		"default":                 {want: "127.0.0.1:"},
		"open to all":             {options: map[string]string{"listen": "0.0.0.0:0"}, fault: "option listen"},
		"open to all, v6":         {options: map[string]string{"listen": "[::]:0"}, fault: "insecure"},
		"no host":                 {options: map[string]string{"listen": ":0"}, fault: "credentials"},
		"allowed":                 {options: map[string]string{"listen": "0.0.0.0:0"}, change: insecure},
		"not an address":          {options: map[string]string{"listen": "nonsense"}, fault: "option listen"},
		"advertised host":         {options: map[string]string{"advertise": "node7.example"}, want: "node7.example:"},
		"advertised address":      {options: map[string]string{"advertise": "node7.example:99"}, want: "node7.example:99"},
		"advertised, no port":     {options: map[string]string{"advertise": "node7.example:"}, fault: "option advertise"},
		"files that do not exist": {change: func(c *backend.Config) { c.Credentials = &backend.Credentials{CertFile: "/nonexistent"} }, fault: "/nonexistent"},
		"no node":                 {change: func(c *backend.Config) { c.Self.Node = "" }, fault: "name of node"},
		"no incarnation":          {change: func(c *backend.Config) { c.Self.Incarnation = 0 }, fault: "incarnation"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			n, err := openNode("a", config{options: test.options, change: test.change})
			if err == nil {
				defer n.Close()
			}
			switch {
			case test.fault == "" && err != nil:
				t.Fatal(err)
			case test.fault != "" && (err == nil || !strings.Contains(err.Error(), test.fault)):
				t.Fatalf("got error %v, want one about %q", err, test.fault)
			case err == nil && !strings.HasPrefix(n.server.addresses[0], test.want):
				t.Fatalf("advertises %v, want %s", n.server.addresses, test.want)
			}
		})
	}
}

// authority issues certificates for 127.0.0.1.
type authority struct {
	t    *testing.T
	dir  string
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t, dir: t.TempDir()}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"},
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	a.key, a.cert = a.sign("ca", template, nil)
	return a
}

func (a *authority) sign(name string, template *x509.Certificate, parent *x509.Certificate) (*ecdsa.PrivateKey, *x509.Certificate) {
	a.t.Helper()
	check := func(err error) {
		if err != nil {
			a.t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	signer := a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	check(err)
	cert, err := x509.ParseCertificate(der)
	check(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	check(err)
	check(os.WriteFile(filepath.Join(a.dir, name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	check(os.WriteFile(filepath.Join(a.dir, name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	return key, cert
}

// credentials issues a certificate to a node that trusts the authority given.
func (a *authority) credentials(name string, trusted *authority) func(*backend.Config) {
	a.sign(name, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.cert)
	return func(c *backend.Config) {
		c.Credentials = &backend.Credentials{
			CertFile: filepath.Join(a.dir, name+".crt"), KeyFile: filepath.Join(a.dir, name+".key"),
			CAFile: filepath.Join(trusted.dir, "ca.crt"),
		}
	}
}

func TestTLS(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	b := node(t, "b", config{change: ours.credentials("b", ours), options: map[string]string{"listen": "127.0.0.1:0"}})
	far := make([]byte, 3<<20)
	remote := b.lend(t, 1, far, everything)

	t.Run("moves bytes", func(t *testing.T) {
		a := node(t, "a", config{change: ours.credentials("a", ours)})
		near := make([]byte, len(far))
		a.lend(t, 1, near, 0)
		p := &pair{completions: new(sink)}
		p.session = bind(t, connect(t, a, b), 1, remote, p.completions)
		for _, n := range []int{1, 3, 4096} {
			fill(near, uint64(n))
			want := bytes.Clone(near)
			p.must(t, write(1, evenly(n, len(far))...))
			if !bytes.Equal(far, want) {
				t.Fatalf("a write of %d segments is not in place", n)
			}
			clear(near)
			p.must(t, read(1, evenly(n, len(far))...))
			if !bytes.Equal(near, want) {
				t.Fatalf("a read of %d segments is not in place", n)
			}
		}
		must(t, p.session.e.Close())
	})
	t.Run("cancel in flight", func(t *testing.T) {
		a := node(t, "a", config{change: ours.credentials("a", ours), options: map[string]string{"connections": "1"}})
		near := make([]byte, len(far))
		a.lend(t, 1, near, 0)
		completions := new(sink)
		e := connect(t, a, b)
		s := bind(t, e, 1, remote, completions)
		for i := range uint64(6) {
			must(t, s.Post(read(i, evenly(3, len(far))...)))
		}
		s.Cancel(5)
		completions.Collect(t, 6)
		clear(near)
	})
	refused := map[string]struct {
		change func(*backend.Config)
		code   backend.Code
	}{
		"no credentials":        {nil, backend.PathDown},
		"certificate of others": {theirs.credentials("a", ours), backend.Denied},
		"authority of others":   {ours.credentials("a", theirs), backend.Denied},
	}
	for name, test := range refused {
		t.Run(name, func(t *testing.T) {
			_, err := establish(node(t, "a", config{change: test.change}), b)
			wantCode(t, err, test.code)
		})
	}
	t.Run("no certificate", func(t *testing.T) {
		conn, err := tls.Dial("tcp", b.server.addresses[0], &tls.Config{InsecureSkipVerify: true})
		must(t, err)
		defer conn.Close()
		if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Fatalf("read %d bytes, %v; want a refusal", n, err)
		}
	})
	t.Run("old version", func(t *testing.T) {
		if conn, err := tls.Dial("tcp", b.server.addresses[0], &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
			conn.Close()
			t.Fatal("TLS 1.2 was accepted")
		}
	})
	t.Run("target without credentials", func(t *testing.T) {
		_, err := establish(node(t, "a", config{change: ours.credentials("a", ours)}), node(t, "c", config{options: map[string]string{"connect_timeout": "200ms"}}))
		if err == nil {
			t.Fatal("an initiator with credentials connected without TLS")
		}
	})
}
