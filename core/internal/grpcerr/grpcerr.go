// Package grpcerr keeps the identity of errors across gRPC.
//
// A server passes what it returns through ToStatus, a client what it gets through FromStatus; between them
// nothing is lost: the code, the details and the words of an error are the same on both ends. Errors that gRPC
// makes itself, such as a connection that is down, come out of FromStatus with the code that tells what to do.
package grpcerr

import (
	"context"
	"errors"
	"math"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/umbp/umbp/core/internal/grpcerr/errorpb"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// statusCodes says which code of gRPC stands for a code of ours, for those who only know gRPC: proxies, metrics,
// clients in other languages.
var statusCodes = map[backend.Code]codes.Code{
	backend.Internal:    codes.Internal,
	backend.Busy:        codes.ResourceExhausted,
	backend.PeerGone:    codes.FailedPrecondition,
	backend.PathDown:    codes.Unavailable,
	backend.BadRequest:  codes.InvalidArgument,
	backend.Denied:      codes.PermissionDenied,
	backend.Integrity:   codes.DataLoss,
	backend.Cancelled:   codes.Canceled,
	backend.Unsupported: codes.Unimplemented,
}

// ownCodes is the way back, for a status that carries no detail. Codes that are not in it mean Internal.
var ownCodes = map[codes.Code]backend.Code{
	codes.ResourceExhausted:  backend.Busy,
	codes.FailedPrecondition: backend.PeerGone,
	codes.Unavailable:        backend.PathDown,
	codes.InvalidArgument:    backend.BadRequest,
	codes.OutOfRange:         backend.BadRequest,
	codes.PermissionDenied:   backend.Denied,
	codes.Unauthenticated:    backend.Denied,
	codes.DataLoss:           backend.Integrity,
	codes.Canceled:           backend.Cancelled,
	codes.DeadlineExceeded:   backend.Cancelled,
	codes.Unimplemented:      backend.Unsupported,
}

// ToStatus returns err as a gRPC server hands it to its client. Nil stays nil.
func ToStatus(err error) error {
	if err == nil {
		return nil
	}
	var e *backend.Error
	if !errors.As(err, &e) {
		e = &backend.Error{Code: backend.CodeOf(err), Err: err}
		err = e
	}
	code, ok := statusCodes[e.Code]
	if !ok {
		code = codes.Unknown
	}
	if e.Code == backend.Cancelled && errors.Is(err, context.DeadlineExceeded) {
		code = codes.DeadlineExceeded
	}
	s, detailErr := status.New(code, valid(err.Error())).WithDetails(toProto(e))
	if detailErr != nil { // the detail cannot be encoded: its words and its code still travel
		s = status.New(code, valid(err.Error()))
	}
	return s.Err()
}

// FromStatus returns the error that a gRPC call ended with as the server had it: an *backend.Error, or an error
// that wraps one. Nil stays nil, and an error that is not a gRPC status is returned as it is.
func FromStatus(err error) error {
	s, ok := status.FromError(err)
	if s.Code() == codes.OK || !ok {
		return err
	}
	for _, detail := range s.Details() {
		if p, ok := detail.(*errorpb.Error); ok && p.GetCode() > 0 && p.GetCode() <= math.MaxUint8 {
			e := fromProto(p, contextError(s.Code()))
			if s.Message() == valid(e.Error()) {
				return e
			}
			return &wrapped{text: s.Message(), err: e}
		}
	}
	code, ok := ownCodes[s.Code()]
	if !ok {
		code = backend.Internal
	}
	return &backend.Error{Code: code, Text: s.Message(), Err: contextError(s.Code())}
}

// wrapped is an error that the server had wrapped: its words, around the error that they were put around.
type wrapped struct {
	text string
	err  *backend.Error
}

func (w *wrapped) Error() string { return w.text }
func (w *wrapped) Unwrap() error { return w.err }

// contextError returns the context's error that a status code stands for, so that errors.Is finds it.
func contextError(c codes.Code) error {
	switch c {
	case codes.Canceled:
		return context.Canceled
	case codes.DeadlineExceeded:
		return context.DeadlineExceeded
	}
	return nil
}

func toProto(e *backend.Error) *errorpb.Error {
	p := &errorpb.Error{
		Code:         errorpb.Code(e.Code),
		Op:           valid(e.Op),
		Backend:      valid(e.Backend),
		Node:         valid(e.Peer.Node),
		Incarnation:  e.Peer.Incarnation,
		Host:         valid(e.Peer.Host),
		Region:       uint64(e.Region),
		Offset:       e.Offset,
		Length:       e.Length,
		Vendor:       int64(e.Vendor),
		VendorText:   valid(e.VendorText),
		Text:         valid(e.Text),
		RetryAfterNs: int64(e.RetryAfter),
	}
	if e.Err != nil {
		cause := valid(e.Err.Error())
		p.Cause = &cause
	}
	return p
}

// fromProto is the inverse of toProto. A cause comes back as ctxErr when it reads the same, else as its words.
func fromProto(p *errorpb.Error, ctxErr error) *backend.Error {
	e := &backend.Error{
		Code:    backend.Code(p.GetCode()),
		Op:      p.GetOp(),
		Backend: p.GetBackend(),
		Peer: backend.Peer{
			Node: p.GetNode(), Incarnation: p.GetIncarnation(), Host: p.GetHost(),
		},
		Region:     backend.RegionID(p.GetRegion()),
		Offset:     p.GetOffset(),
		Length:     p.GetLength(),
		Vendor:     int(p.GetVendor()),
		VendorText: p.GetVendorText(),
		Text:       p.GetText(),
		RetryAfter: max(0, time.Duration(p.GetRetryAfterNs())),
	}
	if p.Cause != nil {
		e.Err = errors.New(p.GetCause())
		if ctxErr != nil && p.GetCause() == ctxErr.Error() {
			e.Err = ctxErr
		}
	}
	return e
}

// valid makes s a string that protobuf can carry: errors may quote bytes that are not UTF-8.
func valid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
