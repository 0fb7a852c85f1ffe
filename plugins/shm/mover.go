package shm

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/samehost"
)

// mover implements samehost.Mover: it maps what peers lend, and copies.
type mover struct {
	inline uint64 // bytes
	copier *copier
}

// region is a region of this process, or one that a peer lent.
type region struct {
	bytes  []byte // a peer's is mapped read-only where its rights lack RemoteWrite
	mapped []byte // of a peer's: what is to be unmapped
	// file is a descriptor of this process's memory with no more than the region's rights, for guests in other processes;
	// -1 where there is none. The region starts at byte offset of the file.
	file   int
	offset uint64
}

// Admit implements samehost.Mover.
func (*mover) Admit(_ context.Context, m backend.Memory) (samehost.Region, error) {
	switch {
	case len(m.Bytes) == 0:
		return nil, backend.Errorf(backend.BadRequest, "the region is empty")
	case m.FD >= 0 && (m.FDOffset < 0 || m.FDOffset > math.MaxInt64-int64(len(m.Bytes))):
		return nil, backend.Errorf(backend.BadRequest, "a file offset of %d is out of range", m.FDOffset)
	}
	r := &region{bytes: m.Bytes, file: -1}
	if m.Rights != 0 && m.FD >= 0 {
		file, err := samehost.Reopen(m.FD, m.Rights)
		if err != nil {
			return nil, &backend.Error{Code: backend.Internal, Text: "duplicate the descriptor of the memory", Err: err}
		}
		r.file, r.offset = file, uint64(m.FDOffset)
	}
	return r, nil
}

// Map implements samehost.Mover. The note is the offset of the region in its file.
func (*mover) Map(_ context.Context, l samehost.Lent) (samehost.Region, error) {
	if l.File < 0 || len(l.Note) != 8 {
		return nil, backend.Errorf(backend.Unsupported, "the peer lends the region without its file, or without its place there")
	}
	mapped, bytes, err := samehost.MapFile(l.File, binary.BigEndian.Uint64(l.Note), l.Size, l.Rights)
	if err != nil {
		return nil, &backend.Error{Code: backend.Unsupported, Text: err.Error()}
	}
	return &region{bytes: bytes, mapped: mapped, file: -1}, nil
}

// Join implements samehost.Mover.
func (m *mover) Join(_ context.Context, near, far samehost.Region, _ samehost.Target) (samehost.Path, error) {
	return &path{mover: m, near: near.(*region).bytes, far: far.(*region).bytes}, nil
}

// Serve implements samehost.Mover.
func (*mover) Serve(context.Context, *samehost.Guest, []byte) ([]byte, error) {
	return nil, backend.Errorf(backend.Unsupported, "there is nothing to ask")
}

// Close implements samehost.Mover.
func (m *mover) Close() error {
	m.copier.close()
	return nil
}

// Size implements samehost.Region.
func (r *region) Size() uint64 { return uint64(len(r.bytes)) }

// Lend implements samehost.Region.
func (r *region) Lend(backend.Rights) (samehost.Lent, error) {
	if r.file < 0 {
		return samehost.Lent{}, backend.Errorf(backend.Unsupported,
			"the region was registered without a file descriptor: only its own process can reach it")
	}
	note := binary.BigEndian.AppendUint64(nil, r.offset)
	return samehost.Lent{Size: r.Size(), File: r.file, Note: note}, nil
}

// Close implements samehost.Region.
func (r *region) Close() error {
	if r.mapped != nil {
		if err := unix.Munmap(r.mapped); err != nil {
			return fmt.Errorf("unmap the peer's region: %w", err)
		}
	}
	if r.file >= 0 {
		return unix.Close(r.file)
	}
	return nil
}
