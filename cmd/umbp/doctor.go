package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// findingRow is a finding about one backend, or about what all need, where that is empty.
type findingRow struct {
	Backend string `json:"backend"`
	backend.Finding
}

// checkup is what umbp doctor prints.
type checkup struct {
	State    backend.FindingState `json:"state"` // the worst of all; a problem, too, when not all could be looked at
	Findings []findingRow         `json:"findings"`
	Links    []backendLinks       `json:"links"` // of the backends that have opened and do not reach all places
	Patterns []patternRow         `json:"patterns"`
}

// backendLinks is what one backend reaches from where.
type backendLinks struct {
	Backend string    `json:"backend"`
	Links   []linkRow `json:"links"`
}

// doctor is one run of the command.
type doctor struct {
	app     *app
	cmd     *cobra.Command
	config  *config.Config
	only    string // the one backend to look at; empty for all
	node    string // the one node to try; empty for all
	checkup checkup
	works   map[string]bool // by name of the backend: it has opened
}

func (a *app) doctorCommand() *cobra.Command {
	d := &doctor{app: a}
	var offline bool
	cmd := a.listing(&cobra.Command{
		Use:   "doctor [NAME]",
		Short: "Find out what the backends lack on this host, and whether they move bytes rightly",
		Long: `doctor looks at what each enabled backend needs on this host, such as libraries, devices and limits, says
what it found and what to do about it, and opens the backend. With a name, it looks at that backend only, also at one
that the configuration does not enable.

Then it tries each node that the directory lists, unless --offline is given: over each backend that the policy
may use between this host and the node, it puts patterns of many sizes, from odd offsets, gets them back, compares
them byte by byte, and removes them. Sizes for which a node has no room without evicting values are left out. What
it shows of latency and rate is of single calls, one after the other, the control plane included.

A problem of a backend that the policy can do without is a warning: every rule that names it names another one that
works.

Exit codes:
  0  all is fine, or there are only warnings
  1  there is a problem
  2  wrong command line or configuration`,
		Args: maxArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if offline && d.node != "" {
				return &usageError{errors.New("--offline leaves out what --node asks for: choose one")}
			}
			c, err := config.Load(a.source(cmd))
			if err != nil {
				return err
			}
			d.cmd, d.config, d.only = cmd, c, strings.Join(args, "")
			return d.run(cmd.Context(), offline)
		},
	})
	cmd.Flags().StringVar(&d.node, "node", "", "try this node only, by the address of its control plane, `host:port`")
	cmd.Flags().BoolVar(&offline, "offline", false, "look at this host only, and try no node")
	config.AddFlags(cmd.Flags(), "directory.address", "client.timeout", "plugins.mode", "plugins.dir",
		"tls.cert", "tls.key", "tls.ca", "log.level")
	return cmd
}

func (d *doctor) run(ctx context.Context, offline bool) error {
	d.checkup = checkup{Findings: []findingRow{}, Links: []backendLinks{}, Patterns: []patternRow{}}
	backends, err := d.backends()
	if err != nil {
		return err
	}
	for _, b := range backends {
		d.examine(b)
	}
	var failures []error
	opened := reassure(d.cmd, "opening the backends")
	engine, err := openEngine(ctx, d.config, processName(d.config, "doctor"), false, newLogger(d.cmd.ErrOrStderr(), quieter(d.config)))
	opened()
	if err != nil {
		failures = append(failures, err)
	} else {
		d.look(engine)
		d.relax()
		if !offline {
			failures = append(failures, d.tryNodes(ctx, engine))
		}
		failures = append(failures, engine.Close())
	}
	if errors.Join(failures...) != nil {
		d.checkup.State = backend.Problem
	}
	if err := d.print(); err != nil {
		return err
	}
	problems := 0
	for _, f := range d.checkup.Findings {
		if f.State == backend.Problem {
			problems++
		}
	}
	for _, p := range d.checkup.Patterns {
		if p.State == backend.Problem {
			problems++
		}
	}
	if problems > 0 {
		failures = append(failures, fmt.Errorf("there are problems: %d", problems))
	}
	return errors.Join(failures...)
}

// backends returns those to look at.
func (d *doctor) backends() ([]config.Backend, error) {
	if d.only == "" {
		off := func(b config.Backend) bool { return !b.Enabled }
		return slices.DeleteFunc(slices.Clone(d.config.Backends), off), nil
	}
	var names []string
	for _, b := range d.config.Backends {
		if names = append(names, b.Name); b.Name == d.only {
			return []config.Backend{b}, nil
		}
	}
	b := config.Backend{Name: d.only}
	if linked(d.only).Name == "" {
		if _, err := describePlugin(d.config.Plugins, b); err != nil {
			names = append(names, factoryNames()...)
			return nil, &usageError{fmt.Errorf("no backend %q is configured or linked in%s, and %w", d.only, backend.DidYouMean(d.only, names), err)}
		}
	}
	return []config.Backend{b}, nil
}

func (d *doctor) add(name string, f ...backend.Finding) {
	for _, f := range f {
		d.checkup.Findings = append(d.checkup.Findings, findingRow{name, f})
	}
}

// examine asks one backend what it finds.
func (d *doctor) examine(b config.Backend) {
	d.add(b.Name, examine(d.cmd, d.config, b)...)
	if !b.Enabled {
		d.add(b.Name, backend.Finding{
			Subject: "configuration", State: backend.Warning, Text: "the configuration does not enable it",
			Remedy: "list it in backends, enabled, and name it in a rule of selection",
		})
	}
}

// look notes which of the backends have opened.
func (d *doctor) look(engine *core.Engine) {
	d.works = make(map[string]bool)
	for _, r := range backendRows(engine.BackendStates()) {
		d.works[r.Name] = r.Available
		state, _ := r.state()
		switch {
		case d.only != "" && d.only != r.Name:
		case r.Available:
			d.add(r.Name, backend.Finding{
				Subject: "opening", Text: fmt.Sprintf("%s %s, %s; %s; reach: %s", state, r.Version, r.Mode, strings.Join(r.Ops, " and "), r.Reach),
			})
			if len(r.Links) > 0 {
				d.checkup.Links = append(d.checkup.Links, backendLinks{r.Name, r.Links})
			}
		default:
			d.add(r.Name, backend.Finding{
				Subject: "opening", State: backend.Problem, Text: r.Reason,
				Remedy: "put right what it says, or leave the backend out of the configuration",
			})
		}
	}
	// What belongs together stands together.
	slices.SortStableFunc(d.checkup.Findings, func(x, y findingRow) int { return cmp.Compare(d.place(x.Backend), d.place(y.Backend)) })
}

func (d *doctor) place(name string) int {
	return slices.IndexFunc(d.config.Backends, func(b config.Backend) bool { return b.Name == name })
}

// relax makes warnings of the problems of backends that the policy can do without.
func (d *doctor) relax() {
	policy := rules(d.config)
	for i := range d.checkup.Findings {
		if f := &d.checkup.Findings[i]; f.State == backend.Problem && !needed(policy, f.Backend, d.works) {
			f.State = backend.Warning
		}
	}
}

// needed tells whether some rule names the backend, and no other one that works.
func needed(rules []selector.Rule, name string, works map[string]bool) bool {
	another := func(n string) bool { return n != name && works[n] }
	return slices.ContainsFunc(rules, func(r selector.Rule) bool {
		return slices.Contains(named(r), name) && !slices.ContainsFunc(named(r), another)
	})
}

// named returns the backends that a rule names.
func named(r selector.Rule) []string { return slices.Concat(r.Require, r.Prefer, r.Allow) }

func (d *doctor) print() error {
	c, out := &d.checkup, d.cmd.OutOrStdout()
	for _, f := range c.Findings {
		c.State = max(c.State, f.State)
	}
	for _, p := range c.Patterns {
		c.State = max(c.State, p.State)
	}
	if d.app.json {
		return printJSON(out, c)
	}
	if err := printFindings(out, c.Findings); err != nil {
		return err
	}
	for _, b := range c.Links {
		fmt.Fprintf(out, "\n%s moves between:\n", b.Backend)
		if err := printLinks(out, b.Links); err != nil {
			return err
		}
	}
	if len(c.Patterns) == 0 {
		return nil
	}
	fmt.Fprintln(out)
	return printPatterns(out, c.Patterns)
}

func printFindings(w io.Writer, findings []findingRow) error {
	var rows [][]string
	for _, f := range findings {
		rows = append(rows, []string{f.Backend, oneLine(f.Subject), f.State.String(), oneLine(f.Text)})
		if f.Remedy != "" { // sentences side by side would be wider than any screen
			rows = append(rows, []string{"", "", "remedy", oneLine(f.Remedy)})
		}
	}
	return printTable(w, []string{"BACKEND", "SUBJECT", "STATE", "FOUND"}, rows)
}

// oneLine makes a text of others fit into a table.
func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }
