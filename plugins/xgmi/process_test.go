package xgmi

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
	"github.com/umbp/umbp/plugin-sdk/samehost"
)

// TestTwoProcesses moves bytes to and from another process, over every pair of places.
func TestTwoProcesses(t *testing.T) {
	for _, m := range []gpusim.Machine{{Runtime: "hip"}, {Runtime: "hip", Version: 50221151}, {Runtime: "cuda"}} {
		t.Run(fmt.Sprintf("%s %d", m.Runtime, m.Version), func(t *testing.T) {
			w := newWorld(t, m)
			a, b := w.node(peer("a", 1), "part_bytes=64KiB"), w.child(peer("b", 2))
			e := a.connect(t, b.Self, b)
			for i, pair := range places {
				id := backend.RegionID(1 + i)
				near := w.region(id, pair[0], mib, 0)
				a.register(t, near)
				remote := b.register(t, RegionArgs{ID: 100 + id, Device: pair[1], Size: mib, Rights: all})
				k := new(sink)
				s := bind(t, e, id, remote, k)
				ours, theirs := w.content(near), filled(mib, uint64(100+id))
				for j, segments := range [][]backend.Segment{
					patterns()["pieces"], patterns()["rows"], patterns()["all"], patterns()["the end"],
				} {
					for op, cookie := range map[backend.Op]uint64{backend.Write: uint64(2 * j), backend.Read: uint64(2*j + 1)} {
						must(t, post(s, op, cookie, segments...))
						must(t, k.Wait(t, cookie).Err)
						model(op, ours, theirs, segments...)
					}
				}
				wantSame(t, "near region", w.content(near), ours)
				wantSame(t, "far region", b.content(t, 100+id), theirs)
			}
			must(t, e.Close())
			if in, out := a.count(t, "imports"), a.count(t, "imports_closed"); in == 0 || in != out {
				t.Errorf("%d imports, %d closed", in, out)
			}
			must(t, b.Call("Close", nil, nil))
		})
	}
}

// TestRights has host memory of another process that may only be read, or only be written.
func TestRights(t *testing.T) {
	w := newWorld(t, gpusim.Machine{})
	a, b := w.node(peer("a", 1)), w.child(peer("b", 2))
	near := w.region(1, 0, mib, 0)
	a.register(t, near)
	e, k := a.connect(t, b.Self, b), new(sink)
	for i, device := range []int{-1, 0} {
		id := backend.RegionID(10 * (i + 1))
		allowed := map[backend.Op]backend.Rights{backend.Read: backend.RemoteRead, backend.Write: backend.RemoteWrite}
		for op, rights := range allowed {
			id++
			s := bind(t, e, 1, b.register(t, RegionArgs{ID: id, Device: device, Size: mib, Rights: rights}), k)
			other := backend.Read ^ backend.Write ^ op
			wantCode(t, post(s, other, uint64(id), backend.Segment{Length: mib}), backend.Denied)
			must(t, post(s, op, uint64(id), backend.Segment{Length: mib}))
			must(t, k.Wait(t, uint64(id)).Err)
			wantSame(t, op.String(), w.content(near), b.content(t, id))
		}
	}
}

// TestOneImport has eight regions of one allocation, used by two connections of two instances: it is imported once.
func TestOneImport(t *testing.T) {
	const n = 8
	w := newWorld(t, gpusim.Machine{})
	b := w.child(peer("b", 2))
	var remotes []backend.Remote
	must(t, b.Call("Slices", RegionArgs{ID: 100, Device: 1, Size: 64 * kib, Rights: all}, &remotes))
	near := w.region(1, 0, n*64*kib, 0)
	var nodes []*node
	var ends []backend.Endpoint
	for i := range uint64(2) {
		a := w.node(peer("a", 1+i), "self_test=false")
		a.register(t, near)
		e, k := a.connect(t, b.Self, b), new(sink)
		nodes, ends = append(nodes, a), append(ends, e)
		for j, r := range remotes {
			r.Peer = b.Self
			s := bind(t, e, 1, r, k)
			must(t, post(s, backend.Read, uint64(j), backend.Segment{Local: uint64(j) * 64 * kib, Length: 64 * kib}))
			must(t, k.Wait(t, uint64(j)).Err)
			wantSame(t, "slice", w.content(near)[j*64*kib:][:64*kib], filled(64*kib, uint64(r.Region)))
		}
	}
	if got := w.sim.Counts().Imports; got != 1 {
		t.Errorf("%d imports are open, want 1", got)
	}
	must(t, ends[0].Close())
	if got := w.sim.Counts().Imports; got != 1 {
		t.Errorf("%d imports are open after the first user has gone, want 1", got)
	}
	must(t, ends[1].Close())
	if in, out := nodes[0].count(t, "imports"), nodes[1].count(t, "imports_closed"); in != 1 || out != 1 {
		t.Errorf("the first user has imported %d times, the last one closed %d times", in, out)
	}
}

// TestManyHandles has 64 allocations of another process in use at once, each with bytes of its own.
func TestManyHandles(t *testing.T) {
	const n, size = 64, 16 * kib
	w := newWorld(t, gpusim.Machine{})
	a, b := w.node(peer("a", 1)), w.child(peer("b", 2))
	near := w.region(1, 0, n*size, 0)
	a.register(t, near)
	e, k := a.connect(t, b.Self, b), new(sink)
	var sessions []backend.Session
	for i := range n {
		r := b.register(t, RegionArgs{ID: backend.RegionID(100 + i), Device: i % 2, Size: size, Rights: all})
		s := bind(t, e, 1, r, k)
		sessions = append(sessions, s)
	}
	for i, s := range sessions {
		must(t, post(s, backend.Read, uint64(i), backend.Segment{Local: uint64(i) * size, Length: size}))
	}
	for i := range sessions {
		must(t, k.Wait(t, uint64(i)).Err)
	}
	got := w.content(near)
	for i, s := range sessions {
		wantSame(t, "what was read", got[i*size:][:size], filled(size, uint64(100+i)))
		must(t, post(s, backend.Write, uint64(n+i), backend.Segment{Local: uint64(n-1-i) * size, Length: size}))
	}
	for i := range sessions {
		must(t, k.Wait(t, uint64(n+i)).Err)
		wantSame(t, "what was written", b.content(t, backend.RegionID(100+i)), got[(n-1-i)*size:][:size])
	}
	if got := w.sim.Counts().Imports; got != n+2 { // and the scratch of two self-tests
		t.Errorf("%d imports are open, want %d", got, n+2)
	}
	// What the target deregisters, it gets back, with the connection.
	must(t, b.Call("Deregister", backend.RegionID(100), nil))
	<-e.Done()
	must(t, e.Close())
	if got := w.sim.Counts().Imports; got != 0 {
		t.Errorf("%d imports are open, want none", got)
	}
}

// TestLentOn has a process lend memory of a third one, as a backend that is a process of its own does: this process owns
// the memory, a lends it, b writes it.
func TestLentOn(t *testing.T) {
	w := newWorld(t, gpusim.Machine{})
	a, b := w.child(peer("a", 1)), w.child(peer("b", 2))
	ours := w.region(5, 1, mib, all)
	sent := ours
	g := *ours.GPU
	g.Address, sent.GPU = 0, &g
	var remote backend.Remote
	must(t, a.Call("Import", sent, &remote))
	remote.Peer = a.Self
	var offer, answer []byte
	must(t, b.Call("Offer", a.Self, &offer))
	must(t, a.Call("Answer", backendtest.AnswerArgs{Peer: b.Self, Offer: offer}, &answer))
	must(t, b.Call("Establish", answer, nil))
	b.register(t, RegionArgs{ID: 1, Device: 0, Size: mib})
	must(t, b.Call("Session", PostArgs{Local: 1, Remote: remote}, nil))
	segments := patterns()["pieces"]
	must(t, b.Call("Post", PostArgs{Op: backend.Write, Cookie: 1, Segments: segments}, nil))
	until(t, "the transfer completes", func() (done bool) {
		must(t, b.Call("Completed", uint64(1), &done))
		return done
	})
	want := w.content(ours)
	model(backend.Write, filled(mib, 1), want, segments...)
	wantSame(t, "the memory of the third process", w.content(ours), want)
	must(t, a.Call("Deregister", backend.RegionID(5), nil)) // which has b let go of the handle
	for _, c := range []process{b, a} {
		must(t, c.Call("Close", nil, nil))
	}
}

// TestImportFails has the runtime refuse handles. The session is refused, for another backend to be tried; when the
// runtime takes them again, the same connection works.
func TestImportFails(t *testing.T) {
	w := newWorld(t, gpusim.Machine{})
	a, b := w.node(peer("a", 1)), w.child(peer("b", 2))
	a.register(t, w.region(1, 0, mib, 0))
	remote := b.register(t, RegionArgs{ID: 5, Device: 1, Size: mib, Rights: all})
	e := a.connect(t, b.Self, b)
	for after := range 2 { // the region's own handle, and that of the scratch
		w.sim.SetFaults(gpusim.Fault{Call: gpusim.Imports, After: after, Code: 400})
		_, err := e.Session(soon(t), 1, remote, new(sink))
		wantCode(t, err, backend.Unsupported, "cannot be imported", "IpcOpenMemHandle")
	}
	w.sim.SetFaults()
	s := bind(t, e, 1, remote, new(sink))
	must(t, s.Close())
}

// TestHostileNote maps what a peer makes up.
func TestHostileNote(t *testing.T) {
	w := newWorld(t, gpusim.Machine{})
	a, b := w.node(peer("a", 1), "devices=0000:c1:00.0"), w.child(peer("b", 2))
	var lent backend.GPURange
	must(t, b.Call("Range", RegionArgs{ID: 5, Size: mib}, &lent))
	before := w.sim.Counts().Imports
	for _, c := range []struct {
		name  string
		spoil func(g *backend.GPURange)
		code  backend.Code
		words string
	}{
		{"a size beyond the allocation", func(g *backend.GPURange) { g.Size = mib + 2*margin }, backend.BadRequest, ""},
		{"an offset beyond the allocation", func(g *backend.GPURange) { g.Offset = mib }, backend.BadRequest, ""},
		{"an overflow", func(g *backend.GPURange) { g.Offset = 1<<64 - 4096 }, backend.BadRequest, ""},
		{"a larger allocation than there is", func(g *backend.GPURange) { g.Allocation, g.Size = 1<<40, 1<<39 }, backend.BadRequest, "is said to have"},
		{"a device that is not used", func(g *backend.GPURange) { g.Device = "0000:c2:00.0" }, backend.Unsupported, "0000:c2:00.0"},
		{"another runtime", func(g *backend.GPURange) { g.Runtime = "cuda" }, backend.Unsupported, "cuda"},
		{"a short handle", func(g *backend.GPURange) { g.Handle = g.Handle[:63] }, backend.Unsupported, "63"},
		{"a handle of nothing", func(g *backend.GPURange) { g.Handle = make([]byte, 64) }, backend.Unsupported, "cannot be imported"},
	} {
		g := lent
		c.spoil(&g)
		_, err := a.engine.Map(soon(t), samehost.Lent{Size: g.Size, File: -1, Note: encodeGPU(&g)})
		wantCode(t, err, c.code, c.words)
		if n := w.sim.Counts().Imports; n != before {
			t.Errorf("%s: %d imports are left open", c.name, n-before)
		}
	}
	r, err := a.engine.Map(soon(t), samehost.Lent{Size: lent.Size, File: -1, Note: encodeGPU(&lent)})
	must(t, err)
	must(t, r.Close())
}

// TestTargetKilled kills the target while bytes move.
func TestTargetKilled(t *testing.T) {
	w := newWorld(t, gpusim.Machine{Rate: 50 << 20})
	a, b := w.node(peer("a", 1), "part_bytes=64KiB"), w.child(peer("b", 2))
	a.register(t, w.region(1, 0, 4*mib, 0))
	remote := b.register(t, RegionArgs{ID: 5, Device: 1, Size: 4 * mib, Rights: all})
	e, k := a.connect(t, b.Self, b), new(sink)
	s := bind(t, e, 1, remote, k)
	before := a.count(t, "copies")
	must(t, post(s, backend.Write, 1, backend.Segment{Length: 4 * mib}))
	until(t, "some is copied", func() bool { return a.count(t, "copies") > before })
	b.End()
	<-e.Done()
	c := k.Wait(t, 1)
	wantCode(t, c.Err, backend.PathDown)
	wantOutcomes(t, c, backend.Failed)
	must(t, e.Close())
	if got := w.sim.Counts().Imports; got != 0 {
		t.Errorf("%d imports of a process that is gone are open", got)
	}
	// Its successor is reached.
	b2 := w.child(peer("b", 3))
	remote = b2.register(t, RegionArgs{ID: 5, Device: 1, Size: mib, Rights: all})
	s = bind(t, a.connect(t, b2.Self, b2), 1, remote, k)
	must(t, post(s, backend.Write, 2, backend.Segment{Length: mib}))
	must(t, k.Wait(t, 2).Err)
}

// stalledInitiator has another process write our memory, with copies that stall.
func stalledInitiator(t *testing.T) (w *world, a process, b *node, far backend.Memory) {
	w = newWorld(t, gpusim.Machine{})
	a, b = w.child(peer("a", 1), "part_bytes=64KiB"), w.node(peer("b", 2))
	far = w.region(5, 1, mib, all)
	remote := b.register(t, far)
	a.ConnectTo(t, b.self, b)
	a.register(t, RegionArgs{ID: 1, Device: 0, Size: mib})
	must(t, a.Call("Session", PostArgs{Local: 1, Remote: remote}, nil))
	before := a.count(t, "copies")
	w.sim.SetFaults(gpusim.Fault{Effect: gpusim.Stall})
	must(t, a.Call("Post", PostArgs{Op: backend.Write, Cookie: 1, Segments: []backend.Segment{{Length: mib}}}, nil))
	until(t, "copies stall", func() bool { return a.count(t, "copies") > before })
	return w, a, b, far
}

// TestInitiatorKilled kills the initiator while its copies stall. The fence waits until the process is gone.
func TestInitiatorKilled(t *testing.T) {
	w, a, b, far := stalledInitiator(t)
	want := w.content(far)
	must(t, a.Kill())
	must(t, b.Fence(soon(t), a.Self))
	// Nobody has waited for the process yet: it is there, and dead.
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", a.Pid))
	must(t, err)
	if _, state, _ := strings.Cut(string(stat), ") "); !strings.HasPrefix(state, "Z") {
		t.Errorf("the fence returned while the process was there: %.20s", state)
	}
	w.sim.SetFaults()
	wantSame(t, "far region", w.content(far), want)
}

// TestConnectionCut ends the initiator's connection while its copies stall, and the process lives on: the fence does not
// take the end of the connection for quiet.
func TestConnectionCut(t *testing.T) {
	w, a, b, _ := stalledInitiator(t)
	must(t, a.Call("Cut", nil, nil))
	ctx, cancel := contextUntil(time.After(50 * time.Millisecond))
	defer cancel()
	wantCode(t, b.Fence(ctx, a.Self), backend.Cancelled)
	wantCode(t, b.Deregister(ctx, 5), backend.Cancelled)
	must(t, a.Kill())
	must(t, b.Fence(soon(t), a.Self))
	must(t, b.Deregister(soon(t), 5))
	w.sim.SetFaults()
}

// TestFenceAcrossProcesses has the initiator leave in order, though its copies stall for a while.
func TestFenceAcrossProcesses(t *testing.T) {
	w, a, b, far := stalledInitiator(t)
	fenced := make(chan error, 1)
	go func() { fenced <- b.Fence(soon(t), a.Self) }()
	select {
	case err := <-fenced:
		t.Fatalf("the fence returned while copies were under way: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	w.sim.SetFaults()
	must(t, <-fenced)
	want := w.content(far)
	var done bool
	must(t, a.Call("Completed", uint64(1), &done))
	if !done {
		t.Error("the fence returned before the transfer completed")
	}
	wantSame(t, "far region", w.content(far), want)
}

// TestRuntimesDiffer has the two ends on different libraries.
func TestRuntimesDiffer(t *testing.T) {
	w, other := newWorld(t, gpusim.Machine{}), newWorld(t, gpusim.Machine{Runtime: "cuda"})
	a, b := w.node(peer("a", 1)), other.node(peer("b", 2))
	a.register(t, w.region(1, 0, mib, 0))
	a.register(t, w.region(2, -1, mib, 0))
	for _, device := range []int{0, -1} {
		remote := b.register(t, other.region(backend.RegionID(6+device), device, mib, all))
		e := a.connect(t, b.self, b)
		_, err := e.Session(soon(t), 1, remote, new(sink))
		wantCode(t, err, backend.Unsupported, w.sim.Library, other.sim.Library)
	}
	c := other.child(peer("c", 3))
	e := a.connect(t, c.Self, c)
	_, err := e.Session(soon(t), 1, c.register(t, RegionArgs{ID: 5, Size: mib, Rights: all}), new(sink))
	wantCode(t, err, backend.Unsupported, `runtime "cuda"`)
}

// TestVisibleDevices has the peer number its devices differently, and use one that this process does not see.
func TestVisibleDevices(t *testing.T) {
	w := newWorld(t, gpusim.Machine{})
	t.Setenv("HIP_VISIBLE_DEVICES", "1,0")
	b := w.child(peer("b", 2))
	a := w.node(peer("a", 1))
	a.register(t, w.region(1, 0, mib, 0))
	remote := b.register(t, RegionArgs{ID: 5, Device: 0, Size: mib, Rights: all})
	if remote.Place != w.sim.Devices[1].PCI {
		t.Fatalf("the peer's first device is %s", remote.Place)
	}
	e, k := a.connect(t, b.Self, b), new(sink)
	s := bind(t, e, 1, remote, k)
	must(t, post(s, backend.Write, 1, backend.Segment{Length: mib}))
	must(t, k.Wait(t, 1).Err)
	wantSame(t, "far region", b.content(t, 5), filled(mib, 1))

	t.Setenv("HIP_VISIBLE_DEVICES", "0")
	c := w.child(peer("c", 3))
	c.ConnectTo(t, a.self, a)
	c.register(t, RegionArgs{ID: 1, Device: 0, Size: mib})
	ours := a.register(t, w.region(6, 1, mib, all))
	err := c.Call("Session", PostArgs{Local: 1, Remote: ours}, nil)
	if err == nil || !strings.Contains(err.Error(), "unsupported") || !strings.Contains(err.Error(), w.sim.Devices[1].PCI) {
		t.Errorf("got %v, want unsupported and the device", err)
	}
}
