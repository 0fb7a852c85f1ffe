// What the machine consists of: read once from the file `machine` beside the library.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "sim.h"

struct sim sim = {
	.broken = UNKNOWN, // until the machine is read
};

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

void wait_a_moment(void)
{
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	t.tv_nsec += 500 * 1000;
	if (t.tv_nsec >= 1000 * 1000 * 1000) {
		t.tv_nsec -= 1000 * 1000 * 1000;
		t.tv_sec++;
	}
	pthread_cond_timedwait(&changed, &lock, &t);
}

static bool read_line(const char *line)
{
	unsigned from, to, type, hops;
	unsigned long long n;
	struct device *d = sim.machine < MAX_DEVICES ? &sim.devices[sim.machine] : NULL;
	if (d && sscanf(line, "device %15s %llu %63[^\n]", d->pci, &n, d->name) == 3) {
		d->memory = n;
		sim.machine++;
		return true;
	}
	if (sscanf(line, "link %u %u %u %u", &from, &to, &type, &hops) == 4) {
		if (from >= MAX_DEVICES || to >= MAX_DEVICES)
			return false;
		sim.devices[from].links[to] = (struct link){.access = true, .type = type, .hops = hops};
		return true;
	}
	if (sscanf(line, "rate %llu", &n) == 1) {
		sim.rate = n;
		return true;
	}
	return sscanf(line, "broken %d", &sim.broken) == 1;
}

// Narrows what the process sees to what its environment names, as the runtimes do: numbers, up to the first bad one.
static void read_visible(const char *list)
{
	for (sim.count = 0; !list && sim.count < sim.machine; sim.count++)
		sim.visible[sim.count] = sim.count;
	while (list && *list) {
		char *end;
		long n = strtol(list, &end, 10);
		if (end == list || n < 0 || n >= sim.machine || sim.count == MAX_DEVICES)
			return;
		for (int i = 0; i < sim.count; i++)
			if (sim.visible[i] == n)
				return;
		sim.visible[sim.count++] = (int)n;
		list = *end == ',' ? end + 1 : "";
	}
}

static bool read_machine(const char *dir)
{
	char path[PATH_MAX], line[256];
	if (snprintf(path, sizeof path, "%s/machine", dir) >= (int)sizeof path)
		return false;
	FILE *f = fopen(path, "re");
	if (!f)
		return false;
	struct stat st;
	bool ok = fstat(fileno(f), &st) == 0;
	sim.identity = (uint64_t)st.st_dev << 32 ^ (uint64_t)st.st_ino;
	sim.broken = SUCCESS;
	while (ok && fgets(line, sizeof line, f))
		ok = read_line(line);
	ok = ok && !ferror(f);
	fclose(f);
	return ok;
}

static void read_all(void)
{
	Dl_info info;
	char dir[PATH_MAX];
	// The path that the library was opened by: links are not followed, since what they lead to lies elsewhere.
	if (!dladdr((void *)(uintptr_t)start, &info) || strlen(info.dli_fname) >= sizeof dir)
		return;
	strcpy(dir, info.dli_fname);
	char *slash = strrchr(dir, '/');
	if (!slash)
		return;
	*slash = 0;
	errno = 0;
	if (!read_machine(dir)) {
		fprintf(stderr, "gpusim: %s/machine cannot be read: %s\n", dir, errno ? strerror(errno) : "a line is no line of it");
		sim.broken = UNKNOWN;
		return;
	}
#ifdef HIP
	const char *list = getenv("HIP_VISIBLE_DEVICES");
	read_visible(list && *list ? list : NULL);
#else
	read_visible(getenv("CUDA_VISIBLE_DEVICES"));
#endif
	if (sim.count == 0 && sim.broken == SUCCESS)
		sim.broken = NO_DEVICE;
	open_faults(dir);
}

void start(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	pthread_once(&once, read_all);
}
