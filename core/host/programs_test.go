package host

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	goplugin "github.com/hashicorp/go-plugin"
	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/fault"
	"github.com/umbp/umbp/plugin-sdk/null"
	"github.com/umbp/umbp/plugin-sdk/rpc"
	"github.com/umbp/umbp/plugin-sdk/serve"
)

// The test binary is also the programs that the tests start: envProgram says which one, and envMood names a file with
// the mood that it is in when it starts.
const (
	envProgram = "UMBP_HOST_TEST_PROGRAM"
	envMood    = "UMBP_HOST_TEST_MOOD"
)

var programs = map[string]func(){"plugin": pluginProgram, "host": hostProgram}

// program is a plugin for a test.
type program struct {
	t    *testing.T
	spec ProcessSpec
}

// newProgram makes the test binary a plugin. Its times are short.
func newProgram(t *testing.T) *program {
	t.Helper()
	t.Setenv(envProgram, "plugin")
	t.Setenv("GORACE", "atexit_sleep_ms=0") // the race detector would sleep for a second at each exit
	t.Setenv(envMood, filepath.Join(t.TempDir(), "mood"))
	p := &program{t: t, spec: ProcessSpec{
		Name: null.Name, Path: os.Args[0], Env: []string{envProgram, envMood, "GORACE"},
		Timing: Timing{
			FirstPause: time.Millisecond, LongPause: 10 * time.Millisecond, Young: time.Nanosecond,
			PingTimeout: time.Hour, // no process is to be killed because the machine is slow
		},
	}}
	p.mood("good")
	return p
}

// mood sets the mood of the processes that will be started.
func (p *program) mood(mood string) {
	p.t.Helper()
	if err := os.WriteFile(os.Getenv(envMood), []byte(mood), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// hasMood tells whether no process has got stuck in its mood as yet.
func (p *program) hasMood() bool {
	_, err := os.Stat(os.Getenv(envMood))
	return err == nil
}

// stuck tells the test that the process gets no further.
func stuck() {
	if err := os.Remove(os.Getenv(envMood)); err != nil {
		panic(err)
	}
	forever()
}

// forever does nothing, in a way that the runtime does not take for a deadlock.
func forever() {
	for {
		time.Sleep(time.Hour)
	}
}

func pluginProgram() {
	mood, err := os.ReadFile(os.Getenv(envMood))
	if err != nil {
		panic(err)
	}
	f := null.Factory
	f.Examine = func(_ context.Context, options backend.Values) []backend.Finding {
		switch string(mood) {
		case "examines a crash":
			panic("the library is broken")
		case "examines nonsense":
			fmt.Println("hello")
		}
		return []backend.Finding{{Subject: "mood", State: backend.Warning, Text: string(mood), Remedy: "be better"}}
	}
	if len(os.Args) > 1 && os.Args[1] == "examine" {
		serve.Main(f)
	}
	if len(os.Args) > 1 && os.Args[1] == "describe" {
		switch string(mood) {
		case "describes nothing":
			return
		case "describes nonsense":
			fmt.Println("hello")
			return
		case "describes without end":
			for {
				fmt.Println(strings.Repeat("x", 1<<16))
			}
		case "describes for ever":
			forever()
		case "describes a crash":
			fmt.Fprintln(os.Stderr, "no library")
			os.Exit(4)
		case "describes another version":
			rpc.ProtocolVersions = []int{98, 99}
		case "describes no examining":
			f.Examine = nil
		case "describes another backend":
			f.Name = "other"
		}
		serve.Main(f)
	}
	switch string(mood) {
	case "exit":
		fmt.Fprintln(os.Stderr, "there is no device")
		os.Exit(3)
	case "panic":
		panic("nothing works")
	case "garbage":
		fmt.Println("Segmentation fault (not really)")
		forever()
	case "much garbage":
		for {
			fmt.Print(strings.Repeat("x", 1<<16))
		}
	case "silent":
		stuck()
	case "version":
		server := rpc.NewServer(f, nil, nil)
		goplugin.Serve(&goplugin.ServeConfig{
			HandshakeConfig:  rpc.Handshake,
			VersionedPlugins: map[int]goplugin.PluginSet{99: {rpc.PluginName: &rpc.Plugin{Backend: server}}},
			GRPCServer:       goplugin.DefaultGRPCServer,
		})
		os.Exit(0)
	}
	f.Open = func(ctx context.Context, cfg backend.Config) (backend.Backend, error) {
		switch string(mood) {
		case "no device":
			return nil, backend.Errorf(backend.Unsupported, "there is no device")
		case "busy port":
			return nil, backend.Errorf(backend.Internal, "the port is taken")
		case "hangs":
			stuck()
		}
		b, err := null.Factory.Open(ctx, cfg)
		if script, ok := strings.CutPrefix(string(mood), "fault "); ok && err == nil {
			s, err := fault.Parse(script)
			if err != nil {
				return nil, err
			}
			return moody{fault.Wrap(b, s), string(mood)}, nil
		}
		return moody{b, string(mood)}, err
	}
	serve.Main(f)
}

// moody is a null backend with keys of its own, that can be told to do something.
type moody struct {
	backend.Backend
	mood string
}

// Counters implements backend.Counter.
func (m moody) Counters() []backend.Count {
	return []backend.Count{{Name: "moods", Value: uint64(len(m.mood))}, {Name: "none"}}
}

func (m moody) Info() backend.Info {
	info := m.Backend.Info()
	if m.mood == "fewer" {
		info.Capabilities.Window--
	}
	return info
}

func (m moody) Register(ctx context.Context, memory backend.Memory) ([]byte, error) {
	if _, err := m.Backend.Register(ctx, memory); err != nil {
		return nil, err
	}
	key := make([]byte, 16)
	rand.Read(key)
	return key, nil
}

// Offer does what the peer's name says.
func (m moody) Offer(ctx context.Context, peer backend.Peer) (backend.Handshake, error) {
	switch peer.Node {
	case "exit":
		fmt.Fprintln(os.Stderr, "the device is gone")
		os.Exit(5)
	case "panic":
		go panic("the device is lost")
		forever()
	case "abort":
		unix.Kill(os.Getpid(), unix.SIGABRT)
		forever()
	case "flood":
		line := []byte(`{"@level":"info","@message":"again"}` + "\n")
		for range 200_000 {
			syscall.Write(2, line)
		}
	case "speak":
		syscall.Write(2, []byte(`{"@level":"warn","@message":"a field","temperature":451}`+"\n"))
		fmt.Println("printed")
		fmt.Fprintln(os.Stderr, "printed as a fault")
		syscall.Write(1, []byte(strings.Repeat("x", 1<<20)))
	case "scribble":
		if err := scribble(); err != nil {
			return nil, err
		}
	case "fork":
		// A child that would hold the plugin's output open.
		_, err := os.StartProcess("/bin/sleep", []string{"sleep", "1000"}, &os.ProcAttr{Files: []*os.File{nil, os.NewFile(1, "1"), os.NewFile(2, "2")}})
		if err != nil {
			return nil, err
		}
	}
	return m.Backend.Offer(ctx, peer)
}

// scribble writes rubbish into the header of the queue of completions, where the position of what was sent last stands,
// and wakes the host.
func scribble() error {
	links, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	var queues, wakes []int
	for _, link := range links {
		fd, err := strconv.Atoi(link.Name())
		if err != nil {
			return err
		}
		switch to, _ := os.Readlink("/proc/self/fd/" + link.Name()); {
		case strings.Contains(to, "umbp-queue"):
			queues = append(queues, fd)
		case strings.Contains(to, "[eventfd]"):
			wakes = append(wakes, fd)
		}
	}
	slices.Sort(queues)
	if len(queues) != 2 || len(wakes) < 2 {
		return fmt.Errorf("the queues are %v, what wakes their receivers %v", queues, wakes)
	}
	if _, err := unix.Pwrite(queues[1], []byte("rubbish!"), 64); err != nil {
		return err
	}
	for _, fd := range wakes {
		if _, err := unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil {
			return err
		}
	}
	return nil
}

// hostProgram opens a plugin and says which process it is. Then it waits to be killed.
func hostProgram() {
	os.Setenv(envProgram, "plugin")
	f, err := ProcessFactory(context.Background(), ProcessSpec{Name: null.Name, Path: os.Args[0], Env: []string{envProgram, envMood}})
	if err != nil {
		panic(err)
	}
	b, err := f.Open(context.Background(), backend.Config{Self: self})
	if err != nil {
		panic(err)
	}
	p := b.(*Process)
	fmt.Println(p.State().PID, p.sockets.path)
	forever()
}

var self = backend.Peer{Node: "self", Incarnation: 1, Host: "here"}
