package config

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// plugins stands for what is in a folder of plugins. It records who was asked.
type plugins struct{ asked []string }

func (p *plugins) describe(at Plugins, b Backend) ([]backend.Option, error) {
	p.asked = append(p.asked, strings.Join([]string{at.Dir, b.Name, b.Plugin, b.SHA256, strings.Join(b.Env, "+")}, "|"))
	switch b.Name {
	case "ring", "tcp":
		return []backend.Option{{Name: "slots", Type: backend.IntOption, Default: "8", Max: "64", Help: "Slots of the ring."}}, nil
	case "bare":
		return nil, nil
	}
	return nil, errors.New("there is no such program")
}

func TestPluginsAreAsked(t *testing.T) {
	sum := strings.Repeat("0aF9", 16)
	var p plugins
	c, err := Load(Source{File: write(t, "umbp.yaml", `
plugins: {dir: /opt}
backends:
  - {name: shm}
  - {name: ring, options: {slots: 9}, env: [A, B], sha256: `+sum+`}
  - {name: bare, mode: process}
  - {name: tcp, mode: process, plugin: ./mine, options: {slots: 1}}
  - {name: rdma, mode: process}
  - {name: absent, enabled: false, options: {anything: 1}}
`), Schemas: schemas, Describe: p.describe})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"/opt|ring||" + sum + "|A+B", "/opt|bare|||", "/opt|tcp|./mine||"}, p.asked); diff != "" {
		t.Errorf("asked (-want +got): %s", diff)
	}
	modes := map[string]string{}
	for i := range c.Backends {
		modes[c.Backends[i].Name] = c.Mode(&c.Backends[i])
	}
	want := map[string]string{
		"shm": InProcess, "ring": AsProcess, "bare": AsProcess, "tcp": AsProcess, "rdma": AsProcess, "absent": AsProcess,
	}
	if diff := cmp.Diff(want, modes); diff != "" {
		t.Error(diff)
	}
	for name, want := range map[string]int{"shm": 0, "tcp": 1, "rdma": 1, "ring": 1, "bare": 0, "absent": -1} {
		if options, known := c.Schema(name); known != (want >= 0) || known && len(options) != want {
			t.Errorf("schema of %s: %v, %v", name, options, known)
		}
	}
	entries := map[string]string{}
	for _, e := range c.Entries() {
		entries[e.Path] = e.Value
	}
	for path, want := range map[string]string{
		"backends[ring].options.slots": "9", "backends[ring].env": "[A, B]", "backends[ring].sha256": sum,
		"backends[tcp].options.slots": "1", "backends[rdma].options.gid_index": "3",
	} {
		if got, ok := entries[path]; !ok || got != want {
			t.Errorf("%s = %q, want %q", path, got, want)
		}
	}
}

// TestModeSwitchesEveryBackend: those that do not say otherwise.
func TestModeSwitchesEveryBackend(t *testing.T) {
	c := load(t, "backends: [{name: tcp}, {name: shm}, {name: rdma, mode: in-process}]", "UMBP_PLUGINS__MODE=process")
	for i, want := range []string{AsProcess, AsProcess, InProcess} {
		if got := c.Mode(&c.Backends[i]); got != want {
			t.Errorf("%s runs as %s, want %s", c.Backends[i].Name, got, want)
		}
	}
}

func TestPluginFaults(t *testing.T) {
	for yaml, want := range map[string]string{
		"{name: ring, options: {slot: 1}}":         `backends[ring].options.slot: unknown option, did you mean "slots"?`,
		"{name: ring, options: {slots: 65}}":       `backends[ring].options.slots: 65 is more than the most allowed, 64`,
		"{name: bare, options: {slots: 1}}":        `backends[bare].options.slots: unknown option`,
		"{name: absent}":                           `backends[absent]: its plugin does not say which options it has: there is no such program`,
		"{name: rmda}":                             `backends[rmda]: its plugin does not say which options it has: there is no such program, did you mean "rdma"?`,
		"{name: ring, mode: in-process}":           `backends[ring].mode: ring is not linked in, and can only run as a process`,
		"{name: rdma, mode: process, plugin: x}":   `backends[rdma]: its plugin does not say which options it has: there is no such program`,
		"{name: ring, mode: thread}":               `backends[ring].mode: "thread" is not one of in-process, process`,
		"{name: ring, sha256: abc}":                `backends[ring].sha256: "abc" is not a checksum: write 64 hex digits`,
		"{name: ring, sha256: 7}":                  `backends[ring].sha256: expected text, not the number 7`,
		"{name: ring, env: [A, B=1]}":              `backends[ring].env[1]: "B=1" is not the name of a variable`,
		"{name: ring, env: ['']}":                  `backends[ring].env[0]: "" is not the name of a variable`,
		"{name: ring, env: A}":                     `backends[ring].env: expected a list, not the text "A"`,
		"{name: ring}, {name: ring}":               `backends[ring]: is listed twice`,
		"{name: ring, faults: 'complete:drip'}":    `backends[ring].faults: `,
		"{name: tcp, mode: process, plugin: mine}": ``, // fine: it is asked, and has answers
	} {
		t.Run(yaml, func(t *testing.T) {
			var p plugins
			file := write(t, "umbp.yaml", "selection: {rules: [{allow: [shm]}]}\nbackends: [{name: shm}, "+yaml+"]")
			_, err := Load(Source{File: file, Schemas: schemas, Describe: p.describe})
			var list Faults
			errors.As(err, &list)
			switch {
			case want == "" && err == nil:
			case len(list) != 1 || !strings.HasPrefix(list[0].Path+": "+list[0].Text, want):
				t.Errorf("got %v\nwant %s", err, want)
			}
			if len(p.asked) > 1 || strings.ContainsAny(yaml, "=") && len(p.asked) > 0 {
				t.Errorf("asked %q", p.asked)
			}
		})
	}
}

func TestPluginWarnings(t *testing.T) {
	c := load(t, "selection: {rules: [{allow: [tcp, shm]}]}\nbackends: [{name: tcp, env: [A]}, {name: shm, mode: process, env: [A]}]")
	want := []string{"backends[tcp]: plugin, sha256 and env say nothing to a backend that runs in-process"}
	if diff := cmp.Diff(want, c.Warnings()); diff != "" {
		t.Error(diff)
	}
}

// TestReloadAsksAgain: a plugin is replaced while the process runs; what the open backend was started with stays.
func TestReloadAsksAgain(t *testing.T) {
	path := write(t, "umbp.yaml", "selection: {rules: [{allow: [ring]}]}\nbackends: [{name: ring}]")
	var p plugins
	m, err := NewManager(Source{File: path, Schemas: schemas, Describe: p.describe})
	if err != nil {
		t.Fatal(err)
	}
	overwrite(t, path, "client: {attempts: 3}\nselection: {rules: [{allow: [ring]}]}\nbackends: [{name: ring, options: {slots: 3}}, {name: bare}]")
	change, err := m.Reload()
	if err != nil {
		t.Fatal(err)
	}
	if len(change.Live) != 1 || !slices.ContainsFunc(change.NeedsRestart, func(d Difference) bool {
		return d.String() == "backends[ring].options.slots: 8 → 3"
	}) {
		t.Errorf("got %v", change)
	}
	if got := m.Config(); len(got.Backends) != 1 || got.Client.Attempts != 3 {
		t.Errorf("got %+v", got)
	}
	overwrite(t, path, "backends: [{name: ring, options: {slots: 300}}]")
	if _, err := m.Reload(); err == nil || !strings.Contains(err.Error(), "backends[ring].options.slots: 300 is more") {
		t.Errorf("got %v", err)
	}
}
