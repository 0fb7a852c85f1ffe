package host

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// TestTail: whatever is written in whatever pieces, the last of it is kept.
func TestTail(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var kept tail
		var all []byte
		for range rapid.IntRange(0, 20).Draw(t, "pieces") {
			piece := bytes.Repeat([]byte{byte(len(all))}, rapid.IntRange(0, tailSize).Draw(t, "size"))
			kept.Write(piece)
			all = append(all, piece...)
		}
		if got, want := kept.String(), string(all[max(0, len(all)-tailSize):]); got != want {
			t.Fatalf("kept are %d bytes that are not the last %d", len(got), len(want))
		}
	})
}

// pass writes text through a lineWriter, in pieces, and returns what comes out when it has ended.
func pass(pieces ...string) string {
	l := newLogPipe()
	read := make(chan string)
	go func() {
		all, _ := io.ReadAll(l)
		read <- string(all)
	}()
	in := &lineWriter{to: l}
	for _, p := range pieces {
		in.Write([]byte(p))
	}
	close(l.done)
	return <-read
}

func TestLines(t *testing.T) {
	long := strings.Repeat("x", lineSize)
	for _, c := range []struct {
		pieces []string
		want   string
	}{
		{nil, ""},
		{[]string{"one\ntwo\n"}, "one\ntwo\n"},
		{[]string{"o", "ne", "\n", "\ntw", "o\nthree"}, "one\n\ntwo\n"},
		{[]string{long + "\n"}, long + "\n"},
		{[]string{long, "\n"}, long + "\n\n"},
		{[]string{long + "y\nz\n"}, long + "\ny\nz\n"},
		{[]string{long[:100], long, "y\n"}, long + "\n" + long[:100] + "y\n"},
	} {
		if got := pass(c.pieces...); got != c.want {
			t.Errorf("after %.60q (%d pieces) comes %d bytes, %.60q, want %d bytes", c.pieces, len(c.pieces), len(got), got, len(c.want))
		}
	}
}

// TestLinesInAnyPieces: how the system cuts what a plugin writes makes no difference.
func TestLinesInAnyPieces(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		lines := rapid.SliceOfN(rapid.StringMatching(`[a-z ]{0,60}`), 0, logBurst).Draw(t, "lines")
		var text string
		if len(lines) > 0 {
			text = strings.Join(lines, "\n") + "\n"
		}
		var pieces []string
		for rest := text; len(rest) > 0; {
			n := rapid.IntRange(1, len(rest)).Draw(t, "piece")
			pieces = append(pieces, rest[:n])
			rest = rest[n:]
		}
		if got := pass(pieces...); got != text {
			t.Fatalf("after %d pieces comes %q, want %q", len(pieces), got, text)
		}
	})
}

// TestFlood: a plugin that floods its log is never held up, also when nobody reads, and no more comes out than a log
// can bear.
func TestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLogPipe()
		in := &lineWriter{to: l}
		const lines = 100_000
		for i := range lines {
			fmt.Fprintf(in, "line %d\n", i)
		}
		got := bufio.NewScanner(l)
		for i := range logBurst {
			if !got.Scan() || got.Text() != fmt.Sprintf("line %d", i) {
				t.Fatalf("line %d is %q", i, got.Text())
			}
		}
		// The count does not wait for another line.
		if want := fmt.Sprintf(`"lines":%d}`, lines-logBurst); !got.Scan() || !strings.Contains(got.Text(), want) {
			t.Errorf("then comes %q, want it to contain %q", got.Text(), want)
		}
		time.Sleep(logPeriod)
		fmt.Fprintln(in, "later")
		if !got.Scan() || got.Text() != "later" {
			t.Errorf("then comes %q", got.Text())
		}
		close(l.done)
		if got.Scan() {
			t.Errorf("at the end comes %q", got.Text())
		}
		if !strings.HasSuffix(l.tail.String(), "line 99999\nlater\n") {
			t.Error("the tail has lost the end")
		}
	})
}

// TestTake reads a pipe to its end, or to its deadline when something else holds it open.
func TestTake(t *testing.T) {
	for name, end := range map[string]func(r, w *os.File){
		"closed":    func(_, w *os.File) { w.Close() },
		"held open": func(r, _ *os.File) { r.SetReadDeadline(time.Unix(1, 0)) },
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		l := newLogPipe()
		go l.take(&output{File: r})
		w.WriteString("one\nan unfinished line")
		for l.tail.String() == "" {
			time.Sleep(time.Millisecond)
		}
		end(r, w)
		all, err := io.ReadAll(l)
		if string(all) != "one\nan unfinished line\n" || err != nil {
			t.Errorf("%s: it reads %q, %v", name, all, err)
		}
	}
}

// TestLateOutput: what was written is read after the deadline, too, as much as a pipe holds. What somebody else goes on
// writing is not.
func TestLateOutput(t *testing.T) {
	full := strings.Repeat("x", pipeSize)
	for _, c := range []struct {
		written, later string
		closed         bool
		want           error
	}{
		{written: "last words", closed: true},
		{written: "last words", want: os.ErrDeadlineExceeded},
		{written: full, later: "more", want: os.ErrDeadlineExceeded},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		defer r.Close()
		w.WriteString(c.written)
		if c.closed {
			w.Close()
		}
		r.SetReadDeadline(time.Unix(1, 0))
		out := &output{File: r}
		all := make([]byte, len(c.written))
		if _, err := io.ReadFull(out, all); err != nil || string(all) != c.written {
			t.Errorf("of %d bytes that were written it reads others, %v", len(c.written), err)
		}
		w.WriteString(c.later)
		if rest, err := io.ReadAll(out); len(rest) != 0 || !errors.Is(err, c.want) {
			t.Errorf("after %d bytes it reads %d more, %v, want none and %v", len(c.written), len(rest), err, c.want)
		}
	}
}

func TestAnnouncement(t *testing.T) {
	for _, c := range []struct{ written, want string }{
		{"1|1|unix|/tmp/x|grpc\nmore\nand more\n", "1|1|unix|/tmp/x|grpc\n"},
		{"no end", "no end"},
		{"", ""},
		{strings.Repeat("x", 3*announcementSize), strings.Repeat("x", announcementSize-1) + "\n"},
		{strings.Repeat("x", announcementSize-1) + "\nmore", strings.Repeat("x", announcementSize-1) + "\n"},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		w.WriteString(c.written)
		w.Close()
		if got, err := io.ReadAll(&announcement{output: &output{File: r}}); string(got) != c.want || err != nil {
			t.Errorf("of %.30q it reads %.30q, %v, want %.30q", c.written, got, err, c.want)
		}
		if _, err := r.Stat(); err == nil {
			t.Error("the file is left open")
		}
	}
}
