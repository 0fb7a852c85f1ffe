package verbstest

import (
	"slices"

	"github.com/umbp/umbp/plugins/rdma/device"
)

// Counts are what happened on a fabric since it was made.
type Counts struct {
	Posts    uint64 // calls of Post
	WRs      uint64 // that were taken
	SGEs     uint64 // of them
	Signaled uint64 // of the WRs
	Polled   uint64 // completions
	Bytes    uint64 // that moved, or would have under NoBytes
}

// Post is one call of QP.Post.
type Post struct {
	Device string
	QPN    uint32
	WRs    []device.WR // as in the chain, taken or not
	SGEs   []device.SGE
	Taken  int
	Err    error
}

// Counts returns the counts.
func (f *Fabric) Counts() Counts {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts
}

// Record starts to keep every post, or starts anew.
func (f *Fabric) Record() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.record, f.posts = true, nil
}

// Posts returns what was recorded.
func (f *Fabric) Posts() []Post {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.posts)
}

func (f *Fabric) count(q *queuePair, c *device.Chain, taken int, err error) {
	f.counts.Posts++
	f.counts.WRs += uint64(taken)
	for i := range c.WRs[:taken] {
		f.counts.SGEs += uint64(c.WRs[i].SGEs)
		if c.WRs[i].Signaled {
			f.counts.Signaled++
		}
	}
	if f.record {
		f.posts = append(f.posts, Post{
			Device: q.dev.hw.config.Name, QPN: q.num,
			WRs: slices.Clone(c.WRs), SGEs: slices.Clone(c.SGEs), Taken: taken, Err: err,
		})
	}
}

// Objects are what is open on a fabric.
type Objects struct {
	Devices, Regions, CQs, QPs int
}

// Objects returns how many there are of each. A test that has closed everything finds the zero value.
func (f *Fabric) Objects() Objects {
	f.mu.Lock()
	defer f.mu.Unlock()
	var o Objects
	for _, hw := range f.hardware {
		o.Devices += len(hw.opened)
		o.Regions += len(hw.lkeys)
		o.CQs += len(hw.cqs)
		o.QPs += len(hw.qps)
	}
	return o
}

// QP is what a queue pair was made into.
type QP struct {
	Num         uint32
	State       State
	Caps        device.Caps
	Port        int
	Access      device.Access
	Receive     device.ReceiveAttr
	Send        device.SendAttr
	Outstanding int // work requests without an answer
}

// QPs returns the queue pairs of a device by number.
func (f *Fabric) QPs(name string) []QP {
	hw := f.named(name)
	f.mu.Lock()
	defer f.mu.Unlock()
	var qps []QP
	for _, q := range hw.qps {
		qps = append(qps, QP{
			Num: q.num, State: q.state, Caps: q.caps, Port: q.port, Access: q.access,
			Receive: q.receive, Send: q.send, Outstanding: int(q.tail - q.next),
		})
	}
	slices.SortFunc(qps, func(a, b QP) int { return int(a.Num) - int(b.Num) })
	return qps
}
