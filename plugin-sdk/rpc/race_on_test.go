//go:build race

package rpc_test

// raceEnabled: under the race detector sync.Pool forgets some of what it holds, so that allocations cannot be counted.
const raceEnabled = true
