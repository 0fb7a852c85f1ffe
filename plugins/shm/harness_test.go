package shm

import (
	"context"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
	"github.com/umbp/umbp/plugin-sdk/samehost"
)

const all = backend.RemoteRead | backend.RemoteWrite

type sink = backendtest.Sink

var (
	soon         = backendtest.Context
	must         = backendtest.Must
	wantCode     = backendtest.WantCode
	wantOutcomes = backendtest.WantOutcomes
	wantSame     = backendtest.WantSame
	fill         = backendtest.Fill
	peer         = backendtest.Peer
	socketDir    = backendtest.SocketDir
	memory       = backendtest.Memfd
	bind         = backendtest.Bind
	post         = backendtest.Post
)

// TestMain runs the tests, or, in a process that the tests started, the other end.
func TestMain(m *testing.M) {
	backendtest.ServeChild(&child{backendtest.Child{Factory: Factory}})
	goleak.VerifyTestMain(m)
}

// spy is a mover that remembers the last path.
type spy struct {
	*mover
	path atomic.Pointer[path]
}

// Join implements samehost.Mover.
func (s *spy) Join(ctx context.Context, near, far samehost.Region, target samehost.Target) (samehost.Path, error) {
	p, err := s.mover.Join(ctx, near, far, target)
	if err == nil {
		s.path.Store(p.(*path))
	}
	return p, err
}

// instance is an opened backend with what tests look at.
type instance struct {
	*samehost.Instance
	self  backend.Peer
	mover *spy
}

// newInstance opens an instance that is closed, without an error, when the test ends. Options are name=value.
func newInstance(t testing.TB, self backend.Peer, options ...string) *instance {
	t.Helper()
	raw := backendtest.Options(append([]string{"socket_dir=" + socketDir(t)}, options...)...)
	values, err := backend.CheckOptions(Factory.Options, raw)
	must(t, err)
	m := &spy{mover: newMover(values)}
	i, err := samehost.Open(backend.Config{Self: self, Options: values}, samehost.Settings{Info: info(values), Mover: m})
	must(t, err)
	backendtest.CloseAtEnd(t, i)
	return &instance{i, self, m}
}

func connect(t testing.TB, from *instance, to backend.Peer, target backendtest.Target) backend.Endpoint {
	t.Helper()
	return backendtest.Connect(t, from, from.self, to, target)
}

// register registers a region and returns its descriptor.
func register(t testing.TB, i *instance, m backend.Memory) backend.Remote {
	t.Helper()
	return backendtest.Register(t, i, i.self, m)
}

// protections lists the permissions of the mappings of test memory, sorted.
func protections(t testing.TB) []string {
	t.Helper()
	list, err := backendtest.Mappings()
	must(t, err)
	return list
}
