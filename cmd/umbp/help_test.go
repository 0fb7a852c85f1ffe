package main

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// TestHelp asks every command for its help, which says what the command does and what each of its flags means.
func TestHelp(t *testing.T) {
	var each func(cmd *cobra.Command)
	each = func(cmd *cobra.Command) {
		args := append(strings.Fields(cmd.CommandPath())[1:], "--help")
		code, help, stderr := command(args...)
		if code != exitOK || stderr != "" {
			t.Errorf("%v: exit code %d, %q", args, code, stderr)
		}
		if cmd.Short == "" || cmd.Long == "" || !strings.HasPrefix(help, strings.TrimSpace(cmd.Long)) {
			t.Errorf("%v: the help does not say what the command does:\n%s", args, help)
		}
		flags := 0
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			flags++
			if f.Usage == "" || !strings.Contains(help, "--"+f.Name+" ") && !strings.Contains(help, "--"+f.Name+"\n") {
				t.Errorf("%v: the help does not explain --%s", args, f.Name)
			}
		})
		if flags > 0 && !strings.Contains(help, "[flags]") {
			t.Errorf("%v: the usage line does not mention flags", args)
		}
		for _, c := range cmd.Commands() {
			if !strings.Contains(help, c.Name()+" ") {
				t.Errorf("%v: the help does not list %s", args, c.Name())
			}
			each(c)
		}
	}
	each(newRoot())
}
