package control_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/umbp/umbp/core/control"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve starts a server with the health service of gRPC, which stands for any.
func serve(t *testing.T, address string, creds *backend.Credentials) *control.Server {
	t.Helper()
	s, err := control.Listen(address, creds, false)
	if err != nil {
		t.Fatal(err)
	}
	healthpb.RegisterHealthServer(s, health.NewServer())
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	t.Cleanup(func() {
		s.Stop(context.Background())
		if err := <-served; err != nil {
			t.Errorf("Serve returns %v", err)
		}
	})
	return s
}

func connect(t *testing.T, address string, creds *backend.Credentials) healthpb.HealthClient {
	t.Helper()
	conn, err := control.Connect(address, creds)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return healthpb.NewHealthClient(conn)
}

func check(ctx context.Context, c healthpb.HealthClient) error {
	_, err := c.Check(ctx, &healthpb.HealthCheckRequest{})
	return err
}

func TestCall(t *testing.T) {
	s := serve(t, "127.0.0.1:0", nil)
	if err := check(t.Context(), connect(t, s.Address(), nil)); err != nil {
		t.Error(err)
	}
}

// TestNoServer: the call fails and does not wait for one; when there is one, the same connection finds it.
func TestNoServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	c := connect(t, address, nil)
	if err := check(t.Context(), c); status.Code(err) != codes.Unavailable {
		t.Fatalf("without a server: %v", err)
	}
	serve(t, address, nil)
	for deadline := time.Now().Add(20 * time.Second); check(t.Context(), c) != nil; {
		if time.Now().After(deadline) {
			t.Fatal("the connection does not recover")
		}
		time.Sleep(time.Millisecond)
	}
}

// TestListenRefuses: an address that others can reach needs credentials, or the word insecure.
func TestListenRefuses(t *testing.T) {
	_, err := control.Listen("0.0.0.0:0", nil, false)
	if !errors.Is(err, backend.ErrDenied) || !strings.Contains(err.Error(), "tls.insecure") {
		t.Errorf("without credentials: %v", err)
	}
	s, err := control.Listen("0.0.0.0:0", nil, true)
	if err != nil {
		t.Fatal(err)
	}
	s.Stop(t.Context())
	if _, err := control.Listen("nowhere", nil, false); err == nil || !strings.Contains(err.Error(), "listen for the control plane") {
		t.Errorf("a wrong address: %v", err)
	}
	missing := &backend.Credentials{CertFile: "/none"}
	if _, err := control.Listen("127.0.0.1:0", missing, false); err == nil {
		t.Error("credentials that cannot be read are accepted by Listen")
	}
	if _, err := control.Connect("127.0.0.1:1", missing); err == nil {
		t.Error("credentials that cannot be read are accepted by Connect")
	}
}

// TestStopBeforeServe gives the address back, and lets Serve return nil.
func TestStopBeforeServe(t *testing.T) {
	s, err := control.Listen("127.0.0.1:0", nil, false)
	if err != nil {
		t.Fatal(err)
	}
	s.Stop(t.Context())
	if err := s.Serve(); err != nil {
		t.Errorf("Serve after Stop returns %v", err)
	}
	l, err := net.Listen("tcp", s.Address())
	if err != nil {
		t.Fatalf("the address is still taken: %v", err)
	}
	l.Close()
}

// TestStopBreaksOff: a call that does not end is broken off when the context ends.
func TestStopBreaksOff(t *testing.T) {
	s, err := control.Listen("127.0.0.1:0", nil, false)
	if err != nil {
		t.Fatal(err)
	}
	began := make(chan struct{})
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: "test.Slow", HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{{StreamName: "Wait", ServerStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
			close(began)
			<-stream.Context().Done()
			return stream.Context().Err()
		}}},
	}, nil)
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	conn, err := control.Connect(s.Address(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, "/test.Slow/Wait")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	<-began
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.Stop(ctx)
	if err := stream.RecvMsg(&healthpb.HealthCheckResponse{}); status.Code(err) != codes.Unavailable {
		t.Errorf("the call ends with %v", err)
	}
	if err := <-served; err != nil {
		t.Errorf("Serve returns %v", err)
	}
}
