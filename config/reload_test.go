package config

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"
)

// manage starts a manager on a file, with times that suit a test.
func manage(t *testing.T, path string) *Manager {
	t.Helper()
	m, err := NewManager(Source{File: path, Schemas: schemas})
	if err != nil {
		t.Fatal(err)
	}
	m.settle, m.firstPause, m.lastPause = 20*time.Millisecond, 5*time.Millisecond, 20*time.Millisecond
	m.idle = time.Hour // what happens to the file has to be noticed
	return m
}

func texts(list []Difference) []string {
	var s []string
	for _, d := range list {
		s = append(s, d.String())
	}
	return s
}

func TestReloadTakesLiveValuesAndKeepsTheOthers(t *testing.T) {
	path := write(t, "umbp.yaml", "pool: {size: 2GiB, slot_ttl: 5s}\nlog: {level: debug}")
	m := manage(t, path)
	var told []*Config
	m.Subscribe(func(c *Config, change Change) {
		if change.Empty() {
			t.Error("told of nothing")
		}
		told = append(told, c)
	})
	first := m.Config()

	overwrite(t, path, `
pool: {size: 4GiB, slot_ttl: 7s}
client: {verify: off, attempts: 3}
backends: [{name: tcp, options: {window: 5}}, {name: shm}]
selection: {rules: [{prefer: [tcp]}]}
`)
	change, err := m.Reload()
	if err != nil {
		t.Fatal(err)
	}
	wantLive := []string{
		"pool.slot_ttl: 5s → 7s", "client.verify: all → off", "client.attempts: 2 → 3",
		"selection.rules[0]: {prefer: [shm], allow: [tcp]} → {prefer: [tcp]}",
		"log.level: debug → info", // the key was deleted: back to its default
	}
	wantRestart := []string{"pool.size: 2GiB → 4GiB", "backends[tcp].options.window: 16 → 5"}
	if diff := cmp.Diff(wantLive, texts(change.Live)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(wantRestart, texts(change.NeedsRestart)); diff != "" {
		t.Error(diff)
	}
	c := m.Config()
	if c.Pool.Size != 2<<30 || c.Pool.SlotTTL != 7*time.Second || c.Client.Verify != "off" || c.Log.Level != "info" ||
		len(c.Backends[0].Options) != 0 {
		t.Errorf("effective configuration: %+v", c)
	}
	if got := c.Origin("log.level"); got != "default" {
		t.Errorf("a key that was deleted comes from %q", got)
	}
	if first.Pool.SlotTTL != 5*time.Second || first.Log.Level != "debug" || first.Origin("log.level") == "default" {
		t.Error("the configuration that was current before has changed")
	}
	if len(told) != 1 || told[0] != c {
		t.Errorf("subscriber was told %d times", len(told))
	}

	// What needs a restart is named until it has happened; subscribers hear of it once.
	change, err = m.Reload()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(wantRestart, texts(change.NeedsRestart)); diff != "" || len(change.Live) != 0 {
		t.Errorf("second reload: %v, %s", texts(change.Live), diff)
	}
	if len(told) != 1 {
		t.Error("subscriber was told of nothing")
	}
}

func TestReloadRefusesAndKeepsTheOld(t *testing.T) {
	path := write(t, "umbp.yaml", "pool: {slot_ttl: 5s}")
	m := manage(t, path)
	m.Subscribe(func(*Config, Change) { t.Error("told of a configuration that was refused") })
	old := m.Config()
	refuse := func(what, want string) {
		t.Helper()
		change, err := m.Reload()
		var list Faults
		if !errors.As(err, &list) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", what, err, want)
		}
		if !change.Empty() || m.Config() != old {
			t.Errorf("%s: the configuration changed", what)
		}
	}
	overwrite(t, path, "pool: {slot_ttl: 7s, low_watermark: 2}")
	refuse("one bad value", "pool.low_watermark: 2 is more than the most allowed, 1")
	overwrite(t, path, "pool: {slot_ttl: 7s")
	refuse("half a file", "cannot be read as YAML")
	overwrite(t, path, " \n")
	refuse("empty file", "it is empty and was not before")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	refuse("no file", "no such file")
	// The rule is right beside the backends of the file, and wrong beside those that are open.
	overwrite(t, path, "pool: {slot_ttl: 7s}\nbackends: [{name: rdma}]\nselection: {rules: [{require: [rdma]}]}")
	refuse("a rule for a backend that is not open", `needs a restart: with the values that stay until then, `+
		`configuration refused: selection.rules[0]: names backend "rdma", which is not listed in backends`)
}

func TestReloadOfAnEmptyFile(t *testing.T) {
	path := write(t, "umbp.yaml", "")
	m := manage(t, path)
	if _, err := m.Reload(); err != nil {
		t.Errorf("a file that was empty from the start: %v", err)
	}
	overwrite(t, path, "version: 1")
	if _, err := m.Reload(); err != nil {
		t.Error(err)
	}
	overwrite(t, path, "")
	if _, err := m.Reload(); err == nil {
		t.Error("a file that is empty after it was not is taken for all defaults")
	}
}

func TestReloadNamesWhatIsGone(t *testing.T) {
	path := write(t, "umbp.yaml", "backends: [{name: tcp}, {name: shm}, {name: rdma}]\nselection: {rules: [{match: {op: read}, require: [tcp]}, {allow: [tcp]}]}")
	m := manage(t, path)
	overwrite(t, path, "backends: [{name: tcp}, {name: shm}]\nselection: {rules: [{allow: [tcp]}]}")
	change, err := m.Reload()
	if err != nil {
		t.Fatal(err)
	}
	wantLive := []string{
		"selection.rules[0]: {match: {op: read}, require: [tcp]} → {allow: [tcp]}",
		`selection.rules[1]: {allow: [tcp]} → ""`,
	}
	wantRestart := []string{`backends[rdma].enabled: true → ""`, `backends[rdma].options.gid_index: 3 → ""`}
	if diff := cmp.Diff(wantLive, texts(change.Live)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(wantRestart, texts(change.NeedsRestart)); diff != "" {
		t.Error(diff)
	}
}

func TestNewManagerRefusesAsLoadDoes(t *testing.T) {
	if m, err := NewManager(Source{File: write(t, "umbp.yaml", "pol: 1"), Schemas: schemas}); err == nil || m != nil {
		t.Errorf("got %v, %v", m, err)
	}
}

// TestReadersDuringReloads has readers check that no configuration is a mixture of two. The race detector looks on.
func TestReadersDuringReloads(t *testing.T) {
	path := write(t, "umbp.yaml", "client: {attempts: 1, verify_sample: 1}")
	m := manage(t, path)
	ctx, cancel := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for ctx.Err() == nil {
				c := m.Config()
				if c.Client.Attempts != c.Client.VerifySample {
					t.Errorf("a mixture: %+v", c.Client)
					return
				}
				_ = c.Origin("client.attempts")
			}
		})
	}
	for i := range 40 {
		n := i%16 + 1
		overwrite(t, path, fmt.Sprintf("client: {attempts: %d, verify_sample: %d}", n, n))
		if _, err := m.Reload(); err != nil {
			t.Error(err)
		}
	}
	cancel()
	readers.Wait()
}

// outcome is one call of Run's onChange.
type outcome struct {
	c      *Config
	change Change
	err    error
}

// follow runs the manager until the test ends, and returns what it reports.
func follow(t *testing.T, m *Manager) <-chan outcome {
	t.Helper()
	outcomes := make(chan outcome, 100)
	ctx, cancel := context.WithCancel(t.Context())
	var run sync.WaitGroup
	run.Go(func() {
		m.Run(ctx, func(c *Config, change Change, err error) {
			select {
			case outcomes <- outcome{c, change, err}:
			case <-ctx.Done():
			}
		})
	})
	t.Cleanup(func() {
		cancel()
		run.Wait()
	})
	return outcomes
}

// await returns the first outcome that is as wanted.
func await(t *testing.T, outcomes <-chan outcome, what string, wanted func(outcome) bool) outcome {
	t.Helper()
	var last outcome
	for {
		select {
		case last = <-outcomes:
			if wanted(last) {
				return last
			}
		case <-time.After(time.Minute):
			t.Fatalf("%s: not seen; last outcome %+v", what, last)
		}
	}
}

func attempts(n int) func(outcome) bool {
	return func(o outcome) bool { return o.err == nil && o.c.Client.Attempts == n }
}

func refused(text string) func(outcome) bool {
	return func(o outcome) bool { return o.err != nil && strings.Contains(o.err.Error(), text) }
}

const attemptsYAML = "client: {attempts: %d}\n"

func TestRunSeesEveryWayOfChangingAFile(t *testing.T) {
	rename := func(t *testing.T, path, text string) {
		t.Helper()
		overwrite(t, path+".new", text)
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	path := write(t, "umbp.yaml", fmt.Sprintf(attemptsYAML, 1))
	m := manage(t, path)
	outcomes := follow(t, m)

	overwrite(t, path, fmt.Sprintf(attemptsYAML, 3))
	await(t, outcomes, "written in place", attempts(3))

	rename(t, path, fmt.Sprintf(attemptsYAML, 4))
	await(t, outcomes, "written elsewhere and renamed", attempts(4))

	// An editor that moves the old file away before it writes the new one.
	if err := os.Rename(path, path+"~"); err != nil {
		t.Fatal(err)
	}
	overwrite(t, path, fmt.Sprintf(attemptsYAML, 5))
	await(t, outcomes, "old file moved away", attempts(5))

	overwrite(t, path, "client: {attempts: none}")
	o := await(t, outcomes, "bad file", refused("client.attempts"))
	if o.c.Client.Attempts != 5 || m.Config() != o.c {
		t.Errorf("a bad file changed the configuration: %+v", o.c.Client)
	}
	rename(t, path, fmt.Sprintf(attemptsYAML, 6))
	await(t, outcomes, "mended", attempts(6))

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	o = await(t, outcomes, "removed", refused("no such file"))
	if o.c.Client.Attempts != 6 {
		t.Errorf("a removed file changed the configuration: %+v", o.c.Client)
	}
	overwrite(t, path, fmt.Sprintf(attemptsYAML, 7))
	await(t, outcomes, "made anew", attempts(7))

	// Truncate, wait until that has been seen, then write.
	overwrite(t, path, "")
	o = await(t, outcomes, "truncated", refused("it is empty"))
	if o.c.Client.Attempts != 7 {
		t.Errorf("an empty file changed the configuration: %+v", o.c.Client)
	}
	overwrite(t, path, fmt.Sprintf(attemptsYAML, 8))
	await(t, outcomes, "written after it was truncated", attempts(8))
}

// TestRunFollowsConfigMaps turns the link that Kubernetes turns: umbp.yaml → ..data/umbp.yaml, ..data → ..1.
func TestRunFollowsConfigMaps(t *testing.T) {
	dir := t.TempDir()
	publish := func(n int) {
		t.Helper()
		version := fmt.Sprintf("..%d", n)
		if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
			t.Fatal(err)
		}
		overwrite(t, filepath.Join(dir, version, "umbp.yaml"), fmt.Sprintf(attemptsYAML, n))
		if err := os.Symlink(version, filepath.Join(dir, "..tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(filepath.Join(dir, fmt.Sprintf("..%d", n-1))); err != nil {
			t.Fatal(err)
		}
	}
	publish(1)
	path := filepath.Join(dir, "umbp.yaml")
	if err := os.Symlink("..data/umbp.yaml", path); err != nil {
		t.Fatal(err)
	}
	m := manage(t, path)
	outcomes := follow(t, m)
	for n := 3; n < 6; n++ {
		publish(n)
		o := await(t, outcomes, "ConfigMap", func(o outcome) bool { return true })
		if o.err != nil || o.c.Client.Attempts != n {
			t.Errorf("version %d: got %d, %v", n, o.c.Client.Attempts, o.err)
		}
	}
}

// TestRunFollowsALinkToAnotherFolder changes the file that the configuration links to.
func TestRunFollowsALinkToAnotherFolder(t *testing.T) {
	first := write(t, "a.yaml", fmt.Sprintf(attemptsYAML, 1))
	second := write(t, "b.yaml", fmt.Sprintf(attemptsYAML, 4))
	path := filepath.Join(t.TempDir(), "umbp.yaml")
	if err := os.Symlink(first, path); err != nil {
		t.Fatal(err)
	}
	outcomes := follow(t, manage(t, path))
	overwrite(t, first, fmt.Sprintf(attemptsYAML, 3))
	await(t, outcomes, "change behind the link", attempts(3))
	if err := os.Symlink(second, path+".new"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	await(t, outcomes, "link to another file", attempts(4))
	overwrite(t, second, fmt.Sprintf(attemptsYAML, 5))
	await(t, outcomes, "change behind the new link", attempts(5))
}

// TestRunOutlivesTheFolder removes the folder of the file and makes it anew.
func TestRunOutlivesTheFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etc")
	path := filepath.Join(dir, "umbp.yaml")
	make := func(n int) {
		t.Helper()
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		overwrite(t, path, fmt.Sprintf(attemptsYAML, n))
	}
	make(1)
	outcomes := follow(t, manage(t, path))
	overwrite(t, path, fmt.Sprintf(attemptsYAML, 3))
	await(t, outcomes, "the watch stands", attempts(3))
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	await(t, outcomes, "folder removed", refused("watch"))
	make(4)
	await(t, outcomes, "folder made anew", attempts(4))
	overwrite(t, path, fmt.Sprintf(attemptsYAML, 5))
	await(t, outcomes, "the watch stands again", attempts(5))
}

// TestRunLooksWithoutBeingTold covers file systems that report nothing: the folder is a link that is turned to
// another folder, which no watch on the first can see.
func TestRunLooksWithoutBeingTold(t *testing.T) {
	base := t.TempDir()
	for n := 3; n < 5; n++ {
		dir := filepath.Join(base, fmt.Sprint(n))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		overwrite(t, filepath.Join(dir, "umbp.yaml"), fmt.Sprintf(attemptsYAML, n))
	}
	link := filepath.Join(base, "current")
	if err := os.Symlink("3", link); err != nil {
		t.Fatal(err)
	}
	m := manage(t, filepath.Join(link, "umbp.yaml"))
	m.idle = 20 * time.Millisecond
	outcomes := follow(t, m)
	if err := os.Symlink("4", link+".new"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(link+".new", link); err != nil {
		t.Fatal(err)
	}
	await(t, outcomes, "folder turned", attempts(4))
}

// TestLookWaitsUntilTheContentStandsStill sees content grow: only what was there twice is loaded.
func TestLookWaitsUntilTheContentStandsStill(t *testing.T) {
	path := write(t, "umbp.yaml", fmt.Sprintf(attemptsYAML, 1))
	m := manage(t, path)
	reloads := 0
	w := watcher{Manager: m, onChange: func(*Config, Change, error) { reloads++ }}
	step := func(text string, settled bool, wantAttempts int) {
		t.Helper()
		if text != "" {
			overwrite(t, path, text)
		}
		if got := w.look(); got != settled {
			t.Errorf("%q: settled %v, want %v", text, got, settled)
		}
		if got := m.Config().Client.Attempts; got != wantAttempts {
			t.Errorf("%q: attempts are %d, want %d", text, got, wantAttempts)
		}
	}
	step("", true, 1)
	step("version: 1\n", false, 1)
	step("version: 1\nclient: {attempts: 3}\n", false, 1)
	step("version: 1\nclient: {attempts: 3}\nlog: {level: warn}\n", false, 1)
	step("", true, 3)
	step("", true, 3)
	if reloads != 1 {
		t.Errorf("%d reloads of a file that was written once", reloads)
	}
	// Content that comes and goes again was never there.
	step("version: 1\n", false, 3)
	step("version: 1\nclient: {attempts: 3}\nlog: {level: warn}\n", true, 3)
	step("version: 1\n", false, 3)
	if reloads != 1 {
		t.Errorf("%d reloads", reloads)
	}
}

// TestRunOutlivesABrokenWatch breaks the watch as the kernel does when its queue overflows, and then has none to
// give.
func TestRunOutlivesABrokenWatch(t *testing.T) {
	path := write(t, "umbp.yaml", fmt.Sprintf(attemptsYAML, 1))
	m := manage(t, path)
	watches := make(chan *fsnotify.Watcher, 100)
	var none atomic.Bool
	m.newWatch = func() (*fsnotify.Watcher, error) {
		if none.Load() {
			return nil, errors.New("too many open files")
		}
		w, err := fsnotify.NewWatcher()
		watches <- w
		return w, err
	}
	outcomes := follow(t, m)
	(<-watches).Errors <- fsnotify.ErrEventOverflow
	await(t, outcomes, "overflow", refused("queue or buffer overflow"))
	second := <-watches
	overwrite(t, path, fmt.Sprintf(attemptsYAML, 3))
	await(t, outcomes, "change after the overflow", attempts(3))

	none.Store(true)
	second.Errors <- fsnotify.ErrEventOverflow
	await(t, outcomes, "no watch to be had", refused("too many open files"))
	overwrite(t, path, fmt.Sprintf(attemptsYAML, 4))
	await(t, outcomes, "change without a watch", attempts(4))
	none.Store(false)
	<-watches
	overwrite(t, path, fmt.Sprintf(attemptsYAML, 5))
	await(t, outcomes, "change after all that", attempts(5))
}

func TestRunWithoutAFile(t *testing.T) {
	outcomes := follow(t, manage(t, ""))
	select {
	case o := <-outcomes:
		t.Errorf("got %+v", o)
	default:
	}
}
