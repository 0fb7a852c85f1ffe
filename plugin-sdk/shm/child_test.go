package shm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"
)

// childEnv makes the test binary serve as the other process, in the role that it names.
const childEnv = "UMBP_SHM_TEST_CHILD"

// childPassage is the descriptor of the child's passage: its first extra file.
const childPassage = 3

// The roles of a child. Each gets its files in one message, and ends with the passage.
const (
	echo     = "echo"     // sends back by the second queue what comes by the first
	greedy   = "greedy"   // the same, for three records; then it sits there
	rubbish  = "rubbish"  // spoils what it may write of both queues
	pingPong = "pingpong" // answers every count of the first eventfd by the second
)

func serveChild(role string) error {
	passage, err := OpenPassage(os.NewFile(childPassage, "passage"))
	if err != nil {
		return err
	}
	_, files, err := passage.Receive()
	if err != nil {
		return err
	}
	if role == pingPong {
		go answerAll(files[0], files[1])
		return untilEOF(passage)
	}
	in, err := Attach(files[0], files[1])
	if err != nil {
		return err
	}
	out, err := Attach(files[2], files[3])
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	switch role {
	case echo:
		go func() { failed <- echoRecords(in, out, -1) }()
	case greedy:
		go echoRecords(in, out, 3)
	case rubbish:
		in.sharedTaken.Store(1 << 50)
		out.sharedSent.Store(1 << 50)
		if err := out.wakeConn.Control(out.signal); err != nil {
			return err
		}
	default:
		return fmt.Errorf("unknown role %q", role)
	}
	err = errors.Join(untilEOF(passage), in.Close(), out.Close())
	if role == echo {
		if failure := <-failed; failure != ErrClosed {
			err = errors.Join(err, failure)
		}
	}
	return err
}

func untilEOF(p *Passage) error {
	if _, _, err := p.Receive(); err != io.EOF {
		return fmt.Errorf("the passage ends with %v", err)
	}
	return p.Close()
}

// echoRecords sends back n records, or all until the queue is closed.
func echoRecords(in, out *Queue, n int) error {
	var record []byte
	for ; n != 0; n-- {
		var err error
		if record, err = in.Receive(record); err != nil {
			return err
		}
		if err := sendPatiently(out, record); err != nil {
			return err
		}
	}
	return nil
}

func sendPatiently(q *Queue, record []byte) error {
	for {
		_, err := q.Send(record)
		if err != ErrFull {
			return err
		}
		time.Sleep(10 * time.Microsecond)
	}
}

func answerAll(in, out io.ReadWriter) error {
	var count [8]byte
	for {
		if _, err := in.Read(count[:]); err != nil {
			return err
		}
		if _, err := out.Write(count[:]); err != nil {
			return err
		}
	}
}

// startChild starts a child and passes it the files. It ends with the test.
func startChild(t testing.TB, role string, files ...*os.File) (*exec.Cmd, *Passage) {
	t.Helper()
	passage, plugin, err := NewPassage()
	must(t, err)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+role)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{plugin}
	must(t, cmd.Start())
	must(t, plugin.Close())
	t.Cleanup(func() {
		passage.Close()
		if err := cmd.Wait(); err != nil && !t.Failed() && cmd.ProcessState.ExitCode() > 0 {
			t.Error(err)
		}
	})
	must(t, passage.Send(1, files...))
	return cmd, passage
}

// queues makes two queues, and returns them with the files of their other ends.
func queues(t testing.TB, capacity int) (there, back *Queue, files []*os.File) {
	t.Helper()
	for _, q := range []**Queue{&there, &back} {
		var err error
		*q, err = Create(capacity)
		must(t, err)
		t.Cleanup(func() { must(t, (*q).Close()) })
		memory, wake := (*q).Files()
		files = append(files, memory, wake)
	}
	return there, back, files
}
