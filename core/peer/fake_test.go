package peer

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

var self = backend.Peer{Node: "node", Incarnation: 0x5e1f, Host: "here"}

// fakeFabric has one region of memory that is not there, and fences as the test says.
type fakeFabric struct {
	pages uint64

	mu       sync.Mutex
	fenceErr error
	fenced   []backend.Peer
}

func (f *fakeFabric) Self() backend.Peer { return self }

func (f *fakeFabric) Describe() []region.Descriptor {
	return []region.Descriptor{{
		Peer: self, ID: 1, Kind: backend.HostMemory, Rights: backend.RemoteRead | backend.RemoteWrite,
		Size: f.pages * testPage, Keys: map[string][]byte{"tcp": []byte("somewhere")},
	}}
}

func (f *fakeFabric) Answer(_ context.Context, from backend.Peer, name string, offer []byte) (*AnswerReply, error) {
	if name != "tcp" {
		return nil, backend.Errorf(backend.Unsupported, "no backend %q", name)
	}
	return &AnswerReply{
		Answer: append([]byte(from.Node+" "), offer...), Keys: map[backend.RegionID][]byte{1: []byte("elsewhere"), 9: nil},
	}, nil
}

func (f *fakeFabric) Fence(_ context.Context, client backend.Peer) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fenced = append(f.fenced, client)
	return f.fenceErr
}

func (f *fakeFabric) failFences(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fenceErr = err
}

func (f *fakeFabric) fences() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.fenced)
}

// fakeDirectory is a directory that can go away and come back, with or without its memory.
type fakeDirectory struct {
	directory.Directory // what a node does not call

	mu       sync.Mutex
	down     error
	member   directory.Node
	replaced bool
	number   uint64            // of the membership
	floor    uint64            // of the node's publications
	owners   map[string]string // node by key
	entered  map[string]uint64 // by key: the greatest Sequence of the node's publications
	leaves   int
	before   func(call string, keys []string) // called outside the lock, may be nil
}

const fakeTTL = 3 * time.Second

func newFakeDirectory() *fakeDirectory {
	return &fakeDirectory{owners: map[string]string{}, entered: map[string]uint64{}}
}

func (d *fakeDirectory) enter(call string, keys []string) func() {
	d.mu.Lock()
	before := d.before
	d.mu.Unlock()
	if before != nil {
		before(call, keys)
	}
	d.mu.Lock()
	return d.mu.Unlock
}

func (d *fakeDirectory) Join(_ context.Context, n *directory.Node) (directory.JoinReply, error) {
	defer d.enter("join", nil)()
	if d.down != nil {
		return directory.JoinReply{}, d.down
	}
	if d.replaced {
		return directory.JoinReply{}, backend.Errorf(backend.PeerGone, "there is a younger one")
	}
	if d.member.Peer != n.Peer {
		d.number++
	}
	d.member = *n
	return directory.JoinReply{TTL: fakeTTL, Membership: d.number}, nil
}

func (d *fakeDirectory) Leave(context.Context, backend.Peer) error {
	defer d.enter("leave", nil)()
	if d.down != nil {
		return d.down
	}
	d.forget()
	d.leaves++
	return nil
}

func (d *fakeDirectory) refuse(peer backend.Peer) error {
	if d.down != nil {
		return d.down
	}
	if d.member.Peer != peer {
		return backend.Errorf(backend.PeerGone, "%v is no member", peer)
	}
	return nil
}

func (d *fakeDirectory) Publish(_ context.Context, r *directory.PublishRequest, reply *directory.PublishReply) error {
	defer d.enter("publish", r.Keys)()
	if err := d.refuse(r.Peer); err != nil {
		return err
	}
	switch {
	case r.Membership != d.number:
		return backend.Errorf(backend.PeerGone, "membership %d is over", r.Membership)
	case r.Sequence < d.floor:
		return backend.Errorf(backend.Busy, "%d is below %d", r.Sequence, d.floor)
	}
	reply.Entered = reply.Entered[:0]
	for _, key := range r.Keys {
		if _, ok := d.owners[key]; !ok {
			d.owners[key] = r.Peer.Node
		}
		d.entered[key] = max(d.entered[key], r.Sequence)
		reply.Entered = append(reply.Entered, d.owners[key] == r.Peer.Node)
	}
	return nil
}

func (d *fakeDirectory) Withdraw(_ context.Context, r *directory.WithdrawRequest) error {
	defer d.enter("withdraw", r.Keys)()
	if err := d.refuse(r.Peer); err != nil {
		return err
	}
	d.floor = max(d.floor, r.Floor)
	for _, key := range r.Keys {
		if d.owners[key] == r.Peer.Node && d.entered[key] < r.Sequence {
			delete(d.owners, key)
			delete(d.entered, key)
		}
	}
	return nil
}

// set changes the directory under its lock.
func (d *fakeDirectory) set(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}

// forget is a restart without memory, but for the keys of others.
func (d *fakeDirectory) forget() {
	d.member, d.floor = directory.Node{}, 0
	clear(d.entered)
	maps.DeleteFunc(d.owners, func(_, node string) bool { return node == self.Node })
}

// listed returns the keys that the directory lists at the node, in order.
func (d *fakeDirectory) listed() (keys []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for key, node := range d.owners {
		if node == self.Node {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}
