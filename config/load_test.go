package config

import (
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// other returns a text for the key that is valid and is not its default.
func other(t *testing.T, k *key) string {
	t.Helper()
	switch k.path {
	case "pool.high_watermark":
		return "0.96"
	case "pool.low_watermark":
		return "0.91"
	case "pool.device":
		return "1"
	}
	v, err := k.parse(k.def)
	if err != nil {
		t.Fatalf("default of %s: %v", k.path, err)
	}
	switch x := v.Interface().(type) {
	case bool:
		return fmt.Sprint(!x)
	case int:
		return fmt.Sprint(x - 1)
	case backend.Size:
		return (2 * x).String()
	case time.Duration:
		return (2 * x).String()
	case string:
		for _, c := range k.choices {
			if c != x {
				return c
			}
		}
		return "localhost:9"
	}
	t.Fatalf("%s: no other value for %v", k.path, k.typ)
	return ""
}

// yamlFor writes a file that sets one key. TLS needs company.
func yamlFor(k *key, text string) string {
	if k.typ == stringType {
		text = fmt.Sprintf("%q", text)
	}
	var b strings.Builder
	words := strings.Split(k.path, ".")
	for i, w := range words {
		fmt.Fprintf(&b, "%s%s:", strings.Repeat("  ", i), w)
		if i < len(words)-1 {
			b.WriteString("\n")
		}
	}
	fmt.Fprintf(&b, " %s\n", text)
	if words[0] == "tls" && k.typ == stringType {
		for _, file := range []string{"cert", "key", "ca"} {
			if file != words[1] {
				fmt.Fprintf(&b, "  %s: company\n", file)
			}
		}
	}
	return b.String()
}

func TestPrecedenceOfEveryKey(t *testing.T) {
	for _, k := range leaves {
		if k.fileOnly() {
			continue // TestListsComeFromTheFileAsAWhole
		}
		t.Run(k.path, func(t *testing.T) {
			changed := other(t, k)
			base := k.def
			if strings.HasPrefix(k.path, "tls.") && k.typ == stringType {
				base = "elsewhere.pem" // an empty name would contradict its company
			}
			file := write(t, "umbp.yaml", yamlFor(k, changed))
			env, flags := k.env()+"="+base, map[string]string{k.path: changed}
			for _, step := range []struct {
				source       Source
				text, origin string
			}{
				{Source{}, k.def, "default"},
				{Source{File: file}, changed, "file:" + file},
				{Source{File: file, Env: []string{env}}, base, "env " + k.env()},
				{Source{File: file, Env: []string{env}, Flags: flags}, changed, "flag --" + k.path},
				{Source{File: file, Flags: flags}, changed, "flag --" + k.path},
			} {
				step.source.Schemas = schemas
				c, err := Load(step.source)
				if err != nil {
					t.Fatal(err)
				}
				want, err := k.parse(step.text)
				if err != nil {
					t.Fatal(err)
				}
				got := reflect.ValueOf(c).Elem().FieldByIndex(k.index)
				if !got.Equal(want) || c.Origin(k.path) != step.origin {
					t.Errorf("got %v from %q, want %v from %q", got, c.Origin(k.path), want, step.origin)
				}
			}
		})
	}
}

func TestListsComeFromTheFileAsAWhole(t *testing.T) {
	c := load(t, `
backends:
  - {name: rdma, options: {gid_index: 5}}
  - {name: tcp, enabled: false, faults: "complete:drop", options: {window: "8", buffer: 1MiB, nodelay: false, device: 1.10}}
selection:
  rules:
    - {match: {local: host, remote: gpu, same_host: true, same_node: false, op: read, min_size: 1, max_size: 1MiB}, require: [rdma]}
    - {allow: [rdma]}
`)
	yes, no := true, false
	wantBackends := []Backend{
		{Name: "rdma", Enabled: true, Options: map[string]string{"gid_index": "5"}},
		{Name: "tcp", Faults: "complete:drop", Options: map[string]string{
			"window": "8", "buffer": "1MiB", "nodelay": "false", "device": "1.10"}},
	}
	wantRules := []Rule{
		{Match: Match{Local: "host", Remote: "gpu", SameHost: &yes, SameNode: &no, Op: "read", MinSize: 1, MaxSize: 1 << 20},
			Require: []string{"rdma"}},
		{Allow: []string{"rdma"}},
	}
	if diff := cmp.Diff(wantBackends, c.Backends); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(wantRules, c.Selection.Rules); diff != "" {
		t.Error(diff)
	}

	c = load(t, "backends: []\nselection: {rules: []}")
	if len(c.Backends) != 0 || len(c.Selection.Rules) != 0 {
		t.Errorf("empty lists became %v and %v", c.Backends, c.Selection.Rules)
	}
}

func TestFormatsAreEquivalent(t *testing.T) {
	texts := map[string]string{
		"umbp.yaml": `
version: 1
pool: {size: 2GiB, page_size: 131072, high_watermark: 0.9, low_watermark: 0.5}
client: {verify: sample, verify_sample: 4, timeout: 1m30s}
directory: {placement: {together: false}}
backends:
  - name: tcp
    options: {window: 5, nodelay: true, buffer: 64KiB, device: "1.10"}
selection:
  rules:
    - match: {same_host: true, min_size: 1MiB}
      prefer: [tcp]
    - require: [tcp]
`,
		"umbp.json": `{
"version": 1,
"pool": {"size": "2GiB", "page_size": 131072, "high_watermark": 0.9, "low_watermark": 0.5},
"client": {"verify": "sample", "verify_sample": 4, "timeout": "1m30s"},
"directory": {"placement": {"together": false}},
"backends": [{"name": "tcp", "options": {"window": 5, "nodelay": true, "buffer": "64KiB", "device": "1.10"}}],
"selection": {"rules": [{"match": {"same_host": true, "min_size": "1MiB"}, "prefer": ["tcp"]}, {"require": ["tcp"]}]}
}`,
		"umbp.toml": `
version = 1
[pool]
size = "2GiB"
page_size = 131072
high_watermark = 0.9
low_watermark = 0.5
[client]
verify = "sample"
verify_sample = 4
timeout = "1m30s"
[directory.placement]
together = false
[[backends]]
name = "tcp"
options = { window = 5, nodelay = true, buffer = "64KiB", device = "1.10" }
[[selection.rules]]
match = { same_host = true, min_size = "1MiB" }
prefer = ["tcp"]
[[selection.rules]]
require = ["tcp"]
`,
	}
	texts["umbp.yml"] = "\uFEFF" + texts["umbp.yaml"]
	want := load(t, texts["umbp.yaml"])
	if want.Pool.Size != 2<<30 || want.Client.Timeout != 90*time.Second || want.Backends[0].Options["window"] != "5" {
		t.Fatalf("the YAML file was not read: %+v", want)
	}
	for name, text := range texts {
		got, err := Load(Source{File: write(t, name, text), Schemas: schemas})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Config{})); diff != "" {
			t.Errorf("%s differs from the YAML file:\n%s", name, diff)
		}
	}
}

func TestFilesThatCannotBeRead(t *testing.T) {
	for _, test := range []struct{ name, text, want string }{
		{"a.ini", "x", `extension ".ini" is none of [.json .toml .yaml .yml]`},
		{"a.yaml", "pool: [", "it cannot be read as YAML"},
		{"a.yaml", "- a\n- b", "it holds a list and not keys with values"},
		{"a.yaml", "just words", `it holds the text "just words" and not keys`},
		{"a.yaml", "version: 1\n---\nversion: 1", "line 2: a second document begins"},
		{"a.yaml", "version: 1\n---\n{", "it cannot be read as YAML"},
		{"a.yaml", "version: 1\nversion: 1", `line 2: key "version" is given twice`},
		{"a.yaml", "pool: &p {size: 1GiB}\nclient: *p", "line 2: references are not read"},
		{"a.yaml", "pool: {<<: {size: 1GiB}}", "line 1: a key is one word"},
		{"a.yaml", "pool: {[1]: 2}", "line 1: a key is one word"},
		{"a.yaml", "node: {name: !!binary aGk=}", "line 1: values tagged !!binary are not read"},
		{"a.yaml", "log: {level: [!mine x]}", "line 1: values tagged !mine are not read"},
		{"a.json", `{"version": 1, "version": 1}`, `key "version" is given twice, at byte`},
		{"a.json", `{"version": 1} {}`, "something follows its end"},
		{"a.json", `{"version": `, "it cannot be read as JSON"},
		{"a.json", `{"log": {"level`, "it cannot be read as JSON"},
		{"a.json", `{"backends": [{]}`, "it cannot be read as JSON"},
		{"a.json", `[]`, "it holds a list"},
		{"a.toml", "version = 1\nversion = 1", "it cannot be read as TOML"},
		{"a.toml", "version", "it cannot be read as TOML"},
		{"a.yaml", strings.Repeat("#", maxFileSize+1), "it is larger than 256 KiB"},
	} {
		t.Run(test.want, func(t *testing.T) {
			got := faults(t, Source{File: write(t, test.name, test.text)})
			if len(got) != 1 || !strings.Contains(got[0], test.want) {
				t.Errorf("got %q, want one fault with %q", got, test.want)
			}
		})
	}
	if got := faults(t, Source{File: filepath.Join(t.TempDir(), "none.yaml")}); !strings.Contains(got[0], "no such file") {
		t.Errorf("missing file: %q", got)
	}
	if got := faults(t, Source{File: t.TempDir()}); !strings.Contains(got[0], "not a regular file") {
		t.Errorf("folder for a file: %q", got)
	}
}

func TestFilesThatSayNothing(t *testing.T) {
	for name, text := range map[string]string{
		"a.yaml": "# nothing\n", "b.yaml": "", "c.yaml": "pool:\n  # size: 2GiB\n", "d.yaml": "---\n", "h.yaml": "null",
		"i.yaml": "backends: [{name: tcp, options: }, {name: shm}]",
		"e.json": "{}", "f.json": " \n", "g.toml": "# nothing",
	} {
		c, err := Load(Source{File: write(t, name, text), Schemas: schemas})
		if err != nil {
			t.Errorf("%q: %v", text, err)
		} else if c.Origin("pool.size") != "default" || c.Pool.Size != 1<<30 {
			t.Errorf("%q sets the size of the pool", text)
		}
	}
}

// TestWrongTypes puts a map where a value is wanted, a value where a map is wanted, and so on.
func TestWrongTypes(t *testing.T) {
	var manyOptions string
	for i := range 101 {
		manyOptions += fmt.Sprintf("o%d: 1, ", i)
	}
	for _, test := range []struct{ yaml, want string }{
		{"pool: 5", `pool: expected a section, not the number 5`},
		{"pool: [5]", `pool: expected a section, not a list`},
		{"pool: {size: {a: 1}}", `pool.size: expected a size such as 64KiB, not a map`},
		{"pool: {size: [1GiB]}", `pool.size: expected a size such as 64KiB, not a list`},
		{"pool: {size: true}", `pool.size: expected a size such as 64KiB, not true`},
		{"pool: {size: }", `pool.size: has no value: give it a size such as 64KiB, or delete the line`},
		{"node: {name: 5}", `node.name: expected text, not the number 5`},
		{"client: {attempts: '2'}", `client.attempts: expected a whole number, not the text "2"`},
		{"client: {attempts: 1.5}", `client.attempts: "1.5" is not a whole number`},
		{"client: {timeout: 30}", `client.timeout: expected a duration such as 1.5s, not the number 30`},
		{"directory: {only: 'true'}", `directory.only: expected true or false, not the text "true"`},
		{"directory: {only: 1}", `directory.only: expected true or false, not the number 1`},
		{"pool: {high_watermark: high}", `pool.high_watermark: expected a number, not the text "high"`},
		{"pool: {high_watermark: .nan}", `pool.high_watermark: ".nan" is not a number`},
		{"backends: {tcp: {}}", `backends: expected a list, not a map`},
		{"backends: ", `backends: has no value: give it a list, or delete the line`},
		{"backends: [tcp, {name: shm}]\nselection: {rules: [{prefer: [shm]}]}", `backends[0]: expected a map, not the text "tcp"`},
		{"backends: [{name: [tcp]}, {name: shm}]", `backends[0].name: expected text, not a list`},
		{"backends: [{name: shm}, {name: tcp, enabled: no}]", `backends[tcp].enabled: expected true or false, not the text "no"`},
		{"backends: [{name: shm}, {name: tcp, options: [window]}]", `backends[tcp].options: expected a map, not a list`},
		{"backends: [{name: shm}, {name: tcp, options: {" + manyOptions + "}}]", `backends[tcp].options: has 101 elements, more than the most allowed, 100`},
		{"backends: [{name: shm}, {name: tcp, options: {window: [1]}}]", `backends[tcp].options.window: expected one value, not a list`},
		{"backends: [{name: shm}, {name: tcp, options: {window: null}}]", `backends[tcp].options.window: expected one value, not nothing`},
		{"selection: {rules: {prefer: [shm]}}", `selection.rules: expected a list, not a map`},
		{"selection: {rules: [shm]}", `selection.rules[0]: expected a map, not the text "shm"`},
		{"selection: {rules: [{prefer: shm}]}", `selection.rules[0].prefer: expected a list, not the text "shm"`},
		{"selection: {rules: [{prefer: [5]}]}", `selection.rules[0].prefer[0]: expected text, not the number 5`},
		{"selection: {rules: [{match: host, prefer: [shm]}]}", `selection.rules[0].match: expected a section, not the text "host"`},
		{"selection: {rules: [{match: {same_host: host}, prefer: [shm]}]}", `selection.rules[0].match.same_host: expected true or false, not the text "host"`},
	} {
		got := faults(t, Source{File: write(t, "umbp.yaml", test.yaml)})
		if len(got) != 1 || got[0] != test.want {
			t.Errorf("%s:\n got %q\nwant %q", test.yaml, got, test.want)
		}
	}
	many := "backends: [{name: shm}, {name: tcp}" + strings.Repeat(", {}", 31) + "]"
	want := "backends: has 33 elements, more than the most allowed, 32"
	if got := faults(t, Source{File: write(t, "umbp.yaml", many)}); len(got) != 1 || got[0] != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, test := range []struct{ toml, want string }{
		{"[node]\nname = 2024-01-02", "node.name: expected text, not a date or time"},
		{"[[backends]]\nname = 'tcp'\noptions = {device = 1.10}\n[[backends]]\nname = 'shm'",
			"backends[tcp].options.device: a number with a fraction must be in quotes, to be passed on as it is written"},
	} {
		got := faults(t, Source{File: write(t, "umbp.toml", test.toml)})
		if len(got) != 1 || got[0] != test.want {
			t.Errorf("%s:\n got %q\nwant %q", test.toml, got, test.want)
		}
	}
}

func TestUnknownKeys(t *testing.T) {
	want := []string{
		`client.size: unknown key, did you mean "pool.size"?`,
		`pol: unknown key, did you mean "pool"?`,
		`pool.pagesize: unknown key, did you mean "page_size"?`,
		`pool.size.max: unknown key`,
		`selection.rules[0].match.sam_host: unknown key, did you mean "same_host"?`,
		`selection.rules[0].perfer: unknown key, did you mean "prefer"?`,
		`zzzzzzzzzzzz: unknown key`,
	}
	for name, text := range map[string]string{
		"umbp.yaml": `
pol: {size: 1GiB}
pool: {pagesize: 64KiB, size.max: 1}
client: {size: 1GiB}
zzzzzzzzzzzz: 1
selection: {rules: [{perfer: [tcp], match: {sam_host: true}}]}
`,
		"umbp.json": `{"pol": {"size": 1}, "pool": {"pagesize": 1, "size.max": 1}, "client": {"size": 1}, "zzzzzzzzzzzz": 1,
"selection": {"rules": [{"perfer": ["tcp"], "match": {"sam_host": true}}]}}`,
		"umbp.toml": `
zzzzzzzzzzzz = 1
[pol]
size = 1
[pool]
pagesize = 1
"size.max" = 1
[client]
size = 1
[[selection.rules]]
perfer = ["tcp"]
match = {sam_host = true}
`,
	} {
		if diff := cmp.Diff(want, faults(t, Source{File: write(t, name, text)})); diff != "" {
			t.Errorf("%s:\n%s", name, diff)
		}
	}
	want = []string{
		`pool.sise: unknown key, did you mean "pool.size"?`,
		`selection.rules: is set in the file only`,
		`version: is set in the file only`,
	}
	got := faults(t, Source{Flags: map[string]string{"pool.sise": "1GiB", "selection.rules": "[]", "version": "1"}})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestEnvironment(t *testing.T) {
	_, err := Load(Source{Schemas: schemas, Env: []string{
		"HOME=/home/me", "umbp_pool__size=x", "UMBP_CONFIG=/etc/umbp.yaml", "UMBP_VERSION=v1.2.3", "UMBP_TEST_X=1",
		// A Kubernetes service named umbp, and one named umbp-directory.
		"UMBP_SERVICE_HOST=10.0.0.1", "UMBP_SERVICE_PORT=7420", "UMBP_SERVICE_PORT_CONTROL_PLANE=7420",
		"UMBP_PORT=tcp://10.0.0.1:7420", "UMBP_PORT_7420_TCP=tcp://10.0.0.1:7420", "UMBP_PORT_7420_TCP_ADDR=10.0.0.1",
		"UMBP_DIRECTORY_SERVICE_HOST=10.0.0.1", "UMBP_DIRECTORY_PORT_7420_TCP_PROTO=tcp",
	}})
	if err != nil {
		t.Errorf("variables that are none of ours: %v", err)
	}

	got := faults(t, Source{Env: []string{
		"UMBP_POOL_SIZE=1GiB", "UMBP_POOL=1GiB", "UMBP_POOL__SIZ=1GiB", "UMBP_", "UMBP_XXXXXXXXX=",
		"UMBP_BACKENDS=tcp", "UMBP_BACKENDS__TCP__WINDOW=5", "UMBP_SELECTION__RULES=", "UMBP_POOL__PAGE_SIZE=64KB2",
		"UMBP_DIRECTORY__ONLY=yes", "UMBP_CLIENT__ATTEMPTS=", "UMBP_POOL__HIGH_WATERMARK=NaN", "UMBP_LOG__LEVEL=INFO",
	}})
	want := []string{
		`unknown variable, did you mean "UMBP_POOL__SIZE"?`,
		`unknown variable: it names a section, and not a key in it such as UMBP_POOL__SIZE`,
		`unknown variable, did you mean "UMBP_POOL__SIZE"?`,
		`unknown variable`,
		`unknown variable`,
		`unknown variable: backends is set in the file only`,
		`backends: is set in the file only`,
		`client.attempts: "" is not a whole number`,
		`directory.only: "yes" is neither true nor false`,
		`log.level: "INFO" is not one of trace, debug, info, warn, error`,
		`pool.high_watermark: "NaN" is not a number`,
		`pool.page_size: "64KB2" is not a size such as 64KiB`,
		`selection.rules: is set in the file only`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestAllFaultsAtOnce has a fault of every kind, in every layer, and gets them all in one error.
func TestAllFaultsAtOnce(t *testing.T) {
	file := write(t, "umbp.yaml", `
version: 2
node: {listen: nowhere, http: "localhost:70000"}
directory: {lease: 1ms, adress: "x:1"}
pool:
  size: 100KB
  page_size: 3KiB
  high_watermark: 0.5
  low_watermark: 0.6
client: {timeout: 30, verify: some}
selection:
  rules:
    - {match: {op: read}, require: [tcp], prefer: [shm]}
    - {}
    - {prefer: [rdma, shm, shm]}
    - {allow: [tpc]}
    - {match: {min_size: 2MiB, max_size: 1MiB}, allow: [tcp]}
backends:
  - {name: tcp, options: {windwo: 3, window: 0, buffer: 1.5}}
  - {name: rdma, enabled: false}
  - {name: shm}
  - {name: shm}
  - {name: xgmi}
  - {name: "mlx5_0.1"}
  - {name: "3fs", nmae: tcp}
tls: {cert: a.pem, insecure: true}
`)
	_, err := Load(Source{
		File:    file,
		Env:     []string{"UMBP_POOL__SLOT_TTL=30", "UMBP_POOL__LOW_WATERMARK=0.7", "UMBP_CLEINT__ATTEMPTS=1"},
		Flags:   map[string]string{"client.attempts": "99", "log.levle": "info"},
		Schemas: schemas,
	})
	if err == nil {
		t.Fatal("accepted")
	}
	golden(t, "faults.txt", strings.ReplaceAll(err.Error(), file, "umbp.yaml")+"\n")
}

func TestOneFaultIsOneLine(t *testing.T) {
	_, err := Load(Source{Env: []string{"UMBP_POOL__PAGE_SIZE=3KiB", "UMBP_POOL__SIZE=3MiB"}, Schemas: schemas})
	want := "configuration refused: pool.page_size: 3KiB is not a power of two [env UMBP_POOL__PAGE_SIZE]"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}
