// Package config builds the one configuration of a UMBP process.
//
// Four layers are laid over each other: the defaults, a file (YAML, TOML or JSON, told by its extension), the
// environment, and command-line flags. Every layer starts from nothing at each Load, so a key that was deleted
// from the file goes back to its default. The struct Config is the table of all keys: its tags give each key its
// name, default, bounds and help, and everything else here (decoding, flags, the default file, the listing for
// `umbp config show`) walks that table.
//
// The reading is strict. An unknown key, an unknown UMBP_ variable, a wrong type, a bad unit, a value out of range
// and a contradiction between keys are refused, all of them in one error, each with its path, where it came from,
// and the nearest known key. A process that starts has understood every word of its configuration.
//
// # Environment
//
// The variable of a key is its path in capitals after UMBP_, with two underscores between levels; a single
// underscore belongs to the word: UMBP_POOL__PAGE_SIZE sets pool.page_size. Lists (selection.rules and backends)
// are set in the file only. UMBP_CONFIG and UMBP_TEST_ variables are left to others, and so are the variables that
// Kubernetes and Docker make up for a service whose name begins with "umbp" (UMBP_SERVICE_HOST, UMBP_PORT).
//
// # Lists
//
// A list is replaced as a whole by the file: nothing of the default list remains.
//
// # Plugins
//
// A backend that is not linked in, and any other for which plugins.mode or its own mode says so, runs as a process,
// from a plugin: a program of its own. Where only the plugin knows the options of its backend, Load asks it, by
// Source.Describe, so that a wrong option is refused like any other wrong word, before anything starts.
//
// # Reloading
//
// A Config never changes. Manager holds the current one and replaces it; keys tagged reload:"live" take effect
// then, all others keep the value that the process started with and are reported as needing a restart.
package config

import (
	"time"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// Config is the configuration of a process. It is shared by all goroutines and must not be modified, including
// what its slices and maps hold.
//
// The tags of a field: koanf is the key; default, min, max and choices are in the notation of the file; reload is
// live where a running process takes a new value; help is the documentation of the key. For a list, max bounds the
// number of elements.
type Config struct {
	Version   int       `koanf:"version" default:"1" min:"1" max:"1" help:"Version of the meaning of this file."`
	Node      Node      `koanf:"node" help:"This process and its addresses."`
	Directory Directory `koanf:"directory" help:"The directory knows which node holds which key."`
	Pool      Pool      `koanf:"pool" help:"The memory that this node lends."`
	GPU       GPU       `koanf:"gpu" help:"The GPU memory that this process allocates itself, such as a pool's; backends have options of their own."`
	Client    Client    `koanf:"client" help:"How this process puts and gets values."`
	Selection Selection `koanf:"selection" help:"Which backend carries what."`
	Plugins   Plugins   `koanf:"plugins" help:"Backends as processes of their own."`
	Backends  []Backend `koanf:"backends" default:"- name: shm\n- name: tcp" max:"32" help:"The ways to move bytes that this process opens."`
	TLS       TLS       `koanf:"tls" help:"Mutual TLS 1.3 between processes: all three files, or none."`
	Log       Log       `koanf:"log" help:"What is logged, to standard error."`

	origins map[string]string // of each leaf of the table, by path
	known   known
}

// Node names the process and says where it listens.
type Node struct {
	Name      string `koanf:"name" default:"" help:"Name of the process, unique in the cluster; empty for the host's name with a random suffix, new at each start."`
	Listen    string `koanf:"listen" default:"127.0.0.1:7420" help:"Address of the control plane, host:port; port 0 takes any free port."`
	Advertise string `koanf:"advertise" default:"" help:"Address of the control plane as peers dial it, host:port; empty for the address listened on."`
	HTTP      string `koanf:"http" default:"127.0.0.1:7421" help:"Address of metrics and health, host:port, without TLS; empty for none."`
}

// Directory says who serves the directory, and how new keys are spread.
type Directory struct {
	Address   string        `koanf:"address" default:"" help:"Address of the directory, host:port; empty when this process serves it."`
	Lease     time.Duration `koanf:"lease" default:"3s" min:"100ms" max:"10m" help:"How long a node stays a member without renewing its membership."`
	Only      bool          `koanf:"only" default:"false" help:"Serve the directory and lend no memory."`
	Placement Placement     `koanf:"placement" help:"Where new keys go."`
}

// Placement is the policy for new keys.
type Placement struct {
	LocalFirst bool `koanf:"local_first" default:"true" reload:"live" help:"Prefer the node of the same process, then those of the same host, as long as they have room."`
	Together   bool `koanf:"together" default:"true" reload:"live" help:"Keep a batch on one node as long as one has room for all of it."`
}

// Pool is the memory that a node lends.
type Pool struct {
	Size          backend.Size  `koanf:"size" default:"1GiB" min:"1KiB" max:"64TiB" help:"Memory to lend, a whole number of pages."`
	PageSize      backend.Size  `koanf:"page_size" default:"64KiB" min:"1KiB" max:"1GiB" help:"Size of a page, a power of two: the unit in which memory is handed out."`
	Memory        string        `koanf:"memory" default:"host" choices:"host,gpu" help:"Whether the pool lies in the host's memory or in that of a GPU, where only a backend for GPU memory reaches it."`
	Device        string        `koanf:"device" default:"" help:"With memory: gpu, the GPU: its PCI address, such as 0000:c1:00.0, or its number in this process; empty for the first."`
	HugePages     string        `koanf:"huge_pages" default:"auto" choices:"auto,off,require" help:"Whether the pool lies on huge pages: where the system has them, never, or else refuse to start."`
	HighWatermark float64       `koanf:"high_watermark" default:"0.95" min:"0.01" max:"1" reload:"live" help:"Evict when more than this share of the pool is in use."`
	LowWatermark  float64       `koanf:"low_watermark" default:"0.9" min:"0.01" max:"1" reload:"live" help:"Evict until no more than this share of the pool is in use."`
	SlotTTL       time.Duration `koanf:"slot_ttl" default:"30s" min:"10ms" max:"1h" reload:"live" help:"How long memory stays reserved for a put that is neither committed nor aborted."`
	ReadLease     time.Duration `koanf:"read_lease" default:"10s" min:"10ms" max:"1h" reload:"live" help:"How long a value that is being read is kept from eviction."`
}

// GPU says which runtime allocates GPU memory.
type GPU struct {
	Runtime string `koanf:"runtime" default:"auto" choices:"auto,hip,cuda" help:"Runtime to allocate with: AMD's HIP, NVIDIA's CUDA, or the first that is found with a device."`
	Library string `koanf:"library" default:"" help:"Path of the runtime's library; empty looks for the known ones."`
}

// Client says how this process puts and gets.
type Client struct {
	Staging      string        `koanf:"staging" default:"allow" choices:"allow,refuse" help:"Whether memory that is not registered may be copied through a staging buffer."`
	StagingSize  backend.Size  `koanf:"staging_size" default:"64MiB" min:"4KiB" max:"1TiB" help:"Size of the staging buffer."`
	Verify       string        `koanf:"verify" default:"all" choices:"off,sample,all" reload:"live" help:"Which values read are checked against their checksum."`
	VerifySample int           `koanf:"verify_sample" default:"16" min:"1" max:"1000000" reload:"live" help:"With verify: sample, one of this many values is checked."`
	Timeout      time.Duration `koanf:"timeout" default:"30s" min:"1ms" max:"1h" reload:"live" help:"Longest time for a batch whose caller sets no deadline."`
	Attempts     int           `koanf:"attempts" default:"2" min:"1" max:"16" reload:"live" help:"How often a transfer is tried on each backend that the rules allow."`
}

// Selection is the ordered policy that chooses backends: the first rule that matches a transfer decides.
type Selection struct {
	Rules []Rule `koanf:"rules" default:"- prefer: [shm]\n  allow: [tcp]" max:"100" reload:"live" help:"The first rule that matches a transfer decides; what no rule matches is refused."`
}

// Rule names the backends that may carry the transfers it matches. It has Require, or Prefer and Allow.
type Rule struct {
	Match   Match    `koanf:"match" help:"What the rule applies to; keys left out match everything."`
	Require []string `koanf:"require" max:"32" help:"Only these, in this order; not beside prefer and allow."`
	Prefer  []string `koanf:"prefer" max:"32" help:"These first, in this order."`
	Allow   []string `koanf:"allow" max:"32" help:"Where none of prefer can carry the transfer, these, in this order."`
}

// Match restricts a rule. Zero fields match everything.
type Match struct {
	Local    string       `koanf:"local" choices:"host,gpu" help:"Memory at this end."`
	Remote   string       `koanf:"remote" choices:"host,gpu" help:"Memory at the far end."`
	SameHost *bool        `koanf:"same_host" help:"Whether both ends share a host."`
	SameNode *bool        `koanf:"same_node" help:"Whether the value lies in this process."`
	Op       string       `koanf:"op" choices:"read,write" help:"The direction, as this process sees it."`
	MinSize  backend.Size `koanf:"min_size" help:"Least size of the transfer."`
	MaxSize  backend.Size `koanf:"max_size" min:"1B" help:"Greatest size of the transfer."`
}

// The modes of Plugins and Backend.
const (
	InProcess = "in-process" // linked into this process
	AsProcess = "process"    // in a process of its own
)

// Plugins says how backends run.
type Plugins struct {
	Mode string        `koanf:"mode" default:"in-process" choices:"in-process,process" help:"Whether backends run within this process or each in a process of its own, for those that do not say; what is not linked in always runs in its own."`
	Dir  string        `koanf:"dir" default:"" help:"Folder of the plugins, which are programs named umbp-plugin-NAME; empty for the folder of umbp itself."`
	Look time.Duration `koanf:"look" default:"1ms" min:"1us" max:"100ms" help:"How long a plugin with nothing to do looks for the next transfer before it sleeps, as long as that pays: it keeps a processor busy, and spares the transfer the time to wake the plugin."`
}

// Backend is one backend that the process opens.
type Backend struct {
	Name    string `koanf:"name" help:"Which backend."`
	Enabled bool   `koanf:"enabled" default:"true" help:"Whether it is opened."`
	Mode    string `koanf:"mode" choices:"in-process,process" help:"How it runs; without it, as plugins.mode says."`
	// Plugin is the path of the program; empty for umbp-plugin-NAME in Plugins.Dir.
	Plugin string   `koanf:"plugin" default:"" help:"Path of its plugin, where a name without a slash is looked for in PATH; empty for umbp-plugin-NAME in plugins.dir."`
	SHA256 string   `koanf:"sha256" default:"" help:"Checksum of its plugin, 64 hex digits, without which the plugin is not started; empty for none."`
	Env    []string `koanf:"env" max:"32" help:"Names of the variables of the environment that are passed on to its plugin."`
	// Options holds the texts as they were written; backend.CheckOptions has accepted them.
	Options map[string]string `koanf:"options" max:"100" help:"Its options, which umbp backends NAME lists."`
	Faults  string            `koanf:"faults" default:"" help:"Faults to inject, for tests, such as complete:drop; empty for none."`
}

// TLS names the files for mutual TLS.
type TLS struct {
	Cert     string `koanf:"cert" default:"" help:"Certificate of this process, a PEM file."`
	Key      string `koanf:"key" default:"" help:"Private key of the certificate, a PEM file."`
	CA       string `koanf:"ca" default:"" help:"Certificate authorities that vouch for peers, a PEM file."`
	Insecure bool   `koanf:"insecure" default:"false" help:"Talk to other hosts without TLS: whoever reaches a port reads and writes the pool."`
}

// Credentials returns the files for backends and the control plane, or nil when none are configured.
func (t TLS) Credentials() *backend.Credentials {
	if t.Cert == "" {
		return nil
	}
	return &backend.Credentials{CertFile: t.Cert, KeyFile: t.Key, CAFile: t.CA}
}

// Log says what is logged.
type Log struct {
	Level  string `koanf:"level" default:"info" choices:"trace,debug,info,warn,error" reload:"live" help:"Least level that is logged."`
	Format string `koanf:"format" default:"text" choices:"text,json" help:"Form of a line."`
}
