package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// nodeStatus is one row of umbp status.
type nodeStatus struct {
	Node             string  `json:"node"`
	Incarnation      string  `json:"incarnation"`
	Address          string  `json:"address"`
	Host             string  `json:"host"`
	Memory           string  `json:"memory,omitempty"` // of the pool: host or gpu
	Device           string  `json:"device,omitempty"` // PCI address of the GPU
	Reachable        bool    `json:"reachable"`
	Error            string  `json:"error,omitempty"`
	CapacityBytes    uint64  `json:"capacity_bytes"`
	FreeBytes        uint64  `json:"free_bytes"`
	PageBytes        uint64  `json:"page_bytes"`
	Keys             uint64  `json:"keys"`
	PendingSlots     uint64  `json:"pending_slots"`
	Leases           uint64  `json:"leases"`
	QuarantinedPages uint64  `json:"quarantined_pages"`
	Evictions        uint64  `json:"evictions"`
	Fragmentation    float64 `json:"fragmentation"`
}

func (a *app) statusCommand() *cobra.Command {
	return a.client(a.listing(&cobra.Command{
		Use:   "status",
		Short: "Show the nodes of the cluster and the state of their pools",
		Long: `status asks the directory for the nodes, and each node for the state of its pool. A node that does not
answer is listed until its membership runs out (directory.lease).`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := a.connect(a.source(cmd), cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer cl.Close()
			ctx, cancel := context.WithTimeout(cmd.Context(), cl.config.Client.Timeout)
			defer cancel()
			nodes, err := cl.directory.Nodes(ctx)
			if err != nil {
				return fmt.Errorf("ask the directory at %s: %w", cl.address, err)
			}
			list := make([]nodeStatus, len(nodes))
			dial := core.DialControl(cl.config.TLS.Credentials())
			var asking sync.WaitGroup
			for i, n := range nodes {
				asking.Go(func() { list[i] = askNode(ctx, dial, n) })
			}
			asking.Wait()
			if a.json {
				return printJSON(cmd.OutOrStdout(), list)
			}
			if len(list) == 0 {
				tell(cmd, "no node has joined the directory at %s; \"umbp serve --directory.address %[1]s\" starts one", cl.address)
				return nil
			}
			var rows [][]string
			for _, n := range list {
				state := "up"
				if !n.Reachable {
					state = "unreachable: " + n.Error
				}
				rows = append(rows, []string{
					n.Node, n.Address, strings.TrimSpace(n.Memory + " " + n.Device), humanSize(n.CapacityBytes), humanSize(n.FreeBytes), fmt.Sprint(n.Keys),
					fmt.Sprint(n.Evictions), fmt.Sprintf("%.2f", n.Fragmentation), state,
				})
			}
			return printTable(cmd.OutOrStdout(), []string{"NODE", "ADDRESS", "MEMORY", "POOL", "FREE", "KEYS", "EVICTED", "FRAGMENTATION", "STATE"}, rows)
		},
	}))
}

// answerTimeout bounds the wait for one node: what has not answered by then is told as unreachable.
const answerTimeout = 3 * time.Second

// poolOf returns the region that a node's pool is.
func poolOf(ctx context.Context, node peer.Service) (region.Descriptor, error) {
	d, err := node.Describe(ctx)
	switch {
	case err != nil:
		return region.Descriptor{}, err
	case len(d.Regions) == 0:
		return region.Descriptor{}, backend.Errorf(backend.Internal, "the node describes no pool")
	}
	return d.Regions[0], nil
}

func askNode(ctx context.Context, dial core.Dial, n directory.Node) nodeStatus {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	s := nodeStatus{
		Node: n.Peer.Node, Incarnation: fmt.Sprintf("%x", n.Peer.Incarnation), Address: n.Address, Host: n.Peer.Host,
		CapacityBytes: n.Capacity, FreeBytes: n.Free,
	}
	var pool region.Descriptor
	stats, err := func() (*peer.Stats, error) {
		service, hangUp, err := dial(ctx, n)
		if err != nil {
			return nil, err
		}
		defer hangUp()
		if pool, err = poolOf(ctx, service); err != nil {
			return nil, err
		}
		return service.Stats(ctx)
	}()
	if err != nil {
		s.Error = err.Error()
		return s
	}
	s.Memory, s.Device = pool.Kind.String(), pool.Place
	s.Reachable = true
	s.FreeBytes, s.PageBytes = stats.FreePages*stats.PageSize, stats.PageSize
	s.Keys, s.PendingSlots, s.Leases = stats.Keys, stats.PendingSlots, stats.Leases
	s.QuarantinedPages, s.Evictions, s.Fragmentation = stats.QuarantinedPages, stats.Evictions, stats.Fragmentation
	return s
}
