package plan

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

var update = flag.Bool("update", false, "write the golden files in testdata anew")

var testNames = Names{
	Local:  func(n uint32) string { return fmt.Sprintf("buffer-%d", n) },
	Remote: func(n uint32) string { return fmt.Sprintf("node-b/%d", n) },
	Key:    func(n uint32) string { return fmt.Sprintf("prefix-%d", n) },
}

// TestExplain compares explanations with the golden files, as text and as JSON.
func TestExplain(t *testing.T) {
	// Twelve values of four pages over two remote regions, last one first: those of region 0 touch, those of region 1
	// lie apart.
	var spread []Run
	for key := uint32(12); key > 0; key-- {
		n := uint64(key - 1)
		spread = append(spread, Run{
			Key: key - 1, Remote: (key - 1) % 2, Length: 4 * page,
			LocalOffset:  (n%2*64 + n/2*4) * page,
			RemoteOffset: (n%2 + 1) * (n / 2) * 4 * page,
		})
	}
	for _, tc := range []struct {
		name  string
		plan  func(*Planner) (*Plan, error)
		names Names
		limit int
		adorn func(*ExplainedGroup)
	}{
		{
			name:  "write",
			plan:  func(p *Planner) (*Plan, error) { return p.Plan(backend.Write, spread, backend.Limits{}) },
			names: testNames,
			limit: 4,
			adorn: func(g *ExplainedGroup) {
				g.Backend, g.Reason = "shm", "same host, preferred"
				g.Rejected = []RejectedBackend{{"tcp", "allowed, but shm is preferred"}}
			},
		},
		{
			name: "read-in-full",
			plan: func(p *Planner) (*Plan, error) {
				return p.Plan(backend.Read, spread, backend.Limits{SegmentBytes: 16 * page})
			},
		},
		{
			name:  "per-page",
			plan:  func(p *Planner) (*Plan, error) { return p.PerPage(backend.Write, spread, page) },
			names: testNames,
			limit: 2,
		},
		{
			name: "nothing",
			plan: func(p *Planner) (*Plan, error) { return p.Plan(backend.Write, nil, backend.Limits{}) },
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pl, err := tc.plan(new(Planner))
			if err != nil {
				t.Fatal(err)
			}
			e := pl.Explain(tc.names, tc.limit)
			if tc.adorn != nil {
				for i := range e.Shown {
					tc.adorn(&e.Shown[i])
				}
			}
			var text bytes.Buffer
			if err := e.WriteText(&text); err != nil {
				t.Fatal(err)
			}
			golden(t, tc.name+".txt", text.Bytes())
			encoded, err := json.MarshalIndent(e, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, tc.name+".json", append(encoded, '\n'))
			var decoded Explanation
			if err := json.Unmarshal(encoded, &decoded); err != nil {
				t.Fatal(err)
			}
			var again strings.Builder
			if err := decoded.WriteText(&again); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(text.String(), again.String()); diff != "" {
				t.Errorf("text of what JSON brought back differs (-want +got):\n%s", diff)
			}
		})
	}
}

// golden compares got with a file in testdata, or with -update writes it.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s differs (-want +got); run go test -update if it should:\n%s", path, diff)
	}
}

func TestExplainNamesAKeyOnce(t *testing.T) {
	var p Planner
	var runs []Run
	for i := range uint64(6) {
		runs = append(runs, Run{Key: uint32(i % 3), LocalOffset: i * page, RemoteOffset: i * page, Length: page})
	}
	pl, err := p.Plan(backend.Write, runs, backend.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	s := pl.Explain(Names{}, 2).Shown[0].Segments[0]
	want := ExplainedSegment{Length: 6 * page, Keys: []string{"key 0", "key 1"}, MoreKeys: 1}
	if diff := cmp.Diff(want, s); diff != "" {
		t.Errorf("the segment differs (-want +got):\n%s", diff)
	}
}
