package main

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

func TestParsePlace(t *testing.T) {
	for _, c := range []struct {
		text string
		want place
		bad  bool
	}{
		{text: "host"},
		{text: "gpu", want: place{gpu: true}},
		{text: "gpu:1", want: place{gpu: true, device: "1"}},
		{text: "gpu:0000:c1:00.0", want: place{gpu: true, device: "0000:c1:00.0"}},
		{text: "", bad: true},
		{text: "gpu:", bad: true},
		{text: "host:0", bad: true},
		{text: "GPU", bad: true},
	} {
		got, err := parsePlace(c.text)
		if (err != nil) != c.bad || got != c.want {
			t.Errorf("%q: %+v, %v", c.text, got, err)
		} else if err == nil && got.String() != c.text {
			t.Errorf("%q is shown as %q", c.text, got)
		}
	}
}

func TestPoolPlace(t *testing.T) {
	for want, pool := range map[string]config.Pool{
		"host":  {Memory: "host", Device: "1"},
		"gpu":   {Memory: "gpu"},
		"gpu:1": {Memory: "gpu", Device: "1"},
	} {
		if got := poolPlace(&config.Config{Pool: pool}).String(); got != want {
			t.Errorf("%+v: %s, want %s", pool, got, want)
		}
	}
}

func TestPrintLinks(t *testing.T) {
	var b bytes.Buffer
	if err := printLinks(&b, linkRows([]backend.Link{
		{Near: "0000:02:00.0", Far: "0000:01:00.0", Cost: 7},
		{Near: "0000:01:00.0", Far: "0000:01:00.0", Text: "same GPU"},
		{Near: "0000:01:00.0", Far: "", Cost: 9, Text: "PCIe"},
		{Near: "", Far: "0000:01:00.0", Cost: 9, Text: "PCIe"},
	})); err != nil {
		t.Fatal(err)
	}
	const want = `FROM \ TO     host  0000:01:00.0  0000:02:00.0
host          -     PCIe          -
0000:01:00.0  PCIe  same GPU      -
0000:02:00.0  -     cost 7        -
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}

func TestReaches(t *testing.T) {
	host, all := backend.Kinds(backend.HostMemory), backend.Kinds(backend.HostMemory, backend.GPUMemory)
	network := backend.Capabilities{Local: host, Remote: host, Reach: backend.Network}
	near := backend.Capabilities{Local: host, Remote: host, Reach: backend.SameHost}
	gpus := backend.Capabilities{Local: all, Remote: all, Reach: backend.SameHost, Links: []backend.Link{{Near: "", Far: "a"}}}
	pools := []region.Descriptor{{Kind: backend.HostMemory}, {Kind: backend.GPUMemory, Place: "a"}, {Kind: backend.GPUMemory, Place: "b"}}
	for i, c := range []struct {
		caps     *backend.Capabilities
		sameHost bool
		want     [3]bool
	}{
		{&network, false, [3]bool{true, false, false}},
		{&near, true, [3]bool{true, false, false}},
		{&near, false, [3]bool{}},
		{&gpus, true, [3]bool{false, true, false}},
		{&gpus, false, [3]bool{}},
	} {
		for k := range pools {
			if got := reaches(c.caps, c.sameHost, &pools[k]); got != c.want[k] {
				t.Errorf("case %d, pool %d: %t", i, k, got)
			}
		}
	}
}

// unaddressed is a runtime for GPUs whose memory lies on the heap, behind addresses that nothing can follow.
type unaddressed struct {
	gpuRuntime
	memory []byte
}

const firstAddress = 1 << 52

func (u *unaddressed) Load(_ int, to []byte, address uint64) error {
	return u.copy(to, u.memory, address-firstAddress, false)
}

func (u *unaddressed) Store(_ int, address uint64, from []byte) error {
	return u.copy(from, u.memory, address-firstAddress, true)
}

func (u *unaddressed) copy(host, device []byte, offset uint64, store bool) error {
	if offset > uint64(len(device)) || uint64(len(host)) > uint64(len(device))-offset {
		return fmt.Errorf("%d bytes at %d of %d", len(host), offset, len(device))
	}
	if store {
		copy(device[offset:], host)
	} else {
		copy(host, device[offset:])
	}
	return nil
}

// TestMemory: memory of a GPU is filled, compared and cleared to its last byte, like that of the host.
func TestMemory(t *testing.T) {
	const size = 2*pieceSize + 13
	kinds := map[string]func() (*memory, []byte){
		"host": func() (*memory, []byte) {
			b := make([]byte, size)
			return &memory{size: size, bytes: b}, b
		},
		"gpu": func() (*memory, []byte) {
			rt := &unaddressed{memory: make([]byte, size)}
			return &memory{size: size, device: &gpuDevice{gpuRuntime: rt}, at: backend.GPURange{Address: firstAddress, Size: size}}, rt.memory
		},
	}
	for name, open := range kinds {
		t.Run(name, func(t *testing.T) {
			a, bytesA := open()
			b, bytesB := open()
			check := func(want error) {
				t.Helper()
				if err := a.compare(b); err != want {
					t.Errorf("compared: %v, want %v", err, want)
				}
			}
			check(nil)
			if err := a.fill(1); err != nil {
				t.Fatal(err)
			}
			check(errDiffers)
			copy(bytesB, bytesA)
			check(nil)
			for _, at := range []int{0, pieceSize - 1, pieceSize, size - 1} {
				bytesB[at] ^= 1
				check(errDiffers)
				bytesB[at] ^= 1
			}
			for at := 0; at < size; at += pieceSize {
				if end := min(at+pieceSize, size); bytes.Equal(bytesA[at:end], make([]byte, end-at)) {
					t.Errorf("nothing was filled from %d on", at)
				}
			}
			if err := b.clear(); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(bytesB, make([]byte, size)) {
				t.Error("not all was cleared")
			}
			want := []byte("somewhere")
			if err := a.store(pieceSize-3, want); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(want))
			if err := a.load(got, pieceSize-3); err != nil || !bytes.Equal(got, want) {
				t.Errorf("loaded %q, %v", got, err)
			}
		})
	}
}
