// Command umbp runs the nodes of a memory pool, and is its client on the command line.
//
// Data goes to standard output, everything else to standard error. Errors begin with "umbp: error:", and say what
// to do next where that is known. The exit code says what kind of failure it was; see exit.go.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run is the program. A first SIGINT or SIGTERM ends it in order; a second one ends it at once.
// Several goroutines write to stderr, which must be fit for that, as a file is.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)

	root := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	printError(stderr, err)
	return exitCode(err)
}

// app is what the commands share.
type app struct {
	configFile string
	json       bool
}

func newRoot() *cobra.Command {
	a := &app{}
	root := &cobra.Command{
		Use:   "umbp",
		Short: "A distributed memory pool for the KV-cache pages of LLM inference",
		Long: `umbp lends the memory of hosts to a pool, and puts and gets values by key.

Start a node with "umbp serve"; the first one serves the directory, too. Others join with
"umbp serve --directory.address HOST:PORT". Then put and get from anywhere.

Every key of the configuration can be given in a file (--config), as a variable UMBP_A__B, or, where a
command lists it, as a flag; "umbp config default" prints them all.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          noArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().StringVarP(&a.configFile, "config", "c", os.Getenv("UMBP_CONFIG"), "configuration `file`: YAML, TOML or JSON")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &usageError{fmt.Errorf("%w; see %q", err, cmd.CommandPath()+" --help")}
	})
	root.AddCommand(
		a.serveCommand(),
		a.putCommand(), a.getCommand(), a.rmCommand(), a.lsCommand(), a.statCommand(),
		a.statusCommand(), a.doctorCommand(), a.explainCommand(), a.backendsCommand(),
		a.configCommand(), a.benchCommand(), a.replayCommand(), a.conformanceCommand(), a.pluginCommand(), a.versionCommand(),
	)
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetHelpCommand(&cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Show the help of a command",
		Long:  "help shows what a command does, and its flags.",
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil {
				return err
			}
			if len(rest) > 0 {
				return unknownCommand(cmd, rest[0])
			}
			cmd.InitDefaultHelpFlag()
			return cmd.Help()
		},
	})
	return root
}

// listing adds --json to a command that lists something.
func (a *app) listing(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	return cmd
}

// client adds the flags of a command that talks to a cluster.
func (a *app) client(cmd *cobra.Command) *cobra.Command {
	config.AddFlags(cmd.Flags(), "directory.address", "client.timeout", "client.verify", "tls.cert", "tls.key", "tls.ca", "log.level")
	return cmd
}

// source is where the configuration of a command comes from.
func (a *app) source(cmd *cobra.Command) config.Source {
	return config.Source{
		File: a.configFile, Env: os.Environ(), Flags: config.ChangedFlags(cmd.Flags()),
		Schemas: schemas(), Describe: describePlugin,
	}
}

// noArgs refuses arguments; those of a command that has subcommands are taken for the name of one.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 && cmd.HasSubCommands() {
		return unknownCommand(cmd, args[0])
	}
	return arguments(cmd, args, 0, 0)
}

func exactArgs(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error { return arguments(cmd, args, n, n) }
}

func minArgs(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error { return arguments(cmd, args, n, len(args)) }
}

func maxArgs(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error { return arguments(cmd, args, 0, n) }
}

func arguments(cmd *cobra.Command, args []string, least, most int) error {
	quantity := "few"
	switch {
	case len(args) > most:
		quantity = "many"
	case len(args) >= least:
		return nil
	}
	return &usageError{fmt.Errorf("too %s arguments: write %q; see %q", quantity, cmd.UseLine(), cmd.CommandPath()+" --help")}
}

func unknownCommand(parent *cobra.Command, name string) error {
	var names []string
	for _, c := range parent.Commands() {
		names = append(names, c.Name())
	}
	return &usageError{fmt.Errorf("unknown command %q for %q%s; see %q",
		name, parent.CommandPath(), backend.DidYouMean(name, names), parent.CommandPath()+" --help")}
}
