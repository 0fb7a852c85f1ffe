package gpusim

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestSanitizers runs testdata/stress.c, many threads and two processes, under the compiler's sanitizers, without and with
// faults.
func TestSanitizers(t *testing.T) {
	if testing.Short() {
		t.Skip("compiles for seconds")
	}
	sources, err := filepath.Glob("library/*.c")
	if err != nil || len(sources) == 0 {
		t.Fatal(sources, err)
	}
	for _, sanitizer := range []string{"thread", "address,undefined"} {
		t.Run(sanitizer, func(t *testing.T) {
			s := New(t, Machine{})
			flags := []string{"-fsanitize=" + sanitizer, "-fno-sanitize-recover=all"}
			empty := filepath.Join(t.TempDir(), "empty.c")
			if err := os.WriteFile(empty, []byte("int main(void) { return 0; }\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("cc", append(flags, "-o", empty+".out", empty)...).CombinedOutput(); err != nil {
				t.Skipf("the compiler has no sanitizer for it: %v\n%s", err, out)
			}
			program := filepath.Join(s.Dir, "stress") // beside the files of the machine, where the library looks for them
			flags = append(flags, "-std=c11", "-g", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror", "-DHIP", "-DVERSION=70125424",
				"-o", program, filepath.Join("testdata", "stress.c"))
			flags = append(append(flags, sources...), "-ldl")
			if out, err := exec.Command("cc", flags...).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for _, faults := range [][]Fault{
				nil,
				{{Effect: Fail, After: 10, Times: 50, Code: 5}, {Effect: Corrupt, From: Host}, {Effect: Slow, Rate: 1 << 30}},
				{{Effect: Lose, After: 100, Code: 5}},
			} {
				s.SetFaults(faults...)
				out, err := exec.Command(program).CombinedOutput()
				if strings.Contains(string(out), "unexpected memory mapping") {
					t.Skip("this sanitizer cannot run on this kernel: it lays out memory more randomly than it expects")
				}
				if err != nil || len(out) > 0 {
					t.Errorf("%+v: %v\n%s", faults, err, out)
				}
			}
		})
	}
}
