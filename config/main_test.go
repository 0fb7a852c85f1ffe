package config

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var update = flag.Bool("update", false, "write the golden files")

// golden compares got with a file in testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s differs (-want +got); run with -update if that is meant:\n%s", path, diff)
	}
}

// schemas are those of three backends, one of which the defaults do not list.
var schemas = map[string][]backend.Option{
	"shm": nil,
	"tcp": {
		{Name: "window", Type: backend.IntOption, Default: "16", Min: "1", Max: "1024", Help: "Transfers in flight."},
		{Name: "buffer", Type: backend.SizeOption, Default: "256KiB", Help: "Size of a buffer."},
		{Name: "nodelay", Type: backend.BoolOption, Default: "true", Help: "Send at once."},
		{Name: "device", Type: backend.StringOption, Default: "", Help: "Device to bind to."},
	},
	"rdma": {{Name: "gid_index", Type: backend.IntOption, Default: "3", Help: "Index of the GID."}},
}

// write makes a file in a new folder and returns its path.
func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	overwrite(t, path, text)
	return path
}

func overwrite(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// load builds a configuration that must be accepted, from the text of a YAML file.
func load(t *testing.T, yaml string, env ...string) *Config {
	t.Helper()
	c, err := Load(Source{File: write(t, "umbp.yaml", yaml), Env: env, Schemas: schemas})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// faults builds a configuration that must be refused, and returns its faults as "path: text".
func faults(t *testing.T, s Source) []string {
	t.Helper()
	s.Schemas = schemas
	c, err := Load(s)
	if c != nil || err == nil {
		t.Fatalf("accepted, and it must be refused")
	}
	var list []string
	for _, f := range err.(Faults) {
		f.Origin = ""
		list = append(list, f.String())
	}
	return list
}
