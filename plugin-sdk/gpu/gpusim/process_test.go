package gpusim

import (
	"fmt"
	"strings"
	"testing"
)

// asks gives a child a line and checks the answer.
func (c *child) asks(want string, words ...any) {
	c.tb.Helper()
	if got := c.ask(words...); got != want {
		c.tb.Errorf("asked %v, it answers %q, want %q", words, got, want)
	}
}

// exported makes a child allocate memory, and returns its address there and its handle, asked for at an offset.
func (c *child) exported(offset int) (address string, h [8]uintptr) {
	c.tb.Helper()
	answer := c.ask("export", offset)
	if _, err := fmt.Sscan(answer, &address, &h[0], &h[1], &h[2], &h[3], &h[4], &h[5], &h[6], &h[7]); err != nil {
		c.tb.Fatalf("%q: %v", answer, err)
	}
	return address, h
}

// TestImport shares memory between processes.
func TestImport(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, s *Sim, r *rt) {
		c := startChild(t, s)
		theirs, h := c.exported(0)
		c.asks("0", "store", theirs, 1000, 42)

		var p, again uintptr
		if code := r.importHandle(&p, &h); code != 0 {
			t.Fatalf("import answers %d", code)
		}
		if touchable(t, p) {
			t.Error("imported memory can be read by the processor")
		}
		if got := r.load(p+1000, 1)[0]; got != 42 {
			t.Errorf("imported memory holds %d, want 42", got)
		}
		r.store(p+2000, []byte{43})
		c.asks("43", "load", theirs, 2000)
		r.answers(invalidValue, "Memcpy", p+(1<<20)-1, make([]byte, 2), 2, anyKind)
		r.answers(invalidValue, "Free", p)
		r.answers(invalidValue, "IpcGetMemHandle", new([8]uintptr), p)

		// Twice is the same memory, to be closed twice.
		if code := r.importHandle(&again, &h); code != 0 || again != p {
			t.Errorf("the second import answers %d, %#x; the first was %#x", code, again, p)
		}
		if n := s.Counts().Imports; n != 2 {
			t.Errorf("%d imports open", n)
		}
		r.must("IpcCloseMemHandle", p)
		if got := r.load(p+1000, 1)[0]; got != 42 {
			t.Errorf("after one of two was closed, it holds %d", got)
		}
		r.must("IpcCloseMemHandle", p)
		r.answers(invalidValue, "IpcCloseMemHandle", p)
		if code := r.call("Memcpy", make([]byte, 1), p, 1, anyKind); code == 0 {
			t.Error("closed memory can be read")
		}
	})
}

// TestImportOffset opens handles that were asked for in the middle: they differ, and are of the whole allocation.
func TestImportOffset(t *testing.T) {
	s := New(t, Machine{})
	r := open(t, s)
	c := startChild(t, s)
	theirs, h := c.exported(4096)
	c.asks("0", "store", theirs, 0, 1)
	c.asks("0", "store", theirs, 4096, 2)
	var p uintptr
	if code := r.importHandle(&p, &h); code != 0 {
		t.Fatalf("import answers %d", code)
	}
	if got := r.load(p, 1)[0]; got != 1 {
		t.Errorf("the import begins with %d: not at the allocation's beginning", got)
	}
	r.must("IpcCloseMemHandle", p)
	mine := r.alloc(8192)
	if *r.export(mine) == *r.export(mine + 4096) {
		t.Error("handles of two addresses are the same")
	}
	r.must("Free", mine)
}

func TestImportRefused(t *testing.T) {
	both(t, Machine{Devices: make([]Device, 3), Links: []Link{{From: 0, To: 1}}}, func(t *testing.T, s *Sim, r *rt) {
		bad := r.either(invalidPointer, invalidValue)
		refused := func(why string, code int, h [8]uintptr) {
			t.Helper()
			if got := r.importHandle(new(uintptr), &h); got != code {
				t.Errorf("%s: import answers %d, want %d", why, got, code)
			}
		}
		mine := r.alloc(100)
		refused("its own", invalidContext, *r.export(mine))
		r.must("Free", mine)

		c := startChild(t, s)
		theirs, h := c.exported(0)
		for i := range h {
			forged := h
			forged[i] ^= 1 << 13
			refused(fmt.Sprint("word ", i, " is forged"), bad, forged)
		}
		refused("nothing", bad, [8]uintptr{})
		c.asks("0", "free", theirs)
		refused("freed", bad, h)
		c.exported(0) // which may be given the same number of a descriptor
		refused("freed, and another in its place", bad, h)

		_, elsewhere := startChild(t, New(t, Machine{Runtime: r.prefix})).exported(0)
		refused("another machine's", bad, elsewhere)

		// A device without a link to that of the memory.
		c.asks("0", "device", 2)
		_, h = c.exported(0)
		refused("no link", peerUnsupported, h)
	})
}

// TestImportPeer imports memory of another device, which enables access to it.
func TestImportPeer(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, s *Sim, r *rt) {
		c := startChild(t, s)
		c.asks("0", "device", 1)
		theirs, h := c.exported(0)
		c.asks("0", "store", theirs, 5, 99)
		var p uintptr
		if code := r.importHandle(&p, &h); code != 0 {
			t.Fatalf("import answers %d", code)
		}
		r.answers(alreadyEnabled, "DeviceEnablePeerAccess", 1, 0)
		mine, stream := r.alloc(10), r.stream()
		r.must("MemcpyAsync", mine, p, 10, 3, stream)
		r.must("StreamSynchronize", stream)
		if got := r.load(mine+5, 1)[0]; got != 99 {
			t.Errorf("copied %d, want 99", got)
		}
		r.must("StreamDestroy", stream)
		r.must("Free", mine)
		r.must("IpcCloseMemHandle", p)
	})
}

// TestExporterGone kills the process that allocated: what was imported stays.
func TestExporterGone(t *testing.T) {
	s := New(t, Machine{})
	r := open(t, s)
	c := startChild(t, s)
	theirs, h := c.exported(0)
	c.asks("0", "store", theirs, 0, 5)
	var p uintptr
	if code := r.importHandle(&p, &h); code != 0 {
		t.Fatalf("import answers %d", code)
	}
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	c.cmd.Wait()
	if got := r.load(p, 1)[0]; got != 5 {
		t.Errorf("it holds %d, want 5", got)
	}
	r.must("IpcCloseMemHandle", p)
	if code := r.importHandle(&p, &h); code != invalidPointer {
		t.Errorf("a handle of a process that is gone: %d", code)
	}
}

// TestFaultsElsewhere checks that faults strike in every process, and that each counts for itself.
func TestFaultsElsewhere(t *testing.T) {
	s := New(t, Machine{})
	a, b := startChild(t, s), startChild(t, s)
	pa, _ := a.exported(0)
	pb, h := b.exported(0)
	copies := func(c *child, p string) string { return c.ask("copy", p, 100, 10) }
	for round := range 2 {
		s.SetFaults(Fault{Effect: Refuse, After: 1, Times: 1, Code: 5})
		got := strings.Join([]string{copies(a, pa), copies(a, pa), copies(b, pb), copies(a, pa), copies(b, pb)}, " ")
		if want := "0 5 0 0 5"; got != want {
			t.Errorf("round %d: copies answer %s, want %s", round, got, want)
		}
	}
	// Memory is bad for whoever copies it, under whatever address.
	answer := a.ask("import", handleText(&h))
	imported, found := strings.CutPrefix(answer, "0 ")
	if !found {
		t.Fatal(answer)
	}
	var address uint64
	fmt.Sscan(pb, &address)
	s.SetFaults(Fault{Effect: Fail, Address: address + 105, Bytes: 1, Code: 6})
	for _, c := range []struct {
		child *child
		p     string
		at    int
		want  string
	}{{b, pb, 100, "6"}, {a, imported, 100, "6"}, {a, imported, 106, "0"}, {a, imported, 90, "0"}} {
		if got := c.child.ask("copy", c.p, c.at, 10); got != c.want {
			t.Errorf("copy to %d answers %s, want %s", c.at, got, c.want)
		}
	}
}
