// Package rpc carries the contract of package backend across the edge of a process.
//
// A host, the umbp process, opens a Client; it is a backend.Backend like one that is linked in. A plugin, the process
// that runs the backend, registers a Server, which drives any backend.Backend. What is rare travels by gRPC, on the
// socket that go-plugin makes: opening, regions, connections, sessions. Transfers and completions travel by one of two
// paths, which Open settles:
//
//   - queues in shared memory (package shm): a Post is a copy and, when the plugin sleeps, one system call
//   - the Transfers stream, the plain path: for plugins that have no use for shared memory, and for a host without a
//     passage for descriptors
//
// The plugin comes at the bytes of a region by mapping the descriptor that is passed to it, or by asking the host for
// them in messages.
//
// This package starts and ends no process. Package serve makes a plugin's main out of a Server; the host's supervisor
// starts the process, watches Client.Broken, ends the process when it must, and tells the Client with Client.Lost.
//
// # Quiet
//
// A transfer ends in two ways only: the plugin completes it, or the plugin's process is certainly gone. As long as the
// process may be alive it may touch the memory of what it was given, whatever else is known to be wrong with it. So a
// Client that is broken refuses what is new, and keeps what is in flight in flight until Lost is called.
//
// # Trust
//
// Neither end believes the other. The host checks that each completion belongs to a transfer in flight, and that the
// plugin's numbers make sense; what does not make sense breaks the Client. The plugin checks what the host sends before
// the backend sees it, and the backend checks it again.
//
// # Where things are
//
// The host's half is in client.go (calls), endpoint.go (connections, sessions, flights), path.go (the two ways to the
// plugin) and memory.go. The plugin's half is in server.go (opening, descriptors), mapping.go (regions), dial.go
// (connections), served.go (sessions, transfers) and traffic.go (the two ways to the host).
//
// docs/plugin-protocol.md says the same for those who write a plugin in another language.
package rpc
