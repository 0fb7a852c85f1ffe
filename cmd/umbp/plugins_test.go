package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
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
	"go.uber.org/goleak"

	"github.com/umbp/umbp/config"
)

// TestOptionsPage: make generate makes the page.
func TestOptionsPage(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "options.md"))
	if err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	args := []string{"backends", "schema", "shm", "tcp", "xgmi", "rdma", "--markdown", "--plugins.dir", pluginFolder(t)}
	if code := run(args, nil, &stdout, &stderr); code != exitOK {
		t.Fatalf("exit code %d\n%s", code, stderr.String())
	}
	if diff := cmp.Diff(string(page), stdout.String()); diff != "" {
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

// lockedBuffer is what several goroutines may write to, like a file.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// replaying tells whether a replay in this process has got the two buffers that it needs last.
func replaying(t *testing.T) bool {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(maps, []byte("umbp-buffer")) >= 2
}

// TestReplayWhileBackendsAreKilled replays a trace, and kills one process of a backend after the other all the while. No
// byte is wrong, the replay comes to its end, and what fails says why: because the path was down, and how the process
// ended.
func TestReplayWhileBackendsAreKilled(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	dir := t.TempDir()
	trace, only := filepath.Join(dir, "trace"), filepath.Join(dir, "tcp.yaml")
	var lines bytes.Buffer
	const requests, interval, kills = 200, 25 /* ms */, 7
	for n := range requests {
		// Prompts that share a beginning, and go different ways from there.
		ids := []int{1, 2, 3, 10 + n%7, 20 + n%20, 100 + n}
		encoded, _ := json.Marshal(ids)
		fmt.Fprintf(&lines, "{\"timestamp\": %d, \"input_length\": %d, \"hash_ids\": %s}\n", n*interval, 512*len(ids), encoded)
	}
	for file, text := range map[string]string{
		trace: lines.String(),
		only:  "backends: [{name: tcp}]\nselection: {rules: [{require: [tcp]}]}\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{nil, {"-c", only}} {
		args = append(args, "replay", trace, "--speed", "1x", "--pool-size", "16MiB", "--client.timeout", "5s",
			"--mode", "process", "--plugins.dir", pluginFolder(t), "--json")
		var stdout, stderr lockedBuffer
		ended := make(chan int, 1)
		go func() { ended <- run(args, nil, &stdout, &stderr) }()
		killed, code := 0, -1
		tick, tooLate := time.NewTicker(time.Second/2), time.After(patienceOfScripts)
		for code < 0 {
			select {
			case code = <-ended:
				tick.Stop()
			case <-tick.C:
				// Not to the very end: what is killed while it is being closed is an error of its own.
				if pids := children(t); len(pids) > 0 && killed < kills && (killed > 0 || replaying(t)) {
					if err := syscall.Kill(pids[rand.IntN(len(pids))], syscall.SIGKILL); err == nil {
						killed++
					}
				}
			case <-tooLate:
				t.Fatal("the replay hangs")
			}
		}
		var r replayResult
		if err := json.Unmarshal([]byte(stdout.String()), &r); err != nil {
			t.Fatalf("exit code %d, %v\n%s%s", code, err, stdout.String(), stderr.String())
		}
		t.Logf("%d processes were killed: %+v", killed, r)
		if r.Mismatches > 0 || r.Requests != requests || r.HitRatio == 0 || killed < kills {
			t.Errorf("%d processes were killed: %+v", killed, r)
		}
		says := regexp.MustCompile(`(?m)^umbp: error: [0-9]+ keys failed; the first: .*(path down|peer gone)`).MatchString(stderr.String())
		if (code == exitOK) != (r.Failed == 0) || says != (r.Failed > 0) {
			t.Errorf("exit code %d, %d keys failed\n%s", code, r.Failed, stderr.String())
		}
		if left := children(t); len(left) > 0 {
			t.Errorf("processes are left: %v", left)
		}
	}
}
