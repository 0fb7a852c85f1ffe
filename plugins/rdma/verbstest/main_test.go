package verbstest_test

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/plugins/rdma/device"
	"github.com/umbp/umbp/plugins/rdma/verbstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const everything = device.LocalWrite | device.RemoteWrite | device.RemoteRead

// end is one end of a connection: a device with registered memory, a completion queue and a queue pair.
type end struct {
	t      *testing.T
	fabric *verbstest.Fabric
	dev    device.Device
	memory []byte
	mr     device.MR
	cq     device.CQ
	qp     device.QP
	chain  *device.Chain
	base   uint64
}

// newEnd makes an end on a device, with a queue pair in the state Init. It is closed with the test, and what is closed
// already is left out.
func newEnd(t *testing.T, f *verbstest.Fabric, name string, sendWRs int) *end {
	t.Helper()
	e := &end{t: t, fabric: f, memory: make([]byte, 1<<16), chain: f.NewChain(sendWRs+8, 4*(sendWRs+8))}
	e.base = verbstest.Address(e.memory)
	var err error
	if e.dev, err = f.Open(name); err != nil {
		t.Fatal(err)
	}
	if e.mr, err = e.dev.Register(e.memory, everything); err != nil {
		t.Fatal(err)
	}
	if e.cq, err = e.dev.CreateCQ(2 * sendWRs); err != nil {
		t.Fatal(err)
	}
	e.newQP(sendWRs)
	t.Cleanup(e.close)
	return e
}

func (e *end) newQP(sendWRs int) {
	e.t.Helper()
	var err error
	if e.qp, err = e.dev.CreateQP(device.QPConfig{CQ: e.cq, SendWRs: sendWRs, SGEs: 4}); err != nil {
		e.t.Fatal(err)
	}
	if err := e.qp.Init(1, everything); err != nil {
		e.t.Fatal(err)
	}
}

func (e *end) close() {
	e.t.Helper()
	if e.qp != nil {
		check(e.t, e.qp.Close())
	}
	if e.cq != nil {
		check(e.t, e.cq.Close())
	}
	if e.mr != nil {
		check(e.t, e.mr.Close())
	}
	check(e.t, e.dev.Close())
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

// routable returns the address that is not link-local.
func (e *end) routable() device.GID {
	e.t.Helper()
	gids, err := e.dev.GIDs(1)
	if err != nil {
		e.t.Fatal(err)
	}
	return gids[len(gids)-1]
}

// toward is what e needs to receive from peer, whose first packet is number 7.
func (e *end) toward(peer *end) device.ReceiveAttr {
	return device.ReceiveAttr{
		Port: 1, GIDIndex: e.routable().Index, RemoteGID: peer.routable().Addr, RemoteQPN: peer.qp.Num(), RemotePSN: 7,
		MTU: 4096, ReadsServed: 16, MinRNRTimer: 12, HopLimit: 64, Link: device.Ethernet,
	}
}

// sender is what an end needs to send.
var sender = device.SendAttr{PSN: 7, Timeout: 14, Retries: 7, RNRRetries: 6, ReadsInitiated: 16}

// connect makes both queue pairs ready.
func connect(a, b *end) {
	a.t.Helper()
	for _, err := range []error{
		a.qp.ReadyToReceive(a.toward(b)), b.qp.ReadyToReceive(b.toward(a)),
		a.qp.ReadyToSend(sender), b.qp.ReadyToSend(sender),
	} {
		if err != nil {
			a.t.Fatal(err)
		}
	}
}

// pair returns two connected ends, on a fabric of two devices with fast retries.
func pair(t *testing.T, sendWRs int) (*verbstest.Fabric, *end, *end) {
	t.Helper()
	return pairOf(t, verbstest.Config{}, sendWRs)
}

func pairOf(t *testing.T, cfg verbstest.Config, sendWRs int) (*verbstest.Fabric, *end, *end) {
	t.Helper()
	for len(cfg.Devices) < 2 {
		cfg.Devices = append(cfg.Devices, verbstest.DeviceConfig{})
	}
	if cfg.Retry == 0 {
		cfg.Retry = time.Millisecond
	}
	f := verbstest.New(cfg)
	a, b := newEnd(t, f, "simulated0", sendWRs), newEnd(t, f, "simulated1", sendWRs)
	connect(a, b)
	return f, a, b
}

// add appends a signaled work request between the same n bytes at both ends.
func (e *end) add(op device.Op, id uint64, peer *end, local, remote, n int) *device.WR {
	e.chain.WRs = append(e.chain.WRs, device.WR{
		ID: id, Op: op, Signaled: true, Remote: peer.base + uint64(remote), RKey: peer.mr.RKey(),
		FirstSGE: uint32(len(e.chain.SGEs)),
	})
	wr := &e.chain.WRs[len(e.chain.WRs)-1]
	if n > 0 {
		wr.SGEs = 1
		e.chain.SGEs = append(e.chain.SGEs, device.SGE{Addr: e.base + uint64(local), Length: uint32(n), LKey: e.mr.LKey()})
	}
	return wr
}

// post posts what was added and starts the next chain.
func (e *end) post() (int, error) {
	n, err := e.qp.Post(e.chain)
	e.chain.WRs, e.chain.SGEs = e.chain.WRs[:0], e.chain.SGEs[:0]
	return n, err
}

func (e *end) mustPost() {
	e.t.Helper()
	if _, err := e.post(); err != nil {
		e.t.Fatal(err)
	}
}

// collect waits for n completions.
func (e *end) collect(n int) []device.Completion {
	e.t.Helper()
	var all []device.Completion
	deadline := time.Now().Add(10 * time.Second)
	for {
		check(e.t, e.cq.Arm())
		for {
			got, err := e.cq.Poll()
			if err != nil {
				e.t.Fatal(err)
			}
			if len(got) == 0 {
				break
			}
			all = append(all, got...)
		}
		if len(all) >= n {
			return all
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("%d completions, want %d: %v", len(all), n, all)
		}
		check(e.t, e.cq.Wait(deadline))
	}
}

// statuses collects as many completions as there are statuses, for the IDs from first on, and compares.
func (e *end) statuses(first uint64, want ...device.Status) {
	e.t.Helper()
	got := e.collect(len(want))
	if len(got) != len(want) {
		e.t.Fatalf("%d completions, want %d: %v", len(got), len(want), got)
	}
	for i, c := range got {
		if c.ID != first+uint64(i) || c.Status != want[i] || c.QPN != e.qp.Num() {
			e.t.Errorf("completion %d is %+v, want ID %d, %v, of %d", i, c, first+uint64(i), want[i], e.qp.Num())
		}
	}
}

func fill(memory []byte, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 0))
	for i := 0; i+8 <= len(memory); i += 8 {
		binary.LittleEndian.PutUint64(memory[i:], r.Uint64())
	}
}

func TestWriteAndRead(t *testing.T) {
	for _, cfg := range []verbstest.Config{{}, {Instant: true}} {
		f, a, b := pairOf(t, cfg, 16)
		fill(a.memory[:4096], 1)
		fill(b.memory[8192:12288], 2)
		a.add(device.Write, 1, b, 0, 100, 4096)
		a.add(device.Read, 2, b, 8192, 8192, 4096)
		a.mustPost()
		a.statuses(1, device.Success, device.Success)
		if !bytes.Equal(a.memory[:4096], b.memory[100:4196]) {
			t.Error("written bytes differ")
		}
		if !bytes.Equal(a.memory[8192:12288], b.memory[8192:12288]) {
			t.Error("read bytes differ")
		}
		want := verbstest.Counts{Posts: 1, WRs: 2, SGEs: 2, Signaled: 2, Polled: 2, Bytes: 8192}
		if got := f.Counts(); got != want {
			t.Errorf("counts %+v, want %+v", got, want)
		}
	}
}
