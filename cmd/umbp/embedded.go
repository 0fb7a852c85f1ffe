package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/region"
)

// embedded is a cluster within the process: a directory, nodes, and a client. The control plane is function calls;
// the bytes go through real backends.
type embedded struct {
	directory *directory.Memory
	nodes     []*core.Node
	device    *gpuDevice // that the pools lie on; nil for the host
	client    *poolClient
	closers   []func() error // run last first
}

// ownLease is how long a node stays a member of a directory in its own process without a sign of life. That process may
// stand still where the machine is busy, and loses both or none.
const ownLease = time.Minute

// openEmbedded starts so many nodes, each with a pool of poolSize bytes in pages of pageSize.
func openEmbedded(
	ctx context.Context, c *config.Config, nodes int, pool place, poolSize, pageSize uint64, log hclog.Logger,
) (_ *embedded, err error) {
	e := &embedded{directory: directory.NewMemory(directory.Options{TTL: ownLease})}
	e.closers = append(e.closers, e.directory.Close)
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	if e.device, err = pool.open(c.GPU); err != nil {
		return nil, err
	}
	if e.device != nil {
		e.closers = append(e.closers, e.device.Close)
	}
	for i := range nodes {
		opts := core.NodeOptions{
			Directory: e.directory, Address: "in this process", PoolSize: poolSize, PageSize: pageSize,
			HugePages: region.HugePages(c.Pool.HugePages), Limits: limits(c), Log: log,
		}
		if e.device != nil {
			at, free, err := e.device.alloc(poolSize)
			if err != nil {
				return nil, err
			}
			e.closers = append(e.closers, free)
			opts.GPU = &at
		}
		engine, err := openEngine(ctx, c, fmt.Sprintf("node-%d", i), true, log)
		if err != nil {
			return nil, err
		}
		e.closers = append(e.closers, engine.Close)
		node, err := core.NewNode(ctx, engine, opts)
		if e.device != nil {
			err = needsGPUBackend(err)
		}
		if err != nil {
			return nil, err
		}
		e.closers = append(e.closers, func() error {
			leaving, cancel := context.WithTimeout(context.Background(), closeTimeout)
			defer cancel()
			return node.Close(leaving)
		})
		if err := node.Start(ctx); err != nil {
			return nil, err
		}
		e.nodes = append(e.nodes, node)
	}
	engine, err := openEngine(ctx, c, "client", false, log)
	if err != nil {
		return nil, err
	}
	client, err := core.NewPoolClient(ctx, core.ClientOptions{
		Engine: engine, Directory: e.directory, Dial: core.DialLocal(nil, e.nodes...), Tuning: tuning(c),
	})
	if err != nil {
		return nil, errors.Join(err, engine.Close())
	}
	e.client = &poolClient{client, engine}
	e.closers = append(e.closers, e.client.Close)
	return e, nil
}

func (e *embedded) Close() error {
	var errs []error
	for i := len(e.closers) - 1; i >= 0; i-- {
		errs = append(errs, e.closers[i]())
	}
	return errors.Join(errs...)
}
