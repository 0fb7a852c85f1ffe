package samehost

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

// copyMover is the mover of these tests. It maps memory files, and copies a transfer segment by segment, in a goroutine
// for each, or when a test says so. It keeps account of what the instance makes it open and close.
type copyMover struct {
	serve func(ctx context.Context, g *Guest, question []byte) ([]byte, error) // nil: echoes
	join  func(ctx context.Context, target Target) error                       // nil: agrees
	admit func(m backend.Memory) error                                         // nil: agrees
	mapIn func(ctx context.Context) error                                      // nil: agrees

	inline bool // copy within Start

	mu      sync.Mutex
	byHand  bool
	queue   []task
	regions map[*copyRegion]struct{}
	paths   map[*copyPath]struct{}
	closed  bool
}

type task struct {
	path     *copyPath
	transfer *Transfer
}

func newCopyMover() *copyMover {
	return &copyMover{regions: make(map[*copyRegion]struct{}), paths: make(map[*copyPath]struct{})}
}

type copyRegion struct {
	mover  *copyMover
	bytes  []byte
	mapped []byte
	file   int
	offset uint64
}

func (m *copyMover) keep(r *copyRegion) *copyRegion {
	m.mu.Lock()
	defer m.mu.Unlock()
	r.mover = m
	m.regions[r] = struct{}{}
	return r
}

func (m *copyMover) Admit(_ context.Context, own backend.Memory) (Region, error) {
	if m.admit != nil {
		if err := m.admit(own); err != nil {
			return nil, err
		}
	}
	if len(own.Bytes) == 0 {
		return nil, backend.Errorf(backend.BadRequest, "the region is empty")
	}
	r := &copyRegion{bytes: own.Bytes, file: -1, offset: uint64(own.FDOffset)}
	if own.FD >= 0 {
		var err error
		if r.file, err = Reopen(own.FD, own.Rights); err != nil {
			return nil, err
		}
	}
	return m.keep(r), nil
}

func (m *copyMover) Map(ctx context.Context, l Lent) (Region, error) {
	if m.mapIn != nil {
		if err := m.mapIn(ctx); err != nil {
			return nil, err
		}
	}
	if len(l.Note) != 8 {
		return nil, backend.Errorf(backend.Unsupported, "a note of %d bytes", len(l.Note))
	}
	mapped, bytes, err := MapFile(l.File, binary.BigEndian.Uint64(l.Note), l.Size, l.Rights)
	if err != nil {
		return nil, &backend.Error{Code: backend.Unsupported, Text: err.Error()}
	}
	return m.keep(&copyRegion{bytes: bytes, mapped: mapped, file: -1}), nil
}

func (m *copyMover) Join(ctx context.Context, near, far Region, target Target) (Path, error) {
	if m.join != nil {
		if err := m.join(ctx, target); err != nil {
			return nil, err
		}
	}
	p := &copyPath{mover: m, near: near.(*copyRegion), far: far.(*copyRegion)}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.paths[p] = struct{}{}
	return p, nil
}

func (m *copyMover) Serve(ctx context.Context, g *Guest, question []byte) ([]byte, error) {
	if m.serve != nil {
		return m.serve(ctx, g, question)
	}
	return append([]byte(nil), question...), nil
}

// Close wants everything closed before it.
func (m *copyMover) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || len(m.regions) > 0 || len(m.paths) > 0 || len(m.queue) > 0 {
		return fmt.Errorf("closed before: %v, and %d regions, %d paths and %d transfers are left", m.closed, len(m.regions), len(m.paths), len(m.queue))
	}
	m.closed = true
	return nil
}

// open counts the regions that are open.
func (m *copyMover) open() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.regions)
}

func (r *copyRegion) Size() uint64 { return uint64(len(r.bytes)) }

func (r *copyRegion) Lend(backend.Rights) (Lent, error) {
	if r.file < 0 {
		return Lent{}, backend.Errorf(backend.Unsupported, "the region has no file")
	}
	return Lent{Size: r.Size(), File: r.file, Note: binary.BigEndian.AppendUint64(nil, r.offset)}, nil
}

func (r *copyRegion) Close() error {
	r.mover.mu.Lock()
	defer r.mover.mu.Unlock()
	if _, open := r.mover.regions[r]; !open {
		return errors.New("the region is closed already")
	}
	delete(r.mover.regions, r)
	if r.mapped != nil {
		return unix.Munmap(r.mapped)
	}
	if r.file >= 0 {
		return unix.Close(r.file)
	}
	return nil
}

type copyPath struct {
	mover     *copyMover
	near, far *copyRegion
}

func (p *copyPath) Start(t *Transfer) {
	if p.mover.inline {
		p.copy(t)
		return
	}
	p.mover.mu.Lock()
	defer p.mover.mu.Unlock()
	if p.mover.byHand {
		p.mover.queue = append(p.mover.queue, task{p, t})
		return
	}
	go p.copy(t)
}

func (p *copyPath) copy(t *Transfer) {
	for i, g := range t.Segments {
		if t.Stopped() {
			outcomes := make([]backend.Outcome, len(t.Segments))
			for k := range i {
				outcomes[k] = backend.Done
			}
			t.Finish(outcomes, nil)
			return
		}
		backendtest.Model(t.Op, p.near.bytes, p.far.bytes, g)
	}
	t.Finish(nil, nil)
}

func (p *copyPath) Stop(t *Transfer) {
	if !t.Stopped() {
		panic("a transfer that is stopped does not say so")
	}
}

func (p *copyPath) Close() {
	p.mover.mu.Lock()
	defer p.mover.mu.Unlock()
	if _, open := p.mover.paths[p]; !open {
		panic("a path is closed twice")
	}
	delete(p.mover.paths, p)
}

// moverOf returns the mover of an instance.
func moverOf(i *Instance) *copyMover { return i.mover.(*copyMover) }

// hold has the transfers of an instance wait for the test, until the test ends.
func (m *copyMover) hold(t testing.TB) {
	m.mu.Lock()
	m.byHand = true
	m.mu.Unlock()
	t.Cleanup(m.release)
}

// release lets all transfers go.
func (m *copyMover) release() {
	m.mu.Lock()
	held := m.queue
	m.queue, m.byHand = nil, false
	m.mu.Unlock()
	for _, k := range held {
		go k.path.copy(k.transfer)
	}
}

// next takes the transfer that has waited longest.
func (m *copyMover) next(t testing.TB) task {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.queue) == 0 {
		t.Fatal("no transfer is held")
	}
	k := m.queue[0]
	m.queue = m.queue[1:]
	return k
}

// step carries out the transfer that has waited longest.
func (m *copyMover) step(t testing.TB) {
	t.Helper()
	k := m.next(t)
	k.path.copy(k.transfer)
}
