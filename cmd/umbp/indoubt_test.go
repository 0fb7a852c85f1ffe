package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/umbp/umbp/config"
	"github.com/umbp/umbp/core"
	"github.com/umbp/umbp/core/control"
	"github.com/umbp/umbp/core/directory"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// deafAfterCommit is a node that commits, and whose answer to that is lost on the way.
type deafAfterCommit struct{ peer.Service }

func (d deafAfterCommit) Commit(ctx context.Context, req *peer.CommitRequest, reply *peer.CommitReply) error {
	if err := d.Service.Commit(ctx, req, reply); err != nil {
		return err
	}
	return backend.Errorf(backend.PathDown, "the answer is lost")
}

// TestPutInDoubt loses the answer to a commit. The put says that nobody knows, with an exit code of its own, and
// what it tells the user to do works.
func TestPutInDoubt(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	ctx := t.Context()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	c, err := config.Load(config.Source{Schemas: schemas()})
	check(err)
	log := newLogger(io.Discard, c.Log)
	engine, err := openEngine(ctx, c, "a", true, log)
	check(err)
	defer engine.Close()
	server, err := control.Listen("127.0.0.1:0", nil, false)
	check(err)
	members := directory.NewMemory(directory.Options{TTL: ownLease})
	defer members.Close()
	node, err := core.NewNode(ctx, engine, core.NodeOptions{
		Directory: members, Address: server.Address(), PoolSize: 1 << 20, PageSize: 1 << 16, Limits: limits(c), Log: log,
	})
	check(err)
	defer node.Close(context.Background())
	check(node.Start(ctx))
	directory.Register(server, members)
	peer.Register(server, deafAfterCommit{node})
	served := make(chan error, 1)
	go func() { served <- server.Serve() }()
	defer func() {
		server.Stop(context.Background())
		check(<-served)
	}()

	umbp := func(args ...string) (code int, stdout, stderr string) {
		return command(append(args, "--directory.address", server.Address())...)
	}
	file := filepath.Join(t.TempDir(), "file")
	check(os.WriteFile(file, []byte("value"), 0o600))

	code, _, stderr := umbp("put", "k", file)
	if code != exitInDoubt || !strings.Contains(stderr, `error: commit "k": path down`) || !strings.Contains(stderr, `hint: "umbp stat k" tells`) {
		t.Errorf("put: exit code %d, %s", code, stderr)
	}
	if code, stdout, stderr := umbp("stat", "k"); code != exitOK || !strings.Contains(stdout, "found") {
		t.Errorf("stat: exit code %d, %s%s", code, stdout, stderr)
	}
	if code, _, stderr := umbp("put", "k", file); code != exitOK || !strings.Contains(stderr, "it exists at a") {
		t.Errorf("put again: exit code %d, %s", code, stderr)
	}
	if code, stdout, stderr := umbp("get", "k"); code != exitOK || stdout != "value" {
		t.Errorf("get: exit code %d, %q, %s", code, stdout, stderr)
	}
}
