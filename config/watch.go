package config

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// errWatchLost ends a watch that can see nothing any more.
var errWatchLost = errors.New("the directory is gone, or is another one now")

// Run reloads the configuration when the file changes, until the context ends. It calls onChange, from its own
// goroutine, with the outcome of each such reload: the configuration that is current then, what differs, and the
// error when the file was refused, or when the file cannot be watched at present.
//
// What counts is the content of the file. It is looked at when something happens in the directory of the file or
// in that of the file that it links to, which covers editors that write a new file and rename it, files removed
// and made anew, and the links that Kubernetes turns around for a ConfigMap. It is looked at every half minute
// besides, for file systems that report nothing. New content is loaded once it has stood still for a quarter of
// a second, so that a file being written is not taken for a finished one; an empty file never replaces one that
// was not. Whoever writes slowly should still write elsewhere and rename.
func (m *Manager) Run(ctx context.Context, onChange func(*Config, Change, error)) {
	if m.source.File == "" {
		<-ctx.Done()
		return
	}
	w := watcher{Manager: m, onChange: onChange}
	pause := m.firstPause
	for {
		stood, err := w.watch(ctx)
		if ctx.Err() != nil {
			return
		}
		if stood {
			pause = m.firstPause
		}
		onChange(m.Config(), Change{}, fmt.Errorf("watch %s: %w; trying again", m.source.File, err))
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, m.lastPause)
		w.look() // so that a file which cannot be watched is at least polled
	}
}

type watcher struct {
	*Manager
	onChange func(*Config, Change, error)
	pending  digest // of new content that has been seen once
}

// watch watches until the context ends or the watch breaks. It says whether the watch ever stood.
func (w *watcher) watch(ctx context.Context) (stood bool, err error) {
	notify, err := w.newWatch()
	if err != nil {
		return false, err
	}
	defer notify.Close()
	parent, err := w.follow(notify)
	if err != nil {
		return false, err
	}
	timer := time.NewTimer(w.settle) // the file may have changed before the watch stood
	defer timer.Stop()
	soon := true // the timer ends a time to settle, and not an idle one
	for {
		select {
		case <-ctx.Done():
			return true, nil
		case event := <-notify.Events:
			if event.Name == parent && event.Has(fsnotify.Remove|fsnotify.Rename) {
				return true, errWatchLost
			}
			if !soon { // a directory that is never quiet must not put the look off for ever
				soon = true
				timer.Reset(w.settle)
			}
		case err, ok := <-notify.Errors:
			if !ok {
				err = errWatchLost
			}
			return true, err
		case <-timer.C:
			// First follow, then look, so that no change falls between the two.
			if now, err := w.follow(notify); err != nil {
				return true, err
			} else if now != parent {
				return true, errWatchLost
			}
			if soon = !w.look(); soon {
				timer.Reset(w.settle)
			} else {
				timer.Reset(w.idle)
			}
		}
	}
}

// follow makes notify watch the directory of the file, which it returns, and that of the file it links to.
func (w *watcher) follow(notify *fsnotify.Watcher) (parent string, err error) {
	parent, err = filepath.EvalSymlinks(filepath.Dir(w.source.File))
	if err != nil {
		return "", err
	}
	target := parent
	if file, err := filepath.EvalSymlinks(w.source.File); err == nil {
		target = filepath.Dir(file)
	}
	for _, dir := range notify.WatchList() {
		if dir != parent && dir != target {
			_ = notify.Remove(dir) // it may be gone already
		}
	}
	if err := notify.Add(parent); err != nil {
		return "", err
	}
	// The target may go between the two calls, when the link is being turned; the parent will tell.
	if err := notify.Add(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return parent, nil
}

// look reloads when the file has content that is new and the same as at the last look. It says whether no look
// is needed soon.
func (w *watcher) look() bool {
	w.mu.Lock()
	f := w.read()
	now := f.digest()
	if now == w.seen || now != w.pending {
		w.pending = now
		w.mu.Unlock()
		return now == w.seen
	}
	change, err := w.reload(f)
	c := w.Config()
	w.mu.Unlock()
	w.onChange(c, change, err)
	return true
}
