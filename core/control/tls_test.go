package control_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// newCredentials makes an authority and a certificate for 127.0.0.1 that it has signed.
func newCredentials(t *testing.T) *backend.Credentials {
	t.Helper()
	dir := t.TempDir()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		check(os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
		return path
	}
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	authorityKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	authorityDER, err := x509.CreateCertificate(rand.Reader, authority, authority, authorityKey.Public(), authorityKey)
	check(err)
	node := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "node"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	nodeDER, err := x509.CreateCertificate(rand.Reader, node, authority, key.Public(), authorityKey)
	check(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	check(err)
	return &backend.Credentials{
		CertFile: write("node.crt", "CERTIFICATE", nodeDER), KeyFile: write("node.key", "PRIVATE KEY", keyDER),
		CAFile: write("ca.crt", "CERTIFICATE", authorityDER),
	}
}

// TestMutualTLS: only who shows a certificate of the same authority is served.
func TestMutualTLS(t *testing.T) {
	ours, theirs := newCredentials(t), newCredentials(t)
	s := serve(t, "127.0.0.1:0", ours)
	works(t, connect(t, s.Address(), ours))
	// Trusts the server, and shows a certificate that the server does not trust.
	stranger := &backend.Credentials{CertFile: theirs.CertFile, KeyFile: theirs.KeyFile, CAFile: ours.CAFile}
	// Shows a certificate that the server trusts, and does not trust the server.
	wary := &backend.Credentials{CertFile: ours.CertFile, KeyFile: ours.KeyFile, CAFile: theirs.CAFile}
	for name, creds := range map[string]*backend.Credentials{"no certificate": nil, "a stranger's": stranger, "another authority": wary} {
		if err := check(t.Context(), connect(t, s.Address(), creds)); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v", name, err)
		}
	}
}
