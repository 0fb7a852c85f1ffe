// Package core is UMBP's API for programs.
//
// An Engine is one process's share in moving bytes: its backends, its registered memory, its connections. A
// PoolClient stands on an engine and puts and gets values by key, in batches. A connector that needs no keys uses
// the engine directly: it registers memory, exchanges descriptors by whatever means it has, and opens a Session
// between a local and a remote region.
//
// A batch goes one way down and one way up. The client asks the directory where its keys are or should go, and
// the nodes for slots or for the places of values; package plan turns the pieces into grouped, sorted, merged
// transfers; package selector chooses a backend for each group; package dispatch posts the groups, sees to what
// fails, and reports by segment. Segments become results by key: the good are committed, the bad aborted.
//
// Memory is the host's or a GPU's. A program registers a range of a GPU's memory with PoolClient.RegisterGPU and names
// values in it by Item.At; a node's pool lies in one with NodeOptions.GPU. This package never touches such bytes: backends
// that claim them move them.
//
//	client, err := core.NewPoolClient(core.ClientOptions{Engine: engine, Directory: dir, Dial: dial})
//	buf, err := client.Alloc(ctx, 64<<20)        // registered memory: values in it move without a copy
//	results := client.BatchPut(ctx, []core.Item{{Key: "a", Value: buf.Bytes()[:1<<20]}})
package core
