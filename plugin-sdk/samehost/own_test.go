package samehost

import (
	"bytes"
	"context"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// lendOwn has an instance lend a region of its mover's own.
func lendOwn(t testing.TB, i *Instance, rights backend.Rights) (backend.RegionID, []byte, backend.Memory) {
	t.Helper()
	m := memory(t, 1, 8192, rights)
	fill(m.Bytes, 5)
	r, err := moverOf(i).Admit(soon(t), m)
	must(t, err)
	id, key, err := i.Lend(r, rights)
	must(t, err)
	return id, key, m
}

// TestOwnRegions goes through the life of a region of the mover's own.
func TestOwnRegions(t *testing.T) {
	eachWay(t, func(t *testing.T, a, b *Instance) {
		id, key, m := lendOwn(t, b, all)
		if id < 1<<63 {
			t.Errorf("the id is %d, want one that hosts do not use", id)
		}
		e := connect(t, a, b.self, b)
		_, err := e.Open(soon(t), id, []byte("a key"))
		wantCode(t, err, backend.Denied)
		_, err = e.Open(soon(t), id, make([]byte, len(key)))
		wantCode(t, err, backend.Denied)
		r, err := e.Open(soon(t), id, key)
		must(t, err)
		again, err := e.Open(soon(t), id, key)
		must(t, err)
		if again != r {
			t.Error("a region that is open is opened again")
		}
		wantSame(t, "region", r.(*copyRegion).bytes, m.Bytes)

		// It is none of the host's.
		must(t, b.Deregister(soon(t), id))
		register(t, b, memory(t, 9, 4096, all))
		self := connect(t, b, b.self, b)
		_, err = self.Session(soon(t), id, backend.Remote{Peer: b.self, Region: id, Kind: backend.HostMemory, Key: key}, new(sink))
		wantCode(t, err, backend.BadRequest)
		must(t, self.Close())
		wantOpen(t, e.Done(), "the connection has ended")
		must(t, b.Withdraw(soon(t), 9)) // the host's
		must(t, b.Withdraw(soon(t), id))
		must(t, b.Withdraw(soon(t), id))
		wantDone(t, e.Done())
		_, err = e.Open(soon(t), id, key)
		wantCode(t, err, backend.PathDown)
		_, err = connect(t, a, b.self, b).Open(soon(t), id, key)
		wantCode(t, err, backend.BadRequest)
		if n := moverOf(b).open(); n != 1 {
			t.Errorf("%d regions are left, want the host's alone", n)
		}
	})
}

func TestLendAfterClose(t *testing.T) {
	i, err := openInstance(peer("a", 1), map[string]string{"socket_dir": socketDir(t)})
	must(t, err)
	_, _, m := lendOwn(t, i, all) // Close gives it back
	must(t, i.Close())
	r := &copyRegion{mover: moverOf(i), bytes: m.Bytes, file: -1}
	_, _, err = i.Lend(r, all)
	wantCode(t, err, backend.PathDown)
}

// unlendable is a region that cannot be described.
type unlendable struct{ Region }

func (u unlendable) Lend(backend.Rights) (Lent, error) {
	return Lent{File: -1, Note: make([]byte, MaxNote+1)}, nil
}

func TestNoteTooLong(t *testing.T) {
	eachWay(t, func(t *testing.T, a, b *Instance) {
		r, err := moverOf(b).Admit(soon(t), memory(t, 1, 4096, all))
		must(t, err)
		id, key, err := b.Lend(unlendable{r}, all)
		must(t, err)
		_, err = connect(t, a, b.self, b).Open(soon(t), id, key)
		if _, local := instances.Load(b.id); local {
			must(t, err)
			return
		}
		wantCode(t, err, backend.Internal, "note of 1025 bytes")
	})
}

// TestScratch is what OnLeave is for: the target's mover lends a guest a region of its own, and takes it back when the
// guest is gone.
func TestScratch(t *testing.T) {
	eachWay(t, func(t *testing.T, a, b *Instance) {
		freed := make(chan struct{})
		moverOf(b).serve = func(_ context.Context, g *Guest, _ []byte) ([]byte, error) {
			id, key, _ := lendOwn(t, b, all)
			g.OnLeave(func() {
				if err := b.Withdraw(soon(t), id); err != nil {
					t.Error(err)
				}
				close(freed)
			})
			return append(binary.BigEndian.AppendUint64(nil, uint64(id)), key...), nil
		}
		var order []string
		moverOf(a).join = func(ctx context.Context, target Target) error {
			answer, err := target.Ask(ctx, nil)
			if err != nil {
				return err
			}
			r, err := target.Open(ctx, backend.RegionID(binary.BigEndian.Uint64(answer)), answer[8:])
			if err != nil {
				return err
			}
			want := make([]byte, 8192)
			fill(want, 5)
			if !bytes.Equal(r.(*copyRegion).bytes, want) {
				return backend.Errorf(backend.Integrity, "the scratch has other bytes")
			}
			target.OnEnd(func() {
				select {
				case <-freed:
					order = append(order, "freed before the end")
				default:
					order = append(order, "end")
				}
			})
			return nil
		}
		register(t, a, memory(t, 1, 4096, 0))
		remote := register(t, b, memory(t, 2, 4096, all))
		e := connect(t, a, b.self, b)
		bind(t, e, 1, remote, new(sink))
		select {
		case <-freed:
			t.Fatal("the scratch is taken back before the guest has left")
		default:
		}
		must(t, e.Close())
		must(t, b.Fence(soon(t), a.self)) // when it returns, OnLeave's work is done
		select {
		case <-freed:
		default:
			t.Error("the scratch is not taken back when the guest is quiet")
		}
		e.OnEnd(func() { order = append(order, "at once") })
		if len(order) != 2 || order[1] != "at once" {
			t.Errorf("OnEnd: got %q", order)
		}
		if n := moverOf(b).open(); n != 1 {
			t.Errorf("%d regions are left, want the host's alone", n)
		}
	})
}

// TestOnLeaveAtOnce asks to hear of a guest that has left.
func TestOnLeaveAtOnce(t *testing.T) {
	eachWay(t, func(t *testing.T, a, b *Instance) {
		guests := make(chan *Guest, 1)
		moverOf(b).serve = func(_ context.Context, g *Guest, _ []byte) ([]byte, error) {
			guests <- g
			return nil, nil
		}
		e := connect(t, a, b.self, b)
		_, err := e.Ask(soon(t), nil)
		must(t, err)
		g := <-guests
		calls := []string(nil)
		g.OnLeave(func() { calls = append(calls, "later") })
		must(t, b.Fence(soon(t), a.self))
		g.OnLeave(func() { calls = append(calls, "at once") })
		if want := []string{"later", "at once"}; !slices.Equal(calls, want) {
			t.Errorf("got %q, want %q", calls, want)
		}
	})
}
