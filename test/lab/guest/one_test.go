package guest

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"
)

// sizes of values: one byte, beside a page, beside a message of the device, of several.
var sizes = []int{1, 4095, 65537, 3<<20 + 7, 9<<20 + 1}

// TestConformance tries the plugin against the contract.
func TestConformance(t *testing.T) {
	alone(t)
	h := here(t, 1)
	argv := []string{umbp, "conformance", "--plugin", plugin + *backendName, "--json", "--patience", "60s"}
	if *backendName == "rdma" {
		argv = append(argv, "--option", "timeout="+patientTimeout)
	}
	out := h.try(Program{Argv: argv, Limit: 12 * time.Minute})
	var report struct {
		Cases []struct{ Name, Rule, Result, Detail string }
	}
	if err := json.Unmarshal(out.Stdout, &report); err != nil {
		t.Fatalf("%v in %s%s", err, out.Stdout, out.Stderr)
	}
	if len(report.Cases) < 20 {
		t.Fatalf("%d cases only", len(report.Cases))
	}
	for _, c := range report.Cases {
		t.Run(c.Name, func(t *testing.T) {
			switch c.Result {
			case "pass":
			case "skip":
				t.Skip(c.Detail)
			default:
				t.Errorf("%s of rule %s: %s", c.Result, c.Rule, c.Detail)
			}
		})
	}
}

// TestPutGet moves values through a node of the same guest, by the command.
func TestPutGet(t *testing.T) {
	alone(t)
	for name, process := range map[string]bool{"in-process": false, "process": true} {
		t.Run(name, func(t *testing.T) {
			h := here(t, 1)
			s := settings{
				name: "node", backends: []string{*backendName}, process: process,
				rule: "require: [" + *backendName + "]",
			}
			h.serve(s)
			s.directory = address(1, nodePort)
			c := client{h, s}
			c.doctor("--offline")
			for _, size := range sizes[2:] { // a call of the command takes seconds here
				key, v := fmt.Sprint("value-", size), value(t.Name(), size)
				c.over(*backendName, c.put(key, v), c.get(key, v))
			}
		})
	}
}

// TestBench compares the bytes of whole batches: of registered memory, of memory that lies partly in the own process,
// and of memory that is copied to the backend's.
func TestBench(t *testing.T) {
	alone(t)
	h := here(t, 1)
	for _, op := range []string{"put", "get"} {
		text := h.run(Program{Argv: []string{
			umbp, "bench", "batch-" + op, "--backend", *backendName, "--scenario", "all_zc,mixed,all_stg", "--plan", "per-page,grouped",
			"--batch", "8", "--per-item-pages", "4", "--iters", "2", "--json",
		}})
		var rows []struct {
			Scenario, Plan string
			Verified       uint64
			Carried        map[string]int
			WorkRequests   uint64 `json:"work_requests"`
			Posts          uint64
			Completions    uint64
		}
		if err := json.Unmarshal(text, &rows); err != nil {
			t.Fatal(err)
		}
		if len(rows) != 6 {
			t.Fatalf("%d rows instead of 6: %s", len(rows), text)
		}
		for _, r := range rows {
			if r.Verified == 0 || r.Carried[*backendName] == 0 {
				t.Errorf("%s %s %s: %d bytes were compared, carried by %v", op, r.Scenario, r.Plan, r.Verified, r.Carried)
			}
			t.Logf("%s %s %s: %d work requests, %d posts, %d completions", op, r.Scenario, r.Plan, r.WorkRequests, r.Posts, r.Completions)
			if *backendName != "rdma" || r.Scenario != "all_zc" {
				continue
			}
			// The pages of a batch lie one after the other at both ends: one by one they are a work request each.
			if r.Plan == "per-page" && r.WorkRequests != 8*4 || r.Plan == "grouped" && r.WorkRequests > 4 {
				t.Errorf("%s, %s: %d work requests for 32 pages", op, r.Plan, r.WorkRequests)
			}
			if r.Posts == 0 || r.Posts > r.WorkRequests || r.Completions == 0 || r.Completions > r.WorkRequests {
				t.Errorf("%s, %s: %d posts and %d completions for %d work requests", op, r.Plan, r.Posts, r.Completions, r.WorkRequests)
			}
		}
	}
}
