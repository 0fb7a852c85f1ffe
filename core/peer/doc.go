// Package peer is the serving side of a node: the memory that it lends to the pool, and who may use which part of
// it for how long.
//
// A client that puts allocates a slot for each key, writes the bytes into the slot's runs by itself, and commits.
// A client that gets resolves keys to runs under a lease, reads the bytes by itself, and releases the lease. The
// node never sees the bytes: it keeps the books. That decides what the parts do:
//
//   - Store is the books: pages, slots, leases, eviction. A page is used again only when nobody can still touch it.
//     Who may still be writing to it is fenced first; who is reading holds a lease, and stops before it runs out.
//   - Node is the Service of one process: it checks what clients ask, keeps the directory in agreement with the
//     store, and takes back what clients leave behind.
//   - Register offers a Service over gRPC, and Client reaches one.
//
// # Agreement with the directory
//
// The store is right, and the directory is told. A commit is published before it is answered, so that a key put is
// visible when the put returns. An eviction is withdrawn later, in batches: in between, the directory names a node
// that answers Missing.
//
// Publications and withdrawals may pass each other on the way, and those whose caller has given up may arrive late.
// Each carries a number that was drawn together with what it says, so that the directory knows the younger: an old
// withdrawal does not take away a new entry. An old publication would enter a key again that has been withdrawn:
// once the node does not know what became of a publication, its withdrawals have the directory refuse that one and
// those before it, and of them those that are still under way are made again.
//
// What the directory did not hear, because it was away, is told when it is back; when it has forgotten everything,
// everything is told again. What it lists in error is withdrawn when somebody comes for it.
package peer
