package main

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"text/template"

	"github.com/spf13/cobra"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

func (a *app) pluginCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "plugin",
		Short: "Help those who write backends",
		Long: `A backend is a way to move bytes. Those that are not linked into umbp are plugins: programs that umbp starts.
docs/BACKEND_GUIDE.md says how to write one.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	var s scaffold
	create := &cobra.Command{
		Use:   "new NAME",
		Short: "Write a plugin to start from",
		Long: `new writes a Go module with a small backend that works, its tests, and a README that says what to change.
Nothing is overwritten: the directory must be new, or empty.`,
		Args: exactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s.Name = args[0]
			if err := s.write(); err != nil {
				return err
			}
			tell(cmd, "wrote a plugin to %s; its README.md says what to do next", s.dir)
			return nil
		},
	}
	create.Flags().StringVar(&s.dir, "dir", "", "`directory` to write to (default umbp-plugin-NAME)")
	create.Flags().StringVar(&s.Module, "module", "", "`path` of the module (default umbp-plugin-NAME)")
	create.Flags().StringVar(&s.Checkout, "umbp", "", "build against umbp's source in this `directory`, instead of a release")
	cmd.AddCommand(create)
	return cmd
}

//go:embed scaffold
var scaffoldFiles embed.FS

// umbpModule is the module that plugins are built against.
const umbpModule = "github.com/umbp/umbp"

// scaffold is a plugin to be written. The fields with capitals are for the templates.
type scaffold struct {
	dir          string
	Name, Module string
	Checkout     string // of umbp; empty for a release
	Version, Go  string // of umbp, and of the language
	Requires     string // what umbp requires, so that the module builds as it is
	goSum        []byte
}

var (
	pluginName = regexp.MustCompile(`^[a-z][a-z0-9]*(-[a-z0-9]+)*$`)
	modulePath = regexp.MustCompile(`^[A-Za-z0-9_~-][A-Za-z0-9._~-]*(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*$`)
	release    = regexp.MustCompile(`^v[0-9]+\.[0-9]+\.[0-9]+(-[0-9A-Za-z.-]+)?$`)
	goVersion  = regexp.MustCompile(`(?m)^go ([0-9.]+)$`)
	requires   = regexp.MustCompile(`(?ms)^require \(\n.*?^\)$`)
	plainPath  = regexp.MustCompile(`^[A-Za-z0-9._/~+-]+$`)
)

// write checks what was asked for, and writes the files.
func (s *scaffold) write() error {
	linked := slices.ContainsFunc(factories, func(f backend.Factory) bool { return f.Name == s.Name })
	switch {
	case !pluginName.MatchString(s.Name) || len(s.Name) > 32:
		return &usageError{fmt.Errorf("%q is no name for a backend: use lower-case letters, digits and single dashes, 32 at most, and begin with a letter", s.Name)}
	case linked:
		return &usageError{fmt.Errorf("a backend %q is linked into umbp: choose another name", s.Name)}
	}
	program := "umbp-plugin-" + s.Name
	if s.Module == "" {
		s.Module = program
	}
	if s.dir == "" {
		s.dir = program
	}
	if !modulePath.MatchString(s.Module) {
		return &usageError{fmt.Errorf("%q is no module path, such as example.com/%s", s.Module, program)}
	}
	if err := s.findSource(); err != nil {
		return &usageError{err}
	}
	files, err := s.render()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.dir, 0o777); err != nil {
		return err
	}
	if there, err := os.ReadDir(s.dir); err != nil {
		return err
	} else if len(there) > 0 {
		return &usageError{fmt.Errorf("%s is not empty: nothing is overwritten; choose another --dir", s.dir)}
	}
	var errs []error
	for name, text := range files {
		errs = append(errs, os.WriteFile(filepath.Join(s.dir, name), text, 0o666))
	}
	return errors.Join(errs...)
}

// findSource says against which umbp the plugin is built.
func (s *scaffold) findSource() error {
	if s.Checkout == "" {
		s.Version, s.Go = version, strings.TrimPrefix(runtime.Version(), "go")
		if info, ok := debug.ReadBuildInfo(); ok && !release.MatchString(s.Version) {
			s.Version = info.Main.Version
		}
		if !release.MatchString(s.Version) {
			return errors.New("this umbp is no release: say with --umbp where its source is")
		}
		return nil
	}
	checkout, err := filepath.Abs(s.Checkout)
	if err != nil {
		return err
	}
	mod, err := os.ReadFile(filepath.Join(checkout, "go.mod"))
	if err == nil {
		s.goSum, err = os.ReadFile(filepath.Join(checkout, "go.sum"))
	}
	if err != nil {
		return fmt.Errorf("--umbp: %w", err)
	}
	language := goVersion.FindSubmatch(mod)
	if language == nil || !bytes.HasPrefix(mod, []byte("module "+umbpModule+"\n")) {
		return fmt.Errorf("--umbp: %s does not hold the source of umbp", checkout)
	}
	s.Version, s.Go = "v0.0.0", string(language[1])
	s.Checkout = checkout
	if !plainPath.MatchString(checkout) {
		s.Checkout = fmt.Sprintf("%q", checkout)
	}
	var blocks []string
	for _, block := range requires.FindAll(mod, -1) {
		lines := strings.Split(string(block), "\n")
		for i, line := range lines[1 : len(lines)-1] {
			lines[i+1] = strings.TrimSuffix(line, " // indirect") + " // indirect"
		}
		blocks = append(blocks, strings.Join(lines, "\n"))
	}
	s.Requires = strings.Join(blocks, "\n\n")
	return nil
}

// render returns the files of the plugin.
func (s *scaffold) render() (map[string][]byte, error) {
	files := make(map[string][]byte)
	if s.goSum != nil {
		files["go.sum"] = s.goSum
	}
	templates, err := fs.Glob(scaffoldFiles, "scaffold/*.tmpl")
	if err != nil {
		return nil, err
	}
	for _, name := range templates {
		t, err := template.ParseFS(scaffoldFiles, name)
		if err != nil {
			return nil, err
		}
		var text bytes.Buffer
		if err := t.Execute(&text, s); err != nil {
			return nil, err
		}
		name = strings.TrimSuffix(path.Base(name), ".tmpl")
		if name == "gitignore" { // the go command does not embed files that begin with a dot
			name = ".gitignore"
		}
		files[name] = text.Bytes()
	}
	return files, nil
}
