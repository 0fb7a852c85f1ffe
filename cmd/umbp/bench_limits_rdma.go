package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
)

const rdmaName = "rdma"

// rdmaLimits hold batches over one queue pair against the programs of perftest, which use one, too.
func rdmaLimits(c benchCase) []limit {
	c.backend, c.mode = rdmaName, config.InProcess
	if linked(rdmaName).Open == nil {
		c.mode = config.AsProcess
	}
	var limits []limit
	for _, op := range []string{benchPut, benchGet} {
		program, measure := "ib_write_bw", putRate
		if op == benchGet {
			program, measure = "ib_read_bw", getRate
		}
		for _, bytes := range []int{64 << 10, 1 << 20} {
			c := c
			c.op = op
			c.options = map[string]string{"queue_pairs": "1", "wr_bytes": fmt.Sprint(bytes)}
			limits = append(limits, limit{
				name:    fmt.Sprintf("rdma_%s_%dk", op, bytes>>10),
				what:    fmt.Sprintf("%s of %s over rdma, work requests of %s", op, humanSize(c.batchBytes()), humanSize(uint64(bytes))),
				against: fmt.Sprintf("%s -s %d", program, bytes), goal: 0.95, turns: 1, needs: []string{program},
				open: func(ctx context.Context) (*contest, error) {
					return openAgainst(ctx, c, measure, openPerftest(program, bytes, int(c.batchBytes())/bytes))
				},
			})
		}
	}
	return limits
}

// getRate makes one get and returns GB/s.
func getRate(ctx context.Context, b *benchCluster) (float64, error) {
	start := time.Now()
	results := b.clients[grouped].BatchGet(ctx, b.items)
	took := time.Since(start)
	return gigabytes(b.batchBytes(), took), b.allAre(core.Found, results)
}

// openPerftest has each measurement be a run of a program of perftest, with a server of its own: it serves one run.
func openPerftest(program string, bytes, iterations int) opener {
	return func(_ context.Context, k *contest) error {
		k.limit = func(ctx context.Context) (_ float64, err error) {
			ctx, cancel := context.WithTimeout(ctx, programTimeout)
			defer cancel()
			var server contest
			defer func() { err = errors.Join(err, server.Close()) }()
			arguments := []string{"-F", "-s", strconv.Itoa(bytes), "-n", strconv.Itoa(iterations), "--report_gbits", "-p", "{port}"}
			port, err := startServer(&server, program, arguments...)
			if err != nil {
				return 0, err
			}
			arguments[len(arguments)-1] = port
			var rate float64
			err = eventually(ctx, func() error {
				out, err := exec.CommandContext(ctx, program, append(arguments, "127.0.0.1")...).CombinedOutput()
				if err != nil {
					return fmt.Errorf("%s: %w: %s", program, err, out)
				}
				rate, err = parsePerftest(string(out), bytes)
				return err
			})
			return rate, err
		}
		return nil
	}
}

// parsePerftest returns the average rate of a report of perftest in Gbit/s, in GB/s: the line of the size has size,
// iterations, peak and average.
func parsePerftest(out string, bytes int) (float64, error) {
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) >= 4 && f[0] == strconv.Itoa(bytes) {
			gigabits, err := strconv.ParseFloat(f[3], 64)
			return gigabits / 8, err
		}
	}
	return 0, fmt.Errorf("perftest reports nothing of %d bytes: %q", bytes, out)
}
