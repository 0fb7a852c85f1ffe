package main

import (
	"context"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// metrics reads the counters of a running node when it is asked for them: nothing on the way of the data knows of
// Prometheus.
type metrics struct {
	server *server
	pool   map[string]*prometheus.Desc
}

// poolMetrics are the gauges and counters of the pool, by name after umbp_pool_.
var poolMetrics = []struct {
	name, help string
	kind       prometheus.ValueType
}{
	{"pages", "Pages that the node lends.", prometheus.GaugeValue},
	{"free_pages", "Pages that are free.", prometheus.GaugeValue},
	{"page_bytes", "Size of a page.", prometheus.GaugeValue},
	{"largest_free_run_pages", "Longest run of free pages.", prometheus.GaugeValue},
	{"fragmentation", "0 when the free pages are one run, towards 1 when they are scattered.", prometheus.GaugeValue},
	{"keys", "Values that can be read.", prometheus.GaugeValue},
	{"pending_slots", "Slots that are reserved and not committed.", prometheus.GaugeValue},
	{"leases", "Read leases.", prometheus.GaugeValue},
	{"quarantined_pages", "Pages that wait for a client to be fenced.", prometheus.GaugeValue},
	{"evictions_total", "Values evicted.", prometheus.CounterValue},
	{"expired_slots_total", "Slots whose time ran out.", prometheus.CounterValue},
	{"fence_failures_total", "Fences of clients that failed.", prometheus.CounterValue},
}

var (
	directoryNodes = prometheus.NewDesc("umbp_directory_nodes", "Nodes that the directory lists, whoever serves it; absent while it does not answer.", nil, nil)

	backendTransfers = prometheus.NewDesc("umbp_backend_transfers_total", "Transfers that this process posted.", []string{"backend"}, nil)
	backendBytes     = prometheus.NewDesc("umbp_backend_bytes_total", "Bytes that those transfers moved.", []string{"backend"}, nil)
	backendFailures  = prometheus.NewDesc("umbp_backend_failures_total", "Transfers that did not end done.", []string{"backend"}, nil)
	backendEndpoints = prometheus.NewDesc("umbp_backend_endpoints", "Peers that this process is connected to, as initiator.", []string{"backend"}, nil)
	backendAvailable = prometheus.NewDesc("umbp_backend_available", "1 when the backend is available.", []string{"backend"}, nil)
	backendDisabled  = prometheus.NewDesc("umbp_backend_disabled", "1 when the operator has disabled the backend.", []string{"backend"}, nil)
	backendPhase     = prometheus.NewDesc("umbp_backend_phase", "1 for the phase that the backend's process is in; absent where it has no process.", []string{"backend", "phase"}, nil)
	backendRestarts  = prometheus.NewDesc("umbp_backend_restarts_total", "Processes that have followed the backend's first one.", []string{"backend"}, nil)
	backendCalls     = prometheus.NewDesc("umbp_backend_calls_total", "Calls of the backend, other than transfers, that have returned.", []string{"backend", "call"}, nil)
	backendErrors    = prometheus.NewDesc("umbp_backend_call_errors_total", "Those of these calls that returned an error.", []string{"backend", "call"}, nil)
	backendSeconds   = prometheus.NewDesc("umbp_backend_call_seconds_total", "How long these calls took together.", []string{"backend", "call"}, nil)
	backendCount     = prometheus.NewDesc("umbp_backend_count_total", "What the backend counts by itself; its process, where it has one, counts from its start.", []string{"backend", "count"}, nil)
)

var phases = []host.Phase{host.Starting, host.Running, host.Restarting, host.Down}

func newMetrics(s *server) *metrics {
	m := &metrics{server: s, pool: map[string]*prometheus.Desc{}}
	for _, p := range poolMetrics {
		m.pool[p.name] = prometheus.NewDesc("umbp_pool_"+p.name, p.help, nil, nil)
	}
	return m
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range m.pool {
		ch <- d
	}
	for _, d := range []*prometheus.Desc{
		directoryNodes, backendTransfers, backendBytes, backendFailures, backendEndpoints, backendAvailable, backendDisabled,
		backendPhase, backendRestarts, backendCalls, backendErrors, backendSeconds, backendCount,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if nodes, err := m.server.directory.Nodes(ctx); err == nil {
		ch <- prometheus.MustNewConstMetric(directoryNodes, prometheus.GaugeValue, float64(len(nodes)))
	}
	if m.server.node == nil {
		return
	}
	if st, err := m.server.node.Stats(ctx); err == nil {
		values := map[string]float64{
			"pages": float64(st.Pages), "free_pages": float64(st.FreePages), "page_bytes": float64(st.PageSize),
			"largest_free_run_pages": float64(st.LargestFreeRun), "fragmentation": st.Fragmentation,
			"keys": float64(st.Keys), "pending_slots": float64(st.PendingSlots), "leases": float64(st.Leases),
			"quarantined_pages": float64(st.QuarantinedPages), "evictions_total": float64(st.Evictions),
			"expired_slots_total": float64(st.Expired), "fence_failures_total": float64(st.FenceFailures),
		}
		for _, p := range poolMetrics {
			ch <- prometheus.MustNewConstMetric(m.pool[p.name], p.kind, values[p.name])
		}
	}
	collectBackends(m.server.engine, ch)
}

func collectBackends(engine *core.Engine, ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, value, labels...)
	}
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	truth := map[bool]float64{true: 1}
	for _, s := range engine.BackendStates() {
		c := engine.Counters(s.Name)
		gauge(backendAvailable, truth[s.Info != nil], s.Name)
		gauge(backendDisabled, truth[s.Disabled], s.Name)
		counter(backendTransfers, float64(c.Transfers.Load()), s.Name)
		counter(backendBytes, float64(c.Bytes.Load()), s.Name)
		counter(backendFailures, float64(c.Failures.Load()), s.Name)
		gauge(backendEndpoints, float64(c.Endpoints.Load()), s.Name)
		if s.Process != nil {
			counter(backendRestarts, float64(s.Process.Restarts), s.Name)
			for _, phase := range phases {
				gauge(backendPhase, truth[s.Process.Phase == phase], s.Name, string(phase))
			}
		}
	}
	for _, b := range engine.Backends() {
		for _, call := range b.Calls() {
			counter(backendCalls, float64(call.Count), b.Name, call.Op)
			counter(backendErrors, float64(call.Errors), b.Name, call.Op)
			counter(backendSeconds, call.Time.Seconds(), b.Name, call.Op)
		}
	}
	for i, counts := range countersOf(engine) {
		for _, c := range counts {
			counter(backendCount, float64(c.Value), engine.Backends()[i].Name, c.Name)
		}
	}
}

// countersOf returns what each backend counts by itself. Processes are asked at the same time: one that does not answer is
// waited for no longer than if it were alone.
func countersOf(engine *core.Engine) [][]backend.Count {
	backends := engine.Backends()
	counts := make([][]backend.Count, len(backends))
	var asking sync.WaitGroup
	for i := range backends {
		asking.Go(func() { counts[i] = backends[i].Counters() })
	}
	asking.Wait()
	return counts
}
