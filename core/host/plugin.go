package host

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"google.golang.org/grpc"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/rpc"
	"github.com/umbp/umbp/plugin-sdk/serve"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// ProcessSpec says which plugin to start, and how. Name and Path are required.
type ProcessSpec struct {
	// Name is what the backend must call itself. Describe and ProcessFactory take any name where it is empty.
	Name string
	// Path is the plugin's file; a name without a slash is looked for in PATH.
	Path string
	// SHA256 is what the file's checksum must be, in hex; empty for any. The file is checked before each start, and
	// then started by its name: whoever can write to its folder can still exchange it.
	SHA256 string
	// Env names variables of this process that the plugin gets, beside the few that every plugin gets.
	Env []string
	// Stream takes the plain data path even where the plugin knows a faster one.
	Stream bool
	// Look is how long the plugin looks for the next transfer before it sleeps, where that pays; zero for
	// rpc.DefaultLook.
	Look time.Duration
	// Timing is for tests.
	Timing Timing
}

// Timing holds the times of a supervisor. Zero takes the default.
type Timing struct {
	Start       time.Duration // how long a process may take until it serves, and to describe itself; 30 s
	Call        time.Duration // how long it may take for a call whose caller set no deadline; 10 s
	Ping        time.Duration // how often it is asked for a sign of life; 1 s
	PingTimeout time.Duration // how long it may take to give one before it is killed; 5 s
	Drain       time.Duration // how long a planned restart waits for transfers in flight; 10 s
	Stop        time.Duration // how long a process may take to close its backend before it is killed; 10 s
	FirstPause  time.Duration // between a crash and the next start; doubled from crash to crash; 100 ms
	LongPause   time.Duration // the longest such pause; 30 s
	Young       time.Duration // a process that dies younger counts as a start that failed; 10 s
	Healthy     time.Duration // after a process that lived so long the pauses begin anew; 60 s
}

func (t Timing) withDefaults() Timing {
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&t.Start, 30 * time.Second}, {&t.Call, rpc.DefaultCallTimeout},
		{&t.Ping, time.Second}, {&t.PingTimeout, 5 * time.Second},
		{&t.Drain, 10 * time.Second}, {&t.Stop, 10 * time.Second},
		{&t.FirstPause, 100 * time.Millisecond}, {&t.LongPause, 30 * time.Second},
		{&t.Young, 10 * time.Second}, {&t.Healthy, 60 * time.Second},
	} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	return t
}

// passed are the variables that every plugin gets.
var passed = []string{"PATH", "HOME", "TMPDIR", "LANG", "SSL_CERT_FILE", "SSL_CERT_DIR"}

func (s *ProcessSpec) environment() []string {
	var env []string
	for _, name := range slices.Concat(passed, s.Env) {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// locate finds the plugin's file, and checks its checksum.
func (s *ProcessSpec) locate() (string, error) {
	path, err := exec.LookPath(s.Path)
	if err != nil {
		return "", fmt.Errorf("find the plugin: %w", err)
	}
	if path, err = filepath.Abs(path); err != nil {
		return "", fmt.Errorf("find the plugin: %w", err)
	}
	if s.SHA256 == "" {
		return path, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("check the plugin's checksum: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("check the plugin's checksum: %w", err)
	}
	if sum := hex.EncodeToString(h.Sum(nil)); !strings.EqualFold(sum, s.SHA256) {
		return "", fmt.Errorf("the SHA-256 of %s is %s, and it must be %s: install the right file, or correct the configuration", path, sum, s.SHA256)
	}
	return path, nil
}

// Describe asks the plugin's file what it is, without opening its backend.
func Describe(ctx context.Context, spec ProcessSpec) (rpc.Description, error) {
	d, err := describe(ctx, &spec)
	if err != nil {
		name := spec.Path
		if spec.Name != "" {
			name = "of backend " + spec.Name
		}
		err = fmt.Errorf("describe the plugin %s: %w", name, err)
	}
	return d, err
}

func describe(ctx context.Context, spec *ProcessSpec) (d rpc.Description, err error) {
	path, text, err := runPlugin(ctx, spec, rpc.MaxDescription, "describe")
	if err != nil {
		return d, err
	}
	if d, err = rpc.ParseDescription(text); err != nil {
		return d, fmt.Errorf("%s describes itself in a way that makes no sense: is it a plugin of UMBP? %w", path, err)
	}
	if spec.Name != "" && d.Name != spec.Name {
		return d, fmt.Errorf("%s is the plugin of backend %s, not of %s", path, d.Name, spec.Name)
	}
	if !slices.ContainsFunc(rpc.ProtocolVersions, func(v int) bool { return slices.Contains(d.ProtocolVersions, v) }) {
		return d, fmt.Errorf("%s speaks versions %v of the protocol, and this host speaks %v: install a version of it that was built for this host",
			path, d.ProtocolVersions, rpc.ProtocolVersions)
	}
	return d, nil
}

// examine asks the plugin's file what its backend needs on this machine, and whether that is there.
func examine(ctx context.Context, spec *ProcessSpec, options map[string]string) ([]backend.Finding, error) {
	arguments := []string{"examine"}
	for _, name := range slices.Sorted(maps.Keys(options)) {
		arguments = append(arguments, name+"="+options[name])
	}
	path, text, err := runPlugin(ctx, spec, rpc.MaxFindings, arguments...)
	if err != nil {
		return nil, err
	}
	findings, err := rpc.ParseFindings(text)
	if err != nil {
		return nil, fmt.Errorf("what %s prints makes no sense: %w", path, err)
	}
	return findings, nil
}

// runPlugin runs the plugin's program with arguments, and returns its path and what it printed, which is to be so many
// bytes at most.
func runPlugin(ctx context.Context, spec *ProcessSpec, most int, arguments ...string) (path string, text []byte, err error) {
	if path, err = spec.locate(); err != nil {
		return "", nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, spec.Timing.withDefaults().Start)
	defer cancel()
	cmd := exec.Command(path, arguments...)
	cmd.Env = spec.environment()
	c := newChild(cmd)
	runtime.LockOSThread() // see newChild
	defer runtime.UnlockOSThread()
	if err := c.Start(ctx); err != nil {
		return path, nil, err
	}
	stop := context.AfterFunc(ctx, c.kill)
	defer stop()
	text, err = io.ReadAll(io.LimitReader(c.stdout, int64(most)+1))
	c.stdout.Close()
	if len(text) > most {
		err = errors.New("it prints too much")
		c.kill()
	}
	<-c.exited
	end := c.ended()
	if end.Err = errors.Join(err, ctx.Err()); end.Err != nil || !c.cmd.ProcessState.Success() {
		return path, nil, end
	}
	return path, text, nil
}

// plugin is a process with everything that the host holds for it.
type plugin struct {
	*child
	starter *goplugin.Client
	passage *shm.Passage
}

// startPlugin starts a process and connects to it. It has to be called on a thread that lives as long as the process.
// When the context ends, the process is killed.
func startPlugin(ctx context.Context, spec *ProcessSpec, sockets string, log backend.Logger) (*plugin, *grpc.ClientConn, error) {
	path, err := spec.locate()
	if err != nil {
		return nil, nil, err
	}
	passage, theirs, err := shm.NewPassage()
	if err != nil {
		return nil, nil, err
	}
	defer theirs.Close()
	cmd := exec.Command(path)
	cmd.Env = append(spec.environment(), rpc.EnvPassage+"=3", serve.EnvLogLevel+"="+levelOf(log))
	cmd.ExtraFiles = []*os.File{theirs}
	p := &plugin{child: newChild(cmd), passage: passage}
	p.starter = goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig:  rpc.Handshake,
		VersionedPlugins: rpc.VersionedPlugins(nil),
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		RunnerFunc: func(_ hclog.Logger, handshake *exec.Cmd, _ string) (runner.Runner, error) {
			cmd.Env = append(cmd.Env, handshake.Env...)
			return p.child, nil
		},
		SkipHostEnv:      true,
		UnixSocketConfig: &goplugin.UnixSocketConfig{TempDir: sockets},
		StartTimeout:     spec.Timing.Start,
		SyncStdout:       &lineWriter{to: p.log},
		SyncStderr:       &lineWriter{to: p.log},
		Logger:           newPluginLog(log, spec.Name, filepath.Base(path)),
	})
	stop := context.AfterFunc(ctx, p.kill)
	defer stop()
	conn, err := p.connect()
	if err == nil {
		return p, conn, nil
	}
	p.kill()
	<-p.exited
	p.release()
	if p.pid == 0 {
		return nil, nil, err
	}
	end := p.ended()
	end.Err = errors.Join(err, ctx.Err())
	return nil, nil, end
}

func (p *plugin) connect() (*grpc.ClientConn, error) {
	protocol, err := p.starter.Client()
	if err != nil {
		return nil, err
	}
	conn, err := protocol.Dispense(rpc.PluginName)
	if err != nil {
		return nil, err
	}
	return conn.(*grpc.ClientConn), nil
}

// exitPatience is how long a plugin whose backend is closed may take to end.
const exitPatience = 2 * time.Second

// stop ends the process, asking it first if it is in order, and returns when it has been reaped.
func (p *plugin) stop(orderly bool) {
	if orderly {
		timer := time.AfterFunc(exitPatience, p.kill) // go-plugin asks without a deadline
		p.starter.Kill()
		timer.Stop()
	}
	p.kill()
	<-p.exited
}

// done is closed when the process has ended.
func (p *plugin) done() <-chan struct{} { return p.exited }

// release frees what the host holds for the process, which has ended.
func (p *plugin) release() {
	p.starter.Kill()
	p.passage.Close()
}
