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
	conformance.Run(t, conformance.Harness{Factory: rdma.Factory(Library()), Patience: time.Minute})
}
