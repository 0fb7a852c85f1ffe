package region

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"os"
	"sync"
)

// NewIncarnation draws the number by which one start of a process is told from every other. It is random, not
// counted: a process that has lost its disk, or starts twice in one second, still differs. It is never zero.
func NewIncarnation() uint64 {
	var b [8]byte
	for {
		rand.Read(b[:]) // never fails: it ends the program where the kernel gives no randomness
		if n := binary.NativeEndian.Uint64(b[:]); n != 0 {
			drawn.Store(n, nil)
			return n
		}
	}
}

// drawn holds the incarnations that this process has drawn: a handful, also in a program that holds many nodes.
var drawn sync.Map

// SameProcess tells whether an incarnation is one of this process, which may hold several nodes.
func SameProcess(incarnation uint64) bool {
	_, here := drawn.Load(incarnation)
	return here
}

// hostFacts are read to name the machine and the namespaces that decide whether two processes can meet: the
// boot id differs between kernels and between boots of one, unix sockets are found through the network
// namespace (abstract names) or the mount namespace (paths).
var hostFacts = []func() (string, error){
	func() (string, error) {
		b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		return string(b), err
	},
	func() (string, error) { return os.Readlink("/proc/self/ns/net") },
	func() (string, error) { return os.Readlink("/proc/self/ns/mnt") },
}

// HostID names the machine and its namespaces: two processes that get the same non-empty text run on one kernel
// and can pass descriptors of memory to each other. Two containers on one machine differ unless they share their
// network and mount namespaces, which costs them the short way between them and never correctness. It is 16
// hexadecimal digits, the same for every process until the machine boots again, and empty where the kernel does
// not tell.
func HostID() string {
	h := sha256.New()
	for _, fact := range hostFacts {
		text, err := fact()
		if err != nil {
			return ""
		}
		h.Write([]byte(text + "\n"))
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}
