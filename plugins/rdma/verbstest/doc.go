// Package verbstest simulates RDMA devices, for tests and for the timing of what a host does per work request.
//
// # What happens here
//
// A [Fabric] is a network within this process, and a [device.Library] of the devices on it. Queue pairs find each other
// by GID (or LID) and number, as they would over wires, across all devices of one fabric. Work requests are carried
// out behind the caller's back: in order within a queue pair, interleaved and in parallel between them. Bytes move by
// copy, outside every lock of the simulation, so that the race detector sees who else touches them meanwhile.
//
//	Post ──► send queue of the QP ──► a goroutine, while there is work: check, find the peer, copy ──► CQ ──► Poll
//	                └── the slot is free again once a completion at or behind it has been polled
//
// Two processes of one test are two users of one fabric. [Fabric.Host] gives each only devices of its own.
//
// # What is as in hardware
//
// The simulation is strict where real devices differ in what they let pass:
//
//   - A queue pair goes through its states in order, with arguments in range. It is heard by its peer only when both
//     name each other's number, GID and, to be understood, packet sequence number. Otherwise requests vanish, and end
//     as RetriesExceeded after [Config].Retry.
//   - A slot of the send queue is free only when a completion of it, or of one posted later, has been polled. A full
//     send queue takes what fits of a chain and refuses the rest with ENOMEM.
//   - Keys, ranges and rights of memory are checked at both ends, and that it belongs to the opened device of the queue
//     pair. Keys are not used twice, and a local key is never a remote key.
//   - A refusal by the target moves its queue pair to the state Error too, and is an event there.
//   - A queue pair that ends has every work request answered, in order. One whose bytes had landed may say Flushed.
//   - A completion queue has exactly the room that was asked for. When it overflows, it is lost, and its queue pairs.
//   - Remote memory is reached only by the rights of the queue pair as well: a zero-length write needs no key, but it
//     needs a target whose Init allowed RemoteWrite.
//
// What no device would survive, a use after Close, a second Close, two goroutines in Post, Poll or Wait, panics.
//
// # Faults
//
// [Fabric.Inject] scripts what goes wrong at the k-th call or work request. Pause and Step hold execution, so that a
// test can have work in flight for certain. Unplug, SetPort, SetGIDs, Break, LoseCQs and Fatal are what happens to devices
// by themselves; Plug and Repair end what Unplug and Fatal began.
package verbstest
