//go:build cgo

package verbs

/*
#include "verbs.h"
*/
import "C"

import (
	"cmp"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/umbp/umbp/plugins/rdma/device"
)

// hca is an opened device.
type hca struct {
	lib    *library
	v      *C.struct_umbp_verbs
	ctx    *C.struct_ibv_context
	pd     *C.struct_ibv_pd
	attr   device.Attr
	events *channel
	event  C.struct_umbp_event // that events took last; for the one that waits in NextEvent
	next   sync.Mutex          // held in NextEvent

	objects atomic.Int64 // made of the device, and not closed

	mu     sync.RWMutex // held for reading while ctx and pd are used
	closed bool

	cqMu   sync.Mutex
	cqs    map[uintptr]*cq // by the name that the library knows them by
	lastCQ uintptr
}

// newHCA takes ctx, also when it fails.
func newHCA(l *library, v *C.struct_umbp_verbs, ctx *C.struct_ibv_context, name string) (*hca, error) {
	d := &hca{lib: l, v: v, ctx: ctx, attr: device.Attr{Name: name}, cqs: map[uintptr]*cq{}}
	err := d.begin()
	if err != nil {
		if d.pd != nil {
			C.umbp_dealloc_pd(v, d.pd)
		}
		C.umbp_close(v, ctx)
		return nil, err
	}
	return d, nil
}

func (d *hca) begin() error {
	var a C.struct_ibv_device_attr
	if errno := C.umbp_query_device(d.v, d.ctx, &a); errno != 0 {
		return d.error("query device", errno)
	}
	d.attr = device.Attr{
		Name:              d.attr.Name,
		Firmware:          C.GoString(&a.fw_ver[0]),
		Ports:             int(a.phys_port_cnt),
		MaxQP:             int(a.max_qp),
		MaxCQ:             int(a.max_cq),
		MaxMR:             int(a.max_mr),
		MaxCQE:            int(a.max_cqe),
		MaxMRSize:         uint64(a.max_mr_size),
		MaxWR:             int(a.max_qp_wr),
		MaxSGE:            int(a.max_sge),
		MaxSGERead:        int(a.max_sge_rd),
		MaxReadsServed:    int(a.max_qp_rd_atom),
		MaxReadsInitiated: int(a.max_qp_init_rd_atom),
	}
	if errno := C.umbp_alloc_pd(d.v, d.ctx, &d.pd); errno != 0 {
		return d.error("allocate protection domain", errno)
	}
	var err error
	d.events, err = newChannel(int(d.ctx.async_fd), d.attr.Name+" events", func() syscall.Errno {
		return syscall.Errno(C.umbp_event(d.v, d.ctx, &d.event))
	})
	if err != nil {
		return d.error("wait for events", C.int(errnoOf(err)))
	}
	return nil
}

func (d *hca) error(op string, errno C.int) error {
	return &device.Error{Device: d.attr.Name, Op: op, Errno: syscall.Errno(errno)}
}

// use keeps the device open until release, unless it is closed.
func (d *hca) use(op string) error {
	d.mu.RLock()
	if d.closed {
		d.mu.RUnlock()
		return closed(d.attr.Name, op)
	}
	return nil
}

func (d *hca) release() { d.mu.RUnlock() }

func (d *hca) Attr() device.Attr { return d.attr }

func (d *hca) Port(number int) (device.Port, error) {
	const op = "query port"
	if err := d.use(op); err != nil {
		return device.Port{}, err
	}
	defer d.release()
	return d.port(number, op)
}

func (d *hca) port(number int, op string) (device.Port, error) {
	if number < 1 || number > d.attr.Ports {
		return device.Port{}, d.error(op, C.EINVAL)
	}
	var a C.struct_ibv_port_attr
	if errno := C.umbp_query_port(d.v, d.ctx, C.uint8_t(number), &a); errno != 0 {
		return device.Port{}, d.error(op, errno)
	}
	p := device.Port{
		Number:     number,
		Active:     a.state == C.IBV_PORT_ACTIVE,
		State:      portState(uint32(a.state)),
		MTU:        mtuBytes(uint32(a.active_mtu)),
		MaxMessage: uint64(a.max_msg_sz),
		LID:        uint16(a.lid),
		GIDs:       int(a.gid_tbl_len),
		Rate:       rate(uint8(a.active_width), uint8(a.active_speed)),
	}
	switch a.link_layer {
	case C.IBV_LINK_LAYER_INFINIBAND:
		p.Link = device.InfiniBand
	case C.IBV_LINK_LAYER_ETHERNET:
		p.Link = device.Ethernet
	}
	return p, nil
}

func (d *hca) GIDs(port int) ([]device.GID, error) {
	const op = "query GIDs"
	if err := d.use(op); err != nil {
		return nil, err
	}
	defer d.release()
	p, err := d.port(port, op)
	if err != nil {
		return nil, err
	}
	var gids []device.GID
	for i := range min(p.GIDs, math.MaxUint8+1) { // the attributes of a queue pair can name no others
		var e C.struct_ibv_gid_entry
		switch errno := C.umbp_query_gid(d.v, d.ctx, C.uint32_t(port), C.uint32_t(i), &e); errno {
		case 0:
		case C.ENODATA, C.EINVAL: // nothing stands there
			continue
		default:
			return nil, d.error(op, errno)
		}
		g := device.GID{Index: i, Addr: e.gid}
		if g.Addr == [16]byte{} {
			continue
		}
		switch e.gid_type {
		case C.IBV_GID_TYPE_ROCE_V1:
			g.Type = device.GIDRoCEv1
		case C.IBV_GID_TYPE_ROCE_V2:
			g.Type = device.GIDRoCEv2
		}
		if e.ndev_ifindex != 0 {
			// One that is not in this network namespace has no name here.
			if n, err := net.InterfaceByIndex(int(e.ndev_ifindex)); err == nil {
				g.Interface = n.Name
			}
		}
		gids = append(gids, g)
	}
	return gids, nil
}

func accessFlags(access device.Access) C.uint {
	var flags C.uint
	for _, f := range []struct {
		access device.Access
		flag   C.uint
	}{
		{device.LocalWrite, C.IBV_ACCESS_LOCAL_WRITE},
		{device.RemoteWrite, C.IBV_ACCESS_REMOTE_WRITE},
		{device.RemoteRead, C.IBV_ACCESS_REMOTE_READ},
	} {
		if access&f.access != 0 {
			flags |= f.flag
		}
	}
	return flags
}

func (d *hca) Register(memory []byte, access device.Access) (device.MR, error) {
	const op = "register memory"
	if err := d.use(op); err != nil {
		return nil, err
	}
	defer d.release()
	if len(memory) == 0 {
		return nil, d.error(op, C.EINVAL)
	}
	m := &mr{hca: d}
	if errno := C.umbp_register(d.v, d.pd, unsafe.Pointer(&memory[0]), C.size_t(len(memory)), C.int(accessFlags(access)), &m.mr); errno != 0 {
		return nil, d.error(op, errno)
	}
	m.lkey, m.rkey = uint32(m.mr.lkey), uint32(m.mr.rkey)
	d.objects.Add(1)
	return m, nil
}

// mr is a memory region.
type mr struct {
	hca        *hca
	lkey, rkey uint32

	mu sync.Mutex
	mr *C.struct_ibv_mr // nil when it is closed
}

func (m *mr) LKey() uint32 { return m.lkey }
func (m *mr) RKey() uint32 { return m.rkey }

func (m *mr) Close() error {
	const op = "deregister memory"
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mr == nil {
		return closed(m.hca.attr.Name, op)
	}
	if errno := C.umbp_deregister(m.hca.v, m.mr); errno != 0 {
		return m.hca.error(op, errno)
	}
	m.mr = nil
	m.hca.objects.Add(-1)
	return nil
}

func (d *hca) NextEvent() (device.Event, error) {
	const op = "next event"
	d.next.Lock()
	defer d.next.Unlock()
	if err := d.events.wait(); err != nil {
		if errno, ok := err.(syscall.Errno); ok {
			err = d.error(op, C.int(errno))
		}
		return device.Event{}, err
	}
	e := device.Event{
		Port: int(d.event.port),
		QPN:  uint32(d.event.qpn),
		Text: C.GoString(d.event.text),
	}
	switch d.event._type {
	case C.IBV_EVENT_DEVICE_FATAL:
		e.Kind = device.DeviceFatal
	case C.IBV_EVENT_PORT_ERR:
		e.Kind = device.PortDown
	case C.IBV_EVENT_PORT_ACTIVE:
		e.Kind = device.PortUp
	case C.IBV_EVENT_GID_CHANGE:
		e.Kind = device.GIDChange
	case C.IBV_EVENT_QP_FATAL, C.IBV_EVENT_QP_REQ_ERR, C.IBV_EVENT_QP_ACCESS_ERR:
		e.Kind = device.QPFailed
	case C.IBV_EVENT_CQ_ERR:
		e.Kind = device.CQFailed
		d.cqMu.Lock()
		if q := d.cqs[uintptr(d.event.cq)]; q != nil {
			e.CQ = q
		}
		d.cqMu.Unlock()
	}
	return e, nil
}

func (d *hca) Close() error {
	const op = "close"
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return closed(d.attr.Name, op)
	}
	if d.objects.Load() > 0 {
		return d.error(op, C.EBUSY)
	}
	d.closed = true
	d.events.close()
	// The context goes in any case, and what is left of the device with it.
	pd := C.umbp_dealloc_pd(d.v, d.pd)
	ctx := C.umbp_close(d.v, d.ctx)
	if errno := cmp.Or(pd, ctx); errno != 0 {
		return d.error(op, errno)
	}
	return nil
}

func portState(state uint32) string {
	switch state {
	case C.IBV_PORT_DOWN:
		return "DOWN"
	case C.IBV_PORT_INIT:
		return "INIT"
	case C.IBV_PORT_ARMED:
		return "ARMED"
	case C.IBV_PORT_ACTIVE:
		return "ACTIVE"
	case C.IBV_PORT_ACTIVE_DEFER:
		return "ACTIVE_DEFER"
	}
	return "UNKNOWN"
}

// mtuBytes returns the bytes of an enum ibv_mtu, zero of one that is none.
func mtuBytes(mtu uint32) int {
	if mtu < C.IBV_MTU_256 || mtu > C.IBV_MTU_4096 {
		return 0
	}
	return 128 << mtu
}

// mtuOf is the other way round.
func mtuOf(bytes int) (mtu uint32, ok bool) {
	for mtu = C.IBV_MTU_256; mtu <= C.IBV_MTU_4096; mtu++ {
		if mtuBytes(mtu) == bytes {
			return mtu, true
		}
	}
	return 0, false
}

// rate returns the Mbit/s of a port, as the InfiniBand specification encodes width and speed, zero when it is unknown.
func rate(width, speed uint8) int {
	lanes := map[uint8]int{1: 1, 2: 4, 4: 8, 8: 12, 16: 2}
	mbits := map[uint8]int{1: 2500, 2: 5000, 4: 10000, 8: 10000, 16: 14000, 32: 25000, 64: 50000, 128: 100000}
	return lanes[width] * mbits[speed]
}
