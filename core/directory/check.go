package directory

import (
	"context"
	"math"
	"unicode/utf8"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// The bounds of what a directory accepts. What lies beyond them is refused with BadRequest, except one node too
// many, which is refused with Busy.
const (
	MaxKey   = 1024 // bytes in a key, which may be any bytes; at least one
	MaxName  = 255  // bytes in a node's name, host and address
	MaxNodes = 4096 // members
)

// The bounds of a listing.
const (
	defaultLimit = 1000
	maxLimit     = 10_000
)

// The checks below are made by Memory, and by Client before it sends: a mistake is reported in the same words,
// with the index that the caller knows, on either side of the wire.

func (r *PublishRequest) check(ctx context.Context) error {
	return checkBatch(ctx, "publish", r.Keys, len(r.Sizes))
}

func (r *WithdrawRequest) check(ctx context.Context) error {
	return checkBatch(ctx, "withdraw", r.Keys, len(r.Keys))
}

func (r *LocateRequest) check(ctx context.Context) error {
	return checkBatch(ctx, "locate", r.Keys, len(r.Keys))
}

func (r *PlaceRequest) check(ctx context.Context) error {
	if len(r.Exclude) > MaxNodes {
		return badRequest("place", "%d nodes are excluded; the limit is %d", len(r.Exclude), MaxNodes)
	}
	return checkBatch(ctx, "place", r.Keys, len(r.Sizes))
}

// checkBatch checks what all calls with keys have in common.
func checkBatch(ctx context.Context, op string, keys []string, sizes int) error {
	if sizes != len(keys) {
		return badRequest(op, "%d keys come with %d sizes", len(keys), sizes)
	}
	for i, key := range keys {
		switch {
		case len(key) == 0:
			return badRequest(op, "key %d of %d is empty", i, len(keys))
		case len(key) > MaxKey:
			return badRequest(op, "key %d of %d is %d bytes long; the limit is %d", i, len(keys), len(key), MaxKey)
		}
	}
	return checkContext(ctx, op)
}

func (r *ListRequest) check(ctx context.Context) error {
	if r.Limit < 0 {
		return badRequest("list", "the limit is %d", r.Limit)
	}
	if len(r.Prefix) > MaxKey || len(r.After) > MaxKey {
		return badRequest("list", "the prefix or the key to start after is longer than %d bytes", MaxKey)
	}
	return checkContext(ctx, "list")
}

// check refuses a node that could not be told from others, or that could not be sent to them.
func (n *Node) check(ctx context.Context) error {
	if n.Peer.Node == "" || n.Peer.Incarnation == 0 {
		return badRequest("join", "the node has no name or no incarnation: %s", n.Peer)
	}
	for _, s := range []string{n.Peer.Node, n.Peer.Host, n.Address} {
		if len(s) > MaxName || !utf8.ValidString(s) {
			return badRequest("join", "%.64q is longer than %d bytes or is not UTF-8", s, MaxName)
		}
	}
	return checkContext(ctx, "join")
}

func checkContext(ctx context.Context, op string) error {
	if err := ctx.Err(); err != nil {
		return &backend.Error{Code: backend.Cancelled, Op: op, Err: err}
	}
	return nil
}

func badRequest(op, format string, args ...any) error {
	err := backend.Errorf(backend.BadRequest, format, args...)
	err.Op = op
	return err
}

// addSizes adds sizes in bytes. A sum that no integer can hold is more than any node has: it stays at the top.
func addSizes(a, b uint64) uint64 {
	if a > math.MaxUint64-b {
		return math.MaxUint64
	}
	return a + b
}
