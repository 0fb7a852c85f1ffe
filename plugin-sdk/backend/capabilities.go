package backend

// Info says what a backend is.
type Info struct {
	Name         string // as in Factory.Name
	Version      string // of the implementation, for people
	Capabilities Capabilities
}

// Capabilities is what a backend claims. Everything claimed works, everything else is refused with
// ErrUnsupported: hosts choose backends by these claims, and the conformance suite tries each of them.
type Capabilities struct {
	Ops    Op            // operations, joined by |
	Local  MemoryKindSet // kinds of memory that may be the near end
	Remote MemoryKindSet // kinds of memory that may be the far end
	Reach  Reach
	// Links lists the pairs of places between which the backend moves bytes, where it cannot between all: two GPUs may
	// share a host and no link. Nil says that it can wherever Local, Remote and Reach allow.
	Links []Link
	// NeedsFD says that a region can be reached by peers only if its Memory has a file descriptor.
	NeedsFD bool
	Limits  Limits
	// Window is how many transfers one endpoint accepts before it says Busy. Never zero. A transfer leaves the window
	// before its Complete is called, so that a host that posts from within Complete finds room.
	Window int
	// Simulated says that the backend moves no real bytes, or moves them over a simulated device.
	Simulated bool
}

// Link is a pair of places that a backend can move bytes between. A place is the PCI address of a GPU, as in
// 0000:c1:00.0, or nothing: the memory of the host.
type Link struct {
	Near, Far string
	// Cost compares the links of one backend: the bytes take the longer the more it is. What it counts is the backend's
	// affair, such as hops. Zero is the least.
	Cost int
	// Text says what the link is: "same GPU", "XGMI, 1 hop".
	Text string
}

// ValidPlace tells whether a text may be a place: it has at most MaxPlace bytes, all of them printable ASCII, since peers and
// plugins say where they have memory, and people read it. It need not be a PCI address.
func ValidPlace(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return len(s) <= MaxPlace
}

// Link returns the link between two places, and whether there is one. Where Links is nil, there always is one of no
// cost and no words.
func (c *Capabilities) Link(near, far string) (Link, bool) {
	if c.Links == nil {
		return Link{Near: near, Far: far}, true
	}
	for _, l := range c.Links {
		if l.Near == near && l.Far == far {
			return l, true
		}
	}
	return Link{}, false
}

// MemoryKindSet is a set of memory kinds.
type MemoryKindSet uint8

// Kinds returns the set of the kinds given.
func Kinds(kinds ...MemoryKind) MemoryKindSet {
	var s MemoryKindSet
	for _, k := range kinds {
		s |= 1 << k
	}
	return s
}

// Has tells whether k is in the set.
func (s MemoryKindSet) Has(k MemoryKind) bool { return s&(1<<k) != 0 }

// Reach is how far apart two ends may be.
type Reach uint8

// Each reach includes those before it.
const (
	SameProcess Reach = 1 + iota
	SameHost
	Network
)

// String returns the reach in words.
func (r Reach) String() string {
	switch r {
	case SameProcess:
		return "same process"
	case SameHost:
		return "same host"
	case Network:
		return "network"
	}
	return "unknown reach"
}

// Limits bounds one transfer. Zero means no limit of the backend's own.
type Limits struct {
	Segments      int    // segments in one transfer
	SegmentBytes  uint64 // bytes in one segment
	TransferBytes uint64 // bytes in one transfer
}

// Tighten returns the limits that satisfy both l and m.
func (l Limits) Tighten(m Limits) Limits {
	return Limits{
		Segments:      tighter(l.Segments, m.Segments),
		SegmentBytes:  tighter(l.SegmentBytes, m.SegmentBytes),
		TransferBytes: tighter(l.TransferBytes, m.TransferBytes),
	}
}

func tighter[T int | uint64](a, b T) T {
	if a == 0 || (b != 0 && b < a) {
		return b
	}
	return a
}
