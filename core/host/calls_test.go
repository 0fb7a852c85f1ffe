package host

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/fault"
	"github.com/umbp/umbp/plugin-sdk/null"
)

// TestCalls counts what is called on a backend that is linked in; one that is a process goes the same way.
func TestCalls(t *testing.T) {
	log := &record{}
	refuses := errors.New("it refuses")
	wrap := func(b backend.Backend) backend.Backend { return refusing{b, refuses} }
	backends, err := Open(t.Context(), backend.Config{Self: self, Log: log}, []Spec{{Factory: null.Factory, Wrap: wrap}})
	if err != nil {
		t.Fatal(err)
	}
	defer Close(backends)
	b := &backends[0]
	lend(t, b.Backend, 1)
	lend(t, b.Backend, 2)
	l, err := connect(t.Context(), b.Backend, 1)
	if err != nil {
		t.Fatal(err)
	}
	before := len(log.lines)
	if err := l.post(3); err != nil {
		t.Fatal(err)
	}
	if <-l.completed; len(log.lines) != before {
		t.Errorf("a transfer is logged: %q", log.lines[before:])
	}
	if err := b.Backend.Deregister(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	if err := b.Backend.Fence(t.Context(), self); !errors.Is(err, refuses) {
		t.Errorf("Fence returns %v", err)
	}
	if _, err := b.Backend.Answer(t.Context(), self, nil); err == nil {
		t.Error("Answer accepts nothing")
	}
	type count struct{ calls, errors uint64 }
	want := map[string]count{
		"register": {2, 0}, "deregister": {1, 0}, "offer": {1, 0}, "answer": {1, 1}, "establish": {1, 0}, "session": {1, 0}, "fence": {1, 1},
	}
	for _, c := range b.Calls() {
		if (count{c.Count, c.Errors}) != want[c.Op] || c.Time < 0 || c.Op == "fence" && c.Time < refusalTime {
			t.Errorf("%+v, want %+v", c, want[c.Op])
		}
		delete(want, c.Op)
		if log.count("call "+c.Op+" ") != int(c.Count) {
			t.Errorf("%d calls of %s are logged, of %d", log.count("call "+c.Op+" "), c.Op, c.Count)
		}
	}
	if len(want) != 0 {
		t.Errorf("not counted are %v", want)
	}
	if !slices.ContainsFunc(log.lines, func(l string) bool { return strings.Contains(l, "fence") && strings.Contains(l, "error it refuses") }) {
		t.Errorf("the log does not say why a call failed: %q", log.lines)
	}
	if none := (&Backend{Err: refuses}).Calls(); none != nil {
		t.Errorf("a backend that is not to be had has calls: %v", none)
	}
}

// TestCountersLinked: what a backend counts is handed on by all that wraps it.
func TestCountersLinked(t *testing.T) {
	wrap := func(b backend.Backend) backend.Backend { return fault.Wrap(moody{b, "good"}, &fault.Script{}) }
	backends, err := Open(t.Context(), backend.Config{Self: self}, []Spec{
		{Factory: null.Factory, Wrap: wrap}, {Factory: null.Factory},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer Close(backends)
	if got, want := backends[0].Counters(), []backend.Count{{Name: "moods", Value: 4}, {Name: "none"}}; !slices.Equal(got, want) {
		t.Errorf("the counters are %v, want %v", got, want)
	}
	for _, none := range []*Backend{&backends[1], {Err: errors.New("not to be had")}} {
		if got := none.Counters(); got != nil {
			t.Errorf("the counters are %v, want none", got)
		}
	}
}

// refusalTime is how long refusing takes at least.
const refusalTime = time.Millisecond

// refusing fences nobody.
type refusing struct {
	backend.Backend
	err error
}

func (r refusing) Fence(context.Context, backend.Peer) error {
	time.Sleep(refusalTime)
	return r.err
}
