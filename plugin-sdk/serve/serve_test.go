package serve

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/null"
	"github.com/umbp/umbp/plugin-sdk/rpc"
	"github.com/umbp/umbp/plugin-sdk/shm"
)

// envProgram makes the test binary a program: a plugin, or a parent that starts one and ends.
const envProgram = "UMBP_SERVE_TEST_PROGRAM"

func TestMain(m *testing.M) {
	switch os.Getenv(envProgram) {
	case "plugin":
		Main(factory)
	case "parent":
		parent()
	default:
		goleak.VerifyTestMain(m)
	}
}

// factory is of a backend that must not be opened by a description.
var factory = backend.Factory{
	Name:    "test",
	Options: []backend.Option{{Name: "size", Type: backend.SizeOption, Default: "4KiB", Help: "A size."}},
	Examine: func(_ context.Context, options backend.Values) []backend.Finding {
		return []backend.Finding{{Subject: "size", State: backend.Warning, Text: fmt.Sprint(options.Size("size")), Remedy: "more"}}
	},
	Open: func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
		fmt.Fprintln(os.Stderr, "opened")
		return null.Factory.Open(ctx, cfg)
	},
}

func program(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), envProgram+"="+name)
	return cmd
}

var cookie = rpc.Handshake.MagicCookieKey + "=" + rpc.Handshake.MagicCookieValue

// TestByHand: whoever starts a plugin by hand is told what it is.
func TestByHand(t *testing.T) {
	for name, c := range map[string]struct {
		args, env []string
		status    int
		want      string
	}{
		"no argument":       {nil, nil, 2, "is the plugin of UMBP's backend test"},
		"an argument":       {[]string{"--help"}, nil, 2, "print what the backend is"},
		"a second argument": {[]string{"describe", "all"}, nil, 2, "print what the backend is"},
		"no value":          {[]string{"examine", "size"}, nil, 2, `"size": write each option once, as OPTION=VALUE`},
		"two values":        {[]string{"examine", "size=1KiB", "size=2KiB"}, nil, 2, `"size=2KiB": write each option once`},
		"a wrong value":     {[]string{"examine", "size=red"}, nil, 2, "size"},
		"a wrong option":    {[]string{"examine", "colour=red"}, nil, 2, "colour"},
		"by a host":         {[]string{"serve"}, []string{cookie}, 2, "print what the backend is"},
		"no passage":        {nil, []string{cookie, rpc.EnvPassage + "=x"}, 1, `"x" is not the number of a descriptor`},
		"a closed passage":  {nil, []string{cookie, rpc.EnvPassage + "=99"}, 1, "open a passage"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := program("plugin", c.args...)
			cmd.Env = append(cmd.Env, c.env...)
			var stdout, stderr strings.Builder
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			cmd.Run()
			if got := cmd.ProcessState.ExitCode(); got != c.status {
				t.Errorf("it exits with %d, want %d", got, c.status)
			}
			if stdout.Len() != 0 || !strings.Contains(stderr.String(), c.want) {
				t.Errorf("it prints %q, and as an error %q; want %q", stdout.String(), stderr.String(), c.want)
			}
		})
	}
}

func TestDescribe(t *testing.T) {
	cmd := program("plugin", "describe")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil || stderr.Len() != 0 {
		t.Fatalf("describe: %v, %q", err, stderr.String())
	}
	d, err := rpc.ParseDescription(out)
	if err != nil {
		t.Fatal(err)
	}
	if want := rpc.Describe(factory); !reflect.DeepEqual(d, want) {
		t.Errorf("it describes %+v, want %+v", d, want)
	}
}

func TestExamine(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{{nil, "4096"}, {[]string{"size=1MiB"}, "1048576"}} {
		cmd := program("plugin", append([]string{"examine"}, c.args...)...)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil || stderr.Len() != 0 {
			t.Fatalf("examine: %v, %q", err, stderr.String())
		}
		findings, err := rpc.ParseFindings(out)
		if err != nil {
			t.Fatal(err)
		}
		want := []backend.Finding{{Subject: "size", State: backend.Warning, Text: c.want, Remedy: "more"}}
		if !reflect.DeepEqual(findings, want) {
			t.Errorf("examine %s finds %+v, want %+v", c.args, findings, want)
		}
	}
}

// start starts a plugin as a host does, and returns its standard error when it serves.
func start(t *testing.T) (cmd *exec.Cmd, passage *shm.Passage, stderr *bufio.Reader) {
	t.Helper()
	passage, theirs, err := shm.NewPassage()
	if err != nil {
		t.Fatal(err)
	}
	cmd = program("plugin")
	cmd.Env = append(cmd.Env, cookie, rpc.EnvPassage+"=3", EnvLogLevel+"=debug", "PLUGIN_PROTOCOL_VERSIONS=1")
	cmd.ExtraFiles = []*os.File{theirs}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	pipe, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "1|1|unix|") {
		t.Fatalf("it announces %q, %v", line, err)
	}
	return cmd, passage, bufio.NewReader(pipe)
}

// TestHostGone: the process ends when its host does.
func TestHostGone(t *testing.T) {
	cmd, passage, stderr := start(t)
	passage.Close()
	rest, err := io.ReadAll(stderr)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("it exits with %v and prints %s", err, rest)
	}
}

// TestLog: the log is lines of JSON, from the level that the host wants.
func TestLog(t *testing.T) {
	cmd, passage, stderr := start(t)
	line, err := stderr.ReadString('\n')
	if err != nil || !strings.HasPrefix(line, `{"@level":"debug",`) {
		t.Errorf("it logs %q, %v", line, err)
	}
	passage.Close()
	io.Copy(io.Discard, stderr)
	cmd.Wait()
}

// TestParentGone: the process ends when its parent does, also where it was given no passage.
func TestParentGone(t *testing.T) {
	cmd := program("parent")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if errors.Is(err, os.ErrNotExist) || strings.Contains(string(stat), ") Z ") { // whoever is its parent now may not reap it
			return
		}
		if time.Now().After(end) {
			unix.Kill(pid, unix.SIGKILL)
			t.Fatal("the plugin outlives its parent")
		}
	}
}

// parent starts a plugin, waits until it serves, and ends.
func parent() {
	cmd := program("plugin")
	cmd.Env = append(cmd.Env, cookie, "PLUGIN_PROTOCOL_VERSIONS=1")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		_, err = bufio.NewReader(out).ReadString('\n')
	}
	if err != nil {
		panic(err)
	}
	fmt.Println(cmd.Process.Pid)
}
