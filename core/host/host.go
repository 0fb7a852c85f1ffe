// Package host opens the backends of a process.
//
// Today every backend is linked in: Open calls its factory. A backend that runs as a process of its own is opened
// here too, behind the same backend.Backend, so that nothing above can tell the difference.
package host

import (
	"context"
	"errors"
	"fmt"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Spec says how to open one backend.
type Spec struct {
	Factory backend.Factory
	// Options are checked against the factory's schema.
	Options map[string]string
	// Wrap, if not nil, is applied to the opened backend: faults for tests, say.
	Wrap func(backend.Backend) backend.Backend
}

// Backend is one configured backend. When it is not to be had on this machine, Backend is nil and Err says why:
// the process goes on, and the selection policy decides what that means.
type Backend struct {
	Name    string
	Backend backend.Backend
	Err     error
}

// Open opens the backends in the order given. A backend that says Unsupported (no such device, no such library)
// is kept with its error; any other error, such as a wrong option, closes what was opened and is returned. The
// Options of cfg are ignored.
func Open(ctx context.Context, cfg backend.Config, specs []Spec) ([]Backend, error) {
	var opened []Backend
	for _, spec := range specs {
		name := spec.Factory.Name
		b, err := open(ctx, cfg, spec)
		switch {
		case errors.Is(err, backend.ErrUnsupported):
			opened = append(opened, Backend{Name: name, Err: err})
		case err != nil:
			return nil, errors.Join(fmt.Errorf("open backend %s: %w", name, err), Close(opened))
		default:
			opened = append(opened, Backend{Name: name, Backend: b})
		}
	}
	return opened, nil
}

func open(ctx context.Context, cfg backend.Config, spec Spec) (backend.Backend, error) {
	var err error
	if cfg.Options, err = backend.CheckOptions(spec.Factory.Options, spec.Options); err != nil {
		return nil, &backend.Error{Code: backend.BadRequest, Op: "check options", Err: err}
	}
	b, err := spec.Factory.Open(ctx, cfg)
	if err == nil && spec.Wrap != nil {
		b = spec.Wrap(b)
	}
	return b, err
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
