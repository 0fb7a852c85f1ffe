package gpusim

import (
	"cmp"
	"crypto/sha256"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

//go:embed library
var source embed.FS

// compiled returns the library that the flags make, compiled by the first process that wants it and then kept in the user's
// cache, under a name that says what it was made of.
func compiled(flags []string) ([]byte, error) {
	flags = append([]string{"-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-fvisibility=hidden", "-shared", "-fPIC",
		"-pthread", "-Wl,-z,nodelete,-z,defs"}, flags...)
	sum := sha256.New()
	fmt.Fprintln(sum, flags)
	names, err := fs.Glob(source, "library/*.[ch]")
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	for _, name := range names {
		text, err := source.ReadFile(name)
		if err != nil {
			return nil, err
		}
		fmt.Fprintln(sum, name, len(text))
		sum.Write(text)
	}
	cache, err := os.UserCacheDir()
	if err != nil { // no home: compile anew
		return compile(names, flags, "")
	}
	kept := filepath.Join(cache, "umbp-gpusim", fmt.Sprintf("%x.so", sum.Sum(nil)[:16]))
	if library, err := os.ReadFile(kept); err == nil {
		return library, nil
	}
	return compile(names, flags, kept)
}

// compile compiles the sources, and keeps the library under a path, if that is not empty and can be made.
func compile(names, flags []string, kept string) ([]byte, error) {
	cc := cmp.Or(os.Getenv("CC"), "cc")
	dir, err := os.MkdirTemp("", "umbp-gpusim-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "library.so")
	args := slices.Concat(flags, []string{"-o", out})
	for _, name := range names {
		text, err := source.ReadFile(name)
		if err != nil {
			return nil, err
		}
		file := filepath.Join(dir, filepath.Base(name))
		if err := os.WriteFile(file, text, 0o600); err != nil {
			return nil, err
		}
		if strings.HasSuffix(name, ".c") {
			args = append(args, file)
		}
	}
	if text, err := exec.Command(cc, args...).CombinedOutput(); errors.Is(err, exec.ErrNotFound) {
		return nil, fmt.Errorf("the simulated GPU runtime needs a C compiler: %w; install gcc, or name one in CC", err)
	} else if err != nil {
		return nil, fmt.Errorf("%s %s: %w\n%s", cc, strings.Join(args, " "), err, text)
	}
	library, err := os.ReadFile(out)
	if err == nil && kept != "" {
		keep(library, kept)
	}
	return library, err
}

// keep writes the library for later processes. One that cannot be written is compiled again.
func keep(library []byte, path string) {
	if os.MkdirAll(filepath.Dir(path), 0o700) != nil {
		return
	}
	f, err := os.CreateTemp(filepath.Dir(path), "new-")
	if err != nil {
		return
	}
	_, err = f.Write(library)
	// Renamed when it is whole: another process may read it, or write the same, at this moment.
	if errors.Join(err, f.Close()) != nil || os.Rename(f.Name(), path) != nil {
		os.Remove(f.Name())
	}
}
