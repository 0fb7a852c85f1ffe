package shm

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

var outcomes = []backend.Outcome{backend.Done, backend.NotSent, backend.Failed, backend.InDoubt}

// TestRecordBytes compares with what docs/plugin-protocol.md shows: other languages depend on it.
func TestRecordBytes(t *testing.T) {
	for what, c := range map[string]struct {
		got  []byte
		want string
	}{
		"post": {AppendPost(nil, &Post{Session: 7, Cookie: 9, Op: backend.Read,
			Segments: []backend.Segment{{Local: 4096, Remote: 8192, Length: 512}}}),
			"01 02 0000 01000000 0700000000000000 0900000000000000 0010000000000000 0020000000000000 0002000000000000"},
		"cancel": {AppendCancel(nil, Cancel{Session: 7, Cookie: 9}),
			"02 00 0000 00000000 0700000000000000 0900000000000000"},
		"done": {AppendCompletion(nil, &Completion{Session: 7, Cookie: 9}),
			"03 00 0000 00000000 0700000000000000 0900000000000000"},
		"failed": {AppendCompletion(nil, &Completion{Session: 7, Cookie: 9, Error: []byte{8, 8}, Outcomes: outcomes}),
			"03 00 0000 04000000 0700000000000000 0900000000000000 01000203 0808"},
	} {
		want, err := hex.DecodeString(strings.ReplaceAll(c.want, " ", ""))
		must(t, err)
		if !bytes.Equal(c.got, want) {
			t.Errorf("%s:\n got % x\nwant % x", what, c.got, want)
		}
	}
}

// again parses a record and writes it once more.
func again(record []byte) ([]byte, error) {
	switch KindOf(record) {
	case PostRecord:
		p, err := ParsePost(record, nil)
		return AppendPost(nil, &p), err
	case CancelRecord:
		c, err := ParseCancel(record)
		return AppendCancel(nil, c), err
	case CompletionRecord:
		c, err := ParseCompletion(record)
		return AppendCompletion(nil, &c), err
	}
	return nil, badRecord(record)
}

func largestPost() *Post {
	p := &Post{Session: 1<<64 - 1, Cookie: 1 << 63, Op: backend.Write}
	for i := range uint64(MaxSegments) {
		p.Segments = append(p.Segments, backend.Segment{Local: i, Remote: ^i, Length: i << 40})
	}
	return p
}

func largestCompletion() *Completion {
	return &Completion{Session: 1, Cookie: 2, Error: make([]byte, MaxError), Outcomes: make([]backend.Outcome, MaxSegments)}
}

func TestRecords(t *testing.T) {
	for what, record := range map[string][]byte{
		"a post":                   AppendPost(nil, &Post{Op: backend.Write, Segments: make([]backend.Segment, 1)}),
		"the largest post":         AppendPost(nil, largestPost()),
		"a cancel":                 AppendCancel(nil, Cancel{1 << 63, 2}),
		"a completion":             AppendCompletion(nil, &Completion{Session: 1, Cookie: 2}),
		"one that failed":          AppendCompletion(nil, &Completion{Session: 1, Cookie: 2, Error: []byte{1}, Outcomes: outcomes}),
		"one without outcomes":     AppendCompletion(nil, &Completion{Session: 1, Cookie: 2, Error: []byte{1}}),
		"the largest completion":   AppendCompletion(nil, largestCompletion()),
		"appended to what is used": AppendPost([]byte("abc"), &Post{Op: backend.Read, Segments: make([]backend.Segment, 3)})[3:],
	} {
		got, err := again(record)
		if err != nil || !bytes.Equal(got, record) {
			t.Errorf("%s: %v\n got % x\nfrom % x", what, err, got[:min(len(got), 99)], record[:min(len(record), 99)])
		}
		if len(record) > DefaultCapacity-lengthSize {
			t.Errorf("%s of %d bytes does not fit into a queue", what, len(record))
		}
	}
	p := largestPost()
	got, err := ParsePost(AppendPost(nil, p), nil)
	must(t, err)
	if diff := cmp.Diff(*p, got); diff != "" {
		t.Error(diff)
	}
	c := Completion{Session: 1, Cookie: 2, Error: []byte("why"), Outcomes: outcomes}
	back, err := ParseCompletion(AppendCompletion(nil, &c))
	must(t, err)
	if diff := cmp.Diff(c, back); diff != "" {
		t.Error(diff)
	}
}

func TestRecordsRefused(t *testing.T) {
	post := AppendPost(nil, &Post{Op: backend.Write, Segments: make([]backend.Segment, 2)})
	cancel := AppendCancel(nil, Cancel{1, 2})
	done := AppendCompletion(nil, &Completion{Session: 1, Cookie: 2})
	failed := AppendCompletion(nil, &Completion{Session: 1, Cookie: 2, Error: []byte{1}, Outcomes: outcomes})
	tooMany := largestPost()
	tooMany.Segments = append(tooMany.Segments, backend.Segment{})
	tooManyOutcomes := largestCompletion()
	tooManyOutcomes.Outcomes = append(tooManyOutcomes.Outcomes, backend.Done)
	tooLong := largestCompletion()
	tooLong.Error = append(tooLong.Error, 0)
	with := func(record []byte, at int, b byte) []byte {
		record = bytes.Clone(record)
		record[at] = b
		return record
	}
	for what, record := range map[string][]byte{
		"nothing":                      nil,
		"a part of a head":             post[:headSize-1],
		"kind 0":                       with(cancel, 0, 0),
		"kind 4":                       with(cancel, 0, 4),
		"a post without an operation":  with(post, 1, 0),
		"a post with two":              with(post, 1, 3),
		"a post with something":        with(post, 2, 1),
		"a post with something more":   with(post, 3, 1),
		"a post cut short":             post[:len(post)-1],
		"a post with a byte more":      append(bytes.Clone(post), 0),
		"a post without a segment":     with(post[:headSize], 4, 0),
		"a post that counts 3 of 2":    with(post, 4, 3),
		"a post that counts too many":  with(post, 7, 0x80),
		"a post of 16385":              AppendPost(nil, tooMany),
		"a cancel with a detail":       with(cancel, 1, 1),
		"a cancel with a count":        with(cancel, 4, 1),
		"a cancel with a byte more":    append(bytes.Clone(cancel), 0),
		"a completion with a detail":   with(done, 1, 1),
		"outcomes, and no error":       failed[:len(failed)-1],
		"more outcomes than bytes":     with(failed, 4, 6),
		"an outcome that is none":      with(failed, headSize, 4),
		"outcomes beyond the limit":    AppendCompletion(nil, tooManyOutcomes),
		"an error beyond the limit":    AppendCompletion(nil, tooLong),
		"a completion, count rubbish":  with(failed, 7, 0xff),
		"a completion without its end": with(done, 4, 1),
	} {
		if got, err := again(record); err == nil {
			t.Errorf("%s is accepted, as % x", what, got[:min(len(got), 99)])
		}
	}
	// Each parser takes its own kind only.
	if _, err := ParsePost(cancel, nil); err == nil {
		t.Error("a cancel is a post")
	}
	if _, err := ParseCancel(done); err == nil {
		t.Error("a completion is a cancel")
	}
	if _, err := ParseCompletion(cancel); err == nil {
		t.Error("a cancel is a completion")
	}
}

func TestRecordsAllocateNothing(t *testing.T) {
	post, out := largestPost(), AppendPost(nil, largestPost())
	room := make([]backend.Segment, MaxSegments)
	done := Completion{Session: 1, Cookie: 2}
	if n := testing.AllocsPerRun(10, func() {
		out = AppendPost(out[:0], post)
		_, err := ParsePost(out, room)
		must(t, err)
		out = AppendCancel(out[:0], Cancel{1, 2})
		_, err = ParseCancel(out)
		must(t, err)
		out = AppendCompletion(out[:0], &done)
		_, err = ParseCompletion(out)
		must(t, err)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzRecord: what is accepted is written back as it was.
func FuzzRecord(f *testing.F) {
	f.Add(AppendPost(nil, &Post{Session: 1, Cookie: 2, Op: backend.Read, Segments: make([]backend.Segment, 2)}))
	f.Add(AppendCancel(nil, Cancel{1, 2}))
	f.Add(AppendCompletion(nil, &Completion{Session: 1, Cookie: 2}))
	f.Add(AppendCompletion(nil, &Completion{Session: 1, Cookie: 2, Error: []byte{1}, Outcomes: outcomes}))
	f.Fuzz(func(t *testing.T, record []byte) {
		if got, err := again(record); err == nil && !bytes.Equal(got, record) {
			t.Errorf("% x is written back as % x", record, got)
		}
	})
}
