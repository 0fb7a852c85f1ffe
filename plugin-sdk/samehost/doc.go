// Package samehost is what backends have in common that move bytes between processes of one host by mapping the
// target's memory into the initiator: everything but mapping and moving. A backend adds a Mover, and is a backend.
//
//	Mover.Admit, Map    how memory becomes reachable, here and in another process
//	Mover.Join          the way between two regions
//	Path.Start          moves a transfer; Transfer.Finish says how it ended
//
// # The two ends
//
// Every opened backend is an Instance. As target it lends its regions; those it lends to are its guests. As
// initiator it has endpoints, each with a reach: the way to the target.
//
//	same process     localReach    the target's Instance, found in a table of this process: its regions are used as they are
//	other process    socketReach   a Unix socket, over which the target passes descriptors of its memory, and notes
//
// Everything else is the same for both: an endpoint opens a region through its reach the first time a session
// names it, the mover joins it to the local one, and sessions post transfers to the path that comes of it. The target does
// nothing while bytes move. What the two movers have to tell each other goes by Target.Ask to Mover.Serve.
//
// # Trust
//
// Offer and answer travel over the hosts' control plane. The answer holds a secret that is good for one
// connection of one peer. The socket lies in a directory that only this user can enter, both ends check with
// SO_PEERCRED that the other is the same user, and each proves to the other that it knows the secret. A region is
// handed out only against its key, and with the least rights. That guards against mistakes; nothing guards against a
// malicious process of the same user, which could just as well attach a debugger.
//
// # Quiet
//
// The target takes its memory back (Fence, Deregister, Close) by shutting down its sending side of the socket.
// The initiator reads the end of the stream, fails the endpoint, waits until its transfers have ended, closes the paths
// and regions, says so, and closes the socket; the target reads that, and knows. The kernel closes the socket of an
// initiator that dies, after its last instruction. Where a device moves the bytes, that is too early: with
// Settings.UntilExit the target waits until the process is gone, by a pidfd that it takes when the guest connects. An
// initiator that is merely stopped gives no sign, and the target reports that quiet is not certain.
package samehost
