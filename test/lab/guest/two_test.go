package guest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/control"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/core/selector"
)

// pair is a cluster's machines.
type pair struct {
	t        *testing.T
	one, two machine
}

// TestPair is guest 2: it tries a cluster of two machines. The tests run one after the other, each on a cluster of its
// own.
func TestPair(t *testing.T) {
	inRole(t, "2")
	far := dial(t)
	defer far.Close()
	defer far.Done(struct{}{}, &struct{}{})
	for _, test := range []struct {
		name string
		run  func(pair)
	}{
		{"across", pair.across}, {"both ways", pair.bothWays}, {"node killed", pair.nodeKilled}, {"plugin killed", pair.pluginKilled},
		{"link down here", pair.linkDownHere}, {"link down there", pair.linkDownThere}, {"loss", pair.loss}, {"mixed fleet", pair.mixedFleet},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := pair{t, machine{t, 1, far}, here(t, 2)}
			p.one.serve(settings{
				name: "directory", listen: address(1, directoryPort), only: true, backends: []string{"tcp"}, rule: "require: [tcp]",
			})
			test.run(p)
		})
	}
}

// only is a configuration that has the backend that is tried, and no other.
func only(name string) settings {
	return settings{
		name: name, directory: address(1, directoryPort), backends: []string{*backendName}, process: true,
		rule: "require: [" + *backendName + "]",
	}
}

// node starts a node on a machine.
func (p pair) node(m machine, s settings) settings {
	s.name = fmt.Sprint("node-", m.number)
	m.serve(s)
	return s
}

// across moves values of all sizes between the machines, by the command.
func (p pair) across() {
	s := p.node(p.one, only("node"))
	c := client{p.two, s}
	for _, size := range sizes {
		key, v := fmt.Sprint("value-", size), value(p.t.Name(), size)
		put, got := c.put(key, v), c.get(key, v)
		c.over(*backendName, put, got)
		if put.Node != s.name {
			p.t.Errorf("the value lies at %s", put.Node)
		}
		p.t.Logf("%d bytes: put in %.1f ms, got in %.1f ms", size, put.Millis, got.Millis)
	}
	patterns := c.doctor()
	if len(patterns) != 1 || patterns[0].Node != s.name || patterns[0].Backend != *backendName || patterns[0].State != "fine" || patterns[0].Values == 0 {
		p.t.Errorf("doctor: %+v", patterns)
	}
}

// bothWays lets each machine read from the other at the same time.
func (p pair) bothWays() {
	clients := []client{{p.one, p.node(p.one, only("node"))}, {p.two, p.node(p.two, only("node"))}}
	v := value(p.t.Name(), 2<<20+3)
	for _, c := range clients {
		if r := c.put(c.name, v); r.Node != c.name {
			p.t.Fatalf("the value %s lies at %s", c.name, r.Node)
		}
	}
	p.t.Run("gets", func(t *testing.T) {
		for i, c := range clients {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				c.t = t
				for range 3 {
					c.over(*backendName, c.get(clients[1-i].name, v))
				}
			})
		}
	})
}

// nodeKilled kills a node that a client is connected to, and starts it again at the same address.
func (p pair) nodeKilled() {
	s := p.node(p.one, only("node"))
	pool := p.connect()
	v := value(p.t.Name(), 1<<20+5)
	pool.put("before", v)
	pool.get("before", v)
	ends := pool.underway()
	p.one.stop(s.name, true)
	ends()
	if r := pool.Get(p.t.Context(), "before", make([]byte, len(v))); r.OK() {
		p.t.Errorf("a value of a node that is dead: %v", r)
	}
	p.node(p.one, only("node"))
	pool.recovers("after", v)
	if r := pool.Get(p.t.Context(), "before", make([]byte, len(v))); r.Status != core.Missing {
		p.t.Errorf("a value of a node that was killed: %v, %v", r.Status, r.Err)
	}
}

// pluginKilled kills the backend's process at the node, which keeps its memory and starts the process again.
func (p pair) pluginKilled() {
	p.node(p.one, only("node"))
	pool := p.connect()
	v := value(p.t.Name(), 1<<20+5)
	pool.put("before", v)
	pool.get("before", v)
	ends := pool.underway()
	p.one.run(Program{Argv: []string{"sh", "-c", "kill -9 $(pidof umbp-plugin-" + *backendName + ")"}})
	pool.recovers("after", v)
	pool.get("before", v)
	for key, v := range ends() {
		pool.get(key, v)
	}
}

// linkDownHere takes the client's link down and up again.
func (p pair) linkDownHere() {
	p.linkDown(p.two, "ip link set eth0 down; sleep 3; ip link set eth0 up")
}

// linkDownThere does so with the node's, which cannot be told to end it while it is down.
func (p pair) linkDownThere() {
	p.linkDown(p.one, "(sleep 1; ip link set eth0 down; sleep 3; ip link set eth0 up) >/dev/null 2>&1 & sleep 0.5")
}

func (p pair) linkDown(m machine, script string) {
	p.node(p.one, only("node"))
	pool := p.connect()
	v := value(p.t.Name(), 1<<20+5)
	pool.put("before", v)
	pool.get("before", v)
	ends := pool.underway()
	m.run(Program{Argv: []string{"sh", "-c", script}})
	pool.recovers("after", v)
	pool.get("before", v)
	for key, v := range ends() {
		pool.get(key, v)
	}
}

// loss drops packets on the link. Soft-RoCE waits for its timeout for nearly each packet of a read that is lost, so that
// the largest value would take longer than the node holds it for a reader.
func (p pair) loss() {
	p.node(p.one, only("node"))
	for _, m := range []machine{p.one, p.two} {
		m.run(Program{Argv: []string{"tc", "qdisc", "add", "dev", "eth0", "root", "netem", "loss", "1%"}})
		defer m.run(Program{Argv: []string{"tc", "qdisc", "del", "dev", "eth0", "root"}})
	}
	pool := p.connect()
	for _, size := range sizes[:len(sizes)-1] {
		pool.recovers(fmt.Sprint("value-", size), value(p.t.Name(), size))
	}
}

// mixedFleet has a node without the backend: the policy says whether another may carry the bytes.
func (p pair) mixedFleet() {
	if *backendName == "tcp" {
		p.t.Skip("needs a backend that is not tcp")
	}
	both := only("node")
	both.backends, both.rule = []string{*backendName, "tcp"}, "prefer: ["+*backendName+"], allow: [tcp]"
	without := both
	without.backends, without.rule = []string{"tcp"}, "require: [tcp]"
	clients := []client{{p.one, p.node(p.one, both)}, {p.two, p.node(p.two, without)}}
	v := value(p.t.Name(), 1<<20+5)
	for _, c := range clients {
		c.settings = both
		if r := c.put(fmt.Sprint("at-", c.number), v); r.Node != fmt.Sprint("node-", c.number) {
			p.t.Fatalf("the value lies at %s", r.Node)
		}
	}
	c := client{p.two, both}
	c.over(*backendName, c.get("at-1", v))
	c.over("tcp", c.get("at-2", v))

	c.rule = "require: [" + *backendName + "]"
	c.over(*backendName, c.get("at-1", v))
	out := c.try(c.command("get", "at-2"))
	if why := string(out.Stderr); out.Code == 0 || !strings.Contains(why, *backendName) {
		p.t.Errorf("a policy that requires %s, and a node without it: exit code %d, %s", *backendName, out.Code, why)
	}
}

// pool is a client in the process of the test, which outlives what happens to its peers.
type pool struct {
	*core.PoolClient
	t *testing.T
}

// connect makes a client that moves bytes over the backend that is tried, and no other.
func (p pair) connect() pool {
	p.t.Helper()
	spec := host.Spec{Process: &host.ProcessSpec{Name: *backendName, Path: plugin + *backendName}, Options: options(*backendName)}
	opts := core.EngineOptions{
		Node: "client", Backends: []host.Spec{spec}, Rules: []selector.Rule{{Require: []string{*backendName}}}, Insecure: true,
	}
	engine, err := core.NewEngine(p.t.Context(), opts)
	if err != nil {
		p.t.Fatal(err)
	}
	conn, err := control.Connect(address(1, directoryPort), nil)
	if err != nil {
		p.t.Fatal(err)
	}
	c, err := core.NewPoolClient(p.t.Context(), core.ClientOptions{
		Engine: engine, Directory: directory.NewClient(conn), Dial: core.DialControl(nil), StagingSize: 16 << 20,
		Tuning: core.Tuning{Verify: core.VerifyAll, Timeout: patience},
	})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		if err := errors.Join(c.Close(context.Background()), engine.Close(), conn.Close()); err != nil {
			p.t.Error(err)
		}
	})
	return pool{c, p.t}
}

// put stores a value, which must succeed.
func (p pool) put(key string, v []byte) {
	p.t.Helper()
	if r := p.Put(p.t.Context(), key, v); r.Status != core.Stored || r.Path.Backend != *backendName {
		p.t.Fatalf("put %s: %v over %q, %v", key, r.Status, r.Path.Backend, r.Err)
	}
}

// get fetches a value, which must be the one wanted.
func (p pool) get(key string, want []byte) {
	p.t.Helper()
	got := make([]byte, len(want))
	r := p.Get(p.t.Context(), key, got)
	if r.Status != core.Found || !r.Verified || r.Path.Backend != *backendName {
		p.t.Fatalf("get %s: %v over %q, verified %t, %v", key, r.Status, r.Path.Backend, r.Verified, r.Err)
	}
	if at := differ(got, want); at >= 0 {
		p.t.Fatalf("get %s: the first other byte is at %d", key, at)
	}
}

// underway puts values one after the other, each of which may fail, until it is told to stop. It returns those that
// were stored.
func (p pool) underway() (stop func() map[string][]byte) {
	done, stored := make(chan struct{}), make(chan map[string][]byte, 1)
	go func() {
		values := map[string][]byte{}
		failed := 0
		for i := 0; ; i++ {
			select {
			case <-done:
				p.t.Logf("%d values were stored meanwhile, %d were not", len(values), failed)
				stored <- values
				return
			case <-time.After(20 * time.Millisecond):
			}
			if len(values) == 50 { // the node has room for no more than these and the test's own
				continue
			}
			key := fmt.Sprint("meanwhile-", i)
			v := value(key, 200<<10+i)
			if r := p.Put(p.t.Context(), key, v); r.Status == core.Stored {
				values[key] = v
			} else {
				failed++
			}
		}
	}()
	stop = sync.OnceValue(func() map[string][]byte {
		close(done)
		return <-stored
	})
	p.t.Cleanup(func() { stop() })
	return stop
}

// recovers puts a value and gets it, both as soon as that works again. What was put in doubt may be there.
func (p pool) recovers(key string, v []byte) {
	p.t.Helper()
	eventually(p.t, "put "+key, func() bool {
		r := p.Put(p.t.Context(), key, v)
		if r.Err != nil {
			p.t.Logf("put %s: %v, %v", key, r.Status, r.Err)
		}
		return r.Status == core.Stored || r.Status == core.Exists
	})
	got := make([]byte, len(v))
	eventually(p.t, "get "+key, func() bool {
		clear(got)
		r := p.Get(p.t.Context(), key, got)
		if r.Err != nil {
			p.t.Logf("get %s: %v, %v", key, r.Status, r.Err)
		}
		return r.Status == core.Found && r.Verified
	})
	if at := differ(got, v); at >= 0 {
		p.t.Fatalf("get %s: the first other byte is at %d", key, at)
	}
}
