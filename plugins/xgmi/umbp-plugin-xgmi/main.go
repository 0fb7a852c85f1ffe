// Umbp-plugin-xgmi runs the backend of package xgmi as a process of its own. See package serve.
package main

import (
	"github.com/umbp/umbp/plugin-sdk/serve"
	"github.com/umbp/umbp/plugins/xgmi"
)

func main() { serve.Main(xgmi.Factory) }
