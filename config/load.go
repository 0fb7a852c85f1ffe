package config

import (
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/knadh/koanf/providers/confmap"
	"github.com/knadh/koanf/v2"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Source is what a configuration is built from.
type Source struct {
	// File is the path of the configuration file; empty for none.
	File string
	// Env holds the environment as os.Environ returns it. Only variables that begin with UMBP_ are looked at.
	Env []string
	// Flags maps paths of keys to the texts that the command line gives them: those of the flags that were given,
	// and no others, for a flag's default must not override the file. ChangedFlags returns them.
	Flags map[string]string
	// Schemas holds the options of every backend that is linked into the process, by name.
	Schemas map[string][]backend.Option
	// Describe asks the plugin of a backend for its options, where Schemas does not have them or the configuration
	// names the plugin. It is called once for each such backend that is enabled, and takes its own time limit. Without
	// it, a backend that is not linked in is unknown.
	Describe func(Plugins, Backend) ([]backend.Option, error)
}

// Load builds a configuration. The error is of type Faults and names everything that is wrong.
func Load(s Source) (*Config, error) {
	if s.File == "" {
		return build(s, nil, nil)
	}
	data, err := readFile(s.File)
	return build(s, data, err)
}

// build is Load after the file has been read, or could not be read.
func build(s Source, data []byte, readErr error) (*Config, error) {
	var faults Faults
	merged := koanf.New(".")
	origins := make(map[string]string, len(leaves))
	overlay := func(l layer) {
		if err := merged.Load(confmap.Provider(l.values, "."), nil); err != nil {
			faults.add("", "", "%v", err)
		}
		maps.Copy(origins, l.origins)
	}

	overlay(defaults())
	if s.File != "" {
		overlay(fileLayer(s.File, data, readErr, &faults))
	}
	overlay(envLayer(s.Env, &faults))
	overlay(flagLayer(s.Flags, &faults))

	c := &Config{origins: origins, known: known{linked: s.Schemas}}
	if err := merged.Unmarshal("", c); err != nil {
		faults.add("", "", "%v", err)
	}
	c.askPlugins(s.Describe)
	c.check(&faults)
	if err := faults.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// layer is what one source sets: typed values by path, and the origin of each. The values are converted before
// koanf merges them, so that every layer has the same types and a fault is told of the layer that has it.
type layer struct {
	values  map[string]any
	origins map[string]string
}

func newLayer() layer { return layer{values: map[string]any{}, origins: map[string]string{}} }

func (l layer) set(k *key, v reflect.Value, origin string) {
	l.values[k.path], l.origins[k.path] = v.Interface(), origin
}

// defaultOrigin is the origin of values that nothing sets.
const defaultOrigin = "default"

// defaults is the lowest layer. It is read from the default file, so that the two cannot differ.
var defaults = sync.OnceValue(func() layer {
	var faults Faults
	l := fileLayer("default.yaml", []byte(DefaultYAML()), nil, &faults)
	if err := faults.err(); err != nil {
		panic(err)
	}
	for path := range l.origins {
		l.origins[path] = defaultOrigin
	}
	return l
})

func fileLayer(path string, data []byte, readErr error, faults *Faults) layer {
	l, origin := newLayer(), "file:"+path
	raw, err := map[string]any(nil), readErr
	if err == nil {
		raw, err = parseFile(path, data)
	}
	if err != nil {
		faults.add("", origin, "%v", err)
		return l
	}
	d := decoder{origin: origin, faults: faults}
	d.section(root, raw, "", func(k *key, v reflect.Value) { l.set(k, v, origin) })
	return l
}

const envPrefix = "UMBP_"

// serviceLink matches the variables that Kubernetes and Docker set in every container for a service whose name
// begins with "umbp". They are not meant for us.
var serviceLink = regexp.MustCompile(
	`^UMBP(_[A-Z0-9]+)*_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9]+)*|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$`)

// reserved tells whether a variable belongs to others: the path of the file is read by the commands, container
// images like to keep the release in UMBP_VERSION, and tests have a space of their own.
func reserved(name string) bool {
	return name == "UMBP_CONFIG" || name == "UMBP_VERSION" || strings.HasPrefix(name, "UMBP_TEST_") ||
		serviceLink.MatchString(name)
}

func envLayer(env []string, faults *Faults) layer {
	l := newLayer()
	known := make(map[string]*key, len(leaves))
	for _, k := range leaves {
		known[k.env()] = k
	}
	for _, pair := range env {
		name, text, _ := strings.Cut(pair, "=")
		if !strings.HasPrefix(name, envPrefix) || reserved(name) {
			continue
		}
		origin := "env " + name
		if k := known[name]; k != nil {
			l.setText(k, text, origin, faults)
			continue
		}
		faults.add("", origin, "unknown variable%s", nearestEnv(name, known))
	}
	return l
}

// nearestEnv names the variable that was probably meant. The prefix that all share is left out of the comparison,
// or else any two would seem near.
func nearestEnv(name string, known map[string]*key) string {
	for _, k := range leaves {
		switch {
		case strings.HasPrefix(k.env(), name+"__"):
			return fmt.Sprintf(": it names a section, and not a key in it such as %s", k.env())
		case k.listOfStructs() && strings.HasPrefix(name, k.env()+"__"):
			return fmt.Sprintf(": %s is set in the file only", k.path)
		}
	}
	words := make([]string, 0, len(known))
	for n := range maps.Keys(known) {
		words = append(words, strings.TrimPrefix(n, envPrefix))
	}
	slices.Sort(words)
	hint := backend.DidYouMean(strings.TrimPrefix(name, envPrefix), words)
	return strings.Replace(hint, `"`, `"`+envPrefix, 1)
}

func flagLayer(flags map[string]string, faults *Faults) layer {
	l := newLayer()
	for _, path := range slices.Sorted(maps.Keys(flags)) {
		if k := byPath[path]; k != nil {
			l.setText(k, flags[path], "flag --"+path, faults)
			continue
		}
		faults.add(path, "flag --"+path, "unknown key%s", backend.DidYouMean(path, slices.Sorted(maps.Keys(byPath))))
	}
	return l
}

// setText sets a key from a text, as the environment and the command line have them.
func (l layer) setText(k *key, text, origin string, faults *Faults) {
	if k.fileOnly() {
		faults.add(k.path, origin, "is set in the file only")
		return
	}
	v, err := k.parse(text)
	if err != nil {
		faults.add(k.path, origin, "%v", err)
		return
	}
	l.set(k, v, origin)
}

// Entry is one value of a configuration, with all that is known about it.
type Entry struct {
	Path    string // pool.page_size, backends[tcp].options.window
	Value   string // as a file would have it
	Origin  string // default, file:PATH, env NAME or flag --NAME
	Default string
	Help    string // one sentence
	Reload  string // live or restart: whether a running process takes a new value
}

// The values of Entry.Reload.
const (
	Live    = "live"
	Restart = "restart"
)

// Entries lists every value, in the order of the table. A list has one entry for each of its rules, and for each
// value of its backends, including the options that nobody set.
func (c *Config) Entries() []Entry {
	var all []Entry
	defaultRules := defaults().values["selection.rules"].([]Rule)
	for _, k := range leaves {
		e := Entry{Path: k.path, Origin: c.origins[k.path], Default: k.def, Help: k.help, Reload: Restart}
		if k.live {
			e.Reload = Live
		}
		v := reflect.ValueOf(c).Elem().FieldByIndex(k.index)
		switch {
		case k.scalar():
			e.Value = textOf(v)
			all = append(all, e)
		case v.Len() == 0:
			e.Value, e.Default = "[]", ""
			all = append(all, e)
		case k.path == "selection.rules":
			for i, r := range c.Selection.Rules {
				e.Path, e.Value, e.Default = fmt.Sprintf("%s[%d]", k.path, i), flow(k.children, reflect.ValueOf(r)), ""
				if i < len(defaultRules) {
					e.Default = flow(k.children, reflect.ValueOf(defaultRules[i]))
				}
				all = append(all, e)
			}
		default:
			for i := range c.Backends {
				all = append(all, c.backendEntries(k, &c.Backends[i], e)...)
			}
		}
	}
	return all
}

// backendEntries lists the values of one backend; e is what they have in common.
func (c *Config) backendEntries(k *key, b *Backend, e Entry) []Entry {
	var all []Entry
	at, listed := fmt.Sprintf("%s[%s].", k.path, b.Name), e.Origin
	for _, child := range k.children {
		if child.typ == optionsType || child.name == "name" {
			continue
		}
		e.Path, e.Value = at+child.name, textOf(reflect.ValueOf(*b).FieldByIndex(child.index))
		e.Default, e.Help = child.def, child.help
		all = append(all, e)
	}
	schema, _ := c.Schema(b.Name)
	for _, o := range schema {
		e.Path, e.Value, e.Origin, e.Default, e.Help = at+"options."+o.Name, o.Default, defaultOrigin, o.Default, o.Help
		if text, given := b.Options[o.Name]; given {
			e.Value, e.Origin = text, listed
		}
		all = append(all, e)
	}
	return all
}

// Origin says where the value at the path of an Entry comes from. It is empty for a path that does not exist.
func (c *Config) Origin(path string) string {
	for _, e := range c.Entries() {
		if e.Path == path {
			return e.Origin
		}
	}
	return c.origins[path] // a list as a whole
}
