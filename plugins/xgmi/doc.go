// Package xgmi moves bytes between the GPUs of one host, over the links that they have (XGMI between AMD GPUs, NVLink
// between those of NVIDIA, or PCIe), and between GPUs and host memory. The initiator's GPU copies; the target does
// nothing while bytes move. The GPU's runtime, HIP or CUDA, is found when the backend opens, by package gpu.
//
// # The parts
//
// Connections, the regions lent over them, sessions and their end are package samehost's. What this package adds is a
// samehost.Mover, the engine:
//
//	engine      the devices of this process, the links between them, what is imported and pinned
//	region      host or GPU memory: registered here, or lent by another process and imported or mapped
//	path        near and far region of a session, and the driver that copies between them
//	driver      one goroutine for each device in use, on a thread that belongs to the device: it gives copies to streams,
//	            and looks for the events behind them
//	shape       (a package) the copies that a transfer takes
//	self-test   patterns over every pair of places before the first session of a connection uses it
//
// # Regions
//
// What a process gives to another one is the runtime's handle of a whole allocation. The region's offset in it always
// goes with the handle, and is checked against the allocation wherever the runtime tells its size. The device goes by its
// PCI address: processes count devices differently. A device whose memory is copied must be visible in this process, also
// where it is the far end.
//
// Runtimes differ in whether a handle may be imported twice, and so imports are counted for the whole process. One that
// is used by nobody is closed.
//
// # Transfers
//
// A transfer is cut into copies, and these into parts. It goes to the stream of the path's device that has the least to
// do, a few parts ahead of the device, an event behind each. Cancelling stops it between two parts. It completes when the
// events of all that was submitted have come: nothing touches its memory any more.
//
// A copy that fails fails its segments, and no others. Where the runtime does not tell which segment that is, since the
// copy has several, or it was a batch or an event that reported it, the copies on the stream are made again, one by one,
// when it is empty, and where one fails, so are its segments. A device that is lost ends everything on it, and is not used
// again by this process; others go on.
//
// # Trust
//
// There is no more protection between processes than GPUs give: whoever imports a handle may write the allocation,
// whatever rights the region has. The rights are kept by the initiator. Handles are passed, against the region's key, to
// processes of the same user only.
package xgmi
