package main

import (
	"bytes"
	"context"
	"errors"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// memory is where values of a command lie: memory of the host, or of a GPU, which the processor cannot address.
type memory struct {
	size    uint64
	bytes   []byte           // of the host; nil for a GPU's
	buffer  *core.Buffer     // nil where it is not registered
	device  *gpuDevice       // nil for the host
	at      backend.GPURange // of a GPU
	closers []func(context.Context) error

	piece []byte // what store and load go through
}

// openMemory allocates memory on a device, or for none in the host, and registers it with the client.
func openMemory(ctx context.Context, client *core.PoolClient, device *gpuDevice, size uint64) (*memory, error) {
	if device == nil {
		buffer, err := client.Alloc(ctx, size)
		if err != nil {
			return nil, err
		}
		return &memory{size: size, bytes: buffer.Bytes()[:size], buffer: buffer, closers: []func(context.Context) error{buffer.Close}}, nil
	}
	at, free, err := device.alloc(size)
	if err != nil {
		return nil, err
	}
	buffer, err := client.RegisterGPU(ctx, at)
	if err != nil {
		return nil, errors.Join(needsGPUBackend(err), free())
	}
	return &memory{size: size, buffer: buffer, device: device, at: at, closers: []func(context.Context) error{
		buffer.Close, func(context.Context) error { return free() },
	}}, nil
}

// openUnregistered allocates memory of the host that no client knows.
func openUnregistered(ctx context.Context, size uint64) (*memory, error) {
	arena, err := region.NewArena("bench", size, region.ArenaOptions{Context: ctx})
	if err != nil {
		return nil, err
	}
	return &memory{size: size, bytes: arena.Bytes()[:size], closers: []func(context.Context) error{
		func(context.Context) error { return arena.Close() },
	}}, nil
}

// Close frees the memory. What is still registered then stays allocated.
func (m *memory) Close(ctx context.Context) error {
	for _, end := range m.closers {
		if err := end(ctx); err != nil {
			return err
		}
	}
	return nil
}

// lay gives an item length bytes of the memory for its value.
func (m *memory) lay(item *core.Item, offset, length uint64) {
	if m.bytes != nil {
		item.Value = m.bytes[offset : offset+length : offset+length]
	} else {
		item.At = m.buffer.At(offset, length)
	}
}

// store writes to the memory, and load reads from it.
func (m *memory) store(offset uint64, from []byte) error {
	if m.bytes != nil {
		copy(m.bytes[offset:], from)
		return nil
	}
	return m.device.Store(m.device.number, m.at.Address+offset, from)
}

func (m *memory) load(to []byte, offset uint64) error {
	if m.bytes != nil {
		copy(to, m.bytes[offset:])
		return nil
	}
	return m.device.Load(m.device.number, to, m.at.Address+offset)
}

// pieceSize bounds what is held of a GPU's memory in the host's.
const pieceSize = 4 << 20

// pieces calls f for one piece of the memory after the other, with a slice that f may use for what lies there.
func (m *memory) pieces(f func(offset uint64, piece []byte) error) error {
	if m.bytes != nil {
		return f(0, m.bytes)
	}
	if m.piece == nil {
		m.piece = make([]byte, min(m.size, pieceSize))
	}
	for offset := uint64(0); offset < m.size; offset += pieceSize {
		if err := f(offset, m.piece[:min(m.size-offset, pieceSize)]); err != nil {
			return err
		}
	}
	return nil
}

// fill fills the memory by a pattern; see fillPattern.
func (m *memory) fill(seed uint64) error {
	return m.rewrite(func(offset uint64, piece []byte) { fillPattern(piece, seed+offset) })
}

// clear fills the memory with zeros.
func (m *memory) clear() error {
	return m.rewrite(func(_ uint64, piece []byte) { clear(piece) })
}

func (m *memory) rewrite(f func(offset uint64, piece []byte)) error {
	return m.pieces(func(offset uint64, piece []byte) error {
		f(offset, piece)
		if m.bytes != nil {
			return nil
		}
		return m.store(offset, piece)
	})
}

// errDiffers says that two memories do not hold the same.
var errDiffers = errors.New("bytes came back that were not put")

// compare returns errDiffers unless both hold the same bytes. They are of one kind, and of one size.
func (m *memory) compare(other *memory) error {
	if m.bytes != nil {
		if !bytes.Equal(m.bytes, other.bytes) {
			return errDiffers
		}
		return nil
	}
	theirs := make([]byte, min(m.size, pieceSize))
	return m.pieces(func(offset uint64, piece []byte) error {
		theirs := theirs[:len(piece)]
		if err := errors.Join(m.load(piece, offset), other.load(theirs, offset)); err != nil {
			return err
		}
		if !bytes.Equal(piece, theirs) {
			return errDiffers
		}
		return nil
	})
}
