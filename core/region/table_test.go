package region

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// mustAdd adds b to the table as a region of host memory.
func mustAdd(t testing.TB, table *Table, b []byte) *Region {
	t.Helper()
	r := &Region{Kind: backend.HostMemory, Bytes: b, FD: -1}
	if err := table.Add(r); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestTableFindEdges(t *testing.T) {
	memory := make([]byte, 100)
	table := NewTable()
	first := mustAdd(t, table, memory[10:40])
	touching := mustAdd(t, table, memory[40:60])
	last := mustAdd(t, table, memory[80:90])

	for _, test := range []struct {
		from, to int
		region   *Region
		offset   uint64
	}{
		{10, 40, first, 0},
		{10, 11, first, 0},
		{39, 40, first, 29},
		{40, 41, touching, 0},
		{40, 60, touching, 0},
		{80, 90, last, 0},
		{85, 87, last, 5},
		{0, 5, nil, 0},     // before all
		{9, 11, nil, 0},    // runs into a region
		{39, 41, nil, 0},   // runs from one into the next
		{10, 60, nil, 0},   // two regions
		{59, 61, nil, 0},   // runs out of a region
		{60, 80, nil, 0},   // between
		{5, 95, nil, 0},    // around all
		{90, 91, nil, 0},   // just behind the last
		{95, 100, nil, 0},  // behind all
		{20, 20, nil, 0},   // empty, in a region
		{100, 100, nil, 0}, // empty, at the end
	} {
		r, offset, ok := table.Find(memory[test.from:test.to])
		if r != test.region || ok != (test.region != nil) || offset != test.offset {
			t.Errorf("[%d, %d): found %v at %d, %v", test.from, test.to, r, offset, ok)
		}
	}
	if _, _, ok := table.Find(nil); ok {
		t.Error("found nil")
	}
	if _, _, ok := NewTable().Find(memory); ok {
		t.Error("found a slice in an empty table")
	}
}

func TestTableRefusesOverlap(t *testing.T) {
	memory := make([]byte, 100)
	table := NewTable()
	mustAdd(t, table, memory[10:20])
	mustAdd(t, table, memory[40:60])

	for _, test := range []struct {
		from, to int
		with     backend.RegionID
	}{
		{40, 60, 2}, {45, 50, 2}, {30, 41, 2}, {59, 70, 2}, {15, 25, 1}, {0, 11, 1}, {5, 95, 1}, {30, 95, 2},
	} {
		r := &Region{Kind: backend.HostMemory, Bytes: memory[test.from:test.to], FD: -1}
		err := table.Add(r)
		var e *backend.Error
		if !errors.As(err, &e) || e.Code != backend.BadRequest || e.Region != test.with || r.ID != 0 {
			t.Errorf("[%d, %d): %v, id %d; want an overlap with region %d", test.from, test.to, err, r.ID, test.with)
			continue
		}
		start, end := extent(r.Bytes)
		if text := fmt.Sprintf("[%#x, +%d)", start, end-start); !bytes.Contains([]byte(e.Text), []byte(text)) {
			t.Errorf("the error does not name the new region %s: %v", text, e)
		}
	}
	for _, free := range [][]byte{memory[0:10], memory[20:40], memory[60:100]} {
		mustAdd(t, table, free) // touching is not overlapping
	}
}

func TestTableRefusesMisuse(t *testing.T) {
	table := NewTable()
	r := mustAdd(t, table, make([]byte, 8))
	for name, wrong := range map[string]*Region{"added twice": r, "no memory": {FD: -1}} {
		if err := table.Add(wrong); backend.CodeOf(err) != backend.BadRequest {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(table.All()) != 1 {
		t.Errorf("the table has %d regions", len(table.All()))
	}
}

func TestTableNeverReusesAnID(t *testing.T) {
	table, memory := NewTable(), make([]byte, 8)
	var last backend.RegionID
	for range 10 {
		r := mustAdd(t, table, memory)
		if r.ID <= last {
			t.Fatalf("id %d after %d", r.ID, last)
		}
		last = r.ID
		if got, ok := table.Get(r.ID); !ok || got != r {
			t.Fatalf("Get(%d) = %v, %v", r.ID, got, ok)
		}
		if !table.Remove(r.ID) || table.Remove(r.ID) {
			t.Fatal("a region is removed once")
		}
		if _, ok := table.Get(r.ID); ok {
			t.Fatal("a removed region is still there")
		}
		if _, _, ok := table.Find(memory); ok {
			t.Fatal("a removed region is still found")
		}
	}
}

func TestTableSetKey(t *testing.T) {
	table, memory := NewTable(), make([]byte, 30)
	mustAdd(t, table, memory[20:])
	before := mustAdd(t, table, memory[:10])
	mustAdd(t, table, memory[10:20])

	table.SetKey(before.ID, "tcp", []byte("old"))
	held, _ := table.Get(before.ID)
	table.SetKey(before.ID, "tcp", []byte("new"))
	table.SetKey(before.ID, "shm", nil)
	if table.SetKey(99, "tcp", nil) {
		t.Error("set a key of a region that does not exist")
	}
	if before.Keys != nil || string(held.Keys["tcp"]) != "old" || len(held.Keys) != 1 {
		t.Error("a region that readers may hold was changed")
	}
	after, _ := table.Get(before.ID)
	if found, _, _ := table.Find(memory[5:6]); found != after || table.All()[1] != after {
		t.Error("Get, Find and All disagree")
	}
	self := backend.Peer{Node: "a", Incarnation: 7, Host: "h"}
	want := Descriptor{
		Peer: self, ID: before.ID, Kind: backend.HostMemory, Size: 10,
		Keys: map[string][]byte{"tcp": []byte("new"), "shm": nil},
	}
	got := after.Descriptor(self)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	remote, ok := got.Remote("shm")
	if !ok || remote.Key != nil || remote.Region != before.ID || remote.Size != 10 || remote.Peer != self {
		t.Errorf("remote for shm: %+v, %v", remote, ok)
	}
	if _, ok := got.Remote("rdma"); ok {
		t.Error("the region is not registered with rdma")
	}
}

func TestRegionMemory(t *testing.T) {
	r := &Region{
		ID: 3, Kind: backend.HostMemory, Rights: backend.RemoteRead, Bytes: []byte{1}, FD: 5, FDOffset: 4096,
	}
	want := backend.Memory{
		Region: 3, Kind: backend.HostMemory, Rights: backend.RemoteRead, Bytes: []byte{1}, FD: 5, FDOffset: 4096,
	}
	if diff := cmp.Diff(want, r.Memory()); diff != "" {
		t.Error(diff)
	}
}

// gpuOver returns a region of a GPU's memory that has the addresses of b. Nothing touches what lies there.
func gpuOver(b []byte) *Region {
	start, _ := extent(b)
	size := uint64(len(b))
	return &Region{Kind: backend.GPUMemory, FD: -1, GPU: &backend.GPURange{
		Runtime: "hip", Device: "0000:c1:00.0", Address: uint64(start), Size: size, Allocation: size + 100, Offset: 64, Handle: []byte("h"),
	}}
}

func TestGPURegion(t *testing.T) {
	table, memory := NewTable(), make([]byte, 30)
	mustAdd(t, table, memory[:10])
	r := gpuOver(memory[10:20])
	if err := table.Add(r); err != nil {
		t.Fatal(err)
	}
	if r.Size() != 10 || r.Place() != "0000:c1:00.0" {
		t.Errorf("%d bytes at %q", r.Size(), r.Place())
	}
	if diff := cmp.Diff(backend.Memory{Region: r.ID, Kind: backend.GPUMemory, GPU: r.GPU, FD: -1}, r.Memory()); diff != "" {
		t.Error(diff)
	}
	table.SetKey(r.ID, "xgmi", []byte("key"))
	keyed, _ := table.Get(r.ID)
	d := keyed.Descriptor(backend.Peer{Node: "a"})
	if d.Kind != backend.GPUMemory || d.Size != 10 || d.Place != "0000:c1:00.0" {
		t.Errorf("%+v", d)
	}
	if remote, ok := d.Remote("xgmi"); !ok || remote.Place != d.Place || remote.Size != 10 || string(remote.Key) != "key" {
		t.Errorf("%+v, %v", remote, ok)
	}
	if found, offset, ok := table.Find(memory[13:15]); !ok || found != keyed || offset != 3 {
		t.Errorf("found %v at %d, %v", found, offset, ok)
	}
	for name, change := range map[string]func(*Region){
		"no address":          func(r *Region) { r.GPU.Address = 0 },
		"out of allocation":   func(r *Region) { r.GPU.Offset = r.GPU.Allocation },
		"no range":            func(r *Region) { r.GPU = nil },
		"the range of a host": func(r *Region) { r.Kind = backend.HostMemory },
		"bytes":               func(r *Region) { r.Bytes = memory[20:30] },
		"overlaps host":       func(r *Region) { r.GPU.Address -= 11 },
		"overlaps a GPU's":    func(r *Region) { r.GPU.Address -= 1 },
	} {
		r := gpuOver(memory[20:30])
		change(r)
		if err := table.Add(r); backend.CodeOf(err) != backend.BadRequest || r.ID != 0 {
			t.Errorf("%s: %v, id %d", name, err, r.ID)
		}
	}
	if err := table.Add(&Region{Bytes: memory[15:25], FD: -1}); backend.CodeOf(err) != backend.BadRequest {
		t.Errorf("host memory that overlaps a GPU's: %v", err)
	}
}

// TestTableAgainstOwners compares the table with an array that says for each byte which region owns it. Some regions are
// said to be of a GPU's memory: all share one address space.
func TestTableAgainstOwners(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		memory := make([]byte, 64)
		owners := make([]*Region, len(memory))
		table := NewTable()
		slice := func(t *rapid.T) (from, to int) {
			from = rapid.IntRange(0, len(memory)-1).Draw(t, "from")
			return from, rapid.IntRange(from+1, len(memory)).Draw(t, "to")
		}
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				from, to := slice(t)
				r := &Region{Bytes: memory[from:to], FD: -1}
				if rapid.Bool().Draw(t, "gpu") {
					r = gpuOver(memory[from:to])
				}
				free := true
				for _, owner := range owners[from:to] {
					free = free && owner == nil
				}
				if err := table.Add(r); (err == nil) != free {
					t.Fatalf("add [%d, %d): %v", from, to, err)
				}
				for i := from; free && i < to; i++ {
					owners[i] = r
				}
			},
			"remove": func(t *rapid.T) {
				if len(table.All()) == 0 {
					t.Skip()
				}
				r := rapid.SampledFrom(table.All()).Draw(t, "region")
				table.Remove(r.ID)
				for i := range owners {
					if owners[i] == r {
						owners[i] = nil
					}
				}
			},
			"find": func(t *rapid.T) {
				from, to := slice(t)
				want := owners[from]
				for _, owner := range owners[from:to] {
					if owner != want {
						want = nil
					}
				}
				r, offset, ok := table.Find(memory[from:to])
				if r != want || ok != (want != nil) {
					t.Fatalf("find [%d, %d) = %v, want %v", from, to, r, want)
				}
				start, _ := extent(memory[from:])
				if !ok {
					return
				}
				if at, _ := r.Extent(); at+uintptr(offset) != start {
					t.Fatalf("find [%d, %d): wrong offset %d", from, to, offset)
				}
			},
		})
	})
}

// TestTableReadersDuringChanges is for the race detector. A region that is never removed is found all the time.
func TestTableReadersDuringChanges(t *testing.T) {
	memory := make([]byte, 1000)
	table := NewTable()
	stays := mustAdd(t, table, memory[500:510])
	stop := make(chan struct{})
	var readers, writers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				r, offset, ok := table.Find(memory[503:506])
				if !ok || r.ID != stays.ID || offset != 3 {
					t.Errorf("found %v at %d", r, offset)
					return
				}
				for _, r := range table.All() {
					_ = r.Descriptor(backend.Peer{}).Keys["tcp"]
					table.Get(r.ID)
				}
			}
		})
	}
	for w := range 2 {
		writers.Go(func() {
			for i := range 500 {
				at := w*500 + i%49*10
				r := &Region{Bytes: memory[at : at+5], FD: -1}
				if err := table.Add(r); err != nil && at != 500 {
					t.Error(err)
				}
				table.SetKey(stays.ID, "tcp", []byte{byte(i)})
				if r.ID != 0 && !table.Remove(r.ID) {
					t.Errorf("region %d was lost", r.ID)
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	readers.Wait()
	if len(table.All()) != 1 {
		t.Errorf("%d regions are left", len(table.All()))
	}
}

func TestTableReadsAllocateNothing(t *testing.T) {
	table, memory := NewTable(), make([]byte, 1000)
	for i := 0; i < len(memory); i += 10 {
		mustAdd(t, table, memory[i:i+10])
	}
	if n := testing.AllocsPerRun(100, func() {
		table.Find(memory[55:57])
		table.Get(7)
		table.All()
	}); n != 0 {
		t.Errorf("reading allocates %v times", n)
	}
}

func BenchmarkFind(b *testing.B) {
	for _, regions := range []int{1, 16, 1024} {
		b.Run(fmt.Sprintf("regions=%d", regions), func(b *testing.B) {
			table, memory := NewTable(), make([]byte, regions*64)
			for i := range regions {
				mustAdd(b, table, memory[i*64:(i+1)*64])
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				at := i % regions * 64
				if _, _, ok := table.Find(memory[at+8 : at+24]); !ok {
					b.Fatal("not found")
				}
				i += 7919
			}
		})
	}
}
