package region

import (
	"errors"
	"os"
	"os/exec"
	"regexp"
	"testing"
)

func TestNewIncarnation(t *testing.T) {
	seen := map[uint64]bool{0: true}
	for range 100 {
		n := NewIncarnation()
		if seen[n] {
			t.Fatalf("%d is zero or was drawn twice", n)
		}
		if !SameProcess(n) || SameProcess(n+1) {
			t.Fatalf("%d is not known as the one drawn here", n)
		}
		seen[n] = true
	}
}

// TestHostID asks for the id in this process and in another one.
func TestHostID(t *testing.T) {
	if os.Getenv("PRINT_HOST_ID") != "" {
		os.Stdout.WriteString("host=" + HostID() + ";")
		return
	}
	id := HostID()
	if !regexp.MustCompile(`^[0-9a-f]{16}$`).MatchString(id) {
		t.Fatalf("id is %q", id)
	}
	other := exec.Command(os.Args[0], "-test.run=^TestHostID$")
	other.Env = append(os.Environ(), "PRINT_HOST_ID=1")
	out, err := other.Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := regexp.MustCompile(`host=(.*);`).FindSubmatch(out); got == nil || string(got[1]) != id {
		t.Errorf("another process says %q, this one %q", out, id)
	}
}

func TestHostIDDependsOnEveryFact(t *testing.T) {
	original := hostFacts
	t.Cleanup(func() { hostFacts = original })
	ids := map[string]bool{HostID(): true}
	for i := range original {
		hostFacts = append([]func() (string, error){}, original...)
		hostFacts[i] = func() (string, error) { return "another", nil }
		if id := HostID(); id == "" || ids[id] {
			t.Errorf("fact %d does not matter: %q", i, id)
		} else {
			ids[id] = true
		}
		hostFacts[i] = func() (string, error) { return "", errors.New("not told") }
		if id := HostID(); id != "" {
			t.Errorf("without fact %d the id is %q, want none", i, id)
		}
	}
}
