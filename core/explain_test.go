package core_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// explained is the text and the JSON of an explanation.
func explained(t *testing.T, e *core.Explanation, err error) (text string, fields map[string]any) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := e.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &fields); err != nil {
		t.Fatal(err)
	}
	return b.String(), fields
}

func same(t *testing.T, want, got string) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the text differs (-want +got):\n%s", diff)
	}
}

func TestExplainPut(t *testing.T) {
	c := newCluster(t, shape{backends: twoNetworks(), client: core.ClientOptions{StagingSize: 1 << 20}})
	is(t, core.Stored, c.client.Put(t.Context(), "there", made(100, 1)))
	before := c.stats(0)
	e, err := c.client.ExplainPut(t.Context(), []string{"a", "b", "there", "huge", "c", "c"}, []uint64{5000, 3, 1, 1 << 40, 1, 1}, core.ExplainOptions{})
	text, fields := explained(t, e, err)
	same(t, `write of 5003B: 2 runs → 1 segment → 1 group

buffer → node-0 region 1: 5003B in 1 segment
  by first: chosen: the first of the rule that can carry it (rule 1)
  not by second: usable; tried if the ones before it fail
  0 → 0: 5003B of a, b

nothing was reserved: each node is taken to have one free run at the start of its pool

"there" does not move: it is in the pool already

"huge" does not move: explain "huge": busy: no node can hold 1099511627776 bytes

"c" does not move: explain "c": bad request: items 4 and 5 have the same key

"c" does not move: explain "c": bad request: items 4 and 5 have the same key
`, text)
	if fields["assumed_places"] != true || len(fields["left_out"].([]any)) != 4 || fields["op"] != "write" {
		t.Errorf("%v", fields)
	}
	if after := c.stats(0); *after != *before {
		t.Errorf("an explanation changes the node: %+v", after)
	}
	is(t, core.Missing, c.client.Exists(t.Context(), "b")...)
}

func TestExplainGet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, shape{backends: twoNetworks(), client: core.ClientOptions{StagingSize: 1 << 20}})
		is(t, core.Stored, c.client.BatchPut(t.Context(), []core.Item{{Key: "a", Value: made(4096, 1)}, {Key: "b", Value: made(5000, 2)}})...)
		e, err := c.client.ExplainGet(t.Context(), []string{"a", "b", "absent", ""}, core.ExplainOptions{})
		text, fields := explained(t, e, err)
		same(t, `read of 9096B: 2 runs → 1 segment → 1 group

buffer ← node-0 region 1: 9096B in 1 segment
  by first: chosen: the first of the rule that can carry it (rule 1)
  not by second: usable; tried if the ones before it fail
  0 ← 0: 9096B of a, b

"absent" does not move: it is not in the pool

"" does not move: explain "": bad request: item 3 has an empty key
`, text)
		if fields["assumed_places"] != false {
			t.Errorf("%v", fields)
		}
		c.quiet() // the lease is given back

		// With the first backend down, the explanation says so.
		c.engine.FailPath(0, c.nodes[0].Engine().Self(), errors.New("connection refused"))
		e, err = c.client.ExplainGet(t.Context(), []string{"a"}, core.ExplainOptions{})
		text, _ = explained(t, e, err)
		same(t, `read of 4KiB: 1 run → 1 segment → 1 group

buffer ← node-0 region 1: 4KiB in 1 segment
  by second: chosen: the first of the rule that can carry it (rule 1)
  not by first: down: connection refused
  0 ← 0: 4KiB of a
`, text)
	})
}

func TestExplainRefuses(t *testing.T) {
	c := newCluster(t, shape{})
	if _, err := c.client.ExplainPut(t.Context(), []string{"a"}, nil, core.ExplainOptions{}); backend.CodeOf(err) != backend.BadRequest {
		t.Errorf("no sizes: %v", err)
	}
	if _, err := c.client.ExplainGet(t.Context(), make([]string, 4097), core.ExplainOptions{}); backend.CodeOf(err) != backend.BadRequest {
		t.Errorf("too many keys: %v", err)
	}
	e, err := c.client.ExplainGet(t.Context(), nil, core.ExplainOptions{})
	if err != nil || e.Groups != 0 {
		t.Errorf("nothing: %+v, %v", e, err)
	}
}

func twoNetworks() []backend.Factory { return []backend.Factory{network("first"), network("second")} }
