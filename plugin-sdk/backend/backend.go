package backend

import (
	"context"
	"strconv"
	"time"
)

// Peer identifies one UMBP process.
type Peer struct {
	// Node is the name of the process, unique in the cluster.
	Node string
	// Incarnation is drawn at each start of the process. It is never zero.
	Incarnation uint64
	// Host names the machine and its namespaces: two peers with the same, non-empty Host share a kernel, and
	// memory can be shared between them.
	Host string
}

// String renders the peer as node@incarnation, for logs and errors.
func (p Peer) String() string {
	return p.Node + "@" + strconv.FormatUint(p.Incarnation, 16)
}

// RegionID names a region within one incarnation of a process. Zero is no region. Ids are never used twice, so
// that a late message about a region that is gone cannot hit another one.
type RegionID uint64

// MemoryKind says what a region is made of.
type MemoryKind uint8

// The kinds of memory.
const (
	HostMemory MemoryKind = 1 // ordinary memory of the host
	GPUMemory  MemoryKind = 2 // memory of a GPU
)

// String returns the kind as it is written in configurations: "host" or "gpu".
func (k MemoryKind) String() string {
	switch k {
	case HostMemory:
		return "host"
	case GPUMemory:
		return "gpu"
	}
	return "memory-kind-" + strconv.Itoa(int(k))
}

// Rights is what peers may do with a region. The zero value keeps a region local: it can be the near end of a
// transfer, and no peer can reach it.
type Rights uint8

// The rights; a region may carry both.
const (
	RemoteRead  Rights = 1 << iota // peers may read the region
	RemoteWrite                    // peers may write the region
)

// Memory is one region of this process, as it is handed to Register.
type Memory struct {
	Region RegionID
	Kind   MemoryKind
	Rights Rights
	// Bytes is the memory itself. It is off the Go heap, it stays mapped until Deregister has returned, and its
	// length is the size of the region. Nil for memory that the processor cannot address.
	Bytes []byte
	// GPU says where a region of GPUMemory lies; nil for host memory. The memory stays allocated until Deregister has
	// returned.
	GPU *GPURange
	// FD is a file descriptor of the memory, or -1 when it has none; FDOffset is where in the file the region
	// starts. The descriptor belongs to the host; a backend that wants to keep it duplicates it.
	FD       int
	FDOffset int64
}

// Size returns the size of the region in bytes.
func (m *Memory) Size() uint64 {
	if m.GPU != nil {
		return m.GPU.Size
	}
	return uint64(len(m.Bytes))
}

// Place returns where the region lies, in the words of Link: the PCI address of its GPU, or nothing for host memory.
func (m *Memory) Place() string {
	if m.GPU != nil {
		return m.GPU.Device
	}
	return ""
}

// Check says what is wrong with where the region is said to lie, if that contradicts itself: a GPU's memory is described by
// GPU, and by nothing else, and no other kind is. The error is BadRequest.
func (m *Memory) Check() error {
	switch {
	case (m.Kind == GPUMemory) != (m.GPU != nil):
		return Errorf(BadRequest, "memory of kind %s: GPU says where a GPU's memory lies, and that of no other kind", m.Kind)
	case m.GPU == nil:
		return nil
	case m.Bytes != nil || m.FD >= 0:
		return Errorf(BadRequest, "memory of a GPU has neither bytes nor a file descriptor")
	}
	return m.GPU.Check()
}

// GPURange is a range of a GPU's memory: a region, or what is to become one. It lies within one allocation of the
// runtime's, which need not begin where the range does: what other processes are given is the allocation, so that the
// offset always goes with its handle.
type GPURange struct {
	// Runtime is the runtime that the memory was allocated with: "hip" or "cuda".
	Runtime string
	// Device is the PCI address of the GPU, as in 0000:c1:00.0, which means the same in every process of the host; the
	// numbers of the runtimes do not.
	Device string
	// Address is where the range begins in the address space of the process that allocated it. Zero in any other
	// process, which has to import Handle.
	Address uint64
	Size    uint64 // bytes of the range
	// Allocation is the size of the allocation in bytes, and Offset where in it the range begins.
	Allocation, Offset uint64
	// Handle is the runtime's interprocess handle of the allocation; empty where the memory cannot leave its process.
	Handle []byte
}

// The longest words of a GPURange and of a Link, in bytes.
const (
	MaxPlace  = 64  // of a place, and of the name of a runtime
	MaxHandle = 256 // of GPURange.Handle
)

// Check says what is wrong with a range, if it contradicts itself: an untrusted one needs no other check of its numbers.
// The error is BadRequest. Address may be zero.
func (g *GPURange) Check() error {
	switch {
	case g.Runtime == "" || !ValidPlace(g.Runtime):
		return Errorf(BadRequest, "a range of GPU memory names its runtime in 1 to %d printable characters, not by %.*q", MaxPlace, MaxPlace, g.Runtime)
	case g.Device == "" || !ValidPlace(g.Device):
		return Errorf(BadRequest, "a range of GPU memory names its GPU by a PCI address of 1 to %d printable characters, not by %.*q", MaxPlace, MaxPlace, g.Device)
	case len(g.Handle) > MaxHandle:
		return Errorf(BadRequest, "the handle of GPU memory has %d bytes, more than %d", len(g.Handle), MaxHandle)
	case g.Size == 0 || g.Size > g.Allocation || g.Offset > g.Allocation-g.Size:
		return Errorf(BadRequest, "%d bytes at offset %d do not lie within a GPU's allocation of %d", g.Size, g.Offset, g.Allocation)
	case g.Address+g.Size < g.Size:
		return Errorf(BadRequest, "%d bytes of GPU memory at address %#x run over the end of the address space", g.Size, g.Address)
	}
	return nil
}

// Remote is one region of a peer, as its descriptor described it.
type Remote struct {
	Peer   Peer
	Region RegionID
	Kind   MemoryKind
	Rights Rights
	Size   uint64 // bytes
	// Place is where the region lies, in the words of Link.
	Place string
	// Key is what Register returned at the peer, for this same backend.
	Key []byte
}

// Op is the direction of a transfer, as the initiator sees it.
type Op uint8

// The operations.
const (
	Write Op = 1 << iota // local region → remote region
	Read                 // remote region → local region
)

// String returns "write" or "read".
func (o Op) String() string {
	switch o {
	case Write:
		return "write"
	case Read:
		return "read"
	}
	return "op-" + strconv.Itoa(int(o))
}

// Segment is one contiguous piece of a transfer. Offsets are bytes from the start of the local and the remote
// region; Length is in bytes and is never zero.
type Segment struct {
	Local, Remote, Length uint64
}

// Transfer is one group of segments that share a session: the unit that a backend gets, and answers with one
// completion.
type Transfer struct {
	Op Op
	// Segments is sorted by Remote. The bytes that the operation writes (remote ranges of a Write, local ranges
	// of a Read) do not overlap. Within the limits of Capabilities. Never empty.
	Segments []Segment
	// Cookie is the host's name for the transfer. It is unique among those in flight on one session, and comes
	// back in the completion.
	Cookie uint64
}

// Outcome is what became of one segment.
type Outcome uint8

// The outcomes. The zero value promises least about the destination and most about the source of trouble: a
// backend that forgets to fill one in causes a repeated transfer, never a false Done.
const (
	NotSent Outcome = iota // nothing of it left; the destination is untouched
	Done                   // it is entirely in place, and nothing touches it any more
	Failed                 // refused or broken; the destination may hold a part of it, and nothing touches it any more
	InDoubt                // it may be in place, in part or whole, and the target may still be storing it until fenced
)

// String returns the outcome in words.
func (o Outcome) String() string {
	switch o {
	case NotSent:
		return "not sent"
	case Done:
		return "done"
	case Failed:
		return "failed"
	case InDoubt:
		return "in doubt"
	}
	return "outcome-" + strconv.Itoa(int(o))
}

// Completion answers one accepted Post.
type Completion struct {
	Cookie uint64
	// Err is nil when every segment is Done.
	Err error
	// Outcomes has one entry for each segment of the transfer, in the same order, when Err is not nil. When it is
	// shorter, the segments without an entry are InDoubt. Ignored when Err is nil.
	Outcomes []Outcome
}

// Sink receives completions.
type Sink interface {
	// Complete is called exactly once for each accepted Post, from any goroutine, possibly before Post has
	// returned and on the goroutine that called it. It does not block, and it may call Post on the same session:
	// a backend therefore holds no lock that Post or Cancel needs while it calls Complete.
	Complete(c Completion)
}

// Backend is one way to move bytes, opened in one process.
type Backend interface {
	// Info says what the backend is and what it can do. It does not change after Open.
	Info() Info

	// Register makes a region usable by this backend and returns the key that peers need to reach it (nil where
	// they need none, or where the region gives peers no rights). Registering may take long: it pins memory.
	// A region id that is registered already is refused with BadRequest.
	Register(ctx context.Context, m Memory) (key []byte, err error)

	// Deregister ends the use of a region. When it returns nil, no peer and no transfer can touch the memory any
	// more; transfers that still used the region have completed. An unknown region is not an error, so that
	// clean-up can be repeated.
	Deregister(ctx context.Context, id RegionID) error

	// Offer starts a connection to a peer, as initiator. It takes no I/O to the peer.
	Offer(ctx context.Context, peer Peer) (Handshake, error)

	// Answer accepts a connection that peer offered, as target, and returns what the initiator needs to finish
	// it. What is in offer is untrusted; one that was meant for another incarnation of this process is refused with
	// PeerGone, here or in Establish. When Answer returns, the target is ready to receive.
	Answer(ctx context.Context, peer Peer, offer []byte) (answer []byte, err error)

	// Fence returns nil when nothing that the peer (this incarnation of it) posted before the call can touch this
	// process's memory any more. It may break the peer's endpoints. An error means that quiet is not certain: the
	// host then keeps the pages out of use and fences again later.
	Fence(ctx context.Context, peer Peer) error

	// Close ends everything: endpoints fail, transfers complete, regions are forgotten, goroutines have ended
	// when it returns. Closing twice is not an error.
	Close() error
}

// Handshake is the initiator's half of a connection that is being set up. Exactly one of Establish and Abandon
// is called on it.
type Handshake interface {
	// Offer returns the bytes to hand to the target's Answer.
	Offer() []byte
	// Establish finishes the connection with what the target answered. What is in answer is untrusted. It
	// connects, proves both ends to each other, and returns within the context's deadline.
	Establish(ctx context.Context, answer []byte) (Endpoint, error)
	// Abandon gives the handshake up and frees what it held.
	Abandon()
}

// Endpoint is a connected peer.
type Endpoint interface {
	// Session binds the endpoint to a local and a remote region. A remote region of another incarnation than the
	// endpoint's peer is refused with PeerGone; one that lies outside what the backend can reach, with
	// Unsupported. Completions of the session go to sink.
	Session(ctx context.Context, local RegionID, remote Remote, sink Sink) (Session, error)
	// Done is closed when the endpoint has failed or was closed: Post refuses from then on.
	Done() <-chan struct{}
	// Close fails what is in flight, waits until it has completed, and disconnects. Closing twice is not an error.
	Close() error
}

// Session is an endpoint bound to one (local region, remote region).
type Session interface {
	// Post starts a transfer and returns at once. Nil means accepted: the sink will be called exactly once.
	// ErrBusy means that the endpoint has no room now: the host posts again after one of its completions, or
	// after Error.RetryAfter when none is outstanding. Any other error refuses the transfer for good, before any
	// byte has moved: a range outside a region, a limit exceeded, an operation not claimed, an endpoint that is
	// down.
	Post(t Transfer) error
	// Cancel asks that the transfer end soon, whatever it takes. The completion still comes, once, when it is
	// quiet; a transfer that finished in the meantime completes as it did. An unknown cookie is ignored.
	// Cancelling one transfer may break the endpoint and with it others: those end with PathDown.
	Cancel(cookie uint64)
	// Close cancels what is in flight on this session, waits until it has completed, and frees the session.
	// The sink is not called after Close has returned. Closing twice is not an error.
	Close() error
}

// PostWaiter is implemented by sessions that complete a transfer sooner when the goroutine that posts it lends a hand.
// It is optional: a host that knows only Post, or a wrapper that hides this, loses nothing but time.
type PostWaiter interface {
	// PostWait is Post, for a caller that has nothing else to do until the transfer completes. It may use the calling
	// goroutine to carry out the transfer, but no longer than MaxPostWait. What it returns says what it says of Post:
	// the completion goes to the sink, before or after PostWait returns. It must not be called from within
	// Sink.Complete.
	PostWait(t Transfer) error
}

// MaxPostWait is how long PostWait may keep its caller, give or take what the system adds to every timer.
const MaxPostWait = 10 * time.Millisecond

// Factory opens a backend.
type Factory struct {
	// Name is how configurations, results and metrics call the backend: lower-case letters, digits and dashes.
	Name string
	// Info is what the backend's Info says when it is opened with default options, for tools that describe a backend
	// without opening it. Nil where only opening tells.
	Info *Info
	// Options is the schema of Config.Options.
	Options []Option
	// Open starts the backend. The context bounds starting only.
	Open func(ctx context.Context, cfg Config) (Backend, error)
	// Examine looks at what the backend needs on this machine, such as libraries, devices and limits, and says what it
	// finds, for an operator who wants to know why the backend does not open, or is slow. The options have been checked.
	// It needs no open backend, disturbs none, and keeps nothing open. Nil where there is nothing to look at.
	Examine func(ctx context.Context, options Values) []Finding
}

// Config is what a backend is opened with.
type Config struct {
	// Self is this process. The backend proves itself to peers under this name.
	Self Peer
	// Options holds the values of the backend's options, all of them, checked against its schema.
	Options Values
	// Credentials are set when the cluster's connections are authenticated by certificates.
	Credentials *Credentials
	// Insecure allows listening beyond the host without credentials.
	Insecure bool
	// Log receives what an operator should know. Nothing is logged for a transfer that succeeds. May be nil.
	Log Logger
	// Posted returns nil when everything that the host has posted before the call has been handed to Session.Post. It is
	// nil where that is always so. It is set in a process of its own, where what the host has posted may still be on its
	// way. Only a Fence that leaves the peer's endpoints intact needs it, at the peer: before the peer says that all it
	// had posted is through.
	Posted func(ctx context.Context) error
}

// Logger is the part of hclog.Logger and of slog.Logger that backends use: a message, then pairs of key and
// value.
type Logger interface {
	Debug(msg string, args ...any)
	Info(msg string, args ...any)
	Warn(msg string, args ...any)
	Error(msg string, args ...any)
}

// DefaultRetryAfter is how long a host waits after ErrBusy when it has nothing outstanding and the error names
// no time.
const DefaultRetryAfter = time.Millisecond
