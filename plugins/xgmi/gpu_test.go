package xgmi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/conformance"
	"github.com/umbp/umbp/plugin-sdk/gpu"
	"github.com/umbp/umbp/plugin-sdk/gpu/gpusim"
	"github.com/umbp/umbp/plugins/xgmi"
)

// The tests whose names begin with TestGPU need a real GPU. Where there is none they are skipped, or fail if
// UMBP_TEST_REQUIRE has gpu.

// realGPUs opens the GPUs of this machine until the test ends, and returns the pairs of places on them.
func realGPUs(t *testing.T) (rt *gpu.Runtime, ways []way) {
	t.Helper()
	rt, err := gpu.Open(gpu.Options{})
	if err != nil {
		if slices.Contains(strings.Split(os.Getenv("UMBP_TEST_REQUIRE"), ","), "gpu") {
			t.Fatalf("%v, and UMBP_TEST_REQUIRE has gpu", err)
		}
		t.Skip(err)
	}
	t.Cleanup(func() {
		if err := rt.Close(); err != nil {
			t.Errorf("close the runtime: %v", err)
		}
	})
	if rt.Simulated() {
		t.Fatalf("%s is a simulated runtime", rt.Library())
	}
	for _, d := range rt.Devices() {
		t.Logf("%s %s (%s): GPU %d, %s, at %s", rt.Name(), rt.Version(), rt.Library(), d.Number, d.Name, d.PCI)
	}
	ways = slices.Clone(everyWay)
	if !linked(t, rt) {
		ways = slices.DeleteFunc(ways, func(w way) bool { return w.far == "gpu:1" })
	}
	return rt, ways
}

// linked tells whether there are two GPUs that can address each other's memory, and says why not.
func linked(t *testing.T, rt *gpu.Runtime) bool {
	if len(rt.Devices()) < 2 {
		t.Log("there is one GPU only: nothing is moved between two")
		return false
	}
	for _, pair := range [][2]int{{0, 1}, {1, 0}} {
		link, err := rt.Link(pair[0], pair[1])
		if err != nil {
			t.Fatal(err)
		}
		if !link.Access {
			t.Logf("GPU %d cannot address the memory of GPU %d: nothing is moved between them", pair[0], pair[1])
			return false
		}
	}
	return true
}

func TestGPUConformance(t *testing.T) {
	rt, ways := realGPUs(t)
	for _, w := range ways {
		t.Run(w.String(), func(t *testing.T) {
			conformance.Run(t, conformance.Harness{
				Factory: xgmi.Factory, Options: map[string]string{"socket_dir": sockets(t)},
				NewMemory: lender(rt, w.near), NewFarMemory: lender(rt, w.far),
			})
		})
	}
}

func TestGPUConformanceAsProcess(t *testing.T) {
	_, ways := realGPUs(t)
	bin := programs(t)
	for _, w := range ways {
		t.Run(w.String(), func(t *testing.T) { asProcess(t, bin, w) })
	}
}

func TestGPUTwoProcesses(t *testing.T) {
	rt, _ := realGPUs(t)
	t.Run("same GPU", func(t *testing.T) { twoProcesses(t, rt, gpu.Options{}, 0, 0) })
	if linked(t, rt) {
		t.Run("two GPUs", func(t *testing.T) { twoProcesses(t, rt, gpu.Options{}, 0, 1) })
	}
}

func TestTwoProcesses(t *testing.T) {
	for _, name := range []string{"hip", "cuda"} {
		sim := gpusim.New(t, gpusim.Machine{Runtime: name})
		o := gpu.Options{Runtime: name, Library: sim.Library}
		rt := open(t, o)
		t.Run(name+", same GPU", func(t *testing.T) { twoProcesses(t, rt, o, 0, 0) })
		t.Run(name+", two GPUs", func(t *testing.T) { twoProcesses(t, rt, o, 0, 1) })
	}
}

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

// A region of these tests lies at an odd place in its allocation.
const (
	allocationSize = 8 << 20
	regionOffset   = 3*4096 + 256
	regionSize     = 7 << 20
)

// shapes are segments of every shape that is moved in a way of its own: a grid, small pages in no order, and a long one.
// They overlap on neither side.
func shapes() []backend.Segment {
	var all []backend.Segment
	for i := range uint64(64) {
		all = append(all, backend.Segment{Local: i * 8192, Remote: i * 12288, Length: 4096})
	}
	for i, k := range rand.New(rand.NewPCG(1, 2)).Perm(200) {
		all = append(all, backend.Segment{Local: 1<<20 + uint64(k)*8192 + 64, Remote: 1<<20 + uint64(i)*8192, Length: 4096})
	}
	return append(all, backend.Segment{Local: 3<<20 + 7, Remote: 4<<20 + 1, Length: 2<<20 + 1})
}

// an end of a connection: a backend with one region.
type end struct {
	backend.Backend
	memory conformance.Memory
	remote backend.Remote
}

// newEnd opens a backend that lends a region of a device, until the test ends.
func newEnd(t *testing.T, rt *gpu.Runtime, o gpu.Options, device int, self backend.Peer) *end {
	t.Helper()
	raw := map[string]string{"library": o.Library, "socket_dir": sockets(t)}
	options, err := backend.CheckOptions(xgmi.Factory.Options, raw)
	if err != nil {
		t.Fatal(err)
	}
	e := &end{}
	if e.memory, err = conformance.GPUMemory(rt, device)(allocationSize); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.memory.Free(); err != nil {
			t.Errorf("free the memory: %v", err)
		}
	})
	if e.Backend, err = xgmi.Factory.Open(t.Context(), backend.Config{Self: self, Options: options}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Errorf("close the backend: %v", err)
		}
	})
	part := *e.memory.GPU
	part.Address += regionOffset
	part.Offset += regionOffset
	part.Size = regionSize
	m := backend.Memory{Region: 1, Kind: backend.GPUMemory, Rights: backend.RemoteRead | backend.RemoteWrite, GPU: &part, FD: -1}
	key, err := e.Register(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	e.remote = backend.Remote{
		Peer: self, Region: m.Region, Kind: m.Kind, Rights: m.Rights, Size: m.Size(), Place: m.Place(), Key: key,
	}
	return e
}

// fill gives the whole allocation new bytes.
func (e *end) fill(t *testing.T, p []byte) {
	t.Helper()
	if err := e.memory.Store(0, p); err != nil {
		t.Fatal(err)
	}
}

// differs says where the allocation is not as it should be.
func (e *end) differs(t *testing.T, want []byte) string {
	t.Helper()
	got := make([]byte, allocationSize)
	if err := e.memory.Load(got, 0); err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(got, want) {
		return ""
	}
	i := 0
	for got[i] == want[i] {
		i++
	}
	return fmt.Sprintf("byte %d of the allocation is %#x, want %#x; the region is that of %d bytes from %d", i, got[i], want[i], regionSize, regionOffset)
}

// sink hands the completion of one transfer at a time on.
type sink chan backend.Completion

func (s sink) Complete(c backend.Completion) { s <- c }

// The two processes talk over a pipe each way, in JSON: the initiator orders, and the target answers.
type (
	order struct {
		// Of the first order.
		Runtime gpu.Options
		Device  int
		Self    backend.Peer
		From    backend.Peer
		// Of the second.
		Offer []byte
		// Of the others: fill the allocation for a round, or check what it holds after it.
		Round int
		Check bool
	}
	answer struct {
		Remote backend.Remote
		Answer []byte
		Fault  string
	}
)

// rounds are the operations that are tried, one after the other.
var rounds = []backend.Op{backend.Write, backend.Read, backend.Write}

// before returns what the allocations of initiator and target hold before a round.
func before(round int) (here, there []byte) {
	here, there = make([]byte, allocationSize), make([]byte, allocationSize)
	rand.NewChaCha8([32]byte{byte(round), 1}).Read(here)
	rand.NewChaCha8([32]byte{byte(round), 2}).Read(there)
	return here, there
}

// after returns what they hold after it.
func after(round int) (here, there []byte) {
	here, there = before(round)
	for _, s := range shapes() {
		mine, theirs := here[regionOffset+s.Local:][:s.Length], there[regionOffset+s.Remote:][:s.Length]
		if rounds[round] == backend.Write {
			copy(theirs, mine)
		} else {
			copy(mine, theirs)
		}
	}
	return here, there
}

const targetEnv = "UMBP_XGMI_TEST_OTHER_PROCESS"

// twoProcesses has a process of its own lend memory of a device, which this one writes and reads; both compare each byte.
func twoProcesses(t *testing.T, rt *gpu.Runtime, o gpu.Options, near, far int) {
	self := backend.Peer{Node: "initiator", Incarnation: 1, Host: "here"}
	target := startTarget(t)
	described := target(order{Runtime: o, Device: far, Self: backend.Peer{Node: "target", Incarnation: 2, Host: "here"}, From: self})
	e := newEnd(t, rt, o, near, self)

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	handshake, err := e.Offer(ctx, described.Remote.Peer)
	if err != nil {
		t.Fatal(err)
	}
	endpoint, err := handshake.Establish(ctx, target(order{Offer: handshake.Offer()}).Answer)
	if err != nil {
		t.Fatal(err)
	}
	completions := make(sink, 1)
	session, err := endpoint.Session(ctx, 1, described.Remote, completions)
	if err != nil {
		t.Fatal(err)
	}
	for round, op := range rounds {
		here, _ := before(round)
		e.fill(t, here)
		target(order{Round: round})
		if err := session.Post(backend.Transfer{Op: op, Segments: shapes(), Cookie: 1}); err != nil {
			t.Fatal(err)
		}
		select {
		case c := <-completions:
			if c.Err != nil {
				t.Fatalf("a %s: %v", op, c.Err)
			}
		case <-ctx.Done():
			t.Fatalf("a %s does not complete", op)
		}
		here, _ = after(round)
		if fault := e.differs(t, here); fault != "" {
			t.Errorf("after a %s, here: %s", op, fault)
		}
		if fault := target(order{Round: round, Check: true}).Fault; fault != "" {
			t.Errorf("after a %s, at the target: %s", op, fault)
		}
	}
	if err := endpoint.Close(); err != nil {
		t.Error(err)
	}
}

// startTarget starts the other process, which ends with the test, and returns how to give it orders.
func startTarget(t *testing.T) func(order) answer {
	t.Helper()
	theirs, ours, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	answers, theirAnswers, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	var output bytes.Buffer
	cmd := exec.Command(os.Args[0], "-test.run=^TestOtherProcess$")
	cmd.Env = append(os.Environ(), targetEnv+"=1")
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = &output, &output, []*os.File{theirs, theirAnswers}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	theirAnswers.Close()
	t.Cleanup(func() {
		ours.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the target: %v\n%s", err, &output)
		}
		answers.Close()
	})
	orders, replies := json.NewEncoder(ours), json.NewDecoder(answers)
	return func(o order) (a answer) {
		t.Helper()
		if err := orders.Encode(o); err != nil {
			t.Fatalf("order something of the target: %v", err)
		}
		if err := replies.Decode(&a); err != nil {
			t.Fatalf("hear from the target: %v", err)
		}
		return a
	}
}

// TestOtherProcess is the target of twoProcesses.
func TestOtherProcess(t *testing.T) {
	if os.Getenv(targetEnv) == "" {
		t.Skip("it is the other process of other tests")
	}
	orders, replies := json.NewDecoder(os.NewFile(3, "orders")), json.NewEncoder(os.NewFile(4, "replies"))
	next := func() (o order, ok bool) { return o, orders.Decode(&o) == nil }
	reply := func(a answer) {
		if err := replies.Encode(a); err != nil {
			t.Fatal(err)
		}
	}
	o, _ := next()
	from := o.From
	e := newEnd(t, open(t, o.Runtime), o.Runtime, o.Device, o.Self)
	reply(answer{Remote: e.remote})

	o, _ = next()
	got, err := e.Answer(t.Context(), from, o.Offer)
	if err != nil {
		t.Fatal(err)
	}
	reply(answer{Answer: got})

	for {
		o, ok := next()
		switch {
		case !ok: // the initiator has seen enough
			return
		case o.Check:
			_, want := after(o.Round)
			reply(answer{Fault: e.differs(t, want)})
		default:
			_, fresh := before(o.Round)
			e.fill(t, fresh)
			reply(answer{})
		}
	}
}
