package shm

import (
	"slices"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// TestTargetKilledUnderWorkers kills the target while workers copy: nobody crashes, and all is accounted for.
func TestTargetKilledUnderWorkers(t *testing.T) {
	const size = 16 * mib
	a := newInstance(t, peer("a", 1), "window=8")
	register(t, a, memory(t, 1, size, 0))
	b := startChild(t, peer("b", 2))
	remote := b.register(t, RegionArgs{ID: 5, Size: size, Rights: all})
	e := connect(t, a, b.self, b)
	k := newSink()
	s, err := e.Session(soon(t), 1, remote, k)
	must(t, err)
	posted := uint64(0)
	for err == nil || backend.CodeOf(err) == backend.Busy {
		switch err = post(s, backend.Write, posted, backend.Segment{Length: size}); backend.CodeOf(err) {
		case 0:
			if posted++; posted == 4 {
				must(t, b.cmd.Process.Kill())
			}
		case backend.Busy:
			<-k.more // of those that are in flight, one will complete
		}
	}
	wantCode(t, err, backend.PathDown)
	must(t, s.Close())
	if uint64(len(k.got)) != posted || len(k.twin) > 0 {
		t.Errorf("%d of %d transfers completed", len(k.got), posted)
	}
	for cookie, c := range k.got {
		if c.Err != nil && (backend.CodeOf(c.Err) != backend.PathDown || slices.Contains(c.Outcomes, backend.Done)) {
			t.Errorf("transfer %d: %v, outcomes %v", cookie, c.Err, c.Outcomes)
		}
	}
}

// TestCloseWhileCopying closes everything while workers copy between two processes, and wants nothing mapped after that.
func TestCloseWhileCopying(t *testing.T) {
	a := newInstance(t, peer("a", 1))
	register(t, a, memory(t, 1, 64*mib, 0))
	b := startChild(t, peer("b", 2))
	remote := b.register(t, RegionArgs{ID: 5, Size: 64 * mib, Rights: all})
	before := protections(t)
	k := newSink()
	s, err := connect(t, a, b.self, b).Session(soon(t), 1, remote, k)
	must(t, err)
	for cookie := range uint64(4) {
		must(t, post(s, backend.Write, cookie, backend.Segment{Length: 64 * mib}))
	}
	must(t, a.Close())
	if len(k.got) != 4 {
		t.Errorf("%d transfers have completed when Close returns, want 4", len(k.got))
	}
	for cookie, c := range k.got {
		if c.Err != nil {
			wantCode(t, c.Err, backend.PathDown)
			if c.Outcomes[0] == backend.Done {
				t.Errorf("transfer %d ended early, and says that all is done", cookie)
			}
		}
	}
	if got := protections(t); !slices.Equal(got, before) {
		t.Errorf("mappings have the permissions %v, want %v", got, before)
	}
}
