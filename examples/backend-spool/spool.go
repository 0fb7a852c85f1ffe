// Package spool is a backend whose path is a directory: it moves bytes between hosts that share a file system, as
// files. It is an example, small enough to be read in one sitting, and makes every promise of package backend.
//
// Each process has a mailbox in the directory, which only its user may enter:
//
//	DIR/MAILBOX/lock                    locked for as long as the process lives
//	DIR/MAILBOX/in/CONNECTION.NUMBER    a request to this process
//	DIR/MAILBOX/out/CONNECTION/NUMBER   the answer to a request of this process
//
// The initiator writes a request, with the bytes of a write in it, and renames it into the target's mailbox. The
// target renames it again to take it, checks it against its own regions, carries it out, and renames an answer into
// the initiator's mailbox. Renaming is the idea to take along: a request is either taken by the target, or removed
// by the initiator, never both. That is how the initiator of a cancelled transfer knows whether it was sent.
//
// This file has the mailbox and what both ends share, target.go the serving side, endpoint.go the initiator.
package spool

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

const name = "spool"

// Limits of one transfer, and with them of what a peer can make this process hold in memory.
const (
	window      = 16
	maxSegments = 4096
	maxBytes    = 16 << 20
	maxFile     = maxBytes + maxSegments*64 + 4096
)

// Pauses between two looks at the file system grow from the first to the second.
const (
	minPause = 50 * time.Microsecond
	maxPause = 5 * time.Millisecond
)

// info is what the backend claims. It does not depend on options.
var info = backend.Info{Name: name, Version: "1", Capabilities: backend.Capabilities{
	Ops: backend.Write | backend.Read, Local: hostMemory, Remote: hostMemory, Reach: backend.Network, Window: window,
	Limits: backend.Limits{Segments: maxSegments, SegmentBytes: maxBytes, TransferBytes: maxBytes},
}}

var hostMemory = backend.Kinds(backend.HostMemory)

// Factory opens the backend.
var Factory = backend.Factory{
	Name: name,
	Info: &info,
	Options: []backend.Option{
		{Name: "dir", Type: backend.StringOption,
			Help: "Directory on the file system that the hosts share, by its full path; it belongs to the user and is closed to others."},
		{Name: "patience", Type: backend.DurationOption, Default: "10s", Min: "100ms",
			Help: "How long a target may take to answer before the connection is given up."},
	},
	Open: open,
}

// spool is the backend.
type spool struct {
	self         backend.Peer
	log          backend.Logger
	dir, mailbox string
	patience     time.Duration
	lock         *os.File
	quit, served chan struct{} // closed to end the serving goroutine, and when it has ended
	closeOnce    func() error

	// copying is held while the target looks up a region and touches its memory. Who has changed what it looks up
	// takes the lock once, and knows that nothing of before is under way; see settle. It is taken before mu.
	copying sync.Mutex

	// mu guards everything below, and the fields of others that say so. It is never held across I/O.
	mu        sync.Mutex
	closed    bool
	regions   map[backend.RegionID]*region
	guests    map[string]*guest // connections to this process, by name
	endpoints map[*endpoint]struct{}
	jobs      map[*job]struct{} // transfers whose Complete has not returned
}

// region is a registered region. It is gone once Deregister has been called. Guarded by spool.mu.
type region struct {
	backend.Memory
	gone bool
}

func open(_ context.Context, cfg backend.Config) (backend.Backend, error) {
	b := &spool{
		self: cfg.Self, log: cfg.Log,
		dir: cfg.Options.String("dir"), mailbox: newName(), patience: cfg.Options.Duration("patience"),
		quit: make(chan struct{}), served: make(chan struct{}),
		regions: map[backend.RegionID]*region{}, guests: map[string]*guest{},
		endpoints: map[*endpoint]struct{}{}, jobs: map[*job]struct{}{},
	}
	b.closeOnce = sync.OnceValue(b.close)
	if b.log == nil {
		b.log = slog.New(slog.DiscardHandler)
	}
	if err := checkDir(b.dir); err != nil {
		return nil, &backend.Error{Code: backend.BadRequest, Backend: name, Op: "open", Text: "option dir", Err: err}
	}
	b.sweep()
	if err := b.moveIn(); err != nil {
		os.RemoveAll(b.path())
		return nil, &backend.Error{Code: backend.PathDown, Backend: name, Op: "open", Err: err}
	}
	go b.serve()
	return b, nil
}

// checkDir wants a directory that nobody else may enter: its permissions are what keeps the bytes secret.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	switch {
	case !filepath.IsAbs(dir):
		return errors.New("name the directory that the hosts share by its full path")
	case err != nil:
		return err
	case !info.IsDir(), info.Mode().Perm()&0o077 != 0, info.Sys().(*syscall.Stat_t).Uid != uint32(os.Getuid()):
		return errors.New(dir + " must be a directory of the user that runs this, closed to others (chmod 700)")
	}
	return nil
}

// newName draws the name of a mailbox or a connection. All names are 16 bytes in hex, and travel as those bytes: so
// no peer can send one that is more than a name.
func newName() string {
	var id [16]byte
	rand.Read(id[:])
	return hex.EncodeToString(id[:])
}

// path returns a path in this process's mailbox.
func (b *spool) path(parts ...string) string {
	return filepath.Join(append([]string{b.dir, b.mailbox}, parts...)...)
}

// moveIn makes the mailbox. The lock gets its name when it is locked, so that one that nobody holds means a process
// that has died.
func (b *spool) moveIn() (err error) {
	for _, dir := range []string{b.path(), b.path("in"), b.path("out")} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	if b.lock, err = os.Create(b.path("new")); err != nil {
		return err
	}
	if err = syscall.Flock(int(b.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err == nil {
		err = os.Rename(b.path("new"), b.path("lock"))
	}
	if err != nil {
		b.lock.Close()
	}
	return err
}

// alive tells whether the process of a mailbox lives. A lock ends with its process, and on a shared file system with
// the lease of its host.
func (b *spool) alive(mailbox string) bool {
	lock, err := os.Open(filepath.Join(b.dir, mailbox, "lock"))
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	defer lock.Close()
	return syscall.Flock(int(lock.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) != nil
}

// sweep removes what processes that were killed have left behind.
func (b *spool) sweep() {
	locks, _ := filepath.Glob(filepath.Join(b.dir, "*", "lock"))
	for _, lock := range locks {
		if mailbox := filepath.Base(filepath.Dir(lock)); !b.alive(mailbox) {
			os.RemoveAll(filepath.Join(b.dir, mailbox))
		}
	}
}

// moveOut removes the mailbox. It is renamed first, so that nobody can put anything into it any more but those who are
// just about to.
func (b *spool) moveOut() error {
	left := filepath.Join(b.dir, "left-"+b.mailbox)
	err := os.Rename(b.path(), left)
	for range 10 {
		if removal := os.RemoveAll(left); removal == nil {
			break
		} else if !errors.Is(removal, syscall.ENOTEMPTY) {
			err = errors.Join(err, removal)
			break
		}
	}
	return errors.Join(err, b.lock.Close())
}

// message is a request or an answer: a line of JSON, then data.
type message struct {
	Secret []byte // of the connection
	Number uint64 // of the request; the answer has the same
	// Of a request: what to do, and with which ranges of which region of the target. Op is zero for one that only
	// proves who is there.
	Op     backend.Op       `json:",omitempty"`
	Region backend.RegionID `json:",omitempty"`
	Ranges []span           `json:",omitempty"`
	// Of an answer that refuses.
	Code backend.Code `json:",omitempty"`
	Text string       `json:",omitempty"`
	data []byte
}

type span struct{ Offset, Length uint64 }

// write writes a message beside its place and moves it there in one step: nobody sees half of one.
func (m *message) write(beside, path string) error {
	head, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := os.WriteFile(beside, append(append(head, '\n'), m.data...), 0o600); err != nil {
		return err
	}
	return os.Rename(beside, path)
}

// readMessage reads a file that anyone may have put there.
func readMessage(path string, secret []byte) (*message, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // it may be a pipe
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, err
	}
	head, data, _ := bytes.Cut(text, []byte{'\n'})
	m := &message{data: data}
	if err := json.Unmarshal(head, m); err != nil {
		return nil, err
	}
	if !hmac.Equal(m.Secret, secret) {
		return nil, errors.New("the secret is not that of the connection")
	}
	return m, nil
}

// within checks a range without adding, since the sum may overflow.
func within(offset, length, size uint64) bool {
	return length != 0 && length <= size && offset <= size-length
}

// same compares what identifies a peer.
func same(p, q backend.Peer) bool { return p.Node == q.Node && p.Incarnation == q.Incarnation }

func fault(code backend.Code, op string, peer backend.Peer, text string) *backend.Error {
	return &backend.Error{Code: code, Backend: name, Op: op, Peer: peer, Text: text}
}

// Info implements backend.Backend.
func (b *spool) Info() backend.Info { return info }

// Register implements backend.Backend. Peers need no key: a connection has proven who it is, and what it may reach
// is looked up here.
func (b *spool) Register(_ context.Context, m backend.Memory) ([]byte, error) {
	refuse := func(code backend.Code, text string) ([]byte, error) {
		return nil, &backend.Error{Code: code, Backend: name, Op: "register", Region: m.Region, Text: text}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.closed:
		return refuse(backend.PathDown, "the backend is closed")
	case m.Kind != backend.HostMemory:
		return refuse(backend.Unsupported, "only host memory can be written to files")
	case m.Region == 0 || len(m.Bytes) == 0:
		return refuse(backend.BadRequest, "a region needs an id and memory")
	case b.regions[m.Region] != nil:
		return refuse(backend.BadRequest, "the region is registered already")
	}
	b.regions[m.Region] = &region{Memory: m}
	return nil, nil
}

// Deregister implements backend.Backend: nothing new may use the region, transfers from here that do have ended, and
// the target is through with it. If the context ends first, the region stays listed for the next call.
func (b *spool) Deregister(ctx context.Context, id backend.RegionID) error {
	b.mu.Lock()
	r := b.regions[id]
	if r != nil {
		r.gone = true
	}
	b.mu.Unlock()
	if r == nil {
		return nil
	}
	why := fault(backend.Cancelled, "deregister", backend.Peer{}, "the local region was deregistered")
	if err := b.drain(ctx, why, func(j *job) bool { return j.local == r }); err != nil {
		return err
	}
	b.settle()
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.regions, id)
	return nil
}

// settle returns when what the target had begun before the call is over.
func (b *spool) settle() {
	b.copying.Lock()
	defer b.copying.Unlock()
}

// Close implements backend.Backend.
func (b *spool) Close() error { return b.closeOnce() }

func (b *spool) close() error {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.failEndpoints("the backend was closed", func(*endpoint) bool { return true })
	err := b.drain(context.Background(), nil, func(*job) bool { return true })
	close(b.quit)
	<-b.served
	return errors.Join(err, b.moveOut())
}
