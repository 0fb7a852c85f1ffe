// Package examples tries the example plugins as their users would: with umbp conformance.
package examples

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	// What is built here comes from the cache of the go command, and so would the result of the tests, if it did not know
	// what they depend on.
	_ "github.com/umbp/umbp/core/host"
	_ "github.com/umbp/umbp/examples/backend-spool"
	_ "github.com/umbp/umbp/plugin-sdk/conformance"
)

// output runs a program, and returns what it has printed. One that prints nothing and fails ends the test.
func output(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && stdout.Len() == 0 {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, stderr.String())
	}
	return stdout.Bytes()
}

func TestConformance(t *testing.T) {
	bin := t.TempDir()
	umbp := filepath.Join(bin, "umbp")
	output(t, "go", "build", "-o", umbp, "../cmd/umbp")
	conformance := func(t *testing.T, plugin string, args ...string) {
		var report struct {
			Cases []struct{ Name, Rule, Result, Detail string }
		}
		args = append([]string{"conformance", "--json", "--plugin", plugin}, args...)
		if err := json.Unmarshal(output(t, umbp, args...), &report); err != nil {
			t.Fatal(err)
		}
		if len(report.Cases) < 40 {
			t.Errorf("only %d cases were tried", len(report.Cases))
		}
		for _, c := range report.Cases {
			if c.Result == "fail" {
				t.Errorf("%s (%s): %s", c.Name, c.Rule, c.Detail)
			}
		}
	}
	t.Run("spool", func(t *testing.T) {
		plugin, dir := filepath.Join(bin, "umbp-plugin-spool"), filepath.Join(t.TempDir(), "spool")
		output(t, "go", "build", "-o", plugin, "./backend-spool/umbp-plugin-spool")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		conformance(t, plugin, "--option", "dir="+dir)
	})
	t.Run("python", func(t *testing.T) {
		conformance(t, installPython(t))
	})
}

// installPython puts the plugin in Python and what is generated for it into a directory, and returns its path.
func installPython(t *testing.T) string {
	t.Helper()
	const python = "/usr/bin/python3" // as the plugin's first line says
	if out, err := exec.Command(python, "-c", "import grpc, google.protobuf").CombinedOutput(); err != nil {
		t.Skipf("%s has no gRPC; on Debian: apt-get install python3-grpcio python3-protobuf\n%s", python, out)
	}
	if _, err := exec.LookPath("protoc"); err != nil {
		t.Skip("there is no protoc; on Debian: apt-get install protobuf-compiler")
	}
	dir := t.TempDir()
	for _, name := range []string{"umbp_plugin.py", "umbp-plugin-pysock"} {
		text, err := os.ReadFile(filepath.Join("python", name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), text, 0o700)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	output(t, "protoc", "-I", "../plugin-sdk/proto/backendpb", "--python_out="+dir, "backend.proto")
	return filepath.Join(dir, "umbp-plugin-pysock")
}

// TestPythonByHand: whoever starts the plugin by hand is told what it is.
func TestPythonByHand(t *testing.T) {
	out, err := exec.Command(installPython(t)).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 2 || !bytes.Contains(out, []byte("umbp starts it")) {
		t.Errorf("%v\n%s", err, out)
	}
}
