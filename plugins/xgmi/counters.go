package xgmi

import (
	"sync/atomic"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// counts is what an engine has done.
type counts struct {
	copies, copies2D, batches, batchedCopies, events atomic.Uint64
	imports, importsClosed                           atomic.Uint64
	selfTests, selfTestsFailed                       atomic.Uint64
}

// list returns the counts by name.
func (c *counts) list() []backend.Count {
	return []backend.Count{
		{Name: "copies", Value: c.copies.Load()}, // calls for one piece
		{Name: "copies_2d", Value: c.copies2D.Load()},
		{Name: "batches", Value: c.batches.Load()},
		{Name: "batched_copies", Value: c.batchedCopies.Load()}, // pieces in batches
		{Name: "events", Value: c.events.Load()},
		{Name: "imports", Value: c.imports.Load()},
		{Name: "imports_closed", Value: c.importsClosed.Load()},
		{Name: "self_tests", Value: c.selfTests.Load()},
		{Name: "self_tests_failed", Value: c.selfTestsFailed.Load()},
	}
}
