package verbs

import (
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/conformance"
	"github.com/umbp/umbp/plugins/rdma"
)

// TestConformance tries the backend against the contract, over the devices of this machine.
func TestConformance(t *testing.T) {
	names(t)
	// An emulated machine may stand still for longer than the default timeout takes to give a peer up.
	options := map[string]string{"timeout": "250ms"}
	conformance.Run(t, conformance.Harness{Factory: rdma.Factory(Library()), Options: options, Patience: time.Minute})
}
