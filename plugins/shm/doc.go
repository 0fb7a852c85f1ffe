// Package shm carries bytes between processes of one host by copying them: the initiator maps the target's region
// into its own address space and moves the bytes with its own processor. The target does nothing while bytes move.
//
// Package samehost brings the two ends together: it lends regions, takes them back, and keeps account of transfers. What
// is here is its Mover: mapping, and a pool of goroutines that copy.
//
// # Trust and quiet
//
// A region is lent as a descriptor with the least rights: without RemoteWrite as a read-only one. The initiator maps only
// memory that cannot shrink under it (a memfd sealed with F_SEAL_SHRINK), for otherwise the target could make it die of
// SIGBUS. A processor that copies stops with its process: the end of the socket, which comes later, is the end of the
// copies.
package shm
