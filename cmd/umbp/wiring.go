package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/hashicorp/go-hclog"
	"google.golang.org/grpc"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/control"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/fault"
	"github.com/umbp/umbp/plugins/tcp"
)

func newLogger(w io.Writer, c config.Log) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{
		Name: "umbp", Level: hclog.LevelFromString(c.Level), Output: w, JSONFormat: c.Format == "json",
	})
}

// processName returns the configured name, or one made up for this start.
func processName(c *config.Config, role string) string {
	if c.Node.Name != "" && role == "node" {
		return c.Node.Name
	}
	name, err := os.Hostname()
	if err != nil || name == "" {
		name = "host"
	}
	suffix := make([]byte, 3)
	rand.Read(suffix)
	if role != "node" {
		name += "-" + role
	}
	return name + "-" + hex.EncodeToString(suffix)
}

// openEngine opens the configured backends. An engine that only initiates does not listen.
func openEngine(ctx context.Context, c *config.Config, name string, listen bool, log hclog.Logger) (*core.Engine, error) {
	var specs []host.Spec
	for _, b := range c.Backends {
		if !b.Enabled {
			continue
		}
		if b.Name == tcp.Factory.Name && !listen {
			b.Options = withOption(b.Options, "listen", "off")
		}
		spec, err := backendSpec(linked(b.Name), c.Mode(&b), c.Plugins, b)
		if err != nil {
			return nil, err
		}
		if b.Faults != "" {
			script, err := fault.Parse(b.Faults)
			if err != nil {
				return nil, fmt.Errorf("faults of backend %s: %w", b.Name, err)
			}
			log.Warn("faults are injected into a backend", "backend", b.Name, "faults", b.Faults)
			spec.Wrap = func(b backend.Backend) backend.Backend { return fault.Wrap(b, script) }
		}
		specs = append(specs, spec)
	}
	return core.NewEngine(ctx, core.EngineOptions{
		Node: name, Backends: specs, Rules: rules(c), Credentials: c.TLS.Credentials(), Insecure: c.TLS.Insecure,
		Attempts: c.Client.Attempts, Log: log,
	})
}

func withOption(options map[string]string, name, value string) map[string]string {
	changed := map[string]string{name: value}
	for k, v := range options {
		if k != name {
			changed[k] = v
		}
	}
	return changed
}

func rules(c *config.Config) []selector.Rule {
	kinds := map[string]backend.MemoryKind{"host": backend.HostMemory, "gpu": backend.GPUMemory}
	operations := map[string]backend.Op{"read": backend.Read, "write": backend.Write}
	var rules []selector.Rule
	for _, r := range c.Selection.Rules {
		rules = append(rules, selector.Rule{
			Match: selector.Match{
				Local: kinds[r.Match.Local], Remote: kinds[r.Match.Remote], Op: operations[r.Match.Op],
				SameHost: r.Match.SameHost, SameNode: r.Match.SameNode,
				MinSize: uint64(r.Match.MinSize), MaxSize: uint64(r.Match.MaxSize),
			},
			Require: r.Require, Prefer: r.Prefer, Allow: r.Allow,
		})
	}
	return rules
}

func tuning(c *config.Config) core.Tuning {
	verify := map[string]core.Verify{"off": core.VerifyOff, "sample": core.VerifySample, "all": core.VerifyAll}
	return core.Tuning{
		Verify: verify[c.Client.Verify], SampleEvery: c.Client.VerifySample, Timeout: c.Client.Timeout,
		Placement: directory.Policy{LocalFirst: c.Directory.Placement.LocalFirst, Together: c.Directory.Placement.Together},
	}
}

func limits(c *config.Config) peer.Limits {
	return peer.Limits{
		SlotTTL: c.Pool.SlotTTL, LeaseTTL: c.Pool.ReadLease,
		HighWatermark: c.Pool.HighWatermark, LowWatermark: c.Pool.LowWatermark,
	}
}

// directoryAddress is where a client finds the directory: where the configuration says, or at the node that runs
// on this host with the same configuration.
func directoryAddress(c *config.Config) (string, error) {
	if c.Directory.Address != "" {
		return c.Directory.Address, nil
	}
	return ownAddress(c)
}

// ownAddress is where the node that runs on this host with the same configuration can be reached.
func ownAddress(c *config.Config) (string, error) {
	hostPart, port, err := net.SplitHostPort(c.Node.Listen)
	if err != nil {
		return "", fmt.Errorf("node.listen: %w", err)
	}
	if ip := net.ParseIP(hostPart); hostPart == "" || ip != nil && ip.IsUnspecified() {
		hostPart = "127.0.0.1"
	}
	return net.JoinHostPort(hostPart, port), nil
}

// cluster is a command's connection to a running cluster.
type cluster struct {
	config    *config.Config
	log       hclog.Logger
	directory *directory.Client
	conn      *grpc.ClientConn
	address   string // of the directory
}

// connect reads the configuration and connects to the directory.
func (a *app) connect(source config.Source, stderr io.Writer) (*cluster, error) {
	c, err := config.Load(source)
	if err != nil {
		return nil, err
	}
	cl := &cluster{config: c, log: newLogger(stderr, quieter(c))}
	if cl.address, err = directoryAddress(c); err != nil {
		return nil, err
	}
	if cl.conn, err = control.Connect(cl.address, c.TLS.Credentials()); err != nil {
		return nil, err
	}
	cl.directory = directory.NewClient(cl.conn)
	return cl, nil
}

// quieter is the log of a command that has no log level of its own: what went right is not worth a line.
func quieter(c *config.Config) config.Log {
	log := c.Log
	if c.Origin("log.level") == "default" {
		log.Level = "warn"
	}
	return log
}

func (cl *cluster) Close() error { return cl.conn.Close() }

// poolClient is a cluster's client with the engine that it stands on.
type poolClient struct {
	*core.PoolClient
	engine *core.Engine
}

// open opens a client. A command registers the memory that it moves, so that it needs no staging memory.
func (cl *cluster) open(ctx context.Context) (*poolClient, error) {
	engine, err := openEngine(ctx, cl.config, processName(cl.config, "client"), false, cl.log)
	if err != nil {
		return nil, err
	}
	client, err := core.NewPoolClient(ctx, core.ClientOptions{
		Engine: engine, Directory: cl.directory, Dial: core.DialControl(cl.config.TLS.Credentials()), Tuning: tuning(cl.config),
	})
	if err != nil {
		return nil, errors.Join(err, engine.Close())
	}
	return &poolClient{client, engine}, nil
}

// closeTimeout bounds the orderly end of a client or node.
const closeTimeout = 5 * time.Second

func (p *poolClient) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	err := p.PoolClient.Close(ctx)
	closed := make(chan error, 1)
	go func() { closed <- p.engine.Close() }()
	select {
	case closing := <-closed:
		return errors.Join(err, closing)
	case <-ctx.Done():
		// A device that stands still keeps its backend from closing. The end of this process, which comes next, ends both.
		return errors.Join(err, fmt.Errorf("a backend has not closed within %s: its device may stand still", closeTimeout))
	}
}

// closeBuffer closes the buffer of a command that is about to end.
func closeBuffer(b *core.Buffer) error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	return b.Close(ctx)
}

// withClient runs f with a client of the cluster that the command's configuration names.
func (a *app) withClient(ctx context.Context, source config.Source, stderr io.Writer, f func(cl *cluster, p *poolClient) error) (err error) {
	cl, err := a.connect(source, stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cl.Close()) }()
	p, err := cl.open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	return f(cl, p)
}
