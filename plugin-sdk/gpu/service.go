package gpu

import (
	"runtime"
	"sync"
)

// noDevice stands for the calls that are made for no device, and on a thread without one.
const noDevice = -1

// job is a call for a service, and where its error goes.
type job struct {
	do   func(c *Context) error
	done chan<- error
}

// on runs f on the thread of a device, and returns what it returned.
func (r *Runtime) on(device int, f func(c *Context) error) error {
	s, err := r.service(device)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	select {
	case s <- job{do: f, done: done}:
		return <-done // what a service has taken, it answers
	case <-r.closed:
		return errClosed
	}
}

// service returns the way to the goroutine of a device, and starts it where there is none.
func (r *Runtime) service(device int) (chan<- job, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case <-r.closed:
		return nil, errClosed
	default:
	}
	if s, ok := r.services[device]; ok {
		return s, nil
	}
	jobs := make(chan job)
	bound := make(chan error)
	r.ended.Go(func() {
		c := &Context{r: r, device: device}
		err := c.bind()
		bound <- err
		if err != nil {
			return
		}
		for {
			select {
			case j := <-jobs:
				j.done <- j.do(c)
			case <-r.closed:
				return
			}
		}
	})
	if err := <-bound; err != nil {
		return nil, err // the next call tries again
	}
	r.services[device] = jobs
	return jobs, nil
}

// aside runs f on a thread that ends with it.
func aside(f func()) {
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		f()
	})
	wg.Wait()
}
