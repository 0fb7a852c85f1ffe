package samehost

import (
	"context"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

const all = backend.RemoteRead | backend.RemoteWrite

type sink = backendtest.Sink

var (
	soon         = backendtest.Context
	must         = backendtest.Must
	wantCode     = backendtest.WantCode
	wantOutcomes = backendtest.WantOutcomes
	wantSame     = backendtest.WantSame
	wantOpen     = backendtest.WantOpen
	fill         = backendtest.Fill
	peer         = backendtest.Peer
	socketDir    = backendtest.SocketDir
	memory       = backendtest.Memfd
	bind         = backendtest.Bind
	post         = backendtest.Post
	closeLater   = backendtest.CloseAtEnd
)

// TestMain runs the tests, or, in a process that the tests started, the other end.
func TestMain(m *testing.M) {
	backendtest.ServeChild(newChild())
	goleak.VerifyTestMain(m)
}

// testName is the name of the backend.
const testName = "copy"

// testFactory is of a backend with a copyMover. Settings can be changed before it is opened.
func testFactory(change ...func(*Settings)) backend.Factory {
	return backend.Factory{
		Name: testName, Options: Options(),
		Open: func(_ context.Context, cfg backend.Config) (backend.Backend, error) {
			host := backend.Kinds(backend.HostMemory)
			s := Settings{Mover: newCopyMover(), Info: backend.Info{Name: testName, Version: "1", Capabilities: backend.Capabilities{
				Ops: backend.Write | backend.Read, Local: host, Remote: host, Reach: backend.SameHost,
				NeedsFD: true, Limits: backend.Limits{Segments: 1 << 14}, Window: cfg.Options.Int("window"),
			}}}
			for _, f := range change {
				f(&s)
			}
			i, err := Open(cfg, s)
			if err != nil {
				return nil, err // and not an *Instance that is nil
			}
			return i, nil
		},
	}
}

func openInstance(self backend.Peer, options map[string]string, change ...func(*Settings)) (*Instance, error) {
	b, err := backendtest.TryOpen(testFactory(change...), backend.Config{Self: self}, options)
	if err != nil {
		return nil, err
	}
	return b.(*Instance), nil
}

// newInstance opens an instance that is closed, without an error, when the test ends. Options are name=value.
func newInstance(t testing.TB, self backend.Peer, options ...string) *Instance {
	t.Helper()
	raw := backendtest.Options(append([]string{"socket_dir=" + socketDir(t)}, options...)...)
	return backendtest.Open(t, testFactory(), backend.Config{Self: self}, raw).(*Instance)
}

// newUntilExit is newInstance, with UntilExit.
func newUntilExit(t testing.TB, self backend.Peer) *Instance {
	t.Helper()
	i, err := openInstance(self, map[string]string{"socket_dir": socketDir(t)}, func(s *Settings) { s.UntilExit = true })
	must(t, err)
	closeLater(t, i)
	return i
}

// asFromElsewhere has an instance reached from now on as if the initiators were in other processes.
func asFromElsewhere(i *Instance) { instances.Delete(i.id) }

func connect(t testing.TB, from *Instance, to backend.Peer, target backendtest.Target) *endpoint {
	t.Helper()
	return backendtest.Connect(t, from, from.self, to, target).(*endpoint)
}

// register registers a region and returns its descriptor.
func register(t testing.TB, i *Instance, m backend.Memory) backend.Remote {
	t.Helper()
	return backendtest.Register(t, i, i.self, m)
}

func wantDone(t testing.TB, done <-chan struct{}) {
	t.Helper()
	backendtest.WantClosed(t, done, "the endpoint ends")
}

// held counts what this process holds: open descriptors, and mappings of test memory.
func held() (counts [2]int, err error) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return counts, err
	}
	mappings, err := backendtest.Mappings()
	return [2]int{len(entries), len(mappings)}, err
}
