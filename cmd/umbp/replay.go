package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cheggaaa/pb/v3"
	"github.com/spf13/cobra"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// tokensPerBlock is the size of a block of the traces: the unit that an id of theirs names.
const tokensPerBlock = 512

// request is one line of a trace.
type request struct {
	Timestamp   int64    `json:"timestamp"` // ms since the start of the trace
	InputLength int      `json:"input_length"`
	HashIDs     []uint64 `json:"hash_ids"` // blocks of the prompt, in order
}

// replayResult is one row of what umbp replay prints with --json.
type replayResult struct {
	Mode       string  `json:"mode"`      // of plugins.mode: in-process, or process
	Memory     string  `json:"memory"`    // where the values of the client lie
	Simulated  bool    `json:"simulated"` // by simulated devices
	Requests   int     `json:"requests"`
	HitRatio   float64 `json:"hit_ratio"` // of the tokens of all prompts, those that were got
	Evictions  uint64  `json:"evictions"`
	GiBPut     float64 `json:"gib_put"`
	GiBGot     float64 `json:"gib_got"`
	GetP50     float64 `json:"get_p50_ms"`
	GetP99     float64 `json:"get_p99_ms"`
	PutP50     float64 `json:"put_p50_ms"`
	PutP99     float64 `json:"put_p99_ms"`
	Busy       int     `json:"busy"`
	Failed     int     `json:"failed"` // keys for which a call failed, but not for want of room
	Mismatches int     `json:"mismatches"`
	Seconds    float64 `json:"seconds"`
}

type replayFlags struct {
	nodes, limit  int
	poolSize      string
	bytesPerToken int
	speed         string
	modes         []string
	memory, pool  string
}

func (a *app) replayCommand() *cobra.Command {
	var f replayFlags
	cmd := &cobra.Command{
		Use:   "replay FILE",
		Short: "Replay a trace of LLM serving traffic, and check every byte",
		Long: `replay reads a trace (JSON lines, plain or gzip, with timestamp, input_length and hash_ids), and does
for each request what a serving engine does: it gets the longest prefix of the prompt's blocks that the pool
holds, and puts the rest. A block is 512 tokens; its bytes are made from its id, so that every byte that comes
back can be checked. It fails if one is wrong.

Without directory.address it starts nodes within the process. With it, it uses a running cluster.

With --memory gpu, the client's values lie in a GPU's memory, and with --pool-memory gpu the pools of the nodes that
it starts: a backend that moves them, such as xgmi, has to be configured.

With --mode, backends run as it says where the configuration says nothing of them. Several modes take turns,
request by request, each on nodes of its own; there is a row for each, and with --json an array of objects instead of
one object.`,
		Args: exactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return a.replay(cmd, f, args[0]) },
	}
	cmd.Flags().IntVar(&f.nodes, "nodes", 2, "nodes to start")
	cmd.Flags().StringVar(&f.poolSize, "pool-size", "2GiB", "`size` of the pools of the nodes, together")
	cmd.Flags().IntVar(&f.bytesPerToken, "bytes-per-token", 64, "bytes of a token's KV cache")
	cmd.Flags().IntVar(&f.limit, "limit", 0, "replay no more than so many requests; 0 replays all")
	cmd.Flags().StringSliceVar(&f.modes, "mode", nil, "`list` of in-process, process; plugins.mode, unless it is given")
	cmd.Flags().StringVar(&f.memory, "memory", "host", "`place` of the client's values: "+placeHelp)
	cmd.Flags().StringVar(&f.pool, "pool-memory", "", "`place` of the pools: host, gpu or gpu:N; without it, as pool.memory and pool.device say")
	config.AddFlags(cmd.Flags(), "plugins.dir", "gpu.runtime", "gpu.library")
	cmd.Flags().StringVar(&f.speed, "speed", "max", "`pace`: max, or a multiple of the trace's own, such as 1x or 10x")
	return a.client(a.listing(cmd))
}

func (a *app) replay(cmd *cobra.Command, f replayFlags, file string) (err error) {
	pace, err := parsePace(f.speed)
	if err != nil {
		return &usageError{err}
	}
	poolSize, err := backend.ParseSize(f.poolSize)
	switch {
	case err != nil:
		return &usageError{fmt.Errorf("--pool-size: %w", err)}
	case f.nodes < 1 || f.nodes > 64:
		return &usageError{fmt.Errorf("--nodes %d: start 1 to 64 nodes", f.nodes)}
	case f.bytesPerToken < 1 || f.bytesPerToken > 1<<20:
		return &usageError{fmt.Errorf("--bytes-per-token %d: a token has 1 byte to 1 MiB", f.bytesPerToken)}
	case f.limit < 0:
		return &usageError{fmt.Errorf("--limit %d is negative", f.limit)}
	}
	faults := benchFaults{}
	if cmd.Flags().Changed("mode") {
		faults.words("mode", f.modes, config.InProcess, config.AsProcess)
	}
	memory, err := parsePlace(f.memory)
	if err != nil {
		faults.addf("--memory %w", err)
	}
	pool, err := parsePlace(cmp.Or(f.pool, "host"))
	if err != nil {
		faults.addf("--pool-memory %w", err)
	}
	if err := faults.err(); err != nil {
		return err
	}
	source := a.source(cmd)
	configs, err := loadModes(source, f.modes)
	if err != nil {
		return err
	}
	c := configs[0]
	if f.pool == "" {
		pool = poolPlace(c)
	}
	switch {
	case c.Directory.Address == "":
	case cmd.Flags().Changed("nodes") || cmd.Flags().Changed("pool-size") || cmd.Flags().Changed("pool-memory"):
		return &usageError{fmt.Errorf("--nodes, --pool-size and --pool-memory are for nodes that replay starts itself, and directory.address names a running cluster: %s [%s]",
			c.Directory.Address, c.Origin("directory.address"))}
	case len(configs) > 1:
		return &usageError{fmt.Errorf("several modes are compared on nodes that replay starts itself, and directory.address names a running cluster: %s [%s]",
			c.Directory.Address, c.Origin("directory.address"))}
	}
	requests, err := readTrace(file, f.limit)
	if err != nil {
		return err
	}
	r := &replayer{requests: requests, blockBytes: tokensPerBlock * f.bytesPerToken, pace: pace, memory: memory, stderr: cmd.ErrOrStderr()}
	if r.device, err = memory.open(c.GPU); err != nil {
		return err
	}
	if r.device != nil {
		defer func() { err = errors.Join(err, r.device.Close()) }()
	}
	if c.Directory.Address != "" {
		err = a.withClient(cmd.Context(), source, cmd.ErrOrStderr(), func(cl *cluster, p *poolClient) error {
			r.lanes = []*lane{r.lane(c, p, cl.directory, core.DialControl(c.TLS.Credentials()))}
			return r.run(cmd.Context())
		})
	} else {
		err = r.embedded(cmd.Context(), configs, f.nodes, pool, uint64(poolSize))
	}
	if r.finished { // and what comes after went wrong, perhaps
		err = errors.Join(a.reportReplay(cmd, r.lanes), err)
	}
	return err
}

// loadModes loads the configuration once for each mode, or once as it is.
func loadModes(source config.Source, modes []string) ([]*config.Config, error) {
	if len(modes) == 0 {
		c, err := config.Load(source)
		return []*config.Config{c}, err
	}
	var configs []*config.Config
	for _, mode := range modes {
		source.Flags["plugins.mode"] = mode
		c, err := config.Load(source)
		if err != nil {
			return nil, err
		}
		configs = append(configs, c)
	}
	return configs, nil
}

// reportReplay prints the results, and returns an error if something was wrong.
func (a *app) reportReplay(cmd *cobra.Command, lanes []*lane) error {
	var results []replayResult
	var wrong []error
	for _, l := range lanes {
		results = append(results, l.result)
		if l.result.Mismatches > 0 {
			wrong = append(wrong, &backend.Error{Code: backend.Integrity, Op: "replay", Text: fmt.Sprintf("%d blocks came back wrong", l.result.Mismatches)})
		} else if l.result.Failed > 0 {
			wrong = append(wrong, fmt.Errorf("%d keys failed; the first: %w", l.result.Failed, l.firstErr))
		}
	}
	var err error
	if a.json && len(results) == 1 {
		err = printJSON(cmd.OutOrStdout(), results[0])
	} else if a.json {
		err = printJSON(cmd.OutOrStdout(), results)
	} else {
		err = printReplay(cmd.OutOrStdout(), results)
	}
	return errors.Join(append(wrong, err)...)
}

func parsePace(speed string) (float64, error) {
	if speed == "max" {
		return 0, nil
	}
	number, ok := strings.CutSuffix(speed, "x")
	pace, err := strconv.ParseFloat(number, 64)
	if !ok || err != nil || !(pace > 0 && pace < 1e6) {
		return 0, fmt.Errorf("--speed %s: write max, or a multiple such as 1x or 10x", speed)
	}
	return pace, nil
}

// maxBlocks bounds the blocks of one request: a prompt of 16 million tokens.
const maxBlocks = 1 << 15

// readTrace reads the requests of a trace, gzip or plain.
func readTrace(file string, limit int) ([]request, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	in := bufio.NewReaderSize(f, 1<<16)
	var text io.Reader = in
	if magic, _ := in.Peek(2); bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		if text, err = gzip.NewReader(in); err != nil {
			return nil, fmt.Errorf("read %s: %w", file, err)
		}
	}
	lines := bufio.NewScanner(text)
	lines.Buffer(nil, 16<<20)
	var requests []request
	n := 1
	for ; (limit == 0 || len(requests) < limit) && lines.Scan(); n++ {
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		var r request
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			// The last line of a file that is cut off is handed out before the reason why it is short.
			return nil, fmt.Errorf("%s, line %d: %w", file, n, cmp.Or(lines.Err(), err))
		}
		if blocks := len(r.HashIDs); r.InputLength < 1 || blocks < 1 || blocks > maxBlocks {
			return nil, fmt.Errorf("%s, line %d: %d tokens in %d blocks is no request", file, n, r.InputLength, blocks)
		}
		requests = append(requests, r)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s, line %d: %w", file, n, err)
	}
	if len(requests) == 0 {
		return nil, fmt.Errorf("%s holds no requests", file)
	}
	return requests, nil
}

// replayer replays a trace.
type replayer struct {
	requests   []request
	blockBytes int
	pace       float64 // multiple of the trace's own; 0 waits for nothing
	memory     place   // of the clients' values
	device     *gpuDevice
	stderr     io.Writer
	lanes      []*lane
	finished   bool // the lanes have results
}

// lane is a client that replays the trace, on a cluster of its own.
type lane struct {
	*replayer
	client    *poolClient
	directory directory.Directory
	dial      core.Dial

	put, got  *memory // registered, for the blocks of a request
	want, had []byte  // what one block should be, and what it is
	gets      []time.Duration
	puts      []time.Duration
	tokens    int
	hitTokens int
	firstErr  error
	evicted   uint64        // before the replay
	before    core.Snapshot // likewise
	took      time.Duration
	result    replayResult
}

func (r *replayer) lane(c *config.Config, client *poolClient, dir directory.Directory, dial core.Dial) *lane {
	return &lane{
		replayer: r, client: client, directory: dir, dial: dial,
		want: make([]byte, r.blockBytes), had: make([]byte, r.blockBytes),
		result: replayResult{Mode: c.Plugins.Mode, Memory: r.memory.String()},
	}
}

// embedded runs the replay on nodes within the process, those of each configuration for themselves. Pages are as large
// as blocks where these are a power of two, and the largest power of two that divides them otherwise.
func (r *replayer) embedded(ctx context.Context, configs []*config.Config, nodes int, pool place, poolSize uint64) (err error) {
	page := uint64(r.blockBytes & -r.blockBytes)
	perNode := poolSize / uint64(nodes) / page * page
	if perNode < uint64(r.blockBytes) {
		return &usageError{fmt.Errorf("--pool-size %s: too small for a block of %d bytes on each of %d nodes", backend.Size(poolSize), r.blockBytes, nodes)}
	}
	for _, c := range configs {
		e, openErr := openEmbedded(ctx, c, nodes, pool, perNode, page, newLogger(r.stderr, quieter(c)))
		if openErr != nil {
			return openErr
		}
		defer func() { err = errors.Join(err, e.Close()) }()
		r.lanes = append(r.lanes, r.lane(c, e.client, e.directory, core.DialLocal(nil, e.nodes...)))
	}
	return r.run(ctx)
}

func (r *replayer) run(ctx context.Context) (err error) {
	for _, l := range r.lanes {
		end, beginErr := l.begin(ctx)
		if beginErr != nil {
			return beginErr
		}
		defer func() { err = errors.Join(err, end(context.WithoutCancel(ctx))) }()
	}
	bar := r.progress()
	defer bar.Finish()
	start := time.Now()
	for i := range r.requests {
		if err := r.waitFor(ctx, start, r.requests[i].Timestamp-r.requests[0].Timestamp); err != nil {
			return err
		}
		for _, l := range r.lanes {
			turn := time.Now()
			if err := l.serve(ctx, &r.requests[i]); err != nil {
				return err
			}
			l.took += time.Since(turn)
		}
		bar.Increment()
	}
	for _, l := range r.lanes {
		if err := l.sum(ctx); err != nil {
			return err
		}
	}
	r.finished = true
	return nil
}

// begin allocates memory for the blocks of the largest request; end frees it.
func (l *lane) begin(ctx context.Context) (end func(context.Context) error, err error) {
	most := 0
	for i := range l.requests {
		most = max(most, len(l.requests[i].HashIDs))
	}
	var opened []*memory
	end = func(ctx context.Context) error {
		var errs []error
		for _, m := range opened {
			errs = append(errs, m.Close(ctx))
		}
		return errors.Join(errs...)
	}
	for _, m := range []**memory{&l.put, &l.got} {
		if *m, err = openMemory(ctx, l.client.PoolClient, l.device, uint64(most*l.blockBytes)); err != nil {
			return nil, errors.Join(err, end(ctx))
		}
		opened = append(opened, *m)
	}
	if l.evicted, err = l.evictions(ctx); err != nil {
		return nil, errors.Join(err, end(ctx))
	}
	l.before = l.client.Stats()
	return end, nil
}

// sum makes the result.
func (l *lane) sum(ctx context.Context) error {
	after := l.client.Stats()
	now, err := l.evictions(ctx)
	if err != nil {
		return err
	}
	r := &l.result
	r.Seconds = l.took.Seconds()
	r.Requests = len(l.requests)
	r.Simulated = simulatedDevices(l.client.engine)
	r.Evictions = max(now, l.evicted) - l.evicted // a node that has left took its count along
	r.HitRatio = float64(l.hitTokens) / float64(l.tokens)
	r.GiBPut = float64(bytesOf(after, "put")-bytesOf(l.before, "put")) / (1 << 30)
	r.GiBGot = float64(bytesOf(after, "get")-bytesOf(l.before, "get")) / (1 << 30)
	r.GetP50, r.GetP99 = percentile(l.gets, 50), percentile(l.gets, 99)
	r.PutP50, r.PutP99 = percentile(l.puts, 50), percentile(l.puts, 99)
	return nil
}

func bytesOf(s core.Snapshot, op string) uint64 {
	i := slices.IndexFunc(s.Ops, func(o core.OpSnapshot) bool { return o.Op == op })
	return s.Ops[i].Bytes
}

// progress returns a bar on a terminal, and something that prints nothing elsewhere.
func (r *replayer) progress() *pb.ProgressBar {
	bar := pb.New(len(r.requests))
	bar.SetTemplateString(`{{counters . }} requests {{bar . }} {{percent . }} {{etime . }}{{rtime . " of %s"}}`)
	f, ok := r.stderr.(*os.File)
	if !ok || !isTerminal(f) {
		return bar
	}
	return bar.SetWriter(f).Start()
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// waitFor waits until it is time for a request, at the pace asked for.
func (r *replayer) waitFor(ctx context.Context, start time.Time, millis int64) error {
	if r.pace == 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(time.Until(start.Add(time.Duration(float64(millis) / r.pace * float64(time.Millisecond)))))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// serve does for one request what a serving engine does.
func (l *lane) serve(ctx context.Context, q *request) error {
	// The same block may stand twice in a prompt; its second place is served by the first.
	ids := slices.Clone(q.HashIDs)
	// In a running cluster, the keys must not be those of others, nor of a replay with blocks of another size.
	prefix := fmt.Sprintf("umbp-replay/%d/", l.blockBytes)
	keys := make([]string, 0, len(ids))
	distinct := ids[:0]
	seen := make(map[uint64]bool, len(ids))
	for _, id := range ids {
		if !seen[id] {
			seen[id] = true
			distinct = append(distinct, id)
			keys = append(keys, prefix+strconv.FormatUint(id, 10))
		}
	}
	ids = distinct
	l.tokens += q.InputLength
	held, err := l.get(ctx, ids, keys)
	if err != nil {
		return err
	}
	hits := len(q.HashIDs)
	if held < len(ids) {
		hits = slices.Index(q.HashIDs, ids[held])
	}
	l.hitTokens += min(hits*tokensPerBlock, q.InputLength) // the last block may be partial
	return l.store(ctx, ids[held:], keys[held:])
}

// get gets the longest prefix that the pool holds, checks it, and returns its length in blocks.
func (l *lane) get(ctx context.Context, ids []uint64, keys []string) (held int, err error) {
	start := time.Now()
	for _, e := range l.client.Exists(ctx, keys...) {
		if e.Err != nil {
			l.count(e)
		}
		if e.Status != core.Exists {
			break
		}
		held++
	}
	if held == 0 {
		return 0, ctx.Err()
	}
	items := make([]core.Item, held)
	for i := range items {
		items[i].Key = keys[i]
		l.lay(l.got, &items[i], i)
	}
	results := l.client.BatchGet(ctx, items)
	l.gets = append(l.gets, time.Since(start))
	for i, got := range results {
		l.count(got)
		if got.Status != core.Found {
			held = min(held, i) // evicted meanwhile: the prefix ends here
			continue
		}
		fillBlock(l.want, ids[i])
		if err := l.got.load(l.had, l.offset(i)); err != nil {
			return 0, err
		}
		if got.Size != uint64(l.blockBytes) || !bytes.Equal(l.had, l.want) {
			l.result.Mismatches++
		}
	}
	return held, ctx.Err()
}

func (l *lane) store(ctx context.Context, ids []uint64, keys []string) error {
	if len(ids) == 0 {
		return nil
	}
	items := make([]core.Item, len(ids))
	for i, id := range ids {
		items[i].Key = keys[i]
		l.lay(l.put, &items[i], i)
		fillBlock(l.want, id)
		if err := l.put.store(l.offset(i), l.want); err != nil {
			return err
		}
	}
	start := time.Now()
	results := l.client.BatchPut(ctx, items)
	l.puts = append(l.puts, time.Since(start))
	for _, put := range results {
		l.count(put)
	}
	return ctx.Err()
}

// lay gives an item the i-th block of the memory.
func (l *lane) lay(m *memory, item *core.Item, i int) {
	m.lay(item, l.offset(i), uint64(l.blockBytes))
}

func (l *lane) offset(i int) uint64 { return uint64(i * l.blockBytes) }

// count counts what did not go well. An Integrity error is a mismatch that the client has found itself.
func (l *lane) count(result core.Result) {
	switch {
	case result.Err == nil:
		return
	case result.Status == core.Busy, result.Status == core.NoSpace:
		l.result.Busy++
		return
	case backend.CodeOf(result.Err) == backend.Integrity:
		l.result.Mismatches++
	}
	l.result.Failed++
	if l.firstErr == nil {
		l.firstErr = result.Err
	}
}

// fillBlock makes the bytes of a block, which are a multiple of tokensPerBlock, from its id: a sequence that differs
// from block to block in every word.
func fillBlock(b []byte, id uint64) {
	x := id*0x9e3779b97f4a7c15 + 1
	for ; len(b) > 0; b = b[8:] {
		x += 0x9e3779b97f4a7c15
		binary.LittleEndian.PutUint64(b, x^x>>29)
	}
}

// evictions adds up what the nodes have evicted.
func (l *lane) evictions(ctx context.Context) (uint64, error) {
	nodes, err := l.directory.Nodes(ctx)
	if err != nil {
		return 0, err
	}
	var sum uint64
	for _, n := range nodes {
		service, hangUp, err := l.dial(ctx, n)
		if err != nil {
			return 0, err
		}
		stats, err := service.Stats(ctx)
		if err = errors.Join(err, hangUp()); err != nil {
			return 0, err
		}
		sum += stats.Evictions
	}
	return sum, nil
}

// percentile returns the p-th percentile in milliseconds, and 0 for no durations.
func percentile(d []time.Duration, p int) float64 {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return float64(d[(len(d)-1)*p/100].Microseconds()) / 1000
}

func printReplay(w io.Writer, results []replayResult) error {
	var rows [][]string
	for _, r := range results {
		rows = append(rows, []string{
			r.Mode, strconv.Itoa(r.Requests), fmt.Sprintf("%.1f %% of tokens", 100*r.HitRatio), strconv.FormatUint(r.Evictions, 10),
			fmt.Sprintf("%.2f GiB", r.GiBPut), fmt.Sprintf("%.2f GiB", r.GiBGot),
			fmt.Sprintf("%.2f ms", r.GetP50), fmt.Sprintf("%.2f ms", r.GetP99), fmt.Sprintf("%.2f ms", r.PutP50), fmt.Sprintf("%.2f ms", r.PutP99),
			strconv.Itoa(r.Busy), strconv.Itoa(r.Failed), strconv.Itoa(r.Mismatches), fmt.Sprintf("%.1f s", r.Seconds),
		})
	}
	if slices.ContainsFunc(results, func(r replayResult) bool { return r.Simulated }) {
		fmt.Fprintln(w, "simulated: the bytes went by simulated devices, and the times are those of no hardware")
	}
	return printTable(w, []string{"MODE", "REQUESTS", "HITS", "EVICTIONS", "PUT", "GOT", "GET P50", "GET P99", "PUT P50", "PUT P99", "BUSY", "FAILED", "MISMATCHES", "TIME"}, rows)
}
