// Package shm carries bytes between processes of one host by copying them: the initiator maps the target's region
// into its own address space and moves the bytes with its own processor. The target does nothing while bytes move.
//
// # The two ends
//
// Every opened backend is an instance. As target it lends its regions; those it lends to are its guests. As
// initiator it has endpoints, each with a reach: the way to the target.
//
//	same process     localReach    the target's instance, found in a table of this process; it reads Memory.Bytes
//	other process    socketReach   a Unix socket, over which the target passes descriptors of its memory
//
// Everything else is the same for both: an endpoint opens a region through its reach the first time a session
// names it, sessions post transfers, and the copier moves them.
//
// # Trust
//
// Offer and answer travel over the hosts' control plane. The answer holds a secret that is good for one
// connection of one peer. The socket lies in a directory that only this user can enter, both ends check with
// SO_PEERCRED that the other is the same user, and each proves to the other that it knows the secret. A region is
// handed out only against its key, and with the least rights: without RemoteWrite as a read-only descriptor. That
// guards against mistakes; nothing guards against a malicious process of the same user, which could just as well
// attach a debugger.
//
// The initiator maps only memory that cannot shrink under it (a memfd sealed with F_SEAL_SHRINK), for otherwise
// the target could make it die of SIGBUS.
//
// # Quiet
//
// The target takes its memory back (Fence, Deregister, Close) by shutting down its sending side of the socket.
// The initiator reads the end of the stream, fails the endpoint, waits until its copies have stopped, unmaps, and
// closes the socket; the target reads the end of the stream in turn, and knows. The kernel gives the same sign for
// an initiator that dies, after its last instruction. An initiator that is merely stopped gives no sign, and the
// target reports that quiet is not certain.
package shm
