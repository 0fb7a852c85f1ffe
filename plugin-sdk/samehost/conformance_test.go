package samehost

import (
	"context"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/conformance"
)

// TestConformance tries a backend on this package: within the process, and with every target reached over its socket.
func TestConformance(t *testing.T) {
	for _, way := range []string{"one process", "two processes"} {
		t.Run(way, func(t *testing.T) {
			f := testFactory()
			if way == "two processes" {
				f = testFactory(func(s *Settings) { s.UntilExit = true })
				open := f.Open
				f.Open = func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
					b, err := open(ctx, cfg)
					if err == nil {
						asFromElsewhere(b.(*Instance))
					}
					return b, err
				}
			}
			conformance.Run(t, conformance.Harness{
				Factory: f, Options: map[string]string{"socket_dir": socketDir(t), "window": "64"},
			})
		})
	}
}
