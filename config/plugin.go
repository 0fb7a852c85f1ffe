package config

import (
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// known is what is known of backends beyond what is written in the configuration.
type known struct {
	linked map[string][]backend.Option // the options of those that are linked in, by name
	asked  map[string]answer           // what the plugins of others have said, by name
}

// answer is what a plugin says about its options, or why it says nothing.
type answer struct {
	schema []backend.Option
	err    error
}

// Schema returns the options of a backend that is linked in, or that Load has asked for.
func (c *Config) Schema(name string) (options []backend.Option, known bool) {
	if a, asked := c.known.asked[name]; asked {
		return a.schema, true
	}
	options, known = c.known.linked[name]
	return options, known
}

// Mode returns how a backend of this configuration runs: InProcess or AsProcess.
func (c *Config) Mode(b *Backend) string {
	_, linked := c.known.linked[b.Name]
	switch {
	case b.Mode != "":
		return b.Mode
	case !linked:
		return AsProcess
	}
	return c.Plugins.Mode
}

// askPlugins asks the plugins of enabled backends for their options, where these are not known: those of backends
// that are not linked in, and those that the configuration names. A backend that is not soundly described is left
// alone; check tells why.
func (c *Config) askPlugins(describe func(Plugins, Backend) ([]backend.Option, error)) {
	c.known.asked = make(map[string]answer)
	if describe == nil {
		return
	}
	for i := range c.Backends {
		b := &c.Backends[i]
		_, linked := c.known.linked[b.Name]
		_, twice := c.known.asked[b.Name]
		if b.Enabled && c.Mode(b) == AsProcess && (!linked || b.Plugin != "") && !twice && validName(b.Name) && b.validPlugin() {
			schema, err := describe(c.Plugins, *b)
			c.known.asked[b.Name] = answer{schema, err}
		}
	}
}

func (b *Backend) validPlugin() bool {
	return (b.SHA256 == "" || validSHA256(b.SHA256)) &&
		!slices.ContainsFunc(b.Env, func(name string) bool { return !validVariable(name) })
}

func validSHA256(sum string) bool {
	_, err := hex.DecodeString(sum)
	return err == nil && len(sum) == 64
}

func validVariable(name string) bool { return name != "" && !strings.ContainsAny(name, "=\x00") }

// plugin checks where a backend comes from, and its options by what that says.
func (c *checker) plugin(at string, b *Backend) {
	if b.SHA256 != "" && !validSHA256(b.SHA256) {
		c.fault(at+".sha256", "%q is not a checksum: write 64 hex digits", b.SHA256)
	}
	for i, name := range b.Env {
		if !validVariable(name) {
			c.fault(fmt.Sprintf("%s.env[%d]", at, i), "%q is not the name of a variable", name)
		}
	}
	schema, linked := c.known.linked[b.Name]
	answer, asked := c.known.asked[b.Name]
	hint := ""
	if !linked {
		hint = backend.DidYouMean(b.Name, slices.Sorted(maps.Keys(c.known.linked)))
	}
	switch {
	case asked && answer.err != nil:
		c.fault(at, "its plugin does not say which options it has: %v%s", answer.err, hint)
	case asked:
		c.options(at+".options", answer.schema, b)
	case linked:
		c.options(at+".options", schema, b)
	case b.Mode == InProcess:
		c.fault(at+".mode", "%s is not linked in, and can only run as a process%s", b.Name, hint)
	case b.Enabled && b.validPlugin(): // and there is no plugin to ask
		c.fault(at, "unknown backend%s", hint)
	}
}

func (c *checker) options(at string, schema []backend.Option, b *Backend) {
	_, err := backend.CheckOptions(schema, b.Options)
	if err == nil {
		return
	}
	// CheckOptions joins one error for each fault, which begins with the name of the option.
	for _, err := range err.(interface{ Unwrap() []error }).Unwrap() {
		name, text, _ := strings.Cut(err.Error(), ": ")
		c.fault(at+"."+name, "%s", text)
	}
}
