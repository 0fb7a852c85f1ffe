package rpc

import (
	"context"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/proto/backendpb"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// fill gives every field below v a value that is not zero, and that differs from its neighbours.
func fill(t *testing.T, v reflect.Value, n *int) {
	t.Helper()
	*n++
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(t, v.Field(i), n)
		}
	case reflect.String:
		v.SetString(fmt.Sprint("text-", *n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Uint8:
		v.SetUint(uint64(1 + *n%3))
	case reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(*n))
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			v.SetBytes([]byte{byte(*n), 0, 255})
			break
		}
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range 2 {
			fill(t, v.Index(i), n)
		}
	case reflect.Interface: // an error
		v.Set(reflect.ValueOf(errors.New(fmt.Sprint("cause ", *n))))
	default:
		t.Fatalf("a field of kind %s: say how to fill it, and see that it travels", v.Kind())
	}
}

func filled[T any](t *testing.T) T {
	t.Helper()
	var x T
	n := 0
	fill(t, reflect.ValueOf(&x).Elem(), &n)
	return x
}

// TestEveryFieldTravels: a field that is added to a type of the contract and forgotten here comes out zero.
func TestEveryFieldTravels(t *testing.T) {
	peer := filled[backend.Peer](t)
	if got := peerIn(peerOut(peer)); got != peer {
		t.Errorf("peer %+v became %+v", peer, got)
	}
	remote := filled[backend.Remote](t)
	if got := remoteIn(remoteOut(remote)); !reflect.DeepEqual(got, remote) {
		t.Errorf("remote %+v became %+v", remote, got)
	}
	memory := filled[backend.GPURange](t)
	memory.Address = 0 // which means nothing in another process
	if got := gpuIn(gpuOut(&memory), memory.Size); !reflect.DeepEqual(got, &memory) {
		t.Errorf("GPU range %+v became %+v", memory, got)
	}
	failure := filled[backend.Error](t)
	failure.Err = &backend.Error{Code: backend.Denied, Text: "inner", Err: errors.New("innermost")}
	if got := errorIn(errorOut(&failure)); !reflect.DeepEqual(got, &failure) {
		t.Errorf("error %+v became %+v", failure, got)
	}
	info := filled[backend.Info](t)
	got, err := infoIn(infoOut(info))
	if err != nil || !reflect.DeepEqual(got, info) {
		t.Errorf("info %+v became %+v, %v", info, got, err)
	}
}

func TestErrorsKeepTheirIdentity(t *testing.T) {
	for _, code := range backend.Codes {
		for _, err := range []error{
			&backend.Error{Code: code}, &backend.Error{Code: code, RetryAfter: time.Second},
			fmt.Errorf("while working: %w", &backend.Error{Code: code, Text: "inside"}),
			errors.Join(errors.New("first"), &backend.Error{Code: code}),
		} {
			got := errorIn(errorOut(err))
			if backend.CodeOf(got) != code || !errors.Is(got, &backend.Error{Code: code}) {
				t.Errorf("%v became %v", err, got)
			}
			if !strings.Contains(got.Error(), code.String()) {
				t.Errorf("%v became %v, which does not name its code", err, got)
			}
		}
	}
	for _, c := range []struct {
		err  error
		want backend.Code
		text string
	}{
		{context.Canceled, backend.Cancelled, "context canceled"},
		{errors.New("plain"), backend.Internal, "plain"},
		{&backend.Error{}, backend.Internal, ""},
		{&backend.Error{Code: 77, Text: "of a later version"}, backend.Internal, "of a later version"},
	} {
		if got := errorIn(errorOut(c.err)); backend.CodeOf(got) != c.want || !strings.Contains(got.Error(), c.text) {
			t.Errorf("%v became %v, want code %v", c.err, got, c.want)
		}
	}
	if errorOut(nil) != nil || errorIn(nil) != nil {
		t.Error("no error became one")
	}
}

// TestAnyErrorTravels: whatever is in an error, it fits into a record, and its code arrives.
func TestAnyErrorTravels(t *testing.T) {
	text := rapid.OneOf(rapid.String(), rapid.SampledFrom([]string{
		strings.Repeat("x", 5000), strings.Repeat("ü", 3000), "\xff\xfe broken \xf0\x9f", "",
	}), rapid.Map(rapid.SliceOf(rapid.Byte()), func(b []byte) string { return string(b) }))
	rapid.Check(t, func(t *rapid.T) {
		var err error
		for range rapid.IntRange(1, 20).Draw(t, "causes") {
			err = &backend.Error{
				Code: rapid.SampledFrom(backend.Codes).Draw(t, "code"), Op: text.Draw(t, "op"), Backend: text.Draw(t, "backend"),
				Peer:   backend.Peer{Node: text.Draw(t, "node"), Host: text.Draw(t, "host"), Incarnation: math.MaxUint64},
				Region: math.MaxUint64, Offset: math.MaxUint64, Length: math.MaxUint64, Vendor: -1,
				VendorText: text.Draw(t, "vendor"), Text: text.Draw(t, "text"), RetryAfter: math.MaxInt64, Err: err,
			}
		}
		encoded, failure := proto.Marshal(errorOut(err))
		if failure != nil || len(encoded) > shm.MaxError {
			t.Fatalf("%d bytes, %v", len(encoded), failure)
		}
		var decoded backendpb.Error
		if failure := proto.Unmarshal(encoded, &decoded); failure != nil {
			t.Fatal(failure)
		}
		if got := backend.CodeOf(errorIn(&decoded)); got != backend.CodeOf(err) {
			t.Fatalf("code %v became %v", backend.CodeOf(err), got)
		}
	})
}

// TestHostileError: an error from the wire may be anything.
func TestHostileError(t *testing.T) {
	deep := &backendpb.Error{Code: 1}
	for range 10000 {
		deep = &backendpb.Error{Code: 1, Cause: deep}
	}
	depth := 0
	for err := errorIn(deep); err != nil; err = errors.Unwrap(err) {
		depth++
	}
	if depth != maxCauses {
		t.Errorf("%d causes, want %d", depth, maxCauses)
	}
	got := errorIn(&backendpb.Error{Code: math.MaxUint32, RetryAfterNs: -5}).(*backend.Error)
	if got.Code != backend.Internal || got.RetryAfter != 0 {
		t.Errorf("got %+v", got)
	}
}

func TestInfoThatMakesNoSense(t *testing.T) {
	good := func() *backendpb.Info {
		return &backendpb.Info{Name: "x", Version: "1", Capabilities: &backendpb.Capabilities{
			Ops: 3, Local: 2, Remote: 2, Reach: 3, Window: 64,
		}}
	}
	info, err := infoIn(good())
	if err != nil || info.Capabilities.Limits.Segments != shm.MaxSegments {
		t.Errorf("got %+v, %v; want transfers that fit into a record", info, err)
	}
	for _, c := range []struct {
		want  string
		spoil func(*backendpb.Info)
	}{
		{"operations 0", func(i *backendpb.Info) { i.Capabilities = nil }},
		{"operations 0", func(i *backendpb.Info) { i.Capabilities.Ops = 0 }},
		{"operations 7", func(i *backendpb.Info) { i.Capabilities.Ops = 7 }},
		{"operations 258", func(i *backendpb.Info) { i.Capabilities.Ops = 258 }},
		{"no kind of memory", func(i *backendpb.Info) { i.Capabilities.Local = 0 }},
		{"no kind of memory", func(i *backendpb.Info) { i.Capabilities.Remote = 256 }},
		{"a reach of 4", func(i *backendpb.Info) { i.Capabilities.Reach = 4 }},
		{"a window of 0", func(i *backendpb.Info) { i.Capabilities.Window = 0 }},
		{"a version of 300 bytes", func(i *backendpb.Info) { i.Version = strings.Repeat("1", 300) }},
		{"4097 links", func(i *backendpb.Info) { i.Capabilities.Links = links(4097, &backendpb.Link{}) }},
		{"link 1 from \"gggg", func(i *backendpb.Info) {
			i.Capabilities.Links = links(1, &backendpb.Link{})
			i.Capabilities.Links.Links = append(i.Capabilities.Links.Links, &backendpb.Link{Near: strings.Repeat("g", 65)})
		}},
		{"link 0 from \"\" to \"gggg", func(i *backendpb.Info) {
			i.Capabilities.Links = links(1, &backendpb.Link{Far: strings.Repeat("g", 65)})
		}},
		{`to "\x1b[2J"`, func(i *backendpb.Info) { i.Capabilities.Links = links(1, &backendpb.Link{Far: "\x1b[2J"}) }},
		{"a text of 257 bytes", func(i *backendpb.Info) {
			i.Capabilities.Links = links(1, &backendpb.Link{Text: strings.Repeat("g", 257)})
		}},
		{"cost -1", func(i *backendpb.Info) { i.Capabilities.Links = links(1, &backendpb.Link{Cost: -1}) }},
	} {
		i := good()
		c.spoil(i)
		if _, err := infoIn(i); backend.CodeOf(err) != backend.Internal || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want an error that says %q", err, c.want)
		}
	}
	wide := good()
	wide.Capabilities.Window, wide.Capabilities.LimitSegments = math.MaxUint32, math.MaxUint64
	if info, err = infoIn(wide); err != nil || info.Capabilities.Window != maxWindow || info.Capabilities.Limits.Segments != shm.MaxSegments {
		t.Errorf("got %+v, %v", info, err)
	}
}

func links(n int, l *backendpb.Link) *backendpb.Links {
	return &backendpb.Links{Links: slices.Repeat([]*backendpb.Link{l}, n)}
}

// TestLinks: no list of links, which means all places, and an empty one, which means none, stay what they are.
func TestLinks(t *testing.T) {
	for _, want := range [][]backend.Link{nil, {}, {{Near: "a", Cost: math.MaxInt, Text: strings.Repeat("x", 256)}, {Far: strings.Repeat("b", 64)}}} {
		encoded, err := proto.Marshal(infoOut(backend.Info{Capabilities: backend.Capabilities{Links: want}}))
		if err != nil {
			t.Fatal(err)
		}
		var decoded backendpb.Info
		if err := proto.Unmarshal(encoded, &decoded); err != nil {
			t.Fatal(err)
		}
		got, err := linksIn(decoded.GetCapabilities().GetLinks())
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%#v became %#v, %v", want, got, err)
		}
	}
	long := linksOut([]backend.Link{{Near: strings.Repeat("n", 300), Far: strings.Repeat("f", 300), Text: "\xff" + strings.Repeat("t", 300)}})
	if _, err := linksIn(long); err != nil {
		t.Errorf("what a backend says at too great length does not get through: %v", err)
	}
}

// TestHostileRemote: what cannot be a place does not become another one.
func TestHostileRemote(t *testing.T) {
	for _, place := range []string{strings.Repeat("g", 65), "0000:01:00.0\n"} {
		got := remoteIn(&backendpb.Remote{Kind: 2, Size: 7, Place: place})
		if got.Kind != 0 || got.Place != "" {
			t.Errorf("got %+v", got)
		}
	}
}

// TestRegisterRequestRefused: a host that says half of where memory lies, or the wrong half.
func TestRegisterRequestRefused(t *testing.T) {
	good := func() *backendpb.RegisterRequest {
		return &backendpb.RegisterRequest{Region: 1, Kind: 2, Size: 4096, Gpu: &backendpb.GPURange{
			Runtime: "hip", Device: "0000:01:00.0", Allocation: 8192, Offset: 4096, Handle: []byte("h"),
		}}
	}
	if m, err := new(mapping).mapIn(good()); err != nil || m.Size() != 4096 || m.Place() != "0000:01:00.0" {
		t.Errorf("%+v, %v", m, err)
	}
	for want, spoil := range map[string]func(*backendpb.RegisterRequest){
		"memory of kind gpu":  func(q *backendpb.RegisterRequest) { q.Gpu = nil },
		"memory of kind host": func(q *backendpb.RegisterRequest) { q.Kind = 1 },
		"has no handle":       func(q *backendpb.RegisterRequest) { q.Gpu.Handle = nil },
		"257 bytes":           func(q *backendpb.RegisterRequest) { q.Gpu.Handle = make([]byte, 257) },
		"do not lie within":   func(q *backendpb.RegisterRequest) { q.Gpu.Offset = math.MaxUint64 },
		"0 bytes":             func(q *backendpb.RegisterRequest) { q.Size = 0 },
	} {
		q := good()
		spoil(q)
		if _, err := new(mapping).mapIn(q); backend.CodeOf(err) != backend.BadRequest || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want a bad request: %s", err, want)
		}
	}
}

// FuzzRegisterRequest: whatever a host sends, memory of a GPU that gets as far as the backend makes sense, and nothing is
// mapped for it.
func FuzzRegisterRequest(f *testing.F) {
	for _, q := range []*backendpb.RegisterRequest{
		{Region: 1, Kind: 2, Size: 4096, Gpu: &backendpb.GPURange{Runtime: "hip", Device: "0000:01:00.0", Allocation: 8192, Offset: 4096, Handle: []byte("h")}},
		{Region: 1, Kind: 2, Size: 4096, HasFd: true, Gpu: &backendpb.GPURange{Runtime: "hip", Device: "0000:01:00.0", Allocation: 4096, Offset: 1}},
		{Region: 1, Kind: 1, Size: 1, Gpu: &backendpb.GPURange{}},
		{Region: 1, Kind: 2, Size: math.MaxUint64, Gpu: &backendpb.GPURange{Runtime: "cuda", Device: "g", Allocation: math.MaxUint64, Offset: 1, Handle: []byte("h")}},
	} {
		encoded, err := proto.Marshal(q)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(encoded)
	}
	f.Fuzz(func(t *testing.T, encoded []byte) {
		var q backendpb.RegisterRequest
		if proto.Unmarshal(encoded, &q) != nil || q.GetGpu() == nil {
			return
		}
		m := &mapping{}
		memory, err := m.mapIn(&q)
		if m.bytes != nil || m.file != nil {
			t.Fatal("something was mapped")
		}
		if err != nil {
			if backend.CodeOf(err) != backend.BadRequest {
				t.Fatalf("refused with %v", err)
			}
			return
		}
		g := memory.GPU
		if memory.Kind != backend.GPUMemory || memory.Bytes != nil || memory.FD >= 0 || g == nil || g.Address != 0 || memory.Size() != q.GetSize() ||
			g.Size == 0 || g.Size > g.Allocation || g.Offset > g.Allocation-g.Size || g.Device == "" || len(g.Device) > 64 ||
			g.Runtime == "" || len(g.Runtime) > 64 || len(g.Handle) == 0 || len(g.Handle) > 256 {
			t.Fatalf("accepted %+v, %+v", memory, g)
		}
	})
}
