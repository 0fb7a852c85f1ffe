package samehost

import (
	"context"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// MaxNote bounds a note, a question and an answer, in bytes.
const MaxNote = 1024

// Mover is what a backend adds to an Instance: how memory that another process lends is reached, and what moves the
// bytes. Its methods may be called at the same time.
//
// An error that is, or wraps, a *backend.Error needs a Code and a Text: what else it lacks, such as the peer and the
// region, the instance fills in. Any other error counts as Internal, and that of a context as Cancelled.
type Mover interface {
	// Admit takes in a region of this process that is being registered, or says what is wrong with it. The instance has
	// checked the id, the rights, that the kind is one of those claimed, and what Memory.Check does; the rest the mover
	// checks.
	Admit(ctx context.Context, m backend.Memory) (Region, error)
	// Map makes a region usable that a target in another process lends. What is in l is untrusted. The context ends with
	// the connection.
	Map(ctx context.Context, l Lent) (Region, error)
	// Join makes the way between two regions, for one session. Near came from Admit; far came from Map or, where the
	// target is in this process, from Admit of the target's mover. The target may be asked, and its regions opened. An
	// error of code Unsupported sends the host to another backend. The context ends when nobody needs the session any
	// more, and when Join has returned.
	Join(ctx context.Context, near, far Region, target Target) (Path, error)
	// Serve answers, at the target, what the peer's mover asks by Target.Ask. The question is untrusted, and good until
	// Serve returns. One guest has one question at a time, but as many as it likes one after another: what the mover keeps
	// for a guest, it bounds. The context ends with the guest's connection, and after ten seconds.
	Serve(ctx context.Context, g *Guest, question []byte) (answer []byte, err error)
	// Close is called once, last: regions and paths are closed, and no transfer is under way.
	Close() error
}

// Region is a region as a mover knows it: one of this process's, or one that was mapped.
type Region interface {
	// Size is in bytes. It does not change.
	Size() uint64
	// Lend returns what guests in other processes need to map the region, with no more than the rights given. It is
	// called once for a region of this process that has rights, and never for a mapped one. The file stays the region's.
	// An error refuses the region to guests of other processes, and to them alone.
	Lend(rights backend.Rights) (Lent, error)
	// Close is called once and gives back what the region holds. Nothing uses it any more, here or at a guest; only where
	// Instance.Close has given up waiting for guests, as its error says, they may.
	Close() error
}

// Lent is a region as it travels to a guest in another process.
type Lent struct {
	Rights backend.Rights // set by the instance
	Size   uint64         // bytes
	// File is a descriptor of the memory, or -1: zero is a descriptor, too. In Map it belongs to the instance, which
	// closes it when Map has returned.
	File int
	// Note is what else Map needs, of at most MaxNote bytes.
	Note []byte
}

// Target is the other end of a connection, as the initiator's mover sees it: one comparable value for each connection.
// Its methods may be called at any time, also when the connection has ended; Ask and Open are refused then.
type Target interface {
	// Ask calls Serve of the target's mover, in this process or in another one. Question and answer have at most MaxNote
	// bytes. Who asks while another question of the connection has no answer yet waits for its turn.
	Ask(ctx context.Context, question []byte) (answer []byte, err error)
	// Open returns a region of the target, against its key, like the one that a session is made for. It stays open as
	// long as the connection does, whose end waits for Join and for paths, and for nothing else that might use it.
	Open(ctx context.Context, id backend.RegionID, key []byte) (Region, error)
	// OnEnd has f called once, on some goroutine, when the connection has ended: its paths and regions are closed. The
	// endpoint counts as closed when f has returned, so that f must not wait for that.
	OnEnd(f func())
	// Peer is who the target is.
	Peer() backend.Peer
}

// Path moves the transfers of one session. Its methods may be called at the same time, but for Close.
type Path interface {
	// Start moves the bytes of a transfer that was accepted. It never blocks. Transfer.Finish is called once for each
	// Start, possibly before Start has returned.
	Start(t *Transfer)
	// Stop asks that a transfer end soon, for which Transfer.Stopped is true from now on. It is called with a lock of the
	// instance held, which is why it must not call Finish itself, nor wait; it may be called more than once, before or
	// during Start, when other fields of the transfer may not be read yet, and during Finish, but never after.
	Stop(t *Transfer)
	// Close is called once, when the session is closed or its endpoint has failed, and no transfer is left.
	Close()
}
