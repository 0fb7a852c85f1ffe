package tcp

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

// drawSegments cuts both regions into the same number of pieces, in a random order on the local side.
func drawSegments(rt *rapid.T, size int) []backend.Segment {
	n := rapid.SampledFrom([]int{1, 2, 3, 17, 300, 1025, 2100}).Draw(rt, "segments")
	slot := size / n
	order := rapid.Permutation(slices.Collect(func(yield func(int) bool) {
		for i := range n {
			if !yield(i) {
				return
			}
		}
	})).Draw(rt, "order")
	seed := rapid.Uint32().Draw(rt, "shape")
	segments := make([]backend.Segment, 0, n)
	for i := range n {
		seed = seed*1664525 + 1013904223
		length := 1 + int(seed>>8)%slot
		if seed%3 == 0 {
			length = slot // touches its neighbour
		}
		segments = append(segments, backend.Segment{
			Local:  uint64(order[i]*slot + slot - length),
			Remote: uint64(i * slot),
			Length: uint64(length),
		})
	}
	return segments
}

func TestTransfersMoveExactlyTheirSegments(t *testing.T) {
	const size = 192 << 10
	p := newPair(t, size, nil)
	var cookie uint64
	rapid.Check(t, func(rt *rapid.T) {
		segments := drawSegments(rt, size)
		fill(p.near, rapid.Uint64Range(0, 255).Draw(rt, "near"))
		fill(p.far, rapid.Uint64Range(256, 511).Draw(rt, "far"))
		wantNear, wantFar := bytes.Clone(p.near), bytes.Clone(p.far)
		op := rapid.SampledFrom([]backend.Op{backend.Write, backend.Read}).Draw(rt, "op")
		backendtest.Model(op, wantNear, wantFar, segments...)
		cookie++
		p.must(t, backend.Transfer{Op: op, Segments: segments, Cookie: cookie})
		if !bytes.Equal(p.near, wantNear) || !bytes.Equal(p.far, wantFar) {
			rt.Fatalf("a %s of %d segments moved other bytes than its own", op, len(segments))
		}
	})
}

// TestPipelining plays a target that answers nothing before all requests have arrived: so they are sent without
// waiting for answers.
func TestPipelining(t *testing.T) {
	const n = 50
	rt := newRawTarget(t, n*4096, nil)
	for i, g := range evenly(n, n*4096) {
		must(t, rt.session.Post(write(uint64(i), g)))
	}
	var requests []received
	for range n {
		requests = append(requests, rt.readRequest(t))
	}
	rt.completions.Empty(t)
	for _, r := range requests {
		rt.reply(t, reply{id: r.id})
	}
	for _, c := range rt.completions.Collect(t, n) {
		if c.Err != nil {
			t.Error(c.Err)
		}
	}
}

func TestFullWindowSaysBusyAndRecovers(t *testing.T) {
	const window = 8
	rt := newRawTarget(t, 1<<16, map[string]string{"window": fmt.Sprint(window)})
	g := backend.Segment{Length: 100}
	for i := range uint64(window) {
		must(t, rt.session.Post(write(i, g)))
	}
	if err := rt.session.Post(write(99, g)); !errors.Is(err, backend.ErrBusy) {
		t.Fatalf("posting into a full window: got %v, want busy", err)
	}
	rt.reply(t, reply{id: rt.readRequest(t).id})
	if c := rt.completions.Next(t); c.Err != nil || c.Cookie != 0 {
		t.Fatalf("got %+v", c)
	}
	if err := rt.session.Post(write(99, g)); err != nil {
		t.Fatalf("posting after a completion: %v", err)
	}
}

// chain posts the next transfer from within the completion of the last.
type chain struct {
	session backend.Session
	left    int
	done    chan error
}

func (c *chain) Complete(done backend.Completion) {
	if c.left--; done.Err != nil || c.left == 0 {
		c.done <- done.Err
		return
	}
	if err := c.session.Post(read(1, backend.Segment{Length: 512})); err != nil {
		c.done <- err
	}
}

func TestSinkMayPost(t *testing.T) {
	p := newPair(t, 4096, map[string]string{"window": "1"})
	c := &chain{left: 500, done: make(chan error, 1)}
	c.session = bind(t, p.endpoint, 1, p.remote, c)
	must(t, c.session.Post(read(1, backend.Segment{Length: 512})))
	must(t, <-c.done)
}

func TestManySessionsAtOnce(t *testing.T) {
	const workers, rounds, size = 12, 40, 64 << 10
	a, b := node(t, "a", config{}), node(t, "b", config{})
	e := connect(t, a, b)
	var wg sync.WaitGroup
	for w := range workers {
		near, far := make([]byte, size), make([]byte, size)
		a.lend(t, backend.RegionID(w+1), near, 0)
		remote := b.lend(t, backend.RegionID(w+1), far, everything)
		completions := make(backendtest.Signal, 2*rounds)
		s := bind(t, e, backend.RegionID(w+1), remote, completions)
		wg.Go(func() {
			scratch := make([]backend.Segment, 0, 16)
			for i := range rounds {
				fill(near, uint64(w*rounds+i))
				want := bytes.Clone(near)
				for _, op := range []backend.Op{backend.Write, backend.Read} {
					scratch = append(scratch[:0], evenly(16, size)...)
					if err := s.Post(backend.Transfer{Op: op, Segments: scratch, Cookie: uint64(i)}); err != nil {
						t.Error(err)
						return
					}
					for j := range scratch { // the slice is ours again
						scratch[j] = backend.Segment{Local: math.MaxUint64, Remote: math.MaxUint64, Length: 1}
					}
					if err := <-completions; err != nil {
						t.Error(err)
						return
					}
					if op == backend.Write {
						clear(near)
					}
				}
				if !bytes.Equal(near, want) {
					t.Errorf("worker %d read back other bytes than it wrote", w)
					return
				}
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// TestSegmentsBelongToTheCallerAfterPost overwrites them while the transfer still waits for its lane.
func TestSegmentsBelongToTheCallerAfterPost(t *testing.T) {
	rt := newRawTarget(t, 16<<20, nil)
	fill(rt.near, 5)
	if err := rt.session.Post(write(1, backend.Segment{Length: 16 << 20})); err != nil { // fills the lane
		t.Fatal(err)
	}
	segments := []backend.Segment{{Local: 100, Remote: 200, Length: 300}}
	must(t, rt.session.Post(write(2, segments...)))
	segments[0] = backend.Segment{}
	rt.readRequest(t)
	r := rt.readRequest(t)
	if len(r.spans) != 1 || r.spans[0] != (span{200, 300}) || !bytes.Equal(r.payload, rt.near[100:400]) {
		t.Fatalf("the transfer went out as %+v", r.spans)
	}
}

// TestPosterHandsOver lets posters find the socket full, so that the writer has to send the rest of their frames.
func TestPosterHandsOver(t *testing.T) {
	const n, size = 64, 32 << 10
	rt := newRawTarget(t, n*size, map[string]string{"send_buffer": "8KiB"})
	fill(rt.near, 11)
	for i, g := range evenly(n, n*size) {
		must(t, rt.session.Post(write(uint64(i), g)))
	}
	for range n {
		r := rt.readRequest(t)
		at := r.spans[0].offset
		if !bytes.Equal(r.payload, rt.near[at:at+size]) {
			t.Fatalf("the payload for offset %d is wrong", at)
		}
		rt.reply(t, reply{id: r.id})
	}
	for _, c := range rt.completions.Collect(t, n) {
		if c.Err != nil {
			t.Error(c.Err)
		}
	}
}

func TestPostRefuses(t *testing.T) {
	p := newPair(t, 4096, nil)
	p.b.lend(t, 3, make([]byte, 4096), backend.RemoteRead)
	readOnly := p.remote
	readOnly.Region, readOnly.Rights = 3, backend.RemoteRead
	noWrites := bind(t, p.endpoint, 1, readOnly, p.completions)
	tests := map[string]struct {
		session  *session
		transfer backend.Transfer
		code     backend.Code
	}{
		"no segments":         {p.session, write(1), backend.BadRequest},
		"empty segment":       {p.session, write(1, backend.Segment{}), backend.BadRequest},
		"beyond the local":    {p.session, write(1, backend.Segment{Local: 4000, Length: 97}), backend.BadRequest},
		"beyond the remote":   {p.session, read(1, backend.Segment{Remote: 4096, Length: 1}), backend.BadRequest},
		"local overflow":      {p.session, read(1, backend.Segment{Local: math.MaxUint64, Length: 2}), backend.BadRequest},
		"remote overflow":     {p.session, write(1, backend.Segment{Remote: math.MaxUint64 - 1, Length: 4096}), backend.BadRequest},
		"length overflow":     {p.session, write(1, backend.Segment{Length: math.MaxUint64}), backend.BadRequest},
		"second segment":      {p.session, write(1, backend.Segment{Length: 1}, backend.Segment{Local: 1, Remote: 4096, Length: 1}), backend.BadRequest},
		"too many segments":   {p.session, read(1, slices.Repeat([]backend.Segment{{Length: 1}}, maxSegments+1)...), backend.BadRequest},
		"no operation":        {p.session, backend.Transfer{Segments: evenly(1, 64)}, backend.Unsupported},
		"both operations":     {p.session, backend.Transfer{Op: backend.Write | backend.Read, Segments: evenly(1, 64)}, backend.Unsupported},
		"no right to write":   {noWrites, write(1, backend.Segment{Length: 1}), backend.Denied},
		"right to read stays": {noWrites, read(1, backend.Segment{Length: 1}), 0},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := test.session.Post(test.transfer)
			if test.code == 0 {
				must(t, err)
				if c := p.completions.Next(t); c.Err != nil {
					t.Fatal(c.Err)
				}
				return
			}
			wantCode(t, err, test.code)
			var e *backend.Error
			if errors.As(err, &e); e.Peer.Node != "b" || e.Region == 0 || e.Backend != "tcp" {
				t.Errorf("the error does not say where: %v", err)
			}
			p.completions.Empty(t)
		})
	}
	p.must(t, write(7, evenly(1, 4096)...)) // the endpoint is as good as before
}

func TestSessionRefuses(t *testing.T) {
	p := newPair(t, 64, nil)
	tests := map[string]struct {
		local  backend.RegionID
		change func(*backend.Remote)
		code   backend.Code
	}{
		"unknown local region": {77, func(*backend.Remote) {}, backend.BadRequest},
		"another incarnation":  {1, func(r *backend.Remote) { r.Peer.Incarnation++ }, backend.PeerGone},
		"another node":         {1, func(r *backend.Remote) { r.Peer.Node = "c" }, backend.BadRequest},
		"memory of a GPU":      {1, func(r *backend.Remote) { r.Kind = backend.GPUMemory }, backend.Unsupported},
		"no remote region":     {1, func(r *backend.Remote) { r.Region = 0 }, backend.BadRequest},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			remote := p.remote
			test.change(&remote)
			_, err := p.endpoint.Session(t.Context(), test.local, remote, p.completions)
			wantCode(t, err, test.code)
		})
	}
}

func TestRegisterRefuses(t *testing.T) {
	a := node(t, "a", config{})
	good := backend.Memory{Region: 1, Kind: backend.HostMemory, Bytes: make([]byte, 8), FD: -1}
	if _, err := a.Register(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	_, err := a.Register(t.Context(), good)
	wantCode(t, err, backend.BadRequest)
	_, err = a.Register(t.Context(), backend.Memory{Region: 2, Kind: backend.HostMemory, FD: -1})
	wantCode(t, err, backend.BadRequest)
	_, err = a.Register(t.Context(), backend.Memory{Kind: backend.HostMemory, Bytes: good.Bytes, FD: -1})
	wantCode(t, err, backend.BadRequest)
	_, err = a.Register(t.Context(), backend.Memory{Region: 2, Kind: backend.GPUMemory, Bytes: good.Bytes, FD: -1})
	wantCode(t, err, backend.Unsupported)
	for range 2 {
		must(t, a.Deregister(t.Context(), 1))
	}
	if _, err := a.Register(t.Context(), good); err != nil {
		t.Fatalf("registering again after Deregister: %v", err)
	}
}

type waker struct {
	done   chan struct{}
	failed atomic.Pointer[error]
}

func (w *waker) Complete(c backend.Completion) {
	if c.Err != nil {
		err := c.Err // a copy that only a failure pays for
		w.failed.Store(&err)
	}
	w.done <- struct{}{}
}

func TestTransfersDoNotAllocate(t *testing.T) {
	p := newPair(t, 1<<20, nil)
	w := &waker{done: make(chan struct{}, 1)}
	s := bind(t, p.endpoint, 1, p.remote, w)
	for _, transfer := range []backend.Transfer{
		write(1, evenly(1, 4096)...), read(1, evenly(1, 4096)...),
		write(1, evenly(256, 1<<20)...), read(1, evenly(256, 1<<20)...),
	} {
		for how, post := range map[string]func(backend.Transfer) error{"Post": s.Post, "PostWait": s.PostWait} {
			round := func() {
				must(t, post(transfer))
				<-w.done
			}
			for range 20 {
				round()
			}
			if n := testing.AllocsPerRun(100, round); n != 0 {
				t.Errorf("%s of a %s of %d segments allocates %v times", how, transfer.Op, len(transfer.Segments), n)
			}
		}
	}
	if err := w.failed.Load(); err != nil {
		t.Fatal(*err)
	}
}
