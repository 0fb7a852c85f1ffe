package core_test

import (
	"bytes"
	"context"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// silent is a node that does not answer as long as it has the name.
type silent struct {
	peer.Service
	name *atomic.Pointer[string]
}

func (s silent) wait(ctx context.Context) error {
	name := s.name.Load()
	if name == nil {
		return nil
	}
	if d, err := s.Describe(ctx); err != nil || d.Peer.Node != *name {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}

func (s silent) Allocate(ctx context.Context, req *peer.AllocateRequest, reply *peer.AllocateReply) error {
	if err := s.wait(ctx); err != nil {
		return err
	}
	return s.Service.Allocate(ctx, req, reply)
}

func (s silent) Resolve(ctx context.Context, req *peer.ResolveRequest, reply *peer.ResolveReply) error {
	if err := s.wait(ctx); err != nil {
		return err
	}
	return s.Service.Resolve(ctx, req, reply)
}

// TestSilentNode: a node that does not answer fails its own values, and no others, and leaves time to put what was
// meant for it elsewhere. The test has a clock of its own, which does not wait.
func TestSilentNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var name atomic.Pointer[string]
		c := newCluster(t, shape{nodes: 2, client: verifyAll, dial: func(s peer.Service) peer.Service { return silent{s, &name} }})
		list := items(c.alloc(1<<20), slices.Repeat([]int{10_000}, 8), 1)
		results := c.client.BatchPut(t.Context(), list)
		is(t, core.Stored, results...)

		silentNode := "node-0"
		name.Store(&silentNode)
		ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
		defer cancel()
		into := buffers(c.alloc(1<<20), list, 0)
		for i, r := range c.client.BatchGet(ctx, into) {
			if results[i].Path.Node == silentNode {
				refused(t, r, core.Failed, backend.PathDown, "no answer within 5s")
			} else if r.Status != core.Found || !bytes.Equal(into[i].Value, list[i].Value) {
				t.Errorf("get %d, which the other node has: %+v", i, r)
			}
		}
		for i := range list {
			list[i].Key += "-more"
		}
		for i, r := range c.client.BatchPut(ctx, list) {
			if r.Status != core.Stored || r.Path.Node != "node-1" {
				t.Errorf("put %d: %+v", i, r)
			}
		}

		// When it is the caller who has no time, that is what the error says.
		short, stop := context.WithTimeout(t.Context(), time.Second)
		defer stop()
		refused(t, c.client.BatchGet(short, into[:1])[0], core.Failed, backend.Cancelled, "deadline exceeded")
	})
}
