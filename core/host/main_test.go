package host

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// TestMain runs the tests, or one of the programs that they start.
func TestMain(m *testing.M) {
	if program, ok := programs[os.Getenv(envProgram)]; ok {
		program()
		return
	}
	goleak.VerifyTestMain(m)
}
