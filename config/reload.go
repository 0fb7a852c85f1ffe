package config

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Manager holds the current configuration and replaces it. Safe for concurrent use.
type Manager struct {
	source  Source
	current atomic.Pointer[Config]

	mu          sync.Mutex // guards what follows, and keeps reloads one after the other
	subscribers []func(*Config, Change)
	seen        digest // of the file at the last reload, whether that was accepted or refused
	filled      bool   // the file of the current configuration held something

	// What Run works with; tests shorten the times and make the watch break.
	settle, idle, firstPause, lastPause time.Duration
	newWatch                            func() (*fsnotify.Watcher, error)
}

// NewManager loads the first configuration. Its error is that of Load.
func NewManager(s Source) (*Manager, error) {
	m := &Manager{
		source: s,
		settle: 250 * time.Millisecond, idle: 30 * time.Second,
		firstPause: time.Second, lastPause: time.Minute,
		newWatch: fsnotify.NewWatcher,
	}
	f := m.read()
	c, err := build(s, f.data, f.err)
	if err != nil {
		return nil, err
	}
	m.current.Store(c)
	m.seen, m.filled = f.digest(), !f.blank()
	return m, nil
}

// Config returns the current configuration. A part that needs several values to agree takes them from one call.
func (m *Manager) Config() *Config { return m.current.Load() }

// Subscribe has fn called with each new configuration in which a live value differs, before the Reload that
// brought it returns. Calls come one at a time. fn must not call Reload or Subscribe.
func (m *Manager) Subscribe(fn func(*Config, Change)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.subscribers = append(m.subscribers, fn)
}

// Change is what a reload found to differ.
type Change struct {
	// Live values are in effect now.
	Live []Difference
	// NeedsRestart values keep what they were until the process starts anew. They are named at every reload until
	// then.
	NeedsRestart []Difference
}

// Empty tells whether nothing differs.
func (c Change) Empty() bool { return len(c.Live)+len(c.NeedsRestart) == 0 }

// Difference is the value that an entry has in the new configuration, and what it was. An entry that only one of
// the two configurations has, such as an option of a backend that was added, is empty on the other side.
type Difference struct {
	Entry
	Was string
}

// String renders the difference for a log: pool.size: 1GiB → 2GiB.
func (d Difference) String() string {
	return fmt.Sprintf("%s: %s → %s", d.Path, orNothing(d.Was), orNothing(d.Value))
}

func orNothing(s string) string {
	if s == "" {
		return `""`
	}
	return s
}

// Reload reads the file anew and builds a whole configuration from it; the environment and the flags are those of
// the start. A configuration with any fault is refused and the current one stays. Otherwise live values take
// effect and the others keep the value that they have.
func (m *Manager) Reload() (Change, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reload(m.read())
}

// reload is Reload with a file that has been read. The caller holds mu.
func (m *Manager) reload(f file) (Change, error) {
	m.seen = f.digest()
	if f.err == nil && f.blank() && m.filled {
		var faults Faults
		faults.add("", "file:"+m.source.File,
			"it is empty and was not before, as if someone were still writing it; version: %d stands for all defaults",
			m.Config().Version)
		return Change{}, faults
	}
	fresh, err := build(m.source, f.data, f.err)
	if err != nil {
		return Change{}, err
	}
	old := m.Config()
	change := compare(old, fresh)
	next := keepRestart(old, fresh)
	if len(change.NeedsRestart) > 0 {
		// Live values were checked beside those that the file has now, and not beside those that stay.
		var faults Faults
		next.check(&faults)
		if err := faults.err(); err != nil {
			return Change{}, fmt.Errorf("it needs a restart: with the values that stay until then, %w", err)
		}
	}
	m.filled = !f.blank()
	m.current.Store(next)
	if len(change.Live) > 0 {
		for _, fn := range m.subscribers {
			fn(next, change)
		}
	}
	return change, nil
}

// compare lists the entries in which two configurations differ, in the order of the table.
func compare(old, fresh *Config) Change {
	var change Change
	add := func(e Entry, was string) {
		if e.Reload == Live {
			change.Live = append(change.Live, Difference{e, was})
		} else {
			change.NeedsRestart = append(change.NeedsRestart, Difference{e, was})
		}
	}
	before := map[string]Entry{}
	for _, e := range old.Entries() {
		before[e.Path] = e
	}
	for _, e := range fresh.Entries() {
		was, both := before[e.Path]
		if !both || was.Value != e.Value {
			add(e, was.Value)
		}
		delete(before, e.Path)
	}
	for _, e := range old.Entries() {
		if _, gone := before[e.Path]; gone && e.Value != "" {
			was := e.Value
			e.Value, e.Origin = "", ""
			add(e, was)
		}
	}
	return change
}

// keepRestart returns fresh with the values and origins that old has for keys which need a restart.
func keepRestart(old, fresh *Config) *Config {
	next := *fresh
	next.origins = maps.Clone(fresh.origins)
	next.known = old.known // what goes with the backends, which stay
	for _, k := range leaves {
		if !k.live {
			kept := reflect.ValueOf(old).Elem().FieldByIndex(k.index)
			reflect.ValueOf(&next).Elem().FieldByIndex(k.index).Set(kept)
			next.origins[k.path] = old.origins[k.path]
		}
	}
	return &next
}

// file is what reading the configuration file gave.
type file struct {
	data []byte
	err  error
}

func (m *Manager) read() file {
	if m.source.File == "" {
		return file{}
	}
	data, err := readFile(m.source.File)
	return file{data, err}
}

func (f file) blank() bool { return len(bytes.TrimSpace(f.data)) == 0 }

// digest stands for a content of the file, or for the reason why it cannot be read.
type digest [sha256.Size]byte

func (f file) digest() digest {
	if f.err != nil {
		return sha256.Sum256([]byte("\x00" + f.err.Error()))
	}
	return sha256.Sum256(f.data)
}
