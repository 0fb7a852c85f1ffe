// Package region holds the memory that values lie in, and says who owns which part of it.
//
// From the outside in:
//
//   - An Arena is memory outside the Go heap that other processes can map: what a node lends to the pool, and
//     what a client stages values in.
//   - A Region is one range of memory, in an arena or brought by the caller, that transfers may start or end in. It
//     is memory of the host, or of a GPU, which no code here touches.
//     The Table of a process names its regions, and finds the one that a caller's slice lies in. A Descriptor is
//     what peers know of a region.
//   - Pages divides a pool region into runs of pages, as few for each value as the free space allows.
//   - Staging lends a piece of a region to a value whose own memory lies in none.
//
// NewIncarnation and HostID make up the identity that the descriptors of a process carry.
//
// The package moves no bytes and speaks to no peer.
package region
