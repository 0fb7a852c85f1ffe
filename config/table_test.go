package config

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spf13/pflag"
)

// allKeys calls f for every key, sections and the keys within lists included.
func allKeys(keys []*key, f func(*key)) {
	for _, k := range keys {
		f(k)
		allKeys(k.children, f)
	}
}

func TestTableIsComplete(t *testing.T) {
	allKeys(root, func(k *key) {
		switch {
		case k.name == "" || strings.Trim(k.name, "abcdefghijklmnopqrstuvwxyz0123456789_") != "" || strings.Contains(k.name, "__"):
			t.Errorf("%q: a key is lower-case words joined by one _", k.path)
		case k.help == "" || !strings.HasSuffix(k.help, "."):
			t.Errorf("%s: its help is no sentence: %q", k.path, k.help)
		case k.section() && (k.live || k.def != ""):
			t.Errorf("%s: a section has no value", k.path)
		}
	})
	for _, k := range leaves {
		if !k.scalar() {
			continue
		}
		v, err := k.parse(k.def)
		if err != nil {
			t.Errorf("%s: %v", k.path, err)
		} else if text := textOf(v); text != k.def {
			t.Errorf("%s: its default is written %s, and would be printed as %s", k.path, k.def, text)
		}
	}
}

func TestDefaultYAML(t *testing.T) {
	golden(t, "default.yaml", DefaultYAML())

	file := write(t, "umbp.yaml", DefaultYAML())
	fromFile, err := Load(Source{File: file, Schemas: schemas})
	if err != nil {
		t.Fatal(err)
	}
	fromNothing, err := Load(Source{Schemas: schemas})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(fromNothing, fromFile, cmpopts.IgnoreUnexported(Config{})); diff != "" {
		t.Error(diff)
	}
	for _, k := range leaves {
		if fromFile.origins[k.path] != "file:"+file {
			t.Errorf("the default file does not set %s", k.path)
		}
		if v := reflect.ValueOf(fromNothing).Elem().FieldByIndex(k.index); k.scalar() && textOf(v) != k.def {
			t.Errorf("%s is %s without a file, and its default is %s", k.path, textOf(v), k.def)
		}
	}
}

func TestEntries(t *testing.T) {
	c := load(t, `
pool: {page_size: 131072}
backends: [{name: tcp, options: {window: 5}}, {name: shm}]
selection: {rules: [{match: {same_host: true, min_size: 1MiB}, prefer: [shm, tcp]}, {require: [tcp]}]}
`, "UMBP_CLIENT__TIMEOUT=90s")
	c.origins["pool.page_size"] = "file:umbp.yaml"
	for _, list := range []string{"backends", "selection.rules"} {
		c.origins[list] = "file:umbp.yaml"
	}
	var b bytes.Buffer
	for _, e := range c.Entries() {
		for _, s := range []string{e.Path, e.Value, e.Origin, e.Default, e.Reload} {
			b.WriteString(s + " | ")
		}
		b.WriteString(e.Help + "\n")
		if got := c.Origin(e.Path); got != e.Origin {
			t.Errorf("origin of %s is %q and in the entry %q", e.Path, got, e.Origin)
		}
	}
	golden(t, "entries.txt", b.String())
	if got := c.Origin("pool.pagesize"); got != "" {
		t.Errorf("a path that does not exist comes from %q", got)
	}

	empty := load(t, "backends: []\nselection: {rules: []}")
	values := map[string]string{}
	for _, e := range empty.Entries() {
		values[e.Path] = e.Value
	}
	if values["backends"] != "[]" || values["selection.rules"] != "[]" {
		t.Errorf("empty lists are not shown: %v", values)
	}
}

func TestFlags(t *testing.T) {
	set := pflag.NewFlagSet("umbp", pflag.ContinueOnError)
	set.String("config", "", "not one of ours")
	AddFlags(set)
	golden(t, "flags.txt", set.FlagUsages())
	if err := set.Parse([]string{"--config=x", "--pool.size", "2GiB", "--directory.only", "--client.attempts=2"}); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"pool.size": "2GiB", "directory.only": "true", "client.attempts": "2"}
	got := ChangedFlags(set)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
	c, err := Load(Source{
		File:    write(t, "umbp.yaml", "pool: {size: 4GiB, page_size: 128KiB}\nclient: {attempts: 5}"),
		Flags:   got,
		Schemas: schemas,
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.Pool.Size != 2<<30 || c.Client.Attempts != 2 || !c.Directory.Only {
		t.Errorf("flags that were given do not override the file: %+v", c)
	}
	if c.Pool.PageSize != 128<<10 {
		t.Errorf("a flag that was not given overrides the file: %v", c.Pool.PageSize)
	}

	set = pflag.NewFlagSet("umbp", pflag.ContinueOnError)
	AddFlags(set, "pool.size", "log.level")
	n := 0
	set.VisitAll(func(*pflag.Flag) { n++ })
	if n != 2 || set.Lookup("pool.size") == nil || set.Lookup("log.level") == nil {
		t.Errorf("%d flags for two paths", n)
	}
	for _, path := range []string{"pool.sise", "backends", "pool", "version"} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("a flag was made for %s", path)
				}
			}()
			AddFlags(pflag.NewFlagSet("umbp", pflag.ContinueOnError), path)
		}()
	}
}

// FuzzLoad feeds files to Load: each ends in a fault or in a configuration that is valid.
func FuzzLoad(f *testing.F) {
	extensions := []string{".yaml", ".json", ".toml"}
	for i, seed := range []string{
		DefaultYAML(), "pool: {size: 1GiB}", "pool: {size: {a: 1}}", "a: &a [*a]", "<<: {}", "? [a]\n: b", "--- \n---\n", "\xff",
		`{"pool": {"size": 1e3}, "backends": [{"name": "tcp", "options": {"window": 5}}]}`, `{"a": [[[[`, "null",
		"[pool]\nsize = 5\n[[backends]]\nname = 'tcp'\n[backends.options]\nwindow = 3", "a = 1979-05-27T07:32:00Z", "a.b = inf",
	} {
		f.Add(uint8(i), []byte(seed))
		f.Add(uint8(i+1), []byte(seed))
		f.Add(uint8(i+2), []byte(seed))
	}
	f.Fuzz(func(t *testing.T, ext uint8, data []byte) {
		s := Source{File: "umbp" + extensions[int(ext)%len(extensions)], Schemas: schemas}
		c, err := build(s, data, nil)
		if err != nil {
			if list, ok := err.(Faults); !ok || len(list) == 0 {
				t.Fatalf("refused without a fault: %v", err)
			}
			_ = err.Error()
			return
		}
		var again Faults
		c.check(&again)
		if len(again) > 0 || len(c.Entries()) < len(leaves)-2 {
			t.Fatalf("accepted, and not valid: %v", again)
		}
	})
}
