package fault

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Point is a place where a fault can be put: a call into the backend, or a completion out of it.
type Point string

// The points.
const (
	Register  Point = "register"  // Backend.Register
	Offer     Point = "offer"     // Backend.Offer
	Answer    Point = "answer"    // Backend.Answer
	Establish Point = "establish" // Handshake.Establish
	Session   Point = "session"   // Endpoint.Session
	Post      Point = "post"      // Session.Post
	Complete  Point = "complete"  // Sink.Complete
	Fence     Point = "fence"     // Backend.Fence
	Close     Point = "close"     // Backend.Close
)

// points lists the points in the order of a backend's life, which is also the order of Script.String.
var points = []Point{Register, Offer, Answer, Establish, Session, Post, Complete, Fence, Close}

type verb string

const (
	off     verb = "off"     // nothing happens
	fail    verb = "error"   // the call returns an error of the code; at complete, the transfer has failed
	delay   verb = "delay"   // the call, or the completion, comes later
	drop    verb = "drop"    // the completion does not come, until the transfer is cancelled or its session closed
	dup     verb = "dup"     // the completion comes twice: a breach of the contract
	busy    verb = "busy"    // Post has no room
	partial verb = "partial" // only the first segments are done, the path is down
	corrupt verb = "corrupt" // one byte of what a Read brought is wrong: a breach of the contract
	kill    verb = "kill"    // the endpoint goes down
)

// verbs says where each verb can stand, and what its argument is, if it has one.
var verbs = []struct {
	name     verb
	argument string
	at       []Point
}{
	{off, "", points},
	{fail, "code", points},
	{delay, "duration", []Point{Register, Offer, Answer, Establish, Session, Complete, Fence, Close}},
	{drop, "", []Point{Complete}},
	{dup, "", []Point{Complete}},
	{busy, "", []Point{Post}},
	{partial, "number", []Point{Complete}},
	{corrupt, "", []Point{Complete}},
	{kill, "", []Point{Session, Post, Complete}},
}

// codes are the names of codes in a script.
var codes = map[string]backend.Code{
	"internal": backend.Internal, "busy": backend.Busy, "peergone": backend.PeerGone, "pathdown": backend.PathDown,
	"badrequest": backend.BadRequest, "denied": backend.Denied, "integrity": backend.Integrity,
	"cancelled": backend.Cancelled, "unsupported": backend.Unsupported,
}

func codeNames() []string {
	names := make([]string, 0, len(codes))
	for _, c := range backend.Codes {
		for name, code := range codes {
			if code == c {
				names = append(names, name)
			}
		}
	}
	return names
}

// action is one step of a term.
type action struct {
	verb  verb
	times uint64 // 0: for ever
	code  backend.Code
	delay time.Duration
	count int // of partial
}

// term is what happens at one point, call after call.
type term struct {
	actions []action
	hits    atomic.Uint64 // calls that have come by
	fired   atomic.Uint64 // of them, those to which something was done
}

// Script says which faults to inject. It counts the calls that come by, so each Script is for one run; the same
// one may be given to several backends, which then share its counts. It is safe for concurrent use.
type Script struct {
	terms map[Point]*term
}

// Fired returns how many faults were injected at a point.
func (s *Script) Fired(p Point) uint64 {
	if t := s.terms[p]; t != nil {
		return t.fired.Load()
	}
	return 0
}

// next counts a call at a point, and returns what is to be done to it.
func (s *Script) next(p Point) action {
	t := s.terms[p]
	if t == nil {
		return action{verb: off}
	}
	n := t.hits.Add(1)
	for _, a := range t.actions {
		if a.times == 0 || n <= a.times {
			if a.verb != off {
				t.fired.Add(1)
			}
			return a
		}
		n -= a.times
	}
	return action{verb: off}
}

// String returns the script as text that Parse reads as the same script.
func (s *Script) String() string {
	var terms []string
	for _, p := range points {
		t := s.terms[p]
		if t == nil {
			continue
		}
		actions := make([]string, len(t.actions))
		for i, a := range t.actions {
			actions[i] = a.String()
		}
		terms = append(terms, string(p)+":"+strings.Join(actions, "->"))
	}
	return strings.Join(terms, ";")
}

func (a action) String() string {
	text := string(a.verb)
	switch a.verb {
	case fail:
		text += "(" + codeNames()[slices.Index(backend.Codes, a.code)] + ")"
	case delay:
		text += "(" + a.delay.String() + ")"
	case partial:
		text += "(" + strconv.Itoa(a.count) + ")"
	}
	if a.times != 0 {
		text = strconv.FormatUint(a.times, 10) + "*" + text
	}
	return text
}

// Parse reads a script:
//
//	script = [ term { ";" term } ]
//	term   = point ":" action { "->" action }
//	action = [ times "*" ] verb [ "(" argument ")" ]
//
// as in "post:2*off->1*error(pathdown)" or "complete:drop". Each action of a term is carried out as many times as
// it says, then comes the next. An action without a number is carried out once, or, as the last of its term, for
// ever; after a last action with a number nothing more happens. Blanks between words do not count. The points and
// verbs are listed in the package's comment.
//
// An error names the column, counted in bytes from 1, and the word that was probably meant.
func Parse(text string) (*Script, error) {
	s := &Script{terms: map[Point]*term{}}
	if strings.TrimSpace(text) == "" {
		return s, nil
	}
	for _, w := range split(word{text, 0}, ";") {
		point, t, err := parseTerm(w)
		if err != nil {
			return nil, err
		}
		if s.terms[point] != nil {
			return nil, w.fault("%q has a term already: join the two with ->", point)
		}
		s.terms[point] = t
	}
	return s, nil
}

// word is a piece of the text, and where it begins.
type word struct {
	text string
	at   int // offset in bytes
}

func (w word) fault(format string, args ...any) error {
	return fmt.Errorf("fault script: column %d: %s", w.at+1, fmt.Sprintf(format, args...))
}

// trim cuts the blanks off both ends.
func (w word) trim() word {
	left := strings.TrimLeft(w.text, " \t\n")
	return word{strings.TrimRight(left, " \t\n"), w.at + len(w.text) - len(left)}
}

// cut splits the word at the first separator.
func (w word) cut(separator string) (before, after word, found bool) {
	b, a, found := strings.Cut(w.text, separator)
	return word{b, w.at}.trim(), word{a, w.at + len(b) + len(separator)}.trim(), found
}

// split splits the word at every separator.
func split(w word, separator string) []word {
	var all []word
	for {
		before, after, found := w.cut(separator)
		all = append(all, before)
		if !found {
			return all
		}
		w = after
	}
}

func parseTerm(w word) (Point, *term, error) {
	name, rest, found := w.cut(":")
	switch {
	case w.text == "":
		return "", nil, w.fault("a term is missing: write point:action")
	case !slices.Contains(points, Point(name.text)):
		return "", nil, name.fault("%q is no point%s; there are %s", name.text, backend.DidYouMean(name.text, texts(points)), strings.Join(texts(points), ", "))
	case !found:
		return "", nil, w.fault("%q has no action: write %s:action", name.text, name.text)
	}
	point, t := Point(name.text), &term{}
	steps := split(rest, "->")
	for i, step := range steps {
		a, err := parseAction(point, step)
		if err != nil {
			return "", nil, err
		}
		if a.times == 0 && i < len(steps)-1 {
			a.times = 1
		}
		t.actions = append(t.actions, a)
	}
	return point, t, nil
}

func parseAction(p Point, w word) (action, error) {
	var a action
	if w.text == "" {
		return a, w.fault("an action is missing after %q", string(p))
	}
	head, argument, hasArgument := w.cut("(")
	name := head
	if times, after, found := head.cut("*"); found {
		n, err := strconv.ParseUint(times.text, 10, 32)
		if err != nil || n == 0 {
			return a, times.fault("%q is no number of times: write a whole number from 1, as in 2*off", times.text)
		}
		a.times, name = n, after
	}
	known := make([]string, len(verbs))
	found := -1
	for i, v := range verbs {
		known[i] = string(v.name)
		if known[i] == name.text {
			found = i
		}
	}
	if found < 0 {
		return a, name.fault("%q is no verb%s; there are %s", name.text, backend.DidYouMean(name.text, known), strings.Join(known, ", "))
	}
	v := verbs[found]
	a.verb = v.name
	switch {
	case p == Post && v.name == delay:
		return a, name.fault("post never blocks, so it cannot be delayed: delay the completion, complete:%s", w.text)
	case !slices.Contains(v.at, p):
		return a, name.fault("%q cannot stand at %s, only at %s", name.text, p, strings.Join(texts(v.at), ", "))
	case v.argument == "" && hasArgument:
		return a, argument.fault("%q takes no argument", name.text)
	case v.argument != "" && !hasArgument:
		return a, name.fault("%q needs a %s: write %s(%s)", name.text, v.argument, name.text, v.argument)
	case !hasArgument:
		return a, nil
	}
	inside, behind, closed := argument.cut(")")
	switch {
	case !closed:
		return a, argument.fault("the bracket is not closed")
	case behind.text != "":
		return a, behind.fault("%q after the bracket: actions are joined by ->, terms by ;", behind.text)
	}
	return a, a.parseArgument(inside)
}

func (a *action) parseArgument(w word) error {
	var err error
	switch a.verb {
	case fail:
		code, ok := codes[w.text]
		if !ok {
			return w.fault("%q is no code%s; there are %s", w.text, backend.DidYouMean(w.text, codeNames()), strings.Join(codeNames(), ", "))
		}
		a.code = code
	case delay:
		if a.delay, err = time.ParseDuration(w.text); err != nil || a.delay < 0 {
			return w.fault("%q is no duration: write a number with a unit, such as 10ms", w.text)
		}
	case partial:
		if a.count, err = strconv.Atoi(w.text); err != nil || a.count < 0 {
			return w.fault("%q is no number of segments", w.text)
		}
	}
	return nil
}

func texts(points []Point) []string {
	all := make([]string, len(points))
	for i, p := range points {
		all[i] = string(p)
	}
	return all
}
