package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Fault is one thing that is wrong with a configuration.
type Fault struct {
	Path   string // of the key, such as pool.page_size; empty when the file as a whole is at fault
	Origin string // as in Entry.Origin
	Text   string // what is wrong, and what to do
}

// String renders the fault on one line.
func (f Fault) String() string {
	s := f.Text
	if f.Path != "" {
		s = f.Path + ": " + s
	}
	if f.Origin != "" {
		s += " [" + f.Origin + "]"
	}
	return s
}

// Faults is the error of a configuration that is refused: everything that is wrong with it, ordered by path.
type Faults []Fault

// Error lists the faults, one a line.
func (f Faults) Error() string {
	if len(f) == 1 {
		return "configuration refused: " + f[0].String()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "configuration refused, %d faults:", len(f))
	for _, fault := range f {
		b.WriteString("\n  " + fault.String())
	}
	return b.String()
}

func (f *Faults) add(path, origin, format string, args ...any) {
	*f = append(*f, Fault{Path: path, Origin: origin, Text: fmt.Sprintf(format, args...)})
}

// touch tells whether any fault lies at the path or below it.
func (f Faults) touch(path string) bool {
	return slices.ContainsFunc(f, func(fault Fault) bool {
		rest, ok := strings.CutPrefix(fault.Path, path)
		return ok && (rest == "" || rest[0] == '.' || rest[0] == '[')
	})
}

// err returns the faults in order as an error, or nil when there are none.
func (f Faults) err() error {
	if len(f) == 0 {
		return nil
	}
	slices.SortStableFunc(f, func(a, b Fault) int { return cmp.Compare(a.Path, b.Path) })
	return f
}
