package tcp

import (
	"io"
	"net"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

// touch gives memory pages of its own: what was never written is one page of zeros, which is always in the cache.
func touch(b []byte) { fill(b, 1) }

// benchmarkTransfer posts one transfer after the other.
func benchmarkTransfer(b *testing.B, size int, transfer backend.Transfer) {
	benchmarkPosts(b, size, func(s *session) error { return s.Post(transfer) })
}

// benchmarkLone is benchmarkTransfer for a goroutine that has nothing else to do.
func benchmarkLone(b *testing.B, size int, transfer backend.Transfer) {
	benchmarkPosts(b, size, func(s *session) error { return s.PostWait(transfer) })
}

func benchmarkPosts(b *testing.B, size int, post func(s *session) error) {
	p := newPair(b, size, nil)
	touch(p.near)
	touch(p.far)
	w := &waker{done: make(chan struct{}, 1)}
	s := bind(b, p.endpoint, 1, p.remote, w)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for b.Loop() {
		if err := post(s); err != nil {
			b.Fatal(err)
		}
		<-w.done
	}
	if err := w.failed.Load(); err != nil {
		b.Fatal(*err)
	}
}

// bareConnection returns both ends of a TCP connection over loopback; serve runs on the far one.
func bareConnection(b *testing.B, serve func(net.Conn)) net.Conn {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer l.Close()
		conn, err := l.Accept()
		if err != nil {
			b.Error(err)
			return
		}
		defer conn.Close()
		serve(conn)
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		conn.Close()
		<-done
	})
	return conn
}

// benchmarkBare is the yardstick: send bytes, receive bytes, and nothing else.
func benchmarkBare(b *testing.B, size, request, answer int) {
	conn := bareConnection(b, func(conn net.Conn) {
		in, out := make([]byte, request), make([]byte, answer)
		touch(out)
		for {
			if _, err := io.ReadFull(conn, in); err != nil {
				return
			}
			if _, err := conn.Write(out); err != nil {
				return
			}
		}
	})
	out, in := make([]byte, request), make([]byte, answer)
	touch(out)
	b.SetBytes(int64(size))
	for b.Loop() {
		if _, err := conn.Write(out); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(conn, in); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWrite64MiB(b *testing.B) {
	const size = 64 << 20
	b.Run("bare", func(b *testing.B) { benchmarkBare(b, size, size, 1) })
	b.Run("umbp", func(b *testing.B) { benchmarkTransfer(b, size, write(1, evenly(1, size)...)) })
}

func BenchmarkRead64MiB(b *testing.B) {
	const size = 64 << 20
	b.Run("bare", func(b *testing.B) { benchmarkBare(b, size, 1, size) })
	b.Run("umbp", func(b *testing.B) { benchmarkTransfer(b, size, read(1, evenly(1, size)...)) })
}

// scattered lists n pages of 4 KiB in an order in which no two touch on both sides.
func scattered(n int) []backend.Segment {
	segments := evenly(n, n*4096)
	for i := range segments {
		segments[i].Local = uint64(n-1-i) * 4096
	}
	return segments
}

func BenchmarkWrite256x4KiB(b *testing.B) {
	const size = 256 * 4096
	b.Run("bare", func(b *testing.B) { benchmarkBare(b, size, size, 1) })
	b.Run("umbp", func(b *testing.B) { benchmarkTransfer(b, size, write(1, scattered(256)...)) })
}

func BenchmarkRead256x4KiB(b *testing.B) {
	const size = 256 * 4096
	b.Run("bare", func(b *testing.B) { benchmarkBare(b, size, 1, size) })
	b.Run("umbp", func(b *testing.B) { benchmarkTransfer(b, size, read(1, scattered(256)...)) })
}

// The bare round trips send as many bytes as a request and its reply have.
func BenchmarkRead4KiB(b *testing.B) {
	b.Run("bare", func(b *testing.B) { benchmarkBare(b, 4096, requestSize+spanSize, replySize+4096) })
	b.Run("umbp", func(b *testing.B) { benchmarkTransfer(b, 4096, read(1, evenly(1, 4096)...)) })
	b.Run("lone", func(b *testing.B) { benchmarkLone(b, 4096, read(1, evenly(1, 4096)...)) })
}

func BenchmarkWrite4KiB(b *testing.B) {
	b.Run("bare", func(b *testing.B) { benchmarkBare(b, 4096, requestSize+spanSize+4096, replySize) })
	b.Run("umbp", func(b *testing.B) { benchmarkTransfer(b, 4096, write(1, evenly(1, 4096)...)) })
	b.Run("lone", func(b *testing.B) { benchmarkLone(b, 4096, write(1, evenly(1, 4096)...)) })
}

func BenchmarkPipelined4KiB(b *testing.B) {
	p := newPair(b, 4096, nil)
	done := make(backendtest.Signal, 128)
	s := bind(b, p.endpoint, 1, p.remote, done)
	b.SetBytes(4096)
	inFlight := 0
	for b.Loop() {
		if inFlight == 128 {
			if err := <-done; err != nil {
				b.Fatal(err)
			}
			inFlight--
		}
		if err := s.Post(read(1, backend.Segment{Length: 4096})); err != nil {
			b.Fatal(err)
		}
		inFlight++
	}
	for ; inFlight > 0; inFlight-- {
		<-done
	}
}
