package samehost

import (
	"context"
	"runtime"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// TestRegisterOnce registers a region again, deregisters it and closes the instance while the mover has not yet admitted
// it.
func TestRegisterOnce(t *testing.T) {
	i := newInstance(t, peer("a", 1))
	m := moverOf(i)
	asked, release := make(chan struct{}), make(chan struct{})
	m.admit = func(backend.Memory) error {
		asked <- struct{}{}
		<-release
		return nil
	}
	own := memory(t, 1, 4096, all)
	done := make(chan error, 1)
	go func() {
		_, err := i.Register(soon(t), own)
		done <- err
	}()
	<-asked
	_, err := i.Register(soon(t), own) // would hang if the mover were asked
	wantCode(t, err, backend.BadRequest)
	must(t, i.Deregister(soon(t), 1))
	_, err = i.near(1)
	wantCode(t, err, backend.BadRequest)
	release <- struct{}{}
	must(t, <-done)
	_, err = i.near(1)
	must(t, err)
	must(t, i.Deregister(soon(t), 1))

	go func() {
		_, err := i.Register(soon(t), own)
		done <- err
	}()
	<-asked
	closed := make(chan error, 1)
	go func() { closed <- i.Close() }()
	for closing := false; !closing; runtime.Gosched() {
		i.mu.Lock()
		closing = i.closed
		i.mu.Unlock()
	}
	time.Sleep(10 * time.Millisecond) // so that Close gets as far as it can
	release <- struct{}{}
	wantCode(t, <-done, backend.PathDown)
	must(t, <-closed)
	if !m.closed || m.open() != 0 {
		t.Errorf("after Close: closed %v, %d regions are left", m.closed, m.open())
	}
}

func TestAdmitRefuses(t *testing.T) {
	i := newInstance(t, peer("a", 1))
	moverOf(i).admit = func(backend.Memory) error { return backend.Errorf(backend.Unsupported, "no room on the device") }
	own := memory(t, 7, 4096, all)
	_, err := i.Register(soon(t), own)
	wantCode(t, err, backend.Unsupported, "copy: register: unsupported: no room on the device (region 7)")
	moverOf(i).admit = nil
	register(t, i, own) // nothing of the first attempt is left
}

func TestJoinRefuses(t *testing.T) {
	eachWay(t, func(t *testing.T, a, b *Instance) {
		register(t, a, memory(t, 1, 4096, 0))
		remote := register(t, b, memory(t, 2, 4096, all))
		e := connect(t, a, b.self, b)
		moverOf(a).join = func(_ context.Context, target Target) error {
			if target != Target(e) {
				t.Error("the target is not one and the same value")
			}
			return backend.Errorf(backend.Unsupported, "the devices see each other not at all")
		}
		_, err := e.Session(soon(t), 1, remote, new(sink))
		wantCode(t, err, backend.Unsupported, "copy: session: unsupported: the devices see each other not at all (peer b@2, region 2)")
		if len(e.sessions) != 0 {
			t.Error("a session that was refused is kept")
		}
		moverOf(a).join = nil
		bind(t, e, 1, remote, new(sink))
	})
}

// TestJoinEnds has the mover take its time to join, until something ends the wait.
func TestJoinEnds(t *testing.T) {
	for _, end := range []struct {
		name string
		by   func(t *testing.T, e *endpoint, a, b *Instance, cancel func())
		code backend.Code
	}{
		{"caller", func(_ *testing.T, _ *endpoint, _, _ *Instance, cancel func()) { cancel() }, backend.Cancelled},
		{"endpoint", func(t *testing.T, e *endpoint, _, _ *Instance, _ func()) { must(t, e.Close()) }, backend.PathDown},
		{"fence", func(t *testing.T, e *endpoint, a, b *Instance, _ func()) { must(t, b.Fence(soon(t), a.self)) }, backend.PathDown},
		{"close", func(t *testing.T, e *endpoint, a, _ *Instance, _ func()) { must(t, a.Close()) }, backend.PathDown},
		{"deregister here", func(t *testing.T, e *endpoint, a, _ *Instance, _ func()) { must(t, a.Deregister(soon(t), 1)) }, backend.BadRequest},
		{"deregister there", func(t *testing.T, e *endpoint, _, b *Instance, _ func()) { must(t, b.Deregister(soon(t), 2)) }, backend.PathDown},
	} {
		t.Run(end.name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, a, b *Instance) {
				register(t, a, memory(t, 1, 4096, 0))
				remote := register(t, b, memory(t, 2, 4096, all))
				e := connect(t, a, b.self, b)
				joining := make(chan struct{})
				moverOf(a).join = func(ctx context.Context, _ Target) error {
					close(joining)
					<-ctx.Done()
					return ctx.Err()
				}
				failed := make(chan error, 1)
				ctx, cancel := context.WithCancel(soon(t))
				defer cancel()
				go func() {
					_, err := e.Session(ctx, 1, remote, new(sink))
					failed <- err
				}()
				<-joining
				end.by(t, e, a, b, cancel)
				wantCode(t, <-failed, end.code)
			})
		})
	}
}

// TestSlowMap has the mover map a region after all, when the target has long taken its memory back. The region is closed,
// as the mover sees to.
func TestSlowMap(t *testing.T) {
	a, b := newInstance(t, peer("a", 1)), newInstance(t, peer("b", 2))
	asFromElsewhere(b)
	register(t, a, memory(t, 1, 4096, 0))
	remote := register(t, b, memory(t, 2, 4096, all))
	e := connect(t, a, b.self, b)
	mapping, mapped := make(chan struct{}), make(chan struct{})
	moverOf(a).mapIn = func(ctx context.Context) error {
		close(mapping)
		<-ctx.Done()
		time.Sleep(10 * time.Millisecond)
		close(mapped)
		return nil
	}
	failed := make(chan error, 1)
	go func() {
		_, err := e.Session(soon(t), 1, remote, new(sink))
		failed <- err
	}()
	<-mapping
	must(t, b.Fence(soon(t), a.self))
	select {
	case <-mapped:
	default:
		t.Error("the fence succeeds while the mover still maps")
	}
	wantCode(t, <-failed, backend.PathDown)
	if n := moverOf(a).open(); n != 1 {
		t.Errorf("%d regions are left, want the local one alone", n)
	}
}

// TestMapRefuses wants a region that could not be mapped to be asked for again.
func TestMapRefuses(t *testing.T) {
	a, b := newInstance(t, peer("a", 1)), newInstance(t, peer("b", 2))
	asFromElsewhere(b)
	register(t, a, memory(t, 1, 4096, 0))
	remote := register(t, b, memory(t, 2, 4096, all))
	e := connect(t, a, b.self, b)
	moverOf(a).mapIn = func(context.Context) error { return backend.Errorf(backend.Unsupported, "no handles left") }
	_, err := e.Session(soon(t), 1, remote, new(sink))
	wantCode(t, err, backend.Unsupported, "copy: session: unsupported: no handles left (peer b@2, region 2)")
	moverOf(a).mapIn = nil
	bind(t, e, 1, remote, new(sink))
}

// TestDeregisterGivesUp deregisters a region while a transfer uses it that does not end.
func TestDeregisterGivesUp(t *testing.T) {
	eachWay(t, func(t *testing.T, a, b *Instance) {
		register(t, a, memory(t, 1, 4096, 0))
		remote := register(t, b, memory(t, 2, 4096, all))
		k := new(sink)
		s := bind(t, connect(t, a, b.self, b), 1, remote, k)
		m := moverOf(a)
		m.hold(t)
		must(t, post(s, backend.Write, 1, backend.Segment{Length: 4096}))
		for range 2 {
			err := a.Deregister(briefly(t), 1)
			wantCode(t, err, backend.Cancelled, "transfers still use the region")
			wantCode(t, b.Deregister(briefly(t), 2), backend.Cancelled)
		}
		if moverOf(a).open() == 0 || moverOf(b).open() == 0 {
			t.Error("a region is closed while a transfer uses it")
		}
		_, err := a.Register(soon(t), memory(t, 1, 4096, 0))
		wantCode(t, err, backend.BadRequest) // it is still there
		m.step(t)
		k.Wait(t, 1)
		must(t, a.Deregister(soon(t), 1))
		must(t, b.Deregister(soon(t), 2))
		if moverOf(b).open() != 0 {
			t.Error("a region is left open")
		}
	})
}
