package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"go.uber.org/goleak"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/host"
)

// TestOptionsPage: make generate makes the page.
func TestOptionsPage(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "options.md"))
	if err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := command("backends", "schema", "shm", "tcp", "xgmi", "rdma", "--markdown", "--plugins.dir", pluginFolder(t))
	if code != exitOK {
		t.Fatalf("exit code %d\n%s", code, stderr)
	}
	if diff := cmp.Diff(string(page), stdout); diff != "" {
		t.Errorf("docs/options.md is not current; run: make generate (-page +options):\n%s", diff)
	}
}

// TestBenchModes runs every backend linked in and as a process, in turns, on the same command line.
func TestBenchModes(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	for _, op := range []string{benchPut, benchGet} {
		stdout, stderr, code := benchCommandLine(t, "batch-"+op, "--scenario", "mixed", "--backend", "null,shm,tcp",
			"--batch", "8", "--per-item-pages", "3", "--iters", "2", "--mode", "in-process,process",
			"--plugins.dir", pluginFolder(t), "--json")
		if code != exitOK {
			t.Fatalf("exit code %d\n%s", code, stderr)
		}
		var rows []benchRow
		if err := json.Unmarshal([]byte(stdout), &rows); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, r := range rows {
			got = append(got, strings.Join([]string{r.Backend, r.Mode, r.Plan}, " "))
			if r.WallMs <= 0 || r.Simulated != (r.Backend == "null") || r.Verified == 0 != r.Simulated || r.Carried[r.Backend] == 0 {
				t.Errorf("%+v", r)
			}
			checksums := r.Plan == grouped && !(op == benchGet && r.Simulated)
			if (r.WallMsVerifySample > 0) != checksums || (r.WallMsVerifyAll > 0) != checksums {
				t.Errorf("with checksums: %+v", r)
			}
		}
		var want []string
		for _, backend := range []string{"null", "shm", "tcp"} {
			for _, mode := range []string{"in-process", "process"} {
				want = append(want, backend+" "+mode+" per-page", backend+" "+mode+" grouped")
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("rows (-want +got):\n%s", diff)
		}
	}

	stdout, stderr, code := benchCommandLine(t, "batch-put", "--batch", "2", "--per-item-pages", "1", "--iters", "1",
		"--mode", "process,in-process", "--plan", "grouped", "--plugins.dir", pluginFolder(t))
	if code != exitOK || !strings.Contains(stdout, "\n  grouped: the wall is ") {
		t.Errorf("exit code %d\n%s%s", code, stderr, stdout)
	}
	_, stderr, code = benchCommandLine(t, "batch-put", "--mode", "process", "--plugins.dir", t.TempDir())
	if code != exitFailure || !strings.Contains(stderr, "batch-put all_zc over null, 256 x 64 pages of 4 KiB, process: ") || !strings.Contains(stderr, "no such file") {
		t.Errorf("without plugins: exit code %d\n%s", code, stderr)
	}
}

// TestLimitsOfProcesses compares small puts, and skips what has no plugin.
func TestLimitsOfProcesses(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	stdout, stderr, code := benchCommandLine(t, "limits", "--only", "process_put", "--json", "--plugins.dir", t.TempDir())
	if code != exitOK || !strings.Contains(stdout, "the plugin does not start") {
		t.Errorf("exit code %d\n%s%s", code, stdout, stderr)
	}
	small := benchCase{
		op: benchPut, scenario: allZeroCopy, backend: "shm", batch: 1, itemPages: 1, pageBytes: 4096,
		mode: config.AsProcess, plugins: config.Plugins{Dir: pluginFolder(t)},
	}
	for _, l := range []limit{
		{name: "group", goal: 1e9, extra: 1e9},
		{name: "put", latency: true, extra: 1e9},
	} {
		measure := map[bool]measurement{false: putRate, true: putMicros}[l.latency]
		l.turns = 1
		l.open = func(ctx context.Context) (*contest, error) {
			return openAgainst(ctx, small, measure, openSame(small.in(config.InProcess), measure))
		}
		row, err := l.run(t.Context(), 1, newPace(os.Stderr))
		if err != nil {
			t.Fatal(err)
		}
		if row.UMBP <= 0 || row.Limit <= 0 || row.Difference != row.UMBP-row.Limit || row.Goal != "<= +1e+09" || !row.Reached {
			t.Errorf("%s: %+v", l.name, row)
		}
	}
}

// children returns the processes of plugins that this process has started, to serve.
func children(t *testing.T) []int {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, path := range all {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // it is gone
		}
		// pid (name) state ppid
		name, rest, _ := strings.Cut(string(stat), ") ")
		fields := strings.Fields(rest)
		if _, name, _ = strings.Cut(name, " ("); strings.HasPrefix(name, "umbp-plugin-") && fields[0] != "Z" && fields[1] == strconv.Itoa(os.Getpid()) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err != nil {
				t.Fatal(err)
			}
			if line, err := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline")); err == nil && !bytes.Contains(line, []byte("describe")) {
				pids = append(pids, pid)
			}
		}
	}
	slices.Sort(pids)
	return pids
}

// serving waits until every backend of the engines has a process that serves, and returns those.
func serving(t *testing.T, engines []*core.Engine) (pids []int) {
	t.Helper()
	var states []core.BackendState
	all := func() bool {
		pids, states = nil, nil
		for _, e := range engines {
			states = append(states, e.BackendStates()...)
		}
		for _, s := range states {
			if s.Process.Phase != host.Running {
				return false
			}
			pids = append(pids, s.Process.PID)
		}
		return true
	}
	for deadline := time.Now().Add(patienceOfScripts); !all(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("a backend does not come back: %+v", states)
		}
	}
	return pids
}

// TestReplayWhileBackendsAreKilled replays a trace, and kills one process of a backend after the other all the while. No
// byte is wrong, the replay comes to its end, and what fails says why: because the path was down, and how the process
// ended.
func TestReplayWhileBackendsAreKilled(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	const requests, interval = 200, 25 // one of so many is on its way when a process is killed
	var trace []request
	for n := range uint64(requests) {
		// Prompts that share a beginning, and go different ways from there.
		ids := []uint64{1, 2, 3, 10 + n%7, 20 + n%20, 100 + n}
		trace = append(trace, request{InputLength: tokensPerBlock * len(ids), HashIDs: ids})
	}
	for name, backends := range map[string]string{
		"all backends": "",
		"tcp":          "backends: [{name: tcp}]\nselection: {rules: [{require: [tcp]}]}\n",
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "umbp.yaml")
			text := fmt.Sprintf("plugins: {mode: process, dir: %s}\nclient: {timeout: 1m}\npool: {read_lease: 1m}\n%s", pluginFolder(t), backends)
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			c, err := config.Load(config.Source{File: file, Schemas: schemas(), Describe: describePlugin})
			if err != nil {
				t.Fatal(err)
			}
			r := &replayer{requests: trace, blockBytes: 64 * tokensPerBlock, stderr: io.Discard}
			e, err := openEmbedded(t.Context(), c, 2, place{}, 8<<20, uint64(r.blockBytes), hclog.NewNullLogger())
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := e.Close(); err != nil {
					t.Error(err)
				}
				if left := children(t); len(left) > 0 {
					t.Errorf("processes are left: %v", left)
				}
			}()
			engines := []*core.Engine{e.client.engine}
			for _, n := range e.nodes {
				engines = append(engines, n.Engine())
			}
			l := r.lane(c, e.client, e.directory, core.DialLocal(nil, e.nodes...))
			end, err := l.begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			killed := 0
			for i := range trace {
				var killing sync.WaitGroup
				if i%interval == interval-1 {
					pids := serving(t, engines)
					victim := pids[killed%len(pids)]
					killed++
					killing.Go(func() {
						if err := syscall.Kill(victim, syscall.SIGKILL); err != nil {
							t.Error(err)
						}
					})
				}
				if err := l.serve(t.Context(), &trace[i]); err != nil {
					t.Fatal(err)
				}
				killing.Wait()
			}
			serving(t, engines)
			if err := errors.Join(l.sum(t.Context()), end(t.Context())); err != nil {
				t.Fatal(err)
			}
			t.Logf("%d processes were killed: %+v", killed, l.result)
			if l.result.Mismatches > 0 || l.result.HitRatio == 0 {
				t.Errorf("%d processes were killed: %+v", killed, l.result)
			}
			cmd := &cobra.Command{}
			cmd.SetOut(io.Discard)
			err = new(app).reportReplay(cmd, []*lane{l})
			if says := regexp.MustCompile(`^[0-9]+ keys failed; the first: .*(path down|peer gone)`); (err == nil) != (l.result.Failed == 0) ||
				err != nil && !says.MatchString(err.Error()) {
				t.Errorf("%d keys failed: %v", l.result.Failed, err)
			}
		})
	}
}
