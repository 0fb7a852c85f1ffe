package backend

import (
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"time"
)

// OptionType says how the text of an option's value is read.
type OptionType string

// The types of options.
const (
	StringOption   OptionType = "string"
	BoolOption     OptionType = "bool"     // true or false
	IntOption      OptionType = "int"      // a whole number
	SizeOption     OptionType = "size"     // bytes, as ParseSize reads them: 64KiB
	DurationOption OptionType = "duration" // as time.ParseDuration reads it: 1.5s
)

// Option describes one option of a backend: enough to check a configuration, to print it, and to document it.
type Option struct {
	Name    string // lower-case words joined by _
	Type    OptionType
	Default string
	// Min and Max bound the value, in the same notation as Default. Empty means unbounded. Not for strings.
	Min, Max string
	// Choices lists the values allowed for a string option. Empty means any.
	Choices []string
	Help    string // one sentence
}

// Values holds a value for every option of a schema. Reading one under a name or a type that the schema does
// not have panics: the backend disagrees with itself.
type Values struct{ m map[string]any }

// String returns the value of a string option.
func (v Values) String(name string) string { return value[string](v, name) }

// Bool returns the value of a bool option.
func (v Values) Bool(name string) bool { return value[bool](v, name) }

// Int returns the value of an int option.
func (v Values) Int(name string) int { return int(value[int64](v, name)) }

// Size returns the value of a size option, in bytes.
func (v Values) Size(name string) uint64 { return uint64(value[Size](v, name)) }

// Duration returns the value of a duration option.
func (v Values) Duration(name string) time.Duration { return value[time.Duration](v, name) }

func value[T any](v Values, name string) T {
	x, ok := v.m[name].(T)
	if !ok {
		panic(fmt.Sprintf("backend: no option %q of this type in the schema", name))
	}
	return x
}

// CheckOptions reads raw, which maps names to texts, by the schema and fills in the defaults. The error names
// every fault: each unknown name with the nearest known one, each value that cannot be read or is out of range.
func CheckOptions(schema []Option, raw map[string]string) (Values, error) {
	v := Values{m: make(map[string]any, len(schema))}
	var faults []error
	names := make([]string, len(schema))
	for i, o := range schema {
		names[i] = o.Name
		text, given := raw[o.Name]
		if !given {
			text = o.Default
		}
		x, err := o.parse(text)
		if err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", o.Name, err))
			continue
		}
		v.m[o.Name] = x
	}
	for _, name := range slices.Sorted(maps.Keys(raw)) {
		if !slices.Contains(names, name) {
			faults = append(faults, fmt.Errorf("%s: unknown option%s", name, DidYouMean(name, names)))
		}
	}
	if err := errors.Join(faults...); err != nil {
		return Values{}, err
	}
	return v, nil
}

// Defaults returns the values of a schema where nothing is set. It panics where the schema does not allow its own
// defaults.
func Defaults(schema []Option) Values {
	v, err := CheckOptions(schema, nil)
	if err != nil {
		panic(fmt.Sprintf("backend: the schema does not allow its own defaults: %v", err))
	}
	return v
}

func (o Option) parse(text string) (any, error) {
	switch o.Type {
	case StringOption:
		if len(o.Choices) > 0 && !slices.Contains(o.Choices, text) {
			return nil, fmt.Errorf("%q is not one of %s", text, strings.Join(o.Choices, ", "))
		}
		return text, nil
	case BoolOption:
		switch text {
		case "true":
			return true, nil
		case "false":
			return false, nil
		}
		return nil, fmt.Errorf("%q is neither true nor false", text)
	case IntOption:
		return parseBounded(o, text, func(s string) (int64, error) { return strconv.ParseInt(s, 10, 64) })
	case SizeOption:
		return parseBounded(o, text, ParseSize)
	case DurationOption:
		return parseBounded(o, text, time.ParseDuration)
	}
	return nil, fmt.Errorf("option type %q does not exist", o.Type)
}

var examples = map[OptionType]string{IntOption: "8", SizeOption: "64KiB", DurationOption: "1.5s"}

func parseBounded[T int64 | Size | time.Duration](o Option, text string, parse func(string) (T, error)) (any, error) {
	x, err := parse(text)
	if err != nil {
		return nil, fmt.Errorf("%q is not a valid %s, such as %s", text, o.Type, examples[o.Type])
	}
	for _, bound := range []struct {
		text  string
		fails func(limit T) bool
		words string
	}{
		{o.Min, func(limit T) bool { return x < limit }, "less than the least allowed"},
		{o.Max, func(limit T) bool { return x > limit }, "more than the most allowed"},
	} {
		if bound.text == "" {
			continue
		}
		limit, err := parse(bound.text)
		if err != nil {
			return nil, fmt.Errorf("the schema's bound %q is not a valid %s", bound.text, o.Type)
		}
		if bound.fails(limit) {
			return nil, fmt.Errorf("%s is %s, %s", text, bound.words, bound.text)
		}
	}
	return x, nil
}

// Size is a number of bytes.
type Size uint64

var sizeUnits = []struct {
	name  string
	bytes uint64
}{
	{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
	{"TB", 1e12}, {"GB", 1e9}, {"MB", 1e6}, {"KB", 1e3}, {"kB", 1e3}, {"B", 1},
}

// ParseSize reads a whole number of bytes with an optional unit: 4096, 64KiB, 2 GiB, 1MB. A fraction is read
// where it comes out whole: 1.5KiB.
func ParseSize(text string) (Size, error) {
	number, unit := strings.TrimSpace(text), uint64(1)
	for _, u := range sizeUnits {
		if n, ok := strings.CutSuffix(number, u.name); ok {
			number, unit = strings.TrimSpace(n), u.bytes
			break
		}
	}
	// The arithmetic is exact: 1.005KB is 1005 bytes, and no digit of a long number is lost. What else big.Rat
	// reads, such as exponents, is no size.
	bytes, ok := new(big.Rat), strings.Trim(number, "0123456789.") == ""
	if ok {
		_, ok = bytes.SetString(number)
	}
	if !ok {
		return 0, fmt.Errorf("%q is not a size: write a number of bytes with a unit, such as 64KiB", text)
	}
	bytes.Mul(bytes, new(big.Rat).SetUint64(unit))
	switch {
	case !bytes.IsInt():
		return 0, fmt.Errorf("size %q is not a whole number of bytes", text)
	case !bytes.Num().IsUint64():
		return 0, fmt.Errorf("size %q is too large", text)
	}
	return Size(bytes.Num().Uint64()), nil
}

// String returns the size with the largest binary unit that keeps it whole: 64KiB.
func (s Size) String() string {
	for _, u := range sizeUnits[:4] {
		if s != 0 && uint64(s)%u.bytes == 0 {
			return strconv.FormatUint(uint64(s)/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatUint(uint64(s), 10) + "B"
}

// DidYouMean returns `, did you mean "x"?` for the known word nearest to the unknown one, or nothing when none
// is near. It is here so that every part of UMBP corrects its users in the same way.
func DidYouMean(unknown string, known []string) string {
	best, bestDistance := "", len(unknown)/4+2
	for _, k := range known {
		if d := editDistance(unknown, k); d < bestDistance {
			best, bestDistance = k, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(", did you mean %q?", best)
}

// editDistance is the optimal string alignment distance: insertions, deletions, substitutions and swaps of
// neighbours.
func editDistance(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(a); i++ {
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
