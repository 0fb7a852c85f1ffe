package rpc_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/rpc"
)

var found = []backend.Finding{
	{Subject: "library", Text: "libx.so.1"},
	{Subject: "device", State: backend.Problem, Text: "there is none", Remedy: "install one"},
}

func TestFindings(t *testing.T) {
	text, err := json.Marshal(found)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := rpc.ParseFindings(text); err != nil || !reflect.DeepEqual(got, found) {
		t.Errorf("%s became %+v, %v", text, got, err)
	}
	if _, err := rpc.ParseFindings([]byte(`[{"subject":"x","state":"fine","text":"","later":1}]`)); err != nil {
		t.Errorf("a field of a later version: %v", err)
	}
}

func TestParseFindingsRefuses(t *testing.T) {
	for text, want := range map[string]string{
		``:                               "unexpected end of JSON",
		`{}`:                             "cannot unmarshal",
		`[{"text":"x"}]`:                 "has no subject",
		`[{"subject":"x","state":"so"}]`: "fine, warning or problem",
		`[{"subject":"x","text":"` + strings.Repeat("x", 5000) + `"}]`:   "too long",
		`[` + strings.Repeat(`{"subject":"x"},`, 1000) + `{}]`:           "there are 1001",
		strings.Repeat(" ", rpc.MaxFindings) + `[]`:                      "bytes are more than",
		`[{"subject":"x","remedy":"` + strings.Repeat("x", 5000) + `"}]`: "too long",
	} {
		if got, err := rpc.ParseFindings([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.200s\nbecame %+v, %v, want an error that says %q", text, got, err, want)
		}
	}
}

// FuzzParseFindings: what is accepted is the same when it is printed and read again.
func FuzzParseFindings(f *testing.F) {
	text, err := json.Marshal(found)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := rpc.ParseFindings(text)
		if err != nil {
			return
		}
		again, err := json.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		if more, err := rpc.ParseFindings(again); err == nil && !reflect.DeepEqual(more, got) {
			t.Fatalf("%s\nbecame %+v", again, more)
		}
	})
}
