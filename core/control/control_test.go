package control_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
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

// works waits until a call succeeds. The first may not: a connection that is not made in time, on a machine that is busy,
// is made anew.
func works(t *testing.T, c healthpb.HealthClient) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		err := check(t.Context(), c)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func TestCall(t *testing.T) {
	s := serve(t, "127.0.0.1:0", nil)
	works(t, connect(t, s.Address(), nil))
}

// portWithoutServer returns an address that nobody listens on. The port is the test's until it ends: nobody else is given
// it, and the test may listen on it.
func portWithoutServer(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	bound, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", bound.(*unix.SockaddrInet4).Port)
}

// TestNoServer: the call fails and does not wait for one; when there is one, the same connection finds it.
func TestNoServer(t *testing.T) {
	address := portWithoutServer(t)
	c := connect(t, address, nil)
	if err := check(t.Context(), c); status.Code(err) != codes.Unavailable {
		t.Fatalf("without a server: %v", err)
	}
	serve(t, address, nil)
	works(t, c)
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
	s, err := control.Listen(portWithoutServer(t), nil, false)
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
