package tcp

import (
	"fmt"
	"net"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

var options = []backend.Option{
	{Name: "listen", Type: backend.StringOption, Default: "127.0.0.1:0",
		Help: `Address to serve peers on, as host:port; port 0 lets the system choose; "off" makes this end an initiator only.`},
	{Name: "advertise", Type: backend.StringOption, Default: "",
		Help: "Address that peers are told to connect to, as host or host:port; empty derives it from the listener."},
	{Name: "connections", Type: backend.IntOption, Default: "2", Min: "1", Max: "64",
		Help: "Connections to each peer; every transfer goes over one of them."},
	{Name: "window", Type: backend.IntOption, Default: "256", Min: "1", Max: "65536",
		Help: "Transfers in flight to each peer before Post says busy."},
	{Name: "max_connections", Type: backend.IntOption, Default: "4096", Min: "1", Max: "1000000",
		Help: "Connections served and promised to all peers together before new peers are told busy."},
	{Name: "connect_timeout", Type: backend.DurationOption, Default: "5s", Min: "10ms", Max: "10m",
		Help: "How long connecting and proving both ends to each other may take."},
	{Name: "io_timeout", Type: backend.DurationOption, Default: "30s", Min: "100ms", Max: "1h",
		Help: "How long a transfer may go without any progress before its connection is given up."},
	{Name: "keepalive", Type: backend.DurationOption, Default: "15s", Min: "1s", Max: "2h",
		Help: "How long a connection may be silent before the system probes the peer."},
	{Name: "user_timeout", Type: backend.DurationOption, Default: "30s", Min: "100ms", Max: "1h",
		Help: "How long sent bytes may stay unacknowledged by the peer's system before the connection fails."},
	{Name: "send_buffer", Type: backend.SizeOption, Default: "0", Max: "1GiB",
		Help: "Size of the socket's send buffer; 0 leaves it to the system, which adapts it."},
	{Name: "receive_buffer", Type: backend.SizeOption, Default: "0", Max: "1GiB",
		Help: "Size of the socket's receive buffer; 0 leaves it to the system, which adapts it."},
}

// fenceGrace is how long a fence waits for a connection to get through with its requests before it breaks it. A
// healthy connection has little more in flight than the network holds, and hosts fence with seconds to spend.
const fenceGrace = time.Second

// settings are the values of the options, and what only tests change.
type settings struct {
	listen, advertise                                 string
	connections, window, maxConnections               int
	connectTimeout, ioTimeout, keepAlive, userTimeout time.Duration
	sendBuffer, receiveBuffer                         int
	fenceGrace                                        time.Duration
}

func readSettings(v backend.Values) settings {
	s := settings{
		listen:         v.String("listen"),
		advertise:      v.String("advertise"),
		connections:    v.Int("connections"),
		window:         v.Int("window"),
		maxConnections: v.Int("max_connections"),
		connectTimeout: v.Duration("connect_timeout"),
		ioTimeout:      v.Duration("io_timeout"),
		keepAlive:      v.Duration("keepalive"),
		userTimeout:    v.Duration("user_timeout"),
		sendBuffer:     int(v.Size("send_buffer")),
		receiveBuffer:  int(v.Size("receive_buffer")),
		fenceGrace:     fenceGrace,
	}
	if s.listen == "off" {
		s.listen = ""
	}
	return s
}

// mayListen refuses an address that other hosts can reach when nothing authenticates them.
func mayListen(addr *net.TCPAddr, cfg *backend.Config) error {
	if addr.IP.IsLoopback() || cfg.Credentials != nil || cfg.Insecure {
		return nil
	}
	return backend.Errorf(backend.Denied, "option listen: other hosts can reach %s, and no credentials are set: "+
		"set the certificate files, listen on 127.0.0.1, or allow it with insecure", addr)
}

// maxAddresses bounds how many addresses an answer names.
const maxAddresses = 8

// advertised returns the addresses that peers are told, for a listener bound to bound.
func advertised(advertise string, bound *net.TCPAddr) ([]string, error) {
	port := fmt.Sprint(bound.Port)
	switch {
	case advertise != "":
		if host, p, err := net.SplitHostPort(advertise); err == nil {
			if host == "" || p == "" || p == "0" {
				return nil, backend.Errorf(backend.BadRequest, "option advertise: %q needs a host and a port that is not 0", advertise)
			}
			return []string{advertise}, nil
		}
		return []string{net.JoinHostPort(advertise, port)}, nil
	case !bound.IP.IsUnspecified():
		return []string{bound.String()}, nil
	}
	// The listener takes every address of the host: name those that another host may route to.
	interfaces, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the addresses of this host: %w", err)
	}
	var addresses []string
	for _, a := range interfaces {
		ip, ok := a.(*net.IPNet)
		usable := ok && ip.IP.IsGlobalUnicast() && !(bound.IP.To4() != nil && ip.IP.To4() == nil)
		if usable && len(addresses) < maxAddresses {
			addresses = append(addresses, net.JoinHostPort(ip.IP.String(), port))
		}
	}
	if len(addresses) == 0 {
		addresses = append(addresses, net.JoinHostPort("127.0.0.1", port))
	}
	return addresses, nil
}
