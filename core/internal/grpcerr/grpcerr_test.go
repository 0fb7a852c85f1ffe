package grpcerr

import (
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// travel sends err through the bytes of a status, as gRPC does.
func travel(t *testing.T, err error) error {
	t.Helper()
	s, ok := status.FromError(ToStatus(err))
	if !ok {
		t.Fatalf("ToStatus(%v) is no status", err)
	}
	bytes, marshalErr := proto.Marshal(s.Proto())
	if marshalErr != nil {
		t.Fatalf("the status of %v cannot be encoded: %v", err, marshalErr)
	}
	p := s.Proto()
	proto.Reset(p)
	if err := proto.Unmarshal(bytes, p); err != nil {
		t.Fatal(err)
	}
	return FromStatus(status.ErrorProto(p))
}

func full(code backend.Code) *backend.Error {
	return &backend.Error{
		Code: code, Op: "publish", Backend: "tcp",
		Peer:   backend.Peer{Node: "n1", Incarnation: 1 << 63, Host: "h1"},
		Region: 7, Offset: 8, Length: 9, Vendor: -12, VendorText: "ENOMEM", Text: "no room",
		RetryAfter: 3 * time.Millisecond, Err: errors.New("cause"),
	}
}

func TestEveryCodeAndFieldSurvives(t *testing.T) {
	for _, code := range backend.Codes {
		for _, want := range []*backend.Error{full(code), {Code: code}, {Code: code, Err: errors.New("")}} {
			got := travel(t, want)
			if !reflect.DeepEqual(got, error(want)) {
				t.Errorf("%v came back as %#v, want %#v", code, got, want)
			}
			if status.Code(ToStatus(want)) == codes.Unknown {
				t.Errorf("%v has no status code", code)
			}
		}
	}
	// The comparison above proves something only if no field of the sample is zero.
	v := reflect.ValueOf(*full(backend.Busy))
	for i := range v.NumField() {
		if v.Field(i).IsZero() {
			t.Errorf("the sample leaves %s zero", v.Type().Field(i).Name)
		}
	}
}

func TestCodeSurvivesWithoutDetail(t *testing.T) {
	for _, code := range backend.Codes {
		s, _ := status.FromError(ToStatus(full(code)))
		if got := backend.CodeOf(FromStatus(status.Error(s.Code(), s.Message()))); got != code {
			t.Errorf("%v came back as %v", code, got)
		}
	}
}

func TestErrorsOfGRPCItself(t *testing.T) {
	for code, want := range map[codes.Code]backend.Code{
		codes.Unavailable: backend.PathDown, codes.DeadlineExceeded: backend.Cancelled,
		codes.Canceled: backend.Cancelled, codes.Unimplemented: backend.Unsupported,
		codes.ResourceExhausted: backend.Busy, codes.Unauthenticated: backend.Denied,
		codes.Unknown: backend.Internal, codes.Aborted: backend.Internal,
	} {
		err := FromStatus(status.Error(code, "words"))
		if got := backend.CodeOf(err); got != want {
			t.Errorf("%v means %v, want %v", code, got, want)
		}
		var e *backend.Error
		if !errors.As(err, &e) || e.Text != "words" {
			t.Errorf("%v lost its words: %v", code, err)
		}
	}
}

func TestContextErrorsKeepTheirIdentity(t *testing.T) {
	for _, cause := range []error{context.Canceled, context.DeadlineExceeded} {
		for _, err := range []error{cause, &backend.Error{Code: backend.Cancelled, Err: cause}} {
			got := travel(t, err)
			if !errors.Is(got, cause) || !errors.Is(got, backend.ErrCancelled) {
				t.Errorf("%v came back as %v", err, got)
			}
		}
		if err := FromStatus(status.FromContextError(cause).Err()); !errors.Is(err, cause) {
			t.Errorf("gRPC's own %v came back as %v", cause, err)
		}
	}
}

func TestWrappedErrorKeepsWordsAndCode(t *testing.T) {
	want := fmt.Errorf("join n1: %w", full(backend.Busy))
	got := travel(t, want)
	var e *backend.Error
	if got.Error() != want.Error() || !errors.As(got, &e) || !reflect.DeepEqual(e, full(backend.Busy)) {
		t.Errorf("%v came back as %v", want, got)
	}
}

func TestForeignError(t *testing.T) {
	got := travel(t, io.ErrUnexpectedEOF)
	if backend.CodeOf(got) != backend.Internal || got.Error() != "internal error: unexpected EOF" {
		t.Errorf("came back as %q with code %v", got, backend.CodeOf(got))
	}
	if err := FromStatus(io.EOF); err != io.EOF {
		t.Errorf("an error that is no status became %v", err)
	}
}

func TestNil(t *testing.T) {
	if err := ToStatus(nil); err != nil {
		t.Error(err)
	}
	if err := FromStatus(nil); err != nil {
		t.Error(err)
	}
}

func TestCodeOfANewerPeer(t *testing.T) {
	if got := backend.CodeOf(travel(t, &backend.Error{Code: 200})); got != 200 {
		t.Errorf("code 200 came back as %v", got)
	}
}

func TestInvalidUTF8(t *testing.T) {
	got := travel(t, &backend.Error{Code: backend.Busy, Text: "key \xff", Peer: backend.Peer{Node: "\xfe"}})
	if !errors.Is(got, backend.ErrBusy) || got.Error() != "busy: key \uFFFD (peer \uFFFD@0)" {
		t.Errorf("came back as %q", got)
	}
}
