package rdma

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
	"github.com/umbp/umbp/plugins/rdma/device"
	"github.com/umbp/umbp/plugins/rdma/verbstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type sink = backendtest.Sink

var (
	must       = backendtest.Must
	wantCode   = backendtest.WantCode
	wantClosed = backendtest.WantClosed
	eventually = backendtest.Eventually
	fill       = backendtest.Fill
)

// openNode opens a backend on the devices of lib. It is closed with the test.
func openNode(t testing.TB, lib device.Library, name string, opts map[string]string) *transport {
	t.Helper()
	return backendtest.Open(t, Factory(lib), backend.Config{Self: backendtest.Peer(name, 7)}, opts).(*transport)
}

// lend registers memory and returns it as peers see it.
func (t *transport) lend(tb testing.TB, id backend.RegionID, bytes []byte, rights backend.Rights) backend.Remote {
	tb.Helper()
	return backendtest.Register(tb, t, t.self, backend.Memory{Region: id, Kind: backend.HostMemory, Rights: rights, Bytes: bytes, FD: -1})
}

// tryConnect sets up a connection.
func tryConnect(initiator, target *transport) (*endpoint, error) {
	e, err := backendtest.TryConnect(initiator, initiator.self, target.self, target)
	if err != nil {
		return nil, err
	}
	return e.(*endpoint), nil
}

// rig is an initiator and a target on one simulated network, connected, with a region of each.
type rig struct {
	fabric      *verbstest.Fabric
	a, b        *transport
	near, far   []byte
	remote      backend.Remote
	endpoint    *endpoint
	session     *session
	completions *sink
}

// newRig gives each end a device of its own for each of those that cfg has, or one, if it has none. Those of the
// initiator are called sim-a0, sim-a1 and so on. Bytes move until the ends are connected, whatever cfg says.
func newRig(t testing.TB, cfg verbstest.Config, size int, opts map[string]string) *rig {
	t.Helper()
	hosts := map[string][]string{}
	if len(cfg.Devices) == 0 {
		cfg.Devices = make([]verbstest.DeviceConfig, 1)
	}
	var all []verbstest.DeviceConfig
	for _, host := range []string{"a", "b"} {
		for i, d := range cfg.Devices {
			d.Name = "sim-" + host + string(rune('0'+i))
			all = append(all, d)
			hosts[host] = append(hosts[host], d.Name)
		}
	}
	cfg.Devices = all
	quiet := cfg.NoBytes
	cfg.NoBytes = false
	r := &rig{fabric: verbstest.New(cfg), near: make([]byte, size), far: make([]byte, size), completions: new(sink)}
	t.Cleanup(func() {
		if left := r.fabric.Objects(); left != (verbstest.Objects{}) {
			t.Errorf("after everything was closed there are %+v", left)
		}
	})
	r.a = openNode(t, r.fabric.Host(hosts["a"]...), "a", opts)
	r.b = openNode(t, r.fabric.Host(hosts["b"]...), "b", opts)
	r.a.lend(t, 1, r.near, 0)
	r.remote = r.b.lend(t, 2, r.far, backend.RemoteRead|backend.RemoteWrite)
	r.connect(t)
	r.fabric.SetNoBytes(quiet)
	return r
}

// connect gives the rig a new endpoint and a session over it.
func (r *rig) connect(t testing.TB) {
	t.Helper()
	r.endpoint = backendtest.Connect(t, r.a, r.a.self, r.b.self, r.b).(*endpoint)
	r.session = r.bind(t, r.completions)
}

// bind returns one more session between the two regions.
func (r *rig) bind(t testing.TB, sink backend.Sink) *session {
	t.Helper()
	return backendtest.Bind(t, r.endpoint, 1, r.remote, sink).(*session)
}
