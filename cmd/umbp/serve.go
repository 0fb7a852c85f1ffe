package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/admin"
	"github.com/umbp/umbp/core/control"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

func (a *app) serveCommand() *cobra.Command {
	var directoryOnly bool
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run a node: lend memory to the pool, and serve the directory unless another does",
		Long: `serve lends memory to the pool until it is told to stop. Without directory.address it serves the
directory, too; with it, it joins the cluster of that directory.

SIGHUP, or a change of the configuration file, reloads what can change while it runs, and says what
needs a restart. SIGTERM leaves the cluster and stops; a second one stops at once.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			source := a.source(cmd)
			if directoryOnly {
				source.Flags["directory.only"] = "true"
			}
			return serveNode(cmd.Context(), source, cmd.ErrOrStderr())
		},
	}
	config.AddFlags(cmd.Flags())
	cmd.Flags().BoolVar(&directoryOnly, "directory-only", false, "serve the directory and lend no memory (short for --directory.only)")
	return cmd
}

// serveNode runs a node until ctx ends.
func serveNode(ctx context.Context, source config.Source, stderr io.Writer) (err error) {
	manager, err := config.NewManager(source)
	if err != nil {
		return err
	}
	c := manager.Config()
	log := newLogger(stderr, c.Log)
	for _, warning := range c.Warnings() {
		log.Warn("configuration: " + warning)
	}
	s := &server{config: c, log: log}
	defer func() { err = errors.Join(err, s.close()) }()
	if err = s.open(ctx); err == nil {
		manager.Subscribe(func(c *config.Config, _ config.Change) { s.retune(c) })
		err = s.run(ctx, manager)
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil // told to stop before it was ready
	}
	return err
}

// server is a running node.
type server struct {
	config    *config.Config
	log       hclog.Logger
	control   *control.Server
	directory directory.Directory
	engine    *core.Engine
	device    *gpuDevice // that the pool lies on; nil for the host
	node      *core.Node
	http      *http.Server
	httpAt    net.Listener

	closers []func() error // run last first
}

func (s *server) onClose(f func() error) { s.closers = append(s.closers, f) }

func (s *server) close() error {
	var errs []error
	for i := len(s.closers) - 1; i >= 0; i-- {
		errs = append(errs, s.closers[i]())
	}
	return errors.Join(errs...)
}

func (s *server) open(ctx context.Context) error {
	c := s.config
	creds := c.TLS.Credentials()
	var err error
	if s.control, err = control.Listen(c.Node.Listen, creds, c.TLS.Insecure); err != nil {
		return err
	}
	s.onClose(func() error {
		stopping, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		s.control.Stop(stopping)
		return nil
	})
	// All addresses come before the pool, which takes long to populate.
	if err := s.openHTTP(); err != nil {
		return err
	}
	if err := s.openDirectory(); err != nil {
		return err
	}
	if c.Directory.Only {
		return nil
	}
	return s.openNode(ctx)
}

func (s *server) openDirectory() error {
	c := s.config
	if c.Directory.Address == "" {
		memory := directory.NewMemory(directory.Options{TTL: c.Directory.Lease})
		s.onClose(memory.Close)
		directory.Register(s.control, memory)
		s.directory = memory
		return nil
	}
	conn, err := control.Connect(c.Directory.Address, c.TLS.Credentials())
	if err != nil {
		return err
	}
	s.onClose(conn.Close)
	s.directory = directory.NewClient(conn)
	return nil
}

func (s *server) openNode(ctx context.Context) error {
	c := s.config
	gpu, err := s.openGPU() // first, so that it is freed last
	if err != nil {
		return err
	}
	if s.engine, err = openEngine(ctx, c, processName(c, "node"), true, s.log); err != nil {
		return err
	}
	s.onClose(s.engine.Close)
	for _, b := range s.engine.Backends() {
		if b.Err != nil {
			s.log.Warn("backend is not available", "backend", b.Name, "reason", b.Err)
		}
	}
	address := c.Node.Advertise
	if address == "" {
		address = s.control.Address()
	}
	s.node, err = core.NewNode(ctx, s.engine, core.NodeOptions{
		Directory: s.directory, Address: address, PoolSize: uint64(c.Pool.Size), PageSize: uint64(c.Pool.PageSize),
		HugePages: region.HugePages(c.Pool.HugePages), GPU: gpu, Limits: limits(c), Progress: s.populating(), Log: s.log,
	})
	if s.device != nil {
		err = needsGPUBackend(err)
	}
	if err != nil {
		return err
	}
	s.onClose(func() error {
		leaving, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		err := s.node.Close(leaving)
		if backend.CodeOf(err) == backend.PathDown { // as when a whole cluster is stopped: no failure of ours
			s.log.Warn("the directory was not told that the node leaves", "reason", err)
			return nil
		}
		return err
	})
	peer.Register(s.control, s.node)
	admin.Register(s.control, s.engine)
	return nil
}

// openGPU allocates the pool on a GPU, where the configuration wants it there.
func (s *server) openGPU() (*backend.GPURange, error) {
	device, err := poolPlace(s.config).open(s.config.GPU)
	if device == nil {
		return nil, err
	}
	s.onClose(device.Close)
	at, free, err := device.alloc(uint64(s.config.Pool.Size))
	if err != nil {
		return nil, err
	}
	s.onClose(free)
	s.device = device
	return &at, nil
}

// populating logs how far the pool is populated, every two seconds.
func (s *server) populating() func(done, total uint64) {
	last := time.Now()
	return func(done, total uint64) {
		if now := time.Now(); now.Sub(last) > 2*time.Second && done < total {
			last = now
			s.log.Info("populating the pool", "done", humanSize(done), "of", humanSize(total))
		}
	}
}

func (s *server) openHTTP() error {
	if s.config.Node.HTTP == "" {
		return nil
	}
	l, err := net.Listen("tcp", s.config.Node.HTTP)
	if err != nil {
		return fmt.Errorf("listen for metrics: %w; set node.http to a free address, or to \"\" for none", err)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(newMetrics(s), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", s.health)
	s.http = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, IdleTimeout: time.Minute}
	s.httpAt = l
	s.onClose(s.http.Close)
	return nil
}

// health answers "ok" as long as the process serves. A node that another of its name has replaced does not.
func (s *server) health(w http.ResponseWriter, r *http.Request) {
	if s.node != nil {
		if _, err := s.node.Describe(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
	}
	fmt.Fprintln(w, "ok")
}

func (s *server) run(ctx context.Context, manager *config.Manager) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(s.control.Serve)
	if s.http != nil {
		group.Go(func() error {
			if err := s.http.Serve(s.httpAt); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		})
	}
	if s.node != nil {
		if err := s.node.Start(ctx); err != nil {
			return err
		}
		group.Go(func() error {
			select {
			case <-s.node.Done():
				return fmt.Errorf("another process has joined the cluster under the name %q; give each node a node.name of its own", s.engine.Self().Node)
			case <-ctx.Done():
				return nil
			}
		})
	}
	group.Go(func() error {
		manager.Run(ctx, s.reloaded)
		return nil
	})
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	group.Go(func() error {
		for {
			select {
			case <-hup:
				change, err := manager.Reload()
				if err == nil && change.Empty() {
					s.log.Info("configuration reloaded: nothing has changed")
				}
				s.reloaded(manager.Config(), change, err)
			case <-ctx.Done():
				return nil
			}
		}
	})
	s.ready()
	<-ctx.Done()
	s.log.Info("stopping")
	err := s.close()
	s.closers = nil
	return errors.Join(err, group.Wait())
}

// ready says where the node can be reached: the line that scripts wait for.
func (s *server) ready() {
	args := []any{"control", s.control.Address()}
	if s.config.Directory.Address == "" {
		args = append(args, "directory", "served here")
	} else {
		args = append(args, "directory", s.config.Directory.Address)
	}
	if s.node != nil {
		args = append(args, "node", s.engine.Self(), "pool", s.config.Pool.Size, "page", s.config.Pool.PageSize)
		if s.device != nil {
			args = append(args, "memory", s.device)
		} else {
			args = append(args, "huge_pages", s.node.HugePages())
		}
	}
	if s.httpAt != nil {
		args = append(args, "http", s.httpAt.Addr())
	}
	s.log.Info("ready", args...)
}

func (s *server) reloaded(_ *config.Config, change config.Change, err error) {
	if err != nil {
		s.log.Error("the configuration was not reloaded; the one before stays in effect", "error", err)
		return
	}
	for _, d := range change.Live {
		s.log.Info("configuration changed", "change", d)
	}
	for _, d := range change.NeedsRestart {
		s.log.Warn("configuration changed, and needs a restart to take effect", "change", d)
	}
}

// retune puts the live values of a new configuration into effect.
func (s *server) retune(c *config.Config) {
	s.log.SetLevel(hclog.LevelFromString(c.Log.Level))
	if s.node == nil {
		return
	}
	if err := s.node.SetLimits(limits(c)); err != nil {
		s.log.Error("the pool keeps its limits", "error", err)
	}
	s.engine.SetAttempts(c.Client.Attempts)
	if err := s.engine.SetRules(rules(c)); err != nil {
		s.log.Error("the selection policy stays as it was", "error", err)
	}
}
