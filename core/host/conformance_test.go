package host

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/conformance"
)

// build builds plugins of this repository, and returns the folder that they are in. Built as they are shipped, they start
// much faster than with the race detector.
func build(t testing.TB, packages ...string) string {
	t.Helper()
	dir := t.TempDir()
	args := []string{"build", "-o", dir + "/"}
	for _, p := range packages {
		args = append(args, "github.com/umbp/umbp/"+p)
	}
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return dir
}

// TestConformance runs the backends of this repository as processes.
func TestConformance(t *testing.T) {
	if testing.Short() {
		t.Skip("it builds plugins")
	}
	dir := build(t, "plugins/tcp/umbp-plugin-tcp", "plugins/shm/umbp-plugin-shm", "plugin-sdk/null/umbp-plugin-null")
	sockets, err := os.MkdirTemp("", "umbp") // t.TempDir is too long for a socket's address
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(sockets)
	for name, c := range map[string]struct {
		backend string
		stream  bool
		harness conformance.Harness
	}{
		"tcp":           {"tcp", false, conformance.Harness{}},
		"tcp by stream": {"tcp", true, conformance.Harness{}},
		"shm":           {"shm", false, conformance.Harness{Options: map[string]string{"socket_dir": sockets}}},
		"null":          {"null", false, conformance.Harness{NearEndOnly: true}},
	} {
		t.Run(name, func(t *testing.T) {
			spec := ProcessSpec{Name: c.backend, Path: filepath.Join(dir, "umbp-plugin-"+c.backend), Stream: c.stream}
			h := c.harness
			if h.Factory, err = ProcessFactory(t.Context(), spec); err != nil {
				t.Fatal(err)
			}
			conformance.Run(t, h)
		})
	}
}

// TestTexts: the texts of values mean the same values.
func TestTexts(t *testing.T) {
	schema := []backend.Option{
		{Name: "text", Type: backend.StringOption, Default: "a b"},
		{Name: "flag", Type: backend.BoolOption, Default: "true"},
		{Name: "count", Type: backend.IntOption, Default: "-5"},
		{Name: "size", Type: backend.SizeOption, Default: "1.5KiB"},
		{Name: "time", Type: backend.DurationOption, Default: "1500ms"},
	}
	values, err := backend.CheckOptions(schema, map[string]string{"count": "7"})
	if err != nil {
		t.Fatal(err)
	}
	again, err := backend.CheckOptions(schema, texts(schema, values))
	if err != nil {
		t.Fatal(err)
	}
	if again.String("text") != "a b" || !again.Bool("flag") || again.Int("count") != 7 || again.Size("size") != 1536 || again.Duration("time") != 1500*time.Millisecond {
		t.Errorf("the texts %v mean something else", texts(schema, values))
	}
}
