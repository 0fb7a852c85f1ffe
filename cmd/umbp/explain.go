package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

func (a *app) explainCommand() *cobra.Command {
	var size, memory string
	var limit int
	cmd := &cobra.Command{
		Use:   "explain KEY...",
		Short: "Show how keys would move: groups, segments, the backend of each, and why not another",
		Long: `explain plans a batch as the client would, and moves nothing: a get of the keys, or, with --size, a
put of values of that size. For each group it names the backend that would carry it, and for each other backend
the reason why it would not. With --memory gpu, the caller's buffer lies in a GPU's memory.

` + exitHelp,
		Args: minArgs(1),
		RunE: func(cmd *cobra.Command, keys []string) error {
			if limit < 0 {
				return &usageError{fmt.Errorf("--limit %d is negative", limit)}
			}
			var bytes backend.Size
			if size != "" {
				var err error
				if bytes, err = backend.ParseSize(size); err != nil || bytes == 0 {
					return &usageError{fmt.Errorf("--size %s: write a number of bytes with a unit, such as 64KiB", size)}
				}
			}
			buffer, err := parsePlace(memory)
			if err != nil {
				return &usageError{fmt.Errorf("--memory %w", err)}
			}
			return a.withClient(cmd.Context(), a.source(cmd), cmd.ErrOrStderr(), func(cl *cluster, p *poolClient) error {
				at, err := buffer.find(cl.config.GPU)
				if err != nil {
					return err
				}
				return a.explain(cmd, p, keys, uint64(bytes), core.ExplainOptions{Place: at, Limit: limit})
			})
		},
	}
	cmd.Flags().StringVar(&size, "size", "", "explain a put of values of this `size`")
	cmd.Flags().StringVar(&memory, "memory", "host", "`place` of the caller's values: "+placeHelp)
	config.AddFlags(cmd.Flags(), "gpu.runtime", "gpu.library")
	cmd.Flags().IntVar(&limit, "limit", 8, "spell out no more than so many groups, segments and keys; 0 spells out all")
	return a.client(a.listing(cmd))
}

func (a *app) explain(cmd *cobra.Command, p *poolClient, keys []string, size uint64, opts core.ExplainOptions) error {
	var e *core.Explanation
	var err, left error
	if size == 0 {
		// The explanation leaves out what cannot be got. Here it is an error as for a get.
		left = failures(keys, p.Exists(cmd.Context(), keys...))
		e, err = p.ExplainGet(cmd.Context(), keys, opts)
	} else {
		sizes := make([]uint64, len(keys))
		for i := range sizes {
			sizes[i] = size
		}
		e, err = p.ExplainPut(cmd.Context(), keys, sizes, opts)
	}
	switch {
	case err != nil:
		return err
	case a.json:
		err = printJSON(cmd.OutOrStdout(), e)
	default:
		err = e.WriteText(cmd.OutOrStdout())
	}
	return errors.Join(err, left)
}
