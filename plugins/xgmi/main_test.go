package xgmi

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// TestMain runs the tests, or, in a process that the tests started, the other end.
func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		serveChild()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}
