package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/null"
)

// The plans.
const (
	perPage = "per-page" // one transfer for each page: the "before"
	grouped = "grouped"  // one for each pair of regions
)

var verifyLevels = map[string]core.Verify{"off": core.VerifyOff, "sample": core.VerifySample, "all": core.VerifyAll}

// benchRow is one row of umbp bench batch-put and batch-get. Times are in milliseconds.
type benchRow struct {
	Scenario     string `json:"scenario"`
	Op           string `json:"op"`
	Plan         string `json:"plan"`
	Backend      string `json:"backend"`
	Mode         string `json:"mode"` // in-process, or process: how both ends run the backend
	Batch        int    `json:"batch"`
	PerItemPages int    `json:"per_item_pages"`
	PageBytes    uint64 `json:"page_bytes"`
	Memory       string `json:"memory"`      // where the caller's values lie
	PoolMemory   string `json:"pool_memory"` // where the pools lie
	Iters        int    `json:"iters"`

	// What one call took, from the outside: the median, the least and the most.
	WallMs    float64 `json:"wall_ms"`
	WallMsMin float64 `json:"wall_ms_min"`
	WallMsMax float64 `json:"wall_ms_max"`
	// Where the wall went, as medians.
	ControlMs  float64 `json:"control_ms"`
	PlanMs     float64 `json:"plan_ms"`
	DispatchMs float64 `json:"dispatch_ms"`
	MoveMs     float64 `json:"move_ms"`
	VerifyMs   float64 `json:"verify_ms"`
	StagingMs  float64 `json:"staging_ms"`

	GiBs      float64 `json:"gib_s"`
	Transfers uint64  `json:"transfers"`
	Segments  uint64  `json:"segments"`
	// How many transfers the backends have answered.
	TransferCompletions uint64 `json:"transfer_completions"`
	// What the backend counts by itself, in one call: zero for a backend that does not. One that does not count
	// completions has one for each transfer.
	WorkRequests uint64 `json:"work_requests"`
	SGEs         uint64 `json:"sges"`
	Posts        uint64 `json:"posts"`
	Completions  uint64 `json:"completions"`
	CgoCalls     uint64 `json:"cgo_calls"` // of all ends, where they share a library
	// What else it counts, without zeros.
	Counts map[string]uint64 `json:"counts,omitempty"`

	AllocsPerPage float64 `json:"allocs_per_page"`
	Verified      uint64  `json:"verified"` // bytes compared after the run

	Verify    string         `json:"verify"`
	Simulated bool           `json:"simulated"` // the backend moves no bytes, or by simulated devices
	Carried   map[string]int `json:"carried"`   // items of a call, by the backend that moved them
	// The options that the backend was given.
	Options map[string]string `json:"options,omitempty"`
	// What the wall is with checksums; for the grouped plan, measured in the same run with verify off.
	WallMsVerifySample float64 `json:"wall_ms_verify_sample,omitempty"`
	WallMsVerifyAll    float64 `json:"wall_ms_verify_all,omitempty"`
}

// benchFlags are the flags of batch-put and batch-get. Of the lists, every combination is run.
type benchFlags struct {
	scenarios, plans              []string
	backends, modes               []string
	plugins                       config.Plugins
	batches, itemPages, pageBytes []int
	iters, peers                  int
	verify                        string
	options                       map[string]string
	memory, pool                  string
	gpu                           config.GPU
}

func (a *app) benchCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure batches, where their time goes, and how they stand against the limits of this host",
		Long: `bench starts the nodes that it needs in its own process. It touches no running cluster, and reads no
configuration.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.benchBatchCommand(benchPut), a.benchBatchCommand(benchGet), a.benchLimitsCommand())
	return cmd
}

func (a *app) benchBatchCommand(op string) *cobra.Command {
	var f benchFlags
	cmd := &cobra.Command{
		Use:   "batch-" + op,
		Short: "Measure batches of " + op + "s, page by page and grouped",
		Long: fmt.Sprintf(`batch-%s measures one call that carries a batch of values, each of several pages, from one caller to its
targets. All are in this process, and the control plane is direct calls; the bytes go over the backend.

Scenarios:
  all_zc      the caller's memory is registered; one target
  mixed       likewise; the caller is a node too, and holds every second value
  all_stg     the caller's memory is not registered: its bytes are copied through staging memory
  multi_peer  registered; --peers targets, two at least

Plans take turns, call by call, on the same cluster:
  per-page    one transfer for each page; each selects its backend and looks up its session
  grouped     one transfer for each pair of regions

Backends: null moves no bytes, and shows what a batch costs the caller; auto chooses as the default policy
does; any other is measured alone: shm, tcp over loopback, and whatever else is linked in or has a plugin.
rdma-simulated is rdma over devices that take work requests and move no bytes: it shows what the backend itself
costs. The memory of the own process is reached over shm, but under null.

Modes take turns, too, each on a cluster of its own:
  in-process  the backends are linked in
  process     every end runs its backends as processes, from the plugins beside umbp or in --plugins.dir

A backend that counts has these counts of the caller's end in its rows: work requests, SGEs, posts, completions
of the device, and calls of C; what else it counts stands beside them. Otherwise completions are those of
transfers.

Memory: the caller's values, the pools, or both may lie in a GPU's memory, where --backend xgmi moves them. Values
of a caller on a GPU have no checksums, and are compared all the same.

After each run the bytes of the last calls are compared. Flags that say "list" take several values, separated by
commas; every combination is run.`, op),
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f.plugins, f.gpu = benchSettings(cmd)
			cases, err := f.cases(op)
			if err != nil {
				return err
			}
			return a.benchBatches(cmd, cases, &f)
		},
	}
	flags := cmd.Flags()
	flags.StringSliceVar(&f.scenarios, "scenario", []string{allZeroCopy}, "`list` of all_zc, mixed, all_stg, multi_peer")
	flags.StringSliceVar(&f.plans, "plan", []string{perPage, grouped}, "`list` of per-page, grouped")
	flags.StringSliceVar(&f.backends, "backend", []string{null.Name}, "`list` of "+strings.Join(benchBackends(), ", ")+", and, with --mode process, others")
	flags.StringToStringVar(&f.options, "backend-option", nil, "`option=value` of the measured backends; may be given more than once")
	flags.StringSliceVar(&f.modes, "mode", []string{config.InProcess}, "`list` of in-process, process")
	flags.StringVar(&f.memory, "memory", "host", "`place` of the caller's values: "+placeHelp)
	flags.StringVar(&f.pool, "pool-memory", "host", "`place` of the pools: "+placeHelp)
	config.AddFlags(flags, benchKeys...)
	flags.IntSliceVar(&f.batches, "batch", []int{256}, "`list` of values in one call")
	flags.IntSliceVar(&f.itemPages, "per-item-pages", []int{64, 128}, "`list` of pages in one value")
	flags.IntSliceVar(&f.pageBytes, "page-bytes", []int{4096}, "`list` of bytes in one page")
	flags.IntVar(&f.iters, "iters", 30, "calls that are measured, for each plan")
	flags.IntVar(&f.peers, "peers", 2, "targets of multi_peer")
	flags.StringVar(&f.verify, "verify", "off", "checksums: off, sample, all; with off, what the others cost is measured as well")
	return a.listing(cmd)
}

// What a batch may be. Beyond that, the flags are taken for a mistake.
const (
	maxBenchBatch = 1 << 16
	maxBenchPages = 1 << 16
	maxBenchPage  = 1 << 30
	maxBenchBytes = 1 << 40
	maxBenchIters = 1 << 20
	maxBenchPeers = 64
)

// benchFaults collects what is wrong with the flags.
type benchFaults []error

func (f *benchFaults) addf(format string, args ...any) { *f = append(*f, fmt.Errorf(format, args...)) }

// words checks a list of words, each of which is to be known, and to be there once.
func (f *benchFaults) words(flag string, values []string, known ...string) {
	if len(values) == 0 {
		f.addf("--%s is empty", flag)
	}
	for i, v := range values {
		if !slices.Contains(known, v) {
			f.addf("--%s %q is not one of %s%s", flag, v, strings.Join(known, ", "), backend.DidYouMean(v, known))
		} else if slices.Contains(values[:i], v) {
			f.addf("--%s names %s twice", flag, v)
		}
	}
}

// numbers checks a list of numbers from 1 to most.
func (f *benchFaults) numbers(flag string, most int, values ...int) {
	if len(values) == 0 {
		f.addf("--%s is empty", flag)
	}
	for _, v := range values {
		if v < 1 || v > most {
			f.addf("--%s %d is not between 1 and %d", flag, v, most)
		}
	}
}

// err returns all faults as one usage error, or nil.
func (f *benchFaults) err() error {
	if len(*f) == 0 {
		return nil
	}
	return &usageError{errors.Join(*f...)}
}

// cases checks the flags and returns their combinations. The error names every fault.
func (b *benchFlags) cases(op string) ([]benchCase, error) {
	var f benchFaults
	f.words("scenario", b.scenarios, allZeroCopy, mixed, allStaged, multiPeer)
	f.words("plan", b.plans, perPage, grouped)
	known := benchBackends()
	if slices.Equal(b.modes, []string{config.AsProcess}) {
		known = append(known, b.backends...) // opening tells whether there is a plugin
	}
	f.words("backend", b.backends, known...)
	if slices.ContainsFunc(b.backends, func(name string) bool { return !slices.Contains(known, name) }) {
		f.addf("a backend that is not linked in is measured with --mode process only")
	}
	f.words("mode", b.modes, config.InProcess, config.AsProcess)
	for _, name := range b.backends {
		if simulations[name] != nil && slices.Contains(b.modes, config.AsProcess) {
			f.addf("--backend %s is linked in only: leave out --mode process", name)
		}
		if name == autoBackend && len(b.options) > 0 {
			f.addf("--backend-option says nothing to --backend auto: name the backend")
		}
	}
	f.words("verify", []string{b.verify}, "off", "sample", "all")
	memory, memoryErr := parsePlace(b.memory)
	if memoryErr != nil {
		f.addf("--memory %w", memoryErr)
	}
	pool, poolErr := parsePlace(b.pool)
	if poolErr != nil {
		f.addf("--pool-memory %w", poolErr)
	}
	if memory.gpu && slices.Contains(b.scenarios, allStaged) {
		f.addf("--scenario %s is of memory that is not registered, and a GPU's always is: leave out --memory %s", allStaged, memory)
	}
	if memory.gpu && b.verify != "off" {
		f.addf("--verify must be off with --memory %s: values in a GPU's memory have no checksums", memory)
	}
	if slices.Contains(b.backends, xgmiName) && !memory.gpu && !pool.gpu && memoryErr == nil && poolErr == nil {
		f.addf("--backend %s is for a GPU's memory: add --memory gpu, --pool-memory gpu, or both", xgmiName)
	}
	f.numbers("batch", maxBenchBatch, b.batches...)
	f.numbers("per-item-pages", maxBenchPages, b.itemPages...)
	f.numbers("page-bytes", maxBenchPage, b.pageBytes...)
	f.numbers("iters", maxBenchIters, b.iters)
	f.numbers("peers", maxBenchPeers, b.peers)
	for _, name := range b.backends {
		if c := (benchCase{backend: name}); op == benchGet && b.verify != "off" && c.moveless() {
			f.addf("--verify must be off for a batch-get over %s, which moves no bytes to verify", name)
		}
	}
	if err := f.err(); err != nil {
		return nil, err
	}
	var cases []benchCase
	for _, scenario := range b.scenarios {
		for _, name := range b.backends {
			for _, batch := range b.batches {
				for _, pages := range b.itemPages {
					for _, size := range b.pageBytes {
						c := benchCase{
							op: op, scenario: scenario, backend: name, batch: batch, itemPages: pages, pageBytes: uint64(size),
							peers: b.peers, plugins: b.plugins, options: b.options, memory: memory, pool: pool, gpu: b.gpu,
						}
						if c.batchBytes() > maxBenchBytes {
							f.addf("%s: a batch of more than %s", &c, humanSize(maxBenchBytes))
						}
						cases = append(cases, c)
					}
				}
			}
		}
	}
	return cases, f.err()
}

// benchBackends names the backends that can be measured in this process.
func benchBackends() []string {
	names := append([]string{null.Name}, factoryNames()...)
	names = append(names, slices.Sorted(maps.Keys(simulations))...)
	return append(names, autoBackend)
}

func (a *app) benchBatches(cmd *cobra.Command, cases []benchCase, f *benchFlags) error {
	rows := []benchRow{}
	progress := newPace(cmd.ErrOrStderr())
	for _, c := range cases {
		got, err := runBench(cmd.Context(), c, f, progress)
		if err != nil {
			return err
		}
		rows = append(rows, got...)
		if !a.json {
			printBench(cmd.OutOrStdout(), &c, got)
		}
	}
	if a.json {
		return printJSON(cmd.OutOrStdout(), rows)
	}
	return nil
}

// benchKeys are the keys that a benchmark has flags for: it reads no configuration.
var benchKeys = []string{"plugins.dir", "gpu.runtime", "gpu.library"}

// benchSettings returns what the flags of benchKeys say.
func benchSettings(cmd *cobra.Command) (config.Plugins, config.GPU) {
	flag := func(name string) string { return cmd.Flags().Lookup(name).Value.String() }
	return config.Plugins{Dir: flag("plugins.dir")}, config.GPU{Runtime: flag("gpu.runtime"), Library: flag("gpu.library")}
}

// runBench runs one case and returns a row for each mode and plan.
func runBench(ctx context.Context, c benchCase, f *benchFlags, progress *pace) (_ []benchRow, err error) {
	var turns, checked []turn
	for _, mode := range f.modes {
		b, openErr := openBench(ctx, c.in(mode), f.plans)
		if openErr != nil {
			return nil, openErr
		}
		defer func() { err = errors.Join(err, b.Close()) }()
		for _, plan := range f.plans {
			turns = append(turns, turn{b, plan, f.verify})
		}
		checked = append(checked, turn{b, grouped, "sample"}, turn{b, grouped, "all"})
	}
	report := func(what string) func(round int) {
		return func(round int) { progress.say("%s%s: round %d of %d", &c, what, round, f.iters) }
	}
	samples, err := measure(ctx, turns, f.iters, report(""))
	if err != nil {
		return nil, err
	}
	var rows []benchRow
	for i, t := range turns {
		rows = append(rows, newBenchRow(t, samples[i]))
	}
	// What checksums cost does not depend on the plan.
	i := slices.Index(f.plans, grouped)
	if i < 0 || f.verify != "off" || c.memory.gpu || c.moveless() && c.op == benchGet {
		return rows, nil
	}
	samples, err = measure(ctx, checked, f.iters, report(", with checksums"))
	if err != nil {
		return nil, err
	}
	for m := range f.modes {
		row := &rows[m*len(f.plans)+i]
		row.WallMsVerifySample = median(samples[2*m], func(s *sample) float64 { return millis(s.wall) })
		row.WallMsVerifyAll = median(samples[2*m+1], func(s *sample) float64 { return millis(s.wall) })
	}
	return rows, nil
}

func newBenchRow(t turn, samples []sample) benchRow {
	c := &t.on.benchCase
	verified := c.batchBytes()
	if c.moveless() {
		verified = 0
	}
	of := func(part func(s *sample) time.Duration) float64 {
		return median(samples, func(s *sample) float64 { return millis(part(s)) })
	}
	count := func(part func(s *sample) uint64) uint64 {
		return uint64(median(samples, func(s *sample) float64 { return float64(part(s)) }))
	}
	own := func(name string) uint64 { return count(func(s *sample) uint64 { return s.counts[name] }) }
	completed := count(func(s *sample) uint64 { return s.completed })
	completions := completed
	if _, counts := samples[0].counts["completions"]; counts {
		completions = own("completions")
	}
	counts := make(map[string]uint64)
	for name := range samples[0].counts {
		if n := own(name); n > 0 && !slices.Contains(countColumns, name) {
			counts[name] = n
		}
	}
	wall := func(s *sample) time.Duration { return s.wall }
	byWall := func(x, y sample) int { return cmp.Compare(x.wall, y.wall) }
	shortest, longest := slices.MinFunc(samples, byWall), slices.MaxFunc(samples, byWall)
	return benchRow{
		Scenario: c.scenario, Op: c.op, Plan: t.plan, Backend: c.backend, Mode: c.mode,
		Batch: c.batch, PerItemPages: c.itemPages, PageBytes: c.pageBytes,
		Memory: c.memory.String(), PoolMemory: c.pool.String(), Iters: len(samples),
		WallMs: of(wall), WallMsMin: millis(shortest.wall), WallMsMax: millis(longest.wall),
		ControlMs:  of(func(s *sample) time.Duration { return s.control }),
		PlanMs:     of(func(s *sample) time.Duration { return s.plan }),
		DispatchMs: of(func(s *sample) time.Duration { return s.dispatch }),
		MoveMs:     of(func(s *sample) time.Duration { return s.move }),
		VerifyMs:   of(func(s *sample) time.Duration { return s.verify }),
		StagingMs:  of(func(s *sample) time.Duration { return s.staging }),
		GiBs:       float64(c.batchBytes()) / (1 << 30) / of(wall) * 1000,
		Transfers:  count(func(s *sample) uint64 { return s.transfers }), Segments: count(func(s *sample) uint64 { return s.segments }),
		TransferCompletions: completed, Completions: completions, WorkRequests: own("work_requests"), SGEs: own("sges"),
		Posts: own("posts"), CgoCalls: own("cgo_calls"), Counts: counts,
		AllocsPerPage: float64(samples[0].allocs) / float64(c.pages()),
		Verified:      verified, Verify: t.verify, Simulated: t.on.simulated(), Carried: samples[0].carried,
		Options: c.options,
	}
}

// countColumns are the counts of backends that have a place of their own in a row.
var countColumns = []string{"work_requests", "sges", "posts", "completions", "cgo_calls"}

func millis(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

// median returns the median of what f says of each element; the upper one of two.
func median[T any](list []T, f func(*T) float64) float64 {
	values := make([]float64, len(list))
	for i := range list {
		values[i] = f(&list[i])
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// printBench prints the rows of one case for people.
func printBench(w io.Writer, c *benchCase, rows []benchRow) {
	note := ""
	if c.moveless() {
		note = fmt.Sprintf(" (simulated: %s moves no bytes)", c.backend)
	} else if rows[0].Simulated {
		note = " (simulated: there is no such device)"
	}
	fmt.Fprintf(w, "%s = %s a call%s; %d calls, verify %s, times in ms\n",
		c, humanSize(c.batchBytes()), note, rows[0].Iters, rows[0].Verify)
	fmt.Fprintf(w, "  %-10s %-9s %9s %9s %9s %9s %9s %9s %9s %8s %9s %8s %11s %11s %9s  %s\n", "MODE", "PLAN", "WALL", "MIN", "MAX",
		"CONTROL", "PLAN", "DISPATCH", "MOVE", "GiB/s", "TRANSFERS", "SEGMENTS", "COMPLETIONS", "ALLOCS/PAGE", "VERIFIED", "CARRIED BY")
	var modes, plans []string
	for _, r := range rows {
		var carried []string
		for _, name := range slices.Sorted(maps.Keys(r.Carried)) {
			carried = append(carried, fmt.Sprintf("%s %d", name, r.Carried[name]))
		}
		fmt.Fprintf(w, "  %-10s %-9s %9.3f %9.3f %9.3f %9.3f %9.4f %9.4f %9.3f %8.2f %9d %8d %11d %11.4f %9s  %s\n",
			r.Mode, r.Plan, r.WallMs, r.WallMsMin, r.WallMsMax, r.ControlMs, r.PlanMs, r.DispatchMs, r.MoveMs, r.GiBs,
			r.Transfers, r.Segments, r.Completions, r.AllocsPerPage, humanSize(r.Verified), strings.Join(carried, ", "))
		if !slices.Contains(modes, r.Mode) {
			modes = append(modes, r.Mode)
		}
		if !slices.Contains(plans, r.Plan) {
			plans = append(plans, r.Plan)
		}
	}
	for _, mode := range modes {
		printPlans(w, c, mode, rows)
	}
	for _, plan := range plans {
		linked, process := findRow(rows, config.InProcess, plan), findRow(rows, config.AsProcess, plan)
		if linked != nil && process != nil {
			fmt.Fprintf(w, "  %s: the wall is %.3f times as long as a process as in-process, %+.3f ms\n",
				plan, process.WallMs/linked.WallMs, process.WallMs-linked.WallMs)
		}
	}
	fmt.Fprintln(w)
}

// printPlans compares the plans in one mode.
func printPlans(w io.Writer, c *benchCase, mode string, rows []benchRow) {
	say := func(format string, args ...any) { fmt.Fprintf(w, "  "+mode+", "+format+"\n", args...) }
	before, after := findRow(rows, mode, perPage), findRow(rows, mode, grouped)
	for _, r := range []*benchRow{before, after} {
		if r != nil && r.StagingMs > 0 {
			say("%s: copying through the staging memory takes %.3f of it", r.Plan, r.StagingMs)
		}
		if r != nil && r.WorkRequests > 0 {
			each := "" // only where the time is not that of copies on the host
			if r.StagingMs == 0 && len(r.Carried) == 1 {
				each = fmt.Sprintf("; %.0f ns a work request, of the wall without control", (r.WallMs-r.ControlMs)*1e6/float64(r.WorkRequests))
			}
			say("%s: %d work requests with %d SGEs in %d posts, %d completions, %d calls of C%s",
				r.Plan, r.WorkRequests, r.SGEs, r.Posts, r.Completions, r.CgoCalls, each)
		}
	}
	for _, r := range []*benchRow{before, after} {
		if r != nil && len(r.Counts) > 0 {
			var counts []string
			for _, name := range slices.Sorted(maps.Keys(r.Counts)) {
				counts = append(counts, fmt.Sprintf("%d %s", r.Counts[name], strings.ReplaceAll(name, "_", " ")))
			}
			say("%s: %s", r.Plan, strings.Join(counts, ", "))
		}
	}
	if before != nil {
		say("per-page: %.0f ns a page; %.0f ns of them plan and dispatch",
			before.WallMs*1e6/float64(c.pages()), (before.PlanMs+before.DispatchMs)*1e6/float64(c.pages()))
	}
	if before != nil && after != nil {
		say("grouped saves %.1f %% of the wall, and %.2f %% of plan and dispatch",
			saving(after.WallMs, before.WallMs), saving(after.PlanMs+after.DispatchMs, before.PlanMs+before.DispatchMs))
	}
	if after != nil {
		say("grouped: control takes %.0f ns a key", after.ControlMs*1e6/float64(c.batch))
		if after.WallMsVerifyAll > 0 {
			say("grouped, with checksums: %.3f with verify sample, %.3f with all", after.WallMsVerifySample, after.WallMsVerifyAll)
		}
	}
}

func findRow(rows []benchRow, mode, plan string) *benchRow {
	for i := range rows {
		if rows[i].Mode == mode && rows[i].Plan == plan {
			return &rows[i]
		}
	}
	return nil
}

// saving says how many percent of before are saved.
func saving(after, before float64) float64 { return 100 * (1 - after/before) }

// pace reports progress to people: nothing before the first two seconds are over, and then a line every two.
type pace struct {
	w    io.Writer
	next time.Time
}

const paceInterval = 2 * time.Second

func newPace(w io.Writer) *pace { return &pace{w: w, next: time.Now().Add(paceInterval)} }

func (p *pace) say(format string, args ...any) {
	if now := time.Now(); now.After(p.next) {
		p.next = now.Add(paceInterval)
		fmt.Fprintf(p.w, "umbp: bench: "+format+"\n", args...)
	}
}
