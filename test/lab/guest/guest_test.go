// Package guest holds the tests that run in the virtual machines of scripts/lab, where there is RDMA: the command umbp
// and the plugin, as they are built for users, over soft-RoCE. Package lab boots the machines and runs them there;
// everywhere else they are skipped.
//
// With two guests, guest 1 is the far end: its TestAgent starts nodes there, kills them and cuts the link, on behalf of
// the tests that run in guest 2.
package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"
)

// backendName is the backend that is tried. The tests that need nothing but a network pass with tcp, too.
var backendName = flag.String("backend", "rdma", "the backend to try")

// Where scripts/lab has put the files.
const (
	umbp   = "/lab/umbp"
	plugin = "/lab/umbp-plugin-"
)

// alone skips a test that is not for a single guest.
func alone(t *testing.T) {
	t.Helper()
	if os.Getenv("GUESTS") != "1" {
		t.Skip("for one guest of scripts/lab: go test ./test/lab")
	}
}

// inRole skips a test that is not for this one of two guests.
func inRole(t *testing.T, role string) {
	t.Helper()
	if os.Getenv("GUESTS") != "2" || os.Getenv("ROLE") != role {
		t.Skip("for guest " + role + " of two of scripts/lab: go test ./test/lab")
	}
}

// The ports of the control planes.
const (
	nodePort      = 7420 // of the node of a guest
	directoryPort = 7400 // of the directory of two guests, a process of its own, which no test kills
)

// address is where a guest can be reached.
func address(guest, port int) string { return fmt.Sprintf("10.77.0.%d:%d", guest, port) }

// settings are what the tests vary in a configuration.
type settings struct {
	guest     int // where the process runs
	name      string
	listen    string // of the control plane; empty for where the guest's node is
	directory string // address; empty to serve it
	only      bool   // the directory, and no memory
	backends  []string
	process   bool   // the backend that is tried runs as a process
	rule      string // of the policy: "require: [rdma]"
}

// file writes the configuration as YAML.
func (s settings) file() []byte {
	var b bytes.Buffer
	if s.listen == "" {
		s.listen = address(s.guest, nodePort)
	}
	fmt.Fprintf(&b, "node: {name: %q, listen: %q, http: \"\"}\n", s.name, s.listen)
	fmt.Fprintf(&b, "directory: {address: %q, only: %t}\n", s.directory, s.only)
	fmt.Fprintf(&b, "pool: {size: 64MiB, huge_pages: off}\n")
	fmt.Fprintf(&b, "client: {timeout: 60s, verify: all}\n")
	fmt.Fprintf(&b, "tls: {insecure: true}\n")
	fmt.Fprintf(&b, "selection: {rules: [{%s}]}\n", s.rule)
	fmt.Fprintf(&b, "backends:\n")
	for _, name := range s.backends {
		mode, options := "in-process", options(name)
		if s.process && name == *backendName {
			mode = "process"
		}
		if name == "tcp" {
			options = map[string]string{"listen": address(s.guest, 0)}
		}
		text, _ := json.Marshal(options) // a map of strings has no way to fail, and JSON is YAML
		fmt.Fprintf(&b, "  - {name: %s, mode: %s, options: %s}\n", name, mode, text)
	}
	return b.Bytes()
}

// patientTimeout is the timeout of the backend rdma. A machine that is emulated stands still for a second now and then,
// which a peer must not take for its end.
const patientTimeout = "250ms"

// options are those that a backend needs in a guest.
func options(name string) map[string]string {
	switch name {
	case "rdma":
		return map[string]string{"timeout": patientTimeout}
	case "tcp":
		return map[string]string{"listen": "off"}
	}
	return nil
}

// hands do what a test asks for in one guest. They are an agent in the same process, or a remote one.
type hands interface {
	// Start starts a program and waits until it says that it is ready.
	Start(Program, *struct{}) error
	// Stop ends a program that was started, by SIGKILL where Kill says so, and waits for its end.
	Stop(Ending, *struct{}) error
	// Run runs a program to its end. The error is about starting it only.
	Run(Program, *Outcome) error
}

// Program is what to run.
type Program struct {
	Name  string // by which Stop knows it
	Argv  []string
	Stdin []byte
	Files map[string][]byte // written before it starts
	Limit time.Duration     // how long Run lets it run; patience when it is zero
}

// Ending is how to end a program.
type Ending struct {
	Name string
	Kill bool
}

// Outcome is what a program has left.
type Outcome struct {
	Code           int
	Stdout, Stderr []byte
}

// machine is a guest, as a test uses it. Every method fails the test when it fails.
type machine struct {
	t      *testing.T
	number int
	hands  hands
}

// serve starts a node, or a directory, and stops it when the test ends.
func (h machine) serve(s settings) {
	h.t.Helper()
	s.guest = h.number
	path := "/tmp/" + s.name + ".yaml"
	program := Program{Name: s.name, Argv: []string{umbp, "serve", "-c", path}, Files: map[string][]byte{path: s.file()}}
	if err := h.hands.Start(program, &struct{}{}); err != nil {
		h.t.Fatalf("%s in guest %d: %v", s.name, h.number, err)
	}
	h.t.Cleanup(func() { h.hands.Stop(Ending{Name: s.name}, &struct{}{}) })
}

func (h machine) stop(name string, kill bool) {
	h.t.Helper()
	if err := h.hands.Stop(Ending{name, kill}, &struct{}{}); err != nil {
		h.t.Fatalf("stop %s in guest %d: %v", name, h.number, err)
	}
}

// try runs a program and returns what it leaves, also when it fails.
func (h machine) try(p Program) Outcome {
	h.t.Helper()
	var out Outcome
	if err := h.hands.Run(p, &out); err != nil {
		h.t.Fatalf("%s in guest %d: %v", strings.Join(p.Argv, " "), h.number, err)
	}
	return out
}

// run runs a program that has to succeed, and returns what it prints.
func (h machine) run(p Program) []byte {
	h.t.Helper()
	out := h.try(p)
	if out.Code != 0 {
		h.t.Fatalf("%s in guest %d: exit code %d\n%s%s", strings.Join(p.Argv, " "), h.number, out.Code, out.Stdout, out.Stderr)
	}
	return out.Stdout
}

// client is how the command umbp is called.
type client struct {
	machine
	settings
}

// command is a call of umbp with the client's configuration.
func (c client) command(args ...string) Program {
	s := c.settings
	s.guest = c.number
	path := "/tmp/client-" + strings.NewReplacer("/", "-").Replace(c.t.Name()) + ".yaml"
	return Program{Argv: append([]string{umbp, "-c", path}, args...), Files: map[string][]byte{path: s.file()}}
}

// moved is what put and get print with --json.
type moved struct {
	Status   string  `json:"status"`
	Node     string  `json:"node"`
	Backend  string  `json:"backend"`
	Bytes    int     `json:"bytes"`
	Verified bool    `json:"verified"`
	Millis   float64 `json:"ms"`
}

// put stores a value and says how it went there.
func (c client) put(key string, value []byte) moved {
	c.t.Helper()
	p := c.command("put", "--json", key, "-")
	p.Stdin = value
	return c.decode(c.run(p))
}

// get fetches a value and fails the test when it is not the one wanted, byte for byte.
func (c client) get(key string, want []byte) moved {
	c.t.Helper()
	file := "/tmp/got"
	report := c.decode(c.run(c.command("get", "--json", key, "-o", file)))
	got := c.run(Program{Argv: []string{"cat", file}})
	if at := differ(got, want); at >= 0 {
		c.t.Fatalf("get %s in guest %d: %d bytes instead of %d, the first other one at %d", key, c.number, len(got), len(want), at)
	}
	if !report.Verified {
		c.t.Errorf("get %s in guest %d: its checksum was not compared", key, c.number)
	}
	return report
}

// doctor returns what umbp doctor finds about the backend that is tried, which must be nothing.
func (c client) doctor(args ...string) (patterns []pattern) {
	c.t.Helper()
	out := c.try(c.command(append([]string{"doctor", *backendName, "--json"}, args...)...))
	var report struct {
		State    string
		Findings []struct{ Backend, Subject, State, Text, Remedy string }
		Patterns []pattern
	}
	if err := json.Unmarshal(out.Stdout, &report); err != nil {
		c.t.Fatalf("%v in %s%s", err, out.Stdout, out.Stderr)
	}
	if out.Code != 0 || report.State != "fine" || len(report.Findings) == 0 {
		c.t.Errorf("doctor: exit code %d, %s\n%s", out.Code, out.Stdout, out.Stderr)
	}
	for _, f := range report.Findings {
		c.t.Logf("%s: %s: %s", f.Subject, f.State, f.Text)
	}
	return report.Patterns
}

// pattern is what umbp doctor has found by moving bytes to one node.
type pattern struct {
	Node, Backend, State, Text string
	Values                     int
}

func (c client) decode(text []byte) moved {
	c.t.Helper()
	var m moved
	if err := json.Unmarshal(text, &m); err != nil {
		c.t.Fatalf("%v in %s", err, text)
	}
	return m
}

// over fails the test when a value went another way.
func (c client) over(backend string, reports ...moved) {
	c.t.Helper()
	for _, r := range reports {
		if r.Backend != backend {
			c.t.Errorf("%d bytes went over %s instead of %s", r.Bytes, r.Backend, backend)
		}
	}
}

// differ returns where a and b differ first, or -1.
func differ(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	if len(a) != len(b) {
		return min(len(a), len(b))
	}
	return -1
}

// value makes bytes that are others for each seed.
func value(seed string, size int) []byte {
	var key [32]byte
	copy(key[:], seed)
	b := make([]byte, size)
	rand.NewChaCha8(key).Read(b)
	return b
}

// here is this guest, with an agent of its own.
func here(t *testing.T, number int) machine {
	a := newAgent()
	t.Cleanup(a.close)
	return machine{t, number, a}
}

// eventually waits until f is true, which it must become.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for !f() {
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within a minute", what)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
