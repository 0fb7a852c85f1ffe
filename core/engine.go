package core

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/umbp/umbp/core/dispatch"
	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/core/peer"
	"github.com/umbp/umbp/core/region"
	"github.com/umbp/umbp/core/selector"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// EngineOptions says how an Engine works. Node and Backends are required.
type EngineOptions struct {
	Node     string // name of the process, unique in the cluster
	Backends []host.Spec
	Rules    []selector.Rule // the selection policy
	// Credentials authenticate the connections of the backends; Insecure lets them listen beyond the host without.
	Credentials *backend.Credentials
	Insecure    bool
	// ConnectTimeout, QuietTimeout and Attempts are those of dispatch.Options; zero takes the defaults.
	ConnectTimeout, QuietTimeout time.Duration
	Attempts                     int
	Log                          backend.Logger // may be nil
}

// Engine is one process's share in moving bytes: its backends, its regions, its connections. A node and a client
// in one process may share an engine. Safe for concurrent use.
type Engine struct {
	self       backend.Peer
	backends   []host.Backend
	regions    *region.Table
	selector   *selector.Selector
	dispatcher *dispatch.Dispatcher
	log        backend.Logger

	// operating is held by the one who enables or disables a backend.
	operating chan struct{}

	mu    sync.Mutex
	peers map[backend.Peer][]*Answerer // those added, and not removed
	keys  sync.Mutex                   // orders the keys that backends give, first and later
}

// Answerer carries a backend's offer to the peer that it stands for. Every peer.Service is one.
type Answerer interface {
	Answer(ctx context.Context, req *peer.AnswerRequest) (*peer.AnswerReply, error)
}

// NewEngine opens the backends and draws an incarnation. The context bounds opening only.
func NewEngine(ctx context.Context, opts EngineOptions) (*Engine, error) {
	if opts.Node == "" {
		return nil, errors.New("an engine needs the name of its node")
	}
	var names []string
	for _, spec := range opts.Backends {
		names = append(names, spec.Name())
	}
	if err := selector.Validate(opts.Rules, names); err != nil {
		return nil, fmt.Errorf("selection policy: %w", err)
	}
	e := &Engine{
		self:      backend.Peer{Node: opts.Node, Incarnation: region.NewIncarnation(), Host: region.HostID()},
		regions:   region.NewTable(),
		peers:     make(map[backend.Peer][]*Answerer),
		log:       opts.Log,
		operating: make(chan struct{}, 1),
	}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	var err error
	e.backends, err = host.Open(ctx, backend.Config{
		Self: e.self, Credentials: opts.Credentials, Insecure: opts.Insecure, Log: opts.Log,
	}, e.withKeys(opts.Backends))
	if err != nil {
		return nil, err
	}
	known := make([]selector.Backend, len(e.backends))
	ways := make([]dispatch.Backend, len(e.backends))
	for i, b := range e.backends {
		known[i] = selector.Backend{Name: b.Name, Unavailable: b.Err}
		ways[i] = dispatch.Backend{Name: b.Name, Backend: b.Backend}
		if b.Backend != nil {
			known[i].Info = b.Backend.Info()
		}
	}
	e.selector = selector.New(e.self, known, opts.Rules)
	e.dispatcher = dispatch.New(dispatch.Options{
		Backends: ways, Select: e.selector, Carry: e.carry, Log: opts.Log,
		ConnectTimeout: opts.ConnectTimeout, QuietTimeout: opts.QuietTimeout, Attempts: opts.Attempts,
	})
	return e, nil
}

// Self returns the identity of the process.
func (e *Engine) Self() backend.Peer { return e.self }

// Backends lists the configured backends, with the reason for each that is not to be had.
func (e *Engine) Backends() []host.Backend { return e.backends }

// SetRules replaces the selection policy for groups that are planned from now on.
func (e *Engine) SetRules(rules []selector.Rule) error {
	names := make([]string, len(e.backends))
	for i, b := range e.backends {
		names[i] = b.Name
	}
	if err := selector.Validate(rules, names); err != nil {
		return fmt.Errorf("selection policy: %w", err)
	}
	e.selector.SetPolicy(rules)
	return nil
}

// SetAttempts changes how often one backend is tried for a group whose connection breaks; zero takes the default.
func (e *Engine) SetAttempts(n int) { e.dispatcher.SetAttempts(n) }

// Outages lists the paths that are not chosen at present because connecting failed.
func (e *Engine) Outages() []selector.Outage { return e.selector.Outages(time.Now()) }

// Counters returns what the named backend has carried, or nil for an unknown name.
func (e *Engine) Counters(name string) *dispatch.Counters {
	if i := e.find(name); i >= 0 {
		return e.dispatcher.Counters(i)
	}
	return nil
}

// Register makes memory usable for transfers, and returns the region as it is from then on. The region given says
// what the memory is; it must not be used afterwards. A backend that does not claim memory of that kind is not asked. One
// that cannot use the memory leaves no key, and is not chosen for it; when no backend can, the region is refused with all
// their reasons. A backend whose process is being started anew is waited for, a few seconds long; one that is down then,
// will not use the region either when it is up again. The memory must stay mapped, or allocated where it is a GPU's, until
// Deregister has returned.
func (e *Engine) Register(ctx context.Context, r *region.Region) (*region.Region, error) {
	if err := e.regions.Add(r); err != nil {
		return nil, err
	}
	id := r.ID
	var absent, refusals []error
	registered := false
	for _, b := range e.backends {
		if b.Backend == nil {
			absent = append(absent, fmt.Errorf("%s is not to be had: %w", b.Name, b.Err))
			continue
		}
		if caps := b.Backend.Info().Capabilities; !caps.Local.Has(r.Kind) && !caps.Remote.Has(r.Kind) {
			absent = append(absent, &backend.Error{Code: backend.Unsupported, Op: "register", Backend: b.Name, Region: id,
				Text: fmt.Sprintf("memory of kind %s is not claimed", r.Kind)})
			continue
		}
		key, err := registerWith(ctx, &b, r.Memory())
		if err != nil {
			refusals = append(refusals, fmt.Errorf("register region %d with %s: %w", id, b.Name, err))
			continue
		}
		registered = true
		e.setFirstKey(id, b.Name, key)
	}
	if !registered {
		e.regions.Remove(id)
		return nil, errors.Join(append(slices.Concat(refusals, absent), errors.New("no backend can use the memory"))...)
	}
	for _, err := range refusals {
		e.log.Warn("a backend cannot use a region, and will not be chosen for it", "error", err)
	}
	r, _ = e.regions.Get(id)
	r.Open()
	return r, nil
}

// Deregister ends the use of a region by this process and by peers: transfers are cancelled, and calls that use the
// memory waited for. When it returns nil, nothing touches the memory any more.
func (e *Engine) Deregister(ctx context.Context, id backend.RegionID) error {
	r, ok := e.regions.Get(id)
	if !ok {
		return nil
	}
	r.Close()
	e.dispatcher.ForgetRegion(id)
	if err := r.Drained(ctx); err != nil {
		return err
	}
	var errs []error
	for _, b := range e.backends {
		if _, registered := r.Keys[b.Name]; registered {
			if err := b.Backend.Deregister(ctx, id); err != nil {
				errs = append(errs, fmt.Errorf("deregister region %d from %s: %w", id, b.Name, err))
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	e.regions.Remove(id)
	return nil
}

// How long, and how often, Register asks a backend whose process is being started anew.
const (
	registerPatience = 5 * time.Second
	registerPause    = 20 * time.Millisecond
)

func registerWith(ctx context.Context, b *host.Backend, m backend.Memory) (key []byte, err error) {
	for deadline := time.Now().Add(registerPatience); ; {
		key, err = b.Backend.Register(ctx, m)
		if backend.CodeOf(err) != backend.PathDown || b.Process == nil || b.Process.State().Phase == host.Down || time.Now().After(deadline) {
			return key, err
		}
		select {
		case <-time.After(registerPause):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// setFirstKey records the key that Register has returned. A key that is there already is younger: the backend has been
// started anew meanwhile.
func (e *Engine) setFirstKey(id backend.RegionID, backendName string, key []byte) {
	e.keys.Lock()
	defer e.keys.Unlock()
	if r, ok := e.regions.Get(id); ok {
		if _, younger := r.Keys[backendName]; !younger {
			e.regions.SetKey(id, backendName, key)
		}
	}
}

// withKeys has the backends tell of the keys that regions get when a backend's process is started anew.
func (e *Engine) withKeys(specs []host.Spec) []host.Spec {
	specs = slices.Clone(specs)
	for i := range specs {
		name := specs[i].Name()
		specs[i].KeysChanged = func(id backend.RegionID, key []byte) {
			e.keys.Lock()
			defer e.keys.Unlock()
			e.regions.SetKey(id, name, key)
		}
	}
	return specs
}

// Answer is the target's half of connecting a backend. The reply has the keys of all regions that give peers rights:
// whoever carries it to a peer that is to reach some of them only takes the others out.
func (e *Engine) Answer(ctx context.Context, from backend.Peer, backendName string, offer []byte) (*peer.AnswerReply, error) {
	refuse := func(code backend.Code, text string) (*peer.AnswerReply, error) {
		return nil, &backend.Error{Code: code, Op: "answer", Backend: backendName, Peer: e.self, Text: text}
	}
	i := e.find(backendName)
	switch {
	case i < 0 || e.backends[i].Backend == nil:
		return refuse(backend.Unsupported, "this process has no such backend")
	case !e.selector.Enabled(i): // the peer takes another way, where its policy allows one, and tries again later
		return refuse(backend.PathDown, selector.Disabled)
	}
	answer, err := e.backends[i].Backend.Answer(ctx, from, offer)
	if err != nil {
		return nil, err
	}
	// The keys are looked up when the answer is there: those of a younger instance than the one that gave it do no harm,
	// since nothing can be established with that any more.
	reply := &peer.AnswerReply{Answer: answer, Keys: make(map[backend.RegionID][]byte)}
	for _, r := range e.regions.All() {
		if key, registered := r.Keys[backendName]; registered && r.Rights != 0 {
			reply.Keys[r.ID] = key
		}
	}
	return reply, nil
}

// find returns the number of the backend of that name, or -1.
func (e *Engine) find(name string) int {
	return slices.IndexFunc(e.backends, func(b host.Backend) bool { return b.Name == name })
}

// Fence returns nil when nothing that the peer posted before can touch this process's memory any more.
func (e *Engine) Fence(ctx context.Context, p backend.Peer) error {
	var errs []error
	for _, b := range e.backends {
		if b.Backend != nil {
			if err := b.Backend.Fence(ctx, p); err != nil {
				errs = append(errs, fmt.Errorf("fence %s over %s: %w", p, b.Name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// AddPeer tells how to reach a peer's Answer, until the function returned is called. Transfers can go to peers that
// have been added, and to the process itself. Several users of the engine may add the same peer; when the last one
// has removed it, its endpoints are closed, and transfers to it fail. Removing twice does nothing.
func (e *Engine) AddPeer(p backend.Peer, a Answerer) (remove func()) {
	way := &a
	e.mu.Lock()
	defer e.mu.Unlock()
	e.peers[p] = append(e.peers[p], way)
	return func() { e.removePeer(p, way) }
}

func (e *Engine) removePeer(p backend.Peer, way *Answerer) {
	e.mu.Lock()
	ways := e.peers[p]
	if i := slices.Index(ways, way); i >= 0 {
		ways = slices.Delete(ways, i, i+1)
		e.peers[p] = ways
	}
	if len(ways) == 0 {
		delete(e.peers, p)
	}
	e.mu.Unlock()
	if len(ways) == 0 && p != e.self {
		e.dispatcher.Forget(p)
	}
}

// carry is the dispatcher's dispatch.Carry.
func (e *Engine) carry(ctx context.Context, to backend.Peer, backendName string, offer []byte) (
	answer []byte, keys map[backend.RegionID][]byte, err error,
) {
	reply, err := e.askPeer(ctx, to, backendName, offer)
	if err != nil {
		return nil, nil, err
	}
	return reply.Answer, reply.Keys, nil
}

func (e *Engine) askPeer(ctx context.Context, to backend.Peer, backendName string, offer []byte) (*peer.AnswerReply, error) {
	if to == e.self {
		return e.Answer(ctx, e.self, backendName, offer)
	}
	var way *Answerer
	e.mu.Lock()
	if ways := e.peers[to]; len(ways) > 0 {
		way = ways[len(ways)-1]
	}
	e.mu.Unlock()
	if way == nil {
		return nil, &backend.Error{Code: backend.PeerGone, Op: "connect", Backend: backendName, Peer: to,
			Text: "no such peer is known"}
	}
	return (*way).Answer(ctx, &peer.AnswerRequest{From: e.self, To: to.Incarnation, Backend: backendName, Offer: offer})
}

// Close ends the connections and closes the backends. Regions must not be used any more.
func (e *Engine) Close() error {
	e.dispatcher.Close()
	return host.Close(e.backends)
}
