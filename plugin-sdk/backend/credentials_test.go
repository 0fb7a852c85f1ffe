package backend_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// authority signs certificates for tests.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{}
	a.cert, a.key = sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil)
	return a
}

// sign makes a certificate, signed by the authority, or by itself without one.
func sign(t *testing.T, template *x509.Certificate, by *authority) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parent, signer := template, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// issue writes a certificate for the name, and the authorities to trust, into dir.
func (a *authority) issue(t *testing.T, dir, name string, trusted *authority) *backend.Credentials {
	t.Helper()
	cert, key := sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a)
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	c := &backend.Credentials{
		CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem"), CAFile: filepath.Join(dir, "ca.pem"),
	}
	for file, block := range map[string]*pem.Block{
		c.CertFile: {Type: "CERTIFICATE", Bytes: cert.Raw},
		c.KeyFile:  {Type: "EC PRIVATE KEY", Bytes: der},
		c.CAFile:   {Type: "CERTIFICATE", Bytes: trusted.cert.Raw},
	} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// shake runs a handshake and one byte in each direction, and returns what either side makes of it, and the name
// in the certificate that the server showed.
func shake(t *testing.T, server, client *tls.Config) (shown string, serverErr, clientErr error) {
	t.Helper()
	near, far := connect(t)
	serverDone := make(chan error, 1)
	go func() {
		defer far.Close()
		serverDone <- exchange(tls.Server(far, server))
	}()
	c := tls.Client(near, client)
	clientErr = exchange(c)
	if certs := c.ConnectionState().PeerCertificates; len(certs) > 0 {
		shown = certs[0].Subject.CommonName
	}
	near.Close()
	return shown, <-serverDone, clientErr
}

// connect returns the two ends of a TCP connection. A pipe would not do: it has no room for the alert of a side that
// gives up while the other one writes.
func connect(t *testing.T) (near, far net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	near, err = net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err = listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return near, far
}

func exchange(c *tls.Conn) error {
	c.SetDeadline(time.Now().Add(time.Minute))
	if err := c.Handshake(); err != nil {
		return err
	}
	written := make(chan error, 1)
	go func() {
		_, err := c.Write([]byte{1})
		written <- err
	}()
	_, err := io.ReadFull(c, make([]byte, 1))
	return errors.Join(err, <-written)
}

func configs(t *testing.T, server, client *backend.Credentials, name string) (*tls.Config, *tls.Config) {
	t.Helper()
	s, err := server.Server()
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.Client()
	if err != nil {
		t.Fatal(err)
	}
	c.ServerName = name
	return s, c
}

func TestCredentialsBothSides(t *testing.T) {
	a := newAuthority(t)
	server, client := configs(t, a.issue(t, t.TempDir(), "server", a), a.issue(t, t.TempDir(), "client", a), "server")
	shown, serverErr, clientErr := shake(t, server, client)
	if serverErr != nil || clientErr != nil || shown != "server" {
		t.Errorf("server: %v; client: %v; the server showed %q", serverErr, clientErr, shown)
	}
}

func TestCredentialsRefuse(t *testing.T) {
	a, stranger := newAuthority(t), newAuthority(t)
	for _, c := range []struct {
		name       string
		server     *backend.Credentials
		client     *backend.Credentials
		dialled    string
		change     func(server, client *tls.Config)
		serverSays string
		clientSays string
	}{
		{name: "a client without a certificate",
			change: func(_, client *tls.Config) { client.GetClientCertificate = nil }, serverSays: "didn't provide a certificate"},
		{name: "a client of another authority",
			client: stranger.issue(t, t.TempDir(), "client", a), serverSays: "unknown authority"},
		{name: "a server of another authority",
			server: stranger.issue(t, t.TempDir(), "server", a), clientSays: "unknown authority"},
		{name: "a server of another name", dialled: "another", clientSays: "not another"},
		{name: "an old version of TLS",
			change: func(_, client *tls.Config) { client.MinVersion, client.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }, serverSays: "unsupported versions"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.server == nil {
				c.server = a.issue(t, t.TempDir(), "server", a)
			}
			if c.client == nil {
				c.client = a.issue(t, t.TempDir(), "client", a)
			}
			if c.dialled == "" {
				c.dialled = "server"
			}
			server, client := configs(t, c.server, c.client, c.dialled)
			if c.change != nil {
				c.change(server, client)
			}
			_, serverErr, clientErr := shake(t, server, client)
			if serverErr == nil || clientErr == nil {
				t.Fatalf("server: %v; client: %v; want both to refuse", serverErr, clientErr)
			}
			if !strings.Contains(serverErr.Error(), c.serverSays) || !strings.Contains(clientErr.Error(), c.clientSays) {
				t.Errorf("server: %v; client: %v", serverErr, clientErr)
			}
		})
	}
}

// TestCredentialsRotate replaces the files under configurations that are in use.
func TestCredentialsRotate(t *testing.T) {
	a := newAuthority(t)
	dir := t.TempDir()
	server, client := configs(t, a.issue(t, dir, "old", a), a.issue(t, t.TempDir(), "client", a), "old")
	if shown, serverErr, clientErr := shake(t, server, client); serverErr != nil || clientErr != nil || shown != "old" {
		t.Fatalf("before: server: %v; client: %v; shown %q", serverErr, clientErr, shown)
	}
	a.issue(t, dir, "new", a)
	client.ServerName = "new"
	if shown, serverErr, clientErr := shake(t, server, client); serverErr != nil || clientErr != nil || shown != "new" {
		t.Errorf("after: server: %v; client: %v; shown %q", serverErr, clientErr, shown)
	}
}

func TestCredentialsFaultsAreFoundAtOnce(t *testing.T) {
	a := newAuthority(t)
	for name, c := range map[string]struct {
		harm func(*backend.Credentials) error
		says string
	}{
		"no certificate":    {func(c *backend.Credentials) error { return os.Remove(c.CertFile) }, "cert.pem"},
		"no key":            {func(c *backend.Credentials) error { return os.Remove(c.KeyFile) }, "key.pem"},
		"no authorities":    {func(c *backend.Credentials) error { return os.Remove(c.CAFile) }, "ca.pem"},
		"empty authorities": {func(c *backend.Credentials) error { return os.Truncate(c.CAFile, 0) }, "holds no PEM certificate"},
		"the key of another": {func(c *backend.Credentials) error {
			return os.Rename(a.issue(t, t.TempDir(), "x", a).KeyFile, c.KeyFile)
		}, "private key does not match"},
		"a broken certificate": {func(c *backend.Credentials) error { return os.WriteFile(c.CertFile, []byte("x"), 0o600) }, "load certificate"},
	} {
		credentials := a.issue(t, t.TempDir(), "server", a)
		if err := c.harm(credentials); err != nil {
			t.Fatal(err)
		}
		for side, load := range map[string]func() (*tls.Config, error){"server": credentials.Server, "client": credentials.Client} {
			if _, err := load(); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s, %s: %v, want an error that says %q", name, side, err, c.says)
			}
		}
	}
}
