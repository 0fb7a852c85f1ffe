package gpu_test

import (
	"encoding/hex"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/gpu"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
)

func TestMemory(t *testing.T) {
	onEach(t, func(t *testing.T, sim *gpusim.Sim, r *gpu.Runtime) {
		const size = 3<<20 + 5
		for device := range r.Devices() {
			a := alloc(t, r, device, size)
			p := pattern(byte(device), size)
			ok(t, r.Store(device, a, p))
			holds(t, r, device, a, p)
			holds(t, r, device, a+12345, p[12345:23456])
			ok(t, r.Store(device, a+size-1, []byte{77}))
			holds(t, r, device, a+size-1, []byte{77})
			ok(t, r.Load(device, nil, a))

			for _, n := range []int{6, size} {
				want(t, r.Load(device, make([]byte, n), a+size-5), "allocation", "ends before")
				want(t, r.Store(device, a+size-5, make([]byte, n)), "allocation", "ends before")
			}
			want(t, r.Load(device, make([]byte, 1), 4096), "MemGetAddressRange")
		}
		_, err := r.Alloc(0, 0)
		want(t, err, "no bytes")
		_, err = r.Alloc(0, 1<<50)
		want(t, err, "Malloc on device 0", "(2)")
		want(t, r.Free(0, 4096), "Free on device 0")
		_, err = r.Alloc(2, 1)
		for _, err := range []error{err, r.Free(-1, 0), r.Load(2, make([]byte, 1), 0), r.Store(2, 0, make([]byte, 1))} {
			want(t, err, "no device number")
		}
	})
}

func TestDescribe(t *testing.T) {
	onEach(t, func(t *testing.T, sim *gpusim.Sim, r *gpu.Runtime) {
		const size = 1 << 20
		a := alloc(t, r, 1, size)
		whole, err := r.Describe(a, size)
		ok(t, err)
		if whole.Runtime != r.Name() || whole.Device != r.Devices()[1].PCI || whole.Address != a || whole.Size != size ||
			whole.Allocation != size || whole.Offset != 0 || len(whole.Handle) != 64 {
			t.Errorf("the whole is described as %+v", whole)
		}
		part, err := r.Describe(a+4097, 4096)
		ok(t, err)
		if part.Address != a+4097 || part.Size != 4096 || part.Allocation != size || part.Offset != 4097 || len(part.Handle) != 64 {
			t.Errorf("a part is described as %+v", part)
		}
		last, err := r.Describe(a+size-1, 1)
		ok(t, err)
		if last.Offset != size-1 {
			t.Errorf("the last byte is described as %+v", last)
		}

		for _, c := range []struct {
			address, size uint64
			words         string
		}{
			{a, size + 1, "ends before it does"},
			{a + 1, size, "ends before it does"},
			{a + 1, ^uint64(0), "ends before it does"},
			{a, 0, "no bytes"},
			{64, 1, "PointerGetAttribute"},
		} {
			g, err := r.Describe(c.address, c.size)
			want(t, err, c.words)
			if g.Size != 0 || g.Handle != nil {
				t.Errorf("described with an error: %+v", g)
			}
		}

		m := mapped(t, 4096)
		bound(t, r, 0, func(c *gpu.Context) {
			host, err := c.Pin(m)
			ok(t, err)
			_, err = r.Describe(host, 4096)
			want(t, err, "host memory")
			ok(t, c.Unpin(m))
		})

		// What the runtime does not export can be used in this process.
		sim.SetFaults(gpusim.Fault{Call: gpusim.Exports, Code: 801})
		g, err := r.Describe(a, size)
		ok(t, err)
		if g.Handle != nil || g.Allocation != size {
			t.Errorf("without a handle it is described as %+v", g)
		}
	})
}

// TestDescribeWithContext describes memory where CUDA says nothing of it on a thread without a context.
func TestDescribeWithContext(t *testing.T) {
	_, r := open(t, gpusim.Machine{Runtime: "cuda", ContextForPointers: true})
	a := alloc(t, r, 1, 4096)
	g, err := r.Describe(a, 4096)
	ok(t, err)
	if g.Device != r.Devices()[1].PCI || g.Allocation != 4096 {
		t.Errorf("described as %+v", g)
	}
}

// TestImport maps the memory of another process.
func TestImport(t *testing.T) {
	onEach(t, func(t *testing.T, sim *gpusim.Sim, r *gpu.Runtime) {
		const size = 64 << 10
		p := pattern(9, size)
		for near := range r.Devices() {
			lender := start(t, "lend", sim.Library, "1", fmt.Sprint(size))
			var text string
			var offset, allocation uint64
			if _, err := fmt.Fscan(lender.out, &text, &offset, &allocation); err != nil {
				t.Fatal(err)
			}
			if offset != lentOffset || allocation != size {
				t.Fatalf("offset %d of %d", offset, allocation)
			}
			handle, err := hex.DecodeString(text)
			if err != nil {
				t.Fatal(err)
			}
			to := alloc(t, r, near, size)
			bound(t, r, near, func(c *gpu.Context) {
				ok(t, c.EnablePeer(1))
				a, err := c.Import(gpu.Handle(handle))
				ok(t, err)
				base, whole, err := c.Range(a + offset)
				ok(t, err)
				if base != a || whole != allocation {
					t.Errorf("the import has %d bytes from %#x on, want %d from %#x on", whole, base, allocation, a)
				}
				s, err := c.NewStream()
				ok(t, err)
				ok(t, c.Copy(s, gpu.Copy{To: to, From: a + offset, Bytes: size - offset}))
				ok(t, c.Wait(s))
				holds(t, r, near, to, p[offset:])
				ok(t, c.DestroyStream(s))
				ok(t, c.Unimport(a))
				if c.Unimport(a) == nil {
					t.Error("an import ended twice")
				}
				handle[40] ^= 255
				if _, err := c.Import(gpu.Handle(handle)); err == nil {
					t.Error("a handle of nothing was imported")
				}
			})
		}
		a := alloc(t, r, 0, size)
		g, err := r.Describe(a, size)
		ok(t, err)
		bound(t, r, 0, func(c *gpu.Context) {
			_, err := c.Import(gpu.Handle(g.Handle))
			want(t, err, "IpcOpenMemHandle on device 0")
			if gpu.Lost(err) {
				t.Errorf("%v is said to be the loss of a device", err)
			}
		})
	})
}

// TestManyCallers uses a runtime from many goroutines at once, and closes it under them.
func TestManyCallers(t *testing.T) {
	for _, runtime := range []string{"hip", "cuda"} {
		sim, r := open(t, gpusim.Machine{Runtime: runtime})
		var wg sync.WaitGroup
		work := func(id int) error {
			device := id % 2
			p := pattern(byte(id), 5000+id)
			a, err := r.Alloc(device, uint64(len(p)))
			if err != nil {
				return err
			}
			defer r.Free(device, a)
			if err := r.Store(device, a, p); err != nil {
				return err
			}
			if g, err := r.Describe(a+8, 16); err != nil || g.Offset != 8 || g.Device != r.Devices()[device].PCI {
				return fmt.Errorf("described as %+v: %w", g, err)
			}
			got := make([]byte, len(p))
			if err := r.Load(device, got, a); err != nil {
				return err
			}
			if string(got) != string(p) {
				return fmt.Errorf("goroutine %d got other bytes than it stored", id)
			}
			_, err = r.Link(device, 1-device)
			return err
		}
		for id := range 16 {
			wg.Go(func() {
				for range 20 {
					ok(t, work(id))
				}
			})
		}
		wg.Wait()
		if left := sim.Counts().Left(); left.Allocations != 0 {
			t.Errorf("left behind: %+v", left)
		}

		closing := make(chan struct{})
		other := reopen(t, sim)
		a, err := other.Alloc(0, 100)
		ok(t, err)
		for range 8 {
			wg.Go(func() {
				for n := 0; ; n++ {
					err := other.Load(0, make([]byte, 100), a)
					if err != nil {
						want(t, err, "closed")
						return
					}
					if n >= 10 {
						select {
						case closing <- struct{}{}:
						default:
						}
					}
				}
			})
		}
		<-closing
		ok(t, other.Close())
		wg.Wait()
		ok(t, other.Close())
		_, err = other.Alloc(0, 1)
		want(t, err, "closed")
		_, err = other.Bind(0)
		want(t, err, "closed")
		_, err = other.Describe(a, 1)
		want(t, err, "closed")
		ok(t, r.Free(0, a))
	}
}

// TestLostDevice sees what is said of a device that is lost, and that the other one goes on.
func TestLostDevice(t *testing.T) {
	onEach(t, func(t *testing.T, sim *gpusim.Sim, r *gpu.Runtime) {
		a := alloc(t, r, 1, 4096)
		lost, err := r.Alloc(0, 4096)
		ok(t, err)
		g, err := r.Describe(lost, 4096)
		ok(t, err)
		bound(t, r, 0, func(c *gpu.Context) {
			s, err := c.NewStream()
			ok(t, err)
			e, err := c.NewEvent()
			ok(t, err)
			sim.SetFaults(gpusim.Fault{Effect: gpusim.Lose, From: g.Device, To: g.Device})
			ok(t, c.Copy(s, gpu.Copy{To: lost, From: lost + 2048, Bytes: 1024}))
			// The loss may be seen by the next call, or by one after it.
			if err = c.Record(e, s); err == nil {
				err = finished(c, e)
			}
			if !gpu.Lost(err) {
				t.Errorf("an event behind the loss of its device answers %v", err)
			}
			if _, err := c.NewStream(); !gpu.Lost(err) {
				t.Errorf("a stream on a lost device: error %v", err)
			}
			c.DestroyEvent(e)
			c.DestroyStream(s)
		})
		if _, err := r.Describe(lost, 4096); !gpu.Lost(err) {
			t.Errorf("memory of a lost device is described: error %v", err)
		}
		if err := r.Load(0, make([]byte, 1), lost); !gpu.Lost(err) {
			t.Errorf("memory of a lost device is loaded: error %v", err)
		}
		r.Free(0, lost)
		ok(t, r.Store(1, a, pattern(1, 4096)))
		holds(t, r, 1, a, pattern(1, 4096))
	})
}

func TestErrorText(t *testing.T) {
	_, r := open(t, gpusim.Machine{Runtime: "cuda"})
	err := r.Free(1, 4096)
	e, isError := err.(*gpu.Error)
	if !isError || e.Runtime != "cuda" || e.Call != "cudaFree" || e.Code == 0 || !strings.HasPrefix(e.Name, "cudaError") || e.Text == "" || e.Device != 1 {
		t.Fatalf("%#v", err)
	}
	want(t, err, fmt.Sprintf("cudaFree on device 1: %s (%d): %s", e.Name, e.Code, e.Text))
	for text, e := range map[string]*gpu.Error{
		"hipInit: hipErrorUnknown (999)":               {Runtime: "hip", Call: "hipInit", Code: 999, Name: "hipErrorUnknown", Text: "hipErrorUnknown", Device: -1},
		"hipFree on device 0: hipErrorX (7): so it is": {Runtime: "hip", Call: "hipFree", Code: 7, Name: "hipErrorX", Text: "so it is"},
		"cudaFree on device 2: cudaErrorUnknown (999)": {Runtime: "cuda", Call: "cudaFree", Code: 999, Name: "cudaErrorUnknown", Device: 2},
	} {
		if e.Error() != text {
			t.Errorf("%q, want %q", e.Error(), text)
		}
	}
}

func TestLost(t *testing.T) {
	lost := func(runtime string, code int) bool {
		return gpu.Lost(fmt.Errorf("in other words: %w", &gpu.Error{Runtime: runtime, Code: code}))
	}
	for _, code := range []int{214, 700, 702, 719} {
		if !lost("hip", code) || !lost("cuda", code) {
			t.Errorf("%d is no loss", code)
		}
	}
	for _, code := range []int{0, 1, 2, 17, 101, 201, 217, 400, 500, 600, 704, 705, 712, 713, 801, 999} {
		if lost("hip", code) || lost("cuda", code) {
			t.Errorf("%d is a loss", code)
		}
	}
	for _, code := range []int{46, 220, 709, 716, 721, 911} {
		if lost("hip", code) || !lost("cuda", code) {
			t.Errorf("%d is CUDA's alone", code)
		}
	}
	if gpu.Lost(nil) || gpu.Lost(fmt.Errorf("719")) {
		t.Error("what is no error of a runtime is a loss")
	}
}
