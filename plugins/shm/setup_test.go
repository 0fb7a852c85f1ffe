package shm

import (
	"encoding/binary"
	"math"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
	"github.com/umbp/umbp/plugin-sdk/samehost"
)

func TestRegisterRefuses(t *testing.T) {
	i := newInstance(t, peer("a", 1))
	good := memory(t, 1, 4096, all)
	for _, c := range []struct {
		name   string
		change func(*backend.Memory)
		code   backend.Code
	}{
		{"memory of a GPU", func(m *backend.Memory) { m.Kind = backend.GPUMemory }, backend.Unsupported},
		{"no bytes", func(m *backend.Memory) { m.Bytes = nil }, backend.BadRequest},
		{"negative offset", func(m *backend.Memory) { m.FDOffset = -1 }, backend.BadRequest},
		{"offset overflow", func(m *backend.Memory) { m.FDOffset = math.MaxInt64 }, backend.BadRequest},
		{"closed descriptor", func(m *backend.Memory) { m.FD = 1 << 20 }, backend.Internal},
	} {
		m := good
		c.change(&m)
		if _, err := i.Register(soon(t), m); backend.CodeOf(err) != c.code {
			t.Errorf("%s: got %v, want code %q", c.name, err, c.code)
		}
	}
	register(t, i, good)
}

// TestMapRefuses lends what must not be mapped.
func TestMapRefuses(t *testing.T) {
	sealed, err := backendtest.NewMemfd(5, 8192, all, unix.F_SEAL_SHRINK)
	must(t, err)
	t.Cleanup(func() { backendtest.FreeMemfd(sealed) })
	unsealed, err := backendtest.NewMemfd(5, 8192, all, unix.F_SEAL_GROW)
	must(t, err)
	t.Cleanup(func() { backendtest.FreeMemfd(unsealed) })
	ordinary, err := os.CreateTemp(socketDir(t), "x")
	must(t, err)
	must(t, ordinary.Truncate(1<<20))
	defer ordinary.Close()
	note := binary.BigEndian.AppendUint64(nil, 4096)
	m := new(mover)
	for _, c := range []struct {
		name string
		lent samehost.Lent
		text string
	}{
		{"no file", samehost.Lent{Size: 8192, File: -1, Note: note}, "without its file"},
		{"no place", samehost.Lent{Size: 8192, File: sealed.FD}, "without its place"},
		{"a long note", samehost.Lent{Size: 8192, File: sealed.FD, Note: make([]byte, 9)}, "without its place"},
		{"unsealed", samehost.Lent{Size: 8192, File: unsealed.FD, Note: note}, "F_SEAL_SHRINK"},
		{"ordinary file", samehost.Lent{Size: 8192, File: int(ordinary.Fd()), Note: note}, "F_SEAL_SHRINK"},
		{"too small", samehost.Lent{Size: 8193, File: sealed.FD, Note: note}, "12289 of a file of 12288"},
	} {
		_, err := m.Map(soon(t), c.lent)
		wantCode(t, err, backend.Unsupported, c.text)
	}
	r, err := m.Map(soon(t), samehost.Lent{Size: 8192, File: sealed.FD, Note: note})
	must(t, err)
	if r.Size() != 8192 {
		t.Errorf("the region has %d bytes, want 8192", r.Size())
	}
	must(t, r.Close())
}

func TestInfo(t *testing.T) {
	i := newInstance(t, peer("a", 1), "window=7")
	info := i.Info()
	if info.Name != Factory.Name || info.Capabilities.Window != 7 || !info.Capabilities.NeedsFD ||
		info.Capabilities.Reach != backend.SameHost {
		t.Errorf("got %+v", info)
	}
}

// TestFactory goes the way of a host.
func TestFactory(t *testing.T) {
	options, err := backend.CheckOptions(Factory.Options, map[string]string{"socket_dir": socketDir(t)})
	must(t, err)
	b, err := Factory.Open(soon(t), backend.Config{Self: peer("a", 1), Options: options})
	must(t, err)
	must(t, b.Close())
	if b, err := Factory.Open(soon(t), backend.Config{Options: badDir(t)}); err == nil || b != nil {
		t.Errorf("got a backend %v and error %v, want an error alone", b, err)
	}
}

func badDir(t *testing.T) backend.Values {
	v, err := backend.CheckOptions(Factory.Options, map[string]string{"socket_dir": "/proc/none/none"})
	must(t, err)
	return v
}
