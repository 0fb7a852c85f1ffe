// What Go calls in C. The functions that return an int return zero or an errno.

#ifndef UMBP_VERBS_H
#define UMBP_VERBS_H

#include <infiniband/verbs.h>

#define UMBP_MAX_POLL 64

// struct umbp_wr is device.WR.
struct umbp_wr {
	uint64_t id;
	uint64_t remote;
	uint32_t rkey;
	uint32_t first_sge;
	uint16_t sges;
	uint8_t op;
	uint8_t signaled;
	uint32_t unused;
};

enum { UMBP_WRITE, UMBP_READ };

// struct umbp_completion is device.Completion.
struct umbp_completion {
	uint64_t id;
	uint32_t qpn;
	uint32_t status;
	uint32_t vendor;
};

// struct umbp_event is an asynchronous event. What does not belong to it is zero.
struct umbp_event {
	int type;
	int port;
	uint32_t qpn;
	uintptr_t cq;
	const char *text; // static
};

// The functions that the library must have, without "ibv_".
#define UMBP_SYMBOLS(X)                                                                              \
	X(get_device_list) X(free_device_list) X(get_device_name) X(open_device) X(close_device)         \
	X(query_device) X(query_port) X(alloc_pd) X(dealloc_pd) X(reg_mr) X(dereg_mr)                    \
	X(create_comp_channel) X(destroy_comp_channel) X(create_cq) X(destroy_cq) X(get_cq_event)        \
	X(ack_cq_events) X(create_qp) X(modify_qp) X(destroy_qp) X(get_async_event) X(ack_async_event)   \
	X(event_type_str) X(fork_init)

// struct umbp_verbs is the library as it was loaded. It stays loaded.
struct umbp_verbs {
#define X(name) __typeof__(ibv_##name) *name;
	UMBP_SYMBOLS(X)
#undef X
	__typeof__(_ibv_query_gid_ex) *query_gid_ex;
	__typeof__(ibv_is_fork_initialized) *is_fork_initialized; // NULL before version 35
	char path[512];                                           // of the library's file
	char missing[512];                                        // what kept it from being loaded
};

// struct umbp_sq is a queue pair with scratch memory for one chain.
struct umbp_sq {
	struct ibv_qp *qp;
	uint32_t room;
	struct ibv_send_wr wrs[];
};

// struct umbp_posted says how many work requests of a chain the device took, and why it did not take the others.
struct umbp_posted {
	uint32_t taken;
	int error;
};

int umbp_load(struct umbp_verbs *v, const char *name);
enum ibv_fork_status umbp_fork(struct umbp_verbs *v);

int umbp_devices(struct umbp_verbs *v, struct ibv_device ***list, int *n);
void umbp_free_devices(struct umbp_verbs *v, struct ibv_device **list);
const char *umbp_device_name(struct umbp_verbs *v, struct ibv_device **list, int i);
int umbp_open(struct umbp_verbs *v, struct ibv_device **list, int i, struct ibv_context **ctx);
int umbp_close(struct umbp_verbs *v, struct ibv_context *ctx);
int umbp_query_device(struct umbp_verbs *v, struct ibv_context *ctx, struct ibv_device_attr *attr);
int umbp_query_port(struct umbp_verbs *v, struct ibv_context *ctx, uint8_t port, struct ibv_port_attr *attr);
int umbp_query_gid(struct umbp_verbs *v, struct ibv_context *ctx, uint32_t port, uint32_t index, struct ibv_gid_entry *gid);
int umbp_event(struct umbp_verbs *v, struct ibv_context *ctx, struct umbp_event *event);

int umbp_alloc_pd(struct umbp_verbs *v, struct ibv_context *ctx, struct ibv_pd **pd);
int umbp_dealloc_pd(struct umbp_verbs *v, struct ibv_pd *pd);
int umbp_register(struct umbp_verbs *v, struct ibv_pd *pd, void *addr, size_t length, int access, struct ibv_mr **mr);
int umbp_deregister(struct umbp_verbs *v, struct ibv_mr *mr);

int umbp_create_channel(struct umbp_verbs *v, struct ibv_context *ctx, struct ibv_comp_channel **channel);
int umbp_destroy_channel(struct umbp_verbs *v, struct ibv_comp_channel *channel);
int umbp_create_cq(struct umbp_verbs *v, struct ibv_context *ctx, int entries, uintptr_t name, struct ibv_comp_channel *channel, struct ibv_cq **cq);
int umbp_destroy_cq(struct umbp_verbs *v, struct ibv_cq *cq);
int umbp_poll(struct ibv_cq *cq, struct umbp_completion *out, int *n);
int umbp_arm(struct ibv_cq *cq);
int umbp_cq_event(struct umbp_verbs *v, struct ibv_comp_channel *channel);

int umbp_create_qp(struct umbp_verbs *v, struct ibv_pd *pd, struct ibv_cq *cq, struct ibv_qp_cap *cap, struct umbp_sq **sq);
int umbp_modify_qp(struct umbp_verbs *v, struct umbp_sq *sq, struct ibv_qp_attr *attr, int mask);
int umbp_destroy_qp(struct umbp_verbs *v, struct umbp_sq *sq);
struct umbp_posted umbp_post(struct umbp_sq *sq, const struct umbp_wr *wrs, size_t n, struct ibv_sge *sges, size_t nsges);

#endif
