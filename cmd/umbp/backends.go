package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// backendRow is one row of umbp backends.
type backendRow struct {
	Name      string      `json:"name"`
	Available bool        `json:"available"`
	Reason    string      `json:"reason,omitempty"` // why it is not available
	Version   string      `json:"version,omitempty"`
	Ops       []string    `json:"ops,omitempty"`
	Local     []string    `json:"local,omitempty"`  // kinds of memory
	Remote    []string    `json:"remote,omitempty"` // kinds of memory
	Reach     string      `json:"reach,omitempty"`
	Window    int         `json:"window,omitempty"` // transfers in flight to one peer
	Simulated bool        `json:"simulated"`
	Options   []optionRow `json:"options,omitempty"`
}

type optionRow struct {
	Name    string   `json:"name"`
	Type    string   `json:"type"`
	Value   string   `json:"value"`
	Default string   `json:"default"`
	Min     string   `json:"min,omitempty"`
	Max     string   `json:"max,omitempty"`
	Choices []string `json:"choices,omitempty"`
	Help    string   `json:"help"`
}

func (a *app) backendsCommand() *cobra.Command {
	return a.listing(&cobra.Command{
		Use:   "backends [NAME]",
		Short: "Show the backends of this binary, what they can do, and the options of one of them",
		Long: `backends opens each configured backend as a client would, and shows what it can do here, or why it
is not available. With a name, it shows that backend with its options, which are set in the configuration
file, in the list "backends".`,
		Args: maxArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := config.Load(a.source(cmd))
			if err != nil {
				return err
			}
			engine, err := openEngine(cmd.Context(), c, processName(c, "client"), false, newLogger(cmd.ErrOrStderr(), quieter(c)))
			if err != nil {
				return err
			}
			defer engine.Close()
			var list []backendRow
			for _, b := range engine.Backends() {
				row := backendRow{Name: b.Name}
				if b.Backend == nil {
					row.Reason = b.Err.Error()
				} else {
					row.describe(b.Backend.Info())
				}
				list = append(list, row)
			}
			for _, f := range factories {
				if !slices.ContainsFunc(list, func(r backendRow) bool { return r.Name == f.Name }) {
					list = append(list, backendRow{Name: f.Name, Reason: "the configuration does not enable it"})
				}
			}
			if len(args) == 0 {
				return a.listBackends(cmd, list)
			}
			i := slices.IndexFunc(list, func(r backendRow) bool { return r.Name == args[0] })
			if i < 0 {
				var names []string
				for _, r := range list {
					names = append(names, r.Name)
				}
				return &usageError{fmt.Errorf("this binary has no backend %q%s", args[0], backend.DidYouMean(args[0], names))}
			}
			list[i].Options = optionRows(c, args[0])
			return a.showBackend(cmd, list[i])
		},
	})
}

func (r *backendRow) describe(info backend.Info) {
	caps := info.Capabilities
	r.Available, r.Version, r.Simulated = true, info.Version, caps.Simulated
	r.Reach, r.Window = caps.Reach.String(), caps.Window
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

func optionRows(c *config.Config, name string) []optionRow {
	var rows []optionRow
	given := map[string]string{}
	for _, b := range c.Backends {
		if b.Name == name {
			given = b.Options
		}
	}
	for _, o := range schemas()[name] {
		row := optionRow{Name: o.Name, Type: string(o.Type), Value: o.Default, Default: o.Default, Min: o.Min, Max: o.Max, Choices: o.Choices, Help: o.Help}
		if text, ok := given[o.Name]; ok {
			row.Value = text
		}
		rows = append(rows, row)
	}
	return rows
}

func (a *app) listBackends(cmd *cobra.Command, list []backendRow) error {
	if a.json {
		return printJSON(cmd.OutOrStdout(), list)
	}
	var rows [][]string
	for _, r := range list {
		window := ""
		if r.Available {
			window = strconv.Itoa(r.Window)
		}
		rows = append(rows, []string{r.Name, r.state(), strings.Join(r.Ops, ","), strings.Join(r.Remote, ","), r.Reach, window})
	}
	return printTable(cmd.OutOrStdout(), []string{"BACKEND", "STATE", "OPS", "MEMORY", "REACH", "WINDOW"}, rows)
}

func (r *backendRow) state() string {
	switch {
	case !r.Available:
		return "unavailable: " + r.Reason
	case r.Simulated:
		return "available (simulated)"
	}
	return "available"
}

func (a *app) showBackend(cmd *cobra.Command, r backendRow) error {
	if a.json {
		return printJSON(cmd.OutOrStdout(), r)
	}
	out := cmd.OutOrStdout()
	if r.Available {
		fmt.Fprintf(out, "%s %s: %s; %s; reach: %s; %d transfers in flight to one peer\n\n",
			r.Name, r.Version, r.state(), strings.Join(r.Ops, " and "), r.Reach, r.Window)
	} else {
		fmt.Fprintf(out, "%s: %s\n\n", r.Name, r.state())
	}
	var rows [][]string
	for _, o := range r.Options {
		bounds := strings.Join(o.Choices, "|")
		if o.Min != "" || o.Max != "" {
			bounds = o.Min + ".." + o.Max
		}
		rows = append(rows, []string{o.Name, o.Type, o.Value, o.Default, bounds, o.Help})
	}
	return printTable(out, []string{"OPTION", "TYPE", "VALUE", "DEFAULT", "RANGE", "MEANING"}, rows)
}
