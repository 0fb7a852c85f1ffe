package shm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"sync"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// closePatience is how long Close waits for guests in other processes to let go of this process's memory.
const closePatience = time.Second

// instanceID names an instance among all of the host. It is drawn at random, so that an answer of an instance that
// is gone can never lead to another one.
type instanceID [16]byte

// instance is one opened backend.
//
// Locks are taken in the order endpoint.mu, copier.mu; instance.mu and socketReach.mu are held while no other lock
// is taken. None is held across I/O or a call of a sink.
type instance struct {
	self   backend.Peer
	id     instanceID
	info   backend.Info
	inline uint64 // bytes
	log    backend.Logger

	copier   *copier
	listener *net.UnixListener
	socket   string         // path of the listener
	tasks    sync.WaitGroup // the accepting goroutine, and one for each accepted connection

	mu        sync.Mutex
	closed    bool
	regions   map[backend.RegionID]*region
	endpoints map[*endpoint]struct{}
	guests    map[*guest]struct{}
	conns     map[*net.UnixConn]struct{} // accepted
	grants    map[uint64]*grant
	lastGrant uint64

	closing  sync.Once
	closeErr error
}

func open(cfg backend.Config) (*instance, error) {
	fail := func(err error) (*instance, error) {
		return nil, &backend.Error{Code: backend.BadRequest, Op: "open", Backend: name, Err: err}
	}
	i := &instance{
		self:      cfg.Self,
		info:      info(cfg.Options),
		inline:    cfg.Options.Size("inline_bytes"),
		log:       cfg.Log,
		regions:   make(map[backend.RegionID]*region),
		endpoints: make(map[*endpoint]struct{}),
		guests:    make(map[*guest]struct{}),
		conns:     make(map[*net.UnixConn]struct{}),
		grants:    make(map[uint64]*grant),
	}
	rand.Read(i.id[:])
	if i.log == nil {
		i.log = slog.New(slog.DiscardHandler)
	}
	dir, err := prepareDir(cfg.Options.String("socket_dir"))
	if err != nil {
		return fail(err)
	}
	sweep(dir)
	if i.listener, i.socket, err = listen(dir, hex.EncodeToString(i.id[:])); err != nil {
		return fail(err)
	}
	workers := cfg.Options.Int("workers")
	if workers == 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	i.copier = startCopier(workers)
	i.tasks.Go(i.accept)
	instances.Store(i.id, i)
	return i, nil
}

// instances holds the open instances of this process by their id, so that an initiator finds a target in its own
// process without a socket.
var instances sync.Map

// Info implements backend.Backend.
func (i *instance) Info() backend.Info { return i.info }

// Fence implements backend.Backend. It breaks every endpoint that the peer has to this instance.
func (i *instance) Fence(ctx context.Context, peer backend.Peer) error {
	return i.evict(ctx, "fence", func(g *guest) bool {
		return g.peer.Node == peer.Node && g.peer.Incarnation == peer.Incarnation
	})
}

// Close implements backend.Backend. It waits a moment for peers to let go of this process's memory, and its error
// names those that did not.
func (i *instance) Close() error {
	i.closing.Do(func() { i.closeErr = i.close() })
	return i.closeErr
}

func (i *instance) close() error {
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
	errs = append(errs, i.evict(ctx, "close", func(*guest) bool { return true }))

	i.mu.Lock()
	conns := keys(i.conns)
	i.mu.Unlock()
	for _, c := range conns {
		c.Close() // those of guests that have not let go, and those that never became guests
	}
	i.tasks.Wait()
	i.copier.close()

	i.mu.Lock()
	defer i.mu.Unlock()
	for id, r := range i.regions {
		errs = append(errs, r.close())
		delete(i.regions, id)
	}
	clear(i.grants)
	return errors.Join(errs...)
}

// adopt adds an endpoint to those that end with the instance.
func (i *instance) adopt(e *endpoint) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return errClosed("establish")
	}
	i.endpoints[e] = struct{}{}
	return nil
}

// disown removes an endpoint that has ended.
func (i *instance) disown(e *endpoint) {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.endpoints, e)
}

func errClosed(op string) *backend.Error {
	return &backend.Error{Code: backend.PathDown, Op: op, Backend: name, Text: "the backend is closed"}
}

func errMalformed(op, what string, peer backend.Peer) *backend.Error {
	return &backend.Error{
		Code: backend.BadRequest, Op: op, Backend: name, Peer: peer,
		Text: fmt.Sprintf("the %s is malformed, or of another version than %d", what, protocolVersion),
	}
}

func keys[K comparable](m map[K]struct{}) []K {
	list := make([]K, 0, len(m))
	for k := range m {
		list = append(list, k)
	}
	return list
}
