package rpc

import (
	"context"
	"errors"
	"fmt"
	"math"
	"reflect"
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
		v.SetString(fmt.Sprint("text ", *n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Uint8:
		v.SetUint(uint64(1 + *n%3))
	case reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(*n))
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Slice:
		v.SetBytes([]byte{byte(*n), 0, 255})
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
