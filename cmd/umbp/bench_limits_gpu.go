//go:build !noxgmi

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/gpu"
)

const (
	copyTraffic = 1 << 30   // bytes that each side moves for one measurement
	copyMemory  = 256 << 20 // most memory on a device
	copyLanes   = 8         // most transfers at a time
	copyPage    = 64 << 10  // a transfer consists of pages, as a batch does
)

// gpuLimits hold transfers over xgmi against the copies of the runtime itself, and grouped batches against page by page.
// They go from the first GPU to the first other one that it reaches, or within it where there is none.
func gpuLimits(gpus config.GPU) []limit {
	var limits []limit
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		for _, size := range []uint64{1 << 20, 4 << 20, 16 << 20, 64 << 20} {
			limits = append(limits, limit{
				name: fmt.Sprintf("gpu_copy_%s_%dm", op, size>>20),
				what: fmt.Sprintf("%s transfers of %s over xgmi, %d at a time", op, humanSize(size), lanesOf(size)),

				against: "as many copies of the runtime", goal: 0.9, turns: 4,
				open: func(ctx context.Context) (*contest, error) { return openCopies(ctx, gpus, op, size) },
			})
		}
	}
	for _, page := range []uint64{4 << 10, 16 << 10, 64 << 10} {
		limits = append(limits, limit{
			name: fmt.Sprintf("gpu_pages_%dk", page>>10),
			what: fmt.Sprintf("put of 1024 scattered pages of %s over xgmi", humanSize(page)),

			against: "the same, page by page", goal: 1, turns: 4,
			open: func(ctx context.Context) (*contest, error) { return openPages(ctx, gpus, page) },
		})
	}
	return limits
}

func lanesOf(size uint64) uint64 { return min(copyLanes, copyMemory/size) }

// gpuPair is two devices of a runtime, which may be one.
type gpuPair struct {
	runtime   *gpu.Runtime
	near, far *gpuDevice
	link      string
}

// openPair chooses the devices, and notes on the contest which.
func openPair(k *contest, gpus config.GPU) (*gpuPair, error) {
	near, err := openGPU(gpus, "")
	if err != nil {
		return nil, err
	}
	k.closers = append(k.closers, near.Close)
	p := &gpuPair{runtime: near.gpuRuntime.(*gpu.Runtime), near: near, far: near, link: "the same GPU"}
	for _, d := range p.runtime.Devices() {
		if d.Number == near.number {
			continue
		}
		link, err := p.runtime.Link(near.number, d.Number)
		if err != nil {
			return nil, err
		}
		if link.Access {
			far := *near
			far.number, far.pci = d.Number, d.PCI
			p.far, p.link = &far, link.Type
			break
		}
	}
	k.note = fmt.Sprintf("%s to %s, %s", near, p.far.pci, p.link)
	return p, nil
}

// openCopies opens a session between two processes in one, and the runtime beside it.
func openCopies(ctx context.Context, gpus config.GPU, op backend.Op, size uint64) (_ *contest, err error) {
	k := &contest{}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.Close())
		}
	}()
	p, err := openPair(k, gpus)
	if err != nil {
		return nil, err
	}
	lanes := lanesOf(size)
	ends := [2]struct {
		device *gpuDevice
		rights backend.Rights
		engine *core.Engine
		region *region.Region
		memory *memory
	}{{device: p.near}, {device: p.far, rights: backend.RemoteRead | backend.RemoteWrite}}
	b := &benchCluster{benchCase: benchCase{backend: xgmiName, mode: config.InProcess, gpu: gpus}}
	b.factories, b.still = b.benchCase.factories()
	k.closers = append(k.closers, b.Close)
	for i := range ends {
		end := &ends[i]
		at, free, err := end.device.alloc(lanes * size)
		if err != nil {
			return nil, err
		}
		b.closers = append(b.closers, free)
		end.memory = &memory{size: at.Size, device: end.device, at: at}
		if end.engine, err = b.openEngine(ctx, fmt.Sprintf("end-%d", i), ""); err != nil {
			return nil, err
		}
		if end.region, err = end.engine.Register(ctx, &region.Region{Kind: backend.GPUMemory, Rights: end.rights, GPU: &at, FD: -1}); err != nil {
			return nil, err
		}
	}
	near, far := &ends[0], &ends[1]
	remote, err := far.engine.Descriptor(far.region.ID)
	if err != nil {
		return nil, err
	}
	near.engine.AddPeer(far.engine.Self(), answerer{far.engine})
	session, err := near.engine.Open(near.region.ID, remote)
	if err != nil {
		return nil, err
	}
	count := max(copyTraffic/size, lanes)
	k.umbp = func(ctx context.Context) (float64, error) {
		start := time.Now()
		err := moveLanes(ctx, session, op, lanes, size, count/lanes)
		return gigabytes(count*size, time.Since(start)), err
	}
	from, to := near.memory, far.memory
	if op == backend.Read {
		from, to = to, from
	}
	k.limit = func(context.Context) (float64, error) { return p.copies(to, from, lanes, size, count) }

	// What is measured has to be right.
	if err := errors.Join(from.fill(1), to.clear()); err != nil {
		return nil, err
	}
	if err := moveLanes(ctx, session, op, lanes, size, 1); err != nil {
		return nil, err
	}
	return k, to.compare(from)
}

// answerer lets an engine answer for itself, in the same process.
type answerer struct{ *core.Engine }

func (a answerer) Answer(ctx context.Context, req *peer.AnswerRequest) (*peer.AnswerReply, error) {
	return a.Engine.Answer(ctx, req.From, req.Backend, req.Offer)
}

// moveLanes has each lane make so many transfers, one after the other.
func moveLanes(ctx context.Context, session *core.Session, op backend.Op, lanes, size, calls uint64) error {
	move := session.Write
	if op == backend.Read {
		move = session.Read
	}
	var group errgroup.Group
	for lane := range lanes {
		group.Go(func() error {
			var pages []backend.Segment
			for at := lane * size; at < (lane+1)*size; at += copyPage {
				pages = append(pages, backend.Segment{Local: at, Remote: at, Length: copyPage})
			}
			for range calls {
				if report := move(ctx, pages); report.Err != nil {
					return report.Err
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// copies has the runtime itself make so many copies, and returns GB/s. A thread that was bound to a device is not used
// again, which is why this has a goroutine of its own.
func (p *gpuPair) copies(to, from *memory, lanes, size, count uint64) (rate float64, err error) {
	var alone errgroup.Group
	alone.Go(func() (err error) {
		rate, err = p.copy(to, from, lanes, size, count)
		return err
	})
	err = alone.Wait()
	return rate, err
}

// copy makes the copies on one stream of the near device.
func (p *gpuPair) copy(to, from *memory, lanes, size, count uint64) (rate float64, err error) {
	thread, err := p.runtime.Bind(p.near.number)
	if err != nil {
		return 0, err
	}
	defer thread.Unbind()
	if p.far != p.near {
		if err := thread.EnablePeer(p.far.number); err != nil {
			return 0, err
		}
	}
	stream, err := thread.NewStream()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, thread.DestroyStream(stream)) }()
	start := time.Now()
	for i := range count {
		at := i % lanes * size
		if err := thread.Copy(stream, gpu.Copy{To: to.at.Address + at, From: from.at.Address + at, Bytes: size}); err != nil {
			return 0, err
		}
	}
	err = thread.Wait(stream)
	return gigabytes(count*size, time.Since(start)), err
}

// openPages opens a cluster that is measured by both plans.
func openPages(ctx context.Context, gpus config.GPU, page uint64) (_ *contest, err error) {
	k := &contest{}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.Close())
		}
	}()
	p, err := openPair(k, gpus)
	if err != nil {
		return nil, err
	}
	b, err := openLoaded(ctx, k, benchCase{
		op: benchPut, scenario: allZeroCopy, backend: xgmiName, mode: config.InProcess, batch: 1024, itemPages: 1, pageBytes: page,
		memory: place{gpu: true, device: p.near.pci}, pool: place{gpu: true, device: p.far.pci}, gpu: gpus,
	}, grouped, perPage)
	if err != nil {
		return nil, err
	}
	k.umbp = func(ctx context.Context) (float64, error) { return putRates(ctx, b, grouped, 8) }
	k.limit = func(ctx context.Context) (float64, error) { return putRates(ctx, b, perPage, 8) }
	return k, nil
}
