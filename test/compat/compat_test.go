// Package compat runs plugins of the past under today's host.
//
// Each version of the plugin protocol that is still supported has a plugin here that speaks it: v1. Their source is
// frozen. They are built as they are, and today's umbp has to put and get values through them, and to find that they
// keep the contract.
package compat

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/umbp/umbp/plugin-sdk/proto/backendpb"

	// What is built here comes from the cache of the go command, and so would the result of the tests, if it did not know
	// what they depend on.
	_ "github.com/umbp/umbp/core"
	_ "github.com/umbp/umbp/plugin-sdk/conformance"
)

// bin holds what the tests have built.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if bin, err = os.MkdirTemp("", "umbp-compat-"); err == nil {
			defer os.RemoveAll(bin)
			var out []byte
			out, err = exec.Command("go", "build", "-o", bin, "../../cmd/umbp", "./v1").CombinedOutput()
			os.Stderr.Write(out)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// umbp runs umbp, and returns its output. It may fail where it prints something.
func umbp(t *testing.T, args ...string) []byte {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(filepath.Join(bin, "umbp"), args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && stdout.Len() == 0 {
		t.Fatalf("umbp %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return stdout.Bytes()
}

// ways are the data paths and the ways to memory. The first two use all of the protocol.
var ways = [][2]string{{"queues", "mapped"}, {"stream", "messages"}, {"queues", "messages"}, {"stream", "mapped"}}

// younger lists the rules of the contract that came after the plugin, which it cannot know.
var younger = []string{}

func TestConformance(t *testing.T) {
	for _, way := range ways[:2] {
		t.Run(way[0]+"/"+way[1], func(t *testing.T) {
			var report struct {
				Cases []struct{ Name, Rule, Result, Detail string }
			}
			text := umbp(t, "conformance", "--json", "--plugin", filepath.Join(bin, "v1"), "-o", "path="+way[0], "-o", "memory="+way[1])
			if err := json.Unmarshal(text, &report); err != nil {
				t.Fatal(err)
			}
			if len(report.Cases) < 40 {
				t.Errorf("only %d cases were tried", len(report.Cases))
			}
			for _, c := range report.Cases {
				if c.Result == "fail" && !slices.Contains(younger, c.Rule) {
					t.Errorf("%s (%s): %s", c.Name, c.Rule, c.Detail)
				}
			}
		})
	}
}

var ready = regexp.MustCompile(`ready: control=(\S+) `)

// TestPutGet uses a node as an operator has it, with the old plugin as its only way.
func TestPutGet(t *testing.T) {
	for _, way := range ways {
		t.Run(way[0]+"/"+way[1], func(t *testing.T) {
			dir := t.TempDir()
			config := filepath.Join(dir, "umbp.yaml")
			text := fmt.Sprintf("backends:\n- name: compat-v1\n  plugin: %s\n  options: {path: %s, memory: %s}\n"+
				"selection:\n  rules:\n  - require: [compat-v1]\n", filepath.Join(bin, "v1"), way[0], way[1])
			if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			node := exec.Command(filepath.Join(bin, "umbp"), "serve", "-c", config, "--node.listen", "127.0.0.1:0",
				"--node.http", "", "--pool.size", "8MiB", "--directory.lease", "10m")
			log, err := node.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := node.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				node.Process.Signal(os.Interrupt)
				timer := time.AfterFunc(time.Minute, func() { node.Process.Kill() })
				defer timer.Stop()
				if err := node.Wait(); err != nil {
					t.Errorf("the node: %v", err)
				}
			})
			var address string
			lines := bufio.NewScanner(log)
			for address == "" && lines.Scan() {
				if m := ready.FindStringSubmatch(lines.Text()); m != nil {
					address = m[1]
				}
			}
			if address == "" {
				t.Fatal("the node does not start")
			}
			go func() {
				for lines.Scan() {
				}
			}()
			value, back := filepath.Join(dir, "value"), filepath.Join(dir, "back")
			want := bytes.Repeat([]byte("compatible "), 300_000)
			if err := os.WriteFile(value, want, 0o600); err != nil {
				t.Fatal(err)
			}
			umbp(t, "put", "-c", config, "--directory.address", address, "--json", "key", value)
			umbp(t, "get", "-c", config, "--directory.address", address, "--json", "key", "-o", back)
			if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, want) {
				t.Errorf("got %d bytes (%v), want the %d that were put", len(got), err, len(want))
			}
		})
	}
}

// TestProtocolOnlyGrows compares the messages and calls of the plugin with those of today.
func TestProtocolOnlyGrows(t *testing.T) {
	text, err := exec.Command(filepath.Join(bin, "v1"), "descriptor").Output()
	if err != nil {
		t.Fatal(err)
	}
	var frozen descriptorpb.FileDescriptorProto
	if err := proto.Unmarshal(text, &frozen); err != nil {
		t.Fatal(err)
	}
	old, err := protodesc.NewFile(&frozen, nil)
	if err != nil {
		t.Fatal(err)
	}
	now := backendpb.File_plugin_sdk_proto_backendpb_backend_proto
	if old.Package() != now.Package() || old.Messages().Len() < 40 {
		t.Fatalf("%s with %d messages is not the protocol", old.Package(), old.Messages().Len())
	}
	for _, fault := range lost(old, now) {
		t.Error(fault)
	}
	// The comparison has to see what it is for.
	changed := proto.Clone(&frozen).(*descriptorpb.FileDescriptorProto)
	changed.MessageType[0].Field[0].Number = proto.Int32(77)
	changed.MessageType[1].Field = changed.MessageType[1].Field[1:]
	changed.EnumType[0].Value = changed.EnumType[0].Value[:1]
	changed.Service[0].Method = changed.Service[0].Method[1:]
	broken, err := protodesc.NewFile(changed, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := len(lost(old, broken)); got != 4+1 { // the enum has lost two values
		t.Errorf("%d differences are found where there are 5: %v", got, lost(old, broken))
	}
}

// lost lists what a protocol had and a later one has not, or has otherwise.
func lost(old, now protoreflect.FileDescriptor) (faults []string) {
	miss := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	for i := range old.Messages().Len() {
		m := old.Messages().Get(i)
		today := now.Messages().ByName(m.Name())
		if today == nil {
			miss("message %s is gone", m.Name())
			continue
		}
		for k := range m.Fields().Len() {
			f := m.Fields().Get(k)
			g := today.Fields().ByNumber(f.Number())
			if g == nil || typeOf(f) != typeOf(g) {
				miss("field %d of message %s, which was %s, is gone or changed", f.Number(), m.Name(), typeOf(f))
			}
		}
	}
	for i := range old.Enums().Len() {
		e := old.Enums().Get(i)
		for k := range e.Values().Len() {
			v := e.Values().Get(k)
			today := now.Enums().ByName(e.Name())
			if today == nil || today.Values().ByNumber(v.Number()) == nil || today.Values().ByNumber(v.Number()).Name() != v.Name() {
				miss("value %s of enum %s is gone or changed", v.Name(), e.Name())
			}
		}
	}
	for i := range old.Services().Len() {
		s := old.Services().Get(i)
		for k := range s.Methods().Len() {
			m := s.Methods().Get(k)
			var g protoreflect.MethodDescriptor
			if today := now.Services().ByName(s.Name()); today != nil {
				g = today.Methods().ByName(m.Name())
			}
			if g == nil || m.Input().FullName() != g.Input().FullName() || m.Output().FullName() != g.Output().FullName() ||
				m.IsStreamingClient() != g.IsStreamingClient() || m.IsStreamingServer() != g.IsStreamingServer() {
				miss("call %s of service %s is gone or changed", m.Name(), s.Name())
			}
		}
	}
	return faults
}

// typeOf describes what a field looks like on the wire.
func typeOf(f protoreflect.FieldDescriptor) string {
	of := f.Kind().String()
	switch {
	case f.IsMap():
		return fmt.Sprintf("%s map[%s]%s", f.Name(), typeOf(f.MapKey()), typeOf(f.MapValue()))
	case f.Message() != nil:
		of = string(f.Message().Name())
	case f.Enum() != nil:
		of = string(f.Enum().Name())
	}
	return fmt.Sprintf("%s %s %s", f.Name(), f.Cardinality(), of)
}
