package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/reference"
)

// benchCommandLine runs the program, and returns what it printed and its exit code.
func benchCommandLine(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	code, stdout, stderr = command(append([]string{"bench"}, args...)...)
	return stdout, stderr, code
}

// benchTable runs the program for so many rows, and returns them.
func benchTable(t *testing.T, n int, args ...string) (rows []benchRow) {
	t.Helper()
	stdout, stderr, code := benchCommandLine(t, append(args, "--json")...)
	if code != exitOK {
		t.Fatalf("bench %s: exit code %d\n%s", strings.Join(args, " "), code, stderr)
	}
	if err := json.Unmarshal([]byte(stdout), &rows); err != nil || len(rows) != n {
		t.Fatalf("bench %s: %d rows, want %d; %v", strings.Join(args, " "), len(rows), n, err)
	}
	return rows
}

func init() {
	simulations["counting"] = func() simulation { return simulation{countingNetwork(), func() {}} }
}

// countingNetwork makes backends that count the work requests and SGEs that transfers would be, were there devices.
func countingNetwork() backend.Factory {
	f := reference.NewNetwork().Factory()
	f.Name = "counting"
	open := f.Open
	f.Open = func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
		b, err := open(ctx, cfg)
		if err != nil {
			return nil, err
		}
		return &countingBackend{Backend: b}, nil
	}
	return f
}

type countingBackend struct {
	backend.Backend
	transfers, segments atomic.Uint64
}

func (c *countingBackend) Info() backend.Info {
	i := c.Backend.Info()
	i.Name = "counting"
	return i
}

func (c *countingBackend) Counters() []backend.Count {
	transfers, segments := c.transfers.Load(), c.segments.Load()
	return []backend.Count{
		{Name: "work_requests", Value: segments}, {Name: "sges", Value: 2 * segments}, {Name: "posts", Value: 3 * transfers},
		{Name: "completions", Value: 4 * transfers}, {Name: "cgo_calls", Value: 5 * transfers},
	}
}

func (c *countingBackend) Offer(ctx context.Context, peer backend.Peer) (backend.Handshake, error) {
	h, err := c.Backend.Offer(ctx, peer)
	return &countingHandshake{h, c}, err
}

type countingHandshake struct {
	backend.Handshake
	backend *countingBackend
}

func (h *countingHandshake) Establish(ctx context.Context, answer []byte) (backend.Endpoint, error) {
	e, err := h.Handshake.Establish(ctx, answer)
	return &countingEndpoint{e, h.backend}, err
}

type countingEndpoint struct {
	backend.Endpoint
	backend *countingBackend
}

func (e *countingEndpoint) Session(
	ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink,
) (backend.Session, error) {
	s, err := e.Endpoint.Session(ctx, local, remote, sink)
	return &countingSession{s, e.backend}, err
}

type countingSession struct {
	backend.Session
	backend *countingBackend
}

func (s *countingSession) Post(t backend.Transfer) error {
	segments := uint64(len(t.Segments))
	err := s.Session.Post(t)
	if err == nil {
		s.backend.transfers.Add(1)
		s.backend.segments.Add(segments)
	}
	return err
}

// TestBenchCounts: what a backend counts is in the rows, for one call, and exactly so.
func TestBenchCounts(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	for _, r := range benchTable(t, 2, "batch-put", "--backend", "counting", "--batch", "4", "--per-item-pages", "16",
		"--page-bytes", "256", "--iters", "3", "--backend-option", "window=100") {
		transfers := map[string]uint64{perPage: 4 * 16, grouped: 1}[r.Plan]
		if r.TransferCompletions != transfers || r.WorkRequests != r.Segments || r.SGEs != 2*r.Segments ||
			r.Posts != 3*transfers || r.Completions != 4*transfers || r.CgoCalls != 5*transfers {
			t.Errorf("%s: %+v", r.Plan, r)
		}
		if !r.Simulated || r.Options["window"] != "100" {
			t.Errorf("%s: simulated %t, options %v", r.Plan, r.Simulated, r.Options)
		}
	}
	stdout, stderr, code := benchCommandLine(t, "batch-get", "--backend", "counting", "--batch", "2", "--per-item-pages", "2", "--iters", "2")
	for _, want := range []string{
		"(simulated: counting moves no bytes)", "grouped: 1 work requests with 2 SGEs in 3 posts, 4 completions, 5 calls of C",
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("the table lacks %q: exit code %d\n%s%s", want, code, stdout, stderr)
		}
	}
}

// TestBenchSimulated: over simulated devices a work request is a work request, and one of signal_every is answered.
func TestBenchSimulated(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	const batch, pages, every = 8, 16, 32
	for _, r := range benchTable(t, 2, "batch-put", "--backend", "rdma-simulated", "--batch", fmt.Sprint(batch),
		"--per-item-pages", fmt.Sprint(pages), "--iters", "2",
		"--backend-option", "wr_bytes=4KiB", "--backend-option", fmt.Sprint("signal_every=", every),
		"--backend-option", "probe=1h") { // a probe is a work request, too
		completions := map[string]uint64{perPage: batch * pages, grouped: batch * pages / every}[r.Plan]
		if !r.Simulated || r.Verified != 0 || r.WorkRequests != batch*pages || r.SGEs != batch*pages || r.Completions != completions {
			t.Errorf("%+v: want %d work requests, and %d completions", r, batch*pages, completions)
		}
	}
}

func TestBenchFlags(t *testing.T) {
	for _, tc := range []struct{ args, want string }{
		{"batch-put --scenario all_zz", `--scenario "all_zz" is not one of all_zc, mixed, all_stg, multi_peer, did you mean "all_zc"?`},
		{"batch-put --scenario mixed,mixed", "--scenario names mixed twice"},
		{"batch-put --plan pages", `--plan "pages" is not one of per-page, grouped`},
		{"batch-put --plan=", "--plan is empty"},
		{"batch-put --backend rdna", `--backend "rdna" is not one of null, shm, tcp, `},
		{"batch-put --backend tpc --mode process,in-process", `--backend "tpc" is not one of`},
		{"batch-put --backend auto --backend-option window=1", "--backend-option says nothing to --backend auto"},
		{"batch-put --backend tcp --backend-option colour=red", "colour"},
		{"batch-put --backend tcp --backend-option window", "--backend-option"},
		{"batch-put --backend counting --mode process", "--backend counting is linked in only"},
		{"batch-get --backend counting --verify all", "--verify must be off for a batch-get over counting"},
		{"batch-put --mode in-process,thread", `--mode "thread" is not one of in-process, process`},
		{"batch-put --mode=", "--mode is empty"},
		{"batch-put --verify some", `--verify "some" is not one of off, sample, all`},
		{"batch-put --batch 0", "--batch 0 is not between 1 and 65536"},
		{"batch-put --per-item-pages 64,-1", "--per-item-pages -1 is not between 1 and 65536"},
		{"batch-put --page-bytes 4k", "4k"},
		{"batch-put --page-bytes 2147483648", "--page-bytes 2147483648 is not between 1 and 1073741824"},
		{"batch-put --batch 65536 --per-item-pages 65536 --page-bytes 4096", "a batch of more than 1 TiB"},
		{"batch-get --iters 0", "--iters 0 is not between 1 and 1048576"},
		{"batch-get --peers 65", "--peers 65 is not between 1 and 64"},
		{"batch-get --backend shm,null --verify all", "--verify must be off for a batch-get over null"},
		{"batch-get now", "batch-get"},
		{"batch-del", `unknown command "batch-del"`},
		{"limits --only tcp_grup", `did you mean "tcp_group"?`},
		{"limits --rounds 0", "--rounds 0 is not between 1 and 1000"},
	} {
		stdout, stderr, code := benchCommandLine(t, strings.Fields(tc.args)...)
		if code != exitUsage || stdout != "" || !strings.Contains(stderr, tc.want) {
			t.Errorf("bench %s: exit code %d, stdout %q, stderr %q; want %d, nothing, and %q",
				tc.args, code, stdout, stderr, exitUsage, tc.want)
		}
	}
}

func TestBenchFlagsNameEveryFault(t *testing.T) {
	_, stderr, _ := benchCommandLine(t, "batch-put", "--batch", "0", "--iters", "-1", "--plan", "x")
	for _, want := range []string{"--batch 0", "--iters -1", `--plan "x"`} {
		if !strings.Contains(stderr, want) {
			t.Errorf("stderr does not name %s:\n%s", want, stderr)
		}
	}
}

// TestBenchRows runs every scenario over every backend, both ways, and checks what a row says of itself.
func TestBenchRows(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	const batch, pages, pageBytes = 8, 3, 4096
	for _, op := range []string{benchPut, benchGet} {
		rows := benchTable(t, 4*4*2, "batch-"+op, "--scenario", "all_zc,mixed,all_stg,multi_peer",
			"--backend", "null,shm,tcp,auto", "--batch", fmt.Sprint(batch), "--per-item-pages", fmt.Sprint(pages),
			"--page-bytes", fmt.Sprint(pageBytes), "--iters", "3", "--peers", "3")
		for i, r := range rows {
			name := fmt.Sprintf("%s %s over %s, %s", op, r.Scenario, r.Backend, r.Plan)
			c := benchCase{scenario: r.Scenario, peers: 3}
			groups := map[string]uint64{perPage: batch * pages, grouped: uint64(c.targets())}
			carried := map[string]int{r.Backend: batch}
			switch {
			case r.Backend == "auto":
				carried = map[string]int{"shm": batch}
			case r.Scenario == mixed && r.Backend == "tcp":
				carried = map[string]int{"shm": batch / 2, "tcp": batch / 2}
			}
			if r.Scenario == mixed {
				groups[grouped] = 2
			}
			wantVerified := uint64(batch * pages * pageBytes)
			if r.Backend == "null" {
				wantVerified = 0
			}
			want := benchRow{
				Scenario: []string{allZeroCopy, mixed, allStaged, multiPeer}[i/8], Op: op, Plan: []string{perPage, grouped}[i%2],
				Backend: []string{"null", "shm", "tcp", "auto"}[i/2%4], Mode: "in-process", Batch: batch, PerItemPages: pages, PageBytes: pageBytes, Memory: "host", PoolMemory: "host",
				Iters: 3, Transfers: groups[r.Plan], TransferCompletions: groups[r.Plan], Completions: groups[r.Plan], Verified: wantVerified, Verify: "off",
				Simulated: r.Backend == "null", Carried: carried,
			}
			measured := r
			r.WallMs, r.WallMsMin, r.WallMsMax, r.ControlMs, r.PlanMs, r.DispatchMs, r.MoveMs = 0, 0, 0, 0, 0, 0, 0
			r.VerifyMs, r.StagingMs, r.GiBs, r.AllocsPerPage, r.Segments = 0, 0, 0, 0, 0
			r.WallMsVerifySample, r.WallMsVerifyAll = 0, 0
			if diff := cmp.Diff(want, r); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
			m := measured
			if !(m.WallMsMin > 0 && m.WallMsMin <= m.WallMs && m.WallMs <= m.WallMsMax && m.GiBs > 0) {
				t.Errorf("%s: wall %g, from %g to %g; %g GiB/s", name, m.WallMs, m.WallMsMin, m.WallMsMax, m.GiBs)
			}
			if m.ControlMs <= 0 || m.DispatchMs <= 0 || m.Segments < m.Transfers || m.AllocsPerPage <= 0 {
				t.Errorf("%s: something was not measured: %+v", name, m)
			}
			if staged := m.StagingMs > 0; op == benchPut && staged != (m.Scenario == allStaged) {
				t.Errorf("%s: staging takes %g ms", name, m.StagingMs)
			}
			checksums := m.Plan == grouped && !(op == benchGet && m.Simulated)
			if got := m.WallMsVerifySample > 0 && m.WallMsVerifyAll > 0; got != checksums {
				t.Errorf("%s: with checksums %g and %g ms", name, m.WallMsVerifySample, m.WallMsVerifyAll)
			}
		}
	}
}

// TestBenchVerifies has a backend lie about what it moved.
func TestBenchVerifies(t *testing.T) {
	b, err := openBench(t.Context(), benchCase{
		op: benchPut, scenario: allZeroCopy, backend: "null", batch: 2, itemPages: 1, pageBytes: 4096,
	}, []string{grouped})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	b.backend = "shm" // it is not: the cluster runs over null, and is made to compare all the same
	_, err = measure(t.Context(), []turn{{b, grouped, "off"}}, 1, func(int) {})
	if !errors.Is(err, backend.ErrIntegrity) {
		t.Errorf("measure: %v, want an integrity error", err)
	}
}

func TestBenchTables(t *testing.T) {
	stdout, stderr, code := benchCommandLine(t, "batch-put", "--batch", "4", "--per-item-pages", "2", "--iters", "2", "--backend", "null,shm")
	if code != exitOK {
		t.Fatalf("exit code %d\n%s", code, stderr)
	}
	for _, want := range []string{
		"batch-put all_zc over null, 4 x 2 pages of 4 KiB = 32 KiB a call (simulated: null moves no bytes); 2 calls, verify off",
		"batch-put all_zc over shm, 4 x 2 pages of 4 KiB = 32 KiB a call; 2 calls",
		"  in-process per-page ", "  in-process grouped ", "ns a page", "grouped saves", "with verify sample", "shm 4\n",
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("the table lacks %q:\n%s", want, stdout)
		}
	}
}

// TestBenchFieldNames holds the names still that programs read.
func TestBenchFieldNames(t *testing.T) {
	for _, tc := range []struct {
		row  any
		want string
	}{
		{benchRow{WallMsVerifySample: 1, WallMsVerifyAll: 1, Options: map[string]string{"a": "b"}, Counts: map[string]uint64{"a": 1}}, "allocs_per_page backend batch carried cgo_calls completions control_ms counts dispatch_ms gib_s iters mode move_ms op options " +
			"memory page_bytes pool_memory per_item_pages plan plan_ms posts scenario segments sges simulated staging_ms transfer_completions transfers verified verify verify_ms " +
			"wall_ms wall_ms_max wall_ms_min wall_ms_verify_all wall_ms_verify_sample work_requests"},
		{limitRow{Skipped: "x", On: "y"}, "on against difference goal limit name ratio reached rounds skipped umbp unit what"},
	} {
		encoded, err := json.Marshal(tc.row)
		if err != nil {
			t.Fatal(err)
		}
		var fields map[string]any
		if err := json.Unmarshal(encoded, &fields); err != nil {
			t.Fatal(err)
		}
		want := strings.Fields(tc.want)
		slices.Sort(want)
		if diff := cmp.Diff(want, slices.Sorted(maps.Keys(fields))); diff != "" {
			t.Errorf("%T: names differ (-want +got):\n%s", tc.row, diff)
		}
	}
}

func TestLimitReached(t *testing.T) {
	rate, latency, extra := limit{goal: 0.9}, limit{latency: true, goal: 1.5}, limit{latency: true, goal: 1.5, extra: 30}
	for _, tc := range []struct {
		l                 limit
		ratio, difference float64
		want              bool
	}{
		{rate, 0.9, -1, true},
		{rate, 0.89, 1, false},
		{latency, 1.5, 100, true},
		{latency, 1.51, 1, false},
		{extra, 9, 30, true},
		{extra, 1, 30.5, false},
		{extra, 0.9, -5, true}, // faster than what it is held against
	} {
		if got := tc.l.reached(tc.ratio, tc.difference); got != tc.want {
			t.Errorf("%+v: reached(%g, %g) = %t", tc.l, tc.ratio, tc.difference, got)
		}
	}
}

// TestLimit measures small things against the opponents that need no other program.
func TestLimit(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	small := benchCase{op: benchPut, scenario: allZeroCopy, backend: "shm", batch: 4, itemPages: 1, pageBytes: 4096}
	crowded := small
	crowded.op = benchGet
	for _, l := range []limit{
		{name: "memcpy", goal: 1e-9, open: func(ctx context.Context) (*contest, error) { return openContest(ctx, small, 2, openMemcpy(1<<16)) }},
		{name: "stream", goal: 1e9, open: func(ctx context.Context) (*contest, error) { return openContest(ctx, small, 2, openBareStream(1<<16)) }},
		{name: "crowd of getters", goal: 1e-9, open: func(ctx context.Context) (*contest, error) {
			return openCrowd(ctx, crowded, 2, 2, openMemcpy(1<<16))
		}},
		{name: "crowd of putters", goal: 1e-9, open: func(ctx context.Context) (*contest, error) {
			return openCrowd(ctx, small, 2, 9, openMemcpy(1<<16)) // enough for the pool to evict
		}},
		{name: "latency", latency: true, goal: 1e9, open: openLatency},
	} {
		l.turns = 2
		row, err := l.run(t.Context(), 1, newPace(io.Discard))
		if err != nil {
			t.Errorf("%s: %v", l.name, err)
			continue
		}
		if row.UMBP <= 0 || row.Limit <= 0 || row.Ratio <= 0 || row.Reached != (l.name != "stream") {
			t.Errorf("%s: %+v", l.name, row)
		}
	}
}

func TestLimitsNeedPrograms(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	stdout, stderr, code := benchCommandLine(t, "limits", "--only", "tcp_group,redis_shm_get_4k", "--json")
	var rows []limitRow
	if err := json.Unmarshal([]byte(stdout), &rows); err != nil || code != exitOK {
		t.Fatalf("exit code %d, %v\n%s", code, err, stderr)
	}
	var got []string
	for _, r := range rows {
		got = append(got, r.Name+": "+r.Skipped)
	}
	want := []string{"tcp_group: iperf3 is not installed", "redis_shm_get_4k: redis-server is not installed"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("skipped limits differ (-want +got):\n%s", diff)
	}
	if stdout, _, _ := benchCommandLine(t, "limits", "--only", "tcp_pages"); !strings.Contains(stdout, "not measured: iperf3 is not installed") {
		t.Errorf("the table does not say why tcp_pages was not measured:\n%s", stdout)
	}
}

func TestParseOthers(t *testing.T) {
	perftest := func(out []byte) (float64, error) { return parsePerftest(string(out), 65536) }
	for _, tc := range []struct {
		name  string
		parse func([]byte) (float64, error)
		out   string
		want  float64 // 0: an error
	}{
		{"iperf3", parseIperf, `{"end": {"sum_sent": {"bits_per_second": 9e9}, "sum_received": {"bits_per_second": 1.6e10}}}`, 2},
		{"iperf3 that fails", parseIperf, `{"start": {}, "error": "unable to connect to server"}`, 0},
		{"iperf3 that dies", parseIperf, "iperf3: not this time", 0},
		{"redis", parseRedis, "\"test\",\"rps\",\"avg_latency_ms\"\n\"SET\",\"8462.81\",\"4.513\"\n", 8462.81},
		{"redis without a result", parseRedis, "\"test\",\"rps\"\n", 0},
		{"redis with a warning", parseRedis, "WARNING: Could not fetch server CONFIG\n", 0},
		{"perftest", perftest, " #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]\n 65536      1000             94.08              92.80              0.177\n", 11.6},
		{"perftest of another size", perftest, " 4096 1000 94.08 92.80 0.177\n", 0},
		{"perftest that fails", perftest, "Couldn't connect to 127.0.0.1:18515\n", 0},
		{"redis with no number", parseRedis, "\"test\",\"rps\"\n\"SET\",\"many\"\n", 0},
	} {
		got, err := tc.parse([]byte(tc.out))
		if got != tc.want || (err == nil) != (tc.want > 0) {
			t.Errorf("%s: %v, %v; want %v", tc.name, got, err, tc.want)
		}
	}
}

// BenchmarkBatch is calls over null, for profiles: what umbp bench measures, without the measuring.
func BenchmarkBatch(b *testing.B) {
	for _, shape := range []struct{ batch, pages int }{{256, 64}, {1, 1}} {
		for _, op := range []string{benchPut, benchGet} {
			for _, plan := range []string{perPage, grouped} {
				b.Run(fmt.Sprintf("%s/%dx%d/%s", op, shape.batch, shape.pages, plan), func(b *testing.B) {
					benchmarkBatch(b, plan, benchCase{
						op: op, scenario: allZeroCopy, backend: "null", batch: shape.batch, itemPages: shape.pages, pageBytes: 4096,
					})
				})
			}
		}
	}
}

func benchmarkBatch(b *testing.B, plan string, c benchCase) {
	cluster, err := openBench(b.Context(), c, []string{plan})
	if err != nil {
		b.Fatal(err)
	}
	defer cluster.Close()
	client := cluster.clients[plan]
	cluster.name(cluster.data)
	run, want := client.BatchPut, core.Stored
	if c.op == benchGet {
		if err := cluster.allAre(core.Stored, client.BatchPut(b.Context(), cluster.items)); err != nil {
			b.Fatal(err)
		}
		run, want = client.BatchGet, core.Found
	}
	b.ReportAllocs()
	for b.Loop() {
		results := run(b.Context(), cluster.items)
		b.StopTimer()
		if err := cluster.allAre(want, results); err != nil {
			b.Fatal(err)
		}
		if c.op == benchPut {
			if err := cluster.remove(b.Context(), client); err != nil {
				b.Fatal(err)
			}
			cluster.name(cluster.data)
		}
		b.StartTimer()
	}
}
