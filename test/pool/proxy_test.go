package pool_test

import (
	"io"
	"net"
	"sync"
	"testing"
)

// proxy stands between a client and the data port of a node. It passes bytes on, until it is told to stop in the
// middle of them.
type proxy struct {
	target string
	l      net.Listener
	wg     sync.WaitGroup
	// stopped gets a token each time that a connection has come to its last byte.
	stopped chan struct{}

	mu    sync.Mutex
	conns map[net.Conn]struct{}
	left  [2]int64 // bytes that may still pass, by direction; -1 for any number
	cut   bool     // after the last byte: cut the connection, or swallow the rest
}

// The directions, as indices of proxy.left.
const (
	toNode = iota
	toClient
)

func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{target: target, l: l, stopped: make(chan struct{}, 100), conns: map[net.Conn]struct{}{}, left: [2]int64{-1, -1}}
	p.wg.Go(p.serve)
	t.Cleanup(func() {
		l.Close()
		p.hangUp()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) address() string { return p.l.Addr().String() }

// stopAfter lets so many bytes pass in one direction, and then either cuts the connection in their middle or swallows
// the rest. After a cut, new connections pass everything.
func (p *proxy) stopAfter(direction int, bytes int64, cut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left[direction], p.cut = bytes, cut
}

func (p *proxy) hangUp() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
	}
}

func (p *proxy) serve() {
	for {
		client, err := p.l.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() {
			defer client.Close()
			node, err := net.Dial("tcp", p.target)
			if err != nil {
				return
			}
			defer node.Close()
			p.mu.Lock()
			p.conns[client], p.conns[node] = struct{}{}, struct{}{}
			p.mu.Unlock()
			hangUp := func() {
				client.Close()
				node.Close()
			}
			var both sync.WaitGroup
			both.Go(func() { p.pass(client, node, toNode); hangUp() })
			both.Go(func() { p.pass(node, client, toClient); hangUp() })
			both.Wait()
			p.mu.Lock()
			delete(p.conns, client)
			delete(p.conns, node)
			p.mu.Unlock()
		})
	}
}

// pass copies until an end of the connection is gone, or until the last byte that may pass.
func (p *proxy) pass(from io.Reader, to io.Writer, direction int) {
	buf := make([]byte, 16<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		p.mu.Lock()
		last := p.left[direction] >= 0 && int64(n) >= p.left[direction]
		if p.left[direction] >= 0 {
			n = int(min(int64(n), p.left[direction]))
			p.left[direction] -= int64(n)
		}
		cut := p.cut
		if last && cut {
			p.left[direction] = -1
		}
		p.mu.Unlock()
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
		if last {
			p.stopped <- struct{}{}
			if !cut {
				io.Copy(io.Discard, from) // until an end is gone
			}
			return
		}
	}
}
