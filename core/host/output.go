package host

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	tailSize = 64 << 10 // bytes of a plugin's output that are kept
	lineSize = 16 << 10 // bytes in one line of its log; longer ones are cut
	linesFor = 256      // lines of its log that wait to be logged here

	// A plugin may log logBurst lines in each logPeriod.
	logBurst  = 200
	logPeriod = time.Second
)

// tail keeps the last of what is written to it.
type tail struct {
	mu   sync.Mutex
	last []byte
}

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = append(t.last, p...)
	if len(t.last) > 2*tailSize {
		t.last = append(t.last[:0], t.last[len(t.last)-tailSize:]...)
	}
	return len(p), nil
}

// String returns what is kept.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.last[max(0, len(t.last)-tailSize):])
}

// logPipe takes what a plugin writes, as fast as it comes, so that writing never holds the plugin up. All of it goes to
// the tail. The lines that a log can bear come out again where go-plugin reads the plugin's standard error; the others
// are counted, and the count comes out as a line of its own.
type logPipe struct {
	tail    tail
	lines   chan []byte
	dropped atomic.Uint64
	done    chan struct{} // closed when standard error has ended

	tick *time.Ticker // of Read
	rest []byte       // of the line that is being read
}

func newLogPipe() *logPipe {
	return &logPipe{lines: make(chan []byte, linesFor), done: make(chan struct{})}
}

// output is the host's end of a pipe that a plugin writes to.
type output struct {
	*os.File
	late int // bytes that were read after the deadline
}

// pipeSize is how many bytes a pipe holds.
const pipeSize = 64 << 10

// Read implements io.Reader. What the plugin has written is read also when the deadline has passed meanwhile: a host that
// the machine gives no time to must not take it for nothing.
func (o *output) Read(p []byte) (int, error) {
	n, err := o.File.Read(p)
	if !errors.Is(err, os.ErrDeadlineExceeded) || o.late >= pipeSize {
		return n, err
	}
	conn, connErr := o.SyscallConn()
	if connErr != nil {
		return 0, err
	}
	var readErr error
	if connErr = conn.Control(func(fd uintptr) { n, readErr = unix.Read(int(fd), p) }); connErr != nil || readErr != nil {
		return 0, err // nothing is there
	}
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	o.late += n
	return n, nil
}

// take reads the plugin's standard error to its end, or its deadline, and closes it.
func (l *logPipe) take(stderr *output) {
	defer close(l.done)
	defer stderr.Close()
	in := &lineWriter{to: l}
	chunk := make([]byte, lineSize)
	for {
		n, err := stderr.Read(chunk)
		in.Write(chunk[:n])
		if err != nil {
			if len(in.line) > 0 {
				in.Write([]byte{'\n'})
			}
			return
		}
	}
}

// lineWriter is a way into a logPipe that cuts what is written into lines. It is for one goroutine.
type lineWriter struct {
	to    *logPipe
	line  []byte // without an end as yet
	taken int    // lines since
	since time.Time
}

// Write implements io.Writer.
func (w *lineWriter) Write(p []byte) (int, error) {
	w.to.tail.Write(p)
	for rest := p; len(rest) > 0; {
		room := lineSize - len(w.line)
		end := bytes.IndexByte(rest, '\n')
		switch {
		case end >= 0 && end <= room:
			w.pass(rest[:end])
			rest = rest[end+1:]
		case len(rest) >= room:
			w.pass(rest[:room])
			rest = rest[room:]
		default:
			w.line = append(w.line, rest...)
			rest = nil
		}
	}
	return len(p), nil
}

// pass ends the line, and hands it to whoever reads unless there have been too many.
func (w *lineWriter) pass(end []byte) {
	if now := time.Now(); now.Sub(w.since) >= logPeriod {
		w.since, w.taken = now, 0
	}
	w.taken++
	if w.taken <= logBurst {
		line := append(append(w.line, end...), '\n')
		w.line = nil
		select {
		case w.to.lines <- line:
			return
		default:
		}
	}
	w.line = w.line[:0]
	w.to.dropped.Add(1)
}

// Read implements io.Reader. It is for one goroutine.
func (l *logPipe) Read(p []byte) (int, error) {
	if l.tick == nil {
		l.tick = time.NewTicker(logPeriod)
	}
	for len(l.rest) == 0 {
		select {
		case l.rest = <-l.lines:
			continue
		default:
		}
		select {
		case l.rest = <-l.lines:
		case <-l.tick.C:
			l.rest = l.summary()
		case <-l.done:
			if l.rest = l.summary(); l.rest == nil {
				l.tick.Stop()
				return 0, io.EOF
			}
		}
	}
	n := copy(p, l.rest)
	l.rest = l.rest[n:]
	return n, nil
}

// summary is a line, in the format of a plugin's log, that says how many were left out; nil when none were.
func (l *logPipe) summary() []byte {
	n := l.dropped.Swap(0)
	if n == 0 {
		return nil
	}
	return fmt.Appendf(nil, `{"@level":"warn","@message":"lines of the plugin's log were left out: it writes too many","lines":%d}`+"\n", n)
}

// Close implements io.Closer. What the pipe reads from, take closes.
func (l *logPipe) Close() error { return nil }

// announcement is the standard output of a plugin: one line, which says where it listens. What comes after it is
// thrown away, and what is too long to be that line is cut.
type announcement struct {
	*output
	size int  // bytes of the line that have been read
	over bool // the line is complete
}

const announcementSize = 1 << 10

// Read implements io.Reader. At the end of the file, or its deadline, it closes it.
func (a *announcement) Read(p []byte) (int, error) {
	if !a.over {
		n, err := a.output.Read(p[:min(len(p), announcementSize-a.size)])
		a.size += n
		if end := bytes.IndexByte(p[:n], '\n') + 1; end > 0 {
			n, a.over = end, true
		} else if a.size == announcementSize {
			p[n-1], a.over = '\n', true
		}
		if err == nil {
			return n, nil
		}
	}
	io.Copy(io.Discard, a.output)
	a.Close()
	return 0, io.EOF
}
