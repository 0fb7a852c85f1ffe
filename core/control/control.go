// Package control is the transport of the control plane: gRPC, over TLS 1.3 with client certificates where the
// cluster has credentials. It carries ids, offsets and sizes; the bytes of values go through backends.
package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// maxMessage bounds a message, in bytes. The largest are batches of keys and runs; the services split what would
// be larger.
const maxMessage = 16 << 20

// A connection that says nothing for so long is asked whether it is alive, and given up after as long again: a
// host that went away without a word is noticed, and an idle one is kept.
const silence = 10 * time.Second

// Server serves the services of one process on one address.
type Server struct {
	*grpc.Server // register services here, before Serve
	listener     net.Listener
}

// Listen opens the address. Without credentials, an address that other hosts can reach is refused unless insecure
// says that it is meant.
func Listen(address string, creds *backend.Credentials, allowInsecure bool) (*Server, error) {
	opts := []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: silence, Timeout: silence}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: silence / 2, PermitWithoutStream: true}),
	}
	if creds != nil {
		tls, err := creds.Server()
		if err != nil {
			return nil, err
		}
		opts = append(opts, grpc.Creds(credentials.NewTLS(tls)))
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen for the control plane: %w", err)
	}
	if ip := l.Addr().(*net.TCPAddr).IP; creds == nil && !allowInsecure && !ip.IsLoopback() {
		l.Close()
		return nil, &backend.Error{Code: backend.Denied, Op: "listen", Text: fmt.Sprintf(
			"%s can be reached from other hosts, and there are no credentials: set tls.cert, tls.key and tls.ca, or tls.insecure to true where the network is trusted", address)}
	}
	return &Server{Server: grpc.NewServer(opts...), listener: l}, nil
}

// Address returns the address that the server listens on, with the port that it got.
func (s *Server) Address() string { return s.listener.Addr().String() }

// Serve serves until Stop. It returns nil then, also when Stop came first.
func (s *Server) Serve() error {
	if err := s.Server.Serve(s.listener); !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// Stop lets the calls under way finish until ctx ends, then breaks them off, and gives the address back.
func (s *Server) Stop(ctx context.Context) {
	defer s.listener.Close() // for a server that never served
	done := make(chan struct{})
	go func() {
		s.GracefulStop()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		s.Server.Stop()
		<-done
	}
}

// Connect returns a connection to a server's address. It connects when it is first used and again when it has
// broken, soon at first and then less often; a call that finds no server fails at once and does not wait for one.
func Connect(address string, creds *backend.Credentials) (*grpc.ClientConn, error) {
	transport := insecure.NewCredentials()
	if creds != nil {
		tls, err := creds.Client()
		if err != nil {
			return nil, err
		}
		transport = credentials.NewTLS(tls)
	}
	return grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: silence, Timeout: silence, PermitWithoutStream: true}),
		grpc.WithConnectParams(grpc.ConnectParams{
			MinConnectTimeout: 2 * time.Second,
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
		}),
	)
}
