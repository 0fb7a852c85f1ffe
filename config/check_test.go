package config

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/fault"
)

func TestContradictions(t *testing.T) {
	_, scriptErr := fault.Parse("complete:drip")
	for _, test := range []struct{ yaml, want string }{
		{"node: {listen: ''}", `node.listen: "" is not an address: write host:port, with a number for the port`},
		{"node: {listen: '127.0.0.1:http'}", `node.listen: "127.0.0.1:http" is not an address: write host:port, with a number for the port`},
		{"node: {advertise: '10.0.0.1:0'}", `node.advertise: peers cannot dial 10.0.0.1:0`},
		{"node: {advertise: ':7420'}", `node.advertise: peers cannot dial :7420`},
		{"node: {http: '127.0.0.1:7420'}", `node.http: 127.0.0.1:7420 is taken by node.listen`},
		{"node: {listen: '10.0.0.1:7420'}", `node.listen: 10.0.0.1:7420 leads beyond this host, and no one there could be told ` +
			`from an intruder: set tls.cert, tls.key and tls.ca, or tls.insecure: true`},
		{"directory: {address: 'directory:7420'}", `directory.address: directory:7420 leads beyond this host, and no one there could ` +
			`be told from an intruder: set tls.cert, tls.key and tls.ca, or tls.insecure: true`},
		{"directory: {address: 'localhost:1', only: true}", `directory.only: contradicts directory.address = localhost:1 (F): ` +
			`the directory is served here or there`},
		{"pool: {size: 65KiB}", `pool.size: 65KiB is no multiple of pool.page_size = 64KiB (default); 64KiB is`},
		{"pool: {size: 1KiB}", `pool.size: 1KiB is no multiple of pool.page_size = 64KiB (default); 64KiB is`},
		{"pool: {low_watermark: 0.95}", `pool.low_watermark: 0.95 is not below pool.high_watermark = 0.95 (default)`},
		{"pool: {low_watermark: 0.97, high_watermark: 5}", `pool.high_watermark: 5 is more than the most allowed, 1`},
		{"pool: {memory: gpu, device: first}", `pool.device: "first" is no GPU: write its PCI address, such as 0000:c1:00.0, or its number`},
		{"pool: {memory: gpu, device: 'c1:00.0'}", `pool.device: "c1:00.0" is no GPU: write its PCI address, such as 0000:c1:00.0, or its number`},
		{"pool: {memory: vram}", `pool.memory: "vram" is not one of host, gpu`},
		{"pool: {memory: gpu, huge_pages: require}", `pool.huge_pages: require contradicts pool.memory = gpu (F): huge pages are the host's`},
		{"gpu: {runtime: rocm}", `gpu.runtime: "rocm" is not one of auto, hip, cuda`},
		{"tls: {cert: a, key: b}", `tls.ca: must be set beside tls.key = b (F): TLS needs tls.cert, tls.key and tls.ca`},
		{"tls: {cert: a, key: [b]}", `tls.key: expected text, not a list`},
		{"tls: {cert: a, key: b, ca: c, insecure: true}", `tls.insecure: contradicts tls.cert = a (F): choose one`},
		{"tls: {insecure: true}\nnode: {listen: '[::]:7420'}", `node.advertise: must be set, because peers cannot dial node.listen = [::]:7420 (F)`},
		{"backends: [{name: tcp}, {name: shm}, {name: tcp}]", `backends[tcp]: is listed twice`},
		{"backends: [{name: tcp}, {name: shm}, {name: smh}]", `backends[smh]: unknown backend, did you mean "shm"?`},
		{"backends: [{name: tcp}, {name: shm}, {enabled: true}]", `backends[2].name: "" is not a name: a name is lower-case letters, digits and dashes`},
		{"backends: [{name: tcp, options: {window: 2000}}, {name: shm}]", `backends[tcp].options.window: 2000 is more than the most allowed, 1024`},
		{"backends: [{name: tcp, faults: 'complete:drip'}, {name: shm}]", "backends[tcp].faults: " + scriptErr.Error()},
		{"backends: [{name: tcp, options: {a.b: 1}}, {name: shm}]", `backends[tcp].options.a.b: unknown option`},
		{"backends: [{name: tcp}, {name: shm, enabled: false}]", `selection.rules[0]: names backend "shm", which is not enabled`},
		{"backends: [{name: tcp}]", `selection.rules[0]: names backend "shm", which is not listed in backends`},
		{"selection: {rules: [{require: [tpc]}]}", `selection.rules[0]: names backend "tpc", which is not listed in backends, did you mean "tcp"?`},
		{"selection: {rules: [{match: {op: raed}, require: [tcp]}]}", `selection.rules[0].match.op: "raed" is not one of read, write`},
		{"selection: {rules: [{require: []}]}", `selection.rules[0]: names no backend: give it require, or prefer and allow`},
		{"selection: {rules: [{require: [tcp], allow: [shm]}]}", `selection.rules[0]: has require beside prefer or allow: require leaves no choice`},
		{"selection: {rules: [{prefer: [tcp], allow: [tcp]}]}", `selection.rules[0]: names backend "tcp" twice`},
		{"selection: {rules: [{match: {min_size: 2, max_size: 1}, allow: [tcp]}]}", `selection.rules[0].match: min_size, 2B, is greater than max_size, 1B`},
		{"selection: {rules: [{match: {max_size: 0}, allow: [tcp]}]}", `selection.rules[0].match.max_size: 0 is less than the least allowed, 1B`},
		{"selection: {rules: [{allow: [tcp]}, {match: {op: read}, allow: [shm]}]}",
			`selection.rules[1]: is never reached: selection.rules[0] matches all that it matches`},
	} {
		t.Run(test.want, func(t *testing.T) {
			t.Chdir(t.TempDir())
			overwrite(t, "F.yaml", test.yaml)
			got := faults(t, Source{File: "F.yaml"})
			want := []string{test.want}
			for i := range got {
				got[i] = replaceOrigin(got[i])
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// replaceOrigin makes the origin in a fault between two keys short.
func replaceOrigin(s string) string { return strings.ReplaceAll(s, "(file:F.yaml)", "(F)") }

// beyond returns the text of a value a little past a bound.
func beyond(t *testing.T, k *key, bound string, above bool) string {
	t.Helper()
	v, err := k.parse(bound)
	if err != nil {
		t.Fatal(err)
	}
	step := -1
	if above {
		step = 1
	}
	switch x := v.Interface().(type) {
	case int:
		return fmt.Sprint(x + step)
	case float64:
		return fmt.Sprint(x + float64(step)/1024)
	case backend.Size:
		return (x + backend.Size(step)).String()
	case time.Duration:
		return (x + time.Duration(step)).String()
	}
	t.Fatalf("%s: a bound on %v", k.path, k.typ)
	return ""
}

func TestBounds(t *testing.T) {
	for _, k := range leaves {
		if !k.scalar() {
			continue
		}
		for _, bound := range []string{k.min, k.max} {
			if bound == "" {
				continue
			}
			if _, err := k.parse(bound); err != nil {
				t.Errorf("%s: its own bound: %v", k.path, err)
			}
			past := beyond(t, k, bound, bound == k.max)
			if _, err := k.parse(past); err == nil {
				t.Errorf("%s: accepts %s, beyond its bound %s", k.path, past, bound)
			}
		}
	}
}

func TestCovers(t *testing.T) {
	yes, no := true, false
	for _, test := range []struct {
		m, n Match
		want bool
	}{
		{Match{}, Match{}, true},
		{Match{}, Match{Local: "gpu", Remote: "host", Op: "read", SameHost: &yes, SameNode: &no, MinSize: 1, MaxSize: 2}, true},
		{Match{Local: "gpu"}, Match{}, false},
		{Match{Local: "gpu"}, Match{Local: "gpu", Op: "read"}, true},
		{Match{Remote: "gpu"}, Match{Remote: "host"}, false},
		{Match{Op: "read"}, Match{Op: "write"}, false},
		{Match{SameHost: &yes}, Match{}, false},
		{Match{SameHost: &yes}, Match{SameHost: &no}, false},
		{Match{SameHost: &yes}, Match{SameHost: &yes}, true},
		{Match{SameNode: &no}, Match{SameNode: &yes}, false},
		{Match{MinSize: 5}, Match{MinSize: 4}, false},
		{Match{MinSize: 5}, Match{MinSize: 5, MaxSize: 9}, true},
		{Match{MaxSize: 9}, Match{}, false},
		{Match{MaxSize: 9}, Match{MaxSize: 10}, false},
		{Match{MaxSize: 9}, Match{MinSize: 3, MaxSize: 9}, true},
	} {
		if got := test.m.covers(test.n); got != test.want {
			t.Errorf("%+v covers %+v: got %v", test.m, test.n, got)
		}
	}
}

func TestWarnings(t *testing.T) {
	if w := load(t, "").Warnings(); w != nil {
		t.Errorf("the defaults warn: %q", w)
	}
	c := load(t, `
tls: {insecure: true}
directory: {address: "10.0.0.1:7420"}
pool: {device: 0000:c1:00.0}
selection: {rules: [{match: {op: read}, allow: [tcp]}]}
backends: [{name: tcp, faults: "complete:drop"}, {name: shm}, {name: rdma, enabled: false, faults: "complete:drop"}]
`)
	want := []string{
		"tls.insecure: whoever reaches a port of this process reads and writes the pool",
		"node.listen: nodes on other hosts, which share the directory at 10.0.0.1:7420, cannot reach 127.0.0.1:7420",
		"pool.device: says nothing to a pool in the host's memory; set pool.memory: gpu",
		"selection.rules: a transfer that no rule matches is refused; a last rule without match would take them all",
		"backends[tcp].faults: faults are injected on purpose",
		"backends[shm]: no rule names it, so it carries nothing",
	}
	if diff := cmp.Diff(want, c.Warnings()); diff != "" {
		t.Error(diff)
	}
}

func TestCredentials(t *testing.T) {
	if c := load(t, "").TLS.Credentials(); c != nil {
		t.Errorf("credentials out of nowhere: %v", c)
	}
	c := load(t, "tls: {cert: a, key: b, ca: c}\nnode: {listen: '10.0.0.1:1'}").TLS.Credentials()
	if c == nil || c.CertFile != "a" || c.KeyFile != "b" || c.CAFile != "c" {
		t.Errorf("got %+v", c)
	}
}
