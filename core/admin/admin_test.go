package admin_test

import (
	"context"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc/connectivity"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/admin"
	"github.com/umbp/umbp/core/control"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// engine says what the test has it say, and records what it is told.
type engine struct {
	states []core.BackendState
	err    error
	told   []string
}

func (e *engine) BackendStates() []core.BackendState { return e.states }

func (e *engine) RestartBackend(_ context.Context, name string) error {
	e.told = append(e.told, "restart "+name)
	return e.err
}

func (e *engine) SetBackendEnabled(_ context.Context, name string, enabled bool) error {
	e.told = append(e.told, map[bool]string{false: "disable ", true: "enable "}[enabled]+name)
	return e.err
}

// serve offers the engine over a real connection.
func serve(t *testing.T, e *engine) *admin.Client {
	t.Helper()
	s, err := control.Listen("127.0.0.1:0", nil, false)
	if err != nil {
		t.Fatal(err)
	}
	admin.Register(s, e)
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	conn, err := control.Connect(s.Address(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		s.Stop(context.Background())
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	// A call fails where no connection is made in time, as on a busy machine.
	conn.Connect()
	for state := conn.GetState(); state != connectivity.Ready; state = conn.GetState() {
		conn.WaitForStateChange(t.Context(), state)
	}
	return admin.NewClient(conn)
}

func TestBackends(t *testing.T) {
	e := &engine{states: []core.BackendState{
		{Name: "rdma", Reason: "no device"},
		{Name: "shm", Disabled: true, Info: &backend.Info{Name: "shm", Version: "1", Capabilities: backend.Capabilities{
			Ops: backend.Read | backend.Write, Local: backend.Kinds(backend.HostMemory, backend.GPUMemory),
			Remote: backend.Kinds(backend.GPUMemory), Reach: backend.SameHost, Window: 7,
			Links: []backend.Link{{Near: "0000:01:00.0", Far: "0000:02:00.0", Cost: 1, Text: "XGMI, 1 hop"}, {Far: "0000:01:00.0"}},
		}}},
		{Name: "xgmi", Info: &backend.Info{Name: "xgmi", Capabilities: backend.Capabilities{Links: []backend.Link{}}}},
		{Name: "null", Reason: "it was killed", Info: &backend.Info{Name: "null", Capabilities: backend.Capabilities{
			Reach: backend.Network, Window: 1, Simulated: true,
		}}, Process: &host.State{Phase: host.Down, PID: 77, Restarts: 5, Since: time.Unix(1700000000, 123)}},
	}}
	got, err := serve(t, e).Backends(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(e.states, got); diff != "" {
		t.Errorf("the states (-told +heard):\n%s", diff)
	}
}

func TestOrders(t *testing.T) {
	e := &engine{}
	c := serve(t, e)
	for _, err := range []error{
		c.RestartBackend(t.Context(), "tcp"), c.SetBackendEnabled(t.Context(), "shm", false), c.SetBackendEnabled(t.Context(), "shm", true),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff([]string{"restart tcp", "disable shm", "enable shm"}, e.told); diff != "" {
		t.Error(diff)
	}
	e.err = &backend.Error{Code: backend.BadRequest, Op: "restart", Backend: "tcp", Text: "it is linked in"}
	for _, err := range []error{c.RestartBackend(t.Context(), "tcp"), c.SetBackendEnabled(t.Context(), "tcp", true)} {
		if backend.CodeOf(err) != backend.BadRequest || err.Error() != e.err.Error() {
			t.Errorf("got %v, want %v", err, e.err)
		}
	}
}
