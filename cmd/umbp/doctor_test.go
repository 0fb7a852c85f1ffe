package main

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

func TestCompareNamesTheFirstWrongByte(t *testing.T) {
	source := []byte("a value")
	for name, c := range map[string]struct {
		spoil func(around []byte)
		want  string // empty: all is right
	}{
		"right":  {func([]byte) {}, ""},
		"first":  {func(a []byte) { a[patternGuard] = 'b' }, "byte 0 came back as 0x62, and was put as 0x61"},
		"two":    {func(a []byte) { a[patternGuard+3] = 'x'; a[patternGuard+5] = 'x' }, "byte 3 came back as 0x78"},
		"before": {func(a []byte) { a[patternGuard-1] = 0 }, "the byte at -1, beside the value of 7, was overwritten with 0x00"},
		"behind": {func(a []byte) { a[patternGuard+len(source)] = 1 }, "the byte at +7, beside the value of 7, was overwritten with 0x01"},
	} {
		around := bytes.Repeat([]byte{guardByte}, len(source)+2*patternGuard)
		copy(around[patternGuard:], source)
		c.spoil(around)
		err := compare(around, source)
		if c.want == "" && err != nil || c.want != "" && (backend.CodeOf(err) != backend.Integrity || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func TestNeeded(t *testing.T) {
	works := map[string]bool{"tcp": true, "shm": true, "rdma": false}
	for _, c := range []struct {
		rules []selector.Rule
		want  bool
	}{
		{nil, false},
		{[]selector.Rule{{Require: []string{"tcp"}}}, false},
		{[]selector.Rule{{Require: []string{"rdma"}}}, true},
		{[]selector.Rule{{Require: []string{"rdma", "tcp"}}}, false},
		{[]selector.Rule{{Prefer: []string{"rdma"}, Allow: []string{"tcp"}}}, false},
		{[]selector.Rule{{Prefer: []string{"rdma"}, Allow: []string{"gone"}}}, true},
		{[]selector.Rule{{Require: []string{"rdma", "tcp"}}, {Require: []string{"rdma"}}}, true},
	} {
		if got := needed(c.rules, "rdma", works); got != c.want {
			t.Errorf("%+v: needed %t, want %t", c.rules, got, c.want)
		}
	}
}

func TestApplied(t *testing.T) {
	truth := true
	for _, c := range []struct {
		name     string
		match    selector.Match
		sameHost bool
		remote   backend.MemoryKind
		want     bool
	}{
		{"all", selector.Match{}, false, backend.HostMemory, true},
		{"hosts' memory", selector.Match{Local: backend.HostMemory, Remote: backend.HostMemory}, false, backend.HostMemory, true},
		{"a GPU's memory", selector.Match{Remote: backend.GPUMemory}, false, backend.HostMemory, false},
		{"a GPU's memory, of a pool there", selector.Match{Remote: backend.GPUMemory}, false, backend.GPUMemory, true},
		{"hosts' memory, of a pool on a GPU", selector.Match{Remote: backend.HostMemory}, false, backend.GPUMemory, false},
		{"a GPU's memory here", selector.Match{Local: backend.GPUMemory}, false, backend.GPUMemory, false},
		{"reads", selector.Match{Op: backend.Read}, false, backend.HostMemory, true},
		{"the same host", selector.Match{SameHost: &truth}, true, backend.HostMemory, true},
		{"another host", selector.Match{SameHost: &truth}, false, backend.HostMemory, false},
		{"the same node", selector.Match{SameNode: &truth}, true, backend.HostMemory, false},
		{"large ones", selector.Match{MinSize: 8 << 20}, false, backend.HostMemory, true},
		{"larger ones", selector.Match{MinSize: 8<<20 + 1}, false, backend.HostMemory, false},
		{"small ones", selector.Match{MaxSize: 1}, false, backend.HostMemory, true},
	} {
		rules := []selector.Rule{{Match: c.match, Prefer: []string{"x"}}, {Require: []string{"y"}}}
		decide := applied(rules, c.sameHost, c.remote)
		got := slices.ContainsFunc(decide, func(r selector.Rule) bool { return slices.Contains(named(r), "x") })
		if got != c.want {
			t.Errorf("%s: these rules decide: %+v", c.name, decide)
		}
	}
}

// TestRelaxPatterns: that one backend works with a node makes up for another one where every rule that names that one
// names it, too.
func TestRelaxPatterns(t *testing.T) {
	tcpOrRDMA := selector.Rule{Prefer: []string{"rdma"}, Allow: []string{"tcp"}}
	onlyRDMA := selector.Rule{Match: selector.Match{Op: backend.Read}, Require: []string{"rdma"}}
	for name, c := range map[string]struct {
		policy []selector.Rule
		tcp    bool // works
		wrong  bool
		want   backend.FindingState
	}{
		"another works":         {[]selector.Rule{tcpOrRDMA}, true, false, backend.Warning},
		"none works":            {[]selector.Rule{tcpOrRDMA}, false, false, backend.Problem},
		"another does not read": {[]selector.Rule{onlyRDMA, tcpOrRDMA}, true, false, backend.Problem},
		"wrong bytes":           {[]selector.Rule{tcpOrRDMA}, true, true, backend.Problem},
	} {
		rows := []patternRow{{Backend: "rdma", State: backend.Problem, wrong: c.wrong}, {Backend: "tcp"}}
		relaxPatterns(rows, c.policy, map[string]bool{"rdma": false, "tcp": c.tcp})
		if rows[0].State != c.want || rows[1].State != backend.Fine {
			t.Errorf("%s: %+v, want %s", name, rows, c.want)
		}
	}
}
