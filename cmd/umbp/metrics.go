package main

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
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
)

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
	for _, d := range []*prometheus.Desc{directoryNodes, backendTransfers, backendBytes, backendFailures, backendEndpoints, backendAvailable} {
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
	for _, b := range m.server.engine.Backends() {
		available := 0.0
		if b.Backend != nil {
			available = 1
		}
		c := m.server.engine.Counters(b.Name)
		ch <- prometheus.MustNewConstMetric(backendAvailable, prometheus.GaugeValue, available, b.Name)
		ch <- prometheus.MustNewConstMetric(backendTransfers, prometheus.CounterValue, float64(c.Transfers.Load()), b.Name)
		ch <- prometheus.MustNewConstMetric(backendBytes, prometheus.CounterValue, float64(c.Bytes.Load()), b.Name)
		ch <- prometheus.MustNewConstMetric(backendFailures, prometheus.CounterValue, float64(c.Failures.Load()), b.Name)
		ch <- prometheus.MustNewConstMetric(backendEndpoints, prometheus.GaugeValue, float64(c.Endpoints.Load()), b.Name)
	}
}
