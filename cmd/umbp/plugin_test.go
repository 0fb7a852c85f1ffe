package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// lockedBuffer is what several goroutines may write to, as they may to a file.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// command runs umbp within the test, and returns its exit code and what it has written.
func command(args ...string) (code int, stdout, stderr string) {
	var out, errs lockedBuffer
	code = run(args, strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

// TestPluginNew writes a plugin, and does with it what its README says.
func TestPluginNew(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a b", "acme") // a path that go.mod has to quote
	source, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "source of umbp")
	if err := os.Symlink(source, link); err != nil {
		t.Fatal(err)
	}
	if code, stdout, stderr := command("plugin", "new", "acme", "--dir", dir, "--umbp", link); code != exitOK || stdout != "" ||
		!strings.Contains(stderr, dir) {
		t.Fatalf("exit code %d, %q, %q", code, stdout, stderr)
	}
	for _, args := range [][]string{
		{"gofmt", "-l", "."}, {"go", "vet", "./..."}, {"go", "test", "./..."}, {"go", "build", "-o", "umbp-plugin-acme", "."},
	} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOPROXY=off", "GOFLAGS=-mod=readonly") // the module is complete as it is written
		if out, err := cmd.CombinedOutput(); err != nil || args[0] == "gofmt" && len(out) > 0 {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	if code, stdout, stderr := command("conformance", "--plugin", filepath.Join(dir, "umbp-plugin-acme")); code != exitOK {
		t.Errorf("conformance: exit code %d\n%s%s", code, stdout, stderr)
	}
}

func TestPluginNewRefuses(t *testing.T) {
	full := t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(full, "new")
	for _, c := range []struct {
		name string
		args []string
		want string
	}{
		{"no name", nil, "too few arguments"},
		{"an empty name", []string{""}, `"" is no name for a backend`},
		{"capitals", []string{"Acme"}, `"Acme" is no name`},
		{"a path", []string{"../acme"}, `"../acme" is no name`},
		{"a dash at the end", []string{"acme-"}, `"acme-" is no name`},
		{"a digit first", []string{"9p"}, `"9p" is no name`},
		{"a long name", []string{strings.Repeat("a", 33)}, "32 at most"},
		{"a name that is taken", []string{"tcp"}, `a backend "tcp" is linked into umbp`},
		{"a module path", []string{"acme", "--module", "a b"}, `"a b" is no module path`},
		{"a module path upwards", []string{"acme", "--module", "../x"}, `"../x" is no module path`},
		{"no source", []string{"acme", "--umbp", full}, "--umbp: open "},
		{"neither release nor source", []string{"acme", "--umbp="}, "say with --umbp where its source is"},
	} {
		args := append(append([]string{"plugin", "new"}, c.args...), "--dir", empty)
		if !strings.Contains(strings.Join(c.args, " "), "--umbp") {
			args = append(args, "--umbp", "../..")
		}
		if code, _, stderr := command(args...); code != exitUsage || !strings.Contains(stderr, c.want) {
			t.Errorf("%s: exit code %d, %q, want %q", c.name, code, stderr, c.want)
		}
		if _, err := os.Stat(empty); err == nil {
			t.Fatalf("%s: something was written", c.name)
		}
	}
	if code, _, stderr := command("plugin", "new", "acme", "--dir", full, "--umbp", "../.."); code != exitUsage || !strings.Contains(stderr, "is not empty") {
		t.Errorf("a directory that is not empty: exit code %d, %q", code, stderr)
	}
	if left, err := os.ReadDir(full); err != nil || len(left) != 1 {
		t.Errorf("the directory holds %v now (%v)", left, err)
	}
}
