//go:build cgo

package verbs

// Without the two lines, which work together only, each poll allocates the count that C returns. In time no difference
// was measured (100 ns for an empty poll), nor any at all for umbp_post.

/*
#cgo noescape umbp_poll
#cgo nocallback umbp_poll
#include <stdlib.h>
#include "verbs.h"
*/
import "C"

import (
	"errors"
	"math"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/umbp/umbp/plugins/rdma/device"
)

// cq is a completion queue with a completion channel of its own.
type cq struct {
	hca     *hca
	name    uintptr // in hca.cqs
	entries int
	events  *channel
	woken   atomic.Bool
	qps     atomic.Int64 // that use it, and are not closed

	mu          sync.Mutex                         // held in each call into C but that of events
	cq          *C.struct_ibv_cq                   // nil when it is destroyed
	channel     *C.struct_ibv_comp_channel         // nil when that is destroyed, too
	completions *[device.MaxPoll]device.Completion // C memory, for Poll
	forgetting  *[device.MaxPoll]device.Completion // C memory, for forget: what Poll has returned is still being read
	kept        []device.Completion                // that were polled, and come before what C has
}

func (d *hca) CreateCQ(entries int) (device.CQ, error) {
	const op = "create completion queue"
	if err := d.use(op); err != nil {
		return nil, err
	}
	defer d.release()
	if entries < 1 || entries > math.MaxInt32 {
		return nil, d.error(op, C.EINVAL)
	}
	q := &cq{hca: d}
	if errno := C.umbp_create_channel(d.v, d.ctx, &q.channel); errno != 0 {
		return nil, d.error("create completion channel", errno)
	}
	d.cqMu.Lock()
	d.lastCQ++
	q.name = d.lastCQ
	d.cqMu.Unlock()
	if errno := C.umbp_create_cq(d.v, d.ctx, C.int(entries), C.uintptr_t(q.name), q.channel, &q.cq); errno != 0 {
		C.umbp_destroy_channel(d.v, q.channel)
		return nil, d.error(op, errno)
	}
	channel := q.channel
	var err error
	q.events, err = newChannel(int(channel.fd), d.attr.Name+" completions", func() syscall.Errno {
		d.lib.calls.Add(1)
		return syscall.Errno(C.umbp_cq_event(d.v, channel))
	})
	if err != nil {
		C.umbp_destroy_cq(d.v, q.cq)
		C.umbp_destroy_channel(d.v, q.channel)
		return nil, d.error("wait for completions", C.int(errnoOf(err)))
	}
	q.entries = int(q.cq.cqe)
	// malloc as cgo has it does not return when there is no memory. What is read of it has been polled.
	arrays := (*[2][device.MaxPoll]device.Completion)(C.malloc(2 * device.MaxPoll * C.sizeof_struct_umbp_completion))
	q.completions, q.forgetting = &arrays[0], &arrays[1]
	// Not in Close: who polled last may still read.
	runtime.AddCleanup(q, func(p unsafe.Pointer) { C.free(p) }, unsafe.Pointer(arrays))
	d.cqMu.Lock()
	d.cqs[q.name] = q
	d.cqMu.Unlock()
	d.objects.Add(1)
	return q, nil
}

func (q *cq) Entries() int { return q.entries }

func (q *cq) Poll() ([]device.Completion, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.cq == nil {
		return nil, closed(q.hca.attr.Name, "poll")
	}
	if len(q.kept) > 0 {
		n := copy(q.completions[:], q.kept)
		q.kept = q.kept[n:]
		return q.completions[:n], nil
	}
	return q.poll(q.completions)
}

// poll fills into, which is C memory.
func (q *cq) poll(into *[device.MaxPoll]device.Completion) ([]device.Completion, error) {
	q.hca.lib.calls.Add(1)
	var n C.int
	if errno := C.umbp_poll(q.cq, (*C.struct_umbp_completion)(unsafe.Pointer(into)), &n); errno != 0 {
		return nil, q.hca.error("poll", errno)
	}
	return into[:n], nil
}

// forget takes the completions of a queue pair that is destroyed out of the queue. Most drivers have done so; soft-RoCE
// leaves them there, and may give the number of the queue pair to another one.
func (q *cq) forget(qpn uint32) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		got, err := q.poll(q.forgetting)
		if len(got) == 0 || err != nil { // the next Poll fails, too
			break
		}
		q.kept = append(q.kept, got...)
	}
	q.kept = slices.DeleteFunc(q.kept, func(c device.Completion) bool { return c.QPN == qpn })
}

func (q *cq) Arm() error {
	const op = "arm"
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.cq == nil {
		return closed(q.hca.attr.Name, op)
	}
	q.hca.lib.calls.Add(1)
	if errno := C.umbp_arm(q.cq); errno != 0 {
		return q.hca.error(op, errno)
	}
	return nil
}

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// Wait sets the deadline and then looks for a Wake. Wake leaves word of itself and then sets a deadline that has
// passed. So a Wake whose deadline Wait has overwritten is one that Wait sees.
func (q *cq) Wait(deadline time.Time) error {
	err := q.events.deadline(deadline)
	if err == nil && q.woken.Swap(false) {
		return nil
	}
	if err == nil {
		err = q.events.wait()
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		q.woken.Store(false)
		return nil
	case errors.Is(err, os.ErrClosed):
		return closed(q.hca.attr.Name, "wait for completions")
	}
	return q.hca.error("wait for completions", C.int(errnoOf(err)))
}

func (q *cq) Wake() {
	q.woken.Store(true)
	q.events.deadline(past) // fails when it is closed, and then nobody waits
}

func (q *cq) Close() error {
	const op = "destroy completion queue"
	q.mu.Lock()
	defer q.mu.Unlock()
	d := q.hca
	if q.channel == nil {
		return closed(d.attr.Name, op)
	}
	if q.qps.Load() > 0 {
		return d.error(op, C.EBUSY)
	}
	q.events.close()
	if q.cq != nil {
		if errno := C.umbp_destroy_cq(d.v, q.cq); errno != 0 {
			return d.error(op, errno)
		}
		q.cq = nil
		d.cqMu.Lock()
		delete(d.cqs, q.name)
		d.cqMu.Unlock()
	}
	if errno := C.umbp_destroy_channel(d.v, q.channel); errno != 0 {
		return d.error("destroy completion channel", errno)
	}
	q.channel = nil
	d.objects.Add(-1)
	return nil
}

// qp is an RC queue pair.
type qp struct {
	hca  *hca
	cq   *cq
	num  uint32
	caps device.Caps

	mu sync.Mutex        // held in each call into C
	sq *C.struct_umbp_sq // nil when it is closed
}

func (d *hca) CreateQP(cfg device.QPConfig) (device.QP, error) {
	const op = "create queue pair"
	if err := d.use(op); err != nil {
		return nil, err
	}
	defer d.release()
	c, ok := cfg.CQ.(*cq)
	if !ok || c.hca != d || cfg.SendWRs < 1 || cfg.SendWRs > math.MaxInt32 || cfg.SGEs < 1 || cfg.SGEs > math.MaxInt32 {
		return nil, d.error(op, C.EINVAL)
	}
	c.mu.Lock() // it is not closed meanwhile
	defer c.mu.Unlock()
	if c.cq == nil {
		return nil, closed(d.attr.Name, op)
	}
	// Nothing is ever received; but some drivers refuse an empty receive queue.
	caps := C.struct_ibv_qp_cap{max_send_wr: C.uint32_t(cfg.SendWRs), max_send_sge: C.uint32_t(cfg.SGEs), max_recv_wr: 1, max_recv_sge: 1}
	q := &qp{hca: d, cq: c}
	if errno := C.umbp_create_qp(d.v, d.pd, c.cq, &caps, &q.sq); errno != 0 {
		return nil, d.error(op, errno)
	}
	q.num = uint32(q.sq.qp.qp_num)
	q.caps = device.Caps{SendWRs: int(caps.max_send_wr), SGEs: int(caps.max_send_sge)}
	c.qps.Add(1)
	d.objects.Add(1)
	return q, nil
}

func (q *qp) Num() uint32       { return q.num }
func (q *qp) Caps() device.Caps { return q.caps }

func (q *qp) modify(op string, attr *C.struct_ibv_qp_attr, mask C.int) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.sq == nil {
		return closed(q.hca.attr.Name, op)
	}
	if errno := C.umbp_modify_qp(q.hca.v, q.sq, attr, mask|C.IBV_QP_STATE); errno != 0 {
		return q.hca.error(op, errno)
	}
	return nil
}

// fit says whether values fit into the bytes that C has for them. What they may be is for the device to say.
func fit(values ...int) bool {
	return !slices.ContainsFunc(values, func(v int) bool { return v < 0 || v > math.MaxUint8 })
}

func (q *qp) Init(port int, access device.Access) error {
	const op = "init"
	if !fit(port) {
		return q.hca.error(op, C.EINVAL)
	}
	attr := C.struct_ibv_qp_attr{
		qp_state:        C.IBV_QPS_INIT,
		port_num:        C.uint8_t(port),
		qp_access_flags: accessFlags(access),
	}
	return q.modify(op, &attr, C.IBV_QP_PKEY_INDEX|C.IBV_QP_PORT|C.IBV_QP_ACCESS_FLAGS)
}

func (q *qp) ReadyToReceive(a device.ReceiveAttr) error {
	const op = "ready to receive"
	mtu, ok := mtuOf(a.MTU)
	if !ok || !fit(a.Port, a.GIDIndex, a.ReadsServed, a.MinRNRTimer, a.TrafficClass, a.ServiceLevel, a.HopLimit) {
		return q.hca.error(op, C.EINVAL)
	}
	attr := C.struct_ibv_qp_attr{
		qp_state:           C.IBV_QPS_RTR,
		path_mtu:           mtu,
		dest_qp_num:        C.uint32_t(a.RemoteQPN),
		rq_psn:             C.uint32_t(a.RemotePSN),
		max_dest_rd_atomic: C.uint8_t(a.ReadsServed),
		min_rnr_timer:      C.uint8_t(a.MinRNRTimer),
	}
	to := &attr.ah_attr
	to.port_num = C.uint8_t(a.Port)
	to.sl = C.uint8_t(a.ServiceLevel)
	if a.Link == device.InfiniBand {
		to.dlid = C.uint16_t(a.RemoteLID)
	}
	// A packet on Ethernet has a global header, and so has one on InfiniBand that leaves its subnet.
	if a.Link != device.InfiniBand || a.RemoteLID == 0 {
		to.is_global = 1
		to.grh.dgid = a.RemoteGID
		to.grh.sgid_index = C.uint8_t(a.GIDIndex)
		to.grh.hop_limit = C.uint8_t(a.HopLimit)
		to.grh.traffic_class = C.uint8_t(a.TrafficClass)
	}
	return q.modify(op, &attr, C.IBV_QP_AV|C.IBV_QP_PATH_MTU|C.IBV_QP_DEST_QPN|C.IBV_QP_RQ_PSN|
		C.IBV_QP_MAX_DEST_RD_ATOMIC|C.IBV_QP_MIN_RNR_TIMER)
}

func (q *qp) ReadyToSend(a device.SendAttr) error {
	const op = "ready to send"
	if !fit(a.Timeout, a.Retries, a.RNRRetries, a.ReadsInitiated) {
		return q.hca.error(op, C.EINVAL)
	}
	attr := C.struct_ibv_qp_attr{
		qp_state:      C.IBV_QPS_RTS,
		sq_psn:        C.uint32_t(a.PSN),
		timeout:       C.uint8_t(a.Timeout),
		retry_cnt:     C.uint8_t(a.Retries),
		rnr_retry:     C.uint8_t(a.RNRRetries),
		max_rd_atomic: C.uint8_t(a.ReadsInitiated),
	}
	return q.modify(op, &attr, C.IBV_QP_SQ_PSN|C.IBV_QP_TIMEOUT|C.IBV_QP_RETRY_CNT|
		C.IBV_QP_RNR_RETRY|C.IBV_QP_MAX_QP_RD_ATOMIC)
}

func (q *qp) Fail() error {
	return q.modify("fail", &C.struct_ibv_qp_attr{qp_state: C.IBV_QPS_ERR}, 0)
}

func (q *qp) Post(c *device.Chain) (taken int, err error) {
	const op = "post"
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.sq == nil {
		return 0, closed(q.hca.attr.Name, op)
	}
	q.hca.lib.calls.Add(1)
	posted := C.umbp_post(q.sq,
		(*C.struct_umbp_wr)(unsafe.Pointer(unsafe.SliceData(c.WRs))), C.size_t(len(c.WRs)),
		(*C.struct_ibv_sge)(unsafe.Pointer(unsafe.SliceData(c.SGEs))), C.size_t(len(c.SGEs)))
	if posted.error != 0 {
		return int(posted.taken), q.hca.error(op, posted.error)
	}
	return int(posted.taken), nil
}

func (q *qp) Close() error {
	const op = "destroy queue pair"
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.sq == nil {
		return closed(q.hca.attr.Name, op)
	}
	if errno := C.umbp_destroy_qp(q.hca.v, q.sq); errno != 0 {
		return q.hca.error(op, errno)
	}
	q.sq = nil
	q.cq.forget(q.num)
	q.cq.qps.Add(-1)
	q.hca.objects.Add(-1)
	return nil
}
