package backend

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
)

// Credentials name the PEM files for mutual TLS 1.3. The certificate and key are read anew at each handshake, so
// that they can be rotated on disk; the authorities are read once.
type Credentials struct {
	CertFile, KeyFile, CAFile string
}

// Server returns a configuration that demands a certificate of the client, signed by one of the authorities.
func (c *Credentials) Server() (*tls.Config, error) {
	authorities, err := c.load()
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ClientAuth: tls.RequireAndVerifyClientCert,
		ClientCAs:  authorities,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return c.certificate()
		},
	}, nil
}

// Client returns a configuration that shows the certificate and verifies the server's against the authorities
// and against the host name that is dialled.
func (c *Credentials) Client() (*tls.Config, error) {
	authorities, err := c.load()
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		RootCAs:    authorities,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return c.certificate()
		},
	}, nil
}

// load checks that all three files can be used, so that a mistake is found at start and not at the first peer.
func (c *Credentials) load() (*x509.CertPool, error) {
	if _, err := c.certificate(); err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(c.CAFile)
	if err != nil {
		return nil, fmt.Errorf("read certificate authorities: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("read certificate authorities: %s holds no PEM certificate", c.CAFile)
	}
	return pool, nil
}

func (c *Credentials) certificate() (*tls.Certificate, error) {
	cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("load certificate %s with key %s: %w", c.CertFile, c.KeyFile, err)
	}
	return &cert, nil
}
