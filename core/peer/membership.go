package peer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

const (
	directoryTimeout = 5 * time.Second        // for a call that no client waits for
	minJoinBackoff   = 100 * time.Millisecond // after the first Join that failed
	firstJoinTTL     = 3 * time.Second        // assumed until a Join has succeeded
	tellInterval     = time.Second            // between attempts to tell the directory what it missed
)

// Start makes the node a member of the directory and starts what it does by itself: renewing the membership,
// telling the directory what it missed, and taking back what clients leave behind. It is called once.
//
// A directory that cannot be reached does not keep the node from starting: it joins as soon as it can. The error
// is PeerGone when another incarnation of the node has taken its place, or the context's when it ends first.
func (n *Node) Start(ctx context.Context) error {
	ttl, err := n.join(ctx)
	if err != nil && (n.gone.Load() || ctx.Err() != nil) {
		return err
	}
	joined := condition{log: n.log, what: "join the directory"}
	joined.note(err)
	n.done.Go(func() { n.keepJoined(joined, ttl) })
	n.done.Go(n.keepTold)
	n.done.Go(n.keepReaping)
	n.done.Go(n.keepFencing)
	return nil
}

// Done is closed when the node has ended: by Close, or because another incarnation of it has taken its place.
func (n *Node) Done() <-chan struct{} { return n.running.Done() }

// Close ends the membership and refuses calls from then on. The node's goroutines have ended when it returns nil.
// Closing twice is not an error.
func (n *Node) Close(ctx context.Context) error {
	n.gone.Store(true)
	n.stop()
	ended := make(chan struct{})
	go func() {
		n.done.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-ctx.Done():
		return &backend.Error{Code: backend.Cancelled, Op: "close", Peer: n.self,
			Text: "a call of the directory or a fence has not ended", Err: ctx.Err()}
	}
	// Last, so that no Join comes after it.
	if err := n.directory.Leave(ctx, n.self); err != nil {
		return &backend.Error{Code: backend.CodeOf(err), Op: "close", Peer: n.self,
			Text: "the directory lists the node until its membership runs out", Err: err}
	}
	return nil
}

// join makes or renews the membership.
func (n *Node) join(ctx context.Context) (ttl time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, directoryTimeout)
	defer cancel()
	reply, err := n.directory.Join(ctx, &directory.Node{
		Peer: n.self, Address: n.address, Capacity: n.store.Capacity(), Free: n.store.FreeBytes(),
	})
	switch {
	case err == nil:
		n.membership.Store(reply.Membership)
		n.tellNow.wake()
		return reply.TTL, nil
	case backend.CodeOf(err) == backend.PeerGone:
		n.gone.Store(true)
		n.stop()
		n.log.Error("node is replaced: it stops serving, and its values are lost to the pool; "+
			"two processes with one name must not run at the same time", "node", n.self.String(), "error", err)
	}
	return firstJoinTTL, err
}

// keepJoined joins three times as often as it must, and more often while that fails.
func (n *Node) keepJoined(joined condition, ttl time.Duration) {
	backoff := minJoinBackoff
	for {
		wait := ttl / 3
		if joined.failing {
			wait, backoff = backoff, min(2*backoff, wait)
		} else {
			backoff = minJoinBackoff
		}
		if !n.wait(n.joinNow, wait) {
			return
		}
		next, err := n.join(n.running)
		if n.running.Err() != nil {
			return
		}
		joined.note(err)
		if err == nil {
			ttl = next
		}
	}
}

// keepTold keeps the directory in agreement with the store, wherever the calls of clients have not done so.
func (n *Node) keepTold() {
	told := condition{log: n.log, what: "tell the directory what the node holds"}
	var t teller
	for n.wait(n.tellNow, tellInterval) {
		for more, err := true, error(nil); more && err == nil; told.note(err) {
			more, err = n.tell(&t)
			if n.running.Err() != nil {
				return
			}
		}
	}
}

// teller is what keepTold keeps from round to round.
type teller struct {
	refilled uint64 // the membership in which the directory was told everything
	p        Publication
	evicted  []string
}

// tell makes one round: a refill if it is needed, a batch of what was published in vain, and a batch of what is to
// be withdrawn. More says that another round has something to do.
func (n *Node) tell(t *teller) (more bool, err error) {
	bounded := func(call func(ctx context.Context) error) error {
		ctx, cancel := context.WithTimeout(n.running, directoryTimeout)
		defer cancel()
		return call(ctx)
	}
	publish := func() error {
		return bounded(func(ctx context.Context) error { return n.publish(ctx, &t.p) })
	}
	if membership := n.membership.Load(); membership != t.refilled {
		keys := 0
		err := n.store.Walk(&t.p, func() error {
			keys += len(t.p.Request.Keys)
			return publish()
		})
		if err != nil {
			return false, err
		}
		t.refilled = membership
		if keys > 0 {
			n.log.Info("told the directory all that the node holds", "node", n.self.String(), "keys", keys)
		}
	}
	if n.store.Unsettled(&t.p) {
		if err := publish(); err != nil {
			return false, err
		}
		more = true
	}
	var overflow bool
	t.evicted, overflow = n.store.Evicted(t.evicted)
	switch {
	case overflow:
		n.log.Warn("too many evictions for the directory: it forgets the node, and is told everything again",
			"node", n.self.String())
		err = bounded(func(ctx context.Context) error { return n.directory.Leave(ctx, n.self) })
		if err != nil {
			n.store.Overflow()
			return false, err
		}
		n.joinNow.wake()
	case len(t.evicted) > 0:
		err = bounded(func(ctx context.Context) error { return n.withdraw(ctx, t.evicted) })
		more = true
	}
	return more, err
}

// publishTries is how often a publication is made that another one, which was lost, or a new membership overtakes.
const publishTries = 3

// publish tells the directory of committed slots and settles what it answers. When it does not answer, the keys
// wait in the store for keepTold.
func (n *Node) publish(ctx context.Context, p *Publication) error {
	if len(p.Request.Keys) == 0 {
		return nil
	}
	err := n.enter(ctx, p)
	for try := 1; try < publishTries && n.overtaken(p, err); try++ {
		n.store.Renew(p)
		err = n.enter(ctx, p)
	}
	if err != nil {
		n.store.Unsettle(p)
		if backend.CodeOf(err) == backend.PeerGone { // it has started anew, or lost patience
			n.joinNow.wake()
		}
		return err
	}
	if stale := n.store.Settle(p); len(stale) > 0 {
		_ = n.withdraw(ctx, stale) // what fails is withdrawn later
	}
	return nil
}

// overtaken tells whether a publication was refused for something that came before it, and may be made again.
func (n *Node) overtaken(p *Publication, err error) bool {
	return errors.Is(err, backend.ErrBusy) ||
		errors.Is(err, backend.ErrPeerGone) && n.membership.Load() != p.Request.Membership
}

// enter has the directory answer a publication.
func (n *Node) enter(ctx context.Context, p *Publication) error {
	p.Request.Peer, p.Request.Membership = n.self, n.membership.Load()
	if p.Request.Membership == 0 {
		return &backend.Error{Code: backend.PeerGone, Op: "publish", Peer: n.self, Text: "it has not joined the directory yet"}
	}
	err := n.directory.Publish(ctx, &p.Request, &p.Reply)
	if err == nil && len(p.Reply.Entered) != len(p.Request.Keys) {
		err = &backend.Error{Code: backend.Internal, Op: "publish", Peer: n.self,
			Text: fmt.Sprintf("the directory answered for %d keys of %d", len(p.Reply.Entered), len(p.Request.Keys))}
	}
	return err
}

// withdraw makes the directory forget those of the keys that the node does not hold. What it cannot be told now is
// withdrawn later.
func (n *Node) withdraw(ctx context.Context, keys []string) error {
	req := directory.WithdrawRequest{Peer: n.self}
	if n.store.Absent(keys, &req); len(req.Keys) == 0 {
		return nil
	}
	err := n.directory.Withdraw(ctx, &req)
	switch {
	case backend.CodeOf(err) == backend.PeerGone: // it lists nothing of a node that is no member
		n.joinNow.wake()
		return nil
	case err != nil:
		n.store.WithdrawLater(req.Keys)
	}
	return err
}

// keepReaping takes back what has expired, also when no client calls.
func (n *Node) keepReaping() {
	for n.wait(nil, n.store.reapInterval()) {
		n.store.Expire()
		n.fenceNow.wake()
	}
}

// keepFencing fences clients that have left pages in quarantine. It has its own goroutine since a fence may take
// long.
func (n *Node) keepFencing() {
	for n.wait(n.fenceNow, maxFenceBackoff) {
		n.store.FenceQuarantined(n.running)
	}
}

// wait returns true when the wish is uttered or the time has passed, and false when the node is to stop.
func (n *Node) wait(w wish, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-n.running.Done():
		return false
	case <-w:
	case <-t.C:
	}
	return n.running.Err() == nil
}

// wish wakes a goroutine. It holds at most one.
type wish chan struct{}

func (w wish) wake() {
	select {
	case w <- struct{}{}:
	default:
	}
}

// condition logs when something that is done over and over begins to fail, and when it works again.
type condition struct {
	log     backend.Logger
	what    string
	failing bool
}

func (c *condition) note(err error) {
	switch {
	case err != nil && !c.failing:
		c.log.Warn("cannot "+c.what+"; trying until it works", "error", err)
	case err == nil && c.failing:
		c.log.Info("can " + c.what + " again")
	}
	c.failing = err != nil
}
