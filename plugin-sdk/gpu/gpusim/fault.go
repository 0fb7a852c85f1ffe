package gpusim

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Call is what a fault strikes.
type Call int

// Copies are the asynchronous ones only, each copy of a batch for itself: faults let synchronous ones pass.
const (
	Copies Call = iota
	Allocations
	Exports // getting a handle
	Imports // opening one
	Registrations
	Streams // making them
	Events  // making them
	Records // of events
	Peers   // enabling access
)

// Effect is what happens to a call that is struck. What is not a copy can only be refused.
type Effect int

const (
	// Refuse: the call returns the code.
	Refuse Effect = iota
	// Fail: the call returns success, and the copy does not happen. Events that are recorded after it in its stream answer
	// with the code, until somebody has waited for the stream and was told the code, too.
	Fail
	// Lose: the call returns success, and when the copy's turn comes, the device of its stream is lost: nothing happens on it
	// any more, and all calls on it answer with the code, for as long as the process lives.
	Lose
	// Corrupt: the copy happens, with one wrong byte.
	Corrupt
	// Stall: the copy happens after the next call of SetFaults.
	Stall
	// Slow: the copy takes as long as Fault.Rate says.
	Slow
)

// Host is host memory, as Fault.From and Fault.To name it.
const Host = "host"

// maxFaults is what the library has room for.
const maxFaults = 32

// Fault says what is to go wrong, in every process on the machine. Each process counts for itself.
type Fault struct {
	Effect Effect
	Call   Call
	// From and To say between which places the copies are that are struck: PCI addresses, or Host; empty: any. For other
	// calls, From is the device of the calling thread.
	From, To string
	// Address and Bytes, if Bytes is not zero, say which memory the copies touch that are struck: device memory by its
	// address in the process that allocated it, host memory by its address in the process that copies.
	Address, Bytes uint64
	// After is how many calls that match are let pass; then Times are struck, or all if it is zero.
	After, Times int
	// Code is what the call, or an event, answers. Zero: 719 for Lose, which is a failed launch; 2, out of memory, for
	// Allocations; else 999, unknown.
	Code int
	// Rate is how many bytes per second a slow copy moves.
	Rate uint64
}

// SetFaults replaces all faults: nothing counts any more that was counted, and what stalled goes on. Calls that begin after
// it has returned find the new faults. Without arguments, everything works, but for devices that are lost.
func (s *Sim) SetFaults(faults ...Fault) {
	s.tb.Helper()
	if len(faults) > maxFaults {
		s.tb.Fatalf("%d faults; a simulated machine has room for %d", len(faults), maxFaults)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.edition++
	var b strings.Builder
	fmt.Fprintln(&b, s.edition)
	for _, f := range faults {
		fmt.Fprintln(&b, int(f.Effect), int(f.Call), s.place(f.From), s.place(f.To), f.Address, f.Bytes, f.After, f.Times, f.code(), f.Rate)
	}
	s.write("faults.new", []byte(b.String()))
	if err := os.Rename(filepath.Join(s.Dir, "faults.new"), filepath.Join(s.Dir, "faults")); err != nil {
		s.tb.Fatal(err)
	}
	if err := s.publish(); err != nil {
		s.tb.Fatal(err)
	}
}

// publish tells the processes that there is a new edition. The file is never cut, since they have it mapped.
func (s *Sim) publish() error {
	f, err := os.OpenFile(filepath.Join(s.Dir, "edition"), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(binary.NativeEndian.AppendUint64(nil, s.edition), 0)
	return errors.Join(err, f.Close())
}

func (f Fault) code() int {
	code := 999
	switch {
	case f.Effect == Lose:
		code = 719
	case f.Call == Allocations:
		code = 2
	}
	return cmp.Or(f.Code, code)
}

// place returns the number by which the library knows a place.
func (s *Sim) place(name string) int {
	s.tb.Helper()
	switch name {
	case "":
		return -2
	case Host:
		return -1
	}
	n := slices.IndexFunc(s.Devices, func(d Device) bool { return d.PCI == name })
	if n < 0 {
		s.tb.Fatalf("a fault names %s; the simulated machine has no such device", name)
	}
	return n
}
