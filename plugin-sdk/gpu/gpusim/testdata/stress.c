// Calls the simulated runtime from many threads at once, and from two processes; for the sanitizers. The build links it with
// the library's sources, for HIP. It prints nothing when all is well.

#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS = 8, ROUNDS = 40, SIZE = 10000, ANY_KIND = 4, NOT_READY = 600, FAILS = 5 };

struct handle {
	char reserved[64];
};

int hipSetDevice(int);
int hipMalloc(void **, size_t);
int hipFree(void *);
int hipHostRegister(void *, size_t, unsigned);
int hipHostUnregister(void *);
int hipStreamCreateWithFlags(void **, unsigned);
int hipStreamDestroy(void *);
int hipStreamSynchronize(void *);
int hipEventCreateWithFlags(void **, unsigned);
int hipEventRecord(void *, void *);
int hipEventQuery(void *);
int hipEventDestroy(void *);
int hipMemcpy(void *, const void *, size_t, int);
int hipMemcpyAsync(void *, const void *, size_t, int, void *);
int hipMemcpy2DAsync(void *, size_t, const void *, size_t, size_t, size_t, int, void *);
int hipMemcpyBatchAsync(void **, void **, size_t *, size_t, void *, size_t *, size_t, size_t *, void *);
int hipIpcGetMemHandle(struct handle *, void *);
int hipIpcOpenMemHandle(void **, struct handle, unsigned);
int hipIpcCloseMemHandle(void *);
long long umbpSimulatedCount(const char *);

static struct handle theirs; // an allocation of the other process

static int check(int line, int code)
{
	// FAILS is what the faults answer that the test set.
	if (code == 0 || code == FAILS)
		return code;
	fprintf(stderr, "line %d answers %d\n", line, code);
	exit(1);
}

#define OK(call) check(__LINE__, call)

struct things {
	unsigned char *host;
	void *a, *b, *far, *stream, *event;
};

static void work(const struct things *t, int n)
{
	memset(t->host, n, SIZE);
	OK(hipMemcpyAsync(t->a, t->host, SIZE, ANY_KIND, t->stream));
	OK(hipMemcpy2DAsync(t->b, 100, t->a, 100, 50, 100, ANY_KIND, t->stream));
	void *to[] = {t->b, (char *)t->b + 200}, *from[] = {t->a, (char *)t->a + 300};
	size_t sizes[] = {100, 100}, failed;
	OK(hipMemcpyBatchAsync(to, from, sizes, 2, NULL, NULL, 0, &failed, t->stream));
	OK(hipMemcpyAsync(t->b, t->far, 10, ANY_KIND, t->stream));
	OK(hipEventRecord(t->event, t->stream));
	int code;
	do
		code = hipEventQuery(t->event);
	while (n % 2 && code == NOT_READY);
	if (code != NOT_READY)
		OK(code);
	if (n % 3)
		OK(hipStreamSynchronize(t->stream));
	if (n % 5 == 0)
		OK(hipStreamSynchronize(NULL));
	unsigned char loose[SIZE];
	OK(hipMemcpy(loose, t->b, SIZE, ANY_KIND));
}

// Makes what work needs, works, and destroys it; on a lost device, as far as it gets.
static void round_of(unsigned char *host, int n)
{
	struct things t = {.host = host};
	int code = OK(hipHostRegister(host, SIZE, 0));
	OK(hipMalloc(&t.a, SIZE));
	OK(hipMalloc(&t.b, SIZE));
	OK(hipStreamCreateWithFlags(&t.stream, 1));
	OK(hipEventCreateWithFlags(&t.event, 2));
	OK(hipIpcOpenMemHandle(&t.far, theirs, 1));
	if (!code && t.a && t.b && t.far && t.stream && t.event)
		work(&t, n);
	if (t.event)
		OK(hipEventDestroy(t.event));
	if (t.stream)
		OK(hipStreamDestroy(t.stream));
	if (!code)
		OK(hipHostUnregister(host));
	if (t.far)
		OK(hipIpcCloseMemHandle(t.far));
	OK(hipFree(t.a));
	OK(hipFree(t.b));
}

static void *thread(void *p)
{
	int number = (int)(long)p;
	unsigned char *host = malloc(SIZE);
	OK(hipSetDevice(number % 2));
	for (int i = 0; i < ROUNDS; i++)
		round_of(host, i);
	free(host);
	return NULL;
}

// Allocates memory in a process of its own, which ends when the other end of `until` does.
static void lend(int to, int until)
{
	struct handle h;
	void *p;
	OK(hipMalloc(&p, SIZE));
	OK(hipIpcGetMemHandle(&h, p));
	if (write(to, &h, sizeof h) != sizeof h || read(until, &h, 1) != 0)
		_exit(1);
	_exit(0);
}

int main(void)
{
	int handle[2], end[2];
	if (pipe(handle) || pipe(end))
		return 1;
	pid_t lender = fork();
	if (lender == 0) {
		close(end[1]);
		lend(handle[1], end[0]);
	}
	if (read(handle[0], &theirs, sizeof theirs) != sizeof theirs)
		return 1;

	pthread_t threads[THREADS];
	for (long i = 0; i < THREADS; i++)
		OK(pthread_create(&threads[i], NULL, thread, (void *)i));
	for (int i = 0; i < THREADS; i++)
		OK(pthread_join(threads[i], NULL));
	const char *const names[] = {"imports", "allocations", "pinned", "streams", "events"};
	for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
		if (umbpSimulatedCount(names[i])) {
			fprintf(stderr, "%lld %s are left\n", umbpSimulatedCount(names[i]), names[i]);
			return 1;
		}
	close(end[1]);
	waitpid(lender, NULL, 0);
	return 0;
}
