package backend_test

import (
	"go/build"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// TestStandardLibraryOnly keeps the promise that a backend's author imports nothing else with this package.
func TestStandardLibraryOnly(t *testing.T) {
	pkg, err := build.ImportDir(".", 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(pkg.Imports) == 0 {
		t.Fatal("no imports found: the test looks at the wrong place")
	}
	for _, path := range pkg.Imports {
		first, _, _ := strings.Cut(path, "/")
		if strings.Contains(first, ".") || path == "unsafe" || path == "C" {
			t.Errorf("imports %s, which is not allowed here", path)
		}
	}
}

func TestLimitsTighten(t *testing.T) {
	for _, c := range []struct{ a, b, want backend.Limits }{
		{backend.Limits{}, backend.Limits{}, backend.Limits{}},
		{backend.Limits{Segments: 3}, backend.Limits{}, backend.Limits{Segments: 3}},
		{backend.Limits{Segments: 3, SegmentBytes: 10}, backend.Limits{Segments: 5, TransferBytes: 7},
			backend.Limits{Segments: 3, SegmentBytes: 10, TransferBytes: 7}},
		{backend.Limits{TransferBytes: 1 << 63}, backend.Limits{TransferBytes: 1<<64 - 1}, backend.Limits{TransferBytes: 1 << 63}},
	} {
		if got := c.a.Tighten(c.b); got != c.want {
			t.Errorf("%+v tightened by %+v = %+v, want %+v", c.a, c.b, got, c.want)
		}
	}
	draw := func(t *rapid.T, name string) backend.Limits {
		n := rapid.Uint64Range(0, 4)
		return backend.Limits{
			Segments: int(n.Draw(t, name)), SegmentBytes: n.Draw(t, name), TransferBytes: n.Draw(t, name),
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := draw(t, "a"), draw(t, "b"), draw(t, "c")
		allowed := func(l backend.Limits, n uint64) bool { return l.TransferBytes == 0 || n <= l.TransferBytes }
		for n := range uint64(7) {
			if allowed(a.Tighten(b), n) != (allowed(a, n) && allowed(b, n)) {
				t.Fatalf("%+v tightened by %+v: %d bytes are wrongly judged", a, b, n)
			}
		}
		switch {
		case a.Tighten(b) != b.Tighten(a):
			t.Fatal("the order of the two counts")
		case a.Tighten(b).Tighten(c) != a.Tighten(b.Tighten(c)):
			t.Fatal("the order of three counts")
		case a.Tighten(a) != a:
			t.Fatal("tightening by itself changes something")
		}
	})
}

func TestKinds(t *testing.T) {
	both := backend.Kinds(backend.HostMemory, backend.GPUMemory)
	if !both.Has(backend.HostMemory) || !both.Has(backend.GPUMemory) || both.Has(0) || both.Has(3) {
		t.Errorf("Kinds(host, gpu) = %b", both)
	}
	if backend.Kinds().Has(backend.HostMemory) || backend.Kinds(backend.GPUMemory).Has(backend.HostMemory) {
		t.Error("a set has what was not put in")
	}
}

func TestWords(t *testing.T) {
	for want, got := range map[string]string{
		"host": backend.HostMemory.String(), "gpu": backend.GPUMemory.String(), "memory-kind-0": backend.MemoryKind(0).String(),
		"write": backend.Write.String(), "read": backend.Read.String(), "op-3": (backend.Write | backend.Read).String(),
		"not sent": backend.NotSent.String(), "done": backend.Done.String(), "failed": backend.Failed.String(),
		"in doubt": backend.InDoubt.String(), "outcome-9": backend.Outcome(9).String(),
		"same process": backend.SameProcess.String(), "same host": backend.SameHost.String(),
		"network": backend.Network.String(), "unknown reach": backend.Reach(0).String(),
		"n@2a": backend.Peer{Node: "n", Incarnation: 42, Host: "h"}.String(),
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	var o backend.Outcome
	if o != backend.NotSent {
		t.Error("the zero outcome must not promise that anything has arrived")
	}
}
