// Package rules holds the project's rules about its own source: who may import whom, where unsafe and cgo may
// stand, and that every package says what it is for.
package rules

import (
	"debug/elf"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	module = "github.com/umbp/umbp"
	purego = "github.com/ebitengine/purego"
)

// pkg is what the rules need to know of a package.
type pkg struct {
	ImportPath   string
	Dir          string
	Name         string
	Standard     bool
	GoFiles      []string
	CgoFiles     []string
	TestGoFiles  []string
	XTestGoFiles []string
	Imports      []string
	TestImports  []string
	XTestImports []string
	Deps         []string
}

func (p *pkg) path() string { return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/") }

// list returns the packages of the project as the go command sees them.
func list(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json", "./...")
	cmd.Dir = filepath.Join("..", "..")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) < 10 {
		t.Fatalf("go list found %d packages only", len(all))
	}
	return all
}

// rule says what the packages under a path must not import, directly or through others.
type rule struct {
	under  string
	forbid func(imported string) bool
	why    string
	// tests are free of the rule: what they import is not what an importer of the package gets.
	testsFree bool
}

func under(path string, roots ...string) bool {
	return slices.ContainsFunc(roots, func(root string) bool { return path == root || strings.HasPrefix(path, root+"/") })
}

func own(imported string) (path string, ok bool) {
	return strings.CutPrefix(imported, module+"/")
}

var rules = []rule{
	{
		under:  "plugin-sdk",
		forbid: func(i string) bool { p, ok := own(i); return ok && !under(p, "plugin-sdk") },
		why:    "the SDK imports nothing of the project but itself",
	},
	{
		under:  "plugin-sdk/backend",
		forbid: func(i string) bool { return strings.Contains(strings.Split(i, "/")[0], ".") },
		why:    "the contract imports the standard library only",

		testsFree: true,
	},
	{
		under: "plugins",
		forbid: func(i string) bool {
			p, ok := own(i)
			return ok && !under(p, "plugins", "plugin-sdk")
		},
		why: "plugins get what third parties get: the SDK",
	},
	{
		under: "core",
		forbid: func(i string) bool {
			p, ok := own(i)
			return ok && under(p, "plugins", "config", "cmd", "plugin-sdk/gpu", "plugin-sdk/samehost") || strings.HasPrefix(i, "github.com/knadh/koanf")
		},
		why: "the core knows neither plugins, nor what only they stand on, nor configuration files nor commands",
	},
	{
		under:  "config",
		forbid: func(i string) bool { p, ok := own(i); return ok && !under(p, "plugin-sdk", "config") },
		why:    "the configuration knows the SDK's options and nothing else of the project",
	},
}

// broken returns what the rules say against one package, or its tests, importing another.
func broken(importer, imported string, test bool) (why string) {
	for _, r := range rules {
		if under(importer, r.under) && r.forbid(imported) && !(test && r.testsFree) {
			return r.why
		}
	}
	// A plugin imports itself and no other plugin.
	if p, ok := own(imported); ok && under(importer, "plugins") && under(p, "plugins") {
		if strings.Split(importer, "/")[1] != strings.Split(p, "/")[1] {
			return "a plugin does not import another"
		}
	}
	return ""
}

func TestImports(t *testing.T) {
	for _, p := range list(t) {
		for test, imports := range map[bool][]string{false: p.Deps, true: slices.Concat(p.TestImports, p.XTestImports)} {
			for _, imported := range imports {
				if why := broken(p.path(), imported, test); why != "" {
					t.Errorf("%s imports %s: %s", p.ImportPath, imported, why)
				}
			}
		}
	}
}

// TestRulesBite tries imports that must be refused, and some that must not.
func TestRulesBite(t *testing.T) {
	for _, c := range []struct {
		importer, imported string
		bad                bool
	}{
		{"plugin-sdk/backend", "golang.org/x/sys/unix", true},
		{"plugin-sdk/backend", "crypto/tls", false},
		{"plugin-sdk/null", module + "/core", true},
		{"plugin-sdk/null", module + "/plugin-sdk/backend", false},
		{"plugins/tcp", module + "/core/region", true},
		{"plugins/tcp", module + "/plugins/shm", true},
		{"plugins/tcp", module + "/plugins/tcp/wire", false},
		{"core/plan", module + "/config", true},
		{"core", module + "/plugins/tcp", true},
		{"core/region", module + "/plugin-sdk/gpu", true},
		{"core", module + "/plugin-sdk/samehost", true},
		{"plugins/xgmi", module + "/plugin-sdk/gpu", false},
		{"plugin-sdk/samehost", module + "/plugins/shm", true},
		{"core/peer", "github.com/knadh/koanf/v2", true},
		{"config", module + "/core", true},
		{"cmd/umbp", module + "/plugins/tcp", false},
	} {
		if got := broken(c.importer, c.imported, false) != ""; got != c.bad {
			t.Errorf("%s importing %s: refused %v, want %v", c.importer, c.imported, got, c.bad)
		}
	}
}

// TestFences checks where cgo, calls of C without it, and unsafe stand: either kind of C in one package, unsafe in files
// that say so by their name. Generated code is left out.
func TestFences(t *testing.T) {
	for _, p := range list(t) {
		if len(p.CgoFiles) > 0 && p.path() != "plugins/rdma/verbs" {
			t.Errorf("%s uses cgo: only plugins/rdma/verbs may", p.ImportPath)
		}
		if slices.Contains(p.Imports, purego) && p.path() != "plugin-sdk/gpu" && p.path() != "plugin-sdk/gpu/gpusim" {
			t.Errorf("%s calls C by purego: only plugin-sdk/gpu may", p.ImportPath)
		}
		for _, name := range slices.Concat(p.GoFiles, p.TestGoFiles, p.XTestGoFiles) {
			file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.ImportsOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if ast.IsGenerated(file) {
				continue
			}
			for _, spec := range file.Imports {
				if spec.Path.Value == `"unsafe"` && !strings.HasSuffix(strings.TrimSuffix(name, "_test.go"), "_unsafe") && !strings.HasSuffix(name, "_unsafe.go") {
					t.Errorf("%s/%s imports unsafe: put it into a file named *_unsafe.go", p.path(), name)
				}
			}
		}
	}
}

// TestPackageComments checks that every package tells a newcomer what happens in it.
func TestPackageComments(t *testing.T) {
	for _, p := range list(t) {
		documented, generated := false, true
		files := p.GoFiles
		if len(files) == 0 {
			files = slices.Concat(p.TestGoFiles, p.XTestGoFiles)
		}
		for _, name := range files {
			file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			generated = generated && ast.IsGenerated(file)
			documented = documented || file.Doc != nil && len(file.Doc.Text()) > 40
		}
		if !documented && !generated {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
	}
}

// TestBuildsWithoutCgo builds the host binary as it is shipped, and as a static program.
func TestBuildsWithoutCgo(t *testing.T) {
	for _, tags := range []string{"", "noxgmi"} {
		program := filepath.Join(t.TempDir(), "umbp")
		cmd := exec.Command("go", "build", "-tags", tags, "-o", program, "./cmd/umbp")
		cmd.Dir = filepath.Join("..", "..")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		file, err := elf.Open(program)
		if err != nil {
			t.Fatal(err)
		}
		needs, err := file.ImportedLibraries()
		if err := errors.Join(err, file.Close()); err != nil {
			t.Fatal(err)
		}
		if static := len(needs) == 0; static != (tags == "noxgmi") {
			t.Errorf("with the tags %q, umbp needs the libraries %q", tags, needs)
		}
	}
}

// TestDynamicPrograms: a program with a package in it that looks for libraries at run time is not static any more. Only
// those packages do that to a program whose business it is.
func TestDynamicPrograms(t *testing.T) {
	for _, p := range list(t) {
		if slices.Contains(p.Deps, purego) && !under(p.path(), "plugin-sdk/gpu", "plugins/xgmi", "cmd/umbp") {
			t.Errorf("%s makes programs dynamic, by %s", p.ImportPath, purego)
		}
	}
}
