// Package shm is the data path between a host and a plugin that is a process of its own: queues in shared memory
// for what is posted and what is completed, and a socket that passes file descriptors.
//
// The bytes of a transfer never come here. Regions are memory that both processes have mapped; what travels is who
// moves what: a Post or a Cancel from the host to the plugin, a Completion back. Package rpc builds the contract of
// package backend from this and from gRPC, which carries everything that is rare.
//
//   - Queue carries records one way: from many goroutines of one process to one goroutine of another. Sending is a
//     copy and one atomic store. A system call is made only to wake a receiver that sleeps.
//   - Post, Cancel and Completion are the records.
//   - Passage carries descriptors: those of the queues themselves, and those of the regions.
//
// docs/plugin-protocol.md describes all three byte by byte, for plugins that are not written in Go.
//
// # Trust
//
// The other end may be defective. Whatever it writes into shared memory, sends or leaves out, this end does not
// panic, does not touch memory outside the queue, and does not loop: it returns ErrCorrupt, and goes on doing so.
// Positions are therefore kept privately by the end that moves them, the other end's are checked each time they are
// read, and a record is copied out of shared memory before it is looked at. The other end runs under the same user,
// who could do worse than to write rubbish: this guards against defects, not against an attacker.
package shm
