package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/umbp/umbp/config"
)

func (a *app) configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Check, show or print configurations",
		Long: `A configuration is laid together from the defaults, a file (--config or UMBP_CONFIG), variables such as
UMBP_POOL__SIZE, and flags; each overrides the ones before it. Nothing in it is passed over in silence.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	check := &cobra.Command{
		Use:   "check",
		Short: "Check the configuration, and name all that is wrong with it",
		Long: `check reads the configuration as any other command would, and does nothing else: exit code 0 when it is
fine, and 2 when it is not.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(a.source(cmd))
			if err != nil {
				return err
			}
			for _, w := range c.Warnings() {
				fmt.Fprintln(cmd.ErrOrStderr(), "umbp: warning:", w)
			}
			fmt.Fprintln(cmd.ErrOrStderr(), "umbp: the configuration is fine")
			return nil
		},
	}
	show := a.listing(&cobra.Command{
		Use:   "show",
		Short: "Show every value in effect, and where it comes from",
		Long: `show lists every key with its value, the place where it was set, and whether a running node takes a new
value (live) or must be restarted.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(a.source(cmd))
			if err != nil {
				return err
			}
			type row struct {
				Key     string `json:"key"`
				Value   string `json:"value"`
				Origin  string `json:"origin"`
				Default string `json:"default"`
				Reload  string `json:"reload"`
				Help    string `json:"help"`
			}
			var list []row
			var rows [][]string
			for _, e := range c.Entries() {
				list = append(list, row{e.Path, e.Value, e.Origin, e.Default, e.Reload, e.Help})
				rows = append(rows, []string{e.Path, e.Value, e.Origin, e.Reload})
			}
			if a.json {
				return printJSON(cmd.OutOrStdout(), list)
			}
			return printTable(cmd.OutOrStdout(), []string{"KEY", "VALUE", "ORIGIN", "RELOAD"}, rows)
		},
	})
	for _, c := range []*cobra.Command{check, show} {
		config.AddFlags(c.Flags())
	}
	cmd.AddCommand(check, show, &cobra.Command{
		Use:   "default",
		Short: "Print the default configuration file, with the meaning of every key",
		Long:  `default prints a file to start from: it says what holds without any file.`,
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := io.WriteString(cmd.OutOrStdout(), config.DefaultYAML())
			return err
		},
	})
	return cmd
}
