package inuse_test

import (
	"maps"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/inuse"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// TestGate holds a gate against a count.
func TestGate(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var g inuse.Gate
		inside, shut := 0, false
		var empty <-chan struct{}
		t.Repeat(map[string]func(*rapid.T){
			"enter": func(t *rapid.T) {
				if g.Enter() == shut {
					t.Fatalf("Enter returns %t, shut is %t", !shut, shut)
				}
				if !shut {
					inside++
				}
			},
			"leave": func(t *rapid.T) {
				if inside == 0 {
					t.Skip("nobody is inside")
				}
				g.Leave()
				inside--
			},
			"shut": func(t *rapid.T) {
				c := g.Shut()
				if empty != nil && c != empty {
					t.Fatal("another channel")
				}
				empty, shut = c, true
			},
			"": func(t *rapid.T) {
				if g.IsShut() != shut || g.Inside() != int64(inside) {
					t.Fatalf("shut %t with %d inside, want %t with %d", g.IsShut(), g.Inside(), shut, inside)
				}
				if shut && closed(empty) != (inside == 0) {
					t.Fatalf("the end is %t with %d inside", closed(empty), inside)
				}
			},
		})
	})
}

// TestShutWaits shuts a gate that many go through. What they touched inside belongs to the one who waited, which the
// race detector sees.
func TestShutWaits(t *testing.T) {
	for range 50 {
		var g inuse.Gate
		var touched [4]int
		var entered, turnedAway sync.WaitGroup
		entered.Add(len(touched))
		for i := range touched {
			turnedAway.Go(func() {
				for g.Enter() {
					touched[i]++
					if touched[i] == 1 {
						entered.Done()
					}
					g.Leave()
					runtime.Gosched()
				}
			})
		}
		entered.Wait()
		<-g.Shut()
		was := touched
		turnedAway.Wait()
		if touched != was {
			t.Fatalf("touched %v when the gate was empty, and %v later", was, touched)
		}
		if <-g.Shut(); g.Enter() {
			t.Fatal("somebody entered a gate that is shut")
		}
	}
}

// TestTable holds a table against a map.
func TestTable(t *testing.T) {
	type region struct{ number int }
	rapid.Check(t, func(t *rapid.T) {
		var table inuse.Table[region]
		want := map[backend.RegionID]*region{}
		var known []*region
		id := rapid.Uint64Range(0, 4)
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				id, r := backend.RegionID(id.Draw(t, "id")), &region{len(known)}
				known = append(known, r)
				before := maps.Collect(table.All())
				all := table.All()
				_, taken := want[id]
				if table.Add(id, r) == taken {
					t.Fatalf("Add(%d) returns %t", id, taken)
				}
				if !taken {
					want[id] = r
				}
				if diff := cmp.Diff(before, maps.Collect(all), cmp.AllowUnexported(region{})); diff != "" {
					t.Fatalf("what All returned has changed (-before +after):\n%s", diff)
				}
			},
			"remove": func(t *rapid.T) {
				if len(known) == 0 {
					t.Skip("no region was made")
				}
				id, r := backend.RegionID(id.Draw(t, "id")), rapid.SampledFrom(known).Draw(t, "region")
				had := want[id] == r
				if table.Remove(id, r) != had {
					t.Fatalf("Remove(%d, %d) returns %t", id, r.number, !had)
				}
				if had {
					delete(want, id)
				}
			},
			"": func(t *rapid.T) {
				for id := range backend.RegionID(5) {
					if table.Get(id) != want[id] {
						t.Fatalf("Get(%d) returns %v, want %v", id, table.Get(id), want[id])
					}
				}
				if got := maps.Collect(table.All()); !maps.Equal(got, want) {
					t.Fatalf("All returns %v, want %v", got, want)
				}
			},
		})
	})
}

// TestTableTogether adds and removes at once: of those who want an id one gets it.
func TestTableTogether(t *testing.T) {
	var table inuse.Table[int]
	var added, removed atomic.Int64
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for id := range backend.RegionID(50) {
				if table.Add(id, &i) {
					added.Add(1)
				}
				if r := table.Get(id); r != nil && table.Remove(id, r) {
					removed.Add(1)
				}
			}
		})
	}
	all.Wait()
	left := len(maps.Collect(table.All()))
	if added.Load()-removed.Load() != int64(left) || added.Load() < 50 {
		t.Errorf("added %d, removed %d, left %d", added.Load(), removed.Load(), left)
	}
}

func BenchmarkGate(b *testing.B) {
	var g inuse.Gate
	for b.Loop() {
		if g.Enter() {
			g.Leave()
		}
	}
}

func BenchmarkTable(b *testing.B) {
	var table inuse.Table[int]
	for id := range backend.RegionID(64) {
		table.Add(id+1, new(int))
	}
	for b.Loop() {
		if table.Get(33) == nil {
			b.Fatal("the region is not there")
		}
	}
}
