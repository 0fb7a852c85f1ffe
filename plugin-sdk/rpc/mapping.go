package rpc

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/proto/backendpb"
)

// mapping is a region of the host in the plugin.
type mapping struct {
	file  *os.File      // nil for memory of a GPU
	bytes []byte        // what is mapped, from a page's start; nil where nothing is
	ready chan struct{} // closed when Register is through; registered is set then
	// registered says that the backend has the region.
	registered bool
}

func (m *mapping) free() error {
	var err error
	if m.bytes != nil {
		err = os.NewSyscallError("munmap", unix.Munmap(m.bytes))
	}
	if m.file != nil {
		err = errors.Join(err, m.file.Close())
	}
	return err
}

// register maps a region, if it is the host's memory, and hands it to the backend.
func (s *Server) register(ctx context.Context, b backend.Backend, q *backendpb.RegisterRequest) (key []byte, err error) {
	fault := func(code backend.Code, text string, cause error) *backend.Error {
		return &backend.Error{Code: code, Op: "register", Region: backend.RegionID(q.GetRegion()), Text: text, Err: cause}
	}
	m := &mapping{ready: make(chan struct{})}
	if q.GetGpu() == nil {
		files, err := s.inbox.take(ctx, q.GetTag(), 1)
		if err != nil {
			return nil, fault(backend.CodeOf(err), "no descriptor has come", err)
		}
		m.file = files[0]
	}
	defer close(m.ready)
	s.mu.Lock()
	ended, twice := s.ended, s.regions[q.GetRegion()] != nil
	if !ended && !twice {
		s.regions[q.GetRegion()] = m
	}
	s.mu.Unlock()
	switch {
	case ended:
		_ = m.free()
		return nil, fault(backend.PathDown, "the plugin is ending", nil)
	case twice:
		_ = m.free()
		return nil, fault(backend.BadRequest, "the region is registered already", nil)
	}
	defer func() {
		if err != nil {
			s.unmap(q.GetRegion(), m)
		}
	}()
	memory, err := m.mapIn(q)
	if err != nil {
		return nil, fault(backend.BadRequest, "the memory cannot be taken in", err)
	}
	if key, err = b.Register(ctx, memory); err != nil {
		return nil, err
	}
	if ctx.Err() != nil { // the host has given up, and will not hear of it
		if err := b.Deregister(context.WithoutCancel(ctx), memory.Region); err != nil {
			m.registered = true // and stays mapped
			return nil, nil
		}
		return nil, fault(backend.Cancelled, "", ctx.Err())
	}
	m.registered = true
	return key, nil
}

// mapIn maps what a RegisterRequest describes. Memory of a GPU is not mapped: the backend opens its handle.
func (m *mapping) mapIn(q *backendpb.RegisterRequest) (backend.Memory, error) {
	memory := backend.Memory{
		Region: backend.RegionID(q.GetRegion()), Kind: backend.MemoryKind(narrow(q.GetKind())),
		Rights: backend.Rights(narrow(q.GetRights())), FD: -1,
	}
	memory.GPU = gpuIn(q.GetGpu(), q.GetSize())
	switch err := memory.Check(); {
	case err != nil:
		return memory, err
	case memory.GPU != nil && len(memory.GPU.Handle) == 0:
		return memory, backend.Errorf(backend.BadRequest, "the range of GPU memory has no handle")
	case memory.GPU != nil:
		return memory, nil
	case q.GetHasFd():
		memory.FD, memory.FDOffset = int(m.file.Fd()), q.GetFdOffset()
	}
	info, err := m.file.Stat()
	if err != nil {
		return memory, err
	}
	offset, size := q.GetFdOffset(), q.GetSize()
	inFile := offset & int64(os.Getpagesize()-1) // where in its first page the region starts
	switch {
	case size == 0 || size > 1<<62 || offset < 0 || offset > 1<<62:
		return memory, backend.Errorf(backend.BadRequest, "%d bytes at offset %d of a file", size, offset)
	case info.Mode().IsRegular() && offset+int64(size) > info.Size(): // touching what is missing would end the process
		return memory, backend.Errorf(backend.BadRequest, "%d bytes at offset %d of a file of %d", size, offset, info.Size())
	}
	m.bytes, err = unix.Mmap(int(m.file.Fd()), offset-inFile, int(inFile)+int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return memory, os.NewSyscallError("mmap", err)
	}
	memory.Bytes = m.bytes[inFile:]
	return memory, nil
}

// unmap forgets a region, once.
func (s *Server) unmap(id uint64, m *mapping) {
	s.mu.Lock()
	mine := s.regions[id] == m
	if mine {
		delete(s.regions, id)
	}
	s.mu.Unlock()
	if mine {
		_ = m.free() // the region is gone either way
	}
}

func (s *Server) deregister(ctx context.Context, b backend.Backend, id uint64) error {
	s.mu.Lock()
	m := s.regions[id]
	s.mu.Unlock()
	if m == nil {
		return nil
	}
	select {
	case <-m.ready:
	case <-ctx.Done():
		return &backend.Error{Code: backend.Cancelled, Op: "deregister", Region: backend.RegionID(id), Err: ctx.Err()}
	}
	if !m.registered {
		return nil
	}
	if err := b.Deregister(ctx, backend.RegionID(id)); err != nil {
		return err
	}
	s.unmap(id, m)
	return nil
}
