package gpusim

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

const mib = 1 << 20

func TestDevices(t *testing.T) {
	m := Machine{
		Devices: []Device{{}, {PCI: "0001:0a:02.0", Name: "Odd One", Memory: 3 * mib}, {}},
		Links:   []Link{{From: 0, To: 1}, {From: 1, To: 0}, {From: 0, To: 2, PCIe: true, Hops: 3}},
	}
	both(t, m, func(t *testing.T, s *Sim, r *rt) {
		if n := r.number("GetDeviceCount"); n != 3 {
			t.Errorf("%d devices, want 3", n)
		}
		id := make([]byte, 13)
		r.must("DeviceGetPCIBusId", id, len(id), 1)
		want := "0001:0a:02.0"
		if !r.hip() {
			want = "0001:0A:02.0"
		}
		if got := name(id); got != want {
			t.Errorf("PCI address %q, want %q", got, want)
		}
		r.answers(invalidValue, "DeviceGetPCIBusId", id, 12, 1)
		r.answers(invalidDevice, "DeviceGetPCIBusId", id, len(id), 3)
		r.answers(invalidDevice, "SetDevice", -1)

		for from, row := range [][]int{{0, 1, 1}, {1, 0, 0}, {0, 0, 0}} {
			for to, want := range row {
				if got := r.number("DeviceCanAccessPeer", from, to); got != want {
					t.Errorf("access from %d to %d: %d, want %d", from, to, got, want)
				}
			}
		}
		r.answers(invalidDevice, "DeviceGetP2PAttribute", new(int32), 1, 1, 1)
		rank := r.either(0, 1)
		if a, b := r.number("DeviceGetP2PAttribute", rank, 0, 1), r.number("DeviceGetP2PAttribute", rank, 0, 2); a >= b {
			t.Errorf("XGMI ranks %d, PCIe %d", a, b)
		}
		if r.hip() {
			var kind, hops int32
			for _, l := range []struct{ to, kind, hops int32 }{{1, 4, 1}, {2, 2, 3}} {
				r.must("hipExtGetLinkTypeAndHopCount", 0, int(l.to), &kind, &hops)
				if kind != l.kind || hops != l.hops {
					t.Errorf("link to %d: type %d, %d hops; want %+v", l.to, kind, hops, l)
				}
			}
			r.answers(invalidValue, "hipExtGetLinkTypeAndHopCount", 1, 1, &kind, &hops)
		}

		driver := r.prefix
		if !r.hip() {
			driver = "cu"
			r.answers(notInitialized, "cuDeviceGet", new(int32), 0)
			r.must("cuInit", 0)
		}
		text := make([]byte, 32)
		r.must(driver+"DeviceGetName", text, len(text), 1)
		if got := name(text); got != "Odd One" {
			t.Errorf("name %q", got)
		}
		total := map[bool]string{true: "hipDeviceTotalMem", false: "cuDeviceTotalMem_v2"}[r.hip()]
		if got := r.word(total, 1); got != 3*mib {
			t.Errorf("memory %d", got)
		}
	})
}

func TestVersions(t *testing.T) {
	for _, c := range []struct {
		m     Machine
		file  string
		batch bool
	}{
		{Machine{Version: 50221153}, "libamdhip64.so.5", false},
		{Machine{Version: 60342131}, "libamdhip64.so.6", false},
		{Machine{}, "libamdhip64.so.7", true},
		{Machine{Runtime: "cuda", Version: 12040}, "libcudart.so.12", false},
		{Machine{Runtime: "cuda"}, "libcudart.so.12", true},
		{Machine{Runtime: "cuda", Version: 13000}, "libcudart.so.13", true},
	} {
		t.Run(fmt.Sprint(c.file, c.m.Version), func(t *testing.T) {
			s := New(t, c.m)
			r := open(t, s)
			if filepath.Base(s.Library) != c.file {
				t.Errorf("library %s", s.Library)
			}
			if got := r.number("RuntimeGetVersion"); c.m.Version != 0 && got != c.m.Version {
				t.Errorf("version %d", got)
			}
			if r.has(r.prefix+"MemcpyBatchAsync") != c.batch {
				t.Errorf("batches: %v", !c.batch)
			}
			// The handle's flags, and the types of memory, are others in HIP 5.
			five := r.hip() && c.m.Version/10_000_000 == 5
			code := invalidContext
			if five {
				code = invalidValue
			}
			p := r.alloc(100)
			if got := r.importHandle(new(uintptr), r.export(p)); got != code {
				t.Errorf("import with flags 1 answers %d, want %d", got, code)
			}
			r.must("Free", p)
		})
	}
}

func TestMissing(t *testing.T) {
	s := New(t, Machine{Missing: []string{"hipIpcOpenMemHandle"}})
	r := open(t, s)
	if r.has("hipIpcOpenMemHandle") || !r.has("hipIpcCloseMemHandle") {
		t.Error("wrong call missing")
	}
}

func TestBroken(t *testing.T) {
	for code, m := range map[int]Machine{35: {Broken: 35}, noDevice: {Devices: []Device{}}} {
		s := New(t, m)
		r := openUnbound(t, s)
		r.answers(code, "Init", 0)
		count := int32(-1)
		r.answers(code, "GetDeviceCount", &count)
		if count != 0 {
			t.Errorf("%d devices", count)
		}
		if got := r.number("RuntimeGetVersion"); got != 70125424 {
			t.Errorf("version %d", got)
		}
		r.answers(code, "Malloc", new(uintptr), 100)
	}
}

func TestErrors(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, _ *Sim, r *rt) {
		want := map[bool]string{true: "hipErrorInvalidDevice", false: "cudaErrorInvalidDevice"}[r.hip()]
		if got := r.text("GetErrorName", invalidDevice); got != want {
			t.Errorf("name %q, want %q", got, want)
		}
		if got := r.text("GetErrorString", invalidDevice); got != "invalid device ordinal" {
			t.Errorf("text %q", got)
		}
	})
}

// TestVisible opens the library in processes that see some of the devices only.
func TestVisible(t *testing.T) {
	s := New(t, Machine{Devices: make([]Device, 3)})
	for list, want := range map[string][]int{"2,0": {2, 0}, "1": {1}, "": {0, 1, 2}, "1,9,0": {1}, "0,0": {0}} {
		c := startChild(t, s, "HIP_VISIBLE_DEVICES="+list)
		if got := c.ask("count"); got != fmt.Sprint(len(want)) {
			t.Errorf("%q shows %s devices, want %v", list, got, want)
			continue
		}
		for i, d := range want {
			if got := c.ask("pci", i); got != s.Devices[d].PCI {
				t.Errorf("%q shows %s as %d, want %s", list, got, i, s.Devices[d].PCI)
			}
		}
	}
}

// TestAllocations checks what is known of device memory, and that the processor cannot touch it.
func TestAllocations(t *testing.T) {
	both(t, Machine{Devices: []Device{{Memory: 3 * mib}, {}}}, func(t *testing.T, s *Sim, r *rt) {
		const size = mib + 100
		p := r.alloc(size)
		for _, at := range []uintptr{p, p + size/2, p + size - 1} {
			if touchable(t, at) {
				t.Errorf("byte %d of device memory can be read", at-p)
			}
		}
		driver := "hipMemGetAddressRange"
		if !r.hip() {
			driver = "cuMemGetAddressRange_v2"
			r.must("cuInit", 0)
		}
		var base, n uintptr
		r.must(driver, &base, &n, p+size-1)
		if base != p || n != size {
			t.Errorf("allocation is %#x of %d bytes, want %#x of %d", base, n, p, size)
		}
		r.answers(notFound, driver, &base, &n, p+size)

		attribute := map[bool]string{true: "hipPointerGetAttribute", false: "cuPointerGetAttribute"}[r.hip()]
		r.must("SetDevice", 1)
		if got := r.number(attribute, 9, p+1); got != 0 {
			t.Errorf("device %d", got)
		}
		r.must("SetDevice", 0)
		r.answers(invalidValue, attribute, new(int32), 9, p+size)

		r.answers(outOfMemory, "Malloc", new(uintptr), 2*mib-99)
		r.must("Free", r.alloc(2*mib-100))
		r.answers(invalidValue, "Free", p+1)
		r.must("Free", p)
		r.answers(invalidValue, "Free", p)
		r.must("Free", r.alloc(2*mib))
		r.must("Free", 0)
	})
}

// TestMoves does random copies of every kind, single, in rows and in batches, and compares all memory with a model.
func TestMoves(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, s *Sim, r *rt) { testMoves(t, r, 0) })
	t.Run("cuda 13", func(t *testing.T) {
		s := New(t, Machine{Runtime: "cuda", Version: 13000})
		testMoves(t, open(t, s), 13000)
	})
}

// place is memory, and a model of what it holds.
type place struct {
	address uintptr
	model   []byte
}

func testMoves(t *testing.T, r *rt, version int) {
	const size = 64 << 10
	pinned, loose := pages(t, size), pages(t, size)
	r.must("HostRegister", addressOf(pinned), size, 3)
	near := r.alloc(size)
	r.must("DeviceEnablePeerAccess", 1, 0)
	r.must("SetDevice", 1)
	far := r.alloc(size)
	r.must("SetDevice", 0)
	places := []place{{near, nil}, {far, nil}, {addressOf(pinned), nil}, {addressOf(loose), nil}}
	for i := range places {
		places[i].model = make([]byte, size)
		for j := range places[i].model {
			places[i].model[j] = byte(rand.Uint32())
		}
		r.store(places[i].address, places[i].model)
	}
	stream := r.stream()

	rapid.Check(t, func(t *rapid.T) {
		to, from := &places[rapid.IntRange(0, 3).Draw(t, "to")], &places[rapid.IntRange(0, 3).Draw(t, "from")]
		// Halves, so that a copy within one place does not overlap.
		width := rapid.IntRange(0, 300).Draw(t, "width")
		a, b := rapid.IntRange(0, 1000).Draw(t, "to offset"), size/2+rapid.IntRange(0, 1000).Draw(t, "from offset")
		rows := rapid.IntRange(1, 40).Draw(t, "rows")
		toPitch, fromPitch := width+rapid.IntRange(0, 100).Draw(t, "to gap"), width+rapid.IntRange(0, 100).Draw(t, "from gap")
		switch rapid.SampledFrom([]string{"single", "rows", "batch"}).Draw(t, "what") {
		case "single":
			r.must("MemcpyAsync", to.address+uintptr(a), from.address+uintptr(b), width, anyKind, stream)
			rows = 1
		case "rows":
			r.must("Memcpy2DAsync", to.address+uintptr(a), toPitch, from.address+uintptr(b), fromPitch, width, rows, anyKind, stream)
		case "batch":
			var tos, froms, sizes []uintptr
			for i := range rows {
				tos = append(tos, to.address+uintptr(a+i*toPitch))
				froms = append(froms, from.address+uintptr(b+i*fromPitch))
				sizes = append(sizes, uintptr(width))
			}
			if code := r.batch(version, tos, froms, sizes, new(uintptr), stream); code != 0 {
				t.Fatalf("batch answers %d", code)
			}
		}
		r.must("StreamSynchronize", stream)
		for i := range rows {
			copy(to.model[a+i*toPitch:][:width], from.model[b+i*fromPitch:])
		}
		for i := range places {
			if !bytes.Equal(r.load(places[i].address, size), places[i].model) {
				t.Fatalf("place %d differs", i)
			}
		}
	})

	r.must("StreamDestroy", stream)
	r.must("HostUnregister", addressOf(pinned))
	r.must("Free", near)
	r.must("Free", far)
}

// TestBatchOrder checks that a batch happens last to first, which no program may rely on.
func TestBatchOrder(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, _ *Sim, r *rt) {
		p, s := r.alloc(3), r.stream()
		r.store(p, []byte{1, 2, 3})
		if code := r.batch(0, []uintptr{p, p}, []uintptr{p + 1, p + 2}, []uintptr{1, 1}, new(uintptr), s); code != 0 {
			t.Fatal(code)
		}
		r.must("StreamSynchronize", s)
		if got := r.load(p, 1)[0]; got != 2 {
			t.Errorf("the first copy of the batch was not the last: %d", got)
		}
		r.must("StreamDestroy", s)
		r.must("Free", p)
	})
}

// TestMistakes makes calls that a runtime refuses, or that this one does not let pass.
func TestMistakes(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, _ *Sim, r *rt) {
		const size = 4096
		near, s, e := r.alloc(size), r.stream(), r.event()
		host := pages(t, size)
		r.must("SetDevice", 1)
		far, farEvent := r.alloc(size), r.event()
		r.must("SetDevice", 0)

		for _, c := range []struct {
			why  string
			code int
			call string
			args []any
		}{
			{"over the end of an allocation", invalidValue, "MemcpyAsync", []any{near + 1, host, size, anyKind, s}},
			{"over the end of its source", invalidValue, "MemcpyAsync", []any{host, near + size - 1, 2, anyKind, s}},
			{"from nowhere", invalidValue, "MemcpyAsync", []any{near, 0, 1, anyKind, s}},
			{"from what is not mapped", invalidValue, "MemcpyAsync", []any{near, 4096, 1, anyKind, s}},
			{"behind an allocation", invalidValue, "MemcpyAsync", []any{near, near + size, 1, anyKind, s}},
			{"a size that overflows", invalidValue, "MemcpyAsync", []any{near, host, -1, anyKind, s}},
			{"a direction that is none", invalidDirection, "MemcpyAsync", []any{near, host, 1, 5, s}},
			{"a direction that it is not", invalidValue, "MemcpyAsync", []any{near, host, 1, 2, s}},
			{"device to device from memory that is not registered", invalidValue, "MemcpyAsync", []any{near, host, 1, 3, s}},
			{"memory of a device without access", peerNotEnabled, "MemcpyAsync", []any{far, near, 1, anyKind, s}},
			{"and the other way", peerNotEnabled, "MemcpyAsync", []any{near, far, 1, anyKind, s}},
			{"a stream that is none", r.either(contextDestroyed, invalidHandle), "MemcpyAsync", []any{near, host, 1, anyKind, near}},
			{"rows wider than the pitch", invalidPitch, "Memcpy2DAsync", []any{near, 9, host, 10, 10, 2, anyKind, s}},
			{"a last row over the end", invalidValue, "Memcpy2DAsync", []any{near, 100, host, 10, 10, size/100 + 2, anyKind, s}},
			{"rows that overflow", invalidValue, "Memcpy2DAsync", []any{near, 1 << 62, host, 10, 10, 5, anyKind, s}},
			{"an event of another device", invalidHandle, "EventRecord", []any{farEvent, s}},
			{"an event that is none", invalidHandle, "EventRecord", []any{s, s}},
			{"query what is no event", invalidHandle, "EventQuery", []any{near}},
			{"flags of a stream", invalidValue, "StreamCreateWithFlags", []any{new(uintptr), 2}},
			{"flags of an event", invalidValue, "EventCreateWithFlags", []any{new(uintptr), 8}},
			{"destroy the default stream", invalidHandle, "StreamDestroy", []any{0}},
			{"access to itself", invalidDevice, "DeviceEnablePeerAccess", []any{0, 0}},
			{"flags of access", invalidValue, "DeviceEnablePeerAccess", []any{1, 1}},
			{"free host memory", invalidValue, "Free", []any{addressOf(host)}},
			{"close what was not imported", invalidValue, "IpcCloseMemHandle", []any{near}},
			{"a handle of host memory", invalidValue, "IpcGetMemHandle", []any{new([8]uintptr), addressOf(host)}},
			{"unregister what is not registered", notRegistered, "HostUnregister", []any{addressOf(host)}},
			{"a device pointer of what is not registered", invalidValue, "HostGetDevicePointer", []any{new(uintptr), addressOf(host), 0}},
			{"register device memory", invalidValue, "HostRegister", []any{near, size, 0}},
			{"register what is not mapped", invalidValue, "HostRegister", []any{4096, size, 0}},
			{"register nothing", invalidValue, "HostRegister", []any{addressOf(host), 0, 0}},
		} {
			if got := r.call(c.call, c.args...); got != c.code {
				t.Errorf("%s: %s answers %d, want %d", c.why, c.call, got, c.code)
			}
		}

		r.must("EventQuery", e) // never recorded: nothing to wait for
		r.must("HostRegister", addressOf(host), size/2, 0)
		r.answers(registered, "HostRegister", addressOf(host)+size/4, size/2, 0)
		if got := r.word("HostGetDevicePointer", addressOf(host)+5, 0); got != addressOf(host)+5 {
			t.Errorf("device pointer %#x of %#x", got, addressOf(host)+5)
		}
		r.answers(notRegistered, "HostUnregister", addressOf(host)+1)
		r.must("HostUnregister", addressOf(host))

		r.must("DeviceEnablePeerAccess", 1, 0)
		r.answers(alreadyEnabled, "DeviceEnablePeerAccess", 1, 0)
		r.must("MemcpyAsync", far, near, size, anyKind, s)

		for _, e := range []uintptr{e, farEvent} {
			r.must("EventDestroy", e)
			r.answers(invalidHandle, "EventDestroy", e)
		}
		r.must("StreamDestroy", s)
		r.answers(r.either(contextDestroyed, invalidHandle), "StreamDestroy", s)
		r.answers(r.either(contextDestroyed, invalidHandle), "StreamSynchronize", s)
		r.must("Free", near)
		r.must("Free", far)
	})
}

func TestNoLink(t *testing.T) {
	both(t, Machine{Links: []Link{}}, func(t *testing.T, _ *Sim, r *rt) {
		r.answers(r.either(invalidDevice, peerUnsupported), "DeviceEnablePeerAccess", 1, 0)
	})
}

// TestBatchMistakes checks which copy of a batch is named.
func TestBatchMistakes(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, _ *Sim, r *rt) {
		p, s := r.alloc(100), r.stream()
		var failed uintptr
		to, from := []uintptr{p, p + 10, p + 20}, []uintptr{p + 50, p + 95, p + 60}
		if code := r.batch(0, to, from, []uintptr{10, 10, 10}, &failed, s); code != invalidValue || failed != 1 {
			t.Errorf("code %d, copy %d; want %d, 1", code, failed, invalidValue)
		}
		if code := r.batch(0, nil, nil, nil, &failed, s); code != invalidValue || failed != ^uintptr(0) {
			t.Errorf("an empty batch: code %d, copy %d", code, failed)
		}
		if code := r.batch(0, to[:1], from[:1], []uintptr{10}, &failed, 0); code != r.either(0, invalidValue) {
			t.Errorf("the default stream: code %d", code)
		}
		if !r.hip() {
			r.answers(invalidValue, "MemcpyBatchAsync", to, from, []uintptr{1, 1, 1}, 3, 0, 0, 0, &failed, s)
		}
		r.must("StreamSynchronize", s)
		r.must("StreamSynchronize", 0)
		r.must("StreamDestroy", s)
		r.must("Free", p)
	})
}

// TestStreams holds copies back, and checks that they are asynchronous, in order, and that freeing waits for them.
func TestStreams(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, s *Sim, r *rt) {
		const size = 1000
		a, b, c := r.alloc(size), r.alloc(size), r.alloc(size)
		want := bytes.Repeat([]byte{7}, size)
		r.store(a, want)
		r.store(c, make([]byte, size))
		stream, other, e := r.stream(), r.stream(), r.event()

		s.SetFaults(Fault{Effect: Stall, Times: 1})
		r.must("MemcpyAsync", b, a, size, anyKind, stream)
		r.must("MemcpyAsync", c, b, size, anyKind, stream)
		r.must("EventRecord", e, stream)
		r.answers(notReady, "EventQuery", e)
		if !bytes.Equal(r.load(c, size), make([]byte, size)) {
			t.Error("a copy overtook the one before it")
		}
		r.must("StreamDestroy", stream) // what it has to do, it does all the same

		freed := make(chan int)
		go func() { freed <- r.call("Free", b) }()
		for r.call("MemcpyAsync", b, b+500, 1, anyKind, other) == 0 { // until Free has begun
			runtime.Gosched()
		}
		s.SetFaults()
		if code := <-freed; code != 0 {
			t.Errorf("Free answers %d", code)
		}
		// Both copies of the stream that touched b are done.
		if !bytes.Equal(r.load(c, size), want) {
			t.Error("memory was freed before the copies from it were done")
		}
		r.awaits(0, e)
		r.must("EventDestroy", e)
		r.must("StreamDestroy", other)
		r.must("Free", a)
		r.must("Free", c)
	})
}

// TestEvents records an event again and destroys it while it is awaited.
func TestEvents(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, s *Sim, r *rt) {
		p, stream, e := r.alloc(10), r.stream(), r.event()
		r.must("EventRecord", e, stream)
		r.awaits(0, e)
		s.SetFaults(Fault{Effect: Stall})
		r.must("MemcpyAsync", p, p+5, 5, anyKind, stream)
		r.must("EventRecord", e, stream)
		r.answers(notReady, "EventQuery", e)
		r.must("EventDestroy", e)
		r.answers(invalidHandle, "EventQuery", e)
		s.SetFaults()
		r.must("StreamSynchronize", stream)
		r.must("StreamDestroy", stream)
		r.must("Free", p)
	})
}

// TestGoneMemory copies from registered memory that the program has unmapped.
func TestGoneMemory(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, s *Sim, r *rt) {
		const size = 8192
		p, stream, m := r.alloc(size), r.stream(), mapped(t, size)
		r.must("HostRegister", addressOf(m), size, 0)
		s.SetFaults(Fault{Effect: Stall})
		at := addressOf(m)
		r.must("MemcpyAsync", p, at, size, anyKind, stream)
		unmap(t, m)
		s.SetFaults()
		r.answers(700, "StreamSynchronize", stream)
		r.must("HostUnregister", at)
		r.must("StreamDestroy", stream)
		r.must("Free", p)
	})
}

func TestCounts(t *testing.T) {
	both(t, Machine{}, func(t *testing.T, s *Sim, r *rt) {
		p, stream, e, m := r.alloc(100), r.stream(), r.event(), pages(t, 100)
		r.must("HostRegister", addressOf(m), 100, 0)
		r.must("MemcpyAsync", p, p+50, 10, anyKind, stream)
		r.must("Memcpy2DAsync", p, 10, p+50, 10, 5, 3, anyKind, stream)
		r.batch(0, []uintptr{p, p + 10}, []uintptr{p + 50, p + 60}, []uintptr{5, 5}, new(uintptr), stream)
		r.must("StreamSynchronize", stream)
		want := Counts{Copies: 1, Copies2D: 1, Batches: 1, Batched: 2, Allocations: 1, Pinned: 1, Streams: 1, Events: 1}
		if got := s.Counts(); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
		r.must("HostUnregister", addressOf(m))
		r.must("EventDestroy", e)
		r.must("StreamDestroy", stream)
		r.must("Free", p)
	})
}

// TestCache checks that a library is kept, and that one that cannot be kept is compiled all the same.
func TestCache(t *testing.T) {
	if testing.Short() {
		t.Skip("compiles twice")
	}
	home := t.TempDir()
	t.Setenv("XDG_CACHE_HOME", home)
	New(t, Machine{})
	kept, err := filepath.Glob(filepath.Join(home, "umbp-gpusim", "*"))
	if err != nil || len(kept) != 1 || !strings.HasSuffix(kept[0], ".so") {
		t.Fatalf("kept %v, %v", kept, err)
	}
	t.Setenv("CC", "no-such-compiler")
	New(t, Machine{}) // fails if it was to be compiled

	file := filepath.Join(home, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("XDG_CACHE_HOME", file)
	if _, err := compiled(Machine{}.complete().flags()); err == nil || !strings.Contains(err.Error(), "install gcc") {
		t.Errorf("without a compiler: %v", err)
	}
	t.Setenv("CC", "")
	if library, err := compiled(Machine{}.complete().flags()); err != nil || len(library) == 0 {
		t.Errorf("without a cache: %v", err)
	}
}
