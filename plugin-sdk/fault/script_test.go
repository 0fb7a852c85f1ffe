package fault

import (
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		text string
		want map[Point][]action
		as   string // String, when it differs from text
	}{
		{"", map[Point][]action{}, ""},
		{" \t", map[Point][]action{}, ""},
		{"post:busy", map[Point][]action{Post: {{verb: busy}}}, ""},
		{"post:2*off->1*error(pathdown)", map[Point][]action{
			Post: {{verb: off, times: 2}, {verb: fail, times: 1, code: backend.PathDown}},
		}, ""},
		{"register:error(denied)->off", map[Point][]action{
			Register: {{verb: fail, times: 1, code: backend.Denied}, {verb: off}},
		}, "register:1*error(denied)->off"},
		{"complete:delay(1500us)->2*partial(3)->drop; fence : error( internal ) ", map[Point][]action{
			Complete: {{verb: delay, times: 1, delay: 1500 * time.Microsecond}, {verb: partial, times: 2, count: 3}, {verb: drop}},
			Fence:    {{verb: fail, code: backend.Internal}},
		}, "complete:1*delay(1.5ms)->2*partial(3)->drop;fence:error(internal)"},
		{"fence:off;post:kill", map[Point][]action{Fence: {{verb: off}}, Post: {{verb: kill}}}, "post:kill;fence:off"},
		{"complete: 1 * dup -> 1*corrupt", map[Point][]action{
			Complete: {{verb: dup, times: 1}, {verb: corrupt, times: 1}},
		}, "complete:1*dup->1*corrupt"},
	} {
		s, err := Parse(c.text)
		if err != nil {
			t.Errorf("Parse(%q): %v", c.text, err)
			continue
		}
		got := map[Point][]action{}
		for p, term := range s.terms {
			got[p] = term.actions
		}
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("Parse(%q) = %v, want %v", c.text, got, c.want)
		}
		if c.as == "" {
			c.as = strings.TrimSpace(c.text)
		}
		if s.String() != c.as {
			t.Errorf("Parse(%q).String() = %q, want %q", c.text, s, c.as)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"post":                     `column 1: "post" has no action: write post:action`,
		"psot:busy":                `column 1: "psot" is no point, did you mean "post"?; there are register, offer, answer, establish, session, post, complete, fence, close`,
		":busy":                    `column 1: "" is no point; there are register, offer, answer, establish, session, post, complete, fence, close`,
		"post:":                    `column 6: an action is missing after "post"`,
		"post:busy;":               `column 11: a term is missing: write point:action`,
		"post:busy;;":              `column 11: a term is missing: write point:action`,
		"post:busy;post:off":       `column 11: "post" has a term already: join the two with ->`,
		"post:off->":               `column 11: an action is missing after "post"`,
		"post:bussy":               `column 6: "bussy" is no verb, did you mean "busy"?; there are off, error, delay, drop, dup, busy, partial, corrupt, kill`,
		"post: 0*busy":             `column 7: "0" is no number of times: write a whole number from 1, as in 2*off`,
		"post:*busy":               `column 6: "" is no number of times: write a whole number from 1, as in 2*off`,
		"post:-1*busy":             `column 6: "-1" is no number of times: write a whole number from 1, as in 2*off`,
		"post:99999999999*busy":    `column 6: "99999999999" is no number of times: write a whole number from 1, as in 2*off`,
		"post:error":               `column 6: "error" needs a code: write error(code)`,
		"post:error()":             `column 12: "" is no code; there are internal, busy, peergone, pathdown, badrequest, denied, integrity, cancelled, unsupported`,
		"post:off->error(pathdwn)": `column 17: "pathdwn" is no code, did you mean "pathdown"?; there are internal, busy, peergone, pathdown, badrequest, denied, integrity, cancelled, unsupported`,
		"post:error(busy":          `column 12: the bracket is not closed`,
		"post:error(busy)off":      `column 17: "off" after the bracket: actions are joined by ->, terms by ;`,
		"post:busy(1)":             `column 11: "busy" takes no argument`,
		"post:delay(1ms)":          `column 6: post never blocks, so it cannot be delayed: delay the completion, complete:delay(1ms)`,
		"post:drop":                `column 6: "drop" cannot stand at post, only at complete`,
		"fence:kill":               `column 7: "kill" cannot stand at fence, only at session, post, complete`,
		"complete:delay(1)":        `column 16: "1" is no duration: write a number with a unit, such as 10ms`,
		"complete:delay(-1s)":      `column 16: "-1s" is no duration: write a number with a unit, such as 10ms`,
		"complete:partial(-1)":     `column 18: "-1" is no number of segments`,
		"complete:partial(x)":      `column 18: "x" is no number of segments`,
	} {
		_, err := Parse(text)
		if err == nil {
			t.Errorf("Parse(%q) succeeded", text)
		} else if got := strings.TrimPrefix(err.Error(), "fault script: "); got != want {
			t.Errorf("Parse(%q):\n got %s\nwant %s", text, got, want)
		}
	}
}

// drawScript draws any script that can be written.
func drawScript(t *rapid.T) *Script {
	s := &Script{terms: map[Point]*term{}}
	for _, p := range rapid.SliceOfNDistinct(rapid.SampledFrom(points), 0, len(points), rapid.ID).Draw(t, "points") {
		tm := &term{}
		n := rapid.IntRange(1, 4).Draw(t, "actions")
		for i := range n {
			var allowed []verb
			for _, v := range verbs {
				for _, at := range v.at {
					if at == p {
						allowed = append(allowed, v.name)
					}
				}
			}
			a := action{verb: rapid.SampledFrom(allowed).Draw(t, "verb"), times: rapid.Uint64Range(0, 1<<32-1).Draw(t, "times")}
			if a.times == 0 && i < n-1 {
				a.times = 1
			}
			switch a.verb {
			case fail:
				a.code = rapid.SampledFrom(backend.Codes).Draw(t, "code")
			case delay:
				a.delay = time.Duration(rapid.Int64Range(0, 1<<62).Draw(t, "delay"))
			case partial:
				a.count = rapid.IntRange(0, 1<<30).Draw(t, "count")
			}
			tm.actions = append(tm.actions, a)
		}
		s.terms[p] = tm
	}
	return s
}

func TestStringRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := drawScript(t)
		got, err := Parse(want.String())
		if err != nil {
			t.Fatalf("Parse(%q): %v", want, err)
		}
		if len(got.terms) != len(want.terms) {
			t.Fatalf("%q has %d terms, want %d", want, len(got.terms), len(want.terms))
		}
		for p, tm := range want.terms {
			if !reflect.DeepEqual(got.terms[p].actions, tm.actions) {
				t.Fatalf("%s of %q: %v, want %v", p, want, got.terms[p].actions, tm.actions)
			}
		}
	})
}

func FuzzParse(f *testing.F) {
	for _, text := range []string{
		"", "post:2*off->1*error(pathdown)", "complete:drop;fence:error(internal)", "post:busy(", "a:b->c;", "complete: 3 * delay( 1h ) ",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := Parse(text)
		if err != nil {
			var column int
			if _, scan := fmt.Sscanf(err.Error(), "fault script: column %d:", &column); scan != nil || column < 1 || column > len(text)+1 {
				t.Fatalf("Parse(%q): the error names no column of the text: %v", text, err)
			}
			return
		}
		again, err := Parse(s.String())
		if err != nil {
			t.Fatalf("Parse(%q).String() = %q, which Parse refuses: %v", text, s, err)
		}
		if s.String() != again.String() {
			t.Fatalf("%q became %q", s, again)
		}
	})
}

func TestNext(t *testing.T) {
	for _, c := range []struct {
		text  string
		calls []verb
		fired uint64
	}{
		{"fence:off", []verb{off, off, off}, 0},
		{"post:busy", []verb{busy, busy, busy, busy}, 4},
		{"post:2*busy", []verb{busy, busy, off, off}, 2},
		{"post:2*off->1*error(pathdown)", []verb{off, off, fail, off, off}, 1},
		{"post:busy->kill", []verb{busy, kill, kill, kill}, 4},
		{"post:1*busy->2*off->3*kill->off", []verb{busy, off, off, kill, kill, kill, off, off}, 4},
	} {
		s, err := Parse(c.text)
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range c.calls {
			p := Post
			if s.terms[Post] == nil {
				p = Fence
			}
			if got := s.next(p).verb; got != want {
				t.Errorf("%s: call %d got %q, want %q", c.text, i, got, want)
			}
		}
		if got := s.Fired(Post); got != c.fired {
			t.Errorf("%s: Fired = %d, want %d", c.text, got, c.fired)
		}
		if s.Fired(Complete) != 0 || s.next(Complete).verb != off {
			t.Errorf("%s: something happens at complete", c.text)
		}
	}
}

// TestNextTogether counts right when many call at once.
func TestNextTogether(t *testing.T) {
	s, err := Parse("post:100*busy->50*kill")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	got := map[verb]int{}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				v := s.next(Post).verb
				mu.Lock()
				got[v]++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if want := (map[verb]int{busy: 100, kill: 50, off: 250}); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if s.Fired(Post) != 150 {
		t.Errorf("Fired = %d, want 150", s.Fired(Post))
	}
}
