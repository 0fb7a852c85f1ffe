package backend_test

import (
	"math"
	"math/big"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

func goodRange() *backend.GPURange {
	return &backend.GPURange{
		Runtime: "hip", Device: "0000:c1:00.0", Address: 1 << 46, Size: 4096, Allocation: 1 << 20, Offset: 8192, Handle: make([]byte, 64),
	}
}

func TestMemoryCheck(t *testing.T) {
	host := func() *backend.Memory {
		return &backend.Memory{Kind: backend.HostMemory, Bytes: make([]byte, 8), FD: -1}
	}
	gpu := func() *backend.Memory { return &backend.Memory{Kind: backend.GPUMemory, GPU: goodRange(), FD: -1} }
	for name, tc := range map[string]struct {
		memory *backend.Memory
		change func(*backend.Memory)
		want   string // of the error; empty for none
	}{
		"host memory":           {host(), func(*backend.Memory) {}, ""},
		"with a descriptor":     {host(), func(m *backend.Memory) { m.FD = 3 }, ""},
		"of another kind":       {host(), func(m *backend.Memory) { m.Kind = 7 }, ""},
		"GPU memory":            {gpu(), func(*backend.Memory) {}, ""},
		"without a handle":      {gpu(), func(m *backend.Memory) { m.GPU.Handle = nil }, ""},
		"without an address":    {gpu(), func(m *backend.Memory) { m.GPU.Address = 0 }, ""},
		"the whole allocation":  {gpu(), func(m *backend.Memory) { m.GPU.Offset, m.GPU.Size = 0, m.GPU.Allocation }, ""},
		"host memory on a GPU":  {host(), func(m *backend.Memory) { m.GPU = goodRange() }, "memory of kind host"},
		"GPU memory nowhere":    {gpu(), func(m *backend.Memory) { m.GPU = nil }, "memory of kind gpu"},
		"GPU memory with bytes": {gpu(), func(m *backend.Memory) { m.Bytes = make([]byte, 8) }, "neither bytes nor"},
		"GPU memory with a fd":  {gpu(), func(m *backend.Memory) { m.FD = 0 }, "neither bytes nor"},
		"no runtime":            {gpu(), func(m *backend.Memory) { m.GPU.Runtime = "" }, "names its runtime"},
		"a long runtime":        {gpu(), func(m *backend.Memory) { m.GPU.Runtime = strings.Repeat("x", 65) }, "64 printable characters, not by"},
		"no device":             {gpu(), func(m *backend.Memory) { m.GPU.Device = "" }, "names its GPU"},
		"a long device":         {gpu(), func(m *backend.Memory) { m.GPU.Device = strings.Repeat("x", 65) }, "64 printable characters, not by"},
		"no printable runtime":  {gpu(), func(m *backend.Memory) { m.GPU.Runtime = "hip\n" }, `not by "hip\n"`},
		"no printable device":   {gpu(), func(m *backend.Memory) { m.GPU.Device = "\x1b[2J" }, `not by "\x1b[2J"`},
		"a long handle":         {gpu(), func(m *backend.Memory) { m.GPU.Handle = make([]byte, 257) }, "257 bytes"},
		"no size":               {gpu(), func(m *backend.Memory) { m.GPU.Size = 0 }, "0 bytes at offset 8192"},
		"over the end":          {gpu(), func(m *backend.Memory) { m.GPU.Offset = m.GPU.Allocation - 4095 }, "do not lie within a GPU's allocation of 1048576"},
		"around the end":        {gpu(), func(m *backend.Memory) { m.GPU.Address = math.MaxUint64 - 4094 }, "end of the address space"},
	} {
		tc.change(tc.memory)
		err := tc.memory.Check()
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case tc.want != "" && (backend.CodeOf(err) != backend.BadRequest || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s: got %v, want a bad request: %s", name, err, tc.want)
		}
	}
	if m := host(); m.Size() != 8 || m.Place() != "" {
		t.Errorf("host memory of %d bytes at %q", m.Size(), m.Place())
	}
	if m := gpu(); m.Size() != 4096 || m.Place() != "0000:c1:00.0" {
		t.Errorf("GPU memory of %d bytes at %q", m.Size(), m.Place())
	}
}

// TestGPURangeCheck compares with arithmetic that does not overflow.
func TestGPURangeCheck(t *testing.T) {
	number := rapid.OneOf(rapid.Uint64Range(0, 8), rapid.Uint64Range(math.MaxUint64-8, math.MaxUint64), rapid.Uint64())
	rapid.Check(t, func(t *rapid.T) {
		g := goodRange()
		g.Address, g.Size = number.Draw(t, "address"), number.Draw(t, "size")
		g.Allocation, g.Offset = number.Draw(t, "allocation"), number.Draw(t, "offset")
		sum := func(a, b uint64) *big.Int {
			return new(big.Int).Add(new(big.Int).SetUint64(a), new(big.Int).SetUint64(b))
		}
		good := g.Size > 0 && sum(g.Offset, g.Size).Cmp(new(big.Int).SetUint64(g.Allocation)) <= 0 && sum(g.Address, g.Size).IsUint64()
		if err := g.Check(); (err == nil) != good {
			t.Fatalf("%+v: %v", g, err)
		}
	})
}

func TestLink(t *testing.T) {
	all, none := backend.Capabilities{}, backend.Capabilities{Links: []backend.Link{}}
	some := backend.Capabilities{Links: []backend.Link{{Near: "a", Far: "b", Cost: 2, Text: "XGMI, 2 hops"}, {Far: "a"}}}
	for _, near := range []string{"", "a", "b"} {
		for _, far := range []string{"", "a", "b"} {
			if l, ok := all.Link(near, far); !ok || l != (backend.Link{Near: near, Far: far}) {
				t.Errorf("%q to %q: %+v, %v, where everything is linked", near, far, l, ok)
			}
			if l, ok := none.Link(near, far); ok {
				t.Errorf("%q to %q: %+v, where nothing is linked", near, far, l)
			}
			i := slices.IndexFunc(some.Links, func(l backend.Link) bool { return l.Near == near && l.Far == far })
			if l, ok := some.Link(near, far); ok != (i >= 0) || ok && l != some.Links[i] {
				t.Errorf("%q to %q: %+v, %v", near, far, l, ok)
			}
		}
	}
}
