package gpu_test

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/gpu"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
)

// childEnv makes the test binary a child: its value says which.
const childEnv = "UMBP_GPU_TEST_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(childEnv) {
	case "":
		goleak.VerifyTestMain(m)
	case "lend":
		lend()
	case "open":
		r, err := gpu.Open(gpu.Options{Runtime: os.Args[1]})
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(r.Library())
		r.Close()
	}
}

// machines are a machine of either runtime, and of the versions that are called differently.
var machines = []gpusim.Machine{
	{Runtime: "hip", Version: 50221153},
	{Runtime: "hip", Version: 60342131},
	{Runtime: "hip", Version: 70125424},
	{Runtime: "cuda", Version: 11080},
	{Runtime: "cuda", Version: 12080},
	{Runtime: "cuda", Version: 13000},
}

// onEach runs a test on machines of all of them.
func onEach(t *testing.T, test func(t *testing.T, sim *gpusim.Sim, r *gpu.Runtime)) {
	for _, m := range machines {
		t.Run(fmt.Sprintf("%s %d", m.Runtime, m.Version), func(t *testing.T) {
			sim, r := open(t, m)
			test(t, sim, r)
		})
	}
}

// open opens a machine's runtime, and sees in the end that nothing of it is left.
func open(t *testing.T, m gpusim.Machine) (*gpusim.Sim, *gpu.Runtime) {
	t.Helper()
	sim := gpusim.New(t, m)
	r := reopen(t, sim)
	t.Cleanup(func() {
		if left := sim.Counts().Left(); left != (gpusim.Counts{}) {
			t.Errorf("left behind: %+v", left)
		}
	})
	return sim, r
}

// reopen opens the runtime of a machine once more.
func reopen(t *testing.T, sim *gpusim.Sim) *gpu.Runtime {
	t.Helper()
	r, err := gpu.Open(gpu.Options{Library: sim.Library})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// bound runs f with a Context of a device, on a goroutine of its own.
func bound(t *testing.T, r *gpu.Runtime, device int, f func(c *gpu.Context)) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := r.Bind(device)
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Unbind()
		f(c)
	}()
	<-done
}

// alloc allocates until the test ends.
func alloc(t *testing.T, r *gpu.Runtime, device int, size uint64) uint64 {
	t.Helper()
	address, err := r.Alloc(device, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ok(t, r.Free(device, address)) })
	return address
}

// ok wants no error. It may be called on any goroutine.
func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

// want wants an error with some words in it.
func want(t *testing.T, err error, words ...string) {
	t.Helper()
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("error %v, want one with %q", err, w)
		}
	}
}

// pattern returns bytes that say where they are.
func pattern(seed byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7) ^ byte(i>>8) ^ seed
	}
	return b
}

// holds wants some bytes in a device's memory.
func holds(t *testing.T, r *gpu.Runtime, device int, address uint64, there []byte) {
	t.Helper()
	got := make([]byte, len(there))
	ok(t, r.Load(device, got, address))
	if !bytes.Equal(got, there) {
		t.Errorf("the bytes at %#x of device %d are not those that were put there", address, device)
	}
}

// mapped maps host memory until the test ends.
func mapped(t *testing.T, size int) []byte {
	t.Helper()
	m, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ok(t, unix.Munmap(m)) })
	return m
}

// finished waits for an event.
func finished(c *gpu.Context, e gpu.Event) error {
	for {
		done, err := c.Done(e)
		if done || err != nil {
			return err
		}
		time.Sleep(10 * time.Microsecond)
	}
}

// child is this binary as another process.
type child struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func start(t *testing.T, what string, args ...string) *child {
	t.Helper()
	c := &child{cmd: exec.Command(os.Args[0], args...)}
	// With the race detector a process would wait for a second before it ends.
	c.cmd.Env = append(os.Environ(), childEnv+"="+what, "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	c.cmd.Stderr = os.Stderr
	in, err := c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.in, c.out = in, bufio.NewReader(out)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.in.Close()
		ok(t, c.cmd.Wait())
	})
	return c
}

// lend is the child that lends memory: it allocates on a device, describes a part of it, says the handle, the offset and
// the size of the allocation, and ends with its standard input. Arguments: library, device, bytes.
func lend() {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	r, err := gpu.Open(gpu.Options{Library: os.Args[1]})
	fail(err)
	device, err := strconv.Atoi(os.Args[2])
	fail(err)
	size, err := strconv.Atoi(os.Args[3])
	fail(err)
	address, err := r.Alloc(device, uint64(size))
	fail(err)
	fail(r.Store(device, address, pattern(9, size)))
	g, err := r.Describe(address+lentOffset, uint64(size)-lentOffset)
	fail(err)
	fmt.Println(hex.EncodeToString(g.Handle), g.Offset, g.Allocation)
	io.Copy(io.Discard, os.Stdin)
	fail(r.Free(device, address))
	fail(r.Close())
}

// lentOffset is where the range begins that the child describes.
const lentOffset = 4096

// required says whether this run must have what a test needs.
func required(what string) bool {
	return slices.Contains(strings.Split(os.Getenv("UMBP_TEST_REQUIRE"), ","), what)
}
