package backendtest

import (
	"context"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/reference"
)

// Peer returns a process of this host.
func Peer(node string, incarnation uint64) backend.Peer {
	return backend.Peer{Node: node, Incarnation: incarnation, Host: "here"}
}

// Options returns options as a configuration has them, each given as name=value. The last of a name counts.
func Options(list ...string) map[string]string {
	options := make(map[string]string, len(list))
	for _, o := range list {
		name, value, _ := strings.Cut(o, "=")
		options[name] = value
	}
	return options
}

// SocketDir returns a new directory with a short name, which is removed with the test: the paths of sockets are bounded,
// and those of t.TempDir are long.
func SocketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "umbp")
	Must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TryOpen opens a backend with the options that are not to have their defaults, in the place of cfg.Options.
func TryOpen(f backend.Factory, cfg backend.Config, options map[string]string) (backend.Backend, error) {
	values, err := backend.CheckOptions(f.Options, options)
	if err != nil {
		return nil, err
	}
	cfg.Options = values
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	return f.Open(ctx, cfg)
}

// Open is TryOpen for a backend that is closed, without an error, when the test ends.
func Open(t testing.TB, f backend.Factory, cfg backend.Config, options map[string]string) backend.Backend {
	t.Helper()
	b, err := TryOpen(f, cfg, options)
	Must(t, err)
	CloseAtEnd(t, b)
	return b
}

// CloseAtEnd closes a backend, or anything else, when the test ends, which fails if there is an error.
func CloseAtEnd(t testing.TB, c io.Closer) {
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
}

// Describe returns a region as peers see it: the memory, who has registered it, and the key that Register returned.
func Describe(owner backend.Peer, m backend.Memory, key []byte) backend.Remote {
	return backend.Remote{
		Peer: owner, Region: m.Region, Kind: m.Kind, Rights: m.Rights, Size: m.Size(), Place: m.Place(), Key: key,
	}
}

// Register registers a region at the backend of a process, and returns it as peers see it.
func Register(t testing.TB, b backend.Backend, self backend.Peer, m backend.Memory) backend.Remote {
	t.Helper()
	key, err := b.Register(Context(t), m)
	Must(t, err)
	return Describe(self, m, key)
}

// Target is the end that answers: a backend of this process, or a Process.
type Target = reference.Target

// TryConnect connects the backend of self to a peer, whose target answers. It has Patience to do so.
func TryConnect(from backend.Backend, self, to backend.Peer, target Target) (backend.Endpoint, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	return reference.Connect(ctx, from, self, target, to)
}

// Connect is TryConnect where that has to work. The endpoint is left for the backend to close.
func Connect(t testing.TB, from backend.Backend, self, to backend.Peer, target Target) backend.Endpoint {
	t.Helper()
	e, err := TryConnect(from, self, to, target)
	Must(t, err)
	return e
}

// Bind returns a session between two regions. It is left for the endpoint to close.
func Bind(t testing.TB, e backend.Endpoint, local backend.RegionID, remote backend.Remote, sink backend.Sink) backend.Session {
	t.Helper()
	s, err := e.Session(Context(t), local, remote, sink)
	Must(t, err)
	return s
}

// Post posts a transfer and overwrites its segments at once, as a host may.
func Post(s backend.Session, op backend.Op, cookie uint64, segments ...backend.Segment) error {
	mine := slices.Clone(segments)
	err := s.Post(backend.Transfer{Op: op, Segments: mine, Cookie: cookie})
	for i := range mine {
		mine[i] = backend.Segment{Local: 1 << 60, Remote: 1 << 60, Length: 1 << 60}
	}
	return err
}

// PostWhenFree is Post, again and again while the session is busy. It returns Busy when that lasts for Patience.
func PostWhenFree(s backend.Session, op backend.Op, cookie uint64, segments ...backend.Segment) error {
	for end := time.Now().Add(Patience); ; time.Sleep(backend.DefaultRetryAfter) {
		err := Post(s, op, cookie, segments...)
		if backend.CodeOf(err) != backend.Busy || time.Now().After(end) {
			return err
		}
	}
}

// Model does to copies of the memory of both ends what a transfer must do to their regions.
func Model(op backend.Op, near, far []byte, segments ...backend.Segment) {
	for _, g := range segments {
		l, r := near[g.Local:][:g.Length], far[g.Remote:][:g.Length]
		if op == backend.Write {
			copy(r, l)
		} else {
			copy(l, r)
		}
	}
}

// Count returns the value of a counter of a backend.
func Count(t testing.TB, b backend.Counter, name string) uint64 {
	t.Helper()
	for _, c := range b.Counters() {
		if c.Name == name {
			return c.Value
		}
	}
	t.Fatalf("there is no counter %q", name)
	return 0
}
