package xgmi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/gpu"
)

// examine looks at what the backend needs on this machine: the runtime, devices and links. It tests every pair of places
// with memory of its own.
func examine(ctx context.Context, s settings) []backend.Finding {
	e, err := openEngine(s, nil)
	if err != nil {
		return []backend.Finding{unusable(err)}
	}
	defer e.Close()
	batches := "with batches"
	if !e.rt.HasBatch() {
		batches = "without batches: many small copies go one by one"
	}
	findings := []backend.Finding{{Subject: "runtime", Text: fmt.Sprintf("%s %s (%s), %s", e.rt.Name(), e.rt.Version(), e.rt.Library(), batches)}}
	if e.rt.Simulated() {
		findings[0].Text += "; simulated"
	}
	for _, d := range e.rt.Devices() {
		f := backend.Finding{Subject: "device " + d.PCI, Text: fmt.Sprintf("number %d, %s, %s", d.Number, d.Name, backend.Size(d.Memory))}
		if e.device(d.PCI) == nil {
			f.Text += "; not used (option devices)"
		}
		findings = append(findings, f)
	}
	for _, near := range e.devices {
		findings = append(findings, e.examineLinks(ctx, near)...)
	}
	return findings
}

// unusable is the finding of an error that keeps the backend from working.
func unusable(err error) backend.Finding {
	f := backend.Finding{Subject: "runtime", State: backend.Problem, Text: err.Error()}
	if m, ok := errors.AsType[*gpu.Missing](err); ok {
		f.Remedy = m.Remedy
		for _, each := range m.Each {
			f.Remedy = strings.TrimPrefix(f.Remedy+"; or "+each.Remedy, "; or ")
		}
	}
	return f
}

// examineLinks looks at the ways that the device copies over, and tests them: those from its own memory, and the one from
// host memory to it. What is well is one finding, what is not one for each.
func (e *engine) examineLinks(ctx context.Context, near *device) []backend.Finding {
	c := backend.Capabilities{Links: e.links}
	ways := []pair{{near.PCI, ""}, {"", near.PCI}}
	for _, far := range e.devices {
		ways = append(ways, pair{near.PCI, far.PCI})
	}
	findings := []backend.Finding{{Subject: "links of " + near.PCI, Text: "self-test passed"}}
	var words []string
	for _, way := range ways {
		f := backend.Finding{Subject: "link " + cmp.Or(way.near, "host memory") + " to " + cmp.Or(way.far, "host memory")}
		link, ok := c.Link(way.near, way.far)
		if !ok {
			f.State, f.Text = backend.Warning, "no access: no bytes are moved between them"
			f.Remedy = "see whether the topology, an IOMMU or a virtual machine keeps the GPUs from each other"
			findings = append(findings, f)
			continue
		}
		failure, err := e.testPlaces(ctx, way)
		switch {
		case err != nil:
			f.State, f.Text = backend.Problem, link.Text+"; no self-test: "+err.Error()
		case failure != nil:
			f.State, f.Text = backend.Problem, link.Text+"; "+failure.Error()
			f.Remedy = "do not use the two together; see the driver's log, and whether an IOMMU redirects what goes between them"
		default:
			words = append(words, fmt.Sprintf("%s (%s)", strings.TrimPrefix(f.Subject, "link "), link.Text))
			continue
		}
		findings = append(findings, f)
	}
	if len(words) == 0 {
		return findings[1:]
	}
	findings[0].Text += ": " + strings.Join(words, ", ")
	return findings
}

// testPlaces runs a self-test between two places of this process.
func (e *engine) testPlaces(ctx context.Context, places pair) (failure *backend.Error, err error) {
	far, err := e.newScratch(places.far)
	if err != nil {
		return nil, err
	}
	defer far.Close()
	return e.test(ctx, places, localEnd{far})
}

// localEnd is the far scratch of a self-test within one process.
type localEnd struct{ *scratch }

func (l localEnd) fill(_ context.Context, seed uint64) (*region, error) {
	return l.region, l.store(pattern(seed))
}

func (l localEnd) check(_ context.Context, seed uint64) (*wrongByte, error) {
	got, err := l.load()
	if err != nil {
		return nil, err
	}
	return compare(got, pattern(seed)), nil
}
