package backendtest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// TestMain runs the tests, or, in a process that the tests started, the other end.
func TestMain(m *testing.M) {
	ServeChild(&child{Child: Child{Factory: paperFactory}})
	goleak.VerifyTestMain(m)
}

// trial is a test that is expected to fail.
type trial struct {
	testing.TB
	failures []string
	cleanups []func()
}

func (t *trial) Helper()          {}
func (t *trial) Cleanup(f func()) { t.cleanups = append(t.cleanups, f) }
func (t *trial) Errorf(format string, args ...any) {
	t.failures = append(t.failures, fmt.Sprintf(format, args...))
}

func (t *trial) Fatalf(format string, args ...any) {
	t.Errorf(format, args...)
	runtime.Goexit()
}

func (t *trial) Fatal(args ...any) { t.Fatalf("%s", fmt.Sprint(args...)) }

// failures runs a test with its cleanups, and returns how it fails.
func failures(test func(t testing.TB)) []string {
	t := new(trial)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer func() {
			for _, f := range slices.Backward(t.cleanups) {
				f()
			}
		}()
		test(t)
	}()
	<-ended
	return t.failures
}

// wantFailure wants a test to fail once, and to say some words.
func wantFailure(t *testing.T, test func(t testing.TB), words ...string) {
	t.Helper()
	got := failures(test)
	if len(got) != 1 {
		t.Fatalf("got the failures %q, want one", got)
	}
	for _, w := range words {
		if !strings.Contains(got[0], w) {
			t.Errorf("got %q, want it to say %q", got[0], w)
		}
	}
}

// paper is a backend that moves nothing: it writes down who asked for what.
type paper struct {
	backend.Backend
	self      backend.Peer
	options   string
	refuse    error // what Answer returns
	abandoned bool
}

var paperFactory = backend.Factory{
	Name:    "paper",
	Options: []backend.Option{{Name: "colour", Type: backend.StringOption, Default: "white", Help: "A colour."}},
	Open: func(_ context.Context, cfg backend.Config) (backend.Backend, error) {
		return &paper{self: cfg.Self, options: cfg.Options.String("colour")}, nil
	},
}

func (p *paper) Register(_ context.Context, m backend.Memory) ([]byte, error) {
	if m.Region == 0 {
		return nil, backend.Errorf(backend.BadRequest, "region 0")
	}
	return fmt.Appendf(nil, "%s %v %d, fd %v, %x", p.options, m.Region, m.Size(), m.FD >= 0, m.Bytes[:4]), nil
}

func (p *paper) Deregister(context.Context, backend.RegionID) error { return nil }

func (p *paper) Offer(_ context.Context, peer backend.Peer) (backend.Handshake, error) {
	return &handshake{p, fmt.Sprintf("%v to %v", p.self, peer)}, nil
}

func (p *paper) Answer(_ context.Context, peer backend.Peer, offer []byte) ([]byte, error) {
	return fmt.Appendf(nil, "%v answers %v: %s", p.self, peer, offer), p.refuse
}

func (p *paper) Close() error {
	if p.options == "red" {
		return errors.New("red does not close")
	}
	return nil
}

func (p *paper) Counters() []backend.Count { return []backend.Count{{Name: "sheets", Value: 7}} }

type handshake struct {
	from  *paper
	offer string
}

func (h *handshake) Offer() []byte { return []byte(h.offer) }
func (h *handshake) Abandon()      { h.from.abandoned = true }

func (h *handshake) Establish(_ context.Context, answer []byte) (backend.Endpoint, error) {
	return &line{answer: string(answer)}, nil
}

// line is an endpoint.
type line struct {
	backend.Endpoint
	answer string
}

func (l *line) Session(_ context.Context, local backend.RegionID, _ backend.Remote, _ backend.Sink) (backend.Session, error) {
	if local == 0 {
		return nil, backend.Errorf(backend.BadRequest, "region 0")
	}
	return new(queue), nil
}

// queue is a session.
type queue struct {
	backend.Session
	busy   int // that many posts are refused
	posted []backend.Transfer
}

func (q *queue) Post(t backend.Transfer) error {
	if q.busy > 0 {
		q.busy--
		return backend.ErrBusy
	}
	q.posted = append(q.posted, t)
	return nil
}
