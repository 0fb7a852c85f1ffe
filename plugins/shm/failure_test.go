package shm

import (
	"slices"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/backendtest"
)

// TestTargetKilledUnderWorkers kills the target while workers copy: nobody crashes, and all is accounted for.
func TestTargetKilledUnderWorkers(t *testing.T) {
	const size = 16 * mib
	a := newInstance(t, peer("a", 1), "window=8")
	register(t, a, memory(t, 1, size, 0))
	b := startChild(t, peer("b", 2))
	remote := b.Register(t, regionArgs{ID: 5, Size: size, Rights: all})
	e := connect(t, a, b.Self, b)
	k := new(sink)
	s := bind(t, e, 1, remote, k)
	posted := uint64(0)
	var err error
	for err == nil {
		if err = backendtest.PostWhenFree(s, backend.Write, posted, backend.Segment{Length: size}); err == nil {
			if posted++; posted == 4 {
				must(t, b.Kill())
			}
		}
	}
	wantCode(t, err, backend.PathDown)
	must(t, s.Close())
	all := k.All(t)
	if uint64(len(all)) != posted {
		t.Errorf("%d of %d transfers completed", len(all), posted)
	}
	for _, c := range all {
		if c.Err != nil && (backend.CodeOf(c.Err) != backend.PathDown || slices.Contains(c.Outcomes, backend.Done)) {
			t.Errorf("transfer %d: %v, outcomes %v", c.Cookie, c.Err, c.Outcomes)
		}
	}
}

// TestCloseWhileCopying closes everything while workers copy between two processes, and wants nothing mapped after that.
func TestCloseWhileCopying(t *testing.T) {
	a := newInstance(t, peer("a", 1))
	register(t, a, memory(t, 1, 64*mib, 0))
	b := startChild(t, peer("b", 2))
	remote := b.Register(t, regionArgs{ID: 5, Size: 64 * mib, Rights: all})
	before := protections(t)
	k := new(sink)
	s := bind(t, connect(t, a, b.Self, b), 1, remote, k)
	for cookie := range uint64(4) {
		must(t, post(s, backend.Write, cookie, backend.Segment{Length: 64 * mib}))
	}
	must(t, a.Close())
	done := k.All(t)
	if len(done) != 4 {
		t.Errorf("%d transfers have completed when Close returns, want 4", len(done))
	}
	for _, c := range done {
		if c.Err != nil {
			wantCode(t, c.Err, backend.PathDown)
			if c.Outcomes[0] == backend.Done {
				t.Errorf("transfer %d ended early, and says that all is done", c.Cookie)
			}
		}
	}
	if got := protections(t); !slices.Equal(got, before) {
		t.Errorf("mappings have the permissions %v, want %v", got, before)
	}
}
