// Package lab runs the tests that need RDMA in virtual machines that have it: Debian guests with soft-RoCE, which
// scripts/lab boots. It builds what goes into a guest, reports each test of a guest as one of its own, and keeps the
// results of each scenario in .cache/lab/results, where a scenario is not run again as long as nothing that it depends
// on has changed: kernel, tools, binaries, command.
//
// "make test-rdma" makes the lab ready, and runs it.
package lab

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// binary is a program that is built for the guests.
type binary struct {
	name    string
	pkg     string
	test    bool // the test binary of the package
	env     []string
	options []string
}

var (
	umbpBinary   = binary{name: "umbp", pkg: "./cmd/umbp", env: []string{"CGO_ENABLED=1"}, options: []string{"-tags", "rdma"}}
	pluginBinary = binary{name: "umbp-plugin-rdma", pkg: "./plugins/rdma/umbp-plugin-rdma", env: []string{"CGO_ENABLED=1"}}
	guestBinary  = binary{name: "guest.test", pkg: "./test/lab/guest", test: true, env: []string{"CGO_ENABLED=0"}}
	verbsBinary  = binary{name: "verbs.test", pkg: "./plugins/rdma/verbs", test: true, env: []string{"CGO_ENABLED=1", "GOEXPERIMENT=cgocheck2"}}
)

// scenario is one boot of the lab.
type scenario struct {
	name     string
	guests   int
	binaries []binary
	command  string // of the shell; its standard output is that of test binaries with -test.v=test2json
	timeout  time.Duration
}

var scenarios = []scenario{
	{
		// The bindings, and the backend on them in one process, with the pointers that go to C checked.
		name: "verbs", guests: 1, binaries: []binary{verbsBinary},
		command: "UMBP_TEST_REQUIRE=rdma UMBP_TEST_LINK=eth0 verbs.test -test.v=test2json -test.timeout 14m",
		timeout: 15 * time.Minute,
	},
	{
		name: "one-host", guests: 1, binaries: []binary{umbpBinary, pluginBinary, guestBinary},
		command: "guest.test -test.v=test2json -test.timeout 14m -test.skip '^(TestAgent|TestPair)$'",
		timeout: 15 * time.Minute,
	},
	{
		name: "two-hosts", guests: 2, binaries: []binary{umbpBinary, pluginBinary, guestBinary},
		command: `case $ROLE in 1) run=TestAgent ;; 2) run=TestPair ;; esac; guest.test -test.v=test2json -test.timeout 14m -test.run "^$run$"`,
		timeout: 15 * time.Minute,
	},
}

// record is what is kept of a run.
type record struct {
	Scenario string    `json:"scenario"`
	Key      string    `json:"key"` // of all that the run depends on
	Kernel   string    `json:"kernel"`
	At       time.Time `json:"at"`
	Seconds  float64   `json:"seconds"`
	Status   int       `json:"status"` // of the command
	Log      string    `json:"log,omitempty"`
	Tests    []outcome `json:"tests"`
}

// outcome is that of one test in a guest.
type outcome struct {
	Guest   int     `json:"guest"`
	Test    string  `json:"test"`
	Result  string  `json:"result"` // pass, fail, skip
	Seconds float64 `json:"seconds"`
	Output  string  `json:"output,omitempty"`
}

// passed says whether there is nothing to run again for.
func (r *record) passed() bool {
	return r.Status == 0 && len(r.Tests) > 0 && !slices.ContainsFunc(r.Tests, func(o outcome) bool { return o.Result == "fail" })
}

func TestGuests(t *testing.T) {
	if testing.Short() {
		t.Skip("boots virtual machines")
	}
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	if why := missing(root); why != "" {
		if strings.Contains(os.Getenv("UMBP_TEST_REQUIRE"), "rdma") {
			t.Fatalf("%s, and UMBP_TEST_REQUIRE has rdma", why)
		}
		t.Skipf("%s; \"make test-rdma\" makes the lab ready", why)
	}
	watch(t, root)
	bin := t.TempDir()
	built := map[string]bool{}
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			args := []string{"--guests", strconv.Itoa(s.guests), "--timeout", strconv.Itoa(int(s.timeout.Seconds()))}
			for _, b := range s.binaries {
				if !built[b.name] {
					build(t, root, bin, b)
					built[b.name] = true
				}
				args = append(args, "--file", filepath.Join(bin, b.name))
			}
			report(t, s.run(t, root, args))
		})
	}
}

// missing says what the lab lacks on this machine, if anything.
func missing(root string) string {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		return "there is no qemu-system-x86_64"
	}
	for _, path := range []string{"/usr/include/infiniband/verbs.h", filepath.Join(root, ".cache/lab/kernel/version")} {
		if _, err := os.Stat(path); err != nil {
			return "there is no " + path
		}
	}
	return ""
}

// watch looks at every file that the binaries are built from: the go command knows the files that a test has looked
// at, and takes the test's last result for good only as long as they are the same.
func watch(t *testing.T, root string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == ".git" || d.Name() == ".cache" || d.Name() == "bin"):
			return fs.SkipDir
		case !d.IsDir():
			_, err = os.Stat(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// build builds a binary so that the same source gives the same bytes.
func build(t *testing.T, root, dir string, b binary) {
	t.Helper()
	args := []string{"build"}
	if b.test {
		args = []string{"test", "-c"}
	}
	args = append(args, "-trimpath", "-buildvcs=false", "-o", filepath.Join(dir, b.name))
	args = append(append(args, b.options...), b.pkg)
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir, cmd.Env = root, append(os.Environ(), b.env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// run boots the guests, unless what they said last holds still.
func (s *scenario) run(t *testing.T, root string, args []string) *record {
	t.Helper()
	lab := func(more ...string) *exec.Cmd {
		all := slices.Concat(more, args, []string{"--", "sh", "-c", s.command})
		return exec.CommandContext(t.Context(), filepath.Join(root, "scripts/lab"), all...)
	}
	key, err := lab("--key").Output()
	if err != nil {
		t.Fatalf("scripts/lab --key: %v", err)
	}
	results := filepath.Join(root, ".cache/lab/results")
	file := filepath.Join(results, s.name+".json")
	r := &record{Scenario: s.name, Key: strings.TrimSpace(string(key))}
	var last record
	if text, err := os.ReadFile(file); err == nil && json.Unmarshal(text, &last) == nil && last.Key == r.Key && last.passed() {
		t.Logf("(cached) of %s, when it took %.0f s: .cache/lab/results/%s.json", last.At.Format(time.DateTime), last.Seconds, s.name)
		return &last
	}

	t.Logf("%d guest(s) boot", s.guests)
	out := t.TempDir()
	r.At = time.Now().UTC().Truncate(time.Second)
	cmd := lab("--out", out)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	r.Seconds = time.Since(r.At).Seconds()
	r.Status = cmd.ProcessState.ExitCode()
	if kernel, err := os.ReadFile(filepath.Join(root, ".cache/lab/kernel/version")); err == nil {
		r.Kernel = strings.TrimSpace(string(kernel))
	}
	if r.Status != 0 {
		r.Log = said.String()
	}
	for guest := 1; guest <= s.guests; guest++ {
		r.Tests = append(r.Tests, outcomes(t, guest, filepath.Join(out, fmt.Sprintf("%d.out", guest)))...)
	}
	text, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(results, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, append(text, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
	return r
}

// outcomes reads what the test binaries of a guest have printed.
func outcomes(t *testing.T, guest int, file string) []outcome {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.CommandContext(t.Context(), "go", "tool", "test2json", "-t")
	cmd.Stdin = f
	events, err := cmd.Output()
	if err != nil {
		t.Fatalf("go tool test2json: %v", err)
	}
	var all []outcome
	output := map[string]*strings.Builder{}
	for lines := bufio.NewScanner(bytes.NewReader(events)); lines.Scan(); {
		var e struct {
			Action, Test, Output string
			Elapsed              float64
		}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatalf("%v in %s", err, lines.Bytes())
		}
		if e.Test == "" {
			continue
		}
		if output[e.Test] == nil {
			output[e.Test] = &strings.Builder{}
		}
		switch e.Action {
		case "output":
			output[e.Test].WriteString(e.Output)
		case "pass", "fail", "skip":
			all = append(all, outcome{guest, e.Test, e.Action, e.Elapsed, output[e.Test].String()})
			delete(output, e.Test)
		}
	}
	for test, said := range output {
		all = append(all, outcome{guest, test, "fail", 0, said.String() + "(it did not end)\n"})
	}
	return all
}

// report makes a subtest of every test of the guests that has no subtests, or has failed.
func report(t *testing.T, r *record) {
	t.Helper()
	for _, o := range r.Tests {
		parent := slices.ContainsFunc(r.Tests, func(c outcome) bool { return strings.HasPrefix(c.Test, o.Test+"/") })
		if parent && o.Result != "fail" {
			continue
		}
		t.Run(o.Test, func(t *testing.T) {
			switch o.Result {
			case "fail":
				t.Errorf("in guest %d, after %.1f s:\n%s", o.Guest, o.Seconds, o.Output)
			case "skip":
				t.Skip(o.Output)
			}
		})
	}
	if !r.passed() {
		t.Errorf("exit status %d, %d tests; .cache/lab/results/%s.json has all\n%s", r.Status, len(r.Tests), r.Scenario, r.Log)
	}
}
