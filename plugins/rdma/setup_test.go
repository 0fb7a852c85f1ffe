package rdma

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma/device"
	"github.com/umbp/umbp/plugins/rdma/verbstest"
)

const bothRights = backend.RemoteRead | backend.RemoteWrite

// move writes and reads once over the session, and compares.
func (r *rig) move(t testing.TB, what string) {
	t.Helper()
	fill(r.near, uint64(time.Now().UnixNano()))
	want := bytes.Clone(r.near)
	whole := []backend.Segment{{Length: uint64(len(r.near))}}
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		if err := r.session.Post(backend.Transfer{Op: op, Segments: whole}); err != nil {
			t.Fatalf("%s: %s: %v", what, op, err)
		}
		if c := r.completions.Next(t); c.Err != nil {
			t.Fatalf("%s: %s: %v", what, op, c.Err)
		}
		if !bytes.Equal(r.far, want) || !bytes.Equal(r.near, want) {
			t.Fatalf("%s: %s moved the wrong bytes", what, op)
		}
		clear(r.near)
	}
}

// hosts is a network with two hosts, each with the devices that it names.
func hosts(cfg verbstest.Config, a, b []verbstest.DeviceConfig) (f *verbstest.Fabric, libA, libB device.Library) {
	names := func(host string, all []verbstest.DeviceConfig) (names []string) {
		for i := range all {
			all[i].Name = fmt.Sprint("sim-", host, i)
			names = append(names, all[i].Name)
		}
		return names
	}
	namesA, namesB := names("a", a), names("b", b)
	cfg.Devices = append(append(cfg.Devices, a...), b...)
	f = verbstest.New(cfg)
	return f, f.Host(namesA...), f.Host(namesB...)
}

// port is a device of one port, whose LID is the last byte of its first GID.
func port(link device.Link, table ...device.GID) verbstest.DeviceConfig {
	return verbstest.DeviceConfig{Ports: []verbstest.PortConfig{{
		Port: device.Port{Active: true, Link: link, MTU: 4096, LID: uint16(table[0].Addr[15])}, Table: table,
	}}}
}

// TestMixedRails connects hosts with different devices.
func TestMixedRails(t *testing.T) {
	four := func(n int) device.GID { return gid(3, device.GIDRoCEv2, fmt.Sprint("::ffff:192.0.2.", n)) }
	six := func(n int) device.GID { return gid(2, device.GIDRoCEv2, fmt.Sprint("2001:db8::", n)) }
	v1 := func(n int) device.GID { return gid(0, device.GIDRoCEv1, fmt.Sprint("::ffff:198.51.100.", n)) }
	ib := func(n int) device.GID { return gid(0, device.GIDInfiniBand, fmt.Sprint("fe80::", n)) }
	type devices = []verbstest.DeviceConfig
	for _, c := range []struct {
		name string
		a, b devices
		want [][2]int // rails of the paths, here and there
		err  string   // instead
	}{
		{"two and one", devices{port(device.Ethernet, four(1)), port(device.Ethernet, four(2))}, devices{port(device.Ethernet, four(3))},
			[][2]int{{0, 0}}, ""},
		{"one and two", devices{port(device.Ethernet, four(1))}, devices{port(device.Ethernet, four(3)), port(device.Ethernet, four(4))},
			[][2]int{{0, 0}}, ""},
		{"two and two", devices{port(device.Ethernet, four(1)), port(device.Ethernet, four(2))},
			devices{port(device.Ethernet, four(3)), port(device.Ethernet, four(4))}, [][2]int{{0, 0}, {1, 1}}, ""},
		{"in another order", devices{port(device.Ethernet, four(1)), port(device.Ethernet, six(1))},
			devices{port(device.Ethernet, six(2)), port(device.Ethernet, four(2))}, [][2]int{{0, 1}, {1, 0}}, ""},
		{"one of two fits", devices{port(device.InfiniBand, ib(1)), port(device.Ethernet, four(1))},
			devices{port(device.Ethernet, four(2))}, [][2]int{{1, 0}}, ""},
		{"InfiniBand", devices{port(device.InfiniBand, ib(1))}, devices{port(device.InfiniBand, ib(2))}, [][2]int{{0, 0}}, ""},
		{"InfiniBand and Ethernet", devices{port(device.InfiniBand, ib(1))}, devices{port(device.Ethernet, four(1))}, nil,
			"sim-b0 port 1 does not fit port 0 of the peer: InfiniBand on one end and Ethernet on the other"},
		{"two versions of RoCE", devices{port(device.Ethernet, v1(1))}, devices{port(device.Ethernet, four(1))}, nil,
			"RoCEv1 on one end and RoCEv2 on the other; set gid_index"},
		{"two families", devices{port(device.Ethernet, six(1))}, devices{port(device.Ethernet, four(1))}, nil,
			"a GID of IPv6 on one end and of IPv4 on the other; set gid_index"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, libA, libB := hosts(verbstest.Config{}, c.a, c.b)
			r := &rig{fabric: f, near: make([]byte, 1<<16), far: make([]byte, 1<<16), completions: new(sink)}
			r.a, r.b = openNode(t, libA, "a", map[string]string{"stripe": "4KiB", "wr_bytes": "4KiB"}), openNode(t, libB, "b", nil)
			r.a.lend(t, 1, r.near, 0)
			r.remote = r.b.lend(t, 2, r.far, bothRights)
			e, err := tryConnect(r.a, r.b)
			if c.err != "" {
				wantCode(t, err, backend.Unsupported)
				if !strings.Contains(err.Error(), c.err) {
					t.Errorf("the error is %v, which does not say %q", err, c.err)
				}
				return
			}
			must(t, err)
			var got [][2]int
			for _, p := range r.a.endpoints[e] {
				got = append(got, [2]int{p.rail.index, p.remote})
			}
			if fmt.Sprint(got) != fmt.Sprint(c.want) {
				t.Errorf("the paths are %v, want %v", got, c.want)
			}
			r.endpoint = e
			r.session = r.bind(t, r.completions)
			r.move(t, "mixed")
		})
	}
}

// TestOnePathFails has one of two paths not work. The other one carries everything, and the breaker keeps the bad one out.
func TestOnePathFails(t *testing.T) {
	r := newRig(t, verbstest.Config{Devices: make([]verbstest.DeviceConfig, 2)}, 1<<16, map[string]string{"breaker_pause": "1m", "breaker_max_pause": "1h"})
	r.endpoint.Close()
	r.fabric.Unplug("sim-b1")
	r.connect(t)
	if n := len(r.a.endpoints[r.endpoint]); n != 1 {
		t.Fatalf("the endpoint has %d paths", n)
	}
	r.move(t, "over one of two paths")
	h, err := r.a.Offer(context.Background(), r.b.self)
	must(t, err)
	if o, _ := parseOffer(h.Offer()); len(o.ends) != 1 || o.ends[0].rail != 0 {
		t.Errorf("the bad path is offered again: %+v", o.ends)
	}
	h.Abandon()
	r.fabric.Plug("sim-b1")
	r.a.breakers.reset(1)
	r.connect(t)
	if n := len(r.a.endpoints[r.endpoint]); n != 2 {
		t.Errorf("when it works again, the endpoint has %d paths", n)
	}
}

// TestAllHeldBack asks for a connection while every breaker is open.
func TestAllHeldBack(t *testing.T) {
	r := newRig(t, verbstest.Config{Devices: make([]verbstest.DeviceConfig, 2)}, 4096, map[string]string{"breaker_pause": "1m", "breaker_max_pause": "1h"})
	r.endpoint.Close()
	r.fabric.Unplug("sim-b0")
	r.fabric.Unplug("sim-b1")
	_, err := tryConnect(r.a, r.b)
	wantCode(t, err, backend.PathDown)
	_, err = r.a.Offer(context.Background(), r.b.self)
	wantCode(t, err, backend.PathDown)
	e := err.(*backend.Error)
	if e.RetryAfter < 20*time.Second || e.RetryAfter > time.Minute {
		t.Errorf("try again after %s", e.RetryAfter)
	}
	for _, want := range []string{"sim-a0 port 1 is held back", "sim-a1 port 1 is held back", "retries exceeded"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
	again := r.b.self
	again.Incarnation++
	h, err := r.a.Offer(context.Background(), again)
	if err != nil {
		t.Fatalf("a new incarnation of the node is held back, too: %v", err)
	}
	h.Abandon()
}

// TestDeviceComesBack has a device fail under way and be repaired, at either end. Regions that were registered before are
// reached by the keys that peers have had all along.
func TestDeviceComesBack(t *testing.T) {
	for _, victim := range []string{"sim-a0", "sim-b0"} {
		for _, devices := range []int{1, 2} {
			t.Run(fmt.Sprint(victim, " of ", devices), func(t *testing.T) {
				r := newRig(t, verbstest.Config{Devices: make([]verbstest.DeviceConfig, devices)}, 1<<16,
					map[string]string{"breaker_pause": "1ms", "drain": "10ms", "stripe": "4KiB", "wr_bytes": "4KiB"})
				loser, before := r.a, r.endpoint
				if victim == "sim-b0" {
					loser = r.b
				}
				idle, err := r.a.Offer(context.Background(), r.b.self) // waits for an answer that does not come
				must(t, err)
				r.fabric.Fatal(victim)
				eventually(t, "losing the rail", func() bool { return len(loser.rails()) == devices-1 })
				if loser == r.a {
					wantClosed(t, before.Done(), "the failure of the endpoint")
				}
				if devices == 2 {
					eventually(t, "connecting over the other device", func() bool {
						e, err := tryConnect(r.a, r.b)
						if err == nil {
							r.endpoint = e
							r.session = r.bind(t, r.completions)
						}
						return err == nil
					})
					r.move(t, "over the other device")
				} else {
					_, err := tryConnect(r.a, r.b)
					wantCode(t, err, backend.PathDown)
					if !strings.Contains(err.Error(), "the device has failed") {
						t.Errorf("the error is %v", err)
					}
				}
				loser.lend(t, 7, make([]byte, 100), bothRights) // comes to the rail when that comes back
				r.fabric.Repair(victim)
				eventually(t, "opening the device again", func() bool { return len(loser.rails()) == devices })
				idle.Abandon()
				eventually(t, "connecting over all devices", func() bool {
					e, err := tryConnect(r.a, r.b)
					if err != nil {
						return false
					}
					if r.endpoint = e; len(r.a.endpoints[e]) == devices {
						return true
					}
					e.Close()
					return false
				})
				r.session = r.bind(t, r.completions)
				r.move(t, "with the old key")
				far := make([]byte, len(r.far))
				r.far, r.remote = far, r.b.lend(t, 3, far, bothRights)
				if _, err := r.endpoint.Session(context.Background(), 1, r.remote, r.completions); err != nil {
					t.Fatal(err)
				}
				r.session = r.bind(t, r.completions)
				r.move(t, "with a new key")
			})
		}
	}
}

// TestOldKeyOnNewDevice has a key that the connection does not know: of a region that went before it was made.
func TestOldKeyOnNewDevice(t *testing.T) {
	r := newRig(t, verbstest.Config{}, 4096, map[string]string{"breaker_pause": "1ms"})
	r.fabric.Fatal("sim-b0")
	r.fabric.Repair("sim-b0")
	eventually(t, "opening the device again", func() bool {
		rails := r.b.rails()
		return len(rails) == 1 && rails[0].generation == 2
	})
	must(t, r.b.Deregister(context.Background(), r.remote.Region))
	e, err := tryConnect(r.a, r.b)
	must(t, err)
	_, err = e.Session(context.Background(), 1, r.remote, r.completions)
	wantCode(t, err, backend.PathDown)
}

// TestPortEvents takes the port down and up, and gives it another address.
func TestPortEvents(t *testing.T) {
	r := newRig(t, verbstest.Config{}, 4096, nil)
	r.fabric.SetPort("sim-a0", 1, false)
	wantClosed(t, r.endpoint.Done(), "the failure of the endpoint")
	_, err := tryConnect(r.a, r.b)
	wantCode(t, err, backend.PathDown)
	if !strings.Contains(err.Error(), "sim-a0 port 1: the port is DOWN") {
		t.Errorf("the error is %v", err)
	}
	r.a.breakers.refused(0, r.b.self, backend.Errorf(backend.Integrity, "held back for long"))
	r.fabric.SetPort("sim-a0", 1, true)
	eventually(t, "closing the breaker", func() bool { return r.a.breakers.wait(0, r.b.self) == 0 })
	r.connect(t)
	r.move(t, "after the port came up")

	r.fabric.SetPort("sim-b0", 1, false)
	if _, err := r.a.Offer(context.Background(), r.b.self); err != nil {
		t.Errorf("a port of the peer went down, and here: %v", err)
	}
	eventually(t, "the target's knowing of its port", func() bool { return r.b.rails()[0].at.Load().err != nil })
	_, err = tryConnect(r.a, r.b)
	wantCode(t, err, backend.PathDown)
	r.fabric.SetPort("sim-b0", 1, true)

	now := gid(5, device.GIDRoCEv2, "::ffff:203.0.113.9")
	r.a.breakers.refused(0, r.b.self, backend.Errorf(backend.Integrity, "held back for long"))
	r.fabric.SetGIDs("sim-a0", 1, []device.GID{now})
	eventually(t, "closing the breaker", func() bool { return r.a.breakers.wait(0, r.b.self) == 0 })
	r.endpoint.Close()
	r.connect(t)
	r.move(t, "from another address")
	for _, qp := range r.fabric.QPs("sim-b0") {
		if qp.State == verbstest.ReadyToSend && qp.Receive.RemoteGID == now.Addr {
			return
		}
	}
	t.Error("no queue pair of the target knows the new address")
}

// TestOpenWithout says what is missing.
func TestOpenWithout(t *testing.T) {
	down := verbstest.DeviceConfig{Name: "sim-down", Ports: []verbstest.PortConfig{{Port: device.Port{Link: device.Ethernet, MTU: 1024}}}}
	bare := verbstest.DeviceConfig{Name: "sim-bare", Ports: []verbstest.PortConfig{{
		Port: device.Port{Active: true, Link: device.Ethernet, MTU: 1024}, Table: []device.GID{},
	}}}
	fabric := func(devices ...verbstest.DeviceConfig) *verbstest.Fabric {
		return verbstest.New(verbstest.Config{Devices: devices})
	}
	without := fabric()
	without.Inject(verbstest.Fault{At: verbstest.AtDevices, Times: -1, Err: &device.Missing{What: "libibverbs.so.1 cannot be loaded", Remedy: "install libibverbs1"}})
	dead := fabric(verbstest.DeviceConfig{Name: "sim-dead"})
	dead.Inject(verbstest.Fault{At: verbstest.AtOpen, Times: -1, Err: syscall.EACCES})
	for name, c := range map[string]struct {
		lib     device.Library
		options map[string]string
		want    string
	}{
		"no library":              {without, nil, "libibverbs.so.1 cannot be loaded; install libibverbs1"},
		"no device":               {fabric().Host(), nil, "simulated verbs finds no device; load the driver"},
		"no active port":          {fabric(down), nil, "no port is active; sim-down port 1 is DOWN; plug the cable in"},
		"no active port, by name": {fabric(down), map[string]string{"devices": "sim-down:1"}, "sim-down port 1: the port is DOWN"},
		"no address":              {fabric(bare), nil, "sim-bare port 1: the port has no GID"},
		"not permitted":           {dead, nil, "sim-dead: open: permission denied"},
		"another device":          {fabric(down), map[string]string{"devices": "sim-dawn"}, `there is no device "sim-dawn", did you mean "sim-down"?; there are sim-down`},
		"another port":            {fabric(down), map[string]string{"devices": "sim-down:2"}, "sim-down has 1 ports, and no port 2"},
		"no port":                 {fabric(down), map[string]string{"devices": "sim-down:x"}, `"sim-down:x" names no port; write sim-down:1`},
		"twice":                   {fabric(down), map[string]string{"devices": "sim-down:1, sim-down:1"}, "sim-down port 1 is named twice"},
		"another GID":             {fabric(), map[string]string{"gid_index": "9"}, "the port has no GID of index 9"},
	} {
		t.Run(name, func(t *testing.T) {
			values, err := backend.CheckOptions(options, c.options)
			must(t, err)
			_, err = Factory(c.lib).Open(context.Background(), backend.Config{Self: backend.Peer{Node: "n", Incarnation: 1}, Options: values})
			wantCode(t, err, backend.Unsupported)
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("the error is %v, which does not say %q", err, c.want)
			}
			problem := false
			for _, f := range examine(c.lib, readSettings(values), hostLimits{memlock: unlimited}) {
				problem = problem || f.State == backend.Problem
			}
			if !problem {
				t.Error("Examine finds no problem")
			}
		})
	}
}

// TestDevicesOption opens what it names.
func TestDevicesOption(t *testing.T) {
	two := verbstest.DeviceConfig{Name: "sim-two", Ports: []verbstest.PortConfig{
		{Port: device.Port{Active: true, Link: device.Ethernet, MTU: 1024}},
		{Port: device.Port{Active: true, Link: device.Ethernet, MTU: 1024}},
		{Port: device.Port{Link: device.Ethernet, MTU: 1024}},
	}}
	one := verbstest.DeviceConfig{Name: "sim-one"}
	for wanted, want := range map[string]string{
		"":                   "[sim-one port 1 sim-two port 1 sim-two port 2]",
		"sim-two":            "[sim-two port 1 sim-two port 2]",
		"sim-two:2, sim-one": "[sim-two port 2 sim-one port 1]",
		"sim-one,sim-two:3":  "[sim-one port 1 sim-two port 3]", // it may come up
	} {
		n := openNode(t, verbstest.New(verbstest.Config{Devices: []verbstest.DeviceConfig{two, one}}), "n", map[string]string{"devices": wanted})
		var got []string
		for _, r := range n.rails() {
			got = append(got, r.name)
		}
		if fmt.Sprint(got) != want {
			t.Errorf("devices=%q opens %v, want %s", wanted, got, want)
		}
	}
}

// TestParts registers a region in parts, as devices with small memory regions want it.
func TestParts(t *testing.T) {
	small := verbstest.DeviceConfig{Attr: device.Attr{MaxMRSize: 10000}} // 8192 is the power of two
	r := newRig(t, verbstest.Config{Devices: []verbstest.DeviceConfig{small}}, 5*8192+17, nil)
	if k, err := parseKey(r.remote.Key); err != nil || k.part != 8192 || len(k.rails[0].rkeys) != 6 {
		t.Fatalf("got key %+v, %v", k, err)
	}
	r.move(t, "across parts")

	before := r.fabric.Objects()
	r.fabric.Inject(verbstest.Fault{At: verbstest.AtRegister, Skip: 3, Err: syscall.ENOMEM})
	m := backend.Memory{Region: 9, Kind: backend.HostMemory, Bytes: make([]byte, 5*8192), FD: -1}
	_, err := r.a.Register(context.Background(), m)
	wantCode(t, err, backend.Denied)
	if now := r.fabric.Objects(); now != before {
		t.Errorf("a part was refused, and left are %+v of %+v", now, before)
	}
	m.Bytes = make([]byte, maxParts*8192+1)
	_, err = r.a.Register(context.Background(), m)
	wantCode(t, err, backend.Unsupported)
}

// TestLeastRights looks at what regions are registered with.
func TestLeastRights(t *testing.T) {
	for rights, want := range map[backend.Rights]device.Access{
		0:                   device.LocalWrite,
		backend.RemoteRead:  device.LocalWrite | device.RemoteRead,
		backend.RemoteWrite: device.LocalWrite | device.RemoteWrite,
		bothRights:          device.LocalWrite | device.RemoteRead | device.RemoteWrite,
	} {
		if got := access(rights); got != want {
			t.Errorf("rights %d: got access %d, want %d", rights, got, want)
		}
	}
}

// TestFenceIsCertain has a device that does not destroy a queue pair. A fence is not done before it does.
func TestFenceIsCertain(t *testing.T) {
	r := newRig(t, verbstest.Config{}, 4096, nil)
	r.fabric.Inject(verbstest.Fault{At: verbstest.AtCloseQP, Device: "sim-b0", Times: 2, Err: syscall.EBUSY})
	fence := func() error { return r.b.Fence(context.Background(), r.a.self) }
	if err := fence(); err == nil {
		t.Fatal("the fence is done, and a queue pair lives")
	}
	must(t, fence())
	if n := len(r.fabric.QPs("sim-b0")); n != 0 {
		t.Errorf("%d queue pairs are left", n)
	}
}

// TestFenceWaitsForTheDevice fences while a device that has failed is not closed yet.
func TestFenceWaitsForTheDevice(t *testing.T) {
	r := newRig(t, verbstest.Config{}, 4096, map[string]string{"breaker_pause": "1m", "breaker_max_pause": "1h"})
	rail := r.b.rails()[0]
	rail.users.Enter() // somebody still has something of the device
	r.fabric.Fatal("sim-b0")
	eventually(t, "losing the rail", func() bool { return len(r.b.rails()) == 0 })
	fence := func() error { return r.b.Fence(context.Background(), r.a.self) }
	wantCode(t, fence(), backend.Busy)
	rail.users.Leave()
	eventually(t, "a fence", func() bool { return fence() == nil })
	if now := r.fabric.QPs("sim-b0"); len(now) != 0 {
		t.Errorf("after it there are %+v", now)
	}
}

// TestFenceOfWhatStays loses a rail whose device is well, and does not destroy the queue pairs that serve a peer. As long
// as they are there no fence is done, and the device is not opened again.
func TestFenceOfWhatStays(t *testing.T) {
	r := newRig(t, verbstest.Config{}, 4096, map[string]string{"breaker_pause": "1ms"})
	stay := r.fabric.Inject(verbstest.Fault{At: verbstest.AtCloseQP, Device: "sim-b0", Times: -1, Err: syscall.EBUSY})
	lost := r.b.rails()[0]
	r.b.loseRail(lost, errors.New("its events cannot be had any more"))
	eventually(t, "trying to destroy them", func() bool { return stay.Hits() >= 3*len(r.fabric.QPs("sim-b0")) })
	if err := r.b.Fence(context.Background(), r.a.self); err == nil {
		t.Errorf("the fence is done, and there are %+v", r.fabric.QPs("sim-b0"))
	}
	stay.Remove()
	eventually(t, "opening the device again", func() bool {
		rails := r.b.rails()
		return len(rails) == 1 && rails[0] != lost
	})
	if err := r.b.Fence(context.Background(), r.a.self); err != nil {
		t.Error(err)
	}
	if left := r.fabric.QPs("sim-b0"); len(left) != 0 {
		t.Errorf("after it there are %+v", left)
	}
}

// TestRailThatIsClosed asks a rail where it is when its device is closed.
func TestRailThatIsClosed(t *testing.T) {
	r := newRig(t, verbstest.Config{}, 4096, nil)
	rail := r.b.rails()[0]
	must(t, r.b.Close())
	if rail.locate(&r.b.settings) {
		t.Error("a closed device has moved")
	}
}

// TestStuckMemory has a device that does not give memory back at first. Deregister can be repeated.
func TestStuckMemory(t *testing.T) {
	r := newRig(t, verbstest.Config{}, 4096, nil)
	r.fabric.Inject(verbstest.Fault{At: verbstest.AtCloseMR, Device: "sim-b0", Err: syscall.EBUSY})
	err := r.b.Deregister(context.Background(), r.remote.Region)
	wantCode(t, err, backend.Internal)
	if !errors.Is(err, syscall.EBUSY) {
		t.Errorf("the error is %v", err)
	}
	must(t, r.b.Deregister(context.Background(), r.remote.Region))
	r.remote = r.b.lend(t, r.remote.Region, r.far, bothRights)
	r.connect(t)
	r.move(t, "registered again")
}

// TestMaxConnections has a peer take more than it may have. Others are served meanwhile, and it is served again once the
// connections that it gave up are found dead.
func TestMaxConnections(t *testing.T) {
	opts := map[string]string{"max_connections": "8", "connect_timeout": "100ms", "probe": "100ms"}
	f, libA, libB := hosts(verbstest.Config{}, make([]verbstest.DeviceConfig, 1), make([]verbstest.DeviceConfig, 1))
	a, b := openNode(t, libA, "a", opts), openNode(t, libB, "b", opts)
	second := openNode(t, libA, "c", opts)
	var all []*endpoint
	for range 2 {
		e, err := tryConnect(a, b)
		must(t, err)
		all = append(all, e)
	}
	_, err := tryConnect(a, b)
	wantCode(t, err, backend.Busy)
	if err.(*backend.Error).RetryAfter == 0 {
		t.Error("it does not say when to try again")
	}
	if _, err := tryConnect(second, b); err != nil {
		t.Fatalf("another peer: %v", err)
	}
	for _, e := range all {
		e.Close()
	}
	eventually(t, "being served again", func() bool {
		_, err := tryConnect(a, b)
		return err == nil
	})
	if n := len(f.QPs("sim-b0")); n > 3*2 {
		t.Errorf("%d queue pairs are left", n)
	}
}

// TestHandshakeOnce uses handshakes in ways that they are not made for.
func TestHandshakeOnce(t *testing.T) {
	r := newRig(t, verbstest.Config{}, 4096, nil)
	ctx := context.Background()
	offer := func() backend.Handshake {
		t.Helper()
		h, err := r.a.Offer(ctx, r.b.self)
		must(t, err)
		return h
	}
	h := offer()
	answer, err := r.b.Answer(ctx, r.a.self, h.Offer())
	must(t, err)
	if _, err := h.Establish(ctx, answer); err != nil {
		t.Fatal(err)
	}
	_, err = h.Establish(ctx, answer)
	wantCode(t, err, backend.BadRequest)
	h.Abandon()

	h = offer()
	h.Abandon()
	h.Abandon()
	_, err = h.Establish(ctx, answer)
	wantCode(t, err, backend.BadRequest)

	// The answer to another offer leads to queue pairs that talk to others.
	h = offer()
	if e, err := h.Establish(ctx, answer); err == nil {
		e.Close()
		t.Error("the answer to another offer is as good")
	}

	// What was meant for somebody else.
	stranger := backend.Peer{Node: "a", Incarnation: 99}
	r.a.breakers.reset(0)
	h = offer()
	_, err = r.b.Answer(ctx, stranger, h.Offer())
	wantCode(t, err, backend.BadRequest)
	h.Abandon()
	old := r.b.self
	old.Incarnation++
	if h, err = r.a.Offer(ctx, old); err != nil {
		t.Fatal(err)
	}
	_, err = r.b.Answer(ctx, r.a.self, h.Offer())
	wantCode(t, err, backend.PeerGone)
	_, err = h.Establish(ctx, answer)
	wantCode(t, err, backend.PeerGone)
}

// TestCloseBesideSetUp closes backends while connections are being set up.
func TestCloseBesideSetUp(t *testing.T) {
	for range 20 {
		f, libA, libB := hosts(verbstest.Config{}, make([]verbstest.DeviceConfig, 2), make([]verbstest.DeviceConfig, 2))
		a, b := openNode(t, libA, "a", nil), openNode(t, libB, "b", nil)
		var busy sync.WaitGroup
		for _, pair := range [][2]*transport{{a, b}, {b, a}, {a, b}} {
			busy.Go(func() {
				for {
					e, err := tryConnect(pair[0], pair[1])
					if err != nil {
						return
					}
					e.Close()
				}
			})
		}
		idle, err := a.Offer(context.Background(), b.self)
		must(t, err)
		time.Sleep(time.Millisecond)
		for _, n := range []*transport{a, b} {
			busy.Go(func() {
				if err := n.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		busy.Wait()
		if left := f.Objects(); left != (verbstest.Objects{}) {
			t.Fatalf("left are %+v", left)
		}
		_, err = idle.Establish(context.Background(), nil)
		wantCode(t, err, backend.PathDown)
	}
}

// TestNewIncarnation connects as a process that was started again. What its predecessor had is gone.
func TestNewIncarnation(t *testing.T) {
	f, libA, libB := hosts(verbstest.Config{}, make([]verbstest.DeviceConfig, 1), make([]verbstest.DeviceConfig, 1))
	b := openNode(t, libB, "b", nil)
	first := openNode(t, libA, "a", nil)
	if _, err := tryConnect(first, b); err != nil {
		t.Fatal(err)
	}
	before := f.QPs("sim-b0")
	second := openNode(t, libA, "a", nil)
	second.self.Incarnation = first.self.Incarnation + 1
	if _, err := tryConnect(second, b); err != nil {
		t.Fatal(err)
	}
	for _, now := range f.QPs("sim-b0") {
		for _, old := range before {
			if now.Num == old.Num {
				t.Errorf("queue pair %#x of the older incarnation is still there", old.Num)
			}
		}
	}
}

// TestExamine describes a machine with a bit of everything.
func TestExamine(t *testing.T) {
	linkLocal := port(device.Ethernet, gid(0, device.GIDRoCEv1, "fe80::1"), gid(1, device.GIDRoCEv2, "fe80::1"))
	linkLocal.Name = "sim-local"
	down := verbstest.DeviceConfig{Name: "sim-down", Ports: []verbstest.PortConfig{{Port: device.Port{Link: device.Ethernet, MTU: 1024}}}}
	f := verbstest.New(verbstest.Config{Fork: device.ForkDisabled, Devices: []verbstest.DeviceConfig{{Name: "sim-good"}, linkLocal, down}})
	s := readSettings(backend.Defaults(options))
	var text strings.Builder
	for _, finding := range examine(f, s, hostLimits{memlock: 8 << 20}) {
		fmt.Fprintf(&text, "%s | %s | %s | %s\n", finding.State, finding.Subject, finding.Text, finding.Remedy)
	}
	for _, want := range []string{
		"fine | library | simulated verbs | \n",
		"fine | device sim-good | firmware simulated; ports: 1; queue pairs: 65536;",
		"fine | port sim-good port 1 | ACTIVE, Ethernet, MTU 4096, messages of 8MiB; GID 0: RoCEv1 fe80::200:0:0:1 on sim-good; " +
			"GID 1: RoCEv2 fe80::200:0:0:1 on sim-good; GID 3: RoCEv2 192.0.2.1 on sim-good (chosen) | \n",
		"warning | port sim-local port 1 | ACTIVE",
		"give the network interface a routable address",
		"fine | port sim-down port 1 | DOWN",
		"warning | fork | a fork may take",
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no finding is like %q", want)
		}
	}
	if t.Failed() {
		t.Log(text.String())
	}
	if left := f.Objects(); left != (verbstest.Objects{}) {
		t.Errorf("left open are %+v", left)
	}
	for _, c := range []struct {
		limits hostLimits
		state  backend.FindingState
		want   string
	}{
		{hostLimits{memlock: 8 << 20}, backend.Warning, "8MiB at most"},
		{hostLimits{memlock: 8 << 20, exempt: true}, backend.Fine, "CAP_IPC_LOCK"},
		{hostLimits{memlock: unlimited}, backend.Fine, "without limit"},
	} {
		if f := examineMemory(c.limits, false); f.State != c.state || !strings.Contains(f.Text, c.want) || (c.state == backend.Fine) != (f.Remedy == "") {
			t.Errorf("%+v: got %+v", c.limits, f)
		}
	}
}
