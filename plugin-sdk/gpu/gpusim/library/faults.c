// Faults: what the file `faults` beside the library says is to go wrong. The file `edition` holds the number of its last
// edition and is mapped, so that looking whether there is a new one costs a load.

#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sim.h"

struct fault {
	int effect, call;
	int from, to;        // devices of the machine, HOST or ANY
	struct range where;  // copies that touch it; all, if it has no size
	uint64_t after;      // calls that pass first
	uint64_t times;      // calls that are struck then; zero: all
	int code;
	uint64_t rate;
	uint64_t seen; // calls that it matched
};

static char file[PATH_MAX];
static _Atomic uint64_t *newest;

static struct {
	uint64_t edition;
	struct fault all[MAX_FAULTS];
	int count;
} faults;

void open_faults(const char *dir)
{
	char path[PATH_MAX];
	if (snprintf(file, sizeof file, "%s/faults", dir) >= (int)sizeof file ||
	    snprintf(path, sizeof path, "%s/edition", dir) >= (int)sizeof path)
		return;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	void *p = mmap(NULL, sizeof *newest, PROT_READ, MAP_SHARED, fd, 0);
	close(fd);
	if (p != MAP_FAILED)
		newest = p;
}

// Reads the file again if there is a new edition. What has begun to count begins anew.
static void refresh(void)
{
	if (!newest || atomic_load(newest) == faults.edition)
		return;
	FILE *f = fopen(file, "re");
	if (!f)
		return;
	uint64_t edition;
	if (fscanf(f, "%" SCNu64, &edition) == 1 && edition != faults.edition) {
		faults.edition = edition;
		faults.count = 0;
		struct fault n = {0};
		while (faults.count < MAX_FAULTS &&
		       fscanf(f, "%d %d %d %d %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %d %" SCNu64, &n.effect, &n.call, &n.from,
			      &n.to, &n.where.address, &n.where.size, &n.after, &n.times, &n.code, &n.rate) == 10)
			faults.all[faults.count++] = n;
	}
	fclose(f);
}

static bool touches(struct range a, struct range b)
{
	return a.address < b.address + b.size && b.address < a.address + a.size;
}

struct verdict judge(enum call call, int from, int to, struct range to_range, struct range from_range)
{
	struct verdict v = {0};
	refresh();
	for (int i = 0; i < faults.count; i++) {
		struct fault *f = &faults.all[i];
		if (f->call != (int)call || (f->from != ANY && f->from != from) || (f->to != ANY && f->to != to))
			continue;
		if (f->where.size && !touches(f->where, to_range) && !touches(f->where, from_range))
			continue;
		f->seen++;
		if (f->seen <= f->after || (f->times && f->seen > f->after + f->times))
			continue;
		switch (f->effect) {
		case REFUSE:
			v.refuse = f->code;
			break;
		case FAIL:
			v.fail = f->code;
			break;
		case LOSE:
			v.lose = f->code;
			break;
		case CORRUPT:
			v.corrupt = true;
			break;
		case STALL:
			v.stall = faults.edition;
			break;
		case SLOW:
			v.rate = f->rate;
			break;
		}
	}
	return v;
}

int refused(enum call call, int device)
{
	return judge(call, device, ANY, (struct range){0}, (struct range){0}).refuse;
}

bool stalled(const struct verdict *v)
{
	refresh();
	return v->stall != 0 && v->stall == faults.edition;
}
