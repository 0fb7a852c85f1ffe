// Package host opens the backends of a process: those that are linked in, and those that run as processes of their own.
//
// Both kinds are a backend.Backend, and nothing above can tell the difference. A Process is the second kind:
//
//	Process      the backend that stays: it keeps the regions, and leads each call to the instance that serves
//	supervisor   one goroutine for each Process: starts instances, watches them, ends them, and starts others
//	instance     one process with its rpc.Client
//	plugin       that process: the file is checked, go-plugin makes the connection, and child is what the system knows
//
// # Ends
//
// A plugin's process never outlives the host: the kernel kills it when the thread that started it ends, and the plugin
// itself ends when its passage to the host does. When the supervisor ends a process, it kills the process group and
// waits until the process has been reaped. Only then does it tell the rpc.Client, which completes what was in flight:
// up to that moment the process might have touched memory.
//
// Where a backend may lend peers the memory itself (Capabilities.NeedsFD, or a reach of the same host: a GPU's memory is lent by
// its handle), peers touch it without the process, and hear of its death from the kernel. The host gives them a second to let go. A peer that is stopped just then is not waited for.
package host

import (
	"context"
	"errors"
	"fmt"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Spec says how to open one backend: by its Factory or, if Process is set, as a process of its own.
type Spec struct {
	Factory backend.Factory
	Process *ProcessSpec
	// Options are checked against the backend's schema.
	Options map[string]string
	// Wrap, if not nil, is applied to the opened backend: faults for tests, say.
	Wrap func(backend.Backend) backend.Backend
	// KeysChanged, if not nil, is told of each region that has another key since its process was started anew. It is
	// called before that process serves, and must not wait for a call of the backend.
	KeysChanged func(id backend.RegionID, key []byte)
}

// Name returns the name of the backend.
func (s Spec) Name() string {
	if s.Process != nil {
		return s.Process.Name
	}
	return s.Factory.Name
}

// Backend is one configured backend. When it is not to be had on this machine, Backend is nil and Err says why:
// the process goes on, and the selection policy decides what that means.
type Backend struct {
	Name    string
	Backend backend.Backend
	Err     error
	// Process is the process that Backend leads to; nil for a backend that is linked in, or not to be had.
	Process *Process

	calls *calls
}

// Open opens the backends in the order given. A backend that says Unsupported (no such device, no such library)
// is kept with its error, and so is one whose plugin is missing or does not start; any other error, such as a wrong
// option, closes what was opened and is returned. The Options of cfg are ignored.
func Open(ctx context.Context, cfg backend.Config, specs []Spec) ([]Backend, error) {
	var opened []Backend
	for _, spec := range specs {
		b, err := open(ctx, cfg, spec)
		switch {
		case errors.Is(err, backend.ErrUnsupported):
			opened = append(opened, Backend{Name: spec.Name(), Err: err})
		case err != nil:
			return nil, errors.Join(fmt.Errorf("open backend %s: %w", spec.Name(), err), Close(opened))
		default:
			opened = append(opened, b)
		}
	}
	return opened, nil
}

func open(ctx context.Context, cfg backend.Config, spec Spec) (Backend, error) {
	b := Backend{Name: spec.Name(), calls: newCalls(spec.Name(), cfg.Log)}
	factory := spec.Factory
	if spec.Process != nil {
		var err error
		if factory, err = processFactory(ctx, *spec.Process, spec.KeysChanged); err != nil {
			return b, err
		}
	}
	options, err := backend.CheckOptions(factory.Options, spec.Options)
	if err != nil {
		return b, &backend.Error{Code: backend.BadRequest, Op: "check options", Err: err}
	}
	cfg.Options = options
	if b.Backend, err = factory.Open(ctx, cfg); err != nil {
		return b, err
	}
	b.Process, _ = b.Backend.(*Process)
	if spec.Wrap != nil {
		b.Backend = spec.Wrap(b.Backend)
	}
	b.Backend = measured{b.Backend, b.calls}
	return b, nil
}

// Close closes the backends, last first.
func Close(backends []Backend) error {
	var errs []error
	for i := len(backends) - 1; i >= 0; i-- {
		if b := backends[i]; b.Backend != nil {
			if err := b.Backend.Close(); err != nil {
				errs = append(errs, fmt.Errorf("close backend %s: %w", b.Name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// ProcessFactory describes a plugin and returns a factory of backends that run as its processes, one for each backend
// that is opened. What is opened is a *Process. The context bounds describing.
func ProcessFactory(ctx context.Context, spec ProcessSpec) (backend.Factory, error) {
	return processFactory(ctx, spec, nil)
}

func processFactory(ctx context.Context, spec ProcessSpec, keysChanged func(backend.RegionID, []byte)) (backend.Factory, error) {
	unavailable := func(err error) error {
		return &backend.Error{Code: backend.Unsupported, Op: "start", Backend: spec.Name, Text: "the plugin does not start", Err: err}
	}
	d, err := Describe(ctx, spec)
	if err != nil {
		return backend.Factory{}, unavailable(err)
	}
	spec.Name = d.Name
	f := backend.Factory{
		Name: spec.Name, Options: d.Schema(),
		Open: func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
			p, err := openProcess(ctx, spec, cfg, texts(d.Schema(), cfg.Options), keysChanged)
			var own *backend.Error
			switch {
			case err == nil:
				return p, nil
			case errors.As(err, &own):
				return nil, err
			}
			return nil, unavailable(err)
		},
	}
	if d.Examines {
		f.Examine = func(ctx context.Context, options backend.Values) []backend.Finding {
			findings, err := examine(ctx, &spec, texts(d.Schema(), options))
			if err != nil {
				return []backend.Finding{pluginFinding(err)}
			}
			return findings
		}
	}
	return f, nil
}

func pluginFinding(err error) backend.Finding {
	return backend.Finding{
		Subject: "plugin", State: backend.Problem, Text: err.Error(),
		Remedy: "install the plugin that came with this umbp, or correct its path in the configuration",
	}
}

// Examine looks at what a backend needs on this machine, without opening it. A backend that does not say what it needs has
// no findings, unless its plugin does not start or its options are wrong.
func Examine(ctx context.Context, spec Spec) []backend.Finding {
	factory := spec.Factory
	if spec.Process != nil {
		var err error
		if factory, err = ProcessFactory(ctx, *spec.Process); err != nil {
			return []backend.Finding{pluginFinding(err)}
		}
	}
	options, err := backend.CheckOptions(factory.Options, spec.Options)
	switch {
	case err != nil:
		return []backend.Finding{{
			Subject: "options", State: backend.Problem, Text: err.Error(), Remedy: "correct them in the configuration",
		}}
	case factory.Examine == nil:
		return nil
	}
	return factory.Examine(ctx, options)
}
