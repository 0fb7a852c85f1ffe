// Package verbs reaches the RDMA devices of this machine through libibverbs. It is the one package of the project
// with cgo, and it implements package device and nothing else.
//
// # What happens here
//
// The library is loaded with dlopen when devices are first asked for, so that one binary runs with and without it;
// its header is needed to build only. What cannot be had is told as *device.Missing. Built without cgo, the package
// says just that.
//
//	QP.Post ──► umbp_post: WRs → struct ibv_send_wr, one ibv_post_send ──► device
//	CQ.Poll ◄── umbp_poll: at most 64 struct ibv_wc ◄──────────────────── device
//	CQ.Wait, Device.NextEvent ◄── Go's network poller ◄── completion channel, asynchronous events
//
// A post is one call into C, however long the chain, and so is a poll. C never blocks and never spins: the file
// descriptors of a completion channel and of the asynchronous events do not block, and Go's network poller waits for
// them.
//
// Work requests, SGEs and completions lie in C memory and are laid out as C has them; the compiler holds the two layouts
// against each other. A queue pair has room, in C, for as many struct ibv_send_wr as its send queue takes. The device reads
// and writes registered memory only, which is never the Go heap's.
//
// # After Close
//
// A handle that was closed answers os.ErrClosed. A device, or a completion queue, that still has objects made of it
// refuses to be closed with EBUSY. What runs while its object is closed has ended when Close returns.
package verbs

// soname is the library as the loader looks for it.
const soname = "libibverbs.so.1"
