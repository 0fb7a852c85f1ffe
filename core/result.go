package core

import (
	"fmt"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Item is one value of a batch. A put reads its memory; a get fills that from its start and needs it as long as the value
// or longer. The memory is Value, or At: one of the two. It belongs to the client until the call has returned.
//
// A Value that lies wholly in one registered region moves straight from or to where it is. Any other is copied
// through the client's staging memory, or refused where the options say so.
//
// At names a range of a Buffer, of any kind of memory. It is the only way to name a GPU's, which has no bytes that the
// processor could address: the client neither makes nor compares checksums of values that lie there. What makes such a
// get right is that the node holds the value under a lease until it has been read, and says so.
type Item struct {
	Key   string
	Value []byte
	At    Range
}

// Range is a piece of a Buffer: see Buffer.At. The zero value is none.
type Range struct {
	buffer         *Buffer
	offset, length uint64 // bytes
}

// size returns how many bytes of memory the item names.
func (i *Item) size() uint64 {
	if i.At.buffer != nil {
		return i.At.length
	}
	return uint64(len(i.Value))
}

// addressable tells whether the processor can address the item's memory.
func (i *Item) addressable() bool { return i.At.buffer == nil || i.At.buffer.region.GPU == nil }

// bytes returns the item's memory, which is addressable, and whose range has been checked.
func (i *Item) bytes() []byte {
	if b := i.At.buffer; b != nil {
		return b.region.Bytes[i.At.offset:][:i.At.length]
	}
	return i.Value
}

// extent returns the addresses of the first byte of the item's memory and of the byte after its last.
func (i *Item) extent() (start, end uintptr) {
	if b := i.At.buffer; b != nil {
		start, _ = b.region.Extent()
		start += uintptr(i.At.offset)
		return start, start + uintptr(i.At.length)
	}
	return extent(i.Value)
}

// check says what is wrong with what the item names as its memory.
func (i *Item) check(e *Engine) error {
	b := i.At.buffer
	switch {
	case b == nil:
		return nil
	case i.Value != nil:
		return backend.Errorf(backend.BadRequest, "the item has Value and At: set one of them")
	case b.client.engine != e:
		return backend.Errorf(backend.BadRequest, "the item's range is of a buffer that another engine has registered")
	}
	if size := b.Size(); i.At.length > size || i.At.offset > size-i.At.length {
		return backend.Errorf(backend.BadRequest, "range [%d, +%d) is not in the buffer of %d bytes", i.At.offset, i.At.length, size)
	}
	return nil
}

// Status is what became of one key.
type Status uint8

// The statuses.
const (
	Failed  Status = iota // nothing was stored or read; Err says why
	Stored                // put: the value is in the pool, and every client can see it
	Exists                // put: the pool had the key, and keeps the value it has; exists: it is there
	Found                 // get: the value has been read
	Missing               // get, exists, remove: the pool does not hold the key
	Removed               // remove: the key was there, and is gone
	Busy                  // no room in a queue or in the staging memory; the same call may succeed later
	NoSpace               // put: no node has room, even after evicting all that may be evicted
	InDoubt               // put: the node did not confirm; the value may or may not become visible
)

var statusNames = [...]string{
	Failed: "failed", Stored: "stored", Exists: "exists", Found: "found", Missing: "missing", Removed: "removed",
	Busy: "busy", NoSpace: "no space", InDoubt: "in doubt",
}

// String returns the status in words.
func (s Status) String() string {
	if int(s) < len(statusNames) {
		return statusNames[s]
	}
	return fmt.Sprintf("status-%d", uint8(s))
}

// MarshalText renders the status for JSON, with underscores for spaces.
func (s Status) MarshalText() ([]byte, error) {
	text := []byte(s.String())
	for i, c := range text {
		if c == ' ' {
			text[i] = '_'
		}
	}
	return text, nil
}

// Path says which way a value went.
type Path struct {
	Node     string // the node that holds the value
	Backend  string // the backend that moved it; of several, the one that was tried last
	Attempts int    // transfers that it took
	Staged   bool   // copied through the staging memory
}

// Result is what became of one key.
type Result struct {
	Status   Status
	Err      error  // not nil for Failed, Busy, NoSpace and InDoubt; carries a backend.Code
	Size     uint64 // bytes of the value, where it is known
	Verified bool   // get: the checksum of the bytes was compared with the writer's; never where these lie in a GPU's memory
	Path     Path
}

// OK reports whether the call did what it was asked to: stored, or found, or there already, or removed.
func (r *Result) OK() bool {
	switch r.Status {
	case Stored, Exists, Found, Removed:
		return true
	}
	return false
}

// fail sets the result to what the error stands for.
func (r *Result) fail(err error) {
	r.Status, r.Err = Failed, err
	if backend.CodeOf(err) == backend.Busy {
		r.Status = Busy
	}
}

// keyError says what went wrong with one key of a batch. The cause's code is its own.
type keyError struct {
	op, key string
	err     error
}

func (e *keyError) Error() string { return fmt.Sprintf("%s %q: %v", e.op, e.key, e.err) }
func (e *keyError) Unwrap() error { return e.err }
