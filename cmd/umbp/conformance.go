package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/conformance"
)

// conformanceFlags are the flags of umbp conformance.
type conformanceFlags struct {
	plugin      string
	options     map[string]string
	env         []string
	run         string
	list        bool
	stream      bool
	nearEndOnly bool
	insecure    bool
	patience    time.Duration
	logLevel    string
	near, far   string // places
}

// conformanceReport is what umbp conformance --json prints.
type conformanceReport struct {
	Plugin    string               `json:"plugin"` // as on the command line
	Backend   string               `json:"backend"`
	Memory    string               `json:"memory"`     // of the initiator
	FarMemory string               `json:"far_memory"` // of the target
	Cases     []conformance.Result `json:"cases"`
}

// conformanceCase is one case of umbp conformance --list.
type conformanceCase struct {
	Name string `json:"name"`
	Rule string `json:"rule"`
	Text string `json:"text"` // of the rule
}

func (a *app) conformanceCommand() *cobra.Command {
	var f conformanceFlags
	cmd := a.listing(&cobra.Command{
		Use:   "conformance --plugin PATH",
		Short: "Try whether a plugin keeps the contract of a backend",
		Long: `conformance starts a plugin, in whatever language it is written, and tries the rules of the contract one
after another. Each case runs in fresh processes of the plugin, one for each end of a connection, which are
given shared memory to move bytes between. What the plugin claims has to work, and what it does not claim has
to be refused. docs/BACKEND_GUIDE.md explains each rule.

The memory is the host's, or a GPU's: --memory says which the initiator is given, and --far-memory which the
target is. One run tries one pair of places, so that a plugin that reaches several takes several runs. --gpu.runtime
and --gpu.library are what this program allocates with; the plugin has options of its own.

It prints a line for each case: PASS, FAIL or SKIP, the case, and the id of its rule; then what went wrong, or
why nothing could be tried. A plugin that dies fails the case, and what it wrote last is shown; one that does
not answer fails it after a while. The next case starts afresh in any event.

The exit code is 0 when no case has failed, 1 when one has, or the plugin does not start, and 2 when the
command line is wrong, or names places between which the plugin does not claim to move bytes.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cases, err := chosenCases(f.run)
			switch {
			case err != nil:
				return err
			case f.list:
				return a.listCases(cmd, cases)
			case f.plugin == "":
				return &usageError{errors.New("which plugin? Name its file with --plugin, or list the cases with --list")}
			case f.patience <= 0:
				return &usageError{fmt.Errorf("--patience %s leaves no time to wait", f.patience)}
			case hclog.LevelFromString(f.logLevel) == hclog.NoLevel:
				return &usageError{fmt.Errorf("--log-level %s is not one of debug, info, warn, error, off", f.logLevel)}
			}
			if f.far == "" {
				f.far = f.near
			}
			memory, err := f.lender(cmd, "memory", f.near)
			if err != nil {
				return err
			}
			defer memory.close()
			farMemory, err := f.lender(cmd, "far-memory", f.far)
			if err != nil {
				return err
			}
			defer farMemory.close()
			h, err := f.harness(cmd)
			if err != nil {
				return err
			}
			h.NewMemory, h.NewFarMemory = memory.lend, farMemory.lend
			if err := claimed(cmd.Context(), h, memory, farMemory); err != nil {
				return err
			}
			return a.tryCases(cmd, &conformanceReport{
				Plugin: f.plugin, Backend: h.Factory.Name, Memory: memory.String(), FarMemory: farMemory.String(),
			}, h, cases)
		},
	})
	flags := cmd.Flags()
	flags.StringVar(&f.plugin, "plugin", "", "the plugin's `file`; a name without a slash is looked for in PATH")
	flags.StringToStringVarP(&f.options, "option", "o", nil, "option of the backend, as `name=value`; may be repeated")
	flags.StringSliceVar(&f.env, "env", nil, "`name` of a variable of the environment that the plugin gets, too; may be repeated")
	flags.StringVar(&f.run, "run", "", "try only the cases whose name matches this `regexp`")
	flags.BoolVar(&f.list, "list", false, "list the cases and the rules that they try, and try nothing")
	flags.BoolVar(&f.stream, "stream", false, "take the plain data path, also where the plugin can use queues in shared memory")
	flags.BoolVar(&f.nearEndOnly, "near-end-only", false, "leave out what needs a far end: for a backend that moves no bytes")
	flags.BoolVar(&f.insecure, "insecure", false, "let the backend listen beyond this host without credentials")
	flags.DurationVar(&f.patience, "patience", conformance.DefaultPatience, "how long a case waits for something that must happen")
	flags.StringVar(&f.near, "memory", "host", "`place` of the initiator's memory: "+placeHelp)
	flags.StringVar(&f.far, "far-memory", "", "`place` of the target's memory; as --memory when it is not given")
	config.AddFlags(flags, "gpu.runtime", "gpu.library")
	flags.StringVar(&f.logLevel, "log-level", "off", "show the plugins' log from this `level` on: debug, info, warn, error, off")
	return cmd
}

// chosenCases returns the cases whose names match.
func chosenCases(expression string) ([]conformance.Case, error) {
	match, err := regexp.Compile(expression)
	if err != nil {
		return nil, &usageError{fmt.Errorf("--run: %w", err)}
	}
	var chosen []conformance.Case
	for _, c := range conformance.Cases() {
		if match.MatchString(c.Name) {
			chosen = append(chosen, c)
		}
	}
	if chosen == nil {
		return nil, &usageError{fmt.Errorf("--run %s matches no case; --list lists them", expression)}
	}
	return chosen, nil
}

func (a *app) listCases(cmd *cobra.Command, cases []conformance.Case) error {
	texts := map[string]string{}
	for _, rule := range conformance.Rules() {
		texts[rule.ID] = rule.Text
	}
	var list []conformanceCase
	var rows [][]string
	for _, c := range cases {
		list = append(list, conformanceCase{c.Name, c.Rule, texts[c.Rule]})
		rows = append(rows, []string{c.Name, c.Rule, texts[c.Rule]})
	}
	if a.json {
		return printJSON(cmd.OutOrStdout(), list)
	}
	return printTable(cmd.OutOrStdout(), []string{"CASE", "RULE", "MEANING"}, rows)
}

// harness opens each end as a process of its own.
func (f *conformanceFlags) harness(cmd *cobra.Command) (conformance.Harness, error) {
	factory, err := host.ProcessFactory(cmd.Context(), host.ProcessSpec{
		Path: f.plugin, Env: f.env, Stream: f.stream,
		// A process that has died stays dead: the case is to see it.
		Timing: host.Timing{FirstPause: time.Hour, LongPause: time.Hour},
	})
	if err != nil {
		return conformance.Harness{}, err
	}
	if _, err := backend.CheckOptions(factory.Options, f.options); err != nil {
		return conformance.Harness{}, &usageError{fmt.Errorf("--option: %w", err)}
	}
	h := conformance.Harness{
		Factory: factory, Options: f.options, Insecure: f.insecure, Patience: f.patience, NearEndOnly: f.nearEndOnly,
		Process: func(b backend.Backend) conformance.Process {
			p := b.(*host.Process)
			return &watchedProcess{p, p.State().PID}
		},
	}
	if f.logLevel != "off" {
		h.Log = newLogger(cmd.ErrOrStderr(), config.Log{Level: f.logLevel})
	}
	return h, nil
}

// lender lends memory at a place, until it is closed.
type lender struct {
	place
	device *gpuDevice // nil for the host
	lend   func(size int) (conformance.Memory, error)
}

// lender returns the lender for the place that a flag names.
func (f *conformanceFlags) lender(cmd *cobra.Command, flag, text string) (*lender, error) {
	p, err := parsePlace(text)
	if err != nil {
		return nil, &usageError{fmt.Errorf("--%s: %w", flag, err)}
	}
	l := &lender{place: p, lend: conformance.SealedMemory}
	set := config.ChangedFlags(cmd.Flags())
	if l.device, err = p.open(config.GPU{Runtime: set["gpu.runtime"], Library: set["gpu.library"]}); err != nil {
		return nil, fmt.Errorf("--%s %s: %w", flag, p, err)
	}
	if l.device != nil {
		l.lend = conformance.GPUMemory(l.device, l.device.number)
	}
	return l, nil
}

// at is the place as backends know it.
func (l *lender) at() (backend.MemoryKind, string) {
	if l.device == nil {
		return backend.HostMemory, ""
	}
	return backend.GPUMemory, l.device.pci
}

// claimed refuses a pair of places that the plugin moves nothing between, if it says between which it does: nearly all
// cases would fail, and none by the plugin's fault. A plugin that does not open is left to the cases.
func claimed(ctx context.Context, h conformance.Harness, near, far *lender) error {
	options, err := backend.CheckOptions(h.Factory.Options, h.Options)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, h.Patience)
	defer cancel()
	b, err := h.Factory.Open(ctx, backend.Config{
		Self: backend.Peer{Node: "claims", Incarnation: 1, Host: "conformance"}, Options: options, Insecure: h.Insecure, Log: h.Log,
	})
	if err != nil {
		return nil
	}
	caps := b.Info().Capabilities
	if err := b.Close(); err != nil {
		return nil
	}
	nearKind, nearAt := near.at()
	farKind, farAt := far.at()
	if _, linked := caps.Link(nearAt, farAt); linked && caps.Local.Has(nearKind) && caps.Remote.Has(farKind) || caps.Local|caps.Remote == 0 {
		return nil
	}
	return &usageError{fmt.Errorf("%s does not claim to move bytes between --memory %s and --far-memory %s; \"umbp backends %s\" shows what it does",
		h.Factory.Name, near, far, h.Factory.Name)}
}

// close forgets the device. What it has lent was given back by the cases.
func (l *lender) close() {
	if l.device != nil {
		l.device.Close()
	}
}

// reasonPatience is how long to wait for the reason why a process has ended.
const reasonPatience = 5 * time.Second

// watchedProcess is the first process of a backend, and the only one.
type watchedProcess struct {
	*host.Process
	pid int
}

// PID implements conformance.Process.
func (p *watchedProcess) PID() int { return p.pid }

// Died implements conformance.Process. The reason is known a moment after the end, when the process has been reaped.
func (p *watchedProcess) Died() error {
	for end := time.Now().Add(reasonPatience); ; time.Sleep(time.Millisecond) {
		switch s := p.State(); {
		case s.Phase == host.Running && s.PID == p.pid:
			return nil
		case s.Reason != "" || time.Now().After(end):
			return errors.New(s.Reason)
		}
	}
}

// tryCases tries one case after the other, and shows each result as soon as it is there.
func (a *app) tryCases(cmd *cobra.Command, report *conformanceReport, h conformance.Harness, cases []conformance.Case) error {
	count := map[conformance.Verdict]int{}
	for _, c := range cases {
		if err := cmd.Context().Err(); err != nil {
			return fmt.Errorf("interrupted before %s: %w", c.Name, context.Cause(cmd.Context()))
		}
		done := reassure(cmd, "trying "+c.Name)
		r := c.Try(h)
		done()
		report.Cases = append(report.Cases, r)
		count[r.Verdict]++
		if !a.json {
			printCase(cmd.OutOrStdout(), r)
		}
	}
	if a.json {
		if err := printJSON(cmd.OutOrStdout(), report); err != nil {
			return err
		}
	}
	tell(cmd, "%s: %d cases passed, %d failed, %d skipped", h.Factory.Name,
		count[conformance.Pass], count[conformance.Fail], count[conformance.Skip])
	if n := count[conformance.Fail]; n > 0 {
		return fmt.Errorf("the plugin %s breaks the contract: %d of %d cases failed", report.Plugin, n, len(cases))
	}
	return nil
}

func printCase(w io.Writer, r conformance.Result) {
	fmt.Fprintf(w, "%s  %s  %s\n", strings.ToUpper(string(r.Verdict)), r.Name, r.Rule)
	if r.Verdict == conformance.Pass {
		return
	}
	for line := range strings.Lines(r.Detail) {
		fmt.Fprintf(w, "      %s\n", strings.TrimRight(line, "\n"))
	}
}
