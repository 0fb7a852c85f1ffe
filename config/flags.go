package config

import (
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

// AddFlags defines flags named after the keys at the paths given, such as --pool.size, and without paths one for
// every key but version and the lists, which are set in the file only. It panics on any other path.
func AddFlags(set *pflag.FlagSet, paths ...string) {
	for _, k := range leaves {
		if k.fileOnly() || len(paths) > 0 && !slices.Contains(paths, k.path) {
			continue
		}
		f := set.VarPF(&flagValue{text: k.def, typ: flagType(k)}, k.path, "", flagUsage(k))
		if k.typ == boolType {
			f.NoOptDefVal = "true" // --directory.only, without a value
		}
	}
	for _, path := range paths {
		if k := byPath[path]; k == nil || k.fileOnly() {
			panic("config: no flag can be made for " + path)
		}
	}
}

// ChangedFlags returns the flags of AddFlags that the command line gave, for Source.Flags. A flag that was not
// given overrides nothing, whatever its default is.
func ChangedFlags(set *pflag.FlagSet) map[string]string {
	changed := map[string]string{}
	set.Visit(func(f *pflag.Flag) {
		if v, ok := f.Value.(*flagValue); ok {
			changed[f.Name] = v.text
		}
	})
	return changed
}

// flagValue holds the text of a flag, which Load reads later, together with all else.
type flagValue struct{ text, typ string }

func (f *flagValue) String() string     { return f.text }
func (f *flagValue) Set(s string) error { f.text = s; return nil }
func (f *flagValue) Type() string       { return f.typ }

// flagType is the word that stands for the value in the usage.
func flagType(k *key) string {
	switch {
	case len(k.choices) > 0:
		return strings.Join(k.choices, "|")
	case k.typ == sizeType:
		return "size"
	case k.typ == durationType:
		return "duration"
	}
	return k.typ.Name() // string, bool, int, float64
}

// flagUsage is the help of a key in the manner of a usage: lower case, no full stop.
func flagUsage(k *key) string {
	return strings.ToLower(k.help[:1]) + strings.TrimSuffix(k.help[1:], ".")
}
