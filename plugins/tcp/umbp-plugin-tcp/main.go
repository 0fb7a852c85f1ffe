// Umbp-plugin-tcp runs the backend of package tcp as a process of its own. See package serve.
package main

import (
	"github.com/umbp/umbp/plugin-sdk/serve"
	"github.com/umbp/umbp/plugins/tcp"
)

func main() { serve.Main(tcp.Factory) }
