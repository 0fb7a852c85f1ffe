package host_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// recorder is a backend that notes when it is closed.
type recorder struct {
	backend.Backend
	name string
	log  *[]string
	err  error
}

func (r recorder) Close() error {
	*r.log = append(*r.log, "close "+r.name)
	return r.err
}

func spec(log *[]string, name string, openErr, closeErr error) host.Spec {
	return host.Spec{Factory: backend.Factory{
		Name:    name,
		Options: []backend.Option{{Name: "size", Type: backend.IntOption, Default: "3"}},
		Open: func(_ context.Context, cfg backend.Config) (backend.Backend, error) {
			*log = append(*log, "open "+name)
			if openErr != nil {
				return nil, openErr
			}
			if cfg.Self.Node != "self" {
				return nil, errors.New("the configuration did not arrive")
			}
			return recorder{nil, name, log, closeErr}, nil
		},
	}}
}

var config = backend.Config{Self: backend.Peer{Node: "self", Incarnation: 1}}

func TestOpenAndClose(t *testing.T) {
	var log []string
	none := backend.Errorf(backend.Unsupported, "no such device")
	opened, err := host.Open(t.Context(), config, []host.Spec{
		spec(&log, "a", nil, errors.New("stuck")), spec(&log, "b", none, nil), spec(&log, "c", nil, nil),
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(opened) != 3 || opened[0].Name != "a" || opened[0].Backend == nil || opened[1].Backend != nil ||
		!errors.Is(opened[1].Err, none) || opened[2].Backend == nil {
		t.Errorf("opened %+v", opened)
	}
	if err := host.Close(opened); err == nil || !strings.Contains(err.Error(), "close backend a: stuck") {
		t.Errorf("Close returns %v", err)
	}
	if want := []string{"open a", "open b", "open c", "close c", "close a"}; !slices.Equal(log, want) {
		t.Errorf("it went %v, want %v", log, want)
	}
}

// TestOpenFails: what was opened is closed again, and the error names the backend at fault.
func TestOpenFails(t *testing.T) {
	wrong := func(log *[]string) host.Spec {
		s := spec(log, "b", nil, nil)
		s.Options = map[string]string{"size": "many"}
		return s
	}
	for name, bad := range map[string]func(log *[]string) host.Spec{
		"open backend b: address in use":             func(log *[]string) host.Spec { return spec(log, "b", errors.New("address in use"), nil) },
		`open backend b: check options: bad request`: wrong,
		`size: "many" is not a valid int, such as 8`: wrong,
	} {
		var log []string
		opened, err := host.Open(t.Context(), config, []host.Spec{spec(&log, "a", nil, nil), bad(&log), spec(&log, "c", nil, nil)})
		if opened != nil || err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("Open returns %v, %v, want an error that says %q", opened, err, name)
		}
		if log[0] != "open a" || log[len(log)-1] != "close a" || slices.Contains(log, "open c") {
			t.Errorf("it went %v", log)
		}
	}
}

func TestWrap(t *testing.T) {
	var log []string
	s := spec(&log, "a", nil, nil)
	s.Wrap = func(b backend.Backend) backend.Backend { return recorder{b, "wrapped", &log, nil} }
	unavailable := spec(&log, "b", backend.ErrUnsupported, nil)
	unavailable.Wrap = func(backend.Backend) backend.Backend {
		t.Error("a backend that was not opened is wrapped")
		return nil
	}
	opened, err := host.Open(t.Context(), config, []host.Spec{s, unavailable})
	if err != nil {
		t.Fatal(err)
	}
	if err := host.Close(opened); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(log, "close wrapped") {
		t.Errorf("it went %v: the wrapper is not what was returned", log)
	}
}
