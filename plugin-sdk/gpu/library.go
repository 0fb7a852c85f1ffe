package gpu

import (
	"bufio"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/ebitengine/purego"
)

// library is one that has been loaded. It stays so: runtimes have threads of their own.
type library struct {
	handle uintptr
	path   string // of the file
}

// symbol returns the address of a function, or zero.
func (l library) symbol(name string) uintptr {
	address, err := purego.Dlsym(l.handle, name)
	if err != nil {
		return 0
	}
	return address
}

// How libraries are loaded: with all that they need, so that what is missing is found here and not in a call; and for
// themselves, so that a second runtime in the process, such as a simulated one, does not get the first one's functions.
const (
	dlopenMode = purego.RTLD_NOW | purego.RTLD_LOCAL
	// rtldNoLoad finds what is loaded already, and nothing else. It is glibc's number, and musl's.
	rtldNoLoad = 0x4
)

// find loads the library of a runtime: the one that is named; or else one that the process has loaded already, as an
// application that uses the GPU has (addresses mean nothing to a second runtime); or else the first of candidates.
func (k *kind) find(name string) (library, *Missing) {
	probe := k.name + "RuntimeGetVersion"
	if name != "" {
		lib, err := load(name, probe, dlopenMode)
		if err != nil {
			return library{}, &Missing{Runtime: k.name, What: name + " cannot be loaded: " + err.Error(), Remedy: k.install}
		}
		return lib, nil
	}
	for _, name := range k.libraries {
		if lib, err := load(name, probe, dlopenMode|rtldNoLoad); err == nil {
			return lib, nil
		}
	}
	lib, missing := search(k.candidates(), probe)
	if missing != nil {
		missing.Runtime, missing.Remedy = k.name, k.install
	}
	return lib, missing
}

// candidates are the libraries that a runtime may be: any in the folders that the environment names; then the newest
// that the dynamic linker finds, or that lies where runtimes are installed.
func (k *kind) candidates() []string {
	var candidates []string
	for _, variable := range k.environment {
		at := os.Getenv(variable)
		if at == "" {
			continue
		}
		for _, sub := range []string{"lib64", "lib"} {
			for _, name := range k.libraries {
				candidates = append(candidates, filepath.Join(at, sub, name))
			}
		}
	}
	var folders []string
	for _, pattern := range k.folders {
		found, _ := filepath.Glob(pattern) // the patterns are ours, and well formed
		slices.SortFunc(found, newestFirst)
		if len(found) == 0 && !strings.Contains(pattern, "*") {
			found = []string{pattern} // to be named as looked in
		}
		folders = append(folders, found...)
	}
	for _, name := range k.libraries {
		candidates = append(candidates, name)
		for _, folder := range folders {
			candidates = append(candidates, filepath.Join(folder, name))
		}
	}
	return candidates
}

var digits = regexp.MustCompile(`\d+`)

// newestFirst orders names that tell a version: 10.0 is newer than 7.14.
func newestFirst(a, b string) int {
	padded := func(s string) string {
		return digits.ReplaceAllStringFunc(s, func(n string) string { return strings.Repeat("0", max(0, 8-len(n))) + n })
	}
	return strings.Compare(padded(b), padded(a))
}

// findDriver loads the driver's library: the one beside the runtime's library, as the simulated one is, or the linker's.
func (k *kind) findDriver(runtime string) (library, *Missing) {
	lib, missing := search([]string{filepath.Join(filepath.Dir(runtime), k.driver), k.driver}, "cuDeviceGet")
	if missing != nil {
		missing.Runtime, missing.Remedy = k.name, k.installDriver
	}
	return lib, missing
}

// search loads the first of some libraries: paths, and names for the dynamic linker. What is there and cannot be loaded
// is said in place of what is not there.
func search(candidates []string, probe string) (library, *Missing) {
	var names, looked, broken, reasons []string
	add := func(to *[]string, s string) {
		if !slices.Contains(*to, s) {
			*to = append(*to, s)
		}
	}
	for _, c := range candidates {
		folder := "the dynamic linker's path"
		if strings.ContainsRune(c, '/') {
			folder = filepath.Dir(c)
		}
		add(&names, filepath.Base(c))
		add(&looked, folder)
		lib, err := load(c, probe, dlopenMode)
		if err == nil {
			return lib, nil
		}
		if !absent(c, err) {
			add(&broken, c)
			add(&reasons, err.Error())
		}
	}
	if len(broken) > 0 {
		return library{}, &Missing{What: strings.Join(broken, ", ") + " cannot be loaded: " + strings.Join(reasons, "; "), Looked: looked}
	}
	return library{}, &Missing{What: strings.Join(names, ", ") + " not found", Looked: looked}
}

// load loads one library. Its path is that of the file which the probe, a function that it should have, lies in.
func load(name, probe string, mode int) (library, error) {
	handle, err := purego.Dlopen(name, mode)
	if err != nil {
		return library{}, err
	}
	lib := library{handle: handle, path: name}
	if maps, err := os.ReadFile("/proc/self/maps"); err == nil {
		lib.path = fileAt(string(maps), lib.symbol(probe), name)
	}
	return lib, nil
}

// absent tells whether a library is not there, and nothing else is wrong. The linker says the same of what the library
// needs, but then names that.
func absent(name string, err error) bool {
	if strings.ContainsRune(name, '/') {
		_, err := os.Stat(name)
		return errors.Is(err, fs.ErrNotExist)
	}
	return strings.Contains(err.Error(), name) && strings.Contains(err.Error(), "No such file")
}

// fileAt returns the file that is mapped at an address, of what /proc/PID/maps says, or else what it was given.
func fileAt(maps string, address uintptr, otherwise string) string {
	lines := bufio.NewScanner(strings.NewReader(maps))
	for lines.Scan() {
		// from-to rights offset device inode path
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 {
			continue
		}
		first, last, _ := strings.Cut(fields[0], "-")
		from, err1 := strconv.ParseUint(first, 16, 64)
		to, err2 := strconv.ParseUint(last, 16, 64)
		if err1 == nil && err2 == nil && from <= uint64(address) && uint64(address) < to {
			return strings.Join(fields[5:], " ")
		}
	}
	return otherwise
}
