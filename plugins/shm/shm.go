package shm

import (
	"context"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

const (
	name    = "shm"
	version = "1.0.0"

	// maxSegments bounds what one transfer makes the endpoint remember: 24 bytes a segment.
	maxSegments = 1 << 14
)

// Factory opens the shared-memory backend. An instance listens on a Unix socket of its own in socket_dir and runs
// as many goroutines as the option workers says, until it is closed.
var Factory = backend.Factory{
	Name:    name,
	Info:    new(info(backend.Defaults(options))),
	Options: options,
	Open: func(_ context.Context, cfg backend.Config) (backend.Backend, error) {
		i, err := open(cfg)
		if err != nil {
			return nil, err
		}
		return i, nil
	},
}

var options = []backend.Option{
	{
		Name: "socket_dir", Type: backend.StringOption,
		Help: "Directory of the Unix sockets; it is created where it is missing, and must belong to the user and be " +
			"closed to all others. Empty means umbp-UID in the directory for temporary files.",
	},
	{
		Name: "workers", Type: backend.IntOption, Default: "0", Min: "0", Max: "1024",
		Help: "Goroutines that copy. 0 means one for each processor that the process may use.",
	},
	{
		Name: "window", Type: backend.IntOption, Default: "1024", Min: "1", Max: "65536",
		Help: "Transfers in flight that one endpoint accepts before it says Busy.",
	},
	{
		Name: "inline_bytes", Type: backend.SizeOption, Default: "64KiB", Min: "0", Max: "1MiB",
		Help: "Transfers up to this size are copied by the posting goroutine itself, within Post.",
	},
}

// info is what the backend is with these options.
func info(v backend.Values) backend.Info {
	host := backend.Kinds(backend.HostMemory)
	return backend.Info{
		Name:    name,
		Version: version,
		Capabilities: backend.Capabilities{
			Ops:     backend.Write | backend.Read,
			Local:   host,
			Remote:  host,
			Reach:   backend.SameHost,
			NeedsFD: true,
			Limits:  backend.Limits{Segments: maxSegments},
			Window:  v.Int("window"),
		},
	}
}
