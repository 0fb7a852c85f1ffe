// Package device is the narrow interface between the RDMA backend and what carries out its work requests: the devices
// of this machine (package verbs), or simulated ones (package verbstest).
//
// It has the words of verbs, and no more of verbs than the backend needs: reliable connections (RC), one-sided RDMA
// writes and reads. A work request (WR) names one contiguous remote range and a list of local ranges (SGEs). Work
// requests are posted to a queue pair (QP) in chains, and those that are signaled are answered in its completion queue
// (CQ) when they, and all that were posted to the queue pair before them, are done. After an error, every work request
// that is left is answered, as flushed, signaled or not.
//
// Objects are closed in the reverse order of their making: queue pairs before their completion queue, memory regions
// and completion queues before the device. Methods may be called from any goroutine unless they say otherwise, and
// none blocks but CQ.Wait, Device.NextEvent and what sets up and closes.
package device

import (
	"fmt"
	"syscall"
	"time"
)

// Library is one way to reach devices. Making one touches nothing: the first call of Devices loads what is needed.
type Library interface {
	// Name is what people call it, with its version once it is loaded: "libibverbs.so.1", "simulated verbs".
	Name() string
	// Simulated says that there is no hardware, and no driver, behind the devices.
	Simulated() bool
	// Devices lists the devices of this machine by name. The error is *Missing when there is no library to ask. An empty
	// list is not an error.
	Devices() ([]string, error)
	// Open opens a device. Opened twice, it is two devices to the backend.
	Open(name string) (Device, error)
	// Fork says whether registered memory survives a fork of this process.
	Fork() Fork
	// NewChain returns an empty chain with room for so many work requests and SGEs, off the Go heap. Close frees it.
	NewChain(wrs, sges int) *Chain
	// Calls is how often the data path has crossed into the library: posts, polls, and what waits for completions.
	Calls() uint64
}

// Fork is what the library does about fork.
type Fork uint8

// The states of fork safety.
const (
	ForkUnneeded Fork = iota // the kernel copies registered pages at fork
	ForkEnabled              // the library keeps registered pages out of the child, at a cost for each registration
	ForkDisabled             // a fork may take registered pages away from the device
)

// Device is an opened device, with one protection domain.
type Device interface {
	Attr() Attr
	// Port asks for the present state of a port, counted from 1.
	Port(number int) (Port, error)
	// GIDs lists the addresses of a port that are set.
	GIDs(port int) ([]GID, error)
	// Register pins memory, which must be off the Go heap, and gives the device access to it.
	Register(memory []byte, access Access) (MR, error)
	// CreateCQ makes a completion queue with room for at least so many completions.
	CreateCQ(entries int) (CQ, error)
	// CreateQP makes an RC queue pair in the state Reset. All it sends and receives is answered in cfg.CQ.
	CreateQP(cfg QPConfig) (QP, error)
	// NextEvent waits for the next asynchronous event. It returns os.ErrClosed once Close has been called.
	NextEvent() (Event, error)
	// Close frees the device. Every object made of it must be closed before.
	Close() error
}

// Attr is what a device is and what it allows.
type Attr struct {
	Name     string
	Firmware string
	Ports    int

	MaxQP, MaxCQ, MaxMR int
	MaxCQE              int    // entries of one CQ
	MaxMRSize           uint64 // bytes of one memory region
	MaxWR               int    // work requests in one send queue; what a QP is granted may be less
	MaxSGE              int    // SGEs in one work request that is not a read
	MaxSGERead          int    // SGEs in one RDMA read
	MaxReadsServed      int    // reads that one QP serves at once, as target (max_qp_rd_atom)
	MaxReadsInitiated   int    // reads that one QP has outstanding, as initiator (max_qp_init_rd_atom)
}

// Link is what a port is plugged into.
type Link uint8

// The links.
const (
	LinkUnknown Link = iota
	InfiniBand
	Ethernet
)

func (l Link) String() string {
	switch l {
	case InfiniBand:
		return "InfiniBand"
	case Ethernet:
		return "Ethernet"
	}
	return "unknown link"
}

// Port is one port of a device, as it was when it was asked for.
type Port struct {
	Number     int
	Active     bool
	State      string // in words: "ACTIVE", "DOWN", "INIT", "ARMED"
	Link       Link
	MTU        int    // bytes, as it is active
	MaxMessage uint64 // bytes in one work request
	LID        uint16
	GIDs       int // length of the table of GIDs
	Rate       int // Mbit/s, zero when the device does not tell
}

// GIDType is the protocol that a GID stands for.
type GIDType uint8

// The types.
const (
	GIDInfiniBand GIDType = iota
	GIDRoCEv1
	GIDRoCEv2
)

func (t GIDType) String() string {
	switch t {
	case GIDRoCEv1:
		return "RoCEv1"
	case GIDRoCEv2:
		return "RoCEv2"
	}
	return "InfiniBand"
}

// GID is an address of a port.
type GID struct {
	Index     int
	Addr      [16]byte // an IPv6 address, or an IPv4 address within ::ffff:0:0/96
	Type      GIDType
	Interface string // the network interface that it belongs to, where the library tells
}

// Access is what the device may do with memory. Local reading is always allowed.
type Access uint8

// The rights; RemoteWrite needs LocalWrite.
const (
	LocalWrite Access = 1 << iota
	RemoteWrite
	RemoteRead
)

// MR is registered memory.
type MR interface {
	LKey() uint32
	RKey() uint32
	// Close unpins the memory. When it returns nil, no peer can reach it any more.
	Close() error
}

// CQ is a completion queue with a channel that tells of new completions.
type CQ interface {
	// Entries is how many completions there is room for. A CQ that overflows is lost, with its QPs.
	Entries() int
	// Poll returns the completions that are there, MaxPoll at most. The slice is good until the next Poll. One goroutine
	// at a time may poll.
	Poll() ([]Completion, error)
	// Arm asks for an event at the next completion. One that came before Arm causes none, so poll once more after it.
	Arm() error
	// Wait blocks until an event has come since the last Wait, Wake was called, or the deadline has passed; a zero
	// deadline never does. It says nothing about which: the caller polls in any case. One goroutine at a time may wait.
	Wait(deadline time.Time) error
	// Wake makes a Wait that runs, or the next one, return.
	Wake()
	Close() error
}

// MaxPoll is the most completions that one CQ.Poll returns.
const MaxPoll = 64

// Completion answers a work request.
type Completion struct {
	ID     uint64 // of the work request; it means something also when Status is not Success
	QPN    uint32 // of the queue pair
	Status Status
	Vendor uint32 // the device's own word for an error
}

// Status is the fate of a work request, with the numbers of enum ibv_wc_status.
type Status uint32

// The states that the backend tells apart.
const (
	Success          Status = 0
	LocalLength      Status = 1
	LocalQPOperation Status = 2
	LocalProtection  Status = 4
	Flushed          Status = 5
	RemoteInvalid    Status = 9
	RemoteAccess     Status = 10
	RemoteOperation  Status = 11
	RetriesExceeded  Status = 12
	RNRExceeded      Status = 13
	FatalError       Status = 20
)

func (s Status) String() string {
	switch s {
	case Success:
		return "success"
	case LocalLength:
		return "local length error"
	case LocalQPOperation:
		return "local queue pair operation error"
	case LocalProtection:
		return "local protection error"
	case Flushed:
		return "flushed"
	case RemoteInvalid:
		return "remote invalid request"
	case RemoteAccess:
		return "remote access error"
	case RemoteOperation:
		return "remote operation error"
	case RetriesExceeded:
		return "transport retries exceeded"
	case RNRExceeded:
		return "receiver-not-ready retries exceeded"
	case FatalError:
		return "fatal device error"
	}
	return fmt.Sprintf("work completion status %d", uint32(s))
}

// QPConfig is what a queue pair is asked to be.
type QPConfig struct {
	CQ      CQ
	SendWRs int // work requests in its send queue
	SGEs    int // SGEs in one of them
}

// Caps is what a queue pair was granted. It may be more than was asked for.
type Caps struct {
	SendWRs, SGEs int
}

// QP is an RC queue pair. It goes from Reset through Init, ReadyToReceive and ReadyToSend; Fail ends it.
type QP interface {
	Num() uint32 // 24 bits
	Caps() Caps
	Init(port int, access Access) error
	ReadyToReceive(a ReceiveAttr) error
	ReadyToSend(a SendAttr) error
	// Fail moves the queue pair to the state Error: what is outstanding is flushed, and the device ends sending and
	// serving.
	Fail() error
	// Post hands the chain to the device, in order and with one doorbell, and returns how many of its first work
	// requests were taken. All of them were when the error is nil. One goroutine at a time may post. The chain is the
	// caller's again when Post returns.
	Post(c *Chain) (taken int, err error)
	// Close destroys the queue pair. When it returns, the device touches no memory for it any more, and no completion of
	// it is to be had.
	Close() error
}

// ReceiveAttr is what a queue pair needs to receive from another one.
type ReceiveAttr struct {
	Port, GIDIndex int
	RemoteGID      [16]byte
	RemoteLID      uint16 // on InfiniBand
	RemoteQPN      uint32
	RemotePSN      uint32 // 24 bits: the first packet that the other end sends
	MTU            int    // bytes: 256, 512, 1024, 2048 or 4096
	ReadsServed    int    // at once
	MinRNRTimer    int    // 0 to 31, encoded as in verbs
	TrafficClass   int
	ServiceLevel   int
	HopLimit       int
	Link           Link
}

// SendAttr is what a queue pair needs to send.
type SendAttr struct {
	PSN            uint32 // 24 bits
	Timeout        int    // for an acknowledgement: 4.096 µs × 2^Timeout, 1 to 31
	Retries        int    // of a request that is not acknowledged, 0 to 7; 7 means for ever to soft-RoCE
	RNRRetries     int    // 0 to 6; 7 would mean for ever
	ReadsInitiated int    // outstanding at once
}

// Op is what a work request does.
type Op uint8

// The operations.
const (
	Write Op = iota
	Read
)

// WR is a work request. C code reads it as it is laid out here.
type WR struct {
	ID       uint64
	Remote   uint64 // address, as the target's device knows it
	RKey     uint32
	FirstSGE uint32 // index in Chain.SGEs
	SGEs     uint16
	Op       Op
	Signaled bool
	_        uint32
}

// SGE is one local range. It is laid out as struct ibv_sge.
type SGE struct {
	Addr   uint64
	Length uint32 // bytes; zero is not allowed
	LKey   uint32
}

// Chain is a list of work requests, off the Go heap. A user appends to WRs and SGEs within their capacities, and
// truncates them for the next use.
type Chain struct {
	WRs   []WR
	SGEs  []SGE
	Close func()
}

// EventKind says what happened to a device.
type EventKind uint8

// The kinds of events.
const (
	OtherEvent EventKind = iota
	DeviceFatal
	PortDown
	PortUp
	GIDChange
	QPFailed
	CQFailed
)

func (k EventKind) String() string {
	switch k {
	case DeviceFatal:
		return "device fatal"
	case PortDown:
		return "port down"
	case PortUp:
		return "port up"
	case GIDChange:
		return "GIDs changed"
	case QPFailed:
		return "queue pair failed"
	case CQFailed:
		return "completion queue failed"
	}
	return "other event"
}

// Event is something that happened to a device by itself. Work requests may be lost by it without a completion.
type Event struct {
	Kind EventKind
	Port int    // of PortDown, PortUp, GIDChange
	QPN  uint32 // of QPFailed
	CQ   CQ     // of CQFailed; nil when it is closed already
	Text string // as the library names it
}

// Error is a call that a device refused.
type Error struct {
	Device string
	Op     string // "register", "create queue pair", "ready to receive"
	Errno  syscall.Errno
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %s: %s", e.Device, e.Op, e.Errno.Error()) }

// Unwrap returns the number, for errors.Is.
func (e *Error) Unwrap() error { return e.Errno }

// Missing says that devices cannot even be looked for.
type Missing struct {
	What   string // what is not there
	Remedy string // what to do about it
}

func (e *Missing) Error() string { return e.What + "; " + e.Remedy }
