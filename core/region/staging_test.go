package region

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// inLine starts an Acquire and returns when it waits in the queue. The function returned waits for its end.
func inLine(t *testing.T, s *Staging, ctx context.Context, n uint64) func() (uint64, error) {
	t.Helper()
	var offset uint64
	var err error
	before := waiting(s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		offset, err = s.Acquire(ctx, n)
	}()
	for waiting(s) == before {
		select {
		case <-done:
			t.Fatalf("acquire of %d did not wait: %d, %v", n, offset, err)
		case <-t.Context().Done():
			t.Fatal("the test has ended")
		default:
		}
	}
	return func() (uint64, error) { <-done; return offset, err }
}

func waiting(s *Staging) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiters.Len()
}

func TestStagingRoundsToUnits(t *testing.T) {
	s := NewStaging(1000, 64)
	if s.Size() != 960 {
		t.Fatalf("size is %d", s.Size())
	}
	a, _ := s.TryAcquire(1)
	b, _ := s.TryAcquire(64)
	c, _ := s.TryAcquire(65)
	d, ok := s.TryAcquire(960 - 4*64)
	if a != 0 || b != 64 || c != 128 || d != 256 || !ok || s.InUse() != 960 {
		t.Fatalf("offsets %d %d %d %d, %v, %d in use", a, b, c, d, ok, s.InUse())
	}
	if _, ok := s.TryAcquire(1); ok {
		t.Error("took from what is full")
	}
	s.Release(a, 1)
	s.Release(c, 65)
	if _, ok := s.TryAcquire(129); ok {
		t.Error("three units are free, and not contiguous")
	}
	s.Release(b, 64)
	s.Release(d, 960-4*64)
	if e, ok := s.TryAcquire(960); e != 0 || !ok {
		t.Error("what was released does not form one piece again")
	}
}

func TestStagingRefusesWhatNeverFits(t *testing.T) {
	s := NewStaging(1<<20, 4096)
	for _, n := range []uint64{0, 1<<20 + 1, 1<<64 - 1} {
		_, err := s.Acquire(t.Context(), n)
		if backend.CodeOf(err) != backend.BadRequest {
			t.Fatalf("acquire of %d: %v", n, err)
		}
		for _, word := range []string{backend.Size(n).String(), "1MiB", "register", "client.staging_size"} {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%q does not name %q", err, word)
			}
		}
		if _, ok := s.TryAcquire(n); ok {
			t.Errorf("TryAcquire(%d) succeeded", n)
		}
	}
	if s.InUse() != 0 {
		t.Errorf("%d in use", s.InUse())
	}
}

func TestStagingServesInOrder(t *testing.T) {
	s := NewStaging(8, 1)
	s.TryAcquire(8)
	large := inLine(t, s, t.Context(), 6)
	small := inLine(t, s, t.Context(), 1)

	s.Release(0, 2) // enough for the small one, which came second
	if waiting(s) != 2 || s.InUse() != 6 {
		t.Fatalf("%d wait, %d in use: the small one overtook the large one", waiting(s), s.InUse())
	}
	if _, ok := s.TryAcquire(1); ok {
		t.Fatal("TryAcquire overtook those who wait")
	}
	s.Release(2, 4)
	if offset, err := large(); offset != 0 || err != nil {
		t.Fatal(offset, err)
	}
	s.Release(6, 2)
	if offset, err := small(); offset != 6 || err != nil {
		t.Fatal(offset, err)
	}
}

func TestStagingGivesUp(t *testing.T) {
	s := NewStaging(8, 1)
	s.TryAcquire(6)
	ctx, cancel := context.WithCancel(t.Context())
	large := inLine(t, s, ctx, 8)
	small := inLine(t, s, t.Context(), 2)
	cancel()
	_, err := large()
	if !errors.Is(err, backend.ErrCancelled) || !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	if offset, err := small(); offset != 6 || err != nil { // it had only waited behind the large one
		t.Fatal(offset, err)
	}
	if _, err := s.Acquire(ctx, 1); backend.CodeOf(err) != backend.Cancelled {
		t.Fatalf("acquire with a context that has ended: %v", err)
	}
}

// TestStagingServedWhileGivingUp plays the race in which a waiter is served after it has decided to give up.
func TestStagingServedWhileGivingUp(t *testing.T) {
	s := NewStaging(8, 1)
	s.TryAcquire(8)
	w := &waiter{n: 5, served: make(chan struct{})}
	place := s.waiters.PushBack(w)
	next := inLine(t, s, t.Context(), 8)
	s.Release(0, 8)
	<-w.served
	s.leave(w, place)
	if offset, err := next(); offset != 0 || err != nil {
		t.Fatal(offset, err)
	}
	s.Release(0, 8)
	if s.InUse() != 0 {
		t.Errorf("%d bytes are lost", s.InUse())
	}
}

func TestStagingQueueIsBounded(t *testing.T) {
	s := NewStaging(1, 1)
	s.TryAcquire(1)
	ctx, cancel := context.WithCancel(t.Context())
	var waiters sync.WaitGroup
	for range maxStagingWaiters {
		waiters.Go(func() {
			if _, err := s.Acquire(ctx, 1); backend.CodeOf(err) != backend.Cancelled {
				t.Errorf("a waiter got %v", err)
			}
		})
	}
	for waiting(s) < maxStagingWaiters {
		if t.Context().Err() != nil {
			t.Fatal("the test has ended")
		}
	}
	if _, err := s.Acquire(ctx, 1); !errors.Is(err, backend.ErrBusy) {
		t.Errorf("one waiter too many got %v", err)
	}
	cancel()
	waiters.Wait()
	if waiting(s) != 0 || s.InUse() != 1 {
		t.Errorf("%d wait, %d in use", waiting(s), s.InUse())
	}
}

func TestStagingRefusesBadRelease(t *testing.T) {
	s := NewStaging(64, 8)
	s.TryAcquire(32)
	for _, r := range [][2]uint64{{0, 0}, {4, 8}, {32, 8}, {24, 16}, {56, 16}, {64, 8}, {8, 1 << 63}, {1 << 40, 8}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("release of [%d, +%d) did not panic", r[0], r[1])
				}
			}()
			s.Release(r[0], r[1])
		}()
	}
	s.Release(0, 32)
	if s.InUse() != 0 {
		t.Errorf("%d in use", s.InUse())
	}
}

func TestNewStagingRefusesBadUnits(t *testing.T) {
	for _, unit := range []uint64{0, 1} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("a unit of %d did not panic", unit)
				}
			}()
			NewStaging(1<<40, unit)
		}()
	}
}

// TestStagingUnderLoad has many goroutines acquire, give up and release. No byte is lent twice at a time, and
// none is lost.
func TestStagingUnderLoad(t *testing.T) {
	const size, goroutines, rounds = 64, 32, 200
	s := NewStaging(size, 1)
	memory := make([]int, size) // written by holders only: the race detector sees a byte that is lent twice
	var all sync.WaitGroup
	for g := range goroutines {
		all.Go(func() {
			random := rand.New(rand.NewPCG(7, uint64(g)))
			for range rounds {
				n := 1 + random.Uint64N(size/2)
				ctx, cancel := context.WithCancel(t.Context())
				if random.IntN(2) == 0 {
					go cancel() // at any moment: before, in and after the wait
				}
				offset, err := s.Acquire(ctx, n)
				cancel()
				if err != nil {
					if backend.CodeOf(err) != backend.Cancelled {
						t.Error(err)
					}
					continue
				}
				for i := offset; i < offset+n; i++ {
					memory[i]++
				}
				s.Release(offset, n)
			}
		})
	}
	all.Wait()
	if s.InUse() != 0 || waiting(s) != 0 {
		t.Errorf("%d bytes in use and %d waiters at the end", s.InUse(), waiting(s))
	}
	if _, ok := s.TryAcquire(size); !ok {
		t.Error("the memory does not form one piece again")
	}
}

func TestStagingAllocatesNothingWithoutWaiting(t *testing.T) {
	s, ctx := NewStaging(1<<20, 4096), t.Context()
	if n := testing.AllocsPerRun(100, func() {
		a, _ := s.Acquire(ctx, 5000)
		b, _ := s.TryAcquire(100)
		s.Release(a, 5000)
		s.Release(b, 100)
	}); n != 0 {
		t.Errorf("allocates %v times", n)
	}
}

func BenchmarkStaging(b *testing.B) {
	s, ctx := NewStaging(1<<30, 1<<16), b.Context()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			offset, err := s.Acquire(ctx, 1<<20)
			if err != nil {
				b.Error(err)
				return
			}
			s.Release(offset, 1<<20)
		}
	})
}
