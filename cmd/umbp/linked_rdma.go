//go:build rdma

package main

import (
	"github.com/umbp/umbp/plugins/rdma"
	"github.com/umbp/umbp/plugins/rdma/verbs"
)

// With the tag rdma the backend is linked in, for which the build needs cgo. Without it, it runs as a process.
func init() { factories = append(factories, rdma.Factory(verbs.Library())) }
