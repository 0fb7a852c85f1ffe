package shm

import (
	"context"
	"runtime"
	"slices"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/samehost"
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
		i, err := samehost.Open(cfg, samehost.Settings{Info: info(cfg.Options), Mover: newMover(cfg.Options)})
		if err != nil {
			return nil, err
		}
		return i, nil
	},
}

var options = slices.Concat(samehost.Options(), []backend.Option{
	{
		Name: "workers", Type: backend.IntOption, Default: "0", Min: "0", Max: "1024",
		Help: "Goroutines that copy. 0 means one for each processor that the process may use.",
	},
	{
		Name: "inline_bytes", Type: backend.SizeOption, Default: "64KiB", Min: "0", Max: "1MiB",
		Help: "Transfers up to this size are copied by the posting goroutine itself, within Post.",
	},
})

func newMover(v backend.Values) *mover {
	workers := v.Int("workers")
	if workers == 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	return &mover{inline: v.Size("inline_bytes"), copier: startCopier(workers)}
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
