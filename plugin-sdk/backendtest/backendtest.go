// Package backendtest has what the tests of a backend need besides the conformance suite: two ends that are connected,
// memory to lend, a sink that keeps account, and the other end in a process of its own, to be stopped or killed.
//
// A test of one process opens both ends and connects them:
//
//	a, b := backendtest.Peer("a", 1), backendtest.Peer("b", 2)
//	initiator := backendtest.Open(t, Factory, backend.Config{Self: a}, nil)
//	target := backendtest.Open(t, Factory, backend.Config{Self: b}, nil)
//	backendtest.Register(t, initiator, a, backendtest.Memfd(t, 1, 4096, 0))
//	remote := backendtest.Register(t, target, b, backendtest.Memfd(t, 2, 4096, backend.RemoteWrite))
//
//	sink := new(backendtest.Sink)
//	endpoint := backendtest.Connect(t, initiator, a, b, target)
//	session := backendtest.Bind(t, endpoint, 1, remote, sink)
//	backendtest.Must(t, backendtest.Post(session, backend.Write, 7, backend.Segment{Length: 4096}))
//	backendtest.Must(t, sink.Wait(t, 7).Err)
//
// With StartChild instead of the second Open, the target is the test binary once more, which ServeChild makes one.
//
// What takes a testing.TB ends the test when it fails, and so has to be called by the goroutine of the test.
package backendtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Patience is how long anything here waits for what must happen. It bounds tests that fail: no test depends on its
// length.
const Patience = time.Minute

// Context returns a context for calls that have to return: it ends after Patience, or with the test.
func Context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	t.Cleanup(cancel)
	return ctx
}

// Must ends the test if there is an error.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// WantCode wants an error of the contract with a code, whose text has all the words.
func WantCode(t testing.TB, err error, code backend.Code, words ...string) {
	t.Helper()
	var e *backend.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Fatalf("got error %v, want code %q", err, code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Fatalf("got error %v, want it to say %q", err, w)
		}
	}
}

// WantOutcomes wants the outcomes of a completion to be those given.
func WantOutcomes(t testing.TB, c backend.Completion, want ...backend.Outcome) {
	t.Helper()
	if !slices.Equal(c.Outcomes, want) {
		t.Fatalf("transfer %d: outcomes %v, want %v (%v)", c.Cookie, c.Outcomes, want, c.Err)
	}
}

// WantSame wants bytes to be the same, and says where they first differ.
func WantSame(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			t.Fatalf("%s: byte %d is %#x, want %#x", what, i, got[i], want[i])
		}
	}
	t.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
}

// WantClosed waits until a channel is closed, or has something to receive.
func WantClosed(t testing.TB, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(Patience):
		t.Fatalf("it does not happen: %s\n%s", what, stacks())
	}
}

// WantOpen wants a channel to be open, with nothing to receive, now.
func WantOpen(t testing.TB, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
		t.Fatalf("it has happened: %s", what)
	default:
	}
}

// Eventually waits until a condition holds that another goroutine, or process, brings about without a sign.
func Eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(Patience); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it does not come about: %s\n%s", what, stacks())
		}
	}
}

// stacks returns the stacks of all goroutines, for a test that waits in vain.
func stacks() string {
	b := make([]byte, 1<<20)
	return string(b[:runtime.Stack(b, true)])
}

// Fill writes bytes that look random, and are others for each seed.
func Fill(b []byte, seed uint64) {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	rand.NewChaCha8(key).Read(b)
}

// Filled returns n bytes as Fill writes them.
func Filled(n int, seed uint64) []byte {
	b := make([]byte, n)
	Fill(b, seed)
	return b
}
