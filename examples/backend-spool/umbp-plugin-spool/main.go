// Command umbp-plugin-spool runs the spool backend as a process of its own, for umbp to start.
package main

import (
	spool "github.com/umbp/umbp/examples/backend-spool"
	"github.com/umbp/umbp/plugin-sdk/serve"
)

func main() { serve.Main(spool.Factory) }
