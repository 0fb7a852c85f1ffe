package rpc_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/rpc"
)

var described = backend.Factory{
	Name: "some-backend",
	Info: &backend.Info{Name: "some-backend", Version: "2.1", Capabilities: backend.Capabilities{
		Ops: backend.Write | backend.Read, Local: backend.Kinds(backend.HostMemory, backend.GPUMemory),
		Remote: backend.Kinds(backend.HostMemory), Reach: backend.Network, NeedsFD: true, Window: 7, Simulated: true,
		Limits: backend.Limits{Segments: 1, SegmentBytes: 2, TransferBytes: 3},
		Links:  []backend.Link{{Near: "0000:01:00.0", Far: "0000:02:00.0", Cost: 1, Text: "XGMI, 1 hop"}, {Far: "0000:01:00.0"}},
	}},
	Options: []backend.Option{
		{Name: "mode", Type: backend.StringOption, Default: "fast", Choices: []string{"fast", "safe"}, Help: "How."},
		{Name: "workers", Type: backend.IntOption, Default: "4", Min: "1", Max: "64"},
	},
}

func TestDescription(t *testing.T) {
	text, err := json.MarshalIndent(rpc.Describe(described), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	const want = `{
  "name": "some-backend",
  "version": "2.1",
  "protocol_versions": [
    1
  ],
  "capabilities": {
    "ops": [
      "write",
      "read"
    ],
    "local": [
      "host",
      "gpu"
    ],
    "remote": [
      "host"
    ],
    "reach": "network",
    "needs_fd": true,
    "window": 7,
    "simulated": true,
    "links": [
      {
        "near": "0000:01:00.0",
        "far": "0000:02:00.0",
        "cost": 1,
        "text": "XGMI, 1 hop"
      },
      {
        "near": "",
        "far": "0000:01:00.0",
        "cost": 0
      }
    ],
    "limit_segments": 1,
    "limit_segment_bytes": 2,
    "limit_transfer_bytes": 3
  },
  "options": [
    {
      "name": "mode",
      "type": "string",
      "default": "fast",
      "choices": [
        "fast",
        "safe"
      ],
      "help": "How."
    },
    {
      "name": "workers",
      "type": "int",
      "default": "4",
      "min": "1",
      "max": "64"
    }
  ]
}`
	if string(text) != want {
		t.Errorf("the description is\n%s\nwant\n%s", text, want)
	}
	d, err := rpc.ParseDescription(text)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(d.Schema(), described.Options) {
		t.Errorf("the schema became %+v", d.Schema())
	}
}

// TestDescriptionOfLittle: a factory need not say what its backend can do.
func TestDescriptionOfLittle(t *testing.T) {
	text, err := json.Marshal(rpc.Describe(backend.Factory{Name: "x"}))
	if want := `{"name":"x","protocol_versions":[1],"options":[]}`; err != nil || string(text) != want {
		t.Errorf("got %s, %v, want %s", text, err, want)
	}
}

func TestParseDescriptionRefuses(t *testing.T) {
	for text, want := range map[string]string{
		``:                                       "unexpected end of JSON",
		`[]`:                                     "cannot unmarshal",
		`{"protocol_versions":[1]}`:              `the name ""`,
		`{"name":"Tcp","protocol_versions":[1]}`: `the name "Tcp"`,
		`{"name":"tcp\n","protocol_versions":[1]}`:                           `the name "tcp\n"`,
		`{"name":"` + strings.Repeat("x", 65) + `","protocol_versions":[1]}`: "at most 64",
		`{"name":"tcp"}`: "0 protocol versions",
		`{"name":"tcp","protocol_versions":["1"]}`:                                                                                   "cannot unmarshal",
		`{"name":"tcp","protocol_versions":[1],"version":"` + strings.Repeat("1", 300) + `"}`:                                        "version has 300 bytes",
		`{"name":"tcp","protocol_versions":[1],"options":[{"name":"a-b","type":"bool","default":"true"}]}`:                           `an option is called "a-b"`,
		`{"name":"tcp","protocol_versions":[1],"options":[{"name":"a","type":"bool"}]}`:                                              `a: "" is neither true nor false`,
		`{"name":"tcp","protocol_versions":[1],"options":[{"name":"a","type":"colour"}]}`:                                            `option type "colour" does not exist`,
		`{"name":"tcp","protocol_versions":[1],"options":[{"name":"a","type":"string"},{"name":"a","type":"string"}]}`:               "two options a",
		`{"name":"tcp","protocol_versions":[1],"options":[{"name":"a","type":"string","help":"` + strings.Repeat("x", 5000) + `"}]}`: "option a is too long",
		strings.Repeat(" ", rpc.MaxDescription) + `{}`:                                                                               "bytes are more than",
	} {
		if d, err := rpc.ParseDescription([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.200s\nbecame %+v, %v, want an error that says %q", text, d, err, want)
		}
	}
	if _, err := rpc.ParseDescription([]byte(`{"name":"tcp","protocol_versions":[1,2],"later":{"x":1}}`)); err != nil {
		t.Errorf("a field of a later version: %v", err)
	}
}

// FuzzParseDescription: what is accepted has options that work, and is the same when it is printed and read again.
func FuzzParseDescription(f *testing.F) {
	text, err := json.Marshal(rpc.Describe(described))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"name":"tcp","protocol_versions":[1]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := rpc.ParseDescription(text)
		if err != nil {
			return
		}
		if _, err := backend.CheckOptions(d.Schema(), nil); err != nil {
			t.Fatal(err)
		}
		again, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		if e, err := rpc.ParseDescription(again); err != nil || !reflect.DeepEqual(d.Schema(), e.Schema()) || e.Name != d.Name {
			t.Fatalf("%s\nbecame %+v, %v", again, e, err)
		}
	})
}
