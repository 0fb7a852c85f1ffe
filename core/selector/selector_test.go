package selector_test

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	self   = backend.Peer{Node: "self", Incarnation: region.NewIncarnation(), Host: "here"}
	beside = backend.Peer{Node: "beside", Incarnation: 2, Host: "here"}
	far    = backend.Peer{Node: "far", Incarnation: 3, Host: "there"}
	lost   = backend.Peer{Node: "lost", Incarnation: 4} // says nothing about its host

	start = time.Unix(1000, 0)
)

const both = backend.Write | backend.Read

// The backends of the tests, with their numbers: one of every reach, one with gaps, one that could not be opened.
var backends = []selector.Backend{
	0: made("tcp", both, backend.Network),
	1: made("shm", both, backend.SameHost),
	2: made("mem", both, backend.SameProcess),
	3: {Name: "gpu", Info: backend.Info{Capabilities: backend.Capabilities{
		Ops: backend.Write, Local: backend.Kinds(backend.GPUMemory), Remote: backend.Kinds(backend.HostMemory), Reach: backend.Network,
	}}},
	4: {Name: "rdma", Unavailable: errors.New("no device")},
}

func made(name string, ops backend.Op, reach backend.Reach) selector.Backend {
	host := backend.Kinds(backend.HostMemory)
	return selector.Backend{Name: name, Info: backend.Info{Capabilities: backend.Capabilities{
		Ops: ops, Local: host, Remote: host, Reach: reach,
	}}}
}

func keys(names ...string) map[string][]byte {
	m := map[string][]byte{}
	for _, n := range names {
		m[n] = nil // a backend that needs no key has a nil one
	}
	return m
}

var every = []string{"tcp", "shm", "mem", "gpu", "rdma"}

// ask returns a query for a write of 4096 bytes of host memory, in which every backend knows both ends.
func ask(to backend.Peer, change ...func(*selector.Query)) selector.Query {
	q := selector.Query{
		Local:  &region.Region{ID: 1, Kind: backend.HostMemory, Keys: keys(every...)},
		Remote: &region.Descriptor{Peer: to, ID: 7, Kind: backend.HostMemory, Keys: keys(every...)},
		Op:     backend.Write, Bytes: 4096, Now: start,
	}
	for _, c := range change {
		c(&q)
	}
	return q
}

func require(names ...string) selector.Rule { return selector.Rule{Require: names} }

func is(b bool) *bool { return &b }

// Reasons that a choice gives.
const (
	chosen   = "chosen: the first of the rule that can carry it"
	spare    = "usable; tried if the ones before it fail"
	noRule   = "no rule matches the group"
	notNamed = "not named by rule 1"
)

// table renders candidates as lines that are good to compare: "backend usable: reason".
func table(c *selector.Choice) []string {
	var lines []string
	for _, candidate := range c.Candidates {
		mark := ""
		switch {
		case candidate.Usable:
			mark = " usable"
		case candidate.Down:
			mark = " down"
		}
		lines = append(lines, candidate.Backend+mark+": "+candidate.Reason)
	}
	return lines
}

func TestChoice(t *testing.T) {
	for _, tc := range []struct {
		name  string
		rules []selector.Rule
		query selector.Query
		rule  int
		order []int
		table []string
	}{
		{
			name: "require takes the rule's order, not that of the backends", rules: []selector.Rule{require("shm", "tcp")},
			query: ask(beside), order: []int{1, 0},
			table: []string{"shm usable: " + chosen, "tcp usable: " + spare, "mem: " + notNamed, "gpu: " + notNamed, "rdma: " + notNamed},
		},
		{
			name: "require and nothing else", rules: []selector.Rule{require("shm")},
			query: ask(far), order: nil,
			table: []string{"shm: reaches its own host only", "tcp: " + notNamed, "mem: " + notNamed, "gpu: " + notNamed, "rdma: " + notNamed},
		},
		{
			name:  "prefer, then allow",
			rules: []selector.Rule{{Prefer: []string{"rdma", "shm"}, Allow: []string{"tcp"}}},
			query: ask(beside), order: []int{1, 0},
			table: []string{"rdma: unavailable: no device", "shm usable: " + chosen, "tcp usable: " + spare, "mem: " + notNamed, "gpu: " + notNamed},
		},
		{
			name:  "allow where none of the preferred can",
			rules: []selector.Rule{{Prefer: []string{"rdma", "shm"}, Allow: []string{"tcp"}}},
			query: ask(far), order: []int{0},
			table: []string{"rdma: unavailable: no device", "shm: reaches its own host only", "tcp usable: " + chosen, "mem: " + notNamed, "gpu: " + notNamed},
		},
		{
			name: "a host that is not named is nobody's", rules: []selector.Rule{require("shm", "tcp")},
			query: ask(lost), order: []int{0},
			table: []string{"shm: reaches its own host only", "tcp usable: " + chosen, "mem: " + notNamed, "gpu: " + notNamed, "rdma: " + notNamed},
		},
		{
			name: "the same process", rules: []selector.Rule{require("mem", "shm")},
			query: ask(self), order: []int{2, 1},
			table: []string{"mem usable: " + chosen, "shm usable: " + spare, "tcp: " + notNamed, "gpu: " + notNamed, "rdma: " + notNamed},
		},
		{
			name: "another process", rules: []selector.Rule{require("mem")},
			query: ask(beside), order: nil,
			table: []string{"mem: reaches its own process only", "tcp: " + notNamed, "shm: " + notNamed, "gpu: " + notNamed, "rdma: " + notNamed},
		},
		{
			name: "an operation that is not claimed", rules: []selector.Rule{require("gpu", "tcp")},
			query: ask(far, func(q *selector.Query) { q.Op = backend.Read; q.Local.Kind = backend.GPUMemory }), order: nil,
			table: []string{"gpu: cannot read", "tcp: cannot use local memory of kind gpu", "shm: " + notNamed, "mem: " + notNamed, "rdma: " + notNamed},
		},
		{
			name: "remote memory that is not claimed", rules: []selector.Rule{require("gpu", "tcp")},
			query: ask(far, func(q *selector.Query) { q.Local.Kind = backend.GPUMemory; q.Remote.Kind = backend.GPUMemory }), order: nil,
			table: []string{"gpu: cannot reach memory of kind gpu", "tcp: cannot use local memory of kind gpu", "shm: " + notNamed, "mem: " + notNamed, "rdma: " + notNamed},
		},
		{
			name: "regions that are not registered", rules: []selector.Rule{require("shm", "tcp", "mem")},
			query: ask(self, func(q *selector.Query) {
				q.Local.Keys, q.Remote.Keys = keys("tcp", "mem"), keys("shm", "mem")
			}), order: []int{2},
			table: []string{
				"shm: the local region is not registered with it", "tcp: the peer has not registered the region with it",
				"mem usable: " + chosen, "gpu: " + notNamed, "rdma: " + notNamed,
			},
		},
		{
			name: "a rule that names what this process does not have", rules: []selector.Rule{require("xgmi", "tcp")},
			query: ask(far), order: []int{0},
			table: []string{"xgmi: not configured in this process", "tcp usable: " + chosen, "shm: " + notNamed, "mem: " + notNamed, "gpu: " + notNamed, "rdma: " + notNamed},
		},
		{
			name: "no rule at all", rules: nil, query: ask(far), rule: -1,
			table: []string{"tcp: " + noRule, "shm: " + noRule, "mem: " + noRule, "gpu: " + noRule, "rdma: " + noRule},
		},
		{
			name: "the first rule that matches decides, even when it finds nothing",
			rules: []selector.Rule{
				{Match: selector.Match{Op: backend.Read}, Require: []string{"mem"}},
				{Match: selector.Match{SameHost: is(false)}, Require: []string{"shm"}},
				require("tcp"),
			},
			query: ask(far), rule: 1, order: nil,
			table: []string{
				"shm: reaches its own host only", "tcp: not named by rule 2", "mem: not named by rule 2", "gpu: not named by rule 2", "rdma: not named by rule 2",
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := selector.New(self, backends, tc.rules)
			for _, c := range []*selector.Choice{s.SelectBackend(tc.query), s.SelectBackend(tc.query), s.Explain(tc.query)} {
				if c.Rule != tc.rule {
					t.Errorf("rule %d decided, want %d", c.Rule, tc.rule)
				}
				if diff := cmp.Diff(tc.order, c.Order); diff != "" {
					t.Errorf("the order differs (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(tc.table, table(c)); diff != "" {
					t.Errorf("the reasons differ (-want +got):\n%s", diff)
				}
			}
		})
	}
}

// TestMatch asks with each condition alone, so that the rule behind it decides where it does not hold.
func TestMatch(t *testing.T) {
	gpu := func(q *selector.Query) { q.Local.Kind = backend.GPUMemory }
	remoteGPU := func(q *selector.Query) { q.Remote.Kind = backend.GPUMemory }
	read := func(q *selector.Query) { q.Op = backend.Read }
	size := func(n uint64) func(*selector.Query) { return func(q *selector.Query) { q.Bytes = n } }
	for _, tc := range []struct {
		name     string
		match    selector.Match
		yes, not []selector.Query
	}{
		{"local", selector.Match{Local: backend.GPUMemory}, []selector.Query{ask(far, gpu)}, []selector.Query{ask(far), ask(far, remoteGPU)}},
		{"remote", selector.Match{Remote: backend.GPUMemory}, []selector.Query{ask(far, remoteGPU)}, []selector.Query{ask(far), ask(far, gpu)}},
		{"op", selector.Match{Op: backend.Read}, []selector.Query{ask(far, read)}, []selector.Query{ask(far)}},
		{"same host", selector.Match{SameHost: is(true)}, []selector.Query{ask(beside), ask(self)}, []selector.Query{ask(far), ask(lost)}},
		{"other host", selector.Match{SameHost: is(false)}, []selector.Query{ask(far), ask(lost)}, []selector.Query{ask(beside), ask(self)}},
		{"same node", selector.Match{SameNode: is(true)}, []selector.Query{ask(self)}, []selector.Query{ask(beside), ask(far)}},
		{"other node", selector.Match{SameNode: is(false)}, []selector.Query{ask(beside), ask(far)}, []selector.Query{ask(self)}},
		{"min size", selector.Match{MinSize: 100}, []selector.Query{ask(far, size(100)), ask(far, size(math.MaxUint64))}, []selector.Query{ask(far, size(99))}},
		{"max size", selector.Match{MaxSize: 100}, []selector.Query{ask(far, size(1)), ask(far, size(100))}, []selector.Query{ask(far, size(101))}},
		{"one size", selector.Match{MinSize: 100, MaxSize: 100}, []selector.Query{ask(far, size(100))}, []selector.Query{ask(far, size(99)), ask(far, size(101))}},
		{"the largest size", selector.Match{MaxSize: math.MaxUint64}, []selector.Query{ask(far, size(math.MaxUint64))}, nil},
		{"nothing", selector.Match{}, []selector.Query{ask(far), ask(self, read, gpu)}, nil},
		{"two at once", selector.Match{SameHost: is(true), Op: backend.Read}, []selector.Query{ask(beside, read)}, []selector.Query{ask(beside), ask(far, read)}},
	} {
		s := selector.New(self, backends, []selector.Rule{{Match: tc.match, Require: []string{"tcp"}}, require("tcp")})
		for want, queries := range [][]selector.Query{tc.yes, tc.not} {
			for _, q := range queries {
				if got := s.Explain(q).Rule; got != want {
					t.Errorf("%s: rule %d decided on %+v, want %d", tc.name, got, q, want)
				}
			}
		}
	}
}

func TestCache(t *testing.T) {
	rules := []selector.Rule{{Match: selector.Match{MaxSize: 4096}, Require: []string{"shm"}}, require("tcp", "shm")}
	s := selector.New(self, backends, rules)
	q := ask(beside)
	small := s.SelectBackend(q)
	if s.SelectBackend(q) != small {
		t.Fatal("the same question has another answer")
	}

	// Sizes of one class share an answer; the edge parts two.
	q.Bytes = 1
	if s.SelectBackend(q) != small {
		t.Error("1 byte is not answered like 4096, which no rule tells apart")
	}
	q.Bytes = 4097
	large := s.SelectBackend(q)
	if large == small || large.Rule != 1 || s.SelectBackend(q) != large {
		t.Errorf("4097 bytes: %+v, want an answer of their own", large)
	}
	q.Bytes = 4096
	if s.SelectBackend(q) != small {
		t.Error("another size has displaced the answer")
	}

	// Each of these is another question.
	for name, change := range map[string]func(*selector.Query){
		"op":            func(q *selector.Query) { q.Op = backend.Read },
		"local region":  func(q *selector.Query) { q.Local = &region.Region{ID: 2, Kind: backend.HostMemory} },
		"remote region": func(q *selector.Query) { q.Remote = &region.Descriptor{Peer: beside, ID: 8} },
		"incarnation":   func(q *selector.Query) { q.Remote = &region.Descriptor{Peer: far, ID: 7} },
	} {
		if s.SelectBackend(ask(beside, change)) == small {
			t.Errorf("another %s gets the same answer", name)
		}
	}

	if s.Explain(q) == small {
		t.Error("an explanation comes from the cache")
	}
	s.SetPolicy([]selector.Rule{require("tcp")})
	if c := s.SelectBackend(q); c == small || c.Order[0] != 0 {
		t.Errorf("after another policy: %+v", c)
	}
}

const gpu1, gpu2, gpu3 = "0000:01:00.0", "0000:02:00.0", "0000:03:00.0"

// TestLinks: a backend that lists links carries what lies at the ends of one, and says by which.
func TestLinks(t *testing.T) {
	both := backend.Kinds(backend.HostMemory, backend.GPUMemory)
	moves := backend.Write | backend.Read
	known := []selector.Backend{
		{Name: "xgmi", Info: backend.Info{Capabilities: backend.Capabilities{
			Ops: moves, Local: both, Remote: both, Reach: backend.SameHost, Links: []backend.Link{
				{Near: gpu1, Far: gpu1, Text: "same GPU"}, {Near: gpu1, Far: gpu2, Cost: 1, Text: "XGMI, 1 hop"}, {Far: gpu2},
			},
		}}},
		{Name: "none", Info: backend.Info{Capabilities: backend.Capabilities{
			Ops: moves, Local: both, Remote: both, Reach: backend.SameHost, Links: []backend.Link{},
		}}},
		{Name: "any", Info: backend.Info{Capabilities: backend.Capabilities{Ops: moves, Local: both, Remote: both, Reach: backend.SameHost}}},
	}
	s := selector.New(self, known, []selector.Rule{require("xgmi", "none", "any")})
	const first, spare = "chosen: the first of the rule that can carry it", "usable; tried if the ones before it fail"
	id := backend.RegionID(0)
	for _, tc := range []struct{ near, far, xgmi, none, any string }{
		{gpu1, gpu1, first + " (same GPU)", "no link from GPU " + gpu1 + " to GPU " + gpu1, spare},
		{gpu1, gpu2, first + " (XGMI, 1 hop)", "no link from GPU " + gpu1 + " to GPU " + gpu2, spare},
		{"", gpu2, first, "no link from host memory to GPU " + gpu2, spare},
		{gpu2, gpu1, "no link from GPU " + gpu2 + " to GPU " + gpu1, "no link from GPU " + gpu2 + " to GPU " + gpu1, first},
		{gpu1, "", "no link from GPU " + gpu1 + " to host memory", "no link from GPU " + gpu1 + " to host memory", first},
		{"", "", "no link from host memory to host memory", "no link from host memory to host memory", first},
		{gpu3, gpu1, "no link from GPU " + gpu3 + " to GPU " + gpu1, "no link from GPU " + gpu3 + " to GPU " + gpu1, first},
	} {
		id++
		q := ask(beside, func(q *selector.Query) {
			q.Local = &region.Region{ID: id, Kind: backend.HostMemory, Keys: keys("xgmi", "none", "any")}
			q.Remote = &region.Descriptor{Peer: beside, ID: id, Kind: backend.HostMemory, Place: tc.far, Keys: keys("xgmi", "none", "any")}
			if tc.near != "" {
				q.Local.Kind, q.Local.GPU = backend.GPUMemory, &backend.GPURange{Device: tc.near}
			}
			if tc.far != "" {
				q.Remote.Kind = backend.GPUMemory
			}
		})
		c := s.SelectBackend(q)
		for i, want := range []string{tc.xgmi, tc.none, tc.any} {
			if got := c.Candidates[i]; got.Reason != want || got.Usable == strings.HasPrefix(want, "no link") {
				t.Errorf("%q to %q, %s: %+v, want %q", tc.near, tc.far, got.Backend, got, want)
			}
		}
		if s.SelectBackend(q) != c {
			t.Errorf("%q to %q: the answer is not kept", tc.near, tc.far)
		}
	}
}

// TestPairRefused: a backend that has refused two regions is not asked again for them, for a while; it carries others.
func TestPairRefused(t *testing.T) {
	s := selector.New(self, backends, []selector.Rule{require("shm", "tcp")})
	at := func(now time.Time, change ...func(*selector.Query)) *selector.Choice {
		return s.SelectBackend(ask(beside, append(change, func(q *selector.Query) { q.Now = now })...))
	}
	before := at(start)
	s.PairRefused(1, 1, ask(beside).Remote, errors.New("the self-test failed"), start)
	c := at(start)
	if c == before {
		t.Fatal("the answer from before the refusal is still given")
	}
	want := []string{"shm: refused: the self-test failed", "tcp usable: " + chosen, "mem: " + notNamed, "gpu: " + notNamed, "rdma: " + notNamed}
	if diff := cmp.Diff(want, table(c)); diff != "" {
		t.Errorf("the reasons differ (-want +got):\n%s", diff)
	}
	if !c.Until.IsZero() || len(s.Outages(start)) != 0 {
		t.Errorf("a refusal is no outage that would be waited for: %+v, %+v", c, s.Outages(start))
	}
	if at(start) != c || at(start.Add(4*time.Second)) != c {
		t.Error("the answer is not kept")
	}
	for name, change := range map[string]func(*selector.Query){
		"local region":  func(q *selector.Query) { q.Local.ID++ },
		"remote region": func(q *selector.Query) { q.Remote.ID++ },
		"incarnation":   func(q *selector.Query) { q.Remote.Peer.Incarnation++ },
	} {
		if c := at(start, change); c.Order[0] != 1 {
			t.Errorf("another %s: %+v, want the backend to be tried", name, c)
		}
	}
	if c := at(start.Add(5 * time.Second)); c.Order[0] != 1 {
		t.Errorf("after the pause: %+v, want the backend to be tried again", c)
	}

	// With no other backend, the refusal is the answer.
	s.SetPolicy([]selector.Rule{require("shm")})
	if c := at(start); len(c.Order) != 0 || c.Candidates[0].Down {
		t.Errorf("%+v", c)
	}
	// An outage that ends sooner than the refusal does is noticed when it ends.
	s.SetPolicy([]selector.Rule{require("shm", "tcp")})
	s.PathFailed(0, beside, errors.New("down"), start)
	if c := at(start); len(c.Order) != 0 {
		t.Errorf("%+v", c)
	}
	if c := at(s.Outages(start)[0].Until); !slices.Equal(c.Order, []int{0}) {
		t.Errorf("after the outage: %+v", c)
	}
	// There are not more of them than can be kept.
	for id := range backend.RegionID(20_000) {
		s.PairRefused(1, id, ask(beside).Remote, errors.New("refused"), start)
	}
	if c := at(start, func(q *selector.Query) { q.Local.ID = 19_999 }); slices.Contains(c.Order, 1) {
		t.Errorf("the last refusal is not kept: %+v", c)
	}
}

// TestRefusalsEnd: a backend that connects anew, or that the operator has seen to, is asked again at once.
func TestRefusalsEnd(t *testing.T) {
	for name, tc := range map[string]struct {
		see func(*selector.Selector)
		end bool
	}{
		"connected anew":       {func(s *selector.Selector) { s.PathWorks(1, beside) }, true},
		"another connection":   {func(s *selector.Selector) { s.PathWorks(1, far) }, false},
		"another backend's":    {func(s *selector.Selector) { s.PathWorks(0, beside) }, false},
		"off and on":           {func(s *selector.Selector) { s.SetEnabled(1, false); s.SetEnabled(1, true) }, true},
		"another off and on":   {func(s *selector.Selector) { s.SetEnabled(0, false); s.SetEnabled(0, true) }, false},
		"started anew":         {func(s *selector.Selector) { s.Restarted(1) }, true},
		"another started anew": {func(s *selector.Selector) { s.Restarted(0) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := selector.New(self, backends, []selector.Rule{require("shm", "tcp")})
			s.PairRefused(1, 1, ask(beside).Remote, errors.New("refused"), start)
			if c := s.SelectBackend(ask(beside)); slices.Contains(c.Order, 1) {
				t.Fatalf("%+v", c)
			}
			tc.see(s)
			if c := s.SelectBackend(ask(beside)); slices.Contains(c.Order, 1) != tc.end {
				t.Errorf("%+v", c)
			}
		})
	}
}

// TestUnreachable: there is no way to a region when there is none for a group of any size, and none is to be waited for.
func TestUnreachable(t *testing.T) {
	sized := func(name string, min, max uint64) selector.Rule {
		return selector.Rule{Match: selector.Match{MinSize: min, MaxSize: max}, Require: []string{name}}
	}
	nothing := func(*selector.Selector) {}
	for name, tc := range map[string]struct {
		rules []selector.Rule
		to    backend.Peer
		spoil func(*selector.Selector)
		want  string // of the error; empty for none
	}{
		"a way":                  {[]selector.Rule{require("shm", "tcp")}, beside, nothing, ""},
		"no way":                 {[]selector.Rule{require("shm")}, far, nothing, "shm: reaches its own host only"},
		"no rule":                {nil, far, nothing, "shm: no rule matches the group"},
		"a way for the small":    {[]selector.Rule{sized("shm", 100, 0), sized("tcp", 0, 99)}, far, nothing, ""},
		"a way for some":         {[]selector.Rule{sized("shm", 1000, 0), sized("tcp", 500, 999), require("shm")}, far, nothing, ""},
		"a way for the large":    {[]selector.Rule{sized("shm", 0, 4095), sized("tcp", 4096, 0)}, far, nothing, ""},
		"a way for the largest":  {[]selector.Rule{sized("tcp", 4097, 0), require("shm")}, far, nothing, "shm: reaches its own host only"},
		"none for any":           {[]selector.Rule{sized("shm", 100, 0), sized("mem", 0, 99)}, far, nothing, "shm: reaches its own host only"},
		"as large as can be":     {[]selector.Rule{sized("shm", 100, math.MaxUint64), require("mem")}, far, nothing, "shm: reaches its own host only"},
		"down, and up again":     {[]selector.Rule{require("tcp")}, far, func(s *selector.Selector) { s.PathFailed(0, far, errors.New("x"), start) }, ""},
		"disabled":               {[]selector.Rule{require("tcp")}, far, func(s *selector.Selector) { s.SetEnabled(0, false) }, "tcp: " + selector.Disabled},
		"refused":                {[]selector.Rule{require("tcp")}, far, func(s *selector.Selector) { s.PairRefused(0, 1, ask(far).Remote, errors.New("x"), start) }, "tcp: refused: x"},
		"the next where refused": {[]selector.Rule{require("shm", "tcp")}, beside, func(s *selector.Selector) { s.PairRefused(1, 1, ask(beside).Remote, errors.New("x"), start) }, ""},
	} {
		s := selector.New(self, backends, tc.rules)
		tc.spoil(s)
		err := s.Unreachable(ask(tc.to))
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case tc.want != "" && (backend.CodeOf(err) != backend.Unsupported || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s: got %v, want Unsupported: %s", name, err, tc.want)
		}
	}
}

// TestExplainLeavesNoTrace: a question about a region that does not exist must not answer one about a real one.
func TestExplainLeavesNoTrace(t *testing.T) {
	s := selector.New(self, backends, []selector.Rule{require("tcp")})
	s.Explain(ask(far, func(q *selector.Query) { q.Local.Keys = nil }))
	if c := s.SelectBackend(ask(far)); len(c.Order) != 1 {
		t.Errorf("the answer is that of the explanation: %+v", c)
	}
}

// TestManySizes has more classes of sizes than a byte can number.
func TestManySizes(t *testing.T) {
	var rules []selector.Rule
	for i := uint64(1); i <= 300; i++ {
		rules = append(rules, selector.Rule{Match: selector.Match{MinSize: i * 10, MaxSize: i * 10}, Require: []string{"tcp"}})
	}
	s := selector.New(self, backends, rules)
	for i := uint64(1); i <= 300; i++ {
		at := func(bytes uint64) int {
			return s.SelectBackend(ask(far, func(q *selector.Query) { q.Bytes = bytes })).Rule
		}
		if at(i*10) != int(i-1) || at(i*10-1) != -1 || at(i*10+1) != -1 {
			t.Fatalf("%d bytes: rules %d, %d, %d decided around it", i*10, at(i*10-1), at(i*10), at(i*10+1))
		}
	}
}

func TestOutage(t *testing.T) {
	s := selector.New(self, backends, []selector.Rule{{Prefer: []string{"shm"}, Allow: []string{"tcp"}}})
	at := func(to backend.Peer, now time.Time) *selector.Choice {
		return s.SelectBackend(ask(to, func(q *selector.Query) { q.Now = now }))
	}
	before := at(beside, start)
	s.PathFailed(1, beside, errors.New("refused"), start)
	c := at(beside, start)
	if c == before {
		t.Fatal("the answer from before the failure is still given")
	}
	want := []string{
		"shm down: down: refused", "tcp usable: " + chosen, "mem: " + notNamed, "gpu: " + notNamed, "rdma: " + notNamed,
	}
	if diff := cmp.Diff(want, table(c)); diff != "" {
		t.Errorf("the reasons differ (-want +got):\n%s", diff)
	}
	if at(beside, start) != c {
		t.Error("the answer is not kept while the pause lasts")
	}
	if other := at(backend.Peer{Node: "other", Incarnation: 9, Host: "here"}, start); other.Order[0] != 1 {
		t.Error("the failure at one peer keeps others from the backend")
	}

	outages := s.Outages(start)
	if len(outages) != 1 || outages[0].Backend != "shm" || outages[0].Peer != beside || outages[0].Err.Error() != "refused" {
		t.Fatalf("outages %+v", outages)
	}
	end := outages[0].Until
	if c := at(beside, end.Add(-1)); c.Order[0] != 0 {
		t.Error("the backend is chosen before the pause has ended")
	}
	if c := at(beside, end); c.Order[0] != 1 {
		t.Error("the backend is not chosen when the pause has ended")
	}
	if left := s.Outages(end); len(left) != 0 {
		t.Errorf("outages %+v after the pause", left)
	}

	// A connection ends the pause, and drops the answer that was due to it.
	s.PathFailed(1, beside, errors.New("refused"), start)
	down := at(beside, start)
	s.PathWorks(1, beside)
	if c := at(beside, start); c == down || c.Order[0] != 1 {
		t.Errorf("the path works, and the answer is %+v", c)
	}
	works := at(beside, start)
	s.PathWorks(1, beside)
	if at(beside, start) != works {
		t.Error("news that changes nothing drops the cache")
	}
}

// TestNoWayLeft: with every backend of the rule down, nothing is chosen, and the reasons say why.
func TestNoWayLeft(t *testing.T) {
	s := selector.New(self, backends, []selector.Rule{require("shm", "tcp")})
	s.PathFailed(0, beside, errors.New("first"), start)
	s.PathFailed(1, beside, errors.New("second"), start.Add(-time.Millisecond))
	c := s.SelectBackend(ask(beside))
	if len(c.Order) != 0 || !c.Candidates[0].Down || !c.Candidates[1].Down {
		t.Fatalf("%+v", c)
	}
	// The answer is looked at again as soon as the first of the two pauses is over.
	outages := s.Outages(start)
	first := outages[0].Until
	if outages[1].Until.Before(first) {
		first = outages[1].Until
	}
	if c := s.SelectBackend(ask(beside, func(q *selector.Query) { q.Now = first })); len(c.Order) == 0 {
		t.Error("the answer outlives the pause that it was due to")
	}
}

// TestPausesGrow: failure after failure, the pause doubles up to five seconds, give or take an eighth.
func TestPausesGrow(t *testing.T) {
	s := selector.New(self, backends, []selector.Rule{require("tcp")})
	now := start
	for _, want := range []time.Duration{50, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000} {
		want *= time.Millisecond
		s.PathFailed(0, far, errors.New("refused"), now)
		until := s.Outages(now)[0].Until
		if got := until.Sub(now); got < want-want/8 || got >= want+want/8 {
			t.Errorf("a pause of %v, want about %v", got, want)
		}
		now = until
	}
	s.PathWorks(0, far)
	s.PathFailed(0, far, errors.New("refused"), now)
	if got := s.Outages(now)[0].Until.Sub(now); got >= 100*time.Millisecond {
		t.Errorf("after a success the pause is %v, want it short again", got)
	}
}

// TestOutagesAreForgotten: peers that went away for good do not stay in the table.
func TestOutagesAreForgotten(t *testing.T) {
	s := selector.New(self, backends, []selector.Rule{require("tcp")})
	for i := range uint64(5) {
		s.PathFailed(0, backend.Peer{Node: "old", Incarnation: i + 1}, errors.New("refused"), start)
	}
	later := start.Add(10 * time.Minute)
	s.PathFailed(0, far, errors.New("refused"), later)
	if n := len(s.Outages(start)); n != 1 {
		t.Errorf("%d outages are known, want the new one only", n)
	}
	s.PathFailed(0, beside, errors.New("refused"), later)
	s.PathFailed(1, beside, errors.New("refused"), later)
	var names []string
	for _, o := range s.Outages(later) {
		names = append(names, o.Backend+" "+o.Peer.Node)
	}
	if diff := cmp.Diff([]string{"shm beside", "tcp beside", "tcp far"}, names); diff != "" {
		t.Errorf("the outages differ (-want +got):\n%s", diff)
	}
}

func TestValidate(t *testing.T) {
	known := []string{"shm", "tcp"}
	for _, tc := range []struct {
		name  string
		rules []selector.Rule
		want  []string
	}{
		{"require", []selector.Rule{require("tcp", "shm")}, nil},
		{"prefer and allow", []selector.Rule{{Prefer: []string{"shm"}, Allow: []string{"tcp"}}}, nil},
		{"prefer alone, allow alone", []selector.Rule{{Prefer: []string{"shm"}}, {Allow: []string{"tcp"}}}, nil},
		{"none", nil, nil},
		{"nothing named", []selector.Rule{require("tcp"), {}}, []string{"rule 2 names no backend"}},
		{
			"every fault of every rule",
			[]selector.Rule{{Require: []string{"tcp"}, Prefer: []string{"smh"}}, {Require: []string{"tcp"}, Allow: []string{"rdma"}}, require("tcp", "tcp")},
			[]string{
				"rule 1 has require beside prefer or allow",
				`rule 1 names backend "smh", which is not configured, did you mean "shm"?`,
				"rule 2 has require beside prefer or allow",
				`rule 2 names backend "rdma", which is not configured`,
				`rule 3 names backend "tcp" twice`,
			},
		},
		{"the same in prefer and allow", []selector.Rule{{Prefer: []string{"tcp"}, Allow: []string{"shm", "tcp"}}}, []string{`rule 1 names backend "tcp" twice`}},
	} {
		err := selector.Validate(tc.rules, known)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if diff := cmp.Diff(strings.Join(tc.want, "\n"), got); diff != "" {
			t.Errorf("%s: the faults differ (-want +got):\n%s", tc.name, diff)
		}
	}
}

func TestCachedAnswerAllocatesNothing(t *testing.T) {
	s := selector.New(self, backends, []selector.Rule{
		{Match: selector.Match{MinSize: 1 << 20}, Require: []string{"tcp"}}, require("shm", "tcp"),
	})
	q := ask(beside)
	s.SelectBackend(q)
	if n := testing.AllocsPerRun(100, func() { s.SelectBackend(q) }); n != 0 {
		t.Errorf("%v allocations for an answer from the cache, want none", n)
	}
}

// TestConcurrentUse is for the race detector; an answer is also looked at, which is wrong whenever it was made from
// two policies.
func TestConcurrentUse(t *testing.T) {
	policies := [][]selector.Rule{{require("tcp")}, {require("shm", "tcp")}}
	s := selector.New(self, backends, policies[0])
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for i := range 500 {
				now := start.Add(time.Duration(i) * time.Millisecond)
				to := []backend.Peer{beside, far}[i%2]
				switch {
				case worker == 0 && i%10 == 0:
					s.SetPolicy(policies[i/10%2])
				case worker == 1 && i%10 == 0:
					s.PathFailed(i/10%2, to, fmt.Errorf("failure %d", i), now)
				case worker == 2 && i%10 == 0:
					s.PathWorks(i/10%2, to)
					s.Outages(now)
				}
				c := s.SelectBackend(ask(to, func(q *selector.Query) { q.Bytes = uint64(i); q.Now = now }))
				if len(c.Candidates) != len(backends) {
					t.Errorf("%d candidates, want %d", len(c.Candidates), len(backends))
				}
				for _, b := range c.Order {
					if b != 0 && !(b == 1 && to == beside) {
						t.Errorf("backend %d is chosen for %s", b, to)
					}
				}
			}
		})
	}
	wg.Wait()
}

// TestSetEnabled: a backend that is disabled is passed over at once, also where a choice was cached, and with its
// reason; the others, and the outages, stay as they are.
func TestSetEnabled(t *testing.T) {
	s := selector.New(self, backends, []selector.Rule{{Prefer: []string{"shm", "rdma"}, Allow: []string{"tcp"}}})
	s.PathFailed(0, far, errors.New("no route"), start)
	check := func(to backend.Peer, order []int, want ...string) {
		t.Helper()
		for _, c := range []*selector.Choice{s.SelectBackend(ask(to)), s.Explain(ask(to))} {
			if diff := cmp.Diff(order, c.Order); diff != "" {
				t.Errorf("the order differs (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(want, table(c)[:3]); diff != "" {
				t.Errorf("the reasons differ (-want +got):\n%s", diff)
			}
		}
	}
	check(beside, []int{1, 0}, "shm usable: "+chosen, "rdma: unavailable: no device", "tcp usable: "+spare)
	s.SetEnabled(1, false)
	s.SetEnabled(4, false)
	check(beside, []int{0}, "shm: disabled by the operator", "rdma: unavailable: no device", "tcp usable: "+chosen)
	s.SetPolicy([]selector.Rule{require("shm", "tcp", "mem")})
	check(self, []int{0, 2}, "shm: disabled by the operator", "tcp usable: "+chosen, "mem usable: "+spare)
	check(far, nil, "shm: disabled by the operator", "tcp down: down: no route", "mem: reaches its own process only")
	s.SetEnabled(1, true)
	check(beside, []int{1, 0}, "shm usable: "+chosen, "tcp usable: "+spare, "mem: reaches its own process only")
}
