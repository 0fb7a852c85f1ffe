// A libibverbs without devices behind it, for tests. It keeps the conventions of the real one: which functions return
// an errno, which return -1 and set errno, and which return NULL and set errno.
//
// FAKE_FAIL=function:errno[,function:errno...] makes functions fail; FAKE_EVENT=number makes query_port cause the
// asynchronous event of that number, of the object that was made last. The firmware is called after the number of
// objects that are alive, contexts aside.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define RING 4096
#define MAX_WR 2000
#define MAX_CQE (RING - 1)

struct context {
	struct ibv_device device;
	int events; // where asynchronous events are written
	struct verbs_context verbs;
};

struct channel {
	struct ibv_comp_channel ibv;
	int events;
};

struct cq {
	struct ibv_cq ibv;
	int qps, armed, delivered, acked;
	unsigned head, tail;
	struct ibv_wc ring[RING]; // byte_len is the room in the send queue that it gives back
	struct qp *from[RING];
};

struct qp {
	struct ibv_qp ibv;
	unsigned room, used, unsignaled;
	int delivered, acked;
};

struct event {
	uint64_t element;
	uint32_t type;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int live;
static uint32_t numbers = 16;
static struct cq *last_cq;
static struct qp *last_qp;

static int told(const char *name)
{
	const char *list = getenv("FAKE_FAIL");
	size_t n = strlen(name);

	for (; list && *list; list = strchr(list, ','), list += list ? 1 : 0) {
		if (!strncmp(list, name, n) && list[n] == ':')
			return atoi(list + n + 1);
		if (!strchr(list, ','))
			break;
	}
	return 0;
}

#define FAIL_ERRNO(name) do { int e = told(name); if (e) return e; } while (0)
#define FAIL_MINUS(name) do { int e = told(name); if (e) { errno = e; return -1; } } while (0)
#define FAIL_NULL(name) do { int e = told(name); if (e) { errno = e; return NULL; } } while (0)

static void *make(size_t size)
{
	__atomic_add_fetch(&live, 1, __ATOMIC_SEQ_CST);
	return calloc(1, size);
}

static int unmake(void *object)
{
	__atomic_sub_fetch(&live, 1, __ATOMIC_SEQ_CST);
	free(object);
	return 0;
}

static struct ibv_device devices[] = {{.name = "fake1"}, {.name = "fake0"}};

struct ibv_device **ibv_get_device_list(int *n)
{
	FAIL_NULL("get_device_list");
	*n = told("no_devices") ? 0 : 2;
	struct ibv_device **list = make(3 * sizeof *list);
	for (int i = 0; i < *n; i++)
		list[i] = &devices[i];
	return list;
}

void ibv_free_device_list(struct ibv_device **list) { unmake(list); }
const char *ibv_get_device_name(struct ibv_device *device) { return device->name; }
static struct context *of(struct ibv_context *ctx) { return (struct context *)((char *)ctx - offsetof(struct context, verbs.context)); }

static void cause(struct ibv_context *ctx, uint32_t type, uint64_t element)
{
	struct event e = {element, type};
	if (write(of(ctx)->events, &e, sizeof e) != sizeof e)
		abort();
}

static int query_port(struct ibv_context *ctx, uint8_t port, struct ibv_port_attr *attr, size_t size)
{
	FAIL_ERRNO("query_port");
	if (size != sizeof *attr)
		abort();
	*attr = (struct ibv_port_attr){
		.state = port == 1 ? IBV_PORT_ACTIVE : IBV_PORT_ARMED,
		.active_mtu = IBV_MTU_2048,
		.gid_tbl_len = 5,
		.max_msg_sz = 1u << 31,
		.lid = 7,
		.link_layer = port == 1 ? IBV_LINK_LAYER_ETHERNET : IBV_LINK_LAYER_INFINIBAND,
		.active_width = 2,
		.active_speed = 32,
	};
	const char *type = getenv("FAKE_EVENT");
	if (type && *type) {
		pthread_mutex_lock(&lock);
		switch (atoi(type)) {
		case IBV_EVENT_CQ_ERR:
			last_cq->delivered++;
			cause(ctx, IBV_EVENT_CQ_ERR, (uintptr_t)last_cq);
			break;
		case IBV_EVENT_QP_FATAL:
		case IBV_EVENT_QP_REQ_ERR:
		case IBV_EVENT_QP_ACCESS_ERR:
		case IBV_EVENT_COMM_EST:
		case IBV_EVENT_SQ_DRAINED:
		case IBV_EVENT_PATH_MIG:
		case IBV_EVENT_PATH_MIG_ERR:
		case IBV_EVENT_QP_LAST_WQE_REACHED:
			last_qp->delivered++;
			cause(ctx, atoi(type), (uintptr_t)last_qp);
			break;
		case IBV_EVENT_SRQ_ERR:
		case IBV_EVENT_SRQ_LIMIT_REACHED:
		case IBV_EVENT_WQ_FATAL:
			cause(ctx, atoi(type), 1); // to be left alone
			break;
		default:
			cause(ctx, atoi(type), port);
		}
		pthread_mutex_unlock(&lock);
	}
	return 0;
}

static int poll_cq(struct ibv_cq *ibv, int n, struct ibv_wc *wcs)
{
	struct cq *cq = (struct cq *)ibv;
	int got = 0;

	FAIL_MINUS("poll_cq");
	pthread_mutex_lock(&lock);
	for (; got < n && cq->head != cq->tail; cq->head++, got++) {
		wcs[got] = cq->ring[cq->head % RING];
		cq->from[cq->head % RING]->used -= wcs[got].byte_len;
	}
	pthread_mutex_unlock(&lock);
	return got;
}

static void notify(struct cq *cq)
{
	struct ibv_cq *ibv = &cq->ibv;
	if (!cq->armed)
		return;
	cq->armed = 0;
	if (write(((struct channel *)ibv->channel)->events, &ibv, sizeof ibv) != sizeof ibv)
		abort();
}

static int req_notify_cq(struct ibv_cq *ibv, int solicited)
{
	FAIL_ERRNO("req_notify_cq");
	if (solicited)
		return EINVAL;
	pthread_mutex_lock(&lock);
	((struct cq *)ibv)->armed = 1;
	pthread_mutex_unlock(&lock);
	return 0;
}

// Every signaled work request is done at once. Its completion carries a sum over all that the device was told of it.
static int post_send(struct ibv_qp *ibv, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
	struct qp *qp = (struct qp *)ibv;
	struct cq *cq = (struct cq *)ibv->send_cq;
	int error = 0, fail = told("post_send"), silent = told("post_send_silent");

	if (silent)
		return silent;
	pthread_mutex_lock(&lock);
	for (; wr; wr = wr->next) {
		if (fail || qp->used == qp->room) {
			error = fail ? fail : ENOMEM;
			*bad = wr;
			break;
		}
		uint64_t sum = wr->wr.rdma.remote_addr + 3 * (uint64_t)wr->wr.rdma.rkey + 5 * (wr->opcode == IBV_WR_RDMA_READ) + 7 * (uint64_t)wr->num_sge;
		for (int i = 0; i < wr->num_sge; i++)
			sum = sum * 31 + wr->sg_list[i].addr + 11 * (uint64_t)wr->sg_list[i].length + 13 * (uint64_t)wr->sg_list[i].lkey;
		qp->used++;
		qp->unsignaled++;
		if (wr->send_flags == IBV_SEND_SIGNALED) {
			cq->from[cq->tail % RING] = qp;
			cq->ring[cq->tail++ % RING] = (struct ibv_wc){
				.wr_id = wr->wr_id,
				.status = told("status"),
				.vendor_err = sum ^ sum >> 32,
				.byte_len = qp->unsignaled,
				.qp_num = ibv->qp_num,
			};
			qp->unsignaled = 0;
			notify(cq);
		}
	}
	pthread_mutex_unlock(&lock);
	return error;
}

struct ibv_context *ibv_open_device(struct ibv_device *device)
{
	int fds[2];

	FAIL_NULL("open_device");
	struct context *c = calloc(1, sizeof *c);
	if (pipe2(fds, O_CLOEXEC))
		abort();
	c->events = fds[1];
	c->verbs.sz = sizeof c->verbs;
	c->verbs.query_port = query_port;
	c->verbs.context = (struct ibv_context){
		.device = device,
		.async_fd = fds[0],
		.abi_compat = __VERBS_ABI_IS_EXTENDED,
		.ops = {.poll_cq = poll_cq, .req_notify_cq = req_notify_cq, .post_send = post_send},
	};
	return &c->verbs.context;
}

int ibv_close_device(struct ibv_context *ctx)
{
	close(ctx->async_fd);
	close(of(ctx)->events);
	free(of(ctx));
	FAIL_MINUS("close_device");
	return 0;
}

int ibv_query_device(struct ibv_context *ctx, struct ibv_device_attr *attr)
{
	(void)ctx;
	FAIL_ERRNO("query_device");
	*attr = (struct ibv_device_attr){
		.max_mr_size = 1ull << 40, .max_qp = 1, .max_qp_wr = MAX_WR, .max_sge = 3, .max_sge_rd = 4, .max_cq = 5, .max_cqe = MAX_CQE,
		.max_mr = 7, .max_qp_rd_atom = 8, .max_qp_init_rd_atom = 9, .phys_port_cnt = 2,
	};
	snprintf(attr->fw_ver, sizeof attr->fw_ver, "%d alive", live - 1); // the list of devices is one of them
	return 0;
}

#undef ibv_query_port
int ibv_query_port(struct ibv_context *ctx, uint8_t port, struct _compat_ibv_port_attr *attr) { abort(); }

int _ibv_query_gid_ex(struct ibv_context *ctx, uint32_t port, uint32_t index, struct ibv_gid_entry *gid, uint32_t flags, size_t size)
{
	(void)ctx;
	FAIL_ERRNO("query_gid_ex");
	if (flags || size != sizeof *gid)
		return EINVAL;
	*gid = (struct ibv_gid_entry){.gid_index = index, .port_num = port};
	switch (index) {
	case 0:
		gid->gid.raw[0] = 0xfe;
		gid->gid.raw[15] = port;
		gid->gid_type = IBV_GID_TYPE_ROCE_V1;
		gid->ndev_ifindex = 1; // lo
		return 0;
	case 1:
		return ENODATA;
	case 2:
		return 0;
	case 3:
		gid->gid.raw[15] = 9;
		gid->gid_type = IBV_GID_TYPE_ROCE_V2;
		gid->ndev_ifindex = 0x7fffffff; // of another network namespace
		return 0;
	}
	gid->gid.raw[15] = 4;
	return 0;
}

struct ibv_pd *ibv_alloc_pd(struct ibv_context *ctx)
{
	FAIL_NULL("alloc_pd");
	struct ibv_pd *pd = make(sizeof *pd);
	pd->context = ctx;
	return pd;
}

int ibv_dealloc_pd(struct ibv_pd *pd)
{
	FAIL_ERRNO("dealloc_pd");
	return unmake(pd);
}

#undef ibv_reg_mr
struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *addr, size_t length, int access)
{
	FAIL_NULL("reg_mr");
	struct ibv_mr *mr = make(sizeof *mr);
	*mr = (struct ibv_mr){.context = pd->context, .pd = pd, .addr = addr, .length = length, .lkey = length, .rkey = access};
	return mr;
}

int ibv_dereg_mr(struct ibv_mr *mr)
{
	FAIL_ERRNO("dereg_mr");
	return unmake(mr);
}

struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *ctx)
{
	int fds[2];

	FAIL_NULL("create_comp_channel");
	struct channel *c = make(sizeof *c);
	if (pipe2(fds, O_CLOEXEC))
		abort();
	c->ibv = (struct ibv_comp_channel){.context = ctx, .fd = fds[0]};
	c->events = fds[1];
	return &c->ibv;
}

int ibv_destroy_comp_channel(struct ibv_comp_channel *channel)
{
	FAIL_ERRNO("destroy_comp_channel");
	if (channel->refcnt)
		return EBUSY;
	close(channel->fd);
	close(((struct channel *)channel)->events);
	return unmake(channel);
}

struct ibv_cq *ibv_create_cq(struct ibv_context *ctx, int cqe, void *name, struct ibv_comp_channel *channel, int vector)
{
	(void)vector;
	FAIL_NULL("create_cq");
	if (cqe > MAX_CQE) {
		errno = EINVAL;
		return NULL;
	}
	struct cq *cq = make(sizeof *cq);
	cq->ibv = (struct ibv_cq){.context = ctx, .channel = channel, .cq_context = name, .cqe = cqe + 1};
	channel->refcnt++;
	last_cq = cq;
	return &cq->ibv;
}

int ibv_destroy_cq(struct ibv_cq *ibv)
{
	struct cq *cq = (struct cq *)ibv;
	FAIL_ERRNO("destroy_cq");
	// The real one waits for acknowledgements, for ever.
	if (cq->qps || cq->acked != cq->delivered)
		return EBUSY;
	ibv->channel->refcnt--;
	return unmake(cq);
}

int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **name)
{
	FAIL_MINUS("get_cq_event");
	ssize_t n = read(channel->fd, cq, sizeof *cq);
	if (n != sizeof *cq)
		return -1;
	*name = (*cq)->cq_context;
	__atomic_add_fetch(&((struct cq *)*cq)->delivered, 1, __ATOMIC_SEQ_CST);
	return 0;
}

void ibv_ack_cq_events(struct ibv_cq *cq, unsigned n) { __atomic_add_fetch(&((struct cq *)cq)->acked, n, __ATOMIC_SEQ_CST); }

struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *attr)
{
	FAIL_NULL("create_qp");
	if (attr->sq_sig_all || attr->qp_type != IBV_QPT_RC || attr->srq || !attr->cap.max_recv_wr || !attr->cap.max_recv_sge ||
	    attr->cap.max_send_wr > MAX_WR) {
		errno = EINVAL;
		return NULL;
	}
	attr->cap.max_send_wr += 3;
	attr->cap.max_send_sge += 2;
	struct qp *qp = make(sizeof *qp);
	qp->ibv = (struct ibv_qp){.context = pd->context, .pd = pd, .send_cq = attr->send_cq, .recv_cq = attr->recv_cq, .qp_num = ++numbers};
	qp->room = attr->cap.max_send_wr;
	((struct cq *)attr->send_cq)->qps++;
	last_qp = qp;
	return &qp->ibv;
}

// The attributes that each state asks for, and wants to be as the test sets them.
int ibv_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *a, int mask)
{
	(void)qp;
	FAIL_ERRNO("modify_qp");
	int good = 0;
	switch (a->qp_state) {
	case IBV_QPS_INIT:
		good = mask == (IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS) && a->port_num == 2 && a->pkey_index == 0 &&
		       a->qp_access_flags == (IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ);
		break;
	case IBV_QPS_RTR:
		good = mask == (IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER) &&
		       a->path_mtu == IBV_MTU_1024 && a->dest_qp_num == 0xabcdef && a->rq_psn == 0xfedcba && a->max_dest_rd_atomic == 11 && a->min_rnr_timer == 12 &&
		       a->ah_attr.port_num == 2 && a->ah_attr.sl == 3;
		if (a->ah_attr.is_global)
			good = good && a->ah_attr.grh.dgid.raw[0] == 1 && a->ah_attr.grh.dgid.raw[15] == 16 && a->ah_attr.grh.sgid_index == 4 &&
			       a->ah_attr.grh.hop_limit == 64 && a->ah_attr.grh.traffic_class == 106 && a->ah_attr.dlid == 0;
		else
			good = good && a->ah_attr.dlid == 77;
		break;
	case IBV_QPS_RTS:
		good = mask == (IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC) &&
		       a->sq_psn == 0xabc && a->timeout == 14 && a->retry_cnt == 7 && a->rnr_retry == 6 && a->max_rd_atomic == 5;
		break;
	case IBV_QPS_ERR:
		good = mask == IBV_QP_STATE;
		break;
	default:
		break;
	}
	return good ? 0 : EDOM;
}

int ibv_destroy_qp(struct ibv_qp *ibv)
{
	struct qp *qp = (struct qp *)ibv;
	FAIL_ERRNO("destroy_qp");
	if (qp->acked != qp->delivered)
		return EBUSY;
	// Its completions stay in the queue, as with soft-RoCE. They belong to nobody now.
	pthread_mutex_lock(&lock);
	struct cq *cq = (struct cq *)ibv->send_cq;
	static struct qp nobody;
	for (unsigned i = cq->head; i != cq->tail; i++)
		if (cq->from[i % RING] == qp)
			cq->from[i % RING] = &nobody;
	cq->qps--;
	pthread_mutex_unlock(&lock);
	return unmake(qp);
}

int ibv_get_async_event(struct ibv_context *ctx, struct ibv_async_event *event)
{
	struct event e;

	FAIL_MINUS("get_async_event");
	if (read(ctx->async_fd, &e, sizeof e) != sizeof e)
		return -1;
	memset(event, 0xff, sizeof *event);
	event->event_type = e.type;
	event->element.cq = (void *)e.element;
	switch (e.type) {
	case IBV_EVENT_PORT_ACTIVE:
	case IBV_EVENT_PORT_ERR:
	case IBV_EVENT_GID_CHANGE:
	case IBV_EVENT_LID_CHANGE:
		event->element.port_num = e.element;
	}
	return 0;
}

void ibv_ack_async_event(struct ibv_async_event *event)
{
	pthread_mutex_lock(&lock);
	switch (event->event_type) {
	case IBV_EVENT_CQ_ERR:
		((struct cq *)event->element.cq)->acked++;
		break;
	case IBV_EVENT_QP_FATAL:
	case IBV_EVENT_QP_REQ_ERR:
	case IBV_EVENT_QP_ACCESS_ERR:
	case IBV_EVENT_COMM_EST:
	case IBV_EVENT_SQ_DRAINED:
	case IBV_EVENT_PATH_MIG:
	case IBV_EVENT_PATH_MIG_ERR:
	case IBV_EVENT_QP_LAST_WQE_REACHED:
		((struct qp *)event->element.qp)->acked++;
		break;
	default:
		break;
	}
	pthread_mutex_unlock(&lock);
}

const char *ibv_event_type_str(enum ibv_event_type type)
{
	static char texts[32][16];
	snprintf(texts[type % 32], sizeof texts[0], "event %d", type);
	return texts[type % 32];
}

enum ibv_fork_status ibv_is_fork_initialized(void)
{
	int unneeded = told("fork_unneeded");
	return unneeded ? IBV_FORK_UNNEEDED : IBV_FORK_DISABLED;
}

#ifndef LACKING
int ibv_fork_init(void)
{
	FAIL_ERRNO("fork_init");
	return 0;
}
#endif
