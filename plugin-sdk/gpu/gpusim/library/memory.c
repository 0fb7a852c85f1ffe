// Memory: what devices allocate, what other processes lend, and what the host registers.
//
// The memory of a device is a memfd. It has two mappings: the address that the program gets is reserved but cannot be
// touched, so that a program that takes device memory for its own faults at once; the other is the runtime's own.

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sim.h"

static struct memory *memories;

struct memory *memory_at(uintptr_t address)
{
	for (struct memory *m = memories; m; m = m->next)
		if (address >= m->address && address - m->address < m->size)
			return m;
	return NULL;
}

static size_t page(void)
{
	return (size_t)sysconf(_SC_PAGESIZE);
}

// Returns how much address space both mappings take, with pages that cannot be touched before, between and behind them.
static size_t reserved(size_t size)
{
	return 2 * ((size + page() - 1) / page() * page()) + 3 * page();
}

// Maps a memfd both ways. It owns the descriptor afterwards, unless it returns NULL.
static struct memory *map(int fd, size_t size)
{
	struct memory *m = calloc(1, sizeof *m);
	struct stat st;
	if (!m || fstat(fd, &st) != 0 || (uint64_t)st.st_size < size) {
		free(m);
		return NULL;
	}
	size_t all = reserved(size);
	char *base = mmap(NULL, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (base == MAP_FAILED) {
		free(m);
		return NULL;
	}
	m->address = (uintptr_t)base + page();
	m->bytes = base + (all + page()) / 2;
	if (mmap(m->bytes, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
		munmap(base, all);
		free(m);
		return NULL;
	}
	m->origin = m->address;
	m->size = size;
	m->fd = fd;
	m->inode = st.st_ino;
	m->next = memories;
	memories = m;
	return m;
}

static void forget(struct memory *m)
{
	struct memory **p = &memories;
	while (*p != m)
		p = &(*p)->next;
	*p = m->next;
	if (m->bytes) {
		munmap((char *)m->address - page(), reserved(m->size));
		close(m->fd);
	}
	free(m);
}

int memory_alloc(int device, size_t size, uintptr_t *address)
{
	struct device *d = &sim.devices[device];
	if (size > d->memory - d->used || size > SIZE_MAX / 4)
		return OUT_OF_MEMORY;
	int fd = memfd_create("simulated-gpu", MFD_CLOEXEC);
	if (fd < 0)
		return OUT_OF_MEMORY;
	struct memory *m = ftruncate(fd, (off_t)size) == 0 ? map(fd, size) : NULL;
	if (!m) {
		close(fd);
		return OUT_OF_MEMORY;
	}
	m->kind = OWNED;
	m->device = device;
	d->used += size;
	sim.counts[ALLOCATIONS]++;
	*address = m->address;
	return SUCCESS;
}

// What an interprocess handle holds: where the allocation's memfd can be opened, and what proves that it is the one.
struct handle {
	uint32_t magic;
	int32_t pid, fd, device;
	uint64_t size, inode, machine, origin;
	uint64_t asked; // the offset that the handle was asked for, which opening does not look at, as in HIP
	uint64_t sum;
};

_Static_assert(sizeof(struct handle) == HANDLE_BYTES, "a handle fills the runtimes' structure");

enum { MAGIC = 0x53424d55 };

static uint64_t sum(const struct handle *h)
{
	uint64_t s = 14695981039346656037u; // FNV-1a
	for (size_t i = 0; i < offsetof(struct handle, sum); i++)
		s = (s ^ ((const unsigned char *)h)[i]) * 1099511628211u;
	return s;
}

int memory_export(uintptr_t address, int device, void *handle)
{
	struct memory *m = memory_at(address);
	if (!m || m->kind != OWNED || m->ending)
		return INVALID_VALUE;
	int code = refused(CALL_EXPORT, device);
	if (code)
		return code;
	struct handle h = {
		.magic = MAGIC,
		.pid = getpid(),
		.fd = m->fd,
		.device = m->device,
		.size = m->size,
		.inode = m->inode,
		.machine = sim.identity,
		.origin = m->origin,
		.asked = address - m->address,
	};
	h.sum = sum(&h);
	memcpy(handle, &h, sizeof h);
	return SUCCESS;
}

// Opens the memfd of a handle in the process that allocated it.
static int open_handle(const struct handle *h)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/fd/%d", h->pid, h->fd);
	int fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
	struct stat st;
	if (fd >= 0 && (fstat(fd, &st) != 0 || st.st_ino != h->inode || (uint64_t)st.st_size != h->size)) {
		close(fd); // it was freed, and the number is another file's by now
		fd = -1;
	}
	return fd;
}

int memory_import(const void *handle, int device, uintptr_t *address)
{
	struct handle h;
	memcpy(&h, handle, sizeof h);
	if (h.magic != MAGIC || h.sum != sum(&h) || h.machine != sim.identity)
		return BAD_IMPORT;
	if (h.pid == getpid())
		return INVALID_CONTEXT;
	int code = refused(CALL_IMPORT, device);
	if (code)
		return code;
	struct device *d = &sim.devices[device];
	if (h.device != device && !d->links[h.device].access)
		return PEER_UNSUPPORTED;

	struct memory *m = memories;
	while (m && (m->kind != IMPORTED || m->inode != h.inode || m->ending))
		m = m->next;
	if (!m) {
		int fd = open_handle(&h);
		if (fd < 0)
			return BAD_IMPORT;
		m = map(fd, h.size);
		if (!m) {
			close(fd);
			return OUT_OF_MEMORY;
		}
		m->kind = IMPORTED;
		m->device = h.device;
		m->origin = h.origin;
	}
	m->uses++;
	sim.counts[IMPORTS]++;
	if (h.device != device)
		d->peers[h.device] = true; // what the flag of lazy access asks for
	*address = m->address;
	return SUCCESS;
}

int memory_register(uintptr_t address, size_t size)
{
	for (struct memory *m = memories; m; m = m->next) {
		if (address >= m->address + m->size || m->address >= address + size)
			continue;
		return m->kind == REGISTERED ? HOST_ALREADY_REGISTERED : INVALID_VALUE;
	}
	uintptr_t first = address / page() * page();
	if (msync((void *)first, address + size - first, MS_ASYNC) != 0) // not mapped
		return INVALID_VALUE;
	struct memory *m = calloc(1, sizeof *m);
	if (!m)
		return OUT_OF_MEMORY;
	*m = (struct memory){.next = memories, .kind = REGISTERED, .device = HOST, .address = address, .size = size, .origin = address};
	memories = m;
	sim.counts[PINNED]++;
	return SUCCESS;
}

int memory_end(uintptr_t address, enum kind kind, int unknown)
{
	struct memory *m = memory_at(address);
	if (!m || m->kind != kind || m->address != address || m->ending)
		return unknown;
	if (kind == IMPORTED) {
		sim.counts[IMPORTS]--;
		if (--m->uses)
			return SUCCESS;
	}
	m->ending = true;
	while (m->busy)
		pthread_cond_wait(&changed, &lock);
	if (kind == OWNED) {
		sim.devices[m->device].used -= m->size;
		sim.counts[ALLOCATIONS]--;
	} else if (kind == REGISTERED) {
		sim.counts[PINNED]--;
	}
	forget(m);
	return SUCCESS;
}
