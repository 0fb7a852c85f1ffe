// Package gpu finds a GPU's runtime at run time, AMD's HIP or NVIDIA's CUDA, and calls what moving memory takes. It needs
// neither cgo nor headers to be built, and a machine without a runtime or a GPU only gets to hear what is missing.
//
// # What happens here
//
// Open looks for the runtime's library, loads it, looks every call up by name and asks for the devices. The two runtimes
// are one implementation with two columns of names (calls.go): HIP follows CUDA's calls. Where they differ, the name or a
// number does: the range of an allocation, what is known of a link, the call for a batch, some flags. What is read of
// the runtime are numbers, never its structures, whose layout has changed between versions.
//
//	Open ──► library.go: where it may be ──► dlopen ──► calls.go: symbols ──► devices
//	Runtime.Alloc, Free, Load, Store, Describe ──► service.go: the thread of the device
//	Runtime.Bind ──► Context: streams, events, copies, on the caller's thread
//
// # Threads
//
// A runtime keeps the current device by thread, and so may what else it keeps there (HIP sets the thread's memory policy,
// too). A goroutine that calls a runtime is therefore locked to its thread, and stays so: the thread ends with the
// goroutine, and no other goroutine ever runs on a thread that has been told of a device. Runtime has one such goroutine
// for every device that is used without a Context, until Close; a Context makes the caller's goroutine such a one.
//
// # Memory
//
// Addresses are the runtime's, and uint64: nothing here makes a Go pointer of one. Go's own memory is given to the runtime
// by Load and Store only, for the length of the call.
package gpu
