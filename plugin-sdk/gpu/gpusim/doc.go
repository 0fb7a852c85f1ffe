// Package gpusim is a GPU's runtime for tests on machines without a GPU: a library that exports the calls of HIP or of CUDA
// that plugin-sdk/gpu makes, with devices, links and faults as a test wants them. It is written in C (folder library) and
// compiled when a test first needs it, so that what the tests run is the code that runs on a real GPU, down to the dynamic
// linker.
//
// New makes a machine: a folder with the library, under the name that the real one has, and the files that it reads.
// Any process that opens this copy of the library is on this machine, and processes lend each other memory by handles as on
// a real one. Two machines in one process are two libraries.
//
// # What it is strict about
//
// Device memory cannot be touched by the processor: its addresses are reserved, and reading or writing one is a fault.
// Copies and events of a stream happen in order, on a thread of the stream, after the call has returned; copies of one
// batch happen last to first, since their order is not promised. Streams do not wait for each other, nor for the default
// stream. Host memory that was not registered is copied to and from before the call returns. A range must lie within its
// allocation, an event and its stream belong to one device, and a device reaches the memory of another one only after peer
// access was enabled, which importing the memory does as well (a real runtime would go by way of the host without a word).
// A handle is of an allocation, whatever address in it was asked for; it cannot be opened by its own process, nor after the
// memory was freed, nor on another machine; opening it twice gives the same address, to be closed twice. Freeing, closing and
// unregistering wait for the operations that use the memory. A lost device answers every call with its code, though what is
// destroyed there is let go nonetheless.
//
// HIP_VISIBLE_DEVICES and CUDA_VISIBLE_DEVICES, lists of numbers, say which devices a process sees.
//
// # What it does not simulate
//
// Kernels, graphs, contexts of CUDA's driver beyond the thread's own, managed memory, timing. The memory of a device is
// limited for each process by itself. No figure taken with it says anything about a GPU.
package gpusim
