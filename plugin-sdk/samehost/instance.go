package samehost

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// closePatience is how long Close waits for guests in other processes to let go of this process's memory.
const closePatience = time.Second

// Settings say what Open opens.
type Settings struct {
	// Info sets Capabilities.Window and Limits.Segments, and no other limit.
	Info  backend.Info
	Mover Mover
	// UntilExit says that memory is quiet only when the process of a guest has ended, where the guest did not leave in
	// order: for what is moved by a device, which may go on for a moment when the process's last instruction has run.
	UntilExit bool
}

// Options returns the options that every backend on this package has: socket_dir and window.
func Options() []backend.Option {
	return []backend.Option{
		{
			Name: "socket_dir", Type: backend.StringOption,
			Help: "Directory of the Unix sockets; it is created where it is missing, and must belong to the user and be " +
				"closed to all others. Empty means umbp-UID in the directory for temporary files.",
		},
		{
			Name: "window", Type: backend.IntOption, Default: "1024", Min: "1", Max: "65536",
			Help: "Transfers in flight that one endpoint accepts before it says Busy.",
		},
	}
}

// instanceID names an instance among all of the host. It is drawn at random, so that an answer of an instance that
// is gone can never lead to another one.
type instanceID [16]byte

// Instance is an opened backend. It implements backend.Backend. It listens on a Unix socket of its own in socket_dir
// until it is closed.
//
// Locks are taken in the order endpoint.mu, then those of the mover's Path.Stop; Instance.mu and socketReach.mu are held
// while no other lock is taken. None is held across I/O, or a call of a sink, or any other call of the mover.
type Instance struct {
	self      backend.Peer
	id        instanceID
	name      string // of the backend
	info      backend.Info
	mover     Mover
	untilExit bool
	log       backend.Logger

	listener *net.UnixListener
	socket   string // path of the listener
	// tasks counts what Close waits for before it closes the mover: the accepting goroutine, accepted connections, and
	// calls of the mover. It grows under mu, and not when ctx has ended.
	tasks  sync.WaitGroup
	ctx    context.Context
	cancel context.CancelFunc // ends what the tasks still wait for; called under mu
	// processOf returns a pidfd of the process at the other end of a connection.
	processOf func(*net.UnixConn) (*os.File, error)

	mu        sync.Mutex
	closed    bool
	regions   map[backend.RegionID]*region
	endpoints map[*endpoint]struct{}
	guests    map[*Guest]struct{}
	conns     map[*net.UnixConn]struct{} // accepted
	grants    map[uint64]*grant
	lastGrant uint64

	closing  sync.Once
	closeErr error
}

// Open starts an instance. The mover is the instance's from then on, and closed with it, also when Open fails.
func Open(cfg backend.Config, s Settings) (*Instance, error) {
	i := &Instance{
		self:      cfg.Self,
		name:      s.Info.Name,
		info:      s.Info,
		mover:     s.Mover,
		untilExit: s.UntilExit,
		log:       cfg.Log,
		processOf: processOf,
		regions:   make(map[backend.RegionID]*region),
		endpoints: make(map[*endpoint]struct{}),
		guests:    make(map[*Guest]struct{}),
		conns:     make(map[*net.UnixConn]struct{}),
		grants:    make(map[uint64]*grant),
	}
	rand.Read(i.id[:])
	if i.log == nil {
		i.log = slog.New(slog.DiscardHandler)
	}
	i.ctx, i.cancel = context.WithCancel(context.Background())
	if err := i.listen(cfg.Options.String("socket_dir")); err != nil {
		i.cancel()
		s.Mover.Close() // of the two errors, this one is not the cause
		return nil, &backend.Error{Code: backend.BadRequest, Op: "open", Backend: i.name, Err: err}
	}
	i.tasks.Go(i.accept)
	instances.Store(i.id, i)
	return i, nil
}

func (i *Instance) listen(dir string) error {
	dir, err := prepareDir(dir)
	if err != nil {
		return err
	}
	sweep(dir)
	i.listener, i.socket, err = listen(dir, hex.EncodeToString(i.id[:]))
	return err
}

// instances holds the open instances of this process by their id, so that an initiator finds a target in its own
// process without a socket.
var instances sync.Map

// Info implements backend.Backend.
func (i *Instance) Info() backend.Info { return i.info }

// Fence implements backend.Backend. It breaks every endpoint that the peer has to this instance.
func (i *Instance) Fence(ctx context.Context, peer backend.Peer) error {
	return i.evict(ctx, "fence", func(g *Guest) bool {
		return g.peer.Node == peer.Node && g.peer.Incarnation == peer.Incarnation
	})
}

// Close implements backend.Backend. It waits a moment for peers to let go of this process's memory, and its error
// names those that did not.
func (i *Instance) Close() error {
	i.closing.Do(func() { i.closeErr = i.close() })
	return i.closeErr
}

func (i *Instance) close() error {
	i.mu.Lock()
	i.closed = true
	endpoints := keys(i.endpoints)
	i.mu.Unlock()

	instances.Delete(i.id)
	errs := []error{closeListener(i.listener, i.socket)}
	for _, e := range endpoints {
		errs = append(errs, e.Close())
	}
	ctx, cancel := context.WithTimeout(context.Background(), closePatience)
	defer cancel()
	errs = append(errs, i.evict(ctx, "close", func(*Guest) bool { return true }))

	i.mu.Lock()
	conns := keys(i.conns)
	i.cancel()
	i.mu.Unlock()
	for _, c := range conns {
		c.Close() // those of guests that have not let go, and those that never became guests
	}
	i.tasks.Wait()

	i.mu.Lock()
	regions := i.regions
	i.regions = nil
	clear(i.grants)
	i.mu.Unlock()
	for _, r := range regions {
		errs = append(errs, i.closeRegion("close", r))
	}
	if err := i.mover.Close(); err != nil {
		errs = append(errs, i.explain(err, "close", backend.Peer{}, 0))
	}
	return errors.Join(errs...)
}

// adopt adds an endpoint to those that end with the instance.
func (i *Instance) adopt(e *endpoint) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return i.errClosed("establish")
	}
	i.endpoints[e] = struct{}{}
	return nil
}

// disown removes an endpoint that has ended.
func (i *Instance) disown(e *endpoint) {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.endpoints, e)
}

// explain returns an error of the mover's as a *backend.Error of its own that also says where it happened.
func (i *Instance) explain(err error, op string, peer backend.Peer, region backend.RegionID) *backend.Error {
	full := backend.Error{Code: backend.CodeOf(err), Err: err}
	if own, ok := err.(*backend.Error); ok {
		full = *own
	}
	full.Op = cmp.Or(full.Op, op)
	full.Backend = cmp.Or(full.Backend, i.name)
	full.Peer = cmp.Or(full.Peer, peer)
	full.Region = cmp.Or(full.Region, region)
	return &full
}

func (i *Instance) errClosed(op string) *backend.Error {
	return &backend.Error{Code: backend.PathDown, Op: op, Backend: i.name, Text: "the backend is closed"}
}

func (i *Instance) errMalformed(op, what string, peer backend.Peer) *backend.Error {
	return &backend.Error{
		Code: backend.BadRequest, Op: op, Backend: i.name, Peer: peer,
		Text: fmt.Sprintf("the %s is malformed, or of another version than %d", what, protocolVersion),
	}
}

func (i *Instance) errRevoked(peer backend.Peer) *backend.Error {
	return &backend.Error{
		Code: backend.PathDown, Backend: i.name, Peer: peer,
		Text: "the peer has taken its memory back: connect again",
	}
}

func keys[K comparable](m map[K]struct{}) []K {
	list := make([]K, 0, len(m))
	for k := range m {
		list = append(list, k)
	}
	return list
}
