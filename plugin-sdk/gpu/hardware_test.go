package gpu_test

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/gpu"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
)

// TestGPU makes every call of the package on the first GPU and the last one of this machine, which may be the same.
// Without a GPU it is skipped, or fails if UMBP_TEST_REQUIRE has gpu.
func TestGPU(t *testing.T) {
	r, err := gpu.Open(gpu.Options{})
	if err != nil {
		if required("gpu") {
			t.Fatalf("%v, and UMBP_TEST_REQUIRE has gpu", err)
		}
		t.Skip(err)
	}
	t.Cleanup(func() { r.Close() })
	everyCall(t, r)
}

// TestGPUSimulated sees that TestGPU is right where it can be seen.
func TestGPUSimulated(t *testing.T) {
	onEach(t, func(t *testing.T, _ *gpusim.Sim, r *gpu.Runtime) { everyCall(t, r) })
	t.Run("one GPU", func(t *testing.T) {
		_, r := open(t, gpusim.Machine{Devices: make([]gpusim.Device, 1)})
		everyCall(t, r)
	})
}

func everyCall(t *testing.T, r *gpu.Runtime) {
	t.Logf("%s %s (%s), batches: %v, simulated: %v", r.Name(), r.Version(), r.Library(), r.HasBatch(), r.Simulated())
	for _, d := range r.Devices() {
		t.Logf("%+v", d)
	}
	near, far := 0, len(r.Devices())-1
	l, err := r.Link(near, far)
	ok(t, err)
	t.Logf("link from %d to %d: %+v", near, far, l)
	if !l.Access {
		far = near
	}

	const size = 5<<20 + 12
	p := pattern(5, size)
	source, to, host := alloc(t, r, near, size), alloc(t, r, far, size), mapped(t, size)
	ok(t, r.Store(near, source, p))
	holds(t, r, near, source, p)
	holds(t, r, near, source+12345, p[12345:23456])
	want(t, r.Load(near, make([]byte, 2*size), source), "ends before")

	g, err := r.Describe(source+4096, 8192)
	ok(t, err)
	if g.Runtime != r.Name() || g.Device != r.Devices()[near].PCI || g.Offset != 4096 || g.Size != 8192 || g.Allocation < size {
		t.Errorf("described as %+v", g)
	}
	_, err = r.Describe(addressOf(host), 4096)
	want(t, err, "bytes at")
	t.Logf("an allocation of %d bytes is of %d; host memory: %v", size, g.Allocation, err)

	bound(t, r, near, func(c *gpu.Context) {
		ok(t, c.EnablePeer(far))
		ok(t, c.EnablePeer(far))
		s, err := c.NewStream()
		ok(t, err)
		e, err := c.NewEvent()
		ok(t, err)
		pinned, err := c.Pin(host)
		ok(t, err)
		_, err = r.Describe(pinned, 4096)
		want(t, err, "host memory")

		// To the other, to the host and back, in order.
		ok(t, c.Copy(s, gpu.Copy{To: to + 5, From: source + 2, Bytes: 1 << 20}))
		ok(t, c.Copy(s, gpu.Copy{To: pinned + 3, From: to + 5, Bytes: 1 << 20}))
		ok(t, c.Copy(s, gpu.Copy{To: to + 2<<20, From: pinned + 3, Bytes: 1 << 20}))
		ok(t, c.Record(e, s))
		ok(t, finished(c, e))
		holds(t, r, far, to+2<<20, p[2:][:1<<20])
		if !bytes.Equal(host[3:][:1<<20], p[2:][:1<<20]) {
			t.Error("pinned memory has other bytes")
		}

		ok(t, c.Copy2D(s, to+100, 300, source+7, 1000, 256, 50))
		ok(t, c.Wait(s))
		for row := range 50 {
			holds(t, r, far, to+100+uint64(row)*300, p[7+row*1000:][:256])
		}

		batch := func(from uint64, n int) error {
			var copies []gpu.Copy
			for i := range uint64(n) {
				copies = append(copies, gpu.Copy{To: to + i*4096, From: from + i*5000, Bytes: 4000 + i%96})
			}
			if err := c.CopyBatch(s, copies); err != nil {
				return err
			}
			return c.Wait(s)
		}
		if r.HasBatch() {
			copy(host, p)
			for _, from := range []uint64{source, pinned} {
				ok(t, r.Store(far, to, make([]byte, size)))
				ok(t, batch(from, 500))
				whole := make([]byte, size)
				for i := range 500 {
					copy(whole[i*4096:], p[i*5000:][:4000+i%96])
				}
				holds(t, r, far, to, whole)
			}
		}
		ok(t, c.Unpin(host))

		// What is not pinned, and what cannot be.
		copy(host, p)
		ok(t, c.Copy(s, gpu.Copy{To: to, From: pinned, Bytes: size}))
		ok(t, c.Wait(s))
		holds(t, r, far, to, p)
		if r.HasBatch() {
			t.Logf("a batch from memory that is not pinned: error %v", batch(pinned, 10))
			ok(t, c.Wait(s))
		}
		ok(t, unix.Mprotect(host, unix.PROT_READ))
		_, err = c.Pin(host)
		t.Logf("pinning memory that may only be read: error %v", err)
		if err == nil {
			ok(t, c.Unpin(host))
		}
		ok(t, c.Copy(s, gpu.Copy{To: to + 1, From: addressOf(host), Bytes: size - 1}))
		ok(t, c.Wait(s))
		holds(t, r, far, to+1, p[:size-1])

		lender := start(t, "lend", r.Library(), fmt.Sprint(far), fmt.Sprint(size))
		line, err := lender.out.ReadString('\n')
		ok(t, err)
		var text string
		var offset, allocation uint64
		if strings.HasPrefix(line, " ") {
			t.Log("this system lends no memory to other processes")
		} else if _, err := fmt.Sscan(line, &text, &offset, &allocation); err != nil || offset != lentOffset || allocation < size {
			t.Errorf("lent as %q", line)
		} else {
			handle, err := hex.DecodeString(text)
			ok(t, err)
			a, err := c.Import(gpu.Handle(handle))
			ok(t, err)
			base, whole, err := c.Range(a)
			ok(t, err)
			t.Logf("an allocation of %d bytes, imported at %#x, is of %d bytes from %#x on", allocation, a, whole, base)
			if base+whole < a+allocation {
				t.Error("the import is shorter than the allocation")
			}
			ok(t, c.Copy(s, gpu.Copy{To: source, From: a + offset, Bytes: size - lentOffset}))
			ok(t, c.Wait(s))
			holds(t, r, near, source, pattern(9, size)[lentOffset:])
			ok(t, c.Unimport(a))
		}
		if g.Handle != nil {
			_, err := c.Import(gpu.Handle(g.Handle))
			t.Logf("importing one's own memory: %v", err)
			if err == nil || gpu.Lost(err) {
				t.Errorf("one's own memory is imported with error %v", err)
			}
		}

		ok(t, c.DestroyEvent(e))
		ok(t, c.DestroyStream(s))
	})
}
