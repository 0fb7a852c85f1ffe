// Package pool_test runs the pool as it is run: nodes and the directory in processes of their own, the control plane
// over gRPC, the bytes over the real backends. Processes are killed, connections are cut, ports are used again.
//
// The test binary is its own node: TestMain starts it again, with a role to play in the environment. It is its own
// plugin, too, under the name of one.
package pool_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/admin"
	"github.com/umbp/umbp/core/control"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/serve"
	"github.com/umbp/umbp/plugins/shm"
	"github.com/umbp/umbp/plugins/tcp"
)

// roleVariable holds the role of a process that TestMain has started.
const roleVariable = "UMBP_TEST_ROLE"

// The modes that backends run in.
const (
	inProcess = "in-process"
	asProcess = "process"
)

// A program under the race detector sleeps for a second before it exits, unless this variable tells it not to.
const (
	raceVariable = "GORACE"
	raceOptions  = "atexit_sleep_ms=0"
)

const pluginPrefix = "umbp-plugin-"

// patience is how long a test waits for what must happen, and how long the processes wait for each other where the test
// is not about that: a machine may be so busy that a process stands still for seconds.
const patience = time.Minute

// briefly is for how long a node stays a member without a sign of life where a test waits for the end of that. A node signs
// on three times as often.
const briefly = 10 * time.Second

// plugins is the folder of the plugins.
var plugins string

func TestMain(m *testing.M) {
	if name, ok := strings.CutPrefix(filepath.Base(os.Args[0]), pluginPrefix); ok {
		serve.Main(factory(name))
		return
	}
	if text := os.Getenv(roleVariable); text != "" {
		if err := play(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Setenv(raceVariable, raceOptions)
	removePlugins, err := makePlugins()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		removePlugins()
		os.Exit(code)
	}))
}

// makePlugins makes links to the test binary that have the names of plugins.
func makePlugins() (remove func(), err error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if plugins, err = os.MkdirTemp("", "umbp"); err != nil {
		return nil, err
	}
	for _, f := range factories {
		if err := os.Symlink(program, filepath.Join(plugins, pluginPrefix+f.Name)); err != nil {
			return nil, err
		}
	}
	return func() { os.RemoveAll(plugins) }, nil
}

// connectTimeout is how long the tcp backend waits for the greeting of a peer.
const connectTimeout = 10 * time.Second

// role says what a process does.
type role struct {
	Listen    string // of the control plane
	Directory string // address of the directory; empty to serve it
	Lease     time.Duration

	Node     string // name; empty to lend no memory
	Backends []string
	Mode     string // of the backends
	Plugins  string // folder
	Data     string // tcp: where to listen
	Announce string // tcp: where to be reached; empty for Data
	Sockets  string // shm: directory of the sockets
	PoolSize uint64
}

// host returns the address that the process serves at, without the port.
func (r *role) host() string {
	host, _, _ := net.SplitHostPort(r.Listen)
	return host
}

// ready is what a process tells when it serves.
type ready struct {
	Control string
	Self    backend.Peer
}

// play is the life of a process: it serves until its standard input ends, which it does when the test ends, whatever
// way that may be.
func play(text string) error {
	var r role
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return err
	}
	ctx := context.Background()
	server, err := control.Listen(r.Listen, nil, false)
	if err != nil {
		return err
	}
	defer server.Stop(ctx)
	var dir directory.Directory
	if r.Directory == "" {
		memory := directory.NewMemory(directory.Options{TTL: r.Lease})
		defer memory.Close()
		directory.Register(server, memory)
		dir = memory
	} else {
		conn, err := control.Connect(r.Directory, nil)
		if err != nil {
			return err
		}
		defer conn.Close()
		dir = directory.NewClient(conn)
	}
	var node *core.Node
	says := ready{Control: server.Address()}
	if r.Node != "" {
		plugins = r.Plugins
		engine, err := newEngine(ctx, r.Mode, r.Node, r.Backends, map[string]map[string]string{
			"tcp": {"listen": r.Data, "advertise": r.Announce, "connect_timeout": connectTimeout.String()}, "shm": {"socket_dir": r.Sockets},
		})
		if err != nil {
			return err
		}
		defer engine.Close()
		if node, err = core.NewNode(ctx, engine, core.NodeOptions{
			Directory: dir, Address: server.Address(), PoolSize: r.PoolSize, PageSize: 4096, HugePages: region.HugePagesOff,
			Limits: peer.Limits{SlotTTL: patience, LeaseTTL: patience},
		}); err != nil {
			return err
		}
		defer node.Close(ctx)
		peer.Register(server, node)
		admin.Register(server, engine)
		says.Self = engine.Self()
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve() }()
	if node != nil {
		if err := node.Start(ctx); err != nil {
			return err
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(says); err != nil {
		return err
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		server.Stop(ctx)
	}()
	return <-served
}

// newEngine opens the backends named, in the order of preference.
func newEngine(ctx context.Context, mode, name string, backends []string, options map[string]map[string]string) (*core.Engine, error) {
	opts := core.EngineOptions{Node: name, Rules: []selector.Rule{{Prefer: backends[:1], Allow: backends[1:]}}, ConnectTimeout: patience}
	for _, b := range backends {
		spec := host.Spec{Factory: factory(b), Options: options[b]}
		if mode == asProcess {
			spec.Process = &host.ProcessSpec{Name: b, Path: filepath.Join(plugins, pluginPrefix+b), Env: []string{raceVariable},
				Timing: host.Timing{PingTimeout: patience}}
		}
		opts.Backends = append(opts.Backends, spec)
	}
	engine, err := core.NewEngine(ctx, opts)
	if err != nil {
		return nil, err
	}
	for _, s := range engine.BackendStates() {
		if s.Info == nil {
			return nil, errors.Join(fmt.Errorf("backend %s: %s", s.Name, s.Reason), engine.Close())
		}
	}
	return engine, nil
}

func factory(name string) backend.Factory {
	return factories[slices.IndexFunc(factories, func(f backend.Factory) bool { return f.Name == name })]
}

var factories = []backend.Factory{shm.Factory, tcp.Factory}

// process is one that the test has started.
type process struct {
	t    *testing.T
	role role
	cmd  *exec.Cmd
	in   io.Closer
	ready
}

// start starts a process and waits until it serves.
func start(t *testing.T, r role) *process {
	t.Helper()
	r.Plugins = plugins
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, role: r, cmd: exec.Command(os.Args[0])}
	p.cmd.Env = append(os.Environ(), roleVariable+"="+string(text))
	p.cmd.Stderr = os.Stderr
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.in = in
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err != nil {
		t.Fatalf("process %+v does not come up: %v", r, err)
	}
	if err := json.Unmarshal(line, &p.ready); err != nil {
		t.Fatal(err)
	}
	return p
}

// kill ends the process as a power cut would.
func (p *process) kill() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
	p.in.Close()
}

// restart starts the process again, on the same ports.
func (p *process) restart() *process {
	p.t.Helper()
	p.kill()
	r := p.role
	if r.Data != "" { // a plugin dies with its host, and a moment later
		eventually(p.t, func() bool {
			l, err := net.Listen("tcp", r.Data)
			return err == nil && l.Close() == nil
		})
	}
	r.Listen = p.Control
	return start(p.t, r)
}

// stop lets the process leave in good order.
func (p *process) stop() {
	p.t.Helper()
	p.in.Close()
	if err := p.cmd.Wait(); err != nil {
		p.t.Errorf("the process ends with %v", err)
	}
}

// ownHost returns an address of this host that nobody else has ports at: one that is free there stays so.
func ownHost() string {
	return fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254))
}

// freePort returns an address with a port that is free there.
func freePort(t *testing.T, host string) string {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
