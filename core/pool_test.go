package core_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/umbp/umbp/core"
)

func TestPutGet(t *testing.T) {
	c := newCluster(t, shape{nodes: 2, client: core.ClientOptions{StagingSize: 1 << 20, Tuning: core.Tuning{Verify: core.VerifyAll}}})
	memory := c.alloc(4 << 20)
	var items []core.Item
	for i, size := range []int{1, 4095, 4096, 4097, 1 << 20, 100_000} {
		value := memory[:size:size]
		memory = memory[size:]
		fill(value, uint64(i))
		items = append(items, core.Item{Key: fmt.Sprintf("key-%d", i), Value: value})
	}
	unregistered := make([]byte, 70_001)
	fill(unregistered, 99)
	items = append(items, core.Item{Key: "staged", Value: unregistered})

	for i, r := range c.client.BatchPut(t.Context(), items) {
		if r.Status != core.Stored || r.Size != uint64(len(items[i].Value)) {
			t.Fatalf("put %q: %+v", items[i].Key, r)
		}
		if r.Path.Staged != (items[i].Key == "staged") || r.Path.Backend != "reference" || r.Path.Attempts != 1 {
			t.Errorf("put %q: path %+v", items[i].Key, r.Path)
		}
	}
	for i, r := range c.client.BatchPut(t.Context(), items) {
		if r.Status != core.Exists {
			t.Errorf("second put %q: %+v", items[i].Key, r)
		}
	}
	into := c.alloc(8 << 20)
	var gets []core.Item
	for _, it := range items {
		n := len(it.Value) + 7
		gets = append(gets, core.Item{Key: it.Key, Value: into[:n:n]})
		into = into[n:]
	}
	gets[2].Value = make([]byte, len(items[2].Value))
	gets = append(gets, core.Item{Key: "absent", Value: into[:10]})
	results := c.client.BatchGet(t.Context(), gets)
	for i, it := range items {
		r := results[i]
		if r.Status != core.Found || !r.Verified || r.Size != uint64(len(it.Value)) {
			t.Fatalf("get %q: %+v", it.Key, r)
		}
		if !bytes.Equal(gets[i].Value[:r.Size], it.Value) {
			t.Errorf("get %q: wrong bytes", it.Key)
		}
	}
	if r := results[len(items)]; r.Status != core.Missing || r.Err != nil {
		t.Errorf("get absent: %+v", r)
	}
	if r := c.client.Stat(t.Context(), "key-1", "absent"); r[0].Status != core.Found || r[0].Size != 4095 || r[1].Status != core.Missing {
		t.Errorf("stat: %+v", r)
	}
	if r := c.client.Remove(t.Context(), "key-1", "absent"); r[0].Status != core.Removed || r[1].Status != core.Missing {
		t.Errorf("remove: %+v", r)
	}
	if r := c.client.Exists(t.Context(), "key-1", "key-2"); r[0].Status != core.Missing || r[1].Status != core.Exists {
		t.Errorf("exists: %+v", r)
	}
}
