package samehost

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// eachWay runs a test with a target that is reached within the process, and with one that is reached over its socket. The
// movers of both can be seen either way.
func eachWay(t *testing.T, test func(t *testing.T, a, b *Instance)) {
	for _, way := range []string{"one process", "two processes"} {
		t.Run(way, func(t *testing.T) {
			a, b := newInstance(t, peer("a", 1)), newInstance(t, peer("b", 2))
			if way == "two processes" {
				asFromElsewhere(b)
			}
			test(t, a, b)
		})
	}
}

// briefly returns a context that ends before anything else happens.
func briefly(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

func TestAsk(t *testing.T) {
	eachWay(t, func(t *testing.T, a, b *Instance) {
		moverOf(b).serve = func(_ context.Context, g *Guest, question []byte) ([]byte, error) {
			switch what, rest, _ := strings.Cut(string(question), " "); what {
			case "echo":
				return []byte(rest), nil
			case "who":
				return []byte(g.Peer().String()), nil
			case "nothing":
				return nil, nil
			case "busy":
				return nil, backend.Errorf(backend.Busy, "come back")
			case "odd":
				return nil, errors.New("something else")
			}
			return make([]byte, MaxNote+1), nil
		}
		e := connect(t, a, b.self, b)
		if e.Peer() != b.self {
			t.Errorf("the target is %v, want %v", e.Peer(), b.self)
		}
		long := strings.Repeat("x", MaxNote-5)
		for _, c := range []struct {
			question, answer string
			code             backend.Code
			text             string
		}{
			{"echo " + long, long, 0, ""},
			{"echo x" + long, "", backend.BadRequest, "1025 bytes exceeds 1024"},
			{"who", "a@1", 0, ""},
			{"nothing", "", 0, ""},
			{"busy", "", backend.Busy, "copy: ask: busy: come back (peer b@2)"},
			{"odd", "", backend.Internal, "something else"},
			{"too much", "", backend.Internal, "1025 bytes exceeds 1024"},
		} {
			got, err := e.Ask(soon(t), []byte(c.question))
			if backend.CodeOf(err) != c.code || string(got) != c.answer {
				t.Errorf("%.10q: got %q and %v, want %q and code %q", c.question, got, err, c.answer, c.code)
			}
			if c.code != 0 {
				wantCode(t, err, c.code, c.text)
			}
		}
		must(t, e.Close())
		_, err := e.Ask(soon(t), []byte("who"))
		wantCode(t, err, backend.PathDown)
	})
}

// TestQuestionsTakeTurns asks from many goroutines: the mover sees one question at a time, and everyone gets the answer
// to the question asked.
func TestQuestionsTakeTurns(t *testing.T) {
	eachWay(t, func(t *testing.T, a, b *Instance) {
		var serving atomic.Int32
		moverOf(b).serve = func(_ context.Context, _ *Guest, question []byte) ([]byte, error) {
			if serving.Add(1) != 1 {
				t.Error("two questions at once")
			}
			runtime.Gosched()
			serving.Add(-1)
			return bytes.Clone(question), nil
		}
		e := connect(t, a, b.self, b)
		var group sync.WaitGroup
		for n := range 8 {
			group.Go(func() {
				for k := range 20 {
					question := fmt.Sprint(n, k)
					if got, err := e.Ask(soon(t), []byte(question)); err != nil || string(got) != question {
						t.Errorf("asked %s, got %q, %v", question, got, err)
					}
				}
			})
		}
		group.Wait()
	})
}

// TestAskGivesUp leaves a question alone: the next one waits until that has its answer, and gets its own.
func TestAskGivesUp(t *testing.T) {
	a, b := newInstance(t, peer("a", 1)), newInstance(t, peer("b", 2))
	asFromElsewhere(b)
	release := make(chan struct{})
	moverOf(b).serve = func(_ context.Context, _ *Guest, question []byte) ([]byte, error) {
		<-release
		return bytes.Clone(question), nil
	}
	e := connect(t, a, b.self, b)
	for _, question := range []string{"first", "second, which is never sent"} {
		_, err := e.Ask(briefly(t), []byte(question))
		wantCode(t, err, backend.Cancelled)
	}
	close(release)
	got, err := e.Ask(soon(t), []byte("third"))
	if err != nil || string(got) != "third" {
		t.Errorf("got %q, %v, want the third question's answer", got, err)
	}
}

// TestQuestionsEndWithTheConnection has the mover work on an answer that nobody waits for any more.
func TestQuestionsEndWithTheConnection(t *testing.T) {
	for _, end := range []struct {
		name string
		by   func(t *testing.T, e *endpoint, b *Instance)
	}{
		{"initiator", func(t *testing.T, e *endpoint, _ *Instance) { must(t, e.Close()) }},
		{"target", func(t *testing.T, e *endpoint, b *Instance) { must(t, b.Fence(soon(t), e.instance.self)) }},
		{"target closes", func(t *testing.T, e *endpoint, b *Instance) { must(t, b.Close()) }},
	} {
		t.Run(end.name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, a, b *Instance) {
				asked, ended := make(chan struct{}), make(chan struct{})
				moverOf(b).serve = func(ctx context.Context, _ *Guest, _ []byte) ([]byte, error) {
					close(asked)
					<-ctx.Done()
					time.Sleep(5 * time.Millisecond)
					close(ended)
					return nil, ctx.Err()
				}
				e := connect(t, a, b.self, b)
				failed := make(chan error, 1)
				go func() {
					_, err := e.Ask(soon(t), nil)
					failed <- err
				}()
				<-asked
				_, local := instances.Load(b.id)
				end.by(t, e, b)
				select {
				case <-ended:
				default:
					if local || end.name != "initiator" { // an initiator elsewhere does not wait for the target
						t.Error("the guest is quiet, and the target still works for it")
					}
					wantDone(t, ended)
				}
				wantCode(t, <-failed, backend.PathDown)
			})
		})
	}
}
