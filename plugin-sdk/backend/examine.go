package backend

import (
	"fmt"
	"strconv"
)

// Finding is one thing that Factory.Examine has looked at.
type Finding struct {
	// Subject is what was looked at, in a few words: "library", "device mlx5_0", "locked memory".
	Subject string `json:"subject"`
	// State says what it means for the backend.
	State FindingState `json:"state"`
	// Text is what was found, Remedy what to do about it; there is none where all is fine.
	Text   string `json:"text"`
	Remedy string `json:"remedy,omitempty"`
}

// FindingState says what a finding means for the backend.
type FindingState uint8

// The states, from good to bad.
const (
	Fine    FindingState = iota
	Warning              // the backend works, but worse than it could, or not with everything
	Problem              // the backend does not work
)

// String returns "fine", "warning" or "problem".
func (s FindingState) String() string {
	switch s {
	case Fine:
		return "fine"
	case Warning:
		return "warning"
	case Problem:
		return "problem"
	}
	return "state-" + strconv.Itoa(int(s))
}

// MarshalText returns what String does.
func (s FindingState) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what String returns.
func (s *FindingState) UnmarshalText(text []byte) error {
	for _, known := range []FindingState{Fine, Warning, Problem} {
		if string(text) == known.String() {
			*s = known
			return nil
		}
	}
	return fmt.Errorf("a finding is fine, warning or problem, and not %.40q", text)
}

// Counter is implemented by backends that count what they do. It is optional.
type Counter interface {
	// Counters returns what was counted since the backend was opened, always under the same names and in the same order,
	// and nothing when that cannot be had at present. It may take a second where the backend is another process. It may be
	// called at any time, also after Close.
	Counters() []Count
}

// Count is how often something has happened. It never goes back.
type Count struct {
	// Name is made of lower-case letters, digits and underscores: "work_requests".
	Name  string
	Value uint64
}
