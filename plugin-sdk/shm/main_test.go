package shm

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// TestMain runs the tests, or, in a process that the tests started, the other end.
func TestMain(m *testing.M) {
	if role := os.Getenv(childEnv); role != "" {
		if err := serveChild(role); err != nil {
			os.Stderr.WriteString("child: " + err.Error() + "\n")
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}
