package samehost

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

const (
	// maxGrants bounds the connections that have been answered and not yet established.
	maxGrants = 1024
	// grantLife is how long an initiator has to establish what was answered.
	grantLife = 30 * time.Second
)

// secret is known to the target and to the one initiator that it answered.
type secret [32]byte

// grant is the right of one peer to connect once.
type grant struct {
	peer    backend.Peer
	secret  secret
	expires time.Time
}

// grant draws a new grant for peer.
func (i *Instance) grant(peer backend.Peer) (uint64, secret, error) {
	now := time.Now()
	g := &grant{peer: peer, expires: now.Add(grantLife)}
	rand.Read(g.secret[:])

	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return 0, secret{}, i.errClosed("answer")
	}
	if len(i.grants) >= maxGrants {
		for id, old := range i.grants {
			if now.After(old.expires) {
				delete(i.grants, id)
			}
		}
	}
	if len(i.grants) >= maxGrants {
		return 0, secret{}, &backend.Error{
			Code: backend.Busy, Op: "answer", Backend: i.name, Peer: peer, RetryAfter: grantLife,
			Text: "too many connections were answered and not established",
		}
	}
	i.lastGrant++
	i.grants[i.lastGrant] = g
	return i.lastGrant, g.secret, nil
}

// granted returns the secret of a grant that is still good.
func (i *Instance) granted(id uint64) (secret, bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	g := i.grants[id]
	if g == nil || time.Now().After(g.expires) {
		return secret{}, false
	}
	return g.secret, true
}

// admit uses up a grant, whose secret the caller has checked, and makes its peer a guest.
func (i *Instance) admit(id uint64, revoke func(), quiet <-chan struct{}) (*Guest, *backend.Error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return nil, i.errClosed("establish")
	}
	granted := i.grants[id]
	if granted == nil {
		return nil, i.errNoGrant()
	}
	delete(i.grants, id)
	g := &Guest{
		instance: i, peer: granted.peer, revoke: revoke, quiet: quiet,
		holds: make(map[backend.RegionID]struct{}),
	}
	i.guests[g] = struct{}{}
	return g, nil
}

// errNoGrant does not say whether the grant or its secret is wrong.
func (i *Instance) errNoGrant() *backend.Error {
	return &backend.Error{
		Code: backend.Denied, Op: "establish", Backend: i.name,
		Text: "the secret is wrong, used up or too old: offer and answer anew",
	}
}

// The two ends prove themselves in different words, so that neither can return the other's proof.
const (
	targetProof    = "target"
	initiatorProof = "initiator"
)

// prove returns the proof that its author knows the secret, good for this backend and this pair of nonces only.
func (s *secret) prove(backend, role string, initiator, target *[32]byte) (mac [32]byte) {
	h := hmac.New(sha256.New, s[:])
	h.Write([]byte("umbp " + backend + " " + role))
	h.Write(initiator[:])
	h.Write(target[:])
	h.Sum(mac[:0])
	return mac
}
