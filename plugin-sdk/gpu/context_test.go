package gpu_test

import (
	"bytes"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/gpu"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
)

// TestCopies copies in all the ways and directions that there are.
func TestCopies(t *testing.T) {
	onEach(t, func(t *testing.T, sim *gpusim.Sim, r *gpu.Runtime) {
		const size = 1 << 20
		p := pattern(3, size)
		source := alloc(t, r, 0, size)
		ok(t, r.Store(0, source, p))
		near, far := alloc(t, r, 0, size), alloc(t, r, 1, size)
		host := mapped(t, size)
		unpinned := mapped(t, size)

		bound(t, r, 0, func(c *gpu.Context) {
			ok(t, c.EnablePeer(1))
			s, err := c.NewStream()
			ok(t, err)
			e, err := c.NewEvent()
			ok(t, err)
			if done, err := c.Done(e); !done || err != nil {
				t.Errorf("an event that was never recorded: done %v, error %v", done, err)
			}
			pinned, err := c.Pin(host)
			ok(t, err)

			// To the same device, to the other, to the host and back, in order.
			ok(t, c.Copy(s, gpu.Copy{To: near + 1, From: source + 2, Bytes: 1000}))
			ok(t, c.Copy(s, gpu.Copy{To: far + 5, From: near + 1, Bytes: 1000}))
			ok(t, c.Copy(s, gpu.Copy{To: pinned + 3, From: far + 5, Bytes: 1000}))
			ok(t, c.Copy(s, gpu.Copy{To: near + 5000, From: pinned + 3, Bytes: 1000}))
			ok(t, c.Record(e, s))
			ok(t, finished(c, e))
			holds(t, r, 0, near+5000, p[2:1002])
			holds(t, r, 1, far+5, p[2:1002])
			if !bytes.Equal(host[3:1003], p[2:1002]) {
				t.Error("pinned memory has other bytes")
			}

			// Rows, closer to each other over there.
			ok(t, c.Copy2D(s, far+100, 300, source+7, 1000, 256, 50))
			ok(t, c.Wait(s))
			for row := range 50 {
				holds(t, r, 1, far+100+uint64(row)*300, p[7+row*1000:][:256])
			}
			ok(t, c.Copy2D(s, pinned, 100, far+100, 300, 100, 50))
			ok(t, c.Wait(s))
			if !bytes.Equal(host[4900:5000], p[7+49*1000:][:100]) {
				t.Error("the last row is not in pinned memory")
			}

			if r.HasBatch() {
				before := sim.Counts()
				ok(t, c.CopyBatch(s, nil))
				for _, n := range []int{1, 500, 30} {
					batch := make([]gpu.Copy, n)
					for i := range batch {
						batch[i] = gpu.Copy{To: far + uint64(i)*2000, From: source + uint64(n-i)*1500, Bytes: uint64(1000 + i)}
					}
					ok(t, c.CopyBatch(s, batch))
					ok(t, c.Wait(s))
					for i, k := range batch {
						holds(t, r, 1, far+uint64(i)*2000, p[(n-i)*1500:][:k.Bytes])
					}
				}
				if n := sim.Counts(); n.Batches-before.Batches != 3 || n.Batched-before.Batched != 531 {
					t.Errorf("batches: %+v, before %+v", n, before)
				}
			}

			copy(unpinned, p)
			ok(t, c.Copy(s, gpu.Copy{To: far, From: addressOf(unpinned), Bytes: size}))
			ok(t, c.Wait(s))
			holds(t, r, 1, far, p)

			ok(t, c.Unpin(host))
			ok(t, c.DestroyEvent(e))
			ok(t, c.DestroyStream(s))
		})
	})
}

// TestStalled sees that nothing waits but what says so.
func TestStalled(t *testing.T) {
	onEach(t, func(t *testing.T, sim *gpusim.Sim, r *gpu.Runtime) {
		a := alloc(t, r, 0, 8192)
		ok(t, r.Store(0, a, make([]byte, 8192)))
		ok(t, r.Store(0, a, pattern(1, 100)))
		bound(t, r, 0, func(c *gpu.Context) {
			s, err := c.NewStream()
			ok(t, err)
			e, err := c.NewEvent()
			ok(t, err)
			sim.SetFaults(gpusim.Fault{Effect: gpusim.Stall})
			ok(t, c.Copy(s, gpu.Copy{To: a + 4096, From: a, Bytes: 100}))
			ok(t, c.Record(e, s))
			for range 3 {
				if done, err := c.Done(e); done || err != nil {
					t.Errorf("an event behind a copy that stalls: done %v, error %v", done, err)
				}
				time.Sleep(time.Millisecond)
			}
			holds(t, r, 0, a+4096, make([]byte, 100))
			sim.SetFaults()
			ok(t, finished(c, e))
			holds(t, r, 0, a+4096, pattern(1, 100))
			ok(t, c.DestroyEvent(e))
			ok(t, c.DestroyStream(s))
		})
	})
}

// TestFailures sees what is said of copies that fail.
func TestFailures(t *testing.T) {
	onEach(t, func(t *testing.T, sim *gpusim.Sim, r *gpu.Runtime) {
		a := alloc(t, r, 0, 8192)
		bound(t, r, 0, func(c *gpu.Context) {
			s, err := c.NewStream()
			ok(t, err)
			e, err := c.NewEvent()
			ok(t, err)
			k := gpu.Copy{To: a + 4096, From: a, Bytes: 100}

			sim.SetFaults(gpusim.Fault{Effect: gpusim.Refuse, Code: 1, Times: 1})
			err = c.Copy(s, k)
			if e, is := err.(*gpu.Error); !is || e.Code != 1 || e.Device != 0 || e.Call != r.Name()+"MemcpyAsync" {
				t.Errorf("a copy that is refused: error %v", err)
			}
			if gpu.Lost(err) {
				t.Errorf("%v is said to be the loss of the device", err)
			}
			ok(t, c.Copy(s, k))
			sim.SetFaults(gpusim.Fault{Effect: gpusim.Refuse, Times: 1})
			want(t, c.Copy2D(s, a+4096, 10, a, 10, 10, 10), "Memcpy2DAsync", "(999)")

			sim.SetFaults(gpusim.Fault{Effect: gpusim.Fail, Times: 1})
			ok(t, c.Copy(s, k))
			ok(t, c.Record(e, s))
			want(t, finished(c, e), "EventQuery", "(999)")
			want(t, c.Wait(s), "StreamSynchronize", "(999)")
			ok(t, c.Copy(s, k))
			ok(t, c.Wait(s))
			sim.SetFaults()

			for what, err := range map[string]error{
				"past the end": c.Copy(s, gpu.Copy{To: a + 8190, From: a, Bytes: 10}),
				"of nowhere":   c.Copy(s, gpu.Copy{To: a, From: 1 << 40, Bytes: 10}),
				"rows":         c.Copy2D(s, a, 4096, a, 100, 10, 3),
			} {
				want(t, err, "Async on device 0")
				t.Logf("%s: %v", what, err)
			}
			ok(t, c.DestroyEvent(e))
			ok(t, c.DestroyStream(s))
			want(t, c.Record(e, s), "EventRecord")
			want(t, c.DestroyEvent(e), "EventDestroy")
			want(t, c.DestroyStream(s), "StreamDestroy")

			sim.SetFaults(gpusim.Fault{Call: gpusim.Streams}, gpusim.Fault{Call: gpusim.Events}, gpusim.Fault{Call: gpusim.Registrations})
			_, err = c.NewStream()
			want(t, err, "StreamCreateWithFlags")
			_, err = c.NewEvent()
			want(t, err, "EventCreateWithFlags")
			_, err = c.Pin(mapped(t, 4096))
			want(t, err, "HostRegister")
			sim.SetFaults()
		})
	})
}

// TestBatchGivenUp opens a runtime that has the call for batches, and a driver that has not.
func TestBatchGivenUp(t *testing.T) {
	for runtime, code := range map[string]int{"hip": 801, "cuda": 36} {
		sim, r := open(t, gpusim.Machine{Runtime: runtime})
		a := alloc(t, r, 0, 8192)
		bound(t, r, 0, func(c *gpu.Context) {
			s, err := c.NewStream()
			ok(t, err)
			batch := []gpu.Copy{{To: a + 4096, From: a, Bytes: 1}, {To: a + 4097, From: a, Bytes: 1}}
			sim.SetFaults(gpusim.Fault{Times: 1})
			want(t, c.CopyBatch(s, batch), "MemcpyBatchAsync", "(999)")
			if !r.HasBatch() {
				t.Error("batches are given up for an error that says nothing of them")
			}
			sim.SetFaults(gpusim.Fault{Code: code})
			want(t, c.CopyBatch(s, batch), "MemcpyBatchAsync", fmt.Sprintf("(%d)", code))
			if r.HasBatch() {
				t.Error("the runtime still has batches, which its driver does not know")
			}
			sim.SetFaults()
			ok(t, c.Wait(s))
			ok(t, c.DestroyStream(s))
		})
	}
}

func TestPeers(t *testing.T) {
	for _, runtime := range []string{"hip", "cuda"} {
		sim, r := open(t, gpusim.Machine{Runtime: runtime, Links: []gpusim.Link{{From: 0, To: 1}}})
		bound(t, r, 0, func(c *gpu.Context) {
			ok(t, c.EnablePeer(0))
			sim.SetFaults(gpusim.Fault{Call: gpusim.Peers, Times: 1})
			want(t, c.EnablePeer(1), "DeviceEnablePeerAccess on device 0", "(999)")
			for range 3 {
				ok(t, c.EnablePeer(1))
			}
			want(t, c.EnablePeer(2), "no device number 2")
		})
		bound(t, r, 1, func(c *gpu.Context) {
			err := c.EnablePeer(0)
			want(t, err, "DeviceEnablePeerAccess on device 1", "(217)")
			if gpu.Lost(err) {
				t.Errorf("%v is said to be the loss of a device", err)
			}
		})
	}
}

func TestPin(t *testing.T) {
	onEach(t, func(t *testing.T, sim *gpusim.Sim, r *gpu.Runtime) {
		other := reopen(t, sim) // what it pins is pinned by somebody else
		m := mapped(t, 64<<10)
		pinned := func(n int64) {
			t.Helper()
			if got := sim.Counts().Pinned; got != n {
				t.Errorf("%d ranges are pinned, want %d", got, n)
			}
		}
		bound(t, r, 0, func(c *gpu.Context) {
			for range 2 {
				address, err := c.Pin(m[:8192])
				ok(t, err)
				if address != addressOf(m) {
					t.Errorf("pinned at %#x, want its own address", address)
				}
			}
			pinned(1)
			_, err := c.Pin(m[:4096])
			want(t, err, "is pinned with 8192 bytes, and cannot be with 4096")
			want(t, c.Unpin(m[:4096]), "not pinned")
			ok(t, c.Unpin(m[:8192]))
			pinned(1)
			ok(t, c.Unpin(m[:8192]))
			pinned(0)
			want(t, c.Unpin(m[:8192]), "not pinned")
			_, err = c.Pin(nil)
			want(t, err, "no memory")
			want(t, c.Unpin(nil), "no memory")
		})
		bound(t, other, 1, func(theirs *gpu.Context) {
			_, err := theirs.Pin(m[4096:16384])
			ok(t, err)
			bound(t, r, 0, func(c *gpu.Context) {
				_, err := c.Pin(m[8192:16384])
				ok(t, err)
				pinned(1)
				ok(t, c.Unpin(m[8192:16384]))
				pinned(1)
				_, err = c.Pin(m[:16384])
				want(t, err, "pinned already")
			})
			ok(t, theirs.Unpin(m[4096:16384]))
			pinned(0)
		})
	})
}

// TestThread sees that no thread is left that knows of a device.
func TestThread(t *testing.T) {
	_, r := open(t, gpusim.Machine{})
	var threads []int
	bound(t, r, 0, func(*gpu.Context) { threads = append(threads, unix.Gettid()) })
	bound(t, r, 1, func(*gpu.Context) { threads = append(threads, unix.Gettid()) })
	if _, err := r.Bind(2); err == nil {
		t.Error("a thread was bound to no device")
	}
	for _, id := range threads {
		for id != os.Getpid() { // Go's runtime parks the main thread, and runs nothing on it any more
			if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", id)); os.IsNotExist(err) {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// TestNoAllocation sees that the calls of a transfer leave the garbage collector alone.
func TestNoAllocation(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	onEach(t, func(t *testing.T, sim *gpusim.Sim, r *gpu.Runtime) {
		a := alloc(t, r, 0, 1<<20)
		bound(t, r, 0, func(c *gpu.Context) {
			s, err := c.NewStream()
			ok(t, err)
			e, err := c.NewEvent()
			ok(t, err)
			batch := make([]gpu.Copy, 100)
			for i := range batch {
				batch[i] = gpu.Copy{To: a + 1<<19 + uint64(i)*64, From: a + uint64(i)*64, Bytes: 64}
			}
			for name, f := range map[string]func() error{
				"Copy":   func() error { return c.Copy(s, batch[0]) },
				"Copy2D": func() error { return c.Copy2D(s, a+1<<19, 128, a, 128, 64, 10) },
				"CopyBatch": func() error {
					if !r.HasBatch() {
						return nil
					}
					return c.CopyBatch(s, batch)
				},
				"Record": func() error { return c.Record(e, s) },
				"Done":   func() error { _, err := c.Done(e); return err },
			} {
				if n := testing.AllocsPerRun(100, func() { ok(t, f()) }); n != 0 {
					t.Errorf("%s allocates %v times", name, n)
				}
				ok(t, c.Wait(s))
			}
			ok(t, c.DestroyEvent(e))
			ok(t, c.DestroyStream(s))
		})
	})
}

// TestModel holds what copies do against the same copies of Go's.
func TestModel(t *testing.T) {
	const size = 4096
	for _, runtime := range []string{"hip", "cuda"} {
		_, r := open(t, gpusim.Machine{Runtime: runtime})
		bases := []uint64{alloc(t, r, 0, size), alloc(t, r, 1, size)}
		bound(t, r, 0, func(c *gpu.Context) {
			ok(t, c.EnablePeer(1))
			s, err := c.NewStream()
			ok(t, err)
			rapid.Check(t, func(t *rapid.T) {
				var model [2][]byte
				for device, base := range bases {
					model[device] = pattern(byte(device), size)
					if err := r.Store(device, base, model[device]); err != nil {
						t.Fatal(err)
					}
				}
				draw := func(name string, low, high int) int { return rapid.IntRange(low, high).Draw(t, name) }
				for range draw("operations", 1, 10) {
					// Sources lie in the lower half, targets in the upper one.
					from, to := draw("from", 0, 1), draw("to", 0, 1)
					piece := func() (k gpu.Copy) {
						n := draw("bytes", 1, 200)
						a, b := draw("source", 0, size/2-n), draw("target", size/2, size-n)
						copy(model[to][b:b+n], model[from][a:])
						return gpu.Copy{To: bases[to] + uint64(b), From: bases[from] + uint64(a), Bytes: uint64(n)}
					}
					switch draw("call", 0, 2) {
					case 0:
						err = c.Copy(s, piece())
					case 1:
						// The order in a batch is not settled: the pieces must not overlap.
						var batch []gpu.Copy
						for i := range draw("pieces", 1, 16) {
							a, b, n := draw("source", 0, size/2-100), size/2+i*128, draw("bytes", 1, 100)
							copy(model[to][b:b+n], model[from][a:])
							batch = append(batch, gpu.Copy{To: bases[to] + uint64(b), From: bases[from] + uint64(a), Bytes: uint64(n)})
						}
						err = c.CopyBatch(s, batch)
					case 2:
						width, rows := draw("width", 1, 50), draw("rows", 1, 20)
						toPitch, fromPitch := draw("to pitch", width, 100), draw("from pitch", width, 100)
						for row := range rows {
							copy(model[to][size/2+row*toPitch:][:width], model[from][row*fromPitch:])
						}
						err = c.Copy2D(s, bases[to]+size/2, uint64(toPitch), bases[from], uint64(fromPitch), uint64(width), uint64(rows))
					}
					if err != nil {
						t.Fatal(err)
					}
				}
				if err := c.Wait(s); err != nil {
					t.Fatal(err)
				}
				for device, base := range bases {
					got := make([]byte, size)
					if err := r.Load(device, got, base); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(got, model[device]) {
						t.Fatalf("device %d holds other bytes", device)
					}
				}
			})
			ok(t, c.DestroyStream(s))
		})
	}
}

// BenchmarkCall measures what a call costs, by one that does nothing.
func BenchmarkCall(b *testing.B) {
	sim := gpusim.New(b, gpusim.Machine{})
	r, err := gpu.Open(gpu.Options{Library: sim.Library})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	c, err := r.Bind(0)
	if err != nil {
		b.Fatal(err)
	}
	e, err := c.NewEvent()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if done, err := c.Done(e); !done || err != nil {
			b.Fatal(err)
		}
	}
	if err := c.DestroyEvent(e); err != nil {
		b.Fatal(err)
	}
}
