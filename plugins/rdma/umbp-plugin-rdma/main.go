// Umbp-plugin-rdma runs the backend of package rdma as a process of its own. See package serve.
package main

import (
	"github.com/umbp/umbp/plugin-sdk/serve"
	"github.com/umbp/umbp/plugins/rdma"
	"github.com/umbp/umbp/plugins/rdma/verbs"
)

func main() { serve.Main(rdma.Factory(verbs.Library())) }
