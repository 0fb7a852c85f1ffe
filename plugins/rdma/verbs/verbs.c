//go:build cgo

#define _GNU_SOURCE
#include "verbs.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

_Static_assert(sizeof(struct ibv_sge) == 16 && offsetof(struct ibv_sge, length) == 8 && offsetof(struct ibv_sge, lkey) == 12,
	       "device.SGE is laid out otherwise");
_Static_assert(sizeof(struct umbp_wr) == 32 && sizeof(struct umbp_completion) == 24, "padding");

// failed makes an errno of what a verb returned. Most return one; some, and some drivers, return -1 and leave it in
// errno; a few return it negative. Callers clear errno first, for those that return -1 without setting it.
static int failed(int ret)
{
	if (ret == -1)
		return errno ? errno : EIO;
	return ret < 0 ? -ret : ret;
}

// made makes an errno of the object that a verb returned.
static int made(const void *object)
{
	if (object)
		return 0;
	return errno ? errno : EIO;
}

static void *find(struct umbp_verbs *v, void *lib, const char *name)
{
	void *symbol = dlsym(lib, name);
	if (!symbol)
		snprintf(v->missing, sizeof v->missing, "%s", name);
	return symbol;
}

// umbp_load returns ENOENT when there is no such library and ENOSYS when it lacks a function. v->missing says more.
int umbp_load(struct umbp_verbs *v, const char *name)
{
	Dl_info info;
	void *lib;

	// Once the kernel has taken a device away, all that was made of it is gone, and to destroy that again has to
	// succeed. Without this, the library answers EIO for ever. It reads the variable as it is loaded.
	setenv("RDMAV_ALLOW_DISASSOC_DESTROY", "1", 0);
	lib = dlopen(name, RTLD_NOW | RTLD_LOCAL);
	if (!lib) {
		snprintf(v->missing, sizeof v->missing, "%s", dlerror());
		return ENOENT;
	}
#define X(name) \
	if (!(v->name = find(v, lib, "ibv_" #name))) \
		goto lacking;
	UMBP_SYMBOLS(X)
#undef X
	if (!(v->query_gid_ex = find(v, lib, "_ibv_query_gid_ex")))
		goto lacking;
	v->is_fork_initialized = dlsym(lib, "ibv_is_fork_initialized");
	if (dladdr((void *)v->open_device, &info) && info.dli_fname)
		snprintf(v->path, sizeof v->path, "%s", info.dli_fname);
	return 0;

lacking:
	dlclose(lib);
	return ENOSYS;
}

// umbp_fork asks the library to keep registered memory safe from fork where the kernel does not. It must be called
// before memory is registered.
enum ibv_fork_status umbp_fork(struct umbp_verbs *v)
{
	enum ibv_fork_status status = v->is_fork_initialized ? v->is_fork_initialized() : IBV_FORK_DISABLED;

	if (status == IBV_FORK_DISABLED && v->fork_init() == 0)
		status = IBV_FORK_ENABLED;
	return status;
}

int umbp_devices(struct umbp_verbs *v, struct ibv_device ***list, int *n)
{
	errno = 0;
	*list = v->get_device_list(n);
	return made(*list);
}

void umbp_free_devices(struct umbp_verbs *v, struct ibv_device **list) { v->free_device_list(list); }

const char *umbp_device_name(struct umbp_verbs *v, struct ibv_device **list, int i) { return v->get_device_name(list[i]); }

int umbp_open(struct umbp_verbs *v, struct ibv_device **list, int i, struct ibv_context **ctx)
{
	errno = 0;
	*ctx = v->open_device(list[i]);
	return made(*ctx);
}

int umbp_close(struct umbp_verbs *v, struct ibv_context *ctx)
{
	errno = 0;
	return failed(v->close_device(ctx));
}

int umbp_query_device(struct umbp_verbs *v, struct ibv_context *ctx, struct ibv_device_attr *attr)
{
	errno = 0;
	return failed(v->query_device(ctx, attr));
}

// umbp_query_port does what the header's macro ibv_query_port does, which would have to be linked with the library.
int umbp_query_port(struct umbp_verbs *v, struct ibv_context *ctx, uint8_t port, struct ibv_port_attr *attr)
{
	struct verbs_context *vctx = verbs_get_ctx_op(ctx, query_port);

	errno = 0;
	memset(attr, 0, sizeof *attr);
	if (vctx)
		return failed(vctx->query_port(ctx, port, attr, sizeof *attr));
	return failed(v->query_port(ctx, port, (struct _compat_ibv_port_attr *)attr));
}

int umbp_query_gid(struct umbp_verbs *v, struct ibv_context *ctx, uint32_t port, uint32_t index, struct ibv_gid_entry *gid)
{
	errno = 0;
	return failed(v->query_gid_ex(ctx, port, index, gid, 0, sizeof *gid));
}

// umbp_event takes one asynchronous event. It acknowledges it at once: an object cannot be destroyed before its events
// are acknowledged, so until then, and no longer, what the event points to exists.
int umbp_event(struct umbp_verbs *v, struct ibv_context *ctx, struct umbp_event *event)
{
	struct ibv_async_event e;

	errno = 0;
	int error = failed(v->get_async_event(ctx, &e));
	if (error)
		return error;
	memset(event, 0, sizeof *event);
	event->type = e.event_type;
	event->text = v->event_type_str(e.event_type);
	switch (e.event_type) {
	case IBV_EVENT_CQ_ERR:
		event->cq = (uintptr_t)e.element.cq->cq_context;
		break;
	case IBV_EVENT_QP_FATAL:
	case IBV_EVENT_QP_REQ_ERR:
	case IBV_EVENT_QP_ACCESS_ERR:
	case IBV_EVENT_COMM_EST:
	case IBV_EVENT_SQ_DRAINED:
	case IBV_EVENT_PATH_MIG:
	case IBV_EVENT_PATH_MIG_ERR:
	case IBV_EVENT_QP_LAST_WQE_REACHED:
		event->qpn = e.element.qp->qp_num;
		break;
	case IBV_EVENT_PORT_ACTIVE:
	case IBV_EVENT_PORT_ERR:
	case IBV_EVENT_LID_CHANGE:
	case IBV_EVENT_PKEY_CHANGE:
	case IBV_EVENT_SM_CHANGE:
	case IBV_EVENT_CLIENT_REREGISTER:
	case IBV_EVENT_GID_CHANGE:
		event->port = e.element.port_num;
		break;
	default: // of the device, or of an object that this package does not make
		break;
	}
	v->ack_async_event(&e);
	return 0;
}

int umbp_alloc_pd(struct umbp_verbs *v, struct ibv_context *ctx, struct ibv_pd **pd)
{
	errno = 0;
	*pd = v->alloc_pd(ctx);
	return made(*pd);
}

int umbp_dealloc_pd(struct umbp_verbs *v, struct ibv_pd *pd)
{
	errno = 0;
	return failed(v->dealloc_pd(pd));
}

int umbp_register(struct umbp_verbs *v, struct ibv_pd *pd, void *addr, size_t length, int access, struct ibv_mr **mr)
{
	errno = 0;
	*mr = v->reg_mr(pd, addr, length, access);
	return made(*mr);
}

int umbp_deregister(struct umbp_verbs *v, struct ibv_mr *mr)
{
	errno = 0;
	return failed(v->dereg_mr(mr));
}

int umbp_create_channel(struct umbp_verbs *v, struct ibv_context *ctx, struct ibv_comp_channel **channel)
{
	errno = 0;
	*channel = v->create_comp_channel(ctx);
	return made(*channel);
}

int umbp_destroy_channel(struct umbp_verbs *v, struct ibv_comp_channel *channel)
{
	errno = 0;
	return failed(v->destroy_comp_channel(channel));
}

int umbp_create_cq(struct umbp_verbs *v, struct ibv_context *ctx, int entries, uintptr_t name, struct ibv_comp_channel *channel, struct ibv_cq **cq)
{
	errno = 0;
	*cq = v->create_cq(ctx, entries, (void *)name, channel, 0);
	return made(*cq);
}

int umbp_destroy_cq(struct umbp_verbs *v, struct ibv_cq *cq)
{
	errno = 0;
	return failed(v->destroy_cq(cq));
}

int umbp_poll(struct ibv_cq *cq, struct umbp_completion *out, int *n)
{
	struct ibv_wc wcs[UMBP_MAX_POLL];

	errno = 0;
	int got = ibv_poll_cq(cq, UMBP_MAX_POLL, wcs);
	if (got < 0) // how far below zero means nothing
		return errno ? errno : EIO;
	for (int i = 0; i < got; i++)
		out[i] = (struct umbp_completion){
			.id = wcs[i].wr_id,
			.qpn = wcs[i].qp_num,
			.status = wcs[i].status,
			.vendor = wcs[i].vendor_err,
		};
	*n = got;
	return 0;
}

int umbp_arm(struct ibv_cq *cq)
{
	errno = 0;
	return failed(ibv_req_notify_cq(cq, 0));
}

// umbp_cq_event takes one completion event, or returns EAGAIN. It acknowledges it at once: a CQ cannot be destroyed
// before.
int umbp_cq_event(struct umbp_verbs *v, struct ibv_comp_channel *channel)
{
	struct ibv_cq *cq;
	void *name;

	errno = 0;
	int error = failed(v->get_cq_event(channel, &cq, &name));
	if (!error)
		v->ack_cq_events(cq, 1);
	return error;
}

// umbp_create_qp makes an RC queue pair. cap becomes what was granted.
int umbp_create_qp(struct umbp_verbs *v, struct ibv_pd *pd, struct ibv_cq *cq, struct ibv_qp_cap *cap, struct umbp_sq **sq)
{
	struct ibv_qp_init_attr attr = {
		.send_cq = cq,
		.recv_cq = cq,
		.cap = *cap,
		.qp_type = IBV_QPT_RC,
		.sq_sig_all = 0,
	};

	errno = 0;
	struct ibv_qp *qp = v->create_qp(pd, &attr);
	if (!qp)
		return made(qp);
	*cap = attr.cap;
	*sq = calloc(1, sizeof **sq + attr.cap.max_send_wr * sizeof(struct ibv_send_wr));
	if (!*sq) {
		v->destroy_qp(qp);
		return ENOMEM;
	}
	(*sq)->qp = qp;
	(*sq)->room = attr.cap.max_send_wr;
	return 0;
}

int umbp_modify_qp(struct umbp_verbs *v, struct umbp_sq *sq, struct ibv_qp_attr *attr, int mask)
{
	errno = 0;
	return failed(v->modify_qp(sq->qp, attr, mask));
}

int umbp_destroy_qp(struct umbp_verbs *v, struct umbp_sq *sq)
{
	errno = 0;
	int error = failed(v->destroy_qp(sq->qp));
	if (!error)
		free(sq);
	return error;
}

// umbp_post hands a chain to the device with one ibv_post_send. Nothing is posted of a chain that is not well formed.
// A chain that is longer than the send queue is posted as far as the queue goes.
struct umbp_posted umbp_post(struct umbp_sq *sq, const struct umbp_wr *wrs, size_t n, struct ibv_sge *sges, size_t nsges)
{
	size_t m = n < sq->room ? n : sq->room;
	struct ibv_send_wr *bad = NULL;

	for (size_t i = 0; i < m; i++) {
		const struct umbp_wr *from = &wrs[i];
		struct ibv_send_wr *to = &sq->wrs[i];

		if (from->op > UMBP_READ || from->first_sge > nsges || from->sges > nsges - from->first_sge)
			return (struct umbp_posted){0, EINVAL};
		to->wr_id = from->id;
		to->next = i + 1 < m ? to + 1 : NULL;
		to->sg_list = from->sges ? &sges[from->first_sge] : NULL;
		to->num_sge = from->sges;
		to->opcode = from->op == UMBP_READ ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE;
		to->send_flags = from->signaled ? IBV_SEND_SIGNALED : 0;
		to->wr.rdma.remote_addr = from->remote;
		to->wr.rdma.rkey = from->rkey;
	}
	if (m == 0)
		return (struct umbp_posted){0, n ? ENOMEM : 0};
	errno = 0;
	int error = failed(ibv_post_send(sq->qp, sq->wrs, &bad));
	if (!error)
		return (struct umbp_posted){m, m < n ? ENOMEM : 0};
	// A driver that does not say which one was bad may have taken them all.
	if (bad >= sq->wrs && bad < sq->wrs + m)
		m = bad - sq->wrs;
	return (struct umbp_posted){m, error};
}
