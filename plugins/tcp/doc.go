// Package tcp is the backend that moves bytes over plain TCP: the path that works everywhere.
//
// # What happens here
//
// A target listens. An initiator connects to it once, with a few persistent connections that together are one
// endpoint, and sends each transfer, whole, as one frame on one of them: a header, a table of remote ranges, and
// for a Write the payload, gathered from the local region by writev. The target checks every range, stores
// the payload straight into its region by readv, and acknowledges the transfer once. A Read is the mirror image.
// Transfers are pipelined: a connection does not wait for one answer before it sends the next request. Answers
// come in the order of the requests.
//
//	Post ──► lane.queued ──► writer goroutine ──► socket ──► served.serve: check, store or load, answer
//	  └────── idle and small: one try on the caller's own goroutine ──┘                        │
//	Sink.Complete ◄── reader goroutine ◄──────────────────── socket ◄──────────────────────────┘
//
// PostWait receives the reply to a small transfer that is alone on its connection, without TLS, on the goroutine of its
// caller: handing it from one goroutine to another takes as long as the network does over loopback. So the right to
// receive changes hands. The reader goroutine lays it down once it sees that posters wait. It takes it back for any
// other transfer, from a poster whose reply does not come soon, and when nobody has used it for some milliseconds: the
// end of the connection, or a wish for a flush, is to be noticed then, too.
//
// The target serves a connection with one goroutine, which does not read while it sends the payload of a Read.
// That cannot deadlock, because the initiator's reader never waits for the initiator's writer: it always drains.
//
// An endpoint is used once. When one of its connections fails, or a Write that has begun is cancelled, all its
// connections are aborted, every goroutine leaves the memory, and only then what was in flight completes.
//
// Cancelling anything else leaves the endpoint alone. A transfer that still waits for its lane is taken out of the
// queue. A Read that has begun completes as soon as the reader has let go of its memory; the rest of its reply is
// received and thrown away, and until then it keeps its place in the window. The target may still read its own
// memory for that rest; what it reads there goes nowhere.
//
// # Fence
//
// Fence is an exchange, too, so that it does not cost the peer its endpoint: on each connection, the target asks for
// a flush, and the initiator sends it behind everything that was posted by then. When the target meets the flush, it
// has carried out all of that. In a process of its own the initiator first waits for the posts that are still on their
// way from its host. A connection whose flush does not come within a second is aborted, which is as quiet.
// Grants, and endpoints that are still being set up, have carried nothing, and stay.
//
// # Handshake
//
// The offer names the two ends and carries a nonce. The answer carries the target's addresses and a grant: an
// id and a fresh secret of 32 bytes, good for the connections of this one endpoint and for a short time. Each
// connection, under TLS 1.3 with certificates on both sides where the cluster has credentials, begins with
//
//	hello    → magic[8] target incarnation u64, grant id [16], connection u16, nonce [32]
//	challenge← status u8, nonce [32], the target's proof [32]
//	proof    → the initiator's proof [32]
//	verdict  ← status u8
//
// A proof is HMAC-SHA256 under the secret of: the role that proves, both node names and incarnations, the offer's
// nonce, the grant id, the connection's index, both nonces, and, under TLS, keying material exported from the
// session. A status is zero or a backend.Code. Every message has a fixed size, both ends have a deadline, and
// nothing else is read before the proof. Without TLS the bytes that follow are neither encrypted nor
// authenticated, which is why a listener that other hosts can reach needs credentials.
//
// # Wire format
//
// All numbers are little-endian. A request, from the initiator:
//
//	 0  u32  magic "UMRQ"
//	 4  u8   operation: 1 write, 2 read, 4 flush
//	 5  [3]  zero
//	 8  u64  request id, chosen by the initiator, returned in the reply; of a flush, the id that it was asked for by
//	16  u64  region id
//	24  u32  segments n, 1 to 16384
//	28  u32  zero
//	32  u64  total bytes, at most 1 GiB
//	40  n × (u64 remote offset, u64 length)
//	    total bytes of payload, in the order of the table, for a write
//
// A flush has zeros from byte 16 on, nothing after its header, and no reply.
//
// A reply, from the target:
//
//	 0  u32  magic "UMRP"
//	 4  u8   status: zero, the backend.Code of a refusal, or 255 for the wish for a flush, which answers no request
//	 5  [3]  zero
//	 8  u64  id of the request, or of the flush
//	16  u64  bytes that follow: the payload of a read, or the text of a refusal, at most 512 bytes
//
// A request that is well formed and not allowed (an unknown region, a range outside it, missing rights) is
// refused, and the connection lives on. One that is not well formed ends the connection, in both directions.
package tcp
