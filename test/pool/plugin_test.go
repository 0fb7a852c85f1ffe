package pool_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/admin"
	"github.com/umbp/umbp/core/control"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// operator returns a way to the operator's side of a node.
func operator(t *testing.T, p *process) *admin.Client {
	t.Helper()
	conn, err := control.Connect(p.Control, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return admin.NewClient(conn)
}

// pluginOf returns the state of the one plugin of a node, or nil while none runs.
func pluginOf(t *testing.T, node *admin.Client) *host.State {
	t.Helper()
	states, err := node.Backends(t.Context())
	if err != nil || len(states) != 1 {
		t.Fatalf("%+v, %v", states, err)
	}
	if s := states[0].Process; s.Phase == host.Running {
		return s
	}
	return nil
}

// TestPluginKilled kills the processes of the backends, at the node and at the client, while bytes move. Each comes
// back by itself. The values stay: they lie in the memory of the node, which lives. The client goes on with the
// descriptors that it has, although the regions have other keys now.
func TestPluginKilled(t *testing.T) {
	t.Parallel()
	for _, way := range shmTCP {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			dir, _, b, socketDir := newPool(t, asProcess, patience, func(a, b *role) {
				a.PoolSize = 4096     // so that all goes to b
				b.PoolSize = 64 << 20 // what is in doubt takes room until it is fenced
				a.Backends, b.Backends = []string{way}, []string{way}
			})
			c := connect(t, asProcess, dir.Control, socketDir, way)
			node := operator(t, b)
			kept := c.items("kept", sizes[1:]...)
			is(t, core.Stored, c.BatchPut(t.Context(), kept)...)
			list := c.items("list", 1_000_000, 1_000_000)
			into := c.into(list)
			victims := []func() *host.State{
				func() *host.State { return pluginOf(t, node) },
				func() *host.State { return c.engine.BackendStates()[0].Process },
			}
			for i, victim := range victims {
				stop := make(chan struct{})
				var traffic sync.WaitGroup
				traffic.Go(func() {
					for n := 0; ; n++ {
						select {
						case <-stop:
							return
						default:
						}
						for k := range list {
							list[k].Key = fmt.Sprintf("list-%d-%d-%d", i, n, k)
							into[k].Key = list[k].Key
						}
						for _, r := range append(c.BatchPut(t.Context(), list), c.BatchGet(t.Context(), into)...) {
							switch code := backend.CodeOf(r.Err); {
							case r.Err == nil && (r.Status == core.Stored || r.Status == core.Found || r.Status == core.Missing || r.Status == core.Exists):
							case code == backend.PathDown, code == backend.PeerGone: // which shm says of a connection that was cut
							default:
								t.Errorf("%v: %v", r.Status, r.Err)
							}
						}
						var keys []string
						for _, it := range list {
							keys = append(keys, it.Key)
						}
						c.Remove(t.Context(), keys...)
					}
				})
				for range 3 {
					var before *host.State
					eventually(t, func() bool { before = victim(); return before != nil && before.Phase == host.Running })
					if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
						t.Error(err)
					}
					eventually(t, func() bool {
						now := victim()
						return now != nil && now.Phase == host.Running && now.PID != before.PID && now.Restarts == before.Restarts+1
					})
				}
				close(stop)
				traffic.Wait()
				eventually(t, func() bool { // an outage may have been noted
					return !slices.ContainsFunc(c.BatchGet(t.Context(), c.into(kept)), func(r core.Result) bool { return r.Status != core.Found })
				})
				c.same(kept)
			}
		})
	}
}

// TestPluginRestart restarts the backend of a node as its operator does: nothing fails for a client that waits.
func TestPluginRestart(t *testing.T) {
	t.Parallel()
	dir, _, b, _ := newPool(t, asProcess, patience, func(a, _ *role) { a.PoolSize = 4096 })
	c := connect(t, asProcess, dir.Control, "", tcpOnly...)
	node := operator(t, b)
	list := c.items("list", sizes[1:]...)
	is(t, core.Stored, c.BatchPut(t.Context(), list)...)
	for _, restart := range map[string]func(ctx context.Context, name string) error{
		"node": node.RestartBackend, "client": c.engine.RestartBackend,
	} {
		restarted := make(chan error, 1)
		go func() { restarted <- restart(t.Context(), "tcp") }()
		for done := false; !done; {
			select {
			case err := <-restarted:
				if err != nil {
					t.Fatal(err)
				}
				done = true
			default:
			}
			c.same(list)
		}
	}
	if s := pluginOf(t, node); s == nil || s.Restarts != 1 {
		t.Errorf("the node's plugin: %+v", s)
	}
	// Memory that is registered while no process runs is registered with the next one, unless that takes too long to come.
	if err := syscall.Kill(c.engine.BackendStates()[0].Process.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		buf, err := c.Alloc(t.Context(), 4096)
		if err == nil {
			err = buf.Close(t.Context())
		} else if backend.CodeOf(err) == backend.PathDown {
			return false
		}
		if err != nil {
			t.Fatal(err)
		}
		return true
	})
	late := c.items("late", 100_000, 100_000)
	is(t, core.Stored, c.BatchPut(t.Context(), late)...)
	c.same(late)
	if err := node.RestartBackend(t.Context(), "shm"); backend.CodeOf(err) != backend.BadRequest {
		t.Errorf("a backend that the node does not have: %v", err)
	}
	if err := node.SetBackendEnabled(t.Context(), "tcp", false); err != nil {
		t.Fatal(err)
	}
	states, err := node.Backends(t.Context())
	if err != nil || !states[0].Disabled {
		t.Errorf("%+v, %v", states, err)
	}
}
