package xgmi

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
)

// places are the pairs of devices that bytes move between, near and far; -1 is the host.
var places = [][2]int{{0, 0}, {0, 1}, {1, 0}, {-1, 0}, {0, -1}}

// patterns are transfers of a region of 1 MiB.
func patterns() map[string][]backend.Segment {
	r := rand.New(rand.NewPCG(1, 2))
	p := map[string][]backend.Segment{
		"one byte":    {{Local: 77, Remote: 99, Length: 1}},
		"all":         {{Length: mib}},
		"the end":     {{Local: mib - 10, Remote: mib - 10, Length: 10}},
		"crosswise":   {{Local: mib / 2, Length: mib / 2}, {Remote: mib / 2, Length: mib / 2}},
		"cut in many": {{Local: 5, Remote: 6, Length: mib - 6}},
	}
	for _, n := range r.Perm(64) {
		i := uint64(len(p["shuffled pages"]))
		p["shuffled pages"] = append(p["shuffled pages"], backend.Segment{Local: uint64(n) * 4096, Remote: i * 8192, Length: 4096})
		p["rows"] = append(p["rows"], backend.Segment{Local: i * 3000, Remote: i * 9000, Length: 2999})
	}
	// Pieces of any length, in any order of the local side.
	var local []uint64
	at := uint64(0)
	for at < mib/2 {
		s := backend.Segment{Remote: at, Length: 1 + r.Uint64N(9000)}
		p["pieces"] = append(p["pieces"], s)
		local = append(local, at)
		at += s.Length + r.Uint64N(3)*r.Uint64N(50)
	}
	for i, s := range p["pieces"] {
		p["pieces"][i].Local = mib - local[i] - s.Length
	}
	return p
}

func TestMoves(t *testing.T) {
	for _, m := range []gpusim.Machine{{Runtime: "hip"}, {Runtime: "hip", Version: 60342131}, {Runtime: "cuda"}} {
		for _, pair := range places {
			t.Run(fmt.Sprintf("%s %d/%d to %d", m.Runtime, m.Version, pair[0], pair[1]), func(t *testing.T) {
				w := newWorld(t, m)
				c := w.newCouple(pair[0], pair[1], mib, "part_bytes=64KiB")
				cookie := uint64(0)
				for name, segments := range patterns() {
					for _, op := range []backend.Op{backend.Write, backend.Read} {
						cookie++
						near, far := filled(mib, 100+cookie), filled(mib, 200+cookie)
						must(t, w.store(&c.near, near))
						must(t, w.store(&c.far, far))
						must(t, post(c.session, op, cookie, segments...))
						if done := c.sink.Wait(t, cookie); done.Err != nil {
							t.Fatalf("%s %s: %v", op, name, done.Err)
						}
						model(op, near, far, segments...)
						wantSame(t, op.String()+" "+name+": near region", w.content(c.near), near)
						wantSame(t, op.String()+" "+name+": far region", w.content(c.far), far)
					}
				}
				if n := c.a.count(t, "self_tests"); n != 1 {
					t.Errorf("%d self-tests, want 1", n)
				}
				if pinned := w.sim.Counts().Pinned; (pinned > 0) != (pair[0] < 0 || pair[1] < 0) {
					t.Errorf("%d ranges are pinned", pinned)
				}
				if lines := w.log.with(); len(lines) > 0 {
					t.Errorf("logged: %q", lines)
				}
			})
		}
	}
}

// TestManyTransfers has many sessions in both directions, side by side, each with a part of the regions of its own.
func TestManyTransfers(t *testing.T) {
	const size, slots = 4 * mib, 64
	w := newWorld(t, gpusim.Machine{})
	c := w.newCouple(0, 1, size, "part_bytes=64KiB", "window=16")
	near, far := w.content(c.near), w.content(c.far)
	sessions := []backend.Session{c.session}
	for range 3 {
		s := bind(t, c.endpoint, 1, c.remote, c.sink)
		sessions = append(sessions, s)
	}
	for i := range uint64(slots) {
		op := backend.Write
		if i%2 == 1 {
			op = backend.Read
		}
		at := i * size / slots
		segments := []backend.Segment{
			{Local: at + 100, Remote: at, Length: 20000}, {Local: at + 30000, Remote: at + 21000, Length: 300}, {Local: at + 21000, Remote: at + 22000, Length: 7},
		}
		must(t, backendtest.PostWhenFree(sessions[i%4], op, i+1, segments...))
		model(op, near, far, segments...)
	}
	for i := range uint64(slots) {
		must(t, c.sink.Wait(t, i+1).Err)
	}
	wantSame(t, "near region", w.content(c.near), near)
	wantSame(t, "far region", w.content(c.far), far)
}

// TestCalls counts what transfers cost: a grid is one call, small pieces are one batch where the runtime has that, and
// every part has one event.
func TestCalls(t *testing.T) {
	rows, pieces := patterns()["rows"], patterns()["shuffled pages"][:8]
	for _, c := range []struct {
		name     string
		machine  gpusim.Machine
		options  []string
		segments []backend.Segment
		want     map[string]uint64
	}{
		{"rows", gpusim.Machine{}, nil, rows, map[string]uint64{"copies_2d": 1, "events": 1}},
		{"pieces", gpusim.Machine{}, nil, pieces, map[string]uint64{"batches": 1, "batched_copies": 8, "events": 1}},
		{"pieces, batches off", gpusim.Machine{}, []string{"batch=off"}, pieces, map[string]uint64{"copies": 8, "events": 1}},
		{"pieces, no batches", gpusim.Machine{Version: 60342131}, nil, pieces, map[string]uint64{"copies": 8, "events": 1}},
		{"one", gpusim.Machine{}, nil, []backend.Segment{{Length: mib}}, map[string]uint64{"copies": 1, "events": 1}},
		{"parts", gpusim.Machine{}, []string{"part_bytes=256KiB"}, []backend.Segment{{Length: mib}}, map[string]uint64{"copies": 4, "events": 4}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, c.machine)
			k := w.newCouple(0, 0, mib, append(c.options, "self_test=false")...)
			must(t, post(k.session, backend.Write, 1, c.segments...))
			must(t, k.sink.Wait(t, 1).Err)
			for _, got := range k.a.Counters() {
				if got.Value != c.want[got.Name] {
					t.Errorf("%s: %d, want %d", got.Name, got.Value, c.want[got.Name])
				}
			}
			s := w.sim.Counts()
			did := map[string]uint64{"copies": uint64(s.Copies), "copies_2d": uint64(s.Copies2D), "batches": uint64(s.Batches), "batched_copies": uint64(s.Batched)}
			for name, n := range did {
				if n != c.want[name] {
					t.Errorf("the runtime counts %d %s, want %d", n, name, c.want[name])
				}
			}
		})
	}
}

// TestRefusals has what cannot be moved refused, with the reason.
func TestRefusals(t *testing.T) {
	w := newWorld(t, gpusim.Machine{Links: []gpusim.Link{{From: 0, To: 1}}}) // and not back
	a, b := w.node(peer("a", 1)), w.node(peer("b", 2))
	e := a.connect(t, b.self, b)
	remote := map[int]backend.Remote{}
	for _, device := range []int{-1, 0, 1} {
		a.register(t, w.region(backend.RegionID(2+device), device, 64*kib, 0))
		remote[device] = b.register(t, w.region(backend.RegionID(12+device), device, 64*kib, all))
	}
	for _, c := range []struct {
		near, far int
		words     string // empty: it works
	}{
		{-1, -1, "link"}, {-1, 0, ""}, {0, -1, ""}, {0, 1, ""}, {1, 0, "link"}, {1, 1, ""},
	} {
		s, err := e.Session(soon(t), backend.RegionID(2+c.near), remote[c.far], new(sink))
		if c.words == "" {
			must(t, err)
			must(t, s.Close())
			continue
		}
		wantCode(t, err, backend.Unsupported, c.words)
		// A descriptor that says another place leads no further.
		lie := remote[c.far]
		lie.Place = map[int]string{-1: w.sim.Devices[0].PCI, 0: w.sim.Devices[1].PCI}[c.far]
		_, err = e.Session(soon(t), backend.RegionID(2+c.near), lie, new(sink))
		wantCode(t, err, backend.Unsupported)
	}
	if links := a.Info().Capabilities.Links; len(links) != 2+1+4 {
		t.Errorf("links %+v, want 7", links)
	}
}

func TestRegisterRefuses(t *testing.T) {
	w := newWorld(t, gpusim.Machine{})
	n, narrow := w.node(peer("a", 1)), w.node(peer("b", 2), "devices=00000000:C1:00.0") // as nvidia-smi writes it
	good, other, memory := w.region(1, 0, 64*kib, all), w.region(2, 1, 64*kib, all), w.region(3, -1, 64*kib, all)
	for _, c := range []struct {
		name  string
		at    *node
		from  backend.Memory
		spoil func(m *backend.Memory)
		code  backend.Code
		words string
	}{
		{"no range", n, good, func(m *backend.Memory) { m.GPU = nil }, backend.BadRequest, ""},
		{"host memory without bytes", n, memory, func(m *backend.Memory) { m.Bytes = nil }, backend.BadRequest, ""},
		{"a negative file offset", n, memory, func(m *backend.Memory) { m.FDOffset = -1 }, backend.BadRequest, ""},
		{"another runtime", n, good, func(m *backend.Memory) { m.GPU.Runtime = "cuda" }, backend.Unsupported, `"cuda"`},
		{"no such device", n, good, func(m *backend.Memory) { m.GPU.Device = "0000:ff:00.0" }, backend.Unsupported, "0000:c1:00.0, 0000:c2:00.0"},
		{"a device that is not used", narrow, other, func(*backend.Memory) {}, backend.Unsupported, "0000:c2:00.0 is not among those"},
		{"another device than it says", n, good, func(m *backend.Memory) { m.GPU.Device = other.GPU.Device }, backend.BadRequest, "the runtime has it"},
		{"another offset", n, good, func(m *backend.Memory) { m.GPU.Offset -= 8 }, backend.BadRequest, "the runtime has it"},
		{"another allocation", n, good, func(m *backend.Memory) { m.GPU.Allocation++ }, backend.BadRequest, "the runtime has it"},
		{"beyond the allocation", n, good, func(m *backend.Memory) { m.GPU.Size += 1 << 30 }, backend.BadRequest, ""},
		{"no memory at the address", n, good, func(m *backend.Memory) { m.GPU.Address = 4096 }, backend.Unsupported, "does not know"},
		{"own handle without an address", n, good, func(m *backend.Memory) { m.GPU.Address = 0 }, backend.Unsupported, "cannot be imported"},
		{"no handle, no address", n, good, func(m *backend.Memory) { m.GPU.Address, m.GPU.Handle = 0, nil }, backend.Unsupported, "handle"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := c.from
			if m.GPU != nil {
				g := *m.GPU
				m.GPU = &g
			}
			c.spoil(&m)
			_, err := c.at.Register(soon(t), m)
			wantCode(t, err, c.code, c.words)
		})
	}
	if _, err := narrow.Register(soon(t), good); err != nil {
		t.Error(err)
	}
}

func TestOptions(t *testing.T) {
	w := newWorld(t, gpusim.Machine{Devices: make([]gpusim.Device, 3)})
	for _, c := range []struct {
		devices string
		want    []string
	}{
		{"", []string{"0000:c1:00.0", "0000:c2:00.0", "0000:c3:00.0"}},
		{"2, 0000:C1:00.0", []string{"0000:c1:00.0", "0000:c3:00.0"}},
	} {
		n := w.node(peer("a", 1), "devices="+c.devices)
		var got []string
		for _, d := range n.engine.devices {
			got = append(got, d.PCI)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("devices %q: %v, want %v", c.devices, got, c.want)
		}
	}
	for _, c := range []struct {
		option string
		code   backend.Code
		words  string
	}{
		{"devices=0,7", backend.BadRequest, "there is no GPU 7 (option devices); there are 0000:c1:00.0 (number 0), 0000:c2:00.0 (number 1)"},
		{"library=/nowhere/libamdhip64.so.6", backend.Unsupported, "/nowhere/libamdhip64.so.6"},
		{"socket_dir=/dev/null", backend.BadRequest, "/dev/null"},
	} {
		_, err := openInstance(peer("a", 1), w.options(c.option), nil)
		wantCode(t, err, c.code, c.words, "xgmi: open")
	}
}
