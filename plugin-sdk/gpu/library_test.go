package gpu

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestNormalPCI(t *testing.T) {
	for s, want := range map[string]string{
		"0000:C1:00.0":     "0000:c1:00.0",
		"0000:c1:00.0":     "0000:c1:00.0",
		"00000000:3B:00.0": "0000:3b:00.0",
		"10001:0a:1f.7":    "10001:0a:1f.7",
		"c1:00.1":          "0000:c1:00.1",
		"c1:0":             "0000:c1:00.0",
		"":                 "",
		"c1":               "",
		"0000:c1:20.0":     "",
		"0000:c1:00.8":     "",
		"0000:100:00.0":    "",
		"0:0000:c1:00.0":   "",
		"0000:c1:00.":      "",
		"0000:c1:-1.0":     "",
		"0000:c1:00.0.0":   "",
	} {
		if got, err := normalPCI(s); got != want || (err == nil) != (want != "") {
			t.Errorf("%q is %q, error %v; want %q", s, got, err, want)
		}
	}
}

func FuzzNormalPCI(f *testing.F) {
	for _, s := range []string{"0000:C1:00.0", "c1:0", "00000001:ff:1f.7", ":::."} {
		f.Add(s)
	}
	normal := regexp.MustCompile(`^[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)
	f.Fuzz(func(t *testing.T, s string) {
		once, err := normalPCI(s)
		if err != nil {
			return
		}
		if !normal.MatchString(once) {
			t.Errorf("%q is normally %q", s, once)
		}
		if twice, err := normalPCI(once); twice != once || err != nil {
			t.Errorf("%q is normally %q, error %v", once, twice, err)
		}
	})
}

func TestFileAt(t *testing.T) {
	const maps = `55d0c0000000-55d0c0001000 r--p 00000000 08:01 100                        /usr/bin/umbp
7f0000001000-7f0000003000 r-xp 00001000 08:01 200                        /opt/a folder/libamdhip64.so.6.2 (deleted)
7f0000003000-7f0000004000 rw-p 00000000 00:00 0
7f0000004000-7f0000005000 rw-p 00000000 00:00 0                          [stack]
nonsense
`
	for address, want := range map[uintptr]string{
		0x55d0c0000000: "/usr/bin/umbp",
		0x55d0c0000fff: "/usr/bin/umbp",
		0x7f0000002fff: "/opt/a folder/libamdhip64.so.6.2 (deleted)",
		0x7f0000003000: "otherwise",
		0x55d0c0001000: "otherwise",
		0:              "otherwise",
	} {
		if got := fileAt(maps, address, "otherwise"); got != want {
			t.Errorf("at %#x is %q, want %q", address, got, want)
		}
	}
}

func TestSearch(t *testing.T) {
	dir := t.TempDir()
	broken := filepath.Join(dir, "libumbptest.so.2")
	if err := os.WriteFile(broken, []byte("no library"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, missing := search([]string{"libumbptest.so.2", filepath.Join(dir, "no", "libumbptest.so.2"), "libumbptest.so.1", filepath.Join(dir, "no", "libumbptest.so.1")}, "f")
	if text, want := missing.Error(), "libumbptest.so.2, libumbptest.so.1 not found; looked in the dynamic linker's path, "+dir+"/no"; text != want {
		t.Errorf("%q, want %q", text, want)
	}
	_, missing = search([]string{"libumbptest.so.2", broken}, "f")
	if text := missing.Error(); !strings.HasPrefix(text, broken+" cannot be loaded: ") || !strings.HasSuffix(text, "; looked in the dynamic linker's path, "+dir) {
		t.Errorf("%q", text)
	}
	// The C library is everywhere.
	lib, missing := search([]string{"libumbptest.so.2", "libc.so.6"}, "getpid")
	if missing != nil || lib.symbol("getpid") == 0 || lib.symbol("umbp_no_such_function") != 0 || !filepath.IsAbs(lib.path) {
		t.Errorf("%+v, %v", lib, missing)
	}
}

func TestCandidates(t *testing.T) {
	dir := t.TempDir()
	for _, sub := range []string{"rocm-6.1.0", "rocm-10.3.1", "rocm-6.14.1"} {
		if err := os.MkdirAll(filepath.Join(dir, sub, "lib"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("UMBP_TEST_ROCM", "/named")
	k := &kind{
		libraries:   []string{"libx.so.2", "libx.so"},
		environment: []string{"UMBP_TEST_UNSET", "UMBP_TEST_ROCM"},
		folders:     []string{dir + "/rocm/lib", dir + "/rocm-*/lib", dir + "/none-*/lib"},
	}
	want := []string{
		"/named/lib64/libx.so.2", "/named/lib64/libx.so", "/named/lib/libx.so.2", "/named/lib/libx.so",
		"libx.so.2", dir + "/rocm/lib/libx.so.2", dir + "/rocm-10.3.1/lib/libx.so.2", dir + "/rocm-6.14.1/lib/libx.so.2", dir + "/rocm-6.1.0/lib/libx.so.2",
		"libx.so", dir + "/rocm/lib/libx.so", dir + "/rocm-10.3.1/lib/libx.so", dir + "/rocm-6.14.1/lib/libx.so", dir + "/rocm-6.1.0/lib/libx.so",
	}
	if got := k.candidates(); !slices.Equal(got, want) {
		t.Errorf("candidates are\n%q, want\n%q", got, want)
	}
}

// TestSymbols compares the columns of names.
func TestSymbols(t *testing.T) {
	var c calls
	seen := map[string]bool{}
	for _, s := range c.symbols() {
		if s.hip == "" && s.cuda == "" || s.to == nil {
			t.Errorf("%+v is no symbol", s)
		}
		if !s.optional && (s.hip == "" || s.cuda == "") {
			t.Errorf("%s%s has to be there in both", s.hip, s.cuda)
		}
		if s.hip != "" && !strings.HasPrefix(s.hip, "hip") || s.cuda != "" && !strings.HasPrefix(s.cuda, "cu") {
			t.Errorf("%s, %s: a prefix is wrong", s.hip, s.cuda)
		}
		// But for their beginnings and CUDA's versions, the names are the same.
		hip, cuda := strings.TrimPrefix(s.hip, "hip"), strings.TrimSuffix(strings.TrimPrefix(strings.TrimPrefix(s.cuda, "cu"), "da"), "_v2")
		if hip != "" && cuda != "" && hip != cuda {
			t.Errorf("%s is not %s", s.hip, s.cuda)
		}
		if seen[s.hip] && s.hip != "" && s.hip != "hipMemcpy" {
			t.Errorf("%s is there twice", s.hip)
		}
		seen[s.hip] = true
	}
}

func TestMissingText(t *testing.T) {
	both := &Missing{What: "no GPU runtime with a device", Each: []*Missing{
		{Runtime: "hip", What: "a not found", Looked: []string{"x", "y"}},
		{Runtime: "cuda", Library: "/b", What: "b has no device"},
	}}
	const want = "no GPU runtime with a device: a not found; looked in x, y; b has no device"
	if both.Error() != want {
		t.Errorf("%q, want %q", both.Error(), want)
	}
	// What a caller does with it.
	if m := (*Missing)(nil); !errors.As(error(both), &m) || len(m.Each) != 2 {
		t.Error("not found by errors.As")
	}
}
