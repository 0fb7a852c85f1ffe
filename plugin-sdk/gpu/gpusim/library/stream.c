// Streams: threads that carry out operations one after the other.

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "sim.h"

struct stream {
	struct stream *next;
	int device;
	bool ending;              // destroyed: the thread ends once it has nothing to do
	int waiters;              // threads that wait for it, which is not freed before they have left
	struct operation *first, **last;
	uint64_t submitted, done; // operations
	int code;                 // of a failed operation, until somebody who waited has heard of it
	pthread_cond_t work;
};

struct event {
	struct event *next;
	int device;
	bool ending;               // destroyed: freed once no operation refers to it
	int uses;                  // operations, and threads that wait
	uint64_t recorded, marked; // tickets
	int code;                  // of what came before it in its stream
};

static struct stream *streams;
static struct event *events;

static void release_event(struct event *e)
{
	if (--e->uses || !e->ending)
		return;
	struct event **p = &events;
	while (*p != e)
		p = &(*p)->next;
	*p = e->next;
	free(e);
}

// ---- carrying out

// Copies one row, with the calls of the kernel where the host's memory takes part: it may be gone.
static bool copy_row(const struct end *to, const struct end *from, size_t width)
{
	struct memory *t = to->memory && to->memory->bytes ? to->memory : NULL;
	struct memory *f = from->memory && from->memory->bytes ? from->memory : NULL;
	if (t && f) {
		memmove(t->bytes + (to->address - t->address), f->bytes + (from->address - f->address), width);
		return true;
	}
	if (!t && !f) {
		struct iovec local = {(void *)to->address, width}, remote = {(void *)from->address, width};
		return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == (ssize_t)width;
	}
	for (size_t done = 0; done < width;) {
		ssize_t n = t ? pwrite(t->fd, (char *)from->address + done, width - done, (off_t)(to->address - t->address + done))
			      : pread(f->fd, (char *)to->address + done, width - done, (off_t)(from->address - f->address + done));
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		done += (size_t)n;
	}
	return true;
}

static void sleep_for(size_t bytes, uint64_t rate)
{
	double seconds = (double)bytes / (double)rate;
	struct timespec t = {.tv_sec = (time_t)seconds};
	t.tv_nsec = (long)((seconds - (double)t.tv_sec) * 1e9);
	nanosleep(&t, NULL);
}

static int perform(struct operation *o)
{
	struct end to = o->to, from = o->from;
	for (size_t i = 0; i < o->rows; i++, to.address += to.pitch, from.address += from.pitch)
		if (!copy_row(&to, &from, o->width))
			return ILLEGAL_ADDRESS;
	if (o->verdict.corrupt) {
		uintptr_t at = o->to.address + o->width / 2;
		struct memory *m = o->to.memory;
		char *p = m && m->bytes ? m->bytes + (at - m->address) : (char *)at;
		*p ^= 0x10;
	}
	uint64_t rate = sim.rate;
	if (o->verdict.rate && (!rate || o->verdict.rate < rate))
		rate = o->verdict.rate;
	if (rate)
		sleep_for(o->width * o->rows, rate);
	return SUCCESS;
}

static int lost(const struct operation *o, const struct device *d)
{
	if (d->lost)
		return d->lost;
	const struct memory *ends[] = {o->to.memory, o->from.memory};
	for (int i = 0; i < 2; i++)
		if (ends[i] && ends[i]->device >= 0 && sim.devices[ends[i]->device].lost)
			return sim.devices[ends[i]->device].lost;
	return SUCCESS;
}

// Carries out a copy and returns its code. No operation of a device runs when the device is lost.
static int run(struct operation *o, struct device *d)
{
	while ((d->losing && !d->lost) || (stalled(&o->verdict) && !lost(o, d)))
		wait_a_moment();
	if (lost(o, d))
		return lost(o, d);
	if (o->verdict.lose) {
		d->losing = true;
		while (d->running)
			pthread_cond_wait(&changed, &lock);
		d->lost = o->verdict.lose;
		return d->lost;
	}
	if (o->verdict.fail)
		return o->verdict.fail;
	d->running++;
	pthread_mutex_unlock(&lock);
	int code = perform(o);
	pthread_mutex_lock(&lock);
	d->running--;
	return code;
}

static void release_memory(struct operation *o)
{
	if (o->to.memory)
		o->to.memory->busy--;
	if (o->from.memory)
		o->from.memory->busy--;
}

static void carry_out(struct stream *s, struct operation *o)
{
	struct device *d = &sim.devices[s->device];
	switch (o->what) {
	case COPY:
		o->code = run(o, d);
		if (o->code && !o->done)
			s->code = o->code;
		release_memory(o);
		break;
	case MARK:
		if (o->ticket > o->event->marked) { // else it was recorded again since, in a stream that was quicker
			o->event->marked = o->ticket;
			o->event->code = s->code;
		}
		release_event(o->event);
		break;
	}
}

static void *work(void *p)
{
	struct stream *s = p;
	pthread_mutex_lock(&lock);
	for (;;) {
		struct operation *o = s->first;
		if (o) {
			carry_out(s, o);
			s->first = o->next;
			if (!s->first)
				s->last = &s->first;
			s->done++;
			if (o->done)
				*o->done = true;
			else
				free(o);
			pthread_cond_broadcast(&changed);
		} else if (!s->ending) {
			pthread_cond_wait(&s->work, &lock);
		} else if (s->waiters) {
			pthread_cond_wait(&changed, &lock);
		} else {
			break;
		}
	}
	struct stream **at = &streams;
	while (*at != s)
		at = &(*at)->next;
	*at = s->next;
	pthread_mutex_unlock(&lock);
	pthread_cond_destroy(&s->work);
	free(s);
	return NULL;
}

static void submit(struct stream *s, struct operation *o)
{
	o->next = NULL;
	*s->last = o;
	s->last = &o->next;
	s->submitted++;
	pthread_cond_signal(&s->work);
}

// ---- streams

struct stream *stream_new(int device)
{
	struct stream *s = calloc(1, sizeof *s);
	if (!s)
		return NULL;
	s->device = device;
	s->last = &s->first;
	pthread_cond_init(&s->work, NULL);
	// The program's signals are none of this thread's business.
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_t t;
	int failed = pthread_create(&t, NULL, work, s);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (failed) {
		pthread_cond_destroy(&s->work);
		free(s);
		return NULL;
	}
	pthread_detach(t);
	s->next = streams;
	streams = s;
	return s;
}

struct stream *stream_find(const void *handle, int device)
{
	if (!handle) {
		struct device *d = &sim.devices[device];
		if (!d->null)
			d->null = stream_new(device);
		return d->null;
	}
	for (struct stream *s = streams; s; s = s->next)
		if (s == handle && !s->ending)
			return s;
	return NULL;
}

int stream_device(const struct stream *s)
{
	return s->device;
}

void stream_destroy(struct stream *s)
{
	s->ending = true;
	pthread_cond_signal(&s->work);
}

int stream_wait(struct stream *s)
{
	uint64_t until = s->submitted;
	s->waiters++;
	while (s->done < until)
		pthread_cond_wait(&changed, &lock);
	s->waiters--;
	pthread_cond_broadcast(&changed);
	int code = s->code;
	s->code = SUCCESS;
	return code;
}

// ---- events

struct event *event_new(int device)
{
	struct event *e = calloc(1, sizeof *e);
	if (!e)
		return NULL;
	e->device = device;
	e->next = events;
	events = e;
	return e;
}

struct event *event_find(const void *handle)
{
	for (struct event *e = events; e; e = e->next)
		if (e == handle && !e->ending)
			return e;
	return NULL;
}

int event_record(struct event *e, struct stream *s)
{
	if (e->device != s->device)
		return INVALID_HANDLE;
	struct operation *o = calloc(1, sizeof *o);
	if (!o)
		return OUT_OF_MEMORY;
	o->what = MARK;
	o->event = e;
	o->ticket = ++e->recorded;
	e->uses++;
	submit(s, o);
	return SUCCESS;
}

int event_lost(const struct event *e)
{
	return sim.devices[e->device].lost;
}

int event_query(struct event *e)
{
	if (event_lost(e))
		return event_lost(e);
	return e->marked < e->recorded ? NOT_READY : e->code;
}

void event_destroy(struct event *e)
{
	e->ending = true;
	e->uses++;
	release_event(e);
}

// ---- copies

// Checks one end of an operation of a device: that the rows lie within one piece of memory that the device can address.
static int check_end(struct end *e, size_t width, size_t rows, int device)
{
	size_t span;
	if (e->address == 0)
		return INVALID_VALUE;
	if (__builtin_mul_overflow(e->pitch, rows - 1, &span) || __builtin_add_overflow(span, width, &span))
		return INVALID_VALUE;
	e->memory = memory_at(e->address);
	struct memory *m = e->memory;
	if (!m)
		return SUCCESS;
	if (m->ending || span > m->size - (e->address - m->address))
		return INVALID_VALUE;
	if (m->device == HOST || m->device == device)
		return SUCCESS;
	return sim.devices[device].peers[m->device] ? SUCCESS : PEER_NOT_ENABLED;
}

static int device_of(const struct end *e)
{
	return e->memory ? e->memory->device : HOST;
}

static struct range range_of(const struct end *e, size_t width, size_t rows)
{
	uint64_t address = e->address;
	if (e->memory)
		address = e->memory->origin + (e->address - e->memory->address);
	return (struct range){address, e->pitch * (rows - 1) + width};
}

// Says whether a direction, as the runtimes number it, goes with what the ends are. Registered memory passes for a device's.
static bool fits(int kind, const struct end *to, const struct end *from)
{
	bool t = device_of(to) != HOST, f = device_of(from) != HOST;
	switch (kind) {
	case 0: // host to host
		return !t && !f;
	case 1: // host to device
		return to->memory && !f;
	case 2: // device to host
		return !t && from->memory;
	case 3: // device to device
		return to->memory && from->memory;
	default: // as the addresses say
		return true;
	}
}

int copy(struct stream *s, struct end to, struct end from, size_t width, size_t rows, int kind, bool faulty, bool wait)
{
	if (kind < 0 || kind > 4)
		return INVALID_DIRECTION;
	if (width == 0 || rows == 0)
		return SUCCESS;
	int code = check_end(&to, width, rows, s->device);
	if (!code)
		code = check_end(&from, width, rows, s->device);
	if (!code && !fits(kind, &to, &from))
		code = INVALID_VALUE;
	if (code)
		return code;

	struct operation local = {.what = COPY, .to = to, .from = from, .width = width, .rows = rows};
	code = lost(&local, &sim.devices[s->device]);
	if (code)
		return code;
	if (faulty)
		local.verdict = judge(CALL_COPY, device_of(&from), device_of(&to), range_of(&to, width, rows), range_of(&from, width, rows));
	if (local.verdict.refuse)
		return local.verdict.refuse;

	bool done = false;
	struct operation *o = &local;
	wait = wait || !to.memory || !from.memory;
	if (wait) {
		local.done = &done;
	} else {
		o = malloc(sizeof *o);
		if (!o)
			return OUT_OF_MEMORY;
		*o = local;
	}
	if (to.memory)
		to.memory->busy++;
	if (from.memory)
		from.memory->busy++;
	submit(s, o);
	if (!wait)
		return SUCCESS;
	s->waiters++;
	while (!done)
		pthread_cond_wait(&changed, &lock);
	s->waiters--;
	pthread_cond_broadcast(&changed);
	return local.code == ILLEGAL_ADDRESS ? INVALID_VALUE : local.code;
}
