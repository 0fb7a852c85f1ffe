package conformance

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/umbp/umbp/plugin-sdk/backend"
)

// kill ends the node's process, and says nothing to it before.
func (n *node) kill() {
	n.killed = true
	if err := unix.Kill(n.process.PID(), unix.SIGKILL); err != nil {
		n.r.Fatalf("kill process %d of the %s: %v", n.process.PID(), n.peer.Node, err)
	}
}

// doomed kills one end of a connection with transfers in flight. Every one completes, and the memory of the initiator
// is quiet; that of the target is after quiet has returned.
func (r *rig) doomed(op backend.Op, from, to, dies *node, quiet func()) {
	endpoint := r.connect(from, to)
	l := r.session(endpoint, from.area(large, 0), to.area(large, allRights))
	all := l.stress(op, 6)
	dies.kill()
	r.await("Endpoint.Done when the process of the "+dies.peer.Node+" was killed", endpoint.Done())
	l.waitAll(all)
	for _, p := range all {
		if p.err != nil {
			r.identity("a "+op.String()+" when a process was killed", p.err, backend.PathDown, backend.PeerGone)
		}
	}
	near := l.near.refill()
	quiet()
	far := l.far.refill()
	time.Sleep(settle)
	l.near.unchanged(near, "a "+op.String()+" touched memory after it had completed because a process was killed")
	l.far.unchanged(far, "a "+op.String()+" touched the target's memory after a process was killed")
	l.refuses("after a process was killed", backend.PathDown, backend.PeerGone)
}

func deathOfTarget(r *rig) {
	if r.target.process == nil {
		r.Skipf("the ends run in this process")
	}
	l := r.link(small)
	for _, op := range r.ops() {
		target := r.open("doomed target", r.h.NewFarMemory)
		r.doomed(op, r.initiator, target, target, func() {})
		l.move(op, []backend.Segment{{Length: small}}, "after another peer's process was killed")
	}
}

func deathOfInitiator(r *rig) {
	if r.target.process == nil {
		r.Skipf("the ends run in this process")
	}
	l := r.link(small)
	for _, op := range r.ops() {
		initiator := r.open("doomed initiator", r.h.NewMemory)
		r.doomed(op, initiator, r.target, initiator, func() { r.target.fence(initiator) })
		l.move(op, []backend.Segment{{Length: small}}, "after another peer's process was killed")
	}
}

// holding is what a process holds, by name.
type holding map[string]int

// holdings counts what the process of a node holds; of this process where that is nil.
func (r *rig) holdings(n *node) holding {
	process := "/proc/self/"
	if n != nil {
		process = fmt.Sprintf("/proc/%d/", n.process.PID())
	}
	entries := func(dir string) int {
		list, err := os.ReadDir(process + dir)
		if err != nil {
			r.Fatalf("count what a process holds: %v", err)
		}
		return len(list)
	}
	maps, err := os.ReadFile(process + "maps")
	if err != nil {
		r.Fatalf("count what a process holds: %v", err)
	}
	return holding{
		"descriptors": entries("fd"), "threads": entries("task"),
		"mappings of memory files": strings.Count(string(maps), "/memfd:"),
	}
}

// grown says what there is more of than before. Threads stay, once started, with many runtimes: only as many new ones
// as there were rounds count.
func grown(before, now holding, rounds int) string {
	var all []string
	for what, n := range now {
		if was := before[what]; n > was && (what != "threads" || n >= was+rounds) {
			all = append(all, fmt.Sprintf("%d %s, %d before", n, what, was))
		}
	}
	return strings.Join(all, "; ")
}

// eventually waits until f returns nothing, so long at most; what has closed its last channel still needs a moment to end.
func eventually(patience time.Duration, f func() string) string {
	deadline := time.Now().Add(patience)
	for {
		text := f()
		if text == "" || time.Now().After(deadline) {
			return text
		}
		time.Sleep(time.Millisecond)
	}
}

// goroutines says whether there are more goroutines than before, and which there are.
func goroutines(before int) string {
	if now := runtime.NumGoroutine(); now > before {
		stacks := make([]byte, 1<<16)
		return fmt.Sprintf("%d goroutines, %d before; these run:\n%s", now, before, stacks[:runtime.Stack(stacks, true)])
	}
	return ""
}

// resourcesOfConnections makes and ends connections, sessions and regions between two backends that stay open.
func resourcesOfConnections(r *rig) {
	const rounds = 12
	near, far := r.initiator.lend(small, 0), r.target.lend(small, allRights)
	use := func() {
		near.remote.Region += 1000
		far.remote.Region += 1000
		near.register()
		far.register()
		endpoint := r.connect(r.initiator, r.target)
		l := r.session(endpoint, near, far)
		for _, op := range r.ops() {
			l.move(op, []backend.Segment{{Length: small}}, "while counting resources")
		}
		l.stress(r.ops()[0], 2) // close has something to end
		l.closeSession()
		near.deregister()
		r.closeEndpoint(endpoint)
		far.deregister()
	}
	owners := map[string]*node{"this process": nil}
	for _, n := range []*node{r.initiator, r.target} {
		if n.process != nil {
			owners["the process of the "+n.peer.Node] = n
		}
	}
	for range 3 {
		use() // what is set up once is there from now on
	}
	time.Sleep(settle)
	text := r.lasting(func(patience time.Duration) string {
		running, before := runtime.NumGoroutine(), map[string]holding{}
		for name, owner := range owners {
			before[name] = r.holdings(owner)
		}
		for range rounds {
			use()
		}
		var left []string
		for name, owner := range owners {
			if text := eventually(patience, func() string { return grown(before[name], r.holdings(owner), rounds) }); text != "" {
				left = append(left, name+" has "+text)
			}
		}
		if text := eventually(patience, func() string { return goroutines(running) }); text != "" {
			left = append(left, "there are "+text)
		}
		return strings.Join(left, "\n")
	})
	if text != "" {
		r.Errorf("after %d connections that were closed again:\n%s", rounds, text)
	}
}

// lasting tries several times whether something is left behind, and returns what the last attempt says. What a runtime
// starts on a whim, threads above all, it keeps and uses again, and what is only slow to end is there before the next
// attempt; a leak grows each time.
func (r *rig) lasting(try func(patience time.Duration) string) (text string) {
	soon := min(r.h.Patience, 2*time.Second)
	for _, patience := range []time.Duration{soon, soon, r.h.Patience} {
		if text = try(patience); text == "" {
			break
		}
	}
	return text
}

// resourcesOfBackends opens, uses and closes the backend some times more, and counts before and after. The case's own
// rig is the first time, so that what the process sets up once is there already.
func resourcesOfBackends(r *rig) {
	const rounds = 8 // with fewer, the threads that a runtime starts and ends on a whim look like one for each
	use := func() {
		extra := newRig(r.trial, r.h)
		defer func() {
			extra.close()
			for _, n := range extra.nodes {
				n.vanished()
			}
		}()
		extra.setUp()
		l := extra.link(small)
		for _, op := range extra.ops() {
			l.move(op, []backend.Segment{{Length: small}}, "while counting resources")
		}
		l.stress(extra.ops()[0], 2) // close has something to end
	}
	use()
	text := r.lasting(func(patience time.Duration) string {
		running, before := runtime.NumGoroutine(), r.holdings(nil)
		for range rounds {
			use()
		}
		var left []string
		if text := eventually(patience, func() string { return goroutines(running) }); text != "" {
			left = append(left, "there are "+text)
		}
		if text := eventually(patience, func() string { return grown(before, r.holdings(nil), rounds) }); text != "" {
			left = append(left, "this process has "+text)
		}
		return strings.Join(left, "\n")
	})
	if text != "" {
		r.Errorf("after backends were closed:\n%s", text)
	}
}

// vanished wants the process of a backend that is closed to be gone.
func (n *node) vanished() {
	if n.process == nil {
		return
	}
	text := eventually(n.r.h.Patience, func() string {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", n.process.PID())); err == nil {
			return fmt.Sprintf("the process %d of the %s is still there after Backend.Close", n.process.PID(), n.peer.Node)
		}
		return ""
	})
	if text != "" {
		n.r.Fatalf("%s", text)
	}
}
