// Package backend is the contract between UMBP and the plugins that move its bytes.
//
// A backend knows one way to carry memory from one process to another: TCP, shared memory, RDMA, a GPU link.
// UMBP plans what has to move, chooses a backend for each group, and posts the group to it; the backend moves
// the bytes and says, segment by segment, what became of them. This package imports the standard library only,
// and it is all that a backend needs to import.
//
// # Words
//
// A region is one contiguous range of memory that a process has registered. A segment is one (local offset,
// remote offset, length). A transfer carries many segments between one local and one remote region. An endpoint
// is a connected peer. A session is an endpoint bound to one local and one remote region. An outcome is what
// became of a segment. An incarnation is a number that a process draws at start: a peer that restarts is a new
// incarnation, and what was known of the old one is void.
//
// # Lifecycle
//
// The same backend runs at both ends, and a process may be initiator and target at once. The initiator is
// the end that posts; the target only lends memory.
//
//	both ends    Factory.Open                            → Backend
//	both ends    Backend.Register(memory)                → key, which travels to peers in a descriptor
//	initiator    Backend.Offer(peer)                     → Handshake, with offer bytes
//	target       Backend.Answer(peer, offer)             → answer bytes          (the hosts carry the bytes)
//	initiator    Handshake.Establish(answer)             → Endpoint
//	initiator    Endpoint.Session(local, remote, sink)   → Session
//	initiator    Session.Post(transfer)                  → nil, or ErrBusy, or a refusal; or PostWait, where there is one
//	initiator    sink.Complete(completion)                 exactly once for each accepted Post
//	initiator    Session.Close, Endpoint.Close
//	target       Backend.Fence(peer)                       before pages that the peer may write are used again
//	both ends    Backend.Deregister(region), Backend.Close
//
// Offer, answer and establish are opaque bytes that the hosts carry over UMBP's control plane. A backend opens
// no channel of its own to set up a connection, with one exception: file descriptors, which bytes cannot carry,
// may be passed over a Unix socket on the same host after the peer's user has been checked.
//
// An endpoint is used once: after its first failure it stays failed, every transfer on it completes, and the
// host replaces it by a new one. Nothing is ever repaired in place.
//
// # Ownership
//
// Region memory belongs to the host. A backend may touch the bytes that a transfer names from the moment Post
// is called until it has completed the transfer, and never outside that time. Transfer.Segments belongs to the
// backend only while Post runs: the host may overwrite the slice as soon as Post returns, so a backend keeps
// what it needs. Completion.Outcomes belongs to the backend: the host copies it before Complete returns.
//
// # Places
//
// A region lies in the memory of the host, or in that of a GPU, which the processor cannot address: only the GPU's
// runtime may touch it, and Memory.GPU says where it is. What another process opens is the allocation that a region
// lies in, so the offset always goes with its handle. A backend that cannot move bytes between all places lists those
// between which it can in Capabilities.Links, and refuses a session between others with Unsupported.
//
// # Quiet
//
// Completion means quiet: after Complete, neither end of this transfer can touch the initiator's memory any more, and
// a Done segment is entirely in place. Cancelling does not shortcut that. Cancel asks; the backend stops
// posting, fences what is on its way (closes a connection, moves a queue pair to error and drains it), and then
// completes. The target may, for a moment, still be storing bytes of a segment that ended InDoubt; Fence is how
// the target's host waits until that is over.
//
// # Concurrency
//
// Every method of every interface here may be called from any goroutine at any time, including while another
// call of the same method runs. Post and Cancel never block: they take no lock that is held across I/O. From within
// Sink.Complete only Post and Cancel may be called: whatever waits for transfers to complete would wait for itself.
//
// # Errors
//
// Errors that cross this contract are, or wrap, *Error, whose Code says what to do about them. A host acts on
// codes, never on text. Busy means try again later and is never a failure. A Post that is refused, for whatever
// reason, leaves the endpoint as it was.
//
// # The smallest backend
//
// Package reference, beside this one, is a complete backend in a few hundred lines. It moves bytes between two ends
// in one process and makes every promise above. Package conformance tests a backend against these promises, and
// package fault injects faults into one.
package backend
