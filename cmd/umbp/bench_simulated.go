package main

import (
	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugins/rdma"
	"github.com/umbp/umbp/plugins/rdma/verbstest"
)

// simulation is a backend over simulated devices. What it opens reaches only what it has opened.
type simulation struct {
	factory backend.Factory
	still   func() // from then on no bytes move
}

// simulations make simulations, by the name of the backend. The devices move bytes until they are told not to: a
// connection proves itself by them.
var simulations = map[string]func() simulation{
	"rdma-simulated": func() simulation {
		fabric := verbstest.New(verbstest.Config{Instant: true})
		return simulation{rdma.Factory(fabric), func() { fabric.SetNoBytes(true) }}
	},
}
