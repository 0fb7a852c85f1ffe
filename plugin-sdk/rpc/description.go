package rpc

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Description is what "umbp-plugin-X describe" prints, as JSON: what is known of a plugin without opening its backend.
// Fields are only added.
type Description struct {
	Name             string `json:"name"`
	Version          string `json:"version,omitempty"` // of the implementation; empty when only opening tells
	ProtocolVersions []int  `json:"protocol_versions"`
	// Capabilities are those with default options; nil when only opening tells.
	Capabilities *DescribedCapabilities `json:"capabilities,omitempty"`
	Options      []DescribedOption      `json:"options"`
	// Examines says that "umbp-plugin-X examine" prints findings.
	Examines bool `json:"examines,omitempty"`
}

// DescribedCapabilities are backend.Capabilities in words.
type DescribedCapabilities struct {
	Ops       []string `json:"ops"`    // write, read
	Local     []string `json:"local"`  // host, gpu
	Remote    []string `json:"remote"` // host, gpu
	Reach     string   `json:"reach"`  // same process, same host, network
	NeedsFD   bool     `json:"needs_fd"`
	Window    int      `json:"window"`
	Simulated bool     `json:"simulated"`
	// Links are absent where the backend moves bytes between all places.
	Links []DescribedLink `json:"links,omitzero"`
	// Limits of one transfer, the last two in bytes; zero means none.
	LimitSegments      int    `json:"limit_segments"`
	LimitSegmentBytes  uint64 `json:"limit_segment_bytes"`
	LimitTransferBytes uint64 `json:"limit_transfer_bytes"`
}

// DescribedLink is a backend.Link.
type DescribedLink struct {
	Near string `json:"near"` // PCI address of a GPU; empty for the memory of the host
	Far  string `json:"far"`
	Cost int    `json:"cost"`
	Text string `json:"text,omitempty"`
}

// DescribedOption is a backend.Option.
type DescribedOption struct {
	Name    string             `json:"name"`
	Type    backend.OptionType `json:"type"`
	Default string             `json:"default"`
	Min     string             `json:"min,omitempty"`
	Max     string             `json:"max,omitempty"`
	Choices []string           `json:"choices,omitempty"`
	Help    string             `json:"help,omitempty"`
}

// Describe describes the backend of a factory.
func Describe(f backend.Factory) Description {
	d := Description{Name: f.Name, ProtocolVersions: ProtocolVersions, Options: []DescribedOption{}, Examines: f.Examine != nil}
	for _, o := range f.Options {
		d.Options = append(d.Options, DescribedOption(o))
	}
	if f.Info == nil {
		return d
	}
	d.Version = f.Info.Version
	c := f.Info.Capabilities
	d.Capabilities = &DescribedCapabilities{
		Ops: []string{}, Local: kindWords(c.Local), Remote: kindWords(c.Remote), Reach: c.Reach.String(), NeedsFD: c.NeedsFD,
		Window: c.Window, Simulated: c.Simulated, LimitSegments: c.Limits.Segments, LimitSegmentBytes: c.Limits.SegmentBytes,
		LimitTransferBytes: c.Limits.TransferBytes,
	}
	if c.Links != nil {
		d.Capabilities.Links = []DescribedLink{}
	}
	for _, l := range c.Links {
		d.Capabilities.Links = append(d.Capabilities.Links, DescribedLink(l))
	}
	for _, op := range []backend.Op{backend.Write, backend.Read} {
		if c.Ops&op != 0 {
			d.Capabilities.Ops = append(d.Capabilities.Ops, op.String())
		}
	}
	return d
}

func kindWords(kinds backend.MemoryKindSet) []string {
	words := []string{}
	for _, k := range []backend.MemoryKind{backend.HostMemory, backend.GPUMemory} {
		if kinds.Has(k) {
			words = append(words, k.String())
		}
	}
	return words
}

// Limits of a description that ParseDescription reads.
const (
	MaxDescription  = 1 << 20 // bytes
	maxDescribed    = 1000    // options, choices of one, protocol versions
	maxNameLength   = 64
	maxOptionLength = 4096 // bytes of each text of an option
)

// ParseDescription reads what a plugin has printed. It is untrusted: the result has a valid name, at least one protocol
// version, and a schema of options that works. Fields that are not known are ignored.
func ParseDescription(text []byte) (Description, error) {
	fault := func(format string, args ...any) (Description, error) {
		return Description{}, fmt.Errorf("not a plugin's description: "+format, args...)
	}
	if len(text) > MaxDescription {
		return fault("%d bytes are more than %d", len(text), MaxDescription)
	}
	var d Description
	if err := json.Unmarshal(text, &d); err != nil {
		return fault("%w", err)
	}
	switch {
	case !validName(d.Name, "-"):
		return fault("the name %.80q is not made of at most %d lower-case letters, digits and dashes", d.Name, maxNameLength)
	case len(d.Version) > maxWord:
		return fault("the version has %d bytes", len(d.Version))
	case len(d.ProtocolVersions) == 0 || len(d.ProtocolVersions) > maxDescribed:
		return fault("it names %d protocol versions", len(d.ProtocolVersions))
	case len(d.Options) > maxDescribed:
		return fault("it has %d options", len(d.Options))
	}
	for i, o := range d.Options {
		long := slices.ContainsFunc(append(slices.Clone(o.Choices), o.Default, o.Min, o.Max, o.Help), func(s string) bool {
			return len(s) > maxOptionLength
		})
		same := func(other DescribedOption) bool { return other.Name == o.Name }
		switch {
		case !validName(o.Name, "_"):
			return fault("an option is called %.80q, which is not made of at most %d lower-case letters, digits and _", o.Name, maxNameLength)
		case long || len(o.Choices) > maxDescribed:
			return fault("option %s is too long", o.Name)
		case slices.ContainsFunc(d.Options[:i], same):
			return fault("there are two options %s", o.Name)
		}
	}
	if _, err := backend.CheckOptions(d.Schema(), nil); err != nil {
		return fault("its options do not accept their own defaults: %w", err)
	}
	return d, nil
}

// validName tells whether a name is made of lower-case letters, digits, and the given separator.
func validName(name, separator string) bool {
	return name != "" && len(name) <= maxNameLength && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789"+separator) == ""
}

// Schema returns the options as backend.CheckOptions wants them.
func (d Description) Schema() []backend.Option {
	schema := make([]backend.Option, len(d.Options))
	for i, o := range d.Options {
		schema[i] = backend.Option(o)
	}
	return schema
}
