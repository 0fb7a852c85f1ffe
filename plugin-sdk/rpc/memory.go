package rpc

import (
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/proto/backendpb"
)

// Limits of memory by messages.
const (
	maxMemoryBytes    = 1 << 20 // in one request
	maxMemoryRequests = 16      // without an answer
)

// serveMemory carries out a plugin's request for memory that it does not map. It is called by one goroutine.
func (c *Client) serveMemory(q *backendpb.MemoryRequest) *backendpb.MemoryReply {
	reply := &backendpb.MemoryReply{Id: q.GetId()}
	offset, length := q.GetOffset(), q.GetLength()
	fault := func(text string) *backendpb.MemoryReply {
		err := c.errorf(backend.BadRequest, "memory", "%s", text)
		err.Region, err.Offset, err.Length = backend.RegionID(q.GetRegion()), offset, length
		reply.Error = errorOut(err)
		return reply
	}
	c.mu.RLock()
	r := c.regions[backend.RegionID(q.GetRegion())]
	c.mu.RUnlock()
	switch {
	case r == nil:
		return fault("the region is not registered")
	case length == 0 || length > maxMemoryBytes:
		return fault("a request is for at least one byte, and at most 1 MiB")
	case q.GetStore() && uint64(len(q.GetData())) != length:
		return fault("the length is not that of the data")
	}
	r.mu.RLock() // revoke waits until it is through
	defer r.mu.RUnlock()
	size := uint64(len(r.bytes))
	if length > size || offset > size-length {
		return fault("the range is not within the region")
	}
	if part := r.bytes[offset:][:length]; q.GetStore() {
		copy(part, q.GetData())
	} else {
		reply.Data = append([]byte(nil), part...)
	}
	return reply
}
