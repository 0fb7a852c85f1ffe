package main

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/admin"
	"github.com/umbp/umbp/core/control"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// backendRow is one row of umbp backends.
type backendRow struct {
	Name      string `json:"name"`
	Available bool   `json:"available"`
	Disabled  bool   `json:"disabled"`         // by the operator
	Reason    string `json:"reason,omitempty"` // why it is not available, or why its last process ended
	Mode      string `json:"mode,omitempty"`
	// Of a backend that runs as a process.
	Phase    string     `json:"phase,omitempty"`
	PID      int        `json:"pid,omitempty"`
	Restarts int        `json:"restarts,omitempty"`
	Since    *time.Time `json:"since,omitempty"`

	Version   string    `json:"version,omitempty"`
	Ops       []string  `json:"ops,omitempty"`
	Local     []string  `json:"local,omitempty"`  // kinds of memory
	Remote    []string  `json:"remote,omitempty"` // kinds of memory
	Reach     string    `json:"reach,omitempty"`
	Window    int       `json:"window,omitempty"` // transfers in flight to one peer
	Simulated bool      `json:"simulated"`
	Links     []linkRow `json:"links,omitempty"` // the pairs of places that it reaches, if not all
	// What it finds on this host.
	Findings []backend.Finding `json:"findings,omitempty"`
	Options  []optionRow       `json:"options,omitempty"`
}

// optionRow is an option with the value that the configuration gives it.
type optionRow struct {
	schemaRow
	Value string `json:"value"`
}

// schemaRow is an option as the backend describes it.
type schemaRow struct {
	Name    string   `json:"name"`
	Type    string   `json:"type"`
	Default string   `json:"default"`
	Min     string   `json:"min,omitempty"`
	Max     string   `json:"max,omitempty"`
	Choices []string `json:"choices,omitempty"`
	Help    string   `json:"help"`
}

func (a *app) backendsCommand() *cobra.Command {
	var node string
	cmd := a.listing(&cobra.Command{
		Use:   "backends [NAME]",
		Short: "Show the backends, what they can do, and the options of one of them; restart one, disable or enable it",
		Long: `backends opens each configured backend as a client would, and shows what it can do here, or why it
is not available. With a name, it shows that backend with what it finds on this host and reaches, and with its
options, which are set in the configuration file, in the list "backends".

With --node, it asks a running node for the state of its backends instead.`,
		Args: maxArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := config.Load(a.source(cmd))
			if err != nil {
				return err
			}
			var list []backendRow
			if cmd.Flags().Changed("node") {
				list, err = askBackends(cmd.Context(), c, node)
			} else {
				list, err = openBackends(cmd, c)
			}
			switch {
			case err != nil:
				return err
			case len(args) == 0:
				return a.listBackends(cmd, list)
			}
			i := slices.IndexFunc(list, func(r backendRow) bool { return r.Name == args[0] })
			if i < 0 {
				var names []string
				for _, r := range list {
					names = append(names, r.Name)
				}
				return &usageError{fmt.Errorf("there is no backend %q%s", args[0], backend.DidYouMean(args[0], names))}
			}
			if !cmd.Flags().Changed("node") {
				list[i].Options = optionRows(c, args[0])
				list[i].Findings = examine(cmd, c, configured(c, args[0]))
			}
			return a.showBackend(cmd, list[i])
		},
	})
	cmd.Flags().StringVar(&node, "node", "", "control plane of the node to ask, `host:port`")
	config.AddFlags(cmd.Flags(), append(operatorFlags, "plugins.mode", "plugins.dir")...)
	cmd.AddCommand(
		a.schemaCommand(), a.restartCommand(),
		a.enablingCommand("disable", `disable keeps a node from using a backend, and takes the connections that it has made by the backend
out of use, as soon as what is under way has ended, or ten seconds have. Transfers go by the other backends
that the policy of each process allows. Connections that others have made to the node stay until they end.

The backend stays disabled until "umbp backends enable", or until the node ends.`, false),
		a.enablingCommand("enable", `enable lets a node use a backend again that "umbp backends disable" has disabled.`, true),
	)
	return cmd
}

// configured returns a backend as the configuration has it, or as it is by default.
func configured(c *config.Config, name string) config.Backend {
	if i := slices.IndexFunc(c.Backends, func(b config.Backend) bool { return b.Name == name }); i >= 0 {
		return c.Backends[i]
	}
	return config.Backend{Name: name}
}

// examine asks a backend what it finds on this host.
func examine(cmd *cobra.Command, c *config.Config, b config.Backend) []backend.Finding {
	defer reassure(cmd, "examining "+b.Name)()
	spec, err := backendSpec(linked(b.Name), c.Mode(&b), c.Plugins, b)
	if err != nil {
		return []backend.Finding{{Subject: "plugin", State: backend.Problem, Text: err.Error()}}
	}
	return host.Examine(cmd.Context(), spec)
}

// openBackends opens the backends as a client would.
func openBackends(cmd *cobra.Command, c *config.Config) ([]backendRow, error) {
	engine, err := openEngine(cmd.Context(), c, processName(c, "client"), false, newLogger(cmd.ErrOrStderr(), quieter(c)))
	if err != nil {
		return nil, err
	}
	list := backendRows(engine.BackendStates())
	if err := engine.Close(); err != nil {
		return nil, err
	}
	for _, f := range factories {
		if !slices.ContainsFunc(list, func(r backendRow) bool { return r.Name == f.Name }) {
			list = append(list, backendRow{Name: f.Name, Reason: "the configuration does not enable it"})
		}
	}
	return list, nil
}

func backendRows(states []core.BackendState) []backendRow {
	rows := []backendRow{}
	for _, s := range states {
		r := backendRow{Name: s.Name, Disabled: s.Disabled, Reason: s.Reason}
		if s.Info != nil {
			r.Mode = config.InProcess
			r.describe(*s.Info)
		}
		if p := s.Process; p != nil {
			r.Mode, r.Phase, r.PID, r.Restarts, r.Since = config.AsProcess, string(p.Phase), p.PID, p.Restarts, &p.Since
		}
		rows = append(rows, r)
	}
	return rows
}

func (r *backendRow) describe(info backend.Info) {
	caps := info.Capabilities
	r.Available, r.Version, r.Simulated = true, info.Version, caps.Simulated
	r.Reach, r.Window = caps.Reach.String(), caps.Window
	r.Links = linkRows(caps.Links)
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		if caps.Ops&op != 0 {
			r.Ops = append(r.Ops, op.String())
		}
	}
	for _, kind := range []backend.MemoryKind{backend.HostMemory, backend.GPUMemory} {
		if caps.Local.Has(kind) {
			r.Local = append(r.Local, kind.String())
		}
		if caps.Remote.Has(kind) {
			r.Remote = append(r.Remote, kind.String())
		}
	}
}

func schemaRows(options []backend.Option) []schemaRow {
	rows := []schemaRow{}
	for _, o := range options {
		rows = append(rows, schemaRow{
			Name: o.Name, Type: string(o.Type), Default: o.Default, Min: o.Min, Max: o.Max, Choices: o.Choices, Help: o.Help,
		})
	}
	return rows
}

func optionRows(c *config.Config, name string) []optionRow {
	var rows []optionRow
	given := configured(c, name).Options
	schema, _ := c.Schema(name)
	for _, o := range schemaRows(schema) {
		row := optionRow{schemaRow: o, Value: o.Default}
		if text, ok := given[o.Name]; ok {
			row.Value = text
		}
		rows = append(rows, row)
	}
	return rows
}

// bounds is the range of an option's values.
func (o *schemaRow) bounds() string {
	if o.Min != "" || o.Max != "" {
		return o.Min + ".." + o.Max
	}
	return strings.Join(o.Choices, "|")
}

func (a *app) listBackends(cmd *cobra.Command, list []backendRow) error {
	if a.json {
		return printJSON(cmd.OutOrStdout(), list)
	}
	header := []string{"BACKEND", "STATE", "MODE", "PID", "RESTARTS", "OPS", "MEMORY", "REACH", "WINDOW"}
	var rows [][]string
	reasons := false
	for _, r := range list {
		state, reason := r.state()
		reasons = reasons || reason != ""
		rows = append(rows, []string{
			r.Name, state, r.Mode, number(r.PID), number(r.Restarts),
			strings.Join(r.Ops, ","), strings.Join(r.Remote, ","), r.Reach, number(r.Window), oneLine(reason),
		})
	}
	if reasons { // in the last column, since they are wider than any screen
		header = append(header, "REASON")
	} else {
		for i := range rows {
			rows[i] = rows[i][:len(header)]
		}
	}
	return printTable(cmd.OutOrStdout(), header, rows)
}

// number leaves the place of a zero empty.
func number(n int) string {
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n)
}

// state says in words whether the backend can be used, and why not. The reason is cut to its first line: the rest is
// what a plugin wrote before it died.
func (r *backendRow) state() (state, reason string) {
	reason, _, _ = strings.Cut(r.Reason, "\n")
	switch {
	case !r.Available:
		return "unavailable", reason
	case r.Phase != "" && r.Phase != string(host.Running):
		state = r.Phase
	case r.Simulated:
		state, reason = "available (simulated)", ""
	default:
		state, reason = "available", ""
	}
	if r.Disabled {
		state = "disabled; " + state
	}
	return state, reason
}

func (a *app) showBackend(cmd *cobra.Command, r backendRow) error {
	if a.json {
		return printJSON(cmd.OutOrStdout(), r)
	}
	out := cmd.OutOrStdout()
	state, reason := r.state()
	if reason != "" {
		state += ": " + reason
	}
	if r.Available {
		fmt.Fprintf(out, "%s %s: %s; %s; reach: %s; %d transfers in flight to one peer\n",
			r.Name, r.Version, state, strings.Join(r.Ops, " and "), r.Reach, r.Window)
	} else {
		fmt.Fprintf(out, "%s: %s\n", r.Name, state)
	}
	if r.Phase != "" {
		fmt.Fprintf(out, "%s, process %d, since %s; restarted %d times\n", r.Phase, r.PID, r.Since.Format(time.RFC3339), r.Restarts)
		if r.Reason != "" {
			fmt.Fprintf(out, "the process before it: %s\n", r.Reason)
		}
	}
	if len(r.Findings) > 0 {
		fmt.Fprintln(out)
		var rows []findingRow
		for _, f := range r.Findings {
			rows = append(rows, findingRow{r.Name, f})
		}
		if err := printFindings(out, rows); err != nil {
			return err
		}
	}
	if len(r.Links) > 0 {
		fmt.Fprintln(out)
		if err := printLinks(out, r.Links); err != nil {
			return err
		}
	}
	if r.Options == nil {
		return nil
	}
	var rows [][]string
	for _, o := range r.Options {
		rows = append(rows, []string{o.Name, o.Type, o.Value, o.Default, o.bounds(), o.Help})
	}
	fmt.Fprintln(out)
	return printTable(out, []string{"OPTION", "TYPE", "VALUE", "DEFAULT", "RANGE", "MEANING"}, rows)
}

func (a *app) schemaCommand() *cobra.Command {
	var markdown bool
	cmd := a.listing(&cobra.Command{
		Use:   "schema NAME...",
		Short: "Show the options of backends, as a table, as JSON or for a document",
		Long: `schema shows the options that backends have, whatever the configuration sets. A backend that is not
linked in is asked for them, by its plugin; nothing is opened.`,
		Args: minArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if markdown && a.json {
				return &usageError{fmt.Errorf("--json and --markdown are two forms of the same: choose one")}
			}
			c, err := config.Load(a.source(cmd))
			if err != nil {
				return err
			}
			type row struct {
				Name    string      `json:"name"`
				Options []schemaRow `json:"options"`
			}
			var list []row
			for _, name := range args {
				options, err := schemaOf(c, name)
				if err != nil {
					return err
				}
				list = append(list, row{name, schemaRows(options)})
			}
			out := cmd.OutOrStdout()
			switch {
			case a.json:
				return printJSON(out, list)
			case markdown:
				fmt.Fprintf(out, markdownHead, cmd.CommandPath()+" "+strings.Join(args, " "))
			}
			for i, r := range list {
				if markdown {
					printOptionsMarkdown(cmd, r.Name, r.Options)
					continue
				}
				if i > 0 {
					fmt.Fprintln(out)
				}
				if len(list) > 1 {
					fmt.Fprintf(out, "%s:\n", r.Name)
				}
				var rows [][]string
				for _, o := range r.Options {
					rows = append(rows, []string{o.Name, o.Type, o.Default, o.bounds(), o.Help})
				}
				if err := printTable(out, []string{"OPTION", "TYPE", "DEFAULT", "RANGE", "MEANING"}, rows); err != nil {
					return err
				}
			}
			return nil
		},
	})
	cmd.Flags().BoolVar(&markdown, "markdown", false, "print a page of a document")
	config.AddFlags(cmd.Flags(), "plugins.dir")
	return cmd
}

// markdownHead takes the command that makes the page.
const markdownHead = `# Options of backends

A backend's options are set in the configuration file, in the list ` + "`backends`" + `, and take effect when the process
starts. Sizes and durations have units: 64KiB, 1.5s. This page is what ` + "`%s --markdown`" + ` prints.
`

// schemaOf returns the options of a backend that the configuration knows, or has a plugin for.
func schemaOf(c *config.Config, name string) ([]backend.Option, error) {
	if options, known := c.Schema(name); known {
		return options, nil
	}
	options, err := describePlugin(c.Plugins, configured(c, name))
	if err != nil {
		return nil, &usageError{fmt.Errorf("no backend %q is linked in%s, and %w", name, backend.DidYouMean(name, factoryNames()), err)}
	}
	return options, nil
}

func printOptionsMarkdown(cmd *cobra.Command, name string, options []schemaRow) {
	out := cmd.OutOrStdout()
	fmt.Fprintf(out, "\n## %s\n\n", name)
	if len(options) == 0 {
		fmt.Fprintln(out, "It has no options.")
		return
	}
	code := func(s string) string {
		if s == "" {
			return ""
		}
		return "`" + s + "`"
	}
	fmt.Fprint(out, "| option | type | default | range | meaning |\n|---|---|---|---|---|\n")
	for _, o := range options {
		bounds := code(o.bounds())
		if len(o.Choices) > 0 {
			bounds = "`" + strings.Join(o.Choices, "`, `") + "`"
		}
		fmt.Fprintf(out, "| %s | %s | %s | %s | %s |\n", code(o.Name), o.Type, code(o.Default), bounds, strings.ReplaceAll(o.Help, "|", `\|`))
	}
}

// operatorFlags are those of every command that asks a node.
var operatorFlags = []string{"client.timeout", "tls.cert", "tls.key", "tls.ca", "log.level"}

// operate runs f with the operator's way to a node: to the one at the address, or to the one on this host with the same
// configuration.
func operate(ctx context.Context, c *config.Config, node string, f func(ctx context.Context, node *admin.Client) error) error {
	if node == "" {
		var err error
		if node, err = ownAddress(c); err != nil {
			return err
		}
	}
	if _, _, err := net.SplitHostPort(node); err != nil {
		return &usageError{fmt.Errorf("--node %s is not an address: write host:port", node)}
	}
	conn, err := control.Connect(node, c.TLS.Credentials())
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, c.Client.Timeout)
	defer cancel()
	if err := f(ctx, admin.NewClient(conn)); err != nil {
		return &nodeError{node, err}
	}
	return nil
}

func askBackends(ctx context.Context, c *config.Config, node string) (list []backendRow, err error) {
	err = operate(ctx, c, node, func(ctx context.Context, node *admin.Client) error {
		states, err := node.Backends(ctx)
		list = backendRows(states)
		return err
	})
	return list, err
}

// operatorCommand is a command that does something with one backend of a node.
func (a *app) operatorCommand(cmd *cobra.Command, run func(ctx context.Context, node *admin.Client, name string) error) *cobra.Command {
	var node string
	cmd.Args = exactArgs(1)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := config.Load(a.source(cmd))
		if err != nil {
			return err
		}
		return operate(cmd.Context(), c, node, func(ctx context.Context, node *admin.Client) error {
			return run(ctx, node, args[0])
		})
	}
	cmd.Flags().StringVar(&node, "node", "", "control plane of the node, `host:port`; without it, the node on this host with the same configuration")
	config.AddFlags(cmd.Flags(), operatorFlags...)
	return cmd
}

func (a *app) restartCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "restart NAME",
		Short: "Restart the process of a node's backend",
		Long: `restart ends the process of a backend, and starts another, from the plugin that is there now. Before
that it waits until what is under way has ended, or ten seconds have. It returns when the backend can be used
again. A backend that is linked into the node has no process, and cannot be restarted.`,
	}
	return a.operatorCommand(cmd, func(ctx context.Context, node *admin.Client, name string) error {
		defer reassure(cmd, "restarting "+name)()
		if err := node.RestartBackend(ctx, name); err != nil {
			return err
		}
		states, err := node.Backends(ctx)
		for _, s := range states {
			if s.Name == name && s.Process != nil {
				tell(cmd, "%s runs as process %d", name, s.Process.PID)
			}
		}
		return err
	})
}

func (a *app) enablingCommand(use, long string, enabled bool) *cobra.Command {
	short := map[bool]string{false: "Keep a node from using a backend", true: "Let a node use a backend again"}[enabled]
	cmd := &cobra.Command{Use: use + " NAME", Short: short, Long: long}
	return a.operatorCommand(cmd, func(ctx context.Context, node *admin.Client, name string) error {
		defer reassure(cmd, use[:len(use)-1]+"ing "+name)()
		if err := node.SetBackendEnabled(ctx, name, enabled); err != nil {
			return err
		}
		tell(cmd, "%s is %sd", name, use)
		return nil
	})
}
