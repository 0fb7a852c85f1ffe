package rdma

import (
	"math"
	"strings"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

var options = []backend.Option{
	{Name: "devices", Type: backend.StringOption, Default: "",
		Help: "Devices to use, as names separated by commas, each with :port where not all its ports are meant; empty uses every active port."},
	{Name: "gid_index", Type: backend.IntOption, Default: "-1", Min: "-1", Max: "255",
		Help: "Index of the GID to use on every port; -1 chooses a routable RoCEv2 one where there is one."},
	{Name: "queue_pairs", Type: backend.IntOption, Default: "2", Min: "1", Max: "16",
		Help: "Queue pairs to each peer on each device."},
	{Name: "send_queue", Type: backend.IntOption, Default: "512", Min: "16", Max: "32767",
		Help: "Work requests outstanding on one queue pair."},
	{Name: "sges", Type: backend.IntOption, Default: "16", Min: "1", Max: "64",
		Help: "Local ranges in one work request, where the device allows so many."},
	{Name: "wr_bytes", Type: backend.SizeOption, Default: "0", Max: "2GiB",
		Help: "Bytes in one work request; 0 leaves it to the device's limit."},
	{Name: "signal_every", Type: backend.IntOption, Default: "64", Min: "1", Max: "16384",
		Help: "Work requests of a transfer that share one completion."},
	{Name: "stripe", Type: backend.SizeOption, Default: "1MiB", Min: "4KiB", Max: "1GiB",
		Help: "Bytes of a transfer that go over one device before the next one has its turn, where a peer is reached by several."},
	{Name: "window", Type: backend.IntOption, Default: "256", Min: "1", Max: "65536",
		Help: "Transfers in flight to each peer before Post says busy."},
	{Name: "timeout", Type: backend.DurationOption, Default: "67ms", Min: "10us", Max: "10s",
		Help: "How long a device waits for an acknowledgement before it sends again; rounded up to 4.096 µs times a power of two."},
	// Verbs has seven retries, too. To soft-RoCE, however, seven means for ever.
	{Name: "retries", Type: backend.IntOption, Default: "6", Min: "0", Max: "6",
		Help: "How often a device sends again what is not acknowledged before the connection fails."},
	{Name: "rnr_retries", Type: backend.IntOption, Default: "6", Min: "0", Max: "6",
		Help: "How often a device sends again to a peer that is not ready to receive before the connection fails."},
	{Name: "min_rnr_timer", Type: backend.IntOption, Default: "12", Min: "1", Max: "31",
		Help: "Pause that this end asks of a peer when it is not ready to receive, encoded as in verbs: 12 is 0.64 ms."},
	{Name: "mtu", Type: backend.StringOption, Default: "0", Choices: []string{"0", "256", "512", "1024", "2048", "4096"},
		Help: "Most payload of one packet in bytes; 0 uses what is active on the ports of both ends."},
	{Name: "traffic_class", Type: backend.IntOption, Default: "0", Min: "0", Max: "255",
		Help: "Traffic class of the packets: DSCP times four, and ECN, on RoCEv2."},
	{Name: "service_level", Type: backend.IntOption, Default: "0", Min: "0", Max: "15",
		Help: "Service level of the packets; the priority on Ethernet."},
	{Name: "look", Type: backend.DurationOption, Default: "50us", Min: "0s", Max: "10ms",
		Help: "How long to look for a completion before going to sleep until the device tells of one."},
	{Name: "cancel_grace", Type: backend.DurationOption, Default: "20ms", Min: "0s", Max: "10s",
		Help: "How long what a cancelled transfer has in flight may take to complete before its connection is broken."},
	{Name: "drain", Type: backend.DurationOption, Default: "1s", Min: "0s", Max: "1m",
		Help: "How long a failed connection waits for the device to answer what is outstanding before its queue pairs are destroyed."},
	{Name: "probe", Type: backend.DurationOption, Default: "5s", Min: "100ms", Max: "1h",
		Help: "How long a connection may be quiet before it is probed; a peer that is gone is noticed by it."},
	{Name: "connect_timeout", Type: backend.DurationOption, Default: "5s", Min: "100ms", Max: "10m",
		Help: "How long connecting and proving every path to a peer may take."},
	{Name: "max_connections", Type: backend.IntOption, Default: "1024", Min: "4", Max: "65536",
		Help: "Connections served to all peers together before more are told busy; one peer may have a quarter of them."},
	{Name: "breaker_pause", Type: backend.DurationOption, Default: "100ms", Min: "1ms", Max: "1m",
		Help: "Pause after the first failure to connect to a peer over a device; each further one doubles it."},
	{Name: "breaker_max_pause", Type: backend.DurationOption, Default: "30s", Min: "1ms", Max: "1h",
		Help: "Longest pause between attempts to connect to a peer over a device, and to open a device that failed."},
	{Name: "breaker_hold", Type: backend.DurationOption, Default: "5m", Min: "1ms", Max: "24h",
		Help: "Pause after an error that a new queue pair cannot cure, unless the peer restarts, or the port or its GID changes."},
}

// settings are the values of the options.
type settings struct {
	devices  []string // as name or name:port
	gidIndex int

	queuePairs, sendQueue, sges, signalEvery, window int
	wrBytes                                          uint64 // 0: as the device allows
	stripe                                           uint64
	timeout                                          int // exponent: 4.096 µs × 2^timeout
	retries, rnrRetries, minRNRTimer                 int
	mtu, trafficClass, serviceLevel                  int
	look, cancelGrace, drain, probe, connectTimeout  time.Duration
	maxConnections                                   int
	breakerPause, breakerMaxPause, breakerHold       time.Duration
}

func readSettings(v backend.Values) settings {
	s := settings{
		gidIndex:        v.Int("gid_index"),
		queuePairs:      v.Int("queue_pairs"),
		sendQueue:       v.Int("send_queue"),
		sges:            v.Int("sges"),
		signalEvery:     v.Int("signal_every"),
		window:          v.Int("window"),
		wrBytes:         v.Size("wr_bytes"),
		stripe:          v.Size("stripe"),
		timeout:         timeoutExponent(v.Duration("timeout")),
		retries:         v.Int("retries"),
		rnrRetries:      v.Int("rnr_retries"),
		minRNRTimer:     v.Int("min_rnr_timer"),
		mtu:             mtus[v.String("mtu")],
		trafficClass:    v.Int("traffic_class"),
		serviceLevel:    v.Int("service_level"),
		look:            v.Duration("look"),
		cancelGrace:     v.Duration("cancel_grace"),
		drain:           v.Duration("drain"),
		probe:           v.Duration("probe"),
		connectTimeout:  v.Duration("connect_timeout"),
		maxConnections:  v.Int("max_connections"),
		breakerPause:    v.Duration("breaker_pause"),
		breakerMaxPause: v.Duration("breaker_max_pause"),
		breakerHold:     v.Duration("breaker_hold"),
	}
	for name := range strings.SplitSeq(v.String("devices"), ",") {
		if name = strings.TrimSpace(name); name != "" {
			s.devices = append(s.devices, name)
		}
	}
	return s
}

// mtus are the sizes that verbs has; zero is no wish.
var mtus = map[string]int{"0": 0, "256": 256, "512": 512, "1024": 1024, "2048": 2048, "4096": 4096}

// timeoutUnit is the unit of an acknowledgement timeout: 4.096 µs.
const timeoutUnit = 4096 * time.Nanosecond

// timeoutExponent returns the least exponent whose timeout is not shorter than d. Zero would mean for ever to a device.
func timeoutExponent(d time.Duration) int {
	return min(31, max(1, int(math.Ceil(math.Log2(float64(d)/float64(timeoutUnit))))))
}

// silence is how long a device may take, with these settings, until it gives up a peer that does not answer. Devices
// may wait up to four times as long as they were told to.
func (s *settings) silence() time.Duration {
	return 4 * timeoutUnit << s.timeout * time.Duration(s.retries+1)
}
