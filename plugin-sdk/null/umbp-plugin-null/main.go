// Umbp-plugin-null runs the simulated backend of package null as a process of its own, for tests and benchmarks: what
// remains is the cost of the process edge. See package serve.
package main

import (
	"github.com/umbp/umbp/plugin-sdk/null"
	"github.com/umbp/umbp/plugin-sdk/serve"
)

func main() { serve.Main(null.Factory) }
