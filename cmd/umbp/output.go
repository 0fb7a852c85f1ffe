package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// tell says something to people, on standard error.
func tell(cmd *cobra.Command, format string, args ...any) {
	fmt.Fprintf(cmd.ErrOrStderr(), "umbp: "+format+"\n", args...)
}

// patience is how long people wait without a word.
const patience = 2 * time.Second

// reassure tells people from time to time what the command is still doing, until the function returned is called.
func reassure(cmd *cobra.Command, doing string) (done func()) {
	stop := make(chan struct{})
	var telling sync.WaitGroup
	start, tick := time.Now(), time.NewTicker(patience)
	telling.Go(func() {
		for {
			select {
			case <-tick.C:
				tell(cmd, "still %s after %s", doing, time.Since(start).Round(time.Second))
			case <-stop:
				return
			}
		}
	})
	return func() {
		tick.Stop()
		close(stop)
		telling.Wait()
	}
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// printTable prints rows under a header, in columns.
func printTable(w io.Writer, header []string, rows [][]string) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, strings.Join(header, "\t"))
	for _, row := range rows {
		fmt.Fprintln(tw, strings.Join(row, "\t"))
	}
	return tw.Flush()
}

// humanSize renders bytes for people: 1.5 GiB.
func humanSize(bytes uint64) string {
	const units = "KMGTPE"
	if bytes < 1<<10 {
		return fmt.Sprintf("%d B", bytes)
	}
	f, unit := float64(bytes)/(1<<10), 0
	for f >= 1<<10 && unit < len(units)-1 {
		f /= 1 << 10
		unit++
	}
	return fmt.Sprintf("%.4g %ciB", f, units[unit])
}
