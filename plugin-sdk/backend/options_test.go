package backend_test

import (
	"math"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

var schema = []backend.Option{
	{Name: "mode", Type: backend.StringOption, Default: "fast", Choices: []string{"fast", "safe"}},
	{Name: "label", Type: backend.StringOption},
	{Name: "checked", Type: backend.BoolOption, Default: "false"},
	{Name: "workers", Type: backend.IntOption, Default: "4", Min: "1", Max: "64"},
	{Name: "offset", Type: backend.IntOption, Default: "0"},
	{Name: "chunk", Type: backend.SizeOption, Default: "64KiB", Min: "4KiB", Max: "1GiB"},
	{Name: "patience", Type: backend.DurationOption, Default: "1.5s", Min: "1ms"},
}

func TestCheckOptionsDefaults(t *testing.T) {
	v, err := backend.CheckOptions(schema, nil)
	if err != nil {
		t.Fatal(err)
	}
	if v.String("mode") != "fast" || v.String("label") != "" || v.Bool("checked") || v.Int("workers") != 4 ||
		v.Int("offset") != 0 || v.Size("chunk") != 65536 || v.Duration("patience") != 1500*time.Millisecond {
		t.Errorf("the defaults are not those of the schema: %+v", v)
	}
}

func TestCheckOptionsGiven(t *testing.T) {
	v, err := backend.CheckOptions(schema, map[string]string{
		"mode": "safe", "label": "any text: at all", "checked": "true", "workers": "64", "offset": "-7",
		"chunk": "4096", "patience": "1h",
	})
	if err != nil {
		t.Fatal(err)
	}
	if v.String("mode") != "safe" || v.String("label") != "any text: at all" || !v.Bool("checked") ||
		v.Int("workers") != 64 || v.Int("offset") != -7 || v.Size("chunk") != 4096 || v.Duration("patience") != time.Hour {
		t.Errorf("the values are not those given: %+v", v)
	}
}

func TestCheckOptionsRefuses(t *testing.T) {
	for _, c := range []struct{ name, value, want string }{
		{"mode", "slow", `mode: "slow" is not one of fast, safe`},
		{"mode", "", `mode: "" is not one of fast, safe`},
		{"checked", "yes", `checked: "yes" is neither true nor false`},
		{"checked", "True", `checked: "True" is neither true nor false`},
		{"workers", "many", `workers: "many" is not a valid int, such as 8`},
		{"workers", "4.0", `workers: "4.0" is not a valid int, such as 8`},
		{"workers", "99999999999999999999", `workers: "99999999999999999999" is not a valid int, such as 8`},
		{"workers", "0", `workers: 0 is less than the least allowed, 1`},
		{"workers", "65", `workers: 65 is more than the most allowed, 64`},
		{"chunk", "big", `chunk: "big" is not a valid size, such as 64KiB`},
		{"chunk", "4095", `chunk: 4095 is less than the least allowed, 4KiB`},
		{"chunk", "1025MiB", `chunk: 1025MiB is more than the most allowed, 1GiB`},
		{"patience", "5", `patience: "5" is not a valid duration, such as 1.5s`},
		{"patience", "999us", `patience: 999us is less than the least allowed, 1ms`},
		{"wrokers", "4", `wrokers: unknown option, did you mean "workers"?`},
		{"colour", "red", `colour: unknown option`},
	} {
		_, err := backend.CheckOptions(schema, map[string]string{c.name: c.value})
		if err == nil {
			t.Errorf("%s = %q is accepted", c.name, c.value)
		} else if err.Error() != c.want {
			t.Errorf("%s = %q:\n got %v\nwant %s", c.name, c.value, err, c.want)
		}
	}
}

// TestCheckOptionsNamesEveryFault: whoever mends a configuration mends it once.
func TestCheckOptionsNamesEveryFault(t *testing.T) {
	_, err := backend.CheckOptions(schema, map[string]string{
		"workers": "0", "chunk": "x", "pateince": "1s", "checked": "true", "aaa": "",
	})
	want := strings.Join([]string{
		`workers: 0 is less than the least allowed, 1`,
		`chunk: "x" is not a valid size, such as 64KiB`,
		`aaa: unknown option`,
		`pateince: unknown option, did you mean "patience"?`,
	}, "\n")
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

func TestCheckOptionsBadSchema(t *testing.T) {
	for _, c := range []struct {
		option backend.Option
		want   string
	}{
		{backend.Option{Name: "a", Type: "colour"}, `a: option type "colour" does not exist`},
		{backend.Option{Name: "a", Type: backend.IntOption, Default: "1", Min: "one"}, `a: the schema's bound "one" is not a valid int`},
		{backend.Option{Name: "a", Type: backend.IntOption}, `a: "" is not a valid int, such as 8`},
	} {
		_, err := backend.CheckOptions([]backend.Option{c.option}, nil)
		if err == nil || err.Error() != c.want {
			t.Errorf("%+v: got %v, want %s", c.option, err, c.want)
		}
	}
}

func TestValuesPanic(t *testing.T) {
	v, err := backend.CheckOptions(schema, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, read := range map[string]func(){
		"an unknown name":    func() { v.Int("worker") },
		"another type":       func() { v.Int("chunk") },
		"of no schema":       func() { backend.Values{}.String("mode") },
		"a number as a text": func() { _ = v.String("workers") },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("reading %s does not panic", name)
				}
			}()
			read()
		}()
	}
}

func TestParseSize(t *testing.T) {
	for text, want := range map[string]backend.Size{
		"0": 0, "1": 1, "4096": 4096, "64KiB": 65536, "2 GiB": 2 << 30, "1MB": 1e6, "3kB": 3000, "3KB": 3000, "7B": 7,
		"1.5KiB": 1536, ".5KiB": 512, "0.000001MB": 1, "1.005KB": 1005, " 8 ": 8, "1TB": 1e12, "1TiB": 1 << 40, "2GB": 2e9,
		"18446744073709551615": math.MaxUint64, "16777215TiB": 16777215 << 40,
		"9007199254740993.0": 9007199254740993, "9223372036854775808.0": 1 << 63,
	} {
		if got, err := backend.ParseSize(text); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v, want %d", text, got, err, want)
		}
	}
	for text, want := range map[string]string{
		"": "is not a size", "KiB": "is not a size", "x": "is not a size", "-1": "is not a size", "-0": "is not a size",
		"+5": "is not a size", "1e3": "is not a size", "0x10": "is not a size", "1_000": "is not a size", "1/2KiB": "is not a size",
		"NaN": "is not a size", "Inf": "is not a size", ".": "is not a size", "1.2.3": "is not a size", "1KiB KiB": "is not a size",
		"64kib": "is not a size", "1 2": "is not a size",
		"1.5": "is not a whole number", "0.0001KB": "is not a whole number", "1.0000000000000000001KiB": "is not a whole number",
		"18446744073709551616": "is too large", "16777216TiB": "is too large", "99999999999999999999GiB": "is too large",
	} {
		if got, err := backend.ParseSize(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseSize(%q) = %d, %v, want an error that says %q", text, got, err, want)
		}
	}
}

func TestSizeString(t *testing.T) {
	for size, want := range map[backend.Size]string{
		0: "0B", 1: "1B", 1000: "1000B", 1024: "1KiB", 1536: "1536B", 65536: "64KiB", 3 << 20: "3MiB", 1 << 30: "1GiB",
		5 << 40: "5TiB", 1<<40 + 1<<30: "1025GiB", math.MaxUint64: "18446744073709551615B",
	} {
		if got := size.String(); got != want {
			t.Errorf("Size(%d) = %q, want %q", uint64(size), got, want)
		}
	}
}

func TestSizeRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := backend.Size(rapid.Uint64().Draw(t, "size") << rapid.IntRange(0, 50).Draw(t, "shift"))
		for _, text := range []string{size.String(), strconv.FormatUint(uint64(size), 10)} {
			if got, err := backend.ParseSize(text); err != nil || got != size {
				t.Fatalf("%q became %d, %v, want %d", text, got, err, size)
			}
		}
	})
}

func FuzzParseSize(f *testing.F) {
	for _, text := range []string{"64KiB", "1.5 GiB", "18446744073709551616", "", "1e9", "-0", "0.1TB"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		size, err := backend.ParseSize(text)
		if err != nil {
			if !strings.Contains(err.Error(), strconv.Quote(text)) {
				t.Fatalf("the error does not name %q: %v", text, err)
			}
			return
		}
		if again, err := backend.ParseSize(size.String()); err != nil || again != size {
			t.Fatalf("ParseSize(%q) = %d, whose text %q became %d, %v", text, size, size, again, err)
		}
	})
}

func TestDidYouMean(t *testing.T) {
	known := []string{"tcp", "shm", "rdma", "window", "read_timeout", "write_timeout"}
	for unknown, want := range map[string]string{
		"tpc": "tcp", "tcpp": "tcp", "windwo": "window", "wind": "window", "read_timeuot": "read_timeout",
		"write_time_out": "write_timeout", "rmda": "rdma",
		"ab": "", "xyz": "", "": "", "completely_different": "",
	} {
		text := ""
		if want != "" {
			text = `, did you mean "` + want + `"?`
		}
		if got := backend.DidYouMean(unknown, known); got != text {
			t.Errorf("DidYouMean(%q) = %q, want %q", unknown, got, text)
		}
	}
	if got := backend.DidYouMean("tcp", nil); got != "" {
		t.Errorf("DidYouMean without known words = %q", got)
	}
}

func TestDefaults(t *testing.T) {
	v := backend.Defaults([]backend.Option{{Name: "window", Type: backend.IntOption, Default: "7", Max: "9"}})
	if n := v.Int("window"); n != 7 {
		t.Errorf("the default of window is %d, want 7", n)
	}
	defer func() {
		if text, _ := recover().(string); !strings.Contains(text, "window") {
			t.Errorf("a default out of its bounds ends with %q, want a panic that names it", text)
		}
	}()
	backend.Defaults([]backend.Option{{Name: "window", Type: backend.IntOption, Default: "10", Max: "9"}})
}
