// Package rdma is the backend that moves bytes by RDMA: over InfiniBand or RoCE, by one-sided writes and reads that the
// target's processor takes no part in.
//
// # What happens here
//
// A rail is one port of a device. Register pins a region once on every rail and returns a key with what opens it there.
// An initiator and a target connect by reliable connections: a few queue pairs for each pair of rails, which make one
// path. All paths to a peer are one endpoint.
//
//	Post ──► coalesce: segments → work requests ──► ledger: credits, parts ──► lane: one chain, one doorbell ──► device
//	Sink.Complete ◄── outcomes ◄── ledger: parts that are done ◄── poller ◄── completion queue ◄────────────────────┘
//
// Segments become the fewest work requests that the devices allow. They are dealt, in parts of which only the last
// work request is signaled, to the lanes, one for each queue pair. The ledger of a lane knows at any time which work
// requests the device may still be busy with, so that each segment's own fate is known when something breaks. A completed
// write is in place in the target's memory: reliable connections acknowledge it there. That is true of host memory, and
// this backend moves no other.
//
// The package has no cgo. It works against the narrow interface of package device, which package verbs implements over
// libibverbs, and package verbstest by simulation.
//
// # Setting up
//
// The initiator makes its queue pairs and offers them; the target makes its own, connects them, and answers: when the
// answer is on its way, the target is ready. The initiator connects its own and reads, over each of them, a page of the
// target's memory that is full of random bytes, which the answer holds once. Right bytes prove that the queue pair leads
// to the process that answered, that both directions work, and that full packets come through. A path that does not
// pass is left out where another one does.
//
//	offer  → incarnations; for each rail: link, GID, LID, MTU, reads outstanding, PSN, queue pairs
//	answer → incarnation; for each pair of rails: the same of the target, and where the proof stands, its key, its bytes
//
// The queue pairs of an endpoint serve its own transfers only. When two processes connect to each other at the same
// time they make two endpoints, each with its own queue pairs at both ends: there is nothing to resolve.
//
// Rails are paired by their index, since where networks are apart hosts number their ports alike, and what is left over
// by what fits: both ends on InfiniBand, or both on Ethernet with the same version of RoCE and the same family of
// addresses.
//
// What is offered and answered is untrusted: it is parsed with bounds and carries a checksum, so that damage ends in a
// refusal and not in a queue pair that leads nowhere. Who may connect at all is for the hosts to decide, whose
// authenticated control plane carries these bytes. RDMA itself authenticates nobody: who knows a queue pair's number,
// its packet sequence and a region's key, and can put packets on the network, can reach that region.
//
// # How things end
//
// An endpoint is used once. When one of its queue pairs fails, it fails: all queue pairs go to the state Error, the
// device answers what is outstanding, the queue pairs are destroyed, and only then the transfers complete. Fence, at
// the target, destroys the queue pairs that serve a peer. After that nothing of it can land.
//
// An end that was quiet for the time of the option probe writes zero bytes to the other one, at both ends. This is how
// the end of a peer is noticed, and how a target gets rid of connections whose initiator has gone.
//
// Events that devices report of themselves are heeded, since they may come instead of completions. When a device fails,
// everything on its rail fails at once, and the device is opened again, for as long as it takes, as a new generation of
// the rail. Keys that peers have do not open that one; answers therefore carry the keys of the new generation. When a
// port goes down, the endpoints over it fail.
//
// A breaker for each rail and node keeps this end from trying ways again and again that do not work.
package rdma
