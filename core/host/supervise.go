package host

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

const (
	// maxFailures is how many starts may fail in a row.
	maxFailures = 5
	// drainStep is how often a planned restart looks whether anything is in flight.
	drainStep = time.Millisecond
	// settling is how long after the death of a process peers may still touch memory, where the backend lends peers
	// the memory itself. They hear of the death from the kernel, and let go at once.
	settling = time.Second
)

// request is one for a planned restart.
type request struct {
	done chan error // takes one
}

// supervise starts the first process, and another one whenever one has ended, until Close. It does so on one thread,
// because the kernel kills a plugin when the thread that started it ends.
func (p *Process) supervise(opening context.Context, opened chan<- error) {
	defer close(p.ended)
	defer p.cleanUp()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	i, err := p.start(opening)
	if err == nil {
		p.info = i.client.Info()
		p.publish(i)
	}
	opened <- err
	pauses := pauses{timing: p.spec.Timing}
	for i != nil {
		planned := p.attend(i)
		err := p.end(i, planned != nil)
		if p.ctx.Err() != nil {
			p.closeErr = err
			return
		}
		if planned == nil {
			pauses.died(time.Since(i.born))
		}
		i = p.replace(&pauses, planned)
	}
}

// cleanUp frees what is left when no process will follow.
func (p *Process) cleanUp() {
	p.cancel()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range p.regions {
		k.close()
	}
	clear(p.regions)
	p.cause, p.quiet, p.waiting = nil, true, false
	p.change(Down, "")
	if p.sockets != nil {
		p.sockets.close()
	}
}

// change enters a phase, and wakes those who wait for it. The caller holds mu.
func (p *Process) change(phase Phase, reason string) {
	if phase != p.state.Phase {
		p.state.Phase, p.state.Since = phase, time.Now()
	}
	if phase != Running {
		p.state.PID = 0
	}
	if reason != "" {
		p.state.Reason = reason
	}
	close(p.changed)
	p.changed = make(chan struct{})
}

// start launches an instance and brings it to where the last one was. It does not publish it.
func (p *Process) start(ctx context.Context) (*instance, error) {
	ctx, cancel := context.WithTimeout(ctx, p.spec.Timing.Start)
	defer cancel()
	i, err := p.launch(ctx)
	if err != nil {
		return nil, err
	}
	i.born, i.failed = time.Now(), make(chan struct{})
	if err = p.replay(ctx, i); err == nil {
		return i, nil
	}
	i.process.stop(false)
	end := i.process.ended()
	end.Err = errors.Join(err, ctx.Err())
	i.client.Lost(end)
	i.process.release()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.quiet = true
	p.change(p.state.Phase, "")
	return nil, end
}

// errChanged says that there is no use in starting the plugin again.
var errChanged = errors.New("the plugin's file was exchanged, or a device has come or gone, and it has other capabilities: restart umbp to use it")

// replay registers the regions with a new instance.
func (p *Process) replay(ctx context.Context, i *instance) error {
	if p.info.Name == "" { // this is the first
		return nil
	}
	if !reflect.DeepEqual(i.client.Info().Capabilities, p.info.Capabilities) {
		return errChanged
	}
	p.mu.Lock()
	p.quiet = false
	regions := maps.Clone(p.regions)
	maps.DeleteFunc(regions, func(_ backend.RegionID, k *kept) bool { return k.leaving })
	p.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(regions)) {
		k := regions[id]
		key, err := i.client.Register(ctx, k.memory)
		if err != nil {
			return fmt.Errorf("register region %d again: %w", id, err)
		}
		if !slices.Equal(key, k.key) {
			k.key = key // only the supervisor uses it after Register
			if p.keysChanged != nil {
				p.keysChanged(id, key)
			}
		}
	}
	return nil
}

// publish makes an instance the one that serves.
func (p *Process) publish(i *instance) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state.Phase != Starting {
		p.state.Restarts++
	}
	p.current, p.waiting, p.quiet, p.cause = i, false, false, nil
	p.change(Running, "")
	p.state.PID, p.state.Version = i.pid, i.client.Info().Version
	p.log.Info("the process of a backend serves", "backend", p.spec.Name, "pid", i.pid, "version", p.state.Version)
}

// attend returns when the instance has failed, when a restart is asked for, which it returns, or when Close has begun.
func (p *Process) attend(i *instance) *request {
	go p.watch(i)
	select {
	case <-i.failed:
	case <-p.ctx.Done():
	case r := <-p.requests:
		return &r
	}
	return nil
}

// watch notices when an instance cannot go on, and says so once.
func (p *Process) watch(i *instance) {
	ctx, cancel := context.WithCancel(context.Background())
	var pinging sync.WaitGroup
	defer pinging.Wait()
	defer cancel()
	defer close(i.failed)

	answers := make(chan error, 1)
	next := time.NewTimer(p.spec.Timing.Ping)
	defer next.Stop()
	for {
		select {
		case <-i.process.done():
			return
		case <-i.client.Broken():
			i.fault = i.orEnd(i.client.Err())
			return
		case <-next.C:
			pinging.Go(func() {
				ctx, cancel := context.WithTimeout(ctx, p.spec.Timing.PingTimeout)
				defer cancel()
				answers <- i.client.Ping(ctx)
			})
		case err := <-answers:
			if err != nil {
				i.fault = i.orEnd(fmt.Errorf("it gave no sign of life within %s: %w", p.spec.Timing.PingTimeout, err))
				return
			}
			next.Reset(p.spec.Timing.Ping)
		}
	}
}

// dyingTime is how long a process takes at most, once it has begun to end and its sockets are closed: a driver may have
// much to free, and the machine be busy.
const dyingTime = time.Second

// orEnd returns what is wrong with an instance, or nil when that was only the first sign of the end of its process.
func (i *instance) orEnd(fault error) error {
	if backend.CodeOf(fault) != backend.PathDown {
		return fault
	}
	timer := time.NewTimer(dyingTime)
	defer timer.Stop()
	select {
	case <-i.process.done():
		return nil
	case <-timer.C:
		return fault
	}
}

func (i *instance) hasFailed() bool {
	select {
	case <-i.failed:
		return true
	default:
		return false
	}
}

// errRestart is why endpoints are down after a planned restart, and after Close.
var errRestart = errors.New("the backend's process was closed")

// end ends an instance and whatever is still in flight on it. Where Close or a planned restart wants it, and the instance
// can, that is done in order: what is in flight before a planned restart may finish, and the backend is closed. The error
// is the backend's, or why it could not be closed.
func (p *Process) end(i *instance, planned bool) (err error) {
	p.mu.Lock()
	p.current, p.waiting = nil, planned
	p.change(Restarting, "")
	p.mu.Unlock()

	closing := planned || p.ctx.Err() != nil
	if planned {
		i.gate.shut.Store(true)
		p.drain(i)
	}
	var closed chan error
	orderly := false
	if closing && !i.hasFailed() {
		closed = make(chan error, 1)
		go func() { closed <- i.client.Close() }()
		timer := time.NewTimer(p.spec.Timing.Stop)
		defer timer.Stop()
		select {
		case err = <-closed:
			orderly = true
		case <-i.failed:
			// A process may end as soon as it has answered, and be seen to before its answer is.
			late := time.NewTimer(dyingTime)
			defer late.Stop()
			select {
			case err = <-closed:
				orderly = true
			case <-late.C:
			}
		case <-timer.C:
		}
	}
	i.process.stop(orderly)
	<-i.failed
	cause := errRestart
	if !orderly {
		end := i.process.ended()
		if end.Status == "" { // or what else was wrong followed from its end
			end.Err = i.fault
			if end.Err == nil {
				end.Err = fmt.Errorf("it did not close the backend within %s", p.spec.Timing.Stop)
			}
		}
		cause, err = end, end
	}
	i.client.Lost(cause)
	i.gate.shut.Store(false) // from here on the client refuses what is new
	i.process.release()
	if closed != nil && !orderly {
		<-closed
	}
	if err != nil {
		p.log.Warn("the process of a backend has failed", "backend", p.spec.Name, "pid", i.pid, "error", err)
	}

	p.mu.Lock()
	defer p.mu.Unlock()
	p.quiet, p.cause = true, cause
	if caps := &p.info.Capabilities; err != nil && (caps.NeedsFD || caps.Reach == backend.SameHost) {
		p.settled = time.Now().Add(settling)
	}
	p.change(Restarting, cause.Error())
	return err
}

// drain waits until nothing is in flight, but not for ever.
func (p *Process) drain(i *instance) {
	step := time.NewTicker(drainStep)
	defer step.Stop()
	timer := time.NewTimer(p.spec.Timing.Drain)
	defer timer.Stop()
	for i.gate.posting.Load() > 0 || i.client.InFlight() > 0 {
		select {
		case <-step.C:
		case <-timer.C:
			p.log.Warn("transfers are cut off by a restart that was asked for", "backend", p.spec.Name, "transfers", i.client.InFlight())
			return
		case <-i.failed:
			return
		case <-p.ctx.Done():
			return
		}
	}
}

// replace starts instances until one serves, or Close has begun: it returns nil then.
func (p *Process) replace(pauses *pauses, planned *request) *instance {
	for {
		if planned == nil {
			planned = p.pause(pauses)
		}
		if p.ctx.Err() != nil {
			return nil
		}
		if planned != nil {
			pauses.reset()
		}
		p.mu.Lock()
		p.waiting = planned != nil
		p.change(Restarting, "")
		p.mu.Unlock()
		i, err := p.start(p.ctx)
		if err == nil {
			p.publish(i)
		} else {
			p.failed(err, pauses)
		}
		if planned != nil {
			planned.done <- err
			planned = nil
		}
		if i != nil {
			return i
		}
	}
}

// failed notes that a start has failed.
func (p *Process) failed(err error, pauses *pauses) {
	pauses.failures++
	var end *ExitError
	if !errors.As(err, &end) {
		err = errors.New(err.Error()) // like an ExitError, it lends no identity to the calls that fail for it
	} else if errors.Is(end.Err, errChanged) {
		pauses.failures = maxFailures
	}
	p.log.Warn("the process of a backend did not start", "backend", p.spec.Name, "error", err)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waiting, p.cause = false, err
	p.change(Restarting, err.Error())
}

// pause waits until it is time for the next start, for ever if there have been enough, or until a restart is asked for,
// which it returns.
func (p *Process) pause(pauses *pauses) *request {
	var over <-chan time.Time
	if d, more := pauses.next(); more {
		timer := time.NewTimer(d)
		defer timer.Stop()
		over = timer.C
	} else {
		p.mu.Lock()
		p.change(Down, "")
		p.log.Error("the process of a backend is down: restart it when the reason is gone", "backend", p.spec.Name, "reason", p.state.Reason)
		p.mu.Unlock()
	}
	select {
	case <-over:
		return nil
	case r := <-p.requests:
		return &r
	case <-p.ctx.Done():
		return nil
	}
}

// pauses says how long to wait before the next start.
type pauses struct {
	timing   Timing
	failures int // starts in a row that failed, or whose process died young
	last     time.Duration
}

// died notes that a process has died, and how old.
func (b *pauses) died(age time.Duration) {
	switch {
	case age >= b.timing.Healthy:
		b.reset()
	case age >= b.timing.Young:
		b.failures = 0
	default:
		b.failures++
	}
}

func (b *pauses) reset() { b.failures, b.last = 0, 0 }

// next returns the pause before the next start, and false when there have been enough.
func (b *pauses) next() (time.Duration, bool) {
	b.last = min(max(2*b.last, b.timing.FirstPause), b.timing.LongPause)
	return b.last, b.failures < maxFailures
}
