package plan

import (
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Names turns the numbers of a plan into the caller's names. Where a function is nil, numbers are
// written as they are: "local 3".
type Names struct {
	Local, Remote, Key func(number uint32) string
}

// Explanation says what a plan does: as JSON by its tags, as text by WriteText. It shares no memory with the plan.
type Explanation struct {
	Op         string           `json:"op"`
	Bytes      uint64           `json:"bytes"`
	Runs       int              `json:"run_count"`
	Segments   int              `json:"segment_count"`
	Groups     int              `json:"group_count"`
	Shown      []ExplainedGroup `json:"groups"`
	MoreGroups int              `json:"groups_not_shown,omitempty"`
}

// ExplainedGroup is one group of an Explanation.
type ExplainedGroup struct {
	Local        string             `json:"local"`
	Remote       string             `json:"remote"`
	Bytes        uint64             `json:"bytes"`
	Count        int                `json:"segment_count"`
	Segments     []ExplainedSegment `json:"segments"`
	MoreSegments int                `json:"segments_not_shown,omitempty"`

	// A plan knows nothing of backends: these are for the caller to fill in. They are left out while empty.

	Backend  string            `json:"backend,omitempty"`  // what carries the group
	Reason   string            `json:"reason,omitempty"`   // why
	Rejected []RejectedBackend `json:"rejected,omitempty"` // and why not another
}

// RejectedBackend is a backend that does not carry a group.
type RejectedBackend struct {
	Backend string `json:"backend"`
	Reason  string `json:"reason"`
}

// ExplainedSegment is one segment of an ExplainedGroup. Each key is named once.
type ExplainedSegment struct {
	Local    uint64   `json:"local_offset"`
	Remote   uint64   `json:"remote_offset"`
	Length   uint64   `json:"length"`
	Keys     []string `json:"keys"`
	MoreKeys int      `json:"keys_not_shown,omitempty"`
}

// Explain describes the plan: of it at most limit groups, of each group at most limit segments, and of each
// segment at most limit keys. It counts what it leaves out. A limit of zero is none.
func (pl *Plan) Explain(names Names, limit int) *Explanation {
	local, remote, key := namer(names.Local, "local"), namer(names.Remote, "remote"), namer(names.Key, "key")
	e := &Explanation{
		Op: pl.Op.String(), Runs: pl.Runs, Segments: len(pl.Segments), Groups: len(pl.Groups),
		Shown: []ExplainedGroup{},
	}
	for _, g := range pl.Groups {
		e.Bytes += g.Bytes
	}
	shown := atMost(len(pl.Groups), limit)
	e.MoreGroups = len(pl.Groups) - shown
	for _, g := range pl.Groups[:shown] {
		shown := atMost(g.Count, limit)
		group := ExplainedGroup{
			Local: local(g.Local), Remote: remote(g.Remote), Bytes: g.Bytes,
			Count: g.Count, MoreSegments: g.Count - shown,
		}
		for i := g.First; i < g.First+shown; i++ {
			s := pl.Segments[i]
			segment := ExplainedSegment{Local: s.Local, Remote: s.Remote, Length: s.Length}
			keys := distinct(pl.Keys(i))
			shown := atMost(len(keys), limit)
			segment.MoreKeys = len(keys) - shown
			for _, k := range keys[:shown] {
				segment.Keys = append(segment.Keys, key(k))
			}
			group.Segments = append(group.Segments, segment)
		}
		e.Shown = append(e.Shown, group)
	}
	return e
}

// WriteText writes the explanation for people.
func (e *Explanation) WriteText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s of %s: %s → %s → %s\n", e.Op, backend.Size(e.Bytes),
		count(e.Runs, "run"), count(e.Segments, "segment"), count(e.Groups, "group"))
	arrow := "→"
	if e.Op == backend.Read.String() {
		arrow = "←"
	}
	for _, g := range e.Shown {
		fmt.Fprintf(&b, "\n%s %s %s: %s in %s\n",
			g.Local, arrow, g.Remote, backend.Size(g.Bytes), count(g.Count, "segment"))
		if g.Backend != "" {
			fmt.Fprintf(&b, "  by %s: %s\n", g.Backend, g.Reason)
		}
		for _, r := range g.Rejected {
			fmt.Fprintf(&b, "  not by %s: %s\n", r.Backend, r.Reason)
		}
		for _, s := range g.Segments {
			fmt.Fprintf(&b, "  %d %s %d: %s of %s", s.Local, arrow, s.Remote, backend.Size(s.Length),
				strings.Join(s.Keys, ", "))
			if s.MoreKeys > 0 {
				fmt.Fprintf(&b, " and %s", count(s.MoreKeys, "more key"))
			}
			b.WriteByte('\n')
		}
		if g.MoreSegments > 0 {
			fmt.Fprintf(&b, "  and %s\n", count(g.MoreSegments, "more segment"))
		}
	}
	if e.MoreGroups > 0 {
		fmt.Fprintf(&b, "\nand %s\n", count(e.MoreGroups, "more group"))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// count says how many there are of a noun.
func count(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return strconv.Itoa(n) + " " + noun
}

// distinct returns the keys without repetitions, in order of their first appearance.
func distinct(keys []uint32) []uint32 {
	var unique []uint32
	seen := make(map[uint32]bool)
	for _, k := range keys {
		if !seen[k] {
			seen[k] = true
			unique = append(unique, k)
		}
	}
	return unique
}

// namer returns f, or where f is nil what writes numbers after a noun.
func namer(f func(uint32) string, noun string) func(uint32) string {
	if f != nil {
		return f
	}
	return func(number uint32) string { return noun + " " + strconv.FormatUint(uint64(number), 10) }
}

// atMost returns n, or limit where that is set and smaller.
func atMost(n, limit int) int {
	if limit > 0 {
		return min(n, limit)
	}
	return n
}
