package spool_test

import (
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	spool "github.com/umbp/umbp/examples/backend-spool"
	"github.com/umbp/umbp/plugin-sdk/conformance"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func shared(t *testing.T) string {
	dir := filepath.Join(t.TempDir(), "spool")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestConformance(t *testing.T) {
	conformance.Run(t, conformance.Harness{Factory: spool.Factory, Options: map[string]string{"dir": shared(t)}})
}
