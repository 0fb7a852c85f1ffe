// What the library exports: the calls of HIP or of CUDA that plugin-sdk/gpu makes. Where the documentation of a call leaves
// several answers to a mistake, this gives an error: what works here is to work on the real ones.

#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>

#include "sim.h"

#define PASTE(a, b) a##b
#define EXPORT __attribute__((visibility("default")))
#ifdef HIP
#define API(name) PASTE(hip, name)
#else
#define API(name) PASTE(cuda, name)
#endif

static _Thread_local int current; // the thread's device, as the process counts
static _Thread_local bool bound;  // the thread has a context, for the calls of CUDA's driver

static int leave(int code)
{
	pthread_mutex_unlock(&lock);
	return code;
}

#define ENTER                                    \
	do {                                     \
		start();                         \
		pthread_mutex_lock(&lock);       \
		if (sim.broken)                  \
			return leave(sim.broken); \
	} while (0)

// The thread's device, as the machine counts.
static int here(void)
{
	bound = true;
	return sim.visible[current];
}

static int lost_here(void)
{
	return sim.devices[here()].lost;
}

static struct device *visible(int number)
{
	return number >= 0 && number < sim.count ? &sim.devices[sim.visible[number]] : NULL;
}

// ---- errors

struct error {
	int code;
	const char *hip, *cuda, *text;
};

static const struct error errors[] = {
	{SUCCESS, "hipSuccess", "cudaSuccess", "no error"},
	{INVALID_VALUE, "hipErrorInvalidValue", "cudaErrorInvalidValue", "invalid argument"},
	{OUT_OF_MEMORY, "hipErrorOutOfMemory", "cudaErrorMemoryAllocation", "out of memory"},
	{NOT_INITIALIZED, "hipErrorNotInitialized", "cudaErrorInitializationError", "initialization error"},
	{INVALID_PITCH, "hipErrorInvalidPitchValue", "cudaErrorInvalidPitchValue", "invalid pitch argument"},
	{INVALID_DEVICE_POINTER, "hipErrorInvalidDevicePointer", "cudaErrorInvalidDevicePointer", "invalid device pointer"},
	{INVALID_DIRECTION, "hipErrorInvalidMemcpyDirection", "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
	{INSUFFICIENT_DRIVER, "hipErrorInsufficientDriver", "cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"},
	{NO_DEVICE, "hipErrorNoDevice", "cudaErrorNoDevice", "no device is detected"},
	{INVALID_DEVICE, "hipErrorInvalidDevice", "cudaErrorInvalidDevice", "invalid device ordinal"},
	{INVALID_CONTEXT, "hipErrorInvalidContext", "cudaErrorDeviceUninitialized", "invalid device context"},
	{UNCORRECTABLE, "hipErrorECCNotCorrectable", "cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"},
	{PEER_UNSUPPORTED, "hipErrorPeerAccessUnsupported", "cudaErrorPeerAccessUnsupported", "peer access is not supported between these two devices"},
	{INVALID_HANDLE, "hipErrorInvalidHandle", "cudaErrorInvalidResourceHandle", "invalid resource handle"},
	{NOT_FOUND, "hipErrorNotFound", "cudaErrorSymbolNotFound", "named symbol not found"},
	{NOT_READY, "hipErrorNotReady", "cudaErrorNotReady", "device not ready"},
	{ILLEGAL_ADDRESS, "hipErrorIllegalAddress", "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
	{PEER_ALREADY_ENABLED, "hipErrorPeerAccessAlreadyEnabled", "cudaErrorPeerAccessAlreadyEnabled", "peer access is already enabled"},
	{PEER_NOT_ENABLED, "hipErrorPeerAccessNotEnabled", "cudaErrorPeerAccessNotEnabled", "peer access has not been enabled"},
	{CONTEXT_IS_DESTROYED, "hipErrorContextIsDestroyed", "cudaErrorContextIsDestroyed", "context is destroyed"},
	{HOST_ALREADY_REGISTERED, "hipErrorHostMemoryAlreadyRegistered", "cudaErrorHostMemoryAlreadyRegistered", "part or all of the requested memory range is already mapped"},
	{HOST_NOT_REGISTERED, "hipErrorHostMemoryNotRegistered", "cudaErrorHostMemoryNotRegistered", "pointer does not correspond to a registered memory region"},
	{LAUNCH_FAILURE, "hipErrorLaunchFailure", "cudaErrorLaunchFailure", "unspecified launch failure"},
	{NOT_SUPPORTED, "hipErrorNotSupported", "cudaErrorNotSupported", "operation not supported"},
	{UNKNOWN, "hipErrorUnknown", "cudaErrorUnknown", "unknown error"},
};

static const struct error *find_error(int code)
{
	for (size_t i = 0; i < sizeof errors / sizeof errors[0]; i++)
		if (errors[i].code == code)
			return &errors[i];
	return NULL;
}

EXPORT const char *API(GetErrorName)(int code)
{
	const struct error *e = find_error(code);
#ifdef HIP
	return e ? e->hip : "hipErrorUnknown";
#else
	return e ? e->cuda : "unrecognized error code";
#endif
}

EXPORT const char *API(GetErrorString)(int code)
{
	const struct error *e = find_error(code);
	return e ? e->text : "unrecognized error code";
}

// ---- the simulation itself

EXPORT int umbpSimulatedRuntime(void)
{
	return 1;
}

// Returns a count by its name, or -1.
EXPORT long long umbpSimulatedCount(const char *name)
{
	static const char *const names[COUNTS] = {
		[COPIES] = "copies",   [COPIES_2D] = "copies2d",       [BATCHES] = "batches", [BATCHED] = "batched", [IMPORTS] = "imports",
		[PINNED] = "pinned",   [ALLOCATIONS] = "allocations", [STREAMS] = "streams", [EVENTS] = "events",
	};
	for (int i = 0; i < COUNTS; i++) {
		if (strcmp(name, names[i]) != 0)
			continue;
		pthread_mutex_lock(&lock);
		long long n = sim.counts[i];
		pthread_mutex_unlock(&lock);
		return n;
	}
	return -1;
}

// ---- devices

static int get_name(char *name, int size, int number)
{
	ENTER;
	struct device *d = visible(number);
	if (!d || !name || size <= 0)
		return leave(d ? INVALID_VALUE : INVALID_DEVICE);
	snprintf(name, (size_t)size, "%s", d->name);
	return leave(SUCCESS);
}

static int get_total(size_t *bytes, int number)
{
	ENTER;
	struct device *d = visible(number);
	if (!d || !bytes)
		return leave(d ? INVALID_VALUE : INVALID_DEVICE);
	*bytes = d->memory;
	return leave(SUCCESS);
}

static int get_device(int *device, int number)
{
	ENTER;
	if (!visible(number) || !device)
		return leave(visible(number) ? INVALID_VALUE : INVALID_DEVICE);
	*device = number;
	return leave(SUCCESS);
}

static int get_range(uintptr_t *base, size_t *size, uintptr_t pointer)
{
	ENTER;
	struct memory *m = memory_at(pointer);
	if (!m)
		return leave(NOT_FOUND);
	if (base)
		*base = m->address;
	if (size)
		*size = m->size;
	return leave(SUCCESS);
}

// The numbers of the attributes of pointers that are simulated.
enum { MEMORY_TYPE = 2, DEVICE_ORDINAL = 9 };

// The number of the type of host memory; that of device memory is the next.
#if defined HIP && VERSION < 60000000
enum { HOST_TYPE = 0 };
#else
enum { HOST_TYPE = 1 };
#endif

static int get_attribute(void *data, int attribute, uintptr_t pointer)
{
	ENTER;
	struct memory *m = memory_at(pointer);
	if (!data || !m)
		return leave(INVALID_VALUE);
	if (attribute == MEMORY_TYPE) {
		*(int *)data = m->device == HOST ? HOST_TYPE : HOST_TYPE + 1;
		return leave(SUCCESS);
	}
	if (attribute != DEVICE_ORDINAL)
		return leave(NOT_SUPPORTED);
	int number = current;
	for (int i = 0; m->device != HOST && i < sim.count; i++)
		if (sim.visible[i] == m->device)
			number = i;
	*(int *)data = number;
	return leave(SUCCESS);
}

// Answers on a machine that is broken or has no devices, too, as the real ones do.
EXPORT int API(RuntimeGetVersion)(int *version)
{
	pthread_mutex_lock(&lock);
	if (!version)
		return leave(INVALID_VALUE);
	*version = VERSION;
	return leave(SUCCESS);
}

EXPORT int API(GetDeviceCount)(int *count)
{
	start();
	pthread_mutex_lock(&lock);
	if (!count)
		return leave(INVALID_VALUE);
	*count = sim.broken ? 0 : sim.count;
	return leave(sim.broken);
}

EXPORT int API(SetDevice)(int number)
{
	ENTER;
	if (!visible(number))
		return leave(INVALID_DEVICE);
	current = number;
	bound = true;
	return leave(SUCCESS);
}

EXPORT int API(DeviceGetPCIBusId)(char *id, int size, int number)
{
	ENTER;
	struct device *d = visible(number);
	if (!d)
		return leave(INVALID_DEVICE);
	if (!id || size <= (int)strlen(d->pci))
		return leave(INVALID_VALUE);
	strcpy(id, d->pci);
#ifndef HIP
	for (char *p = id; *p; p++)
		if (*p >= 'a' && *p <= 'f')
			*p = (char)(*p - 'a' + 'A');
#endif
	return leave(SUCCESS);
}

// ---- the ways between devices

EXPORT int API(DeviceCanAccessPeer)(int *can, int number, int peer)
{
	ENTER;
	struct device *d = visible(number);
	if (!d || !visible(peer) || !can)
		return leave(can ? INVALID_DEVICE : INVALID_VALUE);
	*can = number != peer && d->links[sim.visible[peer]].access;
	return leave(SUCCESS);
}

EXPORT int API(DeviceGetP2PAttribute)(int *value, int attribute, int from, int to)
{
#ifndef HIP
	attribute--; // CUDA counts from 1
#endif
	ENTER;
	if (!value)
		return leave(INVALID_VALUE);
	if (!visible(from) || !visible(to) || from == to)
		return leave(INVALID_DEVICE);
	const struct link *l = &visible(from)->links[sim.visible[to]];
	switch (attribute) {
	case 0: // rank of performance, of which 0 is the best
		*value = l->access && l->type == 4 ? 0 : 1;
		break;
	case 1: // access
		*value = l->access;
		break;
	case 2: // atomic operations
		*value = l->access && l->type == 4;
		break;
	case 3: // arrays
		*value = 0;
		break;
	default:
		return leave(INVALID_VALUE);
	}
	return leave(SUCCESS);
}

EXPORT int API(DeviceEnablePeerAccess)(int peer, unsigned flags)
{
	ENTER;
	int device = here();
	struct device *d = &sim.devices[device];
	if (flags)
		return leave(INVALID_VALUE);
	if (!visible(peer) || peer == current)
		return leave(INVALID_DEVICE);
	int other = sim.visible[peer];
	if (!d->links[other].access)
		return leave(BAD_PEER);
	int code = d->lost ? d->lost : refused(CALL_PEER, device);
	if (!code && d->peers[other])
		code = PEER_ALREADY_ENABLED;
	if (!code)
		d->peers[other] = true;
	return leave(code);
}

// ---- memory

EXPORT int API(Malloc)(void **pointer, size_t size)
{
	ENTER;
	if (!pointer)
		return leave(INVALID_VALUE);
	*pointer = NULL;
	int code = lost_here();
	if (!code)
		code = refused(CALL_ALLOC, here());
	uintptr_t address = 0;
	if (!code && size)
		code = memory_alloc(here(), size, &address);
	*pointer = (void *)address;
	return leave(code);
}

EXPORT int API(Free)(void *pointer)
{
	ENTER;
	int code = pointer ? memory_end((uintptr_t)pointer, OWNED, INVALID_VALUE) : SUCCESS;
	return leave(lost_here() ? lost_here() : code);
}

EXPORT int API(HostRegister)(void *pointer, size_t size, unsigned flags)
{
	ENTER;
	uintptr_t end;
	if (!pointer || !size || flags > 15 || __builtin_add_overflow((uintptr_t)pointer, size, &end))
		return leave(INVALID_VALUE);
	int code = lost_here();
	if (!code)
		code = refused(CALL_REGISTER, here());
	if (!code)
		code = memory_register((uintptr_t)pointer, size);
	return leave(code);
}

EXPORT int API(HostUnregister)(void *pointer)
{
	ENTER;
	int code = pointer ? memory_end((uintptr_t)pointer, REGISTERED, HOST_NOT_REGISTERED) : INVALID_VALUE;
	return leave(lost_here() ? lost_here() : code);
}

EXPORT int API(HostGetDevicePointer)(void **device, void *host, unsigned flags)
{
	ENTER;
	struct memory *m = memory_at((uintptr_t)host);
	if (!device || flags || !m || m->kind != REGISTERED)
		return leave(INVALID_VALUE);
	*device = host; // as with one address space for all
	return leave(lost_here());
}

struct ipc_handle {
	char reserved[HANDLE_BYTES];
};

EXPORT int API(IpcGetMemHandle)(struct ipc_handle *handle, void *pointer)
{
	ENTER;
	if (!handle || !pointer)
		return leave(INVALID_VALUE);
	int code = lost_here();
	return leave(code ? code : memory_export((uintptr_t)pointer, here(), handle));
}

// Lazy peer access is the only flag that there is, and obligatory; HIP 5 knows none.
#if defined HIP && VERSION < 60000000
enum { IPC_FLAGS = 0 };
#else
enum { IPC_FLAGS = 1 };
#endif

EXPORT int API(IpcOpenMemHandle)(void **pointer, struct ipc_handle handle, unsigned flags)
{
	ENTER;
	if (!pointer || flags != IPC_FLAGS)
		return leave(INVALID_VALUE);
	uintptr_t address = 0;
	int code = lost_here();
	if (!code)
		code = memory_import(&handle, here(), &address);
	if (!code)
		*pointer = (void *)address;
	return leave(code);
}

EXPORT int API(IpcCloseMemHandle)(void *pointer)
{
	ENTER;
	int code = pointer ? memory_end((uintptr_t)pointer, IMPORTED, INVALID_VALUE) : INVALID_VALUE;
	return leave(lost_here() ? lost_here() : code);
}

// ---- streams and events

EXPORT int API(StreamCreateWithFlags)(void **stream, unsigned flags)
{
	ENTER;
	if (!stream || flags > 1)
		return leave(INVALID_VALUE);
	int code = lost_here();
	if (!code)
		code = refused(CALL_STREAM, here());
	if (code)
		return leave(code);
	struct stream *s = stream_new(here());
	if (!s)
		return leave(OUT_OF_MEMORY);
	sim.counts[STREAMS]++;
	*stream = s;
	return leave(SUCCESS);
}

EXPORT int API(StreamDestroy)(void *stream)
{
	ENTER;
	struct stream *s = stream ? stream_find(stream, here()) : NULL;
	if (!s)
		return leave(stream ? BAD_STREAM : INVALID_HANDLE);
	int code = sim.devices[stream_device(s)].lost;
	sim.counts[STREAMS]--;
	stream_destroy(s);
	return leave(code);
}

EXPORT int API(StreamSynchronize)(void *stream)
{
	ENTER;
	struct stream *s = stream_find(stream, here());
	if (!s)
		return leave(BAD_STREAM);
	int device = stream_device(s);
	int code = stream_wait(s);
	return leave(sim.devices[device].lost ? sim.devices[device].lost : code);
}

EXPORT int API(EventCreateWithFlags)(void **event, unsigned flags)
{
	ENTER;
	if (!event || flags > 7)
		return leave(INVALID_VALUE);
	int code = lost_here();
	if (!code)
		code = refused(CALL_EVENT, here());
	if (code)
		return leave(code);
	struct event *e = event_new(here());
	if (!e)
		return leave(OUT_OF_MEMORY);
	sim.counts[EVENTS]++;
	*event = e;
	return leave(SUCCESS);
}

EXPORT int API(EventRecord)(void *event, void *stream)
{
	ENTER;
	struct event *e = event_find(event);
	struct stream *s = stream_find(stream, here());
	if (!e || !s)
		return leave(e ? BAD_STREAM : INVALID_HANDLE);
	int code = sim.devices[stream_device(s)].lost;
	if (!code)
		code = refused(CALL_RECORD, stream_device(s));
	return leave(code ? code : event_record(e, s));
}

EXPORT int API(EventQuery)(void *event)
{
	ENTER;
	struct event *e = event_find(event);
	return leave(e ? event_query(e) : INVALID_HANDLE);
}

EXPORT int API(EventDestroy)(void *event)
{
	ENTER;
	struct event *e = event_find(event);
	if (!e)
		return leave(INVALID_HANDLE);
	int code = event_lost(e);
	sim.counts[EVENTS]--;
	event_destroy(e);
	return leave(code);
}

// ---- copies

static struct end end_at(const void *pointer, size_t pitch)
{
	return (struct end){.address = (uintptr_t)pointer, .pitch = pitch};
}

EXPORT int API(Memcpy)(void *to, const void *from, size_t size, int kind)
{
	ENTER;
	struct stream *s = stream_find(NULL, here());
	if (!s)
		return leave(OUT_OF_MEMORY);
	return leave(copy(s, end_at(to, size), end_at(from, size), size, 1, kind, false, true));
}

EXPORT int API(MemcpyAsync)(void *to, const void *from, size_t size, int kind, void *stream)
{
	ENTER;
	struct stream *s = stream_find(stream, here());
	if (!s)
		return leave(BAD_STREAM);
	int code = copy(s, end_at(to, size), end_at(from, size), size, 1, kind, true, false);
	sim.counts[COPIES] += code == SUCCESS;
	return leave(code);
}

EXPORT int API(Memcpy2DAsync)(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows, int kind, void *stream)
{
	ENTER;
	struct stream *s = stream_find(stream, here());
	if (!s)
		return leave(BAD_STREAM);
	if (width > to_pitch || width > from_pitch)
		return leave(INVALID_PITCH);
	int code = copy(s, end_at(to, to_pitch), end_at(from, from_pitch), width, rows, kind, true, false);
	sim.counts[COPIES_2D] += code == SUCCESS;
	return leave(code);
}

struct location {
	int type, id;
};

struct attributes {
	int order; // in which the source is read: 1, 2 or 3
	struct location from, to;
	unsigned flags;
};

// Says whether every copy of a batch has attributes. HIP ignores them.
static bool attributed(const struct attributes *a, const size_t *indices, size_t n, size_t count)
{
#ifdef HIP
	(void)a, (void)indices, (void)n, (void)count;
	return true;
#else
	if (!a || !indices || n == 0 || n > count || indices[0] != 0)
		return false;
	for (size_t i = 0; i < n; i++)
		if (a[i].order < 1 || a[i].order > 3 || a[i].flags > 1 || indices[i] >= count || (i && indices[i] <= indices[i - 1]))
			return false;
	return true;
#endif
}

// Enqueues a batch, the last copy first: there is no order within it. At an error, some of it has been enqueued.
static int batch(void **to, void **from, size_t *sizes, size_t count, struct attributes *a, size_t *indices, size_t n, size_t *failed,
		 void *stream)
{
	ENTER;
	struct stream *s = stream_find(stream, here());
	if (!s)
		return leave(BAD_STREAM);
	if (failed)
		*failed = SIZE_MAX;
	if (!to || !from || !sizes || !count || !attributed(a, indices, n, count))
		return leave(INVALID_VALUE);
#ifndef HIP
	if (!stream) // CUDA has no batches for the default stream
		return leave(INVALID_VALUE);
#endif
	for (size_t i = count; i-- > 0;) {
		int code = copy(s, end_at(to[i], sizes[i]), end_at(from[i], sizes[i]), sizes[i], 1, 4, true, false);
		if (code && failed)
			*failed = i;
		if (code)
			return leave(code);
	}
	sim.counts[BATCHES]++;
	sim.counts[BATCHED] += (long long)count;
	return leave(SUCCESS);
}

#if defined HIP || VERSION < 13000
EXPORT int API(MemcpyBatchAsync)(void **to, void **from, size_t *sizes, size_t count, struct attributes *a, size_t *indices, size_t n,
			  size_t *failed, void *stream)
{
	return batch(to, from, sizes, count, a, indices, n, failed, stream);
}
#else
EXPORT int API(MemcpyBatchAsync)(void **to, void **from, size_t *sizes, size_t count, struct attributes *a, size_t *indices, size_t n, void *stream)
{
	return batch(to, from, sizes, count, a, indices, n, NULL, stream);
}
#endif

// ---- what only one of the runtimes has

#ifdef HIP

EXPORT int hipInit(unsigned flags)
{
	ENTER;
	return leave(flags ? INVALID_VALUE : SUCCESS);
}

EXPORT int hipDeviceGet(int *device, int number)
{
	return get_device(device, number);
}

EXPORT int hipDeviceGetName(char *name, int size, int device)
{
	return get_name(name, size, device);
}

EXPORT int hipDeviceTotalMem(size_t *bytes, int device)
{
	return get_total(bytes, device);
}

EXPORT int hipMemGetAddressRange(uintptr_t *base, size_t *size, uintptr_t pointer)
{
	return get_range(base, size, pointer);
}

EXPORT int hipPointerGetAttribute(void *data, int attribute, uintptr_t pointer)
{
	return get_attribute(data, attribute, pointer);
}

EXPORT int hipExtGetLinkTypeAndHopCount(int from, int to, uint32_t *type, uint32_t *hops)
{
	ENTER;
	if (!visible(from) || !visible(to))
		return leave(INVALID_DEVICE);
	if (!type || !hops || from == to)
		return leave(INVALID_VALUE);
	const struct link *l = &visible(from)->links[sim.visible[to]];
	*type = l->access ? l->type : 2; // a way over PCIe there always is
	*hops = l->access ? l->hops : 2;
	return leave(SUCCESS);
}

#else

#ifndef CONTEXT_FOR_POINTERS
#define CONTEXT_FOR_POINTERS false
#endif

static bool initialized; // cuInit was called

// Returns the code of a call of the driver that comes too early: before cuInit, or on a thread without a context.
static int driver(bool context)
{
	start();
	pthread_mutex_lock(&lock);
	bool ok = initialized;
	pthread_mutex_unlock(&lock);
	return ok ? context && !bound ? INVALID_CONTEXT : SUCCESS : NOT_INITIALIZED;
}

EXPORT int cuInit(unsigned flags)
{
	ENTER;
	initialized = true;
	return leave(flags ? INVALID_VALUE : SUCCESS);
}

EXPORT int cuDeviceGet(int *device, int number)
{
	int code = driver(false);
	return code ? code : get_device(device, number);
}

EXPORT int cuDeviceGetName(char *name, int size, int device)
{
	int code = driver(false);
	return code ? code : get_name(name, size, device);
}

EXPORT int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
	int code = driver(false);
	return code ? code : get_total(bytes, device);
}

EXPORT int cuMemGetAddressRange_v2(uintptr_t *base, size_t *size, uintptr_t pointer)
{
	int code = driver(true);
	return code ? code : get_range(base, size, pointer);
}

EXPORT int cuPointerGetAttribute(void *data, int attribute, uintptr_t pointer)
{
	int code = driver(CONTEXT_FOR_POINTERS);
	return code ? code : get_attribute(data, attribute, pointer);
}

#endif
