// Package conformance tries whether a backend keeps the contract of package backend.
//
// A backend's own test is this:
//
//	func TestConformance(t *testing.T) {
//		conformance.Run(t, conformance.Harness{Factory: tcp.Factory})
//	}
//
// Each case opens two backends in this process, an initiator and a target, lends them memory, and tries one rule;
// Case.Rule says which, in words. What the backend claims in its Capabilities has to work, and what it does not
// claim has to be refused. No case asserts a time: Harness.Patience only bounds how long a case waits for
// something that must happen.
//
// The cases themselves are tested: this package's tests break a working backend in one way after another, and see
// each defect caught by the case whose rule it breaks.
package conformance

import (
	"context"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// TB is the part of testing.TB that the cases need. Fatalf ends the goroutine, and runs its deferred calls.
type TB interface {
	Helper()
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Harness says how to open the backend that is tried. Only Factory is needed.
type Harness struct {
	Factory backend.Factory
	// Options are the options that differ from their defaults, as in a configuration.
	Options map[string]string
	// Credentials and Insecure are handed to both ends.
	Credentials *backend.Credentials
	Insecure    bool
	// Host is the Peer.Host of both ends; "conformance" when it is empty.
	Host string
	// NewMemory lends memory to an end; SealedMemory when it is nil.
	NewMemory func(size int) (Memory, error)
	// Patience is how long a case waits for something that must happen; 20 s when it is zero.
	Patience time.Duration
	// NearEndOnly is for a backend that moves no bytes and knows no far end: memory is not compared, and the cases
	// that need a target are left out.
	NearEndOnly bool
}

func (h Harness) withDefaults() Harness {
	if h.Host == "" {
		h.Host = "conformance"
	}
	if h.NewMemory == nil {
		h.NewMemory = SealedMemory
	}
	if h.Patience == 0 {
		h.Patience = 20 * time.Second
	}
	return h
}

func (h Harness) open(ctx context.Context, self backend.Peer) (backend.Backend, error) {
	options, err := backend.CheckOptions(h.Factory.Options, h.Options)
	if err != nil {
		return nil, err
	}
	return h.Factory.Open(ctx, backend.Config{
		Self: self, Options: options, Credentials: h.Credentials, Insecure: h.Insecure,
	})
}

// Case tries one rule.
type Case struct {
	Name string
	// Rule is the sentence of the contract that is tried.
	Rule string
	// FarEnd says that the case makes sense only where there is a target.
	FarEnd bool
	run    func(*rig)
}

// Run tries the case on the harness. It may be called from any goroutine, but not at the same time as another
// case: some count the goroutines and descriptors of the process.
func (c Case) Run(tb TB, h Harness) {
	tb.Helper()
	r := newRig(tb, h.withDefaults())
	defer r.close()
	c.run(r)
}

// Run tries every case that applies to the harness, each as a subtest.
func Run(t *testing.T, h Harness) {
	t.Helper()
	for _, c := range Cases() {
		if c.FarEnd && h.NearEndOnly {
			continue
		}
		t.Run(c.Name, func(t *testing.T) {
			t.Logf("rule: %s", c.Rule)
			c.Run(t, h)
		})
	}
}

// Cases returns every case, in the order in which they are best tried: what the others rely on comes first.
func Cases() []Case {
	return []Case{
		{Name: "info", run: info,
			Rule: "Info names the backend and claims at least one operation, one kind of memory, and a window; it does not change."},

		{Name: "handshake/garbage", run: handshakeGarbage,
			Rule: "What is in offers and answers is untrusted: garbage is refused, with an identity, and harms nobody."},
		{Name: "handshake/abandon", run: handshakeAbandon,
			Rule: "A handshake that is abandoned leaves nothing behind, and does not stop the next one."},
		{Name: "handshake/expired", run: handshakeExpired,
			Rule: "Establish returns within the context's deadline, even one that has passed."},

		{Name: "region/twice", run: registerTwice,
			Rule: "A region id that is registered already is refused with BadRequest."},
		{Name: "region/kinds", run: registerKinds,
			Rule: "Memory of a kind that is not claimed is refused with Unsupported."},
		{Name: "region/clean-up", run: deregisterTwice,
			Rule: "Deregistering an unknown region is not an error, so that clean-up can be repeated."},
		{Name: "region/near-gone", run: deregisterNear,
			Rule: "After Deregister of the local region no transfer can use it."},
		{Name: "region/far-gone", FarEnd: true, run: deregisterFar,
			Rule: "After Deregister at the target no peer can touch the memory."},
		{Name: "region/waits", FarEnd: true, run: deregisterWaits,
			Rule: "Deregister returns when the transfers that used the region have completed, and nothing touches it any more."},

		{Name: "bytes/edges", FarEnd: true, run: bytesEdges,
			Rule: "A Done segment is entirely in place, and no other byte of either end has changed."},
		{Name: "bytes/random", FarEnd: true, run: bytesRandom,
			Rule: "A transfer of many scattered segments equals the copy of each."},
		{Name: "bytes/segments-reused", FarEnd: true, run: segmentsReused,
			Rule: "Transfer.Segments belongs to the backend only while Post runs."},
		{Name: "bytes/two-ways", FarEnd: true, run: bytesTwoWays,
			Rule: "A process may be initiator and target at once."},
		{Name: "limits", run: limits,
			Rule: "What the limits allow works; what exceeds them is refused by Post with BadRequest."},

		{Name: "refuse/ranges", run: refuseRanges,
			Rule: "A transfer with one bad range is refused by Post, before any byte has moved."},
		{Name: "refuse/operations", run: refuseOperations,
			Rule: "An operation that is not claimed is refused by Post."},
		{Name: "refuse/rights", run: refuseRights,
			Rule: "What the remote region's rights do not allow is refused with Denied, before any byte has moved."},
		{Name: "refuse/regions", run: refuseRegions,
			Rule: "A session needs a local region that is registered."},
		{Name: "refuse/forged", FarEnd: true, run: refuseForged,
			Rule: "The target decides: a descriptor with a forged size, key, right or region moves no byte."},

		{Name: "window/busy", run: windowBusy,
			Rule: "An endpoint accepts Window transfers, then says Busy, and accepts again after a completion."},
		{Name: "complete/once", run: completeOnce,
			Rule: "Each accepted Post is completed exactly once, under its cookie."},
		{Name: "complete/post-inside", run: completePostInside,
			Rule: "Complete may call Post on the same session."},
		{Name: "sessions/concurrent", run: sessionsConcurrent,
			Rule: "Every method may be called from any goroutine at any time."},

		{Name: "cancel/unknown", run: cancelUnknown,
			Rule: "Cancelling an unknown cookie is ignored."},
		{Name: "cancel/race", run: cancelRace,
			Rule: "A transfer that is cancelled, at whatever time and how often, completes once."},
		{Name: "cancel/early", FarEnd: true, run: cancelEarly,
			Rule: "Cancel makes a transfer end soon: what waits behind a long one is not carried out in full every time."},
		{Name: "cancel/quiet", FarEnd: true, run: cancelQuiet,
			Rule: "Completion means quiet: afterwards neither end of the transfer touches the initiator's memory."},

		{Name: "close/twice", run: closeTwice,
			Rule: "Closing a session, an endpoint or a backend twice is not an error, and nothing is accepted afterwards."},
		{Name: "close/session", run: closeSession,
			Rule: "Session.Close returns when what was in flight has completed, and the sink is not called afterwards."},
		{Name: "close/endpoint", run: closeEndpoint,
			Rule: "Endpoint.Close returns when what was in flight has completed; Done is closed."},
		{Name: "close/backend", run: closeBackend,
			Rule: "Backend.Close ends everything: transfers have completed, endpoints have failed, nothing is accepted."},
		{Name: "close/target", FarEnd: true, run: closeTarget,
			Rule: "When the target closes, its memory is quiet, and every transfer to it completes."},

		{Name: "fence/quiet", FarEnd: true, run: fenceQuiet,
			Rule: "When Fence has returned nil, nothing that the peer posted before can touch this process's memory."},
		{Name: "fence/stranger", run: fenceStranger,
			Rule: "A peer that never connected is fenced at once."},

		{Name: "incarnation/descriptor", run: incarnationDescriptor,
			Rule: "A remote region of another incarnation than the endpoint's peer is refused with PeerGone."},
		{Name: "incarnation/handshake", FarEnd: true, run: incarnationHandshake,
			Rule: "A connection to one incarnation cannot be made with an answer of another."},
		{Name: "incarnation/restart", FarEnd: true, run: incarnationRestart,
			Rule: "A peer that restarts is reached again under its new incarnation, and not under the old one."},

		{Name: "resources", run: resources,
			Rule: "When a backend is closed, its goroutines have ended and its descriptors are closed."},
	}
}
