package rpc_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/conformance"
	"github.com/umbp/umbp/plugin-sdk/null"
	"github.com/umbp/umbp/plugin-sdk/reference"
	"github.com/umbp/umbp/plugin-sdk/rpc"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// envProcess makes the test binary a plugin: its value is the name of the backend. The passage is descriptor 3.
const (
	envProcess = "UMBP_RPC_TEST_PLUGIN"
	envSocket  = "UMBP_RPC_TEST_SOCKET"
)

func TestMain(m *testing.M) {
	if name := os.Getenv(envProcess); name != "" {
		if err := runPlugin(name); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func runPlugin(name string) error {
	passage, err := shm.OpenPassage(os.NewFile(3, "passage"))
	if err != nil {
		return err
	}
	factory := map[string]backend.Factory{
		null.Name: null.Factory, "stuck": stuck(),
	}[name]
	server := rpc.NewServer(factory, passage, nil)
	g := grpc.NewServer()
	server.Register(g)
	listener, err := net.Listen("unix", os.Getenv(envSocket))
	if err != nil {
		return err
	}
	fmt.Println("serving")
	go func() { _ = g.Serve(listener) }()
	<-server.HostGone()
	return server.Close()
}

// process is a plugin that is a process.
type process struct {
	*rpc.Client
	cmd     *exec.Cmd
	passage *shm.Passage
	conn    *grpc.ClientConn
}

func startProcess(tb testing.TB, name string) *process {
	tb.Helper()
	socket := filepath.Join(tb.TempDir(), "s")
	passage, theirs, err := shm.NewPassage()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envProcess+"="+name, envSocket+"="+socket)
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err = errors.Join(err, theirs.Close()); err != nil {
		tb.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 16)); err != nil {
		tb.Fatal(err)
	}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		tb.Fatal(err)
	}
	p := &process{cmd: cmd, passage: passage, conn: conn}
	p.Client, err = rpc.Open(context.Background(), rpc.Options{Name: name, Conn: conn, Passage: passage, Config: backend.Config{Self: near}})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if p.cmd.ProcessState == nil {
			if err := p.Close(); err != nil {
				tb.Error(err)
			}
		}
		p.passage.Close() // which ends the process
		p.cmd.Wait()
		p.conn.Close()
	})
	return p
}

var (
	near = backend.Peer{Node: "near", Incarnation: 1, Host: "here"}
	far  = backend.Peer{Node: "far", Incarnation: 2, Host: "here"}
)

// counter is a sink that counts.
type counter struct{ n atomic.Int64 }

func (c *counter) Complete(done backend.Completion) {
	if done.Err != nil {
		panic(done.Err)
	}
	c.n.Add(1)
}

// bindNull lends memory, and connects a null backend with a peer that is not there.
func bindNull(tb testing.TB, b backend.Backend, sink backend.Sink) backend.Session {
	tb.Helper()
	ctx := context.Background()
	m, err := conformance.SealedMemory(1 << 20)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { m.Free() })
	if _, err := b.Register(ctx, backend.Memory{Region: 1, Kind: backend.HostMemory, Bytes: m.Bytes, FD: m.FD}); err != nil {
		tb.Fatal(err)
	}
	endpoint, err := reference.Connect(ctx, b, near, b, far)
	if err != nil {
		tb.Fatal(err)
	}
	session, err := endpoint.Session(ctx, 1, backend.Remote{
		Peer: far, Region: 7, Kind: backend.HostMemory, Rights: backend.RemoteRead | backend.RemoteWrite, Size: 1 << 20,
	}, sink)
	if err != nil {
		tb.Fatal(err)
	}
	return session
}

func linkedIn(tb testing.TB) backend.Backend {
	tb.Helper()
	b, err := null.Factory.Open(context.Background(), backend.Config{Self: near})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { b.Close() })
	return b
}

// waiter is a sink that tells the one that waits.
type waiter chan struct{}

func (w waiter) Complete(backend.Completion) { w <- struct{}{} }

// BenchmarkRoundTrip is the time of one transfer from Post to Complete, alone on its way.
func BenchmarkRoundTrip(b *testing.B) {
	for _, n := range []int{1, 256, shm.MaxSegments} {
		segments := slices.Repeat([]backend.Segment{{Length: 64}}, n)
		for _, where := range []string{"linked in", "process"} {
			b.Run(fmt.Sprintf("segments=%d/%s", n, where), func(b *testing.B) {
				tried := linkedIn
				if where == "process" {
					tried = func(tb testing.TB) backend.Backend { return startProcess(tb, null.Name) }
				}
				done := make(waiter, 1)
				session := bindNull(b, tried(b), done)
				b.ReportAllocs()
				for b.Loop() {
					if err := session.Post(backend.Transfer{Op: backend.Write, Segments: segments}); err != nil {
						b.Fatal(err)
					}
					<-done
				}
			})
		}
	}
}

// TestNoAllocation: a transfer costs the host no memory, whatever it carries.
func TestNoAllocation(t *testing.T) {
	if raceEnabled {
		t.Skip("allocations cannot be counted under the race detector")
	}
	p := startProcess(t, null.Name)
	done := make(waiter, 1)
	session := bindNull(t, p, done)
	segments := slices.Repeat([]backend.Segment{{Length: 64}}, 1000)
	cookie := uint64(0)
	transfer := func() {
		cookie++
		if err := session.Post(backend.Transfer{Op: backend.Write, Cookie: cookie, Segments: segments}); err != nil {
			t.Fatal(err)
		}
		<-done
	}
	for range 100 {
		transfer()
	}
	if n := testing.AllocsPerRun(1000, transfer); n != 0 {
		t.Errorf("%v allocations for one transfer, want none", n)
	}
}
