package tcp

import (
	"testing"

	"github.com/umbp/umbp/plugin-sdk/conformance"
)

func TestConformance(t *testing.T) {
	conformance.Run(t, conformance.Harness{Factory: Factory})
}
