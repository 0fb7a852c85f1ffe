package config

import (
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// key is one row of the table of keys: a section, or a leaf, which has a value. Lists are leaves: they are
// replaced as a whole.
type key struct {
	name  string
	path  string // from the root, or from the element of the list that the key belongs to
	index []int  // of the field, in the struct at the root or in the element
	typ   reflect.Type

	def, min, max string
	choices       []string
	help          string
	live          bool

	children []*key // of a section, or of the elements of a list of structs
}

// root is the table: what the tags of Config say.
var root = keysOf(reflect.TypeFor[Config](), nil)

// leaves are the keys of the table that have a value, in the order of the struct; byPath finds them.
var (
	leaves = leavesOf(root)
	byPath = func() map[string]*key {
		m := make(map[string]*key, len(leaves))
		for _, k := range leaves {
			m[k.path] = k
		}
		return m
	}()
)

func keysOf(t reflect.Type, parent *key) []*key {
	var keys []*key
	for i := range t.NumField() {
		f := t.Field(i)
		if !f.IsExported() {
			continue
		}
		k := &key{
			name: f.Tag.Get("koanf"), path: f.Tag.Get("koanf"), index: []int{i}, typ: f.Type,
			def: f.Tag.Get("default"), min: f.Tag.Get("min"), max: f.Tag.Get("max"),
			help: f.Tag.Get("help"), live: f.Tag.Get("reload") == "live",
		}
		if c := f.Tag.Get("choices"); c != "" {
			k.choices = strings.Split(c, ",")
		}
		if parent != nil {
			k.path = parent.path + "." + k.name
			k.index = append(append([]int(nil), parent.index...), i)
		}
		switch {
		case k.section():
			k.children = keysOf(f.Type, k)
		case k.listOfStructs():
			k.children = keysOf(f.Type.Elem(), nil)
		}
		keys = append(keys, k)
	}
	return keys
}

func leavesOf(keys []*key) []*key {
	var all []*key
	for _, k := range keys {
		if k.section() {
			all = append(all, leavesOf(k.children)...)
		} else {
			all = append(all, k)
		}
	}
	return all
}

func (k *key) section() bool { return k.typ.Kind() == reflect.Struct }

func (k *key) listOfStructs() bool {
	return k.typ.Kind() == reflect.Slice && k.typ.Elem().Kind() == reflect.Struct
}

// env returns the name of the environment variable that sets the key.
func (k *key) env() string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(k.path, ".", "__"))
}

func find(keys []*key, name string) *key {
	for _, k := range keys {
		if k.name == name {
			return k
		}
	}
	return nil
}

var (
	stringType   = reflect.TypeFor[string]()
	boolType     = reflect.TypeFor[bool]()
	maybeType    = reflect.TypeFor[*bool]()
	intType      = reflect.TypeFor[int]()
	floatType    = reflect.TypeFor[float64]()
	sizeType     = reflect.TypeFor[backend.Size]()
	durationType = reflect.TypeFor[time.Duration]()
	namesType    = reflect.TypeFor[[]string]()
	optionsType  = reflect.TypeFor[map[string]string]()
)

// scalar tells whether a value of the key is one text.
func (k *key) scalar() bool {
	switch k.typ {
	case stringType, boolType, maybeType, intType, floatType, sizeType, durationType:
		return true
	}
	return false
}

// fileOnly tells whether neither the environment nor a flag can set the key: lists, and the version, which is a
// statement about the file.
func (k *key) fileOnly() bool { return !k.scalar() || k.path == "version" }

// kind says in words what a value of the leaf is.
func (k *key) kind() string {
	switch k.typ {
	case stringType:
		return "text"
	case boolType, maybeType:
		return "true or false"
	case intType:
		return "a whole number"
	case floatType:
		return "a number"
	case sizeType:
		return "a size such as 64KiB"
	case durationType:
		return "a duration such as 1.5s"
	}
	return "a list"
}

// parse reads the text of a scalar and checks its choices and bounds.
func (k *key) parse(text string) (reflect.Value, error) {
	switch k.typ {
	case stringType:
		if len(k.choices) > 0 && !slices.Contains(k.choices, text) {
			return reflect.Value{}, fmt.Errorf("%q is not one of %s", text, strings.Join(k.choices, ", "))
		}
		return reflect.ValueOf(text), nil
	case boolType, maybeType:
		if text != "true" && text != "false" {
			return reflect.Value{}, fmt.Errorf("%q is neither true nor false", text)
		}
		yes := text == "true"
		if k.typ == maybeType {
			return reflect.ValueOf(&yes), nil
		}
		return reflect.ValueOf(yes), nil
	case intType:
		return bounded(k, text, strconv.Atoi)
	case floatType:
		return bounded(k, text, func(s string) (float64, error) {
			x, err := strconv.ParseFloat(s, 64)
			if math.IsNaN(x) {
				err = strconv.ErrSyntax
			}
			return x, err
		})
	case sizeType:
		return bounded(k, text, backend.ParseSize)
	case durationType:
		return bounded(k, text, time.ParseDuration)
	}
	return reflect.Value{}, fmt.Errorf("%s is not one text but %s", k.path, k.kind())
}

func bounded[T int | float64 | backend.Size | time.Duration](
	k *key, text string, parse func(string) (T, error),
) (reflect.Value, error) {
	x, err := parse(text)
	if err != nil {
		return reflect.Value{}, fmt.Errorf("%q is not %s", text, k.kind())
	}
	if least, err := parse(k.min); err == nil && x < least {
		return reflect.Value{}, fmt.Errorf("%s is less than the least allowed, %s", text, k.min)
	}
	if most, err := parse(k.max); err == nil && x > most {
		return reflect.Value{}, fmt.Errorf("%s is more than the most allowed, %s", text, k.max)
	}
	return reflect.ValueOf(x), nil
}

// textOf renders a value as a file would have it.
func textOf(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case string:
		return x
	case *bool:
		return strconv.FormatBool(*x)
	case float64:
		return strconv.FormatFloat(x, 'g', -1, 64)
	case []string:
		if len(x) == 0 {
			return ""
		}
		return "[" + strings.Join(x, ", ") + "]"
	default: // bool, int, Size and Duration
		return fmt.Sprint(x)
	}
}

// flow renders the fields of a struct that are not zero, in YAML's flow style: {match: {op: read}, prefer: [shm]}.
func flow(keys []*key, v reflect.Value) string {
	var parts []string
	for _, k := range keys {
		f := v.FieldByIndex(k.index)
		switch {
		case f.IsZero():
		case k.section():
			parts = append(parts, k.name+": "+flow(k.children, v))
		default:
			parts = append(parts, k.name+": "+textOf(f))
		}
	}
	return "{" + strings.Join(parts, ", ") + "}"
}
