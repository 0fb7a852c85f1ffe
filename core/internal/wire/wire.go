// Package wire turns what the messages of the control plane have in common into Go's types and back. What comes over
// the wire is untrusted: a message that contradicts itself is an error.
package wire

import (
	"github.com/umbp/umbp/core/internal/wire/wirepb"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// ToPeer makes the message of a peer.
func ToPeer(p backend.Peer) *wirepb.Peer {
	return &wirepb.Peer{Node: p.Node, Incarnation: p.Incarnation, Host: p.Host}
}

// FromPeer returns the peer of a message; of nil, the zero peer.
func FromPeer(p *wirepb.Peer) backend.Peer {
	return backend.Peer{Node: p.GetNode(), Incarnation: p.GetIncarnation(), Host: p.GetHost()}
}

// ToKeys makes the message of a list of keys.
func ToKeys(keys []string) *wirepb.Keys {
	length := 0
	for _, key := range keys {
		length += len(key)
	}
	p := &wirepb.Keys{Text: make([]byte, 0, length), Lengths: make([]uint32, len(keys))}
	for i, key := range keys {
		p.Text = append(p.Text, key...)
		p.Lengths[i] = uint32(len(key))
	}
	return p
}

// FromKeys returns the keys as pieces of one string. It refuses more than limit before it makes room for them. The
// error is BadRequest.
func FromKeys(p *wirepb.Keys, limit int) ([]string, error) {
	if n := len(p.GetLengths()); n > limit {
		return nil, backend.Errorf(backend.BadRequest, "%d keys came in one message; the limit is %d", n, limit)
	}
	text := string(p.GetText())
	keys := make([]string, len(p.GetLengths()))
	for i, length := range p.GetLengths() {
		if uint64(length) > uint64(len(text)) {
			return nil, backend.Errorf(backend.BadRequest, "key %d of %d is longer than the bytes that are left", i, len(keys))
		}
		keys[i], text = text[:length], text[length:]
	}
	if text != "" {
		return nil, backend.Errorf(backend.BadRequest, "%d bytes are left after %d keys", len(text), len(keys))
	}
	return keys, nil
}
