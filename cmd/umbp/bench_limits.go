package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/shm"
	"github.com/umbp/umbp/plugins/tcp"
)

// limitRow is one row of umbp bench limits.
type limitRow struct {
	Name    string  `json:"name"`
	What    string  `json:"what"`
	Against string  `json:"against"`
	Unit    string  `json:"unit"`
	UMBP    float64 `json:"umbp"`  // median of the rounds
	Limit   float64 `json:"limit"` // likewise, of what it is held against
	// Of neighbouring measurements, the medians: what one is divided by the other, and how much more it is.
	Ratio      float64 `json:"ratio"`
	Difference float64 `json:"difference"`
	Goal       string  `json:"goal"` // for the ratio; with a plus, for the difference
	Reached    bool    `json:"reached"`
	Rounds     int     `json:"rounds"`
	Skipped    string  `json:"skipped,omitempty"` // why it was not measured
	On         string  `json:"on,omitempty"`      // the devices, where they matter
}

// limit is something that a part of umbp is held against.
type limit struct {
	name, what, against string
	latency             bool    // µs, less is better; otherwise GB/s
	goal                float64 // for the ratio: at least, or of a latency at most
	extra               float64 // goal for the difference of latencies, at most so many µs, instead of one for the ratio
	turns               int     // measurements in one round: many where they are short, so that noise hits both sides
	needs               []string
	open                func(ctx context.Context) (*contest, error)
}

// contest is the two sides of a limit. Each returns one measurement.
type contest struct {
	umbp, limit func(ctx context.Context) (float64, error)
	note        string // the devices, where they matter
	closers     []func() error
}

func (c *contest) Close() error {
	var errs []error
	for i := len(c.closers) - 1; i >= 0; i-- {
		errs = append(errs, c.closers[i]())
	}
	return errors.Join(errs...)
}

func (a *app) benchLimitsCommand() *cobra.Command {
	var only []string
	var rounds int
	limits := knownLimits(config.Plugins{}, config.GPU{})
	var names, list []string
	for _, l := range limits {
		names = append(names, l.name)
		list = append(list, fmt.Sprintf("  %-19s %s, against %s", l.name, l.what, l.against))
	}
	cmd := &cobra.Command{
		Use:   "limits",
		Short: "Hold backends against memcpy, iperf3, a bare socket, perftest, a GPU's runtime and Redis",
		Long: `limits measures what the backends reach beside what this host can do without them. Both sides take
turns, and the figures are medians. iperf3, perftest and Redis are used where they are installed, and plugins where
they are beside umbp or in --plugins.dir. The control plane of umbp is direct calls here.

` + strings.Join(list, "\n"),
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("only") {
				only = names
			}
			f := benchFaults{}
			f.words("only", only, names...)
			f.numbers("rounds", 1000, rounds)
			if err := f.err(); err != nil {
				return err
			}
			return a.benchLimits(cmd, knownLimits(benchSettings(cmd)), only, rounds)
		},
	}
	cmd.Flags().StringSliceVar(&only, "only", nil, "`list` of the limits to measure; all, unless it is given")
	config.AddFlags(cmd.Flags(), benchKeys...)
	cmd.Flags().IntVar(&rounds, "rounds", 5, "measurements of each side; of short ones, ten or twenty times as many")
	return a.listing(cmd)
}

// knownLimits returns all limits, in the order in which they are printed.
func knownLimits(plugins config.Plugins, gpus config.GPU) []limit {
	const (
		size       = 64 << 20
		big, small = 256 << 10, 4 << 10
	)
	over := func(backendName string, itemPages int) benchCase {
		return benchCase{
			op: benchPut, scenario: allZeroCopy, backend: backendName, mode: config.InProcess, plugins: plugins,
			batch: 256, itemPages: itemPages, pageBytes: 4096, options: oneConnection(backendName),
		}
	}
	overSHM, overTCP, pages := over(shm.Factory.Name, 64), over(tcp.Factory.Name, 64), over(tcp.Factory.Name, 1)
	single := pages
	single.batch = 1
	limits := []limit{{
		name: "shm_group", what: "put of 64 MiB over shm", against: "memcpy by as many goroutines", goal: 0.9, turns: 20,
		open: func(ctx context.Context) (*contest, error) { return openContest(ctx, overSHM, 1, openMemcpy(size)) },
	}, {
		// The two ends of iperf3 are processes, too.
		name: "tcp_group", what: "put of 64 MiB over tcp as processes, one group on one connection", against: "iperf3 -l 1M -P 1", goal: 1, turns: 1,
		needs: []string{"iperf3"},
		open: func(ctx context.Context) (*contest, error) {
			return openContest(ctx, overTCP.in(config.AsProcess), 16, openIperf)
		},
	}, {
		name: "tcp_bare", what: "put of 64 MiB over tcp, one group on one connection", against: "a bare socket between two mappings", goal: 1, turns: 10,
		open: func(ctx context.Context) (*contest, error) { return openContest(ctx, overTCP, 1, openBareStream(size)) },
	}, {
		name: "tcp_pages", what: "put of 256 scattered pages of 4 KiB over tcp", against: "iperf3 -l 1M -P 1", goal: 0.5, turns: 1,
		needs: []string{"iperf3"},
		open:  func(ctx context.Context) (*contest, error) { return openContest(ctx, pages, 500, openIperf) },
	}, {
		name: "tcp_latency", what: "get of 4 KiB over tcp", against: "a bare ping-pong of that size", latency: true, goal: 1.5, turns: 10,
		open: openLatency,
	}, {
		name: "process_group", what: "put of 64 MiB over tcp as a process", against: "the same in-process", goal: 0.95, turns: 10,
		open: func(ctx context.Context) (*contest, error) {
			return openContest(ctx, overTCP.in(config.AsProcess), 1, openSame(overTCP, putRate))
		},
	}, {
		name: "process_put", what: "put of 4 KiB over tcp as a process", against: "the same in-process", latency: true, extra: 30, turns: 10,
		open: func(ctx context.Context) (*contest, error) {
			return openAgainst(ctx, single.in(config.AsProcess), putMicros, openSame(single, putMicros))
		},
	}}
	limits = append(limits, rdmaLimits(overTCP)...)
	limits = append(limits, gpuLimits(gpus)...)
	for _, r := range []struct {
		backend string
		bytes   int
		goal    float64
	}{{tcp.Factory.Name, big, 1}, {tcp.Factory.Name, small, 3}, {shm.Factory.Name, big, 4}, {shm.Factory.Name, small, 4}} {
		for _, op := range []string{benchPut, benchGet} {
			c := benchCase{op: op, scenario: allZeroCopy, backend: r.backend, pageBytes: 4096, itemPages: r.bytes / 4096, batch: 256, peers: 1}
			calls, command := 8, map[string]string{benchPut: "SET", benchGet: "GET"}[op]
			if r.bytes == small {
				c.batch, calls = 1024, 200
			}
			limits = append(limits, limit{
				name:    fmt.Sprintf("redis_%s_%s_%dk", r.backend, op, r.bytes>>10),
				what:    fmt.Sprintf("%s of %s in batches of %d over %s, 4 callers", op, humanSize(uint64(r.bytes)), c.batch/redisClients, r.backend),
				against: fmt.Sprintf("Redis %s, 4 clients, pipelines of 16", command), goal: r.goal,
				turns: 1, needs: []string{"redis-server", "redis-benchmark"},
				open: func(ctx context.Context) (*contest, error) {
					return openCrowd(ctx, c, redisClients, calls, openRedis(command, r.bytes))
				},
			})
		}
	}
	return limits
}

// oneConnection returns the options with which a backend uses one connection to a peer, as the other side does.
func oneConnection(backendName string) map[string]string {
	if backendName != tcp.Factory.Name {
		return nil
	}
	return map[string]string{"connections": "1"}
}

func (a *app) benchLimits(cmd *cobra.Command, limits []limit, only []string, rounds int) error {
	chosen := make(map[string]bool)
	for _, name := range only {
		chosen[name] = true
	}
	rows := []limitRow{}
	progress := newPace(cmd.ErrOrStderr())
	for _, l := range limits {
		if !chosen[l.name] {
			continue
		}
		row, err := l.run(cmd.Context(), rounds, progress)
		if err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
		rows = append(rows, row)
		if !a.json {
			printLimit(cmd.OutOrStdout(), &row, len(rows) == 1)
		}
	}
	if a.json {
		return printJSON(cmd.OutOrStdout(), rows)
	}
	return nil
}

func (l *limit) run(ctx context.Context, rounds int, progress *pace) (row limitRow, err error) {
	row = limitRow{Name: l.name, What: l.what, Against: l.against, Unit: "GB/s", Goal: fmt.Sprintf(">= %g", l.goal), Rounds: rounds}
	if l.latency {
		row.Unit, row.Goal = "µs", fmt.Sprintf("<= %g", l.goal)
	}
	if l.extra > 0 {
		row.Goal = fmt.Sprintf("<= +%g", l.extra)
	}
	for _, program := range l.needs {
		if _, err := exec.LookPath(program); err != nil {
			row.Skipped = program + " is not installed"
			return row, nil
		}
	}
	c, err := l.open(ctx)
	switch {
	case errors.Is(err, backend.ErrUnsupported): // such as a plugin that is not there
		row.Skipped, _, _ = strings.Cut(err.Error(), "\n")
		return row, nil
	case err != nil:
		return row, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	row.On = c.note
	type pair struct{ umbp, limit float64 }
	var pairs []pair
	for n := range rounds*l.turns + 1 {
		progress.say("%s: measurement %d of %d", l.name, n, rounds*l.turns)
		var p pair
		if p.umbp, err = c.umbp(ctx); err != nil {
			return row, err
		}
		if p.limit, err = c.limit(ctx); err != nil {
			return row, err
		}
		if n > 0 { // the first one warms up
			pairs = append(pairs, p)
		}
	}
	row.UMBP = median(pairs, func(p *pair) float64 { return p.umbp })
	row.Limit = median(pairs, func(p *pair) float64 { return p.limit })
	row.Ratio = median(pairs, func(p *pair) float64 { return p.umbp / p.limit })
	row.Difference = median(pairs, func(p *pair) float64 { return p.umbp - p.limit })
	row.Reached = l.reached(row.Ratio, row.Difference)
	return row, nil
}

// reached tells whether the goal is met, at equality too.
func (l *limit) reached(ratio, difference float64) bool {
	switch {
	case l.extra > 0:
		return difference <= l.extra
	case l.latency:
		return ratio <= l.goal
	default:
		return ratio >= l.goal
	}
}

func printLimit(w io.Writer, r *limitRow, first bool) {
	if first {
		fmt.Fprintf(w, "%-19s %-59s %-36s %9s %9s       %7s %7s %8s\n", "LIMIT", "WHAT", "AGAINST", "UMBP", "LIMIT", "RATIO", "DIFF", "GOAL")
	}
	fmt.Fprintf(w, "%-19s %-59s %-36s ", r.Name, r.What, r.Against)
	if r.Skipped != "" {
		fmt.Fprintf(w, "not measured: %s\n", r.Skipped)
		return
	}
	verdict := "reached"
	if !r.Reached {
		verdict = "missed"
	}
	if r.On != "" {
		verdict += "; on " + r.On
	}
	fmt.Fprintf(w, "%9.2f %9.2f %-5s %7.2f %+7.2f %8s %s\n", r.UMBP, r.Limit, r.Unit, r.Ratio, r.Difference, r.Goal, verdict)
}

// opener opens what umbp is held against.
type opener func(ctx context.Context, c *contest) error

// measurement makes the calls of one measurement on a cluster.
type measurement func(ctx context.Context, b *benchCluster) (float64, error)

// openAgainst opens a cluster that is measured, and its opponent.
func openAgainst(ctx context.Context, c benchCase, measure measurement, opponent opener) (*contest, error) {
	k := &contest{}
	b, err := openLoaded(ctx, k, c, grouped)
	if err != nil {
		return nil, errors.Join(err, k.Close())
	}
	k.umbp = func(ctx context.Context) (float64, error) { return measure(ctx, b) }
	if err := opponent(ctx, k); err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

// openContest opens a cluster, where one caller makes so many puts for a measurement, and its opponent.
func openContest(ctx context.Context, c benchCase, calls int, opponent opener) (*contest, error) {
	return openAgainst(ctx, c, func(ctx context.Context, b *benchCluster) (float64, error) { return putRates(ctx, b, grouped, calls) }, opponent)
}

// openSame measures another cluster in the same way.
func openSame(c benchCase, measure measurement) opener {
	return func(ctx context.Context, k *contest) error {
		b, err := openLoaded(ctx, k, c, grouped)
		k.limit = func(ctx context.Context) (float64, error) { return measure(ctx, b) }
		return err
	}
}

// putRate makes one put and returns GB/s.
func putRate(ctx context.Context, b *benchCluster) (float64, error) {
	return putRates(ctx, b, grouped, 1)
}

// putRates makes so many puts by a plan. The values of a page are scattered, so that nothing of them can be merged.
func putRates(ctx context.Context, b *benchCluster, plan string, calls int) (float64, error) {
	scattered := rand.New(rand.NewPCG(400, 1)).Perm(len(b.items))
	var took time.Duration
	for range calls {
		b.name(b.data)
		if b.itemPages == 1 {
			for i, at := range scattered {
				b.data.lay(&b.items[i], uint64(at)*b.pageBytes, b.pageBytes)
			}
		}
		d, err := b.put(ctx, plan)
		if err != nil {
			return 0, err
		}
		took += d
	}
	return gigabytes(uint64(calls)*b.batchBytes(), took), nil
}

// putMicros makes many puts, and returns the median of what they take, in microseconds.
func putMicros(ctx context.Context, b *benchCluster) (float64, error) {
	took := make([]time.Duration, singleCalls)
	for i := range took {
		b.name(b.data)
		var err error
		if took[i], err = b.put(ctx, grouped); err != nil {
			return 0, err
		}
	}
	return micros(took), nil
}

// singleCalls is how many calls a measurement of a latency makes.
const singleCalls = 500

// put makes one put of the items, takes its time, and removes them.
func (b *benchCluster) put(ctx context.Context, plan string) (time.Duration, error) {
	client := b.clients[plan]
	start := time.Now()
	results := client.BatchPut(ctx, b.items)
	took := time.Since(start)
	return took, errors.Join(b.allAre(core.Stored, results), b.remove(ctx, client))
}

// openCrowd opens a cluster, where several callers at once make so many calls each for a measurement, and its
// opponent.
func openCrowd(ctx context.Context, c benchCase, callers, calls int, opponent opener) (*contest, error) {
	return openAgainst(ctx, c, func(ctx context.Context, b *benchCluster) (float64, error) { return b.rate(ctx, callers, calls) }, opponent)
}

// openLoaded opens a cluster that holds its items.
func openLoaded(ctx context.Context, k *contest, c benchCase, plans ...string) (*benchCluster, error) {
	b, err := openBench(ctx, c, plans)
	if err != nil {
		return nil, err
	}
	k.closers = append(k.closers, b.Close)
	b.name(b.mirror)
	if err := b.mirror.fill(1); err != nil {
		return nil, err
	}
	if err := b.allAre(core.Stored, b.clients[grouped].BatchPut(ctx, b.items)); err != nil {
		return nil, err
	}
	b.lay(b.data)
	return b, nil
}

// rate has several callers make calls at once, each with its share of the items, and returns GB/s. Puts have fresh
// keys, and make the pool evict: nothing is removed.
func (b *benchCluster) rate(ctx context.Context, callers, calls int) (float64, error) {
	client := b.clients[grouped]
	share := len(b.items) / callers
	batches := make([][][]core.Item, callers) // by caller and call
	for caller := range batches {
		for call := range calls {
			items := append([]core.Item(nil), b.items[caller*share:(caller+1)*share]...)
			if b.op == benchPut {
				b.serial++
				for i := range items {
					items[i].Key = fmt.Sprintf("rate-%d-%d-%d", b.serial, call, i)
				}
			}
			batches[caller] = append(batches[caller], items)
		}
	}
	run, want := client.BatchGet, core.Found
	if b.op == benchPut {
		run, want = client.BatchPut, core.Stored
	}
	var group errgroup.Group
	start := time.Now()
	for _, calls := range batches {
		group.Go(func() error {
			for _, items := range calls {
				results := run(ctx, items)
				for i := range results {
					if r := &results[i]; r.Status != want {
						return errors.Join(fmt.Errorf("key %q is %s", items[i].Key, r.Status), r.Err)
					}
				}
			}
			return nil
		})
	}
	err := group.Wait()
	return gigabytes(uint64(calls)*b.batchBytes(), time.Since(start)), err
}

func gigabytes(bytes uint64, d time.Duration) float64 { return float64(bytes) / 1e9 / d.Seconds() }

// openArena maps memory as the pools have it.
func openArena(ctx context.Context, c *contest, size uint64) ([]byte, error) {
	arena, err := region.NewArena("bench", size, region.ArenaOptions{Context: ctx})
	if err != nil {
		return nil, err
	}
	c.closers = append(c.closers, arena.Close)
	return arena.Bytes(), nil
}

// openMemcpy copies from one mapping to another, with a goroutine for each processor.
func openMemcpy(size uint64) opener {
	return func(ctx context.Context, c *contest) error {
		from, err := openArena(ctx, c, size)
		if err != nil {
			return err
		}
		to, err := openArena(ctx, c, size)
		if err != nil {
			return err
		}
		fillPattern(from, 1)
		c.limit = func(context.Context) (float64, error) {
			workers := runtime.GOMAXPROCS(0)
			start := time.Now()
			var group sync.WaitGroup
			for w := range workers {
				group.Go(func() {
					first, end := w*len(from)/workers, (w+1)*len(from)/workers
					copy(to[first:end], from[first:end])
				})
			}
			group.Wait()
			return gigabytes(size, time.Since(start)), nil
		}
		return nil
	}
}

// openPipe connects two ends over loopback, and has serve run on the far one until it is closed.
func openPipe(c *contest, serve func(conn net.Conn) error) (net.Conn, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return nil, err
	}
	far, err := l.Accept()
	if err != nil {
		return nil, errors.Join(err, near.Close())
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer far.Close()
		for serve(far) == nil {
		}
	}()
	c.closers = append(c.closers, func() error {
		err := near.Close()
		<-done
		return err
	})
	return near, nil
}

// openBareStream writes one mapping to a socket, and reads another from its other end; one byte comes back.
func openBareStream(size uint64) opener {
	return func(ctx context.Context, c *contest) error {
		from, err := openArena(ctx, c, size)
		if err != nil {
			return err
		}
		to, err := openArena(ctx, c, size)
		if err != nil {
			return err
		}
		fillPattern(from, 1)
		conn, err := openPipe(c, func(far net.Conn) error {
			if _, err := io.ReadFull(far, to); err != nil {
				return err
			}
			_, err := far.Write(to[:1])
			return err
		})
		if err != nil {
			return err
		}
		c.limit = func(context.Context) (float64, error) {
			var answer [1]byte
			start := time.Now()
			if _, err := conn.Write(from); err != nil {
				return 0, err
			}
			if _, err := io.ReadFull(conn, answer[:]); err != nil {
				return 0, err
			}
			return gigabytes(size, time.Since(start)), nil
		}
		return nil
	}
}

// openLatency times single gets of a page, and single round trips with as many bytes.
func openLatency(ctx context.Context) (*contest, error) {
	const (
		request = 64 // about what a request of the backend has
		answer  = 4096
	)
	k := &contest{}
	b, err := openLoaded(ctx, k, benchCase{
		op: benchGet, scenario: allZeroCopy, backend: tcp.Factory.Name, batch: 1, itemPages: 1, pageBytes: answer,
		options: oneConnection(tcp.Factory.Name),
	}, grouped)
	if err != nil {
		return nil, errors.Join(err, k.Close())
	}
	k.umbp = func(ctx context.Context) (float64, error) {
		return medianMicros(singleCalls, func() error {
			r := b.clients[grouped].Get(ctx, b.items[0].Key, b.items[0].Value)
			return r.Err
		})
	}
	in, out := make([]byte, request), make([]byte, answer)
	conn, err := openPipe(k, func(far net.Conn) error {
		if _, err := io.ReadFull(far, in); err != nil {
			return err
		}
		_, err := far.Write(out)
		return err
	})
	if err != nil {
		return nil, errors.Join(err, k.Close())
	}
	ask, reply := make([]byte, request), make([]byte, answer)
	k.limit = func(context.Context) (float64, error) {
		return medianMicros(singleCalls, func() error {
			if _, err := conn.Write(ask); err != nil {
				return err
			}
			_, err := io.ReadFull(conn, reply)
			return err
		})
	}
	return k, nil
}

// medianMicros calls f so often and returns the median of the times, in microseconds.
func medianMicros(times int, f func() error) (float64, error) {
	took := make([]time.Duration, times)
	for i := range took {
		start := time.Now()
		if err := f(); err != nil {
			return 0, err
		}
		took[i] = time.Since(start)
	}
	return micros(took), nil
}

// micros returns the median, in microseconds.
func micros(took []time.Duration) float64 {
	return median(took, func(d *time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 })
}

// startServer starts a program that serves on a free port of the loopback interface until the contest is closed.
// arguments are those in which {port} stands for the port.
func startServer(c *contest, program string, arguments ...string) (port string, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	_, port, err = net.SplitHostPort(l.Addr().String())
	if err = errors.Join(err, l.Close()); err != nil {
		return "", err
	}
	for i, a := range arguments {
		arguments[i] = strings.ReplaceAll(a, "{port}", port)
	}
	server := exec.Command(program, arguments...)
	if err := server.Start(); err != nil {
		return "", err
	}
	c.closers = append(c.closers, func() error {
		if err := server.Process.Kill(); err != nil {
			return err
		}
		server.Wait() // it says that it was killed
		return nil
	})
	return port, nil
}

// programTimeout bounds one run of another's benchmark; it takes about a second.
const programTimeout = time.Minute

// eventually repeats f until it succeeds or a while has passed: a server needs a moment to listen.
func eventually(ctx context.Context, f func() error) error {
	const while, pause = 5 * time.Second, 50 * time.Millisecond
	for deadline := time.Now().Add(while); ; {
		err := f()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(pause):
		}
	}
}

// openIperf starts an iperf3 server. Each measurement is one second of one connection.
func openIperf(ctx context.Context, c *contest) error {
	port, err := startServer(c, "iperf3", "-s", "-B", "127.0.0.1", "-p", "{port}")
	if err != nil {
		return err
	}
	c.limit = func(ctx context.Context) (float64, error) {
		ctx, cancel := context.WithTimeout(ctx, programTimeout)
		defer cancel()
		var rate float64
		err := eventually(ctx, func() error {
			out, err := exec.CommandContext(ctx, "iperf3", "-c", "127.0.0.1", "-p", port, "-l", "1M", "-P", "1", "-t", "1", "-J").Output()
			if err == nil || len(out) > 0 { // it reports its errors in JSON
				rate, err = parseIperf(out)
			}
			return err
		})
		return rate, err
	}
	return nil
}

// parseIperf returns the rate of a report of iperf3 -J, in GB/s.
func parseIperf(out []byte) (float64, error) {
	var report struct {
		Error string
		End   struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		}
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return 0, fmt.Errorf("iperf3 did not print a report: %w", err)
	}
	if report.Error != "" {
		return 0, fmt.Errorf("iperf3 says %q", report.Error)
	}
	return report.End.Received.BitsPerSecond / 8e9, nil
}

// redisClients is the number of connections of redis-benchmark, and of callers on umbp's side.
const redisClients = 4

// openRedis starts a Redis server that persists nothing, with 64 MiB of values in it. Each measurement is one run of
// redis-benchmark with the command given.
func openRedis(command string, valueBytes int) opener {
	return func(ctx context.Context, c *contest) error {
		const held, sent = 64 << 20, 1 << 30 // bytes
		dir, err := os.MkdirTemp("", "umbp-bench-redis-")
		if err != nil {
			return err
		}
		c.closers = append(c.closers, func() error { return os.RemoveAll(dir) })
		port, err := startServer(c, "redis-server", "--port", "{port}", "--bind", "127.0.0.1", "--dir", dir,
			"--save", "", "--appendonly", "no", "--logfile", filepath.Join(dir, "log"))
		if err != nil {
			return err
		}
		run := func(ctx context.Context, command string, requests int) (float64, error) {
			ctx, cancel := context.WithTimeout(ctx, programTimeout)
			defer cancel()
			out, err := exec.CommandContext(ctx, "redis-benchmark", "-h", "127.0.0.1", "-p", port, "--csv",
				"-c", fmt.Sprint(redisClients), "-P", "16", "-t", strings.ToLower(command), "-d", fmt.Sprint(valueBytes),
				"-n", fmt.Sprint(requests), "-r", fmt.Sprint(held/valueBytes)).Output()
			if err != nil {
				return 0, fmt.Errorf("redis-benchmark: %w: %s", err, out)
			}
			perSecond, err := parseRedis(out)
			return perSecond * float64(valueBytes) / 1e9, err
		}
		// redis-benchmark does not return when nobody listens yet.
		err = eventually(ctx, func() error {
			conn, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", port))
			if err != nil {
				return err
			}
			return conn.Close()
		})
		if err != nil {
			return err
		}
		c.limit = func(ctx context.Context) (float64, error) { return run(ctx, command, sent/valueBytes) }
		// Eight times as many random keys as there are: hardly one is left out.
		_, err = run(ctx, "SET", 8*held/valueBytes)
		return err
	}
}

// parseRedis returns the requests per second that redis-benchmark --csv printed for one command: a header
// "test","rps",… and a line "SET","1234.56",….
func parseRedis(out []byte) (float64, error) {
	lines, err := csv.NewReader(bytes.NewReader(out)).ReadAll()
	if err != nil || len(lines) != 2 || len(lines[0]) < 2 || lines[0][1] != "rps" {
		return 0, errors.Join(fmt.Errorf("redis-benchmark says %q", out), err)
	}
	return strconv.ParseFloat(lines[1][1], 64)
}
