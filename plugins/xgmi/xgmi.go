package xgmi

import (
	"context"
	"errors"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/samehost"
)

const (
	name    = "xgmi"
	version = "1.0.0"

	// maxSegments bounds what one transfer makes the backend remember: 24 bytes for each segment, and 56 for each copy.
	maxSegments = 1 << 14
)

// Factory opens the backend. It is unavailable where there is no runtime or no GPU: the error says what was looked for.
// What an instance moves between, and whether the devices are simulated, only opening tells.
var Factory = backend.Factory{
	Name:    name,
	Options: options,
	Open: func(_ context.Context, cfg backend.Config) (backend.Backend, error) {
		i, err := open(cfg)
		if err != nil {
			return nil, err
		}
		return i, nil
	},
	Examine: func(ctx context.Context, v backend.Values) []backend.Finding { return examine(ctx, readSettings(v)) },
}

// instance is an opened backend. It implements backend.Backend and backend.Counter.
type instance struct {
	*samehost.Instance
	engine *engine
}

// Counters implements backend.Counter.
func (i *instance) Counters() []backend.Count { return i.engine.counts.list() }

func open(cfg backend.Config) (*instance, error) {
	e, err := openEngine(readSettings(cfg.Options), cfg.Log)
	if err != nil {
		full := backend.Error{Code: backend.Unsupported, Err: err}
		if own, ok := errors.AsType[*backend.Error](err); ok {
			full = *own
		}
		full.Op, full.Backend = "open", name
		return nil, &full
	}
	kinds := backend.Kinds(backend.HostMemory, backend.GPUMemory)
	info := backend.Info{
		Name:    name,
		Version: version,
		Capabilities: backend.Capabilities{
			Ops:       backend.Write | backend.Read,
			Local:     kinds,
			Remote:    kinds,
			Reach:     backend.SameHost,
			Links:     e.links,
			Limits:    backend.Limits{Segments: maxSegments},
			Window:    cfg.Options.Int("window"),
			Simulated: e.rt.Simulated(),
		},
	}
	i := &instance{engine: e}
	if i.Instance, err = samehost.Open(cfg, samehost.Settings{Info: info, Mover: e, UntilExit: true}); err != nil {
		return nil, err
	}
	e.instance = i.Instance
	for _, d := range e.devices {
		e.log.Info("a GPU is open", "backend", name, "runtime", e.rt.Name(), "version", e.rt.Version(), "library", e.rt.Library(),
			"device", d.PCI, "name", d.Name)
	}
	return i, nil
}
