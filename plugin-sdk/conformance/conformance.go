// Package conformance tries whether a backend keeps the contract of package backend.
//
// A backend's own test is this:
//
//	func TestConformance(t *testing.T) {
//		conformance.Run(t, conformance.Harness{Factory: tcp.Factory})
//	}
//
// Each case opens two backends, an initiator and a target, lends them memory, of the host or of a GPU, and tries one
// rule; Rules says what the rules are. What the backend claims in its Capabilities has to work, and what it does not claim has to be refused. No
// case asserts a time: Harness.Patience only bounds how long a case waits for something that must happen.
//
// Case.Try runs a case without package testing. The command "umbp conformance" does so with plugins, which may be
// written in any language: their Factory starts a process for each end.
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

// DefaultPatience is so long that a machine that is only busy fails no case.
const DefaultPatience = time.Minute

// Harness says how to open the backend that is tried. Only Factory is needed.
type Harness struct {
	Factory backend.Factory
	// Options are the options that differ from their defaults, as in a configuration.
	Options map[string]string
	// Credentials and Insecure are handed to both ends.
	Credentials *backend.Credentials
	Insecure    bool
	// Log is handed to both ends; nil for none.
	Log backend.Logger
	// Host is the Peer.Host of both ends; "conformance" when it is empty.
	Host string
	// NewMemory lends memory to the initiator; SealedMemory when it is nil. NewFarMemory lends it to the target; NewMemory
	// when it is nil. A harness tries one pair of places: a backend that moves bytes between GPUs, or between a GPU and
	// the host, needs one for each pair. See GPUMemory.
	NewMemory, NewFarMemory func(size int) (Memory, error)
	// Patience is how long a case waits for something that must happen; DefaultPatience when it is zero. A call to the
	// backend is given up after twice that time.
	Patience time.Duration
	// NearEndOnly is for a backend that moves no bytes and knows no far end: memory is not compared, and the cases
	// that need a target are left out.
	NearEndOnly bool
	// Process returns the process that runs a backend of the Factory, or nil when it is linked in, as all are when
	// Process is nil. A case fails when such a process dies unasked, and some cases kill one. A backend whose process
	// is gone has to stay down.
	Process func(backend.Backend) Process
}

// Process is a plugin's process, as its host sees it.
type Process interface {
	// PID is its number on this machine, also after its end.
	PID() int
	// Died says why the process has ended, or is nil while it runs.
	Died() error
}

func (h Harness) withDefaults() Harness {
	if h.Host == "" {
		h.Host = "conformance"
	}
	if h.NewMemory == nil {
		h.NewMemory = SealedMemory
	}
	if h.NewFarMemory == nil {
		h.NewFarMemory = h.NewMemory
	}
	if h.Patience == 0 {
		h.Patience = DefaultPatience
	}
	if h.Process == nil {
		h.Process = func(backend.Backend) Process { return nil }
	}
	return h
}

func (h Harness) open(ctx context.Context, self backend.Peer) (backend.Backend, error) {
	options, err := backend.CheckOptions(h.Factory.Options, h.Options)
	if err != nil {
		return nil, err
	}
	return h.Factory.Open(ctx, backend.Config{
		Self: self, Options: options, Credentials: h.Credentials, Insecure: h.Insecure, Log: h.Log,
	})
}

// Case tries one rule.
type Case struct {
	Name string
	// Rule is the id of the rule that is tried.
	Rule string
	// FarEnd says that the case makes sense only where there is a target.
	FarEnd bool
	run    func(*rig)
}

// Verdict is how a case ended.
type Verdict string

// The verdicts.
const (
	Pass Verdict = "pass"
	Fail Verdict = "fail"
	Skip Verdict = "skip" // nothing could be tried, or not all
)

// Result is what came of a case.
type Result struct {
	Name    string  `json:"name"`
	Rule    string  `json:"rule"`
	Verdict Verdict `json:"result"`
	// Detail has a line or more for each failure; for a skipped case the reason; for others what is worth knowing.
	Detail string `json:"detail,omitempty"`
}

// Try runs the case on the harness. It may be called from any goroutine, but not at the same time as another case:
// some count the goroutines and descriptors of the process. A backend that does not return from a call, or from which
// something does not come, fails the case after Harness.Patience; what it still holds is then left behind.
func (c Case) Try(h Harness) Result {
	h = h.withDefaults()
	t := &trial{calls: map[uint64]call{}}
	if c.FarEnd && h.NearEndOnly {
		t.skipped = true
		t.Logf("the backend has no far end")
		return t.result(c)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r := newRig(t, h)
		defer r.close()
		r.setUp()
		c.run(r)
	}()
	t.supervise(ended, h.Patience)
	return t.result(c)
}

// Run tries every case that applies to the harness, each as a subtest.
func Run(t *testing.T, h Harness) {
	t.Helper()
	rules := map[string]string{}
	for _, rule := range Rules() {
		rules[rule.ID] = rule.Text
	}
	for _, c := range Cases() {
		t.Run(c.Name, func(t *testing.T) {
			t.Logf("%s: %s", c.Rule, rules[c.Rule])
			switch r := c.Try(h); r.Verdict {
			case Fail:
				t.Error(r.Detail)
			case Skip:
				t.Skip(r.Detail)
			default:
				t.Log(r.Detail)
			}
		})
	}
}

// Cases returns every case, in the order in which they are best tried: what the others rely on comes first.
func Cases() []Case {
	return []Case{
		{Name: "info", Rule: "info-fixed", run: info},

		{Name: "handshake/garbage", Rule: "handshake-untrusted", run: handshakeGarbage},
		{Name: "handshake/abandon", Rule: "handshake-abandoned", run: handshakeAbandon},
		{Name: "handshake/expired", Rule: "contexts-end", run: handshakeExpired},
		{Name: "contexts", Rule: "contexts-end", run: contexts},
		{Name: "reach", Rule: "claims-complete", run: reach},
		{Name: "links", Rule: "claims-complete", run: links},

		{Name: "region/twice", Rule: "region-ids", run: registerTwice},
		{Name: "region/ids", Rule: "region-ids", run: regionIDs},
		{Name: "region/kinds", Rule: "claims-complete", run: registerKinds},
		{Name: "region/no-descriptor", Rule: "descriptor-optional", run: noDescriptor},
		{Name: "region/clean-up", Rule: "deregister-again", run: deregisterTwice},
		{Name: "region/near-gone", Rule: "deregister-final", run: deregisterNear},
		{Name: "region/far-gone", Rule: "deregister-final", FarEnd: true, run: deregisterFar},
		{Name: "region/waits", Rule: "deregister-waits", FarEnd: true, run: deregisterWaits},

		{Name: "bytes/edges", Rule: "done-in-place", FarEnd: true, run: bytesEdges},
		{Name: "bytes/random", Rule: "done-in-place", FarEnd: true, run: bytesRandom},
		{Name: "bytes/segments-reused", Rule: "segments-not-kept", FarEnd: true, run: segmentsReused},
		{Name: "bytes/two-ways", Rule: "both-directions", FarEnd: true, run: bytesTwoWays},
		{Name: "counters", Rule: "counters-grow", run: counters},
		{Name: "bytes/post-wait", Rule: "post-wait", FarEnd: true, run: postWait},
		{Name: "limits", Rule: "limits-hold", run: limits},

		{Name: "refuse/ranges", Rule: "post-checks", run: refuseRanges},
		{Name: "refuse/harmless", Rule: "post-refusal-harmless", run: refuseHarmless},
		{Name: "refuse/operations", Rule: "claims-complete", run: refuseOperations},
		{Name: "refuse/rights", Rule: "session-rights", run: refuseRights},
		{Name: "refuse/regions", Rule: "session-near", run: refuseRegions},
		{Name: "refuse/forged", Rule: "target-decides", FarEnd: true, run: refuseForged},

		{Name: "window/busy", Rule: "window-busy", run: windowBusy},
		{Name: "window/room", Rule: "window-room", run: windowRoom},
		{Name: "window/never-blocks", Rule: "post-never-blocks", run: neverBlocks},
		{Name: "complete/once", Rule: "complete-once", run: completeOnce},
		{Name: "complete/cookies", Rule: "complete-once", run: completeCookies},
		{Name: "complete/post-inside", Rule: "complete-may-post", run: completePostInside},
		{Name: "concurrent/sessions", Rule: "any-goroutine", run: concurrentSessions},
		{Name: "concurrent/calls", Rule: "any-goroutine", run: concurrentCalls},

		{Name: "cancel/unknown", Rule: "cancel-unknown", run: cancelUnknown},
		{Name: "cancel/race", Rule: "cancel-once", run: cancelRace},
		{Name: "cancel/early", Rule: "cancel-soon", FarEnd: true, run: cancelEarly},
		{Name: "cancel/quiet", Rule: "completion-quiet", FarEnd: true, run: cancelQuiet},

		{Name: "close/twice", Rule: "close-again", run: closeTwice},
		{Name: "close/calls", Rule: "errors-identity", run: closeCalls},
		{Name: "close/session", Rule: "close-waits", run: closeSession},
		{Name: "close/endpoint", Rule: "close-waits", run: closeEndpoint},
		{Name: "close/backend", Rule: "close-waits", run: closeBackend},
		{Name: "close/outcomes", Rule: "outcomes-true", FarEnd: true, run: closeOutcomes},
		{Name: "close/other-endpoint", Rule: "endpoints-apart", run: closeOtherEndpoint},
		{Name: "close/target", Rule: "target-close", FarEnd: true, run: closeTarget},

		{Name: "fence/quiet", Rule: "fence-quiet", FarEnd: true, run: fenceQuiet},
		{Name: "fence/stranger", Rule: "fence-stranger", run: fenceStranger},

		{Name: "incarnation/descriptor", Rule: "incarnation-checked", run: incarnationDescriptor},
		{Name: "incarnation/handshake", Rule: "incarnation-checked", FarEnd: true, run: incarnationHandshake},
		{Name: "incarnation/restart", Rule: "peer-restart", FarEnd: true, run: incarnationRestart},

		{Name: "death/target", Rule: "peer-death", FarEnd: true, run: deathOfTarget},
		{Name: "death/initiator", Rule: "peer-death", FarEnd: true, run: deathOfInitiator},

		{Name: "resources/connections", Rule: "resources-returned", run: resourcesOfConnections},
		{Name: "resources/backends", Rule: "resources-returned", run: resourcesOfBackends},
	}
}
