package backend

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Code says what an error means to the one who has to act on it. Codes keep their identity across processes.
type Code uint8

// The codes. Their numbers are part of the wire format and never change.
const (
	Internal    Code = 1 // a defect, here or in the peer
	Busy        Code = 2 // no room now; the same call may succeed later
	PeerGone    Code = 3 // the peer, or this incarnation of it, does not exist any more
	PathDown    Code = 4 // the peer may be well, but this way to it is broken
	BadRequest  Code = 5 // the caller's mistake; the same call fails again
	Denied      Code = 6 // not allowed: a wrong secret, missing rights, no credentials
	Integrity   Code = 7 // bytes arrived, and they are not the right ones
	Cancelled   Code = 8 // the caller gave up, or its deadline passed
	Unsupported Code = 9 // not among the capabilities
)

var codeNames = [...]string{
	Internal: "internal error", Busy: "busy", PeerGone: "peer gone", PathDown: "path down",
	BadRequest: "bad request", Denied: "denied", Integrity: "integrity violated", Cancelled: "cancelled",
	Unsupported: "unsupported",
}

// Codes lists every code, for tables and tests.
var Codes = []Code{Internal, Busy, PeerGone, PathDown, BadRequest, Denied, Integrity, Cancelled, Unsupported}

// String returns the code in words.
func (c Code) String() string {
	if int(c) < len(codeNames) && codeNames[c] != "" {
		return codeNames[c]
	}
	return fmt.Sprintf("code-%d", uint8(c))
}

// Sentinels for errors.Is. A backend returns an *Error with details where it knows any; ErrBusy itself may be
// returned as it is, so that back-pressure costs nothing.
var (
	ErrInternal    = &Error{Code: Internal}
	ErrBusy        = &Error{Code: Busy}
	ErrPeerGone    = &Error{Code: PeerGone}
	ErrPathDown    = &Error{Code: PathDown}
	ErrBadRequest  = &Error{Code: BadRequest}
	ErrDenied      = &Error{Code: Denied}
	ErrIntegrity   = &Error{Code: Integrity}
	ErrCancelled   = &Error{Code: Cancelled}
	ErrUnsupported = &Error{Code: Unsupported}
)

// Error is an error with an identity. Fields that do not apply are left zero and are not printed.
type Error struct {
	Code    Code
	Op      string // what was being done: "post", "establish", "register"
	Backend string
	Peer    Peer
	Region  RegionID
	Offset  uint64 // with Length: the range at fault, within Region
	Length  uint64
	// Vendor is the number that the device, kernel or library gave, with VendorText for its words.
	Vendor     int
	VendorText string
	Text       string // what went wrong, for people; lower case, no full stop
	// RetryAfter is the least time to wait before trying again, where the backend knows it.
	RetryAfter time.Duration
	Err        error // the cause
}

// Error renders all that is known, most general first.
func (e *Error) Error() string {
	var b strings.Builder
	if e.Backend != "" {
		b.WriteString(e.Backend + ": ")
	}
	if e.Op != "" {
		b.WriteString(e.Op + ": ")
	}
	b.WriteString(e.Code.String())
	if e.Text != "" {
		b.WriteString(": " + e.Text)
	}
	var where []string
	if e.Peer.Node != "" {
		where = append(where, "peer "+e.Peer.String())
	}
	if e.Region != 0 {
		where = append(where, fmt.Sprintf("region %d", e.Region))
	}
	if e.Length != 0 {
		where = append(where, fmt.Sprintf("range [%d, +%d)", e.Offset, e.Length))
	}
	if e.Vendor != 0 || e.VendorText != "" {
		where = append(where, strings.TrimSpace(fmt.Sprintf("vendor error %d %s", e.Vendor, e.VendorText)))
	}
	if len(where) > 0 {
		b.WriteString(" (" + strings.Join(where, ", ") + ")")
	}
	if e.Err != nil {
		b.WriteString(": " + e.Err.Error())
	}
	return b.String()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is an *Error of the same code. It makes errors.Is(err, ErrBusy) true for every Busy
// error.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// Errorf makes an error of the given code with a text. For an error with a cause, fill in Error.Err instead.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Text: fmt.Sprintf(format, args...)}
}

// CodeOf returns the code of the first *Error in err's chain; for context errors, Cancelled; for any other
// error, Internal; and zero for nil.
func CodeOf(err error) Code {
	var e *Error
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e.Code
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return Cancelled
	}
	return Internal
}
