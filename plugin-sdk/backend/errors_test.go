package backend_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

var sentinels = map[backend.Code]error{
	backend.Internal: backend.ErrInternal, backend.Busy: backend.ErrBusy, backend.PeerGone: backend.ErrPeerGone,
	backend.PathDown: backend.ErrPathDown, backend.BadRequest: backend.ErrBadRequest, backend.Denied: backend.ErrDenied,
	backend.Integrity: backend.ErrIntegrity, backend.Cancelled: backend.ErrCancelled, backend.Unsupported: backend.ErrUnsupported,
}

// TestErrorIdentity: an error of one code is that sentinel and no other, however deep it is wrapped.
func TestErrorIdentity(t *testing.T) {
	if len(sentinels) != len(backend.Codes) {
		t.Fatalf("%d sentinels, %d codes", len(sentinels), len(backend.Codes))
	}
	for _, code := range backend.Codes {
		detailed := &backend.Error{Code: code, Op: "post", Text: "some text", Err: io.EOF}
		for name, err := range map[string]error{
			"plain":    backend.Errorf(code, "x"),
			"detailed": detailed,
			"wrapped":  fmt.Errorf("outer: %w", detailed),
			"joined":   errors.Join(io.ErrUnexpectedEOF, detailed),
			"sentinel": sentinels[code],
		} {
			if got := backend.CodeOf(err); got != code {
				t.Errorf("%v, %s: CodeOf = %v", code, name, got)
			}
			for other, sentinel := range sentinels {
				if got := errors.Is(err, sentinel); got != (other == code) {
					t.Errorf("%v, %s: errors.Is(%v) = %t", code, name, other, got)
				}
			}
		}
		var e *backend.Error
		if !errors.As(fmt.Errorf("outer: %w", detailed), &e) || e != detailed {
			t.Errorf("%v: errors.As does not find the error itself", code)
		}
		if !errors.Is(detailed, io.EOF) {
			t.Errorf("%v: the cause is lost", code)
		}
	}
}

func TestCodeOf(t *testing.T) {
	expired, cancel := context.WithTimeout(context.Background(), -time.Second)
	defer cancel()
	for _, c := range []struct {
		err  error
		want backend.Code
	}{
		{nil, 0},
		{io.EOF, backend.Internal},
		{context.Canceled, backend.Cancelled},
		{context.DeadlineExceeded, backend.Cancelled},
		{fmt.Errorf("dial: %w", expired.Err()), backend.Cancelled},
		{&backend.Error{Code: backend.PathDown, Err: context.Canceled}, backend.PathDown}, // what the backend says counts
		{&backend.Error{Code: backend.PathDown, Err: backend.ErrBusy}, backend.PathDown},  // and the outermost of it
	} {
		if got := backend.CodeOf(c.err); got != c.want {
			t.Errorf("CodeOf(%v) = %v, want %v", c.err, got, c.want)
		}
	}
}

func TestErrorText(t *testing.T) {
	peer := backend.Peer{Node: "n1", Incarnation: 0xab, Host: "h"}
	for _, c := range []struct {
		err  *backend.Error
		want string
	}{
		{&backend.Error{Code: backend.Busy}, "busy"},
		{backend.Errorf(backend.Denied, "no right to %s", "read"), "denied: no right to read"},
		{&backend.Error{Code: backend.BadRequest, Backend: "tcp", Op: "post", Peer: peer, Region: 7, Offset: 4096, Length: 64, Text: "outside"},
			"tcp: post: bad request: outside (peer n1@ab, region 7, range [4096, +64))"},
		{&backend.Error{Code: backend.PathDown, Op: "read", Vendor: 12, VendorText: "transport retry exceeded", Err: io.EOF},
			"read: path down (vendor error 12 transport retry exceeded): EOF"},
		{&backend.Error{Code: backend.Internal, Vendor: 3}, "internal error (vendor error 3)"},
		{&backend.Error{Code: 99, Text: "from a newer version"}, "code-99: from a newer version"},
	} {
		if got := c.err.Error(); got != c.want {
			t.Errorf("got  %s\nwant %s", got, c.want)
		}
	}
}

// TestCodeNumbers: they travel between processes of different versions.
func TestCodeNumbers(t *testing.T) {
	for i, code := range backend.Codes {
		if int(code) != i+1 {
			t.Errorf("%v has the number %d, want %d", code, code, i+1)
		}
	}
	seen := map[string]bool{}
	for _, code := range backend.Codes {
		if seen[code.String()] {
			t.Errorf("two codes are called %q", code)
		}
		seen[code.String()] = true
	}
	if got := backend.Code(0).String(); got != "code-0" {
		t.Errorf("Code(0) = %q", got)
	}
}

func TestBusyCostsNothing(t *testing.T) {
	var err error
	if n := testing.AllocsPerRun(100, func() {
		err = backend.ErrBusy
		if !errors.Is(err, backend.ErrBusy) {
			t.Fatal("Busy is not Busy")
		}
	}); n != 0 {
		t.Errorf("%v allocations to say and recognise Busy, want none", n)
	}
}
