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
			conformance.Run(t, conformance.Harness{
				Factory: backend.Factory{
					Name: testName, Options: Options(),
					Open: func(_ context.Context, cfg backend.Config) (backend.Backend, error) {
						i, err := openWith(cfg, func(s *Settings) {
							s.UntilExit = way == "two processes"
						})
						if err != nil {
							return nil, err
						}
						if way == "two processes" {
							asFromElsewhere(i)
						}
						return i, nil
					},
				},
				Options: map[string]string{"socket_dir": socketDir(t), "window": "64"},
			})
		})
	}
}
