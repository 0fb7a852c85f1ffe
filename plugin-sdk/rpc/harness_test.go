package rpc_test

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/rpc"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// wire is what lies between the two halves: a connection for calls and a passage for descriptors.
type wire struct {
	conn   *grpc.ClientConn
	server *grpc.Server
	served sync.WaitGroup
	host   *shm.Passage // nil without a passage
}

// newWire serves what register registers. far is the plugin's end of the passage.
func newWire(passage bool, register func(r grpc.ServiceRegistrar, far *shm.Passage)) (*wire, error) {
	w := &wire{server: grpc.NewServer()}
	var far *shm.Passage
	if passage {
		host, file, err := shm.NewPassage()
		if err != nil {
			return nil, err
		}
		if far, err = shm.OpenPassage(file); err != nil {
			return nil, errors.Join(err, host.Close())
		}
		w.host = host
	}
	register(w.server, far)
	listener := bufconn.Listen(1 << 20)
	w.served.Go(func() { _ = w.server.Serve(listener) })
	conn, err := grpc.NewClient("passthrough:///plugin",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	w.conn = conn
	return w, err
}

func (w *wire) close() error {
	err := w.conn.Close()
	w.server.Stop()
	w.served.Wait()
	if w.host != nil {
		err = errors.Join(err, w.host.Close())
	}
	return err
}

// plugin is a backend behind the process's edge, with both halves in this process, and what a supervisor does: when the
// client breaks, it ends the plugin, and tells the client.
type plugin struct {
	*rpc.Client
	wire    *wire
	server  *rpc.Server
	watched sync.WaitGroup
	closed  chan struct{}
	once    sync.Once
	err     error
}

type setup struct {
	raw         map[string]string
	stream      bool
	callTimeout time.Duration
}

func start(ctx context.Context, f backend.Factory, cfg backend.Config, s setup) (*plugin, error) {
	p := &plugin{closed: make(chan struct{})}
	var err error
	p.wire, err = newWire(true, func(r grpc.ServiceRegistrar, far *shm.Passage) {
		p.server = rpc.NewServer(f, far, nil)
		p.server.Register(r)
	})
	if err != nil {
		return nil, err
	}
	p.Client, err = rpc.Open(ctx, rpc.Options{
		Name: f.Name, Conn: p.wire.conn, Passage: p.wire.host, Config: cfg, RawOptions: s.raw, Stream: s.stream,
		CallTimeout: s.callTimeout,
	})
	if err != nil {
		return nil, errors.Join(err, p.server.Close(), p.wire.close())
	}
	p.watched.Go(func() {
		select {
		case <-p.Broken():
			p.kill(p.Err())
		case <-p.closed:
		}
	})
	return p, nil
}

// kill ends the plugin as a supervisor would, as far as that goes within one process.
func (p *plugin) kill(cause error) {
	p.wire.server.Stop()
	_ = p.server.Close()
	p.Lost(cause)
}

// Close implements backend.Backend.
func (p *plugin) Close() error {
	p.once.Do(func() {
		p.err = p.Client.Close()
		close(p.closed)
		p.watched.Wait()
		p.err = errors.Join(p.err, p.server.Close(), p.wire.close())
	})
	return p.err
}

// over returns a factory whose backends are those of f behind the process's edge.
func over(f backend.Factory, s setup) backend.Factory {
	return backend.Factory{Name: f.Name, Open: func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
		return start(ctx, f, cfg, s)
	}}
}
