package xgmi

import (
	"sync"

	"github.com/umbp/umbp/plugin-sdk/gpu"
)

// importKey names an allocation of another process.
type importKey struct {
	library, device string
	handle          gpu.Handle
}

// imports are those of this process, with their users: some runtimes import an allocation only once.
var imports = importTable{m: make(map[importKey]*use)}

type importTable struct {
	mu sync.Mutex
	m  map[importKey]*use
}

// use is an allocation that is imported, or is being imported or closed.
type use struct {
	mu   sync.Mutex // held while that happens
	open bool
	mapping

	users int // and those that wait to become one; under importTable.mu
}

// mapping is where an import is, and its size.
type mapping struct{ address, bytes uint64 }

// take makes the caller a user, and returns where it is. The first one has it imported.
func (t *importTable) take(key importKey, open func() (mapping, error)) (mapping, error) {
	t.mu.Lock()
	u := t.m[key]
	if u == nil {
		u = new(use)
		t.m[key] = u
	}
	u.users++
	t.mu.Unlock()

	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.open {
		m, err := open()
		if err != nil {
			t.leave(key, u)
			return m, err
		}
		u.open, u.mapping = true, m
	}
	return u.mapping, nil
}

// give ends a use. The last one has it closed.
func (t *importTable) give(key importKey, close func(address uint64) error) (err error) {
	t.mu.Lock()
	u := t.m[key]
	t.mu.Unlock()

	u.mu.Lock()
	defer u.mu.Unlock()
	t.mu.Lock()
	last := u.users == 1
	t.mu.Unlock()
	if last && u.open { // who comes now waits for u.mu, and imports it anew
		err = close(u.address)
		u.open = false
	}
	t.leave(key, u)
	return err
}

func (t *importTable) leave(key importKey, u *use) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if u.users--; u.users == 0 {
		delete(t.m, key)
	}
}
