// Umbp-plugin-shm runs the backend of package shm as a process of its own. See package serve.
package main

import (
	"github.com/umbp/umbp/plugin-sdk/serve"
	"github.com/umbp/umbp/plugins/shm"
)

func main() { serve.Main(shm.Factory) }
