// The simulated runtime: what its parts share. See ../doc.go for what it is, and api.c for what it exports.

#ifndef SIM_H
#define SIM_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MAX_DEVICES = 16, MAX_FAULTS = 32, HANDLE_BYTES = 64 };

// The codes that both runtimes share; the numbers are those of hip_runtime_api.h and driver_types.h.
enum {
	SUCCESS = 0,
	INVALID_VALUE = 1,
	OUT_OF_MEMORY = 2,
	NOT_INITIALIZED = 3,
	INVALID_PITCH = 12,
	INVALID_DEVICE_POINTER = 17,
	INVALID_DIRECTION = 21,
	INSUFFICIENT_DRIVER = 35,
	NO_DEVICE = 100,
	INVALID_DEVICE = 101,
	INVALID_CONTEXT = 201,
	UNCORRECTABLE = 214,
	PEER_UNSUPPORTED = 217,
	INVALID_HANDLE = 400,
	NOT_FOUND = 500,
	NOT_READY = 600,
	ILLEGAL_ADDRESS = 700,
	PEER_ALREADY_ENABLED = 704,
	PEER_NOT_ENABLED = 705,
	CONTEXT_IS_DESTROYED = 709,
	HOST_ALREADY_REGISTERED = 712,
	HOST_NOT_REGISTERED = 713,
	LAUNCH_FAILURE = 719,
	NOT_SUPPORTED = 801,
	UNKNOWN = 999,
};

// Where the runtimes disagree.
#ifdef HIP
enum { BAD_STREAM = CONTEXT_IS_DESTROYED, BAD_IMPORT = INVALID_DEVICE_POINTER, BAD_PEER = INVALID_DEVICE };
#else
enum { BAD_STREAM = INVALID_HANDLE, BAD_IMPORT = INVALID_VALUE, BAD_PEER = PEER_UNSUPPORTED };
#endif

// ---- machine.c

enum { HOST = -1, ANY = -2 };

struct link {
	bool access;
	unsigned type; // as HSA counts: 2 is PCIe, 4 is XGMI
	unsigned hops;
};

struct device {
	char pci[16];
	char name[64];
	uint64_t memory, used; // bytes
	struct link links[MAX_DEVICES];
	bool peers[MAX_DEVICES]; // to which access was enabled
	struct stream *null;     // the default stream, made when it is first used
	int running;             // operations that are being carried out
	bool losing;             // an operation waits for the others to end, to lose the device
	int lost;                // the code, once it is lost
};

// What is counted. From IMPORTS on, it is what is open now.
enum counted { COPIES, COPIES_2D, BATCHES, BATCHED, IMPORTS, ALLOCATIONS, PINNED, STREAMS, EVENTS, COUNTS };

struct sim {
	struct device devices[MAX_DEVICES]; // all of the machine
	int machine;                        // how many
	int visible[MAX_DEVICES];           // those that this process sees, by its own numbers
	int count;                          // how many
	int broken;                         // what the first call of a program answers, if not success
	uint64_t rate;                      // bytes per second of a copy; zero: as fast as it goes
	uint64_t identity;                  // of the machine, in handles
	long long counts[COUNTS];
};

extern struct sim sim;

// One lock guards all state; `changed` is broadcast whenever something ended that somebody may wait for.
extern pthread_mutex_t lock;
extern pthread_cond_t changed;

// Waits for `changed` for a moment, for what nothing signals: a change of the faults.
void wait_a_moment(void);

// Reads the machine, once. Called first by all that is exported.
void start(void);

// ---- faults.c

enum call { CALL_COPY, CALL_ALLOC, CALL_EXPORT, CALL_IMPORT, CALL_REGISTER, CALL_STREAM, CALL_EVENT, CALL_RECORD, CALL_PEER };
enum effect { REFUSE, FAIL, LOSE, CORRUPT, STALL, SLOW };

// What is in store for one call.
struct verdict {
	int refuse, fail, lose; // codes
	bool corrupt;
	uint64_t stall; // the edition of the faults that stalls it
	uint64_t rate;  // bytes per second, zero: no limit
};

struct range {
	uint64_t address, size;
};

void open_faults(const char *dir);
struct verdict judge(enum call call, int from, int to, struct range to_range, struct range from_range);
int refused(enum call call, int device); // judge, for calls that can only be refused
bool stalled(const struct verdict *v);

// ---- memory.c

enum kind { OWNED, IMPORTED, REGISTERED };

struct memory {
	struct memory *next;
	enum kind kind;
	int device; // HOST for what is registered
	uintptr_t address;
	size_t size;
	char *bytes;      // where they can be touched; device memory only
	int fd;           // the memfd, device memory only
	uint64_t inode;   // the memfd's
	uint64_t origin;  // the address in the process that allocated it
	int uses;         // imports that are not closed
	int busy;         // operations that refer to it
	bool ending;      // being freed
};

int memory_alloc(int device, size_t size, uintptr_t *address);
int memory_export(uintptr_t address, int device, void *handle);
int memory_import(const void *handle, int device, uintptr_t *address);
int memory_register(uintptr_t address, size_t size);
int memory_end(uintptr_t address, enum kind kind, int unknown); // frees, closes or unregisters, when it is idle
struct memory *memory_at(uintptr_t address);

// ---- stream.c

// One end of a copy.
struct end {
	uintptr_t address;
	size_t pitch;
	struct memory *memory; // NULL for host memory that is not registered
};

enum what { COPY, MARK };

struct operation {
	struct operation *next;
	enum what what;
	struct end to, from;
	size_t width, rows;
	struct event *event; // to mark
	uint64_t ticket;     // of that event
	struct verdict verdict;
	bool *done; // set in the end where somebody waits for it, who then owns the operation
	int code;
};

struct stream;
struct event;

struct stream *stream_new(int device);
struct stream *stream_find(const void *handle, int device); // NULL if there is none; the default one of the device for NULL
int stream_device(const struct stream *s);
void stream_destroy(struct stream *s);
int stream_wait(struct stream *s);

struct event *event_new(int device);
struct event *event_find(const void *handle);
int event_record(struct event *e, struct stream *s);
int event_query(struct event *e);
int event_lost(const struct event *e); // the code of its device, once that is lost
void event_destroy(struct event *e);

// copy checks and enqueues a copy of rows; with `faulty`, the faults apply. It waits for the end of the copy if `wait`, or if
// it touches host memory that is not registered.
int copy(struct stream *s, struct end to, struct end from, size_t width, size_t rows, int kind, bool faulty, bool wait);

#endif
