package xgmi

import (
	"context"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/samehost"
	"github.com/umbp/umbp/plugins/xgmi/shape"
)

// path is the way between two regions. It implements samehost.Path, and holds nothing.
type path struct {
	e             *engine
	near, far     *region
	nearAt, farAt uint64    // addresses
	devices       []*device // that the bytes lie on
	driver        *driver
}

// Join implements samehost.Mover.
func (e *engine) Join(ctx context.Context, near, far samehost.Region, target samehost.Target) (samehost.Path, error) {
	p, err := e.join(near.(*region), far.(*region))
	if err != nil {
		return nil, err
	}
	if e.settings.selfTest {
		if err := e.prove(ctx, p, target); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// join makes a path, which the near GPU copies over, if there is one, and else the far one. The far region may be that of
// another engine of this process, which has records of the devices for itself.
func (e *engine) join(near, far *region) (*path, error) {
	if far.e.rt.Library() != e.rt.Library() {
		return nil, backend.Errorf(backend.Unsupported, "the peer uses %s, and this end %s", far.e.rt.Library(), e.rt.Library())
	}
	p := &path{e: e, near: near, far: far}
	for _, r := range []*region{near, far} {
		if r.device == nil {
			continue
		}
		d := e.device(r.device.PCI)
		if d == nil {
			return nil, backend.Errorf(backend.Unsupported, "%s is not among those that this process uses: %s", r.device, e.places())
		}
		p.devices = append(p.devices, d)
	}
	switch err := p.lost(backend.Unsupported); {
	case err != nil:
		return nil, err
	case len(p.devices) == 0:
		return nil, backend.Errorf(backend.Unsupported, "both regions are host memory, and no GPU has a part in that: use another backend")
	case len(p.devices) == 2:
		if err := p.devices[0].reach(p.devices[1]); err != nil {
			return nil, err
		}
	}
	var err error
	if p.driver, err = p.devices[0].drive(); err != nil {
		return nil, err
	}
	p.nearAt, p.farAt = near.reach(), far.reach()
	return p, nil
}

// lost returns the error for those who want to use a path that a device has been lost from.
func (p *path) lost(code backend.Code) *backend.Error {
	for _, d := range p.devices {
		if why := d.lost.Load(); why != nil {
			return d.refusal(code, why)
		}
	}
	return nil
}

// move gives an order to the driver.
func (p *path) move(o order, op backend.Op, segments []backend.Segment, limits shape.Limits) {
	j := newJob(o, p, op, segments, limits)
	if j.err = p.lost(backend.PathDown); j.err != nil {
		j.finish()
		return
	}
	p.driver.add(j)
}

// Start implements samehost.Path.
func (p *path) Start(t *samehost.Transfer) { p.move(t, t.Op, t.Segments, p.e.limits()) }

// Stop implements samehost.Path.
func (p *path) Stop(*samehost.Transfer) { p.driver.lookForStopped() }

// Close implements samehost.Path.
func (p *path) Close() {}
