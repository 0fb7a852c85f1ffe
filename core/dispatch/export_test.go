package dispatch

// Queued returns how many groups wait for the windows of endpoints.
func Queued(d *Dispatcher) (n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range d.endpoints {
		if p.done() && p.err == nil {
			p.value.mu.Lock()
			n += p.value.queued
			p.value.mu.Unlock()
		}
	}
	return n
}

// Cancelled tells whether the job's groups are being cancelled.
func Cancelled(j *Job) bool { return j.cancelled.Load() }
