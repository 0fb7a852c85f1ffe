package core

import (
	"context"
	"time"

	"github.com/umbp/umbp/core/host"
	"github.com/umbp/umbp/plugin-sdk/backend"
)

// BackendState is one configured backend, as it is at a moment.
type BackendState struct {
	Name string
	// Info is nil where the backend is not to be had in this process.
	Info *backend.Info
	// Reason says why the backend is not to be had, or what has become of the last process that it ran in.
	Reason   string
	Disabled bool // by the operator
	// Process is nil where the backend is linked in, or is not to be had.
	Process *host.State
}

// BackendStates returns the state of each configured backend, in the order of the configuration.
func (e *Engine) BackendStates() []BackendState {
	states := make([]BackendState, len(e.backends))
	for i := range e.backends {
		states[i] = stateOf(&e.backends[i])
		states[i].Disabled = !e.selector.Enabled(i)
	}
	return states
}

func stateOf(b *host.Backend) BackendState {
	s := BackendState{Name: b.Name}
	if b.Backend == nil {
		s.Reason = b.Err.Error()
		return s
	}
	info := b.Backend.Info()
	if b.Process != nil {
		state := b.Process.State()
		s.Process, s.Reason, info.Version = &state, state.Reason, state.Version
	}
	s.Info = &info
	return s
}

// RestartBackend ends the process of a backend, once what is under way has ended or has had its time, and starts
// another. It returns when that one serves, or why it does not. A restart that has begun goes on when ctx ends.
func (e *Engine) RestartBackend(ctx context.Context, name string) error {
	i := e.find(name)
	if i < 0 {
		return e.unknownBackend(name)
	}
	b := &e.backends[i]
	refuse := func(text string) error {
		return &backend.Error{Code: backend.BadRequest, Op: "restart", Backend: name, Peer: e.self, Text: text, Err: b.Err}
	}
	switch {
	case b.Backend == nil:
		return refuse("it was not to be had when this node started; restart the node once it is")
	case b.Process == nil:
		return refuse("it is linked into this node, and has no process of its own: restart the node, or run the backend with mode: process")
	}
	err := b.Process.Restart(ctx)
	e.selector.Restarted(i)
	return err
}

// drainTimeout bounds the wait for the transfers that are under way by a backend that is disabled.
const drainTimeout = 10 * time.Second

// SetBackendEnabled says whether a backend may be used, until the process ends. One that is disabled is not chosen
// any more, here and for new connections of peers. What this process has under way on its connections is waited for,
// for no longer than ten seconds or until ctx ends; what is left then, is tried another way. Connections that peers have
// made stay until the peers give them up.
func (e *Engine) SetBackendEnabled(ctx context.Context, name string, enabled bool) error {
	i := e.find(name)
	if i < 0 {
		return e.unknownBackend(name)
	}
	select {
	case e.operating <- struct{}{}:
		defer func() { <-e.operating }()
	case <-ctx.Done():
		return ended(ctx)
	}
	if enabled {
		e.dispatcher.Enable(i)
		e.selector.SetEnabled(i, true)
		return nil
	}
	e.selector.SetEnabled(i, false)
	draining, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	e.dispatcher.Disable(draining, i)
	return nil
}

func (e *Engine) unknownBackend(name string) error {
	var names []string
	for _, b := range e.backends {
		names = append(names, b.Name)
	}
	return backend.Errorf(backend.BadRequest, "node %s has no backend %q%s", e.self.Node, name, backend.DidYouMean(name, names))
}
