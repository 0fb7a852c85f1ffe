package conformance

import (
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// refuses wants Post to refuse, and not with Busy.
func (l *link) refuses(what string, codes ...backend.Code) {
	_, err := l.try(l.r.ops()[0], []backend.Segment{{Length: 64}})
	if backend.CodeOf(err) == backend.Busy {
		l.r.Errorf("%s: Post says Busy, and it will never accept again", what)
	}
	l.r.identity(what+": Post", err, codes...)
}

func closeTwice(r *rig) {
	l := r.link(small)
	l.closeSession()
	l.closeSession()
	l.refuses("after Session.Close")

	l = r.session(r.connect(r.initiator, r.target), l.near, l.far)
	endpoint := r.connect(r.initiator, r.target)
	l = r.session(endpoint, l.near, l.far)
	for range 2 {
		r.closeEndpoint(endpoint)
	}
	l.refuses("after Endpoint.Close")
	_, err := r.trySession(endpoint, l.near, l.far, l.far.remote)
	r.identity("Session after Endpoint.Close", err)
	l.closeSession()

	// The rig closes both backends once more.
	for _, n := range r.nodes {
		n.close()
	}
	r.await("Endpoint.Done after Backend.Close", r.endpoint.Done())
	for range 2 {
		r.closeEndpoint(r.endpoint)
	}
}

func (r *rig) closeEndpoint(endpoint backend.Endpoint) {
	if err := endpoint.Close(); err != nil {
		r.Errorf("Endpoint.Close: %v", err)
	}
}

// ended wants every transfer to have completed, now.
func (l *link) ended(what string, all []*posted) {
	for _, p := range all {
		if !p.completed() {
			l.r.Errorf("%s returned before a transfer in flight had completed", what)
			return
		}
	}
	for _, p := range all {
		if p.err != nil {
			l.r.identity("a transfer that was ended by "+what, p.err, backend.Cancelled, backend.PathDown, backend.PeerGone)
		}
	}
}

// closing closes something with transfers in flight, several times, and looks at the initiator's memory after.
func closing(r *rig, what string, fresh func() *link, end func(l *link)) {
	for _, op := range r.ops() {
		for range 4 {
			l := fresh()
			all := l.stress(op, 6)
			end(l)
			l.ended(what, all)
			after := l.near.refill()
			time.Sleep(settle / 4)
			l.near.unchanged(after, "a "+op.String()+" touched memory after "+what)
			l.sink.audit(r)
			l.refuses("after " + what)
		}
	}
}

func closeSession(r *rig) {
	near, far := r.initiator.area(large, 0), r.target.area(large, allRights)
	closing(r, "Session.Close",
		func() *link { return r.session(r.connect(r.initiator, r.target), near, far) },
		func(l *link) { l.closeSession() })
}

func closeEndpoint(r *rig) {
	near, far := r.initiator.area(large, 0), r.target.area(large, allRights)
	var endpoint backend.Endpoint
	closing(r, "Endpoint.Close",
		func() *link {
			endpoint = r.connect(r.initiator, r.target)
			return r.session(endpoint, near, far)
		},
		func(l *link) {
			r.closeEndpoint(endpoint)
			r.await("Endpoint.Done after Endpoint.Close", endpoint.Done())
		})
}

func closeBackend(r *rig) {
	var node *node
	var endpoint backend.Endpoint
	far := r.target.area(large, allRights)
	closing(r, "Backend.Close",
		func() *link {
			node = r.open("closer", r.h.NewMemory)
			endpoint = r.connect(node, r.target)
			return r.session(endpoint, node.area(large, 0), far)
		},
		func(l *link) {
			node.close()
			r.await("Endpoint.Done after Backend.Close", endpoint.Done())
		})
}

// closeCalls calls what is closed, at both ends.
func closeCalls(r *rig) {
	l := r.link(small)
	spare := r.initiator.lend(small, allRights)
	other := r.open("other", r.h.NewMemory)
	fine := r.session(r.connect(other, r.target), other.area(small, 0), l.far)
	r.initiator.close()

	r.identity("Register after Backend.Close", spare.tryRegister())
	_, err := r.tryConnect(r.initiator, r.target, r.target.peer)
	r.identity("a connection from a backend that is closed", err)
	if !r.h.NearEndOnly {
		_, err := r.tryConnect(other, r.initiator, r.initiator.peer)
		r.identity("a connection to a backend that is closed", err)
	}
	_, err = r.trySession(r.endpoint, l.near, l.far, l.far.remote)
	r.identity("Session after Backend.Close", err)
	l.refuses("after Backend.Close")
	l.Cancel(1)
	ctx, cancel := r.timeout()
	defer cancel()
	if err := r.initiator.backend.Deregister(ctx, l.near.remote.Region); err != nil {
		r.identity("Deregister after Backend.Close", err)
	}
	if err := r.initiator.backend.Fence(ctx, r.target.peer); err != nil {
		r.identity("Fence after Backend.Close", err)
	}
	for _, op := range r.ops() {
		fine.move(op, []backend.Segment{{Length: small}}, "between others, when one end has closed")
	}
}

// closeOutcomes ends transfers by closing what carries them, and looks whether their outcomes are true.
func closeOutcomes(r *rig) {
	for _, op := range r.ops() {
		near, far := r.initiator.area(large, 0), r.target.area(large, allRights)
		for round := range 4 {
			endpoint := r.connect(r.initiator, r.target)
			l := r.session(endpoint, near, far)
			l.interrupt(op, time.Duration(round)*100*time.Microsecond, func(*posted) { r.closeEndpoint(endpoint) }, r.fence)
		}
		target := r.open("closing-target", r.h.NewFarMemory)
		l := r.session(r.connect(r.initiator, target), near, target.area(large, allRights))
		l.interrupt(op, 0, func(*posted) { target.close() }, func() {})
	}
}

func closeOtherEndpoint(r *rig) {
	for _, op := range r.ops() {
		short := r.connect(r.initiator, r.target)
		ends := r.session(short, r.initiator.area(large, 0), r.target.area(large, allRights))
		l := r.link(large)
		near, far := l.near.contents(), l.far.contents()
		ends.stress(op, 4)
		all := l.stress(op, 4)
		r.closeEndpoint(short)
		l.waitAll(all)
		for _, p := range all {
			if p.err != nil {
				r.Fatalf("a %s failed when another endpoint was closed: %v", op, p.err)
			}
		}
		l.verify(all[0], near, far, "beside an endpoint that was closed")
		l.move(op, cut64(large), "after another endpoint was closed")
	}
}

func closeTarget(r *rig) {
	near := r.initiator.area(large, 0)
	for _, op := range r.ops() {
		target := r.open("closing-target", r.h.NewFarMemory)
		endpoint := r.connect(r.initiator, target)
		l := r.session(endpoint, near, target.area(large, allRights))
		all := l.stress(op, 6)
		target.close()
		after := l.far.refill()
		l.waitAll(all)
		for _, p := range all {
			if p.err != nil {
				r.identity("a "+op.String()+" to a target that closed", p.err, backend.PathDown, backend.PeerGone)
			}
		}
		if p, err := l.try(op, cut64(large)); err == nil {
			l.wait(p)
			r.identity("a "+op.String()+" to a target that has closed", p.err, backend.PathDown, backend.PeerGone)
		}
		r.await("Endpoint.Done after the target has closed", endpoint.Done())
		time.Sleep(settle)
		l.far.unchanged(after, "a "+op.String()+" reached the memory of a target that had closed")
	}
}

func fenceQuiet(r *rig) {
	if r.caps().Ops&backend.Write == 0 {
		r.Skipf("nothing to fence: writes are not claimed")
	}
	near, far := r.initiator.area(large, 0), r.target.area(large, allRights)
	for range 5 {
		l := r.session(r.connect(r.initiator, r.target), near, far)
		all := l.stress(backend.Write, 6)
		r.fence()
		after := far.refill()
		l.waitAll(all)
		time.Sleep(settle)
		far.unchanged(after, "a write that was posted before Fence touched memory after it")
		for _, p := range all {
			if p.err != nil {
				r.identity("a write that was fenced", p.err, backend.PathDown, backend.PeerGone)
			}
		}
	}
	l := r.session(r.connect(r.initiator, r.target), near, far)
	l.move(backend.Write, cut64(large), "on a new connection, after Fence")
}

func fenceStranger(r *rig) {
	ctx, cancel := r.timeout()
	defer cancel()
	old := r.initiator.peer
	old.Incarnation += 1 << 40
	for _, peer := range []backend.Peer{{Node: "stranger", Incarnation: 1, Host: "elsewhere"}, old} {
		if err := r.target.backend.Fence(ctx, peer); err != nil {
			r.Errorf("Fence of a peer that never connected: %v", err)
		}
	}
	l := r.link(small)
	l.move(r.ops()[0], []backend.Segment{{Length: small}}, "after Fence of others")
}

func incarnationDescriptor(r *rig) {
	l := r.link(small)
	near, far := l.near.contents(), l.far.contents()
	for what, change := range map[string]func(*backend.Remote){
		"an older incarnation": func(d *backend.Remote) { d.Peer.Incarnation-- },
		"a newer incarnation":  func(d *backend.Remote) { d.Peer.Incarnation += 1 << 32 },
	} {
		remote := l.far.remote
		change(&remote)
		_, err := r.trySession(r.connect(r.initiator, r.target), l.near, l.far, remote)
		r.identity("Session with a descriptor of "+what, err, backend.PeerGone)
	}
	l.near.unchanged(near, "after the refusals")
	l.far.unchanged(far, "after the refusals")
}

// restart closes the target and opens it again under its name, with a new incarnation and the same region ids.
func (r *rig) restart(old *area) *area {
	r.target.close()
	r.target = r.open(r.target.peer.Node, r.h.NewFarMemory)
	a := r.target.lend(old.size, old.remote.Rights)
	a.remote.Region = old.remote.Region
	a.register()
	return a
}

func incarnationHandshake(r *rig) {
	old := r.target.peer
	r.restart(r.target.area(small, allRights))
	endpoint, err := r.tryConnect(r.initiator, r.target, old)
	r.identity("a connection to "+old.String()+" that "+r.target.peer.String()+" answered", err,
		backend.PeerGone, backend.Denied, backend.PathDown, backend.BadRequest)
	if err == nil {
		r.closeEndpoint(endpoint)
	}
}

func incarnationRestart(r *rig) {
	l := r.link(small)
	for _, op := range r.ops() {
		l.move(op, []backend.Segment{{Length: small}}, "before the restart")
	}
	fresh := r.restart(l.far)
	oldBefore, freshBefore := l.far.refill(), fresh.refill()
	for _, op := range r.ops() {
		p, err := l.try(op, []backend.Segment{{Length: small}})
		if err == nil {
			l.wait(p)
			err = p.err
		}
		r.identity("a "+op.String()+" over a session of before the restart", err,
			backend.PeerGone, backend.PathDown)
	}
	_, err := r.trySession(r.endpoint, l.near, fresh, fresh.remote)
	r.identity("Session with a new descriptor on an endpoint of before the restart", err, backend.PeerGone, backend.PathDown)

	r.endpoint = r.connect(r.initiator, r.target)
	_, err = r.trySession(r.endpoint, l.near, l.far, l.far.remote)
	r.identity("Session with a descriptor of before the restart", err, backend.PeerGone)
	fresh.unchanged(freshBefore, "of the new incarnation, before anything reached it")
	l.far.unchanged(oldBefore, "of the old incarnation")

	again := r.session(r.endpoint, l.near, fresh)
	for _, op := range r.ops() {
		again.move(op, []backend.Segment{{Local: 3, Remote: 5, Length: small / 2}}, "after the restart")
	}
}
