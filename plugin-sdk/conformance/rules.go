package conformance

// Rule is one rule of the contract of package backend. docs/BACKEND_GUIDE.md explains each of them.
type Rule struct {
	ID   string // stable: results and the guide name rules by it
	Text string // the rule, in one sentence
}

// Rules returns every rule that the suite tries, in the order of a backend's life. Each has one case at least.
func Rules() []Rule {
	return []Rule{
		{"info-fixed", "Info names the backend, claims at least one operation, one kind of memory and a window, and does not change."},
		{"claims-complete", "What is not claimed is refused with Unsupported: operations, kinds of memory, pairs of places, peers out of reach."},
		{"limits-hold", "What the limits allow works; what exceeds them is refused by Post with BadRequest."},
		{"errors-identity", "Every error is, or wraps, an Error with a known code, also after the end of what it is about."},
		{"contexts-end", "A call whose context has ended returns soon: with its work done, or with Cancelled."},
		{"counters-grow", "A backend that counts has the same counters always, each under a name of its own, and none goes back."},
		{"any-goroutine", "Every method may be called from any goroutine at any time."},

		{"region-ids", "A region has an id of its own, any number but zero; a second registration is refused with BadRequest."},
		{"descriptor-optional", "Memory without a file descriptor, or a GPU's without a handle, works, or Register refuses it with Unsupported; under NeedsFD, Session may."},
		{"deregister-final", "After Deregister no transfer and no peer can reach the memory."},
		{"deregister-waits", "Deregister returns when the transfers that used the region have completed, and nothing touches it any more."},
		{"deregister-again", "Deregistering an unknown region is not an error, so that clean-up can be repeated."},

		{"handshake-untrusted", "What is in offers and answers is untrusted: garbage is refused, and harms nobody."},
		{"handshake-abandoned", "A handshake that is abandoned leaves nothing behind, and does not stop the next one."},
		{"endpoints-apart", "Endpoints are independent: what ends one leaves another to the same peer alone."},
		{"both-directions", "A process may be initiator and target at once."},

		{"session-near", "A session needs a local region that is registered."},
		{"session-rights", "What the remote region's rights do not allow is refused with Denied, before any byte has moved."},
		{"target-decides", "The target decides: a descriptor with a forged size, key, right or region moves no byte."},

		{"post-checks", "A transfer with one bad range is refused by Post with BadRequest, before any byte has moved."},
		{"post-refusal-harmless", "A Post that is refused leaves the endpoint, and what is in flight on it, as it was."},
		{"post-never-blocks", "Post accepts, refuses or says Busy, and never waits for room, not even within Complete."},
		{"post-wait", "PostWait, where a session has it, does what Post does."},
		{"segments-not-kept", "Transfer.Segments belongs to the backend only while Post runs."},
		{"window-busy", "An endpoint accepts Window transfers, then says Busy, and accepts again after a completion."},
		{"window-room", "A transfer leaves the window before its Complete is called: a Post within Complete finds room."},

		{"done-in-place", "A Done segment is entirely in place, and no other byte of either end has changed."},
		{"outcomes-true", "Each outcome is true of its segment: NotSent left the destination alone, Done is in place."},
		{"complete-once", "Each accepted Post is completed exactly once, on its own session, under its cookie."},
		{"complete-may-post", "Complete may call Post and Cancel on the same session."},
		{"completion-quiet", "Completion means quiet: afterwards neither end of the transfer touches the initiator's memory."},

		{"cancel-unknown", "Cancelling an unknown cookie is ignored."},
		{"cancel-once", "A transfer that is cancelled, at whatever time and how often, completes once."},
		{"cancel-soon", "Cancel makes a transfer end soon: what waits behind a long one is not carried out in full every time."},

		{"close-again", "Closing a session, an endpoint or a backend twice is not an error, and nothing is accepted afterwards."},
		{"close-waits", "Close returns when what was in flight has completed, and the sink is not called afterwards."},
		{"target-close", "When the target closes, its memory is quiet, and every transfer to it completes."},
		{"peer-death", "When the peer's process dies, every transfer to it completes, its endpoints fail, and nothing else does."},

		{"fence-quiet", "When Fence has returned nil, nothing that the peer posted before can touch this process's memory."},
		{"fence-stranger", "A peer that never connected is fenced at once."},

		{"incarnation-checked", "What was made for one incarnation of a peer, a descriptor or a handshake, is refused by another."},
		{"peer-restart", "A peer that restarts is reached again under its new incarnation, and not under the old one."},

		{"resources-returned", "What is closed has given back its goroutines, threads, descriptors and mappings."},
	}
}
