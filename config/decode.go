package config

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// decoder turns what a file holds into typed values, by the table of keys. It goes on after a fault, so that all
// are found.
type decoder struct {
	origin string
	faults *Faults
}

func (d *decoder) fault(path, format string, args ...any) {
	d.faults.add(path, d.origin, format, args...)
}

// section decodes raw, which ought to be a map of the keys, and calls put for each leaf that it holds.
func (d *decoder) section(keys []*key, raw any, path string, put func(k *key, v reflect.Value)) {
	m, ok := raw.(map[string]any)
	switch {
	case raw == nil: // a section all of whose lines are commented out
		return
	case !ok:
		d.fault(path, "expected a section, not %s", describe(raw))
		return
	}
	for _, name := range slices.Sorted(maps.Keys(m)) {
		at := name
		if path != "" {
			at = path + "." + name
		}
		k := find(keys, name)
		switch {
		case k == nil:
			d.fault(at, "unknown key%s", nearest(keys, at, name))
		case k.section():
			d.section(k.children, m[name], at, put)
		default:
			if v, ok := d.leaf(k, m[name], at); ok {
				put(k, v)
			}
		}
	}
}

// nearest names the key that was probably meant by name: one of the same name elsewhere, or one of keys that is
// spelled much like it.
func nearest(keys []*key, path, name string) string {
	var same []*key
	for _, k := range leaves {
		if k.name == name && !strings.Contains(path, "[") {
			same = append(same, k)
		}
	}
	if len(same) == 1 {
		return fmt.Sprintf(", did you mean %q?", same[0].path)
	}
	names := make([]string, len(keys))
	for i, k := range keys {
		names[i] = k.name
	}
	return backend.DidYouMean(name, names)
}

func (d *decoder) leaf(k *key, raw any, path string) (reflect.Value, bool) {
	if raw == nil && k.typ == optionsType { // as an empty section
		return reflect.Value{}, false
	}
	if raw == nil {
		d.fault(path, "has no value: give it %s, or delete the line", k.kind())
		return reflect.Value{}, false
	}
	switch {
	case k.typ == optionsType:
		return d.options(k, raw, path)
	case k.scalar():
		return d.scalar(k, raw, path)
	}
	list, ok := raw.([]any)
	if !ok {
		d.fault(path, "expected a list, not %s", describe(raw))
		return reflect.Value{}, false
	}
	if !d.fits(k, len(list), path) {
		return reflect.Value{}, false
	}
	values := reflect.MakeSlice(k.typ, 0, len(list))
	for i, element := range list {
		at := elementPath(path, i, element)
		if k.typ == namesType {
			if name, ok := element.(string); ok {
				values = reflect.Append(values, reflect.ValueOf(name))
			} else {
				d.fault(at, "expected text, not %s", describe(element))
			}
		} else {
			values = reflect.Append(values, d.element(k, element, at))
		}
	}
	return values, true
}

// fits checks the number of elements, which max bounds.
func (d *decoder) fits(k *key, n int, path string) bool {
	most, err := strconv.Atoi(k.max)
	if err == nil && n > most {
		d.fault(path, "has %d elements, more than the most allowed, %d", n, most)
		return false
	}
	return true
}

// element decodes one struct of a list. Keys that it lacks get their defaults. What is no struct is a fault and
// yields a zero one, so that the elements keep their numbers.
func (d *decoder) element(k *key, raw any, path string) reflect.Value {
	v := reflect.New(k.typ.Elem()).Elem()
	if _, ok := raw.(map[string]any); !ok {
		d.fault(path, "expected a map, not %s", describe(raw))
		return v
	}
	for _, child := range leavesOf(k.children) {
		if child.def != "" {
			x, err := child.parse(child.def)
			if err != nil {
				panic(fmt.Sprintf("config: default of %s: %v", child.path, err))
			}
			v.FieldByIndex(child.index).Set(x)
		}
	}
	d.section(k.children, raw, path, func(child *key, x reflect.Value) { v.FieldByIndex(child.index).Set(x) })
	return v
}

// elementPath names an element of a list by its name where it has one, and else by its number.
func elementPath(list string, i int, element any) string {
	if m, ok := element.(map[string]any); ok {
		if name, ok := m["name"].(string); ok && validName(name) {
			return fmt.Sprintf("%s[%s]", list, name)
		}
	}
	return fmt.Sprintf("%s[%d]", list, i)
}

// options decodes the options of a backend to their texts. What they mean is for the backend's schema to say.
func (d *decoder) options(k *key, raw any, path string) (reflect.Value, bool) {
	m, ok := raw.(map[string]any)
	if !ok {
		d.fault(path, "expected a map, not %s", describe(raw))
		return reflect.Value{}, false
	}
	if !d.fits(k, len(m), path) {
		return reflect.Value{}, false
	}
	texts := make(map[string]string, len(m))
	for _, name := range slices.Sorted(maps.Keys(m)) {
		text, kind := scalarText(m[name])
		_, rounded := m[name].(float64)
		switch {
		case kind == notScalar:
			d.fault(path+"."+name, "expected one value, not %s", describe(m[name]))
		case rounded:
			d.fault(path+"."+name, "a number with a fraction must be in quotes, to be passed on as it is written")
		default:
			texts[name] = text
		}
	}
	return reflect.ValueOf(texts), true
}

// scalar decodes one value. A number is no text and a text is no number: only sizes are written both ways.
func (d *decoder) scalar(k *key, raw any, path string) (reflect.Value, bool) {
	text, kind := scalarText(raw)
	ok := false
	switch k.typ {
	case stringType, durationType:
		ok = kind == textScalar
	case boolType, maybeType:
		ok = kind == boolScalar
	case intType, floatType:
		ok = kind == numberScalar
	case sizeType:
		ok = kind == textScalar || kind == numberScalar
	}
	if !ok {
		d.fault(path, "expected %s, not %s", k.kind(), describe(raw))
		return reflect.Value{}, false
	}
	v, err := k.parse(text)
	if err != nil {
		d.fault(path, "%v", err)
		return reflect.Value{}, false
	}
	return v, true
}

type scalarKind int

const (
	notScalar scalarKind = iota
	textScalar
	boolScalar
	numberScalar
)

func scalarText(raw any) (string, scalarKind) {
	switch x := raw.(type) {
	case string:
		return x, textScalar
	case bool:
		return strconv.FormatBool(x), boolScalar
	case json.Number:
		return x.String(), numberScalar
	case int64:
		return strconv.FormatInt(x, 10), numberScalar
	case float64:
		return strconv.FormatFloat(x, 'g', -1, 64), numberScalar
	}
	return "", notScalar
}

// describe says in words what a file holds.
func describe(raw any) string {
	text, kind := scalarText(raw)
	switch kind {
	case textScalar:
		return fmt.Sprintf("the text %q", text)
	case boolScalar:
		return text
	case numberScalar:
		return "the number " + text
	}
	switch raw.(type) {
	case nil:
		return "nothing"
	case []any:
		return "a list"
	case map[string]any:
		return "a map"
	}
	return "a date or time"
}
