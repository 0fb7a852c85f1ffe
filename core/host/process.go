package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/rpc"
)

// Process is a backend that runs as a process of its own. It stays the same while the process behind it comes and goes:
// when the process dies, hangs or breaks the protocol, its supervisor makes sure that it is gone, ends what was in
// flight, and starts another one with the same options and regions. What was connected through the old one is down, as
// after any failure of a connection, and is connected anew.
//
// While no process runs, Register, Offer and Answer fail with PathDown; during a planned restart they wait for the next
// process. Deregister and Fence succeed without one: what has ended touches no memory.
type Process struct {
	spec        ProcessSpec
	cfg         backend.Config // without options
	options     map[string]string
	keysChanged func(backend.RegionID, []byte)
	log         backend.Logger
	launch      func(context.Context) (*instance, error)
	sockets     *socketDir

	ctx      context.Context // ends when Close begins
	cancel   context.CancelFunc
	requests chan request  // of planned restarts
	ended    chan struct{} // closed when the supervisor has ended
	closeErr error         // of the last process; readable when ended is closed

	info backend.Info // of the first instance

	mu      sync.Mutex
	state   State
	current *instance // that serves; nil while none does
	// While current is nil, waiting says that a planned restart is on its way, quiet that no process is alive that was
	// given memory, or is being given any, and cause why none serves.
	waiting, quiet bool
	cause          error
	changed        chan struct{} // closed, and replaced, when any of these change
	settled        time.Time     // when peers have heard of the death of the last process
	regions        map[backend.RegionID]*kept
}

// kept is a region as it is registered with each new process.
type kept struct {
	memory  backend.Memory // its FD is a duplicate of the host's
	key     []byte
	leaving bool // Deregister has begun: no process gets it any more
}

// instance is one process of the backend, connected.
type instance struct {
	client  client
	process process
	pid     int
	gate    gate
	born    time.Time

	failed chan struct{} // closed when it cannot go on
	fault  error         // why, if the process has not ended by itself; readable when failed is closed
}

// client is what a Process needs of rpc.Client.
type client interface {
	backend.Backend
	backend.Counter
	Ping(ctx context.Context) error
	Broken() <-chan struct{}
	Err() error
	Lost(cause error)
	InFlight() int
}

// process is what a Process needs of a plugin.
type process interface {
	done() <-chan struct{}
	stop(orderly bool)
	ended() *ExitError
	release()
}

// Phase says what a Process does.
type Phase string

// The phases.
const (
	Starting   Phase = "starting"   // for the first time
	Running    Phase = "running"    // it serves
	Restarting Phase = "restarting" // planned, or after a failure; perhaps in the pause before
	Down       Phase = "down"       // it has failed too often, or was closed; only Restart starts it again
)

// State is what is known of a Process.
type State struct {
	Phase    Phase
	PID      int       // of the process that runs; 0 while none does
	Version  string    // of the implementation that runs, or ran last
	Restarts int       // how many processes have followed the first one
	Reason   string    // why the last process ended, or the last start failed; empty if none has
	Since    time.Time // when the phase began
}

// openProcess starts the plugin and its supervisor. Options holds a text for each option of the plugin. An error that
// is not a *backend.Error says that the plugin does not start.
func openProcess(ctx context.Context, spec ProcessSpec, cfg backend.Config, options map[string]string, keysChanged func(backend.RegionID, []byte)) (*Process, error) {
	p := newProcess(spec, cfg, keysChanged)
	p.options = options
	var err error
	if p.sockets, err = newSocketDir(); err != nil {
		return nil, err
	}
	p.launch = p.launchPlugin
	if err := p.open(ctx); err != nil {
		return nil, err
	}
	return p, nil
}

func newProcess(spec ProcessSpec, cfg backend.Config, keysChanged func(backend.RegionID, []byte)) *Process {
	spec.Timing = spec.Timing.withDefaults()
	cfg.Options = backend.Values{}
	p := &Process{
		spec: spec, cfg: cfg, keysChanged: keysChanged, log: cfg.Log,
		requests: make(chan request), ended: make(chan struct{}),
		state:   State{Phase: Starting, Since: time.Now()},
		changed: make(chan struct{}),
		regions: make(map[backend.RegionID]*kept),
	}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

// open starts the supervisor, and returns when the first process serves or has failed.
func (p *Process) open(ctx context.Context) error {
	opened := make(chan error)
	go p.supervise(ctx, opened)
	err := <-opened
	if err != nil {
		<-p.ended
	}
	return err
}

// launchPlugin starts a process and opens its backend.
func (p *Process) launchPlugin(ctx context.Context) (*instance, error) {
	started, conn, err := startPlugin(ctx, &p.spec, p.sockets.path, p.log)
	if err != nil {
		return nil, err
	}
	client, err := rpc.Open(ctx, rpc.Options{
		Name: p.spec.Name, Conn: conn, Passage: started.passage, Config: p.cfg, RawOptions: p.options,
		CallTimeout: p.spec.Timing.Call, Stream: p.spec.Stream, Look: p.spec.Look,
	})
	if err != nil {
		started.stop(false)
		started.release()
		// What the backend itself says keeps its identity.
		end := started.ended()
		if end.Err = errors.Join(err, ctx.Err()); end.Status != "" || ctx.Err() != nil || backend.CodeOf(err) == backend.PathDown {
			err = end
		}
		return nil, err
	}
	return &instance{client: client, process: started, pid: started.pid}, nil
}

// State returns what is known of the process now.
func (p *Process) State() State {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state
}

// Restart ends the process and starts another one. Before that it waits a moment for the transfers in flight, while new
// ones are Busy. It returns when the new process serves, or why it does not: the supervisor then goes on trying, as
// after a crash. When the context ends first, the restart goes on.
func (p *Process) Restart(ctx context.Context) error {
	r := request{done: make(chan error, 1)}
	closed := &backend.Error{Code: backend.PathDown, Op: "restart", Backend: p.spec.Name, Text: "the backend is closed"}
	select {
	case p.requests <- r:
	case <-p.ended:
		return closed
	case <-ctx.Done():
		return &backend.Error{Code: backend.Cancelled, Op: "restart", Backend: p.spec.Name, Text: "the restart has not begun", Err: ctx.Err()}
	}
	select {
	case err := <-r.done:
		return err
	case <-p.ended:
		return closed
	case <-ctx.Done():
		return &backend.Error{Code: backend.Cancelled, Op: "restart", Backend: p.spec.Name, Text: "the restart goes on", Err: ctx.Err()}
	}
}

// Info implements backend.Backend. It tells of the first process; a later one has the same capabilities.
func (p *Process) Info() backend.Info { return p.info }

// serving returns the instance that serves. During a planned restart it waits for the next one.
func (p *Process) serving(ctx context.Context, op string) (*instance, error) {
	for {
		p.mu.Lock()
		current, waiting, changed, cause := p.current, p.waiting, p.changed, p.cause
		phase := p.state.Phase
		p.mu.Unlock()
		switch {
		case current != nil:
			return current, nil
		case !waiting:
			text := "the backend's process is being restarted"
			switch {
			case p.ctx.Err() != nil:
				text = "the backend is closed"
			case phase == Down:
				text = "the backend's process is down until it is restarted by hand"
			}
			return nil, &backend.Error{Code: backend.PathDown, Op: op, Backend: p.spec.Name, Text: text, Err: cause}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, &backend.Error{
				Code: backend.Cancelled, Op: op, Backend: p.spec.Name, Err: ctx.Err(),
				Text: "the backend's process is being restarted, as was asked for",
			}
		}
	}
}

// Register implements backend.Backend. The region is registered with every process to come, until Deregister.
func (p *Process) Register(ctx context.Context, m backend.Memory) ([]byte, error) {
	i, err := p.serving(ctx, "register")
	if err != nil {
		return nil, err
	}
	k := &kept{memory: m}
	if m.FD >= 0 {
		fd, err := unix.FcntlInt(uintptr(m.FD), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, &backend.Error{
				Code: backend.BadRequest, Op: "register", Backend: p.spec.Name, Region: m.Region, Err: err,
				Text: "duplicate descriptor " + strconv.Itoa(m.FD) + " of the memory",
			}
		}
		k.memory.FD = fd
	}
	if k.key, err = i.client.Register(ctx, m); err != nil {
		k.close()
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.current != i {
		k.close()
		return nil, &backend.Error{
			Code: backend.PathDown, Op: "register", Backend: p.spec.Name, Region: m.Region, Err: p.cause,
			Text: "the backend's process ended meanwhile: register again",
		}
	}
	p.regions[m.Region] = k
	return k.key, nil
}

func (k *kept) close() {
	if k.memory.FD >= 0 {
		unix.Close(k.memory.FD)
	}
}

// Deregister implements backend.Backend.
func (p *Process) Deregister(ctx context.Context, id backend.RegionID) error {
	p.mu.Lock()
	k := p.regions[id]
	if k != nil {
		k.leaving = true
	}
	p.mu.Unlock()
	err := p.calm(ctx, "deregister", func(i *instance) error { return i.client.Deregister(ctx, id) })
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil && k != nil && p.regions[id] == k { // or another Deregister was faster
		delete(p.regions, id)
		k.close()
	}
	return err
}

// Fence implements backend.Backend.
func (p *Process) Fence(ctx context.Context, peer backend.Peer) error {
	return p.calm(ctx, "fence", func(i *instance) error { return i.client.Fence(ctx, peer) })
}

// calm calls the instance that serves, to make memory quiet. When the process has ended, memory is as quiet as the call
// could have made it: calm waits until that is certain.
func (p *Process) calm(ctx context.Context, op string, call func(*instance) error) error {
	for {
		p.mu.Lock()
		current, quiet, changed := p.current, p.quiet, p.changed
		settling := time.Until(p.settled)
		p.mu.Unlock()
		var timer <-chan time.Time
		switch {
		case settling > 0:
			timer = time.After(settling)
		case quiet:
			return nil
		case current != nil:
			err := call(current)
			if backend.CodeOf(err) != backend.PathDown || current.client.Ping(ctx) == nil {
				return err
			}
			// The supervisor is about to see it, too. If it has already, changed is closed.
		}
		select {
		case <-timer:
		case <-changed:
		case <-ctx.Done():
			return &backend.Error{
				Code: backend.Cancelled, Op: op, Backend: p.spec.Name, Err: ctx.Err(),
				Text: "the backend's process is being ended or started: keep the memory out of use and try again",
			}
		}
	}
}

// Offer implements backend.Backend.
func (p *Process) Offer(ctx context.Context, peer backend.Peer) (backend.Handshake, error) {
	i, err := p.serving(ctx, "offer")
	if err != nil {
		return nil, err
	}
	h, err := i.client.Offer(ctx, peer)
	if err != nil {
		return nil, err
	}
	return gatedHandshake{h, &i.gate}, nil
}

// Answer implements backend.Backend.
func (p *Process) Answer(ctx context.Context, peer backend.Peer, offer []byte) ([]byte, error) {
	i, err := p.serving(ctx, "answer")
	if err != nil {
		return nil, err
	}
	return i.client.Answer(ctx, peer, offer)
}

// Counters implements backend.Counter. They begin anew with each process, and there are none while none runs.
func (p *Process) Counters() []backend.Count {
	p.mu.Lock()
	current := p.current
	p.mu.Unlock()
	if current == nil {
		return nil
	}
	return current.client.Counters()
}

// Close implements backend.Backend. It closes the backend and ends the process.
func (p *Process) Close() error {
	p.cancel()
	<-p.ended
	return p.closeErr
}

// socketDir is a folder for the sockets of one Process. Nobody else may enter it. Its lock says that its owner lives.
type socketDir struct {
	path string
	lock *os.File
}

// longestTemp is how long the path of the temporary folder may be, in bytes, for a socket's path to fit into an address.
const longestTemp = 40

func newSocketDir() (*socketDir, error) {
	temp := os.TempDir()
	if len(temp) > longestTemp {
		temp = "/tmp"
	}
	const pattern = "umbp-plugins-*"
	// Those of hosts that were killed.
	stale, _ := filepath.Glob(filepath.Join(temp, pattern))
	for _, path := range stale {
		if d, err := lockDir(path); err == nil {
			d.close()
		}
	}
	for {
		path, err := os.MkdirTemp(temp, pattern)
		if err != nil {
			return nil, fmt.Errorf("make a folder for the plugin's sockets: %w", err)
		}
		d, err := lockDir(path)
		if err == nil {
			return d, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, os.ErrNotExist) { // or somebody took it for a stale one
			return nil, fmt.Errorf("lock the folder for the plugin's sockets: %w", err)
		}
	}
}

// lockDir takes over a folder whose owner is dead.
func lockDir(path string) (*socketDir, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
		_, err = os.Stat(path) // removed meanwhile, perhaps
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &socketDir{path, f}, nil
}

func (d *socketDir) close() {
	os.RemoveAll(d.path)
	d.lock.Close()
}

// texts renders the values of all options.
func texts(schema []backend.Option, values backend.Values) map[string]string {
	m := make(map[string]string, len(schema))
	for _, o := range schema {
		switch o.Type {
		case backend.BoolOption:
			m[o.Name] = strconv.FormatBool(values.Bool(o.Name))
		case backend.IntOption:
			m[o.Name] = strconv.Itoa(values.Int(o.Name))
		case backend.SizeOption:
			m[o.Name] = backend.Size(values.Size(o.Name)).String()
		case backend.DurationOption:
			m[o.Name] = values.Duration(o.Name).String()
		default:
			m[o.Name] = values.String(o.Name)
		}
	}
	return m
}
