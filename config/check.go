package config

import (
	"fmt"
	"math/bits"
	"net"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/umbp/umbp/plugin-sdk/backend"
	"github.com/umbp/umbp/plugin-sdk/fault"
)

// check finds the contradictions between values that are each well formed. A rule is left out where one of the
// values it compares is at fault already, because the value in its place is not what the user wrote.
func (c *Config) check(faults *Faults) {
	ch := checker{Config: c, faults: faults}
	ch.addresses()
	ch.tls()
	ch.pool()
	ch.backends()
	ch.rules()
}

type checker struct {
	*Config
	faults *Faults
}

func (c *checker) fault(path, format string, args ...any) {
	leaf, _, _ := strings.Cut(path, "[")
	c.faults.add(path, c.origins[leaf], format, args...)
}

// sound tells whether none of the paths is at fault.
func (c *checker) sound(paths ...string) bool {
	return !slices.ContainsFunc(paths, c.faults.touch)
}

// value names another key with its value and origin, for a fault between two keys.
func (c *checker) value(path string) string {
	v := reflect.ValueOf(c.Config).Elem().FieldByIndex(byPath[path].index)
	return fmt.Sprintf("%s = %s (%s)", path, textOf(v), c.origins[path])
}

func (c *checker) addresses() {
	c.address("node.listen", c.Node.Listen, false)
	c.address("node.advertise", c.Node.Advertise, true)
	c.address("node.http", c.Node.HTTP, true)
	c.address("directory.address", c.Directory.Address, true)

	if c.sound("node.listen", "node.advertise") {
		host, _, _ := net.SplitHostPort(c.Node.Listen)
		if c.Node.Advertise == "" && wildcard(host) {
			c.fault("node.advertise", "must be set, because peers cannot dial %s", c.value("node.listen"))
		}
		if host, port, _ := net.SplitHostPort(c.Node.Advertise); c.Node.Advertise != "" && (wildcard(host) || port == "0") {
			c.fault("node.advertise", "peers cannot dial %s", c.Node.Advertise)
		}
	}
	if _, port, _ := net.SplitHostPort(c.Node.HTTP); c.sound("node.listen", "node.http") &&
		c.Node.HTTP == c.Node.Listen && port != "0" {
		c.fault("node.http", "%s is taken by node.listen", c.Node.HTTP)
	}
	if c.sound("directory.address", "directory.only") && c.Directory.Only && c.Directory.Address != "" {
		c.fault("directory.only", "contradicts %s: the directory is served here or there", c.value("directory.address"))
	}
}

func (c *checker) address(path, address string, mayBeEmpty bool) {
	if address == "" && mayBeEmpty || !c.sound(path) {
		return
	}
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		c.fault(path, "%q is not an address: write host:port, with a number for the port", address)
	}
}

// wildcard tells whether a host to listen on means all addresses of the machine.
func wildcard(host string) bool {
	return host == "" || net.ParseIP(host).IsUnspecified()
}

// beyondHost tells whether an address can belong to another machine, or be reached from one.
func beyondHost(address string) bool {
	host, _, err := net.SplitHostPort(address)
	return err == nil && host != "localhost" && !net.ParseIP(host).IsLoopback()
}

func (c *checker) tls() {
	files := []struct{ path, file string }{
		{"tls.cert", c.TLS.Cert}, {"tls.key", c.TLS.Key}, {"tls.ca", c.TLS.CA},
	}
	missing, given := "", ""
	for _, f := range files {
		if f.file == "" {
			missing = f.path
		} else {
			given = f.path
		}
	}
	switch {
	case !c.sound("tls"):
		return
	case missing != "" && given != "":
		c.fault(missing, "must be set beside %s: TLS needs tls.cert, tls.key and tls.ca", c.value(given))
		return
	case given != "" && c.TLS.Insecure:
		c.fault("tls.insecure", "contradicts %s: choose one", c.value("tls.cert"))
		return
	case given != "" || c.TLS.Insecure:
		return
	}
	for _, a := range []struct{ path, address string }{
		{"node.listen", c.Node.Listen}, {"directory.address", c.Directory.Address},
	} {
		if a.address != "" && c.sound(a.path) && beyondHost(a.address) {
			c.fault(a.path, "%s leads beyond this host, and no one there could be told from an intruder: "+
				"set tls.cert, tls.key and tls.ca, or tls.insecure: true", a.address)
		}
	}
}

func (c *checker) pool() {
	p := &c.Pool
	if c.sound("pool.page_size") && bits.OnesCount64(uint64(p.PageSize)) != 1 {
		c.fault("pool.page_size", "%s is not a power of two", p.PageSize)
	}
	if c.sound("pool.size", "pool.page_size") && p.Size%p.PageSize != 0 {
		hint := p.Size - p.Size%p.PageSize
		if hint == 0 {
			hint = p.PageSize
		}
		c.fault("pool.size", "%s is no multiple of %s; %s is", p.Size, c.value("pool.page_size"), hint)
	}
	if c.sound("pool.low_watermark", "pool.high_watermark") && p.LowWatermark >= p.HighWatermark {
		c.fault("pool.low_watermark", "%v is not below %s", p.LowWatermark, c.value("pool.high_watermark"))
	}
	if c.sound("pool.device") && !deviceName.MatchString(p.Device) {
		c.fault("pool.device", "%q is no GPU: write its PCI address, such as 0000:c1:00.0, or its number", p.Device)
	}
	if c.sound("pool.memory", "pool.huge_pages") && p.Memory == "gpu" && p.HugePages == "require" {
		c.fault("pool.huge_pages", "require contradicts %s: huge pages are the host's", c.value("pool.memory"))
	}
}

// deviceName matches what can name a GPU: nothing, a number or a PCI address.
var deviceName = regexp.MustCompile(`^([0-9]{0,3}|[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7])$`)

// validName tells whether a name can be a backend's.
func validName(name string) bool {
	return name != "" && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

func (c *checker) backends() {
	seen := map[string]bool{}
	for i, b := range c.Backends {
		at := fmt.Sprintf("backends[%s]", b.Name)
		switch {
		case !validName(b.Name):
			if at = fmt.Sprintf("backends[%d]", i); c.sound(at) {
				c.fault(at+".name", "%q is not a name: a name is lower-case letters, digits and dashes", b.Name)
			}
			continue
		case seen[b.Name]:
			c.fault(at, "is listed twice")
			continue
		}
		c.plugin(at, &b)
		if _, err := fault.Parse(b.Faults); err != nil && c.sound(at+".faults") {
			c.fault(at+".faults", "%v", err)
		}
		seen[b.Name] = true
	}
}

func (c *checker) rules() {
	listed := make([]string, len(c.Backends))
	enabled := map[string]bool{}
	unreadable := slices.ContainsFunc(*c.faults, func(f Fault) bool { return f.Path == "backends" })
	for i, b := range c.Backends {
		listed[i] = b.Name
		enabled[b.Name] = b.Enabled
		unreadable = unreadable || b.Name == ""
	}
	rules := c.Selection.Rules
	for i := range rules {
		r, at := &rules[i], rulePath(i)
		if !c.sound(at) {
			continue
		}
		named := slices.Concat(r.Require, r.Prefer, r.Allow)
		switch {
		case len(named) == 0:
			c.fault(at, "names no backend: give it require, or prefer and allow")
		case len(r.Require) > 0 && len(r.Prefer)+len(r.Allow) > 0:
			c.fault(at, "has require beside prefer or allow: require leaves no choice")
		}
		if m := r.Match; m.MaxSize > 0 && m.MinSize > m.MaxSize {
			c.fault(at+".match", "min_size, %s, is greater than max_size, %s", m.MinSize, m.MaxSize)
		}
		for j, name := range named {
			on, ok := enabled[name]
			switch {
			case !ok && unreadable: // it may be the one
			case slices.Contains(named[:j], name):
				c.fault(at, "names backend %q twice", name)
			case !ok:
				c.fault(at, "names backend %q, which is not listed in backends%s", name, backend.DidYouMean(name, listed))
			case !on:
				c.fault(at, "names backend %q, which is not enabled", name)
			}
		}
		for j := range i {
			if c.sound(rulePath(j)) && rules[j].Match.covers(r.Match) {
				c.fault(at, "is never reached: %s matches all that it matches", rulePath(j))
				break
			}
		}
	}
}

func rulePath(i int) string { return fmt.Sprintf("selection.rules[%d]", i) }

// covers tells whether m matches everything that n matches.
func (m Match) covers(n Match) bool {
	return (m.Local == "" || m.Local == n.Local) &&
		(m.Remote == "" || m.Remote == n.Remote) &&
		(m.Op == "" || m.Op == n.Op) &&
		coversBool(m.SameHost, n.SameHost) &&
		coversBool(m.SameNode, n.SameNode) &&
		m.MinSize <= n.MinSize &&
		(m.MaxSize == 0 || n.MaxSize != 0 && n.MaxSize <= m.MaxSize)
}

func coversBool(m, n *bool) bool {
	return m == nil || n != nil && *m == *n
}

// Warnings names what is allowed and yet seldom meant: one sentence for each, beginning with a path.
func (c *Config) Warnings() []string {
	var warnings []string
	warn := func(format string, args ...any) { warnings = append(warnings, fmt.Sprintf(format, args...)) }

	if c.TLS.Insecure {
		warn("tls.insecure: whoever reaches a port of this process reads and writes the pool")
	}
	if beyondHost(c.Directory.Address) && c.Node.Advertise == "" && !beyondHost(c.Node.Listen) {
		warn("node.listen: nodes on other hosts, which share the directory at %s, cannot reach %s",
			c.Directory.Address, c.Node.Listen)
	}
	if c.Pool.Memory == "host" && c.Pool.Device != "" {
		warn("pool.device: says nothing to a pool in the host's memory; set pool.memory: gpu")
	}
	rules := c.Selection.Rules
	if n := len(rules); n == 0 || rules[n-1].Match != (Match{}) {
		warn("selection.rules: a transfer that no rule matches is refused; a last rule without match would take them all")
	}
	for _, b := range c.Backends {
		named := slices.ContainsFunc(rules, func(r Rule) bool {
			return slices.Contains(slices.Concat(r.Require, r.Prefer, r.Allow), b.Name)
		})
		if b.Enabled && !named {
			warn("backends[%s]: no rule names it, so it carries nothing", b.Name)
		}
		if b.Enabled && c.Mode(&b) == InProcess && (b.Plugin != "" || b.SHA256 != "" || len(b.Env) > 0) {
			warn("backends[%s]: plugin, sha256 and env say nothing to a backend that runs in-process", b.Name)
		}
		if b.Enabled && b.Faults != "" {
			warn("backends[%s].faults: faults are injected on purpose", b.Name)
		}
	}
	return warnings
}
