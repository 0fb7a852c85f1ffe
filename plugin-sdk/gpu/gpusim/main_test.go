package gpusim

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

// childEnv names, in a process that a test started, the library to open.
const childEnv = "UMBP_GPUSIM_TEST_LIBRARY"

// TestMain runs the tests, or, in a process that a test started, does what its standard input says.
func TestMain(m *testing.M) {
	if library := os.Getenv(childEnv); library != "" {
		r := open(childTB{}, &Sim{Library: library})
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			word, rest, _ := strings.Cut(in.Text(), " ")
			fmt.Println(r.serve(word, rest))
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// childTB is what stands for a test in a process that a test started.
type childTB struct{ testing.TB }

func (childTB) Helper()        {}
func (childTB) Cleanup(func()) {}

func (childTB) Errorf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "child: "+format+"\n", args...)
	os.Exit(1)
}

func (childTB) Fatal(args ...any) {
	fmt.Fprintln(os.Stderr, "child:", fmt.Sprint(args...))
	os.Exit(1)
}

// both runs a test on both runtimes.
func both(t *testing.T, m Machine, test func(t *testing.T, s *Sim, r *rt)) {
	t.Helper()
	for _, name := range []string{"hip", "cuda"} {
		t.Run(name, func(t *testing.T) {
			m := m
			m.Runtime = name
			s := New(t, m)
			r := open(t, s)
			before := s.Counts().Left()
			test(t, s, r)
			if left := s.Counts().Left(); left != before {
				t.Errorf("left open: %+v, before: %+v", left, before)
			}
		})
	}
}

// child is a process on a machine, which does one call for each line that it reads.
type child struct {
	tb  testing.TB
	cmd *exec.Cmd
	in  *os.File
	out *bufio.Reader
}

func startChild(tb testing.TB, s *Sim, env ...string) *child {
	tb.Helper()
	exe, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(exe)
	// With the race detector a process would wait for a second before it ends.
	cmd.Env = append(append(os.Environ(), childEnv+"="+s.Library, "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")), env...)
	cmd.Stderr = os.Stderr
	theirIn, in, err := os.Pipe()
	if err != nil {
		tb.Fatal(err)
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		tb.Fatal(err)
	}
	cmd.Stdin, cmd.Stdout = theirIn, theirOut
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	theirIn.Close()
	theirOut.Close()
	tb.Cleanup(func() {
		in.Close()
		cmd.Wait()
		out.Close()
	})
	return &child{tb: tb, cmd: cmd, in: in, out: bufio.NewReader(out)}
}

// ask sends a line and returns the answer.
func (c *child) ask(words ...any) string {
	c.tb.Helper()
	fmt.Fprintln(c.in, words...)
	line, err := c.out.ReadString('\n')
	if err != nil {
		c.tb.Fatalf("asked %v: %v", words, err)
	}
	return strings.TrimSpace(line)
}

// handleText returns a handle as ask takes it.
func handleText(h *[8]uintptr) string {
	return strings.Trim(fmt.Sprint(*h), "[]")
}

// serve does what one line asks for.
func (r *rt) serve(word, rest string) string {
	var h [8]uintptr
	var p, at, n uintptr
	switch word {
	case "count":
		return fmt.Sprint(r.number("GetDeviceCount"))
	case "pci":
		id := make([]byte, 32)
		fmt.Sscan(rest, &n)
		r.must("DeviceGetPCIBusId", id, len(id), n)
		return strings.ToLower(name(id))
	case "device":
		fmt.Sscan(rest, &n)
		return fmt.Sprint(r.call("SetDevice", n))
	case "export":
		fmt.Sscan(rest, &n)
		p = r.alloc(1 << 20)
		return fmt.Sprint(p, " ", handleText(r.export(p+n)))
	case "free":
		fmt.Sscan(rest, &p)
		return fmt.Sprint(r.call("Free", p))
	case "import":
		fmt.Sscan(rest, &h[0], &h[1], &h[2], &h[3], &h[4], &h[5], &h[6], &h[7])
		code := r.importHandle(&p, &h)
		return fmt.Sprint(code, " ", p)
	case "close":
		fmt.Sscan(rest, &p)
		return fmt.Sprint(r.call("IpcCloseMemHandle", p))
	case "store":
		fmt.Sscan(rest, &p, &at, &n)
		return fmt.Sprint(r.call("Memcpy", p+at, []byte{byte(n)}, 1, anyKind))
	case "load":
		fmt.Sscan(rest, &p, &at)
		return fmt.Sprint(r.load(p+at, 1)[0])
	case "copy": // within one allocation, on a stream of its own
		fmt.Sscan(rest, &p, &at, &n)
		s := r.stream()
		defer r.must("StreamDestroy", s)
		if code := r.call("MemcpyAsync", p+at, p, n, anyKind, s); code != 0 {
			return fmt.Sprint(code)
		}
		return fmt.Sprint(r.call("StreamSynchronize", s))
	}
	return "what is " + word
}
