// Package serve is the main of a plugin: a process that a host starts, and that runs one backend for it.
//
//	func main() { serve.Main(tcp.Factory) }
//
// Such a program has three uses. "umbp-plugin-tcp describe" prints what the backend is, as JSON, and touches no device.
// "umbp-plugin-tcp examine [OPTION=VALUE]..." looks at what the backend needs on this machine, and prints what it finds, as
// JSON. Started by a host, it serves the backend until the host closes it, or is gone. Started in any other way it says
// what it is, and exits with status 2.
//
// The log of the backend goes to standard error, a line of JSON for each entry, where the host takes it up. What the
// program prints by itself finds its way to the host's log, too.
package serve

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/rpc"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// EnvLogLevel names the environment variable that says from which level on the host wants a plugin's log: trace, debug,
// info, warn, error or off. Without it, info.
const EnvLogLevel = "UMBP_PLUGIN_LOG_LEVEL"

const (
	// closePatience is how long the backend may take to close when the host is gone: nobody else would end it.
	closePatience = 5 * time.Second
	// exitPatience is how long the process waits for the host to end it, when the backend is closed.
	exitPatience = time.Second
	// parentInterval is how often the process looks whether its parent is still the same.
	parentInterval = time.Second
)

// Main is the main function of a plugin. It does not return.
func Main(f backend.Factory) {
	switch {
	case len(os.Args) == 2 && os.Args[1] == "describe":
		os.Exit(describe(f))
	case len(os.Args) >= 2 && os.Args[1] == "examine":
		os.Exit(examine(f, os.Args[2:]))
	case len(os.Args) > 1 || os.Getenv(rpc.Handshake.MagicCookieKey) != rpc.Handshake.MagicCookieValue:
		fmt.Fprintf(os.Stderr, usage, filepath.Base(os.Args[0]), f.Name)
		os.Exit(2)
	}
	os.Exit(serve(f))
}

const usage = `%[1]s is the plugin of UMBP's backend %[2]s. A host starts it; by hand there are two uses:

  %[1]s describe                     print what the backend is, as JSON
  %[1]s examine [OPTION=VALUE]...    look at what it needs on this machine, and print that, as JSON

To let umbp use it, set the backend's "mode" to "process" in umbp's configuration.
`

func describe(f backend.Factory) int { return printJSON(rpc.Describe(f)) }

// examine prints what the backend finds out about this machine.
func examine(f backend.Factory, args []string) int {
	given := make(map[string]string)
	for _, arg := range args {
		name, value, ok := strings.Cut(arg, "=")
		if _, twice := given[name]; !ok || twice {
			fmt.Fprintf(os.Stderr, "%q: write each option once, as OPTION=VALUE\n", arg)
			return 2
		}
		given[name] = value
	}
	options, err := backend.CheckOptions(f.Options, given)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	findings := []backend.Finding{}
	if f.Examine != nil {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		findings = append(findings, f.Examine(ctx, options)...)
	}
	return printJSON(findings)
}

func printJSON(v any) int {
	out := json.NewEncoder(os.Stdout)
	out.SetIndent("", "  ")
	if err := out.Encode(v); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func serve(f backend.Factory) int {
	parent := os.Getppid()
	level := hclog.LevelFromString(os.Getenv(EnvLogLevel))
	if level == hclog.NoLevel {
		level = hclog.Info
	}
	log := hclog.New(&hclog.LoggerOptions{JSONFormat: true, Level: level, Output: os.Stderr})
	passage, err := openPassage()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// Go-plugin leads os.Stdout and os.Stderr to the host through its socket. What a process writes just before it ends
	// would not arrive that way, and it is what matters most.
	stderr, open := os.Stderr, f.Open
	f.Open = func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
		os.Stderr = stderr
		return open(ctx, cfg)
	}
	server := rpc.NewServer(f, passage, log)
	go exitWithHost(server, parent, log)
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig:  rpc.Handshake,
		VersionedPlugins: rpc.VersionedPlugins(server),
		GRPCServer:       plugin.DefaultGRPCServer,
		Logger:           log,
	})
	return closeBackend(server, log)
}

// openPassage returns this end of the passage to the host, or nil where there is none.
func openPassage() (*shm.Passage, error) {
	text, ok := os.LookupEnv(rpc.EnvPassage)
	if !ok {
		return nil, nil
	}
	fd, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return nil, fmt.Errorf("%s: %q is not the number of a descriptor", rpc.EnvPassage, text)
	}
	return shm.OpenPassage(os.NewFile(uintptr(fd), "umbp-passage"))
}

// exitWithHost ends the process when the host has closed the backend and does not end it, and when the host is gone.
// The kernel may have been asked to kill the process then; this is for hosts that do not ask for it.
func exitWithHost(server *rpc.Server, parent int, log hclog.Logger) {
	look := time.NewTicker(parentInterval)
	defer look.Stop()
	for {
		select {
		case <-server.Closed():
			time.Sleep(exitPatience)
			os.Exit(0)
		case <-server.HostGone():
			os.Exit(closeBackend(server, log))
		case <-look.C:
			if os.Getppid() != parent {
				os.Exit(closeBackend(server, log))
			}
		}
	}
}

// closeBackend makes memory quiet, and returns the status to exit with.
func closeBackend(server *rpc.Server, log hclog.Logger) int {
	closed := make(chan error, 1)
	go func() { closed <- server.Close() }()
	select {
	case err := <-closed:
		if err == nil {
			return 0
		}
		log.Error("the backend was closed with an error", "error", err)
	case <-time.After(closePatience):
		log.Error("the backend does not close", "waited", closePatience)
	}
	return 1
}
