package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/control"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// patternRow is what became of the patterns that went to a node and back by one backend.
type patternRow struct {
	Node    string               `json:"node"`
	Address string               `json:"address"`
	Backend string               `json:"backend,omitempty"` // empty where none could be tried
	State   backend.FindingState `json:"state"`
	Text    string               `json:"text,omitempty"` // what is wrong, or why it was not tried
	// What was compared, and was right.
	Values int    `json:"values"`
	Bytes  uint64 `json:"bytes"`
	// Medians of single calls, the control plane included: the smallest size's time in microseconds, the largest
	// size's rate.
	PutMicros float64 `json:"put_us,omitempty"`
	GetMicros float64 `json:"get_us,omitempty"`
	Largest   uint64  `json:"largest_bytes,omitempty"`
	PutGiBs   float64 `json:"put_gib_s,omitempty"`
	GetGiBs   float64 `json:"get_gib_s,omitempty"`

	wrong bool // bytes came back that were not put, or the backend itself says that integrity is violated
}

// patternSizes are the sizes that are tried, in bytes: the least, around a page, and large ones that are no whole number
// of anything.
var patternSizes = []uint64{1, 3, 255, 4095, 4097, 65537, 1<<20 - 1, 8 << 20}

const (
	patternRounds = 9 // calls for each size, as long as they take no longer than patternTime
	patternTime   = 500 * time.Millisecond
	patternGuard  = 64   // bytes on both sides of a value that must stay as they are
	patternSlack  = 4096 // room for odd offsets and guards, on both sides
)

// tryNodes tries the nodes of the cluster, one after the other.
func (d *doctor) tryNodes(ctx context.Context, engine *core.Engine) (err error) {
	address, err := directoryAddress(d.config)
	if err != nil {
		return err
	}
	conn, err := control.Connect(address, d.config.TLS.Credentials())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	dir := directory.NewClient(conn)
	asking, cancel := context.WithTimeout(ctx, answerTimeout)
	nodes, err := dir.Nodes(asking)
	cancel()
	switch {
	case err != nil && d.node != "":
		return fmt.Errorf("ask the directory at %s: %w", address, err)
	case err != nil:
		d.noNode(fmt.Sprintf("no node was tried: the directory at %s does not answer: %v", address, err))
		return nil
	case len(nodes) == 0:
		d.noNode(fmt.Sprintf("no node was tried: none has joined the directory at %s", address))
		return nil
	}
	var others []string
	for _, n := range nodes {
		others = append(others, n.Address)
	}
	if d.node != "" && !slices.Contains(others, d.node) {
		return &usageError{fmt.Errorf("--node %s: the directory lists no node there, but at %s", d.node, strings.Join(others, ", "))}
	}
	for i, n := range nodes {
		if d.node == "" || d.node == n.Address {
			if err := d.tryNode(ctx, engine, dir, nodes, i); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *doctor) noNode(text string) {
	d.add("", backend.Finding{
		Subject: "cluster", State: backend.Warning, Text: text,
		Remedy: `start a node with "umbp serve", say with --directory.address where the directory is, or leave the nodes out with --offline`,
	})
}

// oneNode is a directory that places every new key on the same node.
type oneNode struct {
	directory.Directory
	others []backend.Peer
}

// Place implements directory.Directory.
func (o oneNode) Place(ctx context.Context, req *directory.PlaceRequest, reply *directory.PlaceReply) error {
	narrow := *req
	narrow.Exclude = slices.Concat(req.Exclude, o.others)
	return o.Directory.Place(ctx, &narrow, reply)
}

// tryNode tries each backend that the policy may use between this host and the node.
func (d *doctor) tryNode(ctx context.Context, engine *core.Engine, dir directory.Directory, nodes []directory.Node, i int) (err error) {
	node := nodes[i]
	only := oneNode{Directory: dir}
	for k, other := range nodes {
		if k != i {
			only.others = append(only.others, other.Peer)
		}
	}
	client, err := core.NewPoolClient(ctx, core.ClientOptions{
		Engine: engine, Directory: only, Dial: core.DialControl(d.config.TLS.Credentials()),
		Tuning: core.Tuning{Verify: core.VerifyOff, Timeout: d.config.Client.Timeout}, // what is wrong is to be seen here
	})
	if err != nil {
		return err
	}
	p := patterns{client: client, node: node, prefix: "umbp-doctor-" + rand.Text()}
	defer func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		err = errors.Join(err, p.close(closing), client.Close(closing))
	}()
	sameHost := node.Peer.Host != "" && node.Peer.Host == engine.Self().Host
	first := len(d.checkup.Patterns)
	pool := d.poolOf(ctx, node)
	policy := applied(rules(d.config), sameHost, pool.Kind)
	works := make(map[string]bool) // by name of the backend: nothing is known against it
	for _, state := range engine.BackendStates() {
		can := state.Info != nil && reaches(&state.Info.Capabilities, sameHost, &pool)
		names := func(r selector.Rule) bool { return slices.Contains(named(r), state.Name) }
		if !can || !slices.ContainsFunc(policy, names) {
			continue
		}
		if works[state.Name] = true; d.only != "" && d.only != state.Name {
			continue
		}
		if err := engine.SetRules([]selector.Rule{{Require: []string{state.Name}}}); err != nil {
			return err
		}
		row := patternRow{Node: node.Peer.Node, Address: node.Address, Backend: state.Name}
		done := reassure(d.cmd, fmt.Sprintf("trying node %s over %s", node.Peer.Node, state.Name))
		p.try(ctx, &row)
		done()
		works[state.Name] = row.State != backend.Problem
		d.checkup.Patterns = append(d.checkup.Patterns, row)
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	rows := d.checkup.Patterns[first:]
	relaxPatterns(rows, policy, works)
	if len(rows) == 0 {
		row := patternRow{
			Node: node.Peer.Node, Address: node.Address, Backend: d.only, State: backend.Problem,
			Text: "no backend that the policy may use to it works here",
		}
		if len(works) > 0 {
			row.State, row.Text = backend.Warning, "not tried: it does not work here, or the policy does not use it to this node"
		}
		d.checkup.Patterns = append(d.checkup.Patterns, row)
	}
	return engine.SetRules(rules(d.config))
}

// relaxPatterns makes warnings of the problems with a node of backends that the policy can do without. That bytes were
// wrong stays a problem.
func relaxPatterns(rows []patternRow, policy []selector.Rule, works map[string]bool) {
	for i := range rows {
		if r := &rows[i]; r.State == backend.Problem && !r.wrong && !needed(policy, r.Backend, works) {
			r.State = backend.Warning
		}
	}
}

// poolOf returns what the patterns go to. Of a node that does not say, they say more.
func (d *doctor) poolOf(ctx context.Context, node directory.Node) region.Descriptor {
	asking, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	service, hangUp, err := core.DialControl(d.config.TLS.Credentials())(asking, node)
	if err == nil {
		defer hangUp()
		var pool region.Descriptor
		if pool, err = poolOf(asking, service); err == nil {
			return pool
		}
	}
	return region.Descriptor{Kind: backend.HostMemory}
}

// reaches tells whether a backend can do with a pool what the patterns want, which are in the host's memory here.
func reaches(caps *backend.Capabilities, sameHost bool, pool *region.Descriptor) bool {
	_, link := caps.Link("", pool.Place)
	near := caps.Reach == backend.Network || caps.Reach == backend.SameHost && sameHost
	return near && link && caps.Local.Has(backend.HostMemory) && caps.Remote.Has(pool.Kind)
}

// applied returns the rules that decide over transfers of the patterns, of memory of this host, with another process. One
// that decides over several kinds of them is there as often.
func applied(rules []selector.Rule, sameHost bool, remote backend.MemoryKind) (decide []selector.Rule) {
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		for _, size := range patternSizes {
			i := slices.IndexFunc(rules, func(r selector.Rule) bool {
				m := r.Match
				return m.Local&^backend.HostMemory == 0 && (m.Remote == 0 || m.Remote == remote) &&
					(m.SameHost == nil || *m.SameHost == sameHost) && (m.SameNode == nil || !*m.SameNode) &&
					(m.Op == 0 || m.Op == op) && size >= m.MinSize && (m.MaxSize == 0 || size <= m.MaxSize)
			})
			if i >= 0 {
				decide = append(decide, rules[i])
			}
		}
	}
	return decide
}

// patterns puts to one node, and gets from it.
type patterns struct {
	client *core.PoolClient
	node   directory.Node
	prefix string // of the keys
	serial int    // of the keys

	from, to *core.Buffer // nil until they are needed
}

func (p *patterns) close(ctx context.Context) error {
	var errs []error
	for _, b := range []*core.Buffer{p.from, p.to} {
		if b != nil {
			errs = append(errs, b.Close(ctx))
		}
	}
	return errors.Join(errs...)
}

// try moves patterns of all sizes by the backend that the policy leaves, and enters what became of them.
func (p *patterns) try(ctx context.Context, row *patternRow) {
	problem := func(format string, args ...any) {
		row.State, row.Text = backend.Problem, fmt.Sprintf(format, args...)
	}
	var sizes []uint64
	for _, size := range patternSizes {
		if size <= p.node.Free/2 {
			sizes = append(sizes, size)
		}
	}
	if len(sizes) == 0 {
		row.State, row.Text = backend.Warning, "not tried: the node has no room without evicting values"
		return
	}
	if reason, err := p.obstacle(ctx, row.Backend); err != nil {
		problem("%v", err)
		return
	} else if reason != "" {
		problem("not tried: %s", reason)
		return
	}
	for _, b := range []**core.Buffer{&p.from, &p.to} {
		if *b == nil {
			var err error
			if *b, err = p.client.Alloc(ctx, patternSizes[len(patternSizes)-1]+2*patternSlack); err != nil {
				problem("%v", err)
				return
			}
		}
	}
	for i, size := range sizes {
		var puts, gets []time.Duration
		start := time.Now()
		for round := 0; round == 0 || round < patternRounds && time.Since(start) < patternTime; round++ {
			put, get, err := p.move(ctx, size, 2*(i+round)+1)
			if err != nil {
				problem("value of %d B: %v", size, err)
				row.wrong = errors.Is(err, backend.ErrIntegrity)
				return
			}
			row.Values++
			row.Bytes += size
			if row.Values > 1 { // the first one connects
				puts, gets = append(puts, put), append(gets, get)
			}
		}
		if len(puts) == 0 {
			continue
		}
		if row.PutMicros == 0 {
			row.PutMicros, row.GetMicros = micros(puts), micros(gets)
		}
		row.Largest = size
		row.PutGiBs, row.GetGiBs = float64(size)/(1<<30)/micros(puts)*1e6, float64(size)/(1<<30)/micros(gets)*1e6
	}
}

// obstacle says why the backend cannot carry to the node, or nothing.
func (p *patterns) obstacle(ctx context.Context, name string) (string, error) {
	e, err := p.client.ExplainPut(ctx, []string{p.prefix}, []uint64{1}, core.ExplainOptions{})
	if err != nil {
		return "", err
	}
	if len(e.Left) > 0 {
		return e.Left[0].Reason, nil
	}
	for _, g := range e.Shown {
		for _, r := range g.Rejected {
			if r.Backend == name {
				return r.Reason, nil
			}
		}
	}
	return "", nil
}

// move puts a value of that size from an odd offset, gets it back to another one, and compares.
func (p *patterns) move(ctx context.Context, size uint64, odd int) (put, get time.Duration, err error) {
	p.serial++
	key := fmt.Sprintf("%s-%d", p.prefix, p.serial)
	source := p.from.Bytes()[odd:][:size]
	fillPattern(source, uint64(p.serial))
	start := time.Now()
	r := p.client.Put(ctx, key, source)
	put = time.Since(start)
	if r.Status != core.Stored {
		return 0, 0, &statusError{key, r}
	}
	defer func() {
		removing, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
		defer cancel()
		if r := p.client.Remove(removing, key)[0]; !r.OK() && err == nil {
			err = &statusError{key, r}
		}
	}()
	at := patternSlack - odd
	around := p.to.Bytes()[at-patternGuard:][:size+2*patternGuard]
	target := around[patternGuard:][:size]
	for i := range around {
		around[i] = guardByte
	}
	for i := range target { // every byte has to be brought
		target[i] = ^source[i]
	}
	start = time.Now()
	r = p.client.Get(ctx, key, target)
	get = time.Since(start)
	if r.Status != core.Found {
		return 0, 0, &statusError{key, r}
	}
	return put, get, compare(around, source)
}

const guardByte = 0xa5

// compare returns an error that names the first byte of a value that did not come back as it was put, or that lies beside
// it and was touched.
func compare(around, source []byte) error {
	for i, got := range around {
		want, n := byte(guardByte), i-patternGuard
		if n >= 0 && n < len(source) {
			want = source[n]
		}
		if got == want {
			continue
		}
		if n < 0 || n >= len(source) {
			return &backend.Error{Code: backend.Integrity, Op: "compare", Text: fmt.Sprintf("the byte at %+d, beside the value of %d, was overwritten with %#02x", n, len(source), got)}
		}
		return &backend.Error{Code: backend.Integrity, Op: "compare", Text: fmt.Sprintf("byte %d came back as %#02x, and was put as %#02x", n, got, want)}
	}
	return nil
}

func printPatterns(w io.Writer, patterns []patternRow) error {
	var rows [][]string
	for _, p := range patterns {
		row := []string{p.Node, p.Address, p.Backend, p.State.String(), "", "", "", "", "", oneLine(p.Text)}
		if p.Values > 0 {
			row[4] = humanSize(p.Bytes)
		}
		if p.PutMicros > 0 {
			row[5], row[6] = fmt.Sprintf("%.0f", p.PutMicros), fmt.Sprintf("%.0f", p.GetMicros)
		}
		if p.Largest > 0 {
			row[7], row[8] = fmt.Sprintf("%.2f", p.PutGiBs), fmt.Sprintf("%.2f", p.GetGiBs)
		}
		rows = append(rows, row)
	}
	return printTable(w, []string{"NODE", "ADDRESS", "BACKEND", "STATE", "COMPARED", "PUT µs", "GET µs", "PUT GiB/s", "GET GiB/s", "WHAT"}, rows)
}
