package conformance_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/conformance"
	"github.com/umbp/umbp/plugin-sdk/reference"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// defect is one way to break a backend.
type defect struct {
	name   string
	caught string // by this case
	saying string // in the words of this failure
	lab    *lab
}

// defects returns backends with a defect each.
func defects() []defect {
	return []defect{
		{"completes twice", "complete/once", "a second completion", &lab{
			complete: func(s *session, c backend.Completion) {
				s.sink.Complete(c)
				s.sink.Complete(c)
			},
		}},
		{"loses every hundredth completion", "complete/once", "nothing after", &lab{
			impatient: true,
			complete: func(s *session, c backend.Completion) {
				if c.Cookie%100 != 0 {
					s.sink.Complete(c)
				}
			},
		}},
		{"keeps the caller's segments", "bytes/segments-reused", "Segments overwritten after Post", &lab{
			post: func(s *session, t backend.Transfer) error {
				s.later(func() backend.Transfer {
					t.Segments = readLate(t.Segments)
					return t
				})
				return nil
			},
		}},
		{"says done and moves nothing", "bytes/edges", "the first byte: after a write", &lab{
			post: func(s *session, t backend.Transfer) error {
				s.sink.Complete(backend.Completion{Cookie: t.Cookie})
				return nil
			},
		}},
		{"writes one byte too many", "bytes/edges", "the first byte: after a write", &lab{
			post: func(s *session, t backend.Transfer) error {
				if end := t.Segments[0].Remote + t.Segments[0].Length; t.Op == backend.Write && end < uint64(len(s.far)) {
					s.far[end]++
				}
				return s.Session.Post(t)
			},
		}},
		{"drops the last segment", "bytes/random", "is wrong", &lab{
			post: func(s *session, t backend.Transfer) error {
				if n := len(t.Segments); n > 1 {
					t.Segments = t.Segments[:n-1]
				}
				return s.Session.Post(t)
			},
		}},
		{"accepts what overflows", "refuse/ranges", "a remote offset that overflows: succeeded", &lab{
			post: func(s *session, t backend.Transfer) error {
				for _, g := range t.Segments {
					if g.Remote+g.Length < g.Remote {
						s.sink.Complete(backend.Completion{Cookie: t.Cookie})
						return nil
					}
				}
				return s.Session.Post(t)
			},
		}},
		{"moves before it checks", "refuse/ranges", "after a refusal of", &lab{
			post: func(s *session, t backend.Transfer) error {
				if g := t.Segments[0]; t.Op == backend.Write && g.Remote == 0 && g.Length == 4096 {
					copy(s.far, s.near[:4096])
				}
				return s.Session.Post(t)
			},
		}},
		{"errors without identity", "refuse/ranges", "is not a *backend.Error", &lab{
			post: func(s *session, t backend.Transfer) error {
				if err := s.Session.Post(t); err != nil {
					return errors.New(err.Error())
				}
				return nil
			},
		}},
		{"gives every right", "refuse/rights", "Post accepts a write", &lab{
			register: func(_ *lab, m backend.Memory) (backend.Memory, error) {
				m.Rights = backend.RemoteRead | backend.RemoteWrite
				return m, nil
			},
		}},
		{"asks for no key", "refuse/forged", "a key with one bit flipped: succeeded", &lab{
			remote: func(l *lab, _ backend.Peer, remote backend.Remote) backend.Remote {
				if key := l.key(remote); key != nil {
					remote.Key = key
				}
				return remote
			},
		}},
		{"takes any incarnation", "incarnation/descriptor", "an older incarnation: succeeded", &lab{
			remote: func(_ *lab, peer backend.Peer, remote backend.Remote) backend.Remote {
				remote.Peer = peer
				return remote
			},
		}},
		{"keeps no window", "window/busy", "Capabilities.Window is 1", &lab{
			window: 1,
			post:   func(s *session, t backend.Transfer) error { return s.delayed(t) },
		}},
		{"completes what it cancels at once", "cancel/quiet", "got after the completion", &lab{
			post: func(s *session, t backend.Transfer) error { return s.delayed(t) },
			cancel: func(s *session, cookie uint64) {
				s.swallow()
				s.sink.Complete(backend.Completion{Cookie: cookie, Err: backend.ErrCancelled})
			},
		}},
		{"calls what it cancelled done", "cancel/quiet", "is Done, and its bytes are not", &lab{
			complete: func(s *session, c backend.Completion) {
				c.Err = nil
				s.sink.Complete(c)
			},
		}},
		{"ignores Cancel", "cancel/early", "each was carried out in full", &lab{
			cancel: func(*session, uint64) {},
		}},
		{"forgets completions when a session closes", "close/session", "Session.Close returned before", &lab{
			close: func(s *session) error {
				s.swallow()
				return s.Session.Close()
			},
		}},
		{"completes after a session is closed", "close/session", "Session.Close returned before", &lab{
			post:  func(s *session, t backend.Transfer) error { return s.delayed(t) },
			close: func(*session) error { return nil },
		}},
		{"does not wait to fence", "fence/quiet", "touched memory after it", &lab{
			post: func(s *session, t backend.Transfer) error { return s.delayed(t) },
		}},
		{"does not wait to deregister", "region/waits", "Deregister at the", &lab{
			post:       func(s *session, t backend.Transfer) error { return s.delayed(t) },
			deregister: keep,
		}},
		{"registers twice", "region/twice", "succeeded, want an error", &lab{
			twice: true,
		}},
		{"leaves goroutines behind", "resources/backends", "goroutines", &lab{
			impatient: true,
			open:      func(l *lab) { l.linger() },
		}},
		{"leaves descriptors behind", "resources/backends", "descriptors, ", &lab{
			impatient: true,
			open:      func(l *lab) { l.keepFile() },
		}},
		{"leaves its process behind", "resources/backends", "is still there after Backend.Close", &lab{
			impatient: true,
			process:   &process{pid: os.Getpid()},
		}},
		{"leaves goroutines behind an endpoint", "resources/connections", "goroutines", &lab{
			impatient: true,
			session:   func(l *lab, _ backend.RegionID) (backend.RegionID, error) { l.linger(); return 0, nil },
		}},
		{"leaves descriptors behind a region", "resources/connections", "the process of the target has", &lab{
			impatient: true,
			process:   &process{pid: os.Getpid()},
			register:  func(l *lab, m backend.Memory) (backend.Memory, error) { l.keepFile(); return m, nil },
		}},

		{"has no version", "info", "Version is empty", &lab{
			info: func(i *backend.Info) { i.Version = "" },
		}},
		{"counts under a name that is none", "counters", `a counter is called "Work Requests"`, &lab{
			counters: func() []backend.Count { return []backend.Count{{Name: "Work Requests"}} },
		}},
		{"counts twice under one name", "counters", "two counters are called posts", &lab{
			counters: func() []backend.Count { return []backend.Count{{Name: "posts"}, {Name: "posts"}} },
		}},
		{"counts backwards", "counters", "posts went back from", &lab{counters: changing(func(n uint64) []backend.Count {
			return []backend.Count{{Name: "posts", Value: 100 - n}}
		})}},
		{"forgets what was counted before it connects", "counters", "posts went back from 1 to 0", forgetful()},
		{"exchanges its counters", "counters", "counter 0 is b1, and was b0", &lab{counters: changing(func(n uint64) []backend.Count {
			return []backend.Count{{Name: fmt.Sprint("b", n)}}
		})}},
		{"has more counters each time", "counters", "there are 2 counters, and there were 1", &lab{counters: changing(func(n uint64) []backend.Count {
			return []backend.Count{{Name: "a"}, {Name: "b"}, {Name: "c"}}[:min(n+1, 3)]
		})}},
		{"answers everything", "handshake/garbage", "Answer accepts an offer that is empty", &lab{
			answer: func(e *end, ctx context.Context, peer backend.Peer, offer []byte) ([]byte, error) {
				answer, err := e.Backend.Answer(ctx, peer, offer)
				if err != nil {
					return []byte("welcome"), nil
				}
				return answer, nil
			},
		}},
		{"knows no end of a handshake but Establish", "handshake/abandon", "Offer: busy", &lab{
			offer: func(e *end, _ context.Context, peer backend.Peer) (backend.Peer, error) {
				if e.lab.offers.Add(1) > 10 {
					return peer, backend.ErrBusy
				}
				return peer, nil
			},
		}},
		{"mistakes a context for the path, to establish", "handshake/expired", `its code is "path down"`, &lab{
			establish: func(ctx context.Context) error {
				if ctx.Err() != nil {
					return backend.ErrPathDown
				}
				return nil
			},
		}},
		{"mistakes a context for the path", "contexts", `its code is "path down"`, &lab{
			offer: func(_ *end, ctx context.Context, peer backend.Peer) (backend.Peer, error) {
				if ctx.Err() != nil {
					return peer, backend.ErrPathDown
				}
				return peer, nil
			},
		}},
		{"waits beyond the context", "contexts", "not returned after 1s: Backend.Answer", &lab{
			impatient: true,
			answer: func(e *end, ctx context.Context, peer backend.Peer, offer []byte) ([]byte, error) {
				if ctx.Err() != nil {
					<-e.lab.ended
				}
				return e.Backend.Answer(ctx, peer, offer)
			},
		}},
		{"connects to other hosts", "reach", "on another host: succeeded", &lab{
			info: func(i *backend.Info) { i.Capabilities.Reach = backend.SameHost },
		}},
		{"does not know unknown regions", "region/clean-up", "that never was", &lab{
			deregister: func(e *end, ctx context.Context, id backend.RegionID) error {
				if e.lab.at(e.self, id).bytes == nil {
					return backend.ErrBadRequest
				}
				return e.Backend.Deregister(ctx, id)
			},
		}},
		{"has region ids of 32 bits", "region/ids", "Register region 4294967296", &lab{
			register: func(_ *lab, m backend.Memory) (backend.Memory, error) {
				m.Region &= 1<<32 - 1
				return m, nil
			},
		}},
		{"takes any kind of memory", "region/kinds", "Session with remote gpu memory: succeeded", &lab{
			remote: func(_ *lab, _ backend.Peer, remote backend.Remote) backend.Remote {
				remote.Kind = backend.HostMemory
				return remote
			},
		}},
		{"needs a descriptor and does not say so", "region/no-descriptor", "which NeedsFD does not ask for", &lab{
			session: func(*lab, backend.RegionID) (backend.RegionID, error) { return 0, backend.ErrUnsupported },
		}},
		{"keeps what is deregistered, near", "region/near-gone", "that was deregistered: succeeded", &lab{
			deregister: keep,
		}},
		{"keeps what is deregistered, far", "region/far-gone", "ended Done", &lab{
			deregister: keep,
		}},
		{"goes one way only", "bytes/two-ways", "connect target@", &lab{
			offer: func(e *end, _ context.Context, peer backend.Peer) (backend.Peer, error) {
				if e.self.Node == "target" {
					return peer, backend.ErrUnsupported
				}
				return peer, nil
			},
		}},
		{"drops the last segment when it waits", "bytes/post-wait", "by PostWait", &lab{
			postWait: func(s *session, t backend.Transfer) error {
				if n := len(t.Segments); n > 1 {
					t.Segments = t.Segments[:n-1]
				}
				return s.Session.Post(t)
			},
		}},
		{"exceeds its limit of segments", "limits", "one segment more than Limits.Segments: succeeded", &lab{
			info: func(i *backend.Info) { i.Capabilities.Limits.Segments = 100 },
		}},
		{"exceeds its limit of bytes", "limits", "one byte more than Limits.TransferBytes, in two segments: succeeded", &lab{
			info: func(i *backend.Info) { i.Capabilities.Limits.TransferBytes = 1 << 20 },
			post: func(s *session, t backend.Transfer) error {
				if t.Segments[0].Length > 1<<20 {
					return backend.ErrBadRequest
				}
				return s.Session.Post(t)
			},
		}},
		{"has a limit and does not say so", "limits", "a legal write: bad request", &lab{
			post: func(s *session, t backend.Transfer) error {
				if len(t.Segments) > 4096 {
					return backend.ErrBadRequest
				}
				return s.Session.Post(t)
			},
		}},
		{"fails as a whole when it refuses", "refuse/harmless", "legal", &lab{
			post: func(s *session, t backend.Transfer) error {
				err := s.Session.Post(t)
				if err != nil && !errors.Is(err, backend.ErrBusy) {
					s.endpoint.Close()
				}
				return err
			},
		}},
		{"writes whatever it is asked", "refuse/operations", "Post of op-4: succeeded", &lab{
			post: func(s *session, t backend.Transfer) error {
				if t.Op != backend.Read {
					t.Op = backend.Write
				}
				return s.Session.Post(t)
			},
		}},
		{"takes another region", "refuse/regions", "that never was: succeeded", &lab{
			session: func(_ *lab, id backend.RegionID) (backend.RegionID, error) {
				if id == 4711 {
					return 1, nil
				}
				return 0, nil
			},
		}},
		{"frees the window after Complete", "window/room", ": busy", &lab{
			post: func(s *session, t backend.Transfer) error {
				if s.open.Add(1) > 64 {
					s.open.Add(-1)
					return backend.ErrBusy
				}
				return s.Session.Post(t)
			},
			complete: func(s *session, c backend.Completion) {
				s.sink.Complete(c)
				s.open.Add(-1)
			},
		}},
		{"waits for room", "window/never-blocks", "not returned after 1s: Session.Post", &lab{
			impatient: true,
			post: func(s *session, t backend.Transfer) error {
				for {
					if err := s.Session.Post(t); !errors.Is(err, backend.ErrBusy) {
						return err
					}
					time.Sleep(time.Millisecond)
				}
			},
		}},
		{"has cookies of 32 bits", "complete/cookies", "never accepted", &lab{
			impatient: true,
			complete: func(s *session, c backend.Completion) {
				c.Cookie &= 1<<32 - 1
				s.sink.Complete(c)
			},
		}},
		{"takes nothing within Complete", "complete/post-inside", "Post within Complete: busy", &lab{
			post: func(s *session, t backend.Transfer) error {
				if s.open.Load() > 0 {
					return backend.ErrBusy
				}
				return s.Session.Post(t)
			},
			complete: func(s *session, c backend.Completion) {
				s.open.Add(1)
				defer s.open.Add(-1)
				s.sink.Complete(c)
			},
		}},
		{"moves half of some", "concurrent/sessions", "brought wrong bytes", &lab{
			post: func(s *session, t backend.Transfer) error {
				if t.Cookie == 25 {
					t.Segments = t.Segments[:(len(t.Segments)+1)/2]
					t.Segments[0].Length = 1
				}
				return s.Session.Post(t)
			},
		}},
		{"answers one at a time", "concurrent/calls", "a connection of", &lab{
			answer: func(e *end, ctx context.Context, peer backend.Peer, offer []byte) ([]byte, error) {
				if e.lab.offers.Add(1) > 1 {
					defer e.lab.offers.Add(-1)
					return nil, backend.ErrBusy
				}
				defer e.lab.offers.Add(-1)
				time.Sleep(5 * time.Millisecond)
				return e.Backend.Answer(ctx, peer, offer)
			},
		}},
		{"ends a session for an unknown cookie", "cancel/unknown", "Post of a legal", &lab{
			cancel: func(s *session, cookie uint64) {
				if cookie == 12345 {
					s.Session.Close()
				}
			},
		}},
		{"completes what it cancels, and again", "cancel/race", "a second completion", &lab{
			cancel: func(s *session, cookie uint64) {
				s.sink.Complete(backend.Completion{Cookie: cookie, Err: backend.ErrCancelled})
				s.Session.Cancel(cookie)
			},
		}},
		{"has more outcomes than segments", "cancel/race", "more outcomes than segments", &lab{
			complete: func(s *session, c backend.Completion) {
				if c.Err != nil {
					c.Outcomes = append(append([]backend.Outcome(nil), c.Outcomes...), backend.NotSent)
				}
				s.sink.Complete(c)
			},
		}},
		{"calls what it has moved not sent", "close/outcomes", "is NotSent, and the target has changed", &lab{
			part: func(e endpoint) error {
				time.Sleep(20 * time.Millisecond) // something has moved until then
				return e.Endpoint.Close()
			},
			complete: func(s *session, c backend.Completion) {
				s.sink.Complete(backend.Completion{Cookie: c.Cookie, Err: backend.ErrPathDown, Outcomes: make([]backend.Outcome, 64)})
			},
		}},
		{"complains of a second Close", "close/twice", "Session.Close: bad request", &lab{
			close: func(s *session) error {
				if s.open.Add(1) > 1 {
					return backend.ErrBadRequest
				}
				return s.Session.Close()
			},
		}},
		{"registers when it is closed", "close/calls", "Register after Backend.Close: succeeded", &lab{
			twice: true,
		}},
		{"does not wait to close an endpoint", "close/endpoint", "Endpoint.Close returned before", &lab{
			post: func(s *session, t backend.Transfer) error { return s.delayed(t) },
		}},
		{"does not wait to close", "close/backend", "Backend.Close returned before", &lab{
			post: func(s *session, t backend.Transfer) error { return s.delayed(t) },
		}},
		{"does not tell that the target has closed", "close/target", "Endpoint.Done after the target has closed: nothing", &lab{
			impatient: true,
			shut: func(e *end) error {
				if e.self.Node == "closing-target" {
					return nil
				}
				return e.Backend.Close()
			},
		}},
		{"closes all endpoints with one", "close/other-endpoint", "when another endpoint was closed", &lab{
			post: func(s *session, t backend.Transfer) error { return s.delayed(t) },
			part: func(e endpoint) error {
				e.end.lab.mu.Lock()
				all := e.end.lab.endpoints
				e.end.lab.mu.Unlock()
				for _, other := range all {
					other.Close()
				}
				return nil
			},
		}},
		{"does not fence strangers", "fence/stranger", "that never connected: busy", &lab{
			fence: func(_ *end, peer backend.Peer) error {
				if peer.Node == "stranger" {
					return backend.ErrBusy
				}
				return nil
			},
		}},
		{"connects to whoever has the name", "incarnation/handshake", "answered: succeeded", &lab{
			offer: func(e *end, _ context.Context, peer backend.Peer) (backend.Peer, error) {
				e.lab.mu.Lock()
				defer e.lab.mu.Unlock()
				return e.lab.latest[peer.Node], nil
			},
		}},
		{"takes descriptors of before a restart", "incarnation/restart", "Session with a descriptor of before the restart", &lab{
			remote: func(_ *lab, peer backend.Peer, remote backend.Remote) backend.Remote {
				remote.Peer = peer
				return remote
			},
		}},
		{"does not notice that the target's process died", "death/target", "was killed: nothing after", &lab{
			impatient: true,
			process:   new(process),
		}},
		{"does not notice that the initiator's process died", "death/initiator", "was killed: nothing after", &lab{
			impatient: true,
			process:   new(process),
		}},
		{"dies unasked", "info", "has died: it has had enough", &lab{
			process: &process{pid: os.Getpid(), died: errors.New("it has had enough")},
		}},

		{"lists a link twice", "info", "lists host memory to GPU 0000:01:00.0 twice", &lab{
			far:  1,
			info: func(i *backend.Info) { i.Capabilities.Links = append(i.Capabilities.Links, i.Capabilities.Links[0]) },
		}},
		{"lists a link to what it does not take", "info", "Local or Remote lacks the kind of memory", &lab{
			info: func(i *backend.Info) { i.Capabilities.Links = []backend.Link{{Far: pci(1)}} },
		}},
		{"lists a link that costs less than nothing", "info", "zero is the least", &lab{
			info: func(i *backend.Info) { i.Capabilities.Links = []backend.Link{{Cost: -1}} },
		}},
		{"goes where it has no link", "links", "Session from host memory to host memory, which Capabilities.Links does not list: succeeded", &lab{
			far: 1,
			remote: func(_ *lab, _ backend.Peer, remote backend.Remote) backend.Remote {
				if remote.Place == "" {
					remote.Place = pci(1)
				}
				return remote
			},
		}},
		{"believes in every GPU", "links", "to GPU ffff:ff:1f.7, which Capabilities.Links does not list: succeeded", &lab{
			near: 1, far: 2,
			remote: func(_ *lab, _ backend.Peer, remote backend.Remote) backend.Remote {
				if remote.Place != "" {
					remote.Place = pci(1)
				}
				return remote
			},
		}},
		{"does not list where it goes", "links", "Session from host memory to host memory succeeds", &lab{
			info: func(i *backend.Info) { i.Capabilities.Links = []backend.Link{{Near: pci(1), Far: pci(1)}} },
		}},
		{"takes a region to begin where its allocation does", "bytes/edges", "byte -65536 of the target's region", &lab{
			near: 1, far: 1,
			register: func(_ *lab, m backend.Memory) (backend.Memory, error) {
				m.GPU.Offset = 0
				return m, nil
			},
		}},
		{"gets no further without a handle", "region/no-descriptor", `its code is "bad request"`, &lab{
			near: 1, far: 1,
			register: func(_ *lab, m backend.Memory) (backend.Memory, error) {
				if m.GPU.Handle == nil {
					return m, backend.ErrBadRequest
				}
				return m, nil
			},
		}},
	}
}

// TestDefectsAreCaught breaks the reference backend, in one way at a time, and wants the case that tries the
// broken rule to fail, for the right reason.
func TestDefectsAreCaught(t *testing.T) {
	catches := map[string]bool{}
	for _, d := range defects() {
		catches[d.caught] = true
		t.Run(d.name, d.isCaught)
	}
	for _, c := range conformance.Cases() {
		if !catches[c.Name] {
			t.Errorf("no defect shows that the case %q can fail", c.Name)
		}
	}
}

// TestDefectsAreCaughtInDeviceMemory has the suite find wrong bytes where it cannot look at them but has to ask for them.
func TestDefectsAreCaughtInDeviceMemory(t *testing.T) {
	names := []string{
		"keeps the caller's segments", "says done and moves nothing", "writes one byte too many", "drops the last segment",
		"moves before it checks", "completes what it cancels at once", "calls what it cancelled done",
		"does not wait to fence", "does not wait to deregister", "moves half of some", "calls what it has moved not sent",
	}
	for _, d := range defects() {
		if i := slices.Index(names, d.name); i >= 0 {
			names = slices.Delete(names, i, i+1)
			d.lab.near, d.lab.far = 1, 2
			t.Run(d.name, d.isCaught)
		}
	}
	if len(names) > 0 {
		t.Errorf("there are no defects %q", names)
	}
}

// isCaught wants the defect to be caught.
func (d *defect) isCaught(t *testing.T) {
	var r conformance.Result
	shows := func() bool { return r.Verdict == conformance.Fail && strings.Contains(r.Detail, d.saying) }
	// Some defects are races: whether one shows depends on who runs when. On a busy machine they may hide often.
	for d.lab.tries = 0; d.lab.tries < 20 && !shows(); d.lab.tries++ {
		r = d.lab.try(t, d.caught)
	}
	if !shows() {
		t.Errorf("%s does not fail with %q but ends with %s: %s", d.caught, d.saying, r.Verdict, r.Detail)
	}
}

// TestLabItself finds nothing where nothing is broken: what catches the defects is not the lab. It skips what the
// backend does not claim, and nothing else.
func TestLabItself(t *testing.T) {
	always := []string{"reach", "counters", "bytes/post-wait", "death/target", "death/initiator"}
	for name, l := range map[string]*lab{
		"host": {}, "gpu to gpu": {near: 1, far: 2}, "host to gpu": {far: 1}, "gpu to host": {near: 2},
	} {
		t.Run(name, func(t *testing.T) {
			for _, c := range conformance.Cases() {
				want := conformance.Pass
				if slices.Contains(always, c.Name) || name == "host" && c.Name == "links" {
					want = conformance.Skip
				}
				if r := l.try(t, c.Name); r.Verdict != want {
					t.Errorf("%s ends with %s, want %s: %s", c.Name, r.Verdict, want, r.Detail)
				}
			}
		})
	}
}

// TestWhatNobodyTried: a backend that claims more than the harness lends is told what was not tried.
func TestWhatNobodyTried(t *testing.T) {
	l := &lab{info: func(i *backend.Info) { i.Capabilities.Local = backend.Kinds(backend.HostMemory, backend.GPUMemory) }}
	if r := l.try(t, "region/kinds"); r.Verdict != conformance.Skip || !strings.Contains(r.Detail, "no case has tried it") {
		t.Errorf("region/kinds ends with %s: %s", r.Verdict, r.Detail)
	}
	l = &lab{far: 1, info: func(i *backend.Info) { i.Capabilities.Links = i.Capabilities.Links[:1] }}
	if r := l.try(t, "bytes/two-ways"); r.Verdict != conformance.Skip || !strings.Contains(r.Detail, "GPU 0000:01:00.0 to host memory, is not claimed") {
		t.Errorf("bytes/two-ways ends with %s: %s", r.Verdict, r.Detail)
	}
}

// lab opens reference backends with one defect. Hooks that are nil leave things as they are.
type lab struct {
	info       func(*backend.Info)
	counters   func() []backend.Count
	register   func(*lab, backend.Memory) (backend.Memory, error)
	deregister func(*end, context.Context, backend.RegionID) error
	offer      func(*end, context.Context, backend.Peer) (backend.Peer, error)
	answer     func(*end, context.Context, backend.Peer, []byte) ([]byte, error)
	establish  func(context.Context) error
	fence      func(*end, backend.Peer) error
	shut       func(*end) error                                       // closes the backend
	session    func(*lab, backend.RegionID) (backend.RegionID, error) // zero: the same
	remote     func(*lab, backend.Peer, backend.Remote) backend.Remote
	part       func(endpoint) error // closes the endpoint
	post       func(*session, backend.Transfer) error
	postWait   func(*session, backend.Transfer) error
	complete   func(*session, backend.Completion)
	cancel     func(*session, uint64)
	close      func(*session) error // closes the session
	open       func(*lab)
	near, far  int // the GPU whose memory the initiator and the target are lent; zero: the host's
	window     int
	twice      bool     // what Register refuses is registered all the same
	impatient  bool     // the case is to wait in vain
	process    *process // that the ends say they run in; without a pid, each in one that does nothing

	tries   int // before this one
	offers  atomic.Int64
	lagging atomic.Int64 // transfers that were posted later
	tasks   sync.WaitGroup
	ended   chan struct{}

	mu        sync.Mutex
	regions   map[where]region
	latest    map[string]backend.Peer // by node
	endpoints []backend.Endpoint
	files     []*os.File
	idle      []*exec.Cmd
	gpus      *fakeGPUs
	lent      [][]byte
}

// linger starts a goroutine that lasts until the case has ended.
func (l *lab) linger() { l.tasks.Go(func() { <-l.ended }) }

// keepFile opens a file and keeps it until the case has ended.
func (l *lab) keepFile() {
	f, err := os.Open(os.DevNull)
	if err != nil {
		panic(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.files = append(l.files, f)
}

// hasGPUs tells whether the backend takes memory of GPUs, too.
func (l *lab) hasGPUs() bool { return l.near != 0 || l.far != 0 }

// keep deregisters nothing.
func keep(*end, context.Context, backend.RegionID) error { return nil }

// process is a conformance.Process.
type process struct {
	pid  int
	died error
}

func (p *process) PID() int    { return p.pid }
func (p *process) Died() error { return p.died }

// idles starts a process that has nothing to do with the backend.
func (l *lab) idles() *process {
	idle := exec.Command("sleep", "600")
	if err := idle.Start(); err != nil {
		panic(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.idle = append(l.idle, idle)
	return &process{pid: idle.Process.Pid}
}

type where struct {
	node        string
	incarnation uint64
	region      backend.RegionID
}

type region struct {
	bytes, key []byte
	place      string
}

// try runs one case.
func (l *lab) try(t *testing.T, name string) conformance.Result {
	t.Helper()
	l.regions, l.latest, l.ended = map[where]region{}, map[string]backend.Peer{}, make(chan struct{})
	l.endpoints, l.idle, l.files, l.lent, l.gpus = nil, nil, nil, nil, new(fakeGPUs)
	defer func() {
		close(l.ended)
		l.tasks.Wait()
		for _, idle := range l.idle {
			idle.Process.Kill()
			idle.Wait()
		}
		for _, f := range l.files {
			f.Close()
		}
		for _, m := range l.lent { // only now: the defects touch memory when they should not
			unix.Munmap(m)
		}
		l.gpus.unmap()
	}()
	memory := func(device int) func(size int) (conformance.Memory, error) {
		if device != 0 {
			return conformance.GPUMemory(l.gpus, device)
		}
		return func(size int) (conformance.Memory, error) {
			mapping, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
			l.lent = append(l.lent, mapping)
			return conformance.Memory{Bytes: mapping, FD: -1, Free: func() error { return nil }}, err
		}
	}
	harness := conformance.Harness{
		Factory:   reference.NewNetwork().Factory(),
		NewMemory: memory(l.near), NewFarMemory: memory(l.far),
	}
	if l.impatient {
		harness.Patience = 500 * time.Millisecond
	}
	if l.process != nil {
		harness.Process = func(backend.Backend) conformance.Process {
			if l.process.pid == 0 {
				return l.idles()
			}
			return l.process
		}
	}
	if l.window != 0 {
		harness.Options = map[string]string{"window": "4096"}
	}
	open := harness.Factory.Open
	harness.Factory.Open = func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
		b, err := open(ctx, cfg)
		if err != nil {
			return nil, err
		}
		if l.open != nil {
			l.open(l)
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		l.latest[cfg.Self.Node] = cfg.Self
		return &end{Backend: b, lab: l, self: cfg.Self}, nil
	}
	for _, c := range conformance.Cases() {
		if c.Name == name {
			return c.Try(harness)
		}
	}
	t.Fatalf("there is no case %q", name)
	return conformance.Result{}
}

type end struct {
	backend.Backend
	lab  *lab
	self backend.Peer
}

func (e *end) Info() backend.Info {
	i := e.Backend.Info()
	if e.lab.window != 0 {
		i.Capabilities.Window = e.lab.window
	}
	if e.lab.hasGPUs() {
		kinds := backend.Kinds(backend.HostMemory, backend.GPUMemory)
		i.Capabilities.Local, i.Capabilities.Remote, i.Capabilities.Links = kinds, kinds, e.lab.gpus.links()
	}
	if e.lab.info != nil {
		e.lab.info(&i)
	}
	return i
}

// Counters implements backend.Counter.
func (e *end) Counters() []backend.Count {
	if e.lab.counters == nil {
		return nil
	}
	return e.lab.counters()
}

// forgetful returns ends with a counter that each second connection puts back to zero.
func forgetful() *lab {
	var posts atomic.Uint64
	return &lab{
		counters: func() []backend.Count { return []backend.Count{{Name: "posts", Value: posts.Load()}} },
		offer: func(_ *end, _ context.Context, peer backend.Peer) (backend.Peer, error) {
			posts.Store(1 - posts.Load())
			return peer, nil
		},
	}
}

// changing returns counters that depend on how often they were asked for.
func changing(counters func(n uint64) []backend.Count) func() []backend.Count {
	var asked uint64
	return func() []backend.Count {
		asked++
		return counters(asked - 1)
	}
}

func (e *end) Register(ctx context.Context, m backend.Memory) ([]byte, error) {
	if e.lab.register != nil {
		var err error
		if m, err = e.lab.register(e.lab, m); err != nil {
			return nil, err
		}
	}
	place := m.Place()
	if e.lab.hasGPUs() && m.GPU != nil {
		m.Kind, m.Bytes, m.GPU = backend.HostMemory, e.lab.gpus.open(m.GPU), nil
	}
	key, err := e.Backend.Register(ctx, m)
	if err != nil {
		if e.lab.twice {
			return nil, nil
		}
		return nil, err
	}
	e.lab.mu.Lock()
	defer e.lab.mu.Unlock()
	e.lab.regions[where{e.self.Node, e.self.Incarnation, m.Region}] = region{m.Bytes, key, place}
	return key, nil
}

func (e *end) Deregister(ctx context.Context, id backend.RegionID) error {
	if e.lab.deregister != nil {
		return e.lab.deregister(e, ctx, id)
	}
	return e.Backend.Deregister(ctx, id)
}

func (e *end) Offer(ctx context.Context, peer backend.Peer) (backend.Handshake, error) {
	if e.lab.offer != nil {
		var err error
		if peer, err = e.lab.offer(e, ctx, peer); err != nil {
			return nil, err
		}
	}
	h, err := e.Backend.Offer(ctx, peer)
	return handshake{h, e, peer}, err
}

func (e *end) Answer(ctx context.Context, peer backend.Peer, offer []byte) ([]byte, error) {
	if e.lab.answer != nil {
		return e.lab.answer(e, ctx, peer, offer)
	}
	return e.Backend.Answer(ctx, peer, offer)
}

func (e *end) Fence(ctx context.Context, peer backend.Peer) error {
	if e.lab.fence != nil {
		return e.lab.fence(e, peer)
	}
	return e.Backend.Fence(ctx, peer)
}

func (e *end) Close() error {
	if e.lab.shut != nil {
		return e.lab.shut(e)
	}
	return e.Backend.Close()
}

type handshake struct {
	backend.Handshake
	end  *end
	peer backend.Peer
}

func (h handshake) Establish(ctx context.Context, answer []byte) (backend.Endpoint, error) {
	l := h.end.lab
	if l.establish != nil {
		if err := l.establish(ctx); err != nil {
			return nil, err
		}
	}
	e, err := h.Handshake.Establish(ctx, answer)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.endpoints = append(l.endpoints, e)
	return endpoint{e, h.end, h.peer}, nil
}

type endpoint struct {
	backend.Endpoint
	end  *end
	peer backend.Peer
}

func (e endpoint) Session(ctx context.Context, local backend.RegionID, remote backend.Remote, sink backend.Sink) (backend.Session, error) {
	l := e.end.lab
	if l.session != nil {
		other, err := l.session(l, local)
		if err != nil {
			return nil, err
		}
		if other != 0 {
			local = other
		}
	}
	s := &session{
		lab: l, endpoint: e.Endpoint, sink: sink,
		near: l.at(e.end.self, local).bytes, far: l.at(remote.Peer, remote.Region).bytes,
	}
	if l.remote != nil {
		remote = l.remote(l, e.peer, remote)
	}
	if l.hasGPUs() {
		here := l.at(e.end.self, local)
		linked := func(k backend.Link) bool { return k.Near == here.place && k.Far == remote.Place }
		if here.bytes != nil && !slices.ContainsFunc(l.gpus.links(), linked) {
			return nil, backend.ErrUnsupported
		}
		if remote.Kind == backend.GPUMemory {
			remote.Kind = backend.HostMemory
		}
	}
	var err error
	if s.Session, err = e.Endpoint.Session(ctx, local, remote, s); err != nil {
		return nil, err
	}
	if l.postWait != nil {
		return waiter{s}, nil
	}
	return s, nil
}

func (e endpoint) Close() error {
	if e.end.lab.part != nil {
		return e.end.lab.part(e)
	}
	return e.Endpoint.Close()
}

func (l *lab) at(p backend.Peer, id backend.RegionID) region {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.regions[where{p.Node, p.Incarnation, id}]
}

func (l *lab) key(r backend.Remote) []byte { return l.at(r.Peer, r.Region).key }

// session is a session and its sink.
type session struct {
	backend.Session
	lab       *lab
	endpoint  backend.Endpoint
	sink      backend.Sink
	near, far []byte
	open      atomic.Int64

	mu   sync.Mutex
	mute bool
}

// waiter is a session with PostWait.
type waiter struct{ *session }

func (w waiter) PostWait(t backend.Transfer) error { return w.lab.postWait(w.session, t) }

func (s *session) swallow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mute = true
}

func (s *session) Complete(c backend.Completion) {
	s.mu.Lock()
	mute := s.mute
	s.mu.Unlock()
	switch {
	case mute:
	case s.lab.complete != nil:
		s.lab.complete(s, c)
	default:
		s.sink.Complete(c)
	}
}

func (s *session) Post(t backend.Transfer) error {
	if s.lab.post != nil && len(t.Segments) > 0 {
		return s.lab.post(s, t)
	}
	return s.Session.Post(t)
}

func (s *session) Cancel(cookie uint64) {
	if s.lab.cancel != nil {
		s.lab.cancel(s, cookie)
		return
	}
	s.Session.Cancel(cookie)
}

func (s *session) Close() error {
	if s.lab.close != nil {
		return s.lab.close(s)
	}
	return s.Session.Close()
}

// later accepts a transfer now and posts it a moment after.
func (s *session) later(t func() backend.Transfer) {
	// It is to be later than the case needs to look away, and before it looks again. When that is, on a busy machine, only
	// trying tells.
	lag := 10 * time.Millisecond
	if s.lab.tries > 0 {
		lag <<= s.lab.lagging.Add(1) % 6
	}
	s.lab.tasks.Go(func() {
		time.Sleep(lag)
		if t := t(); s.Session.Post(t) != nil {
			s.Complete(backend.Completion{Cookie: t.Cookie, Err: backend.ErrPathDown})
		}
	})
}

func (s *session) delayed(t backend.Transfer) error {
	t.Segments = append([]backend.Segment(nil), t.Segments...)
	s.later(func() backend.Transfer { return t })
	return nil
}

// readLate reads a slice that is no longer its own, which is the defect. The race detector would rightly stop it.
//
//go:norace
func readLate(segments []backend.Segment) []backend.Segment {
	late := make([]backend.Segment, len(segments))
	//lint:ignore S1001 the race detector would see copy
	for i := range segments {
		late[i] = segments[i]
	}
	return late
}
