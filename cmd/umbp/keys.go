package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/directory"
)

// keyRow is what the commands print for a key with --json.
type keyRow struct {
	Key    string      `json:"key"`
	Status core.Status `json:"status"`
	Bytes  uint64      `json:"bytes,omitempty"` // where it is known
	Node   string      `json:"node,omitempty"`
	Error  string      `json:"error,omitempty"`
}

func newKeyRow(key string, r core.Result) keyRow {
	row := keyRow{Key: key, Status: r.Status, Bytes: r.Size, Node: r.Path.Node}
	if r.Err != nil {
		row.Error = r.Err.Error()
	}
	return row
}

// report prints what became of a value that was to move: for people beside the data, or as JSON as data.
func (a *app) report(cmd *cobra.Command, verb, key string, r core.Result, took time.Duration) error {
	switch {
	case a.json:
		err := printJSON(cmd.OutOrStdout(), struct {
			keyRow
			Backend  string  `json:"backend,omitempty"`
			Attempts int     `json:"attempts,omitempty"`
			Staged   bool    `json:"staged"`
			Verified bool    `json:"verified"`
			Millis   float64 `json:"ms"`
		}{newKeyRow(key, r), r.Path.Backend, r.Path.Attempts, r.Path.Staged, r.Verified, float64(took.Microseconds()) / 1000})
		if err != nil {
			return err
		}
	case r.Status == core.Exists:
		tell(cmd, "%s %q: it exists at %s and keeps its value; \"umbp rm\" makes room for another", verb, key, r.Path.Node)
	case r.OK():
		tell(cmd, "%s %q: %s, %s at %s over %s in %s (%s/s)", verb, key, r.Status, humanSize(r.Size), r.Path.Node,
			r.Path.Backend, took.Round(10*time.Microsecond), humanSize(uint64(float64(r.Size)/took.Seconds())))
	}
	if !r.OK() {
		return &statusError{key, r}
	}
	return nil
}

func (a *app) putCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "put KEY FILE",
		Short: "Store a file under a key (FILE may be -)",
		Long:  "put stores a file as one value. A key that the pool holds already keeps its value.\n\n" + exitHelp,
		Args:  exactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(cmd.Context(), a.source(cmd), cmd.ErrOrStderr(), func(_ *cluster, p *poolClient) error {
				return a.put(cmd, p, args[0], args[1])
			})
		},
	}
	return a.client(a.listing(cmd))
}

func (a *app) put(cmd *cobra.Command, p *poolClient, key, file string) (err error) {
	defer reassure(cmd, "putting "+strconv.Quote(key))()
	ctx := cmd.Context()
	in, size, err := openInput(cmd.InOrStdin(), file)
	if err != nil {
		return err
	}
	defer in.Close()
	if size == 0 {
		return &usageError{fmt.Errorf("%s is empty; a value has at least one byte", inputName(file))}
	}
	buf, err := p.Alloc(ctx, size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeBuffer(buf)) }()
	value := buf.Bytes()[:size]
	if _, err := io.ReadFull(in, value); err != nil {
		return fmt.Errorf("read %s: %w", inputName(file), err)
	}
	start := time.Now()
	r := p.Put(ctx, key, value)
	return a.report(cmd, "put", key, r, time.Since(start))
}

func inputName(file string) string {
	if file == "-" {
		return "standard input"
	}
	return file
}

// openInput opens a file and tells its size. What has no size, such as standard input or a pipe, is read first.
func openInput(stdin io.Reader, file string) (io.ReadCloser, uint64, error) {
	if file == "-" {
		return slurp(io.NopCloser(stdin))
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, 0, errors.Join(err, f.Close())
	case !info.Mode().IsRegular():
		return slurp(f)
	}
	return f, uint64(info.Size()), nil
}

func slurp(in io.ReadCloser) (io.ReadCloser, uint64, error) {
	data, err := io.ReadAll(in)
	return io.NopCloser(bytes.NewReader(data)), uint64(len(data)), errors.Join(err, in.Close())
}

func (a *app) getCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "get KEY [-o FILE]",
		Short: "Fetch a value into a file, or to standard output",
		Long:  "get fetches one value. The file is written whole or not at all.\n\n" + exitHelp,
		Args:  exactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if a.json && output == "-" {
				return &usageError{errors.New("--json prints to standard output, where the value would go; name a file with -o")}
			}
			return a.withClient(cmd.Context(), a.source(cmd), cmd.ErrOrStderr(), func(_ *cluster, p *poolClient) error {
				return a.get(cmd, p, args[0], output)
			})
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "-", "`file` to write, - for standard output")
	return a.client(a.listing(cmd))
}

func (a *app) get(cmd *cobra.Command, p *poolClient, key, output string) (err error) {
	defer reassure(cmd, "getting "+strconv.Quote(key))()
	ctx := cmd.Context()
	stat := p.Stat(ctx, key)[0]
	if !stat.OK() {
		return a.report(cmd, "get", key, stat, 0)
	}
	buf, err := p.Alloc(ctx, stat.Size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeBuffer(buf)) }()
	start := time.Now()
	r := p.Get(ctx, key, buf.Bytes())
	took := time.Since(start)
	if r.OK() {
		if err := writeOutput(cmd.OutOrStdout(), output, buf.Bytes()[:r.Size]); err != nil {
			return err
		}
	}
	return a.report(cmd, "get", key, r, took)
}

// writeOutput writes a file whole or not at all. A link stays and its target is replaced; what is no file, such as
// a pipe or a terminal, is written to as it is.
func writeOutput(stdout io.Writer, file string, value []byte) (err error) {
	if file == "-" {
		_, err := stdout.Write(value)
		return err
	}
	if target, err := filepath.EvalSymlinks(file); err == nil {
		file = target
	}
	before, err := os.Stat(file)
	if err == nil && !before.Mode().IsRegular() {
		return os.WriteFile(file, value, 0)
	}
	f, err := os.OpenFile(filepath.Join(filepath.Dir(file), ".umbp-"+rand.Text()), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(value)
	if before != nil {
		err = errors.Join(err, f.Chmod(before.Mode().Perm()))
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}

func (a *app) rmCommand() *cobra.Command {
	return a.client(a.listing(&cobra.Command{
		Use:   "rm KEY...",
		Short: "Remove values",
		Long:  "rm removes values; they are gone for every client when it returns.\n\n" + exitHelp,
		Args:  minArgs(1),
		RunE: func(cmd *cobra.Command, keys []string) error {
			return a.withClient(cmd.Context(), a.source(cmd), cmd.ErrOrStderr(), func(_ *cluster, p *poolClient) error {
				results := p.Remove(cmd.Context(), keys...)
				var err error
				if a.json {
					err = printJSON(cmd.OutOrStdout(), keyRows(keys, results))
				} else {
					for i, r := range results {
						if r.OK() {
							tell(cmd, "rm %q: removed from %s", keys[i], r.Path.Node)
						}
					}
				}
				return errors.Join(err, failures(keys, results))
			})
		},
	}))
}

func (a *app) statCommand() *cobra.Command {
	return a.client(a.listing(&cobra.Command{
		Use:   "stat KEY...",
		Short: "Show the size of values, and the nodes that hold them",
		Long:  "stat counts as a use of the values, which keeps them from eviction for longer.\n\n" + exitHelp,
		Args:  minArgs(1),
		RunE: func(cmd *cobra.Command, keys []string) error {
			return a.withClient(cmd.Context(), a.source(cmd), cmd.ErrOrStderr(), func(_ *cluster, p *poolClient) error {
				results := p.Stat(cmd.Context(), keys...)
				var err error
				if a.json {
					err = printJSON(cmd.OutOrStdout(), keyRows(keys, results))
				} else {
					var rows [][]string
					for i, r := range results {
						size := ""
						if r.OK() {
							size = humanSize(r.Size)
						}
						rows = append(rows, []string{keys[i], r.Status.String(), size, r.Path.Node})
					}
					err = printTable(cmd.OutOrStdout(), []string{"KEY", "STATUS", "SIZE", "NODE"}, rows)
				}
				return errors.Join(err, failures(keys, results))
			})
		},
	}))
}

func keyRows(keys []string, results []core.Result) []keyRow {
	rows := make([]keyRow, len(keys))
	for i, r := range results {
		rows[i] = newKeyRow(keys[i], r)
	}
	return rows
}

// failures returns an error for each key that did not come out as asked. Those that say more than that the pool
// does not hold a key come first, and so decide about the exit code.
func failures(keys []string, results []core.Result) error {
	var failed, missing []error
	for i, r := range results {
		switch {
		case r.OK():
		case r.Status == core.Missing:
			missing = append(missing, &statusError{keys[i], r})
		default:
			failed = append(failed, &statusError{keys[i], r})
		}
	}
	return errors.Join(append(failed, missing...)...)
}

func (a *app) lsCommand() *cobra.Command {
	var prefix string
	var limit int
	cmd := &cobra.Command{
		Use:   "ls [PREFIX]",
		Short: "List the keys of the pool, in order",
		Long:  "ls lists the keys that begin with PREFIX, or all, with the sizes of the values and the nodes that hold them.",
		Args:  maxArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if limit < 0 {
				return &usageError{fmt.Errorf("--limit %d is negative", limit)}
			}
			prefix = strings.Join(args, "")
			cl, err := a.connect(a.source(cmd), cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer cl.Close()
			return a.ls(cmd, cl, prefix, limit)
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 0, "list no more than so many keys; 0 lists all")
	return a.client(a.listing(cmd))
}

// lsPage is how many keys one call lists.
const lsPage = 10_000

func (a *app) ls(cmd *cobra.Command, cl *cluster, prefix string, limit int) error {
	type row struct {
		Key   string `json:"key"`
		Bytes uint64 `json:"bytes"`
		Node  string `json:"node"`
	}
	list := []row{}
	ctx, cancel := context.WithTimeout(cmd.Context(), cl.config.Client.Timeout)
	defer cancel()
	req := directory.ListRequest{Prefix: prefix}
	for more := true; more; {
		req.Limit = lsPage
		if limit > 0 {
			req.Limit = min(lsPage, limit-len(list))
		}
		reply, err := cl.directory.List(ctx, &req)
		if err != nil {
			return fmt.Errorf("list keys at %s: %w", cl.address, err)
		}
		for _, e := range reply.Entries {
			list = append(list, row{e.Key, e.Size, e.Node})
			req.After = e.Key
		}
		more = reply.More && len(reply.Entries) > 0 && (limit == 0 || len(list) < limit)
	}
	if a.json {
		return printJSON(cmd.OutOrStdout(), list)
	}
	if len(list) == 0 {
		which := ""
		if prefix != "" {
			which = " that begins with " + strconv.Quote(prefix)
		}
		tell(cmd, "the pool holds no key%s", which)
		return nil
	}
	var rows [][]string
	for _, r := range list {
		rows = append(rows, []string{r.Key, humanSize(r.Bytes), r.Node})
	}
	return printTable(cmd.OutOrStdout(), []string{"KEY", "SIZE", "NODE"}, rows)
}
